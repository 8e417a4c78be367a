"""The speed benchmark: a run on a tiny model, its arithmetic, its refusals."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import nar_speech
from benchmarks import asr_offline
from benchmarks.asr import embedded, onnx_files
from benchmarks.asr.embedded import Clip, Score
from benchmarks.asr.random_model import SIZES, write_folder
from benchmarks.asr_offline import Row, against_onnx, main, same_share, table
from nar_speech.audio import read_audio, write_audio
from nar_speech.errors import InputError

ASSETS = Path(nar_speech.__file__).parent / "assets"
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
    "--no-onnx",
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


def test_it_names_what_it_skips(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in ("funasr", "onnxruntime") else find_spec(name, *a),
    )
    words = [word for word in TINY if word != "--no-onnx"]
    assert main([*words, "--batch", "--dtypes", "float32"]) == 0
    out = capsys.readouterr().out
    assert "funasr: skipped, funasr not installed; see benchmarks/README.md" in out
    for dtype in ("float32", "int8"):
        assert re.search(f"onnxruntime {dtype}: skipped, funasr, (onnx, )?onnxruntime not installed", out)
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
    folder = write_folder(tmp_path, SIZES["tiny"])
    peak = asr_offline.peak_memory("float32", folder, 1.0)
    assert 100e6 < peak < 3e9


@pytest.mark.skipif(bool(onnx_files.lacking()), reason="needs funasr, onnx, onnxruntime")
@pytest.mark.slow
def test_the_onnx_export_gives_the_same_tokens(capsys):
    words = [word for word in TINY if word != "--no-onnx"]
    assert main([*words, "--dtypes", "float32", "--stages", "network"]) == 0
    out = capsys.readouterr().out
    same = re.findall(r"\| onnxruntime float32 \|.*\| ([\d.]+) % \|", out)
    assert len(same) == 2
    assert all(float(share) > 90 for share in same)
    assert len(re.findall(r"- .*: nar_speech float32 against onnxruntime int8: [\d.]+x by CPU", out)) == 2


def clips_of_the_package(folder):
    """A manifest of the sample that is shipped, at 16 kHz."""
    samples = read_audio(ASSETS / "sample.flac", 16000).samples
    write_audio(folder / "sample.wav", samples, 16000)
    text = (ASSETS / "sample.txt").read_text(encoding="utf-8").strip()
    manifest = folder / "clips.jsonl"
    manifest.write_text(json.dumps({"path": "sample.wav", "text": text}))
    return manifest


def test_clips_without_rivals(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = ["--no-paraformer", "--repeats", "1", "--dtypes", "float32", "--json", str(path)]
    words += ["--clips", str(clips_of_the_package(tmp_path)), "--decoders", "ctc_greedy"]
    assert main([*words, "--rivals-python", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out
    for name in embedded.RIVALS:
        assert f"{name}: skipped, no interpreter {tmp_path / 'none'}; see benchmarks/README.md" in out
    (row,) = json.loads(path.read_text())
    assert row["system"] == "nar_speech ctc_greedy float32"
    assert row["cpu"] > 0
    assert row["wer"]["rate"] < 0.7
    assert "| nar_speech ctc_greedy float32 |" in out


def test_a_rival_answers_clip_by_clip(tmp_path, monkeypatch):
    script = tmp_path / "rivals.py"
    script.write_text(
        "import json, sys\n"
        "print(json.dumps({'system': sys.argv[1], 'description': 'stand-in 1.0'}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    path = json.loads(line)['path']\n"
        "    answer = {'error': 'no file'} if 'bad' in path else {'text': path, 'cpu': 2.0, 'wall': 3.0}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "embedded.py"))
    rival = embedded.Rival("stand-in", Path(sys.executable), 1)
    try:
        assert rival.description == "stand-in 1.0"
        good, bad = (Clip(f"/{name}.wav", "", np.zeros(16000, np.float32)) for name in ("good", "bad"))
        assert rival(good) == ("/good.wav", 2.0, 3.0)
        with pytest.raises(InputError, match="no file"):
            rival(bad)
    finally:
        rival.close()


def test_a_rival_that_lacks_its_package_is_skipped(tmp_path):
    systems, skipped = embedded.start("default", [], [], embedded.RIVALS, Path(sys.executable), 1)
    for system in systems:
        system.close()
    names = [system.name for system in systems]
    assert sorted([*names, *(line.split(":")[0] for line in skipped)]) == sorted(embedded.RIVALS)
    assert all("is not installed; see benchmarks/README.md" in line for line in skipped)


def test_the_table_of_clips():
    clips = [Clip(f"/{name}/1.wav", "one two", np.zeros(16000, np.float32)) for name in ("a", "b")]
    slow = Score(embedded.REFERENCE, "", [[(1.0, 2.0), (1.0, 2.0)]], ["one", "one two"])
    fast = Score("x", "", [[(0.1, 0.2), (0.1, 0.2)], [(9.0, 9.0), (9.0, 9.0)], [(0.2, 0.2), (0.2, 0.2)]])
    fast.texts = ["1 2", "One, two."]
    lines = embedded.table([slow, fast], clips).splitlines()
    assert lines[0].endswith("| WER all | a | b |")
    assert lines[2].startswith(f"| {embedded.REFERENCE} | 1.0000 | 2.0000 | 1.00x | 1.00x | 25.0 [")
    assert lines[2].endswith("| 50.0 | 0.0 |")
    assert lines[3] == "| x | 0.2000 | 0.2000 | 5.00x | 10.00x | 0.0 [0.0, 0.0] | 0.0 | 0.0 |"


def test_the_fastest_of_ours_meets_onnx_runtime():
    def row(system, cpu, wall, stage="network"):
        return Row(stage, 15.0, 1, 1, system, cpu, wall, None, None, None)

    rows = [row("onnxruntime int8", 1.0, 3.0), row("nar_speech float32", 2.0, 2.0)]
    rows += [row("nar_speech int8", 0.5, 2.0), row("nar_speech int8", 0.1, 0.1, "text")]
    line = "nar_speech int8 against onnxruntime int8: 2.00x by CPU time, 1.50x by wall time"
    assert against_onnx(rows) == [f"- 1 x 15 s, 1 threads: {line}"]
    assert against_onnx(rows[1:]) == []


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
