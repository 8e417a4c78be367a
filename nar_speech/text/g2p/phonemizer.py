"""Text of any length in one of six languages to phones and their ids."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

from nar_speech.errors import ConfigError, InputError
from nar_speech.text.g2p.chinese import Readings, chinese_phones, clean_chinese
from nar_speech.text.g2p.english import english_phones
from nar_speech.text.g2p.english_official import official_english
from nar_speech.text.g2p.european import other_phones, speak_other
from nar_speech.text.g2p.japanese import japanese_phones
from nar_speech.text.g2p.marks import MARKS, fold_marks, keep_words
from nar_speech.text.g2p.scripts import LANGUAGES, Run, check_scripts, detect_language, runs, script_of
from nar_speech.text.g2p.vocabulary import WORD_GAP, PhoneVocabulary, named
from nar_speech.text.spoken_chinese import official_chinese, speak_chinese
from nar_speech.text.spoken_english import speak_english

logger = logging.getLogger(__name__)

STYLES = ("spoken", "official")
UNKNOWN = ("warn", "error")


@dataclass(frozen=True)
class PhonemizerConfig:
    """How text becomes phones.

    Attributes:
        language: ``en``, ``zh`` (each takes the two mixed), ``fr``, ``de``, ``ja``, ``ko``, or ``auto``: by
            the letters of a text, of which Latin ones count as English.
        style: ``spoken``: numbers, dates, money and signs are said, "don't" is a word; ``official``: English
            and Chinese exactly as the official code has them, whatever it loses.
        unknown: what to do about phones without an id: ``warn`` leaves them out, as the official code does
            silently, and says which; ``error`` refuses the text.
        polyphones: folder of the official model that reads Chinese characters of several readings, or of the
            official lexicon and this model; None: pypinyin alone.
    """

    language: str = "auto"
    style: str = "spoken"
    unknown: str = "warn"
    polyphones: str | None = None

    def __post_init__(self) -> None:
        for name, valid in (("language", ("auto", *LANGUAGES)), ("style", STYLES), ("unknown", UNKNOWN)):
            if getattr(self, name) not in valid:
                raise ConfigError(f"{name} '{getattr(self, name)}': valid are {', '.join(valid)}")


@dataclass(frozen=True)
class Phones:
    """What a text became.

    Attributes:
        text: the text.
        spoken: what was read: words for everything, and marks.
        runs: its parts by language, ``(part, language)``.
        phones: all phones, those too that have no id.
        ids: int, of the phones that have one.
        dropped: phones without an id, each time they occur.
        words: Chinese words, as they were cut.
    """

    text: str
    spoken: str
    runs: tuple[Run, ...]
    phones: tuple[str, ...]
    ids: tuple[int, ...]
    dropped: tuple[str, ...]
    words: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return "|".join(self.phones)


class Phonemizer:
    """Turns texts into phones; nothing is loaded before a language is needed.

    Args:
        config: the options.
        vocabulary: the phones a model knows (default: MaskGCT's).

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(
        self, config: PhonemizerConfig = PhonemizerConfig(), vocabulary: PhoneVocabulary | None = None
    ):
        self.config = config
        self.vocabulary = vocabulary or PhoneVocabulary.maskgct()
        self._readings: Readings | None = None

    def __call__(self, text: str) -> Phones:
        """Phones of a text, in time linear in its length.

        Raises:
            InputError: nothing to say in the text, letters that the language does not have, or, with
                ``unknown="error"``, phones without an id.
            MissingExtraError: a package for the language is not installed.
        """
        if not text.strip():
            raise InputError("text: is empty; give something to say")
        language = self.config.language
        language = detect_language(text) if language == "auto" else language
        check_scripts(text, language)
        # Letters and their accents in one character each; the official code loses accents that stand apart.
        written = unicodedata.normalize("NFC", text) if self.config.style == "spoken" else text
        parts = runs(written) if language in ("en", "zh") else [(written, language)]
        return self._collect(text, parts, [self._read(part, of) for part, of in parts])

    def _collect(self, text: str, parts: list[Run], read: list[Part]) -> Phones:
        phones = [phone for part in read for phone in part.phones]
        if parts[-1][1] == "en" and phones and phones[-1] == WORD_GAP:
            phones.pop()  # a gap at the end of all is taken back
        if not _speech(phones):
            raise InputError(f"text {_start(text)}: has nothing that can be said")
        dropped = self.vocabulary.unknown(phones)
        unread = [character for part in read for character in part.unread]
        if unread:
            logger.warning("not said, because they have no reading: %s", named(unread))
        if dropped and self.config.unknown == "error":
            self.vocabulary.encode(phones)
        if dropped:
            logger.warning("left out, because the model has no such phones: %s", named(dropped))
        missing = set(dropped)
        if not _speech(phone for phone in phones if phone not in missing):
            raise InputError(f"text {_start(text)}: the model has none of its phones ({named(dropped)})")
        return Phones(
            text,
            "".join(part.spoken for part in read),
            tuple(parts),
            tuple(phones),
            tuple(self.vocabulary.encode(phone for phone in phones if phone not in missing)),
            dropped,
            tuple(word for part in read for word in part.words),
        )

    def _read(self, text: str, language: str) -> Part:
        official = self.config.style == "official"
        if language == "en":
            spoken = official_english(text) if official else speak_english(text)
            read = keep_words(spoken, whole_words=not official)
            return Part(spoken, english_phones(spoken, whole_words=not official), _lost(spoken, read))
        if language == "zh":
            if self._readings is None:
                self._readings = Readings.from_folder(self.config.polyphones)
            said = official_chinese(text) if official else speak_chinese(text)
            spoken = clean_chinese(said, official)
            phones, words = chinese_phones(spoken, self._readings, official)
            return Part(spoken, phones, _lost(said, spoken), words)
        if language == "ja":
            phones, unread = japanese_phones(text)
            return Part(text, phones, unread)
        spoken = speak_other(text, language)
        return Part(spoken, other_phones(text, language), _lost(spoken, keep_words(spoken)))


@dataclass(frozen=True)
class Part:
    """One run: what was read, its phones, and the letters and digits that were not read."""

    spoken: str
    phones: list[str]
    unread: list[str]
    words: list[str] = field(default_factory=list)


def _speech(phones: Iterable[str]) -> bool:
    return any(phone not in MARKS and phone != WORD_GAP for phone in phones)


def _start(text: str) -> str:
    """The first characters, on one line, for a message."""
    return repr(text.strip()[:40])


def _lost(before: str, after: str) -> list[str]:
    """Letters and digits of ``before`` that are not in ``after``; signs without a sound are no loss."""
    kept = set(after)
    return [
        one
        for one in dict.fromkeys(fold_marks(before))
        if one not in kept and (script_of(one) or one.isalnum())
    ]
