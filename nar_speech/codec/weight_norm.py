"""Convolutions whose weights are a length times a direction, under the names of older checkpoints.

    Salimans and Kingma 2016, "Weight Normalization", equation 2: w = g v / |v|, for every output channel.

The parameters are ``weight_g`` and ``weight_v`` (torch's own weight norm now calls them otherwise). For
inference :func:`fold` puts ``weight`` in their place, so that it is not computed again in every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WeightNorm(nn.Module):
    """To be inherited before a layer with a parameter ``weight``, whose first dimension keeps its lengths."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        direction = self._parameters.pop("weight")
        length = direction.detach().flatten(1).norm(dim=1).view(-1, *[1] * (direction.dim() - 1))
        self.weight_g = nn.Parameter(length)
        self.weight_v = direction

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "weight_v" in self._parameters:
            return torch._weight_norm(self.weight_v, self.weight_g, 0)
        return super().__getattr__(name)

    def fold(self) -> None:
        """Keep the weight that both parameters stand for instead of them."""
        if "weight_v" in self._parameters:
            weight: Tensor = self.weight.detach()
            trained = self.weight_v.requires_grad
            del self.weight_g, self.weight_v
            self.weight = nn.Parameter(weight, trained)


class NormedConv1d(WeightNorm, nn.Conv1d):
    """A ``Conv1d`` under weight norm."""


class NormedConvTranspose1d(WeightNorm, nn.ConvTranspose1d):
    """A ``ConvTranspose1d`` under weight norm; lengths belong to input channels, as in older checkpoints."""


def fold(module: nn.Module) -> None:
    """Fold every layer of ``module`` that is under weight norm."""
    for layer in module.modules():
        if isinstance(layer, WeightNorm):
            layer.fold()
