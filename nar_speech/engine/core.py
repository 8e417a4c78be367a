"""What the engine's thread does, round after round: step the most urgent streams, hand out their results."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, get_args

import numpy as np
import torch

from nar_speech.engine.buffer import History
from nar_speech.engine.events import Closed, Event, Failed, Reason
from nar_speech.engine.fanout import FanOut
from nar_speech.engine.graphs import SOUND
from nar_speech.engine.lane import Flight, Lane, Pass, Row, Stream
from nar_speech.engine.model import EndUtterance, SecondPass, TwoPassCollector
from nar_speech.engine.offline import OfflineWorker
from nar_speech.engine.options import EngineOptions
from nar_speech.engine.scheduler import Batch, Scheduler
from nar_speech.engine.session import Session
from nar_speech.engine.snapshot import FORMAT, PassMeta, Snapshot, SnapshotMeta, plain_text
from nar_speech.errors import EngineError, NarSpeechError, SessionClosed

logger = logging.getLogger(__name__)

HOUSEKEEPING = 0.25  # s between looks at idle sessions; also the longest sleep
EVENTS = get_args(Event)
T = TypeVar("T")


class DeviceLost(EngineError):
    """The device does not answer any more; only a new process helps."""


class Core:
    """Everything that only the engine's thread may touch; see :class:`nar_speech.engine.engine.Engine`.

    Attributes:
        heartbeat: when the last round began.
        failing, failed_at: steps in a row in which not a single row succeeded; when the last one was.
        busy_seconds: spent working.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        offline: OfflineWorker,
        fanout: FanOut,
        options: EngineOptions,
        clock: Callable[[], float],
    ):
        self.offline, self.fanout, self.options, self.clock = offline, fanout, options, clock
        self.scheduler = Scheduler(options.fill_wait)
        self.lanes: dict[str, Lane] = {}
        with torch.inference_mode():
            for name, model in models.items():
                lane = self.lanes[name] = Lane(name, model, options)
                self.scheduler.add_model(name, lane.sizes, lane.useful, lane.costs)
        self.streams: dict[str, Stream] = {}
        self.heartbeat = clock()
        self.failing = self.crashes = 0
        self.failed_at = self.busy_seconds = 0.0
        self.wake = threading.Event()
        self.stopped = False
        self._gate = threading.Lock()
        self._touched: deque[Session] = deque()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._flights: list[Flight] = []
        self._passes = itertools.count()
        self._tidied = clock()

    # For any thread.

    def touch(self, session: Session) -> None:
        """Look at a session in the next round."""
        if not session._noted:
            session._noted = True
            self._touched.append(session)
            self.wake.set()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Let the engine's thread run ``function`` at the beginning of its next round.

        Raises:
            EngineError: the engine has stopped.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._gate:
            if self.stopped:
                raise EngineError("the engine has stopped; start another one")
            self._commands.put(run)
        self.wake.set()
        return future

    def stop(self, reason: Reason) -> None:
        """End all sessions; from now on nothing is taken. For the engine's thread, when it ends."""
        with self._gate:
            self.stopped = True
        with torch.inference_mode():
            self._run_commands()
        self.close_all(reason)

    # One round.

    @torch.inference_mode()
    def tick(self) -> float | None:
        """Do what is to be done now; tells after how many seconds to come back, None: when woken."""
        begun = time.perf_counter()
        now = self.heartbeat = self.clock()
        active = self._run_commands() + self._look_at_touched(now)
        choice = self.scheduler.next(now)
        flights = self._launch(choice) if isinstance(choice, Batch) else []
        # The results of the step before are handled while the device works on this one.
        earlier, self._flights = self._flights, []
        for flight in earlier:
            self._land(flight)
        for flight in flights:
            if flight.pending.immediate:
                self._land(flight)
            else:
                self._flights.append(flight)
        if now - self._tidied >= HOUSEKEEPING:
            self._tidied = now
            self._end_idle(now)
        self.busy_seconds += time.perf_counter() - begun
        if active or flights or earlier or isinstance(choice, Batch):
            return 0.0
        return choice

    def settle(self) -> None:
        """Handle the results of all steps under way."""
        earlier, self._flights = self._flights, []
        for flight in earlier:
            self._land(flight)

    def _run_commands(self) -> int:
        count = 0
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()
                count += 1
        return count

    def _look_at_touched(self, now: float) -> int:
        count = len(self._touched)
        for _ in range(count):
            session = self._touched.popleft()
            session._noted = False  # before looking: what comes later is noted again
            stream = self.streams.get(session.id)
            if stream is not None:
                self._consider(stream, now)
        return count

    def _consider(self, stream: Stream, now: float) -> None:
        """Queue a stream if there is something to step it with; close it if there never will be."""
        session, lane = stream.session, stream.lane
        if stream.closed:
            return
        if session._cancelled:
            self.close(stream, "cancelled")
            return
        if stream.busy or stream.queued or stream.outlet.full:
            return
        work = session._next()
        if work is None:
            if session._exhausted and not stream.passes:
                self.close(stream, session._ending)
            return
        if stream.slot is None:
            try:
                self._seat(stream)
            except Exception as error:
                self.fail(stream, f"the session could not be begun: {_reason(error)}")
                return
        stream.queued, stream.work = True, work
        stream.due = stream.pace.next(work.arrival, work.ahead)
        self.scheduler.add(lane.name, stream, stream.due, now)

    def _seat(self, stream: Stream) -> None:
        """Give a stream its slot, and its first state where that depends on its options."""
        lane = stream.lane
        stream.slot = lane.store.acquire()
        prepare = getattr(lane.model, "prepare", None)
        if prepare is not None:
            with lane.stepper.on_stream():
                lane.store.put(stream.slot, prepare(stream.options))
            stream.new = stream.fresh = False

    # Steps.

    def _launch(self, batch: Batch) -> list[Flight]:
        """Start a step; where it raises, its halves, down to the stream that is at fault."""
        lane, rows = self.lanes[batch.model], []
        for stream in batch.streams:
            stream.queued = False
            if not stream.closed:
                stream.busy, work = True, stream.work
                samples = stream.session._take(work)
                heard = stream.session._buffer.consumed
                rows.append(Row(stream, samples, work.final, stream.due, stream.slot, heard))
        if not rows:
            return []
        flights = self._attempt(lane, rows)
        self.failing = 0 if flights else self.failing + 1
        if not flights:
            self.failed_at = self.clock()
        return flights

    def _attempt(self, lane: Lane, rows: Sequence[Row]) -> list[Flight]:
        try:
            return [self._start(lane, rows)]
        except Exception as error:
            if _is_sticky(error):
                raise DeviceLost(f"the device failed: {_reason(error)}; restart the process") from error
            lane.counters.failed_steps += 1
            if len(rows) == 1:
                logger.debug("%s: a step failed", lane.name, exc_info=error)  # may quote what was said
                self.fail(rows[0].stream, f"the model failed on this stream: {_reason(error)}")
                return []
            logger.info("%s: a batch of %d failed; trying its halves", lane.name, len(rows))
        middle = len(rows) // 2
        return self._attempt(lane, rows[:middle]) + self._attempt(lane, rows[middle:])

    def _start(self, lane: Lane, rows: Sequence[Row]) -> Flight:
        size = next(size for size in lane.sizes if size >= len(rows))
        staging = lane.stepper.staging(size)
        for i, row in enumerate(rows):
            stream = row.stream
            staging.fill(i, row.samples, row.final, row.slot.row, stream.fresh, stream.new)
        begun = time.perf_counter()
        flight = Flight(lane, list(rows), size, lane.stepper.launch(staging), begun)
        for row in rows:
            row.stream.new, row.stream.fresh = False, row.final
        return flight

    def _land(self, flight: Flight) -> None:
        """Hand out the results of a step."""
        lane, counters = flight.lane, flight.lane.counters
        try:
            arrays = flight.pending.wait()
        except Exception as error:
            raise DeviceLost(f"the device failed: {_reason(error)}; restart the process") from error
        seconds = time.perf_counter() - flight.begun
        self.scheduler.observe(lane.name, flight.size, seconds)
        counters.steps += 1
        counters.sizes[flight.size] += 1
        counters.chunks += len(flight.rows)
        counters.padding += flight.size - len(flight.rows)
        counters.step_seconds.observe(seconds)
        sound = arrays.pop(SOUND)
        for i, row in enumerate(flight.rows):
            counters.samples += len(row.samples)
            self._hand_out(row, {name: array[i] for name, array in arrays.items()}, bool(sound[i]))

    def _hand_out(self, row: Row, values: dict[str, np.ndarray], sound: bool) -> None:
        stream, counters = row.stream, row.stream.lane.counters
        stream.busy = False
        if stream.closed or not stream.lane.store.owns(row.slot):
            return  # the slot may be somebody else's already
        if not sound:
            self.fail(stream, "the model gave NaN or infinite values on this stream")
            return
        collector = stream.collector
        try:
            if stream.history is not None:
                stream.history.append(row.samples)
            self._process(stream, collector.push(values, row.heard, row.final))
            if stream.history is not None:
                stream.history.drop(row.heard if collector.needed is None else collector.needed)
        except Exception as error:
            logger.debug("a collector failed", exc_info=error)
            self.fail(stream, f"its results could not be handled: {_reason(error)}")
            return
        now = self.clock()
        counters.latency.observe(max(now - row.due + stream.lane.seconds, 0.0))
        counters.misses += now > row.due
        self._consider(stream, now)

    def _process(self, stream: Stream, items: Sequence[Any]) -> None:
        """Events go out, requests of the collector are met."""
        for item in items:
            if isinstance(item, EndUtterance):
                stream.session._end_utterance()
            elif isinstance(item, SecondPass):
                self.second_pass(stream, item)
            elif isinstance(item, EVENTS):
                self.fanout.put(stream.outlet, item)
            else:
                raise EngineError(f"a collector gave {type(item).__name__}, which is not an event")

    # Second passes.

    def second_pass(self, stream: Stream, request: SecondPass, wave: np.ndarray | None = None) -> None:
        """Queue audio of a stream with the offline worker."""
        if wave is None:
            if stream.history is None:
                raise EngineError("a collector asked for a second pass, but is no TwoPassCollector")
            wave = stream.history.get(request.start, request.end)
        number = next(self._passes)
        try:
            future = self.offline.submit(request.model, wave, request.options, urgent=True)
        except EngineError as error:
            future = Future()
            future.set_exception(error)
        stream.passes[number] = Pass(request, wave, future.cancel)

        def come_back(done: Future) -> None:
            with contextlib.suppress(EngineError):  # stopped meanwhile: the session is closed
                self.call(lambda: self._second(stream, number, done))

        future.add_done_callback(come_back)

    def _second(self, stream: Stream, number: int, future: Future) -> None:
        """Give a collector the result of a second pass."""
        done = stream.passes.pop(number, None)
        if stream.closed or done is None:
            return
        error = EngineError("called off") if future.cancelled() else future.exception()
        try:
            result = None if error else future.result()
            self._process(stream, stream.collector.second(done.request.tag, result, error))
        except Exception as failure:
            logger.debug("a collector failed", exc_info=failure)
            self.fail(stream, f"the result of its second pass could not be handled: {_reason(failure)}")
            return
        self._consider(stream, self.clock())

    # Beginning and end of sessions.

    def attach(self, stream: Stream, snapshot: Snapshot | None = None) -> None:
        """Take a new session in, or one from another engine.

        Raises:
            SnapshotError: its state does not fit.
        """
        lane = stream.lane
        if isinstance(stream.collector, TwoPassCollector):
            stream.history = History(round(self.options.history * lane.model.sample_rate))
        if snapshot is not None:
            self._take_over(stream, snapshot)
        self.streams[stream.session.id] = stream
        self.scheduler.opened(lane.name)
        lane.counters.opened += 1
        self.touch(stream.session)
        if snapshot is not None:
            for item, wave in zip(snapshot.meta.passes, snapshot.waves, strict=True):
                self.second_pass(stream, SecondPass(**vars(item)), wave)

    def _take_over(self, stream: Stream, snapshot: Snapshot) -> None:
        meta, lane = snapshot.meta, stream.lane
        if not meta.new:
            stream.slot = lane.store.acquire()
            try:
                with torch.inference_mode(), lane.stepper.on_stream():
                    lane.store.restore(stream.slot, snapshot.state)
            except BaseException:
                lane.store.release(stream.slot)
                raise
            stream.new, stream.fresh = False, meta.fresh
        if stream.history is not None and meta.history is not None:
            stream.history = History(stream.history.limit, meta.history)
            stream.history.append(snapshot.history)

    def detach(self, session: Session, keep: bool) -> Snapshot:
        """Snapshot of a session at rest; without ``keep`` it is closed here.

        Raises:
            SessionClosed: it is over already.
            SnapshotError: its settings or its collector's data are not plain; it goes on here.
        """
        self.settle()
        stream = self.streams.get(session.id)
        if stream is None or stream.closed or session._cancelled:
            raise SessionClosed(f"session {session.id}: is over; a snapshot needs an open one")
        lane, history = stream.lane, stream.history
        with torch.inference_mode(), lane.stepper.on_stream():
            state = {} if stream.new else lane.store.export(stream.slot.row)
        passes = list(stream.passes.values())
        collected = stream.collector.export()
        plain_text([collected, dict(stream.options.settings), *(vars(p.request) for p in passes)])
        inbox = session._export(close=not keep)
        meta = SnapshotMeta(
            FORMAT,
            lane.name,
            lane.signature,
            lane.model.sample_rate,
            lane.model.chunk,
            lane.first,
            stream.options,
            collected,
            inbox.consumed,
            inbox.utterance,
            inbox.marks,
            inbox.ending,
            stream.fresh,
            stream.new,
            None if history is None else history.start,
            tuple(PassMeta(**vars(p.request)) for p in passes),
            self.clock() - stream.opened,
        )
        kept = np.zeros(0, np.float32) if history is None else history.get(history.start, history.end)
        if not keep:
            self.close(stream, "moved")
        return Snapshot(meta, state, inbox.audio, kept, tuple(p.wave for p in passes))

    def close(self, stream: Stream, reason: Reason) -> None:
        """End a session: its slot is free, its last event goes out."""
        if stream.closed:
            return
        stream.closed = True
        lane = stream.lane
        self.scheduler.discard(lane.name, stream)
        self.scheduler.opened(lane.name, -1)
        stream.session._close(reason)
        if stream.slot is not None:
            lane.store.release(stream.slot)
        self.streams.pop(stream.session.id, None)
        lane.counters.closed[reason] += 1
        lane.counters.back_pressure += stream.session._refused
        for waiting in stream.passes.values():
            waiting.cancel()
        stream.passes.clear()
        stream.release()
        self.fanout.put(stream.outlet, Closed(reason))

    def fail(self, stream: Stream, message: str) -> None:
        """End a session that can't go on."""
        if not stream.closed:
            stream.lane.counters.poisoned += 1
            logger.warning("session %s: %s", stream.session.id, message)
            self.fanout.put(stream.outlet, Failed(message))
            self.close(stream, "failed")

    def finish_all(self, reason: Reason) -> None:
        """No session gets more audio; what waits is still heard."""
        for stream in list(self.streams.values()):
            stream.session._finish(reason)

    def close_all(self, reason: Reason) -> None:
        """End all sessions now."""
        for stream in list(self.streams.values()):
            self.close(stream, reason)

    def crash(self, error: BaseException) -> None:
        """After an error of the engine's thread itself: no session can go on, the engine may."""
        self.crashes += 1
        self._flights.clear()
        for stream in list(self.streams.values()):
            try:
                self.fail(stream, f"the engine failed: {_reason(error)}")
            except Exception:
                logger.exception("session %s could not be closed", stream.session.id)
                self.streams.pop(stream.session.id, None)

    def _end_idle(self, now: float) -> None:
        """Finish sessions that have been silent, or open, for too long."""
        for stream in self.streams.values():
            session, options = stream.session, stream.options
            idle = self.options.idle if options.idle is None else options.idle
            longest = self.options.longest if options.longest is None else options.longest
            if session._end is not None:
                continue
            if max(now - stream.opened, session.received) > longest:
                session._finish("limit")
            elif now - session._activity > idle and not (stream.busy or stream.queued):
                session._finish("idle")


def _reason(error: BaseException) -> str:
    """One line for a client; only our own errors are quoted, others may tell too much."""
    if isinstance(error, NarSpeechError):
        return " ".join(str(error).split())[:200]
    return type(error).__name__


def _is_sticky(error: BaseException) -> bool:
    """Whether the CUDA context is lost; running out of memory is not meant."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    kinds = tuple(kind for kind in (getattr(torch, "AcceleratorError", None),) if kind is not None)
    return isinstance(error, kinds) or "CUDA error" in str(error)
