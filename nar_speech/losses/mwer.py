"""Minimum word error rate (MWER) training of a parallel decoder (Paraformer, arXiv 2206.08317, section 3.3).

A parallel decoder's beam is a single path, so the candidates that MWER compares are made by the paper's
negative sampling: the top token of randomly chosen positions is masked, and the best of the rest takes its
place. With y* the reference, W the edit distance and P^ the candidates' probabilities made to sum to 1, the
loss is  sum_n P^(y_n | x) (W(y_n, y*) - mean_m W(y_m, y*))  (Prabhavalkar et al., arXiv 1712.01818).

Use in a training step, on the logits (B, U, V) of the second pass (`training_pass` of models/paraformer.py)::

    log_probs = logits.float().log_softmax(-1)
    candidates = negative_samples(log_probs, target_lengths, number=4, generator=generator)
    mwer = mwer_loss(log_probs, candidates, target_lengths, targets, target_lengths)
    loss = gamma * cross_entropy + quantity + mwer        # the paper's sum; start from a trained model

The paper gives neither the share of masked positions nor the number of candidates; our defaults are 0.5 and,
in the example, 4. It does not say what becomes of repeated candidates either: here they count once.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPECIAL = (0, 1, 2)  # blank, start and end of sentence never reach the text


@torch.no_grad()
def negative_samples(
    scores: Tensor,
    lengths: Tensor,
    number: int = 4,
    rate: float = 0.5,
    depth: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw candidates around the greedy path.

    Candidate 0 is the greedy path itself; in every other one each position loses its top token with the
    probability ``rate`` and takes the next best instead.

    Args:
        scores: (B, U, V) logits or log probabilities.
        lengths: (B,) int64 valid positions.
        number: N, candidates per item, at least 1; some may be equal.
        rate: probability of masking, in [0, 1].
        depth: how many tokens may take a masked one's place, each with the same chance: 1 is the paper's
            strategy, k draws from the ranks 2 to k + 1.
        generator: source of randomness; default: torch's global one. Its device may differ from ``scores``'.

    Returns:
        (B, N, U) int64 ids, -1 past the lengths.

    Raises:
        ValueError: ``number``, ``rate`` or ``depth`` out of range; a vocabulary of ``depth`` or fewer tokens.
    """
    batch, size, vocab = scores.shape
    if number < 1 or not 0 <= rate <= 1 or not 1 <= depth < vocab:
        raise ValueError(
            f"negative_samples: number {number} must be at least 1, rate {rate} in [0, 1] and depth {depth} "
            f"from 1 to {vocab - 1}"
        )
    device = scores.device if generator is None else generator.device
    draws = torch.rand(2, batch, number, size, generator=generator, device=device).to(scores.device)
    rank = 1 + (draws[1] * depth).long().clamp_max(depth - 1)
    rank = rank.masked_fill(draws[0] >= rate, 0)
    rank[:, 0] = 0
    best = scores.topk(depth + 1, dim=-1).indices  # (B, U, depth + 1)
    candidates = best.gather(2, rank.transpose(1, 2)).transpose(1, 2)
    padding = torch.arange(size, device=scores.device) >= lengths[:, None]
    return candidates.masked_fill(padding[:, None, :], -1)


def mwer_loss(
    log_probs: Tensor,
    candidates: Tensor,
    candidate_lengths: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    dropped: tuple[int, ...] = SPECIAL,
) -> Tensor:
    """Expected number of token errors over the candidates, less their mean, averaged over the batch.

    The value may be negative; what counts is its gradient, which moves probability from candidates with more
    errors than the mean to those with fewer. An item whose candidates are all equal adds zero.

    Args:
        log_probs: (B, U, V) log probabilities of the decoder, in float32 for a stable sum.
        candidates: (B, N, U) int64 ids (:func:`negative_samples`); what stands past the length is ignored.
        candidate_lengths: (B,) or (B, N) int64.
        targets: (B, L) int64 reference ids; target_lengths: (B,) int64.
        dropped: ids that are taken out of candidates and references before errors are counted, as decoding
            does.

    Returns:
        Scalar of the dtype of ``log_probs``.
    """
    batch, number, size = candidates.shape
    if candidate_lengths.ndim == 1:
        candidate_lengths = candidate_lengths[:, None].expand(batch, number)
    valid = torch.arange(size, device=candidates.device) < candidate_lengths[..., None]
    chosen = log_probs.gather(2, candidates.clamp_min(0).transpose(1, 2)).transpose(1, 2)
    path = chosen.masked_fill(~valid, 0.0).sum(-1)  # (B, N)
    with torch.no_grad():
        fresh = first_occurrences(candidates.masked_fill(~valid, -1))
        errors = candidate_errors(candidates, candidate_lengths, targets, target_lengths, dropped)
        errors = errors.to(path.dtype)
        mean = (errors * fresh).sum(1, keepdim=True) / fresh.sum(1, keepdim=True)
    share = path.masked_fill(~fresh, float("-inf")).softmax(dim=1)
    return (share * (errors - mean)).sum(1).mean()


def first_occurrences(sequences: Tensor) -> Tensor:
    """(B, N, U) ids -> (B, N) bool, false for a sequence equal to an earlier one of its item."""
    equal = (sequences[:, :, None] == sequences[:, None, :]).all(-1)
    earlier = torch.ones(equal.shape[1:], dtype=torch.bool, device=equal.device).tril(-1)
    return ~(equal & earlier).any(-1)


def candidate_errors(
    candidates: Tensor,
    candidate_lengths: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    dropped: tuple[int, ...] = SPECIAL,
) -> Tensor:
    """Edit distance (B, N) of candidates (B, N, U) of lengths (B, N) to their item's target (B, L)."""
    batch, number, size = candidates.shape
    rows, row_lengths = drop_ids(candidates.reshape(-1, size), candidate_lengths.reshape(-1), dropped)
    targets, target_lengths = drop_ids(targets, target_lengths, dropped)
    errors = edit_distance(
        rows,
        row_lengths,
        targets.repeat_interleave(number, dim=0),
        target_lengths.repeat_interleave(number, dim=0),
    )
    return errors.view(batch, number)


def drop_ids(tokens: Tensor, lengths: Tensor, dropped: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Take ids out of sequences (P, U); the rest moves to the front, in order. Returns it and its lengths."""
    keep = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    for value in dropped:
        keep = keep & (tokens != value)
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)
    return tokens.gather(1, order), keep.sum(1)


def edit_distance(a: Tensor, a_lengths: Tensor, b: Tensor, b_lengths: Tensor) -> Tensor:
    """Levenshtein distance of P pairs of sequences at once.

    One step per token of ``a``. Within a row of the usual table a run of insertions is a running minimum:
    D[i, j] = min over k <= j of (t[k] + j - k), with t the best of deletion and substitution.

    Args:
        a: (P, M) int64; a_lengths: (P,); b: (P, N) int64; b_lengths: (P,).

    Returns:
        (P,) int64.
    """
    steps = int(a_lengths.max()) if a_lengths.numel() else 0
    places = torch.arange(b.shape[1] + 1, device=a.device)
    row = places.expand(len(a), -1)
    for i in range(steps):
        best = row + 1
        substituted = row[:, :-1] + (a[:, i : i + 1] != b)
        best = torch.cat([best[:, :1], torch.minimum(best[:, 1:], substituted)], dim=1)
        best = (best - places).cummin(dim=1).values + places
        row = torch.where((i < a_lengths)[:, None], best, row)
    return row.gather(1, b_lengths[:, None])[:, 0]
