"""``/v1/stream``: the simplest protocol. Binary messages are audio, text messages are JSON both ways.

Query: ``model``, ``encoding`` (s16le), ``rate`` (16000), ``channels`` (1), ``language``, ``hotwords`` (a,b),
``endpoint`` (seconds of silence that end an utterance, or ``off``), ``two_pass`` (true), ``api_key``.
The client says ``{"type": "commit" | "finish" | "ping"}``, or just closes.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, WebSocket

from nar_speech.engine import Closed, Event, Failed, Final, Partial, SpeechStarted, SpeechStopped
from nar_speech.errors import AudioError
from nar_speech.server.api_error import ApiError, bad_request, told
from nar_speech.server.audio_in import AudioIn
from nar_speech.server.auth import Identity
from nar_speech.server.formats import language_code
from nar_speech.server.forms import hotwords
from nar_speech.server.live import MAX_SILENCE, Endpoint, Wish
from nar_speech.server.service import ModelEntry, Outcome, Service
from nar_speech.server.sockets import FATAL, Patience, Peer, Stopped, both, parse_json, serve, session_over
from nar_speech.server.stream import LiveStream

API = "stream"
PROTOCOLS = ("nar-speech",)
router = APIRouter()


@router.websocket("/v1/stream")
async def raw_stream(websocket: WebSocket) -> None:
    """One connection is one stream."""
    service: Service = websocket.app.state.service

    async def handle(peer: Peer, who: Identity, outcome: Outcome) -> None:
        query = websocket.query_params
        entry = service.catalog.find_live(query.get("model", "default"))
        audio, wish = parse_query(query, entry)
        async with service.open_stream(entry, who, API, audio, wish) as stream:
            await _talk(peer, stream, entry, outcome)

    await serve(websocket, service, API, handle, error_body, PROTOCOLS)


def error_body(error: ApiError) -> dict[str, Any]:
    """``{"type": "error", "error": {...}}``."""
    return {"type": "error", "error": error.body()}


def parse_query(query: Any, entry: ModelEntry) -> tuple[AudioIn, Wish]:
    """Audio format and wishes in the address.

    Raises:
        ApiError: 400.
    """
    try:
        numbers = [int(query.get(name, default)) for name, default in (("rate", 16000), ("channels", 1))]
        audio = AudioIn(query.get("encoding", "s16le"), numbers[0], entry.stream_rate, numbers[1])
    except AudioError as error:
        raise bad_request(str(error), str(error).partition(":")[0]) from error
    except ValueError as error:
        raise bad_request("rate, channels: must be whole numbers", "rate") from error
    silence = query.get("endpoint", "")
    try:
        endpoint = None if silence == "off" else Endpoint(silence=float(silence)) if silence else Endpoint()
    except ValueError:
        raise _endpoint_wrong(silence) from None
    except ApiError as error:
        raise _endpoint_wrong(silence) from error
    two_pass = query.get("two_pass", "true").lower() not in ("false", "0", "no", "off")
    words = hotwords([query.get("hotwords", "")], "hotwords")
    language = language_code(query.get("language", "")) or None
    return audio, Wish(language, words, (), endpoint, two_pass)


def _endpoint_wrong(value: str) -> ApiError:
    message = f"endpoint: got '{value[:40]}'; must be off or a number of seconds from 0 to {MAX_SILENCE:g}"
    return bad_request(message, "endpoint")


async def _talk(peer: Peer, stream: LiveStream, entry: ModelEntry, outcome: Outcome) -> None:
    outcome.fields["model"] = entry.id
    peer.works = lambda: True  # the engine ends a stream that is idle

    async def read() -> None:
        patience = Patience()
        while True:
            message = await peer.receive()
            try:
                if isinstance(message, bytes):
                    await stream.feed(message)
                elif (kind := parse_json(message).get("type")) == "finish":
                    return await stream.finish()
                elif kind == "commit":
                    await stream.commit()
                elif kind == "ping":
                    await peer.send({"type": "pong", "lag": round(stream.lag, 3)})
                else:
                    raise bad_request(f"type: '{str(kind)[:60]}' is not one of commit, finish, ping", "type")
                patience.regain()
            except ApiError as error:
                if error.status in FATAL or error.code == "stream_closed":
                    raise
                await peer.complain(error)
                patience.lose(error)

    async def pump() -> None:
        async for event in stream.events():
            await peer.send(event_body(event))
            if isinstance(event, Closed):
                if event.reason in ("drained", "shutdown"):
                    raise Stopped
                if event.reason in ("idle", "limit"):
                    raise session_over(event.reason)

    await peer.send({"type": "ready", "model": entry.id, "rate": stream.audio.rate})
    try:
        await both(peer, read(), pump(), stream.finish)
    finally:
        outcome.fields["audio_seconds"] = round(stream.seconds, 3)
        outcome.add_text(stream.service.settings, stream.text)


def event_body(event: Event) -> dict[str, Any]:
    """An event of the engine as JSON; times are seconds of the stream."""
    if isinstance(event, Partial):
        return {
            "type": "partial",
            "segment": event.segment,
            "text": event.text,
            "stable": event.stable,
            "start": round(event.start, 3),
            "end": round(event.end, 3),
        }
    if isinstance(event, Final):
        words = [
            {"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3), "confidence": w.confidence}
            for w in event.words
        ]
        return {
            "type": "final",
            "segment": event.segment,
            "text": event.text,
            "words": words,
            "start": round(event.start, 3),
            "end": round(event.end, 3),
            "source": event.source,
        }
    if isinstance(event, SpeechStarted | SpeechStopped):
        name = "speech_started" if isinstance(event, SpeechStarted) else "speech_stopped"
        return {"type": name, "time": round(event.time, 3)}
    if isinstance(event, Failed):
        return error_body(ApiError(500, event.message, "recognition_failed"))
    if isinstance(event, Closed):
        return {"type": "closed", "reason": event.reason}
    raise told(TypeError(type(event).__name__))
