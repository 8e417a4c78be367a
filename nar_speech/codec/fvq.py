"""Factorised vector quantization: codes are looked up in few dimensions, by direction.

    Yu et al. 2021, "Vector-quantized image modeling with improved VQGAN", section 3.2 (projection to few
    dimensions, normalised distance); Kumar et al. 2023 (DAC), section 3.2 (residual levels, dropout of
    levels). The variant of MaskGCT (Wang et al. 2024, section 3.2): codes are chosen by direction, but the
    code vector that is used is the row of the codebook with the length that it has.

Codebooks are learnt by gradients. Parameter names are the official ones. Letters: B batch, D width of the
latents, d of the codes, K levels, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.codec.weight_norm import NormedConv1d


@dataclass(frozen=True)
class FvqConfig:
    """A residual quantizer, with the official names.

    Args:
        input_dim, codebook_dim: width of the latents, and of the vectors that codes stand for. Where they are
            equal there are no projections.
        num_quantizers, codebook_size: levels, and entries of each.
        quantizer_dropout: part of a training batch that uses only some of the levels.
        commitment, codebook_loss_weight: weights of the two training terms.
        use_l2_normlize: compare directions; False: compare the vectors themselves.
        quantizer_type: only the factorised one.
    """

    input_dim: int = 256
    num_quantizers: int = 12
    codebook_size: int = 1024
    codebook_dim: int = 8
    quantizer_dropout: float = 0.5
    commitment: float = 0.25
    codebook_loss_weight: float = 1.0
    use_l2_normlize: bool = True
    quantizer_type: Literal["fvq"] = "fvq"

    def __post_init__(self) -> None:
        configs.check_range(self, 1, configs.MAX_WIDTH, "input_dim", "codebook_dim")
        configs.check_range(self, 1, configs.MAX_BLOCKS, "num_quantizers")
        configs.check_range(self, 1, configs.MAX_VOCABULARY, "codebook_size")
        configs.check_range(self, 0, 1, "quantizer_dropout")
        configs.check_range(self, 0, 1e6, "commitment", "codebook_loss_weight")

    @classmethod
    def of(cls, whole: object, input_dim: int) -> FvqConfig:
        """Of a configuration that has fields of the same names among its own; others have their defaults."""
        shared = {part.name: getattr(whole, part.name) for part in fields(cls) if hasattr(whole, part.name)}
        return cls(**{**shared, "input_dim": input_dim})


@dataclass(frozen=True)
class FvqOutput:
    """What training needs.

    Attributes:
        latents: (B, D, T) sum of the levels' outputs that an item uses; gradients pass straight through.
        tokens: (B, K, T) int64, of all levels, also where an item does not use them.
        commitment, codebook: (K,) terms of the levels, weighted, the mean over the items of the batch, of
            which those that don't use a level count as 0.
    """

    latents: Tensor
    tokens: Tensor
    commitment: Tensor
    codebook: Tensor

    @property
    def loss(self) -> Tensor:
        """Both terms together, the mean over the levels."""
        return (self.commitment + self.codebook).mean()


class FactorizedQuantizer(nn.Module):
    """One level: project to few dimensions, look up, project back."""

    def __init__(self, config: FvqConfig):
        super().__init__()
        width, inner = config.input_dim, config.codebook_dim
        self.by_direction = config.use_l2_normlize
        self.in_project = NormedConv1d(width, inner, 1) if width != inner else nn.Identity()
        self.out_project = NormedConv1d(inner, width, 1) if width != inner else nn.Identity()
        self.codebook = nn.Embedding(config.codebook_size, inner)

    @torch.no_grad()
    def nearest(self, projected: Tensor) -> Tensor:
        """Codes (B, T) of projected latents (B, d, T)."""
        vectors, table = projected.transpose(1, 2), self.codebook.weight
        if self.by_direction:
            vectors, table = F.normalize(vectors, dim=2), F.normalize(table, dim=1)
        return (vectors @ table.T).mul_(-2).add_(table.square().sum(1)).argmin(2)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Rows of the codebook (B, d, T) of codes (B, T)."""
        return self.codebook(tokens).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (B, D, T) to output (B, D, T), codes (B, T), projected latents, code vectors (B, d, T)."""
        projected = self.in_project(x)
        tokens = self.nearest(projected)
        rows = self.vectors(tokens)
        # Gradients go straight through. Without them this still rounds, and the next level sees that.
        return self.out_project(projected + (rows - projected).detach()), tokens, projected, rows

    def decode(self, tokens: Tensor) -> Tensor:
        """Output (B, D, T) of codes (B, T)."""
        return self.out_project(self.vectors(tokens))


class ResidualFactorizedQuantizer(nn.Module):
    """K levels, each for what the ones before have left over."""

    def __init__(self, config: FvqConfig):
        super().__init__()
        self.config = config
        self.quantizers = nn.ModuleList(FactorizedQuantizer(config) for _ in range(config.num_quantizers))

    def forward(self, x: Tensor, levels: Tensor | None = None, present: Tensor | None = None) -> FvqOutput:
        """Quantize for training.

        Args:
            x: (B, D, T).
            levels: (B,) how many levels each item uses, see :meth:`draw_levels`; None: all.
            present: (B, T) booleans, which frames count in the training terms; None: all.
        """
        c = self.config
        used = x.new_full((len(x),), c.num_quantizers) if levels is None else levels.to(x)
        rest, total = x, torch.zeros_like(x)
        tokens, commitment, codebook = [], [], []
        for number, level in enumerate(self.quantizers):
            output, chosen, projected, rows = level(rest)
            active = (used > number).to(x)
            rest, total = rest - output, total + output * active[:, None, None]
            tokens.append(chosen)
            commitment.append((_distance(projected, rows.detach(), present) * active).mean())
            codebook.append((_distance(rows, projected.detach(), present) * active).mean())
        return FvqOutput(
            latents=total,
            tokens=torch.stack(tokens, 1),
            commitment=c.commitment * torch.stack(commitment),
            codebook=c.codebook_loss_weight * torch.stack(codebook),
        )

    def draw_levels(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """How many levels each item of a training batch uses, (B,) int64 on the CPU.

        The first ``quantizer_dropout`` of the batch, rounded down, use any number from 1, the others all.
        """
        drawn = torch.randint(1, self.config.num_quantizers + 1, (batch,), generator=generator)
        drawn[int(batch * self.config.quantizer_dropout) :] = self.config.num_quantizers
        return drawn

    def encode(self, x: Tensor, num_quantizers: int | None = None) -> tuple[Tensor, Tensor]:
        """Codes (B, K, T) of latents (B, D, T), and the sum of the levels' outputs (B, D, T).

        Args:
            num_quantizers: leave the finer levels out; None: all levels.
        """
        rest, total, tokens = x, torch.zeros_like(x), []
        for level in self.quantizers[:num_quantizers]:
            output, chosen, _, _ = level(rest)
            rest, total = rest - output, total + output
            tokens.append(chosen)
        return torch.stack(tokens, 1), total

    def decode(self, tokens: Tensor) -> Tensor:
        """Latents (B, D, T) of codes (B, K, T); fewer levels than there are give coarser ones."""
        first, *others = zip(self.quantizers, tokens.unbind(1), strict=False)
        total = first[0].decode(first[1])
        for level, chosen in others:
            total = total + level.decode(chosen)
        return total


def _distance(x: Tensor, y: Tensor, present: Tensor | None) -> Tensor:
    """Mean square (B,) of the difference of (B, d, T), over the frames that are ``present`` (B, T)."""
    frames = (x - y).square().mean(1)
    if present is None:
        return frames.mean(1)
    return (frames * present).sum(1) / present.sum(1).clamp_min(1)
