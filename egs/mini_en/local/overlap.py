"""Text that is kept for evaluation or development, and the check that keeps other text clear of it."""

from collections.abc import Iterable
from pathlib import Path

from common import read_jsonl
from development import split

SPAN = 6  # words in a row that a sentence must not share with a held-out transcript
BOOK_SPAN = 10  # words in a row that show that a book is the one that was read out


def spans(words: list[str], size: int) -> Iterable[tuple[str, ...]]:
    """Every run of `size` words."""
    return zip(*(words[start:] for start in range(size)), strict=False)


class HeldOut:
    """The runs of words of held-out transcripts."""

    def __init__(self, texts: Iterable[str]):
        texts = [text.split() for text in texts]
        self.short = {" ".join(words) for words in texts if 3 <= len(words) < SPAN}
        self.runs = {run for words in texts for run in spans(words, SPAN)}
        self.long_runs = {run for words in texts for run in spans(words, BOOK_SPAN)}

    def shares(self, text: str) -> bool:
        """True when `text` has SPAN words in a row with a held-out transcript, or is a short one of them."""
        return text in self.short or not self.runs.isdisjoint(spans(text.split(), SPAN))

    def is_read(self, texts: Iterable[str]) -> bool:
        """True when the sentences of a book hold BOOK_SPAN words in a row of a held-out transcript."""
        return any(not self.long_runs.isdisjoint(spans(text.split(), BOOK_SPAN)) for text in texts)


def held_out(work: Path) -> HeldOut:
    """Of the evaluation sets and the development recordings in a working folder of stage 0.

    The coffee orders and speechocean762's prompts repeat by nature: their development clips are held out by
    recording, not by text.
    """
    texts = [row["text"] for path in sorted((work / "eval").glob("*.jsonl")) for row in read_jsonl(path)]
    manifests = [path for path in sorted((work / "real").glob("*.jsonl")) if path.stem != "table"]
    dev = split([row for path in manifests for row in read_jsonl(path)])[1]
    texts += [row["text"] for row in dev if row["source"] not in ("coffee_commands", "speechocean762")]
    return HeldOut(texts)
