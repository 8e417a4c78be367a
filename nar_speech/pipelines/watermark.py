"""An inaudible mark on sound that a machine made, and how to find it.

The network and its weights are those of Resemble AI's Perth (MIT licence, package ``resemble-perth``), read
from the package without running it: it needs modules that newer Pythons lack, and loads its weights unsafely.
Unlike there, what is added is resampled and not the sound, which keeps everything above 2 kHz as it is.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.audio import resample
from nar_speech.checkpoint import load_strict, read_weights
from nar_speech.errors import MissingExtraError
from nar_speech.layers.perthnet import FFT, SAMPLE_RATE, PerthNet

PACKAGE = "resemble-perth"
WEIGHTS = "perth/perth_net/pretrained/implicit/perth_net_250000.pth.tar"
WINDOW_SECONDS = 4.0  # in which a mark is looked for, by half of it
LONG_SECONDS = 60.0  # of which no spectrogram is made as a whole
SURE = 0.5


@dataclass(frozen=True)
class Found:
    """How surely a stretch of sound is marked.

    Attributes:
        start, end: seconds.
        score: 0 to 1; from 0.5 on it is marked.
    """

    start: float
    end: float
    score: float

    @property
    def marked(self) -> bool:
        """Whether there is a mark."""
        return self.score >= SURE


@cache
def load_watermark() -> PerthNet:
    """The network, on the CPU.

    Raises:
        MissingExtraError: the package is not installed. CheckpointError: its weights are damaged.
    """
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(WEIGHTS)))
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError(PACKAGE, "tts", "the watermark of generated speech") from None
    made = PerthNet()
    load_strict(made, read_weights(path), {r"ap\.": None}, path)
    return made.eval().requires_grad_(False)


@torch.inference_mode()
def add_watermark(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Sound with the mark; silence and less than about 30 ms stay as they are.

    Args:
        samples: (N,) float32 in [-1, 1].

    Raises:
        MissingExtraError: the package is not installed.
    """
    made = load_watermark()
    sound = resample(samples, sample_rate, SAMPLE_RATE)
    if len(sound) <= FFT // 2 or not sound.any():
        return samples
    mark = made.mark(torch.from_numpy(sound)[None])[0].numpy()
    added = resample(mark, SAMPLE_RATE, sample_rate)[: len(samples)]
    marked = samples.copy()
    marked[: len(added)] += added
    return marked.clip(-1.0, 1.0)


@torch.inference_mode()
def find_watermark(samples: np.ndarray, sample_rate: int) -> list[Found]:
    """How surely a sound is marked as a whole, and then in windows of some seconds.

    Args:
        samples: (N,) float32 in [-1, 1].

    Returns:
        The whole first (of long sound the mean of its windows); windows only of what is longer than one.

    Raises:
        MissingExtraError: the package is not installed.
    """
    made = load_watermark()
    sound = torch.from_numpy(resample(samples, sample_rate, SAMPLE_RATE))
    seconds = len(samples) / sample_rate

    def score(part: Tensor) -> float:
        if not bool(part.any()):
            return 0.0
        return float(made.detect(F.pad(part, (0, max(FFT + 1 - len(part), 0)))[None]))

    size = round(WINDOW_SECONDS * SAMPLE_RATE)
    starts = range(0, len(sound) - size // 2, size // 2) if len(sound) > size else ()
    windows = [
        Found(at / SAMPLE_RATE, min((at + size) / SAMPLE_RATE, seconds), score(sound[at : at + size]))
        for at in starts
    ]
    if seconds > LONG_SECONDS:
        whole = sum(part.score for part in windows) / len(windows)
    else:
        whole = score(sound)
    return [Found(0.0, seconds, whole), *windows]
