"""The recipes end to end on a made-up corpus, and the parts they share."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nar_speech import config as configs
from nar_speech.cmvn import read_json_cmvn
from nar_speech.data import DataConfig, EvalData
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.features import Frontend, FrontendConfig
from nar_speech.model_folder import read_model_file
from nar_speech.models.ctc import CtcConfig, CtcModel
from nar_speech.models.paraformer import ParaformerConfig, build_paraformer
from nar_speech.text.tokenizer import load_tokenizer
from nar_speech.train import Saver, World
from nar_speech.train.recipe import InitSection, load_initial
from nar_speech.train.recognition import (
    TokenizerSection,
    Validator,
    cmvn_statistics,
    make_frontend,
    make_tokenizer,
)
from nar_speech.train.report import read_log
from recipes import ctc, draft_verify, paraformer
from tests.corpus import make_manifest, make_spelled

ROOT = Path(__file__).parent.parent
TEXTS = ["Go left", "stop", "the cat", "a dog ran"]
ALONE = World(0, 1, torch.device("cpu"))
RECIPES = {"ctc": ctc, "paraformer": paraformer, "draft_verify": draft_verify}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return [
        f"data.train=[{make_manifest(folder, 24, TEXTS, 'train')}]",
        f"data.dev=[{make_manifest(folder, 5, TEXTS, 'dev')}]",
    ]


def start(name, *words, processes=1, **extra):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launcher, "-m", f"recipes.{name}", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        **extra,
    )


def losses(folder):
    return {r["step"]: r["loss"] for r in read_log(Path(folder) / "train.jsonl") if "loss" in r}


@pytest.mark.parametrize("name", ["ctc", "paraformer"])
def test_recipe_trains_resumes_and_writes_a_model_folder(name, corpus, tmp_path, capsys):
    from nar_speech.train.recipe import run_recipe

    module = RECIPES[name]
    words = [str(ROOT / f"configs/{name}/tiny.yaml"), *corpus, f"train.output_dir={tmp_path}/run"]
    torch.set_num_threads(1)
    assert run_recipe(module.Recipe, module.recipe, [*words, "train.max_steps=15"], "doc") == 0
    first = losses(tmp_path / "run")
    assert run_recipe(module.Recipe, module.recipe, [*words, "train.max_steps=30"], "doc") == 0
    second = losses(tmp_path / "run")
    assert sorted(second) == list(range(1, 31))
    assert {step: second[step] for step in first} == first
    shown = capsys.readouterr().err
    assert "resumed from" in shown
    assert re.search(r"dev-000\n    ref: go left\n    out: ", shown)
    folder = tmp_path / "run/model"
    file = read_model_file(folder)
    assert file.card.model == name
    assert file.card.metrics["wer"] >= 0
    assert file.card.metrics["loss"] < second[1]
    tokenizer = load_tokenizer(file.tokenizer, folder)
    assert tokenizer.decode(tokenizer.encode("Go LEFT")) == "go left"
    build, kind = (CtcModel, CtcConfig) if name == "ctc" else (build_paraformer, ParaformerConfig)
    model = build(configs.from_dict(kind, file.network, "network"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for file_name in ("loss.png", "config.yaml", "tokenizer/tokens.json"):
        assert (tmp_path / "run" / file_name).stat().st_size > 0


def test_a_trained_model_can_be_loaded_and_used(corpus, tmp_path):
    from nar_speech import load_model

    words = [str(ROOT / "configs/ctc/tiny.yaml"), *corpus, f"train.output_dir={tmp_path}/run"]
    from nar_speech.train.recipe import run_recipe

    assert run_recipe(ctc.Recipe, ctc.recipe, [*words, "train.max_steps=2"], "doc") == 0
    transcript = load_model(str(tmp_path / "run/model"), device="cpu")(
        str(Path(corpus[0].split("[")[1]).parent / "train-000.wav")
    )
    assert isinstance(transcript.text, str)


@pytest.mark.slow
def test_paraformer_under_torchrun_equals_accumulation(corpus, tmp_path):
    words = [
        str(ROOT / "configs/paraformer/tiny.yaml"),
        *corpus,
        "train.max_steps=6",
        "train.validate_every=3",
    ]
    for folder, processes, accumulation in (("one", 1, 2), ("two", 2, 1)):
        run = start(
            "paraformer",
            *words,
            f"train.output_dir={tmp_path / folder}",
            f"train.accumulation={accumulation}",
            processes=processes,
        )
        assert run.returncode == 0, run.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == [1, 2, 3, 4, 5, 6]
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4)
    ours, theirs = (read_model_file(tmp_path / f / "model").card.metrics for f in ("one", "two"))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_mwer_joins_after_its_step(corpus, tmp_path):
    from nar_speech.train.recipe import run_recipe

    words = [
        str(ROOT / "configs/paraformer/tiny.yaml"),
        *corpus,
        "train.max_steps=6",
        "train.validate_every=6",
    ]
    torch.set_num_threads(1)
    for folder, extra in (("plain", []), ("mwer", ["mwer.weight=2.0", "mwer.after=3"])):
        arguments = [*words, *extra, f"train.output_dir={tmp_path / folder}"]
        assert run_recipe(paraformer.Recipe, paraformer.recipe, arguments, "doc") == 0
    plain, mwer = (
        [r for r in read_log(tmp_path / f / "train.jsonl") if "lr" in r] for f in ("plain", "mwer")
    )
    assert ["loss_mwer" in row for row in mwer] == [False] * 3 + [True] * 3
    assert [r["loss"] for r in mwer[:3]] == [r["loss"] for r in plain[:3]]
    # The MWER draws come last, so the fourth step differs by exactly this term.
    assert mwer[3]["loss"] == pytest.approx(plain[3]["loss"] + 2 * mwer[3]["loss_mwer"], rel=1e-5)
    assert [r["loss"] for r in mwer[4:]] != [r["loss"] for r in plain[4:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ctc", "paraformer"])
def test_recipe_learns_to_read_tones(name, tmp_path):
    """Letters as tones: both models, and the Paraformer's CTC head, must learn to read unseen strings."""
    manifests = [
        make_spelled(tmp_path / "data", count, part) for count, part in ((240, "train"), (24, "dev"))
    ]
    words = [
        str(ROOT / f"configs/{name}/tiny.yaml"),
        *(f"data.{part}=[{path}]" for part, path in zip(("train", "dev"), manifests, strict=True)),
        f"train.output_dir={tmp_path}/run", "unit=cer", "train.metric=cer", "train.max_steps=900",
        "train.validate_every=300", "frontend.cmvn=cmvn.json", "augment.speed=[1.0]", "specaug=null",
        "network.encoder_conf.output_size=32", "network.encoder_conf.linear_units=64",
    ]  # fmt: skip
    if name == "paraformer":
        words += ["network.decoder_conf.linear_units=64", "network.length_normalized_loss=false"]
    run = start(name, *words)
    assert run.returncode == 0, run.stderr
    metrics = read_model_file(tmp_path / "run/model").card.metrics
    for key in ("cer", "ctc_cer") if name == "paraformer" else ("cer",):
        assert metrics[key] < 0.1, metrics


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.max_stps=3"], "unknown key 'max_stps'; valid keys: accumulation"),
        (["network.encodr=sanm"], "unknown key 'encodr'"),
        (["data.train=[nowhere.jsonl.gz]"], "no such manifest nowhere.jsonl.gz"),
        (["train.metric=cer"], "validation gives no 'cer'"),
        (["init.init_from=nowhere.pt"], "nowhere.pt"),
        (["train.output_dir=/dev/null/x"], "train.output_dir: can't write in /dev/null/x"),
        (["train.device=tpu"], "valid values: auto, cpu, cuda"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(corpus, tmp_path, words, message, capsys):
    from nar_speech.train.recipe import run_recipe

    base = [str(ROOT / "configs/paraformer/tiny.yaml"), *corpus, f"train.output_dir={tmp_path}/run"]
    code = run_recipe(
        paraformer.Recipe, paraformer.recipe, [*base, "train.max_steps=1", *words], paraformer.__doc__
    )
    error = capsys.readouterr().err
    assert code == 2, error
    line = next(line for line in error.splitlines() if line.startswith("error: "))
    assert message in line


def test_a_refused_start_leaves_the_settings_of_the_run_that_is_there(corpus, tmp_path, capsys):
    from nar_speech.train.recipe import run_recipe

    words = [str(ROOT / "configs/ctc/tiny.yaml"), *corpus, f"train.output_dir={tmp_path}/run"]
    assert run_recipe(ctc.Recipe, ctc.recipe, [*words, "train.max_steps=1"], "doc") == 0
    before = (tmp_path / "run/config.yaml").read_text()
    again = [*words, "train.max_steps=2", "--no-resume"]
    assert run_recipe(ctc.Recipe, ctc.recipe, again, "doc") == 2
    assert "holds checkpoints" in capsys.readouterr().err
    assert (tmp_path / "run/config.yaml").read_text() == before


@pytest.mark.parametrize(
    "path",
    sorted(path for name in RECIPES for path in ROOT.glob(f"configs/{name}/*.yaml")),
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_every_configuration_is_valid_and_builds(path):
    config = configs.load(RECIPES[path.parent.name].Recipe, [path], ["train.output_dir=x"])
    assert config.card.name
    sizes = {"input_size": Frontend(config.frontend).feature_size, "vocab_size": 4234}
    with torch.device("meta"):
        if path.parent.name == "ctc":
            model = CtcModel(configs.from_dict(CtcConfig, {**config.network, **sizes}))
        else:
            model = build_paraformer(configs.from_dict(ParaformerConfig, {**config.network, **sizes}))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    bounds = {"large": (210, 230), "mini_en": (9, 25), "tiny": (0, 0.3)}
    low, high = bounds.get(path.stem.removesuffix("_online"), (10, 80))
    assert low < millions < high


def test_recipes_stay_short():
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150, path


# ---- shared parts -------------------------------------------------------------------------------------


def data_config(corpus):
    train, dev = (word.split("[")[1][:-1] for word in corpus)
    return DataConfig(train=[train], dev=[dev], workers=0, batch_seconds=5)


def test_char_tokenizer_is_made_of_the_training_texts_and_kept(corpus, tmp_path):
    section = TokenizerSection(kind="char", case="upper")
    tokenizer = make_tokenizer(section, data_config(corpus), tmp_path, ALONE)
    letters = sorted(set("".join(TEXTS).upper()) - {" "})
    assert tokenizer.pieces(range(tokenizer.vocab_size)) == [
        "<blank>",
        "<s>",
        "</s>",
        "<unk>",
        "<space>",
        *letters,
    ]
    again = make_tokenizer(section, DataConfig(train=["gone"]), tmp_path, ALONE)
    assert again.encode("the cat") == tokenizer.encode("THE CAT")


def test_bpe_tokenizer_from_texts_or_from_a_file(corpus, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(["HELLO THERE", "hello you"] * 4))
    section = TokenizerSection(kind="bpe", vocab_size=20, texts=str(texts))
    made = make_tokenizer(section, data_config(corpus), tmp_path / "a", ALONE)
    assert made.vocab_size == 20
    assert made.decode(made.encode("HELLO you")) == "hello you"
    taken = TokenizerSection(kind="bpe", file=str(tmp_path / "a/tokenizer/tokenizer.model"))
    other = make_tokenizer(taken, data_config(corpus), tmp_path / "b", ALONE)
    assert other.encode("hello") == made.encode("hello")
    with pytest.raises(ConfigError, match=r"tokenizer\.texts"):
        make_tokenizer(TokenizerSection(texts="nowhere.txt"), data_config(corpus), tmp_path / "c", ALONE)


@pytest.mark.parametrize("stack", [1, 3])
def test_cmvn_gives_zero_mean_and_unit_deviation(corpus, tmp_path, stack):
    config = FrontendConfig(num_mels=20, lfr_m=stack, lfr_n=stack, cmvn="cmvn.json")
    data = data_config(corpus)
    frontend = make_frontend(config, data, tmp_path, ALONE)
    rows = []
    for batch in EvalData(DataConfig(dev=data.train, workers=0), lambda _: []):
        feats, lengths = frontend(batch.waves, batch.wave_lengths)
        rows += [feats[b, :n] for b, n in enumerate(lengths)]
    values = torch.cat(rows)
    torch.testing.assert_close(values.mean(0), torch.zeros(20 * stack), atol=1e-3, rtol=0)
    torch.testing.assert_close(values.std(0, unbiased=False), torch.ones(20 * stack), atol=1e-3, rtol=0)
    stats = cmvn_statistics(config, data, utterances=2)
    assert stats["frame_num"] < len(values) / 4
    assert len(read_json_cmvn(tmp_path / "cmvn.json")[0]) == 20 * stack
    with pytest.raises(ConfigError, match=r"am\.mvn"):
        make_frontend(FrontendConfig(cmvn="am.mvn"), data, tmp_path, ALONE)


def net():
    torch.manual_seed(1)
    return nn.ModuleDict({"encoder": nn.Linear(2, 3), "head": nn.Linear(3, 4)})


def test_initial_weights_with_a_prefix_mapping_and_a_report(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(
        {"model.enc.weight": torch.ones(3, 2), "model.enc.bias": torch.ones(3), "x": torch.ones(1)}, path
    )
    model = net()
    before = model["head"].weight.clone()
    report = load_initial(model, InitSection(str(path), {"model.enc.": "encoder."}))
    assert model["encoder"].weight.eq(1).all()
    assert model["encoder"].bias.eq(1).all()
    assert torch.equal(model["head"].weight, before)
    assert "2 tensors" in report
    assert load_initial(net(), InitSection()) == "initial weights: random"


def test_initial_weights_that_do_not_fit_fail_or_are_reported(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"encoder.weight": torch.ones(9, 2), "encoder.bias": torch.ones(3), "old": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"encoder\.weight.*\(9, 2\) for \(3, 2\).*init\.partial"):
        load_initial(net(), InitSection(str(path), {"encoder.": "encoder."}))
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        load_initial(net(), InitSection(str(path)))
    with pytest.raises(CheckpointError, match=r"no tensor of .* fits"):
        load_initial(net(), InitSection(str(path), {"encodr.": "encoder."}, partial=True))
    model = net()
    report = load_initial(model, InitSection(str(path), partial=True))
    assert model["encoder"].bias.eq(1).all()
    for part in ("1 tensors", "not used: old", "head.weight", "(9, 2) for (3, 2)"):
        assert part in report


def test_validator_means_and_rates(corpus, tmp_path):
    data = data_config(corpus)
    tokenizer = make_tokenizer(TokenizerSection(kind="char"), data, tmp_path, ALONE)

    def evaluate(model, feats, lengths, batch):
        ids = [tokenizer.encode(text) for text in batch.texts]
        return {"loss": torch.tensor(float(len(ids)))}, {"": ids, "ctc": [i[:-1] for i in ids]}

    dev = EvalData(DataConfig(dev=data.dev, workers=0, batch_size=2), tokenizer.encode)
    frontend = Frontend(FrontendConfig(num_mels=20))
    metrics = Validator(dev, frontend, tokenizer, evaluate, "cer", ALONE)(nn.Identity())
    assert metrics["cer"] == 0
    assert metrics["loss"] == pytest.approx((2 * 2 + 2 * 2 + 1) / 5)
    references = [TEXTS[i % 4].replace(" ", "") for i in range(5)]
    assert metrics["ctc_cer"] == pytest.approx(5 / sum(map(len, references)))
    words = Validator(dev, frontend, tokenizer, evaluate, "wer", ALONE)(nn.Identity())
    assert words["wer"] == 0
    assert words["ctc_wer"] == pytest.approx(5 / sum(len(TEXTS[i % 4].split()) for i in range(5)))


def test_checkpoints_of_a_recipe_hold_no_code(corpus, tmp_path):
    from nar_speech.train.recipe import run_recipe

    words = [str(ROOT / "configs/ctc/tiny.yaml"), *corpus, f"train.output_dir={tmp_path}/run"]
    assert run_recipe(ctc.Recipe, ctc.recipe, [*words, "train.max_steps=1"], "doc") == 0
    state = torch.load(Saver(tmp_path / "run").path(1), weights_only=True)
    assert set(state) == {"model", "optimizer", "ema", "data", "progress", "config"}
