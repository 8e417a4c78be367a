"""Token times from the weights and the fire track of a CIF predictor.

The rules are those of FunASR's ``ts_prediction_lfr6_standard``: a token lasts from its fire to the next one,
long tokens are cut, and silence is marked before, between and after tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SILENCE = "<sil>"
END_OF_SENTENCE = "</s>"
FIRE = 1 - 1e-4  # a track value from here on is the end of a token
FIRE_SHIFT = -1.5  # frames; the fire comes this much after the token begins
MAX_TOKEN_FRAMES = 12  # what is longer is followed by silence
EDGE_FRAMES = 5  # silence at the beginning and the end is longer than this


class TimedText(NamedTuple):
    """A token, or ``<sil>``, and its times in seconds."""

    text: str
    start: float
    end: float


def fire_frames(alphas: Tensor, peaks: Tensor, count: int, official: bool = False) -> np.ndarray:
    """Frames at which ``count`` tokens end.

    They are read off the track where it shows as many; otherwise the weights are scaled to sum to ``count``
    and cut anew.

    Args:
        alphas: (T,) weights; not changed.
        peaks: (T,) fire track.
        official: cut anew as the official loop does, which can't place two ends in one frame and may find
            fewer than ``count``.

    Returns:
        (count,) int64, not decreasing; spread evenly where all weights are zero.
    """
    found = torch.nonzero(peaks >= FIRE).flatten()
    if len(found) == count:
        return found.cpu().numpy()
    sums = alphas.detach().cpu().double().cumsum(0)
    total = float(sums[-1]) if len(sums) else 0.0
    if total <= 0:
        return np.arange(1, count + 1) * len(alphas) // (count + 1)
    if official:
        worth = (sums * (count / total) / FIRE).floor()
        frames = torch.arange(1, len(sums) + 1, dtype=torch.float64)
        fired = frames + (worth - frames).cummin(dim=0).values.clamp_max(0)  # one end a frame at most
        return torch.nonzero(fired.diff(prepend=fired.new_zeros(1)) > 0).flatten().numpy()
    goals = torch.arange(1, count + 1, dtype=torch.float64) * FIRE
    places = torch.searchsorted(sums * (count / total), goals)
    return places.clamp_max(len(alphas) - 1).numpy()


def fire_times(
    alphas: Tensor,
    peaks: Tensor,
    tokens: Sequence[str],
    frame_seconds: float = 0.02,
    offset: float = 0.0,
    shift: float = FIRE_SHIFT,
    mark_silence: bool = True,
    official: bool = False,
) -> list[TimedText]:
    """Times of tokens, silences in between.

    Args:
        alphas: (T,) CIF weights of one utterance, without padding; not changed.
        peaks: (T,) their fire track. There is one fire more than tokens: that of the end of the sentence.
        tokens: texts of the tokens; a last ``</s>`` is dropped.
        frame_seconds: duration of a frame of ``alphas``.
        offset: seconds added to all times, the start of the utterance in a longer recording.
        shift: frames added to every fire.
        mark_silence: return the silences too, as ``<sil>``.
        official: see :func:`fire_frames`; the last tokens are dropped where it finds too few ends.

    Returns:
        In order of time. With tokens whose fires are near the beginning, times may be below ``offset`` by
        ``shift`` frames.
    """
    names = list(tokens)
    if names and names[-1] == END_OF_SENTENCE:
        names.pop()
    if not tokens or len(alphas) == 0:
        return []
    fires = (fire_frames(alphas, peaks, len(names) + 1, official) + shift).tolist()
    spans: list[list] = []
    if fires[0] > EDGE_FRAMES:
        spans.append([SILENCE, 0.0, fires[0] * frame_seconds])
    for name, begin, end in zip(names, fires, fires[1:], strict=False):
        cut = min(end, begin + MAX_TOKEN_FRAMES)
        spans.append([name, begin * frame_seconds, cut * frame_seconds])
        if cut < end:
            spans.append([SILENCE, cut * frame_seconds, end * frame_seconds])
    frames = len(alphas)
    if frames - fires[-1] > EDGE_FRAMES:
        middle = (frames + fires[-1]) * 0.5 * frame_seconds
        if spans:
            spans[-1][2] = middle
        spans.append([SILENCE, middle, frames * frame_seconds])
    elif spans:
        spans[-1][2] = frames * frame_seconds
    if offset:
        spans = [[name, begin + offset, end + offset] for name, begin, end in spans]
    return [TimedText(*span) for span in spans if mark_silence or span[0] != SILENCE]


def token_times(
    alphas: Tensor, peaks: Tensor, tokens: int, frame_seconds: float, offset: float = 0.0
) -> tuple[list[float], list[float]]:
    """Start and end in seconds of ``tokens`` tokens, never before ``offset``; see :func:`fire_times`.

    Args:
        alphas, peaks: (T,) of one utterance without padding.
        frame_seconds: duration of a frame of ``alphas``: 0.06 for CIF weights at the encoder's rate in
            FunASR's models, a third of that for those of a time stamp head.
    """
    spans = fire_times(alphas, peaks, [""] * tokens, frame_seconds, mark_silence=False)
    starts = [max(span.start, 0.0) + offset for span in spans]
    ends = [max(span.end, 0.0) + offset for span in spans]
    return starts, ends
