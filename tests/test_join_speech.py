"""Trained networks put together to a model that speaks."""

from pathlib import Path

import pytest
import torch

from nar_speech import config as configs
from nar_speech.codec.folder import write_codec_folder
from nar_speech.codec.repcodec import RepCodec, RepCodecConfig
from nar_speech.codec.spectral import SpectralCodec, SpectralCodecConfig
from nar_speech.models.duration import DurationConfig, DurationPredictor
from nar_speech.models.maskgct import S2A, T2S, S2AConfig, T2SConfig
from nar_speech.models.maskgct_part import write_part
from nar_speech.pipelines.semantic import features_source, load_semantic, write_semantic_folder
from nar_speech.pipelines.speech_model import load_speech_parts
from nar_speech.speech_folder import FeaturesConfig, read_speech_file
from nar_speech.types import ModelCard
from recipes import join_speech


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of tiny networks, a codec and a card."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    made = {
        "t2s": T2S(T2SConfig(16, 1, 2, 2, 24, 400)),
        "s2a": S2A(S2AConfig(16, 1, 2, 2, 2, 16, 24)),
        "s2a_first": S2A(S2AConfig(16, 1, 2, 2, 1, 16, 24)),
        "duration": DurationPredictor(DurationConfig(16, 1, 2, 2, 400)),
    }
    for name, network in made.items():
        write_part(base / name, network, ModelCard("x", "speech_part", name.removesuffix("_first")))
    small = {"width": 8, "expansion": 1, "encoder_blocks": 1, "decoder_blocks": 1, "code_width": 4}
    codec = SpectralCodec(SpectralCodecConfig(num_codebooks=3, codebook_size=16, **small)).eval()
    for name, tensor in codec.state_dict().items():
        if name.endswith("started"):
            tensor.fill_(True)
    write_codec_folder(base / "codec", codec, ModelCard("tiny_codec", "codec", "spectral"))
    network = RepCodecConfig(24, 384, 4, 8, 16, 1)
    statistics, source = (torch.zeros(384), torch.ones(384)), FeaturesConfig("recogniser", "mini_en")
    card = ModelCard("tiny", "semantic", "repcodec")
    write_semantic_folder(base / "semantic", RepCodec(network), network, source, statistics, card)
    (base / "card.yaml").write_text("name: tiny_tts\nlicence: none\nlanguages: [en]\n")
    return base


def words(parts, out, *more, leave=()):
    named = {name: parts / name for name in ("t2s", "s2a", "duration", "semantic", "codec")}
    options = [w for name, path in named.items() if name not in leave for w in (f"--{name}", str(path))]
    return [str(parts / "card.yaml"), "-o", str(out), *options, "--language", "en", *more]


def test_an_official_semantic_folder_reads_w2v_bert(parts, tmp_path):
    assert features_source(parts / "semantic") == FeaturesConfig("recogniser", "mini_en")
    assert features_source(tmp_path) == FeaturesConfig()


@pytest.mark.parametrize("first", [False, True])
def test_parts_become_a_model(parts, tmp_path, first):
    more = ("--s2a-first", str(parts / "s2a_first")) if first else ()
    assert join_speech.main(words(parts, tmp_path, *more, "cfg=1.5", "acoustic_steps=[8,2]")) == 0
    file, loaded = read_speech_file(tmp_path), load_speech_parts(tmp_path)
    assert (file.card.name, file.card.task, file.codec) == ("tiny_tts", "synthesize", "codec")
    assert file.synthesis == {"cfg": 1.5, "acoustic_steps": [8, 2]}
    assert (loaded.networks.first is not None) == first
    assert loaded.predictor is not None
    seconds = loaded.predictor([1, 2], 0.4, [3, 4, 5], torch.Generator().manual_seed(0))
    assert 0 <= seconds < 60
    reference = torch.cat([p.flatten() for p in loaded.networks.t2s.parameters()])
    original = configs.from_dict(T2SConfig, file.t2s)
    assert original.num_phones == 400
    assert reference.isfinite().all()
    assert set(loaded.modules()) == {"t2s", "s2a_full", "duration", "semantic"} | (
        {"s2a_first"} if first else set()
    )


def test_a_model_without_durations_is_small_in_int8(parts, tmp_path):
    whole = tmp_path / "whole"
    assert join_speech.main(words(parts, whole, leave=("duration",))) == 0
    assert load_speech_parts(whole).predictor is None
    assert join_speech.main(words(parts, tmp_path / "small", "--store", "int8", leave=("duration",))) == 0

    def size(folder):
        return (Path(folder) / "model.safetensors").stat().st_size

    assert size(tmp_path / "small") < 0.7 * size(whole)
    load_speech_parts(tmp_path / "small")


def test_rounded_codes_are_those_of_the_rounded_model(parts, tmp_path):
    """Codes that a codec stored in int8 makes are those that the whole model in int8 makes of a prompt."""
    torch.manual_seed(5)
    network = RepCodecConfig(64, 384, 8, 96, 128, 2)
    codec, source = RepCodec(network), FeaturesConfig("recogniser", "mini_en")
    statistics, card = (torch.zeros(384), torch.ones(384)), ModelCard("tiny", "semantic", "repcodec")
    t2s, s2a = T2S(T2SConfig(16, 1, 2, 2, 64, 400)), S2A(S2AConfig(16, 1, 2, 2, 2, 16, 64))
    for name, part in (("t2s", t2s), ("s2a", s2a)):
        write_part(tmp_path / name, part, ModelCard("x", "speech_part", name))
    write_semantic_folder(tmp_path / "semantic", codec, network, source, statistics, card, "int8")
    named = {"t2s": tmp_path / "t2s", "s2a": tmp_path / "s2a", "semantic": tmp_path / "semantic"}
    options = [word for name, path in named.items() for word in (f"--{name}", str(path))]
    more = ("--codec", str(parts / "codec"), *options, "--store", "int8")
    assert join_speech.main([str(parts / "card.yaml"), "-o", str(tmp_path / "model"), *more]) == 0
    features = torch.randn(2, 200, 384)
    trained = load_semantic(tmp_path / "semantic").codec.encode(features)
    spoken = load_speech_parts(tmp_path / "model").semantic.encode(features)
    assert float((trained == spoken).float().mean()) > 0.99
    assert trained.unique().numel() > 16


def test_what_does_not_fit_is_one_line(parts, tmp_path, capsys):
    assert join_speech.main(words(parts, tmp_path, "cfgg=1")) == 2
    assert join_speech.main(words(parts, tmp_path, "--t2s", str(parts / "s2a"))) == 2
    assert join_speech.main(words(parts, tmp_path, "--semantic", str(tmp_path / "none"))) == 2
    torch.manual_seed(0)
    write_part(
        tmp_path / "other",
        T2S(T2SConfig(16, 1, 2, 2, 25, 400)),
        ModelCard("x", "speech_part", "t2s"),
    )
    assert join_speech.main(words(parts, tmp_path / "m", "--t2s", str(tmp_path / "other"))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 4
    assert "semantic codes" in lines[-1]
