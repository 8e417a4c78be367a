"""Texts cut into sentences and pieces: ends that are none, limits, nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.text.sentences import cut_text, split_sentences, spoken_size


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        (
            "Dr. Smith met J. Doe at 3.14 p.m. today. He left.",
            ["Dr. Smith met J. Doe at 3.14 p.m. today.", "He left."],
        ),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("So was I. Then what?", ["So was I.", "Then what?"]),
        ("Wait... what? no.", ["Wait... what? no."]),
        ("A line\nAnother line", ["A line", "Another line"]),
        ("我们走吧。好吗？好！", ["我们走吧。", "好吗？", "好！"]),
        ("  ", []),
    ],
)
def test_sentences(text, want):
    assert split_sentences(text) == want


def test_pieces_are_as_few_as_possible():
    text = "One two three. Four five six. Seven eight nine. Ten."
    assert cut_text(text, 1000) == [text]
    assert cut_text(text, 30) == ["One two three. Four five six.", "Seven eight nine. Ten."]
    assert cut_text(text, 14) == ["One two three.", "Four five six.", "Seven eight nine.", "Ten."]
    assert cut_text("alpha beta, gamma delta, epsilon", 14) == ["alpha beta,", "gamma delta,", "epsilon"]
    assert cut_text("我们走吧。好吗？好！", 18) == ["我们走吧。好吗？", "好！"]
    assert cut_text("abcdefghij" * 3, 9.5) == ["abcdefghij"] * 3


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("ab C.?!,;\n1 我。，")), most=st.floats(1.0, 40.0))
def test_nothing_is_lost_and_no_piece_is_too_long(text, most):
    pieces = cut_text(text, most)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece.strip() for piece in pieces)
    for piece in pieces:
        # A space between two joined parts counts, too; one character is never cut.
        assert spoken_size(piece) <= most + 0.9 * piece.count(" ") + 1e-6 or len(piece) == 1


def test_a_very_long_text_takes_linear_time():
    assert len(cut_text("word " * 20_000, 100)) > 500
