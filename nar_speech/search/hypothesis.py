"""The result of a CTC search."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CtcHypothesis:
    """One decoded token sequence.

    Attributes:
        tokens: ids without blanks.
        score: natural log; greedy: of the best path; beam: of the sequence plus context and LM scores.
        times: encoder frame of each token.
        confidences: probability of each token at its best frame, in [0, 1].
        context_score, lm_score: what biasing and (weighted) LM added to ``score``.
    """

    tokens: tuple[int, ...]
    score: float
    times: tuple[int, ...]
    confidences: tuple[float, ...]
    context_score: float = 0.0
    lm_score: float = 0.0
