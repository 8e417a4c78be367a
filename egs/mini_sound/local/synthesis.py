"""Building blocks of synthesised sounds at 16 kHz: tones, noise, strikes, rooms, as float64 (N,)."""

import numpy as np
from base import CLIP, RATE
from scipy.signal import fftconvolve

Generator = np.random.Generator


def seconds(count: int = CLIP) -> np.ndarray:
    """Time of each of `count` samples."""
    return np.arange(count) / RATE


def tone(
    frequency: np.ndarray | float, count: int = CLIP, harmonics: tuple[float, ...] = (1.0,)
) -> np.ndarray:
    """A tone of constant or moving frequency in Hz; `harmonics` are amplitudes, silent above 7.6 kHz."""
    moving = np.broadcast_to(np.asarray(frequency, float), (count,))
    phase = 2 * np.pi * np.cumsum(moving) / RATE
    out = np.zeros(count)
    for number, amplitude in enumerate(harmonics, 1):
        if amplitude:
            out += amplitude * np.sin(number * phase) * (number * moving < 7600)
    return out


def gate(starts: np.ndarray, ends: np.ndarray, ramp: float = 0.005, count: int = CLIP) -> np.ndarray:
    """1 between each start and end in seconds, 0 elsewhere, with linear ramps."""
    time = seconds(count)
    knots, values = [], []
    for start, end in zip(starts, ends, strict=True):
        knots += [start, start + ramp, max(end - ramp, start + ramp), max(end, start + 2 * ramp)]
        values += [0, 1, 1, 0]
    return np.interp(time, knots, values, left=0, right=0)


def noise(
    rng: Generator, count: int = CLIP, low: float = 20.0, high: float = 8000.0, slope: float = 0.0
) -> np.ndarray:
    """Noise of unit power between `low` and `high` Hz, `slope` dB an octave (-3 pink, -6 brown)."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequency = np.fft.rfftfreq(count, 1 / RATE)
    shape = np.maximum(frequency, 10.0) ** (slope / 6.02)
    shape = shape / (1 + (low / np.maximum(frequency, 1e-3)) ** 8) / (1 + (frequency / high) ** 8)
    out = np.fft.irfft(spectrum * shape, count)
    return out / (out.std() + 1e-12)


def drift(rng: Generator, count: int, rate: float) -> np.ndarray:
    """A smooth random curve from 0 to 1 that turns about `rate` times a second."""
    points = max(4, int(count / RATE * rate) + 3)
    values = rng.uniform(0, 1, points)
    place = np.linspace(0, points - 1.001, count)
    left = place.astype(int)
    part = (1 - np.cos(np.pi * (place - left))) / 2
    return values[left] * (1 - part) + values[left + 1] * part


def strike(
    frequencies: np.ndarray,
    decays: np.ndarray,
    amplitudes: np.ndarray,
    count: int,
    phases: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Decaying partials: frequencies in Hz, decays in seconds to 1/e."""
    time = seconds(count)[None]
    phase = 2 * np.pi * frequencies[:, None] * time + np.reshape(phases, (-1, 1))
    waves = amplitudes[:, None] * np.exp(-time / decays[:, None]) * np.sin(phase)
    return waves.sum(axis=0)


def place(events: list[tuple[float, np.ndarray]], count: int = CLIP) -> np.ndarray:
    """The sum of sounds, each from its start in seconds; what passes the end is cut."""
    out = np.zeros(count)
    for start, sound in events:
        first = int(start * RATE)
        if first < count:
            kept = sound[: count - first]
            out[first : first + len(kept)] += kept
    return out


def room(sound: np.ndarray, rng: Generator, time: float, wet: float) -> np.ndarray:
    """`sound` with reverberation that falls by 60 dB in `time` seconds; `wet` is its share of the power."""
    length = int(time * RATE)
    tail = noise(rng, length, 80, 5000) * 10 ** (-3 * np.arange(length) / length)
    tail[: int(0.005 * RATE)] = 0
    tail /= np.sqrt((tail**2).sum())
    return sound * np.sqrt(1 - wet) + fftconvolve(sound, tail)[: len(sound)] * np.sqrt(wet)


def onsets(
    rng: Generator, rate: float, jitter: float, first: float = 0.1, last: float = CLIP / RATE
) -> np.ndarray:
    """Times of a steady beat of `rate` a second, each moved by up to `jitter` of a beat."""
    times = np.arange(first, last, 1 / rate)
    return np.maximum(times + rng.uniform(-jitter, jitter, len(times)) / rate, 0)
