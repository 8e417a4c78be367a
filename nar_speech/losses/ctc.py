"""CTC losses with the conventions of the common toolkits, always in float32.

CTC: Graves et al. 2006. Intermediate CTC: Lee and Watanabe 2021, equation 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nar_speech.errors import ConfigError

# What toolkits do with the per-utterance losses: WeNet and ESPnet "sum over batch / batch size",
# torch's "mean" divides each by its target length first, NeMo's "mean_volume" divides by all target tokens.
REDUCTIONS = ("batch_mean", "token_mean", "mean_volume", "sum", "none")


def ctc_loss(
    log_probs: Tensor,
    lengths: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: str = "batch_mean",
    zero_infinity: bool = True,
) -> Tensor:
    """Negative log likelihood of the targets, summed over all CTC paths.

    Args:
        log_probs: (B, T, V) log probabilities.
        lengths: (B,) valid frames.
        targets: (B, U) ids; entries beyond the target length are ignored (padding may be -1).
        target_lengths: (B,).
        blank: id of the blank.
        reduction: ``batch_mean`` sum over the batch / B (WeNet, ESPnet); ``token_mean`` each utterance / its
            target length, then the mean (torch "mean"); ``mean_volume`` sum / number of target tokens (NeMo);
            ``sum``; ``none`` gives (B,).
        zero_infinity: an utterance whose target does not fit (see :func:`fits`) counts 0 with a zero
            gradient; else its loss is infinite.

    Returns:
        float32 scalar, or (B,) for ``none``.
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction: got {reduction!r}; valid values: {', '.join(REDUCTIONS)}")
    if log_probs.shape[1] == 0:  # no frame at all: only the empty target is possible
        losses = log_probs.new_zeros(len(lengths), dtype=torch.float32)
        if not zero_infinity:
            losses = losses.masked_fill(target_lengths > 0, float("inf"))
    else:
        losses = F.ctc_loss(
            log_probs.float().transpose(0, 1),
            targets.clamp(min=0),
            lengths,
            target_lengths,
            blank,
            reduction="none",
            zero_infinity=zero_infinity,
        )
    if reduction == "none":
        return losses
    if reduction == "token_mean":
        return (losses / target_lengths.clamp(min=1)).mean()
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (len(lengths) if reduction == "batch_mean" else target_lengths.sum().clamp(min=1))


def required_frames(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """(B,) frames a CTC path of ``targets`` (B, U) needs: one per token and one per repeated neighbour."""
    if targets.shape[1] < 2:
        return target_lengths.clone()
    inside = torch.arange(1, targets.shape[1], device=targets.device) < target_lengths.unsqueeze(1)
    repeats = (targets[:, 1:] == targets[:, :-1]) & inside
    return target_lengths + repeats.sum(1)


def fits(lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """(B,) bool: whether the targets (B, U) have any CTC path in ``lengths`` (B,) frames."""
    return lengths >= required_frames(targets, target_lengths)


def interctc_loss(last: Tensor, intermediate: Sequence[Tensor], weight: float) -> Tensor:
    """(1 - weight) * last + weight * mean(intermediate); ``last`` where there is no intermediate loss."""
    if not intermediate:
        return last
    return (1.0 - weight) * last + weight * torch.stack(tuple(intermediate)).mean(0)
