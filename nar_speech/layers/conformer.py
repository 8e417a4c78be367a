"""Conformer encoder of WeNet (U2, U2++), with its configuration keys and parameter names.

Conformer: Gulati et al. 2020. Chunk masks and dynamic chunk training: U2, Zhang et al. 2020, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from nar_speech.config import MAX_BLOCKS, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError
from nar_speech.layers.attention import Attention, PositionBiasAttention
from nar_speech.layers.conv import ConvolutionModule
from nar_speech.layers.intermediate import Tap
from nar_speech.layers.position import interleaved_sinusoid, valid_mask
from nar_speech.layers.subsampling import build_input_layer

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
        if 0 < chunk_size < frames:
            mask = mask & chunk_mask(frames, chunk_size, left_chunks, x.device)
        for number, layer in enumerate(self.encoders, start=1):
            x = layer(x, mask, positions, valid, official_padding)
            if tap is not None and number in tap.layers:
                x = tap.function(x, self._finish(x))
        return self._finish(x).masked_fill(~valid.unsqueeze(2), 0.0), lengths

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


def chunk_mask(frames: int, chunk_size: int, left_chunks: int, device: torch.device) -> torch.Tensor:
    """(T, T) bool: frame i (row) sees its own chunk and ``left_chunks`` before it (negative: all)."""
    chunk = torch.arange(frames, device=device) // chunk_size
    back = chunk.unsqueeze(1) - chunk.unsqueeze(0)
    mask = back >= 0
    return mask if left_chunks < 0 else mask & (back <= left_chunks)
