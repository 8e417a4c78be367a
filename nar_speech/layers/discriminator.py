"""Discriminators that look at complex spectra of several resolutions (Défossez et al. 2022, section 3.4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from nar_speech.spectrum import stft

SLOPE = 0.2


class SpectrumDiscriminator(nn.Module):
    """Two-dimensional convolutions over the compressed complex spectrum of one resolution.

    Args:
        window: samples; the hop is a quarter.
        channels: of every layer.
        layers: strided ones; each halves the frequencies.
    """

    def __init__(self, window: int, channels: int = 16, layers: int = 4):
        super().__init__()
        self.window = window
        sizes = [2, *[channels] * layers]
        self.convs = nn.ModuleList(
            weight_norm(
                nn.Conv2d(
                    a, b, (9, 3), stride=(2, 1), dilation=(1, 2**n % 4 or 1), padding=(4, 2**n % 4 or 1)
                )
            )
            for n, (a, b) in enumerate(itertools.pairwise(sizes))
        )
        self.last = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, waves: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Samples (B, N) to scores (B, 1, F', T') and the hidden maps."""
        spectrum = stft(waves, self.window) / self.window**0.5
        spectrum = spectrum * spectrum.abs().clamp_min(1e-4).pow(-0.5)
        x = torch.view_as_real(spectrum).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            maps.append(x)
        return self.last(x), maps


class MultiResolutionDiscriminator(nn.Module):
    """A :class:`SpectrumDiscriminator` for each of ``windows``."""

    def __init__(self, windows: Sequence[int] = (256, 512, 1024), channels: int = 16, layers: int = 4):
        super().__init__()
        self.parts = nn.ModuleList(SpectrumDiscriminator(window, channels, layers) for window in windows)

    def forward(self, waves: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Samples (B, N) to the scores and the hidden maps of every resolution."""
        results = [part(waves) for part in self.parts]
        return [score for score, _ in results], [maps for _, maps in results]
