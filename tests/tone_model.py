"""A streaming model that hears tones as letters, exactly; and a server in a thread to try it with.

A chunk of 100 ms is one letter, or a blank where it is quiet. A run of equal letters is one letter. With an
endpoint, quiet chunks end an utterance, as voice activity would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_speech.engine import (
    EndUtterance,
    Engine,
    EngineOptions,
    Final,
    Partial,
    SecondPass,
    SessionOptions,
    SpeechStarted,
    SpeechStopped,
)
from nar_speech.errors import ConfigError
from nar_speech.types import Segment, Token, Transcript, Word

RATE, CHUNK = 16000, 1600
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LOWEST, STEP = 300.0, 100.0  # Hz of the first letter, and to the next one
QUIET = 1e-4  # mean square below which a chunk is silence
STABLE = 1  # letters at the end that may still change


def tone(text: str, seconds: float = 0.2, rate: int = RATE) -> np.ndarray:
    """Float32 samples of ``text``: a tone for each letter, silence for a space."""
    time = np.arange(round(seconds * rate)) / rate
    parts = [
        np.zeros_like(time)
        if c == " "
        else 0.5 * np.sin(2 * np.pi * (LOWEST + STEP * LETTERS.index(c)) * time)
        for c in text
    ]
    return np.concatenate(parts or [np.zeros(0)]).astype(np.float32)


def pcm(samples: np.ndarray) -> bytes:
    """As 16-bit integers."""
    return (samples * 32767).astype("<i2").tobytes()


@dataclass(frozen=True)
class ToneState:
    """chunks (B,) heard."""

    chunks: Tensor


@dataclass(frozen=True)
class ToneOutput:
    """letter (B,) index or -1."""

    letter: Tensor


class ToneModel:
    """A :class:`nar_speech.engine.StreamModel`."""

    sample_rate, chunk, device = RATE, CHUNK, torch.device("cpu")

    def init_state(self, slots: int) -> ToneState:
        return ToneState(torch.zeros(slots, dtype=torch.int64))

    def step(self, audio: Tensor, lengths: Tensor, final: Tensor, state: ToneState) -> Any:
        frequency = torch.fft.rfftfreq(CHUNK, 1 / RATE)
        spectrum = torch.fft.rfft(audio).abs()
        peak = frequency[spectrum.argmax(1)]
        letter = ((peak - LOWEST) / STEP).round().long().clamp(0, len(LETTERS) - 1)
        quiet = audio.square().mean(1) < QUIET
        return ToneOutput(torch.where(quiet, -1, letter)), ToneState(state.chunks + 1)

    def collector(self, options: SessionOptions) -> ToneCollector:
        return ToneCollector(dict(options.settings))


class ToneCollector:
    """Letters into words; knows the settings of :func:`nar_speech.server.live.session_settings`."""

    def __init__(self, settings: dict[str, Any]):
        known = ("endpoint", "language", "hotwords", "second_pass")
        if wrong := [name for name in settings if name not in known]:
            raise ConfigError(f"settings: unknown key '{wrong[0]}'")
        if any(not word.isascii() for word in settings.get("hotwords", ())):
            raise ConfigError("hotwords: the model's vocabulary can't spell this")
        self.settings = settings
        self.endpoint = settings.get("endpoint") or None
        self.second_pass = settings.get("second_pass")
        self.needed: int | None = 0 if self.second_pass else None
        self.segment, self.last, self.spans = 0, -1, []
        self.begin, self.quiet, self.speaking = None, 0, False
        self.position = 0

    @property
    def text(self) -> str:
        return "".join(LETTERS[letter] for letter, _, _ in self.spans)

    def push(self, row: dict[str, np.ndarray], samples: int, final: bool) -> list[Any]:
        letter, start = int(row["letter"]), self.position / RATE
        heard, self.position, events = samples - self.position, samples, []
        if heard >= CHUNK // 2:
            if letter >= 0:
                if not self.speaking and self.endpoint is not None:
                    events.append(SpeechStarted(max(start - self.endpoint["pad_start"], 0.0)))
                self.speaking, self.quiet = True, 0
                if letter != self.last:
                    self.spans.append((letter, start, samples / RATE))
                    end = samples / RATE
                    stable = max(len(self.spans) - STABLE, 0)
                    events.append(Partial(self.segment, self.text, stable, self.spans[0][1], end))
                else:
                    self.spans[-1] = (letter, self.spans[-1][1], samples / RATE)
            else:
                self.quiet += heard
            self.last = letter
        if final:
            return [*events, *self._close(samples)]
        if self.speaking and self.endpoint and self.quiet >= self.endpoint["min_silence"] * RATE - 1:
            events.append(SpeechStopped((samples - self.quiet) / RATE))
            events.append(EndUtterance())
            self.speaking = False
        return events

    def _close(self, samples: int) -> list[Any]:
        begin = self.spans[0][1] if self.spans else samples / RATE
        end = self.spans[-1][2] if self.spans else samples / RATE
        words = tuple(Word(LETTERS[i], s, e, 0.9) for i, s, e in self.spans)
        tokens = tuple(Token(i, LETTERS[i], s, e, 0.9) for i, s, e in self.spans)
        events: list[Any] = [Final(self.segment, self.text, words, tokens, begin, end)]
        if self.second_pass and self.spans:
            tag = [self.segment, begin, end]
            first, last = int(begin * RATE), int(end * RATE)
            options = dict(self.second_pass["options"])
            events.append(SecondPass(self.second_pass["model"], first, last, options, tag))
        if self.second_pass:
            self.needed = samples
        self.segment, self.spans, self.last, self.speaking, self.quiet = self.segment + 1, [], -1, False, 0
        return events

    def second(self, tag: Any, result: Any, error: BaseException | None) -> list[Any]:
        text = result.text if error is None else ""
        return [Final(tag[0], text, result.words if result else (), (), tag[1], tag[2], "offline")]

    def export(self) -> dict[str, Any]:
        return {}

    def restore(self, data: dict[str, Any]) -> None:
        raise ConfigError("not restored in these tests")


class ToneBatch:
    """The offline half: the same letters as a sentence, 'Abc.'."""

    sample_rate = RATE

    def run(self, waves: list[np.ndarray], options: list[dict[str, Any]]) -> list[Any]:
        return [self.transcript(wave) for wave in waves]

    def transcript(self, wave: np.ndarray) -> Transcript:
        model, collector = ToneModel(), ToneCollector({"endpoint": False})
        for begin in range(0, len(wave), CHUNK):
            part = wave[begin : begin + CHUNK]
            audio = torch.zeros(1, CHUNK)
            audio[0, : len(part)] = torch.from_numpy(np.ascontiguousarray(part))
            output, _ = model.step(
                audio, torch.tensor([len(part)]), torch.tensor([False]), model.init_state(1)
            )
            collector.push({"letter": output.letter[0].numpy()}, begin + len(part), False)
        (final,) = collector._close(len(wave))
        text = f"{final.text.capitalize()}." if final.text else ""
        segment = Segment(text, final.start, final.end, 0.9, final.words, final.tokens)
        seconds = len(wave) / RATE
        return Transcript(text, (segment,) if text else (), seconds, "en")

    def check(self, options: Any) -> None:
        if any(not word.isascii() for word in options.get("hotwords", ())):
            raise ConfigError("hotword: the model's vocabulary can't spell it")

    def spellable(self, words: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(word for word in words if word.isascii())


class ServerThread:
    """A server on free ports in a thread of its own: ``url``, ``ws``, ``service``, ``server``."""

    def __init__(self, settings: Any, entries: Any, models: Any, keys: Any = None):
        from nar_speech.server.auth import Keyring
        from nar_speech.server.run import Server
        from nar_speech.server.service import Catalog, Service

        self.engine = Engine(
            models, EngineOptions(max_sessions=settings.max_streams, idle=settings.idle_seconds, threads=1)
        ).start()
        self.loop = asyncio.new_event_loop()
        started: threading.Event = threading.Event()
        self.error: BaseException | None = None

        def main() -> None:
            asyncio.set_event_loop(self.loop)

            async def start() -> None:
                catalog = Catalog(entries, settings.aliases)
                self.service = Service(settings, self.engine, catalog, Keyring(keys or {}, settings.limits))
                self.server = Server(self.service)
                await self.server.start()

            try:
                self.loop.run_until_complete(start())
            except BaseException as error:
                self.error = error
            started.set()
            if self.error is None:
                self.loop.run_forever()

        self.thread = threading.Thread(target=main, daemon=True)
        self.thread.start()
        started.wait(30)
        if self.error is not None:
            self.engine.close()
            raise self.error
        self.port = self.server.ports["http"]
        scheme = "https" if settings.ssl_certfile else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.ws = self.url.replace("http", "ws", 1)

    def call(self, coroutine: Any, timeout: float = 30.0) -> Any:
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def close(self, drain: float = 0.0) -> None:
        if self.thread.is_alive():
            with contextlib.suppress(Exception):
                self.call(self.server.stop(drain))
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(10)
        self.engine.close()

    def __enter__(self) -> ServerThread:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def the_end(socket: Any, *messages: Any) -> tuple[list[dict[str, Any]], Any]:
    """Send messages; all that is heard until the server closes, and how it closes."""
    from websockets.exceptions import ConnectionClosed

    heard = []
    with contextlib.suppress(ConnectionClosed):  # the server may have had enough before the last one
        for message in messages:
            socket.send(message)
    try:
        while True:
            heard.append(json.loads(socket.recv(timeout=60)))
    except ConnectionClosed as closed:
        return heard, closed.rcvd


def raw_websocket(port: int, path: str) -> socket.socket:
    """A connected TCP socket behind the handshake, for clients that do not keep the rules."""
    raw = socket.create_connection(("127.0.0.1", port))
    raw.sendall(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    return raw


def binary_frame(data: bytes) -> bytes:
    """A WebSocket message of a client, up to 64 KiB, masked with zeros."""
    return b"\x82\xfe" + struct.pack(">H", len(data)) + bytes(4) + data


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def tone_entry(second: bool = True) -> tuple[list[Any], dict[str, Any]]:
    """Catalog and engine models of a server with the tone model, with or without its offline half."""
    from nar_speech.server.service import ModelEntry

    batch = ToneBatch()
    entry = ModelEntry(
        "tones",
        batch_key="tones:offline" if second else None,
        stream_key="tones:online",
        languages=("en",),
        description="letters as tones",
        offline=batch if second else None,
    )
    models: dict[str, Any] = {"tones:online": ToneModel()}
    if second:
        models["tones:offline"] = batch
    return [entry], models
