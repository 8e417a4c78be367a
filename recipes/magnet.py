"""Train MAGNeT: fill masked spans of one codebook at a time, given those before it and a text.

  python -m recipes.prepare_sound CUTS.jsonl.gz -o data/codes --codec mini_codec
  python -m recipes.magnet configs/magnet/mini.yaml data.train=[data/codes] train.output_dir=exp/magnet ...
  torchrun --nproc-per-node 2 -m recipes.magnet CONFIG.yaml ...

The same command goes on after any interruption. Results in train.output_dir: checkpoints, train.jsonl,
tensorboard/, loss.png and model/, the folder that nar-speech generate reads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.data.tokens import TokenBatch, TokenConfig, TokenData, TokenEval, TokenIndex
from nar_speech.errors import ConfigError
from nar_speech.losses.masked import MaskDraws, draw_masks, mask_codes
from nar_speech.models.magnet import Magnet, MagnetConfig, magnet_loss
from nar_speech.pipelines.sound_options import GenerationConfig, change
from nar_speech.sound_folder import write_sound_folder
from nar_speech.train import World, say, train
from nar_speech.train.distributed import sum_over
from nar_speech.train.loop import TrainConfig
from nar_speech.train.recipe import InitSection, load_initial, run_recipe
from nar_speech.types import ModelCard


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that can be set.

    Attributes:
        network: fields of :class:`nar_speech.models.magnet.MagnetConfig`; codebooks, rates and the width of
            the text come from the data.
        codec: written into the model folder, a folder is copied; None: the one the data was made with.
        generation: defaults of generation for the model folder.
        stage_weights: how often a step is one of each stage, in relation; None: all alike, as published. A
            short training does well to favour the first stage: it decides what is heard.
        store: how the weights of the model folder are written.
    """

    train: TrainConfig
    data: TokenConfig
    card: ModelCard
    network: dict[str, Any] = field(default_factory=dict)
    init: InitSection = field(default_factory=InitSection)
    codec: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    stage_weights: tuple[float, ...] | None = None
    store: Literal["float32", "float16", "int8"] = "float32"


def network_config(config: Recipe, index: TokenIndex, codebooks: int) -> MagnetConfig:
    """Numbers of the network: what the data says, and what the recipe does."""
    from_data = {
        "num_codebooks": codebooks,
        "codebook_size": index.codebook_size,
        "text_width": index.text_width,
        "frame_rate": index.frame_rate,
        "segment_seconds": config.data.seconds,
    }
    return configs.from_dict(MagnetConfig, {**config.network, **from_data}, "network")


def stage_weights(config: Recipe, stages: int) -> Tensor:
    """(stages,) weights; a ConfigError unless there is a positive number for each stage."""
    weights = config.stage_weights or (1.0,) * stages
    if len(weights) != stages or not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(
            f"stage_weights: got {list(weights)}; give {stages} positive numbers, one a codebook"
        )
    return torch.tensor(weights)


class Validator:
    """Loss of every stage on the evaluation clips, the same masks at every call."""

    def __init__(self, data: TokenEval, network: MagnetConfig, world: World):
        self.data, self.network, self.world = data, network, world

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        """``loss``, and ``loss_s0``, ... ``acc_s0``, ... of the stages; means over masked codes."""
        stages = self.network.num_codebooks
        sums = torch.zeros(stages, 3, dtype=torch.float64)
        for number, batch in enumerate(self.data):
            batch = batch.to(self.world.device)
            for stage in range(stages):
                terms = magnet_loss(model, *self._masked(batch, number, stage))
                count = float(terms["masked"])
                sums[stage] += torch.tensor(
                    [float(terms["loss"]) * count, float(terms["acc"]) * count, count], dtype=torch.float64
                )
        sums = sum_over(self.world, sums.flatten()).view(stages, 3)
        means = (sums[:, :2] / sums[:, 2:].clamp_min(1)).tolist()
        metrics = {f"loss_s{s}": row[0] for s, row in enumerate(means)}
        metrics |= {f"acc_s{s}": row[1] for s, row in enumerate(means)}
        return {"loss": sum(row[0] for row in means) / stages, **metrics}

    def _masked(self, batch: TokenBatch, number: int, stage: int) -> tuple[Any, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * number + stage)
        size, frames = len(batch.codes), batch.codes.shape[2]
        drawn = draw_masks(size, frames, generator, torch.device("cpu"))
        spread = (torch.arange(size) + 0.5) / size  # all amounts of masking alike
        draws = MaskDraws(spread.to(batch.codes.device), drawn.scores.to(batch.codes.device))
        conf = self.network
        masked = mask_codes(batch.codes, batch.lengths, stage, conf.span_len, conf.mask_id, draws)
        return masked, batch.states, batch.mask


def recipe(config: Recipe, world: World) -> None:
    """Data, model, loss, training, model folder: in this order."""
    data = TokenData(config.data, config.train.seed, world.rank, world.size)
    network = network_config(config, data.index, data.clips.codebooks)
    torch.manual_seed(config.train.seed)
    model = Magnet(network)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(world, f"{millions:.2f} M parameters, {len(data.clips.places)} clips, {network.max_frames} frames")
    say(world, load_initial(model, config.init))
    change(GenerationConfig(), config.generation, "generation")  # what is wrong is said before the training
    weights = stage_weights(config, network.num_codebooks)

    def loss_step(model, batch, generator, step):
        stage = int(torch.multinomial(weights.to(generator.device), 1, generator=generator))
        draws = draw_masks(len(batch.codes), batch.codes.shape[2], generator, batch.codes.device)
        masked = mask_codes(batch.codes, batch.lengths, stage, network.span_len, network.mask_id, draws)
        terms = magnet_loss(model, masked, batch.states, batch.mask)
        return {name: terms[name] for name in ("loss", "acc")}

    dev = TokenEval(config.data, world.rank, world.size, data.index) if config.data.dev else None
    validate = Validator(dev, network, world) if dev is not None else None
    result = train(config.train, model, loss_step, data, validate, world)
    if result.finished and world.main:
        card = configs.from_dict(ModelCard, {**configs.to_dict(config.card), "metrics": result.metrics})
        codec = config.codec or data.index.codec
        folder = Path(config.train.output_dir) / "model"
        parts = codec, data.index.conditioner, config.generation, config.store
        say(world, f"model folder: {write_sound_folder(folder, model, card, network, *parts)}")


if __name__ == "__main__":
    sys.exit(run_recipe(Recipe, recipe, sys.argv[1:], __doc__))
