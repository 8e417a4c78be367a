"""Masked-token training: which tokens are masked, and the cross entropy of those.

MAGNeT (arXiv 2401.04577, section 3.2) masks spans of one codebook; the loss is the one of every masked token
model. Random numbers are drawn here from an explicit generator, or given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.errors import InputError

PERCENT = 100


@dataclass(frozen=True)
class MaskDraws:
    """What chance decides of a batch.

    Attributes:
        rates: (B,) uniform in [0, 1]; the masked part is cos(pi/2 rate).
        scores: (B, T) uniform in [0, 1]; they order the positions.
    """

    rates: Tensor
    scores: Tensor


@dataclass(frozen=True)
class MaskedBatch:
    """Input and targets of a training step.

    Attributes:
        tokens: (B, K, T) codes as the network sees them: true before the stage, masked in spans at the
            stage, all masked after it.
        targets: (B, T) the true codes of the stage.
        masked: (B, T) bool, the positions that count: masked and not padding.
        spans: (B, T) bool, the masked positions, those of padding too.
        lengths: (B,) frames of each row.
        stage: codebook.
    """

    tokens: Tensor
    targets: Tensor
    masked: Tensor
    spans: Tensor
    lengths: Tensor
    stage: int


@functools.lru_cache(maxsize=256)
def span_counts(frames: int, span_len: int) -> tuple[int, ...]:
    """Spans to start so that on average 0, 1, ..., 100 % of ``frames`` positions are masked.

    ``n`` random starts leave a position free with probability prod_{j<n} (T - L - j) / (T - j); the entry of
    a percentage is the first n that masks so much.

    Returns:
        101 numbers.
    """
    means, free = [0.0], 1.0
    for j in range(frames):
        free *= max(frames - span_len - j, 0) / (frames - j)
        means.append(1.0 - free)
        if free == 0.0:
            break
    table = torch.searchsorted(
        torch.tensor(means, dtype=torch.float64), torch.arange(PERCENT + 1, dtype=torch.float64) / PERCENT
    )
    return tuple(table.clamp_max(len(means) - 1).tolist())


def span_mask(scores: Tensor, rates: Tensor, span_len: int, frames: int | None = None) -> Tensor:
    """Positions that a batch masks.

    With spans longer than one frame a position starts one if the value of ``argsort(scores)`` there is below
    the wanted number: a random permutation, as in audiocraft. Spans may overlap and are cut off at the end.
    With single frames the ``round(T rate)`` lowest of the same permutation are masked, at least one.

    Args:
        scores: (B, T) uniform draws.
        rates: (B,) wanted masked part, 0 to 1.
        frames: T of the table of span numbers; None: that of ``scores``.

    Returns:
        (B, T) bool.
    """
    if span_len < 1:
        raise InputError(f"span_len: got {span_len}; must be at least 1")
    size = frames or scores.shape[1]
    place = scores.argsort(dim=1)
    if span_len == 1:
        return place < (size * rates).round().clamp_min(1)[:, None]
    table = torch.tensor(span_counts(size, span_len), device=scores.device)
    counts = table[(PERCENT * rates).round().long()].clamp_min(1)
    starts = place < counts[:, None]
    mask = starts.clone()
    for shift in range(1, min(span_len, starts.shape[1])):
        mask[:, shift:] |= starts[:, :-shift]
    return mask


def draw_masks(batch: int, frames: int, generator: torch.Generator | None, device: torch.device) -> MaskDraws:
    """Random numbers of a step, from a generator on ``device``."""
    rates = torch.rand(batch, generator=generator, device=device)
    return MaskDraws(rates, torch.rand(batch, frames, generator=generator, device=device))


def mask_codes(
    codes: Tensor,
    lengths: Tensor,
    stage: int,
    span_len: int,
    mask_id: int,
    draws: MaskDraws,
    per_item: bool = True,
) -> MaskedBatch:
    """Make the input of a training step from true codes.

    Args:
        codes: (B, K, T) int64; padding may hold anything from 0 to ``mask_id``.
        lengths: (B,) int64 frames of each row, at least 1.
        stage: codebook that is learnt.
        per_item: spread the masks of a row over its own frames, so that short rows are masked as much as long
            ones; False: over the padded T, as audiocraft does.

    Raises:
        InputError: a stage that does not exist, or codes outside the vocabulary.
    """
    _, streams, frames = codes.shape
    if not 0 <= stage < streams:
        raise InputError(f"stage: got {stage}; there are {streams} codebooks, from 0 on")
    valid = torch.arange(frames, device=codes.device) < lengths.to(codes.device)[:, None]
    rates = torch.cos(draws.rates * (math.pi / 2))
    if per_item and not bool(valid.all()):
        # Rows of one length share a table; positions of padding come last, whatever was drawn for them.
        spans = torch.zeros_like(valid)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0].to(codes.device)
            spans[rows, :length] = span_mask(draws.scores[rows, :length], rates[rows], span_len)
    else:
        spans = span_mask(draws.scores, rates, span_len)
    current = codes[:, stage].masked_fill(spans, mask_id)
    later = torch.full_like(codes[:, stage + 1 :], mask_id)
    tokens = torch.cat([codes[:, :stage], current[:, None], later], dim=1)
    return MaskedBatch(tokens, codes[:, stage], spans & valid, spans, lengths, stage)


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, masked: Tensor, label_smoothing: float = 0.0
) -> Mapping[str, Tensor]:
    """Mean cross entropy over the masked positions of the whole batch.

    Args:
        logits: (B, ..., V) of any float type; computed in float32.
        targets: (B, ...) int64; where nothing is masked they may be any number.
        masked: (B, ...) bool, the positions that count; none at all gives a loss of 0.

    Returns:
        ``loss``; ``acc``, part of the positions whose highest logit is right; ``masked``, how many count.
    """
    count = masked.sum()
    rows = logits[masked].float()
    wanted = targets[masked]
    loss = F.cross_entropy(rows, wanted, label_smoothing=label_smoothing, reduction="sum")
    loss = loss / count.clamp_min(1)
    with torch.no_grad():
        acc = (rows.argmax(-1) == wanted).sum() / count.clamp_min(1)
    return {"loss": loss, "acc": acc, "masked": count.float()}
