"""Mandarin syllables as MaskGCT's phones: an initial, and a final that carries the tone.

A syllable is pinyin without its tone (``zhang``, ``nv`` for nü) and a tone 1 to 4, or 5 for the neutral one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

TONES = {1: "→", 2: "↑", 3: "↓↑", 4: "↓", 5: ""}
NEUTRAL = 5
# fmt: off
_INITIALS = {
    "b": "p⁼", "p": "pʰ", "m": "m", "f": "f", "d": "t⁼", "t": "tʰ", "n": "n", "l": "l", "g": "k⁼", "k": "kʰ",
    "h": "x", "j": "tʃ⁼", "q": "tʃʰ", "x": "ʃ", "zh": "ts`⁼", "ch": "ts`ʰ", "sh": "s`", "r": "ɹ`", "z": "ts⁼",
    "c": "tsʰ", "s": "s",
}
_FINALS = {
    "a": "a", "o": "o", "e": "ə", "ê": "ɛ", "ai": "aɪ", "ei": "eɪ", "ao": "ɑʊ", "ou": "oʊ", "an": "an",
    "en": "ən", "ang": "ɑŋ", "eng": "əŋ", "er": "əɹ", "i": "i", "ia": "ia", "ie": "iɛ", "iao": "iɑʊ",
    "iu": "ioʊ", "ian": "jɛn", "in": "in", "iang": "iɑŋ", "ing": "iŋ", "u": "u", "ua": "ua", "uo": "uo",
    "uai": "uaɪ", "ui": "ueɪ", "uan": "uan", "un": "uən", "uang": "uɑŋ", "ong": "ʊŋ", "v": "ɥ", "ve": "ɥɛ",
    "van": "ɥæn", "vn": "ɥn", "iong": "jʊŋ",
}
# How a syllable without an initial is spelled, and syllables without a vowel.
_ALONE = {
    "yi": "i", "ya": "ia", "ye": "ie", "yao": "iao", "you": "iu", "yan": "ian", "yin": "in", "yang": "iang",
    "ying": "ing", "yong": "iong", "yu": "v", "yv": "v", "yue": "ve", "yve": "ve", "yuan": "van",
    "yvan": "van", "yun": "vn", "yvn": "vn", "wu": "u", "wa": "ua", "wo": "uo", "wai": "uai", "wei": "ui",
    "wan": "uan", "wen": "un", "wang": "uang", "weng": "ong", "wong": "ong", "n": "en", "ng": "en",
}
_ODD = {"m": ("m", "u"), "hm": ("x", "əŋ"), "hng": ("x", "əŋ"), "yo": ("i", "o"), "yai": ("i", "aɪ")}
# fmt: on
_BUZZED = frozenset({"zhi", "chi", "shi", "ri", "zi", "ci", "si"})  # their i is only the initial held on
_ROUNDED = frozenset({"bo", "po", "mo", "fo"})  # one phone, initial and all


@dataclass(frozen=True)
class Syllable:
    """A character as it is read; or, without ``sound``, one that has no reading (a mark).

    ``stray``: a tone mark of its own behind the syllable, a defect of the official third-tone rule.
    """

    text: str
    sound: str | None = None
    tone: int = NEUTRAL
    stray: bool = False

    def phones(self) -> list[str]:
        """The syllable's phones; of a character without a reading the character."""
        if self.sound is None:
            return [self.text]
        return list(syllable_phones(self.sound, self.tone)) + [TONES[2]] * self.stray


@cache
def syllable_phones(sound: str, tone: int) -> tuple[str, ...] | None:
    """Phones of pinyin and a tone; None if there is no such syllable.

    ``zhi`` and its like have no vowel when the tone is neutral, as in the official code.
    """
    mark = TONES[tone]
    if sound in _BUZZED:
        initial = _INITIALS[sound[:-1]]
        return (f"{initial}ɹ{mark}" if mark else initial,)
    if sound in _ROUNDED:
        return (f"{_INITIALS[sound[0]]}wo{mark}",)
    if sound in _ODD:
        first, second = _ODD[sound]
        return (first, second + mark)
    if sound in _ALONE or sound in _FINALS:
        return (_FINALS[_ALONE.get(sound, sound)] + mark,)
    for size in (2, 1):
        initial, final = sound[:size], sound[size:]
        if initial not in _INITIALS:
            continue
        if final.startswith("u") and (initial in ("j", "q", "x") or final == "ue"):
            final = "v" + final[1:]
        final = {"uei": "ui", "uen": "un", "iou": "iu"}.get(final, final)
        return (_INITIALS[initial], _FINALS[final] + mark) if final in _FINALS else None
    return None
