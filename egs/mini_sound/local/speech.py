"""Stage 0: real speech for the codec, by the scripts of mini_en: for training and for evaluation.

    python speech.py --work work [--shared-data DIR] [--github https://github.com]

Writes work/real/<source>/*.flac with work/real/<source>.jsonl and the same under work/eval. Where mini_en
has been run, make_cuts.py can read its work folder (--speech) and this isn't needed.
"""

import argparse
from pathlib import Path

from base import fail, hours, notice, write_flac, write_jsonl
from make_cuts import SPEECH, SPEECH_EVAL
from prepare_eval import SETS
from prepare_real import prepare_source


def evaluation(name: str, args: argparse.Namespace) -> list[dict]:
    """Write one evaluation set; returns its rows."""
    rows = []
    for clip, words, samples in SETS[name](args):
        path = args.work / "eval" / name / f"{clip}.flac"
        duration = round(write_flac(path, samples), 3)
        rows.append(
            {
                "path": f"{name}/{path.name}",
                "text": words,
                "source": name,
                "name": clip,
                "duration": duration,
            }
        )
    write_jsonl(args.work / "eval" / f"{name}.jsonl", rows)
    return rows


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
    for make, names in ((prepare_source, SPEECH), (evaluation, SPEECH_EVAL)):
        for name in names:
            try:
                rows = make(name, args)
            except FileNotFoundError as error:
                notice(f"{name} SKIPPED: {error}")
                continue
            print(f"{name:18s} {len(rows):6d} clips {hours(rows):6.2f} h")


if __name__ == "__main__":
    main()
