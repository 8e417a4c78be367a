"""OpenAI's HTTP endpoints for transcription: ``/v1/audio/transcriptions`` and ``/v1/models``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from nar_speech.errors import InputError
from nar_speech.pipelines.writers import join_texts
from nar_speech.server.api_error import ApiError, bad_request, told
from nar_speech.server.auth import DEFAULT_SECRET_SECONDS, SECRET_SECONDS, Identity
from nar_speech.server.formats import (
    MEDIA_TYPES,
    WRITERS,
    json_body,
    json_text,
    token_usage,
    verbose_body,
)
from nar_speech.server.forms import TranscriptionForm, parse_form, read_form, the_file, too_large
from nar_speech.server.logs import logger
from nar_speech.server.service import ModelEntry, Outcome, Service
from nar_speech.server.uploads import Upload
from nar_speech.types import Segment, Transcript

API = "openai_http"
MULTIPART_OVERHEAD = 2 << 20  # fields and boundaries around the file
MAX_JSON = 16 << 10  # bytes; thousands of secrets remember their session for hours
T = TypeVar("T")
router = APIRouter()


def service_of(request: Any) -> Service:
    """The server's shared state."""
    return request.app.state.service


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All models; aliases are not listed, but work."""
    service = service_of(request)
    service.identify(request)
    return {"object": "list", "data": [model_body(e) for e in service.catalog.entries.values()]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """One model, by id or alias."""
    service = service_of(request)
    service.identify(request)
    return model_body(service.catalog.find(name), name)


def model_body(entry: ModelEntry, name: str | None = None) -> dict[str, Any]:
    """OpenAI's fields, and what ours can do."""
    return {
        "id": name or entry.id,
        "object": "model",
        "created": entry.created,
        "owned_by": "nar-speech",
        "languages": list(entry.languages),
        "offline": entry.batch_key is not None,
        "streaming": entry.stream_key is not None,
    }


@router.post("/v1/audio/transcriptions")
async def transcriptions(request: Request) -> Response:
    """Recognise a file."""
    service = service_of(request)
    with service.watch(API, "transcription") as outcome:
        who = service.identify(request)
        outcome.fields["key"] = who.name
        service.admit(who, API)
        try:
            form = await read_form(request, service.settings.max_upload_bytes + MULTIPART_OVERHEAD)
        except ClientDisconnect:
            outcome.value = "cancelled"
            return Response(status_code=499)
        handed_on = False
        try:
            wanted, file = parse_form(form), the_file(form)
            if file.size > service.settings.max_upload_bytes:
                raise too_large(service.settings.max_upload_bytes)
            entry = service.catalog.find(wanted.model)
            options = await asyncio.to_thread(offline_options, entry, wanted)
            outcome.fields.update(model=entry.id, bytes=file.size)
            upload = Upload(service, entry, who, API, file.file, options)
            if wanted.stream:
                handed_on, outcome.value = True, "streaming"  # the stream is measured by itself
                body = _sse(service, upload, form, dict(outcome.fields))
                return _EventStream(body, media_type="text/event-stream")
            transcript = await unless_gone(request, _whole(service, upload))
            if transcript is None:
                outcome.value = "cancelled"
                return Response(status_code=499)
            _log_result(service, outcome, transcript)
            return rendered(transcript, wanted)
        finally:
            if not handed_on:
                await form.close()


def offline_options(entry: ModelEntry, wanted: TranscriptionForm) -> dict[str, Any]:
    """Decoding options as plain data, those that the model takes.

    Raises:
        ApiError: 400, the model does not take something that was asked for.
    """
    entry.check_language(wanted.language)
    options: dict[str, Any] = {}
    if wanted.language and entry.tells_language:
        options["language"] = wanted.language
    words = wanted.hotwords
    if wanted.hints and not words:
        words = entry.usable(wanted.hints)
    if words:
        options["hotwords"] = list(words)
    if wanted.verify is not None:
        options["verify"] = wanted.verify
    try:
        entry.check(options)
    except InputError as error:
        field = "hotwords" if "hotword" in str(error) else None
        raise bad_request(str(error), field) from error
    return options


async def _whole(service: Service, upload: Upload) -> Transcript:
    async with service.upload_turn():
        async with aclosing(upload.segments()) as segments:
            return upload.transcript([segment async for segment in segments])


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of ``work``; None, and the work cancelled, when the client closes the connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for future in (task, watcher):
            future.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def rendered(transcript: Transcript, wanted: TranscriptionForm) -> Response:
    """The answer in the format asked for."""
    style = wanted.response_format
    if style == "json":
        return JSONResponse(json_body(transcript, wanted.logprobs))
    if style == "verbose_json":
        return JSONResponse(
            verbose_body(transcript, wanted.granularities, wanted.language, wanted.temperature)
        )
    return PlainTextResponse(WRITERS[style](transcript), media_type=MEDIA_TYPES[style])


class _EventStream(StreamingResponse):
    """Server-sent events; a client that does not read for some time is cut off."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        stall = scope["app"].state.service.settings.stall_seconds

        async def bounded(message: Any) -> None:
            await asyncio.wait_for(send(message), stall)

        await super().__call__(scope, receive, bounded)


async def _sse(service: Service, upload: Upload, form: Any, fields: dict[str, Any]) -> AsyncIterator[str]:
    """``transcript.text.delta`` for each segment, ``transcript.text.done`` at the end, then ``[DONE]``."""
    try:
        with service.watch(API, "sse", **fields) as outcome:
            try:
                async with service.upload_turn():
                    found: list[Segment] = []
                    last = ""
                    async with aclosing(upload.segments()) as segments:
                        async for segment in segments:
                            found.append(segment)
                            delta = join_texts([last, segment.text])[len(last) :]
                            last = segment.text or last
                            if delta:
                                yield event({"type": "transcript.text.delta", "delta": delta})
                transcript = upload.transcript(found)
                _log_result(service, outcome, transcript)
                done = {"type": "transcript.text.done", "text": transcript.text}
                yield event({**done, "usage": token_usage(transcript)})
            except ApiError as error:
                outcome.value = "refused" if error.status < 500 else "error"
                outcome.fields.update(status=error.status, reason=error.code)
                yield event({"error": error.body()})
            except Exception:
                outcome.value = "error"
                logger.exception("transcription failed", extra={"api": API})
                yield event({"error": told(RuntimeError()).body()})
        yield "data: [DONE]\n\n"
    finally:
        await form.close()


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json_text(body)}\n\n"


def _log_result(service: Service, outcome: Outcome, transcript: Transcript) -> None:
    outcome.fields["audio_seconds"] = round(transcript.duration, 3)
    outcome.add_text(service.settings, transcript.text)


@router.post("/v1/realtime/client_secrets")
async def client_secrets(request: Request) -> dict[str, Any]:
    """A short-lived secret with which a browser may open a Realtime session."""
    service = service_of(request)
    with service.watch(API, "client_secret") as outcome:
        who = service.identify(request)
        outcome.fields["key"] = who.name
        if who.session is not None:
            raise ApiError(401, "a client secret can't make others; use an API key", "invalid_api_key")
        service.admit(who, API)
        return await _secret(service, who, await json_object(request))


async def _secret(service: Service, who: Identity, body: dict[str, Any]) -> dict[str, Any]:
    from nar_speech.server.realtime_session import RealtimeConfig

    after = body.get("expires_after") or {}
    seconds = after.get("seconds", DEFAULT_SECRET_SECONDS) if isinstance(after, dict) else None
    low, high = SECRET_SECONDS
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not low <= seconds <= high:
        raise bad_request(
            f"expires_after.seconds: must be a whole number from {low} to {high}", "expires_after"
        )
    session = {} if body.get("session") is None else body["session"]
    config = RealtimeConfig().updated(session)
    if config.model is not None:
        service.catalog.find_live(config.model)
    value, expires = service.keyring.make_secret(who, session, seconds)
    return {"value": value, "expires_at": expires, "session": config.body(f"sess_{expires:x}", expires)}


async def json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object; an empty one is {}.

    Raises:
        ApiError: 413, 400.
    """
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_JSON:
            raise ApiError(413, f"the body is larger than {MAX_JSON >> 10} KiB", "too_large")
    try:
        body = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise bad_request("the body is not JSON") from error
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    return body
