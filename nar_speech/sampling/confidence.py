"""How sure the model is of what it drew."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nar_speech.errors import ConfigError


def confidence_of(kind: str, probabilities: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """Confidence of every drawn token, in [0, 1] but for ``logit``.

    Args:
        kind: ``probability`` of the token; ``purity`` highest probability; ``margin`` between the two
            highest; ``entropy`` 1 - entropy / log V.
        probabilities: (M, V) float32.
        tokens: (M,) int64.

    Returns:
        (M,) float32.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind == "probability":
        return probabilities.gather(1, tokens[:, None])[:, 0]
    if kind == "purity":
        return probabilities.amax(-1)
    if kind == "margin":
        if probabilities.shape[-1] < 2:
            return probabilities.amax(-1)
        first = probabilities.topk(2, dim=-1).values
        return first[:, 0] - first[:, 1]
    if kind == "entropy":
        return (1 - entropy(probabilities) / math.log(max(probabilities.shape[-1], 2))).clamp(min=0)
    if kind == "logit":
        return logits.gather(1, tokens[:, None])[:, 0]
    raise ConfigError(f"confidence '{kind}': unknown; use probability, purity, margin, entropy or logit")


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of each row, (M,)."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def gumbel(exponential: Tensor) -> Tensor:
    """Gumbel noise from draws of Exp(1)."""
    return -torch.log(exponential)
