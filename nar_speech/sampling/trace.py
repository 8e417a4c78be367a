"""What happened at every step of the masked-sampling loop, for pictures and studies."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nar_speech.sampling.step import StepInfo


@dataclass(frozen=True)
class TraceStep:
    """One call of the network, on the CPU; rows as in :class:`StepInfo`."""

    stage: int
    step: tuple[int, ...]
    items: tuple[int, ...]
    masked: Tensor  # (R, T) bool, the input of the call
    tokens: Tensor  # (R, T) int32, after what was drawn has been filled in
    confidence: Tensor  # (R, T) float32 where masked, 0 elsewhere
    temperature: tuple[float, ...]
    guidance: tuple[float, ...]


@dataclass(frozen=True)
class ItemTrace:
    """The steps of one item; S calls of the network, K codebooks, T positions.

    Attributes:
        stage: (S,) codebook of each call.
        step: (S,) number of the call in its stage, as planned (it jumps where an item runs ahead).
        masked: (S, T) bool, which positions the network saw masked.
        tokens: (S, T) int32 of that codebook after the call.
        confidence: (S, T) float32 of what was drawn; 0 where nothing was.
        temperature, guidance: (S,) float32.
        fixed: (K, T) bool, what was given and never changed.
        begin: the first position's place in the clip, where the item is a window of one.
    """

    stage: np.ndarray
    step: np.ndarray
    masked: np.ndarray
    tokens: np.ndarray
    confidence: np.ndarray
    temperature: np.ndarray
    guidance: np.ndarray
    fixed: np.ndarray
    begin: int = 0

    def fixed_at(self, stage: int) -> np.ndarray:
        """(T,) which call of a stage, from 1, gave each position its final token; 0 where it was given."""
        masked = self.masked[self.stage == stage]
        calls = np.arange(1, len(masked) + 1)[:, None]
        return (masked * calls).max(0, initial=0)


@dataclass
class Trace:
    """A record that the loop writes into.

    Attributes:
        steps: in order.
        fixed: (B, K, T) bool.
        lengths: positions of each item.
    """

    steps: list[TraceStep] = field(default_factory=list)
    fixed: Tensor | None = None
    lengths: tuple[int, ...] = ()

    def begin(self, fixed: Tensor, lengths: Tensor) -> None:
        """Note what is given, (B, K, T), and the lengths (B,)."""
        self.fixed, self.lengths = fixed.cpu(), tuple(lengths.tolist())

    def add(self, info: StepInfo, masked: Tensor, tokens: Tensor, confidence: Tensor) -> None:
        """Note one call; tensors are copied to the CPU."""
        self.steps.append(
            TraceStep(
                stage=info.stage,
                step=tuple(info.step.tolist()),
                items=info.items,
                masked=masked.cpu().clone(),
                tokens=tokens.to("cpu", torch.int32, copy=True),
                confidence=confidence.cpu().clone(),
                temperature=tuple(info.temperature.tolist()),
                guidance=tuple(info.guidance.tolist()),
            )
        )

    def item(self, index: int) -> ItemTrace:
        """The steps of one item, without padding."""
        length = self.lengths[index]
        rows = [(s, s.items.index(index)) for s in self.steps if index in s.items]
        rows = [(s, row) for s, row in rows if bool(s.masked[row].any())]

        def stacked(name: str, dtype: type) -> np.ndarray:
            parts = [getattr(s, name)[row][:length].numpy() for s, row in rows]
            return np.stack(parts) if parts else np.zeros((0, length), dtype)

        return ItemTrace(
            stage=np.array([s.stage for s, _ in rows], np.int64),
            step=np.array([s.step[row] for s, row in rows], np.int64),
            masked=stacked("masked", bool),
            tokens=stacked("tokens", np.int32),
            confidence=stacked("confidence", np.float32),
            temperature=np.array([s.temperature[row] for s, row in rows], np.float32),
            guidance=np.array([s.guidance[row] for s, row in rows], np.float32),
            fixed=self.fixed[index, :, :length].numpy(),
        )
