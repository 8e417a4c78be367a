"""Hours of mixed load on one engine: does everybody get his results, does the memory stay flat?

``python -m benchmarks.soak --seconds 1800`` runs the toy network; :func:`soak` takes any engine. Clients open
sessions and behave as clients do: most feed and finish, some commit, give up half-way, go silent, flood, send
garbage, are poisoned, or move. Beside them whole segments go to a batch model.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nar_speech.engine import Closed, Engine, EngineOptions, Event, Failed, SessionOptions
from nar_speech.errors import AudioError, BackPressure, EngineBusy, SessionClosed

MEGABYTE = 1 << 20
SETTLING = 0.2  # share of the time before memory is compared
BEHAVIOURS = {
    "finish": 6,  # feed everything, finish
    "commit": 4,  # end utterances on the way
    "move": 2,  # through a snapshot, mid-sentence
    "cancel": 2,  # give up half-way
    "vanish": 1,  # feed no more and never finish: evicted
    "flood": 1,  # feed as fast as it goes, against back-pressure
    "garbage": 1,  # NaN, wrong shapes and types, then go on
    "poison": 1,  # make the model fail
    "raise": 1,  # on_event raises
}

Check = Callable[[np.ndarray, Sequence[int], list[Event]], bool]


@dataclass
class SoakReport:
    """What came of it.

    Attributes:
        ends: sessions by behaviour and reason of their end.
        wrong: sessions whose events ``check`` did not accept, or that ended for another reason than theirs.
        errors: what clients met that they should not have.
        memory: (seconds, bytes) resident set, once a second.
        offline: segments recognised.
    """

    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    offline: int = 0

    @property
    def growth(self) -> float:
        """Share by which memory grew from after settling to the end, medians of a tenth of the time each."""
        later = [size for at, size in self.memory if at >= SETTLING * self.seconds]
        tenth = max(len(self.memory) // 10, 1)
        if len(later) < 2 * tenth:
            return 0.0
        return statistics.median(later[-tenth:]) / statistics.median(later[:tenth]) - 1.0

    def __str__(self) -> str:
        lines = [f"{self.seconds:.0f} s, {sum(self.ends.values())} sessions, {self.offline} whole segments"]
        lines += [f"  {name}: {count}" for name, count in sorted(self.ends.items())]
        if self.memory:
            first, last = self.memory[0][1] / MEGABYTE, self.memory[-1][1] / MEGABYTE
            lines.append(f"memory {first:.1f} -> {last:.1f} MB, growth after settling {self.growth:+.2%}")
        lines += [f"WRONG {line}" for line in self.wrong[:10]] + [
            f"ERROR {line}" for line in self.errors[:10]
        ]
        return "\n".join(lines)


def resident_bytes() -> int:
    """Memory of this process (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Client:
    """One session after the other, until told to stop."""

    def __init__(self, soak: Soak, number: int):
        self.soak, self.random = soak, random.Random(f"{soak.seed}-{number}")
        self.numbers = np.random.default_rng([soak.seed, number])

    def run(self) -> None:
        while not self.soak.over.is_set():
            behaviour = self.random.choices(list(BEHAVIOURS), list(BEHAVIOURS.values()))[0]
            if behaviour == "poison" and self.soak.poison is None:
                continue
            try:
                self.session(behaviour)
            except EngineBusy:
                time.sleep(0.05)
            except Exception as error:
                self.soak.report.errors.append(f"{behaviour}: {type(error).__name__}: {error}")

    def session(self, behaviour: str) -> None:
        """Open a session, behave, and see how it ends."""
        soak, events, done = self.soak, [], threading.Event()

        def on_event(event: Event) -> None:
            events.append(event)
            if isinstance(event, Closed) and event.reason != "moved":
                done.set()
            if behaviour == "raise":
                raise RuntimeError("a client's error")

        audio, marks = soak.audio(self.numbers), []
        if behaviour == "poison":
            audio = soak.poison(audio)
        limits = {"idle": 1.0} if behaviour == "vanish" else {"backlog": 0.5} if behaviour == "flood" else {}
        session = soak.engine.open(soak.online, SessionOptions(**limits), on_event)
        try:
            session = self.feed(behaviour, session, audio, marks, on_event)
        except SessionClosed:
            if behaviour not in ("poison", "raise", "vanish"):
                raise
        if not done.wait(soak.patience):
            soak.report.errors.append(f"{behaviour}: no end after {soak.patience} s")
            return
        self.judge(behaviour, audio, marks, events)

    def feed(self, behaviour: str, session: Any, audio: np.ndarray, marks: list[int], on_event: Any) -> Any:
        """Feed in pieces, at ``pace`` times the speed of speech."""
        soak = self.soak
        stop = self.random.uniform(0.2, 0.8) * len(audio) if behaviour in ("cancel", "vanish") else len(audio)
        place = 0
        while place < stop:
            size = self.random.choice((160, 320, 1600, 4000))
            piece = audio[place : min(place + size, int(stop) + 1)]
            try:
                session.feed(piece, timeout=0.0 if behaviour == "flood" else soak.patience)
            except BackPressure:
                time.sleep(0.002)
                continue
            place += len(piece)
            if behaviour == "commit" and self.random.random() < 0.3:
                session.commit()
                marks.append(place)
            if behaviour == "move" and self.random.random() < 0.2:
                session = soak.engine.resume(soak.engine.snapshot(session).to_bytes(), on_event)
            if behaviour == "garbage":
                self.send_garbage(session)
            if behaviour != "flood":
                time.sleep(len(piece) / session.sample_rate / soak.pace)
        if behaviour == "cancel":
            session.cancel()
        elif behaviour != "vanish":
            session.finish()
        return session

    def send_garbage(self, session: Any) -> None:
        for garbage in (np.array([np.nan], np.float32), np.zeros((2, 2), np.float32), np.zeros(3, np.int16)):
            try:
                session.feed(garbage)
            except AudioError:
                continue  # as it should be
            self.soak.report.errors.append("garbage was taken")

    def judge(self, behaviour: str, audio: np.ndarray, marks: list[int], events: list[Event]) -> None:
        soak = self.soak
        wanted = {"cancel": ("cancelled",), "vanish": ("idle",), "poison": ("failed",)}
        wanted["raise"] = ("failed", "finished")  # where all was heard before the client got its first event
        reason = events[-1].reason
        soak.report.ends[f"{behaviour} {reason}"] += 1
        if reason not in wanted.get(behaviour, ("finished",)):
            failed = [event.message for event in events if isinstance(event, Failed)]
            soak.report.wrong.append(f"{behaviour} ended {reason} {failed}")
        elif reason == "finished" and behaviour != "raise" and soak.check is not None:
            said = [event for event in events if not isinstance(event, Closed)]
            if not soak.check(audio, marks, said):
                soak.report.wrong.append(f"{behaviour}: other results than alone")


@dataclass
class Soak:
    """A load, see :func:`soak`."""

    engine: Engine
    online: str
    audio: Callable[[np.random.Generator], np.ndarray]
    offline: str | None = None
    clients: int = 8
    pace: float = 4.0
    check: Check | None = None
    poison: Callable[[np.ndarray], np.ndarray] | None = None
    seed: int = 0
    patience: float = 120.0
    report: SoakReport = field(default_factory=SoakReport)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, seconds: float) -> SoakReport:
        """Bear it for ``seconds``."""
        clients = [_Client(self, number) for number in range(self.clients)]
        targets = [client.run for client in clients] + ([self._submit] if self.offline else [])
        threads = [threading.Thread(target=target, daemon=True) for target in targets]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        while (at := time.monotonic() - begun) < seconds:
            self.report.memory.append((at, resident_bytes()))
            time.sleep(min(1.0, max(seconds - at, 0.01)))
        self.over.set()
        for thread in threads:
            thread.join(self.patience + 30.0)
        self.report.memory.append((time.monotonic() - begun, resident_bytes()))
        self.report.seconds = time.monotonic() - begun
        return self.report

    def _submit(self) -> None:
        numbers = np.random.default_rng(self.seed + 1)
        while not self.over.is_set():
            jobs = [self.engine.submit(self.offline, self.audio(numbers), {}) for _ in range(4)]
            for job in jobs:
                job.result(self.patience)
                self.report.offline += 1
            time.sleep(0.05)


def soak(engine: Engine, online: str, seconds: float, **options: Any) -> SoakReport:
    """Put a started engine under load.

    Args:
        online: name of its stream model.
        options: ``audio`` (random generator -> samples of one session), ``offline`` (name of a batch model),
            ``clients``, ``pace`` (times the speed of speech), ``check`` (audio, commits, events -> whether
            they are right), ``poison`` (samples -> samples that make the model fail), ``seed``,
            ``patience`` (seconds a client waits for anything).
    """
    return Soak(engine, online, **options).run(seconds)


def toy_audio(numbers: np.random.Generator) -> np.ndarray:
    """Noise of 0.1 to 2 s."""
    return (numbers.standard_normal(int(numbers.integers(1600, 32_000))) * 0.1).astype(np.float32)


def toy_poison(audio: np.ndarray) -> np.ndarray:
    """Too loud in the middle: half of them make the toy raise, the others NaN."""
    from benchmarks.toy_models import ERROR_LEVEL, NAN_LEVEL

    audio = audio.copy()
    audio[len(audio) // 2] = (ERROR_LEVEL if len(audio) % 2 else NAN_LEVEL) + 1.0
    return audio


def main() -> None:
    """The toy network under load, a report, exit code 1 if anything was wrong."""
    from benchmarks.toy_models import ToyBatch, ToyStream

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pace", type=float, default=4.0)
    args = parser.parse_args()
    models = {"toy": ToyStream(chunk=1600), "batch": ToyBatch()}
    with Engine(models, EngineOptions(max_sessions=args.clients)) as engine:
        report = soak(
            engine,
            "toy",
            args.seconds,
            audio=toy_audio,
            offline="batch",
            clients=args.clients,
            pace=args.pace,
            poison=toy_poison,
        )
        stats = engine.stats()
    print(report)
    print(stats.online["toy"])
    if report.wrong or report.errors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
