"""The tool that names operations whose results depend on company."""

from dataclasses import replace

import pytest
import torch

from benchmarks.batch_invariance import culprits, random_paraformer
from benchmarks.toy_models import ToyStream
from nar_speech.engine.graphs import stable_sizes
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.sanm import CrossAttention
from nar_speech.layers.silero import SileroVad


class Uneven(ToyStream):
    """Adds what depends on the row, or goes another way in large batches."""

    branches = False

    def step(self, audio, lengths, final, state):
        size = len(audio)
        noise = torch.linspace(1.0, 1.0 if size == 1 else 2.0, size)[:, None]
        if self.branches and size > 2:
            noise = noise.neg()
        output, new = super().step(audio, lengths, final, state)
        return output, replace(new, hidden=new.hidden + noise)


def test_names_the_operation_that_treats_rows_unlike():
    found = culprits(Uneven(), sizes=(2,), steps=1)
    assert ("aten.linspace.default", "position") in [(c.operation, c.how) for c in found]
    model = Uneven()
    model.branches = True
    found = culprits(model, sizes=(2, 4), steps=1)
    assert ("aten.neg.default", "path", 4) in [(c.operation, c.how, c.size) for c in found]


class Alone:
    """Only the voice activity network."""

    sample_rate, chunk, device = 16000, 1600, torch.device("cpu")

    def __init__(self, vad):
        self.vad = vad
        self.init_state = vad.init_stream

    def step(self, audio, lengths, final, state):
        _, _, state = self.vad.step_stream(audio, lengths, state)
        return state, state


def test_the_packed_voice_activity_network_has_none():
    model = Alone(pack_linear_layers(SileroVad.from_package()))
    assert culprits(model) == []
    with torch.inference_mode():
        assert stable_sizes(model, (1, 2, 3, 4, 8)) == (1, 2, 3, 4, 8)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_streaming_paraformer_has_none(tmp_path):
    model = random_paraformer(tmp_path, 1)
    assert culprits(model, sizes=(2, 4), steps=1) == []
    with torch.inference_mode():
        assert stable_sizes(model, (1, 2, 4, 8)) == (1, 2, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_a_token_does_not_see_how_many_tokens_other_streams_have(dtype):
    """They decide how many places the decoder's attention computes."""
    torch.manual_seed(0)
    attention = pack_linear_layers(CrossAttention(512, 4).to(dtype).eval())
    tokens, memory = torch.randn(4, 40, 512).to(dtype), torch.randn(4, 25, 1024).to(dtype)
    with torch.inference_mode():
        alone = attention.attend(tokens[:, :3], memory, few=True)
        for count in range(2, 41):
            both = min(3, count)
            found = attention.attend(tokens[:, :count], memory, few=True)
            assert found.shape[1] == count
            assert torch.equal(found[:, :both], alone[:, :both]), count
