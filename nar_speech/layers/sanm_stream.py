"""SAN-M encoder and decoder chunk by chunk, with state of fixed shapes (SCAMA: arXiv 2006.01712).

A stream of frames is cut into chunks of C frames. The encoder sees a window of L + C + R rows: the L + R
frames before the chunk and the chunk, so what it finishes in this step are the C rows behind the first L; the
last R rows are the look-ahead, finished in the next step. Every layer also attends to keys and values it kept
of earlier windows. Nothing here depends on values: shapes follow from the configuration alone, rows of a
batch are different streams at different places, no step waits for the device. The same in one piece for whole
utterances: :mod:`nar_speech.layers.sanm_windows`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.config import check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.position import sinusoid_table
from nar_speech.layers.sanm import Padding, SANMDecoder, SANMDecoderLayer, SANMEncoder, depthwise

MAX_CHUNK = 10_000  # frames; larger ones are mistakes


@dataclass(frozen=True)
class WindowConfig:
    """Windows that training cuts utterances into (:func:`nar_speech.layers.sanm_windows.training_windows`).

    size, stride: frames of a window, and from one to the next; the ``stride`` frames behind the first
    ``left`` ones are its own, the rest is context. encoder_look_back, decoder_look_back: how many earlier
    windows the encoder's and the decoder's attention see.
    """

    size: int = 15
    stride: int = 10
    left: int = 0
    encoder_look_back: int = 4
    decoder_look_back: int = 1

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_CHUNK, "size", "stride")
        check_range(self, 0, MAX_CHUNK, "left", "encoder_look_back", "decoder_look_back")
        if self.stride + self.left > self.size:
            raise ConfigError(
                f"windows: size {self.size} is less than left {self.left} + stride {self.stride}"
            )


@dataclass(frozen=True)
class StreamConfig:
    """How a model streams, and which windows it is trained with.

    Attributes:
        chunk: L, C, R in frames (60 ms in the released models): rows seen again before a chunk, frames of a
            step, look-ahead. (0, 10, 5) decides on 600 ms at a time and 300 ms late.
        encoder_look_back, decoder_look_back: chunks whose keys and values are kept; 0: none, -1: all, in a
            state that grows (not for an engine's slots, see ``init_state``).
        max_tokens: most tokens one step returns; more are lost. 0: as many as there can be, C + R + 1.
        windows: training draws one of these for each batch.
        padded: let zeros outside an utterance count as frames, as FunASR does: those in front of a stream's
            first frame, which may then give a token, and in training those of windows that stick out.
        official: do as FunASR 1.4.3 where its streaming code is wrong: no look-back in the encoder with
            R = 0, and a window that grows with L = R = 0; decoder look-back -1 as 0; a single block without
            cross attention left out; token memories that look ahead see zeros behind a stream's first tokens
            and no token ahead later on; frames that no new ones follow scaled twice; one token at most in a
            frame; tokens out of a stream without audio.
    """

    chunk: tuple[int, int, int] = (0, 10, 5)
    encoder_look_back: int = 4
    decoder_look_back: int = 1
    max_tokens: int = 0
    windows: tuple[WindowConfig, ...] = (WindowConfig(12, 8), WindowConfig(15, 10))
    padded: bool = False
    official: bool = False

    def __post_init__(self) -> None:
        left, size, right = self.chunk
        if min(left, right) < 0 or not 1 <= size <= MAX_CHUNK or max(left, right) > MAX_CHUNK:
            raise ConfigError(f"stream.chunk: need [left >= 0, frames >= 1, right >= 0], got {[*self.chunk]}")
        check_range(self, -1, MAX_CHUNK, "encoder_look_back", "decoder_look_back")
        check_range(self, 0, MAX_CHUNK, "max_tokens")

    @property
    def context(self) -> int:
        """Rows of a window before the chunk: L + R."""
        return self.chunk[0] + self.chunk[2]

    @property
    def encoder_reach(self) -> int:
        """The encoder's look-back in chunks, -1: all."""
        return 0 if self.official and self.chunk[2] == 0 else self.encoder_look_back

    @property
    def decoder_reach(self) -> int:
        """The decoder's look-back in chunks, -1: all."""
        return max(self.decoder_look_back, 0) if self.official else self.decoder_look_back

    @property
    def grows(self) -> bool:
        """Whether the state grows with every step."""
        return min(self.encoder_reach, self.decoder_reach) < 0 or self.widens

    @property
    def widens(self) -> bool:
        """Whether the encoder's window grows: the official code without context keeps all frames."""
        return self.official and self.context == 0


@dataclass(frozen=True)
class EncoderState:
    """What the encoder keeps of streams (B); N layers, M = C * look-back rows (L + C where that is more).

    feats: (B, L + R, F) the last frames, scaled and with their position code. frames: (B,) int64 frames
    heard. past: (B, N, M, 2 D) keys and values of each layer, the newest last; kept: (B, M) bool which exist.
    """

    feats: Tensor
    frames: Tensor
    past: Tensor
    kept: Tensor


@dataclass(frozen=True)
class DecoderState:
    """What the decoder keeps of streams (B).

    memory: (B, N, K - 1, D) the last inputs of each token memory. past: (B, N', M, 2 D) keys and values of
    the N' layers with cross attention, M = C * look-back, the newest last; kept: (B, M) bool, which exist.
    tokens: (B,) int64 tokens so far.
    """

    memory: Tensor
    past: Tensor
    kept: Tensor
    tokens: Tensor


def check_grow(config: StreamConfig, grow: bool) -> None:
    """Raise ConfigError where a state would have to grow and ``grow`` does not allow it."""
    if config.grows and not grow:
        raise ConfigError(
            "stream: a look-back of -1 needs a state that grows with every step; give a number of chunks, or"
            " pass grow=True to init_state (no engine can serve that)"
        )


def init_encoder(
    encoder: SANMEncoder,
    config: StreamConfig,
    batch: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> EncoderState:
    """State of ``batch`` streams that have not begun; device and dtype default to those of the weights."""
    if encoder.config.tp_blocks:
        raise ConfigError("stream: an encoder with tp_blocks (SenseVoice) does not stream")
    weight = encoder.after_norm.weight
    device, dtype = device or weight.device, dtype or weight.dtype
    left, size, _ = config.chunk
    rows = max(config.encoder_reach * size, left + size) if config.encoder_reach > 0 else 0
    layers = encoder.config.num_blocks
    return EncoderState(
        torch.zeros(batch, config.context, encoder.input_size, device=device, dtype=dtype),
        torch.zeros(batch, device=device, dtype=torch.int64),
        torch.zeros(batch, layers, rows, 2 * encoder.output_size, device=device, dtype=dtype),
        torch.zeros(batch, rows, device=device, dtype=torch.bool),
    )


def step_encoder(
    encoder: SANMEncoder,
    config: StreamConfig,
    x: Tensor,
    lengths: Tensor,
    state: EncoderState,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, EncoderState]:
    """Encode the next chunk of every stream.

    Args:
        x: (B, C, F) features. lengths: (B,) int64 valid ones, C except where a stream ends.
        in_place: ``state`` may be overwritten.

    Returns:
        (B, W, D) encodings of the window, zero where (B, W) bool tells of no frame; and the next state, which
        means nothing for a stream that has ended.
    """
    window, valid, feats = _window(encoder, config, x, lengths, state)
    past = state.past.shape[2]
    kept = window.shape[1] - config.chunk[2] if config.encoder_reach else 0  # rows that enter the caches
    frames = valid[:, :, None]
    padding = Padding(frames.to(window.dtype), seen_rows(state.kept, valid)[:, None, None])
    length = past + kept if config.encoder_reach < 0 else past
    new = _next_past(state.past, length, in_place)
    y = window
    for number, layer in enumerate([*encoder.encoders0, *encoder.encoders]):
        projected = layer.self_attn.linear_q_k_v(layer.norm1(y))
        seen = projected[..., encoder.output_size :]
        if past:
            seen = torch.cat([state.past[:, number], seen], dim=1)
        y = layer.join(y, layer.self_attn.attend(projected, padding, seen))
        new[:, number] = seen[:, past + kept - length : past + kept]
    y = encoder.after_norm(y).masked_fill(~frames, 0.0)
    both = torch.cat([state.kept, valid[:, :kept]], dim=1)
    exist = both[:, both.shape[1] - length :]
    if config.encoder_reach > 0:  # the first window's rows are all kept, then C * look-back
        new_enough = torch.arange(length, device=x.device) >= length - config.encoder_reach * config.chunk[1]
        exist = exist & (new_enough | (state.frames == 0)[:, None])
    return y, valid, EncoderState(feats, state.frames + lengths, new, exist)


def _next_past(past: Tensor, length: int, in_place: bool) -> Tensor:
    """Memory for the next keys and values (B, N, length, 2 D), layer by layer: ``past`` itself if it may be.

    It is the largest tensor of a step: where it has to be allocated, the system clears as many pages, which
    takes longer than to write it.
    """
    if in_place and past.shape[2] == length:
        return past
    return past.new_empty(*past.shape[:2], length, past.shape[3])


def seen_rows(kept: Tensor, valid: Tensor) -> Tensor:
    """Rows (B, M + W) bool that attention sees: kept ones (B, M), the window's (B, W); its first if none."""
    seen = torch.cat([kept, valid], dim=1)
    first = torch.arange(seen.shape[1], device=seen.device) == kept.shape[1]
    return seen | (first & ~seen.any(dim=1, keepdim=True))


def _window(
    encoder: SANMEncoder, config: StreamConfig, x: Tensor, lengths: Tensor, state: EncoderState
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (B, W, F) the encoder sees, (B, W) bool which exist, and the frames to keep (B, L + R, F)."""
    size = config.chunk[1]
    if x.shape[1] != size:
        raise InputError(f"stream: a step takes chunks of {size} frames, got {x.shape[1]}")
    steps = torch.arange(1, size + 1, device=x.device)
    code = sinusoid_table(state.frames[:, None] + steps, encoder.input_size)
    fresh = (x.float() * encoder.output_size**0.5 + code).to(state.feats.dtype)
    fresh = fresh.masked_fill((steps > lengths[:, None])[:, :, None], 0.0)
    held = state.feats
    if config.official:  # frames that no new ones follow are scaled once more
        again = (lengths == 0).to(held.dtype) * (encoder.output_size**0.5 - 1) + 1
        held = held * again[:, None, None]
    window = torch.cat([held, fresh], dim=1)
    places = torch.arange(window.shape[1], device=x.device) - state.feats.shape[1]
    valid = places < lengths[:, None]
    if not config.padded:
        valid = valid & (places >= -state.frames[:, None])
    keep = window.shape[1] if config.widens else config.context
    return window, valid, window[:, window.shape[1] - keep :]


def token_memories(decoder: SANMDecoder) -> list[SANMDecoderLayer]:
    """The decoder's layers that remember tokens, in their order."""
    return [*decoder.decoders, *getattr(decoder, "decoders2", ())]


def init_decoder(
    decoder: SANMDecoder,
    config: StreamConfig,
    batch: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DecoderState:
    """State of ``batch`` streams that have not begun; device and dtype default to those of the weights."""
    weight = decoder.after_norm.weight
    device, dtype = device or weight.device, dtype or weight.dtype
    layers, size = token_memories(decoder), decoder.size
    kept = max((_memory_rows(layer) for layer in layers), default=0)
    rows = max(config.decoder_reach, 0) * config.chunk[1]
    return DecoderState(
        torch.zeros(batch, len(layers), kept, size, device=device, dtype=dtype),
        torch.zeros(batch, len(decoder.decoders), rows, 2 * size, device=device, dtype=dtype),
        torch.zeros(batch, rows, device=device, dtype=torch.bool),
        torch.zeros(batch, device=device, dtype=torch.int64),
    )


def _memory_rows(layer: SANMDecoderLayer) -> int:
    """Token inputs that a layer's memory must keep."""
    return max(layer.self_attn.left, layer.self_attn.left + layer.self_attn.right)


def step_decoder(
    decoder: SANMDecoder,
    config: StreamConfig,
    tokens: Tensor,
    counts: Tensor,
    memory: Tensor,
    rows: Tensor,
    state: DecoderState,
    in_place: bool = False,
) -> tuple[Tensor, DecoderState]:
    """States of the next tokens of every stream. A stream without new tokens keeps its state.

    Args:
        tokens: (B, U, D) one vector per token. counts: (B,) int64 how many there are.
        memory: (B, W, D) encoder output of the window, zero where ``rows`` (B, W) bool is false.
        in_place: ``state`` may be overwritten.

    Returns:
        (B, U, D) as of :meth:`SANMDecoder.hidden`, and the next state, which means nothing for a stream that
        has ended.
    """
    past, size = state.past.shape[2], memory.shape[1]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    valid = (places < counts[:, None])[:, :, None].to(tokens.dtype)
    seen = seen_rows(state.kept, rows)[:, None, None]
    emits = (counts > 0)[:, None]
    length = past + size if config.decoder_reach < 0 else past
    new = _next_past(state.past, length, in_place)
    layers = token_memories(decoder)
    if config.official and decoder.config.num_blocks - decoder.config.att_layer_num == 1:
        layers = layers[:-1]
    inputs, x = [], tokens
    for number, layer in enumerate(layers):
        inner = layer.norm2(layer.feed_forward(layer.norm1(x))) * valid
        inputs.append(inner)
        x = x + _remember(layer, inner, state.memory[:, number], state.tokens > 0, valid, config.official)
        if layer.src_attn is not None:
            fresh = layer.src_attn.linear_k_v(memory)
            held = state.past[:, number]
            both = torch.cat([held, fresh], dim=1)
            x = x + layer.src_attn.attend(layer.norm3(x), both, seen, few=True)
            if length:
                stay = F.pad(held, (0, 0, length - past, 0)) if length > past else held
                new[:, number] = torch.where(emits[:, :, None], both[:, past + size - length :], stay)
    for layer in decoder.decoders3:
        x = layer(x)
    both = torch.cat([state.kept, rows], dim=1)
    stay = F.pad(state.kept, (length - past, 0))
    return decoder.after_norm(x), DecoderState(
        _advance(layers, inputs, counts, state, config.official),
        new,
        torch.where(emits, both[:, past + size - length :], stay),
        state.tokens + counts,
    )


def _remember(
    layer: SANMDecoderLayer, inner: Tensor, held: Tensor, started: Tensor, valid: Tensor, official: bool
) -> Tensor:
    """Memory (B, U, D) of the tokens ``inner`` (B, U, D), which follow ``held`` (B, P, D)."""
    block = layer.self_attn
    rows = torch.cat([held[:, held.shape[1] - _memory_rows(layer) :], inner], dim=1)
    rows = F.pad(rows, (0, 0, 0, max(block.right, 0)))
    result = depthwise(rows, block.fsmn_block.weight)
    # From here on the tokens' places in the filter are those of the offline computation.
    first = _memory_rows(layer) - block.left
    size = inner.shape[1]
    if official and block.right != 0:  # later chunks lie behind the zeros that padded the first
        later = result[:, _memory_rows(layer) - (block.left + block.right) :][:, :size]
        result = torch.where(started[:, None, None], later, result[:, first : first + size])
    else:
        result = result[:, first : first + size]
    return (result + inner) * valid


def _advance(
    layers: list[SANMDecoderLayer],
    inputs: list[Tensor],
    counts: Tensor,
    state: DecoderState,
    official: bool,
) -> Tensor:
    """The token memories' rows (B, N, P, D) behind this step's valid tokens."""
    if not inputs:
        return state.memory
    new = torch.stack(inputs, dim=1)
    ends = [counts] * len(layers)
    if official:  # the zeros behind a stream's first tokens stay
        first = (state.tokens == 0) & (counts > 0)
        ends = [(counts + layer.self_attn.right * first).clamp_min(0) for layer in layers]
        new = F.pad(new, (0, 0, 0, max(0, *(layer.self_attn.right for layer in layers))))
    index = torch.stack(ends, dim=1)[:, :, None] + torch.arange(state.memory.shape[2], device=counts.device)
    rows = torch.cat([state.memory[:, : len(layers)], new], dim=2)
    first = torch.arange(0, rows[..., 0].numel(), rows.shape[2], device=counts.device)
    chosen = (first[:, None] + index.flatten(0, 1)).flatten()
    rows = rows.flatten(0, 2).index_select(0, chosen).view(*index.shape, -1)
    return torch.cat([rows, state.memory[:, len(layers) :]], dim=1)
