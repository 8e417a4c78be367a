"""Loudness of sound (ITU-R BS.1770) and bringing it to a target without clipping."""

from __future__ import annotations

import math

import numpy as np
import torch

BLOCK_SECONDS = 0.4  # of the measure's blocks; a shorter sound is measured as if it went on
PEAK = 0.99


def loudness(samples: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness in LUFS; -inf for silence.

    Args:
        samples: (N,) or (C, N) float32.
    """
    import torchaudio

    waves = torch.from_numpy(np.atleast_2d(samples).astype(np.float32))
    least = math.ceil(BLOCK_SECONDS * sample_rate) + 1
    if waves.shape[-1] == 0 or not bool(waves.any()):
        return -math.inf
    if waves.shape[-1] < least:
        waves = waves.repeat(1, math.ceil(least / waves.shape[-1]))
    found = float(torchaudio.functional.loudness(waves, sample_rate))
    return found if math.isfinite(found) else -math.inf


def normalize_loudness(
    samples: np.ndarray, sample_rate: int, target: float, peak: float = PEAK
) -> np.ndarray:
    """The sound with one gain: to ``target`` LUFS, or as near to it as its highest sample may go.

    Args:
        samples: (N,) or (C, N) float32.
        peak: what no sample exceeds, so that nothing is clipped.
    """
    found = loudness(samples, sample_rate)
    highest = float(np.abs(samples).max(initial=0.0))
    if found == -math.inf or highest == 0:
        return samples
    gain = min(10 ** ((target - found) / 20), peak / highest)
    return (samples * np.float32(gain)).astype(np.float32)
