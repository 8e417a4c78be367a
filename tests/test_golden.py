"""Every recorded case under tests/golden passes, whatever its folder is called, and the runner can fail."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nar_speech.errors import MissingExtraError
from tests import golden

CASES = golden.find_cases([Path(__file__).parent / "golden"])


@pytest.mark.parametrize("folder", CASES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_recorded_case(folder):
    try:
        verdict, checks = golden.run_case(folder)
    except MissingExtraError as error:
        pytest.skip(str(error))
    failed = [f"{c.name}: {c.difference:.3g} > {c.tolerance}" for c in checks if not c.passed]
    assert verdict == "PASS", failed


def test_all_kinds_of_this_repository_are_covered():
    kinds = {json.loads((c / "meta.json").read_text())["kind"] for c in CASES}
    assert kinds >= {kind for _, kind in golden.HANDLERS}


def test_a_folder_name_means_nothing(tmp_path):
    case = next(c for c in CASES if json.loads((c / "meta.json").read_text())["kind"] == "predictor")
    shutil.copytree(case, tmp_path / "some" / "other name")
    assert golden.main([str(tmp_path), "--quiet"]) == 0


def test_a_wrong_number_fails(tmp_path):
    case = next(c for c in CASES if json.loads((c / "meta.json").read_text())["kind"] == "offline")
    copy = Path(shutil.copytree(case, tmp_path / "case"))
    io = load_file(copy / "io.safetensors")
    name = next(n for n in io if n.startswith("single0") and n.endswith("encoder_out"))
    io[name] = io[name] + 1e-2 * torch.randn_like(io[name])
    save_file(io, copy / "io.safetensors")
    assert golden.main([str(tmp_path), "--quiet"]) == 1


def test_an_unknown_kind_is_unsupported_and_not_a_pass(tmp_path, capsys):
    (tmp_path / "meta.json").write_text(json.dumps({"system": "paraformer", "kind": "nothing_we_know"}))
    assert golden.main([str(tmp_path)]) == 1
    assert "UNSUPPORTED" in capsys.readouterr().out


def test_no_case_is_not_a_pass(tmp_path):
    assert golden.main([str(tmp_path)]) == 1
