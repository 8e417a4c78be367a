"""MAGNeT and MusicGen with random weights of full size: ours against the official algorithm.

    python -m benchmarks.magnet                           # magnet-small, 10 s: ten minutes on two free cores
    python -m benchmarks.magnet --layers 6 --threads 1    # a quarter of the blocks
    python -m benchmarks.magnet --device cuda --dtypes float32 bfloat16

One clip with the default rules (20, 10, 10, 10 steps, guidance 10 to 1, top-p 0.9). Ours runs all of its
steps; of the official algorithm a few steps of every kind are timed, and the clip is their medians times the
numbers of steps. On a machine that is not idle trust the CPU seconds and their ratios. What the exact rows
leave out changes no result: docs/magnet.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import magnet_official
from benchmarks.asr.timing import load, machine, medians, timed
from nar_speech.checkpoint import SkipInit
from nar_speech.models.magnet import Magnet, MagnetConfig
from nar_speech.models.magnet_predictor import predictor
from nar_speech.models.musicgen import MusicGen, MusicGenConfig
from nar_speech.sampling.codebooks import CodebookConfig, sample_codebooks

SIZES = {"small": (1024, 16, 24), "medium": (1536, 24, 48), "tiny": (32, 2, 2)}
TEXT = 12  # tokens of the prompt
STEPS = (20, 10, 10, 10)


@dataclass(frozen=True)
class Row:
    """Seconds of a clip, or of a step of MusicGen times its steps."""

    system: str
    dtype: str
    exact: bool
    cpu: float
    wall: float


def random_network(cls: type, config: MagnetConfig | MusicGenConfig, seed: int = 0) -> nn.Module:
    """Weights with the spread of the initialisation, drawn fast."""
    with SkipInit():
        network = cls(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.uniform_(-1, 1, generator=generator).mul_((3 / parameter.shape[1]) ** 0.5)
        else:
            parameter.fill_(float(name.endswith("weight")))  # norms
    return network


def synchronised(device: str, function: Callable[[], object]) -> Callable[[], object]:
    """``function``, and the wait for what it started on a GPU."""

    def run() -> object:
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


@torch.inference_mode()
def official_clip(network: Magnet, frames: int, dtype: torch.dtype, repeats: int, device: str) -> Row:
    """The official algorithm: medians of a few steps of the first stage and of a later one."""
    network = copy.deepcopy(network).to(device, dtype)
    network.codes = network.codes.float()
    frames = frames // network.config.span_len * network.config.span_len
    text = torch.zeros(2, TEXT, network.config.width, device=device, dtype=dtype)
    text[0].normal_()
    tokens = torch.full((1, network.config.num_codebooks, frames), network.config.mask_id, device=device)
    steps = {}
    for stage in (0, 1):
        step = synchronised(
            device, lambda s=stage: magnet_official.magnet_step(network, tokens, text, s, 5.0, 1.5)
        )
        step()
        steps[stage] = medians([timed(step)[1:] for _ in range(repeats)])
    counts = STEPS[0], sum(STEPS[1:])
    cpu, wall = (sum(n * steps[s][i] for s, n in enumerate(counts)) for i in range(2))
    return Row("official algorithm", str(dtype).removeprefix("torch."), True, cpu, wall)


@torch.inference_mode()
def our_clip(network: Magnet, frames: int, dtype: str, repeats: int, device: str, reuse: int = 0) -> Row:
    """Ours: whole clips through the sampling loop."""
    network = copy.deepcopy(network).to(device).prepare(dtype)
    config = network.config
    states = torch.randn(1, TEXT, config.text_width, generator=torch.Generator().manual_seed(1))
    codes = torch.zeros(1, config.num_codebooks, frames, dtype=torch.int64, device=device)
    fixed = torch.zeros(1, frames, dtype=torch.bool, device=device)
    lengths = torch.tensor([frames], device=device)

    def clip() -> Tensor:
        predict = predictor(network, states, torch.ones(1, TEXT, dtype=torch.bool), reuse=reuse)
        generators = [torch.Generator(device).manual_seed(0)]
        options = CodebookConfig(STEPS)
        return sample_codebooks(
            predict, codes, fixed, lengths, options, generators, mask_id=config.mask_id
        ).tokens

    if device == "cuda":
        clip()
    cpu, wall = medians([timed(synchronised(device, clip))[1:] for _ in range(repeats)])
    system = f"nar_speech, reuse {reuse}" if reuse else "nar_speech"
    return Row(system, dtype, dtype == "float32" and not reuse, cpu, wall)


@torch.inference_mode()
def musicgen_rows(
    network: MusicGen, frames: int, dtypes: Sequence[str], repeats: int, device: str, cached: int = 200
) -> list[Row]:
    """Seconds of a clip's autoregressive steps, by the median of a step with ``cached`` positions."""
    config = network.config
    count = frames + config.num_codebooks - 1
    tokens = torch.zeros(2, config.num_codebooks, 1, dtype=torch.int64, device=device)
    rows = []
    plain = copy.deepcopy(network).to(device)
    text = torch.zeros(2, TEXT, config.width, device=device)
    text[0].normal_()
    shape = (2, config.heads, cached, config.width // config.heads)
    cache = [(torch.randn(shape, device=device), torch.randn(shape, device=device)) for _ in plain.blocks]
    step = synchronised(device, partial(magnet_official.musicgen_step, plain, tokens, text, cache))
    step()
    cpu, wall = medians([timed(step)[1:] for _ in range(repeats)])
    rows.append(Row("MusicGen, official algorithm", "float32", True, cpu * count, wall * count))
    del plain, cache, step
    states = torch.randn(1, TEXT, config.text_width)
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    for dtype in dtypes:
        ready = copy.deepcopy(network).to(device).prepare(dtype)
        sampler = ready.sampler(states.to(device), mask.to(device), room=cached + repeats + 8)
        sampler(tokens[:1].expand(-1, -1, cached))
        step = synchronised(device, lambda s=sampler: s(tokens[:1]))
        step()
        cpu, wall = medians([timed(step)[1:] for _ in range(repeats)])
        rows.append(Row("MusicGen, nar_speech", dtype, dtype == "float32", cpu * count, wall * count))
    return rows


def table(rows: Sequence[Row], seconds: float) -> str:
    """Markdown; ratios against the first row."""
    lines = [
        "| system | dtype | exact | CPU s | wall s | times faster (CPU, wall) | s per second of sound |",
        "|---|---|---|---|---|---|---|",
    ]
    first = rows[0]
    for row in rows:
        ratio = f"{first.cpu / row.cpu:.2f}, {first.wall / row.wall:.2f}"
        lines.append(
            f"| {row.system} | {row.dtype} | {'yes' if row.exact else 'no'} | {row.cpu:.1f} |"
            f" {row.wall:.1f} | {ratio} | {row.wall / seconds:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--layers", type=int, help="blocks, where fewer than the model's will do")
    parser.add_argument("--seconds", type=float, default=10.0, help="of sound")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--reuse", type=int, nargs="*", default=[], help="also with key-value reuse")
    parser.add_argument("--repeats", type=int, default=3, help="timed official steps")
    parser.add_argument("--clips", type=int, default=1, help="timed clips of ours")
    parser.add_argument(
        "--official-bfloat16", action="store_true", help="the official algorithm in bfloat16 too"
    )
    parser.add_argument("--no-musicgen", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    width, heads, blocks = SIZES[options.size]
    numbers = {"width": width, "heads": heads, "num_blocks": options.layers or blocks}
    numbers["segment_seconds"] = options.seconds
    network = random_network(Magnet, MagnetConfig(**numbers))
    frames, device = network.config.max_frames, options.device
    print(f"{machine(['torch', 'nar-speech'])}; {options.threads} threads, load {load()}", file=sys.stderr)
    rows = [official_clip(network, frames, torch.float32, options.repeats, device)]
    print(rows[-1], file=sys.stderr)
    if options.official_bfloat16:
        rows.append(official_clip(network, frames, torch.bfloat16, options.repeats, device))
    for dtype in options.dtypes:
        for reuse in (0, *options.reuse):
            rows.append(our_clip(network, frames, dtype, options.clips, device, reuse))
            print(rows[-1], file=sys.stderr)
    print(table(rows, options.seconds))
    if not options.no_musicgen:
        del network
        partner = random_network(MusicGen, MusicGenConfig(**numbers))
        steps = musicgen_rows(partner, frames, options.dtypes, max(10, options.repeats), device)
        print(table(steps, options.seconds))
        last, partner = rows[-1], steps[-1]
        times = f"{partner.cpu / last.cpu:.2f} (CPU), {partner.wall / last.wall:.2f} (wall)"
        print(f"{last.system} {last.dtype} is {times} times as fast as {partner.system} {partner.dtype}")
        rows += steps
    if options.json:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
