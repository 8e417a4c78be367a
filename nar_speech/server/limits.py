"""What each key has used: streams open now, requests a minute, minutes of audio a day."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nar_speech.server.api_error import ApiError
from nar_speech.server.auth import Identity

DAY, MINUTE = 86_400.0, 60.0


@dataclass
class Bucket:
    """Holds ``size``, refills evenly over ``period`` seconds; goes below zero by what was not foreseen."""

    size: float
    period: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        """Add what has come since the last look."""
        self.level = min(self.size, self.level + (now - self.at) * self.size / self.period)
        self.at = now

    def wait(self, amount: float) -> float:
        """Seconds until ``amount`` is there."""
        rate = self.size / self.period
        return max(amount - self.level, 0.0) / rate if rate > 0 else self.period


class Usage:
    """Counts and refuses. Belongs to the event loop: not for several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.streams: dict[str, int] = {}
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def _bucket(self, who: Identity, kind: str, size: float, period: float) -> Bucket:
        now = self.clock()
        bucket = self._buckets.setdefault((who.name, kind), Bucket(size, period, size, now))
        bucket.refill(now)
        return bucket

    def request(self, who: Identity) -> None:
        """Count a request.

        Raises:
            ApiError: 429, the key has had its requests of this minute or its audio of this day.
        """
        if who.limits.minutes is not None:
            bucket = self._bucket(who, "minutes", who.limits.minutes, DAY)
            if bucket.level <= 0:
                raise _used_up(f"{who.limits.minutes:g} minutes of audio a day", bucket.wait(0.01))
        if who.limits.requests is not None:
            bucket = self._bucket(who, "requests", who.limits.requests, MINUTE)
            if bucket.level < 1:
                raise _used_up(f"{who.limits.requests:g} requests a minute", bucket.wait(1))
            bucket.level -= 1

    def audio(self, who: Identity, seconds: float) -> None:
        """Count audio that is about to be recognised.

        Raises:
            ApiError: 429, there is no audio left of this day.
        """
        if who.limits.minutes is None or seconds <= 0:
            return
        bucket = self._bucket(who, "minutes", who.limits.minutes, DAY)
        if bucket.level <= 0:
            raise _used_up(f"{who.limits.minutes:g} minutes of audio a day", bucket.wait(0.01))
        bucket.level -= seconds / 60

    @contextmanager
    def stream(self, who: Identity) -> Iterator[None]:
        """Hold one of the key's live streams.

        Raises:
            ApiError: 429, all are in use.
        """
        held = self.streams.get(who.name, 0)
        if who.limits.streams is not None and held >= who.limits.streams:
            message = f"this key may have {who.limits.streams} streams at once and has them open; close one"
            raise ApiError(429, message, "rate_limit_exceeded", retry_after=1)
        self.streams[who.name] = held + 1
        try:
            yield
        finally:
            self.streams[who.name] -= 1
            if not self.streams[who.name]:
                del self.streams[who.name]


def _used_up(what: str, seconds: float) -> ApiError:
    return ApiError(429, f"this key has used its {what}", "rate_limit_exceeded", retry_after=seconds)
