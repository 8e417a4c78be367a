"""What all WebSocket protocols share: letting in, cutting off, ending.

A client is refused after the handshake, with an error event and a close code: a browser sees neither status
nor body of a refused handshake. One that does not read is cut off by the watchdog.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from nar_speech.server.api_error import NORMAL, RESTART, ApiError, told
from nar_speech.server.auth import SUBPROTOCOL, Identity
from nar_speech.server.formats import json_text
from nar_speech.server.logs import logger
from nar_speech.server.service import Outcome, Service

FLUSH_SECONDS = 5.0  # for the last events of a stream that the server ends
CLOSE_SECONDS, ABORT_SECONDS = 2.0, 12.0
MAX_BAD_MESSAGES = 50  # in a row
GOING_AWAY = 1001
FATAL = (401, 408, 413, 429, 503)  # errors after which a connection is closed
LIMITS = (413, 429)  # of audio, among them

ErrorBody = Callable[[ApiError], dict[str, Any]]


class Gone(Exception):
    """The client has closed the connection, or it broke."""


class Stopped(Exception):
    """The server ends: the client was told all there was."""


class Peer:
    """One client. Sends wait for a slow reader; the watchdog ends what waits too long.

    Args:
        error_body: an error as a message of this protocol.
    """

    def __init__(self, websocket: WebSocket, service: Service, api: str, error_body: ErrorBody):
        self.websocket, self.service, self.api, self.error_body = websocket, service, api, error_body
        self.heard = time.monotonic()  # when the last message came
        self.blocked: float | None = None  # since when a message waits to be sent
        self.reader: asyncio.Task | None = None
        self.stopped = self.expired = False
        self.cut = ""  # why the watchdog cut it off
        self.works: Callable[[], bool] = lambda: False  # whether it rightly waits without sending
        self.served: Callable[[], bool] = lambda: False  # whether a client that leaves now misses nothing
        self.left_served = False
        self._sending = asyncio.Lock()

    async def send(self, body: dict[str, Any]) -> None:
        """One JSON message.

        Raises:
            Gone: nobody is there.
        """
        async with self._sending:
            self.blocked = time.monotonic()
            try:
                await self.websocket.send_text(json_text(body))
            except (WebSocketDisconnect, RuntimeError, OSError) as error:
                raise Gone from error
            finally:
                self.blocked = None

    async def receive(self) -> str | bytes:
        """The next message.

        Raises:
            Gone: there is none any more.
        """
        try:
            message = await self.websocket.receive()
        except RuntimeError as error:
            raise Gone from error
        if message["type"] == "websocket.disconnect":
            self.left_served = self.served()
            raise Gone
        self.heard = time.monotonic()
        text = message.get("text")
        return message.get("bytes") or b"" if text is None else text

    async def complain(self, error: ApiError) -> None:
        """Tell of an error; the connection stays."""
        await self.send(self.error_body(error))

    async def close(self, code: int, reason: str = "") -> None:
        """End the connection; never waits long, never fails."""
        short = reason.encode(errors="replace")[:120].decode(errors="ignore")
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.websocket.close(code, short), CLOSE_SECONDS)
        # A client that does not read would never take the last bytes.
        asyncio.get_running_loop().call_later(ABORT_SECONDS, self._abort_transport)

    def abort(self, why: str) -> None:
        """Cut the connection without a word: the client would not read it."""
        self.cut = why
        self._abort_transport()
        if self.reader is not None:
            self.reader.cancel()

    def _abort_transport(self) -> None:
        abort = self.websocket.scope.get("state", {}).get("abort")
        if abort is not None:
            abort()

    def expire(self) -> None:
        """Nothing was heard for too long: end this client as if the server ended, with another reason."""
        if self.reader is None:
            return self.abort("idle")
        if not self.expired:
            self.expired = True
            self.reader.cancel()

    def interrupt(self) -> None:
        """The server ends: stop reading, so that what was said can be finished."""
        self.stopped = True
        if self.reader is not None:
            self.reader.cancel()


async def serve(
    websocket: WebSocket,
    service: Service,
    api: str,
    handle: Callable[[Peer, Identity, Outcome], Awaitable[None]],
    error_body: ErrorBody,
    subprotocols: tuple[str, ...] = (),
    open_to_all: bool = False,
) -> None:
    """Let a client in, run ``handle``, and close with the right code.

    Args:
        subprotocols: that this protocol knows; the first one offered is taken.
        open_to_all: no key is asked for.
    """
    offered = websocket.scope.get("subprotocols", [])
    chosen = next((p for p in subprotocols if p in offered), None)
    if chosen is None and any(p.startswith(SUBPROTOCOL) for p in offered):
        chosen = next((p for p in offered if not p.startswith(SUBPROTOCOL)), None)
    peer = Peer(websocket, service, api, error_body)
    code, reason = NORMAL, ""
    try:
        await websocket.accept(subprotocol=chosen)
        with service.watch(api, "websocket") as outcome, service.connected(peer):
            try:
                if len(service.peers) > service.settings.max_connections:
                    raise service.busy("connections")
                who = service.keyring.anonymous if open_to_all else service.identify(websocket)
                outcome.fields["key"] = who.name
                service.admit(who, api)
                await handle(peer, who, outcome)
            except Gone:
                outcome.value = "cut" if peer.cut else "ok" if peer.left_served else "cancelled"
                outcome.fields["reason"] = peer.cut or None
            except Stopped:
                outcome.value = "drained"
                code, reason = RESTART, "the server restarts"
    except ApiError as error:
        code, reason = error.close, error.message
        with contextlib.suppress(Gone, asyncio.TimeoutError):
            await asyncio.wait_for(peer.complain(error), CLOSE_SECONDS)
    except WebSocketDisconnect:
        return
    except Exception as error:
        logger.exception("connection failed", extra={"api": api})
        failure = told(error)
        code, reason = failure.close, failure.message
        with contextlib.suppress(Gone, asyncio.TimeoutError):
            await asyncio.wait_for(peer.complain(failure), CLOSE_SECONDS)
    await peer.close(code, reason)


async def both(
    peer: Peer,
    read: Coroutine[Any, Any, None],
    pump: Coroutine[Any, Any, None],
    finish: Callable[[], Awaitable[None]],
) -> None:
    """Read from the client and hand events to it until both are done, or one of them fails.

    Args:
        read: ends when the client has said everything.
        pump: ends when the client was told everything; then reading ends too.
        finish: called when the server must end: makes ``pump`` come to its end.

    Raises:
        Gone, Stopped, ApiError: as it ended.
    """
    reader, writer = asyncio.ensure_future(read), asyncio.ensure_future(pump)
    peer.reader = reader
    if peer.stopped:
        reader.cancel()
    try:
        await asyncio.wait([reader, writer], return_when=asyncio.FIRST_COMPLETED)
        if not writer.done() and not peer.cut:
            if reader.cancelled():
                await finish()
                await asyncio.wait([writer], timeout=FLUSH_SECONDS)
            else:
                error = reader.exception()
                if isinstance(error, ApiError) and error.status in LIMITS:  # what was said before is told
                    with contextlib.suppress(ApiError):
                        await finish()
                    await asyncio.wait([writer], timeout=FLUSH_SECONDS)
                reader.result()  # raises what ended it
                await writer
        if peer.cut:
            raise Gone
        if writer.done():
            writer.result()
        if peer.stopped:
            raise Stopped
        if peer.expired:
            raise session_over("idle")
        if reader.done() and not reader.cancelled():
            reader.result()
    finally:
        peer.reader = None
        for task in (reader, writer):
            task.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)


def session_over(reason: str) -> ApiError:
    """The engine has ended a stream: ``idle`` or ``limit``."""
    why = {"idle": "no audio came for too long", "limit": "it was open for too long"}.get(reason, reason)
    return ApiError(408, f"the stream is over: {why}; open a new one", f"session_{reason}", close=GOING_AWAY)


def parse_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: 400.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the message is not JSON", "invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the message must be a JSON object", "invalid_json")
    return body


class Patience:
    """Ends a connection that sends nothing but nonsense."""

    def __init__(self) -> None:
        self.bad = 0

    def lose(self, error: ApiError) -> None:
        """Count a bad message.

        Raises:
            ApiError: there were too many in a row.
        """
        self.bad += 1
        if self.bad >= MAX_BAD_MESSAGES:
            message = f"{self.bad} bad messages in a row, the last: {error.message}"
            raise ApiError(400, message, "too_many_errors") from error

    def regain(self) -> None:
        """A good message came."""
        self.bad = 0
