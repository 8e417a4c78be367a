"""The thread that runs whole segments in batches: uploads, and second passes of live sessions."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nar_speech.engine.model import BatchModel
from nar_speech.engine.stats import OfflineCounters, OfflineStats
from nar_speech.errors import EngineBusy, EngineError

logger = logging.getLogger(__name__)

MAX_BATCH = 64
URGENT_IN_A_ROW = 4  # batches of second passes before an upload gets its turn


@dataclass(eq=False)
class Job:
    """One segment: (N,) float32 samples for a model, and where its result goes."""

    model: str
    wave: np.ndarray
    options: dict[str, Any]
    future: Future
    seconds: float


class OfflineWorker:
    """Runs batch models one batch at a time, in the order of submission.

    A batch holds the oldest job and those of the same model whose lengths are nearest to its own. On a CUDA
    device it has a stream of its own with less priority than the live steps have; on Linux its thread is
    ``nice``, so that the scheduler of the operating system lets the engine's thread go first.

    Args:
        limit: seconds of audio that may wait.
        batch: seconds of audio in one batch, with padding.
        threads: for matrix products; None: as many as PyTorch uses.
    """

    def __init__(
        self,
        models: Mapping[str, BatchModel],
        limit: float,
        batch: float,
        threads: int | None = None,
        nice: int = 10,
    ):
        self.models, self.limit, self.batch = dict(models), limit, batch
        self.threads, self.nice = threads, nice
        self.counters = {name: OfflineCounters() for name in self.models}
        self._urgent: deque[Job] = deque()
        self._normal: deque[Job] = deque()
        self._changed = threading.Condition()
        self._row = 0
        self._busy = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self) -> None:
        """Run jobs from a thread; without it :meth:`run_once` runs them."""
        self._thread = threading.Thread(target=self._run, name="nar-speech-offline", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel what waits and end the thread after the batch that runs."""
        with self._changed:
            self._stopping = True
            jobs = [*self._urgent, *self._normal]
            self._urgent.clear()
            self._normal.clear()
            self._changed.notify_all()
        for job in jobs:
            job.future.cancel()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        with self._changed:
            return not (self._busy or self._urgent or self._normal)

    def submit(
        self, model: str, wave: np.ndarray, options: Mapping[str, Any], urgent: bool = False
    ) -> Future:
        """Queue one segment. ``urgent``: before those that are not.

        Raises:
            EngineBusy: too much audio waits already.
            EngineError: no such batch model.
        """
        if model not in self.models:
            known = ", ".join(self.models) or "there are none"
            raise EngineError(f"model '{model}': no batch model of this engine; known: {known}")
        seconds = len(wave) / self.models[model].sample_rate
        job = Job(model, wave, dict(options), Future(), seconds)
        with self._changed:
            waiting = sum(j.seconds for j in (*self._urgent, *self._normal))
            if self._stopping or (waiting and waiting + seconds > self.limit):
                self.counters[model].refused += 1
                raise EngineBusy(
                    f"{waiting:.0f} s of audio wait for recognition already, the limit is {self.limit:.0f} s;"
                    " try again later",
                    retry_after=5.0,
                )
            self.counters[model].submitted += 1
            (self._urgent if urgent else self._normal).append(job)
            self._changed.notify()
        return job.future

    def run_once(self) -> bool:
        """Run one batch in the caller's thread; False if nothing waits."""
        with self._changed:
            jobs = self._next()
            self._busy = bool(jobs)
        if not jobs:
            return False
        try:
            self._run_batch(jobs)
        finally:
            self._busy = False
        return True

    def stats(self) -> dict[str, OfflineStats]:
        """Numbers by model."""
        with self._changed:
            jobs = [*self._urgent, *self._normal]
        stats = {}
        for name, c in self.counters.items():
            own = [job.seconds for job in jobs if job.model == name]
            rate = self.models[name].sample_rate
            stats[name] = OfflineStats(
                len(own),
                sum(own),
                c.submitted,
                c.refused,
                c.done,
                c.failed,
                c.cancelled,
                c.batches,
                c.samples / rate,
                c.padded / rate,
                c.seconds.freeze(),
            )
        return stats

    def _run(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)  # of this thread
        with contextlib.suppress(AttributeError, OSError):  # Linux: of this thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self.nice)
        while True:
            with self._changed:
                while not (self._urgent or self._normal or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    return
                jobs = self._next()
                self._busy = True
            try:
                self._run_batch(jobs)
            finally:
                self._busy = False
            del jobs

    def _next(self) -> list[Job]:
        """The next batch, taken out of its queue."""
        turn = self._normal and self._row >= URGENT_IN_A_ROW
        queue = self._normal if turn or not self._urgent else self._urgent
        if not queue:
            return []
        self._row = self._row + 1 if queue is self._urgent else 0
        head = queue[0]
        others = sorted(
            (job for job in queue if job.model == head.model and job is not head),
            key=lambda job: abs(job.seconds - head.seconds),
        )
        jobs, longest = [head], head.seconds
        for job in others:
            longest = max(longest, job.seconds)
            if len(jobs) == MAX_BATCH or longest * (len(jobs) + 1) > self.batch:
                break
            jobs.append(job)
        chosen = set(map(id, jobs))
        kept = [job for job in queue if id(job) not in chosen]
        queue.clear()
        queue.extend(kept)
        return jobs

    def _run_batch(self, jobs: list[Job]) -> None:
        counters = self.counters[jobs[0].model]
        running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        counters.cancelled += len(jobs) - len(running)
        if not running:
            return
        begun = time.perf_counter()
        with self._device_stream(self.models[jobs[0].model]):
            self._resolve(running)
        counters.batches += 1
        counters.seconds.observe(time.perf_counter() - begun)
        counters.samples += sum(len(job.wave) for job in running)
        counters.padded += len(running) * max(len(job.wave) for job in running)

    def _resolve(self, jobs: list[Job]) -> None:
        """Run jobs; where that fails, their halves, down to the one that is at fault."""
        counters = self.counters[jobs[0].model]
        try:
            results = self.models[jobs[0].model].run([j.wave for j in jobs], [j.options for j in jobs])
            if len(results) != len(jobs):
                raise EngineError(f"batch model gave {len(results)} results for {len(jobs)} segments")
        except BaseException as error:  # of a model, in a thread that must live on
            if self._thread is None and not isinstance(error, Exception):
                raise  # Ctrl-C in the thread of who called
            if len(jobs) == 1:
                counters.failed += 1
                jobs[0].future.set_exception(error)
                return
            logger.info("a batch of %d failed (%s); trying its halves", len(jobs), type(error).__name__)
            middle = len(jobs) // 2
            self._resolve(jobs[:middle])
            self._resolve(jobs[middle:])
            return
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, Exception):
                counters.failed += 1
                job.future.set_exception(result)
            else:
                counters.done += 1
                job.future.set_result(result)

    def _device_stream(self, model: BatchModel) -> contextlib.AbstractContextManager:
        device = torch.device(getattr(model, "device", "cpu"))
        if device.type != "cuda":
            return contextlib.nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return torch.cuda.stream(self._streams[device])
