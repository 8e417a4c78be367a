"""Speech as phones and codes, and the recipes that train MaskGCT's networks and the durations on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech import config as configs
from nar_speech.checkpoint import SkipInit
from nar_speech.data.speech_tokens import (
    SpeechClip,
    SpeechIndex,
    SpeechTokenConfig,
    SpeechTokenData,
    SpeechTokenEval,
    SpeechTokens,
    SpeechTokenStore,
    write_speech_index,
    write_speech_shard,
)
from nar_speech.errors import ConfigError, ManifestError
from nar_speech.models.maskgct import T2S, T2SConfig, T2SItem
from nar_speech.models.maskgct_part import read_part, write_part
from nar_speech.pipelines.maskgct_durations import DurationItem, sample_durations, total_frames
from nar_speech.pipelines.maskgct_stages import StageOptions, sample_semantic
from nar_speech.sampling.draws import seeded
from nar_speech.train.recipe import run_recipe
from nar_speech.train.report import read_log
from nar_speech.types import ModelCard
from recipes import duration, maskgct
from recipes.maskgct_objective import Objective

ROOT = Path(__file__).parent.parent
INDEX = SpeechIndex("some", 16000, 50.0, 3, 12, "semantic", 24, [])
RECIPES = {"duration": duration, "t2s": maskgct, "s2a": maskgct}


def make_clips(count, seed, prefix):
    """Phones, semantic codes that tell them (two a phone), acoustic codes that tell those."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for i in range(count):
        size = int(torch.randint(2, 7, (1,), generator=generator))
        phones = (torch.randint(1, 12, (size,), generator=generator)).cumsum(0) % 12
        frames = 2 + phones % 3 + torch.randint(0, 2, (size,), generator=generator)
        heard = torch.repeat_interleave(phones, frames)
        semantic = heard * 2 + torch.randint(0, 2, heard.shape, generator=generator)
        acoustic = torch.stack([(heard + k) % 12 for k in range(3)])
        clips.append(SpeechClip(f"{prefix}-{i:03d}", phones, semantic, acoustic))
    return clips


def write_folder(folder, clips, per_shard=8, **changes):
    folder.mkdir(parents=True)
    names = []
    for first in range(0, len(clips), per_shard):
        names.append(f"speech-{first // per_shard:05d}.safetensors")
        write_speech_shard(folder / names[-1], clips[first : first + per_shard])
    write_speech_index(folder, SpeechIndex(**{**vars(INDEX), "shards": names, **changes}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("speech")
    for name, count, seed in (("train", 30, 0), ("more", 7, 2), ("dev", 9, 1)):
        write_folder(base / name, make_clips(count, seed, name))
    return base


def data_config(folders, **options):
    values = {"batch_seconds": 1.2, "batch_size": 4, "min_seconds": 0.0} | options
    return SpeechTokenConfig([f"{folders}/train", f"{folders}/more"], [f"{folders}/dev"], **values)


# ---- the folder of codes ------------------------------------------------------------------------------


def test_clips_come_back_as_they_were_written(folders):
    store = SpeechTokenStore(folders / "train")
    clips = make_clips(30, 0, "train")
    assert store.ids == [clip.id for clip in clips]
    for number in (0, 7, 8, 29):
        got = store.clip(number)
        for part in ("phones", "semantic", "acoustic"):
            assert torch.equal(getattr(got, part), getattr(clips[number], part))
        assert store.frames(number) == len(clips[number].semantic)
        assert store.phones(number) == len(clips[number].phones)
        assert torch.equal(store.clip(number, 1).acoustic, clips[number].acoustic[:1])


def test_codes_of_different_lengths_are_not_written(tmp_path):
    clip = make_clips(1, 0, "x")[0]
    with pytest.raises(ManifestError, match="semantic and"):
        write_speech_shard(
            tmp_path / "a.safetensors", [SpeechClip("x", clip.phones, clip.semantic[1:], clip.acoustic)]
        )


def test_missing_damaged_and_foreign_folders_are_named(folders, tmp_path):
    with pytest.raises(ManifestError, match="prepare_speech"):
        SpeechTokenStore(tmp_path)
    with pytest.raises(ManifestError, match=r"data\.train"):
        SpeechTokenData(SpeechTokenConfig())
    with pytest.raises(ConfigError, match=r"4; .* has 3 codebooks"):
        SpeechTokenData(data_config(folders, num_codebooks=4))
    with pytest.raises(ManifestError, match="of 37 clips"):
        SpeechTokenData(data_config(folders, min_seconds=10.0))
    other = write_folder(tmp_path / "other", make_clips(3, 5, "o"), semantic_size=25)
    config = SpeechTokenConfig([f"{folders}/train"], [str(other)])
    with pytest.raises(ConfigError, match="differs in semantic_size"):
        SpeechTokenEval(config, like=SpeechTokenData(config).index)
    shard = other / "speech-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ManifestError, match="speech-00000"):
        SpeechTokenStore(other)


@settings(max_examples=20, deadline=None)
@given(
    least=st.floats(0, 0.3),
    most=st.floats(0.3, 0.6),
    rate=st.floats(10, 40),
)
def test_only_clips_that_fit_are_learnt_from(folders, least, most, rate):
    config = data_config(folders, min_seconds=least, max_seconds=most, max_phones_per_second=rate)
    kept = set()
    try:
        tokens = SpeechTokens(config.train, config, "data.train")
        kept = {tokens.stores[s].ids[c] for s, c in tokens.places}
        assert tokens.left_out == 37 - len(kept)
    except ManifestError:
        pass
    for clip in make_clips(30, 0, "train") + make_clips(7, 2, "more"):
        seconds = len(clip.semantic) / 50
        fits = least <= seconds <= most and len(clip.phones) <= rate * seconds
        assert (clip.id in kept) == fits


@settings(max_examples=20, deadline=None)
@given(seconds=st.floats(0.3, 4.0), size=st.integers(1, 9))
def test_batches_are_as_small_as_asked_and_an_epoch_has_every_clip(folders, seconds, size):
    data = SpeechTokenData(data_config(folders, batch_seconds=seconds, batch_size=size), 3)
    stream, seen, padded = iter(data), [], 0
    while data.state_dict()["epoch"] == 0:
        batch = next(stream)
        count, frames = batch.semantic.shape
        assert count <= size
        assert count == 1 or count * frames <= seconds * 50
        assert frames == int(batch.lengths.max())
        assert batch.phones.shape == (count, int(batch.phone_lengths.max()))
        assert batch.acoustic.shape == (count, 3, frames)
        padded += count * frames - int(batch.lengths.sum())
        for row, length in enumerate(batch.lengths.tolist()):
            assert not batch.semantic[row, length:].any()
            assert not batch.acoustic[row, :, length:].any()
        seen += batch.ids
    assert sorted(seen) == sorted(clip.id for clip in make_clips(30, 0, "train") + make_clips(7, 2, "more"))


def same(a, b):
    return a.ids == b.ids and torch.equal(a.semantic, b.semantic) and torch.equal(a.phones, b.phones)


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 40), seed=st.integers(0, 3))
def test_a_stream_goes_on_where_it_stood_and_shares_are_disjoint(folders, before, seed):
    config = data_config(folders)
    whole = iter(SpeechTokenData(config, seed))
    wanted = [next(whole) for _ in range(before + 4)]
    first = SpeechTokenData(config, seed)
    stream = iter(first)
    for _ in range(before):
        next(stream)
    second = SpeechTokenData(config, seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    again = iter(second)
    assert all(same(next(again), batch) for batch in wanted[before:])
    two = [iter(SpeechTokenData(config, seed, rank, 2)) for rank in range(2)]
    assert all(same(next(two[turn % 2]), batch) for turn, batch in enumerate(wanted))


def test_evaluation_batches_are_complete_and_shared_out(folders):
    config = data_config(folders)
    every = sorted(SpeechTokenStore(folders / "dev").ids)
    assert sorted(i for batch in SpeechTokenEval(config) for i in batch.ids) == every
    assert sorted(i for rank in (0, 1) for b in SpeechTokenEval(config, rank, 2) for i in b.ids) == every


# ---- recipes ------------------------------------------------------------------------------------------


def run(kind, folder, folders, *words):
    torch.set_num_threads(1)
    recipe = RECIPES[kind]
    return run_recipe(
        recipe.Recipe,
        recipe.recipe,
        [
            str(ROOT / f"configs/maskgct/tiny_{kind}.yaml"),
            f"data.train=[{folders}/train,{folders}/more]",
            f"data.dev=[{folders}/dev]",
            "data.min_seconds=0.0",
            f"train.output_dir={folder}",
            *words,
        ],
        "doc",
    )


def losses(folder):
    return {r["step"]: r["loss"] for r in read_log(Path(folder) / "train.jsonl") if "loss" in r}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("t2s", ()),
        ("s2a", ()),
        pytest.param("s2a", ("data.num_codebooks=1", "first_layer=false"), marks=pytest.mark.slow),
        pytest.param("s2a", ("first_layer=false", "layers=uniform"), marks=pytest.mark.slow),
    ],
)
def test_networks_train_resume_and_are_written(kind, words, folders, tmp_path):
    folder = tmp_path / "run"
    words = (*words, "train.optim.schedule=constant", "train.validate_every=1000", "train.save_every=1000")
    assert run(kind, folder, folders, *words, "train.max_steps=8") == 0
    first = losses(folder)
    assert run(kind, folder, folders, *words, "train.max_steps=40") == 0
    second = losses(folder)
    assert all(second[step] == first[step] for step in first)
    assert sum(second[s] for s in range(31, 41)) < sum(second[s] for s in range(1, 11))
    network, card = read_part(folder / "model", kind)
    assert card.model == kind
    assert card.metrics.keys() >= {"loss", "acc"}
    if kind == "t2s":
        assert network.config.codebook_size == 24
        item = T2SItem(torch.tensor([1, 2, 3]), torch.tensor([2, 2, 5]))
        made = sample_semantic(network, [item], [6], seeded([0]), StageOptions((2,)))[0]
        assert made.shape == (6,)
    else:
        count = 1 if "data.num_codebooks=1" in words else 3
        assert (network.config.num_codebooks, network.config.semantic_size) == (count, 24)
        skipped = count > 1 and "first_layer=false" in words
        assert ("loss_0" in card.metrics) == (count > 1 and not skipped)


def test_durations_train_resume_and_are_written(folders, tmp_path):
    words = ["train.optim.schedule=constant", "predict_from=10", "train.optim.lr=0.01"]
    words += ["train.validate_every=1000", "train.save_every=1000"]
    assert run("duration", tmp_path, folders, *words, "train.max_steps=15") == 0
    first = losses(tmp_path)
    assert run("duration", tmp_path, folders, *words, "train.max_steps=80") == 0
    assert all(losses(tmp_path)[step] == first[step] for step in first)
    aligner, _ = read_part(tmp_path / "aligner", "aligner")
    predictor, card = read_part(tmp_path / "model", "duration")
    assert card.metrics["length_error"] < 0.8
    clips = make_clips(5, 9, "new")
    for clip in clips:
        sizes = torch.tensor([len(clip.phones)]), torch.tensor([len(clip.semantic)])
        durations = aligner.align(clip.phones[None], clip.semantic[None], *sizes)
        assert int(durations.sum()) == len(clip.semantic)
        made = sample_durations(predictor, [DurationItem(clip.phones, durations[0, :1])], seeded([0]))[0]
        assert total_frames(made) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t2s", "s2a", "duration"])
def test_two_processes_train_as_one(kind, folders, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [
        str(ROOT / f"configs/maskgct/tiny_{kind}.yaml"),
        f"data.train=[{folders}/train,{folders}/more]",
        f"data.dev=[{folders}/dev]",
        "data.min_seconds=0.0",
        f"train.output_dir={tmp_path}/two",
        "train.max_steps=12",
    ]
    module = RECIPES[kind].__name__
    done = subprocess.run(
        [*launcher, "-m", module, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert run(kind, tmp_path / "one", folders, "train.max_steps=12", "train.accumulation=2") == 0
    alone = losses(tmp_path / "one")
    for step, loss in losses(tmp_path / "two").items():
        assert loss == pytest.approx(alone[step], rel=1e-3)


def test_phones_are_dropped_together_with_prompts(folders):
    """Where phones are dropped the network is called without them, and nothing is left of a prompt."""
    batch = next(iter(SpeechTokenEval(data_config(folders))))
    torch.manual_seed(0)
    model = T2S(T2SConfig(16, 1, 2, 2, 24, 16))
    calls, forward = [], model.forward
    model.forward = lambda *args, **words: calls.append(args) or forward(*args, **words)
    objective = Objective("t2s", 3, 0.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        objective.train(model, batch, generator)
    dropped = [args[3] is None for args in calls]
    assert 5 < sum(dropped) < 25
    drops = []
    objective.draw = lambda lengths, frames, source, drop: (
        drops.append(drop) or Objective.draw(objective, lengths, frames, source, drop)
    )
    calls.clear()
    for _ in range(10):
        objective.train(model, batch, generator)
    assert drops == [1.0 if args[3] is None else 0.0 for args in calls]


def test_layers_are_drawn_by_weight():
    assert Objective("s2a", 3, 0.1, 0.0).weights == (0.5, 1 / 3, 1 / 6)
    assert Objective("s2a", 3, 0.1, 0.0, "uniform", False).weights == (0, 0.5, 0.5)
    assert Objective("s2a", 1, 0.1, 0.0, "linear", False).weights == (1.0,)
    assert Objective("t2s", 3, 0.1, 0.0).weights == (1.0,)


def test_wrong_settings_end_with_one_line(folders, tmp_path, capsys):
    assert run("t2s", tmp_path, folders, "network.widht=3") == 2
    assert run("t2s", tmp_path, folders, "kind=v2v") == 2
    assert run("s2a", tmp_path, folders, "data.num_codebooks=9") == 2
    assert run("s2a", tmp_path, folders, "prompt_drop=2") == 2
    assert run("duration", tmp_path, folders, "aligner.kernel=2") == 2
    assert sum(line.startswith("error: ") for line in capsys.readouterr().err.splitlines()) == 5


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "configs/maskgct").glob("*.yaml") if "semantic" not in p.stem),
    ids=lambda p: p.stem,
)
def test_every_configuration_builds_what_its_comment_says(path):
    kind = next(k for k in RECIPES if k in path.stem)
    recipe = RECIPES[kind]
    config = configs.load(recipe.Recipe, [path], ["train.output_dir=x"])
    index = SpeechIndex("c", 24000, 50.0, 12, 1024, "s", 8192, [])
    with SkipInit():
        if kind == "duration":
            model = duration.DurationPredictor(
                configs.from_dict(duration.DurationConfig, config.network, "network")
            )
        else:
            model = maskgct.build(config, index, config.data.num_codebooks or 12)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    bounds = {"t2s": (740, 750), "t2s_base": (335, 345), "s2a_first": (325, 335), "s2a_full": (350, 356)}
    bounds["duration"] = (120, 140)
    low, high = bounds.get(path.stem, (0, 1) if "tiny" in path.stem else (1, 40))
    assert low < millions < high


# ---- folders of parts ---------------------------------------------------------------------------------


def test_parts_are_what_they_say(tmp_path):
    torch.manual_seed(0)
    network = T2S(T2SConfig(16, 1, 2, 2, 24, 16))
    write_part(tmp_path / "a", network, ModelCard("x", "speech_part", "t2s"))
    again, card = read_part(tmp_path / "a")
    assert card.name == "x"
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(ConfigError, match="'s2a' is needed"):
        read_part(tmp_path / "a", "s2a")
    with pytest.raises(ConfigError, match="is not what a T2S is"):
        write_part(tmp_path / "b", network, ModelCard("x", "speech_part", "s2a"))
    with pytest.raises(ConfigError, match="one of t2s"):
        write_part(tmp_path / "b", network, ModelCard("x", "speech_part", "vocoder"))
