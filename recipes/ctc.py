"""Train a CTC model: plain, InterCTC, self-conditioned, or with U2 / U2++ attention decoders.

  python -m recipes.ctc configs/ctc/librispeech_conformer.yaml train.output_dir=exp/ctc key=value ...
  torchrun --nproc-per-node 2 -m recipes.ctc CONFIG.yaml ...

The same command goes on after any interruption. Results in train.output_dir: checkpoints, train.jsonl,
tensorboard/, loss.png and model/, the folder that nar_speech.load_model reads.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from nar_speech import config as configs
from nar_speech.data import spec_augment
from nar_speech.model_folder import write_model_folder
from nar_speech.models.ctc import CtcConfig, CtcModel, ctc_model_loss
from nar_speech.search import ctc as ctc_search
from nar_speech.train import World, say, train
from nar_speech.train.recipe import load_initial, run_recipe
from nar_speech.train.recognition import (
    RecognitionRecipe,
    Validator,
    make_data,
    make_frontend,
    make_tokenizer,
)
from nar_speech.types import ModelCard


@dataclass(frozen=True, kw_only=True)
class Recipe(RecognitionRecipe):
    """Everything that can be set."""


def recipe(config: Recipe, world: World) -> None:
    """Tokenizer, frontend, model, data, loss, training, model folder: in this order."""
    folder, seed = config.train.output_dir, config.train.seed
    tokenizer = make_tokenizer(config.tokenizer, config.data, folder, world)
    frontend = make_frontend(config.frontend, config.data, folder, world).to(world.device)
    sizes = {"input_size": frontend.feature_size, "vocab_size": tokenizer.vocab_size}
    network = configs.from_dict(CtcConfig, {"sos": 1, "eos": 2, **config.network, **sizes}, "network")

    torch.manual_seed(seed)
    model = CtcModel(network)
    say(world, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {sizes}")
    say(world, load_initial(model, config.init))

    data, dev = make_data(config, tokenizer.encode, world)

    def loss_step(model, batch, generator, step):
        feats, lengths = frontend(batch.waves, batch.wave_lengths)
        if config.specaug is not None:
            feats = spec_augment(feats, lengths, config.specaug, generator, config.frontend.lfr_m)
        return ctc_model_loss(model, feats, lengths, batch.tokens, batch.token_lengths)

    def evaluate(model, feats, lengths, batch):
        terms = ctc_model_loss(model, feats, lengths, batch.tokens, batch.token_lengths)
        out = model(feats, lengths)
        best = ctc_search.greedy(out.log_probs, out.lengths, network.blank)
        return terms, {"": [hypothesis.tokens for hypothesis in best]}

    validate = Validator(dev, frontend, tokenizer, evaluate, config.unit, world)
    result = train(config.train, model, loss_step, data, validate, world)
    if result.finished and world.main:
        card = configs.from_dict(ModelCard, {**configs.to_dict(config.card), "metrics": result.metrics})
        out = write_model_folder(
            f"{folder}/model", model, card, config.frontend, network, tokenizer, config.decoding, folder
        )
        say(world, f"model folder: {out}")


if __name__ == "__main__":
    sys.exit(run_recipe(Recipe, recipe, sys.argv[1:], __doc__))
