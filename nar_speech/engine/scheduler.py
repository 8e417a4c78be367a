"""Which streams of which model are stepped next: earliest deadline first. No threads, no clock."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

CATCH_UP = 0.9  # least distance of a live stream's deadlines, in chunk lengths
YIELD = 4.0  # the same for audio that was fed ahead of time
SMOOTHING = 0.2  # share of the newest step in the estimate of what a step costs


class Pace:
    """When the chunks of one stream are due.

    A chunk that has come at time a is due at a + chunk length. But of a file that is uploaded at once all
    chunks have come at the same time, and in a busy engine they would all be served before any live one.
    So a stream has no more than its share where others need the device (as in constant bandwidth servers:
    Abeni and Buttazzo, RTSS 1998): chunks that came ahead of time, earlier than anybody could have spoken
    them, count as four chunk lengths apart, and those of a live stream that was held up as 0.9 apart, until
    it has caught up. What nobody else needs is theirs all the same, as the device is never left idle.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._last = float("-inf")
        self._ahead = False

    def next(self, arrival: float, ahead: bool = False) -> float:
        """The deadline of the chunk that has come at ``arrival``; ``ahead`` of time if it is no live one."""
        if ahead:
            self._last = max(arrival, self._last + YIELD * self.seconds)
        elif self._ahead:
            self._last = arrival
        else:
            self._last = max(arrival, self._last + CATCH_UP * self.seconds)
        self._ahead = ahead
        return self._last + self.seconds


@dataclass(frozen=True)
class Batch:
    """Streams of one model to step now, most urgent first, in a batch of ``size`` rows."""

    model: str
    streams: list[Hashable]
    size: int


@dataclass
class _Queue:
    """The ready streams of one model."""

    sizes: tuple[int, ...]
    useful: int
    heap: list[tuple[float, int, Hashable]] = field(default_factory=list)  # deadline, number, stream
    numbers: dict[Hashable, int] = field(default_factory=dict)  # of those that wait; others in heap are gone
    open: int = 0
    since: float = 0.0  # since when streams wait without a break
    passed: int = 0  # times in a row that another model was taken although this one had ready streams
    costs: dict[int, float] = field(default_factory=dict)

    def head(self) -> tuple[float, int, Hashable] | None:
        """The entry with the earliest deadline."""
        while self.heap and self.numbers.get(self.heap[0][2]) != self.heap[0][1]:
            heapq.heappop(self.heap)
        return self.heap[0] if self.heap else None

    def cost(self, size: int) -> float:
        """Seconds of a step, measured or in proportion to the nearest measured size; 0 if none was."""
        if not self.costs:
            return 0.0
        if size not in self.costs:
            near = min(self.costs, key=lambda known: (abs(known - size), known))
            return self.costs[near] * size / near
        return self.costs[size]

    def size_for(self, count: int) -> int:
        """The batch size for ``count`` ready streams: padded up, or the smaller one and another step."""
        up = next((size for size in self.sizes if size >= count), self.sizes[-1])
        down = max((size for size in self.sizes if size <= count), default=up)
        if down == up or not self.costs:
            return up
        rest = next(size for size in self.sizes if size >= count - down)
        return down if self.cost(down) + self.cost(rest) < self.cost(up) else up


class Scheduler:
    """Queues of ready streams of several models.

    It never leaves the device idle while a stream is ready, with one exception: a batch smaller than
    ``useful`` waits up to ``fill_wait`` seconds for others if no deadline is near. A stream is in a batch at
    most once, and ready again only when the engine says so. The model with the earliest deadline goes first,
    but one with ready streams is passed over at most as often as there are models.
    """

    def __init__(self, fill_wait: float = 0.005):
        self.fill_wait = fill_wait
        self._queues: dict[str, _Queue] = {}
        self._number = 0

    def add_model(self, name: str, sizes: Sequence[int], useful: int, costs: dict[int, float]) -> None:
        """Make a queue. sizes: batch sizes; costs: seconds of a step by batch size, as far as known."""
        self._queues[name] = _Queue(tuple(sorted(sizes)), useful, costs=dict(costs))

    def opened(self, name: str, count: int = 1) -> None:
        """Note that ``count`` more (or fewer) streams of a model are open: others may still become ready."""
        self._queues[name].open += count

    def add(self, name: str, stream: Hashable, deadline: float, now: float) -> None:
        """A stream is ready. It must not be in the queue already."""
        queue = self._queues[name]
        if not queue.numbers:
            queue.since = now
        self._number += 1
        queue.numbers[stream] = self._number
        heapq.heappush(queue.heap, (deadline, self._number, stream))

    def discard(self, name: str, stream: Hashable) -> None:
        """Take a stream out, if it is in."""
        self._queues[name].numbers.pop(stream, None)

    def ready(self, name: str) -> int:
        """Streams that wait."""
        return len(self._queues[name].numbers)

    def observe(self, name: str, size: int, seconds: float) -> None:
        """Learn what a step of ``size`` rows took."""
        costs = self._queues[name].costs
        costs[size] = (1 - SMOOTHING) * costs.get(size, seconds) + SMOOTHING * seconds

    def cost(self, name: str, size: int) -> float:
        """Seconds that a step of ``size`` rows is expected to take."""
        return self._queues[name].cost(size)

    def next(self, now: float) -> Batch | float | None:
        """A batch to step now, or the seconds after which to ask again, or None if nothing is ready."""
        wait: float | None = None
        chosen: tuple[bool, float, str] | None = None
        for name, queue in self._queues.items():
            head = queue.head()
            if head is None:
                queue.passed = 0
                continue
            delay = self._delay(queue, head[0], now)
            if delay > 0:
                wait = delay if wait is None else min(wait, delay)
                continue
            key = (queue.passed < len(self._queues), head[0], name)
            chosen = key if chosen is None else min(chosen, key)
        if chosen is None:
            return wait
        for name, queue in self._queues.items():
            queue.passed = 0 if name == chosen[2] else queue.passed + (queue.head() is not None)
        return self._take(chosen[2])

    def _delay(self, queue: _Queue, deadline: float, now: float) -> float:
        """How much longer to wait for more streams."""
        count = len(queue.numbers)
        if count >= min(queue.useful, queue.open):
            return 0.0
        near = 2 * queue.cost(queue.size_for(count)) + self.fill_wait
        if deadline - now <= near:
            return 0.0
        return queue.since + self.fill_wait - now

    def _take(self, name: str) -> Batch:
        queue = self._queues[name]
        size = queue.size_for(len(queue.numbers))
        streams = []
        while len(streams) < size:
            head = queue.head()
            if head is None:
                break
            heapq.heappop(queue.heap)
            del queue.numbers[head[2]]
            streams.append(head[2])
        return Batch(name, streams, size)
