"""Units of several tokens: chunks that do not overlap, and MAGNeT's overlapping spans (arXiv 2401.04577)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def chunk_count(length: int, span: int) -> int:
    """Chunks of ``span`` positions that cover ``length``; the last may be shorter."""
    return -(-length // span)


def any_in_chunk(mask: Tensor, span: int) -> Tensor:
    """(R, n) whether any position of each chunk is True in ``mask`` (R, T)."""
    return in_chunks(mask, span, False).any(-1)


def to_positions(chunks: Tensor, span: int, length: int) -> Tensor:
    """(R, T) value of the chunk that each position lies in, from (R, n)."""
    return chunks.repeat_interleave(span, dim=1)[:, :length]


def unit_scores(
    confidence: Tensor, counted: Tensor, span: int, scoring: str, noise: Tensor | None = None
) -> Tensor:
    """How unsure the model is of every unit: the higher, the sooner it is masked again.

    Args:
        confidence: (R, T) float32 of the drawn tokens.
        counted: (R, T) bool, positions that matter.
        span: tokens per unit.
        scoring: ``max``: 1 - highest confidence; ``prod``: sum of -log confidence, of a unit with fewer
            counted positions scaled up to ``span`` of them, so that it competes fairly.
        noise: (R, T) added to the confidence, or to its logarithm with ``prod``.

    Returns:
        (R, n) float32; 0 for units without counted positions.
    """
    if scoring == "max":
        values = confidence if noise is None else noise + confidence
        best = in_chunks(values.masked_fill(~counted, -torch.inf), span, -torch.inf).amax(-1)
        return (1 - best).masked_fill(best == -torch.inf, 0.0)
    losses = -torch.log(confidence)
    if noise is not None:
        losses = losses - noise
    parts = in_chunks(losses.masked_fill(~counted, 0.0), span, 0.0).unbind(-1)
    total = parts[0]
    for part in parts[1:]:  # in one order, whatever the batch
        total = total + part
    number = in_chunks(counted, span, False).sum(-1)
    return total * torch.where(number == span, 1.0, span / number.clamp(min=1))


def overlapping_mask(scores: Tensor, counts: Tensor, lengths: Tensor, span: int) -> Tensor:
    """Positions under the least probable overlapping spans: the official ``stride1`` arrangement.

    A span may begin at every position; its score is the sum of its tokens' scores. The number of spans whose
    union has about ``counts`` positions is found by bisection exactly as the official code does it: it stops
    when the interval is exhausted, and the last union that was looked at counts, not the best one.

    Args:
        scores: (R, T) float32 per token.
        counts: (R,) int64 positions wanted; fewer than ``span`` are taken as ``span``.
        lengths: (R,) int64 valid positions.

    Returns:
        (R, T) bool.
    """
    length = scores.shape[1]
    total = scores.new_zeros(scores.shape)
    padded = F.pad(scores, (0, span - 1))
    for offset in range(span):
        total = total + padded[:, offset : offset + length]
    last = (lengths - span).clamp(min=0)
    places = torch.arange(length, device=scores.device)
    total = total.masked_fill(places[None] > last[:, None], -torch.inf)
    order = total.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, places.expand_as(order).contiguous())
    wanted = counts.clamp(min=span)
    low, high = wanted // span, wanted - span + 1
    middle = chosen = _half_even(low + high)
    active = (low < middle) & (middle < high)
    for _ in range(length.bit_length() + 2):  # each turn halves the interval
        over = _union(rank < middle[:, None], span, lengths).sum(1) > wanted
        chosen = torch.where(active, middle, chosen)
        high = torch.where(active & over, middle, high)
        low = torch.where(active & ~over, middle, low)
        middle = torch.where(active, _half_even(low + high), middle)
        active = active & (low < middle) & (middle < high)
    return _union(rank < chosen[:, None], span, lengths)


def _half_even(total: Tensor) -> Tensor:
    """round(total / 2) with halves to the even number, as Python rounds."""
    half = total // 2
    return torch.where(total % 2 == 1, half + half % 2, half)


def _union(starts: Tensor, span: int, lengths: Tensor) -> Tensor:
    """Positions (R, T) covered by spans that begin where ``starts`` (R, T) is True."""
    count = starts.to(torch.int64).cumsum(1)
    covered = count - F.pad(count, (span, 0))[:, : count.shape[1]] > 0
    return covered & (torch.arange(count.shape[1], device=starts.device)[None] < lengths[:, None])


def in_chunks(values: Tensor, span: int, fill: float | bool) -> Tensor:
    """(R, n, span), the last chunk filled up with ``fill``."""
    rows, length = values.shape
    count = chunk_count(length, span)
    return F.pad(values, (0, count * span - length), value=fill).reshape(rows, count, span)
