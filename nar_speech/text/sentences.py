"""Text cut where a reader would pause: into sentences, and where too long into clauses, words or letters."""

from __future__ import annotations

import re
from collections.abc import Callable

from nar_speech.text.g2p.scripts import script_of

# Behind a full stop of these no sentence ends.
_TITLE = re.compile(
    "mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|e.g|i.e|no|fig|vol|rev|gen|col|capt|lt|sgt|gov|sen|inc|ltd|co|dept|est"
    "|approx|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec",
    re.IGNORECASE,
)
_ENDS = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？…]+[」』”’）]*\s*|\n+")
_CLAUSES = re.compile(r"[,;:—–]+\s+|[，、；：]\s*")
_WORDS = re.compile(r"\s+")
# Phones of a character, roughly: a gap between words is one, too.
_PHONES = {"Han": 2.5, "Hangul": 2.5, "Kana": 1.6}
_DIGIT, _OTHER = 4.0, 0.9


def spoken_size(text: str) -> float:
    """About how many phones a text has, without reading it."""
    return sum(
        _DIGIT if character.isdigit() else _PHONES.get(script_of(character) or "", _OTHER)
        for character in text
    )


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, none empty; "Dr. Smith", "J. Smith" and "3.14" hold no end. Lines end one, too."""
    return _parts(text, _ENDS, _ends_here)


def cut_text(text: str, most: float) -> list[str]:
    """Pieces of at most about ``most`` phones, as few as there can be, cut at the best places there are.

    Sentences that fit are taken together. One that is too long is cut at commas, then between words, and a
    word without end where it must be.

    Args:
        most: see :func:`spoken_size`.
    """
    cuts: list[Callable[[str], list[str]]] = [
        split_sentences,
        lambda part: _parts(part, _CLAUSES),
        lambda part: _parts(part, _WORDS),
        lambda part: _evenly(part, most),
    ]
    return _cut(text.strip(), most, cuts)


def _cut(text: str, most: float, cuts: list[Callable[[str], list[str]]]) -> list[str]:
    if spoken_size(text) <= most or not cuts:
        return [text] if text else []
    pieces = [piece for part in cuts[0](text) for piece in _cut(part, most, cuts[1:])]
    joined: list[str] = []
    size = 0.0
    for piece in pieces:
        more = spoken_size(piece)
        if joined and size + more <= most:
            joined[-1] += ("" if _asian(joined[-1][-1]) else " ") + piece
            size += more
        else:
            joined.append(piece)
            size = more
    return joined


def _parts(text: str, ends: re.Pattern[str], wanted: Callable[[str, str], bool] | None = None) -> list[str]:
    """Text between matches, which stay at the end of their part."""
    parts, start = [], 0
    for match in ends.finditer(text):
        before, after = text[start : match.end()].strip(), text[match.end() : match.end() + 1]
        if before and (wanted is None or "\n" in match[0] or wanted(before, after)):
            parts.append(before)
            start = match.end()
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def _ends_here(before: str, after: str) -> bool:
    if after.islower():
        return False
    if not before.endswith("."):
        return True
    word = before.rsplit(None, 1)[-1].rstrip(".").lstrip("(\"'“‘")
    return not _TITLE.fullmatch(word) and not (len(word) == 1 and word.isalpha() and word not in "IA")


def _evenly(text: str, most: float) -> list[str]:
    """Pieces of about ``most`` phones of a text without any place to cut it at."""
    pieces, start, size = [], 0, 0.0
    for at, character in enumerate(text):
        more = spoken_size(character)
        if at > start and size + more > most:
            pieces.append(text[start:at])
            start, size = at, 0.0
        size += more
    return [*pieces, text[start:]]


def _asian(character: str) -> bool:
    return script_of(character) in ("Han", "Kana") or character in "，、；：。！？…」』）"
