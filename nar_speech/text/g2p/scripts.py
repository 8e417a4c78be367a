"""Which language a character tells of, and text cut into runs of one language."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from nar_speech.errors import InputError

LANGUAGES = ("en", "zh", "fr", "de", "ja", "ko")
# What a language is written with; digits and signs belong to all.
_SCRIPTS = {
    "en": {"Latin", "Greek", "Han"},
    "zh": {"Latin", "Greek", "Han"},
    "fr": {"Latin", "Greek"},
    "de": {"Latin", "Greek"},
    "ja": {"Han", "Kana", "Latin", "Greek"},
    "ko": {"Hangul", "Latin"},
}
_RUNS = {"Latin": "en", "Greek": "en", "Han": "zh"}
_NAMES = {
    "LATIN": "Latin",
    "FULLWIDTH LATIN": "Latin",
    "MODIFIER LETTER": "Latin",
    "GREEK": "Greek",
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "HALFWIDTH KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana",
    "HANGUL": "Hangul",
}
Run = tuple[str, str]


@lru_cache(maxsize=8192)
def script_of(character: str) -> str | None:
    """Script of a letter, such as ``Latin`` or ``Han``; None for what is no letter.

    Letters of a script that no language here is written with give its Unicode name's first word, such as
    ``Cyrillic``.
    """
    if not character.isalpha():
        return "Han" if character == "〇" else None
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "") or unicodedata.name(
        character, ""
    )
    for start, script in _NAMES.items():
        if name.startswith(start):
            return script
    # Signs that Unicode counts as letters: ª, ℵ, 𝐀 ...
    return name.split()[0].capitalize() if name else "an unnamed script"


def detect_language(text: str) -> str:
    """``ko`` or ``ja`` where Hangul or kana stand, else ``en`` for what :func:`runs` takes apart."""
    scripts = {script_of(character) for character in set(text)}
    return "ko" if "Hangul" in scripts else "ja" if "Kana" in scripts else "en"


def check_scripts(text: str, language: str) -> None:
    """Refuse letters that a language does not have.

    Raises:
        InputError: the message names the script and some letters.
    """
    allowed = _SCRIPTS[language]
    strange: dict[str, list[str]] = {}
    for character in dict.fromkeys(text):
        script = script_of(character)
        if script is not None and script not in allowed:
            strange.setdefault(script, []).append(character)
    if strange:
        script, letters = next(iter(strange.items()))
        raise InputError(
            f"text has {script} letters ({''.join(letters[:8])}), which the phones of '{language}' can't say;"
            f" languages are {', '.join(LANGUAGES)}"
        )


def runs(text: str) -> list[Run]:
    """English and Chinese parts of a text as ``(part, language)``.

    Digits, signs and spaces belong to the part before them, at the start to the first one; a text without
    letters is English.
    """
    found: list[Run] = []
    start, language = 0, None
    for at, character in enumerate(text):
        this = _RUNS.get(script_of(character))
        if this is None:
            continue
        if language not in (None, this):
            found.append((text[start:at], language))
            start = at
        language = this
    return [*found, (text[start:], language or "en")]
