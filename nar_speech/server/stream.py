"""One live stream seen from asyncio: bytes go in with back-pressure, events come out of a bounded queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import numpy as np

from nar_speech.engine import (
    Closed,
    Event,
    Failed,
    Final,
    Partial,
    Session,
    SessionOptions,
)
from nar_speech.errors import AudioError, BackPressure, SessionClosed
from nar_speech.pipelines.writers import join_texts
from nar_speech.server.api_error import TRY_LATER, ApiError
from nar_speech.server.audio_in import AudioIn
from nar_speech.server.auth import Identity

if TYPE_CHECKING:
    from nar_speech.server.service import ModelEntry, Service

MAX_EVENTS = 512  # that wait for a client; partials of a segment are one
PIECE_SECONDS = 0.25  # audio handed to the engine at once
FIRST_WAIT, LONGEST_WAIT = 0.01, 0.1  # seconds between tries while the engine's backlog is full


class LiveStream:
    """A session of the engine. Made by :meth:`nar_speech.server.service.Service.open_stream`.

    Args:
        who: pays for the audio.
        api: name of the protocol, for metrics.
        audio: what its bytes mean.
        options: of the session.
    """

    def __init__(
        self,
        service: Service,
        entry: ModelEntry,
        who: Identity,
        api: str,
        audio: AudioIn,
        options: SessionOptions,
    ):
        self.service, self.who, self.api, self.audio = service, who, api, audio
        self.samples = 0  # given to the engine, in its rate
        self.segments = 0  # finals so far
        self.texts: dict[int, str] = {}  # of segments, where they are logged
        self.opened = time.monotonic()
        self.first_audio: float | None = None
        self.failed = False
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._told = False  # whether the loop knows of events it has not seen
        self._overflow = False
        self._finished = False
        self.closed = False  # whether ``Closed`` has come
        self._session: Session = service.engine.open(entry.stream_key, options, self._on_event)

    @property
    def seconds(self) -> float:
        """Audio so far."""
        return self.samples / self.audio.target

    @property
    def text(self) -> str:
        """Of all segments so far; empty where texts are not logged."""
        return join_texts(self.texts[segment] for segment in sorted(self.texts))

    @property
    def lag(self) -> float:
        """Seconds of audio that the engine has not recognised yet."""
        return self._session.lag

    async def feed(self, data: bytes) -> None:
        """Hand bytes on; waits while the engine is busy, so that the socket is not read meanwhile.

        Raises:
            ApiError: audio that is none, a limit of the key or of the server, a session that has ended.
        """
        if self._finished:
            raise ApiError(400, "audio after the end of the stream; open a new one", "stream_finished")
        step = max(round(PIECE_SECONDS * self.audio.bytes_per_second), 1)
        for begin in range(0, len(data), step):
            try:
                samples = self.audio.feed(data[begin : begin + step])
            except AudioError as error:
                raise ApiError(400, str(error), "invalid_audio", "audio") from error
            await self._give(samples)

    async def commit(self) -> None:
        """End the utterance with the audio so far; the stream goes on."""
        await self._give(self.audio.flush())
        self._call(self._session.commit)

    async def finish(self) -> None:
        """No more audio will come; ``Closed`` follows the last event."""
        if not self._finished:
            self._finished = True
            try:
                await self._give(self.audio.flush())
            finally:  # whatever limit was passed
                self._call(self._session.finish)

    def cancel(self) -> None:
        """Forget it. May be called at any time, more than once."""
        self._finished = True
        self._session.cancel()

    def _call(self, method: Any) -> None:
        try:
            method()
        except SessionClosed as error:
            raise self._ended() from error

    async def _give(self, samples: np.ndarray) -> None:
        if not len(samples):
            return
        seconds = len(samples) / self.audio.target
        limit = self.service.settings.max_stream_seconds
        if self.seconds + seconds > limit:
            raise ApiError(413, f"streams may be {limit:g} s long; open a new one", "stream_too_long")
        self.service.usage.audio(self.who, seconds)
        if self.first_audio is None:
            self.first_audio = time.monotonic()
        pause, deadline = FIRST_WAIT, time.monotonic() + self.service.settings.stall_seconds
        while True:
            try:
                self._session.feed(samples)
                break
            except BackPressure as error:
                if time.monotonic() > deadline:
                    raise ApiError(
                        503, "the server is too busy for this stream; try again later", "overloaded"
                    ) from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_WAIT)
            except SessionClosed as error:
                raise self._ended() from error
        self.samples += len(samples)
        self.service.metrics.audio_seconds.labels(self.api).inc(seconds)

    def _ended(self) -> ApiError:
        reason = self._session.closed or "finished"
        return ApiError(400, f"the stream has ended ({reason}); open a new one", "stream_closed")

    # Called by the engine's fan-out thread.
    def _on_event(self, event: Event) -> None:
        with self._lock:
            last = self._events[-1] if self._events else None
            replaces = (
                isinstance(event, Partial) and isinstance(last, Partial) and last.segment == event.segment
            )
            if replaces:
                self._events[-1] = event
            elif len(self._events) >= MAX_EVENTS and not isinstance(event, Closed):
                self._overflow = True
            else:
                self._events.append(event)
            if self._told:
                return
            self._told = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop has gone, and with it everybody who would listen
            return

    def _wake(self) -> None:
        with self._lock:
            self._told = False
        self._arrived.set()

    async def events(self) -> AsyncIterator[Event]:
        """All events up to and with ``Closed``.

        Raises:
            ApiError: the reader was too slow for the queue.
        """
        while True:
            with self._lock:
                event = self._events.popleft() if self._events else None
                overflow = self._overflow
                if event is None:
                    self._arrived.clear()
            if overflow:
                self.cancel()
                raise ApiError(503, "events were not read fast enough", "slow_reader", close=TRY_LATER)
            if event is None:
                await self._arrived.wait()
                continue
            self._note(event)
            yield event
            if isinstance(event, Closed):
                return

    def _note(self, event: Event) -> None:
        metrics = self.service.metrics
        if isinstance(event, Partial | Final) and event.text and self.first_audio is not None:
            if self.first_audio > 0:
                metrics.first_partial.labels(self.api).observe(time.monotonic() - self.first_audio)
            self.first_audio = -1.0  # once a stream
        if isinstance(event, Final):
            self.segments += 1
            metrics.segments.labels(self.api, event.source).inc()
            if self.service.settings.log_text:
                self.texts[event.segment] = event.text
        elif isinstance(event, Failed):
            self.failed = True
        elif isinstance(event, Closed):
            self.closed = True
