"""Model folders of sound generation: ours and official ones, and what is refused."""

import pytest
import torch
from omegaconf import OmegaConf

import nar_speech
from nar_speech import cli, hub
from nar_speech.errors import ConfigError, HubError
from nar_speech.layers.multistream import CONDITION
from nar_speech.models.audiocraft_official import MAGNET, MUSICGEN, WEIGHTS
from nar_speech.pipelines import sound_model
from nar_speech.pipelines.generate import SoundGenerator
from nar_speech.pipelines.sound_model import load_sound_parts, resolve_sound
from nar_speech.sound_folder import write_sound_folder
from nar_speech.text.conditioner import ConditionerConfig
from nar_speech.types import ModelCard
from tests.sound_models import (
    CODEBOOKS,
    CODES,
    QUICK,
    RATE,
    SIZES,
    Words,
    tiny_generator,
    tiny_magnet,
    tiny_partner,
    write_codec,
)

torch.set_num_threads(1)
CARD = ModelCard("tiny", "generate", "magnet", RATE)


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """Text encoders of the folders are the one of the tests."""
    monkeypatch.setattr(sound_model, "load_conditioner", lambda config, folder, *place: Words())


def folder_of(path, network=None, card=CARD, **generation):
    codec = write_codec(path.parent / "tiny_codec")
    network = network or tiny_magnet()
    options = {**QUICK, **generation}
    return write_sound_folder(path, network, card, network.config, codec, ConditionerConfig(), options)


def official(path, network, kind):
    """An export as audiocraft makes it, its codec named by folder."""
    state = {
        name.replace("condition_proj", CONDITION): tensor for name, tensor in network.state_dict().items()
    }
    config = {
        "lm_model": kind,
        "sample_rate": RATE,
        "compression_model_checkpoint": str(write_codec(path.parent / "tiny_codec")),
        "dataset": {"segment_duration": 2},
        "masking": {"span_len": 3},
        "conditioners": {"description": {"model": "t5", "t5": {"name": "t5-base"}}},
        "transformer_lm": {
            "n_q": CODEBOOKS,
            "card": CODES,
            "dim": SIZES["width"],
            "num_heads": SIZES["heads"],
            "num_layers": SIZES["num_blocks"],
            "hidden_scale": 4,
            "subcodes_context": 2,
            "compression_model_framerate": 25,
        },
    }
    path.mkdir()
    torch.save({"best_state": state, "xp.cfg": OmegaConf.to_yaml(config)}, path / WEIGHTS)
    return path


def test_a_folder_of_ours_makes_what_its_parts_make(tmp_path):
    folder = folder_of(tmp_path / "model")
    loaded = nar_speech.load_model(folder, device="cpu")
    assert isinstance(loaded, SoundGenerator)
    assert loaded.card == CARD
    assert loaded.generation.steps == QUICK["steps"]
    want = tiny_generator()("a dog", duration=1.0, seed=2)
    assert torch.equal(loaded("a dog", duration=1.0, seed=2).codes.tokens, want.codes.tokens)
    other = nar_speech.load_model(folder, device="cpu", steps=[2])
    assert other("a dog", duration=1.0).calls == 6


def test_top_k_of_a_model_file_is_not_lost_to_the_default_of_top_p(tmp_path):
    loaded = SoundGenerator.from_folder(folder_of(tmp_path / "model", top_k=5), "cpu")
    assert (loaded.generation.top_k, loaded.generation.top_p) == (5, 0.0)


def test_the_place_of_downloads_reaches_codec_and_text_encoder(tmp_path, monkeypatch):
    asked = []
    codec = sound_model.load_codec

    def load_codec(name, cache_dir=None, offline=None):
        asked.append((cache_dir, offline))
        return codec(name)

    def load_conditioner(config, folder, *place):
        asked.append(place)
        return Words()

    monkeypatch.setattr(sound_model, "load_codec", load_codec)
    monkeypatch.setattr(sound_model, "load_conditioner", load_conditioner)
    folder = folder_of(tmp_path / "model")
    partner = folder_of(
        tmp_path / "partner", tiny_partner().network, ModelCard("p", "generate", "musicgen", RATE)
    )
    nar_speech.load_model(folder, device="cpu", cache_dir="kept", offline=True, partner=partner)
    assert asked == [("kept", True)] * 4
    words = ["generate", "rain", "--model", folder, "--partner", partner, "--hybrid", 0.5, "--duration", 1]
    words += ["--offline", "--cache-dir", "kept", "-o", tmp_path / "x.wav"]
    assert cli.main([str(word) for word in words]) == 0
    assert asked == [("kept", True)] * 8


def test_official_folders_load_with_the_defaults_of_the_api(tmp_path):
    folder = official(tmp_path / "magnet", tiny_magnet(), MAGNET)
    partner = official(tmp_path / "musicgen", tiny_partner().network, MUSICGEN)
    loaded = SoundGenerator.from_folder(folder, "cpu", partner=partner, **QUICK)
    assert loaded.partner.network.config.segment_seconds == 2
    assert loaded.generation.top_p == 0.9
    want = tiny_generator(partner=True)("rain", duration=1.0, rescore=True)
    got = loaded("rain", duration=1.0, rescore=True)
    assert torch.equal(got.codes.tokens, want.codes.tokens)
    assert SoundGenerator.from_folder(folder, "cpu").generation.steps == (20, 10, 10, 10)
    with pytest.raises(ConfigError, match="is autoregressive"):
        SoundGenerator.from_folder(partner, "cpu")
    with pytest.raises(ConfigError, match="must be autoregressive"):
        SoundGenerator.from_folder(folder, "cpu", partner=folder)


def test_parts_that_do_not_belong_together_are_refused(tmp_path, monkeypatch):
    wrong = type(tiny_magnet().config)

    def network(**changes):
        return type(tiny_magnet())(wrong(**{**SIZES, **changes}))

    cases = {
        "another": (network(codebook_size=CODES + 1), "codec tiny_codec has 3 of 24|codec .* has 3 of 24"),
        "more": (network(num_codebooks=CODEBOOKS + 1), "4 codebooks"),
        "rate": (network(frame_rate=50.0), "50 frames per second"),
        "text": (network(text_width=9), "width 9"),
    }
    for name, (made, message) in cases.items():
        with pytest.raises(ConfigError, match=message):
            load_sound_parts(folder_of(tmp_path / name, made))


def test_folders_that_are_wrong_say_so(tmp_path, capsys):
    with pytest.raises(ConfigError, match="unknown model 'paraformer'"):
        load_sound_parts(folder_of(tmp_path / "kind", card=ModelCard("tiny", "generate", "paraformer", RATE)))
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        SoundGenerator.from_folder(folder_of(tmp_path / "key", colour=1), "cpu")
    with pytest.raises(ConfigError, match="top_p"):
        SoundGenerator.from_folder(folder_of(tmp_path / "value", top_p=3.0), "cpu")
    folder = folder_of(tmp_path / "model")
    with pytest.raises(HubError, match="recognises no speech"):
        hub.load_parts(folder)
    assert cli.main(["transcribe", "--model", str(folder), "x.wav"]) == 2
    assert "recognises no speech" in capsys.readouterr().err
    with pytest.raises(HubError, match="no such model folder"):
        resolve_sound(tmp_path / "nothing")
    with pytest.raises(HubError, match=r"nothing: .*mini_sound, magnet-small-10secs"):
        resolve_sound("nothing")


def test_names_of_official_models_are_known(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "resolve", lambda name, *place: asked.append(name))
    resolve_sound("magnet-small-10secs")
    resolve_sound("audio-magnet-medium")
    assert asked == ["facebook/magnet-small-10secs", "facebook/audio-magnet-medium"]
