"""Transcripts of this recipe: lower-case words with apostrophes, nothing else.

Standard library only, because the synthesis scripts run in a separate environment without nar_speech.
"""

import re
import unicodedata

TITLES = {
    "mr": "mister",
    "mrs": "missus",
    "ms": "miss",
    "dr": "doctor",
    "st": "saint",
    "messrs": "messieurs",
    "capt": "captain",
    "col": "colonel",
    "gen": "general",
    "gov": "governor",
    "lieut": "lieutenant",
    "lt": "lieutenant",
    "prof": "professor",
    "rev": "reverend",
    "sergt": "sergeant",
}


def plain(text: str) -> str:
    """ASCII text with simple quotes: accents and typographic quotes go."""
    if text.isascii():
        return text
    text = text.translate(str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-"}))
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def expand_titles(text: str) -> str:
    """ "Mr. Smith" -> "Mister Smith", for the synthesiser and the transcript alike."""

    def spell(match: re.Match) -> str:
        word = TITLES.get(match[1].lower())
        if word is None:
            return match[0]
        return word.capitalize() if match[1][0].isupper() else word

    return re.sub(r"\b([A-Za-z]{2,6})\.(?=\s)", spell, text) if ". " in text or ".\n" in text else text


def to_words(text: str) -> str:
    """The transcript of a sentence: words of a-z and inner apostrophes, single spaces."""
    return bare(expand_titles(plain(text)))


def bare(text: str) -> str:
    """The same of plain text whose titles are spelled out already."""
    text = re.sub(r"[^a-z' ]+", " ", text.lower())
    if "'" in text:
        text = re.sub(r"(?<![a-z])'+|'+(?![a-z])", " ", text)
    return " ".join(text.split())


def pieces(text: str, longest: int = 14) -> list[str]:
    """Cut a sentence at commas and semicolons into parts of 3 to `longest` words where that is possible."""
    parts, current = [], ""
    for piece in re.split(r"(?<=[,;:])\s+", text):
        joined = f"{current} {piece}".strip()
        if current and len(joined.split()) > longest and len(current.split()) >= 3:
            parts.append(current)
            current = piece
        else:
            current = joined
    if len(current.split()) < 3 and parts:
        parts[-1] = f"{parts[-1]} {current}"
    elif current:
        parts.append(current)
    return parts
