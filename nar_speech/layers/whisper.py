"""Whisper's audio encoder (Radford et al. 2022, arXiv 2212.04356, section 2.2) for clips of any length.

Two things differ from the published use, and neither changes a 30 s window: the position table is cut to the
clip (the clip is not padded to the table), and a clip in a padded batch gets the result it has alone.
Parameter names are those of the openai/whisper encoder.

A model that serves two readers may have a branch: blocks of its own, at a lower rate, on top of the official
ones (the trunk). CTC and CIF read the branch, Whisper's text decoder reads the trunk it was trained on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.config import MAX_BLOCKS, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.dot_product import dot_product_attention
from nar_speech.layers.intermediate import Tap
from nar_speech.layers.packed import WindowProduct, keep_float, linear_gelu, merge_linears
from nar_speech.layers.sanm import make_keys, merge_heads, split_heads


@dataclass(frozen=True)
class WhisperEncoderConfig:
    """Numbers of a Whisper encoder; the defaults are those of Whisper tiny.

    Attributes:
        output_size: D, even.
        attention_heads: must divide D.
        linear_units: inner width of the feed-forward part.
        num_blocks: number of Transformer blocks.
        max_positions: longest output in frames of 20 ms; 1500 (30 s) is what the official weights know.
        dropout: in training, on the output of every attention and feed-forward part.
        attention_dropout: in training, on the attention weights.
        layer_drop: in training, the chance that an utterance skips a block (LayerDrop, arXiv 1909.11556).
        branch_blocks: blocks on top of the trunk; 0: no branch.
        branch_stride: trunk frames that are merged into one frame of the branch.
    """

    output_size: int = 384
    attention_heads: int = 6
    linear_units: int = 1536
    num_blocks: int = 4
    max_positions: int = 1500
    dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_drop: float = 0.0
    branch_blocks: int = 0
    branch_stride: int = 1

    def __post_init__(self):
        check_range(self, 1, MAX_WIDTH, "output_size", "attention_heads", "linear_units", "max_positions")
        check_range(self, 1, MAX_BLOCKS, "num_blocks")
        check_range(self, 0, MAX_BLOCKS, "branch_blocks")
        if self.attention_heads < 1 or self.output_size % self.attention_heads:
            raise ConfigError(
                f"attention_heads: {self.attention_heads} does not divide the output_size {self.output_size}"
            )
        if self.output_size < 4 or self.output_size % 2:
            raise ConfigError(f"output_size: must be even and at least 4, got {self.output_size}")
        for name in ("dropout", "attention_dropout", "layer_drop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}: must be at least 0 and below 1, got {getattr(self, name)}")
        if self.branch_stride < 1 or (self.branch_stride > 1 and not self.branch_blocks):
            raise ConfigError(
                f"branch_stride: got {self.branch_stride}; at least 1, above 1 only with branch_blocks"
            )


class WhisperAttention(nn.Module):
    """Multi-head self-attention; a bias of the keys would change nothing, so there is none."""

    def __init__(self, size: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size)
        self.out = nn.Linear(size, size)
        self.merged: nn.Module | None = None
        self.coarse = False  # see dot_product_attention

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); ``keys`` (B, 1, 1, T) bool is true where attention may look, None: all."""
        context = dot_product_attention(
            *(split_heads(part, self.heads) for part in self.project(x)),
            mask=keys,
            dropout=self.dropout if self.training else 0.0,
            coarse=self.coarse,
        )
        return self.out(merge_heads(context))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., D) of (..., D)."""
        if self.merged is None:
            return self.query(x), self.key(x), self.value(x)
        return self.merged(x).chunk(3, dim=-1)

    def merge_projections(self) -> None:
        """Make one product of the three projections of the input, for inference."""
        if self.merged is None:
            self.merged = merge_linears([self.query, self.key, self.value])
            del self.query, self.key, self.value


class WhisperBlock(nn.Module):
    """Pre-norm Transformer block: attention, then Linear, GELU, Linear, each with a residual."""

    def __init__(self, config: WhisperEncoderConfig):
        super().__init__()
        size = config.output_size
        self.dropout = config.dropout
        self.attn = WhisperAttention(size, config.attention_heads, config.attention_dropout)
        self.attn_ln = nn.LayerNorm(size)
        self.mlp = nn.Sequential(
            nn.Linear(size, config.linear_units), nn.GELU(), nn.Linear(config.linear_units, size)
        )
        self.mlp_ln = nn.LayerNorm(size)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + F.dropout(self.attn(self.attn_ln(x), keys), self.dropout, self.training)
        inner = self.mlp[2](linear_gelu(self.mlp[0], self.mlp_ln(x)))
        return x + F.dropout(inner, self.dropout, self.training)


class WhisperBranch(nn.Module):
    """Merges frames and runs a few more blocks, so that CTC and CIF need not bend the trunk to their ends."""

    def __init__(self, config: WhisperEncoderConfig):
        super().__init__()
        size, self.stride = config.output_size, config.branch_stride
        self.merge = nn.Linear(self.stride * size, size)
        self.blocks = nn.ModuleList(WhisperBlock(config) for _ in range(config.branch_blocks))
        self.ln_post = nn.LayerNorm(size)
        # It starts as the mean of the merged frames: a head that knows the trunk knows the branch too.
        with torch.no_grad():
            self.merge.weight.copy_(torch.eye(size).repeat(1, self.stride) / self.stride)
            self.merge.bias.zero_()
            for block in self.blocks:
                for last in (block.attn.out, block.mlp[2]):
                    last.weight.zero_()
                    last.bias.zero_()

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D), zero beyond the lengths (B,) -> (B, ceil(T / stride), D) and its lengths."""
        batch, frames, _ = x.shape
        rest = -frames % self.stride
        x = self.merge(F.pad(x, (0, 0, 0, rest)).reshape(batch, (frames + rest) // self.stride, -1))
        lengths = (lengths + self.stride - 1) // self.stride
        keys = make_keys(lengths, x.shape[1])
        for block in self.blocks:
            x = block(x, keys)
        x = self.ln_post(x)
        return (x if keys is None else x * keys[:, 0, 0, :, None]), lengths


class WhisperEncoder(nn.Module):
    """Two convolutions (the second halves the rate), fixed sinusoidal positions, blocks, LayerNorm."""

    def __init__(self, input_size: int = 80, config: WhisperEncoderConfig | None = None):
        """``input_size``: mel channels F (80 in every official size up to large-v2)."""
        super().__init__()
        config = config or WhisperEncoderConfig()
        self.config = config
        self.input_size = input_size
        self.output_size = config.output_size
        self.frame_stride = 2 * config.branch_stride
        self.conv1 = nn.Conv1d(input_size, config.output_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.output_size, config.output_size, kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(WhisperBlock(config) for _ in range(config.num_blocks))
        self.ln_post = nn.LayerNorm(config.output_size)
        table = whisper_positions(config.max_positions, config.output_size)
        self.register_buffer("positional_embedding", table, persistent=False)
        if config.branch_blocks:
            self.branch = WhisperBranch(config)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Output frames of ``lengths`` (B,) input frames: half, rounded up, less what the branch merges."""
        stride = self.config.branch_stride
        return ((lengths + 1) // 2 + stride - 1) // stride

    def forward(self, x: Tensor, lengths: Tensor, tap: Tap | None = None) -> tuple[Tensor, Tensor]:
        """Encode log-mel features: the trunk and, where there is one, the branch.

        Args:
            x: (B, T, F), 10 ms a frame; what lies beyond a clip's length does not matter.
            lengths: (B,) int64, frames of each clip.
            tap: called after some blocks of the trunk, for intermediate predictions.

        Returns:
            (B, T', D) with T' = ceil(T / 2), ceil(T' / branch_stride) with a branch, zero beyond the end,
            and the new lengths (B,).

        Raises:
            InputError: more frames than the position table holds.
        """
        return self.finish(*self.trunk(x, lengths, tap))

    def finish(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """From the output of :meth:`trunk` to that of :meth:`forward`."""
        return self.branch(x, lengths) if self.config.branch_blocks else (x, lengths)

    def trunk(self, x: Tensor, lengths: Tensor, tap: Tap | None = None) -> tuple[Tensor, Tensor]:
        """The official encoder: (B, T, F) -> (B, ceil(T / 2), D), zero beyond a clip's end, and lengths (B,).

        Raises:
            InputError: more frames than the position table holds.
        """
        frames = (x.shape[1] + 1) // 2
        if frames > self.config.max_positions:
            raise InputError(
                f"input of {x.shape[1]} frames is longer than the {2 * self.config.max_positions} frames "
                f"(max_positions {self.config.max_positions} times 2) of this Whisper encoder; "
                "cut the audio into shorter segments"
            )
        lengths_in, lengths = lengths, (lengths + 1) // 2
        x = self._subsample(x, lengths_in)
        keys = make_keys(lengths, frames)
        x = x + self.positional_embedding[:frames].to(x.dtype)
        for number, block in enumerate(self.blocks, start=1):
            x = self._drop(x, block(x, keys))
            if tap is not None and number in tap.layers:
                x = tap.function(x, self.ln_post(x))
        x = self.ln_post(x)
        return (x if keys is None else x * keys[:, 0, 0, :, None]), lengths

    def _subsample(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, F) -> (B, ceil(T / 2), D). Padding is zero before each convolution."""
        keys = make_keys(lengths, x.shape[1])
        padded = None if keys is None else ~keys[:, 0, 0, :, None]
        x = self._convolve(self.conv1, x if padded is None else x.masked_fill(padded, 0.0))
        x = self._convolve(self.conv2, x if padded is None else x.masked_fill(padded, 0.0))
        return x.contiguous()  # rows of channels, which is what the norms and products of the blocks read

    @staticmethod
    def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
        """GELU of a convolution over time of (B, T, C)."""
        if isinstance(conv, WindowProduct):
            return conv(x, linear_gelu)
        return F.gelu(conv(x.transpose(1, 2)).transpose(1, 2))

    def merge_projections(self) -> None:
        """Make products of the convolutions, for inference."""
        if isinstance(self.conv1, nn.Conv1d):
            self.conv1, self.conv2 = WindowProduct(self.conv1), WindowProduct(self.conv2)
            keep_float(self.conv1.linear)  # few products, and everything depends on them

    def _drop(self, before: Tensor, after: Tensor) -> Tensor:
        """LayerDrop, drawn per utterance: every parameter keeps a gradient, as DDP wants."""
        if not self.training or self.config.layer_drop == 0.0:
            return after
        skip = torch.rand(before.shape[0], 1, 1, device=before.device) < self.config.layer_drop
        return torch.where(skip, before, after)


def whisper_positions(length: int, size: int) -> Tensor:
    """(length, size) float32 position table: all sines, then all cosines, positions from 0.

    Rates run geometrically from 1 to 1/10000 over ``size / 2`` channels. Values are rounded to float16 as in
    the official checkpoints; unrounded ones move Whisper tiny's output by up to 0.03.
    """
    step = math.log(10000.0) / (size // 2 - 1)
    rates = torch.exp(-step * torch.arange(size // 2, dtype=torch.float64))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).half().float()
