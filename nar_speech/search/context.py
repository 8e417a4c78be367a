"""Phrase biasing: an Aho-Corasick automaton over token ids that rewards matching phrases.

Aho and Corasick 1975. Every matched token of a phrase adds its score at once, a broken match takes back what
it was given, a completed phrase keeps it (the scheme of icefall and WeNet).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from nar_speech.errors import InputError


class ContextGraph:
    """Automaton over phrases; states are ints, 0 is the root.

    It is a scorer for :func:`nar_speech.search.prefix_beam.prefix_beam`: ``start``, :meth:`step` and
    :meth:`finish` work on whole arrays of states, with no Python loop over them.

    Args:
        phrases: token ids of each phrase, none empty.
        score: natural-log bonus per token, one number for all phrases or one a phrase. Where phrases share
            a token the larger score holds.
        official: repeat two habits of WeNet. A phrase that is the beginning of an earlier longer one never
            counts as complete; and the search replaces the context score collected by a hypothesis with the
            (negative) finish score, without sorting again. The default completes such phrases, adds the
            finish score and sorts by the result.

    Raises:
        InputError: an empty phrase, or a number of scores other than that of phrases.
    """

    start = 0

    def __init__(
        self, phrases: Sequence[Sequence[int]], score: float | Sequence[float] = 3.0, official: bool = False
    ):
        scores = (
            [float(score)] * len(phrases) if isinstance(score, int | float) else [float(s) for s in score]
        )
        if len(scores) != len(phrases):
            raise InputError(
                f"context score: {len(scores)} scores for {len(phrases)} phrases; give one or as many"
            )
        self.official = official
        self.children: list[dict[int, int]] = [{}]
        self._token_score, self._is_end = [0.0], [False]
        for phrase, bonus in zip(phrases, scores, strict=True):
            if len(phrase) == 0:
                raise InputError("context phrase: an empty phrase can't be matched; leave it out")
            self._insert([int(token) for token in phrase], float(bonus))
        self._link()

    @property
    def num_states(self) -> int:
        """Number of automaton states, the root included."""
        return len(self.children)

    def _insert(self, phrase: list[int], bonus: float) -> None:
        node = 0
        for position, token in enumerate(phrase):
            last = position == len(phrase) - 1
            if token not in self.children[node]:
                self.children[node][token] = len(self.children)
                self.children.append({})
                self._token_score.append(bonus)
                self._is_end.append(last)
                node = len(self.children) - 1
            else:
                node = self.children[node][token]
                self._token_score[node] = max(self._token_score[node], bonus)
                self._is_end[node] = self._is_end[node] or (last and not self.official)

    def _link(self) -> None:
        """Failure links breadth first, giving node scores, outputs and the table of transitions."""
        size = self.num_states
        node_score, output = np.zeros(size), np.zeros(size)
        moves: list[dict[int, int]] = [{} for _ in range(size)]  # where a state differs from the root
        moves[0] = self.children[0]
        queue: deque[tuple[int, int, int, int]] = deque((0, t, n, 0) for t, n in self.children[0].items())
        while queue:
            parent, _, node, fail = queue.popleft()
            node_score[node] = node_score[parent] + self._token_score[node]
            output[node] = (node_score[node] if self._is_end[node] else 0.0) + output[fail]
            moves[node] = {**(moves[fail] if fail else {}), **self.children[node]}
            for token, child in self.children[node].items():
                target = moves[fail].get(token, self.children[0].get(token, 0))
                queue.append((node, token, child, target))
        self.node_score, self.output_score = node_score, output
        pairs = sorted((s << 32 | t, n) for s, row in enumerate(moves) for t, n in row.items())
        self._keys = np.array([key for key, _ in pairs] + [np.iinfo(np.int64).max], dtype=np.int64)
        self._targets = np.array([target for _, target in pairs] + [0], dtype=np.int64)

    def step(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score change (float64) and next state (int64) of each (state, token) pair, any equal shapes."""
        keys = (states.astype(np.int64) << 32) | tokens
        found = np.searchsorted(self._keys, keys)
        own = self._keys[found] == keys
        root = np.searchsorted(self._keys, tokens)
        fallback = np.where(self._keys[root] == tokens, self._targets[root], 0)
        after = np.where(own, self._targets[found], fallback)
        return self.node_score[after] - self.node_score[states] + self.output_score[after], after

    def expand(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`step` of every state (n, K) with every token (n, C) of its row; arrays (n, K, C)."""
        shape = (*states.shape, tokens.shape[1])
        return self.step(
            np.broadcast_to(states[:, :, None], shape), np.broadcast_to(tokens[:, None, :], shape)
        )

    def finish(self, states: np.ndarray) -> np.ndarray:
        """Score change at the end of a sequence: what an open match was given is taken back."""
        return -self.node_score[states]
