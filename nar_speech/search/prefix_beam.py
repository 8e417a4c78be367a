"""CTC prefix beam search (Hannun et al. 2014) with WeNet's pruning and token times, batched.

One Python step per frame; inside it everything is an array over batch x beam x candidates. Prefixes are
never copied: a prefix is a node with a pointer to the node it extends, and equal prefixes are found by a
64-bit hash of their tokens.

Per frame only the ``candidates`` most probable symbols extend a prefix, then the ``beam`` best prefixes by
log(p(ending in blank) + p(ending in a token)) plus context and LM scores go on. Beside these sums the
probability of the best single path of each prefix is kept, which gives the token times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nar_speech.errors import InputError
from nar_speech.search.context import ContextGraph
from nar_speech.search.hypothesis import CtcHypothesis

# A prefix that exists but has probability zero sorts behind all others and before "no prefix" (-inf).
IMPOSSIBLE = -1e30
RECOMBINED = 3  # times the beam: extensions among which equal futures are looked for
FIRST_STEPS = 64  # room for so many steps to begin with
NOTHING = -2  # in place of a candidate's id: no candidate
# Rows of the float state: log probability of ending in a blank or in the last token, the same of the best
# single path, and what context and LM added.
BLANK, TOKEN, BEST_BLANK, BEST_TOKEN, CONTEXT, LM = range(6)
# Rows of the integer state: time nodes of the best path ending in a blank / in the token, the node before the
# latter, the prefix node, its last token, hashes of the prefix and of the prefix without its last token, and
# the states of the scorers.
TIME_BLANK, TIME_TOKEN, TIME_BEFORE, NODE, LAST, KEY, PARENT_KEY, CONTEXT_STATE, LM_STATE = range(9)
# Tokens, the steps of their times, score, context score and LM score of a hypothesis.
Found: TypeAlias = tuple[np.ndarray, np.ndarray, float, float, float]


class Scorer(Protocol):
    """Scores tokens from left to right; its states are ints, so that arrays of them cost no Python loop.

    :class:`ContextGraph` is one; the language models of :mod:`nar_speech.search.word_lm` are others.
    """

    start: int

    def expand(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Natural-log scores and next states (n, K, C) of states (n, K) with their row's tokens (n, C)."""

    def finish(self, states: np.ndarray) -> np.ndarray:
        """Natural-log score of ending in each state."""


def prefix_beam(
    log_probs: Tensor,
    lengths: Tensor,
    beam: int = 10,
    nbest: int | None = None,
    blank: int = 0,
    candidates: int | None = None,
    context: ContextGraph | None = None,
    lm: Scorer | None = None,
    lm_weight: float = 0.3,
    blank_skip: float | None = None,
    floor: float | None = None,
    recombine: bool = False,
) -> list[list[CtcHypothesis]]:
    """Most probable token sequences of each utterance.

    Args:
        log_probs: (B, T, V) log probabilities.
        lengths: (B,) valid frames.
        beam: prefixes kept per frame.
        nbest: sequences returned; default ``beam``.
        blank: id of the blank.
        candidates: symbols per frame that may extend a prefix; default ``beam``.
        context: phrases to favour.
        lm: language model for shallow fusion; ``lm_weight`` times its score is added.
        blank_skip: where the blank's probability is above this (0.99, say), frames in a row are taken as one
            frame; speeds the search up, nearly without a change. None: every frame counts.
        floor: candidates less probable than the frame's best by more than this (natural log; 8, say) are
            left out, which makes clear frames fast. None: all ``candidates`` count.
        recombine: of prefixes that the scorers and the last token can't tell apart, only the best keeps a
            place in the beam (the others fill places that are left). With an n-gram model a beam goes much
            further so, but the lists of hypotheses are poorer in alternatives.

    Returns:
        For each utterance its hypotheses, best first. ``times`` are frames of the best path.
    """
    if beam < 1:
        raise InputError(f"beam: got {beam}; it must be at least 1")
    batch, _, vocabulary = log_probs.shape
    log_probs = log_probs.detach().float()
    lengths = lengths.to(log_probs.device).clamp(max=log_probs.shape[1])
    frames, counts, blank_sums = _kept_frames(log_probs, lengths, blank, blank_skip)
    values, symbols = log_probs.topk(min(candidates or beam, vocabulary), dim=-1)
    values, symbols = values.cpu().double().numpy(), symbols.cpu().numpy()
    rows = np.arange(batch)[:, None]
    values, symbols = values[rows, frames], symbols[rows, frames]  # (B, T', C)
    if blank_sums is not None:
        values = np.where(symbols == blank, blank_sums[:, :, None], values)
    widths = np.full(values.shape[:2], values.shape[2])
    if floor is not None:
        near = values >= values[:, :, :1] - floor
        values, symbols = np.where(near, values, -np.inf), np.where(near, symbols, NOTHING)
        widths = near.sum(2)
    order = np.argsort(-counts, kind="stable")
    search = PrefixBeamSearch(batch, beam, blank, context, lm, lm_weight, recombine)
    for t in range(int(counts.max(initial=0))):
        active = order[: int((counts > t).sum())]
        width = int(widths[active, t].max())
        search.advance(values[active, t, :width], symbols[active, t, :width])
    results = search.results(nbest or beam)
    output: list[list[CtcHypothesis]] = [[] for _ in range(batch)]
    for row, item in enumerate(order.tolist()):
        output[item] = [describe(found, frames[item], values[item], symbols[item]) for found in results[row]]
    return output


def describe(found: Found, frames: np.ndarray, values: np.ndarray, symbols: np.ndarray) -> CtcHypothesis:
    """A hypothesis from one of :meth:`PrefixBeamSearch.results`.

    Args:
        frames: (T,) frame number of each step. values, symbols: (T, C) what the steps were given.
    """
    tokens, steps, score, context_score, lm_score = found
    # A token's frame is one where it was among the candidates.
    own = np.where(symbols[steps] == tokens[:, None], values[steps], -np.inf)
    return CtcHypothesis(
        tuple(tokens.tolist()),
        score,
        tuple(frames[steps].tolist()),
        tuple(np.exp(own.max(1)).tolist()),
        context_score,
        lm_score,
    )


def _kept_frames(
    log_probs: Tensor, lengths: Tensor, blank: int, threshold: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Frames the search visits: (B, T') frame numbers, (B,) how many, (B, T') blank log-prob of each run.

    A run of frames that are surely blank is visited once, with the sum of its blank log probabilities, so
    that two equal tokens around it stay apart and scores stay comparable.
    """
    size = log_probs.shape[1]
    index = torch.arange(size, device=log_probs.device).expand(log_probs.shape[0], size)
    valid = index < lengths.unsqueeze(1)
    if threshold is None:
        return index.cpu().numpy(), lengths.cpu().numpy(), None
    blanks = log_probs[:, :, blank].double()
    sure = blanks.exp() > threshold
    keep = valid.clone()
    keep[:, 1:] &= ~(sure[:, 1:] & sure[:, :-1])
    run = keep.long().cumsum(1) - 1
    sums = torch.zeros_like(blanks).scatter_add(1, run.clamp(min=0), blanks.masked_fill(~valid, 0.0))
    # Left out frames all go to the last column, which is free if there are any.
    packed = torch.zeros_like(index).scatter(1, torch.where(keep, run, size - 1), index) if size else index
    counts = keep.sum(1)
    return packed.cpu().numpy(), counts.cpu().numpy(), sums.cpu().numpy()


class PrefixBeamSearch:
    """The search itself, fed frame by frame.

    Rows of the batch are ordered by length, longest first: a step with n rows advances the first n.

    Args:
        batch, beam, blank, context, lm, lm_weight, recombine: see :func:`prefix_beam`.
    """

    def __init__(
        self,
        batch: int,
        beam: int,
        blank: int = 0,
        context: ContextGraph | None = None,
        lm: Scorer | None = None,
        lm_weight: float = 0.3,
        recombine: bool = False,
    ):
        self.batch, self.beam, self.blank, self.recombine = batch, beam, blank, recombine
        self.context, self.lm, self.lm_weight = context, lm, lm_weight
        self.floats = np.full((6, batch, beam), -np.inf)
        self.floats[CONTEXT:] = 0.0
        # WeNet starts both best paths at 0, though nothing can have ended in a token yet.
        self.floats[[BLANK, BEST_BLANK, BEST_TOKEN], :, 0] = 0.0
        self.ints = np.full((9, batch, beam), -1, dtype=np.int64)
        self.ints[KEY] = 0
        self.ints[CONTEXT_STATE] = 0 if context is None else context.start
        self.ints[LM_STATE] = 0 if lm is None else lm.start
        self.exists = np.zeros((batch, beam), dtype=bool)
        self.exists[:, 0] = True
        self.steps = 0
        # Node t * beam + k of a row was made at step t: what it extends, its token, the time node before it.
        self._nodes = np.full((3, batch, FIRST_STEPS, beam), -1, dtype=np.int64)
        self._rank = np.arange(beam)

    def advance(self, values: np.ndarray, symbols: np.ndarray) -> None:
        """One frame.

        Args:
            values: (n, C) float64 log probabilities of the symbols that may extend a prefix.
            symbols: (n, C) int64 their ids, all different in a row; ``NOTHING`` for none.
        """
        n, width = values.shape
        floats, ints, exists = self.floats[:, :n], self.ints[:, :n], self.exists[:n]
        rows = np.arange(n)[:, None]
        total = np.logaddexp(floats[BLANK], floats[TOKEN])
        ended_blank = floats[BEST_BLANK] > floats[BEST_TOKEN]
        best = np.where(ended_blank, floats[BEST_BLANK], floats[BEST_TOKEN])
        time = np.where(ended_blank, ints[TIME_BLANK], ints[TIME_TOKEN])

        # Each prefix with each symbol behind it: a repeated token needs a blank in between.
        is_blank = symbols == self.blank
        same = symbols[:, None, :] == ints[LAST][:, :, None]
        value = values[:, None, :]
        grown = np.where(same, floats[BLANK][:, :, None], total[:, :, None]) + value
        grown_best = np.where(same, floats[BEST_BLANK][:, :, None], best[:, :, None]) + value
        allowed = exists[:, :, None] & (~is_blank & (symbols != NOTHING))[:, None, :]

        # Each prefix as it is: a blank, or its last token again.
        stay = np.empty((4, n, self.beam))
        blank_value = np.where(is_blank, values, -np.inf).max(1, keepdims=True)
        repeat_value = np.where(same, value, -np.inf).max(2)
        repeated = same.any(2)
        stay[BLANK], stay[BEST_BLANK] = total + blank_value, best + blank_value
        stay[TOKEN], stay[BEST_TOKEN] = floats[TOKEN] + repeat_value, floats[BEST_TOKEN] + repeat_value
        before = ints[TIME_BEFORE]

        # A prefix in the beam is also reached from its own parent, if that is in the beam too.
        child = (ints[PARENT_KEY][:, :, None] == ints[KEY][:, None, :]) & exists[:, None, :]
        merged = child.any(2) & repeated & exists & (ints[LAST] >= 0)
        if merged.any():
            r, k = merged.nonzero()
            parent, column = child[r, k].argmax(1), same[r, k].argmax(1)
            stay[TOKEN, r, k] = np.logaddexp(stay[TOKEN, r, k], grown[r, parent, column])
            through = grown_best[r, parent, column]
            # WeNet visits prefixes in beam order; whoever comes first sets the time of the token.
            wins = through > np.where(parent < k, -np.inf, stay[BEST_TOKEN, r, k])
            stay[BEST_TOKEN, r, k] = np.maximum(stay[BEST_TOKEN, r, k], through)
            twice = same[r, parent, column]
            source = np.where(twice, ints[TIME_BLANK, r, parent], time[r, parent])
            before = before.copy()
            before[r, k] = np.where(wins, source, before[r, k])
            allowed[r, parent, column] = False

        added, next_states = self._score(ints, symbols)
        rank_stay = np.logaddexp(stay[BLANK], stay[TOKEN]) + floats[CONTEXT] + floats[LM]
        rank_grown = grown + (floats[CONTEXT] + floats[LM])[:, :, None] + sum(added)
        alive = exists & (repeated | is_blank.any(1, keepdims=True))
        rank = np.concatenate([rank_stay, rank_grown.reshape(n, -1)], 1)
        there = np.concatenate([alive, allowed.reshape(n, -1)], 1)
        rank = np.where(there, np.maximum(rank, IMPOSSIBLE), -np.inf)
        top = self._distinct(rank, ints, symbols, next_states) if self.recombine else _best(rank, self.beam)

        # Carry the chosen ones over.
        grows = top >= self.beam
        source, column = np.where(grows, (top - self.beam) // width, top), (top - self.beam) % width
        node = self.steps * self.beam + self._rank
        old = ints[:, rows, source]
        new_floats = np.empty_like(floats)
        new_floats[:4] = stay[:, rows, source]
        new_floats[BLANK][grows] = new_floats[BEST_BLANK][grows] = -np.inf
        new_floats[TOKEN] = np.where(grows, grown[rows, source, column], new_floats[TOKEN])
        new_floats[BEST_TOKEN] = np.where(grows, grown_best[rows, source, column], new_floats[BEST_TOKEN])
        new_floats[CONTEXT:] = floats[CONTEXT:, rows, source]
        symbol = symbols[rows, column]
        time = time[rows, source]
        twice = same[rows, source, column]
        new = np.empty_like(old)
        new[TIME_BLANK] = time
        new[TIME_TOKEN] = node
        new[TIME_BEFORE] = np.where(grows, np.where(twice, old[TIME_BLANK], time), before[rows, source])
        new[NODE] = np.where(grows, node, old[NODE])
        new[LAST] = np.where(grows, symbol, old[LAST])
        new[KEY] = np.where(grows, _extend_key(old[KEY], symbol), old[KEY])
        new[PARENT_KEY] = np.where(grows, old[KEY], old[PARENT_KEY])
        new[CONTEXT_STATE:] = old[CONTEXT_STATE:]
        for offset, (score, state) in enumerate(zip(added, next_states, strict=True)):
            if state is not None:
                new_floats[CONTEXT + offset] += np.where(grows, score[rows, source, column], 0.0)
                after = state[rows, source, column]
                new[CONTEXT_STATE + offset] = np.where(grows, after, old[CONTEXT_STATE + offset])
        if self.steps == self._nodes.shape[2]:
            self._nodes = np.concatenate([self._nodes, np.full_like(self._nodes, -1)], axis=2)
        self._nodes[:, :n, self.steps] = old[NODE], symbol, new[TIME_BEFORE]
        self.steps += 1
        self.floats[:, :n], self.ints[:, :n] = new_floats, new
        self.exists[:n] = rank[rows, top] > -np.inf

    def _distinct(
        self, rank: np.ndarray, ints: np.ndarray, symbols: np.ndarray, states: list[np.ndarray | None]
    ) -> np.ndarray:
        """Like :func:`_best`, but those that will go on like a better one come last."""
        top = _best(rank, min(rank.shape[1], RECOMBINED * self.beam))
        width, rows = symbols.shape[1], np.arange(len(top))[:, None]
        grows, column = top >= self.beam, (top - self.beam) % width
        source = np.where(grows, (top - self.beam) // width, top)
        future = np.where(grows, symbols[rows, column], ints[LAST][rows, source])
        for now, after in zip(ints[CONTEXT_STATE:], states, strict=True):
            if after is not None:
                state = np.where(grows, after[rows, source, column], now[rows, source])
                future = _extend_key(future, state)
        size = top.shape[1]
        same = future[:, :, None] == future[:, None, :]
        worse = (same & np.tri(size, k=-1, dtype=bool)).any(2)
        worse |= rank[rows, top] == -np.inf
        order = np.argsort(worse, axis=1, kind="stable")[:, : self.beam]
        return np.take_along_axis(top, order, 1)

    def _score(
        self, ints: np.ndarray, symbols: np.ndarray
    ) -> tuple[list[np.ndarray | float], list[np.ndarray | None]]:
        """Scores and next states (n, K, C) that context and LM give to each extension."""
        # What is no token may not be in their tables; the result of any other is not used there.
        symbols = np.where((symbols == self.blank) | (symbols == NOTHING), 0, symbols)
        scores: list[np.ndarray | float] = [0.0, 0.0]
        states: list[np.ndarray | None] = [None, None]
        if self.context is not None:
            scores[0], states[0] = self.context.expand(ints[CONTEXT_STATE], symbols)
        if self.lm is not None:
            score, states[1] = self.lm.expand(ints[LM_STATE], symbols)
            scores[1] = self.lm_weight * score
        return scores, states

    def results(self, nbest: int, finish: bool = True) -> list[list[Found]]:
        """For each row up to ``nbest`` hypotheses, best first.

        ``finish``: whether the sequences end here, which scorers charge for; else they may go on.
        """
        floats, ints = self.floats, self.ints
        acoustic = np.logaddexp(floats[BLANK], floats[TOKEN])
        context, lm = floats[CONTEXT].copy(), floats[LM].copy()
        if self.lm is not None and finish:
            lm += self.lm_weight * self.lm.finish(ints[LM_STATE])
        order = np.broadcast_to(self._rank, acoustic.shape)
        official = False
        if self.context is not None and finish:
            official = self.context.official
            ended = self.context.finish(ints[CONTEXT_STATE])
            context = ended if official else context + ended
        score = np.where(self.exists, acoustic + context + lm, -np.inf)
        if not official:
            order = np.argsort(-score, axis=1, kind="stable")
        time = np.where(floats[BEST_BLANK] > floats[BEST_TOKEN], ints[TIME_BLANK], ints[TIME_TOKEN])
        tokens, steps = self._trace(ints[NODE], time)
        output = []
        for row in range(self.batch):
            kept = [k for k in order[row].tolist() if score[row, k] > IMPOSSIBLE][:nbest]
            output.append(
                [
                    (
                        tokens[row, k][tokens[row, k] >= 0],
                        steps[row, k][steps[row, k] >= 0],
                        float(score[row, k]),
                        float(context[row, k]),
                        float(lm[row, k]),
                    )
                    for k in kept
                ]
            )
        return output

    def prune(self, margin: float) -> None:
        """Drop prefixes that are less probable, scorers included, than the best by more than ``margin``."""
        floats = self.floats
        rank = np.logaddexp(floats[BLANK], floats[TOKEN]) + floats[CONTEXT] + floats[LM]
        rank = np.where(self.exists, rank, -np.inf)
        self.exists &= rank >= rank.max(1, keepdims=True) - margin

    def agreed(self) -> list[int]:
        """For each row, how many leading tokens all its prefixes share: no later frame can change these."""
        tokens, _ = self._trace(self.ints[NODE], np.full_like(self.ints[NODE], -1))
        output = []
        for prefixes, exists in zip(tokens, self.exists, strict=True):
            rows = [prefix[prefix >= 0] for prefix in prefixes[exists]]
            size = min((len(row) for row in rows), default=0)
            same = np.array([row[:size] == rows[0][:size] for row in rows], bool).reshape(len(rows), size)
            output.append(int(np.logical_and.accumulate(same.all(0)).sum()))
        return output

    def export(self) -> dict[str, np.ndarray]:
        """All that :meth:`restore` of a search with the same arguments needs to go on."""
        nodes = self._nodes[:, :, : self.steps]
        return {"floats": self.floats, "ints": self.ints, "exists": self.exists, "nodes": nodes}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`export` gave.

        Raises:
            InputError: arrays of another search.
        """
        for name, own in self.export().items():
            new = arrays.get(name)
            if (
                new is None
                or new.dtype != own.dtype
                or _without_steps(name, new) != _without_steps(name, own)
            ):
                raise InputError(f"beam: {name} is missing or of another search; begin a new utterance")
        nodes = arrays["nodes"]
        self.steps = nodes.shape[2]
        # A pointer to what is not there would only be found when a result is asked for.
        pointers = np.concatenate([nodes[[0, 2]].ravel(), arrays["ints"][: NODE + 1].ravel()])
        if len(pointers) and not -1 <= pointers.min() <= pointers.max() < self.steps * self.beam:
            raise InputError("beam: damaged state; begin a new utterance")
        self.floats, self.ints, self.exists = (arrays[n].copy() for n in ("floats", "ints", "exists"))
        self._nodes = np.full((3, self.batch, max(self.steps, FIRST_STEPS), self.beam), -1, dtype=np.int64)
        self._nodes[:, :, : self.steps] = nodes

    def _trace(self, node: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and steps (B, K, U) from the last pointers (B, K) back to the start, -1 in front."""
        extends, symbol, before = self._nodes[:, :, : self.steps].reshape(3, self.batch, -1)
        rows = np.arange(self.batch)[:, None]

        def follow(pointer: np.ndarray, previous: np.ndarray, value) -> np.ndarray:
            columns = []
            while (pointer >= 0).any():
                columns.append(np.where(pointer >= 0, value(pointer), -1))
                pointer = np.where(pointer >= 0, previous[rows, pointer], -1)
            columns.append(np.full(pointer.shape, -1))  # never an empty list
            return np.stack(columns[::-1], 2)

        return (
            follow(node, extends, lambda pointer: symbol[rows, pointer]),
            follow(time, before, lambda pointer: pointer // self.beam),
        )


def _best(rank: np.ndarray, count: int) -> np.ndarray:
    """Columns (n, count) of the largest values of each row of ``rank`` (n, m), largest first."""
    if rank.shape[1] <= 512:
        return np.argsort(-rank, axis=1, kind="stable")[:, :count]
    part = np.sort(np.argpartition(-rank, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(rank, part, 1), axis=1, kind="stable")
    return np.take_along_axis(part, order, 1)


def _extend_key(key: np.ndarray, symbol: np.ndarray) -> np.ndarray:
    """64-bit hash of a prefix with ``symbol`` behind it; integer overflow wraps around."""
    mixed = (symbol + 1) * np.int64(-0x61C8864680B583EB)
    mixed = (mixed ^ (mixed >> 29)) * np.int64(-0x40A7B892E31B1A47)
    return (key * np.int64(0x5851F42D4C957F2D) + mixed) ^ (mixed >> 32)


def _without_steps(name: str, array: np.ndarray) -> tuple[int, ...]:
    """The part of an exported array's shape that does not grow."""
    return (*array.shape[:2], *array.shape[3:]) if name == "nodes" else array.shape
