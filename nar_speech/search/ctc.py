"""Decoding of CTC outputs: greedy search and token times, whole batches at once.

Prefix beam search is in :mod:`nar_speech.search.prefix_beam`, forced alignment in
:mod:`nar_speech.search.align`; both are importable from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nar_speech.search.align import Alignment, Span, forced_align, token_spans
from nar_speech.search.context import ContextGraph
from nar_speech.search.hypothesis import CtcHypothesis
from nar_speech.search.prefix_beam import prefix_beam

__all__ = [
    "Alignment",
    "ContextGraph",
    "CtcHypothesis",
    "Span",
    "forced_align",
    "greedy",
    "prefix_beam",
    "token_borders",
    "token_spans",
]


def greedy(log_probs: Tensor, lengths: Tensor, blank: int = 0) -> list[CtcHypothesis]:
    """Best label of every frame, repeats merged, blanks dropped.

    Args:
        log_probs: (B, T, V) log probabilities.
        lengths: (B,) valid frames.
        blank: id of the blank.

    Returns:
        One hypothesis an utterance. ``times`` is the first frame of each run of equal labels, ``confidences``
        the highest probability inside the run.
    """
    batch, frames, _ = log_probs.shape
    if frames == 0:
        return [CtcHypothesis((), 0.0, (), ()) for _ in range(batch)]
    best, labels = (x.cpu() for x in log_probs.float().max(-1))  # small from here on
    valid = torch.arange(frames) < lengths.cpu().unsqueeze(1)
    labels = labels.masked_fill(~valid, blank)
    starts = torch.ones_like(valid)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    run = starts.long().cumsum(1) - 1
    peak = torch.full_like(best, float("-inf")).scatter_reduce(1, run, best, "amax")
    emitted = starts & (labels != blank) & valid
    scores = best.masked_fill(~valid, 0.0).double().sum(1)
    counts = emitted.sum(1).tolist()
    times = emitted.nonzero()[:, 1].split(counts)
    tokens = labels[emitted].split(counts)
    confidences = peak.gather(1, run)[emitted].exp().split(counts)
    return [
        CtcHypothesis(tuple(token.tolist()), score, tuple(time.tolist()), tuple(confidence.tolist()))
        for token, score, time, confidence in zip(tokens, scores.tolist(), times, confidences, strict=True)
    ]


def token_borders(
    times: Sequence[int], duration: float, frame_shift: float = 0.04, max_token_duration: float = 1.0
) -> list[tuple[float, float]]:
    """Start and end of each token in seconds from its peak frame (WeNet's rule).

    Borders are the midpoints between neighbouring peaks, at most half of ``max_token_duration`` from a peak.

    Args:
        times: peak frame of each token, ascending.
        duration: length of the recording in seconds.
        frame_shift: seconds per encoder frame.
        max_token_duration: seconds.
    """
    half = max_token_duration / 2
    peaks = [time * frame_shift for time in times]
    middles = [(a + b) / 2 for a, b in pairwise(peaks)]
    lefts, rights = [0.0, *middles], [*middles, duration]
    return [
        (max(left, peak - half), min(right, peak + half))
        for left, peak, right in zip(lefts, peaks, rights, strict=False)
    ]
