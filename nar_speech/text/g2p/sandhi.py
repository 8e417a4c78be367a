"""How tones of Mandarin change in a word: third tones in a row, 不, 一, and 儿 at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nar_speech.text.g2p.pinyin import NEUTRAL, Syllable

_FULL_ER = frozenset({"女儿", "老儿", "男儿", "少儿", "小儿"})  # here 儿 is a child, not an ending
_DIGITS = frozenset("零一二三四五六七八九十")
_MARKS = frozenset("：，；。？！“”‘’':,;.?!()（）{}【】[]-~`、 ")


def change_tones(word: str, syllables: list[Syllable], official: bool = False) -> list[Syllable]:
    """The syllables of one word with the tones that are said.

    Args:
        official: three third tones in a row keep theirs and get a stray mark, as in the official code,
            instead of becoming two second tones and a third.
    """
    if not syllables:
        return syllables
    syllables = _third_tones(word, list(syllables), official)
    for rule in (_bu, _yi, _er):
        rule(word, syllables, lambda at, tone: _set(syllables, at, tone))
    return syllables


Change = Callable[[int, int], None]


def _set(syllables: list[Syllable], at: int, tone: int) -> None:
    if syllables[at].sound is not None:
        syllables[at] = replace(syllables[at], tone=tone, stray=False)


def _tone(syllables: list[Syllable], at: int) -> int:
    """The tone there; 0 behind the end, for a mark, and where a stray mark stands in for it."""
    if at >= len(syllables) or syllables[at].sound is None:
        return 0
    return 2 if syllables[at].stray else syllables[at].tone


def _third_tones(word: str, syllables: list[Syllable], official: bool) -> list[Syllable]:
    if len(word) not in (2, 3) or len(word) != len(syllables):
        return syllables
    if any(_tone(syllables, at) != 3 for at in range(len(word))):
        return syllables
    if official and len(word) == 3:
        return [replace(one, stray=True) for one in syllables[:-1]] + syllables[-1:]
    return [replace(one, tone=2) for one in syllables[:-1]] + syllables[-1:]


def _bu(word: str, syllables: list[Syllable], change: Change) -> None:
    """不: second tone before a fourth; neutral between two syllables (好不好)."""
    if set(word) == {"不"} or word == "不字":
        return
    if len(word) == 3 and word[1] == "不" and syllables[1].sound == "bu" and syllables[1].tone != 1:
        change(1, NEUTRAL)
        return
    for at, character in enumerate(word[:-1]):
        if character == "不" and _tone(syllables, at + 1) == 4:
            change(at, 2)


def _yi(word: str, syllables: list[Syllable], change: Change) -> None:
    """一: first tone in numbers, neutral in 看一看, second before a fourth tone, else fourth."""
    if "一" in word and any(character.isnumeric() for character in word if character != "一"):
        for at in (at for at, character in enumerate(word) if character == "一"):
            if at == 0 and word[1] not in _DIGITS:
                change(0, 2 if _tone(syllables, 1) in (4, NEUTRAL) else 4)
            else:
                change(at, 1)
    elif len(word) == 3 and word[1] == "一" and word[0] == word[2]:
        change(1, NEUTRAL)
    elif word.startswith("第一"):
        change(1, 1)
    elif word.startswith(("一月", "一日", "一号")):
        change(0, 1)
    else:
        for at, character in enumerate(word[:-1]):
            if character == "一" and _tone(syllables, at + 1) == 4:
                change(at, 2)
            elif character == "一" and word[at + 1] not in _MARKS:
                change(at, 4)


def _er(word: str, syllables: list[Syllable], change: Change) -> None:
    """儿 at the end of a word: neutral."""
    if len(word) > 1 and word[-1] == "儿" and word not in _FULL_ER:
        change(len(syllables) - 1, NEUTRAL)
