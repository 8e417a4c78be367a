"""Drawing tokens: temperature, top-k, top-p, and the draw itself."""

from __future__ import annotations

import torch
from torch import Tensor

NUCLEUS = 256  # tokens that are sorted for top-p before all are


def top_k_filter(probabilities: Tensor, k: int) -> Tensor:
    """The k most probable tokens and all that tie with the k-th, renormalised; (M, V)."""
    if k >= probabilities.shape[-1]:
        return probabilities
    threshold = probabilities.topk(k, dim=-1).values[:, -1:]
    kept = probabilities * (probabilities >= threshold)
    return kept / kept.sum(-1, keepdim=True)


def top_p_filter(probabilities: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The most probable tokens before which at most ``p`` has been summed up, renormalised.

    Returns:
        Probabilities (M, V) in descending order, and the tokens (M, V) that they belong to.
    """
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered * (before <= p)
    return kept / kept.sum(-1, keepdim=True), tokens


def draw(probabilities: Tensor, random: Tensor) -> Tensor:
    """One sample per row, (M,).

    Args:
        probabilities: (M, V), their sum may differ from 1.
        random: (M,) uniform in [0, 1): the column where the running sum passes this share of the whole; or
            (M, V) draws of Exp(1): argmax of p / e, as ``torch.multinomial`` draws one sample.
    """
    if random.dim() == 2:
        return (probabilities / random).argmax(-1)
    running = probabilities.cumsum(-1)
    total = running[:, -1:]
    place = torch.minimum(random[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, place, right=True)[:, 0].clamp_(max=running.shape[1] - 1)


def draw_top_p(probabilities: Tensor, random: Tensor, p: float) -> Tensor:
    """One sample per row of what :func:`top_p_filter` keeps, (M,) tokens; ``random`` as in :func:`draw`.

    With uniform numbers only the ``NUCLEUS`` most probable tokens are sorted, and all where more are kept.
    """
    if random.dim() == 2 or probabilities.shape[-1] <= 2 * NUCLEUS:
        ordered, tokens = top_p_filter(probabilities, p)
        return tokens.gather(1, draw(ordered, random)[:, None])[:, 0]
    ordered, tokens = probabilities.topk(NUCLEUS, dim=-1)
    running = ordered.cumsum(-1)
    drawn = tokens.gather(1, draw(ordered * (running - ordered <= p), random)[:, None])[:, 0]
    wide = (running[:, -1] <= p).nonzero()[:, 0]
    if len(wide):
        ordered, tokens = top_p_filter(probabilities[wide], p)
        drawn[wide] = tokens.gather(1, draw(ordered, random[wide])[:, None])[:, 0]
    return drawn


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    random: Tensor | None,
    top_k: int = 0,
    top_p: float = 0.0,
    tempered_scores: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw one token for each of M positions.

    Args:
        logits: (M, V) float32.
        temperature: (M,) float32 above 0.
        random: (M,) uniform numbers or (M, V) draws of Exp(1), see :func:`draw`; with top_p the columns of
            the latter belong to the tokens in descending order of probability. None takes the most probable
            token.
        top_k, top_p: 0 is off; top_p wins.
        tempered_scores: whether the returned probabilities are those after the temperature.

    Returns:
        Tokens (M,) int64, and the probabilities (M, V) that confidences are taken of: filtered with top_k,
        whole with top_p, as the official MAGNeT does it.
    """
    tempered = torch.softmax(logits / temperature[:, None], dim=-1)
    use_k = top_k > 0 and top_p <= 0 and random is not None
    kept = top_k_filter(tempered, top_k) if use_k else tempered
    if random is None:
        tokens = logits.argmax(-1)
    elif top_p > 0:
        tokens = draw_top_p(tempered, random, top_p)
    else:
        tokens = draw(kept, random)
    if not tempered_scores:
        plain = torch.softmax(logits, dim=-1)
        return tokens, top_k_filter(plain, top_k) if use_k else plain
    return tokens, kept
