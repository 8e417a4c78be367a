"""What this machine's processor computes fastest."""

from __future__ import annotations

import torch

from nar_speech.layers.quantize import int8_available


def fastest_dtype(device: torch.device | str = "cpu") -> str:
    """The dtype that ``auto`` stands for: ``int8``, ``bfloat16`` or ``float32``.

    On a CPU: int8 where it multiplies bytes (AVX-512 VNNI, or AMX, whose processors have both), bfloat16
    where it has only that (AVX-512 BF16), else float32: other processors convert at each step and gain
    nothing. On a GPU float32, as everywhere the choice has not been measured.
    """
    if torch.device(device).type != "cpu":
        return "float32"
    if has("_is_vnni_supported") and int8_available():
        return "int8"
    packable = torch.backends.mkldnn.is_available()
    return "bfloat16" if packable and has("_is_avx512_bf16_supported") else "float32"


def has(check: str) -> bool:
    """Whether the processor passes a check of ``torch.cpu``; False where this PyTorch lacks the check."""
    function = getattr(torch.cpu, check, None)
    return function is not None and bool(function())
