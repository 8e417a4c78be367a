"""The phones a model knows, and their ids.

The 363 phones of MaskGCT come with the package (``maskgct_phones.json``: from Amphion, MIT licence). A phone
is any string: ``iː``, ``tʃʰ``, ``uo↓↑`` (a final with its tone), a punctuation mark, or ``_`` between words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from nar_speech.errors import ConfigError, InputError

SEPARATOR = "|"
WORD_GAP = "_"
_FILE = Path(__file__).parent / "maskgct_phones.json"


class PhoneVocabulary:
    """Phones in the order of their ids.

    Args:
        phones: no two alike, none empty, none with ``|`` in it.

    Raises:
        ConfigError: they are not so.
    """

    def __init__(self, phones: Sequence[str]):
        self.phones = tuple(phones)
        self._ids = {phone: number for number, phone in enumerate(self.phones)}
        if len(self._ids) != len(self.phones):
            twice = next(phone for number, phone in enumerate(self.phones) if self._ids[phone] != number)
            raise ConfigError(f"phones: '{twice}' is there twice; every phone has one id")
        bad = next((phone for phone in self.phones if not phone or SEPARATOR in phone), None)
        if bad is not None:
            raise ConfigError(f"phones: '{bad}' can't be a phone: empty, or with a '{SEPARATOR}' in it")

    def __len__(self) -> int:
        return len(self.phones)

    def __contains__(self, phone: object) -> bool:
        return phone in self._ids

    @classmethod
    @cache
    def maskgct(cls) -> PhoneVocabulary:
        """The 363 phones of the official MaskGCT and Metis checkpoints."""
        return cls.read(_FILE)

    @classmethod
    def read(cls, path: str | Path) -> PhoneVocabulary:
        """A JSON file: ``{"phones": [...]}``, Amphion's ``{"vocab": {phone: id}}``, or only such a mapping.

        Raises:
            ConfigError: the file can't be read, or its ids are not 0, 1, 2 ...
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: can't be read as a phone vocabulary ({error})") from error
        found = tree.get("phones", tree.get("vocab", tree)) if isinstance(tree, dict) else tree
        if isinstance(found, dict):
            if not all(isinstance(number, int) for number in found.values()):
                raise ConfigError(f"{path}: expected a mapping of phones to ids")
            if sorted(found.values()) != list(range(len(found))):
                raise ConfigError(f"{path}: the ids of {len(found)} phones must be 0 to {len(found) - 1}")
            found = sorted(found, key=found.__getitem__)
        if not isinstance(found, list) or not found or not all(isinstance(phone, str) for phone in found):
            raise ConfigError(f"{path}: expected a list of phones or a mapping of phones to ids")
        return cls(found)

    def unknown(self, phones: Iterable[str]) -> tuple[str, ...]:
        """Those of ``phones`` that have no id, each time they occur."""
        return tuple(phone for phone in phones if phone not in self._ids)

    def encode(self, phones: Iterable[str]) -> list[int]:
        """The ids of phones.

        Raises:
            InputError: phones without an id; the message names them.
        """
        phones = list(phones)
        if missing := self.unknown(phones):
            raise InputError(f"not in the vocabulary of {len(self)} phones: {named(missing)}")
        return [self._ids[phone] for phone in phones]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The phones of ids.

        Raises:
            InputError: an id out of range.
        """
        ids = list(ids)
        bad = next((number for number in ids if not 0 <= number < len(self)), None)
        if bad is not None:
            raise InputError(f"phone id {bad}: ids are 0 to {len(self) - 1}")
        return [self.phones[number] for number in ids]

    def parse(self, text: str) -> list[int]:
        """Ids of what is given directly: phones with ``|`` between them, ``w|iː|_|d|uː``, or ids, ``48 5 4``.

        Raises:
            InputError: nothing there, or what has no id.
        """
        text = text.strip()
        words = text.replace(",", " ").split() if SEPARATOR not in text else []
        if words and all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            ids = [int(word) for word in words]
            self.decode(ids)
            return ids
        phones = [phone for phone in text.split(SEPARATOR) if phone]
        if not phones:
            raise InputError("no phones: write them as w|iː|_|d|uː, or ids as 48 5 4 30 13")
        return self.encode(phones)


def named(phones: Sequence[str], most: int = 10) -> str:
    """Distinct phones for a message, quoted."""
    names = [f"'{phone}'" for phone in dict.fromkeys(phones)]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
