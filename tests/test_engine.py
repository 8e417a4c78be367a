"""The streaming engine with a toy network: results, company, faults, several models."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.toy_models import ERROR_LEVEL, NAN_LEVEL, ToyBatch, ToyCollector, ToyStream
from nar_speech.engine import Closed, Engine, EngineOptions, Failed, Partial
from nar_speech.engine.core import DeviceLost
from nar_speech.errors import AudioError, ConfigError, EngineError, SessionClosed
from tests.engine_reference import Clock, Late, alone, finals, inline, noise, opened, size_of, wait_until

# Results.


@pytest.mark.parametrize("first", [320, 400, 160])
def test_a_stream_equals_the_reference(first):
    engine = inline(ToyStream(first=first))
    audio = noise(1, 3000)
    session, events = opened(engine, {"shift": 3})
    session.feed(audio[:1111])
    engine.run_until_idle()
    session.feed(audio[1111:1112])
    session.commit()
    session.feed(audio[1112:])
    session.finish()
    engine.run_until_idle()
    wanted = alone(ToyStream(first=first), audio, [1112], {"shift": 3}, size_of(engine))
    assert events == [*wanted, Closed("finished")]
    assert len(finals(events)) == 2
    assert session.closed == "finished"
    assert engine.sessions == 0


def test_the_same_alone_and_among_32_companions():
    model = ToyStream()
    engine = inline(model)
    sessions = [opened(engine, {"shift": i % 3}) for i in range(33)]
    lengths = np.random.default_rng(5).integers(500, 4000, 33)
    places = np.zeros(33, dtype=int)
    generator = np.random.default_rng(6)
    while (places < lengths).any():
        for i in generator.permutation(33)[: generator.integers(1, 33)]:
            count = min(int(generator.integers(1, 700)), lengths[i] - places[i])
            if count:
                sessions[i][0].feed(noise(i, lengths[i])[places[i] : places[i] + count])
                places[i] += count
                if places[i] == lengths[i]:
                    sessions[i][0].finish()
        engine.tick()
    engine.run_until_idle()
    sizes = engine.stats().online["toy"].sizes
    assert len(sizes) > 2  # many batch sizes were used
    for i, (_, events) in enumerate(sessions):
        wanted = alone(model, noise(i, lengths[i]), [], {"shift": i % 3}, size_of(engine))
        assert events == [*wanted, Closed("finished")]


ACTIONS = st.one_of(
    st.tuples(st.just("feed"), st.integers(0, 900)),
    st.tuples(st.sampled_from(["commit", "commit", "finish", "cancel", "tick", "tick"]), st.just(0)),
)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 3), ACTIONS), min_size=1, max_size=40),
    st.sampled_from([320, 400]),
    st.sampled_from([-1.0, 0.0105]),
    st.booleans(),
)
def test_random_schedules_equal_the_reference(actions, first, quiet, late):
    """Whatever is fed, committed, finished and cancelled when, a stream gives what it gives alone."""
    model = ToyStream(first=first)
    engine = inline(model, useful_batch=1, buckets=(4, 8))
    stepper = engine._core.lanes["toy"].stepper
    if late:
        launch = stepper.launch
        stepper.launch = lambda staging: Late(launch(staging).wait())
    setting = {"quiet": quiet}
    sessions = [opened(engine, setting) for _ in range(4)]
    fed = [np.zeros(0, np.float32) for _ in sessions]
    marks = [[] for _ in sessions]
    for number, (action, size) in actions:
        session = sessions[number][0]
        try:
            if action == "feed":
                audio = noise([number, len(fed[number])], size)
                session.feed(audio)
                fed[number] = np.concatenate([fed[number], audio])
            elif action == "tick":
                engine.tick()
            else:
                getattr(session, action)()
                if action == "commit":
                    marks[number].append(len(fed[number]))
        except SessionClosed:
            assert session.closed or session._end is not None or session._cancelled
    for session, _ in sessions:
        session.finish()
    engine.run_until_idle()
    for (session, events), audio, ends in zip(sessions, fed, marks, strict=True):
        wanted = alone(model, audio, ends, setting, size_of(engine))
        assert events[-1] == Closed(session.closed)
        if session.closed == "cancelled":
            assert events[:-1] == wanted[: len(events) - 1]
        else:
            assert events[:-1] == wanted
    assert engine._core.lanes["toy"].store.used == 0


def test_threads_deliver_the_same():
    """With real threads, many feeders and a slow model."""
    model = ToyStream()
    with Engine({"toy": model}, EngineOptions(max_sessions=16)) as engine:
        size = size_of(engine)
        results = {}

        def client(i):
            events, done = [], threading.Event()

            def on_event(event):
                events.append(event)
                if isinstance(event, Closed):
                    done.set()

            session = engine.open("toy", None, on_event)
            audio = noise(i, 2000 + 100 * i)
            for place in range(0, len(audio), 450):
                session.feed(audio[place : place + 450], timeout=60.0)
            session.finish()
            assert done.wait(120.0)
            results[i] = events

        threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(8):
            assert results[i] == [*alone(model, noise(i, 2000 + 100 * i), size=size), Closed("finished")]
        stats = engine.stats()
        assert stats.online["toy"].closed == {"finished": 8}
        assert stats.online["toy"].chunks == sum((2000 + 100 * i) // 320 + 1 for i in range(8))
        assert stats.events == sum(len(events) for events in results.values())
        assert stats.health.ready
    assert not any(t.name.startswith("nar-speech") for t in threading.enumerate())


# Faults.


@pytest.mark.parametrize(("level", "message"), [(ERROR_LEVEL, "ZeroDivisionError"), (NAN_LEVEL, "NaN")])
def test_one_poisoned_stream_of_32(level, message):
    model = ToyStream()
    engine = inline(model)
    sessions = [opened(engine) for _ in range(32)]
    for i, (session, _) in enumerate(sessions):
        audio = noise(i, 1500)
        if i == 17:
            audio[700] = level + 1
        session.feed(audio)
        session.finish()
    engine.run_until_idle()
    for i, (session, events) in enumerate(sessions):
        wanted = alone(model, noise(i, 1500), [], size=size_of(engine))
        if i == 17:
            assert events[:2] == wanted[:2]
            assert message in events[2].message
            assert events[3:] == [Closed("failed")]
            with pytest.raises(SessionClosed, match="failed"):
                session.feed(noise(0, 10))
        else:
            assert events == [*wanted, Closed("finished")]
    stats = engine.stats().online["toy"]
    assert stats.poisoned == 1
    assert stats.closed == {"failed": 1, "finished": 31}
    assert (stats.failed_steps > 0) == (level == ERROR_LEVEL)
    assert engine.health().ready


def test_poison_in_every_stream_makes_the_engine_unready():
    engine = inline()
    for _ in range(3):
        session, events = opened(engine)
        session.feed(noise(0, 320) + ERROR_LEVEL + 2)
        engine.run_until_idle()
        assert isinstance(events[0], Failed)
    assert engine.health().reason == "the last 3 steps failed"
    session, events = opened(engine)
    session.feed(noise(0, 320))
    engine.run_until_idle()
    assert engine.health().ready


def test_an_engine_that_gets_no_streams_becomes_ready_again():
    """Who is not ready gets no streams from a load balancer, with which to prove itself."""
    clock = Clock()
    engine = inline(clock=clock)
    for _ in range(3):
        session, _ = opened(engine)
        session.feed(noise(0, 320) + ERROR_LEVEL + 2)
        engine.run_until_idle()
    clock.now += 50
    assert not engine.health().ready
    clock.now += 11
    assert engine.health().ready


class BrokenCollector(ToyCollector):
    """Fails, or returns nonsense, at the second step."""

    def push(self, row, samples, final):
        out = super().push(row, samples, final)
        if samples > 320 and not final:
            if self.raises:
                raise KeyError("private text")
            return ["nonsense"]
        return out


@pytest.mark.parametrize("raises", [True, False])
def test_a_collector_that_fails_ends_its_session_only(raises):
    model = ToyStream()
    engine = inline(model)
    broken, broken_events = opened(engine)
    engine._core._run_commands()
    collector = engine._core.streams[broken.id].collector = BrokenCollector({})
    collector.raises = raises
    good, events = opened(engine)
    for session in (broken, good):
        session.feed(noise(3, 1000))
        session.finish()
    engine.run_until_idle()
    assert [type(event) for event in broken_events] == [Partial, Failed, Closed]
    assert "private" not in broken_events[1].message
    assert events == [*alone(model, noise(3, 1000), size=size_of(engine)), Closed("finished")]


def test_a_callback_that_fails_ends_its_session_only():
    model = ToyStream()
    engine = inline(model)
    seen = []

    def broken(event):
        seen.append(event)
        raise RuntimeError("client")

    bad = engine.open("toy", None, broken)
    good, events = opened(engine)
    for session in (bad, good):
        session.feed(noise(3, 1000))
        session.finish()
    engine.run_until_idle()
    assert [type(event) for event in seen] == [Partial, Closed]
    assert bad.closed == "failed"
    assert events == [*alone(model, noise(3, 1000), size=size_of(engine)), Closed("finished")]
    assert engine.stats().callback_errors == 2


def test_late_results_never_reach_a_new_user():
    model = ToyStream()
    engine = inline(model, max_sessions=1)
    stepper = engine._core.lanes["toy"].stepper
    launch = stepper.launch
    stepper.launch = lambda staging: Late(launch(staging).wait())
    first, first_events = opened(engine)
    first.feed(noise(1, 320))
    engine.tick()  # under way
    first.cancel()
    engine.tick()
    assert first_events == [Closed("cancelled")]
    second, events = opened(engine)
    second.feed(noise(2, 700))
    second.finish()
    engine.run_until_idle()
    assert first_events == [Closed("cancelled")]
    assert events == [*alone(model, noise(2, 700), size=size_of(engine)), Closed("finished")]


def test_a_crash_of_the_engine_thread_is_told_and_survived():
    engine = Engine({"toy": ToyStream()}, EngineOptions(max_sessions=8)).start()
    try:
        core = engine._core
        take, crashes = core.scheduler.next, []

        def crash(now):
            if crashes:
                raise crashes.pop()
            return take(now)

        core.scheduler.next = crash
        events = []
        session = engine.open("toy", None, events.append)
        wait_until(lambda: session.id in core.streams)
        crashes.append(RuntimeError("bug"))
        core.wake.set()
        wait_until(lambda: len(events) == 2)
        assert events == [Failed("the engine failed: RuntimeError"), Closed("failed")]
        assert engine.health().ready
        assert engine.stats().crashes == 1
        later = []
        session = engine.open("toy", None, later.append)
        session.feed(noise(0, 400))
        session.finish()
        wait_until(lambda: later and later[-1] == Closed("finished"))
        crashes.append(DeviceLost("CUDA error"))
        core.wake.set()
        wait_until(lambda: not engine.health().alive)
        assert "CUDA error" in engine.health().reason
        with pytest.raises(EngineError, match="restart the process"):
            engine.open("toy", None, later.append)
    finally:
        engine.close()


def test_an_engine_that_crashes_again_and_again_gives_up():
    engine = Engine({"toy": ToyStream()}, EngineOptions(max_sessions=8)).start()
    engine._core.scheduler.next = lambda now: 1 / 0
    wait_until(lambda: not engine.health().alive)
    assert engine.stats().crashes == 3
    engine.close()


# Several models, and the contract.


def test_many_models_in_one_engine():
    one, two = ToyStream(seed=1), ToyStream(chunk=800, seed=2)
    engine = inline(models={"one": one, "two": two, "batch": ToyBatch()})
    audio = noise(0, 4000)
    first, first_events = opened(engine, model="one")
    second, second_events = opened(engine, model="two")
    future = engine.submit("batch", audio)
    for session in (first, second):
        session.feed(audio)
        session.finish()
    engine.run_until_idle()
    for model, name, events in ((one, "one", first_events), (two, "two", second_events)):
        size = engine._core.lanes[name].sizes[0]
        assert events == [*alone(model, audio, size=size), Closed("finished")]
    assert future.result() == f"4000:{audio.sum():.3f}"
    with pytest.raises(AudioError, match="wave"):
        engine.submit("batch", np.zeros(0, np.float32))
    with pytest.raises(AudioError, match="wave"):
        engine.submit("batch", np.zeros(5, np.int16))


class WrongState(ToyStream):
    def step(self, audio, lengths, final, state):
        output, state = super().step(audio, lengths, final, state)
        return output, type(state)(
            *(t.double() if t.dtype == torch.float32 else t for t in vars(state).values())
        )


class WrongOutput(ToyStream):
    def step(self, audio, lengths, final, state):
        output, state = super().step(audio, lengths, final, state)
        return type(output)(output.letters.T, *list(vars(output).values())[1:]), state


def test_models_that_break_the_contract_are_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"hidden|tail"):
        inline(WrongState(), exact_batches=False)
    with pytest.raises(ConfigError, match="letters"):
        inline(WrongOutput(), exact_batches=False)
    with pytest.raises(ConfigError, match="at least one"):
        Engine({})
    with pytest.raises(ConfigError, match="'odd' has neither"):
        Engine({"odd": object()})
    engine = Engine({"toy": WrongState()}, EngineOptions(exact_batches=False))
    with pytest.raises(ConfigError, match=r"hidden|tail"):
        engine.start()
    assert not any(t.name.startswith("nar-speech") for t in threading.enumerate())


def test_an_engine_is_started_once_and_ticked_by_one():
    engine = Engine({"toy": ToyStream()}, EngineOptions(max_sessions=2, buckets=(1,)))
    with pytest.raises(EngineError, match="start"):
        opened(engine)
    assert engine.health().reason == "not started"
    with engine.start():
        with pytest.raises(EngineError, match="own threads"):
            engine.tick()
        with pytest.raises(EngineError, match="once"):
            engine.start()
