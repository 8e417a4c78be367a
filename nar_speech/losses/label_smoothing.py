"""Label-smoothed cross entropy, in float32."""

from __future__ import annotations

import math

from torch import Tensor


def label_smoothed_ce(
    logits: Tensor, targets: Tensor, smoothing: float = 0.1, length_normalized: bool = True, ignore: int = -1
) -> Tensor:
    """Kullback-Leibler divergence to a target that holds 1 - smoothing, the rest spread over the other ids.

    The smoothed target is that of WeNet, ESPnet and FunASR: smoothing / (V - 1) on every wrong id. Its
    entropy is subtracted, so a perfect prediction of the smoothed target has loss 0.

    Args:
        logits: (B, U, V) before the softmax.
        targets: (B, U) ids; ``ignore`` marks padding.
        smoothing: in [0, 1).
        length_normalized: divide by the number of targets, else by the batch size B.

    Returns:
        float32 scalar.
    """
    log_probs = logits.float().log_softmax(-1)
    valid = targets != ignore
    right = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    wrong = smoothing / (logits.shape[-1] - 1)
    entropy = (1.0 - smoothing) * math.log(1.0 - smoothing) + (
        smoothing * math.log(wrong) if wrong > 0 else 0.0
    )
    loss = entropy - (1.0 - smoothing) * right - wrong * (log_probs.sum(-1) - right)
    total = loss.masked_fill(~valid, 0.0).sum()
    return total / (valid.sum().clamp(min=1) if length_normalized else len(targets))
