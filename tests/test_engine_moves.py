"""Sessions that move to another engine, second passes, and speech detection around a model."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.toy_models import ToyBatch, ToyStream
from nar_speech.audio import read_audio
from nar_speech.engine import (
    Closed,
    Engine,
    EngineOptions,
    Final,
    Partial,
    Snapshot,
    SpeechStarted,
    SpeechStopped,
)
from nar_speech.engine.speech import WithVad
from nar_speech.errors import ConfigError, EngineBusy, SessionClosed, SnapshotError
from nar_speech.layers.silero import SileroVad
from nar_speech.model_folder import SegmentConfig
from nar_speech.pipelines.segment import Segmenter
from tests.engine_reference import Late, alone, finals, inline, noise, opened, size_of

SAMPLE = Path(__file__).parent.parent / "nar_speech" / "assets" / "sample.flac"


def with_batch(**options):
    return inline(models={"toy": ToyStream(), "batch": ToyBatch()}, **options)


# Moves.


@pytest.mark.parametrize("place", [0, 1, 319, 320, 900, 2100])
@pytest.mark.parametrize("ticks", [0, 2, 100])
def test_a_session_moves_mid_sentence(place, ticks):
    """Whatever was heard, waits, was committed or kept: the second engine goes on as the first would have."""
    audio, settings = noise(7, 3000), {"shift": 5, "second": "batch"}
    here, there = with_batch(), with_batch()
    if ticks == 2:  # a step is under way when the snapshot is taken
        stepper = here._core.lanes["toy"].stepper
        launch = stepper.launch
        stepper.launch = lambda staging: Late(launch(staging).wait())
    other, _ = opened(there)  # the slot will be another one
    other.feed(noise(0, 400))
    there.run_until_idle()
    session, first = opened(here, settings, backlog=1.0)
    session.feed(audio[:place])
    if place > 2050:
        session.commit()
    for _ in range(ticks):
        here.tick()
    data = here.snapshot(session).to_bytes()
    here.run_until_idle()
    assert first[-1] == Closed("moved")
    assert here.sessions == 0
    with pytest.raises(SessionClosed, match="moved"):
        session.feed(audio[place:])
    second = []
    moved = there.resume(data, second.append)
    moved.feed(audio[place:])
    moved.finish()
    there.run_until_idle()
    marks = [place] if place > 2050 else []
    events = first[:-1] + second
    online = [e for e in events if not (isinstance(e, Final) and e.source == "offline")]
    wanted = alone(ToyStream(), audio, marks, {"shift": 5, "second": "batch"}, size_of(there))
    assert online == [*wanted, Closed("finished")]
    offline = [e.text for e in events if isinstance(e, Final) and e.source == "offline"]
    ends = [0, *marks, 3000]
    parts = [audio[a:b] for a, b in pairwise(ends)]
    assert offline == [f"{len(p)}:{p.sum():.3f}" for p in parts]


def test_a_second_pass_under_way_moves_too():
    here, there = with_batch(), with_batch()
    session, first = opened(here, {"second": "batch"})
    audio = noise(1, 1000)
    session.feed(audio)
    session.finish()
    while not finals(first):
        here._core.tick()  # the batch model has not run yet
    snapshot = here.snapshot(session)
    assert len(snapshot.waves) == 1
    assert snapshot.meta.ending == "finished"
    second = []
    there.resume(Snapshot.from_bytes(snapshot.to_bytes()), second.append)
    there.run_until_idle()
    here.run_until_idle()
    assert [type(e) for e in second] == [Final, Closed]
    assert second[0].text == f"1000:{audio.sum():.3f}"
    assert first[-1] == Closed("moved")


def test_a_kept_session_goes_on():
    engine = inline()
    session, events = opened(engine)
    audio = noise(2, 2000)
    session.feed(audio[:1000])
    engine.tick()
    snapshot = engine.snapshot(session, keep=True)
    copies = []
    copy = engine.resume(snapshot, copies.append)
    for one in (session, copy):
        one.feed(audio[1000:])
        one.finish()
    engine.run_until_idle()
    assert session.id != copy.id
    wanted = [*alone(ToyStream(), audio, size=size_of(engine)), Closed("finished")]
    assert events == wanted
    assert copies == wanted[len(wanted) - len(copies) :]


def test_moves_between_engines_with_threads():
    engines = [Engine({"toy": ToyStream()}, EngineOptions(max_sessions=4)).start() for _ in range(2)]
    try:
        audio, events = noise(3, 6000), []
        session = engines[0].open("toy", None, events.append)
        for i, place in enumerate(range(0, 6000, 1000)):
            session.feed(audio[place : place + 1000])
            time.sleep(0.01)
            snapshot = engines[i % 2].snapshot(session)
            session = engines[(i + 1) % 2].resume(snapshot, events.append)
        session.finish()
        end = time.monotonic() + 60
        while Closed("finished") not in events and time.monotonic() < end:
            time.sleep(0.005)
        size = size_of(engines[0])
    finally:
        for engine in engines:
            engine.close()
    said = [event for event in events if event != Closed("moved")]
    # Two engines hand out by two threads: order them by stream time.
    said[:-1] = sorted(said[:-1], key=lambda event: (event.end, isinstance(event, Final)))
    assert said == [*alone(ToyStream(), audio, size=size), Closed("finished")]


def test_foreign_snapshots_are_refused_and_take_no_place():
    here = inline()
    session, _ = opened(here)
    session.feed(noise(0, 1000))
    here.run_until_idle()
    snapshot = here.snapshot(session)
    meta = snapshot.meta
    wrong = {
        "signature": inline(ToyStream(seed=4), max_sessions=1),
        "chunk": inline(ToyStream(chunk=640), max_sessions=1),
        "fields|shape": inline(ToyStream(width=8), max_sessions=1),
        "no stream model": inline(models={"other": ToyStream()}, max_sessions=1),
    }
    for message, engine in wrong.items():
        with pytest.raises(Exception, match=message):
            engine.resume(snapshot, print)
        assert engine.sessions == 0
        assert all(lane.store.used == 0 for lane in engine._core.lanes.values())
    engine = inline(max_sessions=1)
    changes = {
        "collector's data": replace(meta, collector={"text": "a"}),
        "text: missing": replace(meta, collector={"text": 5}),
        "unknown key": replace(meta, options=replace(meta.options, settings={"colour": 1})),
    }
    for message, changed in changes.items():
        with pytest.raises(ValueError, match=message):
            engine.resume(replace(snapshot, meta=changed), print)
        assert engine.sessions == 0
    small = replace(meta, options=replace(meta.options, backlog=0.5))
    with pytest.raises(SnapshotError, match=r"0\.9 s of audio wait"):
        engine.resume(replace(snapshot, audio=noise(0, 15_000), meta=small), print)
    engine.resume(snapshot, print)
    with pytest.raises(EngineBusy):
        engine.resume(snapshot, print)
    with pytest.raises(SessionClosed):
        here.snapshot(session)


def test_a_session_that_can_not_be_written_down_stays():
    engine = inline()
    session, events = opened(engine, {"shift": np.int64(3)})
    with pytest.raises(SnapshotError, match="plain data"):
        engine.snapshot(session)
    session.feed(noise(0, 400))
    session.finish()
    engine.run_until_idle()
    assert events[-1] == Closed("finished")


# Second passes.


def test_finals_of_the_second_pass_come_before_the_end():
    engine = with_batch()
    session, events = opened(engine, {"second": "batch", "quiet": 0.0001})
    audio = noise(1, 2000)
    audio[640:960] *= 0.01  # a quiet chunk ends the utterance
    session.feed(audio)
    session.finish()
    engine.run_until_idle()
    kinds = [(e.source, e.segment) for e in events if isinstance(e, Final)]
    assert sorted(kinds) == [("offline", 0), ("offline", 1), ("online", 0), ("online", 1)]
    texts = {e.segment: e.text for e in events if isinstance(e, Final) and e.source == "offline"}
    assert texts == {0: f"960:{audio[:960].sum():.3f}", 1: f"1040:{audio[960:].sum():.3f}"}
    assert events[-1] == Closed("finished")


@pytest.mark.parametrize("reason", ["missing", "busy"])
def test_a_second_pass_that_can_not_be_had_is_told_to_the_collector(reason):
    engine = with_batch(offline_waiting=0.1)
    model = "elsewhere" if reason == "missing" else "batch"
    session, events = opened(engine, {"second": model})
    session.feed(noise(1, 4000))
    session.finish()
    if reason == "busy":
        engine.submit("batch", noise(0, 3000))
    while not finals(events):
        engine._core.tick()
    engine.run_until_idle()
    assert events[-2].text == ("?EngineError" if reason == "missing" else "?EngineBusy")
    assert events[-1] == Closed("finished")


def test_cancelled_sessions_call_their_second_passes_off():
    engine = with_batch()
    session, events = opened(engine, {"second": "batch"})
    session.feed(noise(1, 400))
    session.finish()
    while not finals(events):
        engine._core.tick()
    session.cancel()
    engine.run_until_idle()
    assert events[-1] == Closed("cancelled")
    assert engine.stats().offline["batch"].cancelled == 1


# Speech.


@pytest.fixture(scope="module")
def vad():
    return SileroVad.from_package()


@pytest.fixture(scope="module")
def speech():
    """Two utterances of the sample with silence around them, (N,) float32."""
    words = read_audio(SAMPLE, 16000).samples[:40_000]
    silence = noise(0, 16_000, 1e-4)
    return np.concatenate([silence, words, silence, silence, words, silence])


def speak(vad, speech, chunk, settings=None, pieces=2000):
    engine = inline(WithVad(ToyStream(chunk=chunk), vad), exact_batches=False, buckets=(2,))
    session, events = opened(engine, settings)
    for place in range(0, len(speech), pieces):
        session.feed(speech[place : place + pieces])
        engine.run_until_idle()
    session.finish()
    engine.run_until_idle()
    assert events[-1] == Closed("finished")
    return events


def test_speech_is_told_where_the_offline_segmenter_finds_it(vad, speech):
    config = SegmentConfig(whole=0.1, min_speech=0.1, min_silence=0.5, pad=0.0, gap=0.0, merge=1.0)
    pieces = list(Segmenter(config, 16000)([speech]))
    events = speak(vad, speech, 1600, {"endpoint": {"pad_start": 0.0, "pad_end": 0.0}})
    started = [e.time for e in events if isinstance(e, SpeechStarted)]
    stopped = [e.time for e in events if isinstance(e, SpeechStopped)]
    assert len(pieces) >= 2
    assert started == pytest.approx([p.start for p in pieces], abs=0.033)
    ends = [p.start + len(p.samples) / 16000 for p in pieces]
    assert stopped == pytest.approx(ends, abs=0.033)


def test_utterances_end_where_speech_does(vad, speech):
    events = speak(vad, speech, 1600)
    order = [type(e) for e in events if not isinstance(e, Partial)]
    assert order == [SpeechStarted, SpeechStopped, Final] * (len(order) // 3) + [Final, Closed]
    stopped = [e.time for e in events if isinstance(e, SpeechStopped)]
    closed = [e.end for e in events if isinstance(e, Final)]
    assert len(closed) == len(stopped) + 1  # the rest of the stream is an utterance, too
    for time_stopped, end in zip(stopped, closed, strict=False):
        assert 0.4 <= end - time_stopped <= 0.7  # 0.5 s of silence, and up to the end of a chunk


def test_speech_times_do_not_depend_on_chunks_and_commits(vad, speech):
    told = []
    for chunk, pieces in ((1600, 2000), (4000, 700), (9600, 50_000)):
        events = speak(vad, speech, chunk, {"endpoint": False, "shift": 1}, pieces)
        told.append([e for e in events if isinstance(e, SpeechStarted | SpeechStopped)])
        assert len(finals(events)) == 1  # only the end of the stream
    assert told[0]
    assert told[0] == told[1] == told[2]


def test_sessions_have_rules_of_their_own_and_move_with_them(vad, speech):
    model = WithVad(ToyStream(chunk=1600), vad)
    engines = [inline(model, exact_batches=False, buckets=(2,)) for _ in range(2)]
    settings = [{"endpoint": {"min_silence": 0.2}}, {"endpoint": {"min_silence": 1.5}}]
    pairs = [opened(engines[0], setting) for setting in settings]
    for session, _ in pairs:
        session.feed(speech[:60_000])
    engines[0].run_until_idle()
    for number, (session, events) in enumerate(pairs):
        alone_events = speak(vad, speech, 1600, settings[number])
        moved = engines[1].resume(engines[0].snapshot(session).to_bytes(), events.append)
        moved.feed(speech[60_000:])
        moved.finish()
        engines[1].run_until_idle()
        assert [e for e in events if e != Closed("moved")] == alone_events
    counts = [sum(isinstance(e, SpeechStopped) for e in events) for _, events in pairs]
    assert counts[0] > counts[1] > 0


def test_wrong_rules_and_rates_are_refused(vad):
    engine = inline(WithVad(ToyStream(), vad), exact_batches=False, buckets=(1,))
    for wrong, message in (
        ({"endpoint": {"min_silense": 1}}, "min_silense"),
        ({"endpoint": True}, "mapping"),
        ({"endpoint": {"threshold": 2}}, "threshold"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(engine, wrong)
    telephone = ToyStream()
    telephone.sample_rate = 8000
    with pytest.raises(ConfigError, match="16000 Hz"):
        WithVad(telephone, vad)
