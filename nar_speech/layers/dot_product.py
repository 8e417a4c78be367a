"""Scaled dot-product attention, with products in bfloat16 where a model computes coarsely anyway."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = 1 << 20  # scores made at once: they stay in a processor's cache


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    coarse: bool = False,
    few: bool = False,
) -> Tensor:
    """softmax(query key^T / sqrt(D)) value.

    Args:
        query: (B, H, Q, D). key, value: (B, H, K, D).
        mask: (B, 1, 1, K) or (B, 1, Q, K) bool, true where a query may look, at one place at least; None:
            everywhere.
        dropout: on the weights; above 0 in training only.
        coarse: a float32 computation may use bfloat16 products (int8 models do); as bfloat16 ones do anyway.
        few: there are only tens of queries and keys, as in a streaming step, where PyTorch's fused kernel is
            faster in every dtype.

    Returns:
        (B, H, Q, D) in the dtype of ``query``.
    """
    wanted = coarse or query.dtype == torch.bfloat16
    if few or not wanted or dropout > 0.0 or torch.is_grad_enabled() or not _has_products(query.device.type):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    dtype = query.dtype
    query = query.to(torch.bfloat16) * query.shape[-1] ** -0.5
    key, value = key.to(torch.bfloat16).transpose(-1, -2), value.to(torch.bfloat16)
    rows = max(BLOCK_SCORES // (query.shape[0] * query.shape[1] * key.shape[-1]), 32)
    parts = []
    for first in range(0, max(query.shape[2], 1), rows):
        scores = query[:, :, first : first + rows] @ key
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, first : first + rows]
            scores.masked_fill_(~part, float("-inf"))
        parts.append(scores.softmax(-1) @ value)  # float32 inside the softmax
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).to(dtype)


def attention_by_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, coarse: bool = False
) -> Tensor:
    """:func:`dot_product_attention` for hundreds of queries and many heads, faster with bfloat16 products.

    A few heads at a time with all their queries, so that neither scores nor keys leave the cache.

    Args:
        query: (B, H, Q, D). key, value: (B, H, K, D).
        mask: (B or 1, 1, 1, K) bool, true where a query may look, at one place at least; None: everywhere.
    """
    wanted = (coarse or query.dtype == torch.bfloat16) and not torch.is_grad_enabled()
    if not wanted or not _has_products(query.device.type):
        return dot_product_attention(query, key, value, mask, coarse=coarse)
    batch, heads, queries, size = query.shape
    out = torch.empty(batch, heads, queries, size, dtype=torch.bfloat16)
    group = max(BLOCK_SCORES // 2 // (queries * key.shape[2]), 1)
    scale = size**-0.5
    for row in range(batch):
        seen = None if mask is None else mask[row if mask.shape[0] > 1 else 0]
        for first in range(0, heads, group):
            part = slice(first, first + group)
            scores = torch.bmm(
                query[row, part].to(torch.bfloat16).contiguous() * scale,
                key[row, part].to(torch.bfloat16).contiguous().transpose(1, 2),
            )
            if seen is not None:
                scores.masked_fill_(~seen, float("-inf"))
            torch.bmm(
                scores.softmax(-1), value[row, part].to(torch.bfloat16).contiguous(), out=out[row, part]
            )
    return out.to(query.dtype)


@functools.cache
def _has_products(device: str) -> bool:
    """Whether this processor multiplies bfloat16 numbers; elsewhere PyTorch's fused kernel is better."""
    from nar_speech.layers.processor import has

    return device == "cpu" and torch.backends.mkldnn.is_available() and has("_is_avx512_bf16_supported")


def allow_coarse(module: torch.nn.Module) -> None:
    """Let the attention layers of ``module`` (those with an attribute ``coarse``) use bfloat16 products."""
    for part in module.modules():
        if hasattr(part, "coarse"):
            part.coarse = True
