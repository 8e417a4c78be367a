"""Stage 1: find prose to be spoken and put it at work/synth/prose.txt.

    python find_prose.py --work work [--shared-data DIR] [--github https://github.com]

LJSpeech's normalised transcripts (public domain): from the shared folder, or from a repository that has its
metadata. Without either only this recipe's own templates are spoken, which is said loudly.
"""

import argparse
from pathlib import Path

from common import Repository, notice

METADATA = ("PhilippMatthes/dc_tts", "LJSpeech-1.1/metadata.csv")


def find(args: argparse.Namespace) -> bytes | None:
    shared = args.shared_data / "text_lj" / "sentences.txt" if args.shared_data else None
    if shared and shared.exists():
        return shared.read_bytes()
    try:
        return Repository(args.github, METADATA[0], args.work / "clones").read(METADATA[1])
    except FileNotFoundError as error:
        notice(f"no prose to speak, templates only: {error}")
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared-data", type=Path)
    parser.add_argument(
        "--github", default="https://github.com", help="server, or a folder of owner+name/repo mirrors"
    )
    args = parser.parse_args()
    text = find(args)
    if text is not None:
        path = args.work / "synth" / "prose.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


if __name__ == "__main__":
    main()
