"""Speed of offline Paraformer recognition on the CPU against the official FunASR package, same weights.

    python -m benchmarks.asr_offline [--threads 1 2] [--seconds 5 15 30] [--batch 8x15] [--repeats 5]
                                     [--dtypes float32 bfloat16 int8] [--size large|tiny] [--no-official]

Both sides load one official model folder with random weights, written for the run. In every repeat all
systems take their turn on the same input, so that other load on the machine meets all of them; medians are
reported. Stage "network": features to token ids; "text": samples to text (filter banks, network, text). RTF
is time per second of audio; "speed-up" is the official package's time divided by the system's.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from nar_speech import config as configs
from nar_speech.errors import InputError
from nar_speech.model_folder import DecodingConfig
from nar_speech.models.paraformer import EOS, Paraformer, build_paraformer
from nar_speech.models.paraformer_official import convert_config

RATE = 16000
OFFICIAL = "funasr"
CIF_BIAS = -1.0  # random weights then give about 4.5 tokens a second, as speech does


@dataclass(frozen=True)
class Size:
    """Numbers of the random model."""

    blocks: int
    width: int
    units: int
    decoder_blocks: int
    vocab: int


SIZES = {"large": Size(50, 512, 2048, 16, 8404), "tiny": Size(2, 64, 96, 2, 60)}


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


def write_folder(folder: Path, size: Size, seed: int = 0) -> Path:
    """An official FunASR model folder with random weights; no dither, so that results can be compared."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"output_size": size.width, "attention_heads": 4, "linear_units": size.units}
    tree = {
        "model": "Paraformer",
        "model_conf": {"ctc_weight": 0.0, "lsm_weight": 0.1, "predictor_bias": 1, "sampling_ratio": 0.75},
        "encoder": "SANMEncoder",
        "encoder_conf": {
            **shared,
            "num_blocks": size.blocks,
            "input_layer": "pe",
            "pos_enc_class": "SinusoidalPositionEncoder",
            "normalize_before": True,
            "kernel_size": 11,
            "sanm_shfit": 0,
            "selfattention_layer_type": "sanm",
        },
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": {
            "attention_heads": 4,
            "linear_units": size.units,
            "num_blocks": size.decoder_blocks,
            "att_layer_num": size.decoder_blocks,
            "kernel_size": 11,
            "sanm_shfit": 0,
        },
        "predictor": "CifPredictorV2",
        "predictor_conf": {
            "idim": size.width,
            "threshold": 1.0,
            "l_order": 1,
            "r_order": 1,
            "tail_threshold": 0.45,
        },
        "frontend": "WavFrontend",
        "frontend_conf": {
            "fs": RATE,
            "window": "hamming",
            "n_mels": 80,
            "frame_length": 25,
            "frame_shift": 10,
            "lfr_m": 7,
            "lfr_n": 6,
            "dither": 0.0,
            "cmvn_file": str(folder / "am.mvn"),
        },
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {
            "token_list": str(folder / "tokens.json"),
            "unk_symbol": "<unk>",
            "split_with_space": True,
        },
    }
    configs.write_yaml(tree, folder / "config.yaml")
    torch.manual_seed(seed)
    network = build_paraformer(convert_config(tree, 560, size.vocab))
    with torch.no_grad():
        network.predictor.cif_output.bias.fill_(CIF_BIAS)
    torch.save({"state_dict": network.state_dict()}, folder / "model.pt")
    pieces = ["<blank>", "<s>", "</s>", *(chr(0x4E00 + n) for n in range(size.vocab - 4)), "<unk>"]
    (folder / "tokens.json").write_text(json.dumps(pieces))
    parts = [
        f"<{name}> 560 560\n<LearnRateCoef> 0 [ {' '.join([value] * 560)} ]\n"
        for name, value in (("AddShift", "-8.0"), ("Rescale", "0.25"))
    ]
    (folder / "am.mvn").write_text(f"<Nnet>\n<Splice> 560 560\n[ 0 ]\n{''.join(parts)}</Nnet>\n")
    return folder


class Ours:
    """nar_speech in one dtype."""

    def __init__(self, folder: Path, dtype: str = "float32"):
        from nar_speech.pipelines.transcribe import Transcriber

        parts = Paraformer.from_official(folder)
        model = Transcriber(*parts, device="cpu", dtype=dtype)
        self.name, self.recognizer, self.tokenizer = f"nar_speech {dtype}", model.recognizer, parts.tokenizer

    def network(self, feats: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
        with torch.inference_mode():
            out = self.recognizer.network(feats.to(self.recognizer.dtype), lengths)
            return valid_ids(out.log_probs, out.token_lengths)

    def text(self, waves: Sequence[np.ndarray]) -> list[str]:
        found = self.recognizer(waves, DecodingConfig(), times=False)
        return [self.tokenizer.decode(item.ids) for item in found]


class Official:
    """The funasr package: its AutoModel, and the calls that its Paraformer.inference makes."""

    name = OFFICIAL

    def __init__(self, folder: Path):
        logging.disable(logging.INFO)
        from funasr import AutoModel

        self.auto = AutoModel(
            model=str(folder),
            device="cpu",
            ncpu=torch.get_num_threads(),
            disable_update=True,
            disable_pbar=True,
            log_level="ERROR",
        )
        self.model = self.auto.model

    def network(self, feats: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
        with torch.no_grad():  # as its AutoModel does
            # Its encoder scales the features in place: it gets a copy.
            encoded, encoded_lengths = self.model.encode(feats.clone(), lengths)[:2]
            embeds, counts = self.model.calc_predictor(encoded, encoded_lengths)[:2]
            counts = counts.round().long()
            scores = self.model.cal_decoder_with_predictor(encoded, encoded_lengths, embeds, counts)[0]
            return valid_ids(scores, counts)

    def text(self, waves: Sequence[np.ndarray]) -> list[str]:
        results = self.auto.generate(input=list(waves), batch_size=len(waves))
        return [result["text"] for result in results]


def valid_ids(scores: torch.Tensor, counts: torch.Tensor) -> list[list[int]]:
    """Best token at each valid position, special ids dropped."""
    rows = scores.argmax(-1).tolist()
    return [[i for i in row[:n] if i > EOS] for row, n in zip(rows, counts.tolist(), strict=True)]


def noise(seconds: float, seed: int) -> np.ndarray:
    """(N,) float32 at 16 kHz: noise whose loudness goes up and down as syllables do."""
    random = np.random.default_rng(seed)
    samples = round(seconds * RATE)
    loudness = 0.05 * (1.1 + np.sin(2 * np.pi * 4 * np.arange(samples) / RATE))
    return (random.standard_normal(samples) * loudness).astype(np.float32)


def timed(function: Callable[[], object]) -> tuple[object, float, float]:
    """Result, CPU seconds of the process, wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def same_share(rows: Sequence[Sequence], reference: Sequence[Sequence]) -> float:
    """Share of the reference's units that stand at the same place in the rows."""
    total = sum(max(len(a), len(b)) for a, b in zip(rows, reference, strict=True))
    same = sum(x == y for a, b in zip(rows, reference, strict=True) for x, y in zip(a, b, strict=False))
    return same / max(total, 1)


def measure(
    systems: Sequence[Ours | Official],
    stage: str,
    seconds: float,
    batch: int,
    threads: int,
    repeats: int,
) -> list[Row]:
    """Time all systems on one input, in turns; one untimed turn first."""
    torch.set_num_threads(threads)
    waves = [noise(seconds, seed) for seed in range(batch)]
    ours = next(s for s in systems if isinstance(s, Ours))
    if stage == "network":
        with torch.inference_mode():
            feats, lengths = ours.recognizer.frontend(
                torch.from_numpy(np.stack(waves)), torch.full((batch,), len(waves[0]))
            )
        feats, lengths = feats.clone(), lengths.clone()
        calls = {s.name: (lambda s=s: s.network(feats, lengths)) for s in systems}
    else:
        calls = {s.name: (lambda s=s: s.text(waves)) for s in systems}
    results = {name: call() for name, call in calls.items()}
    if torch.get_num_threads() != threads:
        raise RuntimeError(f"a system changed the number of threads from {threads}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            _, cpu, wall = timed(call)
            times[name].append((cpu, wall))
    medians = {n: [statistics.median(column) for column in zip(*t, strict=True)] for n, t in times.items()}
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


def machine() -> str:
    """CPU, versions and date of a run, one line."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").exists()
        else iter(()),
        platform.processor(),
    )
    packages = ["torch", *([OFFICIAL] if importlib.util.find_spec(OFFICIAL) else [])]
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{time.strftime('%Y-%m-%d')}, {model} ({capability}), Python {platform.python_version()}, {versions}"
    )


def build(name: str, folder: Path) -> Ours | Official:
    """The system ``name``: "funasr" or a dtype of ours."""
    return Official(folder) if name == OFFICIAL else Ours(folder, name)


def own_peak() -> int:
    """Most bytes this process held in memory. getrusage would count the parent's as well, after a vfork."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def peak_memory(name: str, folder: Path, seconds: float) -> int:
    """Bytes that one system, in a process of its own, holds at most: loading, and one input end to end."""
    words = ["--memory-of", name, "--folder", str(folder), "--seconds", str(seconds)]
    command = [sys.executable, "-m", "benchmarks.asr_offline", *words]
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed: {out.stderr.strip()[-500:]}")
    return int(out.stdout.split()[-1])


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="large")
    parser.add_argument("--seconds", type=float, nargs="+", default=[5.0, 15.0, 30.0])
    parser.add_argument("--batch", nargs="*", default=["8x15"], help="CLIPSxSECONDS, measured besides")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--stages", nargs="+", choices=["network", "text"], default=["network", "text"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-official", action="store_true", help="time ours only")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--folder", type=Path, help="keep the random model here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(words)


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
    """Measure everything that ``args`` asks for and print it."""
    inputs = read_inputs(args)
    if not (folder / "model.pt").exists():
        write_folder(folder, SIZES[args.size])
    gc.collect()
    names = list(args.dtypes)
    if not args.no_official:
        if importlib.util.find_spec(OFFICIAL) is None:
            print(
                f"{OFFICIAL} is not installed, so there is nothing to compare with: see benchmarks/README.md"
            )
        else:
            names.insert(0, OFFICIAL)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        # Built anew: at every call funasr goes back to the number of threads of its construction.
        systems = [build(name, folder) for name in names]
        for stage in args.stages:
            for seconds, batch in inputs:
                rows += measure(systems, stage, seconds, batch, threads, args.repeats)
                print(
                    f"{stage}, {batch} x {seconds:g} s, {threads} threads: done", file=sys.stderr, flush=True
                )
    print(f"{machine()}; {args.size} model, random weights, medians of {args.repeats} in turns\n")
    print(table(rows), flush=True)
    if not args.no_memory:
        longest = max(args.seconds)
        print(f"\nPeak resident memory of a process that loads the model and transcribes {longest:g} s:\n")
        for name in names:
            print(f"- {name}: {peak_memory(name, folder, longest) / 2**20:.0f} MiB", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    if args.memory_of:
        torch.set_num_threads(1)
        build(args.memory_of, args.folder).text([noise(args.seconds[0], 0)])
        print(own_peak())
        return 0
    try:
        if args.folder is not None:
            run(args, args.folder)
        else:
            with tempfile.TemporaryDirectory() as folder:
                run(args, Path(folder))
    except InputError as error:
        print(f"asr_offline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
