"""The engine's queues: deadlines and batch sizes, events on their way, whole segments."""

import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.toy_models import ERROR_LEVEL, ToyBatch
from nar_speech.engine import Closed, SpeechStarted
from nar_speech.engine.fanout import FanOut, Outlet
from nar_speech.engine.offline import OfflineWorker
from nar_speech.engine.scheduler import Batch, Pace, Scheduler
from nar_speech.errors import EngineBusy, EngineError

# The schedule.


def scheduler(*names, sizes=(1, 2, 4, 8), useful=1, costs=None, fill_wait=0.005, open=8):
    plan = Scheduler(fill_wait)
    for name in names:
        plan.add_model(name, sizes, useful, costs or {})
        plan.opened(name, open)
    return plan


def test_earliest_deadline_first():
    plan = scheduler("a", sizes=(1, 2))
    for stream, deadline in (("x", 3.0), ("y", 1.0), ("z", 2.0)):
        plan.add("a", stream, deadline, 0.0)
    assert plan.next(0.0) == Batch("a", ["y", "z"], 2)
    assert plan.next(0.0) == Batch("a", ["x"], 1)
    assert plan.next(0.0) is None


def test_discarded_streams_are_gone():
    plan = scheduler("a")
    for stream in "xyz":
        plan.add("a", stream, 1.0, 0.0)
    plan.discard("a", "x")
    plan.discard("a", "nobody")
    assert plan.next(0.0) == Batch("a", ["y", "z"], 2)
    plan.add("a", "x", 1.0, 0.0)
    assert plan.next(0.0) == Batch("a", ["x"], 1)


@pytest.mark.parametrize(
    ("costs", "count", "size"),
    [
        ({}, 3, 4),  # unknown: pad
        ({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.3}, 5, 8),  # a device: larger batches are almost free
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 5, 4),  # a CPU: padding costs as much as work
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 7, 8),  # 4 and then 4 for the other three: the same
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 20, 8),
        ({4: 4.0}, 6, 4),  # others in proportion to the one that is known
    ],
)
def test_batch_sizes_follow_the_costs(costs, count, size):
    plan = scheduler("a", costs=costs)
    for i in range(count):
        plan.add("a", i, 1.0, 0.0)
    batch = plan.next(0.0)
    assert (batch.size, len(batch.streams)) == (size, min(size, count))


def test_costs_are_learnt():
    plan = scheduler("a", costs={8: 1.0})
    for _ in range(50):
        plan.observe("a", 8, 3.0)
    assert plan.cost("a", 8) == pytest.approx(3.0, rel=1e-3)
    assert plan.cost("a", 4) == pytest.approx(1.5, rel=1e-3)


def test_small_batches_wait_a_little_unless_a_deadline_is_near():
    plan = scheduler("a", useful=4, costs={8: 0.01})
    plan.add("a", "x", 1.0, now=0.0)
    assert plan.next(0.0) == pytest.approx(0.005)
    assert plan.next(0.002) == pytest.approx(0.003)
    plan.add("a", "y", 1.0, now=0.004)
    assert plan.next(0.004) == pytest.approx(0.001)  # since the first began to wait
    assert plan.next(0.0051).streams == ["x", "y"]
    plan.add("a", "x", 1.0, now=0.995)
    assert plan.next(0.995).streams == ["x"]  # the deadline is near
    for i in range(4):
        plan.add("a", i, 9.0, now=1.0)
    assert len(plan.next(1.0).streams) == 4  # enough
    plan.opened("a", -7)
    plan.add("a", "x", 9.0, now=2.0)
    assert plan.next(2.0).streams == ["x"]  # nobody else could come


def test_what_is_left_of_a_batch_does_not_wait_again():
    plan = scheduler("a", sizes=(1, 2, 4), useful=4)
    for i in range(5):
        plan.add("a", i, 9.0, now=0.0)
    assert len(plan.next(0.006).streams) == 4
    assert plan.next(0.006).streams == [4]


def test_a_late_model_does_not_starve_another():
    plan = scheduler("busy", "calm", sizes=(1,))
    for i in range(40):
        plan.add("busy", i, -100.0 + i, 0.0)
    plan.add("calm", "x", 5.0, 0.0)
    turns = [plan.next(0.0).model for _ in range(4)]
    assert turns == ["busy", "busy", "calm", "busy"]


def test_a_file_fed_at_once_leaves_live_streams_their_turn():
    """One row a step, steps as long as a chunk: a live stream and a file share the device by deadlines."""
    plan, seconds = scheduler("a", sizes=(1,)), 0.1
    file, live = Pace(seconds), Pace(seconds)
    now, served = 0.0, []
    plan.add("a", "file", file.next(0.0, ahead=True), now)
    waits = False
    for step in range(40):
        if step % 2 == 0 and not waits:
            plan.add("a", "live", live.next(now), now)  # comes at half the speed of the device
            waits = True
        batch = plan.next(now)
        served += batch.streams
        waits = waits and "live" not in batch.streams
        if "file" in batch.streams:
            plan.add("a", "file", file.next(0.0, ahead=True), now)
        now += seconds
    assert 18 <= served.count("live") <= 21
    assert served.count("file") >= 18  # the rest of the device is the file's


def test_pace_forgives_a_delay():
    pace = Pace(1.0)
    assert pace.next(10.0) == 11.0
    assert pace.next(11.5) == 12.5  # half a second late
    late = [pace.next(12.0 + i) - (13.0 + i) for i in range(7)]
    assert late == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0])


def test_pace_of_a_file_that_goes_on_live():
    pace = Pace(1.0)
    assert [pace.next(10.0, ahead=True) for _ in range(3)] == [11.0, 15.0, 19.0]
    assert pace.next(13.0) == 14.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 10)), max_size=60), st.integers(1, 5))
def test_everybody_is_served_once_in_order(adds, useful):
    plan = scheduler("m0", "m1", useful=useful, sizes=(1, 2, 4))
    for number, (model, deadline) in enumerate(adds):
        plan.add(f"m{model}", (number, deadline), deadline, 0.0)
    served = {"m0": [], "m1": []}
    while (batch := plan.next(1.0)) is not None:
        assert len(batch.streams) <= batch.size
        served[batch.model] += batch.streams
    for i in range(2):
        wanted = [(n, d) for n, (m, d) in enumerate(adds) if m == i]
        assert served[f"m{i}"] == sorted(wanted, key=lambda x: (x[1], x[0]))


# Events.


def test_fan_out_delivers_in_order_and_survives_callbacks():
    fan, failed, drained, good, bad = FanOut(), [], [], [], []

    def broken(event):
        bad.append(event)
        raise ValueError("client")

    one = Outlet(good.append, failed.append, lambda: drained.append(1), 10)
    two = Outlet(broken, failed.append, lambda: None, 10)
    for i in range(30):
        fan._queue.put((one, SpeechStarted(i)))
        fan._queue.put((two, SpeechStarted(i)))
        one.emitted += 1
    assert one.full
    fan._queue.put((two, Closed("failed")))
    fan.start()
    fan.stop()
    assert good == [SpeechStarted(i) for i in range(30)]
    assert bad == [SpeechStarted(0), Closed("failed")]
    assert [type(error) for error in failed] == [ValueError]
    assert fan.errors == 2  # both of its calls raised
    assert drained
    assert not one.full


# Whole segments.


def test_offline_batches_by_seconds_and_nearest_lengths():
    model = ToyBatch()
    worker = OfflineWorker({"b": model}, limit=100.0, batch=4.0)
    lengths = [16000, 48000, 16000, 17000, 16000, 40000]
    futures = [worker.submit("b", np.zeros(n, np.float32), {}) for n in lengths]
    assert not worker.idle
    while worker.run_once():
        pass
    assert model.batches == [3, 1, 1, 1]  # the 1 s ones; then 17000 would make 4.25 s
    assert [f.result() for f in futures] == [f"{n}:0.000" for n in lengths]
    stats = worker.stats()["b"]
    assert (stats.done, stats.batches, stats.waiting) == (6, 4, 0)
    assert stats.audio_seconds == pytest.approx(sum(lengths) / 16000)
    assert worker.idle


def test_offline_isolates_the_segment_at_fault():
    worker = OfflineWorker({"b": ToyBatch()}, 100.0, 60.0)
    waves = [np.zeros(100, np.float32) for _ in range(8)]
    waves[5][3] = ERROR_LEVEL + 1
    futures = [worker.submit("b", wave, {}) for wave in waves]
    worker.run_once()
    assert [f.exception() is None for f in futures] == [i != 5 for i in range(8)]
    assert isinstance(futures[5].exception(), ZeroDivisionError)
    assert worker.stats()["b"].failed == 1


def test_offline_bounds_its_queue_and_prefers_second_passes():
    model = ToyBatch()
    worker = OfflineWorker({"b": model}, limit=10.0, batch=2.0)
    order, second = [], np.zeros(16000, np.float32)

    def submit(name, urgent=False):
        future = worker.submit("b", second, {}, urgent)
        future.add_done_callback(lambda f: order.append(name))
        return future

    for i in range(2):
        submit(f"upload {i}")
    for i in range(8):
        submit(f"pass {i}", urgent=True)
    with pytest.raises(EngineBusy, match="10 s of audio wait"):
        submit("too much")
    with pytest.raises(EngineError, match="known: b"):
        worker.submit("c", second, {})
    while worker.run_once():
        pass
    assert order[:8] == [f"pass {i}" for i in range(8)]
    assert order[8:] == ["upload 0", "upload 1"]
    for i in range(2):
        submit(f"upload {i}")
    gone = submit("cancelled")
    assert gone.cancel()
    worker.stop()
    assert worker.stats()["b"].refused == 1


def test_uploads_have_their_turn():
    worker, order = OfflineWorker({"b": ToyBatch()}, 1e6, 1.0), []
    wave = np.zeros(16000, np.float32)
    worker.submit("b", wave, {}).add_done_callback(lambda f: order.append("upload"))
    for _ in range(9):
        worker.submit("b", wave, {}, urgent=True).add_done_callback(lambda f: order.append("pass"))
    while worker.run_once():
        pass
    assert order.index("upload") == 4


def test_offline_thread_stops_and_cancels():
    model = ToyBatch()
    model.seconds = 0.2
    worker = OfflineWorker({"b": model}, 1e6, 1.0)
    worker.start()
    wave = np.zeros(16000, np.float32)
    first = worker.submit("b", wave, {})
    while not first.running():
        time.sleep(0.001)
    waiting = worker.submit("b", wave, {})
    worker.stop()
    assert first.result() == "16000:0.000"
    with pytest.raises(CancelledError):
        waiting.result()
    with pytest.raises(EngineBusy):
        worker.submit("b", wave, {})
