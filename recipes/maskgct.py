"""Train a network of MaskGCT: phones to semantic codes (t2s), or semantic to acoustic codes (s2a).

  python -m recipes.prepare_speech CUTS.jsonl.gz -o data/train --codec NAME --semantic exp/semantic/model
  python -m recipes.maskgct configs/maskgct/t2s.yaml data.train=[data/train] train.output_dir=exp/t2s ...
  torchrun --nproc-per-node 2 -m recipes.maskgct CONFIG.yaml ...

The same command goes on after any interruption. Results in train.output_dir: checkpoints, train.jsonl,
tensorboard/, loss.png and model/, one part of what python -m recipes.join_speech puts together.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nar_speech import config as configs
from nar_speech.data.speech_tokens import SpeechIndex, SpeechTokenConfig, SpeechTokenData, SpeechTokenEval
from nar_speech.models.maskgct import S2A, T2S, S2AConfig, T2SConfig
from nar_speech.models.maskgct_part import TASK, write_part
from nar_speech.train import World, say, train
from nar_speech.train.loop import TrainConfig
from nar_speech.train.recipe import InitSection, load_initial, run_recipe
from nar_speech.types import ModelCard
from recipes.maskgct_objective import Objective, Validator


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that can be set.

    Attributes:
        network: fields of T2SConfig or S2AConfig of :mod:`nar_speech.models.maskgct`; numbers of codes come
            from the data.
        prompt_drop: probability that an item has no prompt.
        phone_drop: (t2s) probability that a batch has neither phones nor prompts, as guidance computes it;
            0 as published.
        layers, first_layer: (s2a) how often each layer is learnt, and whether the first is, see
            :func:`nar_speech.losses.maskgct.layer_weights`. A network of one layer always learns it.
    """

    kind: Literal["t2s", "s2a"]
    train: TrainConfig
    data: SpeechTokenConfig
    name: str = "maskgct"
    network: dict[str, Any] = field(default_factory=dict)
    init: InitSection = field(default_factory=InitSection)
    prompt_drop: float = 0.15
    phone_drop: float = 0.0
    layers: Literal["linear", "cosine", "uniform"] = "linear"
    first_layer: bool = True

    def __post_init__(self) -> None:
        configs.check_range(self, 0.0, 1.0, "prompt_drop", "phone_drop")


def build(config: Recipe, index: SpeechIndex, codebooks: int) -> T2S | S2A:
    """The network: what the data says, and what the recipe does."""
    if config.kind == "t2s":
        sizes = {"codebook_size": index.semantic_size}
        return T2S(configs.from_dict(T2SConfig, {**config.network, **sizes}, "network"))
    sizes = {"num_codebooks": codebooks, "codebook_size": index.codebook_size}
    sizes["semantic_size"] = index.semantic_size
    return S2A(configs.from_dict(S2AConfig, {**config.network, **sizes}, "network"))


def recipe(config: Recipe, world: World) -> None:
    """Data, model, loss, training, folder: in this order."""
    data = SpeechTokenData(config.data, config.train.seed, world.rank, world.size)
    torch.manual_seed(config.train.seed)
    model = build(config, data.index, data.clips.codebooks)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    clips = f"{len(data.clips.places)} clips, {data.clips.left_out} left out"
    say(world, f"{config.kind}: {millions:.2f} M parameters, {clips}")
    say(world, load_initial(model, config.init))
    objective = Objective(
        config.kind,
        data.clips.codebooks,
        config.prompt_drop,
        config.phone_drop,
        config.layers,
        config.first_layer,
    )

    def loss_step(model, batch, generator, step):
        return objective.train(model, batch, generator)

    dev = SpeechTokenEval(config.data, world.rank, world.size, data.index) if config.data.dev else None
    validate = Validator(dev, objective, world) if dev is not None else None
    result = train(config.train, model, loss_step, data, validate, world)
    if result.finished and world.main:
        card = ModelCard(config.name, TASK, config.kind, data.index.sample_rate, metrics=result.metrics)
        say(world, f"model folder: {write_part(f'{config.train.output_dir}/model', model, card)}")


if __name__ == "__main__":
    sys.exit(run_recipe(Recipe, recipe, sys.argv[1:], __doc__))
