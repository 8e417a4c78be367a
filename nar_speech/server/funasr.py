"""FunASR's WebSocket protocol: modes ``offline``, ``online`` and ``2pass``.

A client sends a JSON text, audio as binary messages, and ``{"is_speaking": false}``; then the next utterance
may follow. Results of one utterance end with one whose ``is_final`` is true, and with an acknowledgement
where ``is_end`` asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import IO, Any

from fastapi import APIRouter, WebSocket

from nar_speech.engine import Closed, Failed, Final, Partial
from nar_speech.errors import AudioError
from nar_speech.pipelines.writers import join_texts
from nar_speech.server.api_error import ApiError, bad_request
from nar_speech.server.audio_in import AudioIn
from nar_speech.server.auth import Identity
from nar_speech.server.forms import hotwords
from nar_speech.server.live import Appended, Endpoint, Wish
from nar_speech.server.service import ModelEntry, Outcome, Service
from nar_speech.server.sockets import FATAL, Patience, Peer, Stopped, both, parse_json, serve, session_over
from nar_speech.server.stream import LiveStream
from nar_speech.server.uploads import SPOOL_BYTES, Upload, wave_file
from nar_speech.text.postprocess import is_cjk
from nar_speech.types import Segment, Word

API = "funasr"
PROTOCOLS = ("binary",)
RESULT_MODES = {"offline": "offline", "online": "online", "2pass": "2pass-offline"}  # of last results
SILENCE = 0.8  # seconds that end an utterance, as FunASR's voice activity detection has it
PUNCTUATION = ",.?!;:，。？！；：、"
MAX_WAITING = 4  # utterances of one connection that wait for their results
NOT_PCM = "ERROR. Real-time transcription service ONLY SUPPORT PCM stream."
router = APIRouter()


@router.websocket("/funasr")
async def funasr(websocket: WebSocket) -> None:
    """FunASR's protocol on the main port."""
    await serve_funasr(websocket, websocket.app.state.service)


async def serve_funasr(websocket: WebSocket, service: Service, open_to_all: bool = False) -> None:
    """One connection; ``open_to_all``: no key is asked for."""

    async def handle(peer: Peer, who: Identity, outcome: Outcome) -> None:
        await Conversation(peer, who, outcome, websocket.query_params.get("model", "default")).run()

    await serve(websocket, service, API, handle, error_body, PROTOCOLS, open_to_all)


def error_body(error: ApiError) -> dict[str, Any]:
    """FunASR has no error message; clients look at ``is_end`` and ``error``, or ignore both."""
    return {"mode": "error", "wav_name": "", "text": "", "is_final": False, "error": error.message}


@dataclass(frozen=True)
class Config:
    """What the client has said so far. ``error``: a mode that does not exist."""

    mode: str = "2pass"
    wav_name: str = "microphone"
    wav_format: str = "pcm"
    rate: int = 16000
    hotwords: tuple[str, ...] = ()
    itn: bool | None = None
    language: str | None = None
    error: str = ""

    def updated(self, body: dict[str, Any]) -> Config:
        """With the fields of a message; unknown ones are ignored.

        Raises:
            ApiError: 400, a field with a value that is not allowed.
        """
        config = self
        if "mode" in body:
            known = body["mode"] in tuple(RESULT_MODES)
            error = (
                "" if known else f"unknown mode {str(body['mode'])[:40]!r}; valid: {', '.join(RESULT_MODES)}"
            )
            config = replace(config, mode=body["mode"] if known else self.mode, error=error)
        for field, name in (("wav_name", "wav_name"), ("wav_format", "wav_format")):
            if name in body:
                config = replace(config, **{field: str(body[name])[:200]})
        if "audio_fs" in body:
            try:
                rate = int(body["audio_fs"])
                AudioIn("s16le", rate, 16000)
            except (AudioError, OverflowError, TypeError, ValueError) as error:
                raise bad_request(f"audio_fs: {error}", "audio_fs") from error
            config = replace(config, rate=rate)
        if "hotwords" in body:
            config = replace(config, hotwords=parse_hotwords(body["hotwords"]))
        if "itn" in body:
            config = replace(config, itn=bool(body["itn"]))
        if isinstance(body.get("svs_lang"), str):
            config = replace(config, language=None if body["svs_lang"] == "auto" else body["svs_lang"])
        return config

    @property
    def pcm(self) -> bool:
        """Whether the audio is raw samples."""
        return self.wav_format.lower() == "pcm"


def parse_hotwords(given: Any) -> tuple[str, ...]:
    """A JSON object ``{"word": weight}`` as text or as it is, or words between commas, lines or blanks.

    Weights are not used: all hotwords count alike.
    """
    if isinstance(given, str):
        with contextlib.suppress(ValueError, RecursionError):
            loaded = json.loads(given)
            given = loaded if isinstance(loaded, dict) else given
    if isinstance(given, dict):
        return hotwords([str(word) for word in given], "hotwords")
    text = given if isinstance(given, str) else ""
    return hotwords([text if "," in text or "\n" in text else ",".join(text.split())], "hotwords")


class Conversation:
    """One connection: utterance after utterance."""

    def __init__(self, peer: Peer, who: Identity, outcome: Outcome, model: str):
        self.peer, self.who, self.outcome, self.model = peer, who, outcome, model
        self.service = peer.service
        self.config = Config()
        self.busy = False  # whether an utterance is being recognised
        peer.works = lambda: self.busy or self.utterance is not None
        peer.served = lambda: not (peer.works() or self._utterances.qsize())
        self.seconds = 0.0
        self.complained = False  # about audio that is not PCM
        self.utterance: _Live | _File | None = None
        self._utterances: asyncio.Queue[_Live | _File | _Nothing | None] = asyncio.Queue()
        self._places = asyncio.Semaphore(MAX_WAITING)  # without one the socket is not read

    async def run(self) -> None:
        """Until the client leaves."""
        try:
            await both(self.peer, self.read(), self.pump(), self._finish)
        finally:
            if self.utterance is not None:
                await self.utterance.close()
            while not self._utterances.empty():
                waiting = self._utterances.get_nowait()
                if waiting is not None:
                    await waiting.close()
            self.outcome.fields["audio_seconds"] = round(self.seconds, 3)

    async def read(self) -> None:
        """Handle what the client sends."""
        patience = Patience()
        while True:
            message = await self.peer.receive()
            try:
                if isinstance(message, bytes):
                    await self._audio(message)
                else:
                    await self._control(parse_json(message))
                patience.regain()
            except ApiError as error:
                if error.status in FATAL:
                    raise
                await self.peer.complain(error)
                patience.lose(error)

    async def _control(self, body: dict[str, Any]) -> None:
        self.config = self.config.updated(body)
        if body.get("is_speaking", True) is not False and not body.get("is_finished"):
            return
        utterance, self.utterance = self.utterance, None
        if utterance is None:
            await self._places.acquire()
            utterance = _Nothing(self, self.config)
        self.complained = False
        utterance.acknowledge = bool(body.get("is_end"))
        await utterance.finish()
        utterance.ended.set()
        if isinstance(utterance, _Live):
            return  # the pump has it already
        self._utterances.put_nowait(utterance)

    async def _audio(self, data: bytes) -> None:
        config = self.config
        if config.error or not data:
            return
        if config.mode != "offline" and not config.pcm:
            if not self.complained:
                self.complained = True
                await self._say(config, config.mode, NOT_PCM, False)
            return
        if self.utterance is None:
            entry = self.service.catalog.find(self.model)
            self.outcome.fields.update(model=entry.id, mode=config.mode)
            await self._places.acquire()
            try:
                await self._begin(entry, config)
            except BaseException:
                self._places.release()
                raise
        if not self.utterance.over:
            await self.utterance.feed(data)

    async def _begin(self, entry: ModelEntry, config: Config) -> None:
        """Open an utterance."""
        if config.mode == "offline":
            self.utterance = _File(self, entry, config)
        else:
            entry = self.service.catalog.find_live(self.model)
            self.utterance = await _Live.open(self, entry, config)
            self._utterances.put_nowait(self.utterance)

    async def pump(self) -> None:
        """Tell the client the results, utterance after utterance."""
        while (utterance := await self._utterances.get()) is not None:
            error, self.busy = utterance.config.error, True
            try:
                await utterance.tell()
            except ApiError as failure:
                if failure.status in FATAL:
                    raise
                error = failure.message
                await self._say(utterance.config, utterance.config.mode, "", True, error=error)
            finally:
                self.busy = False
                self.outcome.add_text(self.service.settings, utterance.text)
                await utterance.close()
            await utterance.ended.wait()
            self.seconds += utterance.seconds
            self._places.release()
            if utterance.acknowledge:
                last = {"is_end": True, **({"error": error} if error else {})}
                await self._say(utterance.config, utterance.config.mode, "", not error, **last)

    async def _finish(self) -> None:
        """The server ends."""
        if self.utterance is not None:
            await self.utterance.finish()
            self.utterance.ended.set()
            if not isinstance(self.utterance, _Live):
                self._utterances.put_nowait(self.utterance)
        self._utterances.put_nowait(None)

    async def _say(self, config: Config, mode: str, text: str, final: bool, **more: Any) -> None:
        body = {"mode": mode, "wav_name": config.wav_name, "text": text, "is_final": final, **more}
        await self.peer.send(body)


class _Nothing:
    """An end without audio before it."""

    seconds, acknowledge, text = 0.0, False, ""

    def __init__(self, talk: Conversation, config: Config):
        self.talk, self.config, self.ended = talk, config, asyncio.Event()

    async def finish(self) -> None:
        """Nothing is open."""

    async def close(self) -> None:
        """Nothing is open."""

    async def tell(self) -> None:
        """An empty last result, unless the client is about to hear of an error."""
        if not self.config.error:
            await self.talk._say(self.config, RESULT_MODES[self.config.mode], "", True)


class _Live:
    """An utterance of mode ``online`` or ``2pass``."""

    acknowledge = False

    def __init__(self, talk: Conversation, config: Config, stream: LiveStream, holder: Any, second: bool):
        self.talk, self.config, self.stream, self.holder = talk, config, stream, holder
        self.second = second  # whether an offline result follows each online one
        self.appended = Appended()
        self.held: dict[str, Any] | None = None  # the last result, while it is not known to be that
        self.before = ""  # end of the text so far
        self.ended = asyncio.Event()  # the client has said that it has ended

    @classmethod
    async def open(cls, talk: Conversation, entry: ModelEntry, config: Config) -> _Live:
        two_pass = config.mode == "2pass"
        endpoint = Endpoint(silence=SILENCE)
        wish = Wish(config.language, (), config.hotwords, endpoint, two_pass, config.itn)
        holder = contextlib.AsyncExitStack()
        audio = AudioIn("s16le", config.rate, entry.stream_rate)
        stream = await holder.enter_async_context(talk.service.open_stream(entry, talk.who, API, audio, wish))
        return cls(talk, config, stream, holder, two_pass and entry.batch_key is not None)

    @property
    def seconds(self) -> float:
        return self.stream.seconds

    @property
    def text(self) -> str:
        return self.stream.text

    @property
    def over(self) -> bool:
        """Whether the engine has ended it."""
        return self.stream.closed

    async def feed(self, data: bytes) -> None:
        await self.stream.feed(data)

    async def finish(self) -> None:
        if not self.stream.closed:
            await self.stream.finish()

    async def close(self) -> None:
        await self.holder.aclose()

    async def tell(self) -> None:
        """Results as they come; after the end of the audio each is held until the next one comes."""
        mode = self.config.mode
        async for event in self.stream.events():
            if isinstance(event, Partial):
                await self._grow(self.appended.partial(event), False)
            elif isinstance(event, Final) and event.source == "online":
                if mode == "online":
                    await self._result({"mode": "online", "text": self.appended.final(event)})
                elif not self.second and event.text:
                    await self._corrected(event)
                else:
                    self.appended.final(event)
            elif isinstance(event, Final):
                await self._corrected(event)
            elif isinstance(event, Failed):
                raise ApiError(500, event.message, "recognition_failed")
            elif isinstance(event, Closed):
                if event.reason in ("drained", "shutdown"):
                    raise Stopped
                if event.reason in ("idle", "limit"):
                    raise session_over(event.reason)
                held = self.held or {"mode": RESULT_MODES[mode], "text": ""}
                self.held = None
                await self._say(held, True)

    async def _grow(self, text: str, final: bool) -> None:
        if text:
            await self._release()
            await self._say(
                {"mode": "online" if self.config.mode == "online" else "2pass-online", "text": text}, final
            )

    async def _corrected(self, event: Final) -> None:
        text = join_texts([self.before, event.text])[len(self.before) :]
        self.before = (event.text or self.before)[-1:]
        segment = Segment(event.text, event.start, event.end, 0.0, event.words)
        await self._result({"mode": "2pass-offline", "text": text, **stamps([segment])})

    async def _result(self, body: dict[str, Any]) -> None:
        await self._release()
        self.held = body
        if not self.ended.is_set():
            await self._release()

    async def _release(self) -> None:
        held, self.held = self.held, None
        if held is not None and (held["text"] or held["mode"] == "2pass-offline"):
            await self._say(held, False)

    async def _say(self, body: dict[str, Any], final: bool) -> None:
        await self.talk._say(self.config, **{"final": final, **body})


class _File:
    """An utterance of mode ``offline``: everything first, then one answer."""

    acknowledge = over = False

    def __init__(self, talk: Conversation, entry: ModelEntry, config: Config):
        self.talk, self.entry, self.config = talk, entry, config
        self.file: IO[bytes] = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115
        self.size, self.seconds, self.text = 0, 0.0, ""
        self.ended = asyncio.Event()

    async def feed(self, data: bytes) -> None:
        self.size += len(data)
        limit = self.talk.service.settings.max_upload_bytes
        if self.size > limit:
            self.talk.utterance = None
            self.file.close()
            raise ApiError(413, f"the recording is larger than {limit >> 20} MiB", "too_large")
        self.file.write(data)

    async def finish(self) -> None:
        """Nothing to do: :meth:`tell` works."""

    async def close(self) -> None:
        self.file.close()

    async def tell(self) -> None:
        """Recognise and answer."""
        service, config = self.talk.service, self.config
        if config.pcm:
            await asyncio.to_thread(self._as_wave)
        self.file.seek(0)
        wish = Wish(config.language, (), config.hotwords, None, False, config.itn)
        options = await asyncio.to_thread(self.entry.possible, wish)
        upload = Upload(service, self.entry, self.talk.who, API, self.file, options, config.wav_name)
        try:
            async with service.upload_turn(), aclosing(upload.segments()) as segments:
                transcript = upload.transcript([segment async for segment in segments])
        finally:
            self.seconds = upload.seconds
        self.text, more = transcript.text, stamps(list(transcript.segments))
        await self.talk._say(config, "offline", transcript.text, True, **more)

    def _as_wave(self) -> None:
        """Raw samples become a file with a header."""
        self.file.seek(0)
        data = self.file.read()
        self.file.close()
        self.file = wave_file(data, self.config.rate)


def stamps(segments: list[Segment]) -> dict[str, Any]:
    """``timestamp`` (a JSON text of [begin, end] in ms for each word) and ``stamp_sents``."""
    words = [word for segment in segments for word in segment.words]
    if not words:
        return {}
    sentences = [sentence(segment) for segment in segments if segment.words]
    return {"timestamp": json.dumps([_ms(word) for word in words]), "stamp_sents": sentences}


def sentence(segment: Segment) -> dict[str, Any]:
    """One of ``stamp_sents``: tokens between blanks, the punctuation behind them, and times."""
    text = segment.text.strip()
    punctuation = text[-1:] if text[-1:] in PUNCTUATION else ""
    tokens = [word.text for word in segment.words]
    gap = "" if tokens and is_cjk(tokens[0][:1] or " ") and len(tokens[0]) > 1 else " "
    return {
        "text_seg": gap.join(tokens).rstrip(PUNCTUATION),
        "punc": punctuation,
        "start": _ms(segment.words[0])[0],
        "end": _ms(segment.words[-1])[1],
        "ts_list": [_ms(word) for word in segment.words],
    }


def _ms(word: Word) -> list[int]:
    return [round(1000 * word.start), round(1000 * word.end)]
