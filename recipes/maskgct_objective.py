"""What the networks of MaskGCT learn by, and how it is measured; for :mod:`recipes.maskgct`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nar_speech.data.speech_tokens import SpeechTokenBatch, SpeechTokenEval
from nar_speech.losses.maskgct import (
    ACOUSTIC_PROMPT,
    SEMANTIC_FLOOR,
    SEMANTIC_PROMPT,
    StepDraws,
    draw_layer,
    draw_step,
    layer_weights,
    mask_acoustic,
    mask_probability,
    mask_semantic,
)
from nar_speech.models.maskgct import s2a_loss, t2s_loss
from nar_speech.train import World
from nar_speech.train.distributed import sum_over


class Objective:
    """The masked loss of either kind, with draws from a generator; args: see ``recipes.maskgct.Recipe``."""

    def __init__(
        self,
        kind: str,
        codebooks: int,
        prompt_drop: float,
        phone_drop: float,
        layers: str = "linear",
        first_layer: bool = True,
    ):
        self.semantic = kind == "t2s"
        self.prompt_drop, self.phone_drop = prompt_drop, phone_drop
        self.floor = SEMANTIC_FLOOR if self.semantic else 0.0
        self.prompt = SEMANTIC_PROMPT if self.semantic else ACOUSTIC_PROMPT
        first = first_layer or codebooks == 1
        self.weights = (1.0,) if self.semantic else layer_weights(codebooks, layers, first)

    def draw(self, lengths: Tensor, frames: int, generator: torch.Generator, prompt_drop: float) -> StepDraws:
        """See :func:`nar_speech.losses.maskgct.draw_step`."""
        options = {"prompt": self.prompt, "floor": self.floor, "prompt_drop": prompt_drop}
        return draw_step(lengths, frames, generator, **options)

    def train(
        self, model: nn.Module, batch: SpeechTokenBatch, generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Loss and accuracy of a training step."""
        told = torch.rand((), generator=generator, device=generator.device) >= self.phone_drop
        stage = draw_layer(self.weights, generator)
        drop = self.prompt_drop if told else 1.0
        draws = self.draw(batch.lengths, batch.semantic.shape[1], generator, drop)
        terms = self.terms(model, batch, draws, stage, bool(told))
        return {name: terms[name] for name in ("loss", "acc")}

    def terms(
        self, model: nn.Module, batch: SpeechTokenBatch, draws: StepDraws, stage: int, told: bool = True
    ) -> Mapping[str, Tensor]:
        """Loss and accuracy of masked codes, of one layer."""
        if not self.semantic:
            masked = mask_acoustic(batch.acoustic, batch.lengths, draws, stage, model.mask_id)
            return s2a_loss(model, masked, batch.semantic)
        masked = mask_semantic(batch.semantic, batch.lengths, draws, model.mask_id)
        phones = (batch.phones, batch.phone_lengths) if told else (None, None)
        return t2s_loss(model, masked, *phones)


class Validator:
    """Means over the masked codes of the evaluation clips: all amounts of masking alike, drawn once."""

    def __init__(self, data: SpeechTokenEval, objective: Objective, world: World):
        self.data, self.objective, self.world = data, objective, world

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        """``loss`` and ``acc``; of s2a the layers as ``loss_0`` ..., weighted as in training."""
        weights = self.objective.weights
        sums = torch.zeros(len(weights), 3, dtype=torch.float64)
        for number, batch in enumerate(self.data):
            on_device = batch.to(self.world.device)
            for stage in (k for k, weight in enumerate(weights) if weight):
                draws = self._draws(batch, 1000 * number + stage)
                terms = self.objective.terms(model, on_device, draws, stage)
                loss, acc, count = (float(terms[name]) for name in ("loss", "acc", "masked"))
                sums[stage] += torch.tensor([loss * count, acc * count, count], dtype=torch.float64)
        sums = sum_over(self.world, sums.flatten()).view(-1, 3)
        means = sums[:, :2] / sums[:, 2:].clamp_min(1)
        loss, acc = (torch.tensor(weights, dtype=torch.float64) @ means).tolist()
        each = enumerate(means[:, 0].tolist()) if len(weights) > 1 else ()
        return {"loss": loss, "acc": acc} | {f"loss_{k}": value for k, value in each if weights[k]}

    def _draws(self, batch: SpeechTokenBatch, seed: int) -> StepDraws:
        generator = torch.Generator().manual_seed(seed)
        size, frames = batch.semantic.shape
        drawn = self.objective.draw(batch.lengths, frames, generator, self.objective.prompt_drop)
        time = (torch.arange(size) + 0.5) / size
        chosen = torch.rand(size, frames, generator=generator)
        masked = chosen < mask_probability(time, self.objective.floor)[:, None]
        device = self.world.device
        return StepDraws(time.to(device), drawn.prompts.to(device), masked.to(device))
