"""Which units stay masked after a step."""

from __future__ import annotations

import torch
from torch import Tensor

from nar_speech.sampling.confidence import entropy
from nar_speech.sampling.spans import in_chunks


def keep_masked(scores: Tensor, candidates: Tensor, count: Tensor, explored: Tensor | None = None) -> Tensor:
    """The ``count`` candidates with the highest scores; of equal ones the earlier.

    Args:
        scores: (R, n) float32.
        candidates: (R, n) bool, units that are masked now.
        count: (R,) int64; more than there are candidates means all.
        explored: (R,) int64: so many of the highest scores are left out and the next ones taken instead.

    Returns:
        (R, n) bool.
    """
    rank = _ranks(scores, candidates)
    first = torch.zeros_like(count) if explored is None else explored
    inside = (rank >= first[:, None]) & (rank < (first + count)[:, None])
    return inside & candidates


def dilated_groups(units: int, block: int) -> Tensor:
    """The step (units,) in which each unit is unmasked: Dilated Unmasking Scheduler, arXiv 2506.19037.

    Group 0 is every ``block``-th unit, group 1 the middles between those, group 2 the middles of what remains
    ...; the last of the log2(block) + 1 groups is every second unit.
    """
    offset = torch.arange(units) % block
    lowest_bit = offset & -offset
    levels = block.bit_length() - 1
    return torch.where(offset == 0, 0, levels - torch.log2(lowest_bit.clamp(min=1)).round().to(torch.int64))


def sure_units(kind: str, level: float, confidence: Tensor, entropies: Tensor, candidates: Tensor) -> Tensor:
    """Units that can be unmasked together whatever the schedule says.

    Args:
        kind: ``threshold``, ``factor`` or ``entropy``; see :class:`nar_speech.sampling.config.MaskedConfig`.
        confidence: (R, n) of each unit, in [0, 1].
        entropies: (R, n) in nats.
        candidates: (R, n) bool.

    Returns:
        (R, n) bool.
    """
    rank = _ranks(confidence, candidates)
    if kind == "threshold":
        sure = confidence >= level
    else:
        order = rank.argsort(1)
        behind = ~candidates.gather(1, order)
        if kind == "factor":
            number = torch.arange(1, rank.shape[1] + 1, device=rank.device)[None]
            good = (number + 1) * (1 - confidence.gather(1, order)) < level
            # The condition may fail and hold again further on: the largest n counts.
            reach = torch.where(good & ~behind, number, 0).amax(1, keepdim=True)
        else:
            ordered = entropies.gather(1, order).masked_fill(behind, 0.0)
            bound = ordered.cumsum(1) - ordered.cummax(1).values
            reach = ((bound <= level) & ~behind).to(torch.int64).cumprod(1).sum(1, keepdim=True)
        sure = rank < reach
    return sure & candidates


def unit_certainty(probabilities: Tensor, tokens: Tensor, where: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Confidence and entropy of units, from the untempered distributions of their masked tokens.

    Args:
        probabilities: (M, V) of the positions where ``where`` (R, T) is True.
        tokens: (M,) drawn.

    Returns:
        The lowest probability of a unit's drawn tokens and the sum of its tokens' entropies, (R, n) each.
    """
    drawn = probabilities.gather(1, tokens[:, None])[:, 0]
    lowest = torch.ones(where.shape, device=where.device).masked_scatter(where, drawn)
    total = torch.zeros(where.shape, device=where.device).masked_scatter(where, entropy(probabilities))
    return in_chunks(lowest, span, 1.0).amin(-1), in_chunks(total, span, 0.0).sum(-1)


def _ranks(values: Tensor, candidates: Tensor) -> Tensor:
    """(R, n) place of every unit in descending order, those that are no candidates last."""
    order = values.masked_fill(~candidates, -torch.inf)
    # A second key keeps candidates of score -inf before the others.
    order = order.argsort(dim=1, descending=True, stable=True)
    inside = candidates.gather(1, order)
    order = order.gather(1, inside.to(torch.int8).argsort(dim=1, descending=True, stable=True))
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places.contiguous())
