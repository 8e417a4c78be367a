"""Streams of the SEANet layers of EnCodec and Mimi in transformers (Défossez et al. 2022, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from nar_speech.codec.stream import Chain, Conv, ConvTranspose, Op, Pointwise, Residual, ResidualLstm
from nar_speech.errors import ConfigError


def seanet_ops(layers: Iterable[nn.Module]) -> Chain:
    """Operators of an encoder's or a decoder's layers."""
    return Chain([layer_op(layer) for layer in layers])


def layer_op(layer: nn.Module) -> Op:
    """The operator of one layer: a convolution, an LSTM, a residual block, an activation."""
    if hasattr(layer, "norm"):
        raise ConfigError("a norm over time needs the whole signal; such layers can't be streamed")
    if hasattr(layer, "lstm"):
        return ResidualLstm(layer.lstm)
    if hasattr(layer, "block"):
        block = Chain([layer_op(part) for part in layer.block])
        shortcut = None if isinstance(layer.shortcut, nn.Identity) else layer_op(layer.shortcut)
        return Residual(block, layer.block[-1].conv.out_channels, shortcut)
    conv = getattr(layer, "conv", None)
    if isinstance(conv, nn.ConvTranspose1d):
        return _transposed(layer, conv)
    if isinstance(conv, nn.Conv1d):
        return _convolution(layer, conv)
    return Pointwise(layer)


def _convolution(layer: nn.Module, conv: nn.Conv1d) -> Conv:
    """Padding of in all kernel - stride samples, all on the left where causal."""
    total = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1 - conv.stride[0]
    right = 0 if layer.causal else total // 2
    return Conv(conv, total - right, right, layer.pad_mode, fill=True)


def _transposed(layer: nn.Module, conv: nn.ConvTranspose1d) -> ConvTranspose:
    """Of the kernel - stride samples too many, where causal all or a part is trimmed on the right."""
    total = conv.kernel_size[0] - conv.stride[0]
    right = math.ceil(total * layer.trim_right_ratio) if layer.causal else total // 2
    return ConvTranspose(conv, total - right, right)


def fold_weight_norm(module: nn.Module) -> None:
    """Replace the weight-norm pairs of all layers by the weights that they stand for."""
    for layer in module.modules():
        if nn.utils.parametrize.is_parametrized(layer, "weight"):
            nn.utils.parametrize.remove_parametrizations(layer, "weight")
