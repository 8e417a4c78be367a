"""Linear layers whose weights are laid out once for the CPU's matrix kernels.

PyTorch hands a float32 Linear to a general matrix product that reorders the weights at every call, and on
AMD processors to one that is not tuned for them. Here oneDNN gets the weights in its own layout, made once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.errors import InputError

ROWS = 256  # the layout is chosen for inputs of about this many frames or tokens; it is right for any number
DTYPES = (torch.float32, torch.bfloat16)


def pack_linear_layers(module: nn.Module) -> nn.Module:
    """Replace the Linear layers of ``module`` by packed ones, in place, for inference on the CPU.

    Results differ from those of the plain layers by rounding only. The plain weights are dropped: the module
    can be neither trained, saved, loaded nor moved to another device or dtype any more; pack last. Nothing
    is changed on a device other than the CPU, in other dtypes than float32 and bfloat16, in training mode,
    and where PyTorch was built without oneDNN.

    Returns:
        ``module`` itself, or its replacement where it is a Linear layer.
    """
    if module.training or not torch.backends.mkldnn.is_available():
        return module
    return _pack(merge_projections(module))


def _pack(module: nn.Module) -> nn.Module:
    if is_replaceable(module):
        weight = module.weight
        fits = weight.device.type == "cpu" and weight.dtype in DTYPES and weight.numel() > 0
        return PackedLinear(module) if fits else module
    for name, child in module.named_children():
        new = _pack(child)
        if new is not child:
            setattr(module, name, new)
    return module


def merge_projections(module: nn.Module) -> nn.Module:
    """Let the layers of ``module`` that have a method ``merge_projections`` make one product of several.

    For inference: the names of the parameters change. Returns ``module``, changed in place.
    """
    for part in list(module.modules()):
        if hasattr(part, "merge_projections"):
            part.merge_projections()
    return module


def merge_linears(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of several side by side; those of the same input, with or without bias."""
    first = linears[0]
    merged = nn.Linear(first.in_features, sum(linear.out_features for linear in linears), device="meta")
    merged.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), False)
    biases = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    merged.bias = nn.Parameter(torch.cat(biases), False)
    return merged.train(first.training)


def keep_plain(linear: nn.Module) -> None:
    """Exempt a Linear layer whose weight is also read as a table from being packed or quantised."""
    linear.keep_plain = True


def keep_float(linear: nn.Module) -> None:
    """Exempt a Linear layer from being quantised; it may be packed."""
    linear.keep_float = True


def is_replaceable(module: nn.Module) -> bool:
    """Whether ``module`` is a Linear layer that only ever computes its product (a subclass may do more)."""
    return type(module) is nn.Linear and not getattr(module, "keep_plain", False)


class PackedLinear(nn.Module):
    """A copy of a Linear layer on the CPU with its weight in oneDNN's layout."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().contiguous()
        self.dtype = weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"

    def __deepcopy__(self, memo: dict) -> PackedLinear:
        return copy_around(self, self.packed, memo)

    def _apply(self, fn, recurse=True):
        """Refuse what ``to()`` can't do to a packed weight; do nothing where nothing would change."""
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.dtype != self.dtype or probe.device.type != "cpu":
            raise InputError(
                f"this model is laid out for {self.dtype} on the CPU and can't become {probe.dtype} on"
                f" '{probe.device}'; load it again"
            )
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """(..., in_features) -> (..., out_features), no gradient. ``activation``: "none", "relu", "gelu"."""
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        kind = "none" if activation == "gelu" else ""  # the exact one, not the tanh approximation
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, activation, [], kind)


class WindowProduct(nn.Module):
    """A Conv1d over time as one product of its windows, laid side by side, with a Linear layer.

    It reads and gives rows of channels, as everything else does, and can be packed and quantised.
    """

    def __init__(self, conv: nn.Conv1d):
        """``conv``: without groups and dilation, padded with zeros."""
        super().__init__()
        (self.kernel,), (self.stride,), (self.padding,) = conv.kernel_size, conv.stride, conv.padding
        weight = conv.weight.detach().transpose(1, 2).flatten(1)  # (D, kernel * C)
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.linear.weight = nn.Parameter(weight.contiguous(), False)
        self.linear.bias = nn.Parameter(conv.bias.detach(), False)
        self.train(conv.training)

    def forward(
        self, x: Tensor, product: Callable[[nn.Module, Tensor], Tensor], padded: bool = True
    ) -> Tensor:
        """(B, T, C) -> (B, T', D): ``product`` (:func:`linear_gelu`) of the layer and its (B, T', K C).

        ``padded``: whether to pad; a step of a stream brings what is beside it.
        """
        x = (F.pad(x, (0, 0, self.padding, self.padding)) if padded else x).contiguous()
        batch, frames, channels = x.shape
        count = (frames - self.kernel) // self.stride + 1
        strides = (frames * channels, self.stride * channels, 1)
        return product(self.linear, x.as_strided((batch, count, self.kernel * channels), strides))


def copy_around(module: nn.Module, packed: Tensor, memo: dict) -> nn.Module:
    """A deep copy of ``module`` that shares a packed weight, which can't be copied and never changes."""
    memo[id(packed)] = packed
    new = module.__new__(type(module))
    memo[id(module)] = new
    new.__dict__ = copy.deepcopy(module.__dict__, memo)
    return new


def linear_relu(linear: nn.Module, x: Tensor) -> Tensor:
    """relu(linear(x)); in one step where ``linear`` is packed."""
    if isinstance(linear, PackedLinear):
        return linear(x, "relu")
    return torch.relu_(linear(x))  # in place: neither backward pass needs the value before


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """gelu(linear(x)), the exact function; in one step where ``linear`` is packed."""
    return linear(x, "gelu") if isinstance(linear, PackedLinear) else F.gelu(linear(x))
