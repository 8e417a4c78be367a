"""Whisper's audio encoder (Radford et al. 2022, arXiv 2212.04356, section 2.2) for clips of any length.

Two things differ from the published use, and neither changes a 30 s window: the position table is cut to the
clip (the clip is not padded to the table), and a clip in a padded batch gets the result it has alone.
Parameter names are those of the openai/whisper encoder.

A model that serves two readers may have a branch: blocks of its own, at a lower rate, on top of the official
ones (the trunk). CTC and CIF read the branch, Whisper's text decoder reads the trunk it was trained on.

With a ``chunk_size`` the encoder takes streams: a frame sees its own chunk and some frames before it.
Positions run in a circle then and training begins at any of them, so that a stream has no end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.config import MAX_BLOCKS, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.chunks import Chunking, chunk_mask, drop, forget, join, last, row_flags, state_zeros
from nar_speech.layers.dot_product import dot_product_attention
from nar_speech.layers.intermediate import Tap
from nar_speech.layers.packed import WindowProduct, keep_float, linear_gelu, merge_linears
from nar_speech.layers.sanm import make_keys, merge_heads, split_heads

LEFT_FRAMES = 2  # features before a chunk that its convolutions see; they see one after it, too


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
        chunk_size: output frames of a chunk of an encoder for streams; 0: every frame sees the whole clip.
        left: output frames before a chunk that it sees, whole chunks.
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
    chunk_size: int = 0
    left: int = 0

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
        check_range(self, 0, MAX_WIDTH, "chunk_size", "left")
        if self.left % (self.chunk_size or self.left + 1):
            raise ConfigError(
                f"left: got {self.left} frames; must be whole chunks of chunk_size {self.chunk_size} frames"
            )


@dataclass(frozen=True)
class WhisperState:
    """What a stream carries from one step to the next; see :meth:`WhisperEncoder.step`.

    Attributes:
        frames: (B, 3, F) features that the next step needs again, left aligned.
        num_frames: (B,) int64, how many of them there are: two zero ones in front of a new stream.
        position: (B,) int64, of the next frame of the trunk in the table of positions.
        begun: (B,) bool, whether there were frames before ``frames``.
        count: (B,) int64, output frames in the caches, at their right; those of the trunk hold
            ``branch_stride`` times as many.
        trunk, branch: for each block (B, L, 2 D) keys and values of the frames before.
    """

    frames: Tensor
    num_frames: Tensor
    position: Tensor
    begun: Tensor
    count: Tensor
    trunk: tuple[Tensor, ...]
    branch: tuple[Tensor, ...]


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
        """(B, T, D) -> (B, T, D).

        ``keys``: (B, 1, 1, T) or (B, 1, T, T) bool, true where attention may look; None: everywhere.
        """
        return self._attend(*self.project(x), keys)

    def step(self, x: Tensor, cache: Tensor, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, U, D) of a chunk, ``counts`` (B,) of them valid, and the next cache.

        Args:
            cache: (B, L, 2 D) keys and values of the frames before, the newest at the right.
            keys: (B, 1, 1, L + U) bool.
        """
        query, *pair = self.project(x)
        window = torch.cat([cache, torch.cat(pair, dim=-1)], dim=1)
        out = self._attend(query, *window.chunk(2, dim=-1), keys)
        return out, last(window, counts, x.shape[1], cache.shape[1])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        context = dot_product_attention(
            *(split_heads(part, self.heads) for part in (query, key, value)),
            mask=mask,
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
        return self._feed_forward(
            x + F.dropout(self.attn(self.attn_ln(x), keys), self.dropout, self.training)
        )

    def step(self, x: Tensor, cache: Tensor, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`WhisperAttention.step`."""
        out, cache = self.attn.step(self.attn_ln(x), cache, keys, counts)
        return self._feed_forward(x + out), cache

    def _feed_forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor, lengths: Tensor, chunks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, D), zero beyond the lengths (B,) -> (B, ceil(T / stride), D) and its lengths.

        ``chunks``: (T', T') bool, what every frame may see; None: everything.
        """
        x = self.join(x)
        lengths = (lengths + self.stride - 1) // self.stride
        keys = make_keys(lengths, x.shape[1])
        mask = both(keys, chunks)
        for block in self.blocks:
            x = block(x, mask)
        x = self.ln_post(x)
        return (x if keys is None else x * keys[:, 0, 0, :, None]), lengths

    def join(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, ceil(T / stride), D)."""
        batch, frames, _ = x.shape
        rest = -frames % self.stride
        return self.merge(F.pad(x, (0, 0, 0, rest)).reshape(batch, (frames + rest) // self.stride, -1))


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
        """Output frames of ``lengths`` (B,) input frames: half, rounded up, less what the branch merges.

        An encoder for streams drops an output frame that isn't whole.
        """
        stride = self.config.branch_stride
        if self.config.chunk_size:
            return lengths // (2 * stride)
        return ((lengths + 1) // 2 + stride - 1) // stride

    def forward(
        self, x: Tensor, lengths: Tensor, tap: Tap | None = None, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode log-mel features: the trunk and, where there is one, the branch.

        Args:
            x: (B, T, F), 10 ms a frame; what lies beyond a clip's length does not matter.
            lengths: (B,) int64, frames of each clip.
            tap: called after some blocks of the trunk, for intermediate predictions.
            offset: see :meth:`trunk`.

        Returns:
            (B, T', D) with T' = ceil(T / 2), ceil(T' / branch_stride) with a branch, zero beyond the end,
            and the new lengths (B,).

        Raises:
            InputError: more frames than the position table holds.
        """
        return self.finish(*self.trunk(x, lengths, tap, offset))

    def finish(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """From the output of :meth:`trunk` to that of :meth:`forward`."""
        if not self.config.branch_blocks or x.shape[1] == 0:
            return x, lengths // self.config.branch_stride
        return self.branch(x, lengths, self._chunks(x.shape[1] // self.config.branch_stride, 1, x.device))

    def trunk(
        self, x: Tensor, lengths: Tensor, tap: Tap | None = None, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The official encoder: (B, T, F) -> (B, ceil(T / 2), D), zero beyond a clip's end, and lengths (B,).

        An encoder for streams takes clips of any length and drops frames of the end that make no whole output
        frame. ``offset`` (B,) int64: its position of each clip's first frame; None: 0, in training any.

        Raises:
            InputError: more frames than the position table holds.
        """
        chunked, stride = self.config.chunk_size > 0, self.config.branch_stride
        frames = x.shape[1] // (2 * stride) * stride if chunked else (x.shape[1] + 1) // 2
        if frames > self.config.max_positions and not chunked:
            raise InputError(
                f"input of {x.shape[1]} frames is longer than the {2 * self.config.max_positions} frames "
                f"(max_positions {self.config.max_positions} times 2) of this Whisper encoder; "
                "cut the audio into shorter segments"
            )
        whole = self.output_lengths(lengths) * stride if chunked else (lengths + 1) // 2
        if frames == 0:
            return x.new_zeros(len(x), 0, self.config.output_size), whole
        x, lengths = self._subsample(x, lengths)[:, :frames], whole
        keys = make_keys(lengths, frames)
        mask = both(keys, self._chunks(frames, stride, x.device))
        x = x + self._positions(x, offset)
        for number, block in enumerate(self.blocks, start=1):
            x = self._drop(x, block(x, mask))
            if tap is not None and number in tap.layers:
                x = tap.function(x, self.ln_post(x))
        x = self.ln_post(x)
        return (x if keys is None else x * keys[:, 0, 0, :, None]), lengths

    def _positions(self, x: Tensor, offset: Tensor | None) -> Tensor:
        """(T, D) or (B, T, D) codes of the frames of ``x`` (B, T, D)."""
        batch, frames, _ = x.shape
        if not self.config.chunk_size:
            return self.positional_embedding[:frames].to(x.dtype)
        if offset is None:
            most = self.config.max_positions if self.training else 1
            offset = torch.randint(most, (batch,), device=x.device)
        index = offset[:, None] + torch.arange(frames, device=x.device)
        return self.positional_embedding[index % self.config.max_positions].to(x.dtype)

    def _chunks(self, frames: int, scale: int, device: torch.device) -> Tensor | None:
        """(T, T) bool, what each of so many frames sees, ``scale`` of them an output frame; None: all."""
        size = self.config.chunk_size * scale
        if not size or frames <= size:
            return None
        return chunk_mask(frames, size, self.config.left // self.config.chunk_size, device)

    def chunking(self, chunk_size: int | None = None, left: int | None = None) -> Chunking:
        """How to feed streams: in chunks of the configured size, and with one feature frame more at first.

        Raises:
            ConfigError: an encoder for whole clips, or other sizes than the configured ones.
        """
        config = self.config
        if not config.chunk_size:
            raise ConfigError("chunk_size: 0; only a Whisper encoder trained in chunks takes streams")
        if (chunk_size or config.chunk_size) != config.chunk_size or left not in (None, config.left):
            raise ConfigError(
                f"chunk_size, left: this encoder knows one chunk size, {config.chunk_size} frames that see"
                f" {config.left} before them; leave both out"
            )
        later = config.chunk_size * self.frame_stride
        return Chunking(later + 1, later, config.chunk_size, config.left)

    def stream_mask(self, chunking: Chunking) -> dict[str, int]:
        """Arguments with which :meth:`forward` gives what a stream fed so gets: none."""
        return {}

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunking: Chunking | None = None,
    ) -> WhisperState:
        """The state of ``batch`` streams that have not begun; device and dtype are by default the weights'.

        Raises:
            ConfigError: as :meth:`chunking`.
        """
        left = (chunking or self.chunking()).left
        zeros, dtype = state_zeros(batch, self.ln_post.weight, device, dtype)

        def caches(blocks: int, frames: int) -> tuple[Tensor, ...]:
            return tuple(zeros(frames, 2 * self.output_size, dtype=dtype) for _ in range(blocks))

        return WhisperState(
            frames=zeros(LEFT_FRAMES + 1, self.input_size, dtype=dtype),
            num_frames=zeros() + LEFT_FRAMES,
            position=zeros(),
            begun=zeros(dtype=torch.bool),
            count=zeros(),
            trunk=caches(self.config.num_blocks, left * self.config.branch_stride),
            branch=caches(self.config.branch_blocks, left),
        )

    def step(
        self,
        x: Tensor,
        lengths: Tensor,
        state: WhisperState,
        final: bool | Tensor = False,
        tap: Tap | None = None,
    ) -> tuple[Tensor, Tensor, WhisperState]:
        """Encode the next chunk of every stream.

        Fed as :meth:`chunking` says, a stream gets what :meth:`forward` gives. Rows are independent and may
        be at any place of their stream; shapes depend on those of the arguments only.

        Args:
            x: (B, C, F) features.
            lengths: (B,) int64 new frames of each row: ``first`` in its first step, ``later`` in others, 0 to
                as many where ``final``; 0 leaves a row that is not final as it is.
            state: from :meth:`init_state` or the step before.
            final: whether the stream ends here, one flag or (B,) bool; its state is then that of a new one.
            tap: as in :meth:`forward`.

        Returns:
            ((B, chunk_size, D) with zeros beyond the lengths, lengths (B,), the next state).
        """
        stride, size = self.config.branch_stride, self.config.chunk_size
        final = row_flags(final, len(x), x.device)
        x = x.to(state.frames.dtype)
        room = size * self.frame_stride + LEFT_FRAMES + 1
        window, filled = join(state.frames, state.num_frames, x, lengths, room)
        count = ((filled - LEFT_FRAMES) // self.frame_stride).clamp(min=0, max=size)
        kept, num_kept = drop(window, filled, count * self.frame_stride, LEFT_FRAMES + 1)

        x = self._subsample_window(window, filled, state.begun)
        index = torch.arange(size * stride, device=x.device)
        place = (state.position[:, None] + index) % self.config.max_positions
        x = x + self.positional_embedding[place].to(x.dtype)
        keys = step_keys(state.trunk, state.count * stride, count * stride, size * stride)
        trunk, branch = [], []
        for number, block in enumerate(self.blocks, start=1):
            x, cache = block.step(x, state.trunk[number - 1], keys, count * stride)
            trunk.append(cache)
            if tap is not None and number in tap.layers:
                x = tap.function(x, self.ln_post(x))
        x = self.ln_post(x)
        if self.config.branch_blocks:
            x = self.branch.join(x)
            keys = step_keys(state.branch, state.count, count, size)
            for block, held in zip(self.branch.blocks, state.branch, strict=True):
                x, cache = block.step(x, held, keys, count)
                branch.append(cache)
            x = self.branch.ln_post(x)
        valid = torch.arange(size, device=x.device) < count[:, None]
        position = (state.position + count * stride) % self.config.max_positions
        begun, seen = state.begun | (count > 0), (state.count + count).clamp(max=self.config.left)
        kept, num_kept, position, begun, seen = forget(final, kept, num_kept, position, begun, seen)
        num_kept = torch.where(final, LEFT_FRAMES, num_kept)
        for cache in (*trunk, *branch):  # made in this step, so nobody else has them
            cache.masked_fill_(final[:, None, None], 0.0)
        return (
            x.masked_fill(~valid[..., None], 0.0),
            count,
            WhisperState(kept, num_kept, position, begun, seen, tuple(trunk), tuple(branch)),
        )

    def _subsample(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, F) -> (B, ceil(T / 2), D). Padding is zero before each convolution."""
        keys = make_keys(lengths, x.shape[1])
        padded = None if keys is None else ~keys[:, 0, 0, :, None]
        x = self._convolve(self.conv1, x if padded is None else x.masked_fill(padded, 0.0))
        x = self._convolve(self.conv2, x if padded is None else x.masked_fill(padded, 0.0))
        return x.contiguous()  # rows of channels, which is what the norms and products of the blocks read

    def _subsample_window(self, window: Tensor, filled: Tensor, begun: Tensor) -> Tensor:
        """(B, 2 U + 3, F), ``filled`` (B,) of them there, -> (B, U, D); first two and last are context.

        Outside the stream both convolutions see zeros: the first one's results there are cleared.
        """
        x = self._convolve(self.conv1, window, padded=False)
        index = torch.arange(1, 1 + x.shape[1], device=x.device)  # of the frame in the middle
        inside = (index < filled[:, None]) & ((index >= LEFT_FRAMES) | begun[:, None])
        x = self._convolve(self.conv2, x * inside[..., None], padded=False)
        return x.contiguous()

    @staticmethod
    def _convolve(conv: nn.Module, x: Tensor, padded: bool = True) -> Tensor:
        """GELU of a convolution over time of (B, T, C), with zeros at both ends if ``padded``."""
        if isinstance(conv, WindowProduct):
            return conv(x, linear_gelu, padded)
        padding = conv.padding if padded else 0
        x = F.conv1d(x.transpose(1, 2), conv.weight, conv.bias, conv.stride, padding)
        return F.gelu(x.transpose(1, 2))

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


def both(keys: Tensor | None, chunks: Tensor | None) -> Tensor | None:
    """(B, 1, 1, T) or (B, 1, T, T) bool: what keys and chunk mask (T, T) allow; None is everything.

    A frame always sees itself: one of padding that sees nothing else would be NaN, and so would soon be all.
    """
    if keys is None or chunks is None:
        return keys if chunks is None else chunks[None, None]
    return (keys & chunks) | torch.eye(len(chunks), dtype=torch.bool, device=chunks.device)


def step_keys(caches: tuple[Tensor, ...], cached: Tensor, counts: Tensor, frames: int) -> Tensor:
    """(B, 1, 1, L + U) bool: ``cached`` (B,) newest frames of the caches and ``counts`` (B,) of U new ones.

    A row without any sees its first new one, so that its softmax has a sum.
    """
    index = torch.arange(frames, device=counts.device)
    new = index < counts.clamp(min=1)[:, None]
    size = caches[0].shape[1] if caches else 0
    old = torch.arange(size, device=counts.device) >= size - cached[:, None]
    return torch.cat([old, new], dim=1)[:, None, None, :]


def whisper_positions(length: int, size: int) -> Tensor:
    """(length, size) float32 position table: all sines, then all cosines, positions from 0.

    Rates run geometrically from 1 to 1/10000 over ``size / 2`` channels. Values are rounded to float16 as in
    the official checkpoints; unrounded ones move Whisper tiny's output by up to 0.03.
    """
    step = math.log(10000.0) / (size // 2 - 1)
    rates = torch.exp(-step * torch.arange(size // 2, dtype=torch.float64))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).half().float()
