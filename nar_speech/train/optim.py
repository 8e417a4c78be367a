"""Optimizer groups, learning-rate schedules and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nar_speech.errors import ConfigError


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Attributes:
        lr: peak learning rate (for "noam" the factor in front of width^-0.5).
        schedule: "cosine" and "linear" fall from the peak to ``final_lr`` x peak over the training budget
            (steps, or minutes when that is the budget); "inverse_sqrt" is lr min(n/w, sqrt(w/n)), the
            WarmupLR of ESPnet, WeNet and FunASR; "noam" is lr width^-0.5 min(n^-0.5, n w^-1.5);
            "constant" stays. All of them warm up linearly over ``warmup_steps``.
        lr_scales: parameter name prefix -> factor on the learning rate; the longest prefix wins.
        freeze: parameter name prefixes that are not trained.
    """

    name: Literal["adamw", "adam"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    schedule: Literal["cosine", "linear", "inverse_sqrt", "noam", "constant"] = "cosine"
    warmup_steps: int = 1000
    final_lr: float = 0.0
    noam_width: int = 512
    lr_scales: dict[str, float] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    clip_norm: float = 5.0
    ema_decay: float | None = None


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam or AdamW with one group per learning-rate scale; vectors and scalars get no weight decay.

    Frozen parameters get ``requires_grad = False``. Every group keeps its ``scale`` for :func:`set_lr`.

    Raises:
        ConfigError: a prefix of ``lr_scales`` or ``freeze`` matches no parameter, or all are frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    for where, prefixes in (("lr_scales", config.lr_scales), ("freeze", config.freeze)):
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in names):
                tops = sorted({name.split(".")[0] for name in names})
                raise ConfigError(
                    f"optim.{where}: no parameter starts with '{prefix}'; top modules: {', '.join(tops)}"
                )
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if any(name.startswith(prefix) for prefix in config.freeze):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            key = (_scale(name, config.lr_scales), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ConfigError("optim.freeze: leaves no parameter to train")
    tables = [
        {"params": parameters, "scale": scale, "weight_decay": config.weight_decay if decays else 0.0}
        for (scale, decays), parameters in groups.items()
    ]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(tables, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(config: OptimConfig, step: int, progress: float) -> float:
    """Learning rate of step ``step`` (counted from 0) when ``progress`` (0..1) of the budget is used."""
    n, warmup = step + 1, max(1, config.warmup_steps)
    if config.schedule == "inverse_sqrt":
        return config.lr * min(n / warmup, math.sqrt(warmup / n))
    if config.schedule == "noam":
        return config.lr * config.noam_width**-0.5 * min(n**-0.5, n * warmup**-1.5)
    lr = config.lr * min(1.0, n / warmup)
    if config.schedule == "constant":
        return lr
    progress = min(1.0, max(0.0, progress))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return lr * (config.final_lr + (1 - config.final_lr) * fall)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


class Ema:
    """Exponential moving average of a model's weights; the decay grows to its value as (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ConfigError(f"optim.ema_decay: must lie between 0 and 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights; integer buffers are copied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, values = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averages.append(self.weights[name])
                values.append(value)
            else:
                self.weights[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict:
        """Weights and the number of updates."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: Mapping) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.updates = state["updates"]
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)


def average_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of several state dicts, summed in float32; integer tensors are taken from the last one."""
    if not states:
        raise ConfigError("average: no weights to average")
    last = states[-1]
    return {
        name: (sum(state[name].float() for state in states) / len(states)).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in last.items()
    }


def _scale(name: str, scales: Mapping[str, float]) -> float:
    matching = [prefix for prefix in scales if name.startswith(prefix)]
    return scales[max(matching, key=len)] if matching else 1.0
