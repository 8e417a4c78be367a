"""OpenAI Realtime, transcription sessions: ``/v1/realtime?intent=transcription``.

An *item* is one utterance. Deltas carry only text that will not change; the corrected text of the second pass
stands in ``completed``. Speech that ends by itself (server_vad) is committed by the server, otherwise the
client commits.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, WebSocket

from nar_speech.engine import Closed, Event, Failed, Final, Partial, SpeechStarted, SpeechStopped
from nar_speech.pipelines.writers import join_texts
from nar_speech.server.api_error import ApiError, bad_request
from nar_speech.server.auth import Identity
from nar_speech.server.formats import duration_usage, log_prob
from nar_speech.server.live import Appended
from nar_speech.server.realtime_session import RealtimeConfig
from nar_speech.server.service import ModelEntry, Outcome, Service
from nar_speech.server.sockets import FATAL, Patience, Peer, Stopped, both, parse_json, serve, session_over
from nar_speech.server.stream import LiveStream
from nar_speech.types import Token

API = "realtime"
PROTOCOLS = ("realtime",)
COMMIT_PATIENCE = 5.0  # seconds after which a commit that brought no speech is completed
TRANSCRIPTION = "conversation.item.input_audio_transcription"
router = APIRouter()


@router.websocket("/v1/realtime")
async def realtime(websocket: WebSocket) -> None:
    """One Realtime session."""
    service: Service = websocket.app.state.service

    async def handle(peer: Peer, who: Identity, outcome: Outcome) -> None:
        query = websocket.query_params
        if query.get("intent", "transcription") != "transcription":
            raise bad_request("intent: this server transcribes; use intent=transcription", "intent")
        config = RealtimeConfig(model=query.get("model")).updated(who.session)
        await Conversation(peer, who, outcome, config).run()

    await serve(websocket, service, API, handle, lambda error: error_event(error), PROTOCOLS)


def error_event(error: ApiError, client_event: str | None = None) -> dict[str, Any]:
    """An error that names the client's event."""
    return {"type": "error", "event_id": new_id("event"), "error": {**error.body(), "event_id": client_event}}


def new_id(kind: str) -> str:
    """Such as ``item_0f3a...``."""
    return f"{kind}_{uuid.uuid4().hex[:20]}"


@dataclass
class Item:
    """One utterance. ``texts`` are those of its segments, usually one."""

    id: str = field(default_factory=lambda: new_id("item"))
    started: bool = False
    stopped: bool = False
    committed: bool = False
    ended: bool = False  # no segment of it will come any more
    appended: Appended = field(default_factory=Appended)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, tuple[Token, ...]] = field(default_factory=dict)
    awaited: set[int] = field(default_factory=set)  # segments that the second pass still corrects
    seconds: float = 0.0


class Conversation:
    """One session: what the client says is handled by ``read``, what the engine says by ``pump``."""

    def __init__(self, peer: Peer, who: Identity, outcome: Outcome, config: RealtimeConfig):
        self.peer, self.who, self.outcome, self.config = peer, who, outcome, config
        self.service = peer.service
        self.id = new_id("sess")
        peer.works = lambda: self.stream is not None
        peer.served = self._served
        self.stream: LiveStream | None = None
        self.entry: ModelEntry | None = None
        self.two_pass = False
        self.base = 0.0  # seconds of audio before the open stream
        self.uncommitted = 0  # bytes
        self.item: Item | None = None  # the open utterance
        self.pending: deque[Item] = deque()  # committed by the client, their text is on its way
        self.waiting: dict[int, Item] = {}  # segment -> item, for the second pass
        self.previous: str | None = None
        self._holder = contextlib.AsyncExitStack()
        self._streams: asyncio.Queue[LiveStream | None] = asyncio.Queue()
        self._late: set[asyncio.Task] = set()
        self._through = asyncio.Event()  # all events of the open stream were handled

    async def run(self) -> None:
        """Until one side ends it."""
        if self.config.model is not None:
            self.service.catalog.find_live(self.config.model)
        await self._send("session.created", session=self.config.body(self.id))
        try:
            await both(self.peer, self.read(), self.pump(), self._finish)
        finally:
            self.outcome.fields["audio_seconds"] = round(
                self.base + (self.stream.seconds if self.stream else 0), 3
            )
            await self._holder.aclose()

    def _served(self) -> bool:
        """Whether every item is complete, and there is no audio that the client has yet to commit."""
        to_commit = self.config.turn is None and self.uncommitted
        return not (self.pending or self.waiting or self.item or to_commit)

    async def read(self) -> None:
        """Handle the client's events until it leaves."""
        patience = Patience()
        while True:
            message = await self.peer.receive()
            name = None
            try:
                if isinstance(message, bytes):
                    await self._append(message)
                else:
                    body = parse_json(message)
                    name = body.get("event_id") if isinstance(body.get("event_id"), str) else None
                    await self._handle(body)
                patience.regain()
            except ApiError as error:
                if error.status in FATAL:
                    raise
                await self.peer.send(error_event(error, name))
                patience.lose(error)

    async def _handle(self, body: dict[str, Any]) -> None:
        kind = body.get("type")
        if kind == "input_audio_buffer.append":
            await self._append(_decoded(body.get("audio")))
        elif kind == "input_audio_buffer.commit":
            await self._commit()
        elif kind == "input_audio_buffer.clear":
            await self._clear()
        elif kind in ("session.update", "transcription_session.update"):
            await self._update(body.get("session"))
            answer = "session.updated" if kind == "session.update" else "transcription_session.updated"
            await self._send(answer, session=self.config.body(self.id))
        else:
            raise bad_request(
                f"type: '{str(kind)[:60]}' is not an event of a transcription session",
                "type",
                "unknown_event",
            )

    async def _update(self, session: Any) -> None:
        if not isinstance(session, dict):
            raise bad_request("session: must be an object", "session")
        config = self.config.updated(session)
        if config.model is not None:
            self.service.catalog.find_live(config.model)
        if config != self.config:
            await self._end_stream()
            self.config = config

    async def _append(self, data: bytes) -> None:
        if self.stream is None or self.stream.closed:
            await self._open_stream()
        await self.stream.feed(data)
        self.uncommitted += len(data)

    async def _commit(self) -> None:
        if self.stream is None or not self.uncommitted:
            raise bad_request(
                "the input audio buffer is empty; append audio before committing",
                code="input_audio_buffer_commit_empty",
            )
        self.uncommitted = 0
        item = self.item or Item()
        self.item = None
        self.pending.append(item)
        await self._tell_commit(item)
        await self.stream.commit()
        asyncio.get_running_loop().call_later(COMMIT_PATIENCE, self._give_up, item, self.stream)

    def _give_up(self, item: Item, stream: LiveStream) -> None:
        """Complete an item to which no text came: the utterance had ended just before the commit."""
        if item in self.pending and stream is self.stream and not stream.lag and not stream.closed:
            self.pending.remove(item)
            item.ended = True
            task = asyncio.ensure_future(self._complete(item))
            self._late.add(task)
            task.add_done_callback(lambda t: (self._late.discard(t), t.cancelled() or t.exception()))

    async def _clear(self) -> None:
        await self._end_stream(cancel=not self.pending and not self.waiting)
        self.item, self.uncommitted = None, 0
        await self._send("input_audio_buffer.cleared")

    async def _open_stream(self) -> None:
        await self._end_stream()
        entry = self.service.catalog.find_live(self.config.model or "default")
        wish = self.config.wish()
        stream = await self._holder.enter_async_context(
            self.service.open_stream(entry, self.who, API, self.config.audio(entry.stream_rate), wish)
        )
        self.stream, self.entry = stream, entry
        self.two_pass = wish.two_pass and entry.batch_key is not None
        self.outcome.fields["model"] = entry.id
        self._through.clear()
        self._streams.put_nowait(stream)

    async def _end_stream(self, cancel: bool = False) -> None:
        """Finish the open stream, or forget what it has not said; wait until all of it was told."""
        if self.stream is None:
            return
        if cancel:
            self.stream.cancel()
        elif not self.stream.closed:
            await self.stream.finish()
        await self._through.wait()
        await self._holder.aclose()
        self._holder = contextlib.AsyncExitStack()
        self.base += self.stream.seconds
        self.stream, self.uncommitted = None, 0

    async def _finish(self) -> None:
        """The server ends: let the engine say the rest, then end the pump."""
        if self.stream is not None and not self.stream.closed:
            await self.stream.finish()
        self._streams.put_nowait(None)

    async def pump(self) -> None:
        """Tell the client what the engine says."""
        while (stream := await self._streams.get()) is not None:
            reason = "failed"
            async for event in stream.events():
                await self._on_event(event)
                if isinstance(event, Closed):
                    reason = event.reason
            for item in [*self.waiting.values(), *self.pending]:
                await self._complete(item)
            self.waiting.clear()
            self.pending.clear()
            if self.item is not None and (self.item.started or self.item.texts) and reason != "cancelled":
                await self._close_item(self.item, stream.seconds)
                await self._complete(self.item)
            self.item = None
            self._through.set()
            if reason in ("idle", "limit"):
                raise session_over(reason)
            if reason in ("drained", "shutdown"):
                raise Stopped

    async def _on_event(self, event: Event) -> None:
        if isinstance(event, SpeechStarted):
            await self._start(event.time)
        elif isinstance(event, SpeechStopped):
            if self.item is not None and self.item.started:
                await self._stop(self.item, event.time)
        elif isinstance(event, Partial):
            if event.text:
                item = self.pending[0] if self.pending else await self._start(event.start)
                await self._delta(item, item.appended.partial(event))
        elif isinstance(event, Final):
            await (self._corrected(event) if event.source == "offline" else self._final(event))
        elif isinstance(event, Failed):
            await self._failed(event.message)

    async def _start(self, time: float) -> Item:
        """The open item; where the server finds utterances, the client hears when one begins."""
        if self.item is None:
            self.item = Item()
        if self.config.turn is not None and not self.item.started:
            self.item.started = True
            await self._send(
                "input_audio_buffer.speech_started",
                audio_start_ms=round(1000 * (self.base + time)),
                item_id=self.item.id,
            )
        return self.item

    async def _stop(self, item: Item, time: float) -> None:
        if item.started and not item.stopped:
            item.stopped = True
            await self._send(
                "input_audio_buffer.speech_stopped",
                audio_end_ms=round(1000 * (self.base + time)),
                item_id=item.id,
            )

    async def _final(self, event: Final) -> None:
        by_client = bool(self.pending)
        if not by_client and self.item is None and not event.text:
            return  # noise that was no speech after all
        item = self.pending.popleft() if by_client else await self._start(event.start)
        await self._delta(item, item.appended.final(event))
        item.texts[event.segment], item.tokens[event.segment] = event.text, event.tokens
        item.seconds += event.end - event.start
        if self.two_pass and event.text:
            item.awaited.add(event.segment)
            self.waiting[event.segment] = item
        if not by_client and self.config.turn is None:
            return  # an utterance too long for the model: the item goes on until the client commits
        item.ended = True
        await self._close_item(item, event.end)
        if not item.awaited:
            await self._complete(item)

    async def _close_item(self, item: Item, time: float) -> None:
        """Say that an item is whole, if that has not been said."""
        await self._stop(item, time)
        if not item.committed:
            self.uncommitted = 0
            await self._tell_commit(item)
        if self.item is item:
            self.item = None

    async def _corrected(self, event: Final) -> None:
        item = self.waiting.pop(event.segment, None)
        if item is None:
            return
        item.texts[event.segment] = event.text
        item.tokens[event.segment] = event.tokens or item.tokens[event.segment]
        item.awaited.discard(event.segment)
        if item.ended and not item.awaited:
            await self._complete(item)

    async def _tell_commit(self, item: Item) -> None:
        item.committed = True
        await self._send("input_audio_buffer.committed", item_id=item.id, previous_item_id=self.previous)
        body = {
            "id": item.id,
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_audio", "transcript": None}],
        }
        for kind in ("added", "done"):
            await self._send(f"conversation.item.{kind}", item=body, previous_item_id=self.previous)
        self.previous = item.id

    async def _delta(self, item: Item, text: str) -> None:
        if text:
            await self._send(f"{TRANSCRIPTION}.delta", item_id=item.id, content_index=0, delta=text)

    async def _complete(self, item: Item) -> None:
        text = join_texts(item.texts[segment] for segment in sorted(item.texts))
        body: dict[str, Any] = {"item_id": item.id, "content_index": 0, "transcript": text}
        if self.config.logprobs:
            tokens = [t for segment in sorted(item.tokens) for t in item.tokens[segment]]
            body["logprobs"] = [log_prob(token) for token in tokens]
        await self._send(f"{TRANSCRIPTION}.completed", **body, usage=duration_usage(item.seconds))
        self.outcome.add_text(self.service.settings, text)

    async def _failed(self, message: str) -> None:
        """The model failed on this stream: say so of each item that waits, the session goes on."""
        error = ApiError(500, message, "recognition_failed")
        items = [*self.pending, *self.waiting.values(), *([self.item] if self.item else [])]
        self.pending.clear()
        self.waiting.clear()
        self.item = None
        for item in dict.fromkeys(i.id for i in items):
            await self._send(f"{TRANSCRIPTION}.failed", item_id=item, content_index=0, error=error.body())
        if not items:
            await self.peer.send(error_event(error))

    async def _send(self, kind: str, **fields: Any) -> None:
        await self.peer.send({"type": kind, "event_id": new_id("event"), **fields})


def _decoded(audio: Any) -> bytes:
    if not isinstance(audio, str):
        raise bad_request("audio: missing; send base64 text", "audio")
    try:
        return base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request("audio: is not base64", "audio", "invalid_base64") from error
