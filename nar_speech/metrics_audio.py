"""How far a reconstruction is from the recording it was made of, and how evenly codes are used.

Plain measures that need no model. Signals are (N,) or (C, N) float; of signals of different lengths the
common part is compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nar_speech.errors import InputError

WINDOWS = (512, 1024, 2048)  # of the mel distance, samples
BANDS = 80
FLOOR = 1e-5
TINY = 1e-12


def si_sdr(reference: np.ndarray | Tensor, estimate: np.ndarray | Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, equation 4), mean removed.

    Infinite for a perfect estimate, minus infinite where either signal is silent.
    """
    target, guess = (x.double() - x.double().mean(-1, keepdim=True) for x in _pair(reference, estimate))
    energy = float(target.square().sum())
    scale = float((target * guess).sum()) / energy if energy > TINY else 0.0
    kept = scale * target
    signal, noise = float(kept.square().sum()), float((guess - kept).square().sum())
    if signal <= TINY:
        return -math.inf
    return math.inf if noise <= signal * 1e-15 else 10 * math.log10(signal / noise)


def mel_distance(reference: np.ndarray | Tensor, estimate: np.ndarray | Tensor, sample_rate: int) -> float:
    """Mean absolute difference of natural-log mel magnitudes, over windows of 512, 1024 and 2048 samples.

    80 bands (fewer for short windows), floored at 1e-5.
    """
    pair = _pair(reference, estimate)
    totals = []
    for window in WINDOWS:
        first, second = (_log_mel(x, sample_rate, window) for x in pair)
        totals.append(float((first - second).abs().mean()))
    return sum(totals) / len(totals)


def log_spectral_distance(reference: np.ndarray | Tensor, estimate: np.ndarray | Tensor) -> float:
    """Root mean square difference of log spectra of 1024 samples in dB, over each frame, then averaged."""
    first, second = (20 * _magnitudes(x, 1024).clamp(min=FLOOR).log10() for x in _pair(reference, estimate))
    return float((first - second).square().mean(-2).sqrt().mean())


@dataclass(frozen=True)
class CodebookUse:
    """Use of a codebook: the share of its codes that occur, and the perplexity of their frequencies."""

    used: float
    perplexity: float


def codebook_use(tokens: Tensor, size: int) -> list[CodebookUse]:
    """Use of every codebook of tokens (K, T) with codes 0 to ``size - 1``.

    Raises:
        InputError: there are no tokens, or some out of range.
    """
    if tokens.dim() != 2 or not tokens.numel():
        raise InputError(f"tokens of shape {tuple(tokens.shape)}; expected (codebooks, frames)")
    low, high = (int(bound) for bound in torch.aminmax(tokens))
    if low < 0 or high >= size:
        raise InputError(f"code {low if low < 0 else high} is not in 0 to {size - 1}")
    found = []
    for row in tokens.long():
        shares = torch.bincount(row, minlength=size).double() / row.numel()
        entropy = -torch.xlogy(shares, shares).sum()
        found.append(CodebookUse(float((shares > 0).double().mean()), float(entropy.exp())))
    return found


def _pair(reference: np.ndarray | Tensor, estimate: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """Both as (C, N) float32 of one length."""
    first, second = (torch.as_tensor(x).detach().float().cpu() for x in (reference, estimate))
    first, second = (x[None] if x.dim() == 1 else x for x in (first, second))
    length = min(first.shape[-1], second.shape[-1])
    if first.dim() != 2 or first.shape[0] != second.shape[0] or not length:
        raise InputError(
            f"signals of shapes {tuple(first.shape)} and {tuple(second.shape)} can't be compared; give as"
            " many channels, and samples"
        )
    return first[:, :length], second[:, :length]


def _magnitudes(x: Tensor, window: int) -> Tensor:
    """(C, F, T) magnitudes, centred, zeros outside the signal, of a Hann window that sums to 1."""
    hann = torch.hann_window(window)
    frames = torch.stft(
        x, window, window // 4, window=hann / hann.sum(), pad_mode="constant", return_complex=True
    )
    return frames.abs()


def _log_mel(x: Tensor, sample_rate: int, window: int) -> Tensor:
    from torchaudio.functional import melscale_fbanks

    bands = min(BANDS, window // 16)
    banks = melscale_fbanks(window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate)
    return (_magnitudes(x, window).transpose(1, 2) @ banks).clamp(min=FLOOR).log()
