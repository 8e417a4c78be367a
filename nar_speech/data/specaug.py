"""SpecAugment on features (Park et al. 2019, arXiv:1904.08779, masks only), whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpecAugmentConfig:
    """How many masks and how wide. Widths are drawn uniformly from 0 to width (inclusive).

    Attributes:
        freq_masks, freq_width: count and largest width in mel bins.
        time_masks, time_width: count and largest width in feature frames (after frame stacking).
        time_ratio: a time mask never covers more than this part of the utterance.
        fill: "zero" (right after mean normalisation) or "mean" of each utterance.
    """

    freq_masks: int = 2
    freq_width: int = 27
    time_masks: int = 2
    time_width: int = 40
    time_ratio: float = 0.2
    fill: Literal["zero", "mean"] = "zero"

    def __post_init__(self) -> None:
        if min(self.freq_masks, self.freq_width, self.time_masks, self.time_width) < 0:
            raise ValueError("specaug: mask counts and widths must not be negative")
        if not 0 <= self.time_ratio <= 1:
            raise ValueError(f"specaug.time_ratio: must lie in [0, 1], got {self.time_ratio}")


def spec_augment(
    feats: Tensor,
    lengths: Tensor,
    config: SpecAugmentConfig,
    generator: torch.Generator | None = None,
    stack: int = 1,
) -> Tensor:
    """Mask random bands and stretches of frames; padding is left as it is.

    Args:
        feats: (B, T, F) features.
        lengths: (B,) valid frames.
        generator: source of the draws, on the device of ``feats``.
        stack: low-frame-rate stacking m: F = m x bins, and a band is masked in each of the m frames
            (what FunASR calls SpecAugLFR).

    Returns:
        (B, T, F) a masked copy.
    """
    batch, frames, size = feats.shape
    if stack < 1 or size % stack:
        raise ValueError(f"spec_augment: feature size {size} is not a multiple of stack {stack}")
    device = feats.device
    bins = size // stack
    bands = _spans(
        batch,
        config.freq_masks,
        torch.full((batch, 1), min(config.freq_width, bins), device=device),
        torch.full((batch, 1), bins, device=device),
        bins,
        generator,
    )
    widest = (lengths.to(device)[:, None] * config.time_ratio).long().clamp(max=config.time_width)
    stretches = _spans(batch, config.time_masks, widest, lengths.to(device)[:, None], frames, generator)
    valid = torch.arange(frames, device=device) < lengths.to(device)[:, None]
    mask = (bands.repeat(1, stack)[:, None, :] | stretches[:, :, None]) & valid[:, :, None]
    if config.fill == "zero":
        return feats.masked_fill(mask, 0.0)
    count = (lengths.to(device).clamp(min=1) * size).to(feats.dtype)
    mean = (feats * valid[:, :, None]).sum((1, 2)) / count
    return torch.where(mask, mean[:, None, None].to(feats.dtype), feats)


def _spans(
    batch: int, count: int, widest: Tensor, extent: Tensor, size: int, generator: torch.Generator | None
) -> Tensor:
    """(B, size) mask of ``count`` spans; widths uniform in 0..widest (B,1), starts so that they fit."""
    draws = torch.rand(2, batch, count, device=extent.device, generator=generator)
    width = (draws[0] * (widest + 1)).long()
    start = (draws[1] * (extent - width + 1).clamp(min=1)).long()
    place = torch.arange(size, device=extent.device)
    inside = (place >= start[:, :, None]) & (place < (start + width)[:, :, None])
    return inside.any(1)
