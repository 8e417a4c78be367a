"""Parts of the streaming engine by themselves: audio that waits, sessions, slots, batched steps."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.toy_models import ERROR_LEVEL, ToyStream
from nar_speech.engine.asr import LONGEST
from nar_speech.engine.buffer import BLOCK, AudioBuffer, History
from nar_speech.engine.graphs import SOUND, Packing, Staging, Stepper, stable_sizes
from nar_speech.engine.options import EngineOptions
from nar_speech.engine.session import Session, Work
from nar_speech.engine.slots import PRISTINE, RESERVED, SCRATCH, SMALLEST, SlotStore, finite_rows
from nar_speech.errors import (
    AudioError,
    BackPressure,
    ConfigError,
    EngineBusy,
    InputError,
    SessionClosed,
    SnapshotError,
)
from nar_speech.layers.state import named_tensors


def ramp(count: int, start: int = 0) -> np.ndarray:
    """Samples that tell where they belong; exact in float32."""
    return np.arange(start, start + count, dtype=np.float32)


# Audio that waits.


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * BLOCK)), max_size=20))
def test_buffer_keeps_order_and_arrivals(steps):
    buffer, fed, now, times = AudioBuffer(), 0, 0.0, []
    for feeds, size in steps:
        if feeds:
            now += 1.0
            buffer.append(ramp(size, fed), now)
            times += [now] * size
            fed += size
        else:
            size = min(size, buffer.available)
            if size:
                assert buffer.arrival(buffer.consumed + size) == times[buffer.consumed + size - 1]
            assert np.array_equal(buffer.take(size), ramp(size, buffer.consumed - size))
        assert buffer.received == fed
        assert np.array_equal(buffer.peek(), ramp(buffer.available, buffer.consumed))


def test_buffer_memory_follows_the_audio_not_the_pieces():
    buffer = AudioBuffer()
    for i in range(5000):
        buffer.append(ramp(1, i), i * 1e-5)
    assert len(buffer._blocks) == 2
    assert len(buffer._arrivals) <= 20


@pytest.mark.parametrize("chunk", [0.6, 0.64, 5.12])
def test_history_holds_an_utterance_that_nobody_ends(chunk):
    """All of it: it is cut at the first chunk beyond its greatest length, and heard again as a whole."""
    rate, size = 1000, round(1000 * chunk)
    history = History(round(EngineOptions().history * rate))
    while history.end <= LONGEST * rate:
        history.append(ramp(size, history.end))
    assert np.array_equal(history.get(0, history.end), ramp(history.end))


def test_history_keeps_the_end_and_forgets_what_is_not_needed():
    history = History(limit=1000)
    for i in range(30):
        history.append(ramp(100, 100 * i))
    assert history.end == 3000
    assert 1900 <= history.start <= 2000
    assert np.array_equal(history.get(2150, 2430), ramp(280, 2150))
    assert np.array_equal(history.get(0, 2100), ramp(2100 - history.start, history.start))
    history.drop(2999)
    assert history.start == 2900
    assert history.get(0, 2000).size == 0


# Sessions.


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_session(limit=1000, chunk=100, first=None, clock=None):
    woken = []
    clock = clock or Clock()
    return Session("s", "toy", 100, chunk, first or chunk, limit, woken.append, clock), woken


def drain(session):
    """All work there is now, as (samples, final)."""
    done = []
    while (work := session._next()) is not None:
        assert len(session._take(work)) == work.samples
        done.append((work.samples, work.final))
    return done


def test_chunks_do_not_depend_on_when_a_commit_comes():
    late, _ = make_session()
    late.feed(ramp(200))
    assert drain(late) == [(100, False), (100, False)]
    late.commit()
    late.feed(ramp(130))
    early, _ = make_session()
    early.feed(ramp(200))
    early.commit()
    early.feed(ramp(130))
    assert drain(late) == [(0, True), (100, False)]
    assert drain(early) == [(100, False), (100, False), (0, True), (100, False)]
    for session in (early, late):
        session.finish()
        assert drain(session) == [(30, True)]
        assert session._exhausted


def test_utterances_without_audio_are_none():
    session, _ = make_session()
    session.commit()
    session.commit()
    session.feed(ramp(50))
    session.commit()
    session.commit()
    session.finish()
    assert drain(session) == [(50, True)]
    assert session._exhausted
    empty, _ = make_session()
    empty.finish()
    assert drain(empty) == []
    assert empty._exhausted


def test_first_chunk_of_an_utterance_may_differ():
    session, _ = make_session(first=140)
    session.feed(ramp(390))
    session.commit()
    session.feed(ramp(139))
    assert drain(session) == [(140, False), (100, False), (100, False), (50, True)]
    session.feed(ramp(1))
    assert drain(session) == [(140, False)]


def test_collector_ends_an_utterance_where_it_stands():
    session, _ = make_session()
    session.feed(ramp(250))
    assert session._next() == Work(100, False, 100.0, False)
    session._take(session._next())
    session._end_utterance()
    session._end_utterance()
    assert drain(session) == [(0, True), (100, False)]
    session._end_utterance()
    session.commit()
    assert drain(session) == [(0, True), (50, True)]
    session._end_utterance()
    assert drain(session) == []


def test_audio_ahead_of_time_is_told_from_live_audio():
    clock = Clock()
    session, _ = make_session(limit=100_000, clock=clock)
    session.feed(ramp(300))  # 3 s that nobody can have spoken yet; 2 s are allowed for
    ahead = []
    for seconds in (0, 2.5, 1.0, 1.0, 1.0, 40.0):
        clock.now += seconds
        session.feed(ramp(100))
        while (work := session._next()) is not None:
            session._take(work)
            ahead.append(work.ahead)
    assert ahead == [False, False, True, True, True, True, True, True, False]
    other, _ = make_session(clock=clock)
    other._restore(session._export(close=True))
    other.feed(ramp(100))
    assert not other._next().ahead  # what a session heard elsewhere does not count


def test_back_pressure_takes_all_or_nothing():
    session, woken = make_session(limit=300)
    session.feed(ramp(250))
    with pytest.raises(BackPressure, match=r"2\.5 s of audio wait") as caught:
        session.feed(ramp(100))
    assert caught.value.room == session.room == 50
    assert session.lag == 2.5
    assert session._refused == 1
    session._take(session._next())
    session.feed(ramp(100))
    assert woken == [session, session]
    with pytest.raises(InputError, match="smaller pieces"):
        session.feed(ramp(301))
    with pytest.raises(AudioError, match="float"):
        session.feed(np.zeros(4, dtype=np.int16))
    with pytest.raises(AudioError, match="NaN"):
        session.feed(np.array([0.0, np.nan], dtype=np.float32))
    with pytest.raises(AudioError, match="shape"):
        session.feed(np.zeros((2, 4), dtype=np.float32))


def test_feed_waits_for_room_if_told_to():
    session, _ = make_session(limit=300)
    session.feed(ramp(300))
    timer = threading.Timer(0.05, lambda: session._take(session._next()))
    timer.start()
    session.feed(ramp(80, 300), timeout=30.0)
    timer.join()
    assert session._buffer.available == 280
    closer = threading.Timer(0.05, lambda: session._close("shutdown"))
    closer.start()
    with pytest.raises(SessionClosed, match="shutdown"):
        session.feed(ramp(80), timeout=30.0)
    closer.join()


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_nothing_is_taken_after_the_end(end):
    session, _ = make_session()
    getattr(session, end)()
    for call in (lambda: session.feed(ramp(1)), session.commit):
        with pytest.raises(SessionClosed, match=r"finished|cancelled"):
            call()
    assert session.room == 0


# Slots.


def test_slots_grow_and_keep_what_they_hold():
    model = ToyStream()
    store = SlotStore(model, capacity=20)
    assert store.size == SMALLEST
    slots = [store.acquire() for _ in range(20)]
    assert len({slot.row for slot in slots}) == 20
    assert min(slot.row for slot in slots) == RESERVED
    assert store.size == store.used == 20
    with pytest.raises(EngineBusy, match="20 slots"):
        store.acquire()
    state = model.init_state(1)
    state.frames.fill_(7)
    store.put(slots[3], state)
    old = store.bytes
    store.release(slots[3])
    store.release(slots[3])  # has no effect: it is in nobody's hands
    assert store.used == 19
    again = store.acquire()
    assert again.row == slots[3].row
    assert store.owns(again)
    assert not store.owns(slots[3])
    assert store.export(again.row)["frames"] == 7
    assert store.bytes == old


def test_reading_pristine_rows_begins_anew_except_for_what_is_carried():
    store = SlotStore(ToyStream(), capacity=4)
    state = store.model.init_state(3)
    for name, tensor in named_tensors(state):
        tensor.copy_((torch.arange(3) + (10 if name == "total" else 1)).reshape(3, *[1] * (tensor.dim() - 1)))
    rows = torch.tensor([2, 4, 3])
    store.scatter(rows, state)
    got = store.gather(torch.tensor([2, PRISTINE, 4]), torch.tensor([2, 3, PRISTINE]))
    assert got.frames.tolist() == [1, 0, 2]
    assert got.hidden[:, 0].tolist() == [1, 0, 2]
    assert got.total.tolist() == [10, 12, 0]


def test_memory_of_batches_can_be_used_again():
    store = SlotStore(ToyStream(), capacity=4)
    state = store.model.init_state(4)
    state.frames.copy_(torch.arange(1, 5))
    store.scatter(torch.tensor([2, 3, 4, 5]), state)
    both = torch.tensor([3, 4])
    first = store.gather(both, both, reuse=True)
    assert first.frames.tolist() == [2, 3]
    again = store.gather(torch.tensor([5]), both[:1], reuse=True)
    assert again.frames.tolist() == [4]
    assert again.frames.data_ptr() == first.frames.data_ptr()
    more = torch.tensor([2, 3, 4])
    assert store.gather(more, more, reuse=True).frames.tolist() == [1, 2, 3]
    again.frames.fill_(9)
    assert store.gather(more, more).frames.tolist() == [1, 2, 3]


class SharedMemory(ToyStream):
    """Makes two fields of one tensor, and one of a single value."""

    def init_state(self, slots):
        state = super().init_state(slots)
        return replace(state, frames=state.total, hidden=torch.zeros(1, self.width).expand(slots, -1))


def test_fields_made_of_one_tensor_get_memory_of_their_own():
    store = SlotStore(SharedMemory(), 20)
    slots = [store.acquire() for _ in range(10)]  # grows meanwhile
    state = ToyStream().init_state(1)
    state.frames.fill_(7)
    state.hidden.fill_(1)
    store.put(slots[4], state)
    assert store.state.frames.sum() == 7
    assert store.state.total.sum() == 0
    assert store.state.hidden.sum() == store.model.width


def test_a_state_that_does_not_fit_is_refused():
    model = ToyStream()
    model.carried = ("memory",)
    with pytest.raises(ConfigError, match=r"carried.*memory"):
        SlotStore(model, 4)
    model.carried = ()
    store = SlotStore(model, 4)
    store.check(model.init_state(3), 3)
    with pytest.raises(ConfigError, match="tail"):
        store.check(model.init_state(2), 3)
    tensors, slot = store.export(PRISTINE), store.acquire()
    for wrong in (
        {**tensors, "tail": tensors["tail"][:-1]},
        {**tensors, "tail": tensors["tail"].double()},
        {**tensors, "more": tensors["tail"]},
        {name: t for name, t in tensors.items() if name != "tail"},
        {**tensors, "tail": tensors["tail"] * float("nan")},
    ):
        with pytest.raises(SnapshotError, match=r"tail|more"):
            store.restore(slot, wrong)


def test_finite_rows_sees_every_tensor():
    state = ToyStream().init_state(4)
    state.hidden[1, 3] = float("nan")
    state.tail[2, 0] = float("-inf")
    assert finite_rows([state], 4, torch.device("cpu")).tolist() == [True, False, False, True]
    assert finite_rows([state.total], 4, torch.device("cpu")).tolist() == [True] * 4


# Steps.


def test_packing_brings_every_dtype_back():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "floats": torch.randn(3, 2, 5, generator=generator),
        "ids": torch.randint(-9, 9, (3, 7), generator=generator),
        "flag": torch.tensor([True, False, True]),
        "empty": torch.zeros(3, 0),
        "bytes": torch.randint(0, 255, (3, 3), generator=generator, dtype=torch.uint8),
        "strided": torch.randn(4, 3, generator=generator).T,
        "halves": torch.randn(3, 1, generator=generator).half(),
    }
    packing = Packing(tensors)
    packed = packing.pack(tensors)
    assert packed.shape == (3, packing.size)
    back = packing.unpack(packed.numpy())
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(back[name], tensor.numpy()), name


def test_padding_rows_touch_nobody():
    model = ToyStream()
    store = SlotStore(model, 4)
    stepper = Stepper(model, store)
    slot = store.acquire()
    before = {n: t.clone() for n, t in named_tensors(store.state)}
    staging = stepper.staging(4)
    staging.fill(1, np.full(320, 0.1, dtype=np.float32), False, slot.row, True, True)
    out = stepper.launch(staging).wait()
    assert out[SOUND].tolist() == [True] * 4
    for name, tensor in named_tensors(store.state):
        changed = (tensor != before[name]).reshape(len(tensor), -1).any(1)
        assert set(changed.nonzero().flatten().tolist()) <= {slot.row, SCRATCH}


def test_a_step_that_raises_leaves_all_states_as_they_were():
    model = ToyStream()
    store = SlotStore(model, 4)
    stepper = Stepper(model, store)
    slots = [store.acquire(), store.acquire()]
    for level in (0.1, ERROR_LEVEL + 1):
        staging = stepper.staging(2)
        for row, slot in enumerate(slots):
            staging.fill(
                row, np.full(320, level * row, np.float32), False, slot.row, level == 0.1, level == 0.1
            )
        if level == 0.1:
            stepper.launch(staging).wait()
            before = {n: t.clone() for n, t in named_tensors(store.state)}
        else:
            with pytest.raises(ZeroDivisionError):
                stepper.launch(staging)
    assert all(torch.equal(t, before[n]) for n, t in named_tensors(store.state))


def test_staging_is_cleared():
    staging = Staging(2, 320, pinned=False)
    staging.fill(0, np.ones(100, np.float32), True, 5, False, False)
    staging.clear(320)
    assert not staging.audio.any()
    assert staging.meta.tolist() == [[320] * 2, [0] * 2, [PRISTINE] * 2, [PRISTINE] * 2, [SCRATCH] * 2]


class FixedKernels(ToyStream):
    """Adds a rounding error that depends on the batch size, and for size 8 on the row."""

    def step(self, audio, lengths, final, state):
        output, state = super().step(audio, lengths, final, state)
        size = len(audio)
        error = torch.full((size, 1), 0.0 if size == 1 else 1e-7 if size in (2, 16) else 2e-7)
        if size == 8:
            error = torch.arange(8.0)[:, None] * 1e-7
        # The inner results of tiny products do differ by size; only the errors above shall count here.
        return output, type(state)(
            state.tail + error, torch.zeros_like(state.hidden), state.frames, state.total, state.shift
        )


def test_only_sizes_that_agree_to_the_last_bit_are_stable():
    with torch.inference_mode():
        assert stable_sizes(FixedKernels(), (1, 2, 4, 8, 16, 32, 64)) == (4, 32, 64)
        assert stable_sizes(FixedKernels(), (8,)) == ()
