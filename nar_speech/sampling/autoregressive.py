"""Sampling code after code from a model of delayed streams (MusicGen), as a prompt for MAGNeT or for itself.

The model is a callable; it is fed in lockstep, all rows of a batch at the same position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.config import check_range
from nar_speech.errors import InputError
from nar_speech.sampling.draws import Draws
from nar_speech.sampling.filters import draw_tokens

# positions (B, K, n) of the delayed sequence that are new -> conditional and unconditional logits (B, K, V)
# of what follows the last of them; None for the latter: without guidance.
StepLogits = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class AutoregressiveConfig:
    """How codes are drawn; the defaults are those of MusicGen.

    Attributes:
        sample: draw; False takes the most probable code.
        temperature: of the softmax.
        top_k, top_p: see :func:`nar_speech.sampling.filters.draw_tokens`.
        guidance: coefficient of classifier-free guidance; 1: the conditional logits.
    """

    sample: bool = True
    temperature: float = 1.0
    top_k: int = 250
    top_p: float = 0.0
    guidance: float = 3.0

    def __post_init__(self) -> None:
        check_range(self, 1e-4, 1e4, "temperature")
        check_range(self, 0, 1e9, "top_k")
        check_range(self, 0, 1, "top_p")
        check_range(self, 0, 1e4, "guidance")


@torch.inference_mode()
def autoregressive_sample(
    step: StepLogits,
    lengths: Tensor,
    lags: Sequence[int],
    mask_id: int,
    config: AutoregressiveConfig,
    draws: Draws | None = None,
    prompt: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Make clips of codes.

    A row's codes depend on its own draws, text and prompt alone.

    Args:
        step: the model, fresh: it has not been fed anything.
        lengths: (B,) int64 frames to make, prompt included.
        lags: delay of each of the K streams.
        mask_id: the token that stands where there is no code.
        draws: source of random numbers, needed with ``config.sample``.
        prompt: (B, K, P) codes that the clips begin with.
        prompt_lengths: (B,) frames of the prompts; None: P.
        progress: called with the number of steps done and of all.

    Returns:
        (B, K, T) int64 with T the longest length; ``mask_id`` behind shorter ones.

    Raises:
        InputError: lengths or prompts that don't fit, or no draws.
    """
    batch, frames, lags = len(lengths), int(lengths.max()), tuple(lags)
    device = lengths.device
    if int(lengths.min()) < 1:
        raise InputError("lengths: every clip needs at least one frame")
    if config.sample and draws is None:
        raise InputError("draws: sampling needs random numbers; give generators")
    codes = torch.full((batch, len(lags), frames), mask_id, device=device)
    known = _known(codes, lengths, prompt, prompt_lengths)
    size = frames + max(lags) + 1
    sequence = torch.full((batch, len(lags), size), mask_id, device=device)
    wanted = torch.zeros_like(sequence, dtype=torch.bool)  # codes that are to be drawn
    inside = torch.arange(frames, device=device) < lengths[:, None]
    for k, lag in enumerate(lags):
        part = slice(lag + 1, lag + 1 + frames)
        sequence[:, k, part] = codes[:, k]
        wanted[:, k, part] = inside & ~known
    places = wanted.any(0).any(0).nonzero()[:, 0]
    if len(places) == 0:
        return codes
    first, last = int(places[0]), int(places[-1])
    new = sequence[:, :, :first]
    for place in range(first, last + 1):
        drawn = _draw(*step(new), wanted[:, :, place], config, draws)
        sequence[:, :, place] = torch.where(wanted[:, :, place], drawn, sequence[:, :, place])
        new = sequence[:, :, place : place + 1]
        if progress is not None:
            progress(place - first + 1, last - first + 1)
    return torch.stack([sequence[:, k, lag + 1 :][:, :frames] for k, lag in enumerate(lags)], dim=1)


def _known(codes: Tensor, lengths: Tensor, prompt: Tensor | None, sizes: Tensor | None) -> Tensor:
    """(B, T) bool, frames of the prompts, which are written into ``codes``."""
    batch, streams, frames = codes.shape
    known = torch.zeros(batch, frames, dtype=torch.bool, device=codes.device)
    if prompt is None:
        return known
    if prompt.shape[:2] != (batch, streams) or prompt.shape[2] > frames:
        raise InputError(
            f"prompt: expected ({batch}, {streams}, at most {frames}) codes, got {tuple(prompt.shape)}"
        )
    if sizes is None:
        sizes = torch.full((batch,), prompt.shape[2], device=codes.device)
    if bool((sizes > lengths).any()):
        raise InputError("prompt: is longer than the clip; make the clip longer or cut the prompt")
    known = torch.arange(frames, device=codes.device) < sizes.to(codes.device)[:, None]
    part = known[:, None, : prompt.shape[2]]
    codes[:, :, : prompt.shape[2]] = torch.where(part, prompt, codes[:, :, : prompt.shape[2]])
    return known


def _draw(
    logits: Tensor, null: Tensor | None, wanted: Tensor, config: AutoregressiveConfig, draws: Draws | None
) -> Tensor:
    """(B, K) codes; those of places that are not ``wanted`` (B, K) mean nothing."""
    if null is not None:
        logits = null + (logits - null) * config.guidance
    rows = logits[wanted].float()
    random = None
    if config.sample:
        random = draws.tokens(range(len(wanted)), wanted, logits.shape[-1])
    temperature = torch.full((len(rows),), config.temperature, device=rows.device)
    tokens, _ = draw_tokens(rows, temperature, random, config.top_k, config.top_p)
    return torch.zeros(wanted.shape, dtype=torch.int64, device=rows.device).masked_scatter_(wanted, tokens)
