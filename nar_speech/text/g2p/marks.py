"""Punctuation that has a phone of its own, and text between such marks turned into phones by espeak-ng."""

from __future__ import annotations

import re

from nar_speech.text.g2p.espeak import Espeak
from nar_speech.text.g2p.vocabulary import WORD_GAP

MARKS = ",.?!;:'…"
_MARK = re.compile(f"([{MARKS}])")
_OTHER_MARK = re.compile("([,.?!;:…])")
# Asian marks, and then ways to write an ellipsis (three of 。 among them), as the official code folds them.
_FOLDS = str.maketrans("，、。！？；：‘’", ",,.!?;:''")
_ELLIPSIS = re.compile(r"⋯|···|・・・|\.\.\.")


def fold_marks(text: str) -> str:
    """Marks of other scripts as those of :data:`MARKS`."""
    return _ELLIPSIS.sub("…", text.translate(_FOLDS))


def keep_words(text: str, whole_words: bool = False) -> str:
    """Only letters, digits, ``_`` and :data:`MARKS`, no space around marks, one between words.

    Args:
        whole_words: an apostrophe stays only inside a word, to which it belongs; else it is a mark like any.
    """
    text = re.sub(rf"[^\w\s{MARKS}]", "", fold_marks(text.strip()))
    marks = MARKS
    if whole_words:
        text = re.sub(r"(?<!\w)'|'(?!\w)", "", text)
        marks = marks.replace("'", "")
    return re.sub(rf"\s*([{marks}])\s*", r"\1", re.sub(r"\s+", " ", text)).strip()


def read_words(text: str, voice: str, whole_words: bool = False) -> list[str]:
    """Phones of a text by a voice of espeak-ng; ``_`` between words, marks as phones of their own.

    Every stretch between marks is read alone, as the official code has it.

    Args:
        whole_words: read "don't" as a word; the official code reads "don", a mark and "t".

    Raises:
        MissingExtraError: espeak-ng is not installed.
    """
    espeak = Espeak.find()
    phones: list[str] = []
    for part in (_OTHER_MARK if whole_words else _MARK).split(keep_words(text, whole_words)):
        if part in MARKS:
            phones += part  # nothing, or one mark
            continue
        for number, word in enumerate(espeak.words(part, voice)):
            phones += [WORD_GAP, *word] if number else word
    return phones
