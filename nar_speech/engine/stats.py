"""Counters of an engine, and what it tells of them: plain numbers, ready for Prometheus."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

STEP_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 1.0, 2.0)  # s
# fmt: off
LATENCY_BOUNDS = (  # s
    0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0
)
# fmt: on


class Histogram:
    """Counts of values up to each of ``bounds``, and above the last."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def freeze(self) -> HistogramStats:
        return HistogramStats(self.bounds, tuple(self.counts), self.total)


@dataclass(frozen=True)
class HistogramStats:
    """counts[i]: values in (bounds[i - 1], bounds[i]]; the last: above all. ``total``: sum of the values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """The bound below which ``share`` of the values lie; 0 without values, inf above the last bound."""
        seen, wanted = 0, share * self.count
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            if count and seen >= wanted:
                return bound
        return 0.0


@dataclass
class OnlineCounters:
    """What the engine's thread counts for one stream model."""

    opened: int = 0
    closed: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    steps: int = 0
    chunks: int = 0
    padding: int = 0
    misses: int = 0
    sizes: Counter[int] = field(default_factory=Counter)
    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS))
    latency: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS))
    samples: int = 0
    failed_steps: int = 0
    poisoned: int = 0
    back_pressure: int = 0


@dataclass(frozen=True)
class OnlineStats:
    """One stream model.

    Attributes:
        sessions: open now; opened: ever; closed: ended, by reason (evictions are ``idle`` and ``limit``).
        refused: sessions not admitted for want of room.
        slots: rows of state there are now; slots_used: taken by streams that have been heard.
        state_bytes: memory of the states.
        steps: batches; graph_replays, eager_steps: how they ran.
        chunks: rows of real streams; padding: rows beside them. sizes: batches by size.
        step_seconds: of a batch, from launch until its results are on the host.
        latency: seconds from the arrival of a chunk's last sample until its results were handed out; audio
            that is fed ahead of time counts as arriving later (see scheduler.Pace).
        deadline_misses: chunks whose latency was above the chunk's length.
        audio_seconds: heard; lag_max, lag_mean: seconds of audio that open sessions have waiting.
        failed_steps: batches that raised; poisoned: sessions that failed.
        back_pressure: feeds refused.
    """

    sessions: int
    opened: int
    closed: dict[str, int]
    refused: int
    slots: int
    slots_used: int
    state_bytes: int
    steps: int
    graph_replays: int
    eager_steps: int
    chunks: int
    padding: int
    sizes: dict[int, int]
    step_seconds: HistogramStats
    latency: HistogramStats
    deadline_misses: int
    audio_seconds: float
    lag_max: float
    lag_mean: float
    failed_steps: int
    poisoned: int
    back_pressure: int


@dataclass
class OfflineCounters:
    """What the offline worker counts for one batch model."""

    submitted: int = 0
    refused: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    batches: int = 0
    samples: int = 0
    padded: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS))


@dataclass(frozen=True)
class OfflineStats:
    """One batch model.

    Attributes:
        waiting, waiting_seconds: jobs in the queue and their audio.
        submitted, refused, done, failed, cancelled: jobs.
        audio_seconds: of jobs that were run; padded_seconds: with padding to the longest of their batch.
        batch_seconds: time a batch took.
    """

    waiting: int
    waiting_seconds: float
    submitted: int
    refused: int
    done: int
    failed: int
    cancelled: int
    batches: int
    audio_seconds: float
    padded_seconds: float
    batch_seconds: HistogramStats


@dataclass(frozen=True)
class Health:
    """For ``/healthz`` and ``/readyz``.

    Attributes:
        alive: the engine's thread runs, or can.
        ready: takes new sessions: alive, not draining, heartbeat young, last steps went well.
        heartbeat_age: seconds since the engine's thread last went round.
        reason: why it is not ready; empty if it is.
    """

    alive: bool
    ready: bool
    heartbeat_age: float
    reason: str


@dataclass(frozen=True)
class EngineStats:
    """Everything at one moment. Models are by name; ``events_waiting`` were not handed to clients yet;
    ``slow_callbacks`` took an ``on_event`` longer than 0.1 s; ``busy_seconds`` the engine's thread worked;
    ``device_bytes`` are what PyTorch holds on the CUDA devices of the stream models."""

    health: Health
    uptime: float
    draining: bool
    crashes: int
    busy_seconds: float
    events: int
    events_waiting: int
    callback_errors: int
    slow_callbacks: int
    online: dict[str, OnlineStats]
    offline: dict[str, OfflineStats]
    device_bytes: int = 0
