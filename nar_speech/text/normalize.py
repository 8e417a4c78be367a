"""Normalise text before scoring, so that writing conventions do not count as errors.

``normalize_english`` gives lower-case words without punctuation, numbers spelled out; contractions stay.
``normalize_chinese`` gives characters separated by spaces, full-width forms folded, punctuation off.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from nar_speech.errors import InputError
from nar_speech.text.postprocess import CJK

# fmt: off
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS = [
    "_", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]
_SCALES = ("", "thousand", "million", "billion", "trillion", "quadrillion")
# fmt: on
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
# fmt: off
_MONTHS = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
    "november", "december",
]
# fmt: on
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
    "¥": ("yen", "yen", "sen", "sen"),
}
_TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor"}
_SIGNS = {"&": " and ", "%": " percent ", "+": " plus ", "=": " equals ", "@": " at ", "°": " degrees "}
# Words that begin with an apostrophe; before others it is a quotation mark.
# fmt: off
_APHERESIS = frozenset({
    "tis", "twas", "twere", "twill", "em", "til", "till", "cause", "bout", "round", "neath", "gainst",
    "cept",
})

# fmt: on
_APOSTROPHES = re.compile("[‘’ʼ＇`´]")
_DASHES = re.compile("[-‐-―−﹘﹣－]")
_NUMBER = r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
_MONTH = "|".join(_MONTHS)


def spell_number(number: int) -> str:
    """Cardinal in words, without "and": 1234 is "one thousand two hundred thirty four"."""
    if number < 0:
        return "minus " + spell_number(-number)
    if number >= 1000 ** len(_SCALES):
        return spell_digits(str(number))
    if number < 20:
        return _ONES[number]
    words: list[str] = []
    for power in range(len(_SCALES) - 1, -1, -1):
        part = number // 1000**power % 1000
        if not part:
            continue
        hundreds, rest = divmod(part, 100)
        words += [_ONES[hundreds], "hundred"] if hundreds else []
        if 0 < rest < 20:
            words.append(_ONES[rest])
        elif rest:
            words.append(_TENS[rest // 10])
            words += [_ONES[rest % 10]] if rest % 10 else []
        words += [_SCALES[power]] if power else []
    return " ".join(words)


def spell_digits(digits: str) -> str:
    """Every digit as a word."""
    return " ".join(_ONES[int(digit)] for digit in digits)


def spell_ordinal(number: int) -> str:
    """Ordinal in words: 21 is "twenty first"."""
    *head, last = spell_number(number).split()
    if last in _ORDINALS:
        last = _ORDINALS[last]
    else:
        last = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return " ".join([*head, last])


def spell_year(year: int) -> str:
    """A year as read: 1999 "nineteen ninety nine", 1905 "nineteen oh five", 2005 "two thousand five"."""
    century, rest = divmod(year, 100)
    if not 1100 <= year <= 2099 or (century == 20 and rest < 10):
        return spell_number(year)
    if rest == 0:
        return f"{spell_number(century)} hundred"
    return f"{spell_number(century)} {'oh ' if rest < 10 else ''}{spell_number(rest)}"


def normalize_english(text: str) -> str:
    """Lower-case words separated by one space; numbers, dates, times and money in words; no punctuation.

    Apostrophes inside words and of words such as ``'tis`` and ``goin'`` stay, so contractions are untouched.
    """
    text = _DASHES.sub("-", _APOSTROPHES.sub("'", unicodedata.normalize("NFC", text))).lower()
    # Compatibility forms can hold capitals (a mathematical A), so lower case comes once more.
    text = unicodedata.normalize("NFKC", text).lower().replace("⁄", "/")
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    if any(map(str.isdecimal, text)):
        text = _spell_numbers(text)
    text = "".join(_SIGNS.get(character, character) for character in text)
    text = re.sub(r"[^\w\s']|_", " ", text)
    words = [word for word in map(_trim_apostrophes, text.split()) if word]
    # A title stands before a name. Last, so that words split or spelled above are treated alike.
    return " ".join([_TITLES.get(word, word) for word in words[:-1]] + words[-1:])


def normalize_chinese(text: str) -> str:
    """Chinese characters separated by spaces, Latin words and numbers whole, lower case; no punctuation."""
    text = unicodedata.normalize("NFKC", _APOSTROPHES.sub("'", text)).lower()
    text = re.sub(r"[^\w\s']|_|(?<!\w)'|'(?!\w)", " ", text)
    return " ".join(re.sub(f"({CJK})", r" \1 ", text).split())


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "en": normalize_english,
    "zh": normalize_chinese,
    "none": lambda text: " ".join(text.split()),
}


def get_normalizer(name: str) -> Callable[[str], str]:
    """The normaliser ``en``, ``zh`` or ``none`` (which joins runs of spaces).

    Raises:
        InputError: another name.
    """
    if name not in NORMALIZERS:
        raise InputError(f"normaliser '{name}': valid names: {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]


def _spell_numbers(text: str) -> str:
    """Replace everything that has digits by words; the most specific patterns first."""

    def iso_date(match: re.Match[str]) -> str:
        year, month, day = map(int, match.groups())
        if not (1 <= month <= 12 and 1 <= day <= 31):
            return match[0]
        return f" {_MONTHS[month - 1]} {spell_ordinal(day)} {spell_year(year)} "

    def month_day(match: re.Match[str]) -> str:
        return f"{match[1]} {spell_ordinal(int(match[2]))} "

    def clock(match: re.Match[str]) -> str:
        hour, minute = int(match[1]), int(match[2])
        if hour > 24 or minute > 59:
            return match[0]
        rest = "" if minute == 0 else f"{'oh ' if minute < 10 else ''}{spell_number(minute)}"
        return f" {spell_number(hour)} {rest or ('' if match[3] else 'o clock')} {match[3] or ''} "

    def money(match: re.Match[str]) -> str:
        one, many, small_one, small_many = _CURRENCIES[match[1]]
        amount, scale = match[2].replace(",", ""), match[3]
        if scale:
            return f" {_spell_decimal(amount)} {scale} {many} "
        whole, _, part = amount.partition(".")
        cents = int((part + "0")[:2]) if part else 0
        words = f" {_spell_decimal(whole)} {one if whole == '1' else many} "
        return words + (
            f"and {spell_number(cents)} {small_one if cents == 1 else small_many} " if cents else ""
        )

    def decade(match: re.Match[str]) -> str:
        *head, last = (
            spell_year(int(match[1])) if len(match[1]) == 4 else spell_number(int(match[1]))
        ).split()
        return " " + " ".join([*head, last[:-1] + "ies" if last.endswith("y") else last + "s"]) + " "

    text = re.sub(r"\b(\d{4})-(\d\d)-(\d\d)\b", iso_date, text)
    text = re.sub(rf"\b({_MONTH})\s+(\d{{1,2}})(?:st|nd|rd|th)?\b(?![:.,]\d)", month_day, text)
    text = re.sub(r"\b(\d{1,2}):(\d\d)(?!\d)\s*(?:([ap]m)\b)?", clock, text)
    scale = r"(?:\s+(thousand|million|billion|trillion))?\b"
    text = re.sub(rf"([$£€¥])\s?({_NUMBER}){scale}", money, text)
    text = re.sub(r"\b(\d{4}|\d{2})'?s\b", decade, text)
    text = re.sub(r"\b(\d{1,15})(?:st|nd|rd|th)\b", lambda m: f" {spell_ordinal(int(m[1]))} ", text)
    text = re.sub(r"(?<![\w.-])-(?=\d)", " minus ", text)
    text = re.sub(r"\b1/2\b", " one half ", text)
    text = re.sub(r"(?<!\d)(?<!\d[.,])(\d{4})(?!\d|[.,]\d)", lambda m: f" {_spell_four(m[1])} ", text)
    return re.sub(_NUMBER, lambda m: f" {_spell_decimal(m[0].replace(',', ''))} ", text)


def _spell_four(digits: str) -> str:
    """Four digits without a comma are read as a year between 1100 and 2099."""
    return spell_year(int(digits)) if digits[0] != "0" else spell_digits(digits)


def _spell_decimal(number: str) -> str:
    whole, point, part = number.partition(".")
    by_digit = len(whole) > 18 or (len(whole) > 1 and whole[0] == "0")
    spoken = spell_digits(whole) if by_digit else spell_number(int(whole))
    return f"{spoken} point {spell_digits(part)}" if point else spoken


def _trim_apostrophes(word: str) -> str:
    """Drop apostrophes that are quotation marks."""
    inner = word.strip("'")
    if word.startswith("'") and inner in _APHERESIS:
        inner = "'" + inner
    if word.endswith("'") and inner.endswith(("s", "in")) and not word.startswith("'"):
        inner += "'"
    return inner
