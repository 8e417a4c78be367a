"""Wyoming, the protocol of Home Assistant's voice assistants, over TCP.

An event is a line of JSON, then ``data_length`` bytes of JSON and ``payload_length`` bytes of audio. The
lengths come from the client, so they are bounded here before anything is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from nar_speech.engine import Failed, Final, Partial
from nar_speech.errors import InputError
from nar_speech.pipelines.writers import join_texts
from nar_speech.server.api_error import ApiError, bad_request, told
from nar_speech.server.audio_in import AudioIn
from nar_speech.server.formats import json_text, language_code
from nar_speech.server.forms import hotwords
from nar_speech.server.live import Appended, Wish
from nar_speech.server.logs import logger
from nar_speech.server.service import ModelEntry, Outcome, Service
from nar_speech.server.stream import LiveStream
from nar_speech.server.uploads import Upload, wave_file
from nar_speech.version import __version__

API = "wyoming"
MAX_LINE, MAX_DATA = 64 << 10, 1 << 20
PAYLOAD_SECONDS = 30.0  # in which a payload must have come
ENCODINGS = {1: "u8", 2: "s16le", 3: "s24le", 4: "s32le"}  # by bytes a sample
PROJECT = {"name": "nar_speech", "url": ""}


@dataclass(frozen=True)
class Message:
    """One event on the wire."""

    type: str
    data: dict[str, Any]
    payload: bytes = b""


async def read_message(reader: asyncio.StreamReader, idle: float, limit: int) -> Message | None:
    """The next event; None at the end.

    Raises:
        ApiError: 400 malformed, 413 longer than ``limit``, 408 nothing for ``idle`` seconds.
    """
    try:
        line = await asyncio.wait_for(reader.readline(), idle)
        if not line.endswith(b"\n"):
            return None
        head = json.loads(line)
        kind, data = head["type"], head.get("data") or {}
        sizes = [head.get(name) or 0 for name in ("data_length", "payload_length")]
        if not isinstance(kind, str) or not isinstance(data, dict) or any(type(n) is not int for n in sizes):
            raise ValueError
        if not (0 <= sizes[0] <= MAX_DATA and 0 <= sizes[1] <= limit):
            raise ApiError(413, f"an event may have {MAX_DATA} bytes of data and {limit} of audio")
        rest = await asyncio.wait_for(reader.readexactly(sum(sizes)), PAYLOAD_SECONDS)
        if sizes[0]:
            data = {**data, **json.loads(rest[: sizes[0]])}
        return Message(kind, data, rest[sizes[0] :])
    except asyncio.TimeoutError:
        raise ApiError(408, "nothing came for too long", "timeout") from None
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad_request("not an event of the Wyoming protocol", code="malformed") from error


class WyomingServer:
    """Listens on one port."""

    def __init__(self, service: Service):
        self.service = service
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task] = set()

    async def start(self, sock: Any) -> None:
        """Take clients of a bound socket."""
        self._server = await asyncio.start_server(self._client, sock=sock, limit=MAX_LINE)

    async def stop(self) -> None:
        """Close the port and what is still open."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        peer = WyomingPeer(self.service, reader, writer)
        try:
            with (
                contextlib.suppress(ConnectionError, asyncio.CancelledError),
                self.service.watch(API, "connection") as outcome,
                self.service.connected(peer),
            ):
                await peer.run(outcome)
        except ApiError:
            pass  # it was told
        except Exception:
            logger.exception("connection failed", extra={"api": API})
        finally:
            self._tasks.discard(task)
            with contextlib.suppress(Exception):
                writer.close()


class WyomingPeer:
    """One client: request after request."""

    api = API

    def __init__(self, service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.service, self.reader, self.writer = service, reader, writer
        self.heard = time.monotonic()
        self.blocked: float | None = None
        self.stopped = False
        self.wanted: dict[str, Any] = {}  # of the last ``transcribe``
        self.work: _Live | _Whole | None = None
        self.deaf = False  # to the rest of audio that was refused
        self._task: asyncio.Task | None = None
        self._outcome = Outcome()

    def works(self) -> bool:
        """Reading has a time limit of its own."""
        return True

    def abort(self, why: str) -> None:
        """Cut the connection."""
        self.writer.transport.abort()

    def expire(self) -> None:
        """Not called: see :meth:`works`."""
        self.abort("idle")

    def interrupt(self) -> None:
        """The server ends."""
        self.stopped = True
        if self._task is not None:
            self._task.cancel()

    async def send(self, kind: str, data: dict[str, Any] | None = None) -> None:
        """One event."""
        coded = json_text(data or {}).encode()
        head = {"type": kind, "version": __version__, "data_length": len(coded)}
        self.blocked = time.monotonic()
        try:
            self.writer.write(json.dumps(head).encode() + b"\n" + coded)
            await self.writer.drain()
        finally:
            self.blocked = None

    async def tell(self, text: str) -> None:
        """The result of a recording."""
        self._outcome.add_text(self.service.settings, text)
        await self.send("transcript", {"text": text})

    async def run(self, outcome: Outcome) -> None:
        """Until the client leaves."""
        self._task, self._outcome = asyncio.current_task(), outcome
        limit = self.service.settings.max_message_bytes
        try:
            if len(self.service.peers) > self.service.settings.max_connections:
                raise self.service.busy("connections")
            while True:
                message = await read_message(self.reader, self.service.settings.idle_seconds, limit)
                if message is None:
                    outcome.value = "ok" if self.work is None else "cancelled"
                    return
                self.heard = time.monotonic()
                try:
                    await self._handle(message, outcome)
                except (ApiError, InputError) as error:
                    failure = told(error)
                    await self._end()
                    self.deaf = True
                    if failure.status in (413, 429, 503):
                        raise failure from error
                    await self.send("error", {"text": failure.message, "code": failure.code})
        except ApiError as error:
            with contextlib.suppress(ConnectionError):
                await self.send("error", {"text": error.message, "code": error.code})
            raise
        finally:
            await self._end()

    async def _handle(self, message: Message, outcome: Outcome) -> None:
        kind, data = message.type, message.data
        if kind == "describe":
            await self.send("info", info(self.service))
        elif kind == "ping":
            await self.send("pong", {"text": data.get("text")})
        elif kind == "transcribe":
            self.wanted = data
        elif kind == "audio-start":
            await self._end()
            self.deaf = False
            self.work = await self._begin(data, outcome)
        elif kind == "audio-chunk" and not self.deaf:
            if self.work is None:
                self.work = await self._begin(data, outcome)
            await self.work.feed(message.payload)
        elif kind == "audio-stop":
            self.deaf = False
            if self.work is not None:
                await self.work.finish()
                await self._end()

    async def _end(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            await work.close()

    async def _begin(self, data: dict[str, Any], outcome: Outcome) -> _Live | _Whole:
        who = self.service.keyring.anonymous
        self.service.admit(who, API)
        width = data.get("width", 2)
        if isinstance(width, bool) or not isinstance(width, int) or width not in ENCODINGS:
            raise bad_request(f"width: got {width!r}; must be 1 to 4 bytes", "width")
        entry = self.service.catalog.find(str(self.wanted.get("name") or "default"))
        rate, channels = data.get("rate", 16000), data.get("channels", 1)
        audio = AudioIn(ENCODINGS[width], rate, entry.stream_rate, channels)
        language = self.wanted.get("language")
        given = [*_texts(self.wanted.get("transcript_terms")), *_texts(self.wanted.get("transcript_names"))]
        hints = hotwords(given[:200], "transcript_terms")
        code = language_code(language) if isinstance(language, str) else None
        code = code if code in entry.languages else None  # Home Assistant asks in the language of the house
        wish = Wish(code, (), hints, None)
        outcome.fields["model"] = entry.id
        if entry.stream_key is None:
            return _Whole(self, entry, wish, rate, width, channels)
        holder = contextlib.AsyncExitStack()
        stream = await holder.enter_async_context(self.service.open_stream(entry, who, API, audio, wish))
        return _Live(self, stream, holder)


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


class _Live:
    """Audio for a streaming model: text is sent as it grows, and once more as a whole."""

    def __init__(self, peer: WyomingPeer, stream: LiveStream, holder: contextlib.AsyncExitStack):
        self.peer, self.stream, self.holder = peer, stream, holder
        self.texts: dict[int, str] = {}
        self.begun = False
        self.pump = asyncio.ensure_future(self._pump())

    async def feed(self, data: bytes) -> None:
        await self.stream.feed(data)

    async def finish(self) -> None:
        await self.stream.finish()
        await self.pump
        await self.peer.tell(join_texts(self.texts[segment] for segment in sorted(self.texts)))
        if self.begun:
            await self.peer.send("transcript-stop")

    async def close(self) -> None:
        self.pump.cancel()
        await asyncio.gather(self.pump, return_exceptions=True)
        await self.holder.aclose()

    async def _pump(self) -> None:
        appended = Appended()
        async for event in self.stream.events():
            text = ""
            if isinstance(event, Partial):
                text = appended.partial(event)
            elif isinstance(event, Final):
                if event.source == "online":
                    text = appended.final(event)
                self.texts[event.segment] = event.text
            elif isinstance(event, Failed):
                raise ApiError(500, event.message, "recognition_failed")
            if text:
                if not self.begun:
                    self.begun = True
                    await self.peer.send("transcript-start")
                await self.peer.send("transcript-chunk", {"text": text})


class _Whole:
    """Audio for an offline model: kept until it has ended."""

    def __init__(
        self, peer: WyomingPeer, entry: ModelEntry, wish: Wish, rate: int, width: int, channels: int
    ):
        self.peer, self.entry, self.wish = peer, entry, wish
        self.format = (rate, width, channels)
        self.data = bytearray()

    async def feed(self, data: bytes) -> None:
        limit = self.peer.service.settings.max_upload_bytes
        if len(self.data) + len(data) > limit:
            raise ApiError(413, f"the recording is larger than {limit >> 20} MiB", "too_large")
        self.data += data

    async def finish(self) -> None:
        text = ""
        if self.data:
            service = self.peer.service
            options = await asyncio.to_thread(self.entry.possible, self.wish)
            with wave_file(bytes(self.data), *self.format) as file:
                upload = Upload(service, self.entry, service.keyring.anonymous, API, file, options, "audio")
                async with service.upload_turn(), aclosing(upload.segments()) as segments:
                    text = upload.transcript([segment async for segment in segments]).text
        await self.peer.tell(text)

    async def close(self) -> None:
        self.data.clear()


def info(service: Service) -> dict[str, Any]:
    """What Home Assistant is told of this server: one program, all models."""
    models = [
        {
            "name": entry.id,
            "attribution": PROJECT,
            "installed": True,
            "description": entry.description or entry.id,
            "version": __version__,
            "languages": list(entry.languages),
        }
        for entry in service.catalog.entries.values()
    ]
    program = {
        "name": "nar_speech",
        "attribution": PROJECT,
        "installed": True,
        "description": "Non-autoregressive speech recognition",
        "version": __version__,
        "models": models,
        "supports_transcript_streaming": any(
            entry.stream_key is not None for entry in service.catalog.entries.values()
        ),
    }
    return {"asr": [program]}
