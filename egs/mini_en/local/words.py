"""Transcripts of this recipe: lower-case words with apostrophes, nothing else.

Standard library only, because the synthesis scripts run in a separate environment without nar_speech.
"""

import re
import unicodedata

TITLES = {"mr": "mister", "mrs": "missus", "ms": "miss", "dr": "doctor", "st": "saint", "messrs": "messieurs"}


def plain(text: str) -> str:
    """ASCII text with simple quotes: accents and typographic quotes go."""
    text = text.translate(str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-"}))
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def expand_titles(text: str) -> str:
    """ "Mr. Smith" -> "Mister Smith", for the synthesiser and the transcript alike."""

    def spell(match: re.Match) -> str:
        word = TITLES[match[1].lower()]
        return word.capitalize() if match[1][0].isupper() else word

    return re.sub(r"\b(" + "|".join(TITLES) + r")\.(?=\s)", spell, text, flags=re.I)


def to_words(text: str) -> str:
    """The transcript of a sentence: words of a-z and inner apostrophes, single spaces."""
    text = re.sub(r"[^a-z' ]+", " ", expand_titles(plain(text)).lower())
    return " ".join(word for word in (raw.strip("'") for raw in text.split()) if word)


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
