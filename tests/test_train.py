"""The training loop: exact resume after kill -9, several processes, budgets, bad steps, averaging."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from nar_speech.data import Batch
from nar_speech.errors import CheckpointError, ConfigError, TrainingError
from nar_speech.train import (
    OptimConfig,
    Saver,
    TrainConfig,
    average_weights,
    learning_rate,
    train,
    write_atomic,
)
from nar_speech.train.optim import Ema, build_optimizer, set_lr
from nar_speech.train.report import read_log
from tests import training_task
from tests.corpus import make_manifest

ROOT = Path(__file__).parent.parent


def command(manifest, folder, *words, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "tests.training_task", manifest, str(folder), *words]


def environment(**extra):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def losses(folder):
    return {
        r["step"]: (r["loss"], r["grad_norm"]) for r in read_log(Path(folder) / "train.jsonl") if "loss" in r
    }


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_manifest(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def uninterrupted(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(manifest, folder), check=True, env=environment(), cwd=ROOT, capture_output=True)
    return folder


@pytest.mark.slow
def test_kill_9_then_the_same_command_gives_the_same_losses(manifest, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    kills = 0
    for target in (7, 18):  # neither is a step with a checkpoint
        process = subprocess.Popen(
            command(manifest, folder),
            env=environment(STEP_SLEEP="0.1"),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while max(losses(folder), default=0) < target:
            assert process.poll() is None, "the training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 2
    assert 0 < Saver(folder).steps()[-1] < 30
    subprocess.run(command(manifest, folder), check=True, env=environment(), cwd=ROOT, capture_output=True)
    assert sorted(losses(folder)) == list(range(1, 31))
    assert losses(folder) == losses(uninterrupted)
    ours, theirs = (torch.load(f / "final.pt", weights_only=True) for f in (folder, uninterrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_processes_equal_accumulation_of_two(manifest, tmp_path):
    words = ["max_steps=12", "validate_every=6"]
    for folder, processes, accumulation in (("one", 1, 2), ("two", 2, 1)):
        subprocess.run(
            command(manifest, tmp_path / folder, *words, f"accumulation={accumulation}", processes=processes),
            check=True,
            env=environment(),
            cwd=ROOT,
            capture_output=True,
        )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(one) == sorted(two) == list(range(1, 13))
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5)
    ours, theirs = (torch.load(tmp_path / f / "final.pt", weights_only=True) for f in ("one", "two"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_stops_cleanly_and_the_run_goes_on(number, manifest, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(manifest, folder, "save_every=1000", "validate_every=1000"),
        env=environment(STEP_SLEEP="0.1"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while max(losses(folder), default=0) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "the same command goes on from here" in stderr
    stopped_at = Saver(folder).steps()[-1]
    assert stopped_at == max(losses(folder)) >= 3
    whole = losses(uninterrupted)
    assert losses(folder) == {step: whole[step] for step in losses(folder)}


class Numbers:
    """Batches 0, 1, 2, ... as (1, 1) waves; a position is a number."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while True:
            self.at += 1
            value = torch.full((1, 1), float(self.at))
            one = torch.ones(1, dtype=torch.int64)
            yield Batch(value, one, one[:, None], one, [str(self.at)], [""])

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def small_config(folder, **changes):
    optim = {
        "lr": 0.1,
        "warmup_steps": 1,
        "schedule": "constant",
        "weight_decay": 0.0,
        **changes.pop("optim", {}),
    }
    values = {"device": "cpu", "max_steps": 6, "save_every": 3, "validate_every": 3, **changes}
    return TrainConfig(str(folder), optim=OptimConfig(**optim), **values)


def linear():
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def square(model, batch, generator, step):
    return {"loss": model(batch.waves).square().mean()}


def test_bad_steps_are_skipped_and_counted(tmp_path):
    def loss_step(model, batch, generator, step):
        loss = square(model, batch, generator, step)["loss"]
        return {"loss": loss * float("nan") if step in (1, 2) else loss}

    seen = []
    model = linear()
    hook = model.register_forward_pre_hook(lambda m, a: seen.append(m.weight.item()))
    train(small_config(tmp_path), model, loss_step, Numbers())
    hook.remove()
    assert seen[1] == seen[2] == seen[3] != seen[4]
    state = Saver(tmp_path).load_last()
    assert state["progress"]["bad_steps"] == 2
    assert state["progress"]["bad_in_a_row"] == 0
    assert math.isnan(read_log(tmp_path / "train.jsonl")[1]["loss"])


def test_a_gradient_that_is_not_finite_is_a_bad_step_too(tmp_path):
    def loss_step(model, batch, generator, step):
        return {"loss": (model.weight - model.weight.detach()).abs().sqrt().sum()}  # 0 with an infinite slope

    with pytest.raises(TrainingError, match="4 steps in a row"):
        train(small_config(tmp_path, max_bad_steps=4), linear(), loss_step, Numbers())


def test_a_buffer_that_is_not_finite_stops_at_once(tmp_path):
    model = nn.Sequential(linear(), nn.BatchNorm1d(1))

    def loss_step(model, batch, generator, step):
        return {"loss": model(batch.waves.repeat(2, 1) * float("inf")).sum()}

    with pytest.raises(TrainingError, match="running_mean"):
        train(small_config(tmp_path), model, loss_step, Numbers())


def test_best_weights_and_average(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 1.5, 0.5])  # three validations, the best single one again, the average
    config = small_config(tmp_path, max_steps=9, keep_weights=2)
    model = linear()
    result = train(config, model, square, Numbers(), lambda m: {"loss": next(scores)})
    saver = Saver(tmp_path)
    assert saver.steps("weights") == [6, 9]
    assert result.weights_from == "average of steps 6, 9"
    assert result.metrics == {"loss": 0.5}
    expected = average_weights([saver.load_weights(6), saver.load_weights(9)])
    assert torch.equal(model.weight, expected["weight"])
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_an_average_that_is_worse_is_not_taken(tmp_path):
    scores = iter([3.0, 1.0, 1.0, 7.0])
    model = linear()
    result = train(small_config(tmp_path), model, square, Numbers(), lambda m: {"loss": next(scores)})
    assert result.weights_from == "step 6"
    assert torch.equal(model.weight, Saver(tmp_path).load_weights(6)["weight"])


def test_the_weights_of_the_end_are_taken_where_validation_can_not_judge(tmp_path):
    scores = iter([1.0, 2.0, 3.0, 4.0])
    model = linear()
    config = small_config(tmp_path, max_steps=9, average="end")
    result = train(config, model, square, Numbers(), lambda m: {"loss": next(scores)})
    assert (result.weights_from, result.metrics) == ("step 9", {"loss": 4.0})
    assert torch.equal(model.weight, Saver(tmp_path).load_weights(9)["weight"])


def test_minutes_as_budget_drive_the_schedule_and_are_saved(tmp_path):
    config = small_config(
        tmp_path, max_steps=None, max_minutes=1 / 60, save_every=1000, validate_every=100000,
        optim={"schedule": "linear"},
    )  # fmt: skip

    def slow(model, batch, generator, step):
        time.sleep(0.02)
        return square(model, batch, generator, step)

    train(config, linear(), slow, Numbers())
    records = [r for r in read_log(tmp_path / "train.jsonl") if "lr" in r]
    assert 10 < len(records) <= 51
    for before, after in pairwise(records):
        assert after["lr"] == pytest.approx(0.1 * max(0.0, 1 - before["seconds"]), abs=1e-6)
    assert Saver(tmp_path).load_last()["progress"]["seconds"] >= 1
    again = train(config, linear(), slow, Numbers())
    assert again.finished
    assert again.step == len(records)


def test_resume_refuses_another_model_and_honours_resume_false(tmp_path):
    train(small_config(tmp_path), linear(), square, Numbers())
    with pytest.raises(CheckpointError, match="another model"):
        train(small_config(tmp_path, max_steps=9), nn.Linear(2, 3), square, Numbers())
    with pytest.raises(ConfigError, match="holds checkpoints"):
        train(small_config(tmp_path, resume=False), linear(), square, Numbers())


def test_an_unreadable_checkpoint_names_its_file(tmp_path):
    (tmp_path / "step-00000003.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"step-00000003\.pt"):
        train(small_config(tmp_path), linear(), square, Numbers())


def test_keep_last_and_no_partial_file_is_taken(tmp_path):
    (tmp_path / ".step-00000099.pt.part").write_bytes(b"killed while writing")
    train(small_config(tmp_path, max_steps=9, save_every=1, keep_last=3), linear(), square, Numbers())
    assert Saver(tmp_path).steps() == [7, 8, 9]


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_text() == "old"


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulation_is_the_mean_gradient(tmp_path, accumulation):
    config = small_config(
        tmp_path, max_steps=1, accumulation=accumulation, optim={"clip_norm": 1e9, "name": "adam"}
    )
    model = linear()
    start = model.weight.item(), model.bias.item()
    train(config, model, square, Numbers())
    record = read_log(tmp_path / "train.jsonl")[0]
    xs = range(1, accumulation + 1)
    ys = [start[0] * x + start[1] for x in xs]
    assert record["loss"] == pytest.approx(sum(y * y for y in ys) / accumulation, rel=1e-5)
    slope = (sum(2 * y * x for x, y in zip(xs, ys, strict=True)), sum(2 * y for y in ys))
    assert record["grad_norm"] == pytest.approx(math.hypot(*slope) / accumulation, rel=1e-5)


def test_groups_scales_and_freezing():
    model = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)}
    )
    config = OptimConfig(lr=1.0, lr_scales={"encoder.": 0.1, "encoder.1": 0.5}, freeze=["head.bias"])
    optimizer = build_optimizer(model, config)
    set_lr(optimizer, 2.0)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(model["encoder"][0].weight)] == (pytest.approx(0.2), 0.01)
    assert rates[id(model["encoder"][0].bias)] == (pytest.approx(0.2), 0.0)
    assert rates[id(model["encoder"][1].weight)] == (pytest.approx(1.0), 0.01)
    assert rates[id(model["head"].weight)] == (pytest.approx(2.0), 0.01)
    assert id(model["head"].bias) not in rates
    assert not model["head"].bias.requires_grad


@pytest.mark.parametrize("where", ["freeze", "lr_scales"])
def test_a_prefix_that_matches_nothing_fails(where):
    value = ["encodr."] if where == "freeze" else {"encodr.": 0.1}
    with pytest.raises(ConfigError, match=rf"{where}.*encodr.*top modules: bias, weight"):
        build_optimizer(linear(), OptimConfig(**{where: value}))


def test_schedules():
    cosine = OptimConfig(lr=2.0, warmup_steps=10, final_lr=0.1)
    assert learning_rate(cosine, 4, 0.0) == pytest.approx(1.0)
    assert learning_rate(cosine, 100, 0.5) == pytest.approx(2.0 * 0.55)
    assert learning_rate(cosine, 100, 1.0) == pytest.approx(0.2)
    inverse = OptimConfig(lr=2.0, warmup_steps=100, schedule="inverse_sqrt")
    assert learning_rate(inverse, 49, 0.3) == pytest.approx(1.0)
    assert learning_rate(inverse, 99, 0.3) == pytest.approx(2.0)
    assert learning_rate(inverse, 399, 0.3) == pytest.approx(1.0)
    noam = OptimConfig(lr=5.0, warmup_steps=100, schedule="noam", noam_width=256)
    assert learning_rate(noam, 99, 0.3) == pytest.approx(5.0 / 16 / 10)
    assert learning_rate(OptimConfig(lr=1.0, schedule="linear", warmup_steps=1), 9, 0.75) == pytest.approx(
        0.25
    )


def test_ema_is_validated_and_exported(tmp_path):
    model = linear()
    values = []
    config = small_config(tmp_path, optim={"ema_decay": 0.5}, average="none")
    train(
        config, model, square, Numbers(), lambda m: values.append(m.weight.item()) or {"loss": -len(values)}
    )
    state = Saver(tmp_path).load_last()
    assert values[1] == state["ema"]["weights"]["weight"].item() != state["model"]["weight"].item()
    assert model.weight.item() == values[1]


def test_ema_decay():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, 0.9)
    nn.init.ones_(model.weight)
    expected = 0.0
    for n in range(1, 40):
        ema.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
        assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_config_needs_a_budget_and_knows_its_keys(tmp_path):
    from nar_speech import config as configs

    with pytest.raises(ConfigError, match=r"max_steps or train\.max_minutes"):
        configs.from_dict(TrainConfig, {"output_dir": "x"})
    with pytest.raises(ConfigError, match="unknown key 'acumulation'; valid keys: accumulation"):
        configs.from_dict(TrainConfig, {"output_dir": "x", "max_steps": 3, "acumulation": 2})


def test_bfloat16_autocast_reaches_the_loss_step(tmp_path):
    kinds = set()

    def loss_step(model, batch, generator, step):
        out = model(batch.waves)
        kinds.add(out.dtype)
        return {"loss": out.float().square().mean()}

    model = linear()
    train(small_config(tmp_path, dtype="bfloat16"), model, loss_step, Numbers())
    assert kinds == {torch.bfloat16}
    assert model.weight.dtype == torch.float32


def test_log_is_cut_back_and_tensorboard_is_written(tmp_path):
    train(small_config(tmp_path, max_steps=4, save_every=2), linear(), square, Numbers())
    log = tmp_path / "train.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 5, "loss": 1.0}) + "\n" + '{"step": 6, "lo')
    train(small_config(tmp_path, max_steps=8, save_every=2), linear(), square, Numbers())
    assert [r["step"] for r in read_log(log)] == list(range(1, 9))
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_training_task_learns(manifest, tmp_path):
    config = small_config(tmp_path, max_steps=100, validate_every=100, save_every=100, optim={"lr": 0.03})
    torch.set_num_threads(1)
    training_task.run(manifest, config)
    rows = [r for r in read_log(tmp_path / "train.jsonl") if "loss" in r]
    assert sum(r["loss"] for r in rows[-10:]) < 0.8 * sum(r["loss"] for r in rows[:10])
