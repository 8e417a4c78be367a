"""The thread that hands events to clients, so that a slow callback never holds up the device."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from nar_speech.engine.events import Closed, Event
from nar_speech.engine.model import OnEvent

logger = logging.getLogger(__name__)

SLOW = 0.1  # s; a callback that takes longer holds up other sessions


class Outlet:
    """Where the events of one session go, in order.

    Args:
        on_event: the client's callback.
        failed: called with the error when the callback raised; after that it only gets ``Closed``.
        drained: called when enough events were handed out after :attr:`waiting` had passed ``limit``.
    """

    def __init__(
        self,
        on_event: OnEvent,
        failed: Callable[[BaseException], None],
        drained: Callable[[], None],
        limit: int,
    ):
        self.on_event, self.failed, self.drained, self.limit = on_event, failed, drained, limit
        self.emitted = 0  # counted by the engine's thread
        self.delivered = 0  # counted by the thread that hands out
        self.deaf = False

    @property
    def waiting(self) -> int:
        """Events on their way."""
        return self.emitted - self.delivered

    @property
    def full(self) -> bool:
        """Whether the session must wait for its client."""
        return self.waiting > self.limit


class FanOut:
    """Delivers events. Without :meth:`start` it does so at once, in the caller's thread."""

    def __init__(self) -> None:
        self.events = self.errors = self.slow = 0
        self._queue: queue.SimpleQueue[tuple[Outlet, Event] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Deliver from a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="nar-speech-events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Deliver what waits, then end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None

    @property
    def waiting(self) -> int:
        """Events of all sessions on their way."""
        return self._queue.qsize()

    def put(self, outlet: Outlet, event: Event) -> None:
        """Hand one event on its way."""
        outlet.emitted += 1
        if self._thread is None:
            self._deliver(outlet, event)
        else:
            self._queue.put((outlet, event))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._deliver(*item)

    def _deliver(self, outlet: Outlet, event: Event) -> None:
        begun = time.perf_counter()
        try:
            if not outlet.deaf or isinstance(event, Closed):
                outlet.on_event(event)
        except BaseException as error:  # whatever a client's code raises concerns that client only
            if self._thread is None and not isinstance(error, Exception):
                raise  # Ctrl-C in the thread of who called
            self.errors += 1
            if not outlet.deaf:
                outlet.deaf = True
                outlet.failed(error)
        if time.perf_counter() - begun > SLOW:
            self.slow += 1
            logger.warning("on_event took more than %.1f s; it holds up the events of all sessions", SLOW)
        self.events += 1
        outlet.delivered += 1
        if outlet.waiting == outlet.limit // 2:
            outlet.drained()
