"""Input layers of WeNet encoders: strided 2-D convolutions without padding, or one linear layer.

Attribute names follow WeNet (``conv.0``, ``out.0`` / ``linear``). A recording shorter than the receptive
field gives zero frames.
"""

from __future__ import annotations

import torch
from torch import nn

from nar_speech.errors import ConfigError

# (kernel, stride) of each convolution, both on time and frequency.
CONVOLUTIONS = {
    "conv2d": ((3, 2), (3, 2)),
    "conv2d6": ((3, 2), (5, 3)),
    "conv2d8": ((3, 2), (3, 2), (3, 2)),
}


class Conv2dSubsampling(nn.Module):
    """Strided convolutions over (time, frequency), ReLU after each, then one linear layer.

    Args:
        input_size: features per input frame.
        output_size: width D of the result.
        kind: ``conv2d`` (rate 4), ``conv2d6`` or ``conv2d8``.

    Attributes:
        frame_stride: input frames per output frame.
        receptive_field: input frames one output frame sees.
    """

    def __init__(self, input_size: int, output_size: int, kind: str = "conv2d"):
        super().__init__()
        self.shapes = CONVOLUTIONS[kind]
        layers: list[nn.Module] = []
        frequencies, self.frame_stride, self.receptive_field = input_size, 1, 1
        for index, (kernel, stride) in enumerate(self.shapes):
            layers += [nn.Conv2d(1 if index == 0 else output_size, output_size, kernel, stride), nn.ReLU()]
            frequencies = (frequencies - kernel) // stride + 1
            self.receptive_field += (kernel - 1) * self.frame_stride
            self.frame_stride *= stride
        if frequencies < 1:
            raise ConfigError(f"input_size: {input_size} features are too few for input_layer '{kind}'")
        self.conv = nn.Sequential(*layers)
        linear = nn.Linear(output_size * frequencies, output_size)
        # WeNet names the linear layer differently in its rate-4 module.
        if kind == "conv2d":
            self.out = nn.Sequential(linear)
        else:
            self.linear = linear

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Output frames (B,) of inputs with ``lengths`` (B,) frames."""
        for kernel, stride in self.shapes:
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
            lengths = lengths.clamp(min=0)
        return lengths

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reduce the frame rate of ``x`` (B, T, F). Returns ((B, T', D), lengths (B,))."""
        project = self.out if hasattr(self, "out") else self.linear
        lengths = self.output_lengths(lengths)
        if x.shape[1] < self.receptive_field:
            width = project[0].out_features if isinstance(project, nn.Sequential) else project.out_features
            return x.new_zeros(x.shape[0], 0, width), lengths
        x = self.conv(x.unsqueeze(1))
        return project(x.transpose(1, 2).flatten(2)), lengths


class LinearInput(nn.Module):
    """Linear layer, layer norm and dropout; the frame rate stays."""

    frame_stride = 1
    receptive_field = 1

    def __init__(self, input_size: int, output_size: int, dropout: float = 0.0):
        super().__init__()
        self.out = nn.Sequential(
            nn.Linear(input_size, output_size), nn.LayerNorm(output_size), nn.Dropout(dropout)
        )

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """The same ``lengths`` (B,)."""
        return lengths

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``x`` (B, T, F) to (B, T, D); lengths (B,) are returned as they are."""
        return self.out(x), lengths


def build_input_layer(kind: str, input_size: int, output_size: int, dropout: float) -> nn.Module:
    """The input layer ``kind``: ``conv2d``, ``conv2d6``, ``conv2d8`` or ``linear``."""
    if kind == "linear":
        return LinearInput(input_size, output_size, dropout)
    if kind not in CONVOLUTIONS:
        raise ConfigError(f"input_layer: got {kind!r}; valid values: linear, {', '.join(CONVOLUTIONS)}")
    return Conv2dSubsampling(input_size, output_size, kind)
