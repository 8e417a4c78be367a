"""recipes/codec.py and the pieces it trains on."""

from pathlib import Path

import pytest
import soundfile
import torch

from nar_speech import config as configs
from nar_speech.codec.folder import read_codec_folder
from nar_speech.data.crops import CropConfig, CropData, CropEval
from nar_speech.errors import ManifestError
from nar_speech.losses import gan
from nar_speech.train.recipe import run_recipe
from nar_speech.train.report import read_log
from recipes import codec
from tests.corpus import make_manifest

TINY = str(Path(__file__).parent.parent / "configs/codec/tiny.yaml")


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["go left", "stop", "the cat"]
    return make_manifest(folder, 9, texts, "train"), make_manifest(folder, 3, texts, "dev")


@pytest.mark.parametrize("path", sorted(Path(TINY).parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_builds(path):
    config = configs.load(codec.Recipe, [path], ["train.output_dir=x"])
    network = codec.SpectralCodec(configs.from_dict(codec.SpectralCodecConfig, config.network))
    assert max(config.levels) <= network.num_codebooks
    assert codec.count_parameters(network) < 9e6


def losses(folder):
    return {row["step"]: row for row in read_log(folder / "train.jsonl") if "loss_mel" in row}


def test_recipe_trains_resumes_and_writes_a_folder(manifests, tmp_path):
    torch.set_num_threads(1)
    words = [TINY, f"data.train=[{manifests[0]}]", f"data.dev=[{manifests[1]}]"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    for steps in (10, 20):
        words_now = [
            *words,
            f"train.output_dir={run}",
            f"train.max_steps={steps}",
            "train.optim.schedule=constant",
        ]
        assert run_recipe(codec.Recipe, codec.recipe, words_now, "doc") == 0
    words_now = [*words, f"train.output_dir={whole}", "train.optim.schedule=constant"]
    assert run_recipe(codec.Recipe, codec.recipe, words_now, "doc") == 0
    ours, theirs = losses(run), losses(whole)
    assert [row["loss"] for row in ours.values()] == [row["loss"] for row in theirs.values()]
    assert "loss_discriminator" not in ours[10]
    assert ours[5]["loss_commitment"] == 0 < ours[6]["loss_commitment"]  # tiny.yaml: five steps without codes
    assert ours[11]["loss_discriminator"] > 0
    network, card = read_codec_folder(run / "model")
    assert card.metrics["loss"] < ours[1]["loss_mel"]
    codes = network.encode(torch.randn(1, 1, 2000) * 0.1)
    assert network.decode(codes)[0].shape == (1, 1, 2000)


def test_recipe_trains_scalar_codes(manifests, tmp_path):
    torch.set_num_threads(1)
    words = [
        TINY,
        f"data.train=[{manifests[0]}]",
        f"data.dev=[{manifests[1]}]",
        f"train.output_dir={tmp_path}",
    ]
    words += ["network.quantizer=fsq", "network.steps=[5,4]", "train.max_steps=8"]
    assert run_recipe(codec.Recipe, codec.recipe, words, "doc") == 0
    network, card = read_codec_folder(tmp_path / "model")
    assert (network.num_codebooks, network.codebook_size) == (3, 20)
    assert 0 < card.metrics["loss"] < losses(tmp_path)[1]["loss_mel"]


def test_mistakes_end_in_one_line_and_exit_code_2(manifests, tmp_path, capsys):
    words = [TINY, f"train.output_dir={tmp_path}/run", f"data.dev=[{manifests[1]}]"]
    for more, message in (
        ([], "data.train"),
        ([f"data.train=[{tmp_path}/none.jsonl]"], "no such manifest"),
        ([f"data.train=[{manifests[0]}]", "levels=[4]"], "3 codebooks"),
        ([f"data.train=[{manifests[0]}]", "data.weights=[1,2]"], "data.weights"),
        ([f"data.train=[{manifests[0]}]", "network.widht=3"], "widht"),
        ([f"data.train=[{manifests[0]}]", "data.sample_rate=8000"], "must be equal"),
    ):
        assert run_recipe(codec.Recipe, codec.recipe, [*words, *more], "doc") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error


def test_the_discriminators_part_of_the_loss_does_not_reach_the_codec(manifests):
    torch.manual_seed(0)
    model = codec.MultiResolutionDiscriminator([256], 4, 2)
    decoded = (0.1 * torch.randn(1, 2000)).requires_grad_()
    waves = 0.1 * torch.randn(1, 2000)
    gan.adversarial_losses(model, decoded, waves)[0].backward()
    assert decoded.grad is None
    own = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    sum(gan.adversarial_losses(model, decoded, waves)).backward()
    assert decoded.grad.any()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, own[name])


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_depend_on_seed_and_position_alone(manifests, workers):
    config = CropConfig([manifests[0]], seconds=0.3, batch_size=3, workers=workers)
    data = CropData(config, multiple=320, seed=5)
    stream = iter(data)
    first = [next(stream).waves for _ in range(4)]
    assert first[0].shape == (3, 4800)
    assert data.state_dict() == {"batches": 4}
    again = CropData(config, 320, 5)
    again.load_state_dict({"batches": 2})
    torch.testing.assert_close(next(iter(again)).waves, first[2])
    second = CropData(config, 320, 5, rank=1, world_size=2)
    torch.testing.assert_close(next(iter(second)).waves, first[1])
    assert not torch.equal(first[0], first[1])
    sample = data.sample(2.0)
    assert sample.shape == (6, 4800)
    assert data.state_dict() == {"batches": 4}
    torch.testing.assert_close(second.sample(2.0), sample)
    assert max(float(part.abs().max()) for part in first) < 1.0


def test_short_recordings_lie_in_silence(tmp_path):
    manifest = make_manifest(tmp_path, 2, ["a"], "short")
    batch = next(iter(CropEval(CropConfig(dev=[manifest], dev_seconds=20.0), 320)))
    samples, _ = soundfile.read(next(tmp_path.rglob("*.wav")))
    assert batch.waves.shape == (2, 320000)
    assert batch.seconds == 40.0
    assert not batch.waves[:, len(samples) + 32000 :].any()
    batch = next(iter(CropData(CropConfig([manifest], seconds=20.0, batch_size=1, workers=0))))
    assert batch.waves.shape == (1, 320000)
    assert float((batch.waves == 0).float().mean()) > 0.5


def test_manifests_without_recordings(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ManifestError, match="is empty"):
        CropData(CropConfig([str(tmp_path / "empty.jsonl")]))
    with pytest.raises(ManifestError, match=r"data\.dev"):
        CropEval(CropConfig())
