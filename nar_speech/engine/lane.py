"""What the engine's thread holds of each stream model and of each stream."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nar_speech.config import check_range
from nar_speech.engine.buffer import History
from nar_speech.engine.fanout import Outlet
from nar_speech.engine.graphs import Pending, Stepper, stable_sizes
from nar_speech.engine.model import Collector, SecondPass, SessionOptions
from nar_speech.engine.options import EngineOptions
from nar_speech.engine.scheduler import Pace
from nar_speech.engine.session import Session, Work
from nar_speech.engine.slots import Slot, SlotStore
from nar_speech.engine.stats import OnlineCounters, OnlineStats

logger = logging.getLogger(__name__)


class Lane:
    """One stream model: its states, its batch sizes, its numbers.

    Attributes:
        sizes: batch sizes in use.
        costs: seconds of a step by batch size, measured at the start.
        exact: whether results are the same to the last bit in all of ``sizes``.
    """

    def __init__(self, name: str, model: Any, options: EngineOptions):
        for attribute in ("sample_rate", "chunk"):
            check_range(model, 1, 10_000_000, attribute)
        self.name, self.model = name, model
        self.first = int(getattr(model, "first", model.chunk))
        self.seconds = model.chunk / model.sample_rate
        self.signature = str(getattr(model, "signature", ""))
        self.counters = OnlineCounters()
        self.store = SlotStore(model, options.max_sessions)
        self.stepper = Stepper(model, self.store, options.graphs, options.check_state)
        cuda = self.stepper.cuda
        wanted = options.buckets_for(cuda)
        enough = next((size for size in wanted if size >= options.max_sessions), wanted[-1])
        wanted = tuple(size for size in wanted if size <= enough)
        self.exact = options.exact_batches if options.exact_batches is not None else not cuda
        self.sizes = (stable_sizes(model, wanted) or (1,)) if self.exact else wanted
        self.costs = self.stepper.warm_up(self.sizes)
        logger.info(
            "model '%s': %s",
            name,
            ", ".join(f"batch {size} {self.costs[size] * 1000:.1f} ms" for size in self.sizes),
        )
        self.useful = max(self.sizes[0], min(options.useful_batch, self.sizes[-1]))

    def stats(self, streams: list[Stream]) -> OnlineStats:
        """Numbers; ``streams``: those open now."""
        c, lags = self.counters, [stream.session.lag for stream in streams]
        refused = sum(stream.session._refused for stream in streams)
        return OnlineStats(
            sessions=len(streams),
            opened=c.opened,
            closed=dict(c.closed),
            refused=c.refused,
            slots=self.store.size,
            slots_used=self.store.used,
            state_bytes=self.store.bytes,
            steps=c.steps,
            graph_replays=self.stepper.replays,
            eager_steps=self.stepper.eager,
            chunks=c.chunks,
            padding=c.padding,
            sizes=dict(c.sizes),
            step_seconds=c.step_seconds.freeze(),
            latency=c.latency.freeze(),
            deadline_misses=c.misses,
            audio_seconds=c.samples / self.model.sample_rate,
            lag_max=max(lags, default=0.0),
            lag_mean=sum(lags) / len(lags) if lags else 0.0,
            failed_steps=c.failed_steps,
            poisoned=c.poisoned,
            back_pressure=c.back_pressure + refused,
        )


@dataclass(eq=False)
class Stream:
    """The engine's side of a session. Only the engine's thread touches it.

    Attributes:
        release: gives the session's place back when it is closed.
        new, fresh: the stream, the utterance begins with the next step.
        queued, busy: it waits in the scheduler; a step of it is under way.
        work, due: the step it is queued for, and its deadline.
        passes: second passes under way, by a number of their own.
    """

    session: Session
    lane: Lane
    collector: Collector
    outlet: Outlet
    options: SessionOptions
    opened: float
    release: Callable[[], None]
    pace: Pace
    slot: Slot | None = None
    new: bool = True
    fresh: bool = True
    queued: bool = False
    busy: bool = False
    closed: bool = False
    work: Work | None = None
    due: float = 0.0
    history: History | None = None
    passes: dict[int, Pass] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """A second pass under way: what was asked, on which audio, and how to call it off."""

    request: SecondPass
    wave: np.ndarray
    cancel: Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One stream in a batch: what it hears, its deadline, and the stream time behind it (``heard``)."""

    stream: Stream
    samples: np.ndarray
    final: bool
    due: float
    slot: Slot
    heard: int


@dataclass(frozen=True)
class Flight:
    """A batch under way; ``begun`` is a ``time.perf_counter``."""

    lane: Lane
    rows: list[Row]
    size: int
    pending: Pending
    begun: float
