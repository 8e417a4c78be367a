"""A hook on the way through an encoder, for intermediate CTC and self-conditioning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tap:
    """What to do after some layers of an encoder.

    Attributes:
        layers: numbers of the layers, the first layer is 1.
        function: gets (h (B, T, D) as that layer left it, the same after the encoder's final norm) and
            returns the h that goes into the next layer.
    """

    layers: tuple[int, ...]
    function: Callable[[Tensor, Tensor], Tensor]
