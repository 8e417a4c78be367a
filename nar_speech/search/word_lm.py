"""Language models for CTC beams: words under word pieces, and plain tokens.

:class:`WordLm` lets a beam over word pieces follow a word model. Words stand in a trie of characters; a
piece moves along several of its arcs at once, so every way to cut a word into pieces is possible and leads to
the same node. Where a spelling leaves the trie, the word is unknown: it is ``<unk>`` to the language model,
and every character of it costs ``unknown``. What comes out is therefore a word of the vocabulary unless the
sound speaks strongly for something else.

The words of a beam are known to the model only when the next word begins. Until then a prefix has the score
of the most frequent word it can become (look-ahead), which is taken back later: the sum is exact.

Both classes are scorers for :func:`nar_speech.search.prefix_beam.prefix_beam`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nar_speech.errors import ConfigError
from nar_speech.text.ngram import END, START, UNKNOWN, NgramModel

WORD_START = "\u2581"  # sentencepiece's mark at the beginning of a word


class Lexicon:
    """A trie of words, its arcs labelled with characters, walked by pieces.

    Node 0 is the root, ``outside`` is where spellings go that no word begins with.

    Attributes:
        outside: its number, also that of all other nodes together.
        word: (nodes + 1,) index into ``words`` of the word that ends at each node, -1 for none.
        depth: (nodes + 1,) characters from the root.
        best: (nodes + 1,) the largest of ``scores`` at or below each node; 0 outside.
        first: (V,) node to which a piece leads that begins a word; ``outside`` for none.
        begins: (V,) whether a piece begins a word.
        characters: (V,) length of the pieces.

    Args:
        words: all different, none empty.
        scores: (W,) of the words.
        pieces: the text of every token id.
    """

    def __init__(self, words: Sequence[str], scores: np.ndarray, pieces: Sequence[str]):
        order = sorted(range(len(words)), key=words.__getitem__)
        letters = {c: i for i, c in enumerate(sorted({c for word in words for c in word}), start=1)}
        table = np.zeros((len(words), max(map(len, words), default=1)), np.int32)
        for row, i in zip(table, order, strict=True):
            row[: len(words[i])] = [letters[c] for c in words[i]]
        self.begins = np.array([piece.startswith(WORD_START) for piece in pieces])
        bare = [piece.removeprefix(WORD_START) for piece in pieces]
        self.characters = np.array([len(text) for text in bare])
        self._pieces = len(pieces)
        nodes = self._build(table, np.array(order, dtype=np.int64), np.asarray(scores, dtype=np.float64))
        self._link(nodes, bare, letters)

    def _build(self, table: np.ndarray, order: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
        """Nodes from the sorted words; for each depth the (3, n) nodes, their parents and characters."""
        there = table != 0
        new = there.copy()
        new[1:] &= np.logical_or.accumulate(table[1:] != table[:-1], axis=1)
        numbers = np.cumsum(new).reshape(new.shape)
        at = np.maximum.accumulate(np.where(new, numbers, 0), axis=0)
        self.outside = int(new.sum()) + 1
        self.word = np.full(self.outside + 1, -1)
        self.depth = np.zeros(self.outside + 1, np.int64)
        self.best = np.full(self.outside + 1, -np.inf)
        levels = []
        for column in range(table.shape[1]):
            rows = np.flatnonzero(new[:, column])
            parents = at[rows, column - 1] if column else np.zeros_like(rows)
            levels.append(np.stack([at[rows, column], parents, table[rows, column]]))
            self.depth[at[rows, column]] = column + 1
        ends = at[np.arange(len(table)), there.sum(1) - 1]
        self.word[ends], self.best[ends] = order, scores[order]
        for nodes, parents, _ in reversed(levels):
            np.maximum.at(self.best, parents, self.best[nodes])
        self.best[self.outside] = 0.0
        return levels

    def _link(self, levels: list[np.ndarray], bare: list[str], letters: dict[str, int]) -> None:
        """Where each piece leads from each node."""
        arcs, plain, initial = _piece_trie(bare, self.begins, letters)
        longest = max(map(len, bare), default=0)
        # For the last 0, 1, 2 ... characters before a node: the node there, and the piece they begin.
        back = np.zeros((self.outside + 1, longest + 1), np.int64)
        found = np.full((self.outside + 1, longest + 1), -1, np.int64)
        found[:, 0], back[:, 0] = 0, np.arange(self.outside + 1)
        for nodes, parents, characters in levels:
            found[nodes, 1:] = arcs[found[parents, :-1], characters[:, None]]
            back[nodes, 1:] = back[parents, :-1]
        token = np.where(found > 0, plain[found], -1)
        target, steps = (token >= 0).nonzero()
        keys = back[target, steps] * self._pieces + token[target, steps]
        ranks = np.argsort(keys)
        # A last key above all others, so that every search ends at a key.
        self._keys = np.append(keys[ranks], np.iinfo(np.int64).max)
        self._targets = np.append(target[ranks], self.outside)
        self.first = np.full(self._pieces, self.outside)
        target, steps = ((found > 0) & (initial[found] >= 0) & (back == 0)).nonzero()
        self.first[initial[found[target, steps]]] = target
        self.first[self.begins & (self.characters == 0)] = 0

    def walk(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Where pieces that go on with a word lead; arrays of one shape."""
        wanted = nodes * self._pieces + tokens
        place = np.searchsorted(self._keys, wanted)
        return np.where(self._keys[place] == wanted, self._targets[place], self.outside)


def _piece_trie(
    bare: list[str], begins: np.ndarray, letters: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trie of the pieces: arcs (nodes, letters + 1), -1 for none, and the pieces that end at each node.

    The last row of the arcs stays -1, so that index -1 (no node) leads nowhere. The two lists of pieces are
    of those inside words and of those that begin one.
    """
    arcs: list[dict[int, int]] = [{}]
    ends: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for token, (text, first) in enumerate(zip(bare, begins.tolist(), strict=True)):
        if not text or any(c not in letters for c in text):
            continue
        node = 0
        for c in text:
            if letters[c] not in arcs[node]:
                arcs[node][letters[c]] = len(arcs)
                arcs.append({})
            node = arcs[node][letters[c]]
        ends[first][node] = token
    table = np.full((len(arcs) + 1, len(letters) + 1), -1, np.int64)
    for node, row in enumerate(arcs):
        table[node, list(row)] = list(row.values())
    tokens = np.full((2, len(arcs) + 1), -1, np.int64)
    for kind, found in enumerate(ends):
        tokens[kind, list(found)] = list(found.values())
    return table, tokens[0], tokens[1]


def _known(lm: NgramModel) -> np.ndarray:
    """Ids of the real words."""
    special = {UNKNOWN, START, END}
    return np.array([i for i, word in enumerate(lm.words) if word and word not in special], np.int64)


def word_lexicon(lm: NgramModel, pieces: Sequence[str]) -> Lexicon:
    """The words of a model, spelled in a tokenizer's pieces.

    Args:
        pieces: the text of every token id, ``\u2581`` where a word begins.

    Raises:
        ConfigError: no word of the model can begin with any of the pieces.
    """
    known = _known(lm)
    lexicon = Lexicon([lm.words[i] for i in known.tolist()], lm.log_probs[1 + known], pieces)
    tokens = np.arange(len(pieces))
    starts = np.where(lexicon.begins, lexicon.first, lexicon.walk(np.zeros_like(tokens), tokens))
    if not lexicon.begins.any() or not ((starts > 0) & (starts != lexicon.outside)).any():
        raise ConfigError(
            "language model: the tokenizer can spell none of its words; are both of the same language, and"
            " both in lower or upper case?"
        )
    return lexicon


class WordLm:
    """A word n-gram model over word pieces.

    The score of a text is, summed over its words, ``weight * log P(word | words before) + bonus``, and
    ``weight * log P(<unk> | words before) + bonus + unknown * characters`` for a word outside the
    vocabulary; and ``weight * log P(</s> | words)`` at the end.

    Args:
        lm: the word model.
        lexicon: of its words, see :func:`word_lexicon`.
        weight: of the model's natural log probabilities.
        bonus: for each word; above 0 against too few words.
        unknown: for each character of an unknown word, at most 0.
    """

    def __init__(
        self,
        lm: NgramModel,
        lexicon: Lexicon,
        weight: float = 0.5,
        bonus: float = 0.0,
        unknown: float = -1.5,
    ):
        self.lm, self.lexicon = lm, lexicon
        self.weight, self.bonus, self.unknown = weight, bonus, unknown
        self._size = lexicon.outside + 1
        self._word = np.append(_known(lm), lm.unknown)[lexicon.word]  # -1, no word, gives <unk>
        # The look-ahead holds the bonus too: without it, words left out would be the better ones until the
        # next word begins.
        self._strange = weight * lm.log_probs[1 + lm.unknown] + bonus
        self._ahead = weight * lexicon.best + bonus
        self._ahead[0], self._ahead[lexicon.outside] = 0.0, self._strange
        self._lost = unknown * lexicon.depth - self._ahead + self._strange
        self._lost[lexicon.outside] = 0.0
        # What ending a word takes back or adds beside the model's score; outside the trie the characters
        # are paid for already.
        self._settle = bonus - self._ahead + np.where(lexicon.word < 0, unknown * lexicon.depth, 0.0)
        self._settle[lexicon.outside] = bonus - self._strange
        self._settle[0] = 0.0
        out = lexicon.first == lexicon.outside
        self._cost = unknown * lexicon.characters
        self._enter = np.where(out, self._strange + self._cost, self._ahead[lexicon.first])
        self.start = lm.start * self._size

    def _end_word(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score and the model's state after the word that each state is in; none at the root."""
        contexts, nodes = np.divmod(states, self._size)
        score, after = self.lm.step(contexts, self._word[nodes])
        inside = nodes > 0
        return np.where(inside, self.weight * score, 0.0) + self._settle[nodes], np.where(
            inside, after, contexts
        )

    def expand(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and next states (n, K, C) of every state (n, K) with every token (n, C) of its row."""
        lexicon = self.lexicon
        contexts, nodes = np.divmod(states, self._size)
        begins = lexicon.begins[tokens]
        shape = (*states.shape, tokens.shape[1])
        score, after = np.empty(shape), np.empty(shape, np.int64)
        # Pieces inside a word.
        r, c = (~begins).nonzero()
        here, piece = nodes[r], tokens[r, c][:, None]  # (m, K), (m, 1)
        there = lexicon.walk(here, piece)
        left = there == lexicon.outside
        score[r, :, c] = np.where(
            left, self._lost[here] + self._cost[piece], self._ahead[there] - self._ahead[here]
        )
        after[r, :, c] = contexts[r] * self._size + there
        # Pieces that begin one.
        if len(r) < begins.size:
            r, c = begins.nonzero()
            ended, following = self._end_word(states)
            piece = tokens[r, c][:, None]
            score[r, :, c] = ended[r] + self._enter[piece]
            after[r, :, c] = following[r] * self._size + lexicon.first[piece]
        return score, after

    def finish(self, states: np.ndarray) -> np.ndarray:
        """Score of ending in each state: its last word and the sentence end."""
        ended, following = self._end_word(states)
        return ended + self.weight * self.lm.finish(following)


class TokenLm:
    """An n-gram model over the tokens themselves, for Chinese characters and phones.

    Args:
        lm: its words are pieces of the tokenizer.
        pieces: the text of every token id; those that the model does not know are its ``<unk>``.
        weight, bonus: as in :class:`WordLm`, for each token.

    Raises:
        ConfigError: no piece is a word of the model.
    """

    def __init__(self, lm: NgramModel, pieces: Sequence[str], weight: float = 0.3, bonus: float = 0.0):
        self._words = np.array([lm.ids.get(piece, lm.unknown) for piece in pieces])
        if (self._words == lm.unknown).all():
            raise ConfigError("language model: it knows none of the tokenizer's pieces; is it the right one?")
        self.lm, self.weight, self.bonus, self.start = lm, weight, bonus, lm.start

    def expand(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and next states (n, K, C) of every state (n, K) with every token (n, C) of its row."""
        shape = (*states.shape, tokens.shape[1])
        words = np.broadcast_to(self._words[tokens][:, None, :], shape)
        score, after = self.lm.step(np.broadcast_to(states[:, :, None], shape), words)
        return self.weight * score + self.bonus, after

    def finish(self, states: np.ndarray) -> np.ndarray:
        """Score of ending in each state."""
        return self.weight * self.lm.finish(states)
