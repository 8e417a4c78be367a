"""Weights in fewer bytes on disk: float16, or int8 with a scale for each row of a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

SCALE = ".scale"  # the tensor NAME.scale holds the scales of the int8 matrix NAME
SMALLEST = 4096  # values; smaller matrices are not worth the error


def compress(tensors: Mapping[str, Tensor], kind: Literal["float16", "int8"]) -> dict[str, Tensor]:
    """Float tensors as float16, and with ``int8`` matrices as rounded multiples of a float32 scale a row.

    An int8 value is off by at most half a scale, which is 1/254 of the largest value of its row.
    """
    small: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            small[name] = tensor.contiguous()
        elif kind == "int8" and tensor.ndim == 2 and tensor.numel() >= SMALLEST:
            rows = tensor.float()
            scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
            small[name] = (rows / scale).round().to(torch.int8)
            small[name + SCALE] = scale
        else:
            small[name] = tensor.half().contiguous()
    return small


def expand(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`compress`, in float32; integer tensors are left as they are."""
    large: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8 and name + SCALE in tensors:
            large[name] = tensor.float() * tensors[name + SCALE].float()
        elif not (name.endswith(SCALE) and name.removesuffix(SCALE) in tensors):
            large[name] = tensor.float() if tensor.is_floating_point() else tensor
    return large
