"""MaskGCT's three networks with random weights of full size: ours against the official algorithm.

    python -m benchmarks.maskgct                              # 10 s of speech: ten minutes on two free cores
    python -m benchmarks.maskgct --layers 4 --threads 1       # a quarter of the blocks
    python -m benchmarks.maskgct --device cuda --dtypes float32 bfloat16

One utterance with the default rules: 25 steps for semantic codes, 25 for the first acoustic layer, 10 for the
second and 1 for each of the others, guidance 2.5. Ours runs all of them; of the official algorithm a few
steps of each network are timed, and the utterance is their medians times the numbers of steps. It is what its
description says (benchmarks/maskgct_official.py): float32, attention with a mask made by hand, two passes one
after the other, nothing kept from step to step. On a machine that is not idle trust the CPU seconds and their
ratios. What the float32 row leaves out changes no result: nar_speech/models/maskgct_predictor.py.
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
from torch import Tensor

from benchmarks import maskgct_official as official
from benchmarks.asr.timing import load, machine, medians, timed
from benchmarks.magnet import synchronised
from nar_speech.checkpoint import SkipInit
from nar_speech.models.maskgct import (
    FRAME_RATE,
    S2A,
    T2S,
    MaskedNetwork,
    S2AConfig,
    S2AItem,
    T2SConfig,
    T2SItem,
)
from nar_speech.pipelines.maskgct_stages import (
    ALL_LAYERS,
    FIRST_LAYER,
    SEMANTIC,
    StageOptions,
    sample_layers,
    sample_semantic,
)

SIZES = {"full": ({}, {}), "tiny": ({"width": 32, "heads": 2, "num_blocks": 2},) * 2}
OFFICIAL = "official algorithm"


@dataclass(frozen=True)
class Speech:
    """What is spoken: numbers of frames and phones."""

    target: int
    prompt: int
    phones: int


@dataclass(frozen=True)
class Row:
    """Seconds of one network for an utterance."""

    network: str
    system: str
    dtype: str
    steps: int
    cpu: float
    wall: float


@dataclass(frozen=True)
class Stage:
    """A network with inputs; ``official`` runs one step of it, ``ours`` all of them."""

    name: str
    network: MaskedNetwork
    steps: int
    official: Callable[[MaskedNetwork], object]
    ours: Callable[[MaskedNetwork], object]


def random_network(cls: type, config: T2SConfig | S2AConfig) -> MaskedNetwork:
    """Weights with the spread of a trained network's, drawn fast; gains near 1."""
    with SkipInit():
        network = cls(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.uniform_(-1, 1, generator=generator).mul_((3 / parameter.shape[1]) ** 0.5)
        else:
            parameter.fill_(float(name.endswith("to_weight.bias")))
    return network


def _codes(size: int, *shape: int) -> Tensor:
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(0))


def _middle(logits: Callable, frames: int, options: StageOptions, device: torch.device) -> object:
    """A step with half of the positions masked, neither the first nor the last."""
    mask = torch.arange(frames, device=device)[None] % 2 == 0
    seq = torch.zeros(1, frames, dtype=torch.int64, device=device)
    uniform = partial(torch.rand, device=device)
    numbers = 12, 25, options.temperature, options.filter_threshold
    return official.step(logits, seq, mask, *numbers, uniform)


def semantic_stage(speech: Speech, numbers: dict) -> Stage:
    """Phones to semantic codes."""
    network = random_network(T2S, T2SConfig(**numbers))
    item = T2SItem(_codes(363, speech.phones), _codes(network.mask_id, speech.prompt))

    def step(network: T2S) -> object:
        place = network.device
        parts = item.phones[None].to(place), item.prompt[None].to(place)
        logits = official.t2s_logits(network, *parts, SEMANTIC.cfg, SEMANTIC.rescale)
        return _middle(logits, speech.target, SEMANTIC, place)

    def run(network: T2S) -> object:
        draws = [torch.Generator(network.device).manual_seed(0)]
        return sample_semantic(network, [item], [speech.target], draws)

    return Stage("T2S", network, SEMANTIC.steps[0], step, run)


def acoustic_stage(speech: Speech, numbers: dict, layers: int) -> Stage:
    """Semantic codes to the first layer of acoustic ones, or to the others."""
    network = random_network(S2A, S2AConfig(**numbers, num_codebooks=layers))
    config, first = network.config, layers == 1
    options = FIRST_LAYER if first else ALL_LAYERS
    item = S2AItem(
        _codes(config.semantic_size, speech.prompt + speech.target),
        _codes(config.codebook_size, speech.prompt, layers),
    )
    given = None if first else [_codes(config.codebook_size, 1, speech.target)]

    def step(network: S2A) -> object:
        place = network.device
        known = _codes(config.codebook_size, 1, 0 if first else 1, speech.target).to(place)
        parts = item.semantic[None].to(place), item.prompt[None].to(place), known
        logits = official.s2a_logits(network, *parts, options.cfg, options.rescale)
        return _middle(logits, speech.target, options, place)

    def run(network: S2A) -> object:
        draws = [torch.Generator(network.device).manual_seed(0)]
        return sample_layers(network, [item], draws, options, given=given)

    steps = options.steps[0] if first else options.steps[1] + options.steps[2] * (layers - 2)
    return Stage("S2A, first layer" if first else f"S2A, layers 2 to {layers}", network, steps, step, run)


@torch.inference_mode()
def rows_of(stage: Stage, dtypes: Sequence[str], repeats: int, clips: int, device: str) -> list[Row]:
    """The official algorithm and ours in each dtype."""
    network = stage.network.to(device)
    step = synchronised(device, partial(stage.official, network))
    step()
    cpu, wall = medians([timed(step)[1:] for _ in range(repeats)])
    rows = [Row(stage.name, OFFICIAL, "float32", stage.steps, cpu * stage.steps, wall * stage.steps)]
    print(rows[-1], file=sys.stderr)
    for dtype in dtypes:
        ready = copy.deepcopy(network).prepare(dtype)
        run = synchronised(device, partial(stage.ours, ready))
        if device == "cuda":
            run()
        cpu, wall = medians([timed(run)[1:] for _ in range(clips)])
        rows.append(Row(stage.name, "nar_speech", dtype, stage.steps, cpu, wall))
        print(rows[-1], file=sys.stderr)
        del ready, run
    return rows


def totals(rows: Sequence[Row]) -> list[Row]:
    """The sums over the networks, in the order of the rows."""
    kinds = dict.fromkeys((row.system, row.dtype) for row in rows)
    alike = {kind: [row for row in rows if (row.system, row.dtype) == kind] for kind in kinds}
    return [
        Row("all", *kind, *(sum(getattr(row, name) for row in part) for name in ("steps", "cpu", "wall")))
        for kind, part in alike.items()
    ]


def table(rows: Sequence[Row], seconds: float) -> str:
    """Markdown; ratios against the official algorithm of the same network."""
    lines = [
        "| network | system | dtype | steps | CPU s a step | CPU s | wall s | times faster (CPU, wall) |"
        " s per second of speech |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = {row.network: row for row in rows if row.system == OFFICIAL}
    for row in rows:
        base = first[row.network]
        lines.append(
            f"| {row.network} | {row.system} | {row.dtype} | {row.steps} | {row.cpu / row.steps:.3f} |"
            f" {row.cpu:.1f} | {row.wall:.1f} | {base.cpu / row.cpu:.2f}, {base.wall / row.wall:.2f} |"
            f" {row.wall / seconds:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--layers", type=int, help="blocks, where fewer than the model's will do")
    parser.add_argument("--seconds", type=float, default=10.0, help="of speech that is made")
    parser.add_argument("--prompt", type=float, default=3.0, help="seconds of the prompt")
    parser.add_argument("--phones", type=int, default=200, help="of prompt and target")
    parser.add_argument("--codebooks", type=int, default=12, help="acoustic layers")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--repeats", type=int, default=3, help="timed official steps of each network")
    parser.add_argument("--clips", type=int, default=1, help="timed runs of ours")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    frames = (max(1, round(seconds * FRAME_RATE)) for seconds in (options.seconds, options.prompt))
    speech = Speech(*frames, options.phones)
    semantic, acoustic = (dict(numbers) for numbers in SIZES[options.size])
    for numbers in (semantic, acoustic):
        if options.layers:
            numbers["num_blocks"] = options.layers
    print(f"{machine(['torch', 'nar-speech'])}; {options.threads} threads, load {load()}", file=sys.stderr)
    builders = (
        partial(semantic_stage, speech, semantic),
        partial(acoustic_stage, speech, acoustic, 1),
        partial(acoustic_stage, speech, acoustic, max(2, options.codebooks)),
    )
    rows: list[Row] = []
    for build in builders:  # one network in memory at a time
        rows += rows_of(build(), options.dtypes, options.repeats, options.clips, options.device)
    rows += totals(rows)
    print(table(rows, options.seconds))
    if options.json:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
