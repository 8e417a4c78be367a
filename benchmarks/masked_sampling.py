"""Quality against calls of the network, for every way of masked sampling with fewer or cheaper steps.

    python -m benchmarks.masked_sampling MODEL -o exp/masked_sampling [--prompts FILE] [--duration S]
        [--seeds N] [--scorer package.module:function] [--device cpu] [--quick]

MODEL is a folder or name of a model that ``nar-speech generate`` takes. Written are results.json, table.md,
curves.png and steps_<way>.png, one picture of the unmasking per way.

Per setting:

- ``calls`` and ``seconds`` a clip;
- ``cross_entropy``: of the clips' codes under the model itself, in nats: every third span is masked, and
  predicted from the others and from the codebooks before, three times until all have been. It says how well
  the codes fit together; low values also come from dull sounds, so look at ``entropy`` too;
- ``entropy``: of the codes in use, in bits, over all clips, mean of the codebooks;
- ``agreement``: share of codes equal to those of the reference (the longest plain schedule) with the same
  seeds;
- ``score``: mean of the scorer, a function (clips: list of Audio, prompts: list of str) -> list of numbers,
  for example the probability that a classifier of sounds gives the right class.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nar_speech.errors import ConfigError, InputError, NarSpeechError
from nar_speech.pipelines.generate import SoundGenerator, SoundResult
from nar_speech.pipelines.plot_steps import plot_steps
from nar_speech.pipelines.sound_model import resolve_sound
from nar_speech.types import Audio

Scorer = Callable[[list[Audio], list[str]], Sequence[float]]
PROMPTS = ("a dog barks", "rain", "slow piano music")
FULL = (20, 10, 10, 10)


@dataclass(frozen=True)
class Setting:
    """One point of a curve; ``way`` names the curve."""

    way: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Short, for tables."""
        parts = []
        for key, value in self.options.items():
            if key != "adaptive_level":
                parts.append(f"{key} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
        level = self.options.get("adaptive_level")
        return ", ".join(parts) + (f" {level:g}" if level is not None else "")


@dataclass
class Row:
    """Measured of one setting."""

    way: str
    setting: str
    calls: float
    seconds: float
    cross_entropy: float
    entropy: float
    agreement: float
    score: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def settings(quick: bool = False) -> list[Setting]:
    """All points; the first is the reference. ``quick``: one or two of each way."""
    schedules = [(40, 20, 20, 20), FULL, (10, 5, 5, 5), (6, 3, 3, 3), (4, 2, 2, 2), (2, 1, 1, 1)]
    found = [Setting("schedule", {"steps": steps}) for steps in schedules]
    found += [Setting("stride1", {"steps": s, "arrangement": "stride1"}) for s in (FULL, (10, 5, 5, 5))]
    found += [Setting("dilation", {"dilation": block}) for block in (64, 16, 4, 2)]
    levels = {"threshold": (0.9, 0.7, 0.5, 0.3), "factor": (0.5, 1.0, 2.0), "entropy": (1.0, 4.0, 16.0)}
    for kind, values in levels.items():
        options = [{"steps": FULL, "adaptive": kind, "adaptive_level": level} for level in values]
        found += [Setting(f"adaptive {kind}", option) for option in options]
    for steps in ((10, 5, 5, 5), (6, 3, 3, 3)):
        found.append(Setting("explore", {"steps": steps, "explore": 0.25}))
    found += [Setting("reuse", {"steps": FULL, "reuse": period}) for period in (2, 4, 8)]
    if quick:
        seen: dict[str, int] = {}
        kept = []
        for setting in found[1:]:
            seen[setting.way] = seen.get(setting.way, 0) + 1
            if seen[setting.way] <= 1:
                kept.append(setting)
        return kept
    return found


@torch.inference_mode()
def cross_entropy(generator: SoundGenerator, result: SoundResult) -> float:
    """Mean over all codes of a clip, in nats; see the module's docstring. Long clips: the first segment."""
    network = generator.network
    codes = result.codes.tokens[..., : network.config.max_frames].to(generator.device)
    span, mask_id = network.config.span_len, network.config.mask_id
    chunk = torch.arange(codes.shape[2], device=codes.device) // span
    states, mask = generator.conditioner([result.prompt or ""])
    total, count = 0.0, 0
    for stage in range(codes.shape[1]):
        for turn in range(3):
            hidden = chunk % 3 == turn
            if not bool(hidden.any()):
                continue
            given = codes.clone()
            given[:, stage + 1 :] = mask_id
            given[:, stage, hidden] = mask_id
            logits = network(given, None, states, mask, stage, only_stage=True).float()
            loss = F.cross_entropy(logits[0, hidden], codes[0, stage, hidden], reduction="sum")
            total, count = total + float(loss), count + int(hidden.sum())
    return total / max(count, 1)


def code_entropy(tokens: Sequence[Tensor], size: int) -> float:
    """Entropy in bits of the codes of all clips (K, T), mean of the codebooks."""
    joined = torch.cat(list(tokens), dim=1)
    found = []
    for row in joined:
        share = row.bincount(minlength=size).double() / row.numel()
        found.append(float(-torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(2.0))))
    return sum(found) / len(found)


def measure(
    generator: SoundGenerator,
    points: Sequence[Setting],
    prompts: Sequence[str],
    seeds: Sequence[int],
    duration: float,
    scorer: Scorer | None = None,
    folder: Path | None = None,
) -> list[Row]:
    """All settings on all prompts with all seeds; pictures of the first clip of each way go to ``folder``."""
    rows: list[Row] = []
    reference: list[Tensor] = []
    drawn: set[str] = set()
    texts = [prompt for prompt in prompts for _ in seeds]
    numbers = [seed for _ in prompts for seed in seeds]
    if not texts:
        raise InputError("nothing to measure: give at least one prompt and one seed")
    generator.conditioner(texts)  # which keeps them: no setting's time has the text encoder in it
    for point in points:
        draw = folder is not None and point.way not in drawn
        started = time.perf_counter()
        results = generator(texts, duration, numbers, trace=draw, **point.options)
        seconds = (time.perf_counter() - started) / len(results)
        tokens = [result.codes.tokens[0] for result in results]
        reference = reference or tokens
        same = [float((a == b).double().mean()) for a, b in zip(tokens, reference, strict=True)]
        scores = None
        if scorer is not None:
            scores = list(scorer([result.audio for result in results], texts))
        row = Row(
            way=point.way,
            setting=point.name,
            calls=sum(result.calls for result in results) / len(results),
            seconds=seconds,
            cross_entropy=sum(cross_entropy(generator, r) for r in results) / len(results),
            entropy=code_entropy(tokens, generator.network.config.codebook_size),
            agreement=sum(same) / len(same),
            score=None if scores is None else sum(map(float, scores)) / len(scores),
            options=point.options,
        )
        rows.append(row)
        print(line_of(row), file=sys.stderr)
        if draw:
            drawn.add(point.way)
            path = folder / f"steps_{point.way.replace(' ', '_')}.png"
            title = f"{point.way}: {point.name}; '{texts[0]}'"
            plot_steps(results[0].traces, path, generator.codec.frame_rate, title)
    return rows


def line_of(row: Row) -> str:
    """One row of the table."""
    score = "" if row.score is None else f" {row.score:.3f} |"
    return (
        f"| {row.way} | {row.setting} | {row.calls:.1f} | {row.seconds:.2f} | {row.cross_entropy:.3f} |"
        f" {row.entropy:.2f} | {100 * row.agreement:.1f} % |{score}"
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    scored = any(row.score is not None for row in rows)
    names = ["way", "setting", "calls", "seconds", "cross entropy (nats)", "entropy (bits)", "agreement"]
    names += ["score"] if scored else []
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    return head + "".join(f"{line_of(row)}\n" for row in rows)


def curves(rows: Sequence[Row], path: Path) -> None:
    """Cross entropy, entropy and the score against calls, one line per way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = {"cross_entropy": "cross entropy (nats)", "entropy": "entropy of codes (bits)"}
    if any(row.score is not None for row in rows):
        values["score"] = "score"
    figure = Figure(figsize=(6 * len(values), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(values), squeeze=False)[0]
    for axis, (name, label) in zip(axes, values.items(), strict=True):
        for way in dict.fromkeys(row.way for row in rows):
            points = sorted((row.calls, getattr(row, name)) for row in rows if row.way == way)
            axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1, label=way)
        axis.set_xscale("log")
        axis.set_xlabel("calls of the network per clip")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def load_scorer(name: str) -> Scorer:
    """The function ``package.module:function``.

    Raises:
        ConfigError: there is none.
    """
    module, _colon, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--scorer {name}: {error}; expected package.module:function") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masked_sampling")
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--prompts", type=Path, help="a file with one a line")
    parser.add_argument("--duration", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=2, help="clips of every prompt")
    parser.add_argument("--scorer", help="package.module:function")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="one point of every way")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (NarSpeechError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Measure and write; returns the exit code."""
    scorer = load_scorer(options.scorer) if options.scorer else None
    prompts = list(PROMPTS)
    if options.prompts is not None:
        prompts = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines()]
        prompts = [prompt for prompt in prompts if prompt]
    options.output.mkdir(parents=True, exist_ok=True)
    generator = SoundGenerator.from_folder(resolve_sound(options.model), options.device, options.dtype)
    seeds = list(range(options.seeds))
    points = settings(options.quick)
    rows = measure(generator, points, prompts, seeds, options.duration, scorer, options.output)
    (options.output / "results.json").write_text(
        json.dumps({"model": generator.card.name, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
    )
    (options.output / "table.md").write_text(table(rows))
    curves(rows, options.output / "curves.png")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
