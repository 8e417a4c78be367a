"""What the engine asks of a model. It knows nothing else of it: not what it hears, not what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from nar_speech.engine.events import Event
from nar_speech.errors import ConfigError


@dataclass(frozen=True)
class SessionOptions:
    """What one session wants. The limits are in seconds; None takes the engine's.

    settings: for the model and its collector, as plain data that JSON can hold: language, hotwords, endpoint
        rules ...; the model refuses what it does not know.
    backlog: audio that may wait.
    idle: without audio for so long, the session is finished.
    longest: the session is finished when it has been open, or has heard audio, for so long.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    backlog: float | None = None
    idle: float | None = None
    longest: float | None = None

    def __post_init__(self) -> None:
        for name in ("backlog", "idle", "longest"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"{name}: got {value!r}; must be a number of seconds above 0")


class StreamModel(Protocol):
    """A network that hears chunks of many streams at once.

    Attributes:
        sample_rate: Hz of the audio it hears.
        chunk: new samples of one step for each stream.
        device: where its state and inputs live.

    It may also have:
        first (int): samples of the first step of an utterance, if that differs from ``chunk``.
        carried (sequence of str): paths of state fields, as :func:`nar_speech.layers.state.named_tensors`
            gives them, or of what holds them, that outlive an utterance. All others are those of a new stream
            when the next utterance of the session begins; the model need not reset anything itself.
        prepare(options) -> State: the first state of a session with these options, one row; without it,
            every session begins with a row of ``init_state``. Called on the engine's thread. Fields set from
            options must be ``carried``.
        signature (str): what tells its weights from others; a session only moves between equal ones.
    """

    sample_rate: int
    chunk: int
    device: torch.device

    def init_state(self, slots: int) -> Any:
        """The state of ``slots`` streams that have not begun; all rows alike, floats finite."""
        ...

    def step(self, audio: Tensor, lengths: Tensor, final: Tensor, state: Any) -> tuple[Any, Any]:
        """Hear the next chunk of every stream.

        Rows never influence each other and nothing waits for the device: see layers/state.py.

        Args:
            audio: (B, N) float32, N the larger of ``chunk`` and ``first``, zero beyond ``lengths``.
            lengths: (B,) int64 valid samples. A row that is not final has ``chunk``, or ``first``; a final
                one has fewer, often 0, and follows audio of the same utterance or has some itself. So the
                outcome of an utterance does not depend on when its end was made known.
            final: (B,) bool, whether the utterance ends here.
            state: B rows, a copy that is the step's own: it may overwrite and return it.

        Returns:
            a frozen dataclass of tensors (B, ...), small, which are read back to the host (bfloat16 as
            float32), and the next state.
        """
        ...

    def collector(self, options: SessionOptions) -> Collector:
        """The host's side of a new session. Called by the thread that opens it.

        Raises:
            InputError: options that this model does not have.
        """
        ...


class Collector(Protocol):
    """Turns the rows of one stream into events. Runs on the engine's thread: it must be quick."""

    def push(self, row: dict[str, np.ndarray], samples: int, final: bool) -> Sequence[Event | Control]:
        """Take in one step.

        Args:
            row: this stream's part of the step's output, by the names of its fields (dotted where nested);
                views, valid during the call.
            samples: stream time so far: all audio heard since the session was opened.
            final: whether the utterance ended with this step.
        """
        ...

    def export(self) -> dict[str, Any]:
        """All that is needed to go on elsewhere, as plain data that JSON can hold."""
        ...

    def restore(self, data: dict[str, Any]) -> None:
        """Take over what :meth:`export` of a collector with the same options gave.

        Raises:
            InputError: anything that it can't be.
        """
        ...


@runtime_checkable
class TwoPassCollector(Collector, Protocol):
    """A collector that has finished utterances recognised again by a :class:`BatchModel`.

    Attributes:
        needed: first sample (stream time) that a later ``SecondPass`` may ask for; None: no audio is kept.
    """

    needed: int | None

    def second(self, tag: Any, result: Any, error: BaseException | None) -> Sequence[Event | Control]:
        """Take the result of a ``SecondPass``, or why there is none; the session stays open until then."""
        ...


@dataclass(frozen=True)
class EndUtterance:
    """A collector's request: end the utterance with the audio heard so far; the session goes on.

    The model then gets a final step without audio. It does nothing where the utterance has just ended.
    """


@dataclass(frozen=True)
class SecondPass:
    """A collector's request: let batch model ``model`` run on samples [start, end) of stream time.

    ``tag`` is plain data that JSON can hold and is handed back with the result.
    """

    model: str
    start: int
    end: int
    options: dict[str, Any] = field(default_factory=dict)
    tag: Any = None


Control = EndUtterance | SecondPass
OnEvent = Callable[[Event], None]


@runtime_checkable
class BatchModel(Protocol):
    """A model that takes whole segments: uploads, and the second pass of finished utterances.

    Attributes:
        sample_rate: Hz of the audio it hears.
    """

    sample_rate: int

    def run(self, waves: list[np.ndarray], options: list[dict[str, Any]]) -> list[Any]:
        """One result for each of the waves (N,) float32; an exception in place of a result fails that one."""
        ...


def is_stream_model(model: Any) -> bool:
    """Whether ``model`` hears chunks; otherwise it takes whole segments."""
    return hasattr(model, "step") and hasattr(model, "init_state")
