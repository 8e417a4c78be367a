"""Train a CTC model: plain, InterCTC, self-conditioned, for streams, or with U2 / U2++ attention decoders.

  python -m recipes.ctc configs/ctc/librispeech_conformer.yaml train.output_dir=exp/ctc key=value ...
  torchrun --nproc-per-node 2 -m recipes.ctc CONFIG.yaml ...

The same command goes on after any interruption. Results in train.output_dir: checkpoints, train.jsonl,
tensorboard/, loss.png and model/, the folder that nar_speech.load_model reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech import config as configs
from nar_speech.data import spec_augment
from nar_speech.hub import load_parts, resolve
from nar_speech.losses.distill import feature_distance
from nar_speech.model_folder import StreamConfig, write_model_folder
from nar_speech.models.ctc import CtcConfig, CtcModel, ctc_model_loss, ctc_output_loss
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
class StreamSection(StreamConfig):
    """A way to feed streams that validations try too; what it gives is reported as ``stream_wer``.

    It goes into model.yaml, so that whoever serves the model feeds it like that.

    Attributes:
        chunk_size: output frames of a chunk.
        left: frames before it that it sees, whole chunks; -1: all.
    """

    chunk_size: int = 16
    left: int = 64


@dataclass(frozen=True)
class TeacherSection:
    """A trained model whose encoder output the encoder is to come close to, by its width and frame rate.

    It hears the same audio, without SpecAugment, and as a whole where the student has to stream.

    Attributes:
        model: name or folder.
        weight: factor on :func:`nar_speech.losses.distill.feature_distance`.
    """

    model: str
    weight: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Recipe(RecognitionRecipe):
    """Everything that can be set.

    For streams the encoder has to be causal (``causal``, or ``causal_downsampling`` and
    ``conv_context_size``) and to train with chunks: ``use_dynamic_chunk`` of a conformer draws their size,
    several ``att_context_size`` of a fastconformer are drawn from.
    """

    stream: StreamSection | None = None
    teacher: TeacherSection | None = None


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

    ways = {"": {}}  # of encoding the evaluation utterances
    if config.stream is not None:
        chunking = model.chunking(config.stream.chunk_size, config.stream.left)
        ways["stream"] = model.encoder.stream_mask(chunking)

    data, dev = make_data(config, tokenizer.encode, world)
    teach = make_teacher(config.teacher, world) if config.teacher is not None else None

    def loss_step(model, batch, generator, step):
        feats, lengths = frontend(batch.waves, batch.wave_lengths)
        if config.specaug is not None:
            feats = spec_augment(feats, lengths, config.specaug, generator, config.frontend.lfr_m)
        out = model(feats, lengths)
        terms = ctc_output_loss(model, out, batch.tokens, batch.token_lengths)
        if teach is None:
            return terms
        distance = feature_distance(out.encoder_out, teach(batch.waves, batch.wave_lengths), out.lengths)
        loss = terms["loss"] + config.teacher.weight * distance
        return {**terms, "loss": loss, "loss_teacher": distance.detach()}

    def evaluate(model, feats, lengths, batch):
        terms = ctc_model_loss(model, feats, lengths, batch.tokens, batch.token_lengths)
        decoded = {}
        for name, options in ways.items():
            out = model(feats, lengths, **options)
            best = ctc_search.greedy(out.log_probs, out.lengths, network.blank)
            decoded[name] = [hypothesis.tokens for hypothesis in best]
        return terms, decoded

    validate = Validator(dev, frontend, tokenizer, evaluate, config.unit, world)
    result = train(config.train, model, loss_step, data, validate, world)
    if result.finished and world.main:
        card = configs.from_dict(ModelCard, {**configs.to_dict(config.card), "metrics": result.metrics})
        parts = (card, config.frontend, network, tokenizer, config.decoding)
        out = write_model_folder(f"{folder}/model", model, *parts, folder, config.stream)
        say(world, f"model folder: {out}")


def make_teacher(section: TeacherSection, world: World) -> Callable[[Tensor, Tensor], Tensor]:
    """Waves (B, N) and their lengths (B,) to the encoder output (B, T, D) of the teacher."""
    parts = load_parts(resolve(section.model))
    network, frontend = parts.network.to(world.device), parts.frontend.to(world.device)

    @torch.no_grad()
    def encode(waves: Tensor, lengths: Tensor) -> Tensor:
        return network.encode(*frontend(waves, lengths))[0]

    return encode


if __name__ == "__main__":
    sys.exit(run_recipe(Recipe, recipe, sys.argv[1:], __doc__))
