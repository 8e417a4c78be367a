"""The streaming benchmark: its arithmetic, and a run on a tiny model."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks import streaming
from benchmarks.asr.embedded import Clip
from benchmarks.asr.online import Redecoding, Work, update_ends
from nar_speech.errors import InputError

HAS_OFFICIAL = importlib.util.find_spec("funasr") is not None
TINY = ["--size", "tiny", "--repeats", "1", "--streams", "2"]


def clip(seconds: float, path: str = "clip.wav") -> Clip:
    return Clip(path, "", np.linspace(-0.5, 0.5, round(seconds * 16000), dtype=np.float32))


def test_updates_come_at_intervals_and_at_the_end():
    assert update_ends(2.0, 0.6) == pytest.approx([0.6, 1.2, 1.8, 2.0])
    assert update_ends(1.8, 0.6) == pytest.approx([0.6, 1.2, 1.8])
    assert update_ends(0.3, 0.6) == [0.3]
    with pytest.raises(InputError, match="must be above 0"):
        update_ends(1.0, 0.0)


def test_redecoding_hears_the_last_seconds_at_each_update(tmp_path):
    heard = []

    class Rival:
        name = "other"

        def __call__(self, clip):
            samples, rate = soundfile.read(clip.path)
            heard.append(samples)
            assert rate == 16000
            return f"text {len(heard)}", 0.1, 0.2

    whole = clip(5.0)
    work = Redecoding(Rival(), tmp_path, every=2.0, window=3.0)(whole)
    assert [len(samples) / 16000 for samples in heard] == [2.0, 3.0, 3.0]
    assert np.abs(heard[1] - whole.samples[16000:64000]).max() < 1e-3
    assert (work.updates, work.text) == (3, "text 3")
    assert work.cpu == pytest.approx(0.3)
    assert work.wall == pytest.approx(0.6)


def test_all_take_their_turn_at_every_clip():
    order = []

    class System:
        def __init__(self, name):
            self.name = name

        def __call__(self, clip):
            order.append((self.name, clip.path))
            return Work(1.0, 1.0, 1, "")

    works = streaming.measure([System("a"), System("b")], [clip(1, "x"), clip(1, "y")], 2)
    turn = [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")]
    assert order == [("a", "x"), ("b", "x"), *turn, *turn]
    assert [[len(repeat) for repeat in own] for own in works] == [[2, 2], [2, 2]]


def test_medians_and_ratios():
    def turns(*cpu, updates):
        return [[Work(c, 2 * c, updates, "ab")] for c in cpu]

    works = [turns(4.0, 8.0, 100.0, updates=10), turns(16.0, 16.0, 16.0, updates=160)]
    rows = streaming.summarize(["ref", "ours"], works, 6.0, [1, 16], "ref", True)
    assert [row.cpu_ms for row in rows] == pytest.approx([800.0, 100.0])
    assert [row.wall_ms for row in rows] == pytest.approx([1600.0, 200.0])
    assert [row.ratio for row in rows] == pytest.approx([1.0, 8.0])
    assert [row.per_second for row in rows] == pytest.approx([8 / 6, 1 / 6])
    assert [row.same for row in rows] == [1.0, 1.0]
    alone = streaming.summarize(["ours"], works[1:], 6.0, [16], "ref", True)
    assert (alone[0].ratio, alone[0].same) == (None, None)
    printed = streaming.table([*rows, *alone]).splitlines()
    assert "| ours | 100.0 | 200.0 | 0.1667 | 8.00x | 100 % |" in printed
    assert printed[-1].endswith("| 0.1667 |  |  |")


def test_same_text_is_counted_by_place():
    def work(text):
        return Work(1.0, 1.0, 1, text)

    assert streaming.same_share([work("abcd")], [work("abxd")]) == 0.75
    assert streaming.same_share([work("abcd")], [work("ab")]) == 0.5
    assert streaming.same_share([work("")], [work("")]) == 1.0


def test_ours_alone(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = [*TINY, "--no-official", "--dtypes", "float32", "int8", "--json", str(path)]
    assert streaming.main(words) == 0
    rows = json.loads(path.read_text())["paraformer"]
    names = [
        f"ours {dtype}, {how}" for dtype in ("float32", "int8") for how in ("1 stream", "2 streams, engine")
    ]
    assert [row["system"] for row in rows] == names
    assert all(row["cpu_ms"] > 0 and row["ratio"] is None for row in rows)
    assert rows[1]["updates"] == 2 * rows[0]["updates"] > 0
    assert "CPU ms per update" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not HAS_OFFICIAL, reason="needs funasr")
def test_official_code_gives_the_same_text(tmp_path):
    path = tmp_path / "rows.json"
    assert streaming.main([*TINY, "--dtypes", "float32", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["paraformer"]
    assert rows[0]["system"] == streaming.Official.name
    assert [row["same"] for row in rows] == [1.0, 1.0, 1.0]


def test_a_model_that_can_not_be_loaded_is_named(tmp_path, capsys):
    words = ["--no-paraformer", "--model", str(tmp_path / "none"), "--model-dtypes", "float32"]
    assert streaming.main(words) == 0
    assert "none float32: skipped" in capsys.readouterr().out
    assert Path(tmp_path / "none").exists() is False
