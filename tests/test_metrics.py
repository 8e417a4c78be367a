"""Error rates against a plain dynamic programme, empty references, intervals, alignments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import InputError
from nar_speech.metrics import (
    ErrorCounts,
    alignment_text,
    bootstrap_interval,
    char_error_rate,
    char_errors,
    word_error_rate,
    word_errors,
)


def distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


texts = st.lists(st.sampled_from(["a", "b", "ab", "你好", "it's"]), max_size=8).map(" ".join)


@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_errors_equal_the_edit_distance(pairs):
    references, hypotheses = zip(*pairs, strict=True)
    for (reference, hypothesis), words, chars, spaced in zip(
        pairs,
        word_errors(references, hypotheses),
        char_errors(references, hypotheses),
        char_errors(references, hypotheses, spaces=True),
        strict=True,
    ):
        for counts, r, h in (
            (words, reference.split(), hypothesis.split()),
            (chars, reference.replace(" ", ""), hypothesis.replace(" ", "")),
            (spaced, reference, hypothesis),
        ):
            assert counts.errors == distance(r, h)
            assert counts.reference == len(r)
            assert counts.insertions - counts.deletions == len(h) - len(r)


def test_known_counts():
    assert word_errors(["a b c d"], ["a x d e"]) == [ErrorCounts(2, 1, 1, 4)] or word_errors(
        ["a b c d"], ["a x d e"]
    ) == [ErrorCounts(3, 0, 0, 4)]
    assert word_errors(["a b c"], ["a c"]) == [ErrorCounts(0, 1, 0, 3)]
    assert char_errors(["今 天"], ["今天好"]) == [ErrorCounts(0, 0, 1, 2)]


def test_empty_references_and_hypotheses():
    assert word_errors(["", "a b", ""], ["x y", "", ""]) == [
        ErrorCounts(0, 0, 2, 0),
        ErrorCounts(0, 2, 0, 2),
        ErrorCounts(),
    ]
    assert ErrorCounts(0, 0, 2, 0).rate == float("inf")
    assert ErrorCounts().rate == 0.0
    report = word_error_rate(["", "a b"], ["x", "a b"])
    assert report.rate == 0.5
    assert word_error_rate(["", ""], ["", ""]).rate == 0.0
    silent = word_error_rate([""], ["x"])
    assert (silent.rate, silent.low, silent.high) == (float("inf"),) * 3


def test_the_corpus_rate_weighs_utterances_by_length():
    report = word_error_rate(["a", "b c d e f g h i j"], ["x", "b c d e f g h i j"])
    assert report.rate == pytest.approx(0.1)
    assert report.total == ErrorCounts(1, 0, 0, 10)
    assert len(report.items) == 2


def test_the_interval_is_seeded_and_has_the_right_width():
    generator = np.random.default_rng(5)
    items = [ErrorCounts(int(e), 0, 0, 20) for e in generator.binomial(20, 0.1, size=2000)]
    low, high = bootstrap_interval(items)
    rate = sum(items, ErrorCounts()).rate
    half = 1.96 * np.sqrt(0.1 * 0.9 / 40000)
    assert (low, high) == bootstrap_interval(items)
    assert (low, high) != bootstrap_interval(items, seed=1)
    assert rate - low == pytest.approx(half, rel=0.15)
    assert high - rate == pytest.approx(half, rel=0.15)


def test_the_interval_does_not_depend_on_the_memory_limit(monkeypatch):
    items = [ErrorCounts(i % 3, 0, 0, 10) for i in range(50)]
    want = bootstrap_interval(items, samples=100)
    monkeypatch.setattr("nar_speech.metrics.BOOTSTRAP_CELLS", 120)
    assert bootstrap_interval(items, samples=100) == want


def test_reports_read_well():
    report = char_error_rate(["今天天气"], ["今天天汽"])
    assert str(report) == (
        "CER 25.00 % [25.00, 25.00]: 1 errors in 4 characters (S 1, D 0, I 0), 1 utterances"
    )
    assert report.to_dict()["errors"] == 1
    assert report.to_dict()["reference"] == 4


def test_alignment_text_lines_up():
    assert alignment_text("the cat sat", "the bat sat down").splitlines() == [
        "REF: the cat sat ****",
        "HYP: the bat sat down",
        "         S       I",
    ]
    assert alignment_text("a bb c", "a c").splitlines() == ["REF: a bb c", "HYP: a ** c", "       D"]
    assert alignment_text("今天", "今天好", characters=True).splitlines() == [
        "REF: 今 天 **",
        "HYP: 今 天 好",
        "           I",
    ]
    assert alignment_text("", "x").splitlines() == ["REF: *", "HYP: x", "     I"]


def test_wrong_calls_are_refused():
    with pytest.raises(InputError, match="2 references but 1"):
        word_errors(["a", "b"], ["a"])
    with pytest.raises(InputError, match="put it in a list"):
        word_errors("a", "a")
    with pytest.raises(InputError, match="no utterance"):
        word_error_rate([], [])
