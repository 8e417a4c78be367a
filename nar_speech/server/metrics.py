"""Prometheus metrics of the server and of its engine."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from nar_speech.engine.stats import EngineStats, HistogramStats

PREFIX = "nar_speech_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
LATENCY_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)


class Metrics:
    """Everything that is counted. Every server has a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # a series for each series, which nobody reads
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, processor time, open files

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        self.requests = Histogram(
            PREFIX + "request_duration_seconds",
            "Requests and WebSocket connections, by protocol, kind and outcome",
            ("api", "mode", "outcome"),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.first_partial = Histogram(
            PREFIX + "time_to_first_partial_seconds",
            "From the first audio of a live stream to its first text",
            ("api",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.connections = Gauge(
            PREFIX + "connections_active", "WebSocket and Wyoming clients", ("api",), registry=registry
        )
        self.waiting = Gauge(
            PREFIX + "uploads_waiting", "Files that wait to be recognised", registry=registry
        )
        self.running = Gauge(PREFIX + "uploads_running", "Files being recognised", registry=registry)
        self.draining = Gauge(PREFIX + "draining", "1 while the server shuts down", registry=registry)
        self.connections_total = counter("connections_total", "Clients that were let in", "api")
        self.admitted = counter("requests_admitted_total", "Requests that were let in", "api")
        self.rejected = counter(
            "requests_rejected_total", "Requests refused, by HTTP status", "api", "status"
        )
        self.audio_seconds = counter("audio_seconds_total", "Audio that came in", "api")
        self.segments = counter("segments_emitted_total", "Finished segments", "api", "source")
        self.errors = counter("errors_total", "Failures of the server itself", "api")
        self.slow_readers = counter("slow_readers_total", "Clients cut off for not reading", "api")

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        """Publish what ``stats()`` says, each time somebody asks."""
        self.registry.register(_EngineCollector(stats))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


# Field of the engine's statistics -> name of the metric; names that end in _total only grow.
_WHOLE = {
    "uptime": "uptime_seconds",
    "crashes": "crashes_total",
    "busy_seconds": "busy_seconds_total",
    "events": "events_total",
    "events_waiting": "events_waiting",
    "callback_errors": "callback_errors_total",
    "slow_callbacks": "slow_callbacks_total",
}
_ONLINE = {
    "sessions": "running",
    "opened": "sessions_opened_total",
    "closed": "sessions_closed_total",
    "refused": "sessions_refused_total",
    "slots": "slots",
    "slots_used": "slots_used",
    "state_bytes": "state_bytes",
    "steps": "steps_total",
    "graph_replays": "graph_replays_total",
    "eager_steps": "eager_steps_total",
    "chunks": "chunks_total",
    "padding": "padding_rows_total",
    "sizes": "batch_size",
    "step_seconds": "step_seconds",
    "latency": "latency_seconds",
    "deadline_misses": "deadline_misses_total",
    "audio_seconds": "audio_seconds_total",
    "lag_max": "lag_seconds_max",
    "lag_mean": "lag_seconds_mean",
    "failed_steps": "failed_steps_total",
    "poisoned": "poisoned_sessions_total",
    "back_pressure": "back_pressure_total",
}
_OFFLINE = {
    "waiting": "waiting",
    "waiting_seconds": "waiting_audio_seconds",
    "submitted": "jobs_submitted_total",
    "refused": "jobs_refused_total",
    "done": "jobs_done_total",
    "failed": "jobs_failed_total",
    "cancelled": "jobs_cancelled_total",
    "audio_seconds": "offline_audio_seconds_total",
    "padded_seconds": "offline_padded_seconds_total",
    "batch_seconds": "offline_batch_seconds",
}
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _EngineCollector:
    """Turns :class:`nar_speech.engine.EngineStats` into metrics when somebody asks."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self.stats = stats

    def describe(self) -> list[Metric]:
        """Nothing beforehand."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics of the engine."""
        stats = self.stats()
        heartbeat = GaugeMetricFamily(f"{PREFIX}engine_heartbeat_age_seconds", "Since its last round")
        heartbeat.add_metric([], stats.health.heartbeat_age)
        yield heartbeat
        for field, name in _WHOLE.items():
            family = _family(name, ())
            family.add_metric([], float(getattr(stats, field)))
            yield family
        for table, models in ((_ONLINE, stats.online), (_OFFLINE, stats.offline)):
            for field, name in table.items():
                values = {model: getattr(numbers, field) for model, numbers in models.items()}
                if values:
                    yield _of_models(name, values)


def _of_models(name: str, values: Mapping[str, Any]) -> Metric:
    """One metric with the label ``model``; tables get a label more, batch sizes are a histogram."""
    first = next(iter(values.values()))
    if isinstance(first, HistogramStats) or name == "batch_size":
        family = HistogramMetricFamily(f"{PREFIX}engine_{name}", name.replace("_", " "), labels=["model"])
        for model, value in values.items():
            stats = sizes_histogram(value) if isinstance(value, Mapping) else value
            steps = itertools.accumulate(stats.counts)
            bounds = [*map(str, stats.bounds), "+Inf"]
            family.add_metric([model], list(zip(bounds, steps, strict=True)), stats.total)
        return family
    family = _family(name, ("model", "reason") if isinstance(first, Mapping) else ("model",))
    for model, value in values.items():
        if isinstance(value, Mapping):
            for reason, count in value.items():
                family.add_metric([model, reason], float(count))
        else:
            family.add_metric([model], float(value))
    return family


def _family(name: str, labels: tuple[str, ...]) -> Any:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(f"{PREFIX}engine_{name}", name.replace("_", " "), labels=list(labels))


def sizes_histogram(sizes: Mapping[int, int]) -> HistogramStats:
    """Batches by size, as a histogram."""
    counts = [0] * (len(SIZE_BUCKETS) + 1)
    for size, count in sizes.items():
        counts[bisect.bisect_left(SIZE_BUCKETS, size)] += count
    return HistogramStats(SIZE_BUCKETS, tuple(counts), float(sum(s * c for s, c in sizes.items())))
