"""What a session tells its client. Times are seconds of stream time: of all audio fed since it was opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from nar_speech.types import Token, Word


@dataclass(frozen=True)
class SpeechStarted:
    """Somebody began to speak."""

    time: float


@dataclass(frozen=True)
class SpeechStopped:
    """Nobody speaks any more."""

    time: float


@dataclass(frozen=True)
class Partial:
    """The text of the open segment so far; the next one replaces it.

    The first ``stable`` characters will not change any more before the segment's ``Final``.
    """

    segment: int
    text: str
    stable: int
    start: float
    end: float


@dataclass(frozen=True)
class Final:
    """The text of a closed segment. An ``offline`` one replaces the ``online`` one of the same number."""

    segment: int
    text: str
    words: tuple[Word, ...]
    tokens: tuple[Token, ...]
    start: float
    end: float
    source: Literal["online", "offline"] = "online"


@dataclass(frozen=True, eq=False)
class AudioOut:
    """Sound that a model made, (N,) float32 in its own output rate."""

    samples: np.ndarray


@dataclass(frozen=True)
class Failed:
    """The session can't go on; ``message`` is one line without private data. ``Closed`` follows."""

    message: str


Reason: TypeAlias = Literal[
    "finished",  # the client's finish(): everything was heard
    "cancelled",  # the client's cancel()
    "failed",  # the model, the collector or the client's on_event raised; or NaN
    "idle",  # no audio for too long; what had come was finished
    "limit",  # open for too long; what had come was finished
    "moved",  # to another engine by a snapshot
    "drained",  # the engine was drained before the client had finished
    "shutdown",  # the engine was closed
]


@dataclass(frozen=True)
class Closed:
    """The last event of every session."""

    reason: Reason


Event: TypeAlias = SpeechStarted | SpeechStopped | Partial | Final | AudioOut | Failed | Closed
