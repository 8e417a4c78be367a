"""SAN-M on utterances cut into overlapping windows: training of streaming models, and streams in one piece.

The windows of an utterance stand side by side on one axis of N * W rows. Attention goes over that axis with a
mask, memory blocks stay inside a window. Two ways of cutting share all code but the masks:
``training_windows`` is that of SCAMA (arXiv 2006.01712) and of FunASR's training, where only the frames a
window owns look back, and only at frames that were owned; ``stream_windows`` is exactly what
:mod:`nar_speech.layers.sanm_stream` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.errors import ConfigError
from nar_speech.layers.sanm import Padding, SANMEncoder
from nar_speech.layers.sanm_stream import StreamConfig, WindowConfig


@dataclass(frozen=True)
class Windows:
    """How a batch of utterances (B) is cut into N windows of W rows.

    size: W. number: N. frames: (N W,) int64 frame that each row shows; outside an utterance it shows zeros.
    valid: (B, N W) bool rows that exist. own: (B, N W) bool rows whose CIF weights count, each frame in one
    window. sees: (N W, N W) bool, which rows (second) a row (first) may look at where they are valid.
    last: (B,) int64 an utterance's last window.
    """

    size: int
    number: int
    frames: Tensor
    valid: Tensor
    own: Tensor
    sees: Tensor
    last: Tensor

    @property
    def window(self) -> Tensor:
        """(N W,) int64 number of each row's window."""
        return torch.arange(len(self.frames), device=self.frames.device) // self.size


def _places(number: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Window and place in the window of each row, (N W,) int64."""
    rows = torch.arange(number * size, device=device)
    return rows // size, rows % size


def training_windows(lengths: Tensor, config: WindowConfig, padded: bool = False) -> Windows:
    """Cut utterances of ``lengths`` (B,) frames for training.

    Window n owns the frames n * stride ... (n + 1) * stride - 1. All rows of a window see the whole window;
    its first ``stride`` rows also see the first ``stride`` rows of ``encoder_look_back`` windows before.
    ``padded``: see :class:`StreamConfig`.
    """
    longest, stride, size = int(lengths.max()), config.stride, config.size
    number = max(-(-longest // stride), 1)
    window, place = _places(number, size, lengths.device)
    last = (torch.div(lengths + stride - 1, stride, rounding_mode="floor") - 1).clamp_min(0)
    rest = config.left + lengths - last * stride  # rows of the last window
    valid = (window < last[:, None]) | ((window == last[:, None]) & (place < rest[:, None]))
    frames = window * stride + place - config.left
    if not padded:
        valid = valid & (frames >= 0) & (frames < lengths[:, None])
    owned = (place >= config.left) & (place < config.left + stride)
    first = place < stride
    back = (window < window[:, None]) & (window >= window[:, None] - config.encoder_look_back)
    sees = (window == window[:, None]) | (back & first & first[:, None])
    return Windows(size, number, frames, valid, owned & valid, sees, last)


def stream_windows(lengths: Tensor, last_frames: Tensor, config: StreamConfig) -> Windows:
    """Cut utterances of ``lengths`` (B,) frames as a stream is whose last step has ``last_frames`` (B,)."""
    left, stride, right = config.chunk
    size, kept = left + stride + right, left + stride
    last = torch.div(lengths - last_frames, stride, rounding_mode="floor")
    number = int(last.max()) + 1
    window, place = _places(number, size, lengths.device)
    ends = window == last[:, None]
    valid = (window < last[:, None]) | (ends & (place < (config.context + last_frames)[:, None]))
    frames = window * stride + place - config.context
    if not config.padded:
        valid = valid & (frames >= 0)
    own = valid & (place >= left) & ((place < left + stride) | ends)
    sees = window == window[:, None]
    if config.encoder_reach:
        position = window * kept + place
        back = (window < window[:, None]) & (place < kept)
        if config.encoder_reach > 0:  # the second window sees all rows that the first one kept
            oldest = window * kept - config.encoder_reach * stride
            back = back & (position >= torch.where(window == 1, 0, oldest)[:, None])
        sees = sees | back
    return Windows(size, number, frames, valid, own, sees, last)


def encode_windows(encoder: SANMEncoder, x: Tensor, lengths: Tensor, windows: Windows) -> Tensor:
    """Encode utterances window by window.

    Args:
        x: (B, T, F) features; not changed. lengths: (B,) int64.

    Returns:
        (B, N W, D); rows that are not valid hold numbers without meaning.
    """
    x = encoder.embed(x * encoder.output_size**0.5)
    rows = x[:, windows.frames.clamp(0, x.shape[1] - 1)] if x.shape[1] else x.new_zeros(len(x), 1, x.shape[2])
    outside = (windows.frames < 0) | (windows.frames >= lengths[:, None])
    y = rows.masked_fill(outside[:, :, None], 0.0)
    keys = _never_empty(windows.sees & windows.valid[:, None])
    padding = Padding(windows.valid[:, :, None].to(x.dtype), keys[:, None], window=windows.size)
    for layer in [*encoder.encoders0, *encoder.encoders]:
        y = layer(y, padding)
    return encoder.after_norm(y)


def _never_empty(mask: Tensor) -> Tensor:
    """Mask (B, Q, K) with everything allowed to queries that may look nowhere, which are padding."""
    return mask | ~mask.any(dim=-1, keepdim=True)


def owned_frames(rows: Tensor, config: WindowConfig, frames: int) -> Tensor:
    """(B, N W, D) -> (B, T, D): each of the first ``frames`` frames from the window that owns it."""
    time = torch.arange(frames, device=rows.device)
    return rows[:, time // config.stride * config.size + config.left + time % config.stride]


def training_reach(windows: Windows, config: WindowConfig, ends: Tensor) -> Tensor:
    """Rows that the decoder looks at for each token in training: those of the window in which the token ends,
    and the ones owned by ``decoder_look_back`` windows before.

    Args:
        ends: (B, U) int64 row in which each token ends.

    Returns:
        (B, 1, U, N W) bool.
    """
    token = token_windows(windows, ends)[:, :, None]
    window = windows.window
    here = (window == token) & windows.valid[:, None]
    back = (window < token) & (window >= token - config.decoder_look_back) & windows.own[:, None]
    return _never_empty(here | back)[:, None]


def stream_reach(windows: Windows, config: StreamConfig, ends: Tensor, counts: Tensor) -> Tensor:
    """Rows that the decoder looks at for each token of a stream: those of the window in which the token ends,
    and the last C * look-back of all rows of earlier windows in which tokens ended.

    Args:
        ends: (B, U) int64 row in which each token ends; counts: (B,) int64 tokens.

    Returns:
        (B, 1, U, N W) bool.
    """
    token = token_windows(windows, ends)
    window, size = windows.window, windows.size
    exists = torch.arange(ends.shape[1], device=ends.device) < counts[:, None]
    emits = torch.zeros(len(ends), windows.number, dtype=torch.int64, device=ends.device)
    emits = emits.scatter_reduce(1, token, exists.long(), reduce="amax")
    order = emits.cumsum(dim=1) - emits  # windows with tokens before each
    place = torch.arange(len(window), device=window.device) % size
    here = window == token[:, :, None]
    seen = here & windows.valid[:, None]
    if config.decoder_reach:
        back = (window < token[:, :, None]) & emits[:, None].bool().repeat_interleave(size, dim=-1)
        if config.decoder_reach > 0:
            position = order[:, window] * size + place
            oldest = order.gather(1, token) * size - config.decoder_reach * config.chunk[1]
            back = back & (position[:, None] >= oldest[:, :, None])
        seen = seen | (back & windows.valid[:, None])
    seen = seen | (here & (place == 0) & ~seen.any(dim=-1, keepdim=True))  # as in a step: a row of zeros
    return seen[:, None]


def token_windows(windows: Windows, ends: Tensor) -> Tensor:
    """Window (B, U) int64 of tokens that end in the rows ``ends`` (B, U); the last one where none is left."""
    return torch.minimum(torch.div(ends, windows.size, rounding_mode="floor"), windows.last[:, None])


def check_streams_exactly(config: StreamConfig) -> None:
    """Raise ConfigError where the stream's result can't be had in one piece."""
    if config.official:
        raise ConfigError("stream.official: only chunk by chunk, with step; turn it off here")
