"""Back-off n-gram language models: compact tables, batched look-up, files.

All n-grams of all orders stand in one table, shorter ones first, each order sorted by its words. Node 0 is
the empty context, node 1 + i the i-th entry of the table. An entry is found by one binary search for
``context node * vocabulary + word``: because a context precedes its extensions, these keys ascend through
the whole table. A state of the model is the node of the longest context that it knows, an int, so arrays of
states and words are scored without a Python loop over them.

Models are estimated by :mod:`nar_speech.text.kneser_ney` and exchanged as ARPA text
(:mod:`nar_speech.text.arpa`); the compact file is safetensors with 8-bit log probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nar_speech.errors import ConfigError, InputError

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
FORMAT, VERSION = "nar_speech.ngram", "1"
LEVELS = 256  # of a quantised log probability
CHUNK = 4096  # sentences scored together
NEVER = -50.0  # natural log probabilities below this say "never"


@dataclass(frozen=True)
class Level:
    """The N n-grams of one order, sorted by ``parents``, then by ``words``.

    Attributes:
        parents: (N,) int64, the first words of each as an index into the order below; zeros for words.
        words: (N,) int64, the last word's id.
        log_probs: (N,) float64, natural log of P(last word | first words).
        backoffs: (N,) float64, natural log of the weight with which shorter contexts are asked where this
            n-gram is the context and a word does not follow it; all 0 in the highest order.
    """

    parents: np.ndarray
    words: np.ndarray
    log_probs: np.ndarray
    backoffs: np.ndarray


@dataclass(frozen=True)
class Perplexity:
    """What a model thinks of a text.

    Attributes:
        sentences, words: counts; ``words`` without sentence ends.
        unknown: words outside the vocabulary.
        log_prob: natural log of everything, sentence ends and unknown words (as ``<unk>``) included.
        value: exp(-log_prob / (words + sentences)).
        known: the same without the unknown words.
    """

    sentences: int
    words: int
    unknown: int
    log_prob: float
    value: float
    known: float


class NgramModel:
    """A back-off model.

    Args:
        words: the vocabulary, id by id; ``<unk>``, ``<s>`` and ``</s>`` are in it.
        levels: n-grams of order 1 (one a word, in the order of the ids), 2, ...

    Raises:
        ConfigError: a special word is missing, a word is there twice, or the levels do not fit together.
    """

    def __init__(self, words: Sequence[str], levels: Sequence[Level]):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        size = len(self.words)
        missing = [word for word in (UNKNOWN, START, END) if word not in self.ids]
        if missing:
            raise ConfigError(f"n-gram model: '{missing[0]}' is not in its vocabulary; every model has it")
        if len(self.ids) != size:
            twice = next(word for i, word in enumerate(self.words) if self.ids[word] != i)
            raise ConfigError(f"n-gram model: '{twice}' is there twice; check the file")
        if not levels or len(levels[0].words) != size:
            raise ConfigError("n-gram model: needs one unigram for every word; check the file")
        self.unknown, self.begin, self.end = (self.ids[word] for word in (UNKNOWN, START, END))
        self.order, self.levels = len(levels), tuple(levels)
        starts = np.cumsum([1, *(len(level.words) for level in levels)])
        self._first_leaf = int(starts[-2])
        keys = [level.words if k == 0 else self._keys(level, starts[k - 1]) for k, level in enumerate(levels)]
        self.keys = np.concatenate(keys)
        if (self.keys[1:] <= self.keys[:-1]).any():
            raise ConfigError("n-gram model: the n-grams are not sorted, or one is there twice")
        self.log_probs = np.concatenate([[0.0], *(level.log_probs for level in levels)])
        self.backoffs = np.concatenate([[0.0], *(level.backoffs for level in levels)])
        # The longest shorter context of each context: itself without its first word, as far as it is known.
        self.suffixes = np.zeros(self._first_leaf, dtype=np.int64)
        for k in range(1, self.order - 1):
            nodes = slice(int(starts[k]), int(starts[k + 1]))
            parents = starts[k - 1] + levels[k].parents
            self.suffixes[nodes] = self._longest(self.suffixes[parents], levels[k].words)
        self.start = int(self._longest(np.zeros(1, np.int64), np.array([self.begin]))[0])

    def _keys(self, level: Level, first: int) -> np.ndarray:
        return (first + level.parents.astype(np.int64)) * len(self.words) + level.words

    @property
    def num_ngrams(self) -> tuple[int, ...]:
        """Entries of each order."""
        return tuple(len(level.words) for level in self.levels)

    def _find(self, contexts: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes of (context, word) pairs and whether they exist; what does not has a meaningless node."""
        wanted = contexts * len(self.words) + words
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return place + 1, self.keys[place] == wanted

    def _longest(self, contexts: np.ndarray, words: np.ndarray) -> np.ndarray:
        """The longest known context that ends in ``words`` after ``contexts``."""
        result = words + 1 if self.order > 1 else np.zeros_like(words)
        open_ = np.full(words.shape, self.order > 1)
        for _ in range(self.order - 2):
            node, found = self._find(contexts, words)
            found &= open_ & (contexts > 0) & (node < self._first_leaf)
            result = np.where(found, node, result)
            open_ = open_ & ~found & (contexts > 0)
            contexts = self.suffixes[contexts]
        return result

    def step(self, states: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Natural log of P(word | state), float64, and the next states, int64; arrays of one shape."""
        states, words = np.asarray(states, np.int64), np.asarray(words, np.int64)
        score = np.zeros(states.shape)
        after = np.zeros(states.shape, np.int64)
        scored, placed = np.zeros(states.shape, bool), np.zeros(states.shape, bool)
        context = states
        for _ in range(self.order):
            node, found = self._find(context, words)
            score += np.where(scored, 0.0, np.where(found, self.log_probs[node], self.backoffs[context]))
            lands = found & ~placed & (node < self._first_leaf)
            after = np.where(lands, node, after)
            scored, placed = scored | found, placed | lands
            if self.order == 1 or bool(placed.all()):
                break
            context = self.suffixes[context]
            # Whoever was at the empty context has found its word and does not look again.
        return score, after

    def finish(self, states: np.ndarray) -> np.ndarray:
        """Natural log of P(sentence end | state)."""
        return self.step(states, np.full(np.shape(states), self.end))[0]

    def encode(self, text: str) -> list[int]:
        """Ids of the words between spaces; unknown ones are ``<unk>``."""
        return [self.ids.get(word, self.unknown) for word in text.split()]

    def perplexity(self, sentences: Iterable[str]) -> Perplexity:
        """Of sentences, words between spaces.

        Raises:
            InputError: there is no sentence.
        """
        counts, totals = np.zeros(3, np.int64), np.zeros(2)
        source = iter(sentences)
        while chunk := [self.encode(sentence) for sentence in islice(source, CHUNK)]:
            lengths = np.array([len(row) for row in chunk])
            ids = np.full((len(chunk), lengths.max() + 1), self.end)
            for row, sentence in zip(ids, chunk, strict=True):
                row[: len(sentence)] = sentence
            states = np.full(len(chunk), self.start)
            for column in range(ids.shape[1]):
                alive = lengths >= column
                score, states[alive] = self.step(states[alive], ids[alive, column])
                strange = (ids[alive, column] == self.unknown) & (lengths[alive] > column)
                totals += score.sum(), score[strange].sum()
                counts[2] += strange.sum()
            counts[:2] += len(chunk), lengths.sum()
        if not counts[0]:
            raise InputError("perplexity: there is no sentence")
        number, size, unknown = counts.tolist()
        value = float(np.exp(-totals[0] / (size + number)))
        known = float(np.exp(-(totals[0] - totals[1]) / (size + number - unknown)))
        return Perplexity(number, size, unknown, float(totals[0]), value, known)

    def save(self, path: str | Path) -> Path:
        """Write the compact file: ids of 16 or 32 bits, log probabilities and weights of 8 bits."""
        tensors = {"words": np.frombuffer("\n".join(self.words).encode(), np.uint8)}
        for k, level in enumerate(self.levels):
            name = str(k + 1)
            if k:
                number = len(self.levels[k - 1].words)
                tensors[f"{name}.children"] = _narrow(np.bincount(level.parents, minlength=number))
                tensors[f"{name}.words"] = _narrow(level.words)
            pairs = [("log_probs", level.log_probs)]
            if k < self.order - 1:
                pairs.append(("backoffs", level.backoffs))
            for kind, values in pairs:
                tensors[f"{name}.{kind}"], tensors[f"{name}.{kind}.values"] = quantize(values)
        metadata = {"format": FORMAT, "version": VERSION, "order": str(self.order)}
        save_file(tensors, str(path), metadata)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> NgramModel:
        """Read a compact file or, if its name does not end in ``.safetensors``, ARPA text.

        Raises:
            ConfigError: a missing or damaged file, or one of another kind.
        """
        if Path(path).suffix != ".safetensors":
            from nar_speech.text.arpa import read_arpa

            return read_arpa(path)
        try:
            with safe_open(str(path), "numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
            raise ConfigError(f"{path}: can't read the language model ({reason}); check the path") from error
        if metadata.get("format") != FORMAT:
            raise ConfigError(
                f"{path}: not an n-gram model of nar_speech; make one with 'python -m recipes.ngram', or give"
                " an ARPA file"
            )
        if metadata.get("version") != VERSION:
            raise ConfigError(
                f"{path}: version {metadata.get('version')} of the format, this program reads {VERSION};"
                " update nar_speech"
            )
        try:
            return cls._from_tensors(tensors, int(metadata["order"]))
        except (KeyError, ValueError, IndexError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}: a damaged language model ({type(error).__name__}: {error}); get it again"
            ) from error

    @classmethod
    def _from_tensors(cls, tensors: dict[str, np.ndarray], order: int) -> NgramModel:
        words = tensors["words"].tobytes().decode().split("\n")
        levels = []
        for k in range(order):
            name = str(k + 1)
            ids, parents = np.arange(len(words)), np.zeros(len(words), np.int64)
            if k:
                ids = tensors[f"{name}.words"].astype(np.int64)
                children = tensors[f"{name}.children"].astype(np.int64)
                if len(children) != len(levels[-1].words) or children.sum() != len(ids):
                    raise ValueError(f"{name}.children does not fit")
                parents = np.repeat(np.arange(len(children)), children)
            values = {
                kind: tensors[f"{name}.{kind}.values"].astype(np.float64)[tensors[f"{name}.{kind}"]]
                if f"{name}.{kind}" in tensors
                else np.zeros(len(ids))
                for kind in ("log_probs", "backoffs")
            }
            if any(len(array) != len(ids) for array in values.values()):
                raise ValueError(f"order {name}: arrays of different length")
            levels.append(Level(parents, ids, values["log_probs"], values["backoffs"]))
        return cls(words, levels)


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest unsigned type that holds them."""
    top = int(values.max(initial=0))
    return values.astype(np.uint8 if top < 1 << 8 else np.uint16 if top < 1 << 16 else np.uint32)


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) uint8 codes and the (256,) float32 values behind them; up to 256 different values stay exact.

    Otherwise frequent values (a weight of exactly 1) and what is practically never stay exact, and the others
    become the means of bins of equal width.
    """
    distinct, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    table = np.zeros(LEVELS, np.float32)
    if len(distinct) <= LEVELS:
        table[: len(distinct)] = distinct
        return inverse.astype(np.uint8), table
    exact = (counts > len(values) / LEVELS) | (distinct < NEVER)
    exact &= np.cumsum(exact) < LEVELS // 2
    number = int(exact.sum())
    code = np.cumsum(exact) - 1
    table[:number] = distinct[exact]
    rest = distinct[~exact]
    width = (rest[-1] - rest[0]) / (LEVELS - number)
    bins = np.minimum(((rest - rest[0]) / width).astype(np.int64), LEVELS - number - 1)
    sizes = np.bincount(bins, counts[~exact], LEVELS - number)
    table[number:] = np.bincount(bins, rest * counts[~exact], LEVELS - number) / np.maximum(sizes, 1)
    code[~exact] = number + bins
    return code[inverse].astype(np.uint8), table
