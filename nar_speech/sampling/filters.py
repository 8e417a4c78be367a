"""Drawing tokens: temperature, top-k, top-p, and the draw itself."""

from __future__ import annotations

import torch
from torch import Tensor


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


def draw(probabilities: Tensor, exponential: Tensor) -> Tensor:
    """One sample per row, (M,): argmax of p / e with e ~ Exp(1), as ``torch.multinomial`` draws one."""
    return (probabilities / exponential).argmax(-1)


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    exponential: Tensor | None,
    top_k: int = 0,
    top_p: float = 0.0,
    tempered_scores: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw one token for each of M positions.

    Args:
        logits: (M, V) float32.
        temperature: (M,) float32 above 0.
        exponential: (M, V) draws of Exp(1); with top_p its columns belong to the tokens in descending order
            of probability. None takes the most probable token.
        top_k, top_p: 0 is off; top_p wins.
        tempered_scores: whether the returned probabilities are those after the temperature.

    Returns:
        Tokens (M,) int64, and the probabilities (M, V) that confidences are taken of: filtered with top_k,
        whole with top_p, as the official MAGNeT does it.
    """
    tempered = torch.softmax(logits / temperature[:, None], dim=-1)
    use_k = top_k > 0 and top_p <= 0
    kept = top_k_filter(tempered, top_k) if use_k else tempered
    if exponential is None:
        tokens = logits.argmax(-1)
        kept = tempered
        use_k = False
    elif top_p > 0:
        ordered, ids = top_p_filter(tempered, top_p)
        tokens = ids.gather(1, draw(ordered, exponential)[:, None])[:, 0]
    else:
        tokens = draw(kept, exponential)
    if not tempered_scores:
        plain = torch.softmax(logits, dim=-1)
        return tokens, top_k_filter(plain, top_k) if use_k else plain
    return tokens, kept
