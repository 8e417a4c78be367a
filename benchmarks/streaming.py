"""CPU time of streaming recognition, all systems in turns in one run.

    python -m benchmarks.streaming --official FUNASR_CHECKOUT --model NAME --rivals-python RIVALS/bin/python

Two comparisons, on real audio. Paraformer-online of full size with the same random weights: ours in float32,
bfloat16 and int8, one stream alone and 16 streams through the engine, against FunASR's PyTorch code, for each
chunk of 600 ms. And a streaming model of ours against faster-whisper (tiny.en, int8), which hears the last
three seconds again at every update. Times are those of the process, so other work on the machine counts only
through what it takes from memory and caches. See benchmarks/README.md for what the others need.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.asr import timing
from benchmarks.asr.embedded import Clip, Rival, read_clips
from benchmarks.asr.online import Alone, Engined, Official, RandomOnline, Redecoding, Work
from benchmarks.asr.random_model import SIZES
from nar_speech.audio import read_audio
from nar_speech.errors import NarSpeechError
from nar_speech.locate import ASSETS

DTYPES = ("float32", "bfloat16", "int8")
WHISPER = "faster-whisper greedy"

System = Callable[[Clip], Work]


@dataclass(frozen=True)
class Row:
    """One system: medians over the turns.

    cpu_ms, wall_ms: for an update of a stream. per_second: CPU seconds for a second of audio. ratio: how many
    times less that is than the reference's. same: share of the characters of the reference's texts that it
    has at the same place, None where that means nothing.
    """

    system: str
    cpu_ms: float
    wall_ms: float
    updates: int
    per_second: float
    ratio: float | None
    same: float | None


def measure(systems: Sequence[Any], clips: Sequence[Clip], repeats: int) -> list[list[list[Work]]]:
    """works[system][repeat][clip]; at every clip all take their turn. One clip beforehand is not counted."""
    for system in systems:
        system(clips[0])
    works: list[list[list[Work]]] = [[[] for _ in range(repeats)] for _ in systems]
    for repeat in range(repeats):
        for clip in clips:
            for system, own in zip(systems, works, strict=True):
                own[repeat].append(system(clip))
    return works


def summarize(
    names: Sequence[str],
    works: Sequence[Sequence[Sequence[Work]]],
    seconds: float,
    streams: Sequence[int],
    reference: str | None,
    texts: bool,
) -> list[Row]:
    """Rows of the table.

    Args:
        seconds: of audio that one stream hears in a repeat.
        streams: of each system.
        reference: name of the system that ratios are taken to; None, or not among ``names``: no ratios.
        texts: compare texts with the reference's too.
    """

    def median(own: Sequence[Sequence[Work]], field: str) -> float:
        return statistics.median(sum(getattr(w, field) for w in turn) for turn in own)

    place = names.index(reference) if reference in names else None
    base = None if place is None else median(works[place], "cpu") / streams[place]
    rows = []
    for name, own, count in zip(names, works, streams, strict=True):
        updates = sum(work.updates for work in own[0])
        cpu, wall = median(own, "cpu"), median(own, "wall")
        rows.append(
            Row(
                name,
                1000 * cpu / updates,
                1000 * wall / updates,
                updates,
                cpu / (seconds * count),
                None if base is None else base / (cpu / count),
                None if place is None or not texts else same_share(works[place][0], own[0]),
            )
        )
    return rows


def same_share(reference: Sequence[Work], other: Sequence[Work]) -> float:
    """Characters of the other's texts that the reference has at the same place, of the longer text's."""
    total = sum(max(len(a.text), len(b.text)) for a, b in zip(reference, other, strict=True))
    same = sum(
        x == y for a, b in zip(reference, other, strict=True) for x, y in zip(a.text, b.text, strict=False)
    )
    return same / total if total else 1.0


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        ["system", "CPU ms per update", "wall ms", "CPU-s per s of audio", "times less CPU", "same text"]
    ]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        lines.append(
            [
                row.system,
                f"{row.cpu_ms:.1f}",
                f"{row.wall_ms:.1f}",
                f"{row.per_second:.4f}",
                "" if row.ratio is None else f"{row.ratio:.2f}x",
                "" if row.same is None else f"{100 * row.same:.0f} %",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paraformer(options: argparse.Namespace, clips: Sequence[Clip], folder: Path) -> list[Row]:
    """The first comparison."""
    random = RandomOnline(folder, SIZES[options.size])
    systems: list[Any] = []
    skipped = []
    if not options.no_official:
        try:
            systems.append(Official(random, options.official))
        except ImportError as error:
            skipped.append(f"FunASR: skipped, {error}; see benchmarks/README.md")
    for dtype in options.dtypes:
        model = random.ours(dtype)
        systems.append(Alone(f"ours {dtype}, 1 stream", model))
        if options.streams > 1:
            name = f"ours {dtype}, {options.streams} streams, engine"
            systems.append(Engined(name, model, options.streams))
    return run(systems, clips, options.repeats, Official.name, skipped, texts=True)


def redecoding(options: argparse.Namespace, clips: Sequence[Clip], folder: Path) -> list[Row]:
    """The second one."""
    from nar_speech.server.models import load_stream_model

    systems: list[Any] = []
    skipped, every = [], None
    for dtype in options.model_dtypes:
        try:
            _, model, settings = load_stream_model(options.model, "cpu", dtype)
        except NarSpeechError as error:
            skipped.append(f"{options.model} {dtype}: skipped, {error}")
            continue
        every = model.chunk / model.sample_rate
        name = f"{options.model} {dtype}, engine with VAD, {1000 * every:.0f} ms chunks"
        systems.append(Engined(name, model, settings=settings))
    reference = None
    if every is not None and options.rivals_python is not None:
        try:
            rival = Rival(WHISPER, options.rivals_python, torch.get_num_threads())
            systems.insert(0, Redecoding(rival, folder, options.every or every))
            reference = systems[0].name
        except NarSpeechError as error:
            skipped.append(f"{WHISPER}: skipped, {error}; see benchmarks/README.md")
    return run(systems, clips, options.repeats, reference, skipped, texts=False)


def run(
    systems: Sequence[Any],
    clips: Sequence[Clip],
    repeats: int,
    reference: str | None,
    skipped: Sequence[str],
    texts: bool,
) -> list[Row]:
    """Measure, print, close."""
    try:
        works = measure(systems, clips, repeats) if systems else []
    finally:
        for system in systems:
            if hasattr(system, "close"):
                system.close()
    streams = [getattr(system, "streams", 1) for system in systems]
    seconds = sum(clip.seconds for clip in clips)
    rows = summarize([s.name for s in systems], works, seconds, streams, reference, texts)
    print(table(rows), flush=True)
    for line in skipped:
        print(f"\n{line}")
    print()
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clips", type=Path, nargs="+", help="manifests of 16 kHz clips (default: our sample)"
    )
    parser.add_argument("--every", type=float, help="seconds between Whisper's updates (default: our chunk)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    first = parser.add_argument_group("Paraformer-online with random weights")
    first.add_argument("--no-paraformer", action="store_true", help="leave this comparison out")
    first.add_argument("--official", type=Path, help="checkout of modelscope/FunASR (default: the package)")
    first.add_argument("--no-official", action="store_true", help="ours alone")
    first.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    first.add_argument("--streams", type=int, default=16, help="through the engine; 1: no engine")
    first.add_argument("--size", default="large", choices=sorted(SIZES))
    second = parser.add_argument_group("against Whisper")
    second.add_argument("--model", help="a streaming model of ours; without it this comparison is left out")
    second.add_argument("--model-dtypes", nargs="+", default=("float32", "bfloat16"), choices=DTYPES)
    second.add_argument("--rivals-python", type=Path, help="interpreter that has faster-whisper")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both comparisons."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.clips:
        clips = read_clips(options.clips)
    else:
        samples = read_audio(ASSETS / "sample.flac", 16000).samples
        clips = [Clip(str(ASSETS / "sample.flac"), (ASSETS / "sample.txt").read_text().strip(), samples)]
    print(
        f"{len(clips)} clips, {sum(c.seconds for c in clips):.0f} s, {options.threads} thread(s), medians of"
        f" {options.repeats} in turns; {timing.machine(['torch', 'funasr'])}; load {timing.load()}\n"
    )
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if not options.no_paraformer:
            rows["paraformer"] = paraformer(options, clips, Path(folder))
        if options.model is not None:
            rows["whisper"] = redecoding(options, clips, Path(folder))
    print(f"load at the end {timing.load()}")
    if options.json:
        options.json.write_text(json.dumps({k: [asdict(r) for r in v] for k, v in rows.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
