"""How an engine is set up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nar_speech.config import check_range
from nar_speech.errors import ConfigError

CPU_BUCKETS = (1, 2, 4, 8, 16, 32)
CUDA_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class EngineOptions:
    """Limits and choices; times in seconds.

    Args:
        max_sessions: open at once, for each stream model.
        buckets: batch sizes; None: 1, 2, 4 ... to 32 on a CPU, to 128 on a CUDA device. A smaller number of
            streams is padded.
        exact_batches: use only batch sizes among which results agree to the last bit, found by trial at the
            start; so a stream's result does not depend on its company. None: on a CPU. Engines that
            exchange sessions should agree in this, in ``buckets`` and in ``max_sessions``.
        graphs: CUDA graphs: ``auto`` (eager with a warning where a capture fails), ``on``, ``off``.
        check_state: look for NaN in states too, not only in outputs.
        fill_wait: how long a batch of fewer than ``useful_batch`` streams may wait for others.
        backlog: audio of a session that may wait, unless its options say otherwise.
        idle: a session without audio for so long is finished.
        longest: a session open for so long is finished.
        history: audio kept for second passes at most.
        max_events: a session with more events on their way to its client is not stepped.
        offline_waiting: audio that may wait for the batch models.
        offline_batch: audio in one of their batches, with padding.
        offline_threads: threads of their matrix products; None: PyTorch's.
        offline_nice: niceness of their thread (Linux).
        threads: of the engine's own matrix products; None: PyTorch's.
        switch_interval: after how long a thread that runs Python lets others (``sys.setswitchinterval``),
            for the whole process while the engine runs. Every operation of an eager step gives Python's lock
            away and has to get it back: beside a thread that computes in pure Python a step of 120 small
            operations took 1.3 ms alone, 990 ms with Python's 5 ms, 47 ms with 0.5 ms, 11 ms with 20 us.
    """

    max_sessions: int = 64
    buckets: tuple[int, ...] | None = None
    exact_batches: bool | None = None
    graphs: Literal["auto", "on", "off"] = "auto"
    check_state: bool = True
    fill_wait: float = 0.005
    useful_batch: int = 4
    backlog: float = 30.0
    idle: float = 120.0
    longest: float = 4 * 3600.0
    history: float = 70.0  # an utterance that nobody ends has 60 s and a chunk
    max_events: int = 1000
    offline_waiting: float = 3600.0
    offline_batch: float = 60.0
    offline_threads: int | None = None
    offline_nice: int = 10
    threads: int | None = None
    switch_interval: float = 2e-5

    def __post_init__(self) -> None:
        check_range(self, 1, 1_000_000, "max_sessions", "useful_batch")
        check_range(self, 0, 1, "fill_wait")
        check_range(self, 0.01, 1e9, "backlog", "idle", "longest", "history")
        check_range(self, 0.01, 1e9, "offline_waiting", "offline_batch")
        check_range(self, 2, 1_000_000_000, "max_events")
        check_range(self, 0, 19, "offline_nice")
        check_range(self, 1e-6, 1, "switch_interval")
        for name in ("threads", "offline_threads"):
            if getattr(self, name) is not None:
                check_range(self, 1, 4096, name)
        if self.buckets is not None and (not self.buckets or min(self.buckets) < 1):
            raise ConfigError(f"buckets: got {self.buckets}; need batch sizes of at least 1")
        if self.graphs not in ("auto", "on", "off"):
            raise ConfigError(f"graphs: got {self.graphs!r}; valid values: auto, on, off")

    def buckets_for(self, cuda: bool) -> tuple[int, ...]:
        """The batch sizes to use, ascending."""
        return tuple(sorted(set(self.buckets or (CUDA_BUCKETS if cuda else CPU_BUCKETS))))
