"""Loading codecs: every kind of file, and files that are wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nar_speech import locate
from nar_speech.codec import load
from nar_speech.codec.folder import write_codec_folder
from nar_speech.codec.load import fingerprint, load_codec
from nar_speech.codec.vocos import Vocos
from nar_speech.errors import CheckpointError, ConfigError, HubError, InputError
from nar_speech.types import ModelCard
from tests.codec_models import MIMI, codec, waves
from tests.golden_kinds.codec import codes_of

GOLDEN = Path(__file__).parent / "golden" / "codec"


def recorded(case):
    folder = GOLDEN / case
    tensors = (load_file(folder / f"{part}.safetensors") for part in ("weights", "io"))
    return json.loads((folder / "meta.json").read_text())["config"], *tensors


def folder_of(path, kind, config, tensors, safe=True):
    """A folder of transformers."""
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"model_type": kind, "transformers_version": "4.0", **config})
    )
    if safe:
        save_file(tensors, path / "model.safetensors")
    else:
        torch.save(tensors, path / "pytorch_model.bin")
    return path


def old_norms(tensors):
    """Names of before torch's parametrizations."""
    pairs = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, old in pairs.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_of_transformers_encodec(tmp_path, old):
    config, weights, io = recorded("encodec_hf_causal")
    folder = folder_of(tmp_path / "small", "encodec", config, old_norms(weights) if old else weights, not old)
    made = load_codec(folder)
    assert (made.name, made.training) == ("small", False)
    assert not any(p.requires_grad for p in made.parameters())
    assert not any("original0" in name for name in made.state_dict())  # weight norm is folded
    key = max(name for name in io if name.startswith("codes"))
    tokens = made.encode(io["wav"], num_codebooks=io[key].shape[2]).tokens
    assert torch.equal(tokens, io[key][0])


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_of_transformers_mimi(tmp_path, old):
    config, weights, io = recorded("mimi_small")
    if old:
        for before, after in load.mimi.OLD_PARTS.items():
            weights = {
                before + n.removeprefix(after) if n.startswith(after) else n: t for n, t in weights.items()
            }
        config = {**config, "rope_theta": 10000.0}
    made = load_codec(folder_of(tmp_path / "mimi", "mimi", config, weights))
    assert torch.equal(made.encode(io["wav"]).tokens, io["codes.nq4"])
    torch.testing.assert_close(made.decode(codes_of(made, io["codes.nq4"]))[0], io["wav_out.nq4"])


def test_dac_official_and_of_transformers(tmp_path):
    config, weights, io = recorded("dac_official")
    torch.save({"state_dict": weights, "metadata": {"kwargs": config}}, tmp_path / "weights.pth")
    made = load_codec(tmp_path / "weights.pth")
    assert torch.equal(made.encode(io["wav"]).tokens, io["codes.nq4"])
    assert torch.equal(load_codec(tmp_path).encode(io["wav"]).tokens, io["codes.nq4"])
    settings = made.config.to_dict()
    again = load_codec(folder_of(tmp_path / "hf", "dac", settings, made.model.state_dict()))
    assert torch.equal(again.encode(io["wav"]).tokens, io["codes.nq4"])
    assert fingerprint(again) == fingerprint(made)


def audiocraft_tree(config, weights):
    c = dict(config)
    cfg = {
        "compression_model": "encodec",
        "sample_rate": c["sample_rate"],
        "channels": c["channels"],
        "encodec": {
            "sample_rate": "${sample_rate}",
            "channels": "${channels}",
            "causal": c["causal"],
            "renormalize": c.get("renormalize", False),
        },
        "seanet": {k: c[k] for k in ("dimension", "n_filters", "n_residual_layers", "ratios", "pad_mode")}
        | {"true_skip": c["true_skip"], "lstm": c["lstm"], "decoder": {"trim_right_ratio": 1.0}}
        | {"norm": "weight_norm", "activation": "ELU", "activation_params": {"alpha": 1.0}},
        "rvq": {"n_q": c["n_q"], "bins": c["bins"]},
    }
    return {"best_state": weights, "xp.cfg": json.dumps(cfg), "version": "1", "exported": True}


@pytest.mark.parametrize("nested", [False, True])
def test_audiocraft(tmp_path, nested):
    config, weights, io = recorded("encodec_ac_renorm_stereo_oddstride")
    tree = audiocraft_tree(config, {"model": weights} if nested else weights)
    torch.save(tree, tmp_path / "compression_state_dict.bin")
    made = load_codec(tmp_path)
    codes = made.encode(io["wav"])
    assert torch.equal(codes.tokens, io["codes.nq6"])
    assert made.name == tmp_path.name
    torch.testing.assert_close(codes.scales, io["scale"])


def test_audiocraft_that_names_another(tmp_path):
    config, weights, _ = recorded("encodec_hf_causal")
    other = folder_of(tmp_path / "other", "encodec", config, weights)
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "compression_state_dict.bin"
    torch.save({"pretrained": str(other)}, path)
    assert fingerprint(load_codec(path.parent)) == fingerprint(load_codec(other))
    torch.save({"pretrained": str(path)}, path)
    with pytest.raises(CheckpointError, match="name each other"):
        load_codec(path)


def test_encodec_package(tmp_path):
    """Its files hold tensors only; sizes are read from them."""
    from nar_speech.codec.encodec import PACKAGE_MODELS, EncodecCodec

    small = {"num_filters": 2, "hidden_size": 8, "upsampling_ratios": [4, 2], "codebook_size": 1024}
    made = EncodecCodec({**PACKAGE_MODELS[1], **small, "target_bandwidths": [2 * 10 * 3.0]})
    tensors = {}
    for name, tensor in old_norms(made.model.state_dict()).items():
        transposed = ".conv." in name and any(name.startswith(f"decoder.layers.{i}.conv.") for i in (3, 6))
        name = name.replace(".conv.", ".convtr.convtr." if transposed else ".conv.conv.")
        name = name.replace("encoder.layers.", "encoder.model.").replace("decoder.layers.", "decoder.model.")
        name = name.replace("quantizer.layers.", "quantizer.vq.layers.").replace("codebook.", "_codebook.")
        tensors[name] = tensor
    torch.save(tensors, tmp_path / "encodec_24khz.th")
    loaded = load_codec(tmp_path / "encodec_24khz.th")
    assert (loaded.sample_rate, loaded.hop, loaded.name) == (24000, 8, "encodec_24khz")
    sound = waves(made, 1, 100)
    assert made.num_codebooks == loaded.num_codebooks == 2
    assert torch.equal(loaded.encode(sound).tokens, made.encode(sound).tokens)


def test_our_folder_and_the_default(tmp_path, monkeypatch):
    card = ModelCard(name="little", task="codec", model="spectral", sample_rate=2000)
    write_codec_folder(tmp_path / "assets" / "mini_codec", codec("spectral"), card)
    monkeypatch.setattr(locate, "ASSETS", tmp_path / "assets")
    sound = waves(codec("spectral"), 1, 300)
    for name in ("default", "mini_codec", tmp_path / "assets" / "mini_codec"):
        made = load_codec(name)
        assert made.name == "little"
        assert torch.equal(made.encode(sound).tokens, codec("spectral").encode(sound).tokens)
    monkeypatch.setattr(locate, "ASSETS", tmp_path / "none")
    with pytest.raises(HubError, match="mini_codec is not in this installation"):
        load_codec()


def test_vocos_official(tmp_path):
    _, weights, io = recorded("vocos_mel_istft_center")
    config = {
        "feature_extractor": {
            "class_path": "vocos.feature_extractors.MelSpectrogramFeatures",
            "init_args": {"sample_rate": 24000, "n_fft": 128, "hop_length": 32, "n_mels": 20},
        },
        "backbone": {
            "class_path": "vocos.models.VocosBackbone",
            "init_args": {"input_channels": 20, "dim": 32, "intermediate_dim": 64, "num_layers": 3},
        },
        "head": {
            "class_path": "vocos.heads.ISTFTHead",
            "init_args": {"dim": 32, "n_fft": 128, "hop_length": 32, "padding": "center"},
        },
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    made = Vocos.from_official(tmp_path)
    torch.testing.assert_close(made(io["features"])[0], io["wav"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(made.features(io["audio"]), io["mel"])
    with pytest.raises(ConfigError, match="is a vocoder"):
        load_codec(tmp_path)
    for part, change, words in (
        ("head", {"class_path": "x.Other"}, "head Other is not supported"),
        ("head", {"init_args": {"dim": 32, "n_fft": 128}}, "hop_length: is needed"),
        ("backbone", {"init_args": {"dim": 32}}, "is required"),
        ("backbone", None, "not a Vocos model"),
    ):
        broken = {**config, part: None if change is None else {**config[part], **change}}
        (tmp_path / "config.yaml").write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match=words):
            Vocos.from_official(tmp_path)


def test_files_that_are_wrong(tmp_path):
    config, weights, _ = recorded("encodec_hf_causal")
    good = folder_of(tmp_path / "good", "encodec", config, weights)

    def variant(name, **files):
        folder = Path(shutil.copytree(good, tmp_path / name))
        for file, content in files.items():
            path = folder / {"config": "config.json", "weights": "model.safetensors"}[file]
            path.unlink()
            if content is not None:
                path.write_bytes(content)
        return folder

    other = json.dumps({"model_type": "bert"}).encode()
    as_mimi = json.dumps({"model_type": "mimi", **MIMI}).encode()
    cut = (good / "model.safetensors").read_bytes()[:-50]
    wide = json.dumps({"model_type": "encodec", **config, "num_filters": 4}).encode()
    odd = json.dumps({"model_type": "encodec", **config, "codebook_size": 17}).encode()
    for folder, words in (
        (variant("bert", config=other), "model_type 'bert' is not a codec"),
        (variant("mimi", config=as_mimi), "don't fit the model"),
        (variant("wide", config=wide), "misshaped"),
        (variant("odd", config=odd), "impossible configuration"),
        (variant("text", config=b"{"), "not valid JSON"),
        (variant("nothing", weights=None), "has config.json but no model.safetensors"),
        (variant("bare", config=None), "without its config.json"),
        (variant("cut", weights=cut), "damaged or truncated"),
        (good / "model.safetensors", "only a part of a codec"),
        (tmp_path / "nowhere" / "at_all", "no such model folder"),
        ("no_such_codec", "no such codec"),
        ("", "no such codec"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            load_codec(folder)
        assert "\n" not in str(caught.value)
    for number, (tree, words) in enumerate(
        (
            ({"best_state": weights}, "xp.cfg: is missing"),
            ({"best_state": weights, "xp.cfg": "compression_model: dac"}, "'dac' is not supported"),
            ({"best_state": weights, "xp.cfg": "lm: 1"}, "part 'seanet' is missing"),
            ({"best_state": {"a": 1}, "xp.cfg": "lm: 1"}, "no plain tensors"),
            ({"state_dict": weights, "metadata": {}}, "no metadata.kwargs"),
            ({"linear.weight": torch.zeros(2)}, "not the weights of a codec"),
        )
    ):
        path = tmp_path / f"{number}.pth"
        torch.save(tree, path)
        with pytest.raises(InputError, match=words):
            load_codec(path)
    (tmp_path / "junk.th").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        load_codec(tmp_path / "junk.th")


def test_a_shortcut_that_the_weights_lack(tmp_path, caplog):
    from nar_speech.codec.encodec import EncodecCodec
    from tests.codec_models import ENCODEC

    made = EncodecCodec({**ENCODEC, "use_conv_shortcut": False})
    early = {**ENCODEC, "use_conv_shortcut": True}
    folder = folder_of(tmp_path / "early", "encodec", early, made.model.state_dict())
    loaded = load_codec(folder)
    assert "use_conv_shortcut" in caplog.text
    sound = waves(made, 1, 100)
    torch.testing.assert_close(loaded.model.encoder(sound), made.model.encoder(sound))
