"""Write the list of sentences to synthesise: prose of LJSpeech's (public domain) texts and our own templates.

    python make_text.py --prose sentences.txt --held-out manifest.jsonl --out text.jsonl

Each line: {"id", "kind": "prose"|"template", "spoken": text for the synthesiser, "text": its words}.
Sentences of the held-out manifests are left out, also where they are a part of a prose sentence.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from templates import sentences
from words import expand_titles, pieces, plain, to_words


def read_prose(path: Path) -> list[tuple[str, str]]:
    """(id, sentence) of lines `id<TAB>sentence`, `id|raw|normalised` or `folder/id.wav|sentence`."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cut = line.split("\t") if "\t" in line else line.split("|")
        if len(cut) >= 2 and cut[-1].strip():
            rows.append((Path(cut[0]).stem, cut[-1].strip()))
    return rows


def build(prose: list[tuple[str, str]], held_out: set[str], templates: int, seed: int) -> list[dict]:
    """All sentences in a random order fixed by `seed`; every second long one is cut at its commas."""
    rng = random.Random(seed)
    out, seen = [], set(held_out)

    def add(name: str, kind: str, spoken: str) -> None:
        text = to_words(spoken)
        if text and text not in seen and len(text.split()) <= 30 and not any(c.isdigit() for c in spoken):
            seen.add(text)
            out.append({"id": name, "kind": kind, "spoken": spoken, "text": text})

    for name, sentence in prose:
        words = f" {to_words(sentence)} "
        # LJ003 holds reserved recordings; it is absent from the shared list but not from LJSpeech's own.
        if name.startswith("LJ003") or any(
            f" {held} " in words for held in held_out if len(held.split()) > 3
        ):
            continue
        sentence = expand_titles(plain(sentence)).replace("[", "").replace("]", "").replace('"', "")
        parts = pieces(sentence, rng.choice([6, 12, 40, 40]))
        for index, part in enumerate(parts):
            add(name if len(parts) == 1 else f"{name}-{index}", "prose", part)
    for index, sentence in enumerate(sentences(templates, seed)):
        add(f"T{index:05d}", "template", sentence)
    rng.shuffle(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prose", type=Path, help="id<TAB>sentence lines or LJSpeech metadata.csv")
    parser.add_argument(
        "--held-out", type=Path, nargs="*", default=[], help="JSONL manifests whose texts are left out"
    )
    parser.add_argument("--templates", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    held = set()
    for path in args.held_out:
        held |= {to_words(json.loads(line)["text"]) for line in path.read_text(encoding="utf-8").splitlines()}
    rows = build(read_prose(args.prose) if args.prose else [], held, args.templates, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    count = sum(row["kind"] == "prose" for row in rows)
    print(f"{args.out}: {count} of prose, {len(rows) - count} of templates", file=sys.stderr)


if __name__ == "__main__":
    main()
