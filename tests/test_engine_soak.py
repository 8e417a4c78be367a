"""The load harness: briefly by default, for as long as NAR_SPEECH_SOAK_SECONDS says in the slow suite."""

import logging
import os

import numpy as np
import pytest

from benchmarks.soak import SoakReport, resident_bytes, soak, toy_audio, toy_poison
from benchmarks.toy_models import ToyBatch, ToyStream
from nar_speech.engine import Engine, EngineOptions
from tests.engine_reference import alone


def load(seconds: float, clients: int, **options) -> SoakReport:
    models = {"toy": ToyStream(chunk=1600), "batch": ToyBatch()}
    with Engine(models, EngineOptions(max_sessions=clients)) as engine:
        reference, size = ToyStream(chunk=1600), engine._core.lanes["toy"].sizes[0]

        def check(audio, marks, events):
            return events == alone(reference, audio, marks, size=size)

        report = soak(
            engine,
            "toy",
            seconds,
            offline="batch",
            clients=clients,
            check=check,
            poison=toy_poison,
            **{"audio": toy_audio, **options},
        )
        stats = engine.stats()
        assert stats.health.ready
        assert engine.sessions == 0
        assert stats.crashes == 0
    return report


def test_a_moment_of_mixed_load():
    def audio(numbers: np.random.Generator) -> np.ndarray:
        return toy_audio(numbers)[:8000]

    report = load(1.5, clients=6, audio=audio, pace=8.0)
    assert not report.errors
    assert not report.wrong
    assert report.offline
    assert sum(report.ends.values()) > 6


@pytest.mark.slow
@pytest.mark.timeout(0)  # as long as the variable says
def test_soak():
    logging.disable(logging.CRITICAL)  # pytest keeps what is logged, and so the memory would grow
    try:
        report = load(float(os.environ.get("NAR_SPEECH_SOAK_SECONDS", "120")), clients=12)
    finally:
        logging.disable(logging.NOTSET)
    print(report)
    assert not report.errors
    assert not report.wrong
    assert report.growth < 0.05
    kinds = {end.split()[0] for end in report.ends}
    assert kinds == {"finish", "commit", "move", "cancel", "vanish", "flood", "garbage", "poison", "raise"}


def test_growth_is_measured_after_settling():
    report = SoakReport(seconds=100.0, memory=[(float(t), 50 if t < 15 else 100) for t in range(101)])
    assert report.growth == 0.0
    report.memory = [(float(t), 1000 + 10 * t) for t in range(101)]
    assert report.growth == pytest.approx(1955 / 1245 - 1, rel=0.01)
    assert resident_bytes() > 1 << 20
    assert "growth" in str(report)
