"""A bidirectional Llama whose norms are steered by the diffusion step: the core of MaskGCT and Metis.

Pre-norm blocks of self attention with rotary positions and a gated feed-forward part (SwiGLU with SiLU), all
without biases. Every RMSNorm is adaptive: its gain is a Linear function of the embedded step t, and there is
no shift (MaskGCT, arXiv 2409.00750, section 3.2.1; names and the unscaled t as in the official code).

The same blocks run in two layouts. ``forward`` takes a padded batch, for training. ``packed`` takes items one
behind the other without padding, which is exact and wastes nothing: what inference uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.config import MAX_BLOCKS, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError
from nar_speech.layers.dot_product import attention_by_heads
from nar_speech.layers.packed import keep_float, merge_linears
from nar_speech.layers.precision import no_autocast

EPSILON = 1e-6
THETA = 10_000.0
INIT_STD = 0.02

# (query, key, value) (..., H, d) each -> context (..., H, d), fewer rows where fewer are wanted
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiffLlamaConfig:
    """Numbers of the network; the defaults are those of MaskGCT's text-to-semantic model.

    Attributes:
        width: D.
        num_blocks: L.
        heads: H; must divide D so that a head has an even width.
        hidden_scale: inner width of all feed-forward parts in units of D.
        condition: whether there is a ``cond_mlp`` for what the network is conditioned on.
    """

    width: int = 1536
    num_blocks: int = 16
    heads: int = 16
    hidden_scale: int = 4
    condition: bool = True

    def __post_init__(self) -> None:
        check_range(self, 4, MAX_WIDTH, "width")
        check_range(self, 1, MAX_WIDTH, "heads", "hidden_scale")
        check_range(self, 1, MAX_BLOCKS, "num_blocks")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(f"heads: width {self.width} / {self.heads} heads must be an even whole number")


def step_embedding(time: Tensor, width: int) -> Tensor:
    """(S,) diffusion steps in [0, 1] -> (S, D) float32: D/2 sines, then D/2 cosines, of the unscaled time."""
    half = width // 2
    rates = torch.exp(
        torch.arange(half, dtype=torch.float32, device=time.device) * (-math.log(THETA) / max(half - 1, 1))
    )
    phase = time.float()[:, None] * rates
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def rotary(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(...,) positions -> cosines and sines (..., 1, 1, size / 2) float32 of the rotation of a head."""
    rates = THETA ** (
        -torch.arange(0, size, 2, dtype=torch.int64, device=positions.device).to(torch.float32) / size
    )
    angle = positions.to(torch.float32)[..., None, None, None] * rates
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (..., 2, H, d), queries and keys, by :func:`rotary`; coordinate i goes with i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@dataclass(frozen=True)
class PackedLayout:
    """Sequences one behind the other, each with positions from 0.

    Attributes:
        groups: runs of alike neighbours, (number of sequences, length, wanted) each; a sequence that goes on
            behind kept positions is a group of its own.
        before: kept positions before each group's sequences, 0 or those of the only one.
        cos, sin: rotation of each of the N rows.
        segment: (N,) int64 sequence of each row.
        rows: (M,) int64 rows whose results are wanted: the last ``wanted`` of each sequence.
    """

    groups: tuple[tuple[int, int, int], ...]
    before: tuple[int, ...]
    cos: Tensor
    sin: Tensor
    segment: Tensor
    rows: Tensor

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        wanted: Sequence[int],
        size: int,
        device: torch.device,
        before: Sequence[int] | None = None,
    ) -> PackedLayout:
        """The layout of sequences of these lengths.

        Args:
            wanted: rows at the end of each sequence whose results are wanted.
            size: width of a head.
            before: positions before each sequence whose keys and values are kept, see :class:`Kept`.
        """
        starts = [0] * len(lengths) if before is None else list(before)
        groups: list[tuple[int, int, int]] = []
        kept: list[int] = []
        for length, rows, start in zip(lengths, wanted, starts, strict=True):
            if groups and groups[-1][1:] == (length, rows) and not (start or kept[-1]):
                groups[-1] = (groups[-1][0] + 1, length, rows)
            else:
                groups.append((1, length, rows))
                kept.append(start)
        count = torch.tensor(list(lengths))
        segment = torch.repeat_interleave(torch.arange(len(count)), count)
        place = torch.arange(int(count.sum())) - (count.cumsum(0) - count)[segment]
        rows = (place >= (count - torch.tensor(list(wanted)))[segment]).nonzero()[:, 0]
        cos, sin = rotary((place + torch.tensor(starts)[segment]).to(device), size)
        return cls(tuple(groups), tuple(kept), cos, sin, segment.to(device), rows.to(device))


@dataclass
class Kept:
    """Keys and values of the first ``size`` positions of a pack's first sequence, a pair (A, H, d) a block.

    A pass over the whole sequence fills it in; passes over what follows those positions then read it. That
    is approximate: in a bidirectional network they would change with what follows, and with the step.
    """

    size: int
    pairs: list[tuple[Tensor, Tensor]]


class AdaptiveNorm(nn.Module):
    """RMSNorm times a gain that is a Linear function of the step embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.to_weight = nn.Linear(width, width)

    def gain(self, step: Tensor) -> Tensor:
        """Embedded steps (S, D) -> gains (S, D)."""
        return self.to_weight(step)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        """(..., D) times a ``gain`` that it can be multiplied with."""
        if gain.numel() == x.shape[-1]:
            return F.rms_norm(x, x.shape[-1:], gain.flatten(), EPSILON)
        return F.rms_norm(x, x.shape[-1:], eps=EPSILON) * gain


class SelfAttention(nn.Module):
    """Queries, keys, values and the output projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.merged: nn.Module | None = None
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> queries and keys (..., 2, H, D / H), and values (..., H, D / H)."""
        if self.merged is not None:
            y = self.merged(x).unflatten(-1, (3, self.heads, -1))
            return y[..., :2, :, :], y[..., 2, :, :]
        parts = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (part(x).unflatten(-1, (self.heads, -1)) for part in parts)
        return torch.stack([query, key], -3), value

    def merge_projections(self) -> None:
        """Make one product of three, for inference."""
        if self.merged is None:
            self.merged = merge_linears([self.q_proj, self.k_proj, self.v_proj])
            del self.q_proj, self.k_proj, self.v_proj


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.merged: nn.Module | None = None
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.merged is not None:
            gate, up = self.merged(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up)

    def merge_projections(self) -> None:
        """Make one product of two, for inference."""
        if self.merged is None:
            self.merged = merge_linears([self.gate_proj, self.up_proj])
            del self.gate_proj, self.up_proj


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: DiffLlamaConfig):
        super().__init__()
        width = config.width
        self.compute: torch.dtype | None = None  # of the products; None: as the residual
        self.coarse = False
        self.self_attn = SelfAttention(width, config.heads)
        self.mlp = GatedMlp(width, config.hidden_scale * width)
        self.input_layernorm = AdaptiveNorm(width)
        self.post_attention_layernorm = AdaptiveNorm(width)

    def forward(
        self,
        x: Tensor,
        gains: tuple[Tensor, Tensor],
        turn: tuple[Tensor, Tensor],
        attend: Attend,
        rows: Tensor | None = None,
    ) -> Tensor:
        """(..., D) -> (..., D), or of the ``rows`` alone, which ``gains[1]`` is then for."""
        both, value = self.self_attn.project(self._ready(self.input_layernorm(x, gains[0])))
        query, key = rotate(both, *turn).unbind(-3)
        if rows is not None:
            x, query = x[rows], query[rows]
        x = x + self.self_attn.o_proj(attend(query, key, value).flatten(-2))
        return x + self.mlp(self._ready(self.post_attention_layernorm(x, gains[1])))

    def _ready(self, x: Tensor) -> Tensor:
        return x if self.compute is None else x.to(self.compute)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))


class DiffLlama(nn.Module):
    """The network between embeddings and heads; parameters are named as in the official checkpoints."""

    def __init__(self, config: DiffLlamaConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_scale * config.width
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = AdaptiveNorm(config.width)
        self.diff_step_mlp = _mlp(config.width, hidden)
        if config.condition:
            self.cond_mlp = _mlp(config.width, hidden)
        self.reset_parameters()
        for name, part in self.named_modules():
            if name.endswith("to_weight") or (isinstance(part, nn.Linear) and not name.startswith("layers")):
                keep_float(part)

    def reset_parameters(self) -> None:
        """Normal weights of deviation 0.02 without bias; gains begin near 1 (officially near 0)."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=INIT_STD)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for part in self.norms():
            nn.init.ones_(part.to_weight.bias)

    def norms(self) -> list[AdaptiveNorm]:
        """The 2L + 1 norms in the order in which they are used."""
        pairs = [norm for b in self.layers for norm in (b.input_layernorm, b.post_attention_layernorm)]
        return [*pairs, self.norm]

    def gains(self, time: Tensor) -> Tensor:
        """Gains (2L + 1, S, D) float32 of all norms at the diffusion steps ``time`` (S,)."""
        with no_autocast(time):
            step = self.diff_step_mlp(step_embedding(time, self.config.width))
            return torch.stack([norm.gain(step) for norm in self.norms()])

    def forward(self, x: Tensor, time: Tensor, mask: Tensor | None = None) -> Tensor:
        """A padded batch; every row has positions from 0 on.

        Args:
            x: (B, T, D) embeddings; padding may hold anything finite.
            time: (B,) diffusion step of each row, in [0, 1].
            mask: (B, T) bool, false on padding, which nothing attends to; None: there is none.

        Returns:
            (B, T, D) after the final norm; what stands on padding means nothing.
        """
        gains = self.gains(time)[:, :, None]
        turn = rotary(torch.arange(x.shape[1], device=x.device), self.config.width // self.config.heads)
        seen = None if mask is None else mask[:, None, None]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = (part.transpose(1, 2) for part in (query, key, value))
            return attention_by_heads(*parts, seen, coarse=self.layers[0].coarse).transpose(1, 2)

        for number, block in enumerate(self.layers):
            x = block(x, (gains[2 * number], gains[2 * number + 1]), turn, attend)
        return self.norm(x, gains[-1])

    def packed(self, x: Tensor, layout: PackedLayout, gains: Tensor, kept: Kept | None = None) -> Tensor:
        """Sequences without padding, each attending to itself alone, and the first to what is kept for it.

        Args:
            x: (N, D) embeddings, one sequence behind the other.
            gains: (2L + 1, 1, D) of :meth:`gains`, or (2L + 1, number of sequences, D).
            kept: filled in if the first sequence is whole (then it must be empty), read if that sequence goes
                on behind kept positions.

        Returns:
            (M, D) after the final norm, of ``layout.rows``. In the last block only these are computed.
        """
        rows, last = layout.rows, len(self.layers) - 1
        alike = gains.shape[1] == 1
        whole = len(rows) == len(x)
        turn = layout.cos, layout.sin

        def gain(number: int, few: bool) -> Tensor:
            if alike:
                return gains[number]
            return gains[number][layout.segment[rows] if few else layout.segment]

        for number, block in enumerate(self.layers):
            few = number == last and not whole
            pair = gain(2 * number, False), gain(2 * number + 1, few)
            attend = self._attend(layout, few, block.coarse, kept, number)
            x = block(x, pair, turn, attend, rows if few else None)
        return self.norm(x, gain(-1, not whole))

    @staticmethod
    def _attend(layout: PackedLayout, few: bool, coarse: bool, kept: Kept | None, number: int) -> Attend:
        """Attention inside every sequence; with ``few`` there are queries of the wanted rows only."""
        groups = layout.groups

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            counts = [count * (wanted if few else length) for count, length, wanted in groups]
            sizes = [count * length for count, length, _ in groups]
            if kept is not None and not layout.before[0]:
                kept.pairs.append((key[: kept.size].clone(), value[: kept.size].clone()))
            parts = []
            for (count, _, _), before, q, k, v in zip(
                groups, layout.before, query.split(counts), key.split(sizes), value.split(sizes), strict=True
            ):
                if before:
                    k, v = (torch.cat(pair) for pair in zip(kept.pairs[number], (k, v), strict=True))
                heads = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in (q, k, v))
                parts.append(attention_by_heads(*heads, coarse=coarse).transpose(1, 2).flatten(0, 1))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return attend
