"""The audio of one session that the network has not heard yet, and the part of it that must be kept."""

from __future__ import annotations

from collections import deque

import numpy as np

BLOCK = 4096  # samples of one block: however small the pieces that are fed, memory follows the audio
SAME_TIME = 0.005  # s; pieces that come within this count as come together, at the time of the last


class AudioBuffer:
    """A queue of samples that knows when each of them came. Positions are samples of stream time.

    Not locked: :class:`nar_speech.engine.session.Session` does that.
    """

    def __init__(self, consumed: int = 0):
        self.received = consumed
        self.consumed = consumed
        self._blocks: deque[np.ndarray] = deque()
        self._first = 0  # samples of the first block that were taken
        self._filled = BLOCK  # samples of the last block that are valid
        self._arrivals: deque[list[float]] = deque()  # [samples received by then, time, time of the first]

    @property
    def available(self) -> int:
        """Samples that wait."""
        return self.received - self.consumed

    def append(self, samples: np.ndarray, now: float) -> None:
        """Copy (N,) float32 samples that came at ``now``."""
        done = 0
        while done < len(samples):
            if self._filled == BLOCK:
                self._blocks.append(np.empty(BLOCK, dtype=np.float32))
                self._filled = 0
            count = min(BLOCK - self._filled, len(samples) - done)
            self._blocks[-1][self._filled : self._filled + count] = samples[done : done + count]
            self._filled += count
            done += count
        self.received += len(samples)
        last = self._arrivals[-1] if self._arrivals else None
        if last is not None and now - last[2] < SAME_TIME:
            last[0], last[1] = self.received, now
        elif len(samples):
            self._arrivals.append([self.received, now, now])

    def take(self, count: int) -> np.ndarray:
        """Remove the first ``count`` <= ``available`` samples; (count,) float32, the caller's own."""
        taken = np.empty(count, dtype=np.float32)
        done = 0
        while done < count:
            block = self._blocks[0]
            part = block[self._first : self._first + count - done]
            taken[done : done + len(part)] = part
            self._first += len(part)
            done += len(part)
            if self._first == BLOCK:
                self._blocks.popleft()
                self._first = 0
        self.consumed += count
        if self.consumed == self.received:
            self._blocks.clear()
            self._first, self._filled = 0, BLOCK
        while self._arrivals and self._arrivals[0][0] <= self.consumed:
            self._arrivals.popleft()
        return taken

    def arrival(self, end: int) -> float:
        """When the sample before position ``end`` (consumed < end <= received) came."""
        return next(mark[1] for mark in self._arrivals if mark[0] >= end)

    def peek(self) -> np.ndarray:
        """All samples that wait, as a copy."""
        blocks = list(self._blocks)
        if not blocks:
            return np.zeros(0, dtype=np.float32)
        blocks[-1] = blocks[-1][: self._filled]
        blocks[0] = blocks[0][self._first :]
        return np.concatenate(blocks)


class History:
    """The last samples that were heard, for a second pass; at most ``limit`` of them."""

    def __init__(self, limit: int, start: int = 0):
        self.limit = limit
        self.start = self.end = start
        self._parts: deque[np.ndarray] = deque()

    def append(self, samples: np.ndarray) -> None:
        """Add what was heard next."""
        self._parts.append(samples)
        self.end += len(samples)
        self.drop(self.end - self.limit)

    def drop(self, position: int) -> None:
        """Forget what comes before ``position``, where that frees memory."""
        while self._parts and self.start + len(self._parts[0]) <= position:
            self.start += len(self._parts.popleft())

    def get(self, start: int, end: int) -> np.ndarray:
        """Samples [start, end) of stream time, as far as they are kept."""
        begin = max(start - self.start, 0)
        parts, position = [], 0
        for part in self._parts:
            parts.append(part[max(begin - position, 0) : max(end - self.start - position, 0)])
            position += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
