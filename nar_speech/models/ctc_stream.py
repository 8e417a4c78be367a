"""A CTC model that hears audio in steps: features, network, and the best symbols of every frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nar_speech.errors import ConfigError
from nar_speech.features import Frontend
from nar_speech.layers.chunks import Chunking
from nar_speech.layers.frontend_frames import FrameFrontend, FrameState
from nar_speech.models.ctc import CtcModel


@dataclass(frozen=True)
class CtcAudioState:
    """What :class:`CtcStream` keeps of streams (B): of the features, and of the network."""

    frontend: FrameState
    network: Any


@dataclass(frozen=True)
class CtcFrames:
    """The best symbols of the frames of a step.

    Attributes:
        values: (B, U, C) float32 natural log probabilities, best first.
        symbols: (B, U, C) int64 their ids.
        blanks: (B, U) float32 log probability of the blank.
        counts: (B,) int64 frames that are valid; U depends on the configuration alone.
    """

    values: Tensor
    symbols: Tensor
    blanks: Tensor
    counts: Tensor


def frame_candidates(log_probs: Tensor, lengths: Tensor, count: int = 1, blank: int = 0) -> CtcFrames:
    """The ``count`` best symbols of each frame of ``log_probs`` (B, U, V); ``lengths`` (B,) valid frames.

    No shape depends on a value and nothing waits for the device.
    """
    log_probs = log_probs.float()
    if count == 1:
        values, symbols = log_probs.max(-1, keepdim=True)
    else:
        values, symbols = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    return CtcFrames(values, symbols, log_probs[..., blank], lengths)


class CtcStream:
    """Audio steps to candidates for a search of :mod:`nar_speech.search.ctc_stream`.

    Args:
        network: in eval mode, with an encoder that takes streams.
        frontend: that of the model.
        chunking: from ``network.chunking``; default: the model's own.
        candidates: C, symbols of each frame to give; 1 is enough for greedy search.
        adjust: what is done to the log probabilities (B, U, V) of a step before they are chosen.
        options: of the network's ``step``, for example ``chunk_size`` where a step holds several chunks.

    Attributes:
        sample_rate: in Hz.
        first, chunk: samples of a stream's first step and of every other one.
        frame_seconds: time from one frame to the next.
        device: of the network.

    Raises:
        ConfigError: a model that takes no streams, or a look-back without limit.
    """

    def __init__(
        self,
        network: CtcModel,
        frontend: Frontend,
        chunking: Chunking | None = None,
        candidates: int = 1,
        adjust: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ):
        self.network, self.chunking = network, chunking or network.chunking()
        if self.chunking.left < 0:
            raise ConfigError("left: a stream of fixed shapes needs a limit; name a number of frames")
        self.frontend = FrameFrontend(frontend, self.chunking.first, self.chunking.later)
        self.candidates, self.adjust, self.options = candidates, adjust, options
        self.sample_rate = frontend.config.sample_rate
        self.first, self.chunk = self.frontend.first, self.frontend.later
        self.frame_seconds = frontend.frame_shift * network.encoder.frame_stride

    @property
    def device(self) -> torch.device:
        return self.frontend.frontend.window.device

    def init_state(self, slots: int) -> CtcAudioState:
        """State of ``slots`` streams that have not begun."""
        network = self.network.init_state(slots, self.device, chunking=self.chunking)
        return CtcAudioState(self.frontend.init_state(slots, self.device), network)

    @torch.no_grad()
    def step(
        self, audio: Tensor, lengths: Tensor, final: Tensor, state: CtcAudioState
    ) -> tuple[CtcFrames, CtcAudioState]:
        """Hear the next step of every stream.

        Args:
            audio: (B, N) float32 in [-1, 1], N the larger of ``first`` and ``chunk``.
            lengths: (B,) int64 valid samples: ``first`` or ``chunk``, fewer where ``final``.
            final: (B,) bool, where the stream ends; its next state is that of a new stream.
        """
        feats, counts, frontend = self.frontend.step(audio, lengths, state.frontend, final)
        out, network = self.network.step(feats, counts, state.network, final, **self.options)
        blank = self.network.config.blank
        log_probs = out.log_probs if self.adjust is None else self.adjust(out.log_probs)
        frames = frame_candidates(log_probs, out.lengths, self.candidates, blank)
        return frames, CtcAudioState(frontend, network)
