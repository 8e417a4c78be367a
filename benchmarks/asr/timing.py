"""Times of calls that take turns, the machine's description, peak memory."""

from __future__ import annotations

import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def timed(function: Callable[[], object]) -> tuple[object, float, float]:
    """Result, CPU seconds of the process, wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median CPU and wall seconds of each call; in every repeat each takes its turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            _, cpu, wall = timed(call)
            times[name].append((cpu, wall))
    return {name: medians(rows) for name, rows in times.items()}


def medians(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Median of both columns."""
    cpu, wall = zip(*rows, strict=True)
    return statistics.median(cpu), statistics.median(wall)


def machine(packages: Sequence[str]) -> str:
    """Date, CPU and versions of a run, one line; packages that are not installed are left out."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    cpu = f"{next(names, platform.processor())} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{time.strftime('%Y-%m-%d')}, {cpu}, Python {platform.python_version()}, {', '.join(versions)}"


def load() -> str:
    """Other work on the machine: the mean number of running processes in the last minute."""
    try:
        return f"{float(Path('/proc/loadavg').read_text().split()[0]):.1f}"
    except (OSError, ValueError):
        return "not known"


def own_peak() -> int:
    """Most bytes this process held in memory. getrusage would count the parent's as well, after a vfork."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
