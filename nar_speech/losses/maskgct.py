"""Masked training of MaskGCT (arXiv 2409.00750, section 3.1): what is masked of semantic and acoustic codes.

A diffusion step t masks each code with probability sin(pi t / 2), but for a prompt at the beginning, which
stays. Random numbers are drawn here from an explicit generator, or given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.errors import ConfigError, InputError

SHORTEST_TIME = 1e-5
SEMANTIC_FLOOR = 0.2  # the least probability with which a semantic code is masked
SEMANTIC_PROMPT, ACOUSTIC_PROMPT = 0.4, 0.5  # the longest prompt, as a part of the item
LEAST_PROMPT = 5  # frames


@dataclass(frozen=True)
class StepDraws:
    """What chance decides of a batch.

    Attributes:
        time: (B,) diffusion steps, uniform in [1e-5, 1].
        prompts: (B,) int64 frames of each item's prompt.
        masked: (B, L) bool, each true with its item's probability.
    """

    time: Tensor
    prompts: Tensor
    masked: Tensor


@dataclass(frozen=True)
class MaskedCodes:
    """Input and targets of a training step.

    Attributes:
        tokens: (B, L), or (B, K, L) with layers, int64 codes as the network sees them.
        targets: (B, L) the true codes, of the layer.
        masked: (B, L) bool, the positions that count: masked and not padding.
        time: (B,).
        lengths: (B,) positions of each item.
        stage: the layer; 0 where there is only one.
    """

    tokens: Tensor
    targets: Tensor
    masked: Tensor
    time: Tensor
    lengths: Tensor
    stage: int = 0


def mask_probability(time: Tensor, floor: float = 0.0) -> Tensor:
    """sin(pi t / 2), at least ``floor``; 0.2 for semantic codes, 0 for acoustic ones."""
    return torch.sin(time * math.pi / 2).clamp_min(floor)


def draw_step(
    lengths: Tensor,
    frames: int,
    generator: torch.Generator | None,
    *,
    prompt: float = SEMANTIC_PROMPT,
    floor: float = SEMANTIC_FLOOR,
    prompt_drop: float = 0.15,
) -> StepDraws:
    """Random numbers of a step, from a generator on the device of ``lengths``.

    Prompts are as long as each item allows: from min(T // 4, 5) to below int(``prompt`` T) frames of its own
    T (the official code takes the padded T, so that a short item may be all prompt).

    Args:
        lengths: (B,) int64, at least 1.
        frames: L of the batch.
        prompt: the longest prompt, as a part of the item: 0.4 for semantic codes, 0.5 for acoustic ones.
        floor: see :func:`mask_probability`.
        prompt_drop: probability that an item has no prompt.
    """
    shape, device = lengths.shape, lengths.device

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    time = uniform(*shape).clamp_min(SHORTEST_TIME)
    low = torch.clamp_max(lengths // 4, LEAST_PROMPT)
    span = ((lengths * prompt).long() - low).clamp_min(0)
    prompts = low + torch.minimum((uniform(*shape) * span).long(), (span - 1).clamp_min(0))
    prompts = torch.minimum(prompts, lengths - 1)
    prompts = torch.where(uniform(*shape) < prompt_drop, 0, prompts)
    masked = uniform(*shape, frames) < mask_probability(time, floor)[:, None]
    return StepDraws(time, prompts, masked)


def layer_weights(count: int, schedule: str = "linear", first: bool = True) -> tuple[float, ...]:
    """How often each layer is learnt; the coarse ones most.

    Args:
        count: K layers.
        schedule: ``linear`` K - i, ``cosine`` cos(pi i / 2K) or ``uniform`` weight of the i-th layer.
        first: learn the first layer too; otherwise i counts from the second.

    Raises:
        ConfigError: an unknown schedule, or nothing to learn.
    """
    rules = {
        "linear": lambda i: count - i,
        "cosine": lambda i: math.cos(i / count * math.pi / 2),
        "uniform": lambda i: 1,
    }
    if schedule not in rules:
        raise ConfigError(f"layer schedule '{schedule}': unknown; use {', '.join(rules)}")
    if count < 2 - first:
        raise ConfigError(f"layers: {count} without the first leaves nothing to learn")
    weights = [rules[schedule](i) for i in range(count - (not first))]
    weights = weights if first else [0, *weights]
    return tuple(weight / sum(weights) for weight in weights)


def draw_layer(weights: Sequence[float], generator: torch.Generator | None) -> int:
    """The layer that a batch learns, by :func:`layer_weights`."""
    device = "cpu" if generator is None else generator.device
    return int(torch.multinomial(torch.tensor(weights, device=device), 1, generator=generator))


def mask_semantic(
    codes: Tensor, lengths: Tensor, draws: StepDraws, mask_id: int, official_padding: bool = False
) -> MaskedCodes:
    """Make the input of a training step of T2S from true codes (B, L); padding may hold any of them.

    In every item one position at least is masked, the first behind the prompt if chance chose none. With
    ``official_padding`` a mask on padding counts as one too, so that an item may teach nothing.
    """
    masked, valid = _masked(codes, lengths, draws, official_padding)
    return MaskedCodes(codes.masked_fill(masked, mask_id), codes, masked & valid, draws.time, lengths)


def mask_acoustic(
    codes: Tensor,
    lengths: Tensor,
    draws: StepDraws,
    stage: int,
    mask_id: int,
    official_padding: bool = False,
) -> MaskedCodes:
    """Make the input of a training step of S2A from true codes (B, K, L); padding may hold any of them.

    Layers before ``stage`` are true, those after it masked but for the prompt; see :func:`mask_semantic`.

    Raises:
        InputError: a layer that does not exist.
    """
    count = codes.shape[1]
    if not 0 <= stage < count:
        raise InputError(f"stage: got {stage}; there are {count} layers, from 0 on")
    masked, valid = _masked(codes[:, stage], lengths, draws, official_padding)
    hidden = torch.arange(codes.shape[2], device=codes.device) >= draws.prompts[:, None]
    layer = torch.arange(count, device=codes.device)[None, :, None]
    covered = ((layer == stage) & masked[:, None]) | ((layer > stage) & hidden[:, None])
    tokens = codes.masked_fill(covered, mask_id)
    return MaskedCodes(tokens, codes[:, stage], masked & valid, draws.time, lengths, stage)


def _masked(
    codes: Tensor, lengths: Tensor, draws: StepDraws, official_padding: bool
) -> tuple[Tensor, Tensor]:
    """Masked positions (B, L), one at least in every row, and valid ones."""
    place = torch.arange(codes.shape[1], device=codes.device)
    valid = place < lengths.to(codes.device)[:, None]
    masked = draws.masked & (place >= draws.prompts[:, None])
    counted = masked if official_padding else masked & valid
    first = place == draws.prompts[:, None]
    return masked | (first & ~counted.any(1, keepdim=True)), valid
