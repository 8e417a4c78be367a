"""Attention inside a band: a position sees those at most ``context`` positions away.

Queries are cut into blocks, and every block meets the window of keys that its band covers. Time and memory
grow with T context instead of T^2, and the numbers are those of attention over everything with a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.layers.dot_product import dot_product_attention

BLOCK = 32  # queries; of 16 to 128 the fastest on a CPU for contexts of a few positions


def band_mask(frames: int, context: int, lengths: Tensor, block: int = BLOCK) -> Tensor:
    """What the queries of every block see of their window, for :func:`banded_attention`.

    Args:
        frames: T, padding included.
        lengths: (B,) int64, positions of each row that count.

    Returns:
        (B n, 1, block, block + 2 context) bool with n = ceil(T / block) blocks.
    """
    blocks = -(-frames // block)
    query = torch.arange(block, device=lengths.device)[:, None] + context
    key = torch.arange(block + 2 * context, device=lengths.device)
    near = (query - key).abs() <= context  # (block, window)
    place = torch.arange(blocks, device=lengths.device)[:, None] * block - context + key  # (n, window)
    valid = (place >= 0) & (place < lengths[:, None, None])  # (B, n, window)
    mask = near & valid[:, :, None]
    mask |= ~mask.any(-1, keepdim=True)  # rows of padding, which nothing reads, must not become NaN
    return mask.flatten(0, 1).unsqueeze(1)


def banded_attention(
    query: Tensor, key: Tensor, value: Tensor, context: int, mask: Tensor, coarse: bool = False
) -> Tensor:
    """softmax(query key^T / sqrt(d)) value over the positions of the band.

    Args:
        query, key, value: (B, T, H, d).
        mask: of :func:`band_mask` for T and the rows' lengths.
        coarse: see :func:`nar_speech.layers.dot_product.dot_product_attention`.

    Returns:
        (B, T, H, d).
    """
    batch, frames, heads, size = query.shape
    block = mask.shape[2]
    blocks = -(-frames // block)
    more = blocks * block - frames

    def windows(x: Tensor) -> Tensor:  # (B n, H, block + 2 context, d)
        x = F.pad(x, (0, 0, 0, 0, context, context + more))
        return x.unfold(1, block + 2 * context, block).permute(0, 1, 2, 4, 3).flatten(0, 1)

    query = F.pad(query, (0, 0, 0, 0, 0, more)).view(batch * blocks, block, heads, size).transpose(1, 2)
    out = dot_product_attention(query, windows(key), windows(value), mask, coarse=coarse)
    return out.transpose(1, 2).reshape(batch, blocks * block, heads, size)[:, :frames]
