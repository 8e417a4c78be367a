"""Clips longer than what a model sees at once: windows one after the other, with known frames around."""

from __future__ import annotations

import numpy as np


def next_window(given: np.ndarray, most: int, context: int) -> tuple[int, int] | None:
    """The next frames that are sampled together.

    The first stretch of unknown frames is taken. If it fits into a window with ``context`` known frames, the
    window is laid around it with known frames on both sides, as evenly as there are any; else the window
    begins ``context`` known frames before it and takes as much of it as there is room for.

    Args:
        given: (T,) bool, frames that are known.
        most: frames of a window.
        context: known frames wanted before a stretch that is too long for one window; below ``most``.

    Returns:
        (begin, end), or None where every frame is known.
    """
    unknown = np.flatnonzero(~given)
    if not len(unknown):
        return None
    total, first = len(given), int(unknown[0])
    known_after = np.flatnonzero(given[first:])
    last = first + int(known_after[0]) if len(known_after) else total
    size = last - first
    before = min(first, context)
    if size + before <= most:
        room = most - size
        after = min(total - last, room // 2)
        before = min(first, room - after)
        after = min(total - last, room - before)
        return first - before, last + after
    begin = first - before
    return begin, min(begin + most, total)


def count_windows(given: np.ndarray, most: int, context: int) -> int:
    """How many windows it takes."""
    given, count = given.copy(), 0
    while (window := next_window(given, most, context)) is not None:
        given[window[0] : window[1]] = True
        count += 1
    return count
