"""Distances between waveforms in the frequency domain, at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from nar_speech.spectrum import stft

WINDOWS = (64, 128, 256, 512, 1024, 2048)
MELS = (8, 16, 32, 64, 80, 160)
FLOOR = 1e-5  # of mel magnitudes, before the logarithm


def mel_distance(
    waves: Tensor,
    target: Tensor,
    sample_rate: int,
    windows: Sequence[int] = WINDOWS,
    mels: Sequence[int] = MELS,
) -> Tensor:
    """Mean absolute difference of log10 mel magnitudes, averaged over resolutions; a scalar.

    Source: Kumar et al. 2023 (DAC), section 3.4, with windows from 64 to 2048 samples and hops of a quarter.

    Args:
        waves, target: (B, N) samples.
        sample_rate: Hz.
        windows, mels: samples of each window, and mel bands for it.
    """
    total = waves.new_zeros(())
    for window, bands in zip(windows, mels, strict=True):
        filters = _mel_filters(sample_rate, window, bands).to(waves)
        ours, theirs = (stft(x, window).abs().transpose(1, 2) @ filters for x in (waves, target))
        total = total + (ours.clamp_min(FLOOR).log10() - theirs.clamp_min(FLOOR).log10()).abs().mean()
    return total / len(windows)


def wave_distance(waves: Tensor, target: Tensor, quiet: float = 1e-3) -> Tensor:
    """Mean absolute difference of samples, relative to the mean absolute value of the target; a scalar.

    Args:
        waves, target: (B, N) samples; every row counts alike.
        quiet: added to the mean value of a row, so that silence does not count for much.
    """
    difference = (waves - target).float().abs().mean(1)
    return (difference / (target.float().abs().mean(1) + quiet)).mean()


@lru_cache(maxsize=64)
def _mel_filters(sample_rate: int, window: int, bands: int) -> Tensor:
    """(window / 2 + 1, bands) triangles; empty ones of a coarse spectrum are left out."""
    import torchaudio.functional as AF

    filters = AF.melscale_fbanks(window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, norm="slaney")
    return filters[:, filters.sum(0) > 0]
