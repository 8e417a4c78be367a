"""What a training run shows: a progress bar on stderr, one JSON line a step, tensorboard, a loss curve."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nar_speech.train.saver import write_atomic

LOG = "train.jsonl"
LINE_SECONDS = 30.0


class Reporter:
    """Output of the main process; with ``enabled`` False every method does nothing.

    Files in the output folder: ``train.jsonl`` (one object a step or validation, cut back to the checkpoint
    on resume so that no step appears twice), ``tensorboard/``, ``loss.png``.
    """

    def __init__(self, folder: str | Path, enabled: bool, total: float, unit: str, step: int, done: float):
        self.folder, self.enabled = Path(folder), enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.folder.mkdir(parents=True, exist_ok=True)
        _cut_log(self.folder / LOG, step)
        self._log = (self.folder / LOG).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else None)
        shape = "{l_bar}{bar}| {n:.4g}/{total:.4g} {unit} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(
            total=total,
            initial=min(done, total),
            unit=unit,
            file=sys.stderr,
            bar_format=shape,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._total, self._unit, self._start = total, unit, min(done, total)
        self._began = self._last_line = time.monotonic()

    def step(self, step: int, done: float, scalars: Mapping[str, float], to_board: bool) -> None:
        """Record one optimizer step; ``done`` is the part of the budget used, in the bar's unit."""
        if not self.enabled:
            return
        self._write({"step": step, **scalars})
        if to_board:
            self._scalars("train", step, scalars)
            shown = {k: f"{scalars[k]:.4g}" for k in ("loss", "lr", "audio_per_second") if k in scalars}
            self._bar.set_postfix({"step": step, **shown}, refresh=False)
        if self._bar.disable:
            self._line(step, done, scalars)
        else:
            self._bar.update(max(0.0, min(done, self._bar.total) - self._bar.n))

    def validation(self, step: int, metrics: Mapping[str, float], name: str = "dev") -> None:
        """Record and print the metrics of a validation."""
        if not self.enabled:
            return
        self._write({"step": step, name: dict(metrics)})
        self._scalars(name, step, metrics)
        self.say(f"step {step} {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))

    def say(self, text: str) -> None:
        """One line on stderr above the bar."""
        if self.enabled:
            self._bar.write(text, file=sys.stderr)
            sys.stderr.flush()

    def flush(self) -> None:
        """Bring everything recorded so far to disk."""
        if self.enabled:
            self._log.flush()
            self._board.flush()

    def close(self) -> None:
        """Close the files and draw the loss curve."""
        if not self.enabled:
            return
        self._log.close()
        self._board.close()
        self._bar.close()
        draw_curves(self.folder / LOG, self.folder / "loss.png")

    def _line(self, step: int, done: float, scalars: Mapping[str, float]) -> None:
        """Progress as a plain line every half minute, where stderr is a file."""
        now = time.monotonic()
        if now - self._last_line < LINE_SECONDS or done <= self._start:
            return
        self._last_line = now
        left = (self._total - done) * (now - self._began) / (done - self._start)
        numbers = ", ".join(
            f"{k} {scalars[k]:.4g}" for k in ("loss", "lr", "audio_per_second") if k in scalars
        )
        minutes, hours = int(left / 60) % 60, int(left / 3600)
        self.say(
            f"step {step}, {done:.4g}/{self._total:.4g} {self._unit}, {numbers}, {hours}:{minutes:02d} h left"
        )

    def _write(self, record: Mapping[str, Any]) -> None:
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()

    def _scalars(self, group: str, step: int, scalars: Mapping[str, float]) -> None:
        for key, value in scalars.items():
            self._board.add_scalar(f"{group}/{key}", value, step)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``train.jsonl``; a last line cut short by a crash is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # only a killed process leaves such a line, and it is the last one
    return records


def draw_curves(log: Path, picture: Path) -> None:
    """Loss of training (with a running mean) and of validation, and its error rate, over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(log)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    dev = [(r["step"], r["dev"]) for r in records if "dev" in r]
    if not train:
        return
    figure, left = pyplot.subplots(figsize=(9, 5))
    steps, losses = zip(*train, strict=True)
    smooth, mean = [], losses[0]
    for loss in losses:
        mean = 0.98 * mean + 0.02 * loss if loss == loss and abs(loss) != float("inf") else mean
        smooth.append(mean)
    left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    left.plot(steps, smooth, color="tab:blue", label="training loss (running mean)")
    if any("loss" in m for _, m in dev):
        left.plot(*zip(*[(s, m["loss"]) for s, m in dev if "loss" in m], strict=True), "o-", label="dev loss")
    left.set_xlabel("step")
    left.set_ylabel("loss")
    left.legend(loc="upper left")
    rates = sorted({key for _, metrics in dev for key in metrics if key in ("wer", "cer")})
    if rates:
        right = left.twinx()
        for key in rates:
            points = [(s, 100 * m[key]) for s, m in dev if key in m]
            right.plot(*zip(*points, strict=True), "s--", color="tab:red", label=f"dev {key.upper()} %")
        right.set_ylabel("error rate, %")
        right.set_ylim(bottom=0)
        right.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _cut_log(path: Path, step: int) -> None:
    """Drop records after ``step``: the steps of a killed run that are about to be repeated."""
    if path.is_file():
        kept = [record for record in read_log(path) if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))
