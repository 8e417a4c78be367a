"""Feature distillation: the loss by its definition, and a recipe with a student that streams."""

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nar_speech import hub
from nar_speech.errors import InputError
from nar_speech.losses.distill import feature_distance
from nar_speech.models.ctc_stream import CtcStream
from nar_speech.train.recipe import run_recipe
from nar_speech.train.report import read_log
from recipes import ctc
from tests.corpus import make_manifest

ROOT = Path(__file__).parent.parent
SMALL = {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 1}
SMALL |= {"branch_blocks": 1, "branch_stride": 2}


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), more=st.integers(0, 2))
def test_distance_by_its_definition(lengths, more):
    generator = torch.Generator().manual_seed(sum(lengths))
    student = torch.randn(len(lengths), 6, 3, generator=generator, requires_grad=True)
    teacher = torch.randn(len(lengths), 6 + more, 3, generator=generator, requires_grad=True)
    want = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            want += sum((student[row, t, d] - teacher[row, t, d]).item() ** 2 for d in range(3)) / 3
    got = feature_distance(student, teacher, torch.tensor(lengths))
    assert got.item() == pytest.approx(want / len(lengths), rel=1e-5)
    got.backward()
    assert teacher.grad is None
    assert bool(student.grad.any()) == any(lengths)


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 12, 4), (2, 6, 5), (1, 6, 4)])
def test_a_teacher_that_does_not_fit_is_refused(shape):
    with pytest.raises(InputError, match="frame rate and width"):
        feature_distance(torch.zeros(2, 6, 4), torch.zeros(shape), torch.tensor([6, 6]))


def test_recipe_teaches_a_streaming_encoder(tmp_path):
    torch.set_num_threads(1)
    texts = ["Go left", "stop", "the cat", "a dog ran"]
    data = [make_manifest(tmp_path, 24, texts, "train"), make_manifest(tmp_path, 5, texts, "dev")]

    def run(name, encoder, frontend, **sections):
        tree = yaml.safe_load((ROOT / "configs/ctc/tiny.yaml").read_text())
        tree["network"] = {"encoder": "whisper", "encoder_conf": encoder}
        tree["frontend"] = {"kind": "log_mel", **frontend}
        tree["data"] |= {"train": [str(data[0])], "dev": [str(data[1])]}
        tree["train"] |= {"max_steps": 12, "output_dir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**tree, **sections}))
        assert run_recipe(ctc.Recipe, ctc.recipe, [str(tmp_path / f"{name}.yaml")], "") == 0
        return tmp_path / name

    teacher = run("teacher", SMALL, {})
    section = {"model": str(teacher / "model"), "weight": 1.0}
    student = run("student", {**SMALL, "chunk_size": 4, "left": 8}, {"peak": 1.0}, teacher=section)
    rows = [row for row in read_log(student / "train.jsonl") if "loss_teacher" in row]
    assert len(rows) == 12
    assert all(row["loss"] == pytest.approx(row["loss_ctc"] + row["loss_teacher"], rel=1e-4) for row in rows)
    parts = hub.load_parts(student / "model")
    assert CtcStream(parts.network, parts.frontend).chunk == 4 * 4 * 160
