"""Multi-head attention with WeNet's parameter names, on ``scaled_dot_product_attention``.

Masks are bool (B, Q or 1, K), true where a query may look. Keys and values are made by :meth:`keys` so that
a caller may compute them once (rescoring many hypotheses). In a stream they are kept, see :meth:`step`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from nar_speech.errors import ConfigError
from nar_speech.layers.chunks import last


class Attention(nn.Module):
    """Dot-product attention between queries (B, Q, D) and a memory (B, K, D) (Vaswani et al. 2017).

    Args:
        heads: number of heads; must divide ``width``.
        width: D.
        dropout: on the attention weights, in training.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        dropout: float = 0.0,
        query_bias: bool = True,
        key_bias: bool = True,
        value_bias: bool = True,
    ):
        super().__init__()
        if width % heads:
            raise ConfigError(f"attention_heads: {heads} does not divide the width {width}")
        self.heads, self.dropout = heads, dropout
        self.linear_q = nn.Linear(width, width, bias=query_bias)
        self.linear_k = nn.Linear(width, width, bias=key_bias)
        self.linear_v = nn.Linear(width, width, bias=value_bias)
        self.linear_out = nn.Linear(width, width, bias=query_bias)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, heads, T, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of ``memory`` (B, K, D), each (B, heads, K, D / heads)."""
        return self.split(self.linear_k(memory)), self.split(self.linear_v(memory))

    def combine(
        self, q: torch.Tensor, keys: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the values and the output layer; ``mask`` is (B, 1 or heads, Q or 1, K)."""
        dropout = self.dropout if self.training else 0.0
        out = scaled_dot_product_attention(q, *keys, attn_mask=mask, dropout_p=dropout)
        return self.linear_out(out.transpose(1, 2).flatten(2))

    def forward(
        self, x: torch.Tensor, keys: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """Attend from ``x`` (B, Q, D) to ``keys`` under ``mask`` (B, Q or 1, K). Returns (B, Q, D).

        A query that may look nowhere gets a finite result; the caller drops it.
        """
        mask = mask | ~mask.any(-1, keepdim=True)
        return self.combine(self.split(self.linear_q(x)), keys, mask.unsqueeze(1))

    @property
    def cache_width(self) -> int:
        """Numbers that :meth:`step` keeps of every frame: its key and its value."""
        return 2 * self.linear_out.in_features

    def step(
        self,
        x: torch.Tensor,
        cache: torch.Tensor,
        num_new: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor | None = None,
        grow: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Self-attention of the next frames of streams over themselves and the frames kept before them.

        Args:
            x: (B, U, D), of which ``num_new`` (B,) are frames of the stream.
            cache: (B, L, cache_width), the newest frame at the right.
            mask: (B, U or 1, L + U), where a query may look.
            positions: (B, U, D) codes of the frames, for attention that takes them.
            grow: keep all frames; the cache gets L + U long.

        Returns:
            (B, U, D); the cache of the next step.
        """
        query, entries = self._project(x, positions)
        window = torch.cat([cache, entries.flatten(2)], dim=1)
        size = query.shape[-1]
        memory = window.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = memory[..., :size], memory[..., size:]
        mask = (mask | ~mask.any(-1, keepdim=True)).unsqueeze(1)
        scale = value.shape[-1] ** -0.5
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        kept = last(window, num_new, x.shape[1], window.shape[1] if grow else cache.shape[1])
        return self.linear_out(out.transpose(1, 2).flatten(2)), kept

    def _project(self, x: torch.Tensor, positions: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (B, heads, U, Q), and keys with values behind them (B, U, heads, Q + D / heads)."""
        parts = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.linear_k, self.linear_v))
        return self.split(self.linear_q(x)), torch.cat([*parts], dim=-1)


class PositionBiasAttention(Attention):
    """Attention with learned content and position biases, without a relative shift (WeNet ``rel_selfattn``).

    scores = ((q + u) k^T + (q + v) p^T) / sqrt(d_k) with p a linear map of the position codes of the KEYS
    (Dai et al. 2019, section 3.3, but the shift of its appendix B is left out, as in WeNet).
    """

    def __init__(self, heads: int, width: int, dropout: float = 0.0, **biases: bool):
        super().__init__(heads, width, dropout, **biases)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(
        self,
        x: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """As :meth:`Attention.forward`, with the position codes ``positions`` (1 or B, K, D) of the keys."""
        q = self.split(self.linear_q(x))
        p = self.split(self.linear_pos(positions))
        scale = q.shape[-1] ** -0.5
        bias = torch.matmul((q + self.pos_bias_v.unsqueeze(1)) * scale, p.transpose(-2, -1))
        mask = mask | ~mask.any(-1, keepdim=True)
        bias = bias.masked_fill(~mask.unsqueeze(1), float("-inf"))
        return self.combine(q + self.pos_bias_u.unsqueeze(1), keys, bias)

    @property
    def cache_width(self) -> int:
        """Numbers that a step keeps of every frame: its key, its projected position and its value."""
        return 3 * self.linear_out.in_features

    def _project(self, x: torch.Tensor, positions: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        # (q + u) k + (q + v) p is one product of [q + u, q + v] with [k, p].
        q = self.split(self.linear_q(x))
        query = torch.cat([q + self.pos_bias_u.unsqueeze(1), q + self.pos_bias_v.unsqueeze(1)], dim=-1)
        parts = (self.linear_k(x), self.linear_pos(positions), self.linear_v(x))
        return query, torch.cat([part.unflatten(-1, (self.heads, -1)) for part in parts], dim=-1)
