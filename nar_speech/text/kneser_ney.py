"""Estimation of n-gram models: interpolated modified Kneser-Ney, count cut-offs, entropy pruning.

Chen and Goodman 1999, 'An empirical study of smoothing techniques for language modeling' (section 4.1.6,
equations 26 to 28 for the discounts); cut-offs keep the mass of what they drop in the back-off weight, as
Heafield et al. 2013 ('Scalable modified Kneser-Ney language model estimation') do; pruning by relative
entropy after Stolcke 1998, with the histories' relative frequencies as their probabilities.

Everything is a sort or a count over whole arrays. Of the text only 4 bytes a word are held, plus as much for
the contexts; counting goes through it in pieces, so the memory beyond that depends on the number of different
n-grams.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nar_speech.errors import ConfigError, InputError
from nar_speech.text.ngram import END, START, UNKNOWN, Level, NgramModel

logger = logging.getLogger(__name__)
PIECE = 1 << 23  # words counted at a time
FALLBACK = (0.5, 1.0, 1.5)  # discounts where the text is too small to tell


@dataclass(frozen=True)
class Counts:
    """The different n-grams of one order, sorted by ``parents``, then ``words``.

    Attributes:
        parents: (N,) index of the first words in the order below.
        words: (N,) last word.
        raw: (N,) how often each occurs.
        suffixes: (N,) index of the n-gram without its first word in the order below.
        begins: (N,) whether the first word is ``<s>``.
    """

    parents: np.ndarray
    words: np.ndarray
    raw: np.ndarray
    suffixes: np.ndarray
    begins: np.ndarray


def choose_vocabulary(counts: Counter, size: int | None = None, least: int = 1) -> list[str]:
    """``<unk>``, ``<s>``, ``</s>`` and the words by falling frequency, equals in alphabetical order.

    Args:
        counts: of the words of a text.
        size: greatest number of words, the three included.
        least: rarer words are left out.
    """
    special = [UNKNOWN, START, END]
    found = sorted((word for word, n in counts.items() if n >= least), key=lambda word: (-counts[word], word))
    return special + [word for word in found if word not in special][: None if size is None else size - 3]


def encode_text(sentences: Iterable[str], words: Sequence[str]) -> np.ndarray:
    """(N,) int32 ids of ``<s> words </s>`` of every sentence that has a word."""
    ids = {word: i for i, word in enumerate(words)}
    unknown, start, end = (ids[word] for word in (UNKNOWN, START, END))
    parts, row = [], []
    for sentence in sentences:
        found = [ids.get(word, unknown) for word in sentence.split()]
        # The marks themselves are no words of a text.
        found = [unknown if i in (start, end) else i for i in found]
        if found:
            row += [start, *found, end]
        if len(row) >= PIECE:
            parts.append(np.array(row, np.int32))
            row = []
    return np.concatenate([*parts, np.array(row, np.int32)])


def count_ngrams(text: np.ndarray, words: Sequence[str], order: int) -> list[Counts]:
    """Count the n-grams of all orders that do not cross a sentence.

    Args:
        text: see :func:`encode_text`.
        words: the vocabulary.
    """
    size, start = len(words), words.index(START)
    index = np.arange(size)
    levels = [
        Counts(np.zeros_like(index), index, np.bincount(text, minlength=size), index * 0, index == start)
    ]
    place = text.astype(np.int32)  # of the n-gram that begins here, -1 where a sentence ends inside it
    for k in range(1, order):
        positions = range(0, max(len(text) - k, 0), PIECE)
        keys, raw = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for i in positions:
            found, times = np.unique(_joined(place, text, i, k, size, start), return_counts=True)
            known = found >= 0
            keys, raw = _merge(keys, raw, found[known], times[known])
        below = levels[-1]
        parents, last = keys // size, keys % size
        if k == 1:
            suffixes = last
        else:
            shorter = below.parents * size + below.words
            suffixes = np.searchsorted(shorter, below.suffixes[parents] * size + last)
        levels.append(Counts(parents, last, raw, suffixes, below.begins[parents]))
        if k < order - 1:
            for i in positions:
                # Looking up ascending keys is much faster than looking them up as they come.
                wanted, inverse = np.unique(_joined(place, text, i, k, size, start), return_inverse=True)
                here = np.where(wanted >= 0, np.searchsorted(keys, wanted), -1)
                place[i : i + len(inverse)] = here[inverse]
            place[max(len(text) - k, 0) :] = -1
    return levels


def _joined(place: np.ndarray, text: np.ndarray, first: int, k: int, size: int, start: int) -> np.ndarray:
    """Keys of the n-grams of k + 1 words that begin in one piece of the text, -1 across sentences."""
    last = min(first + PIECE, len(text) - k)
    context, word = place[first:last], text[first + k : last + k]
    return np.where((context >= 0) & (word != start), context.astype(np.int64) * size + word, -1)


def _merge(
    keys: np.ndarray, raw: np.ndarray, more: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Union of two sorted tables of counts."""
    if not len(keys):
        return more, times
    merged = np.concatenate([keys, more])
    order = np.argsort(merged, kind="stable")
    merged, sums = merged[order], np.concatenate([raw, times])[order]
    firsts = np.flatnonzero(np.append(True, merged[1:] != merged[:-1]))
    return merged[firsts], np.add.reduceat(sums, firsts)


def discounts(adjusted: np.ndarray, order: int) -> np.ndarray:
    """(4,) discounts of n-grams seen 0, 1, 2 and more times (Chen and Goodman, equation 26).

    Where the text is too small or odd for the formula, 0.5, 1 and 1.5 with a warning.
    """
    n = np.bincount(np.minimum(adjusted, 5).astype(np.int64), minlength=6)[:5].astype(np.float64)
    if n[1:].min() > 0:
        ratio = n[1] / (n[1] + 2 * n[2])
        found = [k - (k + 1) * ratio * n[k + 1] / n[k] for k in (1, 2, 3)]
        if all(0 <= d <= k for k, d in enumerate(found, start=1)):
            return np.array([0.0, *found])
    logger.warning(
        "order %d: the counts of counts %s give no Kneser-Ney discounts; taking %s",
        order,
        n[1:].astype(int).tolist(),
        FALLBACK,
    )
    return np.array([0.0, *FALLBACK])


def estimate(
    sentences: Iterable[str] | np.ndarray,
    words: Sequence[str],
    order: int = 3,
    prune: Sequence[int] = (0,),
    entropy: float = 0.0,
) -> NgramModel:
    """Estimate a model.

    Args:
        sentences: words between spaces; or what :func:`encode_text` made of them.
        words: the vocabulary, see :func:`choose_vocabulary`. Other words are counted as ``<unk>``.
        order: longest n-gram.
        prune: for each order the count up to which its n-grams are left out; the last number holds for all
            longer ones. Words always stay: the first number is 0.
        entropy: n-grams without which the perplexity grows by less than this share are left out; 1e-8 to
            1e-6 are usual, 0 keeps all.

    Raises:
        ConfigError: a wrong order, prune or entropy. InputError: there is no text.
    """
    limits = [*prune, *[prune[-1]] * (order - len(prune))] if prune else []
    if order < 1:
        raise ConfigError(f"order: got {order}; must be at least 1")
    if len(limits) != order or limits[0] != 0 or limits != sorted(limits):
        raise ConfigError(
            f"prune: got {','.join(map(str, prune))}; needs up to {order} numbers that never fall, first 0"
        )
    if not entropy >= 0:
        raise ConfigError(f"entropy: got {entropy:g}; must not be negative")
    text = sentences if isinstance(sentences, np.ndarray) else encode_text(sentences, words)
    if not len(text):
        raise InputError("n-gram model: the text has no words")
    counts = count_ngrams(text, words, order)
    levels, raws = _smooth(counts, limits, words.index(START))
    model = NgramModel(words, levels)
    if entropy > 0 and order > 1:
        model = prune_entropy(model, raws, entropy)
    return model


def _smooth(counts: list[Counts], limits: Sequence[int], start: int) -> tuple[list[Level], list[np.ndarray]]:
    """Interpolated probabilities of what the cut-offs keep, and its raw counts."""
    order, size = len(counts), len(counts[0].words)
    levels: list[Level] = []
    raws: list[np.ndarray] = []
    moved = np.zeros(1, np.int64)  # where each n-gram of the order below went
    below = np.full(1, -np.log(size - 1.0))  # log probabilities of all n-grams of the order below
    for k, level in enumerate(counts):
        adjusted = level.raw
        if k < order - 1:
            different = np.bincount(counts[k + 1].suffixes, minlength=len(level.words))
            adjusted = np.where(level.begins, level.raw, different)
        if k == 0:
            adjusted = adjusted.copy()
            adjusted[start] = 0
        cut = discounts(adjusted[adjusted > 0], k + 1)
        keep = level.raw > limits[k] if k else np.ones(size, bool)
        held = np.minimum(cut[np.minimum(adjusted, 3).astype(np.int64)], adjusted)
        parents = level.parents
        total = np.bincount(parents, adjusted, len(below) if k else 1)
        spare = np.bincount(parents, np.where(keep, held, adjusted), len(total))
        weight = np.where(total > 0, spare / np.maximum(total, 1), 1.0)
        lower = below[level.suffixes] if k else np.full(size, below[0])
        here = np.log((adjusted - held) / total[parents] + weight[parents] * np.exp(lower))
        if k == 0:
            here[start] = -np.inf
        else:
            last = levels[-1]
            backoffs = np.log(weight)[np.flatnonzero(moved >= 0)]
            levels[-1] = Level(last.parents, last.words, last.log_probs, backoffs)
        shown = np.maximum(here, -99 * np.log(10.0))[keep]
        levels.append(Level(moved[parents][keep], level.words[keep], shown, np.zeros(int(keep.sum()))))
        raws.append(level.raw[keep])
        moved = np.where(keep, np.cumsum(keep) - 1, -1)
        below = here
    return levels, raws


def prune_entropy(model: NgramModel, raws: Sequence[np.ndarray], threshold: float) -> NgramModel:
    """Leave out n-grams that hardly matter (Stolcke 1998), and set the back-off weights anew.

    Args:
        model: every n-gram's suffix is in it too, as cut-offs by raw counts leave it.
        raws: raw count of each n-gram of each order.
        threshold: relative growth of the perplexity that a dropped n-gram may cause.
    """
    start = model.begin
    total = float(raws[0].sum() - raws[0][start])
    levels = list(model.levels)
    sizes = np.cumsum([1, *model.num_ngrams])
    keeps = [np.ones(len(level.words), bool) for level in levels]
    needed = np.zeros(len(levels[-1].words), bool)
    for k in range(len(levels) - 1, 0, -1):
        level = levels[k]
        context = sizes[k - 1] + level.parents
        high = np.exp(level.log_probs)
        low = np.exp(model.step(model.suffixes[context], level.words)[0])
        count = len(levels[k - 1].words)
        left = 1 - np.bincount(level.parents, high, count)[level.parents]
        spare = 1 - np.bincount(level.parents, low, count)[level.parents]
        before = model.backoffs[context]
        after = np.log(np.maximum(left, 0) + high) - np.log(np.maximum(spare, 0) + low)
        change = high * (np.log(low) + after - level.log_probs) + np.maximum(left, 0) * (after - before)
        loss = -raws[k - 1][level.parents] / total * change
        keeps[k] = needed | (np.expm1(loss) >= threshold)
        needed = np.bincount(level.parents[keeps[k]], minlength=count) > 0
    kept: list[Level] = []
    moved = np.zeros(1, np.int64)
    for level, keep in zip(levels, keeps, strict=True):
        kept.append(
            Level(moved[level.parents][keep], level.words[keep], level.log_probs[keep], level.backoffs[keep])
        )
        moved = np.where(keep, np.cumsum(keep) - 1, -1)
    return normalize(NgramModel(model.words, kept))


def normalize(model: NgramModel) -> NgramModel:
    """The model with the back-off weights that make the probabilities of every context sum to 1."""
    levels = list(model.levels)
    for k in range(1, model.order):
        shorter = NgramModel(model.words, levels[:k] if k > 1 else levels[:1])
        level, below = levels[k], levels[k - 1]
        # Contexts of the shorter model: those of k words lose their first one, the highest order included.
        suffix = _without_first(shorter, levels, k)
        low = np.exp(shorter.step(suffix[level.parents], level.words)[0])
        count = len(below.words)
        left = 1 - np.bincount(level.parents, np.exp(level.log_probs), count)
        spare = 1 - np.bincount(level.parents, low, count)
        has = np.bincount(level.parents, minlength=count) > 0
        tiny = 1e-12  # what rounding leaves where a context was followed by every word
        weights = np.log(np.maximum(left, tiny)) - np.log(np.maximum(spare, tiny))
        levels[k - 1] = Level(
            below.parents, below.words, below.log_probs, np.where(has & (spare > tiny), weights, 0.0)
        )
    return NgramModel(model.words, levels)


def _without_first(model: NgramModel, levels: Sequence[Level], k: int) -> np.ndarray:
    """Longest context of ``model`` (order k) that each n-gram of order k has without its first word."""
    suffix = np.zeros(len(levels[0].words), np.int64)
    for level in levels[1:k]:
        suffix = model._longest(suffix[level.parents], level.words)
    return suffix
