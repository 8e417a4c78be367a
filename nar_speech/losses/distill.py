"""Distances between what a student and its teacher make of the same audio; a teacher needs no transcripts."""

from __future__ import annotations

import torch
from torch import Tensor

from nar_speech.errors import InputError

MOST_MORE = 4  # frames: encoders of one rate differ by what they make of the ends


def feature_distance(student: Tensor, teacher: Tensor, lengths: Tensor) -> Tensor:
    """Squared distance of two encoders' outputs, summed over frames, in float32 (FitNets, arXiv 1412.6550).

    Args:
        student: (B, T, D), with gradient.
        teacher: (B, T', D) of the same frame rate, T' from T to T + 4; frames beyond T are not compared.
        lengths: (B,) valid frames of the student.

    Returns:
        scalar: the mean over utterances of the sum over frames of the mean over D.

    Raises:
        InputError: widths that differ, a teacher with fewer frames, or with those of another rate.
    """
    batch, frames, width = student.shape
    if teacher.shape[::2] != (batch, width) or not 0 <= teacher.shape[1] - frames <= MOST_MORE:
        raise InputError(
            f"teacher: outputs {tuple(teacher.shape)} do not cover the student's {tuple(student.shape)}; "
            "both need the same sample rate, frame rate and width"
        )
    squares = (student.float() - teacher[:, :frames].detach().float()).square().mean(-1)
    valid = torch.arange(frames, device=student.device) < lengths[:, None]
    return squares.masked_fill(~valid, 0.0).sum() / max(batch, 1)
