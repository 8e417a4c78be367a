"""Official MAGNeT and MusicGen checkpoints: names and shapes, loading, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from nar_speech.checkpoint import SkipInit, compare_shapes, rename_tensors
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.layers.multistream import CONDITION, RENAME
from nar_speech.models.audiocraft_official import CODEC, WEIGHTS, from_official, is_official_folder
from nar_speech.models.magnet import Magnet, MagnetConfig
from nar_speech.models.musicgen import MusicGen, MusicGenConfig

FULL = json.loads((Path(__file__).parent / "golden" / "magnet" / "full_size.json").read_text())
NUMBERS = {"num_codebooks": 2, "codebook_size": 8, "width": 16, "heads": 2, "num_blocks": 2, "text_width": 12}
XP = {
    "lm_model": "transformer_lm_magnet",
    "sample_rate": 32000,
    "channels": 1,
    "dora": {"dir": "${oc.env:NO_SUCH_VARIABLE_ANYWHERE}/x"},
    "compression_model_checkpoint": "//pretrained/facebook/encodec_32khz",
    "dataset": {"segment_duration": 2},
    "masking": {"span_len": 3},
    "conditioners": {
        "args": {"merge_text_conditions_p": 0.25},
        "description": {"model": "t5", "t5": {"name": "t5-base", "finetune": False}},
    },
    "fuser": {"cross": ["description"], "sum": [], "prepend": []},
    "codebooks_pattern": {"modeling": "parallel", "delay": {"delays": [0, 1], "flatten_first": 0}},
    "generate": {"lm": {"temp": 3.5, "max_cfg_coef": 20.0}},
    "transformer_lm": {
        "n_q": 2,
        "card": 8,
        "dim": 16,
        "num_heads": 2,
        "num_layers": 2,
        "hidden_scale": 4,
        "causal": False,
        "norm": "layer_norm",
        "norm_first": True,
        "activation": "gelu",
        "bias_ff": False,
        "layer_scale": None,
        "subcodes_context": 5,
        "compression_model_framerate": 50,
    },
}


def official_names(network):
    """A state dict under audiocraft's names."""
    return {k.replace("condition_proj", CONDITION): v for k, v in network.state_dict().items()}


def write_folder(folder, network, **changes):
    config = OmegaConf.merge(
        OmegaConf.create(XP), OmegaConf.from_dotlist([f"{k}={v}" for k, v in changes.items()])
    )
    package = {"best_state": official_names(network), "xp.cfg": OmegaConf.to_yaml(config), "version": "1.3"}
    torch.save(package, folder / WEIGHTS)
    torch.save({"pretrained": "facebook/encodec_32khz"}, folder / CODEC)
    return folder


@pytest.mark.parametrize("name", sorted(FULL["models"]))
def test_full_size_models_have_the_official_names_and_shapes(name):
    entry = FULL["models"][name]
    entry = FULL["models"][entry["same_as"]] if "same_as" in entry else entry
    cls, conf = (MusicGen, MusicGenConfig) if "musicgen" in name else (Magnet, MagnetConfig)
    with torch.device("meta"), SkipInit():
        network = cls(
            conf(
                width=entry["width"],
                heads=entry["width"] // 64,
                num_blocks=entry["blocks"],
                text_width=entry["text"],
            )
        )
    width = entry["width"]
    sizes = {"D": width, "3*D": 3 * width, "4*D": 4 * width, "W": entry["text"]}
    pattern = {}
    for key, shape in FULL["tensors"].items():
        tensor = torch.empty([sizes.get(size, size) for size in shape], device="meta")
        for number in range(entry["blocks"] if ".N." in key else 1):
            pattern[key.replace(".N.", f".{number}.")] = tensor
    assert sum(t.numel() for t in pattern.values()) == entry["n_params"]
    renamed = rename_tensors(pattern, RENAME)
    assert compare_shapes(network, {k: tuple(v.shape) for k, v in renamed.items()}) == []


@pytest.mark.parametrize("positions", ["sin", "rope", "sin_rope"])
def test_an_audiocraft_magnet_loads(positions, tmp_path):
    torch.manual_seed(0)
    network = Magnet(MagnetConfig(**NUMBERS, segment_seconds=2.0, positions=positions)).eval()
    write_folder(tmp_path, network, **{"transformer_lm.positional_embedding": positions})
    assert is_official_folder(tmp_path)
    parts = from_official(tmp_path)
    assert parts.network.config == network.config
    assert parts.conditioner.name == "google-t5/t5-base"
    assert parts.codec == str(tmp_path / CODEC)
    assert parts.generation == {"temp": 3.5, "max_cfg_coef": 20.0}
    assert parts.card.sample_rate == 32000
    tokens = torch.randint(9, (1, 2, 20))
    assert torch.equal(parts.network(tokens), network(tokens))


def test_an_audiocraft_musicgen_loads(tmp_path):
    network = MusicGen(MusicGenConfig(**NUMBERS)).eval()
    write_folder(
        tmp_path,
        network,
        **{
            "lm_model": "transformer_lm",
            "codebooks_pattern.modeling": "delay",
            "dataset.segment_duration": 30,
        },
    )
    (tmp_path / CODEC).unlink()
    parts = from_official(tmp_path)
    assert parts.network.config.lags == (0, 1)
    assert parts.codec == "facebook/encodec_32khz"
    tokens = torch.randint(9, (1, 2, 20))
    assert torch.equal(parts.network(tokens), network(tokens))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lm_model": "other"}, ConfigError),
        ({"transformer_lm.bias_ff": "true"}, ConfigError),
        ({"transformer_lm.dim": "wide"}, ConfigError),
        ({"transformer_lm.num_layers": 3}, CheckpointError),
        ({"transformer_lm.num_heads": 3}, ConfigError),
        ({"conditioners.self_wav.model": "chroma_stem"}, ConfigError),
        ({"interleave_stereo_codebooks.use": "true"}, ConfigError),
        ({"transformer_lm.causal": "true"}, ConfigError),
        ({"transformer_lm.xpos": "true"}, ConfigError),
        ({"transformer_lm.positional_embedding": "none"}, ConfigError),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, error, tmp_path):
    write_folder(tmp_path, Magnet(MagnetConfig(**NUMBERS)), **change)
    with pytest.raises(error) as caught:
        from_official(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_damaged_packages_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        from_official(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"PK\x03\x04 not a whole file")
    with pytest.raises(CheckpointError, match="damaged"):
        from_official(tmp_path)
    torch.save({"best_state": {}}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="best_state"):
        from_official(tmp_path)
    torch.save({"best_state": {"a": torch.zeros(1)}}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"xp\.cfg"):
        from_official(tmp_path)
    torch.save({"best_state": {"a": torch.zeros(1)}, "xp.cfg": "a: [1"}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match=r"xp\.cfg"):
        from_official(tmp_path)


class Payload:
    """Runs code when a careless reader unpickles it."""

    def __reduce__(self):
        return print, ("owned",)


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"best_state": Payload(), "xp.cfg": ""}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="trust"):
        from_official(tmp_path)
    assert "owned" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def transformers_musicgen(tmp_path_factory):
    """A tiny random MusicGen in transformers' layout, and the model itself."""
    from transformers import (
        EncodecConfig,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        T5Config,
    )

    torch.manual_seed(0)
    text = T5Config(vocab_size=50, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    audio = EncodecConfig(
        sampling_rate=32000, num_filters=2, hidden_size=8, codebook_dim=8, codebook_size=8, num_lstm_layers=1,
        upsampling_ratios=[8, 5, 4, 4],
    )  # fmt: skip
    decoder = MusicgenDecoderConfig(
        vocab_size=8, num_codebooks=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
        activation_dropout=0.0, dropout=0.0, layerdrop=0.0, max_position_embeddings=64,
    )  # fmt: skip
    model = MusicgenForConditionalGeneration(
        MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict())
    ).eval()
    folder = tmp_path_factory.mktemp("musicgen")
    model.save_pretrained(folder)
    return folder, model


def test_a_transformers_musicgen_loads_into_the_same_network(transformers_musicgen):
    folder, model = transformers_musicgen
    parts = from_official(folder)
    states, mask = torch.randn(2, 5, 12), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    sequence = torch.randint(9, (2, 2, 11))
    projected = model.enc_to_dec_proj(states) * mask.unsqueeze(-1)
    with torch.no_grad():
        wanted = model.decoder(
            sequence.flatten(0, 1), encoder_hidden_states=projected, encoder_attention_mask=mask
        ).logits.view(2, 2, 11, 8)
        got = parts.network(sequence, states, mask)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    assert parts.network.config.frame_rate == 50


def test_the_text_encoder_of_a_transformers_musicgen_is_found_inside(transformers_musicgen, monkeypatch):
    import transformers

    from nar_speech.text.conditioner import load_conditioner

    class Letters:
        def __call__(self, text, verbose=False):
            return {"input_ids": [ord(c) % 48 + 1 for c in text]}

    folder, model = transformers_musicgen
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: Letters())
    conditioner = load_conditioner(from_official(folder).conditioner)
    states, _ = conditioner(["abc"])
    ids = torch.tensor([conditioner.tokens("abc")])
    with torch.no_grad():
        torch.testing.assert_close(states, model.text_encoder(ids).last_hidden_state)


def test_a_transformers_folder_without_weights_or_in_stereo_is_refused(transformers_musicgen, tmp_path):
    folder, _ = transformers_musicgen
    tree = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        from_official(tmp_path)
    tree["decoder"]["audio_channels"] = 2
    (tmp_path / "config.json").write_text(json.dumps(tree))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="stereo"):
        from_official(tmp_path)
