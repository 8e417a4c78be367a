"""Tokens of an utterance of a stream, collected step by step: CTC by search, a Paraformer's as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from nar_speech.errors import InputError
from nar_speech.models.paraformer import EOS
from nar_speech.pipelines.recognize import LM_FLOOR, tidy
from nar_speech.search.context import ContextGraph
from nar_speech.search.ctc import token_borders
from nar_speech.search.ctc_stream import BeamStream, GreedyStream
from nar_speech.search.prefix_beam import Scorer

BEAM_MARGIN = 12.0
BLANK_SKIP = 0.99  # where the model names none: live searches can't afford a beam over silence
TOKEN_SECONDS = 0.6  # a token of a Paraformer is not longer; what is left is silence


@dataclass(frozen=True)
class Heard:
    """Token ids of an utterance so far, start and end of each in seconds of it, and probabilities."""

    ids: tuple[int, ...] = ()
    starts: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()
    confidences: tuple[float, ...] = ()


class Hearing(Protocol):
    """Collects the tokens of one utterance. ``agreement``: hypotheses that must agree to be promised."""

    agreement: int

    def push(self, row: Mapping[str, np.ndarray]) -> None:
        """Take in one step of this stream."""

    def heard(self, seconds: float, final: bool) -> Heard:
        """What was heard in ``seconds``."""

    def export(self) -> dict[str, Any]:
        """Plain data."""

    def restore(self, data: dict[str, Any]) -> None:
        """Take over what :meth:`export` gave."""


class CtcHearing:
    """Greedy search; a beam where ``graph`` favours words or with a language model, its weights inside."""

    def __init__(
        self,
        blank: int,
        frame_seconds: float,
        graph: ContextGraph | None,
        lm: Scorer | None,
        beam: int,
        blank_skip: float,
    ):
        self.frame_seconds, self.beam = frame_seconds, graph is not None or lm is not None
        self.agreement = 2 if self.beam else 1
        self.search: Any = GreedyStream(blank)
        if self.beam:
            limits = {} if lm is None else {"lm": lm, "lm_weight": 1.0, "floor": LM_FLOOR, "recombine": True}
            self.search = BeamStream(beam, blank, graph, blank_skip=blank_skip, margin=BEAM_MARGIN, **limits)

    def push(self, row: Mapping[str, np.ndarray]) -> None:
        """See :class:`nar_speech.models.ctc_stream.CtcFrames`."""
        count = int(row["counts"])
        more = (row["blanks"][:count],) if self.beam else ()
        self.search.push(row["values"][:count], row["symbols"][:count], *more)

    def heard(self, seconds: float, final: bool) -> Heard:
        """Times from the frames of the best path."""
        if final:
            self.search.finish()
        found = self.search.hypothesis(final) if self.beam else self.search.hypothesis()
        borders = token_borders(found.times, seconds, self.frame_seconds) if found.tokens else []
        starts, ends = tidy([a for a, _ in borders], [b for _, b in borders], seconds)
        return Heard(found.tokens, starts, ends, found.confidences)

    def export(self) -> dict[str, Any]:
        """Plain data."""
        return self.search.export()

    def restore(self, data: dict[str, Any]) -> None:
        """Take over what :meth:`export` gave."""
        self.search.restore(data)


class TokenHearing:
    """Tokens that the network has decided; none ever changes."""

    agreement = 1

    def __init__(self, frame_seconds: float):
        self.frame_seconds = frame_seconds
        self.ids: list[int] = []
        self.frames: list[int] = []
        self.sure: list[float] = []

    def push(self, row: Mapping[str, np.ndarray]) -> None:
        """See :class:`TokenStep`."""
        count = int(row["counts"])
        kept = [u for u, token in enumerate(row["ids"][:count].tolist()) if token > EOS]
        for own, name in ((self.ids, "ids"), (self.frames, "frames"), (self.sure, "sure")):
            own += row[name][kept].tolist()

    def heard(self, seconds: float, final: bool) -> Heard:
        """A token ends in the frame in which it fired and begins where the one before it ended."""
        ends = [(frame + 1) * self.frame_seconds for frame in self.frames]
        starts = [max(before, end - TOKEN_SECONDS) for before, end in zip([0.0, *ends], ends, strict=False)]
        starts, ends = tidy(starts, ends, seconds)
        return Heard(tuple(self.ids), starts, ends, tuple(self.sure))

    def export(self) -> dict[str, Any]:
        """Plain data."""
        return {"ids": self.ids, "frames": self.frames, "sure": self.sure}

    def restore(self, data: dict[str, Any]) -> None:
        """Take over what :meth:`export` gave."""
        try:
            self.ids, self.frames = ([int(i) for i in data[name]] for name in ("ids", "frames"))
            self.sure = [float(p) for p in data["sure"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("tokens: damaged state; begin a new utterance") from error


@dataclass(frozen=True)
class TokenStep:
    """Tokens of a step: ids, frames (B, U) int64, sure (B, U) float32 probabilities, counts (B,) int64."""

    ids: Tensor
    frames: Tensor
    sure: Tensor
    counts: Tensor
