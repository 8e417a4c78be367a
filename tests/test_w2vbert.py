"""w2v-BERT up to a layer: against transformers' own classes, batches, folders, wrong input."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.checkpoint import save_safetensors
from nar_speech.errors import AudioError, CheckpointError, ConfigError
from nar_speech.models import w2vbert
from nar_speech.models.w2vbert import W2vBert, read_statistics

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "feature_projection_input_dim": 160,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def noise(*shape, seed=0):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole():
    """transformers' network with all four layers."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    torch.manual_seed(0)
    network = Wav2Vec2BertModel(Wav2Vec2BertConfig(**SMALL)).eval().requires_grad_(False)
    for number, parameter in enumerate(network.parameters()):
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return network


WHOLE = whole()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("w2vbert")
    (path / "config.json").write_text(json.dumps(SMALL | {"model_type": "wav2vec2-bert"}))
    save_safetensors(path / "model.safetensors", WHOLE)
    save_safetensors(path / "stats.safetensors", {"mean": noise(16), "var": noise(16, seed=1).abs() + 0.5})
    return path


@settings(max_examples=8, deadline=None)
@given(samples=st.integers(560, 12_000), layer=st.integers(1, 4), seed=st.integers(0, 99))
def test_features_are_those_of_transformers(folder, samples, layer, seed):
    from transformers import SeamlessM4TFeatureExtractor

    network = W2vBert.from_folder(folder, folder / "stats.safetensors", layer)
    wave = noise(1, samples, seed=seed)
    read = SeamlessM4TFeatureExtractor(padding_value=0.0)(
        wave[0].numpy(), sampling_rate=16_000, return_tensors="pt"
    )
    inputs, mask, counts = network.inputs(wave, torch.tensor([samples]))
    torch.testing.assert_close(inputs, read["input_features"], atol=2e-3, rtol=0)
    assert torch.equal(mask, read["attention_mask"].bool())
    want = WHOLE(inputs, mask, output_hidden_states=True).hidden_states[layer]
    got, lengths = network(wave)
    torch.testing.assert_close(got * network.variance.sqrt() + network.mean, want, atol=1e-4, rtol=1e-4)
    assert lengths.tolist() == counts.tolist() == [(1 + (samples - 400) // 160 + 1) // 2]


@settings(max_examples=8, deadline=None)
@given(samples=st.lists(st.integers(560, 9000), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_a_batch_equals_its_singles(folder, samples, seed):
    network = W2vBert.from_folder(folder, folder / "stats.safetensors", 3)
    waves = noise(len(samples), max(samples), seed=seed)  # what lies behind a row is not looked at
    batch, lengths = network(waves, torch.tensor(samples))
    for row, size in enumerate(samples):
        alone, count = network(waves[row : row + 1, :size])
        assert count[0] == lengths[row] == alone.shape[1]
        torch.testing.assert_close(batch[row, : count[0]], alone[0], atol=1e-4, rtol=1e-4)
        assert not batch[row, count[0] :].any()


def test_layers_behind_are_not_built(folder):
    network = W2vBert.from_folder(folder, folder / "stats.safetensors", 2)
    assert len(network.model.encoder.layers) == 2
    assert not any("layers.2." in name or "masked_spec_embed" in name for name in network.state_dict())


def test_the_published_statistics_ship_with_the_package():
    mean, variance = read_statistics(w2vbert.STATISTICS)
    assert mean.shape == variance.shape == (1024,)
    assert variance.min() > 0
    assert float(mean.abs().max()) == pytest.approx(1.9134, abs=1e-3)


def test_wrong_waves_are_refused(folder):
    network = W2vBert.from_folder(folder, folder / "stats.safetensors", 1)
    with pytest.raises(AudioError, match="it needs 560 or more"):
        network(noise(1, 559))
    with pytest.raises(AudioError, match="NaN or infinite"):
        network(torch.full((1, 600), float("nan")))
    with pytest.raises(AudioError, match="expected float"):
        network(torch.zeros(600))
    with pytest.raises(AudioError, match="lengths"):
        network(noise(1, 600), torch.tensor([601]))


def test_wrong_folders_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="layer 17 of a network of 4"):
        W2vBert.from_folder(folder, folder / "stats.safetensors")
    with pytest.raises(ConfigError, match="statistics of"):
        W2vBert.from_folder(folder, layer=2)  # the published ones are of another width
    with pytest.raises(CheckpointError, match="expected mean and var"):
        W2vBert.from_folder(folder, folder / "model.safetensors", 2)
    with pytest.raises(ConfigError, match="can't be read"):
        W2vBert.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    with pytest.raises(ConfigError, match="expected wav2vec2-bert"):
        W2vBert.from_folder(tmp_path)
    wrong = SMALL | {"model_type": "wav2vec2-bert", "num_attention_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    save_safetensors(tmp_path / "model.safetensors", WHOLE)
    with pytest.raises((ConfigError, CheckpointError)):
        W2vBert.from_folder(tmp_path, folder / "stats.safetensors", 2)
