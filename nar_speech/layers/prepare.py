"""Transformers made ready for inference: the number type of their products, weights laid out for kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from nar_speech.errors import InputError
from nar_speech.layers.packed import keep_float, pack_linear_layers
from nar_speech.layers.quantize import quantize_dynamic_int8


def prepare_products(
    network: nn.Module,
    dtype: str,
    exact: Iterable[nn.Linear],
    blocks: Iterable[tuple[nn.Module, Iterable[nn.Module]]],
) -> nn.Module:
    """Freeze ``network``, give its products their type, and on a CPU lay the weights out for its kernels.

    Args:
        dtype: ``float32``; ``bfloat16``, ``float16`` (not on a CPU): rounded products; ``int8`` (CPU).
        exact: layers that stay in float32 where others become int8.
        blocks: every block with its parts that compute in half precision; the block learns it as ``compute``.

    Raises:
        InputError: another ``dtype``.
    """
    network.eval().requires_grad_(False)
    cpu = next(network.parameters()).device.type == "cpu"
    if dtype == "int8":
        for layer in exact:
            keep_float(layer)
        quantize_dynamic_int8(network)
    elif dtype in ("bfloat16", "float16") and not (cpu and dtype == "float16"):
        for block, parts in blocks:
            block.compute = getattr(torch, dtype)
            for part in parts:
                part.to(block.compute)
    elif dtype != "float32":
        known = "float32, bfloat16, int8" if cpu else "float32, bfloat16, float16"
        raise InputError(f"dtype: got '{dtype}'; valid values here: {known}")
    return pack_linear_layers(network) if cpu else network
