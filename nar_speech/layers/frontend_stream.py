"""Features of audio that comes in chunks of one size, with fixed shapes; ``Frontend.step`` takes any chunks.

Every chunk of C * n * shift samples gives exactly C rows of stacked frames, the first one too: what the last
row lacks at its end is covered by the copies of the first frame that stacking puts in front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.errors import ConfigError, InputError
from nar_speech.features import INT16_SCALE, Frontend
from nar_speech.layers.precision import no_autocast


@dataclass(frozen=True)
class ChunkFrontendState:
    """What is kept of streams (B).

    samples: (B, S) the last samples, scaled to 16 bit, part of the next frame. frames: (B, P, M) the last
    frames, part of the next row. started: (B,) bool whether the stream has begun.
    """

    samples: Tensor
    frames: Tensor
    started: Tensor


class ChunkFrontend:
    """Chunks of ``chunk`` samples to ``rows`` rows of features, as ``Frontend.forward`` makes of the whole.

    Attributes:
        chunk: samples of a step. rows: C, rows of features it gives. feature_size: F.
    """

    def __init__(self, frontend: Frontend, rows: int, official_tail: bool = False):
        """
        Args:
            frontend: kind "fbank".
            rows: C.
            official_tail: give no rows for the end of a stream where fewer samples are left than a row is
                long, as FunASR 1.4.3 does (the frames of up to 60 ms are lost).

        Raises:
            ConfigError: a kind that can't stream, or stacking whose first row needs more than a chunk.
        """
        config = frontend.config
        if config.kind != "fbank":
            raise ConfigError(f"frontend.kind: '{config.kind}' is scaled by whole utterances, can't stream")
        self.frontend, self.rows, self.official_tail = frontend, rows, official_tail
        self.feature_size = frontend.feature_size
        self.chunk = rows * config.lfr_n * frontend.shift
        self.left = (config.lfr_m - 1) // 2  # copies of the first frame in front
        self.late = -(-frontend.frame // frontend.shift) - 1  # frames a chunk leaves to the next one
        if config.lfr_m + self.late > config.lfr_n + self.left:
            raise ConfigError(
                f"frontend: with lfr_m {config.lfr_m}, lfr_n {config.lfr_n} and frames of"
                f" {config.frame_ms:g} ms the first chunk of a stream does not complete its rows;"
                " the released models have 7, 6 and 25 ms"
            )

    def init_state(self, batch: int, device: torch.device | str | None = None) -> ChunkFrontendState:
        """State of ``batch`` streams that have not begun."""
        front = self.frontend
        device = device or front.window.device
        kept = max(self.left - self.late, 0)
        return ChunkFrontendState(
            torch.zeros(batch, self.late * front.shift, device=device),
            torch.zeros(batch, kept, front.config.num_mels, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def step(
        self, waves: Tensor, lengths: Tensor, state: ChunkFrontendState, final: Tensor
    ) -> tuple[Tensor, Tensor, ChunkFrontendState]:
        """Features of the next chunk of every stream.

        Args:
            waves: (B, chunk) samples in [-1, 1]. lengths: (B,) int64 valid ones, ``chunk`` unless ``final``.
            final: (B,) bool, where the stream ends; its next state is that of a new stream.

        Returns:
            features (B, C, F) float32, zero past (B,) their number; the next state. A stream shorter than one
            frame (25 ms) gives no row.
        """
        front, config = self.frontend, self.frontend.config
        if waves.shape[1] != self.chunk:
            raise InputError(f"stream: a step takes chunks of {self.chunk} samples, got {waves.shape[1]}")
        with no_autocast(waves):
            places = torch.arange(self.chunk, device=waves.device)
            scaled = (waves.float() * INT16_SCALE).masked_fill(places >= lengths[:, None], 0.0)
            buffer = torch.cat([state.samples, scaled], dim=1)
            fresh, _ = front.filter_bank(buffer, lengths)  # (B, C * n, M)
            frames = torch.cat([state.frames, fresh], dim=1)
            # Frames of the stream that are complete, counted from the first of this chunk's rows.
            complete = torch.div(lengths - front.frame, front.shift, rounding_mode="floor") + 1
            first = max(self.left, self.late)  # where that frame is in ``frames``
            begin = torch.where(state.started, 0, first)
            end = torch.maximum(first + complete - 1, begin)
            ending = torch.div(complete + config.lfr_n - 1, config.lfr_n, rounding_mode="floor")
            if self.official_tail:
                ending = torch.where(lengths < config.lfr_n * front.shift, 0, ending)
            count = torch.where(final, ending.clamp_min(0), self.rows)
            start = torch.arange(self.rows, device=waves.device)[:, None] * config.lfr_n + first - self.left
            index = (start + torch.arange(config.lfr_m, device=waves.device)).flatten()
            index = torch.minimum(torch.maximum(index, begin[:, None]), end[:, None])
            index = index[..., None].expand(-1, -1, frames.shape[2])
            features = frames.gather(1, index).view(len(waves), self.rows, -1)
            if front.cmvn_shift is not None:
                features = (features + front.cmvn_shift).mul_(front.cmvn_scale)
            features = features.masked_fill((places[: self.rows] >= count[:, None])[..., None], 0.0)
            kept, late = state.frames.shape[1], state.samples.shape[1]
            return (
                features,
                count,
                ChunkFrontendState(
                    buffer[:, buffer.shape[1] - late :].masked_fill(final[:, None], 0.0),
                    frames[:, frames.shape[1] - kept :].masked_fill(final[:, None, None], 0.0),
                    ~final,
                ),
            )
