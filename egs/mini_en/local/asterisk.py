"""The English Asterisk prompts of Debian (CC BY-SA 3.0, voice of Allison Smith): names, words, files."""

import gzip
import re
from pathlib import Path

from templates import cardinal
from words import to_words

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
# Words that the list misspells, as they are spoken.
SPELLING = {"fourtieth": "fortieth", "umute": "unmute", "voicemail": "voice mail"}


def spell_numbers(text: str) -> str | None:
    """Whole numbers below 100 in words; None where others occur (how they are read isn't written)."""
    out = re.sub(r"(?<![\w.])\d{1,2}(?![\w.]*\d)(?!\w)", lambda match: cardinal(int(match[0])), text)
    return None if re.search(r"\d", out) else out


def prompts() -> list[tuple[str, str, Path]]:
    """(name, words, G.722 file) of every spoken prompt that is there; tones and music are left out.

    Raises FileNotFoundError naming the Debian packages when they are not installed.
    """
    if not SOUNDS.is_dir() or not TEXTS.exists():
        raise FileNotFoundError(
            "Debian packages asterisk-core-sounds-en and asterisk-core-sounds-en-g722 are not installed"
        )
    rows = []
    for line in gzip.decompress(TEXTS.read_bytes()).decode(errors="replace").splitlines():
        match = re.match(r"([\w./-]+):\s+(.*\S)", line)
        if not match or line.startswith(";") or re.search(r"[\[<(]", match[2]):
            continue
        name, text = match[1], spell_numbers(match[2])
        path = SOUNDS / f"{name}.g722"
        words = to_words(text) if text else ""
        if words and path.exists():
            rows.append((name.replace("/", "_"), " ".join(SPELLING.get(w, w) for w in words.split()), path))
    return rows
