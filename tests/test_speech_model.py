"""Folders of models that speak: the official layout, ours, what is told of them, what is wrong with them."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nar_speech
from nar_speech import cli, config, hub, inspection
from nar_speech.codec.load import load_codec
from nar_speech.errors import CheckpointError, ConfigError, HubError
from nar_speech.models.recogniser_features import RecogniserFeatures
from nar_speech.models.w2vbert import W2vBert
from nar_speech.pipelines.speech_model import load_speech_parts, part_weights, resolve_speech
from nar_speech.pipelines.synthesize import Synthesizer
from nar_speech.speech_folder import FeaturesConfig, SpeechFile, write_speech_folder
from tests.speech_models import CARD, QUICK, speech, tiny_parts, tiny_synthesizer, write_official, write_own

IDS = tuple(range(40, 60))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "MaskGCT"
    return folder, write_official(folder)


@pytest.fixture(scope="module")
def own(tmp_path_factory, official):
    folder = tmp_path_factory.mktemp("ours") / "tiny"
    source, _ = official
    return folder, write_own(folder, source / "acoustic_codec", source / "w2v-bert-2.0")


def spoken(speaker):
    """What a model says of some phones in the voice of others."""
    voice = speaker.voice(speech(0.8), " ".join(map(str, IDS[:9])), "phones")
    return voice, speaker(IDS, voice, seed=3, **QUICK)


# ---- official -------------------------------------------------------------------------------------------


def test_the_official_layout_loads(official):
    folder, parts = official
    speaker = hub.load_model(folder, device="cpu")
    assert isinstance(speaker, Synthesizer)
    assert (speaker.card.model, speaker.card.name, speaker.sample_rate) == ("maskgct", "MaskGCT", 24000)
    assert len(speaker.parts.features.model.encoder.layers) == 17
    assert not speaker.parts.codec.config.pad_tail
    parts.prepare(torch.device("cpu"), "float32")
    voice, result = spoken(speaker)
    want_voice, want = spoken(Synthesizer(parts))
    assert torch.equal(voice.semantic, want_voice.semantic)
    assert torch.equal(voice.acoustic, want_voice.acoustic)
    assert np.array_equal(result.audio.samples, want.audio.samples)


def test_the_whole_package_knows_it(official):
    speaker = nar_speech.load_model(str(official[0]), device="cpu", steps=4)
    assert isinstance(speaker, nar_speech.Synthesizer)
    assert speaker.config.steps == 4
    with pytest.raises(ConfigError, match="unknown key 'beam'"):
        nar_speech.load_model(str(official[0]), device="cpu", beam=4)
    with pytest.raises(HubError, match="speaks and recognises no speech"):
        hub.load_parts(official[0])


def test_half_precision_speaks_too(official):
    speaker = hub.load_model(official[0], device="cpu", dtype="bfloat16")
    assert np.isfinite(spoken(speaker)[1].audio.samples).all()


def test_models_info_and_verify(official, own, capsys):
    for folder in (official[0], own[0]):
        assert inspection.find(folder)[1] == "synthesizer"
        assert cli.main(["models", "info", str(folder)]) == 0
        info = json.loads(capsys.readouterr().out)
        assert info["networks"]["s2a_full"]["num_codebooks"] == 3
        assert info["features"] == {"name": "w2v-BERT", "width": 16, "frame_rate": 50.0}
        assert info["parameters"]["t2s"] == sum(p.numel() for p in tiny_parts().networks.t2s.parameters())
        assert cli.main(["models", "verify", str(folder)]) == 0
        out = capsys.readouterr().out
        assert "PASS run: 1 s of noise, 4 phones" in out


def test_w2vbert_comes_from_the_hub_where_it_is_not_inside(official, tmp_path, monkeypatch):
    folder, _ = official
    copy = tmp_path / "MaskGCT"
    shutil.copytree(folder, copy)
    shutil.move(copy / "w2v-bert-2.0", tmp_path / "elsewhere")
    asked = []

    def download(repository, **options):
        asked.append((repository, options["allow_patterns"]))
        return str(tmp_path / "elsewhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(spoken(hub.load_model(copy, device="cpu"))[1].pieces) == 1
    assert asked == [("facebook/w2v-bert-2.0", ["config.json", "model.safetensors"])]


def test_only_the_files_of_the_model_are_downloaded(monkeypatch, official):
    asked = []

    def download(repository, **options):
        asked.append((repository, options["allow_patterns"]))
        return str(official[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_speech("maskgct") == resolve_speech("amphion/MaskGCT") == official[0]
    assert asked[0] == asked[1]
    assert "t2s_model/model.safetensors" in asked[0][1]
    with pytest.raises(HubError, match="no model that speaks ships with this version"):
        resolve_speech()


@pytest.mark.parametrize(
    "name",
    [
        "t2s_model",
        "s2a_model/s2a_model_1layer",
        "s2a_model/s2a_model_full",
        "semantic_codec",
        "acoustic_codec",
    ],
)
def test_an_official_folder_that_is_not_whole_is_refused(official, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(official[0], copy)
    shutil.rmtree(copy / name)
    with pytest.raises((CheckpointError, HubError), match=name if name != "acoustic_codec" else "is missing"):
        load_speech_parts(copy)


def test_an_official_file_with_other_tensors_is_refused(official, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(official[0], copy)
    shutil.copy(copy / "semantic_codec/model.safetensors", copy / "t2s_model/model.safetensors")
    with pytest.raises(CheckpointError, match="not the weights of a network of MaskGCT"):
        load_speech_parts(copy)
    shutil.copytree(official[0], copy, dirs_exist_ok=True)
    path = copy / "s2a_model/s2a_model_full/model.safetensors"
    tensors = load_file(path)
    tensors["layer_emb.weight"] = tensors["layer_emb.weight"][:2].clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"layer_emb\.weight"):
        load_speech_parts(copy)


# ---- ours -----------------------------------------------------------------------------------------------


def test_our_folder_gives_what_went_in(own):
    folder, _ = own
    speaker = hub.load_model(folder, device="cpu")
    assert speaker.config.steps == 4
    assert speaker.parts.phonemizer.language == "en"
    assert sorted(path.name for path in folder.iterdir()) == [
        "codec",
        "features",
        "model.safetensors",
        "model.yaml",
    ]
    voice, result = spoken(speaker)
    want_voice, want = spoken(tiny_synthesizer())
    assert torch.equal(voice.acoustic, want_voice.acoustic)
    # w2v-BERT is that of the official folder of the tests, whose layers were drawn in another order.
    assert result.audio.samples.shape == want.audio.samples.shape


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_our_folder_can_be_small(official, tmp_path, store, own):
    folder = tmp_path / store
    write_own(folder, official[0] / "acoustic_codec", official[0] / "w2v-bert-2.0", store)
    size = (folder / "model.safetensors").stat().st_size
    assert size < 0.6 * (own[0] / "model.safetensors").stat().st_size
    assert np.isfinite(spoken(hub.load_model(folder, device="cpu"))[1].audio.samples).all()


def test_features_of_a_recogniser(tmp_path, official):
    torch.manual_seed(0)
    parts = tiny_parts()
    model = hub.load_parts(hub.resolve("mini_en"))
    features = RecogniserFeatures(model.network, model.frontend, name=model.card.name)
    assert (features.frame_rate, features.width, features.sample_rate) == (50.0, 384, 16_000)
    sound = torch.from_numpy(speech(1.0, 16_000).samples)[None]
    hidden, counts = features(sound.repeat(2, 1), torch.tensor([16_000, 9000]))
    assert hidden.shape == (2, 50, 384)
    alone, _ = features(sound[:, :9000])
    torch.testing.assert_close(hidden[1, : counts[1]], alone[0], atol=1e-3, rtol=1e-3)
    assert not hidden[1, counts[1] :].any()
    statistics = (hidden[0].mean(0), hidden[0].var(0))
    features = RecogniserFeatures(model.network, model.frontend, statistics)
    assert float(features(sound)[0].mean()) == pytest.approx(0, abs=1e-3)
    # A whole model on them.
    sizes = {**config.to_dict(parts.semantic.config), "hidden_size": 384}
    from nar_speech.codec.repcodec import RepCodec, RepCodecConfig
    from nar_speech.codec.weight_norm import fold

    semantic = RepCodec(RepCodecConfig(**sizes)).eval()
    fold(semantic)
    file = SpeechFile(
        CARD,
        config.to_dict(parts.networks.t2s.config),
        config.to_dict(parts.networks.full.config),
        sizes,
        str(official[0] / "acoustic_codec"),
        features=FeaturesConfig("recogniser", "mini_en"),
    )
    modules = {"t2s": parts.networks.t2s, "s2a_full": parts.networks.full, "semantic": semantic}
    write_speech_folder(tmp_path / "model", part_weights(modules, features), file)
    speaker = hub.load_model(tmp_path / "model", device="cpu")
    assert speaker.parts.networks.first is None
    assert np.isfinite(spoken(speaker)[1].audio.samples).all()


def test_the_codec_of_a_model_is_a_codec(own):
    assert load_codec(own[0] / "codec").num_codebooks == 3


def changed(own, tmp_path, edit):
    """A copy of our folder with another model.yaml."""
    copy = tmp_path / "copy"
    shutil.copytree(own[0], copy)
    tree = config.read_yaml(copy / "model.yaml")
    edit(tree)
    config.write_yaml(tree, copy / "model.yaml")
    return copy


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("codec"), "key 'codec' is required"),
        (lambda t: t["t2s"].update(codebook_size=33), "t2s"),
        (lambda t: t["t2s"].update(depth=33), "unknown key 'depth'"),
        (lambda t: t["card"].update(model="magnet"), "a model that speaks has"),
        (lambda t: t["features"].update(layer=19), "layer 19 of a network of 18"),
        (lambda t: t["features"].update(kind="hubert"), "valid values: w2vbert, recogniser"),
        (lambda t: t["features"].update(source="nowhere/at-all@x y"), "no such model"),
        (lambda t: t.update(codec="nothing"), "no such codec"),
        (lambda t: t.pop("s2a_first"), "tensors of no part"),
        (lambda t: t["phonemizer"].update(style="plain"), "valid are spoken, official"),
    ],
)
def test_a_wrong_model_yaml_is_refused(own, tmp_path, edit, message):
    with pytest.raises((ConfigError, CheckpointError, HubError), match=message):
        load_speech_parts(changed(own, tmp_path, edit))


def test_a_wrong_option_of_the_folder_is_refused(own, tmp_path):
    copy = changed(own, tmp_path, lambda t: t["synthesis"].update(stepz=3))
    with pytest.raises(ConfigError, match="synthesis: unknown key 'stepz'"):
        hub.load_model(copy, device="cpu")


def test_statistics_are_part_of_our_folder(own, tmp_path):
    copy = changed(own, tmp_path, lambda t: None)
    tensors = load_file(copy / "model.safetensors")
    assert isinstance(load_speech_parts(copy).features, W2vBert)
    save_file({n: t for n, t in tensors.items() if n != "features.mean"}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"features\.mean is missing"):
        load_speech_parts(copy)


def test_another_folder_is_no_model_that_speaks(tmp_path):
    with pytest.raises(HubError, match="not a model that speaks"):
        load_speech_parts(tmp_path)
