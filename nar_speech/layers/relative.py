"""Attention with relative positions (Dai et al. 2019, section 3.3, appendix B), as in NeMo's conformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.layers.attention import Attention
from nar_speech.layers.chunks import last, position_codes
from nar_speech.layers.packed import merge_linears

TABLES_KEPT = 4  # shapes of steps whose projected positions are remembered


def relative_shift(scores: Tensor, keys: int) -> Tensor:
    """From scores by distance to scores by key.

    Args:
        scores: (B, H, Q, Q + K - 1), for each query the distances to key from the largest that any query has
            down to the smallest.
        keys: K; the last of them stands where the last query does.

    Returns:
        (B, H, Q, K): entry (q, k) is entry (q, Q - 1 - q + k) of ``scores``.
    """
    batch, heads, queries, distances = scores.shape
    # One number more in each row, then rows of another length: each row begins one further to the left.
    flat = F.pad(scores, (1, 0)).view(batch, heads, distances + 1, queries)
    return flat[:, :, 1:].reshape(batch, heads, queries, distances)[..., :keys]


def distance_codes(queries: int, keys: int, like: Tensor) -> Tensor:
    """Codes (1, Q + K - 1, D) of the distances from queries to keys, which end at the same frame.

    The largest distance, K - 1 frames back, is the first and Q - 1 frames ahead the last. Width, dtype and
    device are those of ``like`` (..., D).
    """
    distance = torch.arange(keys - 1, -queries, -1, device=like.device)
    return position_codes(distance, like.shape[-1]).to(like.dtype).unsqueeze(0)


class RelativeAttention(Attention):
    """Self-attention with scores ((q + u) k^T + (q + v) p^T) / sqrt(d_k), p a map of the distance's code.

    Args:
        bias: whether the four projections have biases.
        position_biases: u and v, each (heads, D / heads), where layers share them.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        dropout: float = 0.0,
        bias: bool = True,
        position_biases: tuple[nn.Parameter, nn.Parameter] | None = None,
    ):
        super().__init__(heads, width, dropout, bias, bias, bias)
        self.linear_pos = nn.Linear(width, width, bias=False)
        u, v = position_biases or (nn.Parameter(torch.zeros(heads, width // heads)) for _ in range(2))
        self.pos_bias_u, self.pos_bias_v = u, v
        self.merged: nn.Module | None = None
        self._tables: dict[tuple, Tensor] = {}

    def merge_projections(self) -> None:
        """Make one product of queries, keys and values; for inference."""
        if self.merged is None:
            self.merged = merge_linears([self.linear_q, self.linear_k, self.linear_v])
            del self.linear_q, self.linear_k, self.linear_v

    def train(self, mode: bool = True) -> RelativeAttention:
        """As any module; forgets what was computed from the weights."""
        self._tables.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> RelativeAttention:
        self._tables.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._tables.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def project(self, codes: Tensor) -> Tensor:
        """Codes of distances (1, P, D) to (1, heads, P, D / heads)."""
        return self.split(self.linear_pos(codes))

    def forward(self, x: Tensor, mask: Tensor, codes: Tensor) -> Tensor:
        """Attend from ``x`` (B, T, D) to itself under ``mask`` (B, T or 1, T) bool. Returns (B, T, D).

        ``codes`` (1, 2 T - 1, D) are those of :func:`distance_codes`. A query that may look nowhere gets a
        finite result; the caller drops it.
        """
        query, key, value = self._projections(x)
        return self._attend(query, self.split(key), self.split(value), self.project(codes), mask)

    @property
    def cache_width(self) -> int:
        """Numbers that :meth:`step` keeps of every frame: its key and its value."""
        return 2 * self.linear_out.in_features

    def step(
        self, x: Tensor, cache: Tensor, num_new: Tensor, mask: Tensor, grow: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`nar_speech.layers.attention.Attention.step`; keys and values lie side by side."""
        query, key, value = self._projections(x)
        window = torch.cat([cache, torch.cat([key, value], dim=-1)], dim=1)
        key, value = window.chunk(2, dim=-1)
        table = self._table(x.shape[1], window.shape[1], x)
        out = self._attend(query, self.split(key), self.split(value), table, mask)
        return out, last(window, num_new, x.shape[1], window.shape[1] if grow else cache.shape[1])

    def _table(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """Projected codes of all distances in a step.

        They depend on the weights and on two sizes only, so outside of training they are remembered: a step
        has few frames, and projecting the distances would cost as much as the frames themselves.
        """
        key = self.linear_pos, queries, keys, like.dtype, like.device
        kind = like.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if torch.is_grad_enabled() or self.training or autocast:
            return self.project(distance_codes(queries, keys, like))
        if key not in self._tables:
            table = self.project(distance_codes(queries, keys, like))
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return table  # it has no values before the graph is replayed
            while len(self._tables) >= TABLES_KEPT:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = table
        return self._tables[key]

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, D)."""
        if self.merged is not None:
            query, key, value = self.merged(x).chunk(3, dim=-1)
            return query, key, value
        return self.linear_q(x), self.linear_k(x), self.linear_v(x)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        query = self.split(query)
        scale = query.shape[-1] ** -0.5
        distances = torch.matmul((query + self.pos_bias_v.unsqueeze(1)) * scale, table.transpose(-2, -1))
        bias = relative_shift(distances, key.shape[2])
        mask = (mask | ~mask.any(-1, keepdim=True)).unsqueeze(1)
        bias = bias.masked_fill(~mask, float("-inf"))
        drop = self.dropout if self.training else 0.0
        query = query + self.pos_bias_u.unsqueeze(1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=drop)
        return self.linear_out(out.transpose(1, 2).flatten(2))
