"""Sizes of a network from the names and shapes of its weights, for checkpoints without a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nar_speech.errors import CheckpointError


@dataclass(frozen=True)
class Shapes:
    """The tensors of a file.

    Attributes:
        tensors: by name.
        where: the file, for errors.
        what: they should be, "the semantic codec of MaskGCT" for example.
    """

    tensors: Mapping[str, Tensor]
    where: str
    what: str

    def of(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor; a CheckpointError where it is missing or has other ``dimensions``."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.where}: {name} is missing; not the weights of {self.what}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise CheckpointError(
                f"{self.where}: {name} has the shape {shape}, expected {dimensions} dimensions; not the"
                f" weights of {self.what}"
            )
        return shape

    def count(self, pattern: str) -> int:
        """How many names match the whole of a regular expression."""
        return sum(re.fullmatch(pattern, name) is not None for name in self.tensors)
