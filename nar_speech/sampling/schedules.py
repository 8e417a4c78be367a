"""Schedules: how many units are masked at every step, how hot tokens are drawn, how strong guidance is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.errors import ConfigError
from nar_speech.sampling.config import MaskedConfig


def mask_ratio(schedule: str, progress: Tensor) -> Tensor:
    """Share of units that are masked at a progress in [0, 1]; falls from 1 to 0.

    Args:
        progress: float32, any shape. The official implementations compute in float32 and then truncate, so
            another precision would give other counts.

    Raises:
        ConfigError: an unknown schedule.
    """
    if schedule == "cosine":
        return torch.cos(progress * math.pi * 0.5)
    if schedule in ("linear", "even"):
        return 1 - progress
    if schedule == "arccos":
        return torch.arccos(progress) * (2 / math.pi)
    if schedule == "square":
        return 1 - progress.square()
    if schedule == "cubic":
        return 1 - progress**3
    if schedule == "sqrt":
        return 1 - progress.sqrt()
    raise ConfigError(
        f"schedule '{schedule}': unknown; use cosine, linear, arccos, square, cubic, sqrt or even"
    )


@dataclass(frozen=True)
class Plan:
    """Numbers of every step, known before the loop; one value a step.

    Attributes:
        ratio: share of masked units.
        progress, time, temperature, guidance: see :class:`nar_speech.sampling.step.StepInfo`; those of the
            rounds that refine come behind the steps.
    """

    ratio: tuple[float, ...]
    progress: tuple[float, ...]
    time: tuple[float, ...]
    temperature: tuple[float, ...]
    guidance: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.ratio)


def make_plan(config: MaskedConfig) -> Plan:
    """The plan of a configuration."""
    steps = config.planned
    length = 1.0 / steps
    time = [1.0 - i * length for i in range(steps)]
    if config.progress == "inclusive":
        progress = torch.linspace(0, 1, steps)
        ratio = mask_ratio(config.schedule, progress)
    else:
        progress = 1 - torch.tensor(time)
        if config.schedule == "cosine":  # MaskGCT writes it as a sine of the time; other roundings otherwise
            ratio = torch.sin(torch.tensor(time) * math.pi / 2)
        else:
            ratio = mask_ratio(config.schedule, progress)
    shares = [1.0, *ratio.clamp(0, 1).tolist()[1:]]
    factor = {
        "none": [1.0] * steps,
        "steps_left": [(steps - 1 - i) / steps for i in range(steps)],
        "time": time,
    }[config.anneal]
    heat = [config.temperature * f for f in factor]
    if steps == 1 and config.single_temperature:
        heat = [config.single_temperature]
    end = config.guidance if config.guidance_end is None else config.guidance_end
    weights = shares if config.guidance_anneal == "mask_ratio" else [1 - u for u in progress.tolist()]
    guidance = [w * config.guidance + (1 - w) * end for w in weights]
    rounds = config.refine_rounds
    later = _time_of(config.schedule, config.refine_share)
    return Plan(
        ratio=tuple(shares),
        progress=(*progress.tolist(), *[1 - later] * rounds),
        time=(*time, *[later] * rounds),
        temperature=(*(max(t, config.temperature_floor) for t in heat), *[1.0] * rounds),
        guidance=(*guidance, *guidance[-1:] * rounds),
    )


def _time_of(schedule: str, share: float) -> float:
    """The time 1 - u at which a schedule masks a share of the units, by bisection; it falls with u."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        few = float(mask_ratio(schedule, torch.tensor(1 - middle, dtype=torch.float64))) < share
        low, high = (middle, high) if few else (low, middle)
    return high


def unit_counts(config: MaskedConfig, plan: Plan, totals: list[int]) -> list[list[int]]:
    """Units masked at the beginning of every step, for each item.

    Args:
        totals: units of each item that are to be sampled.

    Returns:
        One list of ``plan.steps`` numbers per item; they never grow. A 0 says that the item is finished.
    """
    if config.schedule == "even":
        return [_even_counts(total, plan.steps) for total in totals]
    ratio = torch.tensor(plan.ratio)
    # The official cosine counts are cut off as they come in float32; elsewhere 4.9999 is meant to be 5.
    slack = 0.0 if config.schedule == "cosine" else 1e-3
    counts = (ratio[None] * torch.tensor(totals, dtype=torch.float32)[:, None] + slack).to(torch.int64)
    most = torch.tensor(totals)[:, None]
    counts = torch.minimum(counts.clamp(min=config.minimum), most)
    counts[:, 0] = most[:, 0]
    return counts.tolist()


def _even_counts(total: int, steps: int) -> list[int]:
    """Mask-CTC: total // n units in each of n = min(steps, total) steps, what remains in the last."""
    used = min(steps, total)
    if not used:
        return [0] * steps
    return [total - i * (total // used) for i in range(used)] + [0] * (steps - used)
