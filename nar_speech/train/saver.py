"""Checkpoints that survive being killed at any moment.

A folder holds ``step-00001000.pt`` (everything needed to go on, the last few) and
``weights-00001000.safetensors`` (weights alone as they were validated, the best or last few).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nar_speech.errors import CheckpointError

_STEP = re.compile(r"^(step|weights)-(\d{8})\.(pt|safetensors)$")


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file, flush it to disk, then rename it to ``path``.

    A reader therefore sees the old file or the whole new one, even after a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    write(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Saver:
    """Writes, finds and prunes the checkpoints of one training run."""

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_weights: int = 5):
        self.folder = Path(folder)
        self.keep_last, self.keep_weights = max(1, keep_last), max(1, keep_weights)

    def steps(self, kind: str = "step") -> list[int]:
        """Steps for which a "step" or "weights" file exists, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.match(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[2]) for match in found if match and match[1] == kind)

    def path(self, step: int, kind: str = "step") -> Path:
        """Where the file of ``step`` lies."""
        return self.folder / f"{kind}-{step:08d}.{'pt' if kind == 'step' else 'safetensors'}"

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and remove all but the last ``keep_last``."""
        path = self.path(step)
        write_atomic(path, lambda part: torch.save(dict(state), part))
        for old in self.steps()[: -self.keep_last]:
            self.path(old).unlink(missing_ok=True)
        return path

    def load_last(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest checkpoint, or None in a fresh folder.

        Raises:
            CheckpointError: it can't be read.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path}: can't be read ({reason}); remove it to go on from an older one"
            ) from error

    def save_weights(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Write the weights of ``step``; :meth:`prune_weights` decides later what stays."""
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
        write_atomic(self.path(step, "weights"), lambda part: save_file(tensors, part))

    def ranked(self, scores: Mapping[int, float], higher_is_better: bool, by: str) -> list[int]:
        """Steps with weights on disk, best (``by`` "best") or newest ("last") first."""
        there = [step for step in self.steps("weights") if step in scores]
        if by == "last":
            return sorted(there, reverse=True)
        return sorted(there, key=lambda step: (-scores[step] if higher_is_better else scores[step], -step))

    def prune_weights(self, scores: Mapping[int, float], higher_is_better: bool, by: str) -> None:
        """Keep the first ``keep_weights`` of :meth:`ranked` and the best one; remove the others."""
        keep = set(self.ranked(scores, higher_is_better, by)[: self.keep_weights])
        keep.update(self.ranked(scores, higher_is_better, "best")[:1])
        for step in self.steps("weights"):
            if step not in keep:
                self.path(step, "weights").unlink(missing_ok=True)

    def load_weights(self, step: int) -> dict[str, Tensor]:
        """Weights written by :meth:`save_weights`."""
        return load_file(self.path(step, "weights"))
