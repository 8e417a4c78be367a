"""Weights: safe reading, strict loading, rename tables, one-line errors."""

import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nar_speech import checkpoint
from nar_speech.checkpoint import (
    SkipInit,
    compare_shapes,
    load_strict,
    read_weights,
    rename_tensors,
    save_safetensors,
    tensor_shapes,
)
from nar_speech.errors import CheckpointError


class RunsCode:
    """A pickle of this writes a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def error_of(function, *arguments, **options):
    with pytest.raises(CheckpointError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["plain", "state_dict", "model_state_dict", "nested", "module"],
)
def test_pickles_are_read_and_unwrapped(tmp_path, wrap, zipped):
    state = nn.Linear(3, 2).state_dict()
    torch.save(wrap(dict(state)), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    got = read_weights(tmp_path / "x.pt")
    assert set(got) == {"weight", "bias"}
    assert torch.equal(got["weight"], state["weight"])


def test_safetensors_round_trip_of_shared_and_strided_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    save_safetensors(tmp_path / "x.safetensors", {"a": base, "b": base, "c": base.T}, {"made": "here"})
    got = read_weights(tmp_path / "x.safetensors")
    assert torch.equal(got["a"], base)
    assert torch.equal(got["b"], base)
    assert torch.equal(got["c"], base.T)
    assert tensor_shapes(tmp_path / "x.safetensors") == {"a": (3, 4), "b": (3, 4), "c": (4, 3)}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_content_decides_not_the_suffix(tmp_path):
    save_safetensors(tmp_path / "model.pt", {"a": torch.ones(2)})
    assert torch.equal(read_weights(tmp_path / "model.pt")["a"], torch.ones(2))


@pytest.mark.parametrize("way", ["zip", "old", "pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, way):
    path, trap = tmp_path / "x.pt", tmp_path / "trap"
    if way == "pickle":
        path.write_bytes(pickle.dumps(RunsCode(trap), protocol=2))
    else:
        torch.save({"a": RunsCode(trap)}, path, _use_new_zipfile_serialization=way == "zip")
    message = error_of(read_weights, path)
    assert "x.pt" in message
    assert "trust" in message
    assert not trap.exists()


def test_the_refused_name_is_told(tmp_path):
    torch.save({"a": RunsCode("nowhere")}, tmp_path / "x.pt")
    assert "posix.system" in error_of(read_weights, tmp_path / "x.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    assert "Linear" in error_of(read_weights, tmp_path / "module.pt")


BAD_FILES = {
    "empty.pt": (b"", "empty"),
    "page.pt": (b"\n <!DOCTYPE html><html>not found</html>", "web page"),
    "page.safetensors": (b"<html></html>", "web page"),
    "lfs.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "text.pt": (b"hello world " * 20, "get the weights again"),
    "text.safetensors": (b"hello world " * 20, "not a safetensors file"),
    "header.safetensors": (b"\x10\0\0\0\0\0\0\0{garbage garbage", "damaged or truncated"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_not_weights(tmp_path, name):
    data, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    message = error_of(read_weights, tmp_path / name)
    assert name in message
    assert words in message


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.95])
def test_truncated_files(tmp_path, kind, part):
    tensors = {"a": torch.randn(4000)}
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        save_safetensors(path, tensors)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    message = error_of(read_weights, path)
    assert str(path) in message
    assert "again" in message


def test_missing_file_folder_and_wrong_content(tmp_path):
    assert "no such weights file" in error_of(read_weights, tmp_path / "gone.pt")
    assert "is a folder" in error_of(read_weights, tmp_path)
    for tree, words in (
        ([1, 2], "holds a list"),
        ({"epoch": 3, "w": torch.ones(1)}, "epoch is not a tensor"),
        ({"state_dict": {}}, "no tensors"),
    ):
        torch.save(tree, tmp_path / "x.pt")
        assert words in error_of(read_weights, tmp_path / "x.pt")


def test_strict_loading_names_what_is_wrong():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in state.items()}
    wrong = {name: tensor for name, tensor in state.items() if name != "0.bias"}
    wrong["extra"] = torch.ones(1)
    wrong["1.weight"] = torch.ones(5, 4)
    message = error_of(load_strict, model, wrong, where="file.pt")
    assert message.startswith("file.pt: ")
    assert "1 missing: 0.bias" in message
    assert "1 unexpected: extra" in message
    assert "1.weight is 5x4 in the file, 2x4 in the model" in message
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_long_lists_are_cut():
    message = compare_shapes(nn.Linear(1, 1), {f"x{i}": (1,) for i in range(50)})
    assert message == [
        "2 missing: weight, bias",
        "50 unexpected: x0, x1, x2, ... (47 more)",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    model = nn.Linear(3, 2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["weight"][1, 2] = value
    assert "weight" in error_of(load_strict, model, state)


def test_half_precision_files_load_in_full_precision(tmp_path):
    source = nn.BatchNorm1d(4)
    save_safetensors(tmp_path / "x.safetensors", source.half())
    model = nn.BatchNorm1d(4)
    load_strict(model, read_weights(tmp_path / "x.safetensors"))
    assert model.weight.dtype == torch.float32
    assert model.num_batches_tracked.dtype == torch.int64
    assert model.weight.requires_grad


def test_tied_parameters_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    load_strict(model, {"a.weight": torch.eye(2), "b.weight": torch.eye(2)})
    assert model.a.weight is model.b.weight
    assert torch.equal(model.a.weight, torch.eye(2))


def test_rename_table():
    tensors = {
        "enc.0.w": torch.zeros(1),
        "enc.1.w": torch.ones(1),
        "old.x": torch.ones(1),
        "keep": torch.ones(2),
    }
    got = rename_tensors(tensors, {r"enc\.(\d+)\.": r"encoder.layer\1.", r"old\.": None})
    assert set(got) == {"encoder.layer0.w", "encoder.layer1.w", "keep"}
    assert "two tensors" in error_of(rename_tensors, tensors, {r"enc\.\d\.": "same."}, "x.pt")


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text("abcdef.", min_size=1, max_size=8),
        st.lists(st.integers(0, 4), max_size=3),
        min_size=1,
        max_size=5,
    )
)
def test_any_tensors_come_back_equal(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_safetensors(path, tensors)
    got = read_weights(path)
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


def test_skip_init_changes_nothing_after_a_strict_load():
    wanted = nn.Sequential(
        nn.Linear(8, 8), nn.LSTM(8, 4), nn.Conv1d(8, 8, 3), nn.Embedding(5, 8), nn.LayerNorm(8)
    )
    with SkipInit():
        model = nn.Sequential(
            nn.Linear(8, 8), nn.LSTM(8, 4), nn.Conv1d(8, 8, 3), nn.Embedding(5, 8), nn.LayerNorm(8)
        )
    load_strict(model, wanted.state_dict())
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_sha256_and_failed_writes(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    assert checkpoint.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
    save_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    assert torch.equal(read_weights(tmp_path / "x.safetensors")["a"], torch.zeros(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "x.safetensors"]
