"""Train a Paraformer.

  python -m recipes.paraformer configs/paraformer/mini_en.yaml train.output_dir=exp/mini_en key=value ...
  torchrun --nproc-per-node 2 -m recipes.paraformer CONFIG.yaml ...

The same command goes on after any interruption. Results in train.output_dir: checkpoints, train.jsonl,
tensorboard/, loss.png and model/, the folder that nar_speech.load_model reads.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch

from nar_speech import config as configs
from nar_speech.data import spec_augment
from nar_speech.losses.mwer import mwer_loss, negative_samples
from nar_speech.model_folder import write_model_folder
from nar_speech.models.paraformer import (
    BLANK,
    EOS,
    Paraformer,
    ParaformerConfig,
    TrainingPass,
    build_paraformer,
    loss_terms,
    training_pass,
)
from nar_speech.models.paraformer_stream import recognise_stream
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


@dataclass(frozen=True)
class MwerSection:
    """Minimum word error rate loss (:mod:`nar_speech.losses.mwer`), for a model that is already trained.

    Attributes:
        weight: its factor in the total loss; 0 turns it off.
        after: step from which it counts; before, the model learns without it.
        number, rate, depth: candidates per utterance, share of replaced tokens, and how many ranks replace.
    """

    weight: float = 0.0
    after: int = 0
    number: int = 4
    rate: float = 0.5
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class Recipe(RecognitionRecipe):
    """Everything that can be set."""

    mwer: MwerSection = field(default_factory=MwerSection)


def greedy(model: Paraformer, feats: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    """Token ids of each utterance: the best token at every position, special ids dropped.

    A model that learns to stream is heard as a stream.
    """
    out = model(feats, lengths) if model.stream is None else recognise_stream(model, feats, lengths)
    best = out.log_probs.argmax(-1).tolist() if out.log_probs.shape[1] else [[]] * len(feats)
    counts = out.token_lengths.tolist()
    return [[i for i in row[:count] if i > EOS] for row, count in zip(best, counts, strict=True)]


def add_mwer(terms: dict, run: TrainingPass, mwer: MwerSection, generator: torch.Generator) -> None:
    """Add the MWER loss of the second pass to ``terms["loss"]`` and report it."""
    log_probs = run.logits.float().log_softmax(-1)
    lengths = run.target_lengths
    candidates = negative_samples(log_probs, lengths, mwer.number, mwer.rate, mwer.depth, generator)
    loss = mwer_loss(log_probs, candidates, lengths, run.targets, lengths)
    terms["loss"] = terms["loss"] + mwer.weight * loss
    terms["loss_mwer"] = loss.detach()


def recipe(config: Recipe, world: World) -> None:
    """Tokenizer, frontend, model, data, loss, training, model folder: in this order."""
    folder, seed = config.train.output_dir, config.train.seed
    tokenizer = make_tokenizer(config.tokenizer, config.data, folder, world)
    frontend = make_frontend(config.frontend, config.data, folder, world).to(world.device)
    sizes = {"input_size": frontend.feature_size, "vocab_size": tokenizer.vocab_size}
    network = configs.from_dict(ParaformerConfig, {**config.network, **sizes}, "network")

    torch.manual_seed(seed)
    model = build_paraformer(network)
    say(world, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {sizes}")
    say(world, load_initial(model, config.init))

    data, dev = make_data(config, tokenizer.encode, world)

    def loss_step(model, batch, generator, step):
        feats, lengths = frontend(batch.waves, batch.wave_lengths)
        if config.specaug is not None:
            feats = spec_augment(feats, lengths, config.specaug, generator, config.frontend.lfr_m)
        run = training_pass(model, feats, lengths, batch.tokens, batch.token_lengths, generator)
        terms = loss_terms(model, run, batch.tokens, batch.token_lengths)
        terms.pop("weight")
        if config.mwer.weight > 0 and step >= config.mwer.after:
            add_mwer(terms, run, config.mwer, generator)
        return terms

    def evaluate(model, feats, lengths, batch):
        generator = torch.Generator(world.device).manual_seed(seed)
        run = training_pass(model, feats, lengths, batch.tokens, batch.token_lengths, generator)
        terms = loss_terms(model, run, batch.tokens, batch.token_lengths)
        terms.pop("weight")
        decoded = {"": greedy(model, feats, lengths)}
        if network.ctc_weight > 0:
            log_probs = model.ctc_logits(run.encoder_out).float().log_softmax(-1)
            decoded["ctc"] = [h.tokens for h in ctc_search.greedy(log_probs, run.encoder_lengths, BLANK)]
        return terms, decoded

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
