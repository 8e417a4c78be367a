"""Classifier-free guidance (arXiv 2207.12598) and its rescaling (arXiv 2305.08891, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, coefficient: Tensor | float) -> Tensor:
    """unconditional + coefficient (conditional - unconditional); a coefficient may be a tensor (R,).

    Where it is 1 the conditional values come out exactly, as if there had been no unconditional pass.
    """
    coefficient = torch.as_tensor(coefficient, dtype=conditional.dtype, device=conditional.device)
    coefficient = coefficient.reshape(-1, *[1] * (conditional.dim() - 1))
    guided = unconditional + (conditional - unconditional) * coefficient
    return torch.where(coefficient == 1, conditional, guided)


def rescale(
    guided: Tensor, conditional: Tensor, share: float, valid: Tensor | None = None, per_item: bool = True
) -> Tensor:
    """Bring the deviation of ``guided`` back to that of ``conditional``, for ``share`` of it.

    Args:
        guided, conditional: (R, T, D) logits or embeddings.
        share: 0 leaves ``guided`` as it is.
        valid: (R, T) bool positions that the deviations are taken of; all if not given.
        per_item: a deviation per item; False: one over the whole batch, so that its items depend on each
            other (official MaskGCT).
    """
    if valid is None:
        valid = torch.ones(guided.shape[:2], dtype=torch.bool, device=guided.device)
    wanted, found = (_deviation(x, valid, per_item) for x in (conditional, guided))
    rescaled = share * (guided * wanted / found) + (1 - share) * guided
    return torch.where(wanted == found, guided, rescaled)  # exactly, where there is nothing to bring back


def _deviation(values: Tensor, valid: Tensor, per_item: bool) -> Tensor:
    """Unbiased standard deviation over valid positions and features, (R, 1, 1).

    In float64: how far a batch is padded changes the order of sums, and with it a float32's last digits.
    """
    values, kind = values.double(), values.dtype
    weight = valid[..., None].to(values.dtype).expand_as(values)
    places = (1, 2) if per_item else (0, 1, 2)
    number = weight.sum(places, keepdim=True)
    mean = (values * weight).sum(places, keepdim=True) / number
    squares = ((values - mean).square() * weight).sum(places, keepdim=True)
    return (squares / (number - 1).clamp(min=1)).sqrt().clamp(min=1e-12).to(kind)
