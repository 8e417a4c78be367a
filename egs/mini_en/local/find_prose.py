"""Stage 1: find prose to be spoken and put it at work/synth/prose.txt.

    python find_prose.py --work work [--shared-data DIR] [--github https://github.com]

LJSpeech's transcripts (public domain): from the shared folder, or from a repository that lists them
(make_text.py leaves out those with figures). Without either only our own templates are spoken, which is
said loudly.
"""

import argparse
from pathlib import Path

from common import Repository, notice

FILELIST = ("NVIDIA/tacotron2", "filelists/ljs_audio_text_train_filelist.txt")


def find(args: argparse.Namespace) -> bytes | None:
    shared = args.shared_data / "text_lj" / "sentences.txt" if args.shared_data else None
    if shared and shared.exists():
        return shared.read_bytes()
    try:
        return Repository(args.github, FILELIST[0], args.work / "clones").read(FILELIST[1])
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
