"""Stage 1: the text of a language model and novel sentences to be spoken, from public-domain books.

    python find_books.py --work work [--github https://github.com]

Writes work/lm/text.txt (one normalised sentence a line: lower-case words, numbers spelled out),
work/lm/table.jsonl (books and words by source) and work/synth/books.txt (`id<TAB>sentence`, case and
punctuation kept, a sample of every book). Left out: books that an evaluation or development recording reads,
and every sentence that shares six words in a row with one of those transcripts.
"""

import argparse
import multiprocessing
import random
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from books import SOURCES, book_paths, read_book, sentences
from common import Repository, notice, write_jsonl
from overlap import HeldOut, held_out
from words import bare, to_words

from nar_speech.text.normalize import normalize_english

DIGIT = re.compile(r"\d")
SPEAKABLE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,.;:!?'\"-")


def transcript(sentence: str) -> str:
    """Its words as the transcripts of this recipe have them, figures spelled out."""
    return to_words(normalize_english(sentence)) if DIGIT.search(sentence) else bare(sentence)


def speakable(sentence: str, words: int) -> bool:
    """Fit for a synthesiser: letters and plain punctuation, a whole sentence, 4 to 50 words."""
    return (
        4 <= words <= 50
        and SPEAKABLE.issuperset(sentence)
        and sentence.lstrip("\"'")[:1].isupper()
        and sentence.rstrip("\"'")[-1:] in ".!?"
    )


class Reader:
    """Reads one book in a worker process."""

    def __init__(self, source: str, repo: Repository, held: HeldOut):
        self.source, self.repo, self.held = source, repo, held

    def __call__(self, path: str) -> list[tuple[str, str, bool]] | None:
        """(sentence, its words, shared with a held-out transcript) of a book; None where it is none.

        An empty list stands for a book that a held-out recording reads.
        """
        try:
            text = read_book(self.source, path, self.repo)
        except FileNotFoundError as error:  # a mirror may lack some files
            notice(f"{path} skipped: {error}")
            return None
        if text is None:
            return None
        found = [(sentence, transcript(sentence)) for sentence in sentences(text)]
        if self.held.is_read(words for _, words in found):
            return []
        return [(sentence, words, self.held.shares(words)) for sentence, words in found]


class Gatherer:
    """Writes the sentences of one book after another and keeps count."""

    def __init__(self, out, seed: int, share: float):
        self.out, self.share = out, share
        self.rng = random.Random(seed)
        self.seen: set[int] = set()
        self.spoken: list[str] = []
        self.table: list[dict] = []

    def source(self, name: str, books: Iterable[tuple[str, list | None]]) -> None:
        """All books of a source as `Reader` gives them."""
        row = {"source": name, "repository": SOURCES[name].repository, "licence": SOURCES[name].licence}
        row |= {"books": 0, "sentences": 0, "words": 0, "repeated": 0, "held_out": 0, "read_out": []}
        for path, found in books:
            if found == []:
                row["read_out"].append(Path(path).stem)
            row["books"] += bool(found)
            for sentence, words, shared in found or []:
                self._sentence(sentence, words, shared, row)
        self.table.append(row)
        print(f"{name}: {row['books']} books, {row['words'] / 1e6:.1f} million words; left out: "
              f"{row['repeated']} repeated, {row['held_out']} held-out sentences, "
              f"books read out: {', '.join(row['read_out']) or 'none'}", flush=True)  # fmt: skip

    def _sentence(self, sentence: str, words: str, shared: bool, row: dict) -> None:
        count = len(words.split())
        if not 0 < count <= 200:
            return
        key = zlib.crc32(words.encode()) << 32 | zlib.adler32(words.encode())
        if count >= 5:  # "yes sir" may come as often as it likes
            if key in self.seen:
                row["repeated"] += 1
                return
            self.seen.add(key)
        if shared:
            row["held_out"] += 1
            return
        row["sentences"] += 1
        row["words"] += count
        self.out.write(words + "\n")
        if speakable(sentence, count) and self.rng.random() < self.share:
            self.spoken.append(f"B{key:016x}\t{sentence}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--github", default="https://github.com", help="server, or a folder of owner+name/repo mirrors"
    )
    parser.add_argument("--spoken", type=int, default=80000, help="sentences kept for the synthesisers")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    folder = args.work / "lm"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "text.part"
    with part.open("w", encoding="utf-8") as out:
        held, gatherer = held_out(args.work), Gatherer(out, args.seed, 0.1)
        for name, books in SOURCES.items():
            try:
                repo = Repository(args.github, books.repository, args.work / "clones")
                paths = book_paths(name, repo)
            except FileNotFoundError as error:
                notice(f"{name} SKIPPED: {error}")
                continue
            with multiprocessing.Pool(args.jobs) as pool:
                found = pool.imap(Reader(name, repo, held), paths, chunksize=4)
                gatherer.source(name, zip(paths, found, strict=True))
    part.rename(folder / "text.txt")
    write_jsonl(folder / "table.jsonl", gatherer.table)
    spoken = gatherer.rng.sample(gatherer.spoken, min(args.spoken, len(gatherer.spoken)))
    path = args.work / "synth" / "books.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(spoken), encoding="utf-8")
    words = sum(row["words"] for row in gatherer.table)
    print(f"{folder / 'text.txt'}: {words / 1e6:.1f} million words; {path}: {len(spoken)} sentences")


if __name__ == "__main__":
    main()
