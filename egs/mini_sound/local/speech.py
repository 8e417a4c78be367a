"""Stage 0: real speech for the codec, by the scripts of mini_en: for training and for evaluation.

    python speech.py --work work [--shared-data DIR] [--github https://github.com]

Writes work/real/<source>/*.flac with work/real/<source>.jsonl and the same under work/eval. Where mini_en
has been run, make_cuts.py can read its work folder (--speech) and this isn't needed.
"""

import argparse
from pathlib import Path

from base import fail, hours, notice
from make_cuts import SPEECH, SPEECH_EVAL
from prepare_eval import evaluation_set
from prepare_real import prepare_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared-data", type=Path, help="folder with librispeech251, coffee_commands ...")
    parser.add_argument(
        "--github", default="https://github.com", help="server, or a folder of owner+name/repo mirrors"
    )
    args = parser.parse_args()
    if args.shared_data and not args.shared_data.is_dir():
        fail(f"--shared-data {args.shared_data}: no such folder")
    args.speechocean_adults, args.wake_share, args.fsdd_takes = "drop", 0.0, 0  # options of prepare_real
    for make, names in ((prepare_source, SPEECH), (evaluation_set, SPEECH_EVAL)):
        for name in names:
            try:
                rows = make(name, args)
            except FileNotFoundError as error:
                notice(f"{name} SKIPPED: {error}")
                continue
            print(f"{name:18s} {len(rows):6d} clips {hours(rows):6.2f} h")


if __name__ == "__main__":
    main()
