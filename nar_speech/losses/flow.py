"""Flow matching (Lipman et al. 2023, arXiv 2210.02747, section 4.1) along straight paths from noise to data.

At time t a value is x_t = (1 - t) noise + t clean, and moves with the velocity clean - noise. Functions of
tensors; random numbers come from an explicit generator, or are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.errors import InputError


@dataclass(frozen=True)
class DurationDraws:
    """What chance decides of a batch of phone durations.

    Attributes:
        time: (B,) uniform in [0, 1).
        noise: (B, N) normal.
        prompts: (B,) int64 phones at the beginning whose durations are given.
        conditional: (B,) bool; false: the network is told neither phones nor prompt, for guidance.
    """

    time: Tensor
    noise: Tensor
    prompts: Tensor
    conditional: Tensor


def draw_durations(
    lengths: Tensor,
    symbols: int,
    generator: torch.Generator | None,
    *,
    prompt: float = 0.5,
    prompt_drop: float = 0.15,
    condition_drop: float = 0.1,
) -> DurationDraws:
    """Random numbers of a training step, from a generator on the device of ``lengths``.

    Args:
        lengths: (B,) int64 phones of each item, at least 1.
        symbols: N of the batch.
        prompt: the longest prompt, as a part of the item; any number of phones from 1 on is as likely.
        prompt_drop, condition_drop: probabilities of an item without a prompt, and of one without anything.
    """
    device, shape = lengths.device, lengths.shape

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    most = torch.minimum((lengths * prompt).long().clamp_min(1), lengths - 1)
    prompts = torch.minimum(1 + (uniform(*shape) * most).long(), most)
    prompts = torch.where(uniform(*shape) < prompt_drop, 0, prompts)
    return DurationDraws(
        time=uniform(*shape),
        noise=torch.randn((*shape, symbols), generator=generator, device=device),
        prompts=prompts,
        conditional=uniform(*shape) >= condition_drop,
    )


def straight_path(clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The values (B, ...) at ``time`` (B,) on the way from noise to what is clean, and their velocity."""
    t = time.reshape(-1, *[1] * (clean.dim() - 1))
    return (1 - t) * noise + t * clean, clean - noise


def flow_loss(velocity: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    """Mean squared error of velocities (B, ...) over the positions that count (B, ...) bool.

    Raises:
        InputError: shapes that differ.
    """
    if not velocity.shape == wanted.shape == counts.shape:
        raise InputError(
            f"flow: velocity {tuple(velocity.shape)}, target {tuple(wanted.shape)}, mask"
            f" {tuple(counts.shape)}; must be alike"
        )
    errors = (velocity.float() - wanted).square().masked_fill(~counts, 0.0)
    return errors.sum() / counts.sum().clamp_min(1)
