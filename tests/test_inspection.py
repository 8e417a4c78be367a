"""`nar-speech models info` and `verify` on codecs and sound generators; test_hub.py has the recognisers."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nar_speech import cli, inspection
from nar_speech.codec.folder import write_codec_folder
from nar_speech.errors import HubError
from nar_speech.pipelines import sound_model
from nar_speech.sound_folder import write_sound_folder
from nar_speech.text.conditioner import ConditionerConfig
from nar_speech.types import ModelCard
from tests import sound_models as sounds
from tests.test_spectral_codec import make_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return write_codec_folder(
        tmp_path_factory.mktemp("models") / "codec", make_codec(), ModelCard("toy", "codec", "spectral")
    )


def test_a_codec(codec, capsys):
    assert cli.main(["models", "info", str(codec)]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["card"]["name"], info["codebooks"], info["sample_rate"]) == ("toy", 3, 16000)
    assert cli.main(["models", "verify", str(codec)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "PASS folder",
        "PASS sha256",
        "PASS weights",
        "PASS run",
    ]
    assert "codec" in lines[0]


def test_a_damaged_codec(codec, tmp_path):
    folder = shutil.copytree(codec, tmp_path / "codec")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    checks = inspection.verify(folder)
    assert [check.passed for check in checks] == [True, False]
    assert "SHA-256 differs" in checks[1].detail


def test_a_sound_generator(tmp_path, monkeypatch):
    monkeypatch.setattr(sound_model, "load_conditioner", lambda *_: sounds.Words())
    network, card = sounds.tiny_magnet(), ModelCard("tiny", "generate", "magnet", sounds.RATE)
    codec = sounds.write_codec(tmp_path / "codec")
    folder = write_sound_folder(tmp_path / "m", network, card, network.config, codec, ConditionerConfig())
    info = inspection.model_info(folder)
    assert info["card"]["task"] == "generate"
    assert info["parameters"] == sum(p.numel() for p in network.parameters())
    assert info["codec"]["codebooks"] == info["network"]["num_codebooks"] == sounds.CODEBOOKS
    checks = inspection.verify(folder)
    assert [check.passed for check in checks] == [True] * 4
    assert int(checks[1].detail.split()[0]) >= 2  # of the codec inside too
    assert "sound in" in checks[3].detail


def test_a_file_that_names_another_codec_obeys_the_options(tmp_path):
    torch.save({"pretrained": "facebook/encodec_32khz"}, tmp_path / "compression_state_dict.bin")
    last = inspection.verify(tmp_path, tmp_path / "cache", offline=True)[-1]
    assert not last.passed
    assert "offline mode is on" in last.detail
    with pytest.raises(HubError, match="offline mode is on"):
        inspection.model_info(tmp_path, tmp_path / "cache", offline=True)


def test_a_folder_goes_before_a_short_name(codec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(codec, "mimi")
    assert inspection.find("mimi", offline=True) == (Path("mimi"), "codec")


def test_names_of_codecs_are_known(monkeypatch):
    asked = []

    def resolve(name, *_):
        asked.append(name)
        raise HubError("no network")

    monkeypatch.setattr(inspection.hub, "resolve", resolve)
    assert not inspection.verify("encodec_24khz")[0].passed
    assert asked == ["facebook/encodec_24khz"]
