"""The speed benchmark: a run on a tiny model, its arithmetic, its refusals."""

import importlib.util
import json
import re

import pytest

from benchmarks import asr_offline
from benchmarks.asr_offline import Row, main, same_share, table

TINY = [
    "--size",
    "tiny",
    "--seconds",
    "1",
    "--batch",
    "2x0.6",
    "--threads",
    "1",
    "--repeats",
    "1",
    "--no-memory",
]
HAS_OFFICIAL = importlib.util.find_spec("funasr") is not None


def test_ours_alone(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = [*TINY, "--no-official", "--dtypes", "float32", "int8", "--json", str(path)]
    assert main([*words, "--folder", str(tmp_path / "model")]) == 0
    rows = json.loads(path.read_text())
    places = {(r["stage"], r["seconds"], r["batch"], r["system"]) for r in rows}
    assert places == {
        (stage, *size, f"nar_speech {dtype}")
        for stage in ("network", "text")
        for size in ((1.0, 1), (0.6, 2))
        for dtype in ("float32", "int8")
    }
    assert all(r["cpu"] > 0 and r["wall"] > 0 and r["speedup"] is None for r in rows)
    out = capsys.readouterr().out
    assert "tiny model, random weights, medians of 1 in turns" in out
    assert out.count("| nar_speech int8 |") == 4


def test_without_the_official_package_it_says_so(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "funasr" else find_spec(name, *a)
    )
    assert main([*TINY, "--batch", "--dtypes", "float32"]) == 0
    out = capsys.readouterr().out
    assert "funasr is not installed, so there is nothing to compare with" in out
    assert "| nar_speech float32 |" in out
    assert "| funasr |" not in out


@pytest.mark.skipif(not HAS_OFFICIAL, reason="funasr is not installed: see benchmarks/README.md")
@pytest.mark.slow
def test_outputs_agree_with_the_official_package(capsys):
    assert main([*TINY, "--dtypes", "float32"]) == 0
    rows = re.findall(
        r"\| nar_speech float32 \|.*\| ([\d.]+)x \| ([\d.]+)x \| ([\d.]+) % \|", capsys.readouterr().out
    )
    assert len(rows) == 4
    assert all(float(same) == 100 for _, _, same in rows)


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_process_of_its_own(tmp_path):
    folder = asr_offline.write_folder(tmp_path, asr_offline.SIZES["tiny"])
    peak = asr_offline.peak_memory("float32", folder, 1.0)
    assert 100e6 < peak < 3e9


def test_a_wrong_batch_is_an_error(capsys):
    assert main([*TINY, "--batch", "8*15", "--no-official"]) == 2
    assert "--batch 8*15: write CLIPSxSECONDS" in capsys.readouterr().err


def test_shares_and_ratios():
    assert same_share([[3, 4], [5]], [[3, 4], [5]]) == 1
    assert same_share([[3, 9, 7], []], [[3, 4], [5]]) == 1 / 4
    assert same_share([[]], [[]]) == 0
    row = Row("network", 15.0, 8, 2, "x", cpu=12.0, wall=6.0, speedup=2.0, wall_speedup=1.5, agreement=0.5)
    assert row.rtf == 0.1
    assert row.wall_rtf == 0.05
    last = "| network | 8 x 15 s | 2 | x | 0.1000 | 0.0500 | 2.00x | 1.50x | 50.0 % |"
    assert table([row]).splitlines()[-1] == last
