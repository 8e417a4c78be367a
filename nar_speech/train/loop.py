"""One plain training loop, alone or under torchrun.

Everything random in a step is seeded from (seed, number of the micro-batch in the whole run), and everything
else the next step depends on is in the checkpoint. So a run that is killed and started again gives the same
losses as one that was not, and W processes give what one process with W times the accumulation gives.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nar_speech import config as configs
from nar_speech.data.seeding import derive_seed
from nar_speech.errors import CheckpointError, ConfigError, TrainingError
from nar_speech.train.distributed import World, barrier, init_world, sum_over
from nar_speech.train.optim import Ema, OptimConfig, average_weights, build_optimizer, learning_rate, set_lr
from nar_speech.train.report import Reporter
from nar_speech.train.saver import Saver

LossStep = Callable[[nn.Module, Any, torch.Generator, int], Mapping[str, Tensor]]
Validate = Callable[[nn.Module], Mapping[str, float]]


class TrainStream(Protocol):
    """What the loop needs of its data: an endless iterator with a position (``data.TrainData`` is one)."""

    def __iter__(self) -> Iterator[Any]: ...  # batches with .to(device) and .seconds

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class TrainConfig:
    """The loop's settings.

    Attributes:
        output_dir: checkpoints, logs and curves; a start with the same folder goes on where it stopped.
        dtype: "bfloat16" computes under autocast; weights stay float32.
        threads: CPU threads of torch, or None for its default.
        max_steps, max_minutes: the budget; at least one. Schedules follow the part of it that is used.
            Minutes are wall-clock minutes of all starts together, validation included.
        accumulation: micro-batches of one process in an optimizer step.
        validate_every, save_every, log_every: in steps.
        metric: which number of ``validate`` ranks weights.
        keep_last, keep_weights: full checkpoints, and weights of validations, that stay on disk.
        average: final weights = mean of the ``keep_weights`` "best" or "last" validated ones, if that
            validates better than the best single ones; "none" takes the best single ones, "end" those of the
            end, for adversarial trainings, which validation can't judge.
        max_bad_steps: after so many steps in a row with a non-finite loss or gradient, training fails.
        resume: False refuses to start in a folder that holds checkpoints.
    """

    output_dir: str
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    accumulation: int = 1
    validate_every: int = 1000
    save_every: int = 200
    log_every: int = 10
    metric: str = "loss"
    higher_is_better: bool = False
    keep_last: int = 2
    keep_weights: int = 5
    average: Literal["best", "last", "none", "end"] = "best"
    max_bad_steps: int = 20
    find_unused_parameters: bool = False
    resume: bool = True
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("train.max_steps or train.max_minutes: give at least one")
        for name in ("accumulation", "validate_every", "save_every", "log_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: must be at least 1, got {getattr(self, name)}")

    def used(self, step: int, seconds: float) -> float:
        """Part of the budget used, 0 to 1 and more."""
        by_steps = step / self.max_steps if self.max_steps is not None else 0.0
        by_time = seconds / (60 * self.max_minutes) if self.max_minutes is not None else 0.0
        return max(by_steps, by_time)


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    audio_seconds: float = 0.0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    scores: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` hands back; the model holds the final weights."""

    step: int
    metrics: dict[str, float]
    weights_from: str
    finished: bool


def train(
    config: TrainConfig,
    model: nn.Module,
    loss_step: LossStep,
    data: TrainStream,
    validate: Validate | None = None,
    world: World | None = None,
) -> TrainResult:
    """Train ``model`` until the budget is used.

    Args:
        loss_step: ``(model, batch, generator, step) -> {"loss": scalar tensor, other scalars to log}``;
            called under autocast; draws from ``generator`` (on the training device) only.
        data: endless batches of this process with a position.
        validate: ``model -> {name: number}``, the same numbers in every process; runs in eval mode without
            gradients on the averaged weights when there is an average.
        world: from :func:`~nar_speech.train.distributed.init_world`, or None to join it here.

    Raises:
        TrainingError: too many non-finite steps in a row.
        ConfigError: a setting that can't work; CheckpointError: a checkpoint of another model.
    """
    world = world or init_world(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = _Run(config, model, loss_step, data, validate, world)
    try:
        with _stop_on_signal() as stop:
            finished = run.loop(stop)
        return run.finish() if finished else TrainResult(run.progress.step, {}, "", False)
    finally:
        run.reporter.close()


class _LossModule(nn.Module):
    """The loss as a module's forward, which is where DDP hooks in."""

    def __init__(self, model: nn.Module, loss_step: LossStep):
        super().__init__()
        self.model = model
        self.loss_step = loss_step

    def forward(self, batch: Any, generator: torch.Generator, step: int) -> Mapping[str, Tensor]:
        return self.loss_step(self.model, batch, generator, step)


class _Run:
    def __init__(self, config, model, loss_step, data, validate, world):
        self.config, self.world, self.data, self.validate = config, world, data, validate
        self.model = model.to(world.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.step_module = _LossModule(self.model, loss_step)
        if world.size > 1:
            self.step_module = DistributedDataParallel(
                self.step_module,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                find_unused_parameters=config.find_unused_parameters,
            )
        self.ema = Ema(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self.generator = torch.Generator(world.device)
        self.saver = Saver(config.output_dir, config.keep_last, config.keep_weights)
        self.progress = Progress()
        self.metrics: dict[str, float] = {}
        resumed = self._restore()
        in_minutes = config.max_steps is None
        self.reporter = Reporter(
            config.output_dir,
            world.main,
            total=config.max_minutes if in_minutes else config.max_steps,
            unit="min" if in_minutes else "step",
            step=self.progress.step,
            done=self._done(),
        )
        if resumed:
            self.reporter.say(f"resumed from {resumed} at step {self.progress.step}")

    # ---- the loop -------------------------------------------------------------------------------------

    def loop(self, stop: _Stop) -> bool:
        """Train to the end of the budget (True) or to a stop signal (False)."""
        config, progress = self.config, self.progress
        began = time.monotonic() - progress.seconds
        if config.used(progress.step, progress.seconds) >= 1:
            return True
        self.model.train()
        batches = iter(self.data)
        while True:
            lr = learning_rate(config.optim, progress.step, config.used(progress.step, progress.seconds))
            set_lr(self.optimizer, lr)
            scalars, seconds, stopped = self._step(batches, began, bool(stop))
            speed = scalars.pop("_audio") / max(1e-9, seconds - progress.seconds)
            progress.step, progress.seconds = progress.step + 1, seconds
            scalars.update(lr=lr, audio_per_second=speed, seconds=seconds)
            to_board = progress.step % config.log_every == 0 or progress.step == 1
            self.reporter.step(progress.step, self._done(), scalars, to_board)
            ended = config.used(progress.step, seconds) >= 1
            due = ended or progress.step % config.validate_every == 0
            validated = bool(self.validate) and due and not stopped
            if validated:
                self._validate()
                progress.seconds = self._agree(time.monotonic() - began)
            if ended or stopped or validated or progress.step % config.save_every == 0:
                self.save()
            if ended or stopped:
                if stopped and not ended:
                    self.reporter.say(f"stopped at step {progress.step}; the same command goes on from here")
                return ended

    def _step(self, batches: Iterator[Any], began: float, stop: bool) -> tuple[dict[str, float], float, bool]:
        """One optimizer step: (scalars averaged over processes, seconds trained so far, stop asked for)."""
        config, world, progress = self.config, self.world, self.progress
        sums: dict[str, float] = {}
        audio = 0.0
        for micro in range(config.accumulation):
            batch = next(batches)
            audio += batch.seconds
            batch = batch.to(world.device)
            number = (progress.step * config.accumulation + micro) * world.size + world.rank
            torch.manual_seed(derive_seed(config.seed, "dropout", number))
            self.generator.manual_seed(derive_seed(config.seed, "loss", number))
            last = micro == config.accumulation - 1
            with contextlib.nullcontext() if last or world.size == 1 else self.step_module.no_sync():
                with self._autocast():
                    parts = self.step_module(batch, self.generator, progress.step)
                (parts["loss"] / config.accumulation).backward()
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach()) / config.accumulation / world.size
        seconds = time.monotonic() - began
        keys = sorted(sums)
        row = [sums[key] for key in keys] + [audio, seconds if world.main else 0.0, float(stop)]
        row = sum_over(world, torch.tensor(row, dtype=torch.float64)).tolist()
        scalars = dict(zip(keys, row, strict=False))
        scalars["grad_norm"] = self._update(math.isfinite(scalars["loss"]))
        progress.audio_seconds += row[-3]
        scalars["_audio"] = row[-3]
        return scalars, row[-2], row[-1] > 0

    def _update(self, finite: bool) -> float:
        """Clip and apply the gradients unless something is not finite; returns the gradient norm."""
        config, progress = self.config, self.progress
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm))
        if finite and math.isfinite(norm):
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model)
            progress.bad_in_a_row = 0
        else:
            self._bad_step(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _bad_step(self, norm: float) -> None:
        progress = self.progress
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        self.reporter.say(
            f"step {progress.step + 1}: loss or gradient (norm {norm}) is not finite; step skipped, "
            f"{progress.bad_in_a_row} in a row, {progress.bad_steps} in all"
        )
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point() and not torch.isfinite(buffer).all():
                raise TrainingError(
                    f"step {progress.step + 1}: buffer '{name}' is not finite; go on from the last "
                    "checkpoint with a lower optim.lr, or look at the batch"
                )
        if progress.bad_in_a_row >= self.config.max_bad_steps:
            raise TrainingError(
                f"{progress.bad_in_a_row} steps in a row with a non-finite loss or gradient, the last one "
                f"step {progress.step + 1}; lower optim.lr, lengthen optim.warmup_steps, or try "
                "train.dtype=float32"
            )

    # ---- validation and the end -----------------------------------------------------------------------

    def _validate(self) -> None:
        step = self.progress.step
        with self._final_weights():
            self.metrics = self._measure()
            self.reporter.validation(step, self.metrics)
            self.progress.scores[step] = self.metrics[self.config.metric]
            if self.world.main:
                self.saver.save_weights(step, self.model.state_dict())
                self.saver.prune_weights(*self._ranking())
        self.model.train()

    def _measure(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad(), self._autocast():
            metrics = {key: float(value) for key, value in self.validate(self.model).items()}
        if self.config.metric not in metrics:
            names = ", ".join(sorted(metrics))
            raise ConfigError(f"train.metric: validation gives no '{self.config.metric}'; it gives {names}")
        return metrics

    def finish(self) -> TrainResult:
        """Load the final weights: the average of the kept ones, the best single ones, or those of the end."""
        barrier(self.world)
        progress, config = self.progress, self.config
        ranked = self.saver.ranked(*self._ranking())
        if not self.validate or not ranked or config.average == "end":
            if self.ema:
                self.model.load_state_dict(self.ema.weights)
            if self.validate and config.average == "end":
                self.metrics = self._measure()
                self.reporter.validation(progress.step, self.metrics, "final")
            return TrainResult(progress.step, self.metrics, f"step {progress.step}", True)
        sign = 1.0 if config.higher_is_better else -1.0
        best = self.saver.ranked(progress.scores, config.higher_is_better, "best")[0]
        self.model.load_state_dict(self.saver.load_weights(best))
        metrics, source = self._measure(), f"step {best}"
        if config.average != "none" and len(ranked) > 1:
            chosen = sorted(ranked[: config.keep_weights])
            self.model.load_state_dict(average_weights([self.saver.load_weights(step) for step in chosen]))
            averaged = self._measure()
            self.reporter.validation(progress.step, averaged, "average")
            if sign * averaged[config.metric] >= sign * metrics[config.metric]:
                metrics, source = averaged, f"average of steps {', '.join(map(str, chosen))}"
            else:
                self.model.load_state_dict(self.saver.load_weights(best))
        self.reporter.validation(progress.step, metrics, "final")
        self.reporter.say(f"final weights: {source}")
        return TrainResult(progress.step, metrics, source, True)

    # ---- checkpoints ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint of this step (main process) and wait for it (the others)."""
        if self.world.main:
            self.reporter.flush()
            progress = self.progress
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict() if self.ema else None,
                "data": self.data.state_dict(),
                "progress": dict(vars(progress)),
                "config": configs.to_dict(self.config),
            }
            self.saver.save(progress.step, state)
        barrier(self.world)

    def _restore(self) -> str:
        """Go on from the newest checkpoint, if there is one; returns its path or an empty string."""
        if not self.config.resume and self.saver.steps():
            raise ConfigError(
                f"train.output_dir: {self.config.output_dir} holds checkpoints; choose another folder, "
                "remove them, or leave train.resume on"
            )
        state = self.saver.load_last()
        if state is None:
            return ""
        path = self.saver.path(state["progress"]["step"])
        try:
            self.model.load_state_dict(state["model"])
            own = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, settings in zip(self.optimizer.param_groups, own, strict=True):
                group.update(settings)  # moments come from the checkpoint, settings from the configuration
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path}: is of another model or optimizer ({reason}); use another output_dir"
            ) from error
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
        self.data.load_state_dict(state["data"])
        self.progress = Progress(**state["progress"])
        return str(path)

    # ---- small helpers --------------------------------------------------------------------------------

    def _ranking(self) -> tuple[dict[int, float], bool, str]:
        by = "last" if self.config.average == "last" else "best"
        return self.progress.scores, self.config.higher_is_better, by

    def _done(self) -> float:
        if self.config.max_steps is None:
            return self.progress.seconds / 60
        return self.config.max_steps * self.config.used(self.progress.step, self.progress.seconds)

    def _agree(self, seconds: float) -> float:
        """The main process' clock, in every process."""
        value = torch.tensor([seconds if self.world.main else 0.0], dtype=torch.float64)
        return float(sum_over(self.world, value))

    def _autocast(self):
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=enabled)

    @contextlib.contextmanager
    def _final_weights(self) -> Iterator[None]:
        """The averaged weights in the model for a while, when there is an average."""
        if not self.ema:
            yield
            return
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema.weights)
        try:
            yield
        finally:
            self.model.load_state_dict(own)


class _Stop:
    """True once SIGTERM or SIGINT has come."""

    def __init__(self):
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Turn the first SIGTERM or SIGINT into a clean stop after the step; the second one acts as usual."""
    stop, before = _Stop(), {}

    def ask(number: int, _frame: Any) -> None:
        stop.asked = True
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.getsignal(number)
            signal.signal(number, ask)
    except ValueError:  # not in the main thread: signals go elsewhere
        before.clear()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
