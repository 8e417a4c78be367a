"""What every protocol shares: models, engine, who may come in, what is open, and how it all ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nar_speech.engine import Engine, SessionOptions
from nar_speech.engine.asr_offline import OfflineModel
from nar_speech.errors import EngineBusy, EngineError, InputError
from nar_speech.model_folder import SegmentConfig
from nar_speech.pipelines.writers import join_texts
from nar_speech.server.api_error import ApiError, bad_request, told
from nar_speech.server.audio_in import AudioIn
from nar_speech.server.auth import Identity, Keyring, key_of
from nar_speech.server.limits import Usage
from nar_speech.server.live import Wish, session_settings
from nar_speech.server.logs import logger
from nar_speech.server.metrics import Metrics
from nar_speech.server.offline import SharedVad
from nar_speech.server.settings import OPENAI_NAMES, Settings
from nar_speech.server.stream import LiveStream

if TYPE_CHECKING:
    from nar_speech.server.sockets import Peer

BUSY_RETRY = 2.0  # seconds a refused client should wait
DRAIN_POLL = 0.05
WATCH_SECONDS = 0.5
LAST_WORDS = 10.0  # seconds in which streams that the server ends can tell their last text
IDLE_GRACE = 10.0  # the engine ends an idle stream first, with a word to the client


@dataclass(frozen=True)
class ModelEntry:
    """One model as clients see it.

    Args:
        id: its name in the API.
        batch_key, stream_key: names of its halves in the engine; None: it lacks this half.
        batch_rate, stream_rate: Hz of the audio they hear.
        segments: how files are cut for the offline half.
        offline: the offline half, asked whether it takes a client's options.
        settings: what a client wishes, and the second pass -> settings of the streaming half.
    """

    id: str
    batch_key: str | None = None
    stream_key: str | None = None
    batch_rate: int = 16000
    stream_rate: int = 16000
    languages: tuple[str, ...] = ()
    description: str = ""
    created: int = 0
    segments: SegmentConfig = field(default_factory=SegmentConfig)
    offline: OfflineModel | None = None
    settings: Callable[[Wish, dict[str, Any] | None], dict[str, Any]] = session_settings

    @property
    def tells_language(self) -> bool:
        """Whether it makes a difference to say which language is spoken."""
        return len(self.languages) > 1

    def check_language(self, language: str | None) -> None:
        """Whether it knows a language.

        Raises:
            ApiError: 400.
        """
        if language and self.languages and language not in self.languages:
            known = ", ".join(self.languages)
            message = f"language: model '{self.id}' knows {known}, not '{language[:20]}'"
            raise bad_request(message, "language")

    def check(self, options: Mapping[str, Any]) -> None:
        """Whether the offline half takes these options.

        Raises:
            InputError: it does not.
        """
        if self.offline is not None:
            self.offline.check(options)

    def usable(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some words that may be favoured."""
        return () if self.offline is None or not words else self.offline.spellable(words)

    def possible(self, wish: Wish) -> dict[str, Any]:
        """Options of the offline half: those wishes that it can fulfil."""
        options: dict[str, Any] = {}
        words = self.usable(wish.hotwords or wish.hints)
        if words:
            options["hotwords"] = list(words)
        wanted = {"language": wish.language if self.tells_language else None}
        wanted["textnorm"] = {True: "withitn", False: "woitn", None: None}[wish.written]
        for name, value in wanted.items():
            if value is not None and self._takes({**options, name: value}):
                options[name] = value
        return options

    def _takes(self, options: Mapping[str, Any]) -> bool:
        try:
            self.check(options)
        except InputError:
            return False
        return self.offline is not None


class Catalog:
    """Models by id and alias.

    Raises:
        InputError: an id twice, or an alias of nothing.
    """

    def __init__(self, entries: list[ModelEntry], aliases: Mapping[str, str]):
        self.entries = {entry.id: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise InputError("models: two have the same id; give them others with --model ID=NAME")
        self.aliases = {name: entries[0].id for name in OPENAI_NAMES if name not in self.entries}
        for alias, target in aliases.items():
            if target not in self.entries:
                raise InputError(f"alias {alias}: no model '{target}'; there are {', '.join(self.entries)}")
            self.aliases[alias] = target

    def find(self, name: str) -> ModelEntry:
        """The model that ``name`` means.

        Raises:
            ApiError: 404.
        """
        entry = self.entries.get(self.aliases.get(name, name))
        if entry is None:
            known = ", ".join(self.entries)
            raise ApiError(
                404, f"model '{name[:80]}' does not exist; there are {known}", "model_not_found", "model"
            )
        return entry

    def find_live(self, name: str) -> ModelEntry:
        """The same, for a live stream; an alias means the first model that can stream.

        Raises:
            ApiError: 404; 400, it can't hear live streams.
        """
        entry = self.find(name)
        if entry.stream_key is None and name in OPENAI_NAMES:
            entry = next((e for e in self.entries.values() if e.stream_key is not None), entry)
        if entry.stream_key is None:
            can = [e.id for e in self.entries.values() if e.stream_key is not None]
            use = f"use {', '.join(can)}" if can else "this server has no streaming model"
            raise bad_request(f"model '{entry.id}' recognises files only; {use}", "model", "not_streaming")
        return entry


@dataclass
class Outcome:
    """How a request went, for metrics and the log; ``fields`` go into the log."""

    value: str = "ok"
    fields: dict[str, Any] = field(default_factory=dict)

    def add_text(self, settings: Settings, text: str) -> None:
        """Recognised text goes into the log where that was asked for."""
        if settings.log_text and text:
            self.fields["text"] = join_texts([self.fields.get("text", ""), text])


class Service:
    """One server's shared state. Everything here belongs to the event loop.

    Args:
        engine: started.
        keyring: who may come in.
    """

    def __init__(self, settings: Settings, engine: Engine, catalog: Catalog, keyring: Keyring):
        self.settings, self.engine, self.catalog, self.keyring = settings, engine, catalog, keyring
        self.usage, self.metrics = Usage(), Metrics()
        self.metrics.watch_engine(engine.stats)
        self.streams: set[LiveStream] = set()
        self.vad = SharedVad()
        self.draining = False
        self.peers: set[Peer] = set()
        self.started = time.time()
        self.pool = ThreadPoolExecutor(settings.max_uploads, "nar-speech-upload")
        self._uploads, self._waiting = 0, 0
        self._turn = asyncio.Semaphore(settings.max_uploads)

    def identify(self, connection: Any) -> Identity:
        """Who sent a request or opened a WebSocket (anything with headers, query and scope of Starlette).

        Raises:
            ApiError: 401.
        """
        protocols = connection.scope.get("subprotocols", ())
        who = self.keyring.check(key_of(connection.headers, connection.query_params, protocols))
        if who is None:
            raise ApiError(401, "a valid API key is needed: 'Authorization: Bearer KEY'", "invalid_api_key")
        return who

    def admit(self, who: Identity, api: str) -> None:
        """Count a request.

        Raises:
            ApiError: 503 while draining, 429 over the key's limits.
        """
        if self.draining:
            raise ApiError(
                503, "the server is shutting down; use another, or retry", "draining", retry_after=5
            )
        self.usage.request(who)
        self.metrics.admitted.labels(api).inc()

    @contextmanager
    def watch(self, api: str, mode: str, **fields: Any) -> Iterator[Outcome]:
        """Measure and log a request; an error passes through. A client that went away is ``cancelled``."""
        outcome, begin = Outcome(fields=fields), time.monotonic()
        try:
            yield outcome
        except (asyncio.CancelledError, GeneratorExit):
            outcome.value = "cancelled"
            raise
        except ApiError as error:
            outcome.value = "error" if error.status >= 500 and error.status != 503 else "refused"
            outcome.fields.setdefault("status", error.status)
            outcome.fields.setdefault("reason", error.code)
            self.metrics.rejected.labels(api, str(error.status)).inc()
            raise
        except Exception:
            outcome.value = "error"
            raise
        finally:
            seconds = time.monotonic() - begin
            self.metrics.requests.labels(api, mode, outcome.value).observe(seconds)
            if outcome.value == "error":
                self.metrics.errors.labels(api).inc()
            logger.info(
                "request",
                extra={
                    "api": api,
                    "mode": mode,
                    "outcome": outcome.value,
                    "seconds": round(seconds, 3),
                    **outcome.fields,
                },
            )

    @asynccontextmanager
    async def open_stream(
        self, entry: ModelEntry, who: Identity, api: str, audio: AudioIn, wish: Wish
    ) -> AsyncIterator[LiveStream]:
        """A live stream; it is gone from the engine when the block is left.

        Raises:
            ApiError: 503 no room, 429 the key's streams are in use, 400 wishes that the model can't fulfil.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", "draining", retry_after=5)
        if len(self.streams) >= self.settings.max_streams:
            raise self.busy("streams")
        entry.check_language(wish.language)
        second = None
        if wish.two_pass and entry.batch_key is not None:
            options = await asyncio.to_thread(entry.possible, wish)
            second = {"model": entry.batch_key, "options": options}
        with self.usage.stream(who):
            try:
                stream = self._opened(entry, who, api, audio, wish, second)
            except EngineBusy as error:
                raise self.busy("streams") from error
            except EngineError as error:
                raise engine_down(error) from error
            except InputError as error:
                raise told(error) from error
            self.streams.add(stream)
            try:
                yield stream
            finally:
                self.streams.discard(stream)
                if not stream.closed:
                    stream.cancel()

    def _opened(
        self,
        entry: ModelEntry,
        who: Identity,
        api: str,
        audio: AudioIn,
        wish: Wish,
        second: dict[str, Any] | None,
    ) -> LiveStream:
        while True:
            settings = entry.settings(wish, second)
            options = SessionOptions(settings, idle=self.settings.idle_seconds)
            try:
                return LiveStream(self, entry, who, api, audio, options)
            except InputError:
                if not wish.hints:
                    raise
                wish = wish.without_hints()

    @contextmanager
    def connected(self, peer: Peer) -> Iterator[None]:
        """Keep a WebSocket client in view while it is there."""
        self.peers.add(peer)
        self.metrics.connections_total.labels(peer.api).inc()
        self.metrics.connections.labels(peer.api).inc()
        try:
            yield
        finally:
            self.peers.discard(peer)
            self.metrics.connections.labels(peer.api).dec()

    async def watch_peers(self) -> None:
        """Cut off clients that take nothing; runs as long as the server."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            for peer in list(self.peers):
                if peer.blocked is not None and now - peer.blocked > self.settings.stall_seconds:
                    self.metrics.slow_readers.labels(peer.api).inc()
                    peer.abort("slow_reader")
                elif now - peer.heard > self.settings.idle_seconds + IDLE_GRACE and not peer.works():
                    peer.expire()

    @asynccontextmanager
    async def upload_turn(self) -> AsyncIterator[None]:
        """Wait for one of the places for files.

        Raises:
            ApiError: 503, too many wait already.
        """
        if self._turn.locked() and self._waiting >= self.settings.waiting_uploads:
            raise self.busy("uploads")
        self._waiting += 1
        self.metrics.waiting.set(self._waiting)
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
            self.metrics.waiting.set(self._waiting)
        self._uploads += 1
        self.metrics.running.set(self._uploads)
        try:
            yield
        finally:
            self._uploads -= 1
            self.metrics.running.set(self._uploads)
            self._turn.release()

    def busy(self, what: str) -> ApiError:
        """503 of a server whose places are all taken."""
        return ApiError(
            503, f"all places for {what} are taken; try again", "overloaded", retry_after=BUSY_RETRY
        )

    @property
    def at_work(self) -> int:
        """Streams and files that are not finished."""
        return len(self.streams) + self._uploads + self._waiting

    async def drain(self, limit: float | None = None, flush: float = LAST_WORDS) -> bool:
        """Refuse what is new, wait for what is open, at most ``limit`` seconds, then end it.

        Args:
            flush: seconds that clients may take to hear what was recognised until then.

        Returns:
            whether everything ended by itself.
        """
        limit = self.settings.drain_seconds if limit is None else limit
        self.draining = True
        self.metrics.draining.set(1)
        logger.info("draining", extra={"streams": len(self.streams), "uploads": self._uploads})
        deadline = time.monotonic() + limit
        while self.at_work and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL)
        cut_off = self.at_work
        for peer in list(self.peers):
            peer.interrupt()
        deadline = time.monotonic() + flush
        while self.peers and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL)
        logger.info("drained", extra={"clean": not cut_off, "cut_off": cut_off})
        return not cut_off

    def close(self) -> None:
        """Free threads; the engine belongs to who made it."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def engine_down(error: EngineError) -> ApiError:
    """503: the engine has failed or is being closed."""
    logger.error("engine refused", extra={"reason": str(error)})
    return ApiError(503, "the engine has stopped; try again", "engine_stopped", retry_after=5)
