"""Linear layers whose weights are laid out once for the CPU's matrix kernels.

PyTorch hands a float32 Linear to a general matrix product that reorders the weights at every call, and on
AMD processors to one that is not tuned for them. Here oneDNN gets the weights in its own layout, made once.
"""

from __future__ import annotations

import torch
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
    if is_replaceable(module):
        weight = module.weight
        fits = weight.device.type == "cpu" and weight.dtype in DTYPES and weight.numel() > 0
        return PackedLinear(module) if fits else module
    for name, child in module.named_children():
        new = pack_linear_layers(child)
        if new is not child:
            setattr(module, name, new)
    return module


def keep_plain(linear: nn.Module) -> None:
    """Exempt a Linear layer whose weight is also read as a table from being packed or quantised."""
    linear.keep_plain = True


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
        """(..., in_features) -> (..., out_features), no gradient. ``activation``: "none" or "relu"."""
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, activation, [], "")


def linear_relu(linear: nn.Module, x: Tensor) -> Tensor:
    """relu(linear(x)); in one step where ``linear`` is packed."""
    if isinstance(linear, PackedLinear):
        return linear(x, "relu")
    return torch.relu_(linear(x))  # in place: neither backward pass needs the value before
