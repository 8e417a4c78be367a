"""Features of audio that comes in steps of fixed size, with fixed shapes, for encoders fed in chunks.

Frames are those of ``Frontend.forward``: Kaldi's, which begin with the stream, or NeMo's and Whisper's, which
are centred, so that the first one begins before it. Stacked frames: :mod:`nar_speech.layers.frontend_stream`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.errors import ConfigError, InputError
from nar_speech.features import INT16_SCALE, Frontend
from nar_speech.layers.chunks import drop, join


@dataclass(frozen=True)
class FrameState:
    """What is kept of streams (B).

    Attributes:
        samples: (B, S) float32 the last samples, scaled, left aligned.
        num_samples: (B,) int64, how many of them there are.
    """

    samples: Tensor
    num_samples: Tensor


class FrameFrontend:
    """Audio steps to steps of frames.

    Args:
        frontend: kind ``fbank`` without stacking, ``nemo`` without normalisation, or ``log_mel`` with a fixed
            ``peak``.
        first_frames, later_frames: that a stream's first step and every other one give.

    Attributes:
        first, later: samples of the first step and of every other one.
        width: samples a batch has room for, the larger of both.
        frames: frames a step has room for.
        feature_size: values of a frame.

    Raises:
        ConfigError: features that can't be made in such steps.
    """

    def __init__(self, frontend: Frontend, first_frames: int, later_frames: int):
        config = frontend.config
        whole = config.normalize != "none" or (config.kind == "log_mel" and config.peak is None)
        if config.lfr_m != 1 or whole:
            raise ConfigError(
                "frontend: a stream of frames needs kind fbank, nemo without normalize or log_mel with peak,"
                " and lfr_m, lfr_n 1"
            )
        if frontend.frame < frontend.shift:
            raise ConfigError("frontend: a stream of frames needs frames at least as long as the hop")
        self.frontend, self.centred = frontend, frontend.centred
        self.scale = 1.0 if self.centred else INT16_SCALE
        self.lead = frontend.lead if self.centred else 0
        self.size = frontend.span  # samples that a frame is made of
        self.frames, self.feature_size = max(first_frames, later_frames), frontend.feature_size
        self.first = (first_frames - 1) * frontend.shift + self.size - self.lead
        self.later = later_frames * frontend.shift
        self.width = max(self.first, self.later)

    def init_state(self, batch: int, device: torch.device | str | None = None) -> FrameState:
        """State of ``batch`` streams that have not begun."""
        device = device or self.frontend.window.device
        kept = max(self.size - self.frontend.shift, self.lead)
        return FrameState(
            torch.zeros(batch, kept, device=device),
            torch.full((batch,), self.lead, dtype=torch.int64, device=device),
        )

    def step(
        self, waves: Tensor, lengths: Tensor, state: FrameState, final: Tensor
    ) -> tuple[Tensor, Tensor, FrameState]:
        """Frames of the next step of every stream.

        Args:
            waves: (B, width) float32 in [-1, 1].
            lengths: (B,) int64 valid samples: ``first`` or ``later``, fewer where ``final``; with 0 a row
                that is not final stays as it is.
            final: (B,) bool, where the stream ends; its next state is that of a new stream.

        Returns:
            (B, frames, F) float32, zero beyond (B,) their number; the next state. A stream shorter than one
            frame (``nemo``: the hop) gives none.
        """
        front = self.frontend
        if waves.shape[1] != self.width:
            raise InputError(f"stream: a step takes {self.width} samples, got {waves.shape[1]}")
        device = waves.device.type
        with (
            torch.autocast(device, enabled=False)
            if torch.amp.is_autocast_available(device)
            else nullcontext()
        ):
            room = (self.frames - 1) * front.shift + self.size
            buffer, filled = join(state.samples, state.num_samples, waves.float() * self.scale, lengths, room)
            if self.centred:
                features, counts = front.centred_mel(buffer, filled, final)
            else:
                features, counts = front.filter_bank(buffer, filled)
            counts = counts.clamp(max=self.frames)
            features = features[:, : self.frames]
            if front.cmvn_shift is not None:
                features = (features + front.cmvn_shift) * front.cmvn_scale
            place = torch.arange(self.frames, device=waves.device)
            features = features.masked_fill((place >= counts.unsqueeze(1)).unsqueeze(2), 0.0)
            samples, left = drop(buffer, filled, counts * front.shift, state.samples.shape[1])
            samples = samples.masked_fill(final.unsqueeze(1), 0.0)
            return features, counts, FrameState(samples, torch.where(final, self.lead, left))
