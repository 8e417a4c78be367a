"""NeMo's FastConformer encoder, offline and cache-aware, with its configuration keys and parameter names.

Fast Conformer: Rekesh et al. 2023. Chunk-aware look-ahead and caches: Noroozi et al. 2023, "Stateful
Conformer with Cache-based Inference for Streaming ASR".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.config import MAX_BLOCKS, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError
from nar_speech.layers.chunks import Chunking, chunk_mask, forget, last, row_flags, state_zeros, step_mask
from nar_speech.layers.conv import as_linear, depthwise, pointwise
from nar_speech.layers.intermediate import Tap
from nar_speech.layers.position import valid_mask
from nar_speech.layers.relative import RelativeAttention, distance_codes
from nar_speech.layers.strided import StridedSubsampling


@dataclass(frozen=True)
class FastConformerConfig:
    """Numbers of an encoder; names and meaning are those of NeMo's ``ConformerEncoder``.

    Attributes:
        subsampling_conv_channels: -1: ``d_model``.
        att_context_size: output frames (left, right) that attention sees, -1 for all. Several pairs: one is
            drawn per batch in training, by ``att_context_probs`` (default: all alike); the first one is used
            elsewhere.
        att_context_style: ``regular``: so many frames before and after each. ``chunked_limited``: chunks of
            right + 1 frames that see themselves and left frames before them.
        conv_context_size: ``causal``, or None for a centred convolution.
        untie_biases: whether every layer has its own position biases.
        dropout_pre_encoder, dropout_emb, dropout_att: after the input layer, on position codes, on weights.
    """

    n_layers: int = 17
    d_model: int = 512
    subsampling: Literal["dw_striding", "striding"] = "dw_striding"
    subsampling_factor: int = 8
    subsampling_conv_channels: int = 256
    causal_downsampling: bool = False
    ff_expansion_factor: int = 4
    n_heads: int = 8
    att_context_size: tuple[tuple[int, int], ...] = ((-1, -1),)
    att_context_style: Literal["regular", "chunked_limited"] = "regular"
    att_context_probs: tuple[float, ...] = ()
    xscaling: bool = True
    untie_biases: bool = True
    conv_kernel_size: int = 9
    conv_norm_type: Literal["batch_norm", "layer_norm"] = "batch_norm"
    conv_context_size: Literal["causal"] | None = None
    use_bias: bool = True
    dropout: float = 0.1
    dropout_pre_encoder: float = 0.1
    dropout_emb: float = 0.0
    dropout_att: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_BLOCKS, "n_layers")
        check_range(self, 1, MAX_WIDTH, "d_model", "ff_expansion_factor", "n_heads", "conv_kernel_size")
        check_range(self, 2, 64, "subsampling_factor")
        check_range(self, -1, MAX_WIDTH, "subsampling_conv_channels")
        check_range(self, 0, 1, "dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att")
        if self.subsampling_conv_channels == 0:
            raise ConfigError("subsampling_conv_channels: got 0; give a number, or -1 for d_model")
        if self.conv_kernel_size % 2 == 0:
            raise ConfigError(f"conv_kernel_size: {self.conv_kernel_size} is even; it must be odd")
        if not self.att_context_size:
            raise ConfigError("att_context_size: name one pair (left, right) at least")
        for context in self.att_context_size:
            check_context(context, self.att_context_style)
        probs = self.att_context_probs
        if probs and (len(probs) != len(self.att_context_size) or min(probs) < 0 or sum(probs) <= 0):
            raise ConfigError("att_context_probs: give a number of 0 or more for each att_context_size")

    @property
    def num_blocks(self) -> int:
        """``n_layers``, by the name other encoders have."""
        return self.n_layers


def check_context(context: tuple[int, int], style: str) -> None:
    """Refuse a pair (left, right) that has no meaning.

    Raises:
        ConfigError: a number below -1, or a chunked left context that is not a number of whole chunks.
    """
    left, right = context
    if min(left, right) < -1:
        raise ConfigError(f"att_context_size: got {list(context)}; -1 means all, less means nothing")
    if style == "chunked_limited" and left > 0 and right >= 0 and left % (right + 1):
        raise ConfigError(
            f"att_context_size: {list(context)}: the first must be a multiple of {right + 1}, the second + 1"
        )


@dataclass(frozen=True)
class FastConformerState:
    """What a stream carries from one step to the next; see :meth:`FastConformerEncoder.step`.

    Attributes:
        frames: (B, 2 f - 2, F) the last features, left aligned, f the subsampling factor.
        num_frames: (B,) int64, how many of them there are; a new stream has all of them, zeros.
        offset: (B,) int64, output frames so far.
        count: (B,) int64, valid entries of the attention caches, at their right.
        attention: for each layer (B, L, 2 D) keys and values.
        convolution: for each layer (B, kernel - 1, D) the last inputs of its depthwise convolution.
    """

    frames: Tensor
    num_frames: Tensor
    offset: Tensor
    count: Tensor
    attention: tuple[Tensor, ...]
    convolution: tuple[Tensor, ...]


class FeedForward(nn.Module):
    """Linear, SiLU, dropout, linear."""

    def __init__(self, width: int, units: int, dropout: float, bias: bool):
        super().__init__()
        self.linear1 = nn.Linear(width, units, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(units, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.linear2(self.dropout(F.silu(self.linear1(x))))


class ConvolutionModule(nn.Module):
    """Pointwise convolution with GLU, depthwise convolution, norm, SiLU, pointwise convolution.

    ``batch_norm`` is a LayerNorm where ``norm`` says so: the name is NeMo's.
    """

    def __init__(self, width: int, kernel: int, norm: str, causal: bool, bias: bool):
        super().__init__()
        self.left = kernel - 1 if causal else (kernel - 1) // 2
        self.right = kernel - 1 - self.left
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, groups=width, bias=bias)
        self.batch_norm = nn.LayerNorm(width) if norm == "layer_norm" else nn.BatchNorm1d(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=bias)

    def merge_projections(self) -> None:
        """Turn the pointwise convolutions into Linear layers, which can be packed; for inference."""
        self.pointwise_conv1 = as_linear(self.pointwise_conv1)
        self.pointwise_conv2 = as_linear(self.pointwise_conv2)

    def gate(self, x: Tensor, valid: Tensor) -> Tensor:
        """Input of the depthwise convolution (B, T, D), zero where not ``valid`` (B, T)."""
        return F.glu(pointwise(self.pointwise_conv1, x), -1).masked_fill(~valid.unsqueeze(2), 0.0)

    def mix(self, x: Tensor) -> Tensor:
        """From :meth:`gate` with its neighbours (B, T + kernel - 1, D) to the result (B, T, D)."""
        x = depthwise(self.depthwise_conv, x)
        if isinstance(self.batch_norm, nn.LayerNorm):
            x = self.batch_norm(x)
        else:
            x = self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
        return pointwise(self.pointwise_conv2, F.silu(x))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D); frames that are not ``valid`` (B, T) count as silence."""
        return self.mix(F.pad(self.gate(x, valid), (0, 0, self.left, self.right)))

    def step(self, x: Tensor, valid: Tensor, cache: Tensor, num_new: Tensor) -> tuple[Tensor, Tensor]:
        """The next frames ``x`` (B, U, D) of streams; ``cache`` (B, kernel - 1, D) of :meth:`gate` before."""
        window = torch.cat([cache, self.gate(x, valid)], dim=1)
        return self.mix(window), last(window, num_new, x.shape[1], cache.shape[1])


class FastConformerLayer(nn.Module):
    """Half feed forward, attention, convolution, half feed forward, each with a norm before; a last norm."""

    def __init__(
        self, config: FastConformerConfig, position_biases: tuple[nn.Parameter, nn.Parameter] | None = None
    ):
        super().__init__()
        c, width = config, config.d_model
        units = width * c.ff_expansion_factor
        self.norm_feed_forward1 = nn.LayerNorm(width)
        self.feed_forward1 = FeedForward(width, units, c.dropout, c.use_bias)
        self.norm_conv = nn.LayerNorm(width)
        self.conv = ConvolutionModule(
            width, c.conv_kernel_size, c.conv_norm_type, c.conv_context_size == "causal", c.use_bias
        )
        self.norm_self_att = nn.LayerNorm(width)
        self.self_attn = RelativeAttention(c.n_heads, width, c.dropout_att, c.use_bias, position_biases)
        self.norm_feed_forward2 = nn.LayerNorm(width)
        self.feed_forward2 = FeedForward(width, units, c.dropout, c.use_bias)
        self.dropout = nn.Dropout(c.dropout)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D).

        Args:
            mask: (B, T, T) bool, where attention may look.
            codes: (1, 2 T - 1, D) of the distances.
            valid: (B, T) bool, frames that are not padding.
        """
        x = x + 0.5 * self.dropout(self.feed_forward1(self.norm_feed_forward1(x)))
        x = x + self.dropout(self.self_attn(self.norm_self_att(x), mask, codes))
        x = x + self.dropout(self.conv(self.norm_conv(x), valid))
        return self._end(x)

    def step(
        self,
        x: Tensor,
        mask: Tensor,
        valid: Tensor,
        count: Tensor,
        attention: Tensor,
        convolution: Tensor,
        grow: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next frames ``x`` (B, U, D) of streams, ``count`` (B,) of them ``valid`` (B, U).

        Returns:
            (B, U, D) and the layer's next two caches.
        """
        x = x + 0.5 * self.feed_forward1(self.norm_feed_forward1(x))
        y, attention = self.self_attn.step(self.norm_self_att(x), attention, count, mask, grow)
        x = x + y
        y, convolution = self.conv.step(self.norm_conv(x), valid, convolution, count)
        return self._end(x + y), attention, convolution

    def _end(self, x: Tensor) -> Tensor:
        return self.norm_out(x + 0.5 * self.dropout(self.feed_forward2(self.norm_feed_forward2(x))))


class FastConformerEncoder(nn.Module):
    """Strided subsampling and conformer layers with relative positions.

    Attributes:
        output_size: width D of the result.
        frame_stride: input frames per output frame.
    """

    def __init__(self, input_size: int, config: FastConformerConfig | None = None):
        super().__init__()
        config = c = config or FastConformerConfig()
        self.config, self.input_size, self.output_size = config, input_size, config.d_model
        channels = c.d_model if c.subsampling_conv_channels < 0 else c.subsampling_conv_channels
        self.pre_encode = StridedSubsampling(
            input_size, c.d_model, channels, c.subsampling_factor, c.subsampling, c.causal_downsampling
        )
        self.frame_stride = c.subsampling_factor
        biases = None
        if not c.untie_biases:
            shape = c.n_heads, c.d_model // c.n_heads
            biases = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.layers = nn.ModuleList(FastConformerLayer(c, biases) for _ in range(c.n_layers))

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Output frames (B,) of inputs with ``lengths`` (B,) frames."""
        return self.pre_encode.output_lengths(lengths)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor,
        context: tuple[int, int] | None = None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode features.

        Args:
            x: (B, T, F) features.
            lengths: (B,) int64 valid frames.
            context: (left, right) frames that attention sees, in the configured style; None: a drawn pair in
                training, the first one elsewhere.
            tap: called after some layers, for intermediate predictions.

        Returns:
            ((B, T', D) with zeros in padded frames, lengths (B,)).
        """
        x, lengths = self.pre_encode(x, lengths)
        frames = x.shape[1]
        if frames == 0:
            return x, lengths
        x = F.dropout(self._scale(x), self.config.dropout_pre_encoder, self.training)
        codes = F.dropout(distance_codes(frames, frames, x), self.config.dropout_emb, self.training)
        valid = valid_mask(lengths, frames)
        mask = valid.unsqueeze(1) & self._context_mask(frames, context or self._draw(), x.device)
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, mask, codes, valid)
            if tap is not None and number in tap.layers:
                x = tap.function(x, x)
        return x.masked_fill(~valid.unsqueeze(2), 0.0), lengths

    def _scale(self, x: Tensor) -> Tensor:
        return x * math.sqrt(self.output_size) if self.config.xscaling else x

    def _draw(self) -> tuple[int, int]:
        """The context of a forward pass."""
        contexts, probs = self.config.att_context_size, self.config.att_context_probs
        if not self.training or len(contexts) == 1:
            return contexts[0]
        return contexts[int(torch.multinomial(torch.tensor(probs or [1.0] * len(contexts)), 1))]

    def _context_mask(self, frames: int, context: tuple[int, int], device: torch.device) -> Tensor:
        """(T, T) bool: which frames (columns) each frame (row) sees."""
        check_context(context, self.config.att_context_style)
        left, right = context
        if self.config.att_context_style == "chunked_limited" and right >= 0:
            return chunk_mask(frames, right + 1, left if left < 0 else left // (right + 1), device)
        index = torch.arange(frames, device=device)
        back = index.unsqueeze(1) - index
        mask = torch.ones_like(back, dtype=torch.bool)
        if left >= 0:
            mask &= back <= left
        return mask & (back >= -right) if right >= 0 else mask

    def chunking(self, chunk_size: int | None = None, left: int | None = None, chunks: int = 1) -> Chunking:
        """How to feed streams.

        Args:
            chunk_size: output frames of a chunk, the right context + 1; default: that of the first context.
            left: frames before a chunk that it sees, -1 for all; default: that of the configured context with
                this chunk size, else of the first one.
            chunks: how many chunks a step computes; :meth:`step` has to be told the chunk size if not 1.

        Raises:
            ConfigError: an encoder that looks ahead in other ways, or sizes that don't go together.
        """
        c = self.config
        if not c.causal_downsampling or c.conv_context_size != "causal":
            raise ConfigError(
                "causal_downsampling, conv_context_size: only an encoder with both causal can take a stream"
            )
        default = c.att_context_size[0]
        chunk_size = default[1] + 1 if chunk_size is None else chunk_size
        if chunk_size < 1 or chunks < 1:
            raise ConfigError(f"chunk_size: got {chunk_size}, chunks: {chunks}; both must be 1 or more")
        if c.att_context_style == "regular" and chunk_size != 1:
            raise ConfigError(
                "att_context_style: 'regular' takes streams only without look-ahead; use chunk_size 1"
            )
        if left is None:
            left = next((pair[0] for pair in c.att_context_size if pair[1] + 1 == chunk_size), default[0])
        if c.att_context_style == "chunked_limited" and left > 0 and left % chunk_size:
            raise ConfigError(f"left: got {left}; must be a multiple of the chunk size, {chunk_size}")
        check_context((left, chunk_size - 1), c.att_context_style)
        frames = chunk_size * chunks
        return Chunking(1 + self.frame_stride * (frames - 1), self.frame_stride * frames, frames, left)

    def stream_mask(self, chunking: Chunking) -> dict[str, tuple[int, int]]:
        """Arguments with which :meth:`forward` gives what a stream fed so, one chunk a step, gets."""
        return {"context": (chunking.left, chunking.frames - 1)}

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunking: Chunking | None = None,
    ) -> FastConformerState:
        """The state of ``batch`` streams that have not begun; device and dtype are by default the weights'.

        Raises:
            ConfigError: as :meth:`chunking`.
        """
        chunking = chunking or self.chunking()
        zeros, dtype = state_zeros(batch, self.layers[0].norm_out.weight, device, dtype)
        past = self.pre_encode.past
        return FastConformerState(
            frames=zeros(past, self.input_size, dtype=dtype),
            num_frames=zeros() + past,
            offset=zeros(),
            count=zeros(),
            attention=tuple(
                zeros(chunking.cached, layer.self_attn.cache_width, dtype=dtype) for layer in self.layers
            ),
            convolution=tuple(zeros(layer.conv.left, self.output_size, dtype=dtype) for layer in self.layers),
        )

    def step(
        self,
        x: Tensor,
        lengths: Tensor,
        state: FastConformerState,
        final: bool | Tensor = False,
        chunk_size: int | None = None,
        grow: bool = False,
        official_start: bool = False,
        tap: Tap | None = None,
    ) -> tuple[Tensor, Tensor, FastConformerState]:
        """Encode the next chunks of every stream.

        Fed as :meth:`chunking` says, a stream gets what :meth:`forward` gives under the mask of its context.
        Rows are independent and may be at any place of their stream; shapes depend on those of the arguments
        only.

        Args:
            x: (B, C, F) features with room for ``C // frame_stride`` output frames.
            lengths: (B,) int64 new frames of each row: ``first`` in its first step, ``later`` in others, 0 to
                as many where ``final``; 0 leaves a row that is not final as it is.
            state: from :meth:`init_state` or the step before.
            final: whether the stream ends here, one flag or (B,) bool; its state is then that of a new one.
            chunk_size: output frames of a chunk where a step holds several; None: a step is one chunk.
            grow: for an unlimited look-back: keep every frame. The caches get longer at each step, so this
                is for single streams and not for captured graphs.
            official_start: repeat a defect of NeMo, see :meth:`StridedSubsampling.step`.
            tap: as in :meth:`forward`.

        Returns:
            ((B, U, D) with zeros beyond the lengths, lengths (B,), the next state).
        """
        final = row_flags(final, len(x), x.device)
        s = state
        x, count, left, num_left = self.pre_encode.step(
            x, lengths, s.frames, s.num_frames, s.offset, final, official_start
        )
        frames, cached = x.shape[1], s.attention[0].shape[1]
        x = self._scale(x)
        valid = valid_mask(count, frames)
        old = torch.arange(cached, device=x.device) >= cached - s.count.unsqueeze(1)
        mask = torch.cat([old, valid], dim=1).unsqueeze(1)
        if chunk_size is not None and chunk_size < frames:
            mask = mask & step_mask(cached, frames, chunk_size, x.device)
        attention, convolution = [], []
        for number, layer in enumerate(self.layers, start=1):
            caches = s.attention[number - 1], s.convolution[number - 1]
            x, keys, inputs = layer.step(x, mask, valid, count, *caches, grow)
            attention.append(keys)
            convolution.append(inputs)
            if tap is not None and number in tap.layers:
                x = tap.function(x, x)
        seen = (s.count + count).clamp(max=attention[0].shape[1])
        left, offset, seen = forget(final, left, s.offset + count, seen)
        num_left = torch.where(final, self.pre_encode.past, num_left)
        kept = forget(final, *attention), forget(final, *convolution)
        x = x.masked_fill(~valid.unsqueeze(2), 0.0)
        return x, count, FastConformerState(left, num_left, offset, seen, *kept)
