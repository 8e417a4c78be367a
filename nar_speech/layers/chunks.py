"""Parts of chunk-wise encoders: chunk masks, and windows over streams whose rows stand at different places.

Everything here has shapes that depend on shapes only, never reads a value on the host, and treats every row
(stream) by itself, so a step made of it can be captured as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.errors import ConfigError


@dataclass(frozen=True)
class Chunking:
    """How an encoder is fed in steps.

    Attributes:
        first: input frames of a stream's first step; fewer only if it is the last one too.
        later: input frames of every other step; fewer, 0 perhaps, only in the last one.
        frames: output frames of a step.
        left: output frames before a chunk that it sees; negative: all.
    """

    first: int
    later: int
    frames: int
    left: int

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"chunk_size: got {self.frames}; a chunk has at least one frame")

    @property
    def width(self) -> int:
        """Input frames a batch has room for: a first and a later step may share it."""
        return max(self.first, self.later)

    @property
    def cached(self) -> int:
        """Frames an attention cache begins with; one without a limit begins empty and grows."""
        return max(self.left, 0)


def chunk_mask(
    frames: int, chunk_size: int, left_chunks: int, device: torch.device | None, first: int | None = None
) -> Tensor:
    """(T, T) bool: frame i (row) sees its own chunk and ``left_chunks`` before it (negative: all).

    ``first``: frames of the first chunk where it is shorter than the others.
    """
    shift = 0 if first is None else chunk_size - first
    chunk = (torch.arange(frames, device=device) + shift) // chunk_size
    back = chunk.unsqueeze(1) - chunk.unsqueeze(0)
    mask = back >= 0
    return mask if left_chunks < 0 else mask & (back <= left_chunks)


def step_mask(left: int, frames: int, chunk_size: int, device: torch.device | None) -> Tensor:
    """(U, left + U) bool for a step of ``frames`` U that holds several chunks: what the frames of each see.

    Keys are ``left`` cached frames and the U new ones; a chunk sees the ``left`` frames before it.
    """
    begin = (torch.arange(frames, device=device) // chunk_size * chunk_size).unsqueeze(1)
    key = torch.arange(left + frames, device=device)
    return (key >= begin) & (key < left + begin + chunk_size)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Entries ``index`` (B, K) int64 of dimension 1 of ``values`` (B, S, ...)."""
    batch, size = values.shape[:2]
    flat = index + torch.arange(batch, device=index.device).unsqueeze(1) * size
    rows = values.reshape(batch * size, *values.shape[2:]).index_select(0, flat.flatten())
    return rows.view(*index.shape, *values.shape[2:])


def _behind(mask: Tensor, values: Tensor) -> Tensor:
    """``mask`` (B, K) with as many dimensions as ``values``."""
    return mask.reshape(*mask.shape, *[1] * (values.dim() - 2))


def join(held: Tensor, num_held: Tensor, new: Tensor, num_new: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each row's ``num_held`` first entries of ``held`` and then its ``num_new`` first ones of ``new``.

    Args:
        held: (B, S, ...). new: (B, C, ...). num_held, num_new: (B,) int64.

    Returns:
        (B, size, ...), zeros behind each row's end, and the counts (B,).
    """
    both = torch.cat([held, new], dim=1)
    filled = num_held + num_new
    if not both.shape[1]:
        return both.new_zeros(len(both), size, *both.shape[2:]), filled
    position = torch.arange(size, device=held.device)
    index = torch.where(
        position < num_held.unsqueeze(1), position, position - num_held.unsqueeze(1) + held.shape[1]
    )
    window = take(both, index.clamp(max=both.shape[1] - 1))
    return window.masked_fill(_behind(position >= filled.unsqueeze(1), window), 0.0), filled


def drop(window: Tensor, filled: Tensor, count: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What is left of each row of ``window`` (B, S, ...) after its first ``count`` (B,) entries.

    Returns:
        (B, size, ...), zeros behind each row's end, and the counts (B,).
    """
    left = filled - count
    position = torch.arange(size, device=window.device)
    if not size or not window.shape[1]:
        return window.new_zeros(len(window), size, *window.shape[2:]), left
    index = (position + count.unsqueeze(1)).clamp(max=window.shape[1] - 1)
    rest = take(window, index)
    return rest.masked_fill(_behind(position >= left.unsqueeze(1), rest), 0.0), left


def last(window: Tensor, num_new: Tensor, new: int, size: int) -> Tensor:
    """The ``size`` entries before each row's end of a window whose rows stand at its right side.

    Args:
        window: (B, S, ...), old entries and behind them room for ``new`` ones, of which ``num_new`` (B,) are.

    Returns:
        (B, size, ...), the newest entry at the right. Entries from before the window are meaningless.
    """
    if not size:
        return window[:, :0]
    start = window.shape[1] - size - new + num_new
    index = torch.arange(size, device=window.device) + start.unsqueeze(1)
    return take(window, index.clamp(min=0))


def forget(rows: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros in the rows where ``rows`` (B,) bool is true."""
    return tuple(t.masked_fill(rows.reshape(-1, *[1] * (t.dim() - 1)), 0) for t in tensors)


def state_zeros(
    batch: int, weight: Tensor, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[Callable[..., Tensor], torch.dtype]:
    """What states are made of: ``zeros(*shape, dtype=int64)`` gives (batch, *shape), and the dtype of caches.

    Device and dtype are those of ``weight`` where None.
    """
    place = device or weight.device

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=place)

    return zeros, dtype or weight.dtype


def row_flags(flag: bool | Tensor, batch: int, device: torch.device) -> Tensor:
    """(B,) bool of one flag for all rows, or of flags that are already one a row."""
    if isinstance(flag, Tensor):
        return flag.to(device).expand(batch)
    return torch.full((batch,), flag, device=device)


def position_codes(position: Tensor, width: int) -> Tensor:
    """Sinusoids of any positions: sine on even and cosine on odd columns (Vaswani et al. 2017, 3.5).

    Args:
        position: (...) numbers.

    Returns:
        (..., width) float32, equal to :func:`nar_speech.layers.position.interleaved_sinusoid`.
    """
    even = torch.arange(0, width, 2, device=position.device, dtype=torch.float32)
    angle = position.float().unsqueeze(-1) * torch.exp(even * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width]
