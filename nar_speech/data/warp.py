"""Change tempo and pitch apart from each other: a phase vocoder, one array operation for all frames."""

from __future__ import annotations

import numpy as np

SIZE = 512  # samples of a window: 32 ms at 16 kHz, a few pitch periods of a low voice
HOP = SIZE // 4
_WINDOW = np.hanning(SIZE + 1)[:-1].astype(np.float32)


def change_tempo(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play ``wave`` ``factor`` times as fast at the same pitch.

    A phase vocoder (Flanagan and Golden 1966): magnitudes are interpolated between frames, phases go on at
    the frequency that two neighbouring frames show. In dips of the level they start anew from the phases that
    were measured, so that the bins of the next syllable are in step.

    Args:
        wave: (N,) float32.
        factor: positive; above 1 is faster.

    Returns:
        (round(N / factor),) float32; the input itself where the factor is 1 or a wave shorter than a window.
    """
    length = round(len(wave) / factor)
    if factor == 1.0 or len(wave) < SIZE or length < SIZE:
        return wave
    padded = np.pad(wave.astype(np.float32, copy=False), (SIZE // 2, SIZE))
    frames = np.lib.stride_tricks.sliding_window_view(padded, SIZE)[::HOP]
    spectrum = np.fft.rfft(frames * _WINDOW, axis=1).astype(np.complex64)  # (T, SIZE / 2 + 1)
    places = np.arange(0, len(spectrum) - 1, factor)  # where the new frames lie between the old ones
    left = places.astype(np.int64)
    share = (places - left).astype(np.float32)[:, None]
    magnitude, phase = np.abs(spectrum), np.angle(spectrum)
    # What a bin's phase gains in one hop: that of its centre frequency, and the rest within half a turn.
    centre = (2 * np.pi * HOP / SIZE) * np.arange(SIZE // 2 + 1)
    rest = phase[left + 1] - phase[left] - centre
    advance = rest - 2 * np.pi * np.round(rest / (2 * np.pi)) + centre
    start = _restarts(np.sum(magnitude**2, axis=1)[left])
    gained = np.cumsum(advance, axis=0) - advance
    running = phase[left[start]] + gained - gained[start]
    running = np.mod(running, 2 * np.pi).astype(np.float32)  # sine and cosine are faster in float32
    level = (1 - share) * magnitude[left] + share * magnitude[left + 1]
    made = np.empty(level.shape, np.complex64)
    made.real, made.imag = level * np.cos(running), level * np.sin(running)
    out = overlap_add(np.fft.irfft(made, SIZE, axis=1).astype(np.float32) * _WINDOW)
    out = out[SIZE // 2 : SIZE // 2 + length]
    return np.pad(out, (0, length - len(out)))


def change_pitch(wave: np.ndarray, semitones: float, tempo: float = 1.0) -> np.ndarray:
    """Shift the pitch, and the formants with it, by ``semitones``; play ``tempo`` times as fast.

    Args:
        wave: (N,) float32.
        semitones: 12 is an octave up.
        tempo: as the factor of :func:`change_tempo`.

    Returns:
        About N / tempo samples, float32.
    """
    import soxr

    ratio = 2 ** (semitones / 12)
    stretched = change_tempo(wave, tempo / ratio)
    return stretched if ratio == 1.0 else soxr.resample(stretched, 1000 * ratio, 1000, quality="MQ")


def _restarts(energy: np.ndarray) -> np.ndarray:
    """(T,) for every frame the last one at or before it, from which phases go on: quiet frames and dips."""
    reach = 4  # frames, 32 ms to either side
    around = np.lib.stride_tricks.sliding_window_view(np.pad(energy, reach, mode="edge"), 2 * reach + 1)
    dip = (energy <= around.min(1)) & (energy < 0.25 * around.max(1))
    fresh = dip | (energy < 1e-5 * energy.max())
    fresh[0] = True
    return np.maximum.accumulate(np.where(fresh, np.arange(len(energy)), 0))


def overlap_add(frames: np.ndarray) -> np.ndarray:
    """Sum (T, SIZE) windowed twice frames that are HOP apart; (T + 3) * HOP samples of the original level."""
    pieces = frames.reshape(len(frames), SIZE // HOP, HOP)
    out = np.zeros((len(frames) + SIZE // HOP - 1, HOP), np.float32)
    for index in range(SIZE // HOP):
        out[index : index + len(frames)] += pieces[:, index]
    return out.ravel() * np.float32(HOP / np.sum(_WINDOW**2))
