"""Sound as codes with captions, and the recipe that trains MAGNeT on it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet

from nar_speech.checkpoint import load_strict
from nar_speech.codec.folder import write_codec_folder
from nar_speech.codec.load import load_codec
from nar_speech.codec.spectral import SpectralCodec, SpectralCodecConfig
from nar_speech.config import from_dict
from nar_speech.data.augment import open_cuts, read_cut
from nar_speech.data.tokens import TokenConfig, TokenData, TokenEval, TokenStore
from nar_speech.errors import CheckpointError, ConfigError, ManifestError
from nar_speech.models.magnet import Magnet, MagnetConfig
from nar_speech.sound_folder import (
    codec_source,
    is_sound_folder,
    read_sound_file,
    read_sound_weights,
    write_sound_folder,
)
from nar_speech.text.conditioner import ConditionerConfig, TextConditioner
from nar_speech.train.recipe import run_recipe
from nar_speech.train.report import read_log
from nar_speech.types import ModelCard
from recipes import magnet, prepare_sound
from tests.corpus import make_manifest

ROOT = Path(__file__).parent.parent
CAPTIONS = ["a low tone", "a high tone", "two tones at once", ""]


class Letters(TextConditioner):
    """A stand-in: the state of a letter is its code, three times."""

    name, width, max_tokens = "letters", 3, 64

    def tokens(self, text):
        return [ord(c) for c in text]

    def encode(self, ids):
        return ids.unsqueeze(-1).expand(-1, -1, 3) / 100

    def move(self, device):
        pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny codec, and folders of codes of a few tones for training and development."""
    base = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    small = SpectralCodecConfig(
        hop=320,
        width=8,
        expansion=1,
        encoder_blocks=1,
        decoder_blocks=1,
        num_codebooks=3,
        codebook_size=16,
        code_width=4,
    )
    card = ModelCard("tiny_codec", "codec", "spectral")
    codec = SpectralCodec(small).eval()
    for name, tensor in codec.state_dict().items():
        if name.endswith(".embed"):
            tensor.copy_(torch.randn(tensor.shape))  # codes that change from frame to frame
    write_codec_folder(base / "codec", codec, card)
    original = prepare_sound.load_conditioner
    prepare_sound.load_conditioner = lambda config: Letters()
    try:
        for name, count in (("train", 11), ("dev", 5)):
            cuts = make_manifest(base / "wav", count, CAPTIONS, name)
            prepare_sound.prepare(
                *(cuts, base / name, str(base / "codec"), ConditionerConfig("sentence", "letters")),
                num_codebooks=2,
                shard_size=4,
                batch_seconds=2.0,
            )
    finally:
        prepare_sound.load_conditioner = original
    return base


def data_config(folders, **options):
    return TokenConfig(train=[str(folders / "train")], dev=[str(folders / "dev")], **options)


def test_codes_are_those_of_every_clip_alone(folders):
    store, codec = TokenStore(folders / "train"), load_codec(folders / "codec")
    cuts = list(open_cuts(str(folders / "wav" / "train.jsonl.gz"), "cuts"))
    assert store.ids == [cut.id for cut in cuts]
    assert [store.index.num_codebooks, len(store.index.shards)] == [2, 3]
    for clip in (0, 4, 10):
        wave = torch.from_numpy(read_cut(cuts[clip], 16000))[None, None]
        wanted = codec.encode(wave, None, 2)
        got = store.codes(clip, 0, 10**6, 2)
        assert torch.equal(got, wanted.tokens[0])
        text = cuts[clip].supervisions[0].text
        assert [store.index.captions[c] for c in store.captions[clip]] == ([text] if text else [])
        for caption in store.captions[clip]:
            torch.testing.assert_close(store.text(caption), Letters()([text])[0][0], atol=1e-3, rtol=1e-3)


def test_preparing_again_keeps_shards_and_refuses_other_cuts(folders, monkeypatch):
    monkeypatch.setattr(prepare_sound, "load_conditioner", lambda config: Letters())
    shard = folders / "train" / "codes-00001.safetensors"
    before = shard.stat().st_mtime_ns
    options = {"num_codebooks": 2, "shard_size": 4}
    words = (folders / "train", str(folders / "codec"), ConditionerConfig("sentence", "letters"))
    prepare_sound.prepare(str(folders / "wav" / "train.jsonl.gz"), *words, **options)
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="other cuts"):
        prepare_sound.prepare(str(folders / "wav" / "dev.jsonl.gz"), *words, **options)


def test_codes_of_a_codec_or_captions_that_changed_are_not_kept(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_sound, "load_conditioner", lambda config: Letters())
    cuts = list(open_cuts(str(folders / "wav" / "dev.jsonl.gz"), "cuts"))
    write_codec_folder(tmp_path / "codec", load_codec(folders / "codec"), ModelCard("t", "codec", "spectral"))
    words = (str(tmp_path / "codes"), str(tmp_path / "codec"), ConditionerConfig("sentence", "letters"))
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    prepare_sound.prepare(str(tmp_path / "cuts.jsonl.gz"), *words)
    prepare_sound.prepare(str(tmp_path / "cuts.jsonl.gz"), *words)
    trained_on = load_codec(folders / "codec")
    next(p for p in trained_on.parameters() if p.ndim > 1).data.add_(0.1)
    write_codec_folder(tmp_path / "codec", trained_on, ModelCard("t", "codec", "spectral"))
    with pytest.raises(ConfigError, match="another codec"):
        prepare_sound.prepare(str(tmp_path / "cuts.jsonl.gz"), *words)
    write_codec_folder(tmp_path / "codec", load_codec(folders / "codec"), ModelCard("t", "codec", "spectral"))
    cuts[2].supervisions[0].custom = {"captions": ["a zebra"]}  # the numbers of all captions move
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    with pytest.raises(ConfigError, match="captions"):
        prepare_sound.prepare(str(tmp_path / "cuts.jsonl.gz"), *words)


def same(a, b):
    return a.ids == b.ids and a.captions == b.captions and torch.equal(a.codes, b.codes)


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 9), size=st.integers(1, 13), seed=st.integers(0, 3))
def test_a_stream_goes_on_where_it_stood(folders, before, size, seed):
    config = data_config(folders, batch_size=size, seconds=0.3, text_dropout=0.5)
    whole = iter(TokenData(config, seed))
    wanted = [next(whole) for _ in range(before + 3)]
    first = TokenData(config, seed)
    stream = iter(first)
    for _ in range(before):
        next(stream)
    second = TokenData(config, seed)
    second.load_state_dict(first.state_dict())
    again = iter(second)
    assert all(same(next(again), batch) for batch in wanted[before:])


def test_two_processes_see_what_one_sees(folders):
    config = data_config(folders, batch_size=3, seconds=0.3)
    one = iter(TokenData(config, 1))
    two = [iter(TokenData(config, 1, rank, 2)) for rank in range(2)]
    for turn in range(8):
        assert same(next(one), next(two[turn % 2]))


def test_crops_are_random_and_short_clips_are_padded(folders):
    config = data_config(folders, batch_size=11, seconds=0.5, text_dropout=0.0)
    data = iter(TokenData(config, 0))
    first, second = next(data), next(data)
    assert first.codes.shape[:2] == (11, 2)
    assert first.codes.shape[2] == int(first.lengths.max()) <= 25
    assert int(first.lengths.min()) < 25, "one of the clips is shorter than half a second"
    by_id = dict(zip(second.ids, second.codes, strict=True))
    moved = [
        not torch.equal(c[:, :20], by_id[i][:, :20]) for c, i in zip(first.codes, first.ids, strict=True)
    ]
    assert any(moved)
    for row, length in enumerate(first.lengths.tolist()):
        assert not first.codes[row, :, length:].any()
        assert bool(first.mask[row].any()) == bool(first.captions[row])


def test_captions_are_dropped_as_often_as_asked(folders):
    for part, low, high in ((0.0, 0, 0), (1.0, 1, 1), (0.5, 0.3, 0.7)):
        data = iter(TokenData(data_config(folders, batch_size=11, text_dropout=part), 0))
        told = [c for _ in range(12) for c in zip(*(lambda b: (b.ids, b.captions))(next(data)), strict=True)]
        spoken = [c for i, c in told if int(i[-3:]) % 4 != 3]  # every fourth clip has no caption at all
        assert low <= sum(not c for c in spoken) / len(spoken) <= high


def test_evaluation_batches_are_the_same_every_time_and_complete(folders):
    config = data_config(folders, batch_size=2)
    first, second = list(TokenEval(config)), list(TokenEval(config))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(i for b in first for i in b.ids) == sorted(TokenStore(folders / "dev").ids)
    split = [i for rank in range(2) for b in TokenEval(config, rank, 2) for i in b.ids]
    assert sorted(split) == sorted(i for b in first for i in b.ids)


def test_missing_and_damaged_folders_are_named(folders, tmp_path):
    with pytest.raises(ManifestError, match="prepare_sound"):
        TokenStore(tmp_path)
    with pytest.raises(ManifestError, match=r"data\.train"):
        TokenData(TokenConfig())
    with pytest.raises(ConfigError, match="3 codebooks"):
        TokenData(data_config(folders, num_codebooks=3))
    for file in (folders / "dev").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "codes-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ManifestError, match="codes-00001"):
        TokenStore(tmp_path)


@pytest.fixture
def words(folders, tmp_path):
    return [
        str(ROOT / "configs/magnet/tiny.yaml"),
        f"data.train=[{folders}/train]",
        f"data.dev=[{folders}/dev]",
        f"train.output_dir={tmp_path}/run",
    ]


def run(words):
    torch.set_num_threads(1)
    return run_recipe(magnet.Recipe, magnet.recipe, words, "doc")


def losses(folder):
    return {r["step"]: r["loss"] for r in read_log(Path(folder) / "train.jsonl") if "loss" in r}


def test_the_recipe_trains_resumes_and_writes_a_model_folder(words, folders, tmp_path):
    assert run([*words, "train.max_steps=10"]) == 0
    first = losses(tmp_path / "run")
    assert run([*words, "train.max_steps=40", "train.optim.schedule=constant", "store=int8"]) == 0
    second = losses(tmp_path / "run")
    assert all(second[step] == first[step] for step in first)
    assert sum(second[s] for s in range(36, 41)) < sum(second[s] for s in range(1, 6))
    folder = tmp_path / "run" / "model"
    file = read_sound_file(folder)
    assert is_sound_folder(folder)
    assert file.conditioner == ConditionerConfig("sentence", "letters")
    assert {"loss", "loss_s0", "loss_s1", "acc_s0"} <= file.card.metrics.keys()
    config = from_dict(MagnetConfig, file.network)
    assert (config.num_codebooks, config.codebook_size, config.text_width, config.max_frames) == (
        2,
        16,
        3,
        50,
    )
    network = Magnet(config)
    load_strict(network, read_sound_weights(folder), where=folder)
    assert load_codec(codec_source(folder, file)).sample_rate == 16000
    assert (folder / "codec" / "model.yaml").is_file(), "the codec is in the folder"
    assert network(torch.randint(17, (1, 2, 20))).isfinite().all()


@pytest.mark.slow
def test_two_processes_train_alike(words, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "recipes.magnet", *words, "train.max_steps=6", "data.batch_size=2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = losses(tmp_path / "run")
    other = [w.replace("/run", "/alone") for w in words]
    assert run([*other, "train.max_steps=6", "data.batch_size=2", "train.accumulation=2"]) == 0
    alone = losses(tmp_path / "alone")
    for step, loss in two.items():
        assert loss == pytest.approx(alone[step], rel=1e-3)


def test_wrong_settings_end_with_one_line(words, capsys):
    assert run([*words, "network.widht=3"]) == 2
    assert run([*words, "network.heads=3"]) == 2
    assert run([*words, "data.train=[/no/such/folder]"]) == 2
    assert run([*words, "stage_weights=[1,0]"]) == 2
    assert run([*words, "stage_weights=[1,1,1]"]) == 2
    assert run([*words, "+generation.colour=red"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 6


def test_clips_for_validation_are_of_the_same_codec(words, folders, tmp_path, capsys):
    shutil.copytree(folders / "dev", tmp_path / "dev")
    path = tmp_path / "dev" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"codec": "another"}))
    assert run([*words, f"data.dev=[{tmp_path}/dev]"]) == 2
    assert "differs in codec" in capsys.readouterr().err


def test_a_crop_is_never_longer_than_the_segment(words, folders):
    # 0.58 * 50 is a little less than 29: rounded up, it would be more frames than the network takes.
    crops = TokenData(data_config(folders, seconds=0.58))
    assert next(iter(crops)).codes.shape[2] == 28
    assert run([*words, "data.seconds=0.58", "train.max_steps=1"]) == 0


def test_stages_are_trained_as_often_as_their_weights_say(words, monkeypatch):
    stages, mask_codes = [], magnet.mask_codes
    monkeypatch.setattr(magnet, "Validator", lambda *_: lambda model: {"loss": 1.0})
    monkeypatch.setattr(
        magnet, "mask_codes", lambda *inputs: (stages.append(inputs[2]), mask_codes(*inputs))[1]
    )
    assert run([*words, "stage_weights=[9,1]", "train.max_steps=60"]) == 0
    assert len(stages) == 60
    assert 45 <= stages.count(0) < 60


def test_a_folder_of_another_task_or_a_wrong_key_is_refused(tmp_path):
    network = Magnet(MagnetConfig(2, 8, 16, 2, 1, 1, 3))
    card = ModelCard("x", "generate", "magnet")
    write_sound_folder(tmp_path, network, card, network.config, "mimi", ConditionerConfig(), store="float16")
    assert read_sound_file(tmp_path).codec == "mimi"
    torch.testing.assert_close(
        read_sound_weights(tmp_path)["out_norm.weight"], network.out_norm.weight.detach()
    )
    with pytest.raises(ConfigError, match="store"):
        write_sound_folder(tmp_path, network, card, network.config, "mimi", ConditionerConfig(), store="int4")
    path = tmp_path / "model.yaml"
    text = path.read_text()
    path.write_text(text.replace("task: generate", "task: transcribe"))
    with pytest.raises(ConfigError, match=r"card\.task"):
        read_sound_file(tmp_path)
    path.write_text(text + "extra: 1\n")
    with pytest.raises(ConfigError, match="extra"):
        read_sound_file(tmp_path)
    path.write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(CheckpointError):
        read_sound_weights(tmp_path)


def test_the_command_that_prepares_names_what_is_wrong(tmp_path, capsys):
    assert prepare_sound.main([str(tmp_path / "none.jsonl.gz"), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
