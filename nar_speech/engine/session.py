"""A client's handle of one stream: it takes audio from any thread and never waits for the device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nar_speech.engine.buffer import AudioBuffer
from nar_speech.engine.events import Reason
from nar_speech.errors import AudioError, BackPressure, InputError, SessionClosed

AHEAD = 2.0  # s; a client may have buffered so much before it connected


@dataclass(frozen=True)
class Work:
    """What a stream may be stepped with next.

    ``samples`` to take, whether they end the utterance, since when they could have been taken, and whether
    they came ahead of time: before a live speaker could have said them.
    """

    samples: int
    final: bool
    arrival: float
    ahead: bool


@dataclass(frozen=True)
class Inbox:
    """What a session holds that the network has not heard: part of a snapshot.

    audio: (N,) float32 from stream time ``consumed`` on; utterance: where the open one begins; marks: where
    utterances end; ending: why no more audio will come, or None.
    """

    audio: np.ndarray
    consumed: int
    utterance: int
    marks: tuple[int, ...]
    ending: Reason | None


class Session:
    """One stream of audio. All methods may be called by any thread.

    Made by :meth:`nar_speech.engine.Engine.open`; events go to the callback given there, ``Closed`` last.

    Args:
        chunk, first: samples of a step, and of the first one of an utterance.
        limit: samples that may wait.
        wake: tells the engine's thread that something changed.

    Attributes:
        id: unique among all sessions.
        model: name of the model.
        sample_rate: Hz of the audio that :meth:`feed` takes.
    """

    def __init__(
        self,
        id: str,
        model: str,
        sample_rate: int,
        chunk: int,
        first: int,
        limit: int,
        wake: Callable[[Session], None],
        clock: Callable[[], float],
    ):
        self.id, self.model, self.sample_rate = id, model, sample_rate
        self._chunk, self._first, self._limit = chunk, first, limit
        self._wake, self._clock = wake, clock
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._buffer = AudioBuffer()
        self._utterance = 0  # where the open utterance begins
        self._marks: deque[tuple[int, float]] = deque()  # ends of utterances, and when they were known
        self._end: float | None = None  # when the end of the audio was known
        self._ending: Reason = "finished"
        self._closed: Reason | None = None
        self._cancelled = False
        self._activity = self._began = clock()  # began: when a live speaker would have begun
        self._refused = 0
        self._noted = False  # the engine's thread will look at it

    def feed(self, samples: np.ndarray, timeout: float = 0.0) -> None:
        """Hand over the next samples. All of them are taken, or none and an error is raised.

        Args:
            samples: (N,) float in [-1, 1] at the model's rate; copied.
            timeout: seconds to wait for room.

        Raises:
            AudioError: not one-dimensional, not floating point, or not finite.
            InputError: more at once than may ever wait.
            BackPressure: no room; feed slower, or again later.
            SessionClosed: finished, cancelled, moved, evicted or failed.
        """
        samples = _checked(samples)
        if len(samples) > self._limit:
            raise InputError(
                f"session {self.id}: {len(samples) / self.sample_rate:.1f} s at once, but only"
                f" {self._limit / self.sample_rate:.1f} s may wait; feed smaller pieces"
            )
        with self._lock:
            self._refuse_if_closed()
            if self._buffer.available + len(samples) > self._limit and timeout > 0:
                self._room.wait_for(
                    lambda: self._buffer.available + len(samples) <= self._limit or not self._takes_audio(),
                    timeout,
                )
                self._refuse_if_closed()
            room = self._limit - self._buffer.available
            if len(samples) > room:
                self._refused += 1
                raise BackPressure(
                    f"session {self.id}: {self._buffer.available / self.sample_rate:.1f} s of audio wait"
                    f" already, the limit is {self._limit / self.sample_rate:.1f} s; feed slower",
                    room,
                )
            self._activity = self._clock()
            self._buffer.append(samples, self._activity)
        self._wake(self)

    def commit(self) -> None:
        """End the utterance with the audio fed so far; the session goes on with the next one.

        Raises:
            SessionClosed: see :meth:`feed`.
        """
        with self._lock:
            self._refuse_if_closed()
            self._activity = self._clock()
            if not self._marks or self._marks[-1][0] != self._buffer.received:
                self._marks.append((self._buffer.received, self._activity))
        self._wake(self)

    def finish(self) -> None:
        """No more audio will come: what waits is heard, ``Closed`` comes after the last event."""
        self._finish("finished")

    def cancel(self) -> None:
        """Stop now: what waits is dropped, ``Closed`` comes next."""
        with self._lock:
            self._cancelled = True
            self._room.notify_all()
        self._wake(self)

    @property
    def lag(self) -> float:
        """Seconds of audio that were fed and not yet heard."""
        return self._buffer.available / self.sample_rate

    @property
    def room(self) -> int:
        """Samples that :meth:`feed` would take now; 0 when it takes none any more."""
        with self._lock:
            return self._limit - self._buffer.available if self._takes_audio() else 0

    @property
    def received(self) -> float:
        """Seconds of audio fed so far: the stream time."""
        return self._buffer.received / self.sample_rate

    @property
    def closed(self) -> Reason | None:
        """Why the session is over; None while it is not. ``Closed`` may still be on its way."""
        return self._closed

    # What follows is for the engine.

    def _takes_audio(self) -> bool:
        return self._closed is None and self._end is None and not self._cancelled

    def _refuse_if_closed(self) -> None:
        if not self._takes_audio():
            why = self._closed or ("cancelled" if self._cancelled else self._ending)
            raise SessionClosed(f"session {self.id}: takes no more audio: {why}; open another one")

    def _finish(self, reason: Reason) -> None:
        with self._lock:
            if self._end is None:
                self._end, self._ending = self._clock(), reason
            self._room.notify_all()
        self._wake(self)

    def _close(self, reason: Reason) -> None:
        """Take nothing any more and forget what waits."""
        with self._lock:
            self._closed = reason
            self._buffer = AudioBuffer(self._buffer.received)
            self._marks.clear()
            self._room.notify_all()

    def _next(self) -> Work | None:
        """What can be stepped now; marks of utterances without audio are dropped on the way."""
        with self._lock:
            buffer = self._buffer
            while True:
                if self._marks:
                    boundary, known = self._marks[0]
                elif self._end is not None:
                    boundary, known = buffer.received, self._end
                else:
                    boundary, known = None, 0.0
                ahead = (buffer.received if boundary is None else boundary) - buffer.consumed
                due = self._first if buffer.consumed == self._utterance else self._chunk
                if ahead >= due:
                    return self._work(due, False, buffer.arrival(buffer.consumed + due))
                if boundary is None:
                    return None
                if boundary > self._utterance:
                    return self._work(ahead, True, known)
                if not self._marks:
                    return None
                self._marks.popleft()

    def _work(self, samples: int, final: bool, arrival: float) -> Work:
        spoken = self._began + (self._buffer.consumed + samples) / self.sample_rate
        return Work(samples, final, arrival, spoken - arrival > AHEAD)

    def _take(self, work: Work) -> np.ndarray:
        """Remove the samples of ``work`` from the queue."""
        with self._lock:
            samples = self._buffer.take(work.samples)
            if work.final:
                self._utterance = self._buffer.consumed
                if self._marks and self._marks[0][0] == self._utterance:
                    self._marks.popleft()
            self._room.notify_all()
        return samples

    def _end_utterance(self) -> None:
        """As if the client had committed at the last sample heard."""
        with self._lock:
            consumed = self._buffer.consumed
            if consumed > self._utterance and not (self._marks and self._marks[0][0] == consumed):
                self._marks.appendleft((consumed, self._clock()))

    def _export(self, close: bool) -> Inbox:
        """What has not been heard; with ``close`` no audio is taken from here on."""
        with self._lock:
            inbox = Inbox(
                self._buffer.peek(),
                self._buffer.consumed,
                self._utterance,
                tuple(position for position, _ in self._marks),
                None if self._end is None else self._ending,
            )
            if close:
                self._closed = "moved"
                self._room.notify_all()
        return inbox

    def _restore(self, inbox: Inbox) -> None:
        """Go on where another session stopped; its audio counts as fed now."""
        with self._lock:
            now = self._clock()
            self._buffer = AudioBuffer(inbox.consumed)
            self._buffer.append(inbox.audio, now)
            self._utterance = inbox.utterance
            self._marks.extend((position, now) for position in inbox.marks)
            if inbox.ending is not None:
                self._end, self._ending = now, inbox.ending
            self._activity = now
            self._began = now - self._buffer.received / self.sample_rate

    @property
    def _exhausted(self) -> bool:
        """Whether all audio was heard and no more will come."""
        with self._lock:
            return self._end is not None and self._utterance == self._buffer.received


def _checked(samples: np.ndarray) -> np.ndarray:
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise AudioError(
            f"samples: expected floating point of shape (N,), got {samples.dtype} {samples.shape}; divide"
            " 16-bit integers by 32768, mix channels down"
        )
    samples = samples.astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise AudioError("samples: NaN or infinite values; send finite audio")
    return samples
