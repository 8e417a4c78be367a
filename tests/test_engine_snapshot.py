"""What an engine gives away as data: snapshots, options, numbers."""

import json

import numpy as np
import pytest
import torch

from nar_speech.engine import EngineOptions, SessionOptions, Snapshot
from nar_speech.engine.snapshot import SnapshotMeta
from nar_speech.engine.stats import Histogram
from nar_speech.errors import ConfigError, SnapshotError

# Snapshots, options, numbers.


def make_snapshot(**changes):
    meta = {
        "format": 1,
        "model": "toy",
        "signature": "x",
        "sample_rate": 16000,
        "chunk": 320,
        "first": 320,
        "options": SessionOptions({"quiet": 0.5, "words": ["ä"]}, idle=3.0),
        "collector": {"text": "a", "segment": 0, "begin": 0},
        "consumed": 640,
        "utterance": 320,
        "marks": (700,),
        "ending": None,
        "fresh": False,
        "new": False,
        "history": 600,
    }
    state = {"hidden": torch.arange(3.0), "frames": torch.tensor(7)}
    audio, history = np.arange(100, dtype=np.float32), np.arange(40, dtype=np.float32)
    return Snapshot(SnapshotMeta(**{**meta, **changes}), state, audio, history)


def test_snapshots_survive_the_journey():
    snapshot = make_snapshot()
    back = Snapshot.from_bytes(snapshot.to_bytes())
    assert back.meta == snapshot.meta
    assert back.state.keys() == snapshot.state.keys()
    assert all(torch.equal(back.state[n], t) for n, t in snapshot.state.items())
    assert np.array_equal(back.audio, snapshot.audio)
    assert np.array_equal(back.history, snapshot.history)
    assert back.inbox.marks == (700,)


@pytest.mark.parametrize(
    "changes",
    [
        {"utterance": 641},
        {"marks": (700, 699)},
        {"marks": (800,)},
        {"utterance": -1},
        {"history": 601},
        {"ending": "bored"},
        {"new": True},
        {"fresh": True},
        {"consumed": 2**60, "marks": ()},
        {"format": 2},
    ],
)
def test_impossible_snapshots_are_refused(changes):
    with pytest.raises(SnapshotError, match="snapshot"):
        Snapshot.from_bytes(make_snapshot(**changes).to_bytes())


def test_damaged_snapshots_are_refused():
    data = make_snapshot().to_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    meta = json.loads(header["__metadata__"]["nar_speech.session"])

    def rebuilt(tree, key="nar_speech.session"):
        text = json.dumps({**header, "__metadata__": {key: json.dumps(tree)}}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    assert Snapshot.from_bytes(rebuilt(meta)).meta == make_snapshot().meta
    for bad in (
        b"",
        b"garbage that is longer than eight bytes",
        data[:-3],
        data[: size // 2],
        rebuilt([1]),
        rebuilt({**meta, "surprise": 1}),
        rebuilt({**meta, "consumed": "640"}),
        rebuilt({**meta, "options": {"backlog": -1}}),
        rebuilt({name: value for name, value in meta.items() if name != "marks"}),
        rebuilt(meta, key="other"),
    ):
        with pytest.raises(SnapshotError, match="snapshot"):
            Snapshot.from_bytes(bad)
    with pytest.raises(SnapshotError, match="plain data"):
        make_snapshot(collector={"text": object()}).to_bytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_sessions": 0},
        {"buckets": (0, 1)},
        {"buckets": ()},
        {"graphs": "maybe"},
        {"fill_wait": -1.0},
        {"threads": 0},
        {"max_events": 1},
    ],
)
def test_options_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineOptions(**wrong)


def test_session_options_are_checked():
    for name in ("backlog", "idle", "longest"):
        with pytest.raises(ConfigError, match=name):
            SessionOptions(**{name: 0.0})


def test_histograms():
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 4.0, 9.0):
        histogram.observe(value)
    frozen = histogram.freeze()
    assert frozen.counts == (2, 1, 1, 1)
    assert (frozen.count, frozen.total) == (5, 16.0)
    assert [frozen.quantile(q) for q in (0.4, 0.5, 0.8, 1.0)] == [1.0, 2.0, 5.0, float("inf")]
    assert Histogram((1.0,)).freeze().quantile(0.5) == 0.0
