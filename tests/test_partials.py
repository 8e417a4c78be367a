"""Stable beginnings of changing texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.engine.partials import StablePrefix, common_prefix, keep_promise, units

TEXTS = st.text(alphabet="ab 你好 ", max_size=12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("hello big world", ("hello", " big", " world")),
        ("你好 world吗", ("你", "好", " world", "吗")),
        ("  a  ", ("  a", "  ")),
        ("don't stop, 吧。", ("don't", " stop,", " 吧", "。")),
        ("ไทย", ("ไ", "ท", "ย")),
        ("naïve été", ("naïve", " été")),
    ],
)
def test_units(text, expected):
    assert units(text) == expected


@given(st.text(max_size=30))
def test_units_put_together_are_the_text(text):
    assert "".join(units(text)) == text
    assert all(units(text))


def test_common_prefix_ends_between_units():
    assert common_prefix(["the cat sat", "the cats", "the cat"]) == "the"
    assert common_prefix(["the cat", "the cat"]) == "the cat"
    assert common_prefix(["你好吗", "你好嘛"]) == "你好"
    assert common_prefix([]) == ""
    assert common_prefix(["a", ""]) == ""


def test_what_two_hypotheses_agree_on_is_promised():
    prefix = StablePrefix()
    shown = []
    for text in ("the", "the cat", "the cat sat", "the cat set on", "the cat set on a"):
        prefix = prefix.update(text)
        shown.append((prefix.text, prefix.promised))
    assert shown == [
        ("the", ""),
        ("the cat", "the"),
        ("the cat sat", "the cat"),
        ("the cat set on", "the cat"),
        ("the cat set on a", "the cat set on"),
    ]
    assert prefix.stable == len("the cat set on")


def test_a_promise_is_kept_against_later_hypotheses():
    assert keep_promise("the cat", "the cat sat") == "the cat sat"
    assert keep_promise("the cat", "a cat sat down") == "the cat sat down"
    assert keep_promise("the cat", "the dog sat") == "the cat sat"
    assert keep_promise("one two", "three four five") == "one two five"
    assert keep_promise("one two", "") == "one two"


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, max_size=8), st.integers(1, 3), st.integers(0, 2))
def test_promises_only_grow(texts, agreement, hold):
    prefix = StablePrefix(agreement, hold)
    for text in texts:
        after = prefix.update(text)
        assert after.promised.startswith(prefix.promised)
        assert after.text.startswith(after.promised)
        if text.startswith(prefix.promised):
            assert after.text == text
        prefix = after
    assert StablePrefix(agreement, hold).restore(prefix.export()) == prefix
