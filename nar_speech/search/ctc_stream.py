"""CTC decoding of streams: what has been heard of an utterance is carried from chunk to chunk.

A step on the device ends with the best few symbols of each frame, which are read back. On the host each
stream has a :class:`GreedyStream` or a :class:`BeamStream`, one per utterance: fed with any chunks they find
what :func:`nar_speech.search.ctc.greedy` and :func:`nar_speech.search.prefix_beam.prefix_beam` find in all
frames at once.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from nar_speech.errors import InputError
from nar_speech.search.context import ContextGraph
from nar_speech.search.hypothesis import CtcHypothesis
from nar_speech.search.prefix_beam import NOTHING, PrefixBeamSearch, Scorer, describe


class GreedyStream:
    """Best label of every frame, repeats merged, blanks dropped, over the chunks of one utterance.

    Attributes:
        tokens: ids so far; none of them ever changes.
        times: first frame of each.
        confidences: highest probability in each token's run of frames; that of the last token may grow.
        score: natural log probability of the path.
        frames: number of frames heard. silence: how many of the last ones were blank.
    """

    def __init__(self, blank: int = 0):
        self.blank = blank
        self.tokens: list[int] = []
        self.times: list[int] = []
        self.confidences: list[float] = []
        self.score, self.frames, self.silence = 0.0, 0, 0

    def push(self, values: np.ndarray, symbols: np.ndarray) -> None:
        """Hear the next frames: (U,) or (U, C) log probabilities and ids, best first."""
        if not len(symbols):
            return
        values = np.asarray(values, np.float64).reshape(len(values), -1)[:, 0]
        labels = np.asarray(symbols, np.int64).reshape(len(symbols), -1)[:, 0]
        open_label = self.tokens[-1] if self.tokens and not self.silence else self.blank
        first = np.flatnonzero(np.diff(labels, prepend=open_label))  # where another label begins
        begins = first if len(first) and first[0] == 0 else np.insert(first, 0, 0)
        peaks = np.exp(np.maximum.reduceat(values, begins))
        kept = labels[begins] != self.blank
        if kept[0] and labels[0] == open_label:  # the last token goes on
            self.confidences[-1] = max(self.confidences[-1], float(peaks[0]))
            kept[0] = False
        self.tokens += labels[begins][kept].tolist()
        self.times += (begins[kept] + self.frames).tolist()
        self.confidences += peaks[kept].tolist()
        self.score += float(values.sum())
        self.frames += len(labels)
        spoken = np.flatnonzero(labels != self.blank)
        self.silence = int(len(labels) - 1 - spoken[-1]) if len(spoken) else self.silence + len(labels)

    def finish(self) -> None:
        """The utterance is over; nothing waits here."""

    @property
    def stable(self) -> int:
        """How many leading tokens no later frame can change."""
        return len(self.tokens)

    def hypothesis(self) -> CtcHypothesis:
        """What has been heard so far."""
        return CtcHypothesis(tuple(self.tokens), self.score, tuple(self.times), tuple(self.confidences))

    def export(self) -> dict[str, Any]:
        """All that :meth:`restore` needs, as plain data."""
        names = ("tokens", "times", "confidences", "score", "frames", "silence")
        return {name: getattr(self, name) for name in names}

    def restore(self, data: dict[str, Any]) -> None:
        """Take over what :meth:`export` gave.

        Raises:
            InputError: something else.
        """
        try:
            tokens, times = ([int(i) for i in data[name]] for name in ("tokens", "times"))
            confidences = [float(c) for c in data["confidences"]]
            rest = float(data["score"]), int(data["frames"]), int(data["silence"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("greedy search: damaged state; begin a new utterance") from error
        if not len(tokens) == len(times) == len(confidences):
            raise InputError("greedy search: damaged state; begin a new utterance")
        self.tokens, self.times, self.confidences = tokens, times, confidences
        self.score, self.frames, self.silence = rest


class BeamStream:
    """Prefix beam search with phrases and language model over the chunks of one utterance.

    Args:
        beam, blank, context, lm, lm_weight, blank_skip, floor, recombine: see
            :func:`nar_speech.search.prefix_beam.prefix_beam`. As many candidates are used as are given.
        margin: after each chunk drop what is less probable than the best by more than this (natural log).
            Without it, a result equals that of ``prefix_beam``, but an old doubt may keep tokens from being
            ``stable`` for long.

    Attributes:
        frames: number of frames heard. silence: how many of the last ones were most likely blank.
    """

    def __init__(
        self,
        beam: int = 10,
        blank: int = 0,
        context: ContextGraph | None = None,
        lm: Scorer | None = None,
        lm_weight: float = 0.3,
        blank_skip: float | None = None,
        floor: float | None = None,
        recombine: bool = False,
        margin: float | None = None,
    ):
        if beam < 1:
            raise InputError(f"beam: got {beam}; it must be at least 1")
        self.blank, self.floor, self.margin = blank, floor, margin
        self.skip = np.inf if blank_skip is None else float(np.log(blank_skip))
        self.search = PrefixBeamSearch(1, beam, blank, context, lm, lm_weight, recombine)
        self.frames, self.silence = 0, 0
        # What each step was given, for the confidences, and its frame.
        self._values: list[np.ndarray] = []
        self._symbols: list[np.ndarray] = []
        self._numbers: list[int] = []
        # A run of surely blank frames that may go on: its first frame and what belongs to it, and the sum of
        # its blank log probabilities.
        self._run: tuple[int, np.ndarray, np.ndarray, float] | None = None

    def push(self, values: np.ndarray, symbols: np.ndarray, blanks: np.ndarray) -> None:
        """Hear the next frames.

        Args:
            values, symbols: (U, C) log probabilities and ids, best first; C the same in all chunks.
            blanks: (U,) log probability of the blank.
        """
        values, symbols = np.asarray(values, np.float64), np.asarray(symbols, np.int64)
        for row, ids, blank in zip(values, symbols, np.asarray(blanks, np.float64).tolist(), strict=True):
            sure = blank > self.skip
            if sure and self._run is not None:
                first, *given, total = self._run
                self._run = (first, *given, total + blank)
            else:
                self.finish()
                self._run = (self.frames, row, ids, blank)
                if not sure:
                    self.finish()
            self.frames += 1
            self.silence = self.silence + 1 if ids[0] == self.blank else 0
        if self.margin is not None:
            self.search.prune(self.margin)

    def finish(self) -> None:
        """The utterance is over: take in what waited. More frames may follow, but runs of blanks end here."""
        if self._run is None:
            return
        number, values, symbols, blank = self._run
        self._run = None
        values = np.where(symbols == self.blank, blank, values)
        if self.floor is not None:
            near = values >= values[0] - self.floor
            width = int(near.sum())
            values, symbols = np.where(near, values, -np.inf), np.where(near, symbols, NOTHING)
            self.search.advance(values[None, :width], symbols[None, :width])
        else:
            self.search.advance(values[None], symbols[None])
        self._values.append(values)
        self._symbols.append(symbols)
        self._numbers.append(number)

    @property
    def stable(self) -> int:
        """How many leading tokens all prefixes of the beam share: no later frame can change them."""
        return self.search.agreed()[0]

    def hypotheses(self, nbest: int = 1, finish: bool = False) -> list[CtcHypothesis]:
        """Best sequences so far; ``finish``: scored as if they ended here."""
        if not self._numbers:
            return [CtcHypothesis((), 0.0, (), ())]
        given = np.array(self._numbers), np.stack(self._values), np.stack(self._symbols)
        return [describe(found, *given) for found in self.search.results(nbest, finish)[0]]

    def hypothesis(self, finish: bool = False) -> CtcHypothesis:
        """The best of :meth:`hypotheses`."""
        return self.hypotheses(1, finish)[0]

    def export(self) -> dict[str, Any]:
        """All that :meth:`restore` of a stream with the same arguments needs, as plain data."""
        given = {"values": self._values, "symbols": self._symbols, "numbers": self._numbers}
        arrays = {name: np.array(rows) for name, rows in given.items() if rows} | self.search.export()
        run = None if self._run is None else [self._run[0], *map(_pack, self._run[1:3]), self._run[3]]
        packed = {name: _pack(array) for name, array in arrays.items()}
        return {"frames": self.frames, "silence": self.silence, "run": run, "arrays": packed}

    def restore(self, data: dict[str, Any]) -> None:
        """Take over what :meth:`export` gave.

        Raises:
            InputError: something else, or the state of a search with other settings.
        """
        try:
            frames, silence, run = int(data["frames"]), int(data["silence"]), data["run"]
            arrays = {name: _unpack(packed) for name, packed in data["arrays"].items()}
            if run is not None:
                run = int(run[0]), _unpack(run[1]), _unpack(run[2]), float(run[3])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError("beam: damaged state; begin a new utterance") from error
        none = np.zeros((0, 0))
        values, symbols, numbers = (arrays.get(name, none) for name in ("values", "symbols", "numbers"))
        nodes = arrays.get("nodes", none)
        fits = values.shape == symbols.shape and nodes.ndim == 4 and len(values) == nodes.shape[2]
        fits &= run is None or (run[1].ndim == 1 and run[1].shape == run[2].shape)
        if not fits or len(numbers) != len(values):
            raise InputError("beam: damaged state; begin a new utterance")
        self.search.restore(arrays)
        self.frames, self.silence, self._run = frames, silence, run
        self._values, self._symbols = list(values), list(symbols)
        self._numbers = [int(number) for number in numbers]


def _pack(array: np.ndarray) -> dict[str, Any]:
    """An array as plain data; the bytes as text, for JSON has no minus infinity."""
    array = np.ascontiguousarray(array)
    data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def _unpack(packed: dict[str, Any]) -> np.ndarray:
    """The array of :func:`_pack`.

    Raises:
        ValueError, KeyError, TypeError: something else.
    """
    dtype = np.dtype(packed["dtype"])
    if dtype.kind not in "fib":
        raise ValueError(f"dtype {dtype}")
    shape = [int(size) for size in packed["shape"]]
    return np.frombuffer(base64.b64decode(packed["data"], validate=True), dtype).reshape(shape).copy()
