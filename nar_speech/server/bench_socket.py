"""The load of :mod:`nar_speech.server.bench` on a running server, each client a WebSocket on ``/v1/stream``.

What the engine says of the run is read from the server's ``/metrics`` before and after it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from nar_speech.engine.stats import HistogramStats
from nar_speech.errors import InputError
from nar_speech.server.bench import END_SECONDS, EngineView, Log, Report, Utterance, report

RATE = 16000
MEMORY_SECONDS = 2.0


@dataclass(frozen=True)
class Target:
    """A server, ``http://host:port``, with the key and the model to use."""

    url: str
    model: str = "default"
    key: str | None = None

    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def socket(self) -> str:
        """Address of the WebSocket."""
        parts = urlsplit(self.url)
        query = urlencode({"model": self.model, "rate": RATE, "endpoint": "off", "two_pass": "false"})
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        return urlunsplit((scheme, parts.netloc, f"{parts.path.rstrip('/')}/v1/stream", query, ""))


@dataclass(frozen=True)
class Scrape:
    """Metrics of a server at one moment: (name, labels) -> value."""

    values: dict[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def read(cls, target: Target) -> Scrape:
        """Ask the server.

        Raises:
            InputError: no server, or no key.
        """
        url = f"{target.url.rstrip('/')}/metrics"
        try:
            with urlopen(Request(url, headers=target.headers()), timeout=20) as answer:
                text = answer.read().decode()
        except (OSError, ValueError) as error:
            raise InputError(f"{url}: can't be read ({error}); check --url and --key") from error
        return cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> Scrape:
        """Of Prometheus' text format."""
        values = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                name, _, labels = series.partition("{")
                values[name, labels.rstrip("}")] = float(value)
        return cls(values)

    def total(self, name: str) -> float:
        """Sum over all labels."""
        return sum(v for (n, _), v in self.values.items() if n == f"nar_speech_{name}")

    def buckets(self, name: str) -> dict[float, float]:
        """Counts up to each bound, over all models."""
        counts: dict[float, float] = {}
        for (n, labels), value in self.values.items():
            if n == f"nar_speech_{name}_bucket":
                bound = float(labels.partition('le="')[2].partition('"')[0])
                counts[bound] = counts.get(bound, 0.0) + value
        return counts


def between(before: Scrape, after: Scrape, lag: float) -> EngineView:
    """What the engine did from one look to the other."""

    def grown(name: str) -> int:
        return round(after.total(name) - before.total(name))

    first, last = before.buckets("engine_latency_seconds"), after.buckets("engine_latency_seconds")
    bounds = sorted(last)
    steps = [last[b] - first.get(b, 0.0) for b in bounds]
    counts = [round(n - m) for n, m in zip(steps, [0.0, *steps[:-1]], strict=True)]
    latency = HistogramStats(tuple(b for b in bounds if b != float("inf")), tuple(counts), 0.0)
    steps_done = grown("engine_graph_replays_total") + grown("engine_eager_steps_total")
    busy = after.total("engine_busy_seconds_total") - before.total("engine_busy_seconds_total")
    misses, chunks = grown("engine_deadline_misses_total"), grown("engine_chunks_total")
    return EngineView(latency, misses, chunks, steps_done, busy, lag)


async def speak(
    target: Target,
    corpus: Sequence[Utterance],
    first: int,
    log: Log,
    until: float,
    packet: float,
    paced: bool,
) -> None:
    """One client: utterance after utterance, each ended by a commit, until it is ``until``."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    spoken: deque[tuple[Utterance, float]] = deque()  # committed, their text is on its way
    began: list[float] = []  # of the utterance whose first text is awaited
    problems: list[str] = []

    async def listen(socket: Any) -> None:
        async for message in socket:
            event, now = json.loads(message), time.monotonic()
            if event["type"] in ("partial", "final") and event["text"] and began:
                log.firsts.append(now - began.pop())
            if event["type"] == "final" and spoken:
                utterance, ended = spoken.popleft()
                log.finals.append(now - ended)
                if utterance.text is not None:
                    log.pairs.append((utterance.text, event["text"]))
            elif event["type"] == "error":
                problems.append(event["error"]["message"])

    listener: asyncio.Future = asyncio.get_running_loop().create_future()
    try:
        async with connect(target.socket(), additional_headers=target.headers(), max_queue=256) as socket:
            listener = asyncio.ensure_future(listen(socket))
            index, due = first, time.monotonic()
            while time.monotonic() < until and not listener.done():
                utterance = corpus[index % len(corpus)]
                data = (utterance.samples * 32767).clip(-32768, 32767).astype("<i2").tobytes()
                step = round(packet * RATE) * 2
                began[:] = [due]
                for place in range(0, len(data), step):
                    if paced:
                        due += packet
                        await asyncio.sleep(due - time.monotonic())
                    await socket.send(data[place : place + step])
                spoken.append((utterance, time.monotonic()))
                log.audio += len(data) / 2 / RATE
                await socket.send('{"type": "commit"}')
                index += 1
            await socket.send('{"type": "finish"}')
            await asyncio.wait_for(listener, END_SECONDS)
    except (OSError, WebSocketException, asyncio.TimeoutError) as error:
        problems.append(f"{type(error).__name__}: {error}")
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
    log.failed.extend(problems[:1])  # the first one tells why


def bench_server(
    target: Target,
    corpus: Sequence[Utterance],
    streams: int,
    seconds: float,
    paced: bool,
    packet_seconds: float,
    normalizer: str,
) -> Report:
    """One run on a server. Memory is the server's.

    Raises:
        InputError: it can't be reached.
    """
    log, memory, lags = Log(), [], [0.0]

    async def watch() -> None:
        while True:
            seen = await asyncio.to_thread(Scrape.read, target)
            memory.append(int(seen.values.get(("process_resident_memory_bytes", ""), 0)))
            lags.append(seen.total("engine_lag_seconds_max"))
            await asyncio.sleep(MEMORY_SECONDS)

    async def main() -> float:
        watcher = asyncio.ensure_future(watch())
        begun = time.monotonic()
        until = begun + seconds

        async def late(number: int) -> None:
            await asyncio.sleep(packet_seconds * number / streams)  # microphones do not tick together
            await speak(target, corpus, number, log, until, packet_seconds, paced)

        await asyncio.gather(*map(late, range(streams)))
        wall = time.monotonic() - begun
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        return wall

    before = Scrape.read(target)
    memory.append(int(before.values.get(("process_resident_memory_bytes", ""), 0)))
    wall = asyncio.run(main())
    after = Scrape.read(target)
    memory.append(int(after.values.get(("process_resident_memory_bytes", ""), 0)))
    return report(streams, paced, wall, log, memory, normalizer, between(before, after, max(lags)))
