"""English as it is said: numbers, dates, times, money, units, abbreviations and signs written out in words.

For speech synthesis, or any use that wants words and keeps sentences: capitals and punctuation stay, unlike
in ``nar_speech.text.normalize``, whose output is for scoring. What is ambiguous is read the American way.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from nar_speech.text.normalize import spell_digits, spell_number, spell_ordinal, spell_year

# fmt: off
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)
_TITLES = {
    "Mr": "Mister", "Mrs": "Missus", "Ms": "Miz", "Dr": "Doctor", "Prof": "Professor",
}
_DOTTED_TITLES = {
    "Drs": "Doctors", "Rev": "Reverend", "Hon": "Honorable", "Gen": "General", "Col": "Colonel",
    "Maj": "Major", "Capt": "Captain", "Lt": "Lieutenant", "Sgt": "Sergeant", "Gov": "Governor",
    "Sen": "Senator",
    "Rep": "Representative", "Pres": "President", "Fr": "Father", "Mt": "Mount", "Ft": "Fort",
}
_ABBREVIATIONS = {
    "e.g": "for example", "i.e": "that is", "etc": "et cetera", "vs": "versus", "approx": "approximately",
    "dept": "department", "est": "established", "Inc": "Incorporated", "Ltd": "Limited",
    "Corp": "Corporation", "Co": "Company", "Jr": "Junior", "Sr": "Senior", "Esq": "Esquire",
    "Bros": "Brothers",
    "Ave": "Avenue", "Blvd": "Boulevard", "Rd": "Road", "St": "Street", "al": "al", "ca": "circa",
    "misc": "miscellaneous",
    "Univ": "University", "Assn": "Association",
}
_BEFORE_DIGITS = {
    "no": "number", "fig": "figure", "vol": "volume", "ch": "chapter", "sec": "section", "p": "page",
}
_UNITS = {
    "mm": "millimeter", "cm": "centimeter", "m": "meter", "km": "kilometer", "mi": "mile", "ft": "foot",
    "yd": "yard", "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "pound", "lbs": "pound",
    "oz": "ounce",
    "ml": "milliliter", "l": "liter", "L": "liter", "ms": "millisecond", "s": "second", "sec": "second",
    "min": "minute", "h": "hour", "hr": "hour", "hrs": "hour", "Hz": "hertz", "kHz": "kilohertz",
    "MHz": "megahertz", "GHz": "gigahertz", "kB": "kilobyte", "KB": "kilobyte", "MB": "megabyte",
    "GB": "gigabyte", "TB": "terabyte", "V": "volt", "kV": "kilovolt", "W": "watt", "kW": "kilowatt",
    "MW": "megawatt", "kWh": "kilowatt hour", "mA": "milliampere", "dB": "decibel",
    "Pa": "pascal", "kPa": "kilopascal", "kJ": "kilojoule", "kcal": "kilocalorie",
    "mph": "mile per hour", "kph": "kilometer per hour", "km/h": "kilometer per hour",
    "m/s": "meter per second", "mm2": "square millimeter", "cm2": "square centimeter", "m2": "square meter",
    "km2": "square kilometer", "cm3": "cubic centimeter", "m3": "cubic meter",
    "rpm": "revolution per minute",
    "fps": "frame per second", "px": "pixel", "°C": "degree Celsius", "°F": "degree Fahrenheit",
    "°": "degree",
    "%": "percent", "‰": "per mille",
}
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"), "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"), "¥": ("yen", "yen", "sen", "sen"),
    "₹": ("rupee", "rupees", "paisa", "paise"), "₩": ("won", "won", "jeon", "jeon"),
    "₽": ("ruble", "rubles", "kopek", "kopeks"), "₺": ("lira", "liras", "kurus", "kurus"),
}
_CODES = {
    "USD": "$", "GBP": "£", "EUR": "€", "JPY": "¥", "INR": "₹", "KRW": "₩", "RUB": "₽", "TRY": "₺",
}
_SCALES = {
    "k": "thousand", "K": "thousand", "M": "million", "m": "million", "mn": "million", "B": "billion",
    "bn": "billion", "b": "billion", "T": "trillion", "tn": "trillion", "thousand": "thousand",
    "million": "million", "billion": "billion", "trillion": "trillion",
}
_SIGNS = {
    "&": " and ", "@": " at ", "#": " hash ", "+": " plus ", "=": " equals ", "×": " times ",
    "÷": " divided by ",
    "±": " plus or minus ", "~": " about ", "≈": " about ", "<": " less than ", ">": " greater than ",
    "≤": " at most ", "≥": " at least ", "≠": " is not equal to ", "^": " to the power of ", "*": " times ",
    "\\": " backslash ", "§": " section ", "©": " copyright ", "®": " registered ", "™": " trademark ",
    "√": " square root of ", "∞": " infinity ", "π": " pi ", "µ": " micro ", "μ": " micro ", "Ω": " ohm ",
}
# fmt: on
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,]\d)|\d+(?:\.\d+)?"
_NO_DIGIT_BEFORE = r"(?<!\d)(?<!\d[.,])"
_MONTH_NAMES = {name[:3]: name for name in _MONTHS} | {name: name for name in _MONTHS} | {"Sept": "September"}
_SENTENCE_STARTS = {"In", "At", "On", "The", "To", "From", "Near", "And", "But", "For", "By", "Of", "Doctor"}
_MONEY = "".join(_CURRENCIES)
_MONTH = "|".join(sorted(_MONTH_NAMES, key=len, reverse=True))
_ZERO_DECIMALS = ("yen", "won")
_IDIOMS = {(24, 7), (9, 11), (50, 50), (20, 20)}
_FRACTIONS = {2: ("half", "halves"), 4: ("quarter", "quarters")}


def _alternatives(names: dict[str, object] | dict[str, str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


def speak_english(text: str) -> str:
    """Words for all that is not words; capitals, sentences and their punctuation stay, spaces are joined.

    Digits and spellings of other scripts are folded first (NFKC). No digit is left; a sign that is never
    said, such as a bracket, may be.
    """
    text = _fold(text)
    for pattern, replace in _RULES:
        text = pattern.sub(replace, text)
    text = re.sub(r" +([,.?!;:…])", r"\1", re.sub(r"\s+", " ", text))
    return text.strip()


def _fold(text: str) -> str:
    """Compatibility forms as plain ones; quotes, dashes and digits of one kind."""
    text = re.sub(r"(?<=\d)(?=[¼½¾⅐-⅞])", " ", text)
    text = re.sub(r"(?<=[A-Za-z)])([²³])(?!\w)", _power, text)
    text = unicodedata.normalize("NFKC", text.replace("…", "...")).replace("⁄", "/")
    text = re.sub("[‘’ʼ＇`´]", "'", text)
    text = re.sub("[‐‑‒−﹣]", "-", text)  # a minus or hyphen; – and — are handled as dashes
    text = "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text)
    return re.sub(r"\s+", " ", text)


def _power(match: re.Match[str]) -> str:
    """A unit's power stays a digit behind it (m²); any other is said."""
    before = re.search(r"[A-Za-z]+$", match.string[max(0, match.start() - 8) : match.start()])
    digit = "2" if match[1] == "²" else "3"
    if before and before[0] + digit in _UNITS:
        return digit
    return " squared " if digit == "2" else " cubed "


def _spell(number: str) -> str:
    """A number with or without commas and decimals; long ones and those with a leading zero by digits."""
    whole, point, part = number.replace(",", "").partition(".")
    by_digit = len(whole) > 18 or (len(whole) > 1 and whole[0] == "0")
    spoken = spell_digits(whole) if by_digit else spell_number(int(whole))
    return f"{spoken} point {spell_digits(part)}" if point else spoken


def _iso_date(match: re.Match[str]) -> str:
    return _date(match, match["year"], match["month"], match["day"])


def _slash_date(match: re.Match[str]) -> str:
    first, second = match["first"], match["second"]
    if int(first) > 12:  # not American: the day comes first
        first, second = second, first
    return _date(match, match["year"], first, second)


def _date(match: re.Match[str], year: str, month: str, day: str) -> str:
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return match[0]
    return f" {_MONTHS[int(month) - 1]} {spell_ordinal(int(day))}, {spell_year(int(year))} "


def _month_day(match: re.Match[str]) -> str:
    if not 1 <= int(match["day"]) <= 31:
        return match[0]
    year = f", {spell_year(int(match['year']))}" if match["year"] else ""
    return f"{_MONTH_NAMES[match['month']]} {spell_ordinal(int(match['day']))}{year}"


def _day_month(match: re.Match[str]) -> str:
    if not 1 <= int(match["day"]) <= 31:
        return match[0]
    year = f" {spell_year(int(match['year']))}" if match["year"] else ""
    return f"the {spell_ordinal(int(match['day']))} of {_MONTH_NAMES[match['month']]}{year}"


def _clock(match: re.Match[str]) -> str:
    hour, minute, second = int(match["hour"]), int(match["minute"]), match["second"]
    if hour > 24 or minute > 59 or (second and int(second) > 59):
        return match[0]
    words = [spell_number(hour)]
    if minute:
        words.append(("oh " if minute < 10 else "") + spell_number(minute))
    elif not match["half"] and not second:
        words.append("o'clock" if 1 <= hour <= 12 else "hundred")
    if second:
        words.append(f"and {spell_number(int(second))} second{'' if int(second) == 1 else 's'}")
    return " ".join([*words, *_half(match)])


def _hour(match: re.Match[str]) -> str:
    if not 1 <= int(match["hour"]) <= 12:
        return match[0]
    return " ".join([spell_number(int(match["hour"])), *_half(match)])


def _half(match: re.Match[str]) -> list[str]:
    return [f"{match['half'][0].upper()} M"] if match["half"] else []


def _money(match: re.Match[str]) -> str:
    sign = match["sign"] if match["sign"] in _CURRENCIES else _CODES[match["sign"]]
    one, many, small_one, small_many = _CURRENCIES[sign]
    amount, scale = match["amount"].replace(",", ""), match["scale"]
    minus = "minus " if match.groupdict().get("minus") else ""
    if scale:
        return f" {minus}{_spell(amount)} {_SCALES[scale]} {many} "
    whole, point, part = amount.partition(".")
    if point and (len(part) > 2 or one in _ZERO_DECIMALS):
        return f" {minus}{_spell(amount)} {many} "
    cents = int((part + "0")[:2]) if point else 0
    small = f"{spell_number(cents)} {small_one if cents == 1 else small_many}"
    if whole.strip("0") == "" and cents:
        return f" {minus}{small} "
    words = f" {minus}{_spell(whole)} {one if whole == '1' else many} "
    return words + (f"and {small} " if cents else "")


def _unit(match: re.Match[str]) -> str:
    unit, number = _UNITS[match["unit"]], match["number"]
    if number != "1":
        head, per, rest = unit.partition(" per ")
        words = head.split()
        if words[-1] == "foot":
            words[-1] = "feet"
        elif words[0] == "degree":
            words[0] = "degrees"
        elif words[-1] not in ("hertz", "percent", "per", "mille"):
            words[-1] += "s"
        unit = " ".join(words) + per + rest
    return f"{_spell(number)} {unit} "


def _phone_number(match: re.Match[str]) -> str:
    parts = [part for part in re.split(r"\D+", match[0]) if part]
    return " " + ", ".join(spell_digits(part) for part in parts) + " "


def _range(match: re.Match[str]) -> str:
    low, high = match["low"], match["high"]
    if _is_year(low) and len(high) in (2, 4):
        return f"{spell_year(int(low))} to {_year_or_number(high)}"
    return f"{low} to {high}"


def _is_year(digits: str) -> bool:
    return len(digits) == 4 and 1100 <= int(digits) <= 2099


def _year_or_number(digits: str) -> str:
    return spell_year(int(digits)) if _is_year(digits) else _spell(digits)


def _heights(match: re.Match[str]) -> str:
    return f" {_spell(match['feet'])} foot {_spell(match['inches'])} "


def _mixed_fraction(match: re.Match[str]) -> str:
    whole, top, bottom = match["whole"], int(match["top"]), int(match["bottom"])
    if not whole and (top, bottom) in _IDIOMS:
        return f" {spell_number(top)} {spell_number(bottom)} "
    one, many = _FRACTIONS.get(bottom) or (spell_ordinal(bottom), spell_ordinal(bottom) + "s")
    if bottom < 2 or (bottom > 20 and bottom not in (32, 64, 100, 1000)) or top >= bottom:
        words = f"{spell_number(top)} over {spell_number(bottom)}"
    elif whole and top == 1:
        words = ("a " if bottom in _FRACTIONS else "one ") + one
    else:
        words = f"{spell_number(top)} {one if top == 1 else many}"
    return f" {_spell(whole)} and {words} " if whole else f" {words} "


def _decade(match: re.Match[str]) -> str:
    digits = match["decade"]
    *head, last = (spell_year(int(digits)) if len(digits) == 4 else spell_number(int(digits))).split()
    return " ".join([*head, last[:-1] + "ies" if last.endswith("y") else last + "s"])


def _ordinal_number(match: re.Match[str]) -> str:
    digits = match["number"].replace(",", "")
    return spell_ordinal(int(digits)) if len(digits) <= 18 else spell_digits(digits)


def _version(match: re.Match[str]) -> str:
    return " " + " point ".join(_spell(part) for part in match[0].split(".")) + " "


def _plain(match: re.Match[str]) -> str:
    return f" {_year_or_number(match[0]) if match[0].isdigit() else _spell(match[0])} "


def _address(match: re.Match[str]) -> str:
    """A web or mail address: what stands between its signs, and the signs by name."""
    names = {".": "dot", "@": "at", "/": "slash", "-": "dash", "_": "underscore", ":": "colon"}
    text = re.sub(r"^https?://", "", match[0])
    text = re.sub(r"^www\.", "w w w dot ", text)
    return re.sub(r"[^\w]|_", lambda sign: f" {names.get(sign[0], ' ')} ", text.rstrip("/"))


def _saint(match: re.Match[str]) -> str:
    """A saint before a name; a street (left to the abbreviations) behind one or a number."""
    before = match["before"] or ""
    street = before[:1].isdigit() or (before[:1].isupper() and before.strip() not in _SENTENCE_STARTS)
    return match[0] if street else f"{before}Saint"


Rule = tuple[re.Pattern[str], "str | Callable[[re.Match[str]], str]"]
_SCALE = rf"(?:\s?(?P<scale>{_alternatives(_SCALES)})\b)?"
_HALF = r"(?P<half>[AaPp])\.?\s?[Mm]\b(?:\.(?!\s+[A-Z\d]|\s*$))?"
# The most specific first: what a rule has written in words is nothing to those behind it.
_RULES: tuple[Rule, ...] = (
    (
        re.compile(r"\bhttps?://[^\s,;!?]*[\w/]|\bwww\.[\w./-]*\w|(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.\w+)+"),
        _address,
    ),
    (re.compile(r"(?P<before>\b[\w']{1,40}\s)?\bSt\b\.?(?=\s+[A-Z])"), _saint),
    (
        re.compile(
            rf"\b(?P<title>(?:{_alternatives(_TITLES)})(?=\.?\s+[A-Z])|(?:{_alternatives(_DOTTED_TITLES)})"
            r"(?=\.\s+[A-Z]))\.?"
        ),
        lambda match: (_TITLES | _DOTTED_TITLES)[match["title"]],
    ),
    (
        re.compile(rf"\b(?P<short>{_alternatives(_BEFORE_DIGITS)})\.\s?(?=\d)", re.IGNORECASE),
        lambda match: _BEFORE_DIGITS[match["short"].lower()] + " ",
    ),
    (re.compile(r"#\s?(?=\d)"), "number "),
    (
        re.compile(rf"\b(?P<short>{_alternatives(_ABBREVIATIONS)})\.(?=(?P<more>\s+[^\sA-Z]|,|;|:|\))?)"),
        lambda match: _ABBREVIATIONS[match["short"]] + ("" if match["more"] else "."),
    ),
    (re.compile(rf"{_NO_DIGIT_BEFORE}\b(?P<year>\d{{4}})-(?P<month>\d\d)-(?P<day>\d\d)\b"), _iso_date),
    (
        re.compile(rf"{_NO_DIGIT_BEFORE}\b(?P<first>\d\d?)/(?P<second>\d\d?)/(?P<year>\d{{4}})\b(?!/)"),
        _slash_date,
    ),
    (
        re.compile(
            rf"\b(?P<month>{_MONTH})\b\.?\s+(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\b(?![:./]\d)"
            r"(?:,?\s+(?P<year>[12]\d{3})\b(?![:./]\d))?"
        ),
        _month_day,
    ),
    (
        re.compile(
            rf"\b(?:the\s+)?(?P<day>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<month>{_MONTH})\b"
            r"(?:\.(?=\s+\d))?(?:,?\s+(?P<year>[12]\d{3})\b(?![:./]\d))?"
        ),
        _day_month,
    ),
    (
        re.compile(
            rf"{_NO_DIGIT_BEFORE}(?P<hour>\d{{1,2}}):(?P<minute>\d\d)(?::(?P<second>\d\d))?(?![\d:])(?:\s?{_HALF})?"
        ),
        _clock,
    ),
    (re.compile(rf"{_NO_DIGIT_BEFORE}(?P<hour>\d{{1,2}})\s?{_HALF}"), _hour),
    (
        re.compile(
            rf"(?:(?<!\w)(?P<minus>-))?(?P<sign>[{_MONEY}]|\b(?:{'|'.join(_CODES)})\b)"
            rf"\s?(?P<amount>{_NUMBER}){_SCALE}"
        ),
        _money,
    ),
    (
        re.compile(
            rf"{_NO_DIGIT_BEFORE}(?P<amount>{_NUMBER}){_SCALE}"
            rf"\s?(?P<sign>[{_MONEY}](?!\s?\d)|(?:{'|'.join(_CODES)})\b)"
        ),
        _money,
    ),
    (re.compile(r"(?<![\w.])(?:\+?\d{1,2}[\s-])?\(?\d{3}\)?[\s-]\d{3}-\d{4}\b"), _phone_number),
    (
        re.compile(
            rf"{_NO_DIGIT_BEFORE}(?:(?P<whole>\d{{1,6}}) )?\b(?P<top>\d{{1,4}})/(?P<bottom>\d{{1,4}})\b(?!/)"
        ),
        _mixed_fraction,
    ),
    (
        re.compile(rf"{_NO_DIGIT_BEFORE}\b(?P<low>\d{{1,9}})\s?[-–]\s?(?P<high>\d{{1,9}})\b(?![-–/]\d)"),
        _range,
    ),
    (re.compile(r"(?<!\d)(?<!\d[.,])'?(?P<decade>[12]\d\d0|[2-9]0)'?s\b"), _decade),
    (re.compile(r"\b(?P<feet>\d{1,2})'\s?(?P<inches>\d{1,2})(?:\"|''|\b)"), _heights),
    (re.compile(r"(?<![\w.-])-(?=\d)"), " minus "),
    (
        re.compile(
            rf"{_NO_DIGIT_BEFORE}(?P<number>{_NUMBER})[\s-]?(?P<unit>{_alternatives(_UNITS)})(?![\w²³]|'\w)"
        ),
        _unit,
    ),
    (re.compile(r"(?<=\w)-(?=\w)"), " "),
    (re.compile(rf"{_NO_DIGIT_BEFORE}\d+(?:\.\d+){{2,}}"), _version),
    (
        re.compile(rf"{_NO_DIGIT_BEFORE}(?P<number>\d{{1,3}}(?:,\d{{3}})+|\d+)(?:st|nd|rd|th)\b"),
        _ordinal_number,
    ),
    (
        re.compile(
            rf"{_NO_DIGIT_BEFORE}(?P<number>{_NUMBER})\s?(?P<scale>thousand|million|billion|trillion|[kK])\b"
        ),
        lambda match: f"{_spell(match['number'])} {_SCALES[match['scale']]}",
    ),
    (re.compile(_NUMBER), _plain),
    (re.compile(r"\s+[-–—]+\s+|[–—]|--+"), ", "),
    (re.compile(r"(?<=[a-z]) /\s?(?=[a-z])"), " per "),
    (re.compile("/"), " "),
    (re.compile("|".join(map(re.escape, _SIGNS))), lambda match: _SIGNS[match[0]]),
)
