"""Forced alignment: the best CTC path of a known token sequence (Viterbi over blank-extended labels)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchaudio
from torch import Tensor

from nar_speech.errors import InputError


@dataclass(frozen=True)
class Alignment:
    """Best paths of a batch.

    Attributes:
        labels: (B, T) int64 label of each frame, blanks included; -1 beyond the length.
        log_probs: (B, T) float32 log probability of that label; 0 beyond the length.
        scores: (B,) float32 log probability of the path.
        positions: (B, T) int64 index of the target token a frame belongs to; -1 at blanks and padding.
    """

    labels: Tensor
    log_probs: Tensor
    scores: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Span:
    """Frames ``start`` to ``end`` (exclusive) of one token; ``score`` is its mean probability there."""

    token: int
    start: int
    end: int
    score: float


def forced_align(
    log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int = 0
) -> Alignment:
    """Most probable CTC path of each target sequence, all utterances at once.

    Equals ``torchaudio.functional.forced_align``, which takes one utterance a call.

    Args:
        log_probs: (B, T, V) log probabilities.
        lengths: (B,) valid frames.
        targets: (B, U) ids without blanks; entries beyond the target length are not read.
        target_lengths: (B,); 0 is fine, its path is all blank.
        blank: id of the blank.

    Raises:
        InputError: a target needs more frames than its utterance has, or holds the blank.
    """
    log_probs = log_probs.detach().float()
    frames = log_probs.shape[1]
    device = log_probs.device
    lengths, targets = lengths.to(device), targets.to(device)
    target_lengths = target_lengths.to(device)
    inside = torch.arange(targets.shape[1], device=device) < target_lengths.unsqueeze(1)
    _check(lengths, targets, target_lengths, inside, blank)
    search = _paths_one_by_one if device.type == "cpu" else _paths_at_once
    labels = search(log_probs, lengths, targets.masked_fill(~inside, blank), target_lengths, blank)
    valid = torch.arange(frames, device=device) < lengths.unsqueeze(1)
    labels = labels.masked_fill(~valid, blank)
    scores = log_probs.gather(2, labels.unsqueeze(2)).squeeze(2).masked_fill(~valid, 0.0)
    begins = labels != blank
    begins[:, 1:] &= labels[:, 1:] != labels[:, :-1]
    positions = (begins.long().cumsum(1) - 1).masked_fill(labels == blank, -1)
    return Alignment(labels.masked_fill(~valid, -1), scores, scores.double().sum(1).float(), positions)


def _paths_one_by_one(
    log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int
) -> Tensor:
    """Labels (B, T) from torchaudio's compiled search; on a CPU faster than any batched tensor code."""
    labels = torch.full(log_probs.shape[:2], blank, device=log_probs.device)
    sizes = zip(lengths.tolist(), target_lengths.tolist(), strict=True)
    for row, (frames, tokens) in enumerate(sizes):
        if tokens > 0:
            item, target = log_probs[row : row + 1, :frames], targets[row : row + 1, :tokens]
            labels[row, :frames] = torchaudio.functional.forced_align(item, target, blank=blank)[0]
    return labels


def _paths_at_once(
    log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, blank: int
) -> Tensor:
    """Labels (B, T) by tensor operations over the whole batch, one step a frame; for accelerators."""
    batch, frames, _ = log_probs.shape
    states = torch.full((batch, 2 * targets.shape[1] + 1), blank, device=log_probs.device)
    states[:, 1::2] = targets
    if frames == 0:
        return states[:, :0]
    emissions = log_probs.gather(2, states.unsqueeze(1).expand(-1, frames, -1))
    moves, state = _viterbi(emissions, states, lengths, target_lengths, blank)
    return states.gather(1, _trace(moves, state, lengths))


def _check(lengths: Tensor, targets: Tensor, target_lengths: Tensor, inside: Tensor, blank: int) -> None:
    if bool(((targets == blank) & inside).any()):
        row = int(((targets == blank) & inside).any(1).long().argmax())
        raise InputError(f"targets: utterance {row} holds the blank (id {blank}); leave it out of the target")
    repeats = ((targets[:, 1:] == targets[:, :-1]) & inside[:, 1:]).sum(1)
    needed = target_lengths + repeats
    bad = needed > lengths
    if bool(bad.any()):
        row = int(bad.long().argmax())
        raise InputError(
            f"targets: utterance {row} has {int(lengths[row])} frames, but its {int(target_lengths[row])} "
            f"tokens with {int(repeats[row])} repeats need {int(needed[row])}; check text and audio"
        )


def _viterbi(
    emissions: Tensor, states: Tensor, lengths: Tensor, target_lengths: Tensor, blank: int
) -> tuple[Tensor, Tensor]:
    """Step sizes (T, B, S) uint8 into each state (0, 1 or 2 states back) and the last state (B,)."""
    batch, frames, size = emissions.shape
    skip = torch.zeros(batch, size, dtype=torch.bool, device=emissions.device)
    skip[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    barrier = torch.zeros_like(emissions[:, 0]).masked_fill(~skip, float("-inf"))
    first = min(2, size)
    score = torch.full((batch, size + 2), float("-inf"), device=emissions.device)  # two columns in front
    score[:, 2 : 2 + first] = emissions[:, 0, :first]
    moves = torch.zeros(frames, batch, size, dtype=torch.uint8, device=emissions.device)
    final = score.clone()
    for t in range(1, frames):
        options = torch.stack([score[:, 2:], score[:, 1:-1], score[:, :-2] + barrier])
        best, move = options.max(0)
        moves[t] = move
        score = torch.cat([score[:, :2], best + emissions[:, t]], 1)
        final = torch.where((lengths == t + 1).unsqueeze(1), score, final)
    last = (2 * target_lengths).unsqueeze(1)  # the path ends in the final blank or in the last token
    token = (last - 1).clamp(min=0)
    final = final[:, 2:]
    return moves, torch.where(final.gather(1, token) > final.gather(1, last), token, last).squeeze(1)


def _trace(moves: Tensor, state: Tensor, lengths: Tensor) -> Tensor:
    """State (B, T) of each frame, followed back from the last one; 0 beyond the length."""
    frames = moves.shape[0]
    path = torch.zeros(moves.shape[1], frames, dtype=torch.int64, device=moves.device)
    for t in range(frames - 1, -1, -1):
        running = lengths > t
        path[:, t] = torch.where(running, state, 0)
        back = moves[t].gather(1, state.unsqueeze(1)).squeeze(1).long()
        state = torch.where(running, state - back, state)
    return path


def token_spans(alignment: Alignment) -> list[list[Span]]:
    """Frames and mean probability of each target token, per utterance."""
    positions, probabilities = alignment.positions, alignment.log_probs.exp()
    batch, frames = positions.shape
    if frames == 0:
        return [[] for _ in range(batch)]
    tokens = int(positions.max()) + 1
    index = positions.clamp(min=0)
    hit = (positions >= 0).float()
    count = torch.zeros(batch, tokens + 1, device=hit.device).scatter_add(1, index, hit)
    total = torch.zeros_like(count).scatter_add(1, index, hit * probabilities)
    numbers = torch.arange(frames, device=hit.device).expand(batch, frames)
    far = torch.where(positions >= 0, numbers, frames)
    start = torch.full((batch, tokens + 1), frames, device=hit.device).scatter_reduce(1, index, far, "amin")
    label = torch.zeros_like(start).scatter_reduce(1, index, alignment.labels * hit.long(), "amax")
    mean = (total / count.clamp(min=1)).tolist()
    rows = zip(label.tolist(), start.tolist(), count.long().tolist(), mean, strict=True)
    return [[Span(a, b, b + c, d) for a, b, c, d in zip(*row, strict=True) if c > 0] for row in rows]
