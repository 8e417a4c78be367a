"""Write the list of sentences to synthesise: prose of public-domain books and our own templates.

    python make_text.py --prose sentences.txt --books books.txt --work work --out text.jsonl

Each line: {"id", "kind": "prose"|"book"|"template", "spoken": text for the synthesiser, "text": its words}.
Sentences of the held-out manifests are left out, also where they are a part of a prose sentence; with
--work also those that share six words in a row with a transcript of evaluation or development.
The ids of prose and templates don't depend on the books, so speech made before stays valid.
"""

import argparse
import json
import random
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import everyday
import templates
from words import expand_titles, pieces, plain, to_words


def read_prose(path: Path) -> list[tuple[str, str]]:
    """(id, sentence) of lines `id<TAB>sentence`, `id|raw|normalised` or `folder/id.wav|sentence`."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cut = line.split("\t") if "\t" in line else line.split("|")
        if len(cut) >= 2 and cut[-1].strip():
            rows.append((Path(cut[0]).stem, cut[-1].strip()))
    return rows


def build(
    prose: list[tuple[str, str]],
    held_out: set[str],
    count: int,
    seed: int,
    books: Sequence[tuple[str, str]] = (),
    everyday_count: int = 0,
) -> list[dict]:
    """All sentences in a random order fixed by `seed`; every second long one is cut at its commas.

    `count` and `everyday_count` are the sentences of templates.py and everyday.py.
    """
    rng = random.Random(seed)
    out, seen = [], set(held_out)

    def add(name: str, kind: str, spoken: str) -> None:
        text = to_words(spoken)
        if text and text not in seen and len(text.split()) <= 30 and not any(c.isdigit() for c in spoken):
            seen.add(text)
            out.append({"id": name, "kind": kind, "spoken": spoken, "text": text})

    def add_parts(name: str, kind: str, sentence: str) -> None:
        sentence = expand_titles(plain(sentence)).replace("[", "").replace("]", "").replace('"', "")
        parts = pieces(sentence, rng.choice([6, 12, 40, 40]))
        for index, part in enumerate(parts):
            add(name if len(parts) == 1 else f"{name}-{index}", kind, part)

    for name, sentence in prose:
        words = f" {to_words(sentence)} "
        # LJ003 holds reserved recordings; it is absent from the shared list but not from LJSpeech's own.
        if name.startswith("LJ003") or any(
            f" {held} " in words for held in held_out if len(held.split()) > 3
        ):
            continue
        add_parts(name, "prose", sentence)
    for index, sentence in enumerate(templates.sentences(count, seed)):
        add(f"T{index:05d}", "template", sentence)
    for name, sentence in books:
        add_parts(name, "book", sentence)
    for sentence in everyday.sentences(everyday_count, seed):
        add(f"E{zlib.crc32(sentence.encode()):08x}", "template", sentence)
    rng.shuffle(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prose", type=Path, help="id<TAB>sentence lines or LJSpeech metadata.csv")
    parser.add_argument(
        "--held-out", type=Path, nargs="*", default=[], help="JSONL manifests whose texts are left out"
    )
    parser.add_argument("--books", type=Path, help="id<TAB>sentence lines of find_books.py")
    parser.add_argument("--books-count", type=int, default=80000, help="lines of --books that are used")
    parser.add_argument("--work", type=Path, help="leave out what this folder evaluates or validates")
    parser.add_argument("--templates", type=int, default=6000, help="sentences of templates.py")
    parser.add_argument("--everyday", type=int, default=12000, help="sentences of everyday.py")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    held = set()
    for path in args.held_out:
        held |= {to_words(json.loads(line)["text"]) for line in path.read_text(encoding="utf-8").splitlines()}
    prose = read_prose(args.prose) if args.prose else []
    books = read_prose(args.books)[: args.books_count] if args.books else []
    rows = build(prose, held, args.templates, args.seed, books, args.everyday)
    if args.work:
        from overlap import held_out  # needs nar_speech, which this script can do without

        guard = held_out(args.work)
        rows = [row for row in rows if not guard.shares(row["text"])]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    counts = Counter(row["kind"] for row in rows)
    print(f"{args.out}: " + ", ".join(f"{n} {kind} sentences" for kind, n in counts.items()), file=sys.stderr)


if __name__ == "__main__":
    main()
