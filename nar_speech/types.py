"""Frozen result types shared by all pipelines. Times are seconds from the start of the audio."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Audio:
    """Samples of one recording.

    ``samples`` is float32 in [-1, 1] with shape (N,) for mono or (C, N) for several channels.
    """

    samples: np.ndarray
    sample_rate: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.samples.shape[-1] / self.sample_rate


@dataclass(frozen=True)
class Codes:
    """Tokens of a batch of recordings.

    Attributes:
        tokens: (B, K, T) int64, codebook by codebook; what lies behind a row's end means nothing.
        lengths: (B,) int64, frames of each row.
        sample_rate: of the codec, Hz.
        samples: (B,) int64, samples that each row was made of; None: unknown.
        scales: (B, chunks) float32 of a codec that normalises loudness chunk by chunk; None: it does not.
        chunk_frames: frames of a chunk, where each is coded alone (only the last one is shorter); None:
            the recording is one piece.
        codec: name of the codec; "" is unknown.
    """

    tokens: Tensor
    lengths: Tensor
    sample_rate: int
    samples: Tensor | None = None
    scales: Tensor | None = None
    chunk_frames: int | None = None
    codec: str = ""


@dataclass(frozen=True)
class Token:
    """One unit of the tokenizer with its place in time."""

    id: int
    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Word:
    """One word (or one Chinese character) with its place in time; ``confidence`` is in [0, 1]."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Hypothesis:
    """One entry of an n-best list; ``score`` is a natural-log probability."""

    text: str
    score: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech and what was said in it."""

    text: str
    start: float
    end: float
    confidence: float
    words: tuple[Word, ...] = ()
    tokens: tuple[Token, ...] = ()
    nbest: tuple[Hypothesis, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """The result of transcribing one recording."""

    text: str
    segments: tuple[Segment, ...]
    duration: float
    language: str | None = None
    source: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[Word, ...]:
        """All words in order."""
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def confidence(self) -> float:
        """Mean confidence of the segments, weighted by their duration; 0 when there are none."""
        total = sum(s.end - s.start for s in self.segments)
        if total <= 0:
            return 0.0
        return sum(s.confidence * (s.end - s.start) for s in self.segments) / total

    def to_dict(self) -> dict:
        """Plain dictionaries and lists, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ModelCard:
    """What a model folder says about itself (the ``card`` part of ``model.yaml``)."""

    name: str
    task: str
    model: str
    sample_rate: int = 16000
    languages: tuple[str, ...] = ()
    licence: str = ""
    source: str = ""
    description: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
