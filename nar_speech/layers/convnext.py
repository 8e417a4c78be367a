"""ConvNeXt block over time: depthwise convolution, norm, two pointwise layers (Siuzdak 2023, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.layers.conv import depthwise


class CausalConvNeXtBlock(nn.Module):
    """A ConvNeXt block that sees the ``kernel - 1`` frames before and none after.

    Args:
        width, hidden: channels D, and between the pointwise layers.
        kernel: of the depthwise convolution.
        scale: what the block's output is multiplied with at first; learnt for each channel.
    """

    def __init__(self, width: int, hidden: int, kernel: int = 7, scale: float = 0.1):
        super().__init__()
        self.context = kernel - 1
        self.dwconv = nn.Conv1d(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, hidden)
        self.pwconv2 = nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.full((width,), scale))

    def init_state(self, batch: int, device: torch.device | str = "cpu", dtype=torch.float32) -> Tensor:
        """Frames (B, kernel - 1, D) before the first one: zeros."""
        return torch.zeros(batch, self.context, self.dwconv.in_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Frames (B, T, D) and the frames before them: (B, T, D) and the frames before what follows."""
        if state is None:
            state = self.init_state(len(x), x.device, x.dtype)
        seen = torch.cat([state.to(x.dtype), x], 1)
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(depthwise(self.dwconv, seen)))))
        return x + self.gamma * y, seen[:, seen.shape[1] - self.context :]
