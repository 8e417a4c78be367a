"""SAN-M: self-attention with a memory block (a depthwise convolution over the values).

Encoder, cross attention and decoder blocks of the Paraformer and SenseVoice models (SAN-M: arXiv 2006.01713;
Paraformer: arXiv 2206.08317, section 3). Attribute names follow FunASR's state dicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.config import MAX_BLOCKS, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError
from nar_speech.layers.dot_product import dot_product_attention
from nar_speech.layers.intermediate import Tap
from nar_speech.layers.packed import linear_relu
from nar_speech.layers.position import SinusoidPosition

if TYPE_CHECKING:
    from nar_speech.layers.sanm_stream import DecoderState, EncoderState, StreamConfig

QUERY_BLOCK = 32  # queries that PyTorch's fused attention on a CPU takes at once


class Padding(NamedTuple):
    """Where a ragged batch is padded, in the two shapes the blocks need.

    frames: (B, T, 1) one at valid frames, zero at padding, of the activations' dtype.
    keys: (B, 1, 1, T) or (B, 1, T, T) bool, true where attention may look.
    window: above 0 where the frames are windows of this size, one after the other; a memory block does not
        look from one into the next.
    groups: (B, T) int64 number of the chunk a token came out of; a token memory does not look ahead into
        another one, which a stream has not heard yet.
    """

    frames: Tensor
    keys: Tensor
    window: int = 0
    groups: Tensor | None = None


def make_padding(lengths: Tensor, size: int, dtype: torch.dtype) -> Padding | None:
    """Masks of a batch padded to ``size`` frames, or None where nothing is padded (no mask work then).

    The check needs the values of ``lengths``, so it is made on the CPU only; a GPU always gets the masks.
    """
    keys = make_keys(lengths, size)
    if keys is None:
        return None
    return Padding(keys[:, 0, 0, :, None].to(dtype), keys)


def make_keys(lengths: Tensor, size: int) -> Tensor | None:
    """The attention part of :func:`make_padding`: (B, 1, 1, size) bool, or None where nothing is padded."""
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and bool((lengths >= size).all()):
        return None
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None, None, :]


def memory_padding(kernel_size: int, shift: int) -> tuple[int, int]:
    """Zero frames (left, right) around a memory block's input; a positive ``shift`` looks further back."""
    left = (kernel_size - 1) // 2 + max(shift, 0)
    return left, kernel_size - 1 - left


def memory_block(x: Tensor, weight: Tensor, left: int, right: int) -> Tensor:
    """Depthwise convolution over time plus identity (SAN-M, equation 7).

    Args:
        x: (B, T, D).
        weight: (D, 1, kernel).
        left, right: zero frames to add on both sides; ``right`` may be negative (frames are cut).
    """
    inner = x
    if left != right:
        inner, left = F.pad(x, (0, 0, left, max(right, 0)))[:, : x.shape[1] + left + right], 0
    return depthwise(inner, weight, left) + x


def depthwise(x: Tensor, weight: Tensor, padding: int = 0) -> Tensor:
    """Depthwise convolution over time: (B, T, D) and (D, 1, K) -> (B, T + 2 * padding - K + 1, D).

    Computed as a two-dimensional convolution on the channels-last view of x, which needs no transposed copy
    and takes a sixth of the time of ``conv1d`` on a CPU.
    """
    grid = x.contiguous().transpose(1, 2).unsqueeze(2)
    result = F.conv2d(grid, weight.unsqueeze(2), padding=(0, padding), groups=weight.shape[0])
    return result.squeeze(2).transpose(1, 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, heads, T, D / heads) without a copy."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, D / heads) -> (B, T, D)."""
    return x.transpose(1, 2).flatten(2)


class SANMAttention(nn.Module):
    """Multi-head self-attention whose output gets the memory of its own values added."""

    def __init__(
        self, input_size: int, size: int, heads: int, kernel_size: int, shift: int = 0, dropout: float = 0.0
    ):
        """``input_size`` may differ from ``size`` (first encoder block)."""
        super().__init__()
        if size % heads:
            raise ConfigError(f"attention_heads: width {size} is not a multiple of {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.coarse = False  # see dot_product_attention
        self.left, self.right = memory_padding(kernel_size, shift)
        self.linear_q_k_v = nn.Linear(input_size, 3 * size)
        self.linear_out = nn.Linear(size, size)
        self.fsmn_block = nn.Conv1d(size, size, kernel_size, groups=size, bias=False)

    def memory(self, values: Tensor, padding: Padding | None) -> Tensor:
        """Memory (B, T, D) of the values (B, T, D); zero at padding."""
        if padding is not None:
            values = values * padding.frames
        folded = values
        if padding is not None and padding.window:
            folded = values.unflatten(1, (-1, padding.window)).flatten(0, 1)
        memory = memory_block(folded, self.fsmn_block.weight, self.left, self.right).reshape(values.shape)
        memory = F.dropout(memory, self.dropout, self.training)
        return memory if padding is None else memory * padding.frames

    def forward(self, x: Tensor, padding: Padding | None = None) -> Tensor:
        """(B, T, input_size) -> (B, T, size)."""
        return self.attend(self.linear_q_k_v(x), padding)

    def attend(self, projected: Tensor, padding: Padding | None = None, seen: Tensor | None = None) -> Tensor:
        """What :meth:`forward` makes of the projected input.

        Args:
            projected: (B, T, 3 D) queries, keys and values.
            padding: its ``keys`` cover all that is seen.
            seen: (B, P + T, 2 D) keys and values of earlier frames and of these (streaming); default: of
                these alone.
        """
        query, key_value = projected.split([projected.shape[-1] // 3, 2 * projected.shape[-1] // 3], dim=-1)
        key, value = (key_value if seen is None else seen).chunk(2, dim=-1)
        context = dot_product_attention(
            split_heads(query, self.heads),
            split_heads(key, self.heads),
            split_heads(value, self.heads),
            mask=None if padding is None else padding.keys,
            dropout=self.dropout if self.training else 0.0,
            coarse=self.coarse,
            few=seen is not None,
        )
        return self.linear_out(merge_heads(context)) + self.memory(key_value.chunk(2, dim=-1)[1], padding)


class FeedForward(nn.Module):
    """Linear, ReLU, Linear (encoder)."""

    def __init__(self, size: int, units: int, dropout: float = 0.0):
        super().__init__()
        self.w_1 = nn.Linear(size, units)
        self.w_2 = nn.Linear(units, size)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.w_2(F.dropout(linear_relu(self.w_1, x), self.dropout, self.training))


class SANMEncoderLayer(nn.Module):
    """Pre-norm block; the attention has no residual where the input size differs from the output size."""

    def __init__(
        self,
        input_size: int,
        size: int,
        heads: int,
        units: int,
        kernel_size: int,
        shift: int = 0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        norm_eps: float = 1e-12,
    ):
        super().__init__()
        self.residual = input_size == size
        self.dropout = dropout
        self.self_attn = SANMAttention(input_size, size, heads, kernel_size, shift, attention_dropout)
        self.feed_forward = FeedForward(size, units, dropout)
        self.norm1 = nn.LayerNorm(input_size, eps=norm_eps)
        self.norm2 = nn.LayerNorm(size, eps=norm_eps)

    def forward(self, x: Tensor, padding: Padding | None = None) -> Tensor:
        """(B, T, input_size) -> (B, T, size)."""
        return self.join(x, self.self_attn(self.norm1(x), padding))

    def join(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block from the attention's output (B, T, size) on."""
        attended = F.dropout(attended, self.dropout, self.training)
        x = x + attended if self.residual else attended
        return x + F.dropout(self.feed_forward(self.norm2(x)), self.dropout, self.training)


@dataclass(frozen=True)
class SANMEncoderConfig:
    """Numbers of a SAN-M encoder; the defaults are those of Paraformer-large.

    shift: how many frames further back the memory looks. norm_eps: 1e-12 in Paraformer, 1e-5 in SenseVoice.
    tp_blocks: extra blocks after the first final norm, followed by a norm of their own (SenseVoice).
    """

    output_size: int = 512
    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 50
    tp_blocks: int = 0
    kernel_size: int = 11
    shift: int = 0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_WIDTH, "output_size", "attention_heads", "linear_units", "kernel_size")
        check_range(self, 1, MAX_BLOCKS, "num_blocks")
        check_range(self, 0, MAX_BLOCKS, "tp_blocks")
        check_range(self, 0, 1, "dropout", "attention_dropout", "norm_eps")
        check_range(self, -self.kernel_size, self.kernel_size, "shift")


class SANMEncoder(nn.Module):
    """SAN-M encoder: scaling by sqrt(D), position code, blocks, norm (, ``tp`` blocks, their norm)."""

    frame_stride = 1

    def __init__(self, input_size: int, config: SANMEncoderConfig | None = None):
        """``input_size``: feature size F, even (the position code has this depth)."""
        super().__init__()
        config = config or SANMEncoderConfig()
        self.config = config
        self.input_size = input_size
        self.output_size = config.output_size
        self.embed = SinusoidPosition(input_size)
        self.encoders0 = nn.ModuleList([self._layer(input_size, config)])
        self.encoders = nn.ModuleList(
            self._layer(config.output_size, config) for _ in range(config.num_blocks - 1)
        )
        self.after_norm = nn.LayerNorm(config.output_size, eps=config.norm_eps)
        if config.tp_blocks > 0:
            self.tp_encoders = nn.ModuleList(
                self._layer(config.output_size, config) for _ in range(config.tp_blocks)
            )
            self.tp_norm = nn.LayerNorm(config.output_size, eps=config.norm_eps)

    @staticmethod
    def _layer(input_size: int, config: SANMEncoderConfig) -> SANMEncoderLayer:
        return SANMEncoderLayer(
            input_size,
            config.output_size,
            config.attention_heads,
            config.linear_units,
            config.kernel_size,
            config.shift,
            config.dropout,
            config.attention_dropout,
            config.norm_eps,
        )

    def forward(self, x: Tensor, lengths: Tensor, tap: Tap | None = None) -> tuple[Tensor, Tensor]:
        """Encode a padded batch.

        Args:
            x: (B, T, F) features; not changed.
            lengths: (B,) int64 valid frames.
            tap: called after some of the ``num_blocks`` layers, for intermediate predictions.

        Returns:
            (B, T, D) encodings and the same lengths. Padded rows hold numbers without meaning; valid rows do
            not depend on the padding.
        """
        padding = make_padding(lengths, x.shape[1], x.dtype)
        x = self.embed(x * self.output_size**0.5)
        for number, layer in enumerate([*self.encoders0, *self.encoders], start=1):
            x = layer(x, padding)
            if tap is not None and number in tap.layers:
                x = tap.function(x, self.after_norm(x))
        x = self.after_norm(x)
        if self.config.tp_blocks > 0:
            for layer in self.tp_encoders:
                x = layer(x, padding)
            x = self.tp_norm(x)
        return x, lengths

    def init_state(
        self,
        batch: int,
        stream: StreamConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> EncoderState:
        """State of ``batch`` streams that have not begun (:mod:`nar_speech.layers.sanm_stream`)."""
        from nar_speech.layers.sanm_stream import init_encoder

        return init_encoder(self, stream, batch, device, dtype)

    def step(
        self, x: Tensor, lengths: Tensor, state: EncoderState, stream: StreamConfig, in_place: bool = False
    ) -> tuple[Tensor, Tensor, EncoderState]:
        """Encode the next chunk (B, C, F) of every stream: window (B, W, D), its valid rows (B, W), state."""
        from nar_speech.layers.sanm_stream import step_encoder

        return step_encoder(self, stream, x, lengths, state, in_place)


class CrossAttention(nn.Module):
    """Multi-head attention of token states over a memory: one projection for keys and values."""

    def __init__(self, size: int, heads: int, dropout: float = 0.0, memory_size: int | None = None):
        """``memory_size``: width of the memory (encoder output); default ``size``."""
        super().__init__()
        if size % heads:
            raise ConfigError(f"attention_heads: width {size} is not a multiple of {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.coarse = False  # see dot_product_attention
        self.linear_q = nn.Linear(size, size)
        self.linear_k_v = nn.Linear(memory_size or size, 2 * size)
        self.linear_out = nn.Linear(size, size)

    def forward(self, x: Tensor, memory: Tensor, keys: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, U, D) queries.
            memory: (B, T, E).
            keys: (B, 1, 1, T) or (B, 1, U, T) bool, true where attention may look; None: everywhere.
        """
        return self.attend(x, self.linear_k_v(memory), keys)

    def attend(self, x: Tensor, key_value: Tensor, keys: Tensor | None = None, few: bool = False) -> Tensor:
        """What :meth:`forward` gives for the projected memory (B, T, 2 D); ``few`` as in ``dot_product``.

        With ``few`` the queries are padded to whole blocks of the fused kernel: how many tokens other streams
        of a batch have must not change how a token's products are summed up.
        """
        key, value = key_value.chunk(2, dim=-1)
        query, tokens = split_heads(self.linear_q(x), self.heads), x.shape[1]
        if few:
            query = F.pad(query, (0, 0, 0, -tokens % QUERY_BLOCK))
        context = dot_product_attention(
            query,
            split_heads(key, self.heads),
            split_heads(value, self.heads),
            mask=keys,
            dropout=self.dropout if self.training else 0.0,
            coarse=self.coarse,
            few=few,
        )
        return self.linear_out(merge_heads(context[:, :, :tokens]))

    def weights(self, x: Tensor, memory: Tensor, keys: Tensor | None = None) -> Tensor:
        """Attention weights (B, heads, U, T) of :meth:`forward`, without dropout."""
        key = self.linear_k_v(memory).chunk(2, dim=-1)[0]
        query, key = split_heads(self.linear_q(x), self.heads), split_heads(key, self.heads)
        scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        if keys is not None:
            scores = scores.masked_fill(~keys, float("-inf"))
        return scores.softmax(dim=-1)


class TokenMemory(nn.Module):
    """The decoder's stand-in for self-attention: a memory block over the tokens."""

    def __init__(self, size: int, kernel_size: int, shift: int = 0, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.left, self.right = memory_padding(kernel_size, shift)
        self.fsmn_block = nn.Conv1d(size, size, kernel_size, groups=size, bias=False)

    def forward(self, x: Tensor, padding: Padding | None = None) -> Tensor:
        """(B, U, D) -> (B, U, D), zero at padding."""
        if padding is not None:
            x = x * padding.frames
        if padding is not None and padding.groups is not None and self.right > 0:
            x = self._grouped(x, padding.groups)
        else:
            x = memory_block(x, self.fsmn_block.weight, self.left, self.right)
        x = F.dropout(x, self.dropout, self.training)
        return x if padding is None else x * padding.frames

    def _grouped(self, x: Tensor, groups: Tensor) -> Tensor:
        """Memory of tokens (B, U, D) that does not look ahead into other ``groups`` (B, U)."""
        size = self.left + 1 + self.right
        inner = F.pad(x, (0, 0, self.left, self.right)).unfold(1, size, 1)  # (B, U, D, K)
        near = F.pad(groups, (self.left, self.right), value=-1).unfold(1, size, 1) == groups[:, :, None]
        near[:, :, : self.left + 1] = True
        weight = self.fsmn_block.weight.squeeze(1)
        return torch.einsum("budk,dk,buk->bud", inner, weight, near.to(x.dtype)) + x


class NormedFeedForward(nn.Module):
    """The decoder's feed forward: Linear, ReLU, LayerNorm, Linear without bias."""

    def __init__(self, size: int, units: int, dropout: float = 0.0, norm_eps: float = 1e-12):
        super().__init__()
        self.w_1 = nn.Linear(size, units)
        self.w_2 = nn.Linear(units, size, bias=False)
        self.norm = nn.LayerNorm(units, eps=norm_eps)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, U, D) -> (B, U, D)."""
        return self.w_2(self.norm(F.dropout(linear_relu(self.w_1, x), self.dropout, self.training)))


class SANMDecoderLayer(nn.Module):
    """Feed forward, then token memory, then cross attention, in this unusual order.

    The block input is the residual of the memory, so the feed forward has none of its own; a block without
    memory returns the feed forward's output alone.
    """

    def __init__(
        self,
        size: int,
        feed_forward: NormedFeedForward,
        self_attn: TokenMemory | None = None,
        src_attn: CrossAttention | None = None,
        dropout: float = 0.0,
        norm_eps: float = 1e-12,
    ):
        super().__init__()
        self.dropout = dropout
        self.feed_forward = feed_forward
        self.self_attn = self_attn
        self.src_attn = src_attn
        self.norm1 = nn.LayerNorm(size, eps=norm_eps)
        if self_attn is not None:
            self.norm2 = nn.LayerNorm(size, eps=norm_eps)
        if src_attn is not None:
            self.norm3 = nn.LayerNorm(size, eps=norm_eps)

    def remember(self, x: Tensor, padding: Padding | None = None) -> Tensor:
        """The block up to the token memory: (B, U, D) -> (B, U, D)."""
        inner = self.feed_forward(self.norm1(x))
        if self.self_attn is None:
            return inner
        return x + F.dropout(self.self_attn(self.norm2(inner), padding), self.dropout, self.training)

    def forward(
        self,
        x: Tensor,
        padding: Padding | None = None,
        memory: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: (B, U, D) token states.
            padding: of the tokens.
            memory: (B, T, E) what the cross attention looks at; needed where the block has one.
            keys: (B, 1, 1, T) bool, valid memory frames.
        """
        x = self.remember(x, padding)
        if self.src_attn is not None:
            x = x + F.dropout(self.src_attn(self.norm3(x), memory, keys), self.dropout, self.training)
        return x


@dataclass(frozen=True)
class SANMDecoderConfig:
    """Numbers of a SAN-M decoder; the defaults are those of Paraformer-large.

    att_layer_num: blocks with cross attention; num_blocks beyond it have none (fewer than that adds none).
    embed, output_layer: whether the decoder has a token embedding and a projection to the vocabulary.
    """

    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 16
    att_layer_num: int = 16
    kernel_size: int = 11
    shift: int = 0
    dropout: float = 0.1
    self_attention_dropout: float = 0.1
    src_attention_dropout: float = 0.1
    norm_eps: float = 1e-12
    embed: bool = True
    output_layer: bool = True

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_WIDTH, "attention_heads", "linear_units", "kernel_size")
        check_range(self, 0, MAX_BLOCKS, "num_blocks", "att_layer_num")
        check_range(self, 0, 1, "dropout", "self_attention_dropout", "src_attention_dropout", "norm_eps")
        check_range(self, -self.kernel_size, self.kernel_size, "shift")


class SANMDecoder(nn.Module):
    """Parallel decoder: blocks with cross attention, blocks without, a feed-forward block, norm, output."""

    def __init__(self, size: int, vocab_size: int, config: SANMDecoderConfig | None = None):
        """``size``: width D, that of the encoder output. ``vocab_size``: V."""
        super().__init__()
        config = config or SANMDecoderConfig()
        self.config = config
        self.size = size
        if config.embed:
            self.embed = nn.Sequential(nn.Embedding(vocab_size, size))
        self.decoders = nn.ModuleList(
            self._layer(config.shift, cross=True) for _ in range(self._cross_layers())
        )
        plain = config.num_blocks - config.att_layer_num
        if plain > 0:
            self.decoders2 = nn.ModuleList(self._layer(0, cross=False) for _ in range(plain))
        self.decoders3 = nn.ModuleList([self._layer(None, cross=False)])
        self.after_norm = nn.LayerNorm(size, eps=config.norm_eps)
        if config.output_layer:
            self.output_layer = nn.Linear(size, vocab_size)

    def _cross_layers(self) -> int:
        """How many blocks ``decoders`` has."""
        return self.config.att_layer_num

    def _layer(self, shift: int | None, cross: bool) -> SANMDecoderLayer:
        """One block: without memory where ``shift`` is None, with cross attention where ``cross``."""
        c = self.config
        return SANMDecoderLayer(
            self.size,
            NormedFeedForward(self.size, c.linear_units, c.dropout, c.norm_eps),
            None if shift is None else TokenMemory(self.size, c.kernel_size, shift, c.self_attention_dropout),
            CrossAttention(self.size, c.attention_heads, c.src_attention_dropout) if cross else None,
            c.dropout,
            c.norm_eps,
        )

    def hidden(self, tokens: Tensor, token_lengths: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        """States before the projection.

        Args:
            tokens: (B, U, D) one vector per token, U at least 1.
            token_lengths: (B,) int64 valid tokens.
            memory: (B, T, D) what the cross attention looks at.
            lengths: (B,) int64 valid memory rows.

        Returns:
            (B, U, D).
        """
        padding = make_padding(token_lengths, tokens.shape[1], tokens.dtype)
        return self.states(tokens, padding, memory, make_keys(lengths, memory.shape[1]))

    def states(self, tokens: Tensor, padding: Padding | None, memory: Tensor, keys: Tensor | None) -> Tensor:
        """As :meth:`hidden`, with ``padding`` of the tokens and ``keys`` (B, 1, 1 or U, T) of the memory."""
        x = tokens
        for layer in self.decoders:
            x = layer(x, padding, memory, keys)
        if self.config.num_blocks > self.config.att_layer_num:
            for layer in self.decoders2:
                x = layer(x, padding)
        for layer in self.decoders3:
            x = layer(x, padding)
        return self.after_norm(x)

    def forward(self, tokens: Tensor, token_lengths: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        """As :meth:`hidden`, projected to the vocabulary: (B, U, V) logits."""
        return self.output_layer(self.hidden(tokens, token_lengths, memory, lengths))

    def init_state(
        self,
        batch: int,
        stream: StreamConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DecoderState:
        """State of ``batch`` streams that have not begun (:mod:`nar_speech.layers.sanm_stream`)."""
        from nar_speech.layers.sanm_stream import init_decoder

        return init_decoder(self, stream, batch, device, dtype)

    def step(
        self,
        tokens: Tensor,
        counts: Tensor,
        memory: Tensor,
        rows: Tensor,
        state: DecoderState,
        stream: StreamConfig,
        in_place: bool = False,
    ) -> tuple[Tensor, DecoderState]:
        """Logits (B, U, V) of the next tokens of every stream, and its state.

        Args:
            tokens: (B, U, D), ``counts`` (B,) of them valid.
            memory: (B, W, D) window of the encoder, ``rows`` (B, W) bool of it valid.
        """
        from nar_speech.layers.sanm_stream import step_decoder

        hidden, state = step_decoder(self, stream, tokens, counts, memory, rows, state, in_place)
        return self.output_layer(hidden), state
