"""Japanese to the phones of MaskGCT: readings by Open JTalk, kana by kana to phones.

The package ``pyopenjtalk-plus`` brings Open JTalk with its dictionary as a wheel (extra ``tts-ja``).
"""

from __future__ import annotations

import re
from functools import cache

from nar_speech.errors import MissingExtraError
from nar_speech.text.g2p.marks import MARKS, fold_marks

_HISS = (
    "c\u0327"  # written with a combining cedilla: the vocabulary has another phone for the single character
)
_VOWELS = {"a": "a", "i": "i", "u": "ɯ", "e": "e", "o": "o"}
# fmt: off
# A kana for each of a i u e o, by the consonant before it.
_ROWS = {
    "": "アイウエオ", "k": "カキクケコ", "s": "サ-スセソ", "t": "タ--テト", "n": "ナニヌネノ",
    _HISS: "ハヒ-ヘホ", "m": "マミムメモ", "j": "ヤ-ユ-ヨ", "ɾ": "ラリルレロ", "ɰᵝ": "ワ----",
    "g": "ガギグゲゴ", "z": "ザ-ズゼゾ",
    "d": "ダ--デド", "b": "バビブベボ", "p": "パピプペポ", "ɕ": "-シ---", "tɕ": "-チ---", "dʑ": "-ジ---",
    "tsɯ": "--ツ--", "ɸ": "--フ--", "v": "--ヴ--",
}
# The same with a small ャ ュ ョ (or ァ ィ ゥ ェ ォ) behind a kana.
_COMBINED = {
    "kj": "キャ キュ キェ キョ", "gj": "ギャ ギュ ギェ ギョ", "nj": "ニャ ニュ ニェ ニョ",
    _HISS + "j": "ヒャ ヒュ ヒェ ヒョ",
    "bj": "ビャ ビュ ビェ ビョ", "pj": "ピャ ピュ ピェ ピョ", "mj": "ミャ ミュ ミェ ミョ",
    "ɾj": "リャ リュ リェ リョ",
    "ɕ": "シャ シュ シェ ショ", "tɕ": "チャ チュ チェ チョ", "dʑ": "ジャ ジュ ジェ ジョ",
    "tej": "テャ テュ テョ",
    "dej": "デャ デュ デョ", "ɸ": "ファ フィ フェ フォ", "v": "ヴァ ヴィ ヴェ ヴォ",
    "tsɯ": "ツァ ツィ ツェ ツォ",
    "t": "ティ トゥ", "d": "ディ ドゥ", "s": "スィ", "z": "ズィ", "ɰᵝ": "ウィ ウェ ウォ", "j": "イェ",
    "kɯ": "クヮ", "gɯ": "グヮ",
}
_OTHERS = {
    "ン": ("ɴ",), "ッ": ("q",), "ヲ": ("o",), "ヱ": ("e",), "ヰ": ("i",), "ヅ": ("z", "ɯ"), "ヂ": ("dʑ", "i"),
    "ヮ": ("ɰᵝ", "a"), "ャ": ("j", "a"), "ュ": ("j", "ɯ"), "ョ": ("j", "o"), "ヶ": ("k", "e"), "ァ": ("a",),
    "ィ": ("i",), "ゥ": ("ɯ",), "ェ": ("e",), "ォ": ("o",), "ヴャ": ("bj", "a"),
    "ヴュ": ("bj", "ɯ"), "ヴョ": ("bj", "o"),
}
_SMALL = {"ャ": "a", "ュ": "ɯ", "ョ": "o", "ァ": "a", "ィ": "i", "ゥ": "ɯ", "ェ": "e", "ォ": "o", "ヮ": "a"}
# fmt: on
_LONG = "ー"
_MORA = re.compile(".[ァィゥェォャュョヮ]|.", re.DOTALL)


def japanese_phones(text: str) -> tuple[list[str], list[str]]:
    """Phones without gaps between words, and what Open JTalk could not read.

    Raises:
        MissingExtraError: Open JTalk is not installed.
    """
    try:
        import pyopenjtalk
    except ImportError as error:
        raise MissingExtraError("pyopenjtalk-plus", "tts-ja", "reading Japanese") from error
    text = re.sub(r"\s+", "", fold_marks(text))
    phones: list[str] = []
    unread: list[str] = []
    for part in re.split(f"([{MARKS}])", text):
        if part in MARKS:
            phones += part
            continue
        for word in pyopenjtalk.run_frontend(part):
            kana = word["pron"].replace("’", "")
            if re.fullmatch(r"[ァ-ヶー]+", kana):
                phones += kana_phones(kana, phones[-1:])
            elif any(letter.isalnum() for letter in word["string"]):
                unread.append(word["string"])
    return phones, unread


def kana_phones(kana: str, before: list[str] | None = None) -> list[str]:
    """Phones of katakana; ``ー`` says the phone before it once more (``before``: the phone before all)."""
    phones: list[str] = list(before or [])
    start = len(phones)
    table = _table()
    for mora in _MORA.findall(kana):
        for part in [mora] if mora in table else mora:
            phones += phones[-1:] if part == _LONG else table.get(part, ())
    return phones[start:]


@cache
def _table() -> dict[str, tuple[str, ...]]:
    """Kana, alone or with a small one behind it -> phones."""
    table = dict(_OTHERS)
    for consonant, row in _ROWS.items():
        for kana, vowel in zip(row, _VOWELS.values(), strict=True):
            if kana != "-":
                table[kana] = (consonant, vowel) if consonant else (vowel,)
    for consonant, combined in _COMBINED.items():
        for kana in combined.split():
            table[kana] = (consonant, _SMALL[kana[1]])
    return table
