"""The network of Resemble AI's Perth, an inaudible watermark (MIT licence), with its official names.

It works on decibels of a spectrogram: an encoder adds to the lowest 2 kHz of loud frames what listeners don't
hear, a decoder tells how sure it is to find it, at three speeds, so that stretching does not hide it.
Letters: B sounds, F frequencies, T frames, S the lowest frequencies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_RATE = 32_000
FFT, HOP = 2048, 320
BAND = 128  # S, up to 2 kHz
HIDDEN, KERNEL, BLOCKS = 256, 7, 5
FLOOR_DB, HEADROOM_DB = -180.0, 15.0  # they become 0 and 1
QUIET = 0.05  # frames whose sum is below this part of the highest carry no mark
SPEEDS = {"slow_layers": 1.25, "normal_layers": 1.0, "fast_layers": 0.75}


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, bent: bool = True):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.bent = bent

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.leaky_relu(x) if self.bent else x


def _stack(outputs: int) -> nn.Sequential:
    middle = [_Conv(HIDDEN, HIDDEN, KERNEL) for _ in range(BLOCKS)]
    return nn.Sequential(_Conv(BAND, HIDDEN, 1), *middle, _Conv(HIDDEN, outputs, 1, bent=False))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _stack(BAND)


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in SPEEDS:
            setattr(self, name, _stack(2))


class PerthNet(nn.Module):
    """Encoder and decoder of the mark."""

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _Encoder(), _Decoder()
        self.register_buffer("window", torch.hann_window(FFT), persistent=False)

    def mark(self, waves: Tensor) -> Tensor:
        """What is to be added to waves (B, N) at 32 kHz, N > 1024; the same shape."""
        spectra = self._spectra(waves)
        level = _level(spectra)
        added = torch.zeros_like(level)
        added[:, :BAND] = self.encoder.layers(level[:, :BAND]) * _loud(level)
        # The phases stay, so only the size of every value changes.
        gain = _amplitude(level + added) / _amplitude(level)
        change = spectra * (gain - 1)
        return torch.istft(change, FFT, HOP, window=self.window, length=waves.shape[1])

    def detect(self, waves: Tensor) -> Tensor:
        """How surely waves (B, N) at 32 kHz, N > 1024, are marked: (B,) from 0 to 1."""
        level = _level(self._spectra(waves))
        loud, band, frames = _loud(level), level[:, :BAND], level.shape[2]
        votes, weights = [], []
        for name, speed in SPEEDS.items():
            size = max(int(frames * speed), 1)
            stretched = band
            if size != frames:
                stretched = F.interpolate(band, size=size, mode="linear", align_corners=True)
            heard = F.interpolate(loud, size=size, mode="nearest")
            weight, vote = getattr(self.decoder, name)(stretched).unbind(1)
            total = heard[:, 0].sum(1).clamp(min=1)
            weights.append((weight * heard[:, 0]).sum(1) / total)
            votes.append((vote * heard[:, 0]).sum(1) / total)
        shares = torch.stack(weights, 1).softmax(1)
        return (torch.stack(votes, 1) * shares).sum(1).clamp(0.0, 1.0)

    def _spectra(self, waves: Tensor) -> Tensor:
        """(B, F, T) complex."""
        return torch.stft(waves, FFT, HOP, window=self.window, return_complex=True)


def _level(spectra: Tensor) -> Tensor:
    decibels = 20 * spectra.abs().clamp(min=10 ** (FLOOR_DB / 20)).log10()
    return (decibels - FLOOR_DB) / (HEADROOM_DB - FLOOR_DB)


def _amplitude(level: Tensor) -> Tensor:
    return 10 ** ((level * (HEADROOM_DB - FLOOR_DB) + FLOOR_DB) / 20).clamp(max=10)


def _loud(level: Tensor) -> Tensor:
    """(B, 1, T), 1 for frames that carry a mark."""
    total = level.sum(1)
    return (total > QUIET * total.amax(1, keepdim=True)).to(level.dtype)[:, None]
