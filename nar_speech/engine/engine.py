"""One engine: any number of streaming and batch models, many sessions, one thread that owns the device."""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch

from nar_speech.engine.core import HOUSEKEEPING, Core, DeviceLost
from nar_speech.engine.fanout import FanOut, Outlet
from nar_speech.engine.lane import Lane, Stream
from nar_speech.engine.model import BatchModel, OnEvent, SessionOptions, StreamModel, is_stream_model
from nar_speech.engine.offline import OfflineWorker
from nar_speech.engine.options import EngineOptions
from nar_speech.engine.scheduler import Pace
from nar_speech.engine.session import Session
from nar_speech.engine.snapshot import Snapshot
from nar_speech.engine.stats import EngineStats, Health
from nar_speech.errors import AudioError, ConfigError, EngineBusy, EngineError, SnapshotError

__all__ = ["Engine", "EngineOptions"]

logger = logging.getLogger(__name__)

STALE = 5.0  # s; a heartbeat older than this is not a healthy one
FAILING = 3  # steps in a row without a single good row
FORGET = 60.0  # s; then failed steps say nothing any more: who is not ready gets no stream to prove itself
CRASHES, CRASH_WINDOW = 3, 60.0  # so many crashes in so many seconds: the engine gives up
FLUSH = 5.0  # s; how long the last results may take when an engine is drained
T = TypeVar("T")


class Engine:
    """Batches the live streams of many sessions, and runs whole segments beside them.

    Threads: clients call from theirs; one thread owns the device; one hands out events; one runs the batch
    models. With ``start(threads=False)`` there are none and the caller runs :meth:`tick`.

    Args:
        models: by name; a :class:`StreamModel` has ``step``, a :class:`BatchModel` has ``run``.
        clock: seconds, ever growing.

    Example:
        >>> with Engine({"asr": model}, EngineOptions(max_sessions=16)) as engine:
        ...     session = engine.open("asr", SessionOptions(), print)
        ...     session.feed(samples)
        ...     session.finish()
    """

    def __init__(
        self,
        models: Mapping[str, StreamModel | BatchModel],
        options: EngineOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not models:
            raise ConfigError("models: an engine needs at least one")
        wrong = [n for n, m in models.items() if not is_stream_model(m) and not isinstance(m, BatchModel)]
        if wrong:
            raise ConfigError(f"models: '{wrong[0]}' has neither init_state and step nor run and sample_rate")
        self.options = options or EngineOptions()
        self._clock = clock
        self._online = {name: model for name, model in models.items() if is_stream_model(model)}
        self._fanout = FanOut()
        self._offline = OfflineWorker(
            {name: model for name, model in models.items() if not is_stream_model(model)},
            self.options.offline_waiting,
            self.options.offline_batch,
            self.options.offline_threads,
            self.options.offline_nice,
        )
        self._core: Core | None = None
        self._thread: threading.Thread | None = None
        self._inline = False
        self._stopping = self._closed = self._draining = False
        self._dead = ""
        self._begun = clock()
        self._lock = threading.Lock()
        self._admitted: dict[str, int] = dict.fromkeys(self._online, 0)
        self._refused: dict[str, int] = dict.fromkeys(self._online, 0)
        self._interval: float | None = None

    def __enter__(self) -> Engine:
        return self if self._core is not None else self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, threads: bool = True) -> Engine:
        """Allocate the states, try and capture all batch sizes, begin to work.

        Raises:
            ConfigError: a model that does not keep the contract.
            EngineError: started before.
        """
        if self._core is not None or self._closed:
            raise EngineError("an engine is started once; make another one")
        self._inline = not threads
        if self._inline:
            self._core = self._build()
            return self
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._interval, self.options.switch_interval))
        ready: Future[Core] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(ready,), name="nar-speech-engine", daemon=True
        )
        self._thread.start()
        try:
            self._core = ready.result()
        except BaseException:
            self.close()
            raise
        self._fanout.start()
        self._offline.start()
        return self

    def open(self, model: str, options: SessionOptions | None, on_event: OnEvent) -> Session:
        """Begin a session. Does not wait for the device.

        Args:
            on_event: called with every event, in order, from the thread that hands out; must be quick. If it
                raises, the session is closed.

        Raises:
            EngineBusy: no place, draining.
            EngineError: no such model, not started, failed.
            InputError: options that the model refuses.
        """
        options = options or SessionOptions()
        lane = self._admit(model)
        try:
            collector = lane.model.collector(options)
            stream = self._stream(lane, collector, options, on_event)
            self._hand_over(lambda core: core.attach(stream))
        except BaseException:
            self._release(model)
            raise
        return stream.session

    def submit(self, model: str, wave: np.ndarray, options: Mapping[str, Any] | None = None) -> Future:
        """Let a batch model run on one segment, (N,) float32 at its rate; the result comes in the future.

        Raises:
            EngineBusy: too much waits, draining.
            EngineError: no such batch model, not started.
            AudioError: not floating point samples of shape (N,), or none.
        """
        self._running()
        if self._draining:
            raise EngineBusy("the engine is draining; use another one", retry_after=30.0)
        wave = np.array(wave, dtype=np.float32) if np.asarray(wave).dtype.kind == "f" else np.asarray(wave)
        if wave.ndim != 1 or wave.dtype.kind != "f" or not len(wave) or not np.isfinite(wave).all():
            raise AudioError(
                f"wave: expected finite floating point samples (N,), got {wave.dtype} {wave.shape}"
            )
        return self._offline.submit(model, wave, options or {})

    def snapshot(self, session: Session, keep: bool = False) -> Snapshot:
        """A session as data, between two of its steps. Without ``keep`` it ends here, with ``moved``.

        Feeding it then raises ``SessionClosed``: what the snapshot does not hold was not taken, feed it to
        the session that :meth:`resume` gives. Waits for the engine's round to end.

        Raises:
            SessionClosed: it is over.
        """
        return self._on_engine(lambda core: core.detach(session, keep))

    def resume(self, snapshot: Snapshot | bytes, on_event: OnEvent) -> Session:
        """Go on with a session of another engine. Waits for the engine's round to end.

        Raises:
            SnapshotError: damaged, or of another model.
            EngineBusy, EngineError: see :meth:`open`.
        """
        if not isinstance(snapshot, Snapshot):
            snapshot = Snapshot.from_bytes(snapshot)
        meta = snapshot.meta
        lane = self._admit(meta.model)
        try:
            self._check_belongs(lane, snapshot)
            collector = lane.model.collector(meta.options)
            try:
                collector.restore(meta.collector)
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise SnapshotError(f"snapshot: the collector's data are wrong: {error}") from error
            stream = self._stream(lane, collector, meta.options, on_event)
            stream.opened -= max(meta.open_seconds, 0.0)
            stream.session._restore(snapshot.inbox)
            self._on_engine(lambda core: core.attach(stream, snapshot))
        except BaseException:
            self._release(meta.model)
            raise
        return stream.session

    def drain(self, timeout: float = 60.0) -> bool:
        """Take no new sessions and jobs, and wait until the ones there are have ended.

        Sessions still open after ``timeout`` seconds are finished: what waits is heard, their last results go
        out; what takes longer than five more seconds is closed. :meth:`close` is the next call.

        Returns:
            Whether nothing was cut off.
        """
        self._draining = True
        if self._core is None:
            return True
        if self._wait_until_empty(timeout):
            return True
        self._on_engine(lambda core: core.finish_all("drained"))
        clean = self._wait_until_empty(FLUSH)
        self._on_engine(lambda core: core.close_all("drained"))
        return clean

    def close(self) -> None:
        """End all sessions with ``shutdown`` and all threads. May be called again."""
        if self._closed:
            return
        self._closed = self._stopping = True
        if self._thread is not None:
            if self._core is not None:
                self._core.wake.set()
            self._thread.join()
        elif self._core is not None:
            self._core.stop("shutdown")
        self._offline.stop()
        self._fanout.stop()
        if self._interval is not None:
            sys.setswitchinterval(self._interval)

    def tick(self) -> bool:
        """One round of an engine without threads; False if there was nothing to do.

        Events are handed out before it returns; batch models run when no stream is ready.

        Raises:
            EngineError: the engine has threads, or is not started.
        """
        core = self._running()
        if not self._inline:
            raise EngineError("tick: this engine has its own threads")
        if core.tick() == 0.0:
            return True
        return self._offline.run_once()

    def run_until_idle(self) -> None:
        """Rounds of an engine without threads until nothing is left to do."""
        while self.tick():
            pass

    @property
    def sessions(self) -> int:
        """How many are open."""
        return sum(self._admitted.values())

    def health(self) -> Health:
        """Whether the engine works, for probes."""
        core = self._core
        alive = core is not None and not self._closed and not self._dead
        alive = alive and (self._inline or (self._thread is not None and self._thread.is_alive()))
        age = self._clock() - core.heartbeat if core is not None else 0.0
        if not alive:
            reason = self._dead or ("closed" if self._closed else "not started")
        elif self._draining:
            reason = "draining"
        elif age > STALE and not self._inline:
            reason = f"no heartbeat for {age:.0f} s"
        elif core.failing >= FAILING and self._clock() - core.failed_at < FORGET:
            reason = f"the last {core.failing} steps failed"
        else:
            reason = ""
        return Health(alive, not reason, age, reason)

    def stats(self) -> EngineStats:
        """All numbers at this moment."""
        core, fanout = self._core, self._fanout
        streams = list(core.streams.values()) if core is not None else []
        lanes = core.lanes if core is not None else {}
        online = {}
        for name, lane in lanes.items():
            lane.counters.refused = self._refused[name]
            online[name] = lane.stats([stream for stream in streams if stream.lane is lane])
        devices = {lane.stepper.device for lane in lanes.values() if lane.stepper.cuda}
        return EngineStats(
            health=self.health(),
            uptime=self._clock() - self._begun,
            draining=self._draining,
            crashes=core.crashes if core is not None else 0,
            busy_seconds=core.busy_seconds if core is not None else 0.0,
            events=fanout.events,
            events_waiting=fanout.waiting,
            callback_errors=fanout.errors,
            slow_callbacks=fanout.slow,
            online=online,
            offline=self._offline.stats(),
            device_bytes=sum(torch.cuda.memory_reserved(device) for device in devices),
        )

    def _build(self) -> Core:
        return Core(self._online, self._offline, self._fanout, self.options, self._clock)

    def _main(self, ready: Future[Core]) -> None:
        """The engine's thread."""
        try:
            if self.options.threads is not None:
                torch.set_num_threads(self.options.threads)
            core = self._build()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(core)
        crashes: deque[float] = deque(maxlen=CRASHES)
        while not self._stopping:
            try:
                wait = core.tick()
            except BaseException as error:
                logger.critical("the engine's thread crashed", exc_info=error)
                core.crash(error)
                crashes.append(time.monotonic())
                often = len(crashes) == CRASHES and crashes[-1] - crashes[0] < CRASH_WINDOW
                if often or isinstance(error, DeviceLost):
                    self._dead = f"the engine failed: {' '.join(str(error).split())[:200]}"
                    break
                continue
            if wait != 0.0:
                core.wake.wait(HOUSEKEEPING if wait is None else min(wait, HOUSEKEEPING))
                core.wake.clear()
        core.stop("failed" if self._dead else "shutdown")

    def _running(self) -> Core:
        if self._core is None or self._closed:
            raise EngineError("the engine is closed" if self._closed else "start() the engine first")
        if self._dead:
            raise EngineError(f"{self._dead}; restart the process")
        return self._core

    def _hand_over(self, function: Callable[[Core], Any]) -> None:
        """Let the engine's thread run ``function`` soon."""
        core = self._running()
        if self._inline:
            function(core)
        else:
            core.call(lambda: function(core))

    def _on_engine(self, function: Callable[[Core], T]) -> T:
        """Let the engine's thread run ``function`` and wait for the result."""
        core = self._running()
        return function(core) if self._inline else core.call(lambda: function(core)).result()

    def _admit(self, model: str) -> Lane:
        """Reserve a place."""
        core = self._running()
        if self._draining:
            raise EngineBusy("the engine is draining; use another one", retry_after=30.0)
        if model not in core.lanes:
            known = ", ".join(core.lanes) or "there are none"
            raise EngineError(f"model '{model}': no stream model of this engine; known: {known}")
        with self._lock:
            if self._admitted[model] >= self.options.max_sessions:
                self._refused[model] += 1
                raise EngineBusy(
                    f"all {self.options.max_sessions} places of model '{model}' are taken; try again later"
                )
            self._admitted[model] += 1
        return core.lanes[model]

    def _release(self, model: str) -> None:
        with self._lock:
            self._admitted[model] -= 1

    def _stream(self, lane: Lane, collector: Any, options: SessionOptions, on_event: OnEvent) -> Stream:
        core, rate = self._running(), lane.model.sample_rate
        backlog = self.options.backlog if options.backlog is None else options.backlog
        session = Session(
            uuid.uuid4().hex,
            lane.name,
            rate,
            lane.model.chunk,
            lane.first,
            max(round(backlog * rate), lane.first, lane.model.chunk),
            core.touch,
            self._clock,
        )

        def failed(error: BaseException) -> None:
            logger.debug("session %s: its on_event raised", session.id, exc_info=error)
            self._hand_over_quietly(lambda core: core.fail(stream, "the client's on_event raised"))

        outlet = Outlet(on_event, failed, lambda: core.touch(session), self.options.max_events)
        stream = Stream(
            session=session,
            lane=lane,
            collector=collector,
            outlet=outlet,
            options=options,
            opened=self._clock(),
            release=lambda: self._release(lane.name),
            pace=Pace(lane.seconds),
        )
        return stream

    def _hand_over_quietly(self, function: Callable[[Core], Any]) -> None:
        """For callbacks: an engine that has stopped has closed the session already."""
        core = self._core
        try:
            core.call(lambda: function(core))
        except EngineError:
            logger.debug("the engine has stopped")

    def _check_belongs(self, lane: Lane, snapshot: Snapshot) -> None:
        meta = snapshot.meta
        own = (lane.signature, lane.model.sample_rate, lane.model.chunk, lane.first)
        if own != (meta.signature, meta.sample_rate, meta.chunk, meta.first):
            raise SnapshotError(
                f"snapshot: was taken from another model than '{meta.model}' is here (signature, sample rate"
                " or chunk differ); use the same weights and options"
            )
        backlog = self.options.backlog if meta.options.backlog is None else meta.options.backlog
        limit = max(round(backlog * meta.sample_rate), meta.first, meta.chunk)
        if len(snapshot.audio) > limit:
            raise SnapshotError(
                f"snapshot: {len(snapshot.audio) / meta.sample_rate:.1f} s of audio wait in it, but only"
                f" {limit / meta.sample_rate:.1f} s may here; raise backlog"
            )
        for item, wave in zip(meta.passes, snapshot.waves, strict=True):
            if item.model not in self._offline.models:
                raise SnapshotError(f"snapshot: batch model '{item.model}' is missing here; add it")
            if len(wave) > round(self.options.history * meta.sample_rate):
                raise SnapshotError("snapshot: a second pass is longer than history; raise it")

    def _wait_until_empty(self, timeout: float) -> bool:
        """Whether all sessions and jobs end within ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while self.sessions or not self._offline.idle or self._fanout.waiting:
            if time.monotonic() >= end:
                return False
            if not (self._inline and self.tick()):
                time.sleep(0.01)
        return True
