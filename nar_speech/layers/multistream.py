"""The Transformer of MAGNeT and MusicGen: several token streams in, one width inside, a head for each stream.

x = sum_k Emb_k(tokens_k) + position code, or none where queries and keys are rotated; pre-norm blocks of
self attention, attention on the text and a feed-forward part with the exact GELU, all without biases;
LayerNorm; one Linear head for each stream (audiocraft's ``StreamingTransformer``; MAGNeT, arXiv 2401.04577,
section 3; MusicGen, arXiv 2306.05284).
Parameter names are the official ones but for the projection of the text, here ``condition_proj``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.config import MAX_BLOCKS, MAX_VOCABULARY, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.dot_product import dot_product_attention
from nar_speech.layers.packed import linear_gelu
from nar_speech.layers.precision import no_autocast
from nar_speech.layers.prepare import prepare_products

# (number of the block, query, key, value (B, T, H, d)) -> context (B, T, H, d)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]  # cosines and sines (T, 1, d / 2)

RENAME = {
    r"condition_provider\.conditioners\.description\.output_proj": "condition_proj",
    r"transformer\.(layers\.\d+\.self_attn\.)?rope\.frequencies": None,
}
CONDITION = "condition_provider.conditioners.description.output_proj"


@dataclass(frozen=True)
class MultiStreamConfig:
    """Numbers of the network; the defaults are those of the small official models.

    Attributes:
        num_codebooks: K streams.
        codebook_size: V tokens of a stream; V itself stands for a masked or missing token.
        width: D.
        heads: attention heads; must divide D.
        num_blocks: Transformer blocks.
        hidden_scale: inner width of the feed-forward part in units of D.
        text_width: width of the text encoder's states.
        frame_rate: frames per second.
        segment_seconds: longest clip the model was trained on.
        dropout: in training, on the output of every attention and feed-forward part.
        positions: ``sin``: codes added to the input, as in every released model; ``rope``: rotated queries
            and keys instead; ``sin_rope``: both.
    """

    num_codebooks: int = 4
    codebook_size: int = 2048
    width: int = 1024
    heads: int = 16
    num_blocks: int = 24
    hidden_scale: int = 4
    text_width: int = 768
    frame_rate: float = 50.0
    segment_seconds: float = 10.0
    dropout: float = 0.0
    positions: Literal["sin", "rope", "sin_rope"] = "sin"

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_VOCABULARY, "codebook_size")
        check_range(self, 1, MAX_WIDTH, "width", "text_width", "heads", "hidden_scale", "num_codebooks")
        check_range(self, 1, MAX_BLOCKS, "num_blocks")
        if self.width % self.heads or self.width % 2 or self.width < 4:
            raise ConfigError(f"heads: {self.heads} must divide the width {self.width}, which must be even")
        if self.positions != "sin" and self.width // self.heads % 2:
            raise ConfigError(
                f"positions: '{self.positions}' needs heads of an even width, got"
                f" {self.width} / {self.heads} = {self.width // self.heads}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout: must be at least 0 and below 1, got {self.dropout:g}")
        if not (0 < self.frame_rate <= 1e6 and 0 < self.segment_seconds <= 1e6 and self.max_frames >= 1):
            raise ConfigError(
                f"frame_rate {self.frame_rate:g} and segment_seconds {self.segment_seconds:g} must be above 0"
                " and give at least one frame"
            )

    @property
    def max_frames(self) -> int:
        """Frames of a segment."""
        return int(self.frame_rate * self.segment_seconds)

    @property
    def mask_id(self) -> int:
        """The token that stands for a masked or missing one."""
        return self.codebook_size


def position_codes(positions: Tensor, width: int) -> Tensor:
    """(T,) -> (T, D) float32: D/2 cosines, then as many sines, rates 10000^(-i / (D/2 - 1))."""
    half = width // 2
    rates = torch.full((), 10000.0, device=positions.device) ** (
        torch.arange(half, device=positions.device, dtype=torch.float32) / max(half - 1, 1)
    )
    phase = positions.to(torch.float32)[:, None] / rates
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def rotation_codes(positions: Tensor, size: int) -> Rotation:
    """(T,) -> cosines and sines (T, 1, d / 2) float32 of a head of width d, rates 10000^(-2i / d).

    Source: Su et al. 2022 (RoPE, arXiv 2104.09864).
    """
    rates = 1.0 / 10000.0 ** (torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    phase = torch.outer(positions.to(torch.float32), rates)[:, None]
    return phase.cos(), phase.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn every pair of neighbouring coordinates of (B, T, H, d), in float32."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class SelfAttention(nn.Module):
    """Queries, keys and values from one packed weight, and the output projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.merged: nn.Module | None = None
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.out_proj = nn.Linear(width, width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, T, D) -> query, key and value (B, T, H, D / H)."""
        y = F.linear(x, self.in_proj_weight) if self.merged is None else self.merged(x)
        return y.unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def merge_projections(self) -> None:
        """Make a Linear layer of the packed weight, for inference."""
        if self.merged is None:
            self.merged = _linear(self.in_proj_weight).train(self.training)
            del self.in_proj_weight


class CrossAttention(nn.Module):
    """The same packed weight, whose first third meets the sound and the others the text."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query: nn.Module | None = None
        self.pair: nn.Module | None = None
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.out_proj = nn.Linear(width, width, bias=False)

    def project(self, x: Tensor) -> Tensor:
        """(B, T, D) -> queries (B, H, T, D / H)."""
        width = x.shape[-1]
        y = F.linear(x, self.in_proj_weight[:width]) if self.query is None else self.query(x)
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> keys and values (B, H, L, D / H)."""
        width = source.shape[-1]
        y = F.linear(source, self.in_proj_weight[width:]) if self.pair is None else self.pair(source)
        key, value = y.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return key.transpose(1, 2), value.transpose(1, 2)

    def merge_projections(self) -> None:
        """Make Linear layers of the packed weight, for inference."""
        if self.query is None:
            width = self.out_proj.out_features
            self.query = _linear(self.in_proj_weight[:width]).train(self.training)
            self.pair = _linear(self.in_proj_weight[width:]).train(self.training)
            del self.in_proj_weight


@dataclass(frozen=True)
class TextMemory:
    """What the blocks attend to of the text, computed once for a prompt.

    A row without text gets nothing from these layers, as keys and values of zeros, without biases, would
    give it; so it is left out.

    Attributes:
        keys, values: one (R, H, L, d) tensor a block, for the R rows that have text.
        mask: (R, 1, 1, L) bool, true on tokens; None: all are.
        rows: (R,) int64 places of those rows in the batch; None: all rows, in order.
        count: rows of the batch, B.
        weight: (B, 1, 1) 1 for rows with text and 0 for others, where gradients are wanted: then all rows
            are computed.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    rows: Tensor | None
    count: int
    weight: Tensor | None = None


class Block(nn.Module):
    """x + self attention, x + attention on the text, x + feed-forward; each on its normalised input."""

    def __init__(self, config: MultiStreamConfig):
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.compute: torch.dtype | None = None  # of the products; None: as the residual
        self.coarse = False
        self.self_attn = SelfAttention(width, config.heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, config.heads)
        self.norm_cross = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, config.hidden_scale * width, bias=False)
        self.linear2 = nn.Linear(config.hidden_scale * width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self,
        number: int,
        x: Tensor,
        attend: Attend,
        memory: TextMemory | None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); ``number`` of this block for ``attend`` and ``memory``."""
        query, key, value = self.self_attn.project(self._ready(self.norm1(x)))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        context = attend(number, query, key, value)
        x = x + self._drop(self.self_attn.out_proj(context.flatten(2)))
        if memory is not None and (memory.rows is None or len(memory.rows)):
            x = self._read(number, x, memory)
        inner = linear_gelu(self.linear1, self._ready(self.norm2(x)))
        return x + self._drop(self.linear2(inner))

    def _read(self, number: int, x: Tensor, memory: TextMemory) -> Tensor:
        reading = x if memory.rows is None else x[memory.rows]
        query = self.cross_attention.project(self._ready(self.norm_cross(reading)))
        pair = memory.keys[number], memory.values[number]
        context = dot_product_attention(query, *pair, memory.mask, coarse=self.coarse)
        out = self._drop(self.cross_attention.out_proj(context.transpose(1, 2).flatten(2)))
        if memory.weight is not None:
            out = out * memory.weight
        if memory.rows is None:
            return x + out
        return x.index_add(0, memory.rows, out.to(x.dtype))

    def _ready(self, x: Tensor) -> Tensor:
        return x if self.compute is None else x.to(self.compute)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Stack(nn.Module):
    """The blocks, under the official name ``layers``."""

    def __init__(self, config: MultiStreamConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_blocks))


class MultiStreamNetwork(nn.Module):
    """Embeddings, blocks, norm and heads; its subclasses say who sees whom."""

    def __init__(self, config: MultiStreamConfig):
        super().__init__()
        self.config = config
        streams, width = range(config.num_codebooks), config.width
        self.emb = nn.ModuleList(nn.Embedding(config.codebook_size + 1, width) for _ in streams)
        self.transformer = Stack(config)
        self.out_norm = nn.LayerNorm(width)
        self.linears = nn.ModuleList(nn.Linear(width, config.codebook_size, bias=False) for _ in streams)
        self.condition_proj = nn.Linear(config.text_width, width)
        self.register_buffer("codes", torch.zeros(0, width), persistent=False)
        for name in ("cosines", "sines"):
            self.register_buffer(name, torch.zeros(0, 1, width // config.heads // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with std 1/sqrt(fan in), cut off at 3 std; deeper blocks start smaller (audiocraft).

        The products of block i are divided by sqrt(2 (i + 1)). Norms and the bias start as PyTorch has them.
        """
        for table in self.emb:
            _draw(table.weight, self.config.width)
        for head in self.linears:
            _draw(head.weight, self.config.width)
        _draw(self.condition_proj.weight, self.config.text_width)
        nn.init.zeros_(self.condition_proj.bias)
        for number, block in enumerate(self.transformer.layers):
            for name, weight in block.named_parameters():
                if weight.ndim == 2 and "norm" not in name:
                    _draw(weight, weight.shape[1], 1 / math.sqrt(2 * (number + 1)))

    @property
    def blocks(self) -> Sequence[Block]:
        """The Transformer blocks."""
        return self.transformer.layers

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.out_norm.weight.device

    def prepare(self, dtype: str = "float32") -> MultiStreamNetwork:
        """Get ready for inference, in place: it can then be neither trained, saved nor moved.

        Embeddings, norms, the residual and the heads stay in float32; ``dtype`` is that of the blocks'
        products. On a CPU the weights are laid out for its kernels.

        Args:
            dtype: ``float32``; ``bfloat16``, ``float16`` (not on a CPU): products rounded to them; ``int8``
                (CPU): :mod:`nar_speech.layers.quantize`.
        """
        blocks = [(b, (b.self_attn, b.cross_attention, b.linear1, b.linear2)) for b in self.blocks]
        prepare_products(self, dtype, (self.condition_proj, *self.linears), blocks)
        return self

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens (B, K, T), the first at frame ``start``, to (B, T, D), with position codes if there are any.

        Raises:
            InputError: another number of streams.
        """
        if tokens.dim() != 3 or tokens.shape[1] != self.config.num_codebooks:
            raise InputError(
                f"tokens: expected (batch, {self.config.num_codebooks}, frames), got {tuple(tokens.shape)}"
            )
        x = sum(table(tokens[:, k]) for k, table in enumerate(self.emb))
        if self.config.positions == "rope":
            return x
        return x + self.position(start, tokens.shape[2]).to(x.dtype)

    def position(self, start: int, count: int) -> Tensor:
        """(count, D) float32 codes of the frames from ``start`` on."""
        end = start + count
        if self._outgrown(self.codes, end):
            with no_autocast(self.out_norm.weight):
                self.codes = position_codes(self._frames(end), self.config.width)
        return self.codes[start:end]

    def rotation(self, start: int, count: int) -> Rotation | None:
        """Of the frames from ``start`` on; None: nothing is rotated."""
        if self.config.positions == "sin":
            return None
        end = start + count
        if self._outgrown(self.cosines, end):
            size = self.config.width // self.config.heads
            with no_autocast(self.out_norm.weight):
                self.cosines, self.sines = rotation_codes(self._frames(end), size)
        return self.cosines[start:end], self.sines[start:end]

    def _outgrown(self, table: Tensor, end: int) -> bool:
        return table.shape[0] < end or table.device != self.device or table.dtype != torch.float32

    def _frames(self, end: int) -> Tensor:
        return torch.arange(max(512, 1 << (end - 1).bit_length()), device=self.device)

    def remember(self, condition: Tensor, mask: Tensor, official_padding: bool = False) -> TextMemory:
        """Keys and values of text states (B, L, W) whose ``mask`` (B, L) bool is true on tokens.

        ``official_padding``: attend to padding too, as vectors of zeros, as audiocraft does; the numbers of a
        row then depend on how far its batch is padded.

        Raises:
            InputError: states of another width.
        """
        if condition.dim() != 3 or condition.shape[-1] != self.config.text_width:
            raise InputError(
                f"condition: expected (batch, tokens, {self.config.text_width}), got"
                f" {tuple(condition.shape)}; the text encoder belongs to another model"
            )
        mask = mask.bool()
        text = mask.any(1)
        weight = rows = None
        if torch.is_grad_enabled():  # all rows, so that every step has the same gradients
            weight = text[:, None, None].to(condition.dtype)
        elif not bool(text.all()):
            rows = text.nonzero()[:, 0]
            condition, mask = condition[rows], mask[rows]
        dtype = self.out_norm.weight.dtype
        states = self.condition_proj(condition.to(dtype)) * mask.unsqueeze(-1).to(dtype)
        pairs = [b.cross_attention.keys(b._ready(states)) for b in self.blocks] if mask.numel() else []
        look = None
        if not official_padding and not bool(mask.all()):
            look = (mask | ~mask.any(1, keepdim=True))[:, None, None]
        keys, values = tuple(k for k, _ in pairs), tuple(v for _, v in pairs)
        return TextMemory(keys, values, look, rows, len(text), weight)

    def logits(self, x: Tensor, head: int | None = None) -> Tensor:
        """(..., T, D) -> (..., T, V) of one head, or (..., K, T, V) of all."""
        x = self.out_norm(x)
        if head is not None:
            return self.linears[head](x)
        return torch.stack([linear(x) for linear in self.linears], dim=-3)


def with_null(
    condition: Tensor, mask: Tensor, null: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Rows (B, L, W) with as many rows of the null condition behind them; null (1 or B, L', W) or no text."""
    if null is None:
        return torch.cat([condition, torch.zeros_like(condition)]), torch.cat([mask, torch.zeros_like(mask)])
    states, seen = (t.expand(len(condition), *t.shape[1:]).to(condition.device) for t in null)
    longest = max(condition.shape[1], states.shape[1])

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, longest - x.shape[1]))

    return torch.cat([pad(condition), pad(states)]), torch.cat([pad(mask), pad(seen)])


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), False)
    return linear


def _draw(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    std = scale / math.sqrt(fan_in)
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
