"""Distances between waveforms in the frequency domain, at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from nar_speech.spectrum import stft

WINDOWS = (64, 128, 256, 512, 1024, 2048)
MELS = (8, 16, 32, 64, 80, 160)
FLOOR = 1e-5  # of mel magnitudes, before the logarithm
LOUDNESS = 0.4  # power of a magnitude


def mel_distances(
    waves: Tensor,
    target: Tensor,
    sample_rate: int,
    windows: Sequence[int] = WINDOWS,
    mels: Sequence[int] = MELS,
) -> tuple[Tensor, Tensor]:
    """Two distances of mel magnitudes, averaged over resolutions; scalars.

    Sources: Kumar et al. 2023 (DAC), section 3.4, with windows from 64 to 2048 samples and hops of a quarter,
    for the first; Stevens' power law of loudness for the second.

    Args:
        waves, target: (B, N) samples.
        sample_rate: Hz.
        windows, mels: samples of each window, and mel bands for it.

    Returns:
        The mean absolute difference of log10 magnitudes, which asks for every band at every moment alike,
        silent ones too; and that of loudness (magnitudes to the power of 0.4) relative to a row's mean
        loudness, which asks for what is heard most.
    """
    logs, loud = waves.new_zeros(()), waves.new_zeros(())
    for window, bands in zip(windows, mels, strict=True):
        filters = _mel_filters(sample_rate, window, bands).to(waves)
        ours, theirs = (
            (stft(x, window).abs().transpose(1, 2) @ filters).clamp_min(FLOOR).log10()
            for x in (waves, target)
        )
        logs = logs + (ours - theirs).abs().mean()
        ours, theirs = (10.0 ** (LOUDNESS * x) for x in (ours, theirs))
        loud = loud + ((ours - theirs).abs().mean((1, 2)) / theirs.mean((1, 2))).mean()
    return logs / len(windows), loud / len(windows)


def mel_distance(
    waves: Tensor,
    target: Tensor,
    sample_rate: int,
    windows: Sequence[int] = WINDOWS,
    mels: Sequence[int] = MELS,
) -> Tensor:
    """The first of :func:`mel_distances`."""
    return mel_distances(waves, target, sample_rate, windows, mels)[0]


@lru_cache(maxsize=64)
def _mel_filters(sample_rate: int, window: int, bands: int) -> Tensor:
    """(window / 2 + 1, bands) triangles; empty ones of a coarse spectrum are left out."""
    import torchaudio.functional as AF

    filters = AF.melscale_fbanks(window // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, norm="slaney")
    return filters[:, filters.sum(0) > 0]
