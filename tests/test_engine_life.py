"""From open to Closed: limits, deadlines, fairness, eviction, drain, memory."""

import gc
import sys
import threading
import tracemalloc
import weakref

import numpy as np
import pytest

from benchmarks.toy_models import ToyBatch, ToyStream
from nar_speech.engine import Closed, Engine, EngineOptions, Final
from nar_speech.errors import BackPressure, ConfigError, EngineBusy, EngineError, SessionClosed
from tests.engine_reference import Clock, alone, inline, noise, opened, size_of


def test_back_pressure_loses_nothing():
    model = ToyStream()
    engine = inline(model)
    session, events = opened(engine, backlog=0.1)  # 1600 samples
    audio = noise(4, 5000)
    session.feed(audio[:1500])
    with pytest.raises(BackPressure):
        session.feed(audio[1500:2800])
    engine.run_until_idle()
    session.feed(audio[1500:2800])
    engine.run_until_idle()
    for place in (2800, 3900):
        session.feed(audio[place : place + 1100])
        engine.run_until_idle()
    session.finish()
    engine.run_until_idle()
    assert events == [*alone(model, audio, size=size_of(engine)), Closed("finished")]
    assert engine.stats().online["toy"].back_pressure == 1


def test_a_client_that_does_not_take_its_events_is_not_stepped():
    engine = inline(max_events=4)
    session, _ = opened(engine)
    engine._core._run_commands()
    outlet = engine._core.streams[session.id].outlet
    session.feed(noise(0, 3200))
    outlet.delivered -= 5  # as if five were still on their way
    engine.run_until_idle()
    assert session.lag == 0.2
    outlet.delivered += 5
    outlet.drained()
    engine.run_until_idle()
    assert session.lag == 0


@pytest.mark.parametrize(("limits", "reason"), [({"idle": 5.0}, "idle"), ({"longest": 12.0}, "limit")])
def test_eviction_finishes_what_was_heard(limits, reason):
    clock, model = Clock(), ToyStream()
    engine = inline(model, clock)
    session, events = opened(engine, **limits)
    for i in range(4):
        session.feed(noise(i, 400))
        engine.run_until_idle()
        clock.now += 3.0
        engine.tick()
    assert session.closed is None
    clock.now += 3.0
    engine.tick()
    engine.run_until_idle()
    audio = np.concatenate([noise(i, 400) for i in range(4)])
    assert events == [*alone(model, audio, size=size_of(engine)), Closed(reason)]
    assert engine.stats().online["toy"].closed == {reason: 1}


def test_places_are_bounded_and_come_back():
    engine = inline(max_sessions=2)
    first, _ = opened(engine)
    opened(engine)
    with pytest.raises(EngineBusy, match="all 2 places") as caught:
        opened(engine)
    assert caught.value.retry_after > 0
    first.cancel()
    engine.run_until_idle()
    opened(engine)
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        opened(inline(), {"colour": "red"})
    assert engine.stats().online["toy"].refused == 1
    with pytest.raises(EngineError, match="known: toy"):
        opened(engine, model="other")
    assert engine.sessions == 2


def test_options_that_are_refused_take_no_place():
    engine = inline(max_sessions=1)
    for _ in range(3):
        with pytest.raises(ConfigError):
            opened(engine, {"colour": "red"})
    opened(engine)


def test_a_thousand_sessions_in_sequence_leave_nothing_behind():
    engine = inline(max_sessions=4, buckets=(4,))
    audio = noise(0, 700)
    references = []
    for i in range(1000):
        session, events = opened(engine)
        references.append(weakref.ref(session))
        session.feed(audio)
        (session.cancel if i % 7 == 0 else session.finish)()
        engine.run_until_idle()
        assert isinstance(events[-1], Closed)
        if i == 850:
            gc.collect()
            tracemalloc.start()
    gc.collect()
    left = tracemalloc.get_traced_memory()[0]  # of what was allocated since
    tracemalloc.stop()
    core = engine._core
    assert not core.streams
    assert not core._touched
    assert (core.lanes["toy"].store.size, core.lanes["toy"].store.used) == (4, 0)
    assert left < 120_000  # PyTorch's own pools of small objects, however many sessions
    assert not any(reference() for reference in references[:-1])
    assert engine.stats().online["toy"].opened == 1000


def test_deadline_misses_and_latency_follow_the_clock():
    clock = Clock()
    engine = inline(clock=clock)
    session, _ = opened(engine)
    for delay in (0.001, 0.015, 0.05):  # a chunk is 0.02 s
        session.feed(noise(0, 320))
        clock.now += delay
        engine.run_until_idle()
        clock.now += 1.0
    stats = engine.stats().online["toy"]
    assert stats.deadline_misses == 1
    assert stats.latency.total == pytest.approx(0.066)
    assert stats.audio_seconds == pytest.approx(0.06)


def test_drain_waits_then_finishes_then_closes():
    with Engine({"toy": ToyStream(), "batch": ToyBatch()}, EngineOptions(max_sessions=8)) as engine:
        session, events = opened(engine)
        session.feed(noise(0, 500))
        job = engine.submit("batch", noise(0, 500))
        assert engine.drain(timeout=0.2)
        assert isinstance(events[-2], Final)
        assert events[-1] == Closed("drained")
        assert job.result().startswith("500:")
        for refused in (lambda: opened(engine), lambda: engine.submit("batch", noise(0, 5))):
            with pytest.raises(EngineBusy, match="draining"):
                refused()
        assert engine.health().alive
        assert engine.health().reason == "draining"
        assert engine.drain()


def test_drain_lets_sessions_end_by_themselves():
    with Engine({"toy": ToyStream()}, EngineOptions(max_sessions=8)) as engine:
        session, events = opened(engine)
        timer = threading.Timer(0.2, session.finish)
        timer.start()
        assert engine.drain(timeout=60.0)
        assert events == [Closed("finished")]


def test_threads_that_run_python_let_the_engine_in_while_it_lives():
    before = sys.getswitchinterval()
    with Engine({"toy": ToyStream()}, EngineOptions(max_sessions=2, buckets=(1,))):
        assert sys.getswitchinterval() == pytest.approx(2e-5)
    assert sys.getswitchinterval() == before


def test_close_tells_every_session():
    engine = Engine({"toy": ToyStream()}, EngineOptions(max_sessions=8)).start()
    pairs = [opened(engine) for _ in range(3)]
    engine.close()
    engine.close()
    assert [events for _, events in pairs] == [[Closed("shutdown")]] * 3
    with pytest.raises(SessionClosed, match="shutdown"):
        pairs[0][0].feed(noise(0, 10))
    with pytest.raises(EngineError, match="closed"):
        opened(engine)
    assert not engine.health().alive


def test_live_streams_are_in_time_while_files_wait():
    """A batch takes 5 ms and has four rows; twelve files of 10 s came before; two live streams of 20 ms."""
    clock, model = Clock(), ToyStream()
    engine = inline(model, clock, buckets=(4,))
    step = model.step

    def slow(*inputs):
        clock.now += 0.005
        return step(*inputs)

    model.step = slow
    files = [opened(engine) for _ in range(12)]
    for number, (session, _) in enumerate(files):
        session.feed(noise(number, 160_000))
        session.finish()
    live = [opened(engine) for _ in range(2)]
    for number in range(40):
        for session, _ in live:
            session.feed(noise(number, 320))
        begun = clock.now
        while clock.now < begun + 0.02:
            assert engine.tick()  # never idle
        assert [session.lag for session, _ in live] == [0.0, 0.0]
    heard = [160_000 / 16_000 - session.lag for session, _ in files]
    assert sum(heard) >= 0.9 * (40 * 4 * 4 - 80) * 0.02  # the files have all the rest
    assert max(heard) - min(heard) <= 0.0401  # and share it evenly
