"""Position codes that are added to a network's input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nar_speech.errors import ConfigError


def sinusoid_table(positions: Tensor, depth: int) -> Tensor:
    """Sine and cosine codes in the order FunASR uses: all sines first, then all cosines.

    ``code[p] = [sin(p * w_0) .. sin(p * w_{D/2-1}), cos(p * w_0) .. cos(p * w_{D/2-1})]`` with
    ``w_k = exp(-k ln(10000) / (D/2 - 1))`` (the tensor2tensor variant of "Attention Is All You Need" 3.5).

    Args:
        positions: (..., T) positions; FunASR counts from 1.
        depth: D, even and at least 4.

    Returns:
        (..., T, D) float32.
    """
    half = depth // 2
    # float32, as the weights saw it; filled, not copied from the host, which a CUDA graph can't do
    base = torch.full((), 10000.0, device=positions.device)
    step = base.log() / (half - 1)
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=positions.device) * -step)
    angles = positions.to(torch.float32)[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SinusoidPosition(nn.Module):
    """Adds FunASR's sinusoidal position code, whose depth is the input size, counted from position 1.

    The table is computed once, grown by doubling, kept in float32 and never stored in a checkpoint.
    """

    def __init__(self, depth: int):
        """``depth``: feature size D of the input, even and at least 4."""
        super().__init__()
        if depth < 4 or depth % 2:
            raise ConfigError(f"input_size: must be even and at least 4, got {depth}")
        self.depth = depth
        self.register_buffer("table", torch.zeros(0, depth), persistent=False)

    def code(self, length: int, device: torch.device, start: int = 0) -> Tensor:
        """(T, D) float32 codes of frames ``start`` .. ``start + length - 1`` (position = frame + 1)."""
        end = start + length
        table = self.table
        if table.shape[0] < end or table.device != device or table.dtype != torch.float32:
            size = max(512, 1 << (end - 1).bit_length())
            table = sinusoid_table(torch.arange(1, size + 1, device=device), self.depth)
            self.table = table
        return table[start:end]

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D) with the code added; ``start`` is the index of the first frame."""
        return x + self.code(x.shape[1], x.device, start).to(x.dtype)


def interleaved_sinusoid(length: int, width: int, device: torch.device, offset: int = 0) -> Tensor:
    """Sinusoids with sine on even and cosine on odd columns (Vaswani et al. 2017, section 3.5).

    Returns:
        (length, width) float32 for the positions ``offset .. offset + length - 1``.
    """
    position = torch.arange(offset, offset + length, device=device, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(
        torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / width)
    )
    angle = position * rate
    code = torch.empty(length, width, device=device)
    code[:, 0::2] = torch.sin(angle)
    code[:, 1::2] = torch.cos(angle[:, : width // 2])
    return code


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """(B, size) bool, true at the valid frames of sequences with ``lengths`` (B,)."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)
