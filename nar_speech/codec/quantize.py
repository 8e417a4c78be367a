"""Quantizers that turn latent frames into codes: residual vectors with moving-average codebooks, and scalars.

Sources: van den Oord et al. 2017, appendix A.1 (codebooks as moving averages); Zeghidour et al. 2021
(SoundStream), section III-C (residual levels, dead codes, dropout of levels); Mentzer et al. 2023 (FSQ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nar_speech.errors import ConfigError


@dataclass(frozen=True)
class Quantized:
    """What a quantizer gives for latents (B, T, D).

    Attributes:
        latents: (B, T, D) float32, the code vectors of the levels in use added up; in training gradients pass
            straight through.
        tokens: (B, K, T) int64; levels an item does not use hold what they would have been.
        commitment: scalar, mean squared distance of a level's input from its code vector, over levels in use,
            relative to the mean square of the latents: growing latents make it no smaller.
    """

    latents: Tensor
    tokens: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """``size`` vectors that follow the mean of what is assigned to them.

    Args:
        size, width: entries, and values of each.
        decay: of the moving averages.
        revive: an entry used less than this part of the mean use is replaced by a vector of the batch.
    """

    def __init__(self, size: int, width: int, decay: float = 0.99, revive: float = 0.05):
        super().__init__()
        self.decay, self.revive = decay, revive
        self.register_buffer("embed", torch.zeros(size, width))
        self.register_buffer("usage", torch.zeros(size))  # moving average of how often each is chosen
        self.register_buffer("total", torch.zeros(size, width))  # and of the sum of what chose it
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def nearest(self, x: Tensor) -> Tensor:
        """Entry (M,) closest to each vector (M, D) in Euclidean distance."""
        table = self.embed.float()
        return (x @ table.T).mul_(-2).add_(table.square().sum(1)).argmin(1)

    @torch.no_grad()
    def start(self, x: Tensor, rounds: int = 10) -> None:
        """Entries from vectors (M, D) by k-means; few vectors become entries with a little noise."""
        pick = torch.randperm(max(len(x), len(self.embed)), device=x.device)[: len(self.embed)] % len(x)
        noise = torch.randn(len(pick), x.shape[1], device=x.device) * x.std(0, correction=0) * 0.05
        self.embed.copy_(x[pick] + noise)
        for _ in range(rounds if len(x) > 2 * len(self.embed) else 0):
            sums = self.sums(x, self.nearest(x))
            used = sums[:, -1:] > 0
            self.embed.copy_(torch.where(used, sums[:, :-1] / sums[:, -1:].clamp_min(1), self.embed))
        self.usage.fill_(1.0)
        self.total.copy_(self.embed)
        self.started.fill_(True)

    @torch.no_grad()
    def sums(self, x: Tensor, chosen: Tensor) -> Tensor:
        """For each entry the sum of the vectors (M, D) that chose it (M,), and their number: (S, D + 1)."""
        rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        return rows.new_zeros(len(self.embed), rows.shape[1]).index_add_(0, chosen, rows)

    @torch.no_grad()
    def learn(self, sums: Tensor, x: Tensor) -> None:
        """Move the entries by what :meth:`sums` gave, and replace unused ones by vectors of ``x`` (M, D)."""
        self.usage.lerp_(sums[:, -1], 1 - self.decay)
        self.total.lerp_(sums[:, :-1], 1 - self.decay)
        self.embed.copy_(self.total / self.usage.clamp_min(1e-8)[:, None])
        mean = self.usage.mean()
        dead = (self.usage < self.revive * mean).nonzero()[:, 0]
        if len(dead) and len(x):
            self.embed[dead] = x[torch.randint(len(x), (len(dead),), device=x.device)]
            self.usage[dead] = mean
            self.total[dead] = self.embed[dead] * mean


class ResidualVectorQuantizer(nn.Module):
    """K codebooks, each for what the ones before have left over.

    Args:
        width: of latents D.
        num_codebooks, codebook_size: K levels of so many entries.
        code_width: the levels work in this many dimensions (linear projections in and out); default D.
        decay, revive: see :class:`Codebook`.
    """

    def __init__(
        self,
        width: int,
        num_codebooks: int,
        codebook_size: int,
        code_width: int | None = None,
        decay: float = 0.99,
        revive: float = 0.05,
    ):
        super().__init__()
        inner = code_width or width
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.project_in = nn.Linear(width, inner) if inner != width else nn.Identity()
        self.project_out = nn.Linear(inner, width) if inner != width else nn.Identity()
        self.levels = nn.ModuleList(
            Codebook(codebook_size, inner, decay, revive) for _ in range(num_codebooks)
        )

    def forward(self, x: Tensor, levels: Tensor | None = None) -> Quantized:
        """Quantize latents and, in training mode, let the codebooks learn from them.

        Under DDP all processes' latents count, and the first one's codebooks are handed to the others.

        Args:
            x: (B, T, D).
            levels: (B,) how many levels each item uses (quantizer dropout), or None for all.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = self.project_in(x.float())
            used = x.new_full((len(x),), self.num_codebooks) if levels is None else levels.to(x)
            rest, result, tokens, losses, seen = x, torch.zeros_like(x), [], [], []
            for number, level in enumerate(self.levels):
                active = used > number
                if self.training and not bool(level.started) and bool(active.any()):
                    level.start(rest.detach()[active].flatten(0, 1))
                chosen = level.nearest(rest.detach().flatten(0, 1)).view(x.shape[:2])
                if self.training:
                    flat = rest.detach()[active].flatten(0, 1)
                    seen.append((flat, level.sums(flat, chosen[active].flatten())))
                vectors, mask = level.embed.float()[chosen], active.view(-1, 1, 1)
                share = len(x) / active.sum().clamp_min(1)
                losses.append(((rest - vectors).square() * mask).mean() * share)
                result = result + vectors * mask
                rest = rest - vectors * mask
                tokens.append(chosen)
            if self.training:
                self._learn(seen)
            straight = x + (result - x).detach() if self.training else result
            commitment = torch.stack(losses).mean() / x.detach().square().mean().clamp_min(1e-12)
            return Quantized(self.project_out(straight), torch.stack(tokens, 1), commitment)

    @torch.no_grad()
    def start_projections(self, rows: Tensor, values: Tensor) -> None:
        """Let the codes begin with the linear map ``rows`` (n, D), n <= code width, and its transpose back.

        Args:
            values: what it gives for many latents, (M, n); codebooks adapt to them by themselves.
        """
        for layer, weight in ((self.project_in, rows), (self.project_out, rows.T)):
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
                layer.weight[: weight.shape[0], : weight.shape[1]] = weight

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Begin with codebooks that fit latents (M, D), many times as many as there are entries.

        Without this they begin with the vectors of the first batch.
        """
        rest = self.project_in(x.float())
        for level in self.levels:
            level.start(rest)
            rest = rest - level.embed[level.nearest(rest)]

    @property
    def started(self) -> bool:
        """Whether the codebooks hold anything."""
        return all(bool(level.started) for level in self.levels)

    def skip(self, x: Tensor) -> Quantized:
        """Latents (B, T, D) through both projections only; no codes, nothing is learnt."""
        with torch.autocast(x.device.type, enabled=False):
            latents = self.project_out(self.project_in(x.float()))
            tokens = torch.empty(len(x), 0, x.shape[1], dtype=torch.int64, device=x.device)
            return Quantized(latents, tokens, latents.new_zeros(()))

    def _learn(self, seen: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One step of all codebooks, from the vectors and sums of each level."""
        sums = torch.stack([part for _, part in seen])
        if dist.is_initialized():
            dist.all_reduce(sums)
        for level, part, (flat, _) in zip(self.levels, sums, seen, strict=True):
            level.learn(part, flat)

    def encode(self, x: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Codes (B, K, T) of latents (B, T, D); ``num_codebooks`` leaves the finer levels out."""
        rest, tokens = self.project_in(x.float()), []
        for level in self.levels[: self.num_codebooks if num_codebooks is None else num_codebooks]:
            chosen = level.nearest(rest.flatten(0, 1)).view(rest.shape[:2])
            rest = rest - level.embed.float()[chosen]
            tokens.append(chosen)
        return torch.stack(tokens, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Latents (B, T, D) of codes (B, K, T); fewer levels than there are give a coarser result."""
        pairs = zip(self.levels, tokens.unbind(1), strict=False)
        return self.project_out(sum(level.embed.float()[chosen] for level, chosen in pairs))


class FiniteScalarQuantizer(nn.Module):
    """Every latent value rounded to one of a few steps; a group of values makes one code.

    There is nothing to learn but the projections, and no codebook that could collapse.

    Args:
        width: of latents D.
        num_codebooks: groups K.
        steps: steps of each value of a group, 3 or more, such as (8, 5, 5, 5): 1000 codes.
    """

    def __init__(self, width: int, num_codebooks: int, steps: Sequence[int]):
        super().__init__()
        if not steps or min(steps) < 3:
            raise ConfigError(f"quantizer.steps: at least one value of 3 or more steps, got {list(steps)}")
        self.num_codebooks, self.steps = num_codebooks, tuple(steps)
        self.codebook_size = 1
        basis = []
        for count in self.steps:
            basis.append(self.codebook_size)
            self.codebook_size *= count
        self.project_in = nn.Linear(width, num_codebooks * len(self.steps))
        self.project_out = nn.Linear(num_codebooks * len(self.steps), width)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)
        self.register_buffer("counts", torch.tensor(self.steps), persistent=False)

    def forward(self, x: Tensor, levels: Tensor | None = None) -> Quantized:
        """Quantize (B, T, D); ``levels`` (B,): groups beyond that many count as zero."""
        with torch.autocast(x.device.type, enabled=False):
            bounded = self._bound(self.project_in(x.float()).unflatten(2, (self.num_codebooks, -1)))
            digits = bounded.detach().round()
            values = bounded + (digits - bounded.detach()) if self.training else digits
            scaled = values / self._half()
            if levels is not None:
                group = torch.arange(self.num_codebooks, device=x.device)
                scaled = scaled * (group < levels[:, None]).to(scaled)[:, None, :, None]
            return Quantized(self.project_out(scaled.flatten(2)), self._codes(digits), scaled.new_zeros(()))

    @torch.no_grad()
    def start_projections(self, rows: Tensor, values: Tensor) -> None:
        """Let the codes begin with the linear map ``rows`` (n, D) and its transpose back.

        Args:
            values: what it gives for many latents, (M, n): its range becomes that of the steps, and a group
                that is left away counts as the mean.
        """
        count, mean = len(rows), values.mean(0)
        spread = 2 * values.std(0, correction=0) + 1e-4
        for layer in (self.project_in, self.project_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.project_in.weight[:count] = rows / spread[:, None]
        self.project_in.bias[:count] = -mean / spread
        self.project_out.weight[:, :count] = rows.T * spread
        self.project_out.bias.copy_(rows.T @ mean)

    def skip(self, x: Tensor) -> Quantized:
        """Latents (B, T, D) through both projections and the bounds, not rounded; no codes."""
        with torch.autocast(x.device.type, enabled=False):
            bounded = self._bound(self.project_in(x.float()).unflatten(2, (self.num_codebooks, -1)))
            tokens = torch.empty(len(x), 0, x.shape[1], dtype=torch.int64, device=x.device)
            latents = self.project_out((bounded / self._half()).flatten(2))
            return Quantized(latents, tokens, latents.new_zeros(()))

    def encode(self, x: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Codes (B, K, T) of latents (B, T, D)."""
        digits = self._bound(self.project_in(x.float()).unflatten(2, (self.num_codebooks, -1))).round()
        return self._codes(digits)[:, :num_codebooks]

    def decode(self, tokens: Tensor) -> Tensor:
        """Latents (B, T, D) of codes (B, K, T); groups that are missing count as zero."""
        digits = tokens.transpose(1, 2)[..., None] // self.basis % self.counts
        values = (digits - self.counts // 2) / self._half()
        missing = self.num_codebooks - tokens.shape[1]
        values = nn.functional.pad(values, (0, 0, 0, missing))
        return self.project_out(values.flatten(2))

    def _half(self) -> Tensor:
        return (self.counts // 2).float()

    def _bound(self, x: Tensor) -> Tensor:
        """Values between -floor(L/2) and the largest step; even numbers of steps are shifted by a half."""
        half = (self.counts - 1).float() * (1 - 1e-3) / 2
        shift = torch.where(self.counts % 2 == 0, 0.5, 0.0)
        return torch.tanh(x + torch.atanh(shift / half)) * half - shift

    def _codes(self, digits: Tensor) -> Tensor:
        return ((digits.long() + self.counts // 2) * self.basis).sum(-1).transpose(1, 2)
