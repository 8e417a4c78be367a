"""Loss terms of the Paraformer family that are functions of tensors alone (arXiv 2206.08317, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def quantity_loss(token_num: Tensor, target_lengths: Tensor, length_normalized: bool = True) -> Tensor:
    """Mean absolute error of the predicted token count (the "MAE" term).

    Args:
        token_num: (B,) float, sum of the CIF weights.
        target_lengths: (B,) int64, tokens the count should equal (eos included where it is predicted).
        length_normalized: divide the sum by the number of target tokens, else by B.

    Returns:
        float32 scalar.
    """
    error = (token_num.float() - target_lengths).abs().sum()
    return error / (target_lengths.sum().clamp_min(1) if length_normalized else len(target_lengths))


def append_eos(tokens: Tensor, lengths: Tensor, eos: int = 2, ignore: int = -1) -> tuple[Tensor, Tensor]:
    """Put ``eos`` after the last token of each item.

    Args:
        tokens: (B, U) ids; what stands past ``lengths`` is replaced by ``ignore``.
        lengths: (B,) int64.

    Returns:
        (B, max(lengths) + 1) ids and lengths + 1.
    """
    size = int(lengths.max()) if lengths.numel() else 0
    places = torch.arange(size + 1, device=tokens.device)
    room = tokens.new_full((len(tokens), size + 1), ignore)
    room[:, :size] = tokens[:, :size]
    room = room.masked_fill(places >= lengths[:, None], ignore)
    return room.masked_fill(places == lengths[:, None], eos), lengths + 1


def random_orders(lengths: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """A random permutation of 0 .. length - 1 per item.

    Args:
        lengths: (B,) int64.
        size: U, row length of the result.
        generator: source of randomness; default: torch's global one. Its device may differ from ``lengths``'.

    Returns:
        (B, U) int64, -1 past the length.
    """
    device = lengths.device if generator is None else generator.device
    noise = torch.rand((len(lengths), size), generator=generator, device=device).to(lengths.device)
    padded = torch.arange(size, device=lengths.device) >= lengths[:, None]
    return noise.masked_fill(padded, 2.0).argsort(dim=1).masked_fill(padded, -1)


def glancing_mask(
    predictions: Tensor, targets: Tensor, ratio: float, orders: Tensor, ignore: int = -1
) -> tuple[Tensor, Tensor]:
    """Which token vectors of pass 1 the glancing sampler keeps (GLM sampler, section 3.3).

    It replaces floor(ratio * number of wrong tokens) of the positions by the label's embedding; positions are
    drawn from all target positions, so right ones may be drawn too.

    Args:
        predictions: (B, U) ids of pass 1.
        targets: (B, U) ids, ``ignore`` at padding.
        ratio: lambda, at least 0.
        orders: (B, U) int64 permutations of each item's positions, -1 at padding (:func:`random_orders`); the
            first entries are the positions that are replaced.

    Returns:
        (B, U) bool, true where the acoustic vector is kept, false where it is replaced and at padding; and
        (B,) int64 how many are replaced.
    """
    valid = targets != ignore
    wrong = valid.sum(dim=1) - ((predictions == targets) & valid).sum(dim=1)
    number = (wrong.float() * ratio).long().clamp_max(valid.sum(dim=1))
    places = torch.arange(targets.shape[1], device=targets.device)
    rank = torch.where(orders < 0, places, orders).argsort(dim=1)  # when each position is drawn
    return valid & (rank >= number[:, None]), number


def token_accuracy(predictions: Tensor, targets: Tensor, ignore: int = -1) -> Tensor:
    """Share of the targets that are predicted right; both (B, U) ids. float32 scalar."""
    valid = targets != ignore
    return ((predictions == targets) & valid).sum() / valid.sum().clamp_min(1)
