"""Rescoring of n-best lists with a model that scores whole token sequences in one parallel pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nar_speech.search.hypothesis import CtcHypothesis

# (utterance index (N,), tokens (N, U) padded with 0, lengths (N,)) -> (N, U + 1, V) logits, position u
# predicts token u and the last one the end; and the same for reversed sequences, or None.
SequenceModel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def attention_rescore(
    nbest: Sequence[Sequence[CtcHypothesis]],
    score: SequenceModel,
    eos: int,
    ctc_weight: float = 0.5,
    reverse_weight: float = 0.0,
    device: torch.device | str = "cpu",
) -> list[tuple[CtcHypothesis, float]]:
    """Choose from each n-best list by attention decoder and CTC scores (U2++, Wu et al. 2021, section 2.2).

    score = (1 - reverse_weight) * left-to-right + reverse_weight * right-to-left + ctc_weight * CTC score.
    All hypotheses of all utterances are scored in one pass.

    Args:
        nbest: hypotheses of each utterance, none of the lists empty.
        score: the decoder over the encoder output of the utterances.
        eos: id that ends a sequence.
        ctc_weight: of the hypothesis' own score.
        reverse_weight: share of the right-to-left decoder, 0 without one.
        device: where ``score`` expects its tensors.

    Returns:
        For each utterance the best hypothesis, its ``score`` replaced by the new one and its token
        confidences by the decoder's; and its confidence exp(decoder score / (U + 1)).
    """
    flat = [(row, hypothesis) for row, hypotheses in enumerate(nbest) for hypothesis in hypotheses]
    if not flat:
        return []
    lengths = torch.tensor([len(h.tokens) for _, h in flat], device=device)
    rows = torch.tensor([row for row, _ in flat], device=device)
    size = int(lengths.max())
    tokens = torch.tensor([[*h.tokens, *[0] * (size - len(h.tokens))] for _, h in flat], device=device)
    tokens = tokens.reshape(len(flat), size).long()
    left, right = score(rows, tokens, lengths)
    total, token_scores = _sequence_scores(left, tokens, lengths, eos)
    sure = token_scores.exp()
    if reverse_weight > 0.0 and right is not None:
        index = torch.arange(size, device=tokens.device).expand_as(tokens)
        mirror = (lengths.unsqueeze(1) - 1 - index).clamp(min=0)
        backward, scores = _sequence_scores(right, tokens.gather(1, mirror), lengths, eos)
        sure = (sure + scores.gather(1, mirror).exp()) / 2
        total = (1.0 - reverse_weight) * total + reverse_weight * backward
    confidence = (total / (lengths + 1)).exp().tolist()
    own = torch.tensor([h.score for _, h in flat], dtype=total.dtype, device=total.device)
    combined = (total + ctc_weight * own).tolist()
    sure = sure.tolist()
    results, start = [], 0
    for hypotheses in nbest:
        best = max(range(start, start + len(hypotheses)), key=combined.__getitem__)
        chosen = flat[best][1]
        confidences = tuple(sure[best][: len(chosen.tokens)])
        results.append((replace(chosen, score=combined[best], confidences=confidences), confidence[best]))
        start += len(hypotheses)
    return results


def _sequence_scores(logits: Tensor, tokens: Tensor, lengths: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """Log probability (N,) of each sequence with its end, and of each token (N, U); float64."""
    log_probs = logits.float().log_softmax(-1).double()
    each = log_probs[:, :-1].gather(2, tokens.unsqueeze(2)).squeeze(2)
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    end = log_probs[:, :, eos].gather(1, lengths.unsqueeze(1)).squeeze(1)
    return each.masked_fill(~valid, 0.0).sum(1) + end, each
