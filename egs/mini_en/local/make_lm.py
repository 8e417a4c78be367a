"""The 3-gram language model of the beam, from books, templates and the transcripts of the training set.

    python make_lm.py --work work [--part 2] --out work/lm.safetensors

Books (work/lm/text.txt) are most of the text; the sentences of the templates and the transcripts of real
commands and prompts are repeated, so that they are not lost among them. Nothing of the development or
evaluation sets is in it: find_books.py leaves out what shares words with them, and the transcripts are the
training set's.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common import read_jsonl
from lhotse import CutSet

from nar_speech.text.kneser_ney import choose_vocabulary, encode_text, estimate
from nar_speech.text.ngram import NgramModel

TEMPLATES = 10  # times each sentence of the templates
TRANSCRIPTS = {  # times each real transcript, by source; others are not taken
    "coffee_commands": 50,
    "asterisk": 50,
    "fsdd": 20,
    "speechocean762": 10,
    "librispeech251": 2,
    "dctts_reader": 2,
}


def repeated(work: Path) -> list[str]:
    """Sentences of templates and transcripts, as often as they count."""
    rows = [row["text"] for row in read_jsonl(work / "synth" / "text.jsonl") if row["kind"] == "template"]
    sentences = rows * TEMPLATES
    for cut in CutSet.from_file(work / "cuts" / "train.jsonl.gz"):
        supervision = cut.supervisions[0]
        sentences += [supervision.text] * TRANSCRIPTS.get(supervision.custom["source"], 0)
    return sentences


def sentences(work: Path, part: int, more: list[str]) -> Iterator[str]:
    """Every ``part``-th line of the books, then ``more``."""
    with open(work / "lm" / "text.txt", encoding="utf-8") as file:
        yield from (line for number, line in enumerate(file) if number % part == 0)
    yield from more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, default=2, help="take one line of the books in so many")
    parser.add_argument("--vocab", type=int, default=50000)
    parser.add_argument("--prune", type=int, nargs="+", default=[0, 1, 2], help="count cut-offs")
    parser.add_argument("--entropy", type=float, default=2.1e-7, help="entropy pruning")
    parser.add_argument("--limit", type=float, default=6.0, help="largest size in MB")
    args = parser.parse_args()
    if not (args.work / "real").is_dir():
        parser.error(f"--work {args.work}: has no real/; run stage 0 first")
    more = repeated(args.work)
    counts: Counter[str] = Counter()
    for sentence in sentences(args.work, args.part, more):
        counts.update(sentence.split())
    words = choose_vocabulary(counts, args.vocab)
    text = encode_text(sentences(args.work, args.part, more), words)
    print(f"{counts.total()} words, {len(counts)} different, {len(words)} kept", flush=True)
    model = estimate(text, words, 3, args.prune, args.entropy)
    model.save(args.out)
    size = args.out.stat().st_size
    print(f"{args.out}: n-grams {model.num_ngrams}, {size / 1e6:.2f} MB")
    dev = [cut.supervisions[0].text for cut in CutSet.from_file(args.work / "cuts" / "dev.jsonl.gz")]
    found = NgramModel.load(args.out).perplexity(dev)
    print(json.dumps({"dev_perplexity": found.value, "unknown": found.unknown, "words": found.words}))
    if size > args.limit * 1e6:
        raise SystemExit(f"{args.out}: more than {args.limit:g} MB; raise --entropy")


if __name__ == "__main__":
    main()
