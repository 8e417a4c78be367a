"""Adversarial losses as functions of what discriminators give.

Sources: Mao et al. 2017 (least squares); Lim & Ye 2017 (hinge); Larsen et al. 2016 (feature matching).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

Kind = Literal["hinge", "least_squares"]


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor], kind: Kind = "hinge") -> Tensor:
    """What the discriminators minimise; a scalar, the mean over them.

    Args:
        real, fake: scores of each discriminator for recordings and for what was generated, any shapes.
    """
    terms = []
    for r, f in zip(real, fake, strict=True):
        r, f = r.float(), f.float()
        if kind == "hinge":
            terms.append((1 - r).clamp_min(0).mean() + (1 + f).clamp_min(0).mean())
        else:
            terms.append((1 - r).square().mean() + f.square().mean())
    return torch.stack(terms).mean()


def generator_loss(fake: Sequence[Tensor], kind: Kind = "hinge") -> Tensor:
    """What the generator minimises; a scalar, the mean over discriminators."""
    if kind == "hinge":
        return torch.stack([(1 - f.float()).clamp_min(0).mean() for f in fake]).mean()
    return torch.stack([(1 - f.float()).square().mean() for f in fake]).mean()


def feature_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """Relative distance of the discriminators' hidden maps (Défossez et al. 2022, equation 2); a scalar.

    Args:
        real, fake: the hidden maps of each discriminator; no gradient flows into ``real``.
    """
    terms = []
    for ours, theirs in zip(fake, real, strict=True):
        for f, r in zip(ours, theirs, strict=True):
            r = r.detach().float()
            terms.append((f.float() - r).abs().mean() / r.abs().mean().clamp_min(1e-4))
    return torch.stack(terms).mean()


def adversarial_losses(
    discriminator: nn.Module, fake: Tensor, real: Tensor, kind: Kind = "hinge"
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of both sides for one backward pass: what one side learns from doesn't reach the other.

    Args:
        discriminator: signals to the scores and the hidden maps of its parts.
        fake, real: (B, N), what was generated and recordings.

    Returns:
        :func:`discriminator_loss`, whose gradients go to the discriminator, and :func:`generator_loss` and
        :func:`feature_loss`, whose gradients go to ``fake``; scalars.
    """
    truth, truth_maps = discriminator(real)
    own = discriminator_loss(truth, discriminator(fake.detach())[0], kind)
    constants = {name: value.detach() for name, value in discriminator.named_parameters()}
    judged, maps = functional_call(discriminator, constants, (fake,))
    return own, generator_loss(judged, kind), feature_loss(truth_maps, maps)
