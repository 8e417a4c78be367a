"""Sounds put together without clicks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FADE_SECONDS = 0.01


def join_pieces(
    pieces: Sequence[np.ndarray], sample_rate: int, pause: float
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Pieces (N,) with ``pause`` seconds of silence between them, into which they fade; one stays as it is.

    Returns:
        (N',) float32, and where each piece begins and ends, in samples.
    """
    silence = np.zeros(round(pause * sample_rate), np.float32)
    parts: list[np.ndarray] = []
    places: list[tuple[int, int]] = []
    at = 0
    for number, piece in enumerate(pieces):
        piece = piece.astype(np.float32)
        size = min(round(FADE_SECONDS * sample_rate), len(piece) // 2)
        ramp = (np.arange(size, dtype=np.float32) + 0.5) / max(size, 1)
        if number > 0:
            parts.append(silence)
            at += len(silence)
            piece[:size] *= ramp
        if number + 1 < len(pieces):
            piece[len(piece) - size :] *= ramp[::-1]
        parts.append(piece)
        places.append((at, at + len(piece)))
        at += len(piece)
    return np.concatenate(parts), places


def replace_part(
    recording: np.ndarray, part: np.ndarray, begin: int, end: int, fade: int
) -> tuple[np.ndarray, int]:
    """A recording with ``part`` in place of its samples ``begin`` to ``end``.

    All other samples stay as they are: both sounds fade into each other inside of the part, where the
    recording goes on for ``fade`` samples behind ``begin`` and comes back so long before ``end``.

    Args:
        recording: (C, N) float32. part: (M,) float32, for every channel.

    Returns:
        (C, N - end + begin + M) float32, and the samples of either fade.
    """
    size = max(min(fade, len(part) // 2, (end - begin) // 2), 0)
    new = np.repeat(part[None].astype(np.float32), len(recording), axis=0)
    ramp = (np.arange(size, dtype=np.float32) + 0.5) / max(size, 1)
    if begin > 0 and size:
        new[:, :size] = ramp * new[:, :size] + (1 - ramp) * recording[:, begin : begin + size]
    if end < recording.shape[1] and size:
        old = recording[:, end - size : end]
        new[:, new.shape[1] - size :] = ramp[::-1] * new[:, new.shape[1] - size :] + (1 - ramp[::-1]) * old
    return np.concatenate([recording[:, :begin], new, recording[:, end:]], axis=1), size
