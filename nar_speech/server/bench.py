"""Load: many clients that speak at once, paced like microphones or as fast as they are let.

Every client says utterance after utterance of a corpus, a session each, and begins at another one. Clients
talk to an engine in this process, or to a server's ``/v1/stream`` (:mod:`nar_speech.server.bench_socket`).

What is measured: *chunk latency*, from the arrival of a chunk's last sample until its results were handed out
(by the engine; waiting for the chunk to fill is not in it); *final latency*, from the last sample of an
utterance until its last text; *first text*, from the first sample until the first text; audio behind at the
worst moment; resident memory; word errors of the texts of this very run.
"""

from __future__ import annotations

import heapq
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nar_speech.audio import read_audio
from nar_speech.engine import Closed, Engine, EngineOptions, Failed, Final, Partial, Session, SessionOptions
from nar_speech.engine.stats import HistogramStats
from nar_speech.errors import BackPressure, InputError, NarSpeechError
from nar_speech.locate import ASSETS
from nar_speech.metrics import char_error_rate, word_error_rate
from nar_speech.pipelines.evaluate import read_manifest
from nar_speech.pipelines.writers import join_texts
from nar_speech.text.normalize import get_normalizer

PACKET_SECONDS = 0.1
RETRY = 0.02  # seconds after which a client tries again to hand over audio that was refused
END_SECONDS = 60.0  # in which the last texts must have come
MISSES_ALLOWED = 0.001
SERIES = 240  # values of memory that a report keeps
FINENESS = 16  # a capacity is found to a sixteenth
QUANTILES = (0.5, 0.95, 0.99)
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Utterance:
    """samples (N,) float32 in the model's rate; what was said, None where nobody knows."""

    samples: np.ndarray
    text: str | None


def read_corpus(source: str | None, rate: int) -> list[Utterance]:
    """Utterances of a manifest of ``evaluate``, of one audio file, or of the sample that ships with us.

    Raises:
        InputError: nothing usable.
    """
    if source is None:
        text = (ASSETS / "sample.txt").read_text(encoding="utf-8").strip()
        return [Utterance(read_audio(ASSETS / "sample.flac", rate).samples, text)]
    if Path(source).suffix not in (".jsonl", ".json"):
        return [Utterance(read_audio(source, rate).samples, None)]
    found = [Utterance(read_audio(u.path, rate).samples, u.text) for u in read_manifest(source)[0]]
    if not found:
        raise InputError(f"{source}: no usable line; see 'nar-speech evaluate'")
    return found


@dataclass
class Log:
    """What the clients of one run saw; seconds. ``pairs``: what was said and what was understood."""

    finals: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    audio: float = 0.0
    refused: int = 0  # times that audio had to wait in the client
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """One run. Latencies in seconds, quantiles p50, p95 and p99; None: there was nothing to measure.

    rtfx: audio per wall time. busy: share of the time in which the engine's thread worked. batch_mean:
    streams of a step. lag_max: seconds of audio that some stream had waiting. refused: times that audio had
    to wait in the client. rss: bytes; rss_series: over the run, in equal steps. held: paced, no
    stream failed or had to wait, and at most 0.1 % of the chunks were late.
    """

    streams: int
    paced: bool
    seconds: float
    audio_seconds: float
    rtfx: float
    utterances: int
    failed: int
    chunk_latency: tuple[float, float, float]
    final_latency: tuple[float, float, float] | None
    first_text: tuple[float, float, float] | None
    chunks: int
    deadline_misses: int
    busy: float
    batch_mean: float
    lag_max: float
    refused: int
    rss_start: int
    rss_peak: int
    rss_end: int
    rss_series: tuple[int, ...]
    wer: float | None
    words: int
    held: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Memory:
    """Resident memory of this process over time, bytes."""

    def __init__(self, period: float = 0.5):
        self.values = [resident()]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(period,), daemon=True)

    def _run(self, period: float) -> None:
        while not self._stop.wait(period):
            self.values.append(resident())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.values.append(resident())


def resident() -> int:
    """Bytes of memory this process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


class Client:
    """One simulated speaker on an engine. Fed by the pacer's thread; events come from the engine's."""

    def __init__(
        self, number: int, corpus: Sequence[Utterance], open_session: Callable[..., Session], log: Log
    ):
        self.corpus, self.open, self.log = corpus, open_session, log
        self.next = number % len(corpus)
        self.session: Session | None = None
        self.done: Callable[[Client], None] = lambda client: None

    def begin(self, now: float) -> None:
        """Start to say the next utterance."""
        self.utterance = self.corpus[self.next]
        self.next = (self.next + 1) % len(self.corpus)
        self.place, self.began, self.ended, self.heard = 0, now, 0.0, False
        self.last_text = 0.0
        self.texts: dict[int, str] = {}
        self.session = self.open(self._on_event)

    def feed(self, packet: int, now: float) -> bool:
        """Say the next ``packet`` samples; True when that was the end of the utterance.

        Raises:
            BackPressure: the engine does not take it now.
        """
        samples = self.utterance.samples[self.place : self.place + packet]
        self.session.feed(samples)
        self.place += len(samples)
        if self.place < len(self.utterance.samples):
            return False
        self.ended = now
        self.log.audio += len(self.utterance.samples) / self.session.sample_rate
        self.session.finish()
        return True

    def _on_event(self, event: Any) -> None:
        now = time.monotonic()
        if isinstance(event, Partial | Final) and event.text and not self.heard:
            self.heard = True
            self.log.firsts.append(now - self.began)
        if isinstance(event, Final):
            self.texts[event.segment] = event.text
            self.last_text = now
        elif isinstance(event, Failed):
            self.log.failed.append(event.message)
        elif isinstance(event, Closed):
            if event.reason == "finished" and self.ended:
                self.log.finals.append(max(self.last_text - self.ended, 0.0) if self.last_text else 0.0)
                if self.utterance.text is not None:
                    text = join_texts(self.texts[key] for key in sorted(self.texts))
                    self.log.pairs.append((self.utterance.text, text))
            elif event.reason != "cancelled":
                self.log.failed.append(f"closed: {event.reason}")
            self.done(self)


def drive(clients: Sequence[Client], packet: int, rate: int, seconds: float, paced: bool) -> float:
    """Let all clients speak for so long, then finish their utterances.

    Returns:
        wall time in seconds until the last text.

    Raises:
        NarSpeechError: texts did not come within a minute of the end.
    """
    ready: queue.SimpleQueue[Client] = queue.SimpleQueue()
    step, random = packet / rate, np.random.default_rng(0)
    begun = time.monotonic()
    due: list[tuple[float, int]] = [
        (begun + (float(random.random()) * step if paced else 0.0), i) for i in range(len(clients))
    ]
    heapq.heapify(due)
    index = {id(client): i for i, client in enumerate(clients)}
    speaking: set[int] = set()
    for client in clients:
        client.done = ready.put
    end = begun + seconds
    open_sessions = 0
    while due or open_sessions:
        now = time.monotonic()
        if now > end + END_SECONDS:
            raise NarSpeechError(
                f"bench: {open_sessions} streams had not ended a minute after their last audio"
            )
        while not ready.empty():
            client = ready.get()
            open_sessions -= 1
            if now < end:
                heapq.heappush(due, (now, index[id(client)]))
        if not due or due[0][0] > now:
            time.sleep(min(max(due[0][0] - now, 0.0), 0.005) if due else 0.002)
            continue
        when, i = heapq.heappop(due)
        client = clients[i]
        if i not in speaking:
            if now >= end:
                continue
            client.begin(when)
            speaking.add(i)
            open_sessions += 1
            if paced:  # the first packet is full one packet later
                heapq.heappush(due, (when + step, i))
                continue
        try:
            if client.feed(packet, now):
                speaking.discard(i)
                continue
        except BackPressure:
            client.log.refused += 1
            heapq.heappush(due, (now + RETRY, i))
            continue
        heapq.heappush(due, (when + step if paced else now, i))
    return time.monotonic() - begun


def bench_engine(
    models: dict[str, Any],
    model: str,
    corpus: Sequence[Utterance],
    streams: int,
    seconds: float,
    paced: bool,
    settings: dict[str, Any] | None = None,
    options: EngineOptions | None = None,
    packet_seconds: float = PACKET_SECONDS,
    normalizer: str = "en",
) -> Report:
    """One run on an engine of its own.

    Args:
        model: name of the streaming model in ``models``.
        settings: of the sessions.
    """
    rate = models[model].sample_rate
    options = options or EngineOptions(max_sessions=streams)
    log = Log()
    with Engine(models, options) as engine:

        def open_session(on_event: Callable[[Any], None]) -> Session:
            return engine.open(model, SessionOptions(settings or {}), on_event)

        clients = [Client(i, corpus, open_session, log) for i in range(streams)]
        lags = [0.0]
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.25):
                lags.append(engine.stats().online[model].lag_max)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        busy = engine.stats().busy_seconds
        with Memory() as memory:
            wall = drive(clients, round(packet_seconds * rate), rate, seconds, paced)
        stop.set()
        watcher.join()
        stats = engine.stats()
    own = stats.online[model]
    seen = EngineView(
        own.latency,
        own.deadline_misses,
        own.chunks,
        sum(own.sizes.values()),
        stats.busy_seconds - busy,
        max(lags),
    )
    return report(streams, paced, wall, log, memory.values, normalizer, seen)


@dataclass(frozen=True)
class EngineView:
    """What the engine says of a run: latency and deadline misses of chunks, batches, work, audio behind."""

    latency: HistogramStats
    misses: int
    chunks: int
    steps: int
    busy_seconds: float
    lag_max: float


def report(
    streams: int,
    paced: bool,
    wall: float,
    log: Log,
    memory: Sequence[int],
    normalizer: str,
    engine: EngineView,
) -> Report:
    """All that was seen, in numbers."""
    normalize = get_normalizer(normalizer)
    pairs = [(normalize(said), normalize(heard)) for said, heard in log.pairs]
    rate = char_error_rate if normalizer == "zh" else word_error_rate
    errors = rate([said for said, _ in pairs], [heard for _, heard in pairs]) if pairs else None
    in_time = engine.misses <= MISSES_ALLOWED * max(engine.chunks, 1)
    return Report(
        streams=streams,
        paced=paced,
        seconds=wall,
        audio_seconds=log.audio,
        rtfx=log.audio / wall if wall else 0.0,
        utterances=len(log.finals),
        failed=len(log.failed),
        chunk_latency=tuple(engine.latency.quantile(q) for q in QUANTILES),
        final_latency=quantiles(log.finals),
        first_text=quantiles(log.firsts),
        chunks=engine.chunks,
        deadline_misses=engine.misses,
        busy=engine.busy_seconds / wall if wall else 0.0,
        batch_mean=engine.chunks / engine.steps if engine.steps else 0.0,
        lag_max=engine.lag_max,
        refused=log.refused,
        rss_start=memory[0],
        rss_peak=max(memory),
        rss_end=memory[-1],
        rss_series=thinned(memory),
        wer=errors.rate if errors else None,
        words=sum(len(said.split()) for said, _ in pairs),
        held=paced and not log.failed and not log.refused and in_time,
    )


def thinned(values: Sequence[int]) -> tuple[int, ...]:
    """Every n-th value, so that at most ``SERIES`` are left."""
    return tuple(values[:: -(-len(values) // SERIES)])


def find_capacity(run: Callable[[int], Report], first: int, most: int, budget: float) -> list[Report]:
    """Look for the most streams that hold with a 95 % chunk latency of at most ``budget`` seconds.

    Doubles from ``first`` until a run fails, then halves the interval until it is a sixteenth of the number;
    where already ``first`` fails, goes down to 1.

    Returns:
        all runs, in their order; :func:`capacity` tells the number.
    """
    reports: list[Report] = []

    def good(streams: int) -> bool:
        reports.append(run(streams))
        return within(reports[-1], budget)

    low, high, n = 0, most + 1, min(first, most)
    while n < high and good(n):
        low, n = n, min(2 * n, most) if n < most else high
    high = min(n, high)
    while high - low > max(1, low // FINENESS):
        middle = (low + high) // 2
        if good(middle):
            low = middle
        else:
            high = middle
    return reports


def within(report: Report, budget: float) -> bool:
    """Whether a paced run held, with a 95 % chunk latency of at most ``budget`` seconds."""
    return report.held and report.chunk_latency[1] <= budget


def capacity(reports: Sequence[Report], budget: float) -> int:
    """Most streams of a run that was :func:`within` the budget; 0: none was."""
    return max((r.streams for r in reports if within(r, budget)), default=0)


def quantiles(values: Sequence[float]) -> tuple[float, float, float] | None:
    """p50, p95 and p99."""
    if not values:
        return None
    return tuple(float(q) for q in np.quantile(values, QUANTILES))


def lines(reports: Sequence[Report]) -> Iterator[str]:
    """A table for people; latencies in ms, those of chunks are upper bounds of a histogram's buckets."""
    names = [
        "streams",
        "held",
        "rtfx",
        "busy",
        "batch",
        *(f"{n}_p50/95/99" for n in ("chunk", "final", "first")),
    ]
    names += ["misses", "lag_s", "wer", "rss_MB"]
    rows = [names]
    for r in reports:
        rows.append(
            [
                str(r.streams),
                ("yes" if r.held else "no") if r.paced else "-",
                f"{r.rtfx:.1f}",
                f"{100 * r.busy:.0f}%",
                f"{r.batch_mean:.1f}",
                *(ms(values) for values in (r.chunk_latency, r.final_latency, r.first_text)),
                f"{r.deadline_misses}/{r.chunks}",
                f"{r.lag_max:.2f}",
                "-" if r.wer is None else f"{100 * r.wer:.2f}%",
                f"{r.rss_start >> 20}/{r.rss_peak >> 20}/{r.rss_end >> 20}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def ms(values: tuple[float, float, float] | None) -> str:
    """Such as ``12/35/80``."""
    return "-" if values is None else "/".join(f"{1000 * v:.0f}" for v in values)
