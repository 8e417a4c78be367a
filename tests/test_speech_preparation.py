"""From recordings to semantic codes, and to folders of phones and codes."""

from pathlib import Path

import pytest
import torch
from lhotse import CutSet

from nar_speech import config as configs
from nar_speech.checkpoint import SkipInit
from nar_speech.codec.folder import write_codec_folder
from nar_speech.codec.load import load_codec
from nar_speech.codec.repcodec import RepCodec, RepCodecConfig
from nar_speech.codec.spectral import SpectralCodec, SpectralCodecConfig
from nar_speech.data.augment import open_cuts, read_cut
from nar_speech.data.speech_tokens import SpeechTokenStore
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.features import Frontend, FrontendConfig
from nar_speech.layers.whisper import WhisperEncoder, WhisperEncoderConfig
from nar_speech.models.recogniser_features import RecogniserFeatures
from nar_speech.pipelines import semantic
from nar_speech.pipelines.semantic import (
    SemanticTokenizer,
    load_semantic,
    start_codebooks,
    unquantized,
    write_semantic_folder,
)
from nar_speech.speech_folder import FeaturesConfig
from nar_speech.text.g2p import Phonemizer
from nar_speech.train.recipe import run_recipe
from nar_speech.train.report import read_log
from nar_speech.types import ModelCard
from recipes import prepare_speech, semantic_codec
from tests.corpus import make_manifest

ROOT = Path(__file__).parent.parent
TINY = RepCodecConfig(
    codebook_size=16,
    codebook_dim=4,
    hidden_size=8,
    vocos_dim=8,
    vocos_intermediate_dim=16,
    vocos_num_layers=1,
)
TEXTS = ["one, two", "three cats", "four", "привет"]  # the last is not English
CARD = ModelCard("tiny", "semantic", "repcodec")


class Recogniser(torch.nn.Module):
    """A tiny one."""

    def __init__(self):
        super().__init__()
        conf = WhisperEncoderConfig(output_size=8, attention_heads=2, linear_units=8, num_blocks=1)
        self.encoder = WhisperEncoder(80, conf)


def tiny_features(statistics=None):
    torch.manual_seed(0)
    frontend = Frontend(FrontendConfig(kind="log_mel", num_mels=80, normalize="none"))
    return RecogniserFeatures(Recogniser(), frontend, statistics)


@pytest.fixture(autouse=True)
def quick_features(monkeypatch):
    """The tiny recogniser in place of the embedded one."""
    torch.set_num_threads(1)

    def load(config, statistics=None, cache_dir=None, offline=None):
        assert config.kind == "recogniser"
        return tiny_features(statistics)

    monkeypatch.setattr(semantic, "load_features", load)
    monkeypatch.setattr(semantic_codec, "load_features", load)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny codec and a tiny semantic codec."""
    base = tmp_path_factory.mktemp("speech")
    torch.manual_seed(1)
    small = {"width": 8, "expansion": 1, "encoder_blocks": 1, "decoder_blocks": 1, "code_width": 4}
    codec = SpectralCodec(SpectralCodecConfig(num_codebooks=3, codebook_size=16, **small)).eval()
    for name, tensor in codec.state_dict().items():
        if name.endswith(".embed"):
            tensor.copy_(torch.randn(tensor.shape))
    write_codec_folder(base / "codec", codec, ModelCard("tiny_codec", "codec", "spectral"))
    statistics = torch.zeros(8), torch.ones(8)
    source = FeaturesConfig("recogniser", "default")
    write_semantic_folder(base / "semantic", RepCodec(TINY), TINY, source, statistics, CARD)
    make_manifest(base / "wav", 8, TEXTS, "train")
    return base


def options(base, out):
    """Words of the command; texts are read by espeak-ng, which is in the extra ``tts``."""
    for package in ("phonemizer", "espeakng_loader"):
        pytest.importorskip(package)
    return [
        str(base / "wav" / "train.jsonl.gz"),
        *("-o", str(out), "--codec", str(base / "codec"), "--semantic", str(base / "semantic")),
        *("--language", "en", "--codebooks", "2", "--shard-size", "4", "--batch-seconds", "2"),
    ]


# ---- the semantic codec -------------------------------------------------------------------------------


def test_codes_of_a_batch_are_those_of_its_singles(base):
    tokenizer = load_semantic(base / "semantic")
    waves, lengths = 0.1 * torch.randn(3, 9000), torch.tensor([9000, 4000, 6401])
    codes, counts = tokenizer.encode(waves, lengths)
    assert tokenizer.codebook_size == 16
    for row, samples in enumerate(lengths.tolist()):
        alone, count = tokenizer.encode(waves[row : row + 1, :samples])
        assert int(count[0]) == int(counts[row])
        assert torch.equal(alone[0], codes[row, : len(alone[0])])
        assert not codes[row, len(alone[0]) :].any()


def test_a_folder_comes_back(tmp_path):
    torch.manual_seed(3)
    codec, statistics = RepCodec(TINY), (torch.randn(8), torch.rand(8) + 0.5)
    source = FeaturesConfig("recogniser", "default")
    write_semantic_folder(tmp_path, codec, TINY, source, statistics, CARD)
    again = load_semantic(tmp_path)
    features = torch.randn(2, 7, 8)
    assert torch.equal(again.codec.encode(features), codec.eval().encode(features))
    torch.testing.assert_close(again.features.mean, statistics[0])
    torch.testing.assert_close(again.features.variance, statistics[1])
    path = tmp_path / "model.yaml"
    text = path.read_text()
    path.write_text(text.replace("task: semantic", "task: codec"))
    with pytest.raises(ConfigError, match=r"card: task"):
        load_semantic(tmp_path)
    path.write_text(text.replace("hidden_size: 8", "hidden_size: 9"))
    with pytest.raises(CheckpointError, match="fit"):
        load_semantic(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError):
        load_semantic(tmp_path)


def test_features_of_another_width_are_refused():
    codec = RepCodec(RepCodecConfig(**{**vars(TINY), "hidden_size": 12}))
    with pytest.raises(ConfigError, match="reads features of 12"):
        SemanticTokenizer(tiny_features(), codec)


def test_codes_begin_as_frames():
    torch.manual_seed(0)
    codec, features = RepCodec(TINY).eval(), torch.randn(4, 30, 8)
    before = codec.encode(features).unique().numel()
    start_codebooks(codec, features)
    level = codec.quantizer.quantizers[0]
    vectors = level.in_project(codec.analyse(features)).transpose(1, 2).flatten(0, 1)
    assert float(torch.cdist(level.codebook.weight, vectors).amin(1).max().detach()) < 1e-3
    assert codec.encode(features).unique().numel() == 16 >= before
    start_codebooks(codec, features[:1, :5])  # fewer frames than codes
    assert level.codebook.weight.unique(dim=0).shape[0] == 5
    through = codec.synthesise(level.out_project(level.in_project(codec.analyse(features))))
    torch.testing.assert_close(unquantized(codec, features), through)


def run(base, folder, *words):
    manifest = base / "wav" / "train.jsonl.gz"
    return run_recipe(
        semantic_codec.Recipe,
        semantic_codec.recipe,
        [
            str(ROOT / "configs/maskgct/tiny_semantic.yaml"),
            f"data.train=[{manifest}]",
            f"data.dev=[{manifest}]",
            f"train.output_dir={folder}",
            *words,
        ],
        "doc",
    )


def test_the_semantic_codec_trains_resumes_and_is_written(base, tmp_path):
    words = ("train.optim.schedule=constant", "train.save_every=100", "train.validate_every=100")
    assert run(base, tmp_path, *words, "train.max_steps=8") == 0
    first = {r["step"]: r["loss"] for r in read_log(tmp_path / "train.jsonl") if "loss" in r}
    assert run(base, tmp_path, *words, "train.max_steps=80") == 0
    second = {r["step"]: r["loss"] for r in read_log(tmp_path / "train.jsonl") if "loss" in r}
    assert all(second[step] == first[step] for step in first)
    assert sum(second[s] for s in range(71, 81)) < sum(second[s] for s in range(6, 16))
    tokenizer = load_semantic(tmp_path / "model")
    assert tokenizer.codec.config.hidden_size == 8
    heard = tokenizer.features(0.2 * torch.randn(2, 16000))[0]
    assert heard.isfinite().all()
    metrics = configs.read_yaml(tmp_path / "model" / "model.yaml")["card"]["metrics"]
    assert metrics.keys() >= {"loss", "variance", "perplexity"}
    assert 1 <= metrics["perplexity"] <= 16


def test_wrong_settings_of_the_semantic_codec_end_with_one_line(base, tmp_path, capsys):
    assert run(base, tmp_path, "published_statistics=true") == 2
    assert run(base, tmp_path, "data.sample_rate=8000") == 2
    assert run(base, tmp_path, "features.kind=hubert") == 2
    assert run(base, tmp_path, "network.vocos_dimm=3") == 2
    assert sum(line.startswith("error: ") for line in capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize(
    ("name", "low", "high"), [("semantic", 43, 46), ("mini_semantic", 2, 12), ("tiny_semantic", 0, 0.2)]
)
def test_every_configuration_of_a_semantic_codec_is_valid(name, low, high):
    path = ROOT / f"configs/maskgct/{name}.yaml"
    config = configs.load(semantic_codec.Recipe, [path], ["train.output_dir=x"])
    width = 1024 if config.features.kind == "w2vbert" else 384
    with SkipInit():
        codec = RepCodec(configs.from_dict(RepCodecConfig, {**config.network, "hidden_size": width}))
    assert low < sum(p.numel() for p in codec.parameters()) / 1e6 < high


# ---- phones and codes ---------------------------------------------------------------------------------


def test_phones_and_codes_are_those_of_every_recording(base, tmp_path, capsys):
    out = tmp_path / "codes"
    assert prepare_speech.main(options(base, out)) == 0
    said = capsys.readouterr().err
    assert said.count("left out, ") == 2
    store = SpeechTokenStore(out)
    cuts = {cut.id: cut for cut in open_cuts(str(base / "wav" / "train.jsonl.gz"), "cuts")}
    assert (len(store), len(store.index.shards), store.index.num_codebooks) == (6, 2, 2)
    assert (store.index.frame_rate, store.index.codebook_size, store.index.semantic_size) == (50.0, 16, 16)
    codec, tokenizer, phonemizer = load_codec(base / "codec"), load_semantic(base / "semantic"), Phonemizer()
    for number in range(6):
        clip, cut = store.clip(number), cuts[store.ids[number]]
        wave = torch.from_numpy(read_cut(cut, 16000))[None]
        wanted = codec.encode(wave[None], None, 2).tokens[0]
        heard = tokenizer.encode(wave)[0][0]
        size = min(len(heard), wanted.shape[1])
        assert torch.equal(clip.acoustic, wanted[:, :size])
        assert torch.equal(clip.semantic, heard[:size])
        assert clip.phones.tolist() == list(phonemizer(cut.supervisions[0].text).ids)
    shard = out / "speech-00001.safetensors"
    before = shard.stat().st_mtime_ns
    assert prepare_speech.main(options(base, out)) == 0
    assert shard.stat().st_mtime_ns == before


def test_codes_of_another_text_or_codec_are_not_kept(base, tmp_path, capsys):
    out = tmp_path / "codes"
    words = options(base, out)
    assert prepare_speech.main(words) == 0
    cuts = list(open_cuts(words[0], "cuts"))
    cuts[0].supervisions[0].text = "another text"
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    assert prepare_speech.main([str(tmp_path / "cuts.jsonl.gz"), *words[1:]]) == 2
    assert prepare_speech.main([*words, "--codebooks", "3"]) == 2
    assert prepare_speech.main([*words, "--semantic", str(tmp_path)]) == 2
    assert prepare_speech.main([str(tmp_path / "none.jsonl.gz"), *words[1:]]) == 2
    assert sum(line.startswith("error: ") for line in capsys.readouterr().err.splitlines()) == 4


def test_codecs_of_different_rates_are_refused(base, tmp_path, capsys):
    codec = SpectralCodec(
        SpectralCodecConfig(hop=640, width=8, encoder_blocks=1, decoder_blocks=1, code_width=4)
    )
    write_codec_folder(tmp_path / "slow", codec, ModelCard("slow", "codec", "spectral"))
    words = options(base, tmp_path / "codes")
    assert prepare_speech.main([*words, "--codec", str(tmp_path / "slow")]) == 2
    assert "25 and 50 codes a second" in capsys.readouterr().err
