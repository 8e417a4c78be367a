"""int8 arithmetic for the Linear layers of a network on the CPU.

Weights: symmetric int8 with one scale per output channel. Activations: quantised while running, with one
scale per row (frame or token), so that neither padding nor the other items of a batch change a result, which
one scale per tensor (PyTorch's ``quantize_dynamic``) would do, at twice the error. Products are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nar_speech.errors import InputError
from nar_speech.layers.dot_product import allow_coarse
from nar_speech.layers.packed import PackedLinear, copy_around, is_replaceable, merge_projections

SMALLEST_OUTPUT = 16  # narrower layers (CIF's weight of a frame) gain no time and decide too much
ZERO = 128  # the unsigned byte that stands for zero: oneDNN's kernels are written for unsigned activations
TINY = 1e-12


def int8_available() -> bool:
    """Whether this PyTorch has int8 kernels for this CPU."""
    return torch.backends.mkldnn.is_available() and "x86" in torch.backends.quantized.supported_engines


def quantize_dynamic_int8(module: nn.Module) -> nn.Module:
    """Replace the Linear layers of ``module`` by int8 ones, in place, for inference on an x86 CPU.

    Layers with fewer than 16 outputs, convolutions, norms, LSTMs and embeddings stay in float32; the products
    inside attention become bfloat16 where the processor has those. The float weights are dropped: about a
    quarter of the memory is left, and the module can be neither trained, saved nor loaded any more; quantise
    after loading.

    Args:
        module: in eval mode, float32 or bfloat16 (made float32 first) parameters on the CPU.

    Returns:
        ``module`` itself, or its replacement where it is a Linear layer.

    Raises:
        InputError: parameters on another device, a module in training mode, a module that was packed before
            (:mod:`nar_speech.layers.packed`), or a CPU without int8 support.
    """
    where = {p.device.type for p in module.parameters()} - {"cpu"}
    if where:
        raise InputError(f"dtype int8: runs on the CPU only, the model is on '{where.pop()}'; use device cpu")
    if module.training:
        raise InputError("dtype int8: is for inference only; call eval() on the model first")
    if any(isinstance(m, PackedLinear) for m in module.modules()):
        raise InputError("dtype int8: this model was used in another dtype before; load it again")
    if not int8_available():
        raise InputError("dtype int8: this PyTorch has no int8 kernels for this CPU; use float32")
    allow_coarse(module)
    return _replace(merge_projections(module.float()))


def _replace(module: nn.Module) -> nn.Module:
    if is_replaceable(module):
        exempt = module.out_features < SMALLEST_OUTPUT or getattr(module, "keep_float", False)
        return module if exempt else Int8Linear(module)
    for name, child in module.named_children():
        new = _replace(child)
        if new is not child:
            setattr(module, name, new)
    return module


class Int8Linear(nn.Module):
    """An int8 copy of a Linear layer; same numbers to about 1 % of the output's size."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float().clone()
        self.register_buffer("bias", bias, persistent=False)
        scale = (weight.abs().amax(dim=1) / 127).clamp_min(TINY)
        self.scale, self.zeros = scale, torch.zeros(len(weight), dtype=torch.int64)
        integers = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(integers, None)
        # Without VNNI instructions sums of two products saturate at 16 bit unless activations have 7 bit.
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def __deepcopy__(self, memo: dict) -> Int8Linear:
        return copy_around(self, self.packed, memo)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) float -> (..., out_features) of the same dtype, without gradient.

        Raises:
            InputError: ``x`` is not on the CPU.
        """
        if x.device.type != "cpu":
            raise InputError(f"dtype int8: runs on the CPU only, got input on '{x.device}'; use device cpu")
        shape = (*x.shape[:-1], self.out_features)
        if x.numel() == 0:
            return x.new_zeros(shape)
        rows = x.detach().reshape(-1, self.in_features).float()
        step = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
        step = step.clamp_min_(TINY).div_(self.levels)
        # This rounds and converts at once: Tensor.to(uint8) alone takes five times as long.
        integers = torch.quantize_per_tensor(rows * step.reciprocal(), 1.0, ZERO, torch.quint8)
        weight = self.packed, self.scale, self.zeros
        y = torch.ops.onednn.qlinear_pointwise(
            integers.view(torch.uint8), 1.0, ZERO, *weight, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.addcmul(self.bias.float(), y, step, out=y).view(shape).to(x.dtype)
