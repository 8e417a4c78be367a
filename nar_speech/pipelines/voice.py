"""A voice: what the networks need of a prompt, made once and used for any number of texts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nar_speech.audio import AudioSource, read_audio
from nar_speech.errors import InputError
from nar_speech.pipelines.transcribe import name_of
from nar_speech.types import Audio

MIN_SECONDS, MAX_SECONDS = 0.5, 30.0
SILENCE = 1e-3  # deviation of the loudest 20 ms, -60 dBFS
WINDOW_SECONDS = 0.02


@dataclass(frozen=True)
class Voice:
    """A prompt as the networks see it.

    Attributes:
        semantic: (P,) int64 codes.
        acoustic: (P', K) int64 codes; P' may differ from P by a frame or so.
        phones: ids of what it says.
        samples: of its sound, at ``sample_rate`` Hz, that of the features.
        text: what it says.
        source: where it is from, for messages.
    """

    semantic: Tensor
    acoustic: Tensor
    phones: tuple[int, ...]
    samples: int
    sample_rate: int
    text: str
    source: str

    @property
    def seconds(self) -> float:
        """Of its sound."""
        return self.samples / self.sample_rate


def hold(source: AudioSource, sample_rate: int) -> Any:
    """A source that can be read twice: streams are read, bare arrays get ``sample_rate``."""
    if isinstance(source, str | Path):
        return sys.stdin.buffer.read() if str(source) == "-" else source
    if hasattr(source, "read"):
        return source.read()
    if isinstance(source, bytes | bytearray | memoryview | Audio | tuple):
        return source
    return (source, sample_rate)


def read_prompt(source: AudioSource, rates: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, str]:
    """The sound of a prompt in two rates, each resampled from the recording itself, and its name.

    Args:
        source: see :func:`nar_speech.audio.read_audio`; a bare array has the second rate.
        rates: Hz.

    Returns:
        (N,) and (N',) float32, mono.

    Raises:
        AudioError: it can't be read. InputError: too short, too long, or silent.
    """
    name = name_of(source)
    held = hold(source, rates[1])
    first, second = (read_audio(held, rate, duration=MAX_SECONDS + 1).samples for rate in rates)
    seconds = len(first) / rates[0]
    if seconds < MIN_SECONDS:
        raise InputError(
            f"{name}: the prompt lasts {seconds:.2f} s; give at least {MIN_SECONDS:g} s of speech, best 3 to"
            " 10 s"
        )
    if seconds > MAX_SECONDS:
        raise InputError(f"{name}: the prompt is longer than {MAX_SECONDS:g} s; cut it, 3 to 10 s are best")
    if loudest(first, rates[0]) < SILENCE:
        raise InputError(f"{name}: the prompt is silent; give a recording of speech")
    return first, second, name


def loudest(samples: np.ndarray, rate: int) -> float:
    """Deviation of the loudest window of 20 ms; a constant offset is no sound."""
    size = max(round(WINDOW_SECONDS * rate), 1)
    windows = samples[: len(samples) // size * size].reshape(-1, size)
    return float(windows.std(1).max(initial=0.0))
