"""Where the randomness of the masked-sampling loop comes from: a generator per item, or recorded draws.

For tokens a generator gives one uniform number per position, recorded draws are Exp(1) for every token of the
vocabulary (:func:`nar_speech.sampling.filters.draw`). Gumbel noise is -log(e) with e ~ Exp(1) in both cases.
An item draws for its own positions only, so what it gets does not depend on its batch mates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nar_speech.errors import InputError


class Draws(Protocol):
    """A source of draws for the positions where ``needed`` (R, T) is True, in the order of ``x[needed]``."""

    def tokens(self, items: Sequence[int], needed: Tensor, vocabulary: int) -> Tensor:
        """(M,) uniform numbers or (M, V) draws of Exp(1), float32, one row per needed position."""

    def noise(self, items: Sequence[int], needed: Tensor) -> Tensor:
        """(M,) draws of Exp(1), float32."""


class GeneratorDraws:
    """Draws of one ``torch.Generator`` per item, on any device."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = list(generators)

    def tokens(self, items: Sequence[int], needed: Tensor, vocabulary: int) -> Tensor:
        """See :class:`Draws`."""
        return self._draw(items, needed, torch.Tensor.uniform_)

    def noise(self, items: Sequence[int], needed: Tensor) -> Tensor:
        """See :class:`Draws`."""
        return self._draw(items, needed, torch.Tensor.exponential_)

    def _draw(self, items: Sequence[int], needed: Tensor, fill: Callable[..., Tensor]) -> Tensor:
        parts = []
        for item, count in zip(items, needed.sum(1).tolist(), strict=True):
            generator = self.generators[item]
            part = torch.empty(count, device=generator.device)
            parts.append(fill(part, generator=generator).to(needed.device))
        return torch.cat(parts)


class RecordedDraws:
    """Draws given beforehand, in the order in which the loop asks for them.

    Args:
        tokens: for each call that draws tokens, (B, T, V) values of Exp(1).
        noise: for each call with noise on the confidence, (B, T).
    """

    def __init__(self, tokens: Sequence[Tensor] = (), noise: Sequence[Tensor] = ()):
        self._tokens, self._noise = iter(tokens), iter(noise)

    def tokens(self, items: Sequence[int], needed: Tensor, vocabulary: int) -> Tensor:
        """See :class:`Draws`."""
        values = _next(self._tokens)[list(items), : needed.shape[1]]
        if values.shape != (*needed.shape, vocabulary):
            raise InputError(
                f"recorded draws: shape {tuple(values.shape)}; this step needs {(*needed.shape, vocabulary)}"
            )
        return values[needed]

    def noise(self, items: Sequence[int], needed: Tensor) -> Tensor:
        """See :class:`Draws`."""
        return _next(self._noise)[list(items), : needed.shape[1]][needed]


def seeded(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per seed."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _next(values: Iterator[Tensor]) -> Tensor:
    value = next(values, None)
    if value is None:
        raise InputError("recorded draws: fewer than the loop asks for; record one for every step")
    return value
