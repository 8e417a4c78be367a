"""Error rates of recognised text: words or characters, with a confidence interval and alignments.

The rate of a corpus is the sum of errors over the sum of reference units. The interval is a percentile
bootstrap over utterances (Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR
performance evaluation").
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jiwer
import numpy as np

from nar_speech.errors import InputError

BOOTSTRAP_CELLS = 1 << 22  # resampling weights held at once, 32 MiB


@dataclass(frozen=True)
class ErrorCounts:
    """Substitutions, deletions, insertions, and the number of reference units."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference: int = 0

    @property
    def errors(self) -> int:
        """All errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference unit. An empty reference gives 0 without errors and infinity with some."""
        if self.reference:
            return self.errors / self.reference
        return float("inf") if self.errors else 0.0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference + other.reference,
        )


@dataclass(frozen=True)
class ErrorReport:
    """The error rate of a corpus.

    Args:
        unit: "word" or "character".
        total: sums over the utterances.
        items: counts of every utterance.
        low, high: 95 % confidence interval of the rate.
    """

    unit: str
    total: ErrorCounts
    items: tuple[ErrorCounts, ...]
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Errors per reference unit."""
        return self.total.rate

    def to_dict(self) -> dict:
        """Rate, interval and sums, ready for JSON."""
        return {
            "unit": self.unit,
            "rate": self.rate,
            "low": self.low,
            "high": self.high,
            "utterances": len(self.items),
            "errors": self.total.errors,
            **asdict(self.total),
        }

    def __str__(self) -> str:
        name, t = {"word": "WER", "character": "CER"}[self.unit], self.total
        return (
            f"{name} {100 * self.rate:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]: {t.errors} errors"
            f" in {t.reference} {self.unit}s (S {t.substitutions}, D {t.deletions}, I {t.insertions}),"
            f" {len(self.items)} utterances"
        )


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> list[ErrorCounts]:
    """Word errors of every utterance. Words are separated by white space; nothing else is normalised.

    With an empty reference every recognised word is an insertion.

    Raises:
        InputError: the lists differ in length.
    """
    _check_pairs(references, hypotheses)
    pairs = [(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True)]
    return [_counts(*pair) for pair in _alignments(pairs)]


def char_errors(
    references: Sequence[str], hypotheses: Sequence[str], spaces: bool = False
) -> list[ErrorCounts]:
    """Character errors of every utterance; ``spaces`` counts the space between words as a character.

    Raises:
        InputError: the lists differ in length.
    """
    _check_pairs(references, hypotheses)
    glue = " " if spaces else ""
    pairs = [
        (list(glue.join(r.split())), list(glue.join(h.split())))
        for r, h in zip(references, hypotheses, strict=True)
    ]
    return [_counts(*pair) for pair in _alignments(pairs)]


def word_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], samples: int = 1000, seed: int = 0
) -> ErrorReport:
    """WER of a corpus with its 95 % bootstrap interval.

    Raises:
        InputError: no utterance, or lists that differ in length.
    """
    return _report("word", word_errors(references, hypotheses), samples, seed)


def char_error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    spaces: bool = False,
    samples: int = 1000,
    seed: int = 0,
) -> ErrorReport:
    """CER of a corpus with its 95 % bootstrap interval.

    Raises:
        InputError: no utterance, or lists that differ in length.
    """
    return _report("character", char_errors(references, hypotheses, spaces), samples, seed)


def bootstrap_interval(
    items: Sequence[ErrorCounts], samples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the corpus rate over ``samples`` corpora drawn from the utterances with replacement."""
    errors = np.array([item.errors for item in items], dtype=np.float64)
    lengths = np.array([item.reference for item in items], dtype=np.float64)
    generator = np.random.default_rng(seed)
    count = len(items)
    rows = max(BOOTSTRAP_CELLS // count, 1)
    rates = []
    for begin in range(0, samples, rows):
        # How often each utterance is drawn; the same as drawing ``count`` indices.
        weights = generator.multinomial(count, np.full(count, 1 / count), size=min(rows, samples - begin))
        total = weights @ lengths
        rates.append((weights @ errors)[total > 0] / total[total > 0])
    drawn = np.concatenate(rates)
    if not len(drawn):
        rate = sum(items, ErrorCounts()).rate
        return rate, rate
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def alignment_text(reference: str, hypothesis: str, characters: bool = False) -> str:
    """Three lines for a report: reference, hypothesis and, under each error, S, D or I."""
    pair = (list("".join(t.split())) if characters else t.split() for t in (reference, hypothesis))
    ((units, recognised, steps),) = _alignments([tuple(pair)])
    lines: tuple[list[str], list[str], list[str]] = (["REF:"], ["HYP:"], ["    "])
    for kind, i, j in steps:
        cells = (
            units[i] if kind != "I" else "*" * _width(recognised[j]),
            recognised[j] if kind != "D" else "*" * _width(units[i]),
            "" if kind == "=" else kind,
        )
        width = max(map(_width, cells))
        for line, cell in zip(lines, cells, strict=True):
            line.append(cell + " " * (width - _width(cell)))
    return "\n".join(" ".join(line).rstrip() for line in lines)


Step = tuple[str, int, int]  # "=", "S", "D" or "I"; place in the reference; place in the hypothesis
Pair = tuple[list[str], list[str]]


def _alignments(pairs: Sequence[Pair]) -> list[tuple[list[str], list[str], list[Step]]]:
    """Each pair with the steps of its cheapest alignment."""
    # jiwer compares words of strings, so units are numbered: they may then hold any character.
    table: dict[str, str] = {}

    def number(units: list[str]) -> str:
        return " ".join(table.setdefault(unit, str(len(table))) for unit in units)

    filled = [(number(r), number(h)) for r, h in pairs if r]
    aligned = iter(
        jiwer.process_words([r for r, _ in filled], [h for _, h in filled]).alignments if filled else []
    )
    result = []
    for reference, hypothesis in pairs:
        steps: list[Step] = []
        if not reference:  # jiwer refuses empty references
            steps = [("I", 0, j) for j in range(len(hypothesis))]
        else:
            for chunk in next(aligned):
                i, j = chunk.ref_start_idx, chunk.hyp_start_idx
                kind = {"equal": "=", "substitute": "S", "delete": "D", "insert": "I"}[chunk.type]
                size = max(chunk.ref_end_idx - i, chunk.hyp_end_idx - j)
                steps += [(kind, i + k * (kind != "I"), j + k * (kind != "D")) for k in range(size)]
        result.append((reference, hypothesis, steps))
    return result


def _counts(reference: list[str], _: list[str], steps: list[Step]) -> ErrorCounts:
    kinds = [step[0] for step in steps]
    return ErrorCounts(kinds.count("S"), kinds.count("D"), kinds.count("I"), len(reference))


def _report(unit: str, items: list[ErrorCounts], samples: int, seed: int) -> ErrorReport:
    if not items:
        raise InputError("error rate: there is no utterance to score; give references and hypotheses")
    low, high = bootstrap_interval(items, samples, seed)
    return ErrorReport(unit, sum(items, ErrorCounts()), tuple(items), low, high)


def _check_pairs(references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise InputError("error rate: expected lists of utterances, got one text; put it in a list")
    if len(references) != len(hypotheses):
        raise InputError(
            f"error rate: {len(references)} references but {len(hypotheses)} hypotheses; need as many"
        )


def _width(text: str) -> int:
    """Columns of a terminal: wide East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
