"""Conformer encoder of WeNet (U2, U2++), with its configuration keys and parameter names.

Conformer: Gulati et al. 2020. Chunk masks and dynamic chunk training: U2, Zhang et al. 2020, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nar_speech.config import MAX_BLOCKS, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError
from nar_speech.layers.attention import Attention, PositionBiasAttention
from nar_speech.layers.chunks import (
    Chunking,
    chunk_mask,
    drop,
    forget,
    join,
    position_codes,
    row_flags,
    state_zeros,
)
from nar_speech.layers.conv import ConvolutionModule
from nar_speech.layers.intermediate import Tap
from nar_speech.layers.position import interleaved_sinusoid, valid_mask
from nar_speech.layers.subsampling import build_input_layer

STREAM_CHUNK, STREAM_LEFT_CHUNKS = 16, 4  # where neither the configuration nor the caller says

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "swish": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
}


@dataclass(frozen=True)
class ConformerEncoderConfig:
    """Numbers of a WeNet conformer encoder; names and defaults are those of WeNet's ``encoder_conf``.

    Attributes:
        static_chunk_size: train and decode with this chunk size (output frames); 0: full context.
        use_dynamic_chunk: draw a chunk size per training batch.
        use_dynamic_left_chunk: draw the number of left chunks too.
        global_cmvn: hold the feature mean and inverse deviation (``global_cmvn.mean``, ``global_cmvn.istd``).
    """

    output_size: int = 256
    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 6
    dropout_rate: float = 0.1
    positional_dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.0
    input_layer: Literal["conv2d", "conv2d6", "conv2d8", "linear"] = "conv2d"
    pos_enc_layer_type: Literal["rel_pos", "abs_pos", "no_pos"] = "rel_pos"
    selfattention_layer_type: Literal["rel_selfattn", "selfattn"] = "rel_selfattn"
    normalize_before: bool = True
    final_norm: bool = True
    static_chunk_size: int = 0
    use_dynamic_chunk: bool = False
    use_dynamic_left_chunk: bool = False
    macaron_style: bool = True
    activation_type: Literal["swish", "relu", "gelu", "tanh", "hardtanh"] = "swish"
    use_cnn_module: bool = True
    cnn_module_kernel: int = 15
    cnn_module_norm: Literal["batch_norm", "layer_norm"] = "batch_norm"
    causal: bool = False
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    conv_bias: bool = True
    mlp_bias: bool = True
    norm_eps: float = 1e-5
    conv_norm_eps: float = 1e-5
    global_cmvn: bool = False

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_WIDTH, "output_size", "attention_heads", "linear_units", "cnn_module_kernel")
        check_range(self, 1, MAX_BLOCKS, "num_blocks")
        check_range(self, 0, 1, "dropout_rate", "positional_dropout_rate", "attention_dropout_rate")
        check_range(self, 0, 1, "norm_eps", "conv_norm_eps")
        check_range(self, 0, MAX_WIDTH, "static_chunk_size")


@dataclass(frozen=True)
class ConformerState:
    """What a stream carries from one step to the next; see :meth:`ConformerEncoder.step`.

    Attributes:
        frames: (B, S, F) features that wait for more, left aligned; S = receptive field - 1.
        num_frames: (B,) int64, how many of them there are.
        offset: (B,) int64, output frames so far.
        count: (B,) int64, valid entries of the attention caches, at their right.
        attention: for each layer (B, L, 2 or 3 D) keys, projected positions and values.
        convolution: for each layer (B, kernel - 1, D) the last inputs of its convolution module.
    """

    frames: Tensor
    num_frames: Tensor
    offset: Tensor
    count: Tensor
    attention: tuple[Tensor, ...]
    convolution: tuple[Tensor, ...]


class GlobalCMVN(nn.Module):
    """Normalise features with a stored mean and inverse deviation."""

    def __init__(self, input_size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(input_size))
        self.register_buffer("istd", torch.ones(input_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(x - mean) * istd for ``x`` (B, T, F)."""
        return (x - self.mean) * self.istd


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear."""

    def __init__(self, width: int, units: int, dropout: float, activation: nn.Module, bias: bool = True):
        super().__init__()
        self.w_1 = nn.Linear(width, units, bias=bias)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.w_2 = nn.Linear(units, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.w_2(self.dropout(self.activation(self.w_1(x))))


class ConformerLayer(nn.Module):
    """Half feed forward, attention, convolution, half feed forward, each with a residual and a norm.

    The plain form (no macaron, no convolution) is a transformer layer.
    """

    def __init__(self, config: ConformerEncoderConfig):
        super().__init__()
        c, width = config, config.output_size
        activation = ACTIVATIONS[c.activation_type]()
        attention = PositionBiasAttention if c.selfattention_layer_type == "rel_selfattn" else Attention
        self.self_attn = attention(
            c.attention_heads,
            width,
            c.attention_dropout_rate,
            query_bias=c.query_bias,
            key_bias=c.key_bias,
            value_bias=c.value_bias,
        )

        def feed_forward() -> FeedForward:
            return FeedForward(width, c.linear_units, c.dropout_rate, activation, c.mlp_bias)

        self.feed_forward = feed_forward()
        self.feed_forward_macaron = feed_forward() if c.macaron_style else None
        self.conv_module = None
        if c.use_cnn_module:
            self.conv_module = ConvolutionModule(
                width,
                c.cnn_module_kernel,
                activation,
                c.cnn_module_norm,
                c.causal,
                c.conv_bias,
                c.conv_norm_eps,
            )
            self.norm_conv = nn.LayerNorm(width, eps=c.norm_eps)
            self.norm_final = nn.LayerNorm(width, eps=c.norm_eps)
        self.norm_ff = nn.LayerNorm(width, eps=c.norm_eps)
        self.norm_mha = nn.LayerNorm(width, eps=c.norm_eps)
        if c.macaron_style:
            self.norm_ff_macaron = nn.LayerNorm(width, eps=c.norm_eps)
        self.ff_scale = 0.5 if c.macaron_style else 1.0
        self.dropout = nn.Dropout(c.dropout_rate)
        self.normalize_before = c.normalize_before

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor | None,
        valid: torch.Tensor,
        official_padding: bool = False,
    ) -> torch.Tensor:
        """One layer over ``x`` (B, T, D).

        Args:
            mask: (B, T or 1, T) bool, where attention may look.
            positions: (1, T, D) position codes of the frames, None without them.
            valid: (B, T) bool, frames that are not padding.
            official_padding: see :class:`ConvolutionModule`.
        """
        if self.feed_forward_macaron is not None:
            x = self._residual(x, self.norm_ff_macaron, self.feed_forward_macaron, self.ff_scale)
        x = self._residual(x, self.norm_mha, lambda y: self._attend(y, mask, positions))
        if self.conv_module is not None:
            x = self._residual(
                x,
                self.norm_conv,
                lambda y: self.conv_module(y, valid, official_padding=official_padding),
            )
        x = self._residual(x, self.norm_ff, self.feed_forward, self.ff_scale)
        return x if self.conv_module is None else self.norm_final(x)

    def step(
        self,
        x: Tensor,
        mask: Tensor,
        positions: Tensor | None,
        valid: Tensor,
        count: Tensor,
        attention: Tensor,
        convolution: Tensor,
        grow: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer over the next frames ``x`` (B, U, D) of streams, ``count`` (B,) of them valid.

        Args:
            mask: (B, 1, L + U) bool. positions: (B, U, D) codes. valid: (B, U) bool.
            attention, convolution, grow: see :class:`ConformerState` and :meth:`ConformerEncoder.step`.

        Returns:
            (B, U, D) and the layer's next two caches.
        """
        caches = [attention, convolution]

        def attend(y: Tensor) -> Tensor:
            y, caches[0] = self.self_attn.step(y, attention, count, mask, positions, grow)
            return y

        def convolve(y: Tensor) -> Tensor:
            y, caches[1] = self.conv_module.step(y, valid, convolution, count)
            return y

        if self.feed_forward_macaron is not None:
            x = self._residual(x, self.norm_ff_macaron, self.feed_forward_macaron, self.ff_scale)
        x = self._residual(x, self.norm_mha, attend)
        if self.conv_module is not None:
            x = self._residual(x, self.norm_conv, convolve)
        x = self._residual(x, self.norm_ff, self.feed_forward, self.ff_scale)
        return (x if self.conv_module is None else self.norm_final(x)), caches[0], caches[1]

    def _residual(self, x: torch.Tensor, norm: nn.Module, part, scale: float = 1.0) -> torch.Tensor:
        if self.normalize_before:
            return x + scale * self.dropout(part(norm(x)))
        return norm(x + scale * self.dropout(part(x)))

    def _attend(self, x: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        keys = self.self_attn.keys(x)
        if isinstance(self.self_attn, PositionBiasAttention):
            return self.self_attn(x, keys, mask, positions)
        return self.self_attn(x, keys, mask)


class ConformerEncoder(nn.Module):
    """Subsampling, conformer layers, final norm.

    Attributes:
        output_size: width D of the result.
        frame_stride: input frames per output frame.
        max_chunk: largest chunk drawn in dynamic training, about one second.
    """

    def __init__(self, input_size: int, config: ConformerEncoderConfig | None = None):
        super().__init__()
        config = config or ConformerEncoderConfig()
        if config.selfattention_layer_type == "rel_selfattn" and config.pos_enc_layer_type == "abs_pos":
            raise ConfigError("pos_enc_layer_type: 'abs_pos' goes with selfattention_layer_type 'selfattn'")
        self.config, self.input_size, self.output_size = config, input_size, config.output_size
        self.global_cmvn = GlobalCMVN(input_size) if config.global_cmvn else None
        self.embed = build_input_layer(
            config.input_layer, input_size, config.output_size, config.dropout_rate
        )
        self.frame_stride = self.embed.frame_stride
        self.max_chunk = 100 // self.frame_stride
        self.position_dropout = nn.Dropout(config.positional_dropout_rate)
        self.encoders = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_blocks))
        self.after_norm = nn.LayerNorm(config.output_size, eps=config.norm_eps)

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Output frames (B,) of inputs with ``lengths`` (B,) frames."""
        return self.embed.output_lengths(lengths)

    def forward(
        self,
        x: torch.Tensor,
        lengths: torch.Tensor,
        chunk_size: int | None = None,
        left_chunks: int = -1,
        tap: Tap | None = None,
        official_padding: bool = False,
        first_chunk: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode features.

        Args:
            x: (B, T, F) features.
            lengths: (B,) int64 valid frames.
            chunk_size: output frames that see each other; 0 or less: all. None: what the configuration says
                (a drawn size in training with ``use_dynamic_chunk``, else ``static_chunk_size``, else all).
            left_chunks: whole chunks a chunk sees before itself; negative: all.
            tap: called after some layers, for intermediate predictions.
            official_padding: repeat WeNet's leak of padding into non-causal convolutions.
            first_chunk: output frames of the first chunk where it is shorter than ``chunk_size``.

        Returns:
            ((B, T', D) with zeros in padded frames, lengths (B,)).
        """
        if self.global_cmvn is not None:
            x = self.global_cmvn(x)
        x, lengths = self.embed(x, lengths)
        frames = x.shape[1]
        if frames == 0:
            return x, lengths
        x, positions = self._add_positions(x)
        valid = valid_mask(lengths, frames)
        mask = valid.unsqueeze(1)
        if chunk_size is None:
            chunk_size, left_chunks = self._policy(frames, left_chunks)
        if chunk_size > 0 and (first_chunk or chunk_size) < frames:
            mask = mask & chunk_mask(frames, chunk_size, left_chunks, x.device, first_chunk)
        for number, layer in enumerate(self.encoders, start=1):
            x = layer(x, mask, positions, valid, official_padding)
            if tap is not None and number in tap.layers:
                x = tap.function(x, self._finish(x))
        return self._finish(x).masked_fill(~valid.unsqueeze(2), 0.0), lengths

    def chunking(self, chunk_size: int | None = None, left: int | None = None) -> Chunking:
        """How to feed streams in chunks of ``chunk_size`` output frames that see ``left`` frames before them.

        Default: the configuration's ``static_chunk_size``, else 16, and four chunks back. Whole chunks as
        ``left`` give what :meth:`forward` gives under the mask of as many ``left_chunks``; negative: all.

        Raises:
            ConfigError: convolutions that look ahead, or a chunk without frames.
        """
        if self.config.use_cnn_module and not self.config.causal:
            raise ConfigError("causal: false; only an encoder with causal convolutions can take a stream")
        chunk_size = chunk_size or self.config.static_chunk_size or STREAM_CHUNK
        left = STREAM_LEFT_CHUNKS * chunk_size if left is None else left
        later = chunk_size * self.frame_stride
        return Chunking(later - self.frame_stride + self.embed.receptive_field, later, chunk_size, left)

    def stream_mask(self, chunking: Chunking) -> dict[str, int]:
        """Arguments with which :meth:`forward` gives what a stream fed so gets."""
        return {"chunk_size": chunking.frames, "left_chunks": chunking.left // chunking.frames}

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunking: Chunking | None = None,
    ) -> ConformerState:
        """The state of ``batch`` streams that have not begun; device and dtype are by default the weights'.

        Raises:
            ConfigError: as :meth:`chunking`.
        """
        chunking = chunking or self.chunking()
        zeros, dtype = state_zeros(batch, self.after_norm.weight, device, dtype)
        context = self.config.cnn_module_kernel - 1 if self.config.use_cnn_module else 0
        return ConformerState(
            frames=zeros(self.embed.receptive_field - 1, self.input_size, dtype=dtype),
            num_frames=zeros(),
            offset=zeros(),
            count=zeros(),
            attention=tuple(
                zeros(chunking.cached, layer.self_attn.cache_width, dtype=dtype) for layer in self.encoders
            ),
            convolution=tuple(zeros(context, self.output_size, dtype=dtype) for _ in self.encoders),
        )

    def step(
        self,
        x: Tensor,
        lengths: Tensor,
        state: ConformerState,
        final: bool | Tensor = False,
        grow: bool = False,
        tap: Tap | None = None,
    ) -> tuple[Tensor, Tensor, ConformerState]:
        """Encode the next chunk of every stream.

        Fed as :meth:`chunking` says, a stream gets what :meth:`forward` gives under the chunk mask. Rows are
        independent and may be at any place of their stream; shapes depend on those of the arguments only.

        Args:
            x: (B, C, F) features with room for ``C // frame_stride`` output frames.
            lengths: (B,) int64 new frames of each row: ``first`` in its first step, ``later`` in others, 0 to
                as many where ``final``; 0 leaves a row that is not final as it is. A shorter first step makes
                the first chunk shorter.
            state: from :meth:`init_state` or the step before.
            final: whether the stream ends here, one flag or (B,) bool; its state is then that of a new one.
            grow: for an unlimited look-back: keep every frame. The caches get longer at each step, so this
                is for single streams and not for captured graphs.
            tap: as in :meth:`forward`.

        Returns:
            ((B, U, D) with zeros beyond the lengths, lengths (B,), the next state).
        """
        batch, frames = x.shape[0], max(x.shape[1] // self.frame_stride, 1)
        final = row_flags(final, batch, x.device)
        if self.global_cmvn is not None:
            x = self.global_cmvn(x)
        field = self.embed.receptive_field
        size = frames * self.frame_stride + field - 1
        window, filled = join(state.frames, state.num_frames, x.to(state.frames.dtype), lengths, size)
        x, count = self.embed(window, filled)
        count = count.clamp(max=frames)
        left, left_over = drop(window, filled, count * self.frame_stride, field - 1)

        index = torch.arange(frames, device=x.device)
        valid = index < count.unsqueeze(1)
        x, positions = self._step_positions(x, state.offset.unsqueeze(1) + index)
        cached = state.attention[0].shape[1]
        old = torch.arange(cached, device=x.device) >= cached - state.count.unsqueeze(1)
        mask = torch.cat([old, valid], dim=1).unsqueeze(1)
        attention, convolution = [], []
        for number, layer in enumerate(self.encoders, start=1):
            caches = state.attention[number - 1], state.convolution[number - 1]
            x, keys, inputs = layer.step(x, mask, positions, valid, count, *caches, grow)
            attention.append(keys)
            convolution.append(inputs)
            if tap is not None and number in tap.layers:
                x = tap.function(x, self._finish(x))
        x = self._finish(x).masked_fill(~valid.unsqueeze(2), 0.0)
        left, left_over, offset, seen = forget(
            final,
            left,
            left_over,
            state.offset + count,
            (state.count + count).clamp(max=attention[0].shape[1]),
        )
        kept = forget(final, *attention), forget(final, *convolution)
        return x, count, ConformerState(left, left_over, offset, seen, *kept)

    def _step_positions(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale (B, U, D) as :meth:`forward` does; codes (B, U, D) of frames ``position`` (B, U)."""
        kind = self.config.pos_enc_layer_type
        if kind == "no_pos":
            return x, torch.zeros_like(x)
        x = x * math.sqrt(self.output_size)
        code = position_codes(position, self.output_size).to(x.dtype)
        return (x + code if kind == "abs_pos" else x), code

    def _finish(self, x: torch.Tensor) -> torch.Tensor:
        return self.after_norm(x) if self.config.normalize_before and self.config.final_norm else x

    def _add_positions(self, x: torch.Tensor, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        kind = self.config.pos_enc_layer_type
        if kind == "no_pos":
            positions = x.new_zeros(1, x.shape[1], self.output_size)
            return self.position_dropout(x), positions
        code = interleaved_sinusoid(x.shape[1], self.output_size, x.device, offset).to(x.dtype).unsqueeze(0)
        x = x * math.sqrt(self.output_size)
        if kind == "abs_pos":
            x = x + code
        return self.position_dropout(x), self.position_dropout(code)

    def _policy(self, frames: int, left_chunks: int) -> tuple[int, int]:
        c = self.config
        if c.use_dynamic_chunk:
            if not self.training or frames < 2:
                return 0, -1
            chunk = chunk_from_draw(int(torch.randint(1, frames, (1,))), frames, self.max_chunk)
            if chunk < frames and c.use_dynamic_left_chunk:
                most = (frames - 1) // chunk
                return chunk, int(torch.randint(0, most, (1,))) if most > 0 else 0
            return chunk, -1
        return c.static_chunk_size, left_chunks


def chunk_from_draw(draw: int, frames: int, max_chunk: int = 25) -> int:
    """Chunk size of dynamic chunk training (U2, section 3.3) from a number drawn in 1 .. frames - 1.

    More than half of the frames means full context, else the chunk is ``draw % max_chunk + 1``.
    """
    return frames if draw > frames // 2 else draw % max_chunk + 1
