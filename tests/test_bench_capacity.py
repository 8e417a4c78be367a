"""The search for the number of streams that an engine holds, without an engine."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.cli import main
from nar_speech.engine.stats import HistogramStats
from nar_speech.server import bench
from nar_speech.server.bench import EngineView, Log, capacity, find_capacity, report, thinned, within

BUDGET = 0.05


def run_of(streams: int, latency: float = 0.01, misses: int = 0, paced: bool = True) -> bench.Report:
    """A report of a run whose chunks all had this latency."""
    view = EngineView(HistogramStats((latency,), (1000, 0), 0.0), misses, 1000, 100, 1.0, 0.0)
    return report(streams, paced, 10.0, Log(), [1 << 20, 3 << 20, 2 << 20], "en", view)


def test_a_run_is_within_the_budget():
    assert within(run_of(1), BUDGET)
    assert within(run_of(1, latency=BUDGET), BUDGET)
    assert not within(run_of(1, latency=0.06), BUDGET)
    assert within(run_of(1, misses=1), BUDGET)
    assert not within(run_of(1, misses=2), BUDGET)
    assert not within(run_of(1, paced=False), BUDGET)


@settings(deadline=None)
@given(true=st.integers(0, 700), first=st.integers(1, 300), most=st.integers(1, 600))
def test_finds_it_to_a_sixteenth(true, first, most):
    tried = []

    def run(streams):
        tried.append(streams)
        return run_of(streams, latency=0.02 if streams <= true else 0.08)

    found = capacity(find_capacity(run, first, most, BUDGET), BUDGET)
    best = min(true, most)
    assert best - max(1, best // 16) < found <= best or found == best
    assert len(set(tried)) == len(tried)
    assert max(tried) <= most
    assert min(tried) >= 1


def test_memory_over_time_is_kept_and_bounded():
    assert run_of(1).rss_series == (1 << 20, 3 << 20, 2 << 20)
    assert thinned(range(1000))[:3] == (0, 5, 10)
    assert len(thinned(range(100_000))) <= bench.SERIES


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr("nar_speech.server.command.need_extra", lambda purpose: None)
    monkeypatch.setattr(bench, "read_corpus", lambda source, rate: [])
    stream = SimpleNamespace(sample_rate=16000)
    monkeypatch.setattr(
        "nar_speech.server.models.load_stream_model", lambda *options: ("toy", stream, {"endpoint": False})
    )
    paced = []

    def run(models, key, corpus, n, seconds, pace, *rest):
        paced.append(pace)
        return run_of(n, latency=0.01 if n <= 5 else 0.06)

    monkeypatch.setattr(bench, "bench_engine", run)
    words = ["bench", "streams", "--find-capacity", "--n", "2"]
    assert main(words) == 0
    assert "capacity: 5 streams" in capsys.readouterr().out
    assert set(paced) == {True}
    assert main([*words, "--json", "--budget-ms", "80", "--most", "8"]) == 0
    assert [run["streams"] for run in json.loads(capsys.readouterr().out)] == [2, 4, 8]
    assert main(["bench", "streams", "--find-capacity", "--n", "2,4"]) == 2
    assert "begins with one number" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--budget-ms", "0"], ["--most", "0"]])
def test_refuses_limits_that_are_none(words, capsys):
    assert main(["bench", "streams", "--find-capacity", *words]) == 2
    assert words[0] in capsys.readouterr().err
