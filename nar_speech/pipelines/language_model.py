"""N-gram models of a recogniser's beam, and the label prior that goes with them, read once."""

from __future__ import annotations

from torch import Tensor

from nar_speech.checkpoint import read_weights
from nar_speech.errors import ConfigError
from nar_speech.model_folder import DecodingConfig
from nar_speech.search.prefix_beam import Scorer
from nar_speech.search.word_lm import WORD_START, Lexicon, TokenLm, WordLm, word_lexicon
from nar_speech.text.ngram import END, START, UNKNOWN, NgramModel
from nar_speech.text.tokenizer import Tokenizer

PRIOR_NAME = "log_prior"


class LanguageModels:
    """The language model of the last decoding that named one.

    A model is over tokens if most of its words are pieces of the tokenizer, or if these do not tell where
    words begin; else it is over words.
    """

    def __init__(self, tokenizer: Tokenizer):
        pieces = tokenizer.pieces(range(tokenizer.vocab_size))
        self.pieces = [WORD_START if piece == "<space>" else piece for piece in pieces]
        self._path: str | None = None
        self._model: NgramModel | None = None
        self._lexicon: Lexicon | None = None
        self._key: tuple | None = None
        self._scorer: Scorer | None = None
        self._prior: tuple[str, Tensor] | None = None

    def __call__(self, decoding: DecodingConfig) -> Scorer:
        """The scorer of ``decoding.lm`` with its weights.

        Raises:
            ConfigError: a bad file, or one that does not suit the tokenizer.
        """
        key = (decoding.lm, decoding.lm_weight, decoding.word_bonus, decoding.unknown_word)
        if key != self._key:
            if decoding.lm != self._path:
                self._model, self._lexicon = NgramModel.load(decoding.lm), None
                self._path = decoding.lm
            self._scorer = self._make(self._model, *key[1:])
            self._key = key
        return self._scorer

    def prior(self, decoding: DecodingConfig, size: int) -> Tensor | None:
        """(V,) log prior of the labels, V = ``size``; None if ``decoding`` names none.

        Raises:
            CheckpointError, ConfigError: a bad file, or one of another model.
        """
        if decoding.prior is None or not decoding.prior_weight:
            return None
        if self._prior is None or self._prior[0] != decoding.prior:
            prior = read_weights(decoding.prior).get(PRIOR_NAME)
            if prior is None or prior.shape != (size,) or not bool(prior.isfinite().all()):
                raise ConfigError(
                    f"prior: {decoding.prior} must hold the finite tensor '{PRIOR_NAME}' of {size} values,"
                    " one a label of this model"
                )
            self._prior = decoding.prior, prior
        return self._prior[1]

    def _make(self, model: NgramModel, weight: float, bonus: float, unknown: float) -> Scorer:
        marked = any(piece.startswith(WORD_START) for piece in self.pieces)
        words = set(model.words) - {UNKNOWN, START, END}
        if not marked or len(words.intersection(self.pieces)) > len(words) / 2:
            return TokenLm(model, self.pieces, weight, bonus)
        if self._lexicon is None:
            self._lexicon = word_lexicon(model, self.pieces)
        return WordLm(model, self._lexicon, weight, bonus, unknown)
