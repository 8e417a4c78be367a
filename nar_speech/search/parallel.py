"""n-best lists of models that predict every token at once, independently of the others."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def best_sequences(log_probs: Tensor, count: int) -> list[tuple[tuple[int, ...], float]]:
    """The ``count`` most probable sequences, exactly.

    As positions are independent, the best sequences of the first u + 1 positions extend the best ones of
    the first u by the best tokens at u.

    Args:
        log_probs: (U, V) log probabilities of each position.
        count: sequences wanted; fewer come out where fewer exist.

    Returns:
        (ids, sum of log probabilities), best first; ties in order of the ids' rank.
    """
    values, ids = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    values, ids = values.double().cpu().numpy(), ids.cpu().numpy()
    scores = np.zeros(1)
    sequences = np.zeros((1, 0), dtype=np.int64)
    for position, row in zip(values, ids, strict=True):
        totals = (scores[:, None] + position).ravel()
        order = np.argsort(-totals, kind="stable")[:count]
        origin, choice = np.divmod(order, len(row))
        scores = totals[order]
        sequences = np.concatenate([sequences[origin], row[choice][:, None]], 1)
    return [(tuple(s.tolist()), float(score)) for s, score in zip(sequences, scores, strict=True)]
