"""Numbers and abbreviations of English as the official MaskGCT code writes them out, to the letter.

Its rules miss much (dates, times, a dollar amount of one decimal ...): ``nar_speech.text.spoken_english`` is
used unless the official writing is asked for. Facts: models/tts/maskgct/g2p/g2p/english.py of Amphion.
"""

from __future__ import annotations

import re

# fmt: off
_ABBREVIATIONS = {
    "mrs": "misess", "mr": "mister", "dr": "doctor", "st": "saint", "co": "company", "jr": "junior",
    "maj": "major", "gen": "general", "drs": "doctors", "rev": "reverend", "lt": "lieutenant",
    "hon": "honorable", "sgt": "sergeant", "capt": "captain", "esq": "esquire", "ltd": "limited",
    "col": "colonel", "ft": "fort", "etc": "et cetera", "btw": "by the way",
}
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = (
    "", "thousand", "million", "billion", "trillion", "quadrillion", "quintillion", "sextillion",
    "septillion", "octillion", "nonillion", "decillion",
)
_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}
# fmt: on
_ABBREVIATION = re.compile(rf"\b({'|'.join(_ABBREVIATIONS)})\b", re.IGNORECASE)
_PLACES = 3 * len(_SCALES)  # longer numbers, at which the official code breaks off, are read digit by digit


def official_english(text: str) -> str:
    """Abbreviations and numbers in words, with the official spaces and commas."""
    text = _ABBREVIATION.sub(_abbreviation, text)
    text = re.sub(r"[0-9][0-9,]+[0-9]", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"£([0-9,]*[0-9]+)", r"\1 pounds", text)
    text = re.sub(r"\$([0-9.,]*[0-9]+)", _dollars, text)
    # Looking back keeps long runs of digits from being tried from every digit; it changes no result.
    text = re.sub(r"(?<![0-9])([0-9]+)/([0-9]+)", _fraction, text)
    text = re.sub(r"(?<![0-9])[0-9]+\.[0-9]+", lambda match: match[0].replace(".", " point "), text)
    text = re.sub(r"(?<![0-9.,])([0-9.,]*[0-9])%", r"\1 percent ", text)
    text = re.sub(r"(?<![0-9])([0-9]+)(?:st|nd|rd|th)", lambda match: f" {_ordinal(match[1])} ", text)
    return re.sub(r"[0-9]+", _number, text)


def _abbreviation(match: re.Match[str]) -> str:
    return _ABBREVIATIONS[match[0].lower()]


def _cardinal(digits: str, hundred: str) -> str:
    """In words, with a comma after every scale but before less than a hundred; ``hundred`` joins that."""
    digits = digits.lstrip("0") or "0"
    if len(digits) > _PLACES:
        return " ".join(_ONES[int(digit)] for digit in digits)
    number = int(digits)
    if number == 0:
        return _ONES[0]
    words = ""
    for power in range(len(_SCALES) - 1, -1, -1):
        part = number // 1000**power % 1000
        if not part:
            continue
        small = power == 0 and part < 100
        scale = f" {_SCALES[power]}" if power else ""
        words += (hundred if small else ", ") * bool(words) + _below_thousand(part, hundred) + scale
    return words


def _below_thousand(number: int, hundred: str) -> str:
    hundreds, rest = divmod(number, 100)
    words = [f"{_ONES[hundreds]} hundred"] if hundreds else []
    if rest >= 20:
        tens, ones = divmod(rest, 10)
        words.append(_TENS[tens] + (f"-{_ONES[ones]}" if ones else ""))
    elif rest:
        words.append(_ONES[rest])
    return hundred.join(words)


def _ordinal(digits: str) -> str:
    words = _cardinal(digits, " and ")
    head, last = re.fullmatch(r"(.*?)([a-z]+)", words).groups()
    if last in _ORDINALS:
        return head + _ORDINALS[last]
    return head + (last[:-1] + "ieth" if last.endswith("y") else last + "th")


def _number(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0") or "0"
    number = int(digits) if len(digits) == 4 else 0
    if not 1000 < number < 3000 or number == 2000 or 2000 < number < 2010 or number % 100 == 0:
        if number > 1000 and number != 2000 and number % 100 == 0 and number < 3000:
            return f" {_cardinal(digits[:2], ' ')} hundred "
        return f" {_cardinal(digits, ' ')} "
    ones = "oh " if number % 100 < 10 else ""
    return f" {_cardinal(digits[:2], ' ')} {ones}{_cardinal(digits[2:], ' ')} "


def _dollars(match: re.Match[str]) -> str:
    parts = match[1].split(".")
    if len(parts) > 2:
        return f" {match[1]} dollars "
    amounts = [part.replace(",", "").lstrip("0") for part in parts]
    dollars, cents = amounts[0], amounts[1] if len(amounts) > 1 else ""
    words = []
    if dollars:
        words.append(f"{dollars} {'dollar' if dollars == '1' else 'dollars'}")
    if cents:
        words.append(f"{cents} {'cent' if cents == '1' else 'cents'}")
    return f" {', '.join(words) or 'zero dollars'} "


def _fraction(match: re.Match[str]) -> str:
    top, bottom = (digits.lstrip("0") or "0" for digits in match.groups())
    if top == "1" and bottom in ("2", "4"):
        return " one half " if bottom == "2" else " one quarter "
    below = {"2": "halves", "4": "quarters"}.get(bottom) or _ordinal(bottom)
    return f" {_cardinal(top, ' and ')} {below} "
