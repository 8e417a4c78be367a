"""What the masked-sampling loop tells the network at every step, and the callables it works with.

A row is one item that is still being sampled: finished items leave the batch, so row r of a call is item
``rows[r]`` of the batch that the loop was started with. Letters: B items, R rows, K codebooks, T positions
(frames), V tokens of the vocabulary. All tensors lie on the device of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepInfo:
    """One call of the network.

    Attributes:
        call: number of the call since the loop began, over all stages; a cache is empty at call 0.
        stage: codebook that is sampled now, 0 where there is only one.
        steps: steps planned for this stage.
        step: (R,) int64, step of each row in this stage, from 0. Rows may differ where items run ahead of the
            plan (adaptive unmasking). From ``steps`` on: rounds that refine, see
            :class:`nar_speech.sampling.config.MaskedConfig`.
        progress: (R,) float32 u in [0, 1], what the mask schedule is a function of.
        time: (R,) float32, 1 - step / steps: 1 at the first step, never 0; in rounds that refine the time at
            which as much would be masked. A network with a step embedding reads it (MaskGCT's t).
        guidance: (R,) float32 coefficient of classifier-free guidance; 1: the conditional logits alone.
        guided: whether any of ``guidance`` is not 1; if False the unconditional pass is not needed.
        temperature: (R,) float32 of the softmax that tokens are drawn from.
        lengths: (R,) int64 positions of each row.
        active: (R, T) bool, positions whose logits will be read; all others may hold anything.
        changed: (R, T) bool, positions where the input of any codebook differs from this item's previous
            call; all True at the first. What was computed for an item may be reused where it is False.
        frozen: (R, T) bool, positions whose input stays as it is now to the end of this stage; those that may
            still be refined are not.
        rows: (R,) int64, item of each row.
        items: the same as plain numbers.
    """

    call: int
    stage: int
    steps: int
    step: Tensor
    progress: Tensor
    time: Tensor
    guidance: Tensor
    guided: bool
    temperature: Tensor
    lengths: Tensor
    active: Tensor
    changed: Tensor
    frozen: Tensor
    rows: Tensor
    items: tuple[int, ...]


# (tokens (R, T) with mask ids, step) -> (conditional logits, unconditional logits or None). Logits are
# (R, T, V), or (M, V) of the M active positions only, in the order of ``logits[step.active]``. V is the
# number of tokens that can be drawn; with V > mask id the mask itself can be predicted, and the position then
# stays masked (Mask-CTC).
Predict = Callable[[Tensor, StepInfo], tuple[Tensor, Tensor | None]]

# The same over K codebooks: tokens (R, K, T); logits of the codebook ``step.stage``.
PredictCodebook = Callable[[Tensor, StepInfo], tuple[Tensor, Tensor | None]]

# (tokens with the drawn ones filled in (R, T) or (R, K, T), step) -> probabilities (R, T) that an external
# model gives the tokens of the codebook ``step.stage``.
Rescore = Callable[[Tensor, StepInfo], Tensor]
