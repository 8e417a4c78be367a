"""Chinese as it is said: numbers, times and money written out in characters, by cn2an and rules of ours."""

from __future__ import annotations

import re
import unicodedata

from nar_speech.errors import MissingExtraError

_DIGITS = "零一二三四五六七八九"
_CURRENCIES = {"¥": "元", "$": "美元", "€": "欧元", "£": "英镑", "₩": "韩元", "₹": "卢比", "₽": "卢布"}
_SIGNS = {"+": "加", "=": "等于", "×": "乘", "÷": "除以", "&": "和", "@": "艾特"}
_UNITS = {
    "km": "公里",
    "kg": "公斤",
    "cm": "厘米",
    "mm": "毫米",
    "m": "米",
    "g": "克",
    "ml": "毫升",
    "℃": "度",
}
_LONGEST = 15  # digits; longer numbers are not counted but read one by one
_NUMBER = r"\d+(?:\.\d+)?"


def speak_chinese(text: str) -> str:
    """Characters for all digits; the rest of the text stays.

    Raises:
        MissingExtraError: cn2an is not installed.
    """
    text = re.sub(r"(?<=\d)[,，](?=\d{3}(?!\d))", "", _fold(text))
    text = re.sub(r"(?<!\d)([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?(?![\d:])", _clock, text)
    text = re.sub(rf"([{''.join(_CURRENCIES)}])\s?({_NUMBER})([万亿千百]*)", _money, text)
    units = "|".join(sorted(_UNITS, key=len, reverse=True))
    text = re.sub(rf"({_NUMBER})\s?({units})(?![A-Za-z])", lambda match: match[1] + _UNITS[match[2]], text)
    text = re.sub(rf"(?<!\d)({_NUMBER})\s?[-~–—]\s?(?={_NUMBER}(?![-\d]))(?<!\d{{5}})", r"\1到", text)
    text = re.sub(rf"\d{{{_LONGEST + 1},}}(?:\.\d+)?|(?<![\d.])0\d+|1[3-9]\d{{9}}(?!\d)", _by_digit, text)
    text = official_chinese(text)
    text = re.sub(r"\d+", _by_digit, text)
    return "".join(_SIGNS.get(sign, sign) for sign in text)


def official_chinese(text: str) -> str:
    """Numbers as the official code has them: cn2an alone. Digits it leaves stay digits.

    Raises:
        MissingExtraError: cn2an is not installed.
    """
    try:
        import cn2an
    except ImportError as error:
        raise MissingExtraError("cn2an", "tts", "numbers in Chinese") from error
    try:
        return cn2an.transform(text.strip(), "an2cn")
    except (ValueError, TypeError):
        # It rejects the whole text for one number it can't count, such as the thirteenth month.
        return re.sub(_NUMBER, _by_digit, text.strip())


def _fold(text: str) -> str:
    """Full-width letters, digits and currency signs as plain ones; punctuation stays Chinese."""
    folded = (unicodedata.normalize("NFKC", one) if one.isalnum() or one in "￥￡％" else one for one in text)
    text = "".join(folded).replace("〇", "零")
    return "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in text)


def _by_digit(match: re.Match[str]) -> str:
    return "".join("点" if one == "." else _DIGITS[int(one)] for one in match[0])


def _clock(match: re.Match[str]) -> str:
    hour, minute, second = match.groups()
    minutes = (
        "整" if int(minute) == 0 and not second else f"{'零' if int(minute) < 10 else ''}{int(minute)}分"
    )
    return f"{int(hour)}点{minutes}{f'{int(second)}秒' if second else ''}"


def _money(match: re.Match[str]) -> str:
    return f"{match[2]}{match[3]}{_CURRENCIES[match[1]]}"
