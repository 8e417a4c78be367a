"""What the processor decides: the dtype of ``--dtype auto``, the lengths that share a batch."""

import numpy as np
import pytest
import torch

from nar_speech.errors import ConfigError
from nar_speech.layers import processor
from nar_speech.layers.processor import fastest_dtype
from nar_speech.model_folder import DecodingConfig
from nar_speech.pipelines.segment import Piece
from nar_speech.pipelines.transcribe import _Batches, _Job, pick_dtype, resolve_dtype

VNNI, BF16 = "_is_vnni_supported", "_is_avx512_bf16_supported"


@pytest.mark.parametrize(
    ("abilities", "kernels", "want"),
    [
        ({VNNI: True, BF16: True}, True, "int8"),
        ({VNNI: True, BF16: True}, False, "bfloat16"),
        ({VNNI: False, BF16: True}, True, "bfloat16"),
        ({VNNI: False, BF16: False}, True, "float32"),
    ],
)
def test_goes_by_the_processor(monkeypatch, abilities, kernels, want):
    for name, value in abilities.items():
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
    monkeypatch.setattr(processor, "int8_available", lambda: kernels)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert fastest_dtype() == want
    assert resolve_dtype("auto", torch.device("cpu")) == want


def test_an_older_pytorch_without_the_checks(monkeypatch):
    for name in (VNNI, BF16):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert fastest_dtype() == "float32"


def test_on_a_gpu_it_is_float32():
    assert fastest_dtype("cuda:0") == "float32"


def test_names_that_are_no_dtype():
    assert resolve_dtype("bf16", torch.device("cpu")) == "bf16"
    with pytest.raises(ConfigError, match=r"got 'fast'; valid values: auto, float32, bfloat16, int8"):
        pick_dtype("fast")


@pytest.mark.parametrize(("device", "want"), [("cpu", [[40], [36, 35], [30]]), ("cuda", [[40, 36, 35, 30]])])
def test_lengths_that_share_a_batch(device, want):
    """With 10 samples a second: on a CPU within 10 % of the longest."""
    seen = []

    def recognise(waves, *_):
        seen.append([len(wave) for wave in waves])
        return [None] * len(waves)

    recognise.sample_rate, recognise.device = 10, torch.device(device)
    batches = _Batches(recognise, DecodingConfig(), None, False, 60.0)
    job = _Job("x", None)
    for size in (35, 40, 30, 36):
        batches.add(job, Piece(0.0, np.zeros(size, np.float32)))
    batches.flush()
    assert seen == want
    assert job.waiting == 0
