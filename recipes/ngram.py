"""Estimate an n-gram language model: python -m recipes.ngram TEXT... --order 3 --output lm.arpa"""

import argparse
import gzip
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nar_speech.errors import InputError, NarSpeechError
from nar_speech.text.arpa import write_arpa
from nar_speech.text.kneser_ney import choose_vocabulary, encode_text, estimate
from nar_speech.text.ngram import NgramModel
from nar_speech.text.normalize import get_normalizer


def sentences(paths: list[Path], normalizer: str) -> Iterator[str]:
    """Lines of text files, plain or gzipped."""
    normalize = get_normalizer(normalizer)
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                for line in file:
                    yield normalize(line) if normalizer != "none" else line
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: can't read it as UTF-8 text ({error}); check the file") from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.ngram", description=__doc__.split(":")[0])
    parser.add_argument("text", nargs="+", type=Path, help="a sentence a line, words between spaces; .gz too")
    parser.add_argument("--order", type=int, default=3, help="longest n-gram (default: %(default)s)")
    parser.add_argument(
        "--prune",
        default="0",
        help="for each order the count up to which n-grams are left out, 0,0,1 for example (default: none)",
    )
    parser.add_argument("--entropy", type=float, default=0.0, help="entropy pruning, 1e-8 for example")
    parser.add_argument("--vocab", type=int, help="number of words, the most frequent ones (default: all)")
    parser.add_argument("--least", type=int, default=1, help="rarer words are unknown (default: %(default)s)")
    parser.add_argument("--normalize", default="none", choices=("none", "en", "zh"), help="of the text")
    parser.add_argument(
        "--held-out", nargs="*", type=Path, default=[], help="texts to report perplexities of"
    )
    parser.add_argument(
        "--output",
        nargs="+",
        type=Path,
        required=True,
        help="files: .arpa or .arpa.gz text, .safetensors compact with 8-bit values",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(options)
    except NarSpeechError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    try:
        prune = [int(part) for part in options.prune.split(",")]
    except ValueError:
        raise InputError(f"--prune {options.prune}: expected whole numbers between commas") from None
    counts: Counter[str] = Counter()
    for sentence in sentences(options.text, options.normalize):
        counts.update(sentence.split())
    words = choose_vocabulary(counts, options.vocab, options.least)
    text = encode_text(sentences(options.text, options.normalize), words)
    covered = sum(counts[word] for word in words) / max(sum(counts.values()), 1)
    total = f"{sum(counts.values())} words, {len(counts)} different"
    print(f"{total}, {len(words)} kept ({covered:.2%} of the text)")
    model = estimate(text, words, options.order, prune, options.entropy)
    print("n-grams of order 1 to", f"{model.order}:", *model.num_ngrams)
    for path in options.output:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path) if path.suffix == ".safetensors" else write_arpa(model, path)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
        read = NgramModel.load(path) if options.held_out else None
        for held in options.held_out:
            found = read.perplexity(sentences([held], options.normalize))
            print(
                f"  {held}: perplexity {found.value:.2f}, {found.known:.2f} without the {found.unknown}"
                f" unknown of {found.words} words"
            )


if __name__ == "__main__":
    sys.exit(main())
