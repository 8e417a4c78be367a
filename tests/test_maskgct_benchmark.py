"""The benchmark of MaskGCT runs; that its baseline computes what ours does is in test_maskgct_sampling.py."""

import json

import pytest
import torch

from benchmarks import maskgct


def test_it_runs_and_writes_its_numbers(tmp_path, capsys):
    torch.set_num_threads(1)
    words = ["--size", "tiny", "--seconds", "0.3", "--prompt", "0.1", "--phones", "5", "--codebooks", "3"]
    words += ["--threads", "1", "--dtypes", "float32", "--repeats", "1", "--layers", "1"]
    assert maskgct.main([*words, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["steps"] for row in rows] == [25, 25, 25, 25, 11, 11, 61, 61]
    assert all(row["cpu"] > 0 for row in rows)
    for name in ("cpu", "wall"):
        assert rows[-1][name] == pytest.approx(sum(row[name] for row in rows[1:6:2]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rows)
    assert all(" 1.00, 1.00 " in line for line in lines[2:] if "official" in line)
