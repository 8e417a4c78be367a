"""French, German and Korean to phones: voices of espeak-ng, which counts in these languages by itself.

Marks become those four that the official code gives in French and German.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nar_speech.text.g2p.marks import fold_marks, read_words

# fmt: off
_FRENCH = {
    "M.": "monsieur", "Mlle": "mademoiselle", "Mlles": "mesdemoiselles", "Mme": "madame",
    "Mmes": "mesdames",
    "Dr": "docteur", "Pr": "professeur", "etc.": "et cetera", "p. ex.": "par exemple",
    "c.-à-d.": "c'est-à-dire", "av.": "avenue", "boul.": "boulevard", "no": "numéro",
}
_GERMAN = {
    "z. B.": "zum Beispiel", "z.B.": "zum Beispiel", "d. h.": "das heißt", "d.h.": "das heißt",
    "u. a.": "unter anderem",
    "u.a.": "unter anderem", "usw.": "und so weiter", "bzw.": "beziehungsweise", "ca.": "circa",
    "Dr.": "Doktor",
    "Nr.": "Nummer", "Str.": "Straße", "St.": "Sankt",
}
_KOREAN = {
    "A": "에이", "B": "비", "C": "씨", "D": "디", "E": "이", "F": "에프", "G": "지", "H": "에이치",
    "I": "아이",
    "J": "제이", "K": "케이", "L": "엘", "M": "엠", "N": "엔", "O": "오", "P": "피", "Q": "큐",
    "R": "알", "S": "에스",
    "T": "티", "U": "유", "V": "브이", "W": "더블유", "X": "엑스", "Y": "와이", "Z": "제트",
}
# fmt: on
_FEWER_MARKS = str.maketrans({";": ",", ":": ",", "…": ".", "-": " ", "–": ",", "—": ",", "\n": " "})


@dataclass(frozen=True)
class Language:
    """What a voice of espeak-ng needs to be told.

    Attributes:
        voice: its name.
        comma: the word between a whole number and its decimals; thousands then have points or spaces.
        words: abbreviations and what they stand for.
        signs: signs and their words.
    """

    voice: str
    comma: str | None = None
    words: dict[str, str] = field(default_factory=dict)
    signs: dict[str, str] = field(default_factory=dict)


LANGUAGES = {
    "fr": Language(
        "fr",
        "virgule",
        _FRENCH,
        {"%": "pour cent", "€": "euros", "$": "dollars", "£": "livres", "&": "et", "+": "plus", "=": "égale"},
    ),
    "de": Language(
        "de",
        "Komma",
        _GERMAN,
        {"%": "Prozent", "€": "Euro", "$": "Dollar", "£": "Pfund", "&": "und", "+": "plus", "=": "gleich"},
    ),
    "ko": Language("ko", None, {}, {"%": "퍼센트", "₩": "원", "$": "달러", "€": "유로", "&": "그리고"}),
}


def other_phones(text: str, language: str) -> list[str]:
    """Phones of a text in one of :data:`LANGUAGES`."""
    return read_words(speak_other(text, language), LANGUAGES[language].voice, whole_words=True)


def speak_other(text: str, language: str) -> str:
    """Abbreviations, signs and decimals as words; marks reduced to ``, . ? !``."""
    rules = LANGUAGES[language]
    text = fold_marks(text)
    if rules.words:
        names = "|".join(re.escape(name) for name in sorted(rules.words, key=len, reverse=True))
        text = re.sub(rf"(?<!\w)({names})(?!\w)", lambda match: rules.words[match[0]], text)
    if rules.comma:
        # 1.234.567 and 1 234 are one number, 3,5 has decimals.
        text = re.sub(r"(?<=\d)[.   ](?=\d{3}(?!\d))", "", text)
        text = re.sub(r"(?<=\d),(?=\d)", f" {rules.comma} ", text)
    else:
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
        text = re.sub(r"(?<![A-Za-z])[A-Z]+(?![A-Za-z])", lambda match: _spell_korean(match[0]), text)
    text = re.sub(r"([€$£₩])\s?(\d+(?:\.\d+)?)", r"\2 \1", text)
    text = "".join(f" {rules.signs[sign]} " if sign in rules.signs else sign for sign in text)
    return re.sub(r"\s+", " ", text.translate(_FEWER_MARKS)).strip()


def _spell_korean(letters: str) -> str:
    return "".join(_KOREAN[letter] for letter in letters)
