"""Mandarin to the phones of MaskGCT: words, their readings, the tones as said, initials and finals.

Readings come from pypinyin's dictionaries of words and characters, or from the official lexicon, and for
characters of several readings from the official model, where a folder with these files is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nar_speech.errors import ConfigError, InputError, MissingExtraError
from nar_speech.text.g2p.chinese_words import cut_words
from nar_speech.text.g2p.marks import MARKS, fold_marks
from nar_speech.text.g2p.pinyin import Syllable, syllable_phones
from nar_speech.text.g2p.polyphone import PolyphoneModel
from nar_speech.text.g2p.sandhi import change_tones

_HAN = re.compile("[㐀-䶿一-鿿豈-﫿𠀀-𳑿]")
_OFFICIAL_HAN = "一-鿿"
_ALL_HAN = "㐀-䶿一-鿿豈-﫿𠀀-𳑿"
_PINYIN = re.compile(r"([a-zê]+)([0-5])")

Sentence = Callable[[str], Mapping[int, str]]


class Readings:
    """How words are read.

    Args:
        words: words and single characters -> pinyin with tones (``"gong1 yuan2"``).
        polyphones: characters read by ``choose``, unless the word they stand in is longer and in ``words``.
        choose: text -> place -> pinyin of polyphones.
    """

    def __init__(
        self,
        words: Mapping[str, str],
        polyphones: frozenset[str] = frozenset(),
        choose: Sentence | None = None,
    ):
        self._words = words
        self._polyphones = polyphones if choose else frozenset()
        self._choose = choose

    @classmethod
    def from_folder(cls, folder: str | Path | None) -> Readings:
        """pypinyin's readings; with a folder of the official model and perhaps lexicon those.

        Args:
            folder: official ``g2p/sources`` (``chinese_lexicon.txt``, ``g2p_chinese_model/``), or only the
                model's folder, with which pypinyin reads what the model does not.

        Raises:
            ConfigError: the folder has neither.
            MissingExtraError: pypinyin or onnxruntime is not installed.
        """
        if folder is None:
            return cls(PypinyinWords())
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder of a polyphone model")
        inner = folder / "g2p_chinese_model"
        model = PolyphoneModel(inner if inner.is_dir() else folder)
        lexicon = folder / "chinese_lexicon.txt"
        words = read_lexicon(lexicon) if lexicon.is_file() else PypinyinWords(phrases_only=True)
        return cls(words, model.characters, model.readings)

    def read(self, text: str, words: list[str]) -> list[list[Syllable]]:
        """The syllables of every word, one a character; without sound where a character has no reading.

        Args:
            text: all words joined, which tells readings of polyphones apart.
        """
        chosen = self._choose(text) if self._choose else {}
        place, read = 0, []
        for word in words:
            syllables = self._whole(word)
            if syllables is None:
                syllables = [self._character(one, chosen.get(place + at)) for at, one in enumerate(word)]
            read.append(syllables)
            place += len(word)
        return read

    def _whole(self, word: str) -> list[Syllable] | None:
        if word in self._polyphones or word not in self._words:
            return None
        pinyin = self._words[word].split()
        return (
            [_syllable(*pair) for pair in zip(word, pinyin, strict=True)]
            if len(pinyin) == len(word)
            else None
        )

    def _character(self, character: str, chosen: str | None) -> Syllable:
        if character in self._polyphones and chosen is not None:
            return _syllable(character, chosen)
        if character in self._words:
            return _syllable(character, self._words[character].split()[0])
        return Syllable(character)


class PypinyinWords(Mapping[str, str]):
    """What pypinyin reads, as a mapping of words to pinyin.

    Args:
        phrases_only: only words that stand in its dictionary, and single characters; else also other words,
            read by the words in them.
    """

    def __init__(self, phrases_only: bool = False):
        try:
            import pypinyin
        except ImportError as error:
            raise MissingExtraError("pypinyin", "tts", "reading Chinese") from error
        self._pypinyin = pypinyin
        self._phrases = pypinyin.constants.PHRASES_DICT
        self._phrases_only = phrases_only
        self._known: dict[str, str] = {}

    def __contains__(self, word: object) -> bool:
        if not isinstance(word, str) or (self._phrases_only and len(word) > 1 and word not in self._phrases):
            return False
        return bool(word) and bool(self._read(word))

    def __getitem__(self, word: str) -> str:
        if word not in self:
            raise KeyError(word)
        return self._read(word)

    def __iter__(self) -> Iterator[str]:
        return iter(self._phrases)

    def __len__(self) -> int:
        return len(self._phrases)

    def _read(self, word: str) -> str:
        """Pinyin of all characters; empty where one has none."""
        if word not in self._known:
            read = self._pypinyin.lazy_pinyin(
                word,
                style=self._pypinyin.Style.TONE3,
                errors=lambda characters: ["?"] * len(characters),
                neutral_tone_with_five=True,
            )
            whole = len(read) == len(word) and all(_PINYIN.fullmatch(one) for one in read)
            self._known[word] = " ".join(read) if whole else ""
        return self._known[word]


def read_lexicon(path: str | Path) -> dict[str, str]:
    """The official ``chinese_lexicon.txt``: a word, a tab, its pinyin on every line.

    Raises:
        ConfigError: a line is not so.
    """
    words: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            word, tab, pinyin = line.strip().partition("\t")
            if not tab or not pinyin:
                raise ConfigError(f"{path}:{number}: expected a word, a tab and its pinyin")
            words[word] = pinyin
    return words


def clean_chinese(text: str, official: bool = False) -> str:
    """Chinese characters and marks only; ``official``: of the basic block only (U+4E00 to U+9FFF)."""
    text = re.sub(r"\s+", "", fold_marks(text))
    return re.sub(rf"[^{_OFFICIAL_HAN if official else _ALL_HAN}_{MARKS}]", "", text)


def chinese_phones(text: str, readings: Readings, official: bool = False) -> tuple[list[str], list[str]]:
    """Phones of cleaned Chinese text, and its words.

    Raises:
        InputError: a reading that is no syllable of Mandarin.
    """
    words = cut_words(text, official)
    phones: list[str] = []
    # Where the official code has lost a character, it asks for readings at the places of others.
    read = readings.read(text if official else "".join(words), words)
    for word, syllables in zip(words, read, strict=True):
        if _HAN.search(word):
            syllables = change_tones(word, syllables, official)
        for syllable in syllables:
            phones += syllable.phones()
    return phones, words


def _syllable(character: str, pinyin: str) -> Syllable:
    found = _PINYIN.fullmatch(pinyin)
    if not found or syllable_phones(found[1], int(found[2]) or 5) is None:
        raise InputError(f"'{character}' read as '{pinyin}': not a syllable of Mandarin with a tone")
    return Syllable(character, found[1], int(found[2]) or 5)
