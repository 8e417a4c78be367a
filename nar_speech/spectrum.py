"""From windows of samples to mel energies: what all kinds of features are made of.

Sources: Kaldi ``feat/feature-fbank.cc`` and ``feat/mel-computations.cc``; Slaney's Auditory Toolbox, 1998.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PREEMPHASIS = 0.97
LOG_FLOOR = torch.finfo(torch.float32).eps  # Kaldi's floor before the logarithm
NEMO_GUARD = 2.0**-24  # what NeMo adds before the logarithm
NEMO_SMALLEST_DEVIATION = 1e-5  # what it adds to deviations


def kaldi_spectrum_frames(waves: Tensor, window: Tensor, shift: int) -> Tensor:
    """Frames (B, T, W) of ``waves`` (B, N >= W) without DC, with pre-emphasis, times ``window`` (W,).

    Kaldi removes the mean of a frame and then takes ``x[i] - 0.97 x[i-1]`` with ``x[-1] = x[0]``. Both are
    linear, so pre-emphasis runs once over the waveform (overlapping frames share it) and only
    ``0.03 * mean`` is left to subtract from each frame.
    """
    size = len(window)
    rest = 1.0 - PREEMPHASIS
    frames = waves.unfold(1, size, shift)
    mean = frames.mean(-1, keepdim=True)
    emphasised = torch.sub(waves, waves.roll(1, dims=1), alpha=PREEMPHASIS)  # its first sample is not used
    result = emphasised.unfold(1, size, shift) - mean * rest
    result[..., 0] = (frames[..., 0] - mean[..., 0]) * rest
    return result.mul_(window)


def nemo_frames(waves: Tensor, filled: Tensor, window: Tensor, shift: int) -> Tensor:
    """Frames (B, T, W) with pre-emphasis times ``window`` (W,).

    Args:
        waves: (B, N >= W + 1); frame t is made of the samples ``shift * t + 1`` and following, and the one
            before them goes into the pre-emphasis only.
        filled: (B,) samples there are; what would follow is zero after the pre-emphasis.
    """
    emphasised = torch.sub(waves[:, 1:], waves[:, :-1], alpha=PREEMPHASIS)
    position = torch.arange(1, waves.shape[1], device=waves.device)
    emphasised = emphasised.masked_fill_(position >= filled[:, None], 0.0)
    return emphasised.unfold(1, len(window), shift) * window


def filled_frames(waves: Tensor, filled: Tensor, window: Tensor, shift: int) -> Tensor:
    """Frames (B, T, W) times ``window`` (W,) of ``waves`` (B, N >= W), zero after ``filled`` (B,) samples."""
    position = torch.arange(waves.shape[1], device=waves.device)
    return waves.masked_fill(position >= filled[:, None], 0.0).unfold(1, len(window), shift) * window


def whisper_log_energies(frames: Tensor, fft_size: int, mel: Tensor) -> Tensor:
    """log10 of the mel energies (B, T, M) of windowed frames (B, T, W), at least -10."""
    return (power(frames, fft_size) @ mel).clamp_(min=1e-10).log10_()


def nemo_log_energies(frames: Tensor, fft_size: int, mel: Tensor) -> Tensor:
    """Natural log of the guarded mel energies (B, T, M) of windowed frames (B, T, W)."""
    return (power(frames, fft_size) @ mel).add_(NEMO_GUARD).log_()


def normalize_features(features: Tensor, counts: Tensor) -> Tensor:
    """(B, T, M) with mean 0 and unbiased deviation 1 of each feature over ``counts`` (B,) valid frames."""
    valid = (torch.arange(features.shape[1], device=features.device) < counts[:, None])[..., None]
    mean = features.masked_fill(~valid, 0.0).sum(1, keepdim=True) / counts.clamp(min=1)[:, None, None]
    centred = (features - mean).masked_fill(~valid, 0.0)
    deviation = (centred.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)[:, None, None]).sqrt()
    return centred / (deviation + NEMO_SMALLEST_DEVIATION)


def log_energies(frames: Tensor, fft_size: int, mel: Tensor) -> Tensor:
    """Natural log of the mel energies (B, T, M) of windowed frames (B, T, W)."""
    return (power(frames, fft_size) @ mel).clamp_(min=LOG_FLOOR).log_()


def power(frames: Tensor, fft_size: int) -> Tensor:
    """Power spectrum (..., fft_size // 2 + 1) of frames (..., W), zero padded to ``fft_size``."""
    spectrum = torch.fft.rfft(frames, n=fft_size)
    return spectrum.real.square() + spectrum.imag.square()


def kaldi_mel_matrix(num_mels: int, fft_size: int, sample_rate: int, low: float, high: float) -> Tensor:
    """Kaldi's filters (num_mels, fft_size // 2 + 1) float64: triangles in mel, 1127 ln(1 + f / 700)."""

    def to_mel(hz: Tensor | float) -> Tensor:
        return 1127.0 * torch.log1p(torch.as_tensor(hz, dtype=torch.float64) / 700.0)

    edges = torch.linspace(to_mel(low).item(), to_mel(high).item(), num_mels + 2, dtype=torch.float64)
    bins = to_mel(torch.arange(fft_size // 2 + 1, dtype=torch.float64) * sample_rate / fft_size)
    matrix = _triangles(bins, edges)
    matrix[:, -1] = 0.0  # Kaldi leaves out the bin at half the sample rate
    return matrix


def slaney_mel_matrix(num_mels: int, fft_size: int, sample_rate: int, low: float, high: float) -> Tensor:
    """Slaney's filters (num_mels, fft_size // 2 + 1) float64, of equal area; the ones Whisper uses.

    The scale is linear below 1 kHz (200/3 Hz a mel) and logarithmic above (Auditory Toolbox, 1998).
    """
    step, knee_hz, log_step = 200.0 / 3.0, 1000.0, math.log(6.4) / 27.0
    knee = knee_hz / step

    def to_mel(hz: float) -> float:
        return hz / step if hz < knee_hz else knee + math.log(hz / knee_hz) / log_step

    mels = torch.linspace(to_mel(low), to_mel(high), num_mels + 2, dtype=torch.float64)
    edges = torch.where(mels < knee, mels * step, knee_hz * torch.exp(log_step * (mels - knee)))
    bins = torch.arange(fft_size // 2 + 1, dtype=torch.float64) * sample_rate / fft_size
    return _triangles(bins, edges) * (2.0 / (edges[2:] - edges[:-2]))[:, None]


def _triangles(bins: Tensor, edges: Tensor) -> Tensor:
    """Filters (K, bins) of height 1: up from ``edges[k]`` to ``edges[k + 1]``, down to ``edges[k + 2]``."""
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)


def window_samples(name: str, size: int) -> Tensor:
    """(size,) float64 of a symmetric window: hamming, rectangular, blackman, hann or povey."""
    if name == "hamming":
        return torch.hamming_window(size, periodic=False, dtype=torch.float64)
    if name == "rectangular":
        return torch.ones(size, dtype=torch.float64)
    if name == "blackman":
        return torch.blackman_window(size, periodic=False, dtype=torch.float64)
    hann = torch.hann_window(size, periodic=False, dtype=torch.float64)
    return hann.pow(0.85) if name == "povey" else hann


def power_of_two(size: int) -> int:
    """The smallest power of 2 that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def stft(waves: Tensor, window: int) -> Tensor:
    """Complex spectra (B, F, T) of samples (B, N) in float32: Hann windows, centred, hops of a quarter."""
    with torch.autocast(waves.device.type, enabled=False):
        shape = torch.hann_window(window, device=waves.device)
        return torch.stft(waves.float(), window, window // 4, window=shape, return_complex=True)
