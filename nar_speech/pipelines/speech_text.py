"""Texts as a synthesizer takes them: checked, and turned into the ids of its phones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nar_speech.errors import InputError
from nar_speech.text.g2p import Phonemizer, PhonemizerConfig, PhoneVocabulary
from nar_speech.text.g2p.scripts import check_scripts, detect_language

MAX_CHARACTERS = 20_000  # of one text: more than twenty minutes of speech
DIRECT = "phones"  # the language of phones given directly

Text = str | Sequence[int]


def check_text(text: Text, language: str = "auto", what: str = "text") -> None:
    """Whether a text can be spoken, as far as that is known without reading it.

    Args:
        text: words; or ids of phones.
        what: what messages call it.

    Raises:
        InputError: it is empty or too long, or its letters are those of no language here.
    """
    if not isinstance(text, str):
        if not len(text):
            raise InputError(f"{what}: there are no phones; give at least one")
        return
    if not text.strip():
        raise InputError(f"{what}: is empty; give something to say")
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{what}: {len(text)} characters; at most {MAX_CHARACTERS} at once, split it into several texts"
        )
    if language != DIRECT:
        check_scripts(text, detect_language(text) if language == "auto" else language)


class SpeechText:
    """Texts to ids of phones; a reader of each language is made when it is first needed.

    Args:
        config: how text becomes phones; its language counts where none is named.
        vocabulary: the phones a model knows.
    """

    def __init__(self, config: PhonemizerConfig, vocabulary: PhoneVocabulary | None = None):
        self.config, self.vocabulary = config, vocabulary or PhoneVocabulary.maskgct()
        self._readers: dict[str, Phonemizer] = {}

    def __call__(self, text: Text, language: str = "auto", what: str = "text") -> tuple[int, ...]:
        """Ids of the phones.

        Args:
            text: words; phones or ids in one text with the language ``phones``; or ids.

        Raises:
            InputError: see :func:`check_text` and :class:`nar_speech.text.g2p.phonemizer.Phonemizer`.
            MissingExtraError: a package for the language is not installed.
        """
        check_text(text, language, what)
        if not isinstance(text, str):
            ids = [int(number) for number in text]
            self.vocabulary.decode(ids)
            return tuple(ids)
        if language == DIRECT:
            return tuple(self.vocabulary.parse(text))
        language = self.config.language if language == "auto" else language
        if language not in self._readers:
            self._readers[language] = Phonemizer(replace(self.config, language=language), self.vocabulary)
        return self._readers[language](text).ids
