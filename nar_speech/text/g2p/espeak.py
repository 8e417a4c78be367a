"""The espeak-ng library by ctypes: words in, phones of the International Phonetic Alphabet out.

The wheel ``espeakng-loader`` brings the library (GPL-3) with its data, so that nothing is installed outside
Python; without it a library of the system is taken. No program is started and no file copied.

Releases of espeak-ng write some phones differently. The phones given here are those of 1.51, with which the
official models were trained, whichever release is there: see :data:`VOWELS_OF_1_51`. (A handful of words,
such as "Tacoma", have another pronunciation in the dictionary of 1.52; that is left as it is.)
"""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import threading
from functools import cache

from nar_speech.errors import InputError, MissingExtraError

# The vowels that 1.52 writes as ɔː for an American, by espeak's own names. 1.51 wrote o@, the vowel of
# "four", as oː, and only the others, those of "quarter" and "law", as ɔː.
VOWELS_OF_1_51 = {"o@": "oː", "O@": "ɔː", "O:": "ɔː"}
# What needs no names: the short ü of German, which is no phone of the official vocabulary.
PHONES_OF_1_51 = {"de": {"ʏ": "y"}}
_AMERICAN, _OPEN_O, _FOUR = "en-us", "ɔː", "four"

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_UTF8, _IPA, _SEPARATED = 1, 2, ord("_") << 8
_FLAG = re.compile(r"\([^()]*\)")  # "(fr)": the rules of another language begin here
_STRESS = re.compile("[ˈˌ'-]+")
_STRESS_NAMES = re.compile("[',%=]+")
_LONGEST_PATH = 150  # the library cuts longer ones off and then finds nothing


class Espeak:
    """One loaded library. Its state is the process's: a lock lets callers in one by one.

    Args:
        library: path or name of the shared library.
        data: folder with phone tables and dictionaries; None: where the library was built to look.

    Raises:
        InputError: the library can't be loaded, or finds no data.
    """

    def __init__(self, library: str, data: str | None = None):
        self._lock = threading.Lock()
        self._voice: str | None = None
        if data is not None and len(data.encode()) > _LONGEST_PATH:
            raise InputError(
                f"{data}: espeak-ng can't use a folder whose path has more than {_LONGEST_PATH} bytes;"
                " install Python's packages in a shorter one"
            )
        try:
            self._library = ctypes.CDLL(library)
            self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
            self._library.espeak_Info.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise InputError(f"{library}: can't be loaded as espeak-ng ({error})") from error
        place = None if data is None else data.encode()
        if self._library.espeak_Initialize(_SYNCHRONOUS, 0, place, _DONT_EXIT) <= 0:
            raise InputError(f"{library}: espeak-ng finds no data in {data or 'its own place'}")
        self._use(_AMERICAN)
        self._open_four = any(_OPEN_O in phone for phone in self._run(_FOUR, _IPA, _STRESS)[0])
        self.version: str = self._library.espeak_Info(None).decode().split()[0]

    @classmethod
    @cache
    def find(cls) -> Espeak:
        """The library of ``espeakng-loader``, or else the system's.

        Raises:
            MissingExtraError: there is none.
        """
        try:
            import espeakng_loader
        except ImportError as error:
            if library := ctypes.util.find_library("espeak-ng"):
                return cls(library)
            raise MissingExtraError("espeakng-loader", "tts", "turning text into phones") from error
        return cls(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())

    def words(self, text: str, voice: str) -> list[list[str]]:
        """The words of a text as phones without stress, in the writing of espeak-ng 1.51.

        Args:
            text: without punctuation; characters the voice can't say give nothing.
            voice: a voice of espeak-ng, such as ``en-us``.

        Raises:
            InputError: no such voice.
        """
        text = text.replace("\0", " ")
        with self._lock:
            self._use(voice)
            words = self._run(text, _IPA, _STRESS)
            if voice != _AMERICAN or not self._open_four:
                changes = PHONES_OF_1_51.get(voice, {})
                return [[changes.get(phone, phone) for phone in word] for word in words]
            names = self._run(text, 0, _STRESS_NAMES)
        vowels = [VOWELS_OF_1_51[name] for word in names for name in word if name in VOWELS_OF_1_51]
        if sum(_OPEN_O in phone for word in words for phone in word) != len(vowels):
            return words  # a word for which the rules of another language wrote an ɔː
        old = iter(vowels)
        return [
            [phone.replace(_OPEN_O, next(old)) if _OPEN_O in phone else phone for phone in word]
            for word in words
        ]

    def _use(self, voice: str) -> None:
        if voice != self._voice and self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise InputError(f"espeak-ng {self.version} has no voice '{voice}'")
        self._voice = voice

    def _run(self, text: str, mode: int, stress: re.Pattern[str]) -> list[list[str]]:
        """Words of all clauses; a call of the library takes the next clause off the text."""
        buffer = ctypes.create_string_buffer(text.encode("utf-8", "replace"))
        place = ctypes.c_void_p(ctypes.addressof(buffer))
        clauses = []
        while place.value:
            clauses.append(
                self._library.espeak_TextToPhonemes(ctypes.byref(place), _UTF8, mode | _SEPARATED) or b""
            )
        line = _FLAG.sub("", b" ".join(clauses).decode("utf-8", "replace"))
        words = ([stress.sub("", phone) for phone in word.split("_")] for word in line.split())
        return [phones for word in words if (phones := [phone for phone in word if phone])]
