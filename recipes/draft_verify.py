"""Train a parallel recogniser and an autoregressive verifier on one Whisper encoder (draft and verify).

  python -m recipes.draft_verify CONFIG.yaml verifier.tokenizer=FILE train.output_dir=exp/x key=value ...
  torchrun --nproc-per-node 2 -m recipes.draft_verify CONFIG.yaml ...

CTC and, unless ``parallel_weight`` is 0, the Paraformer predictor and decoder read the encoder's branch; the
verifier, Whisper's text decoder, reads its trunk and learns from the written transcripts (``written`` of the
supervisions). The same command goes on after any interruption. Results in train.output_dir: checkpoints,
train.jsonl, loss.png and final.safetensors (``encoder.* ctc.* predictor.* decoder.* verifier.*``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch

from nar_speech import config as configs
from nar_speech.checkpoint import save_safetensors
from nar_speech.data import spec_augment
from nar_speech.errors import ConfigError
from nar_speech.layers.whisper_decoder import WhisperDecoder, WhisperDecoderConfig
from nar_speech.losses.ctc import ctc_loss
from nar_speech.losses.noisy_prefix import noisy_prefix_ce
from nar_speech.models.paraformer import (
    BLANK,
    EOS,
    Paraformer,
    ParaformerConfig,
    build_paraformer,
    decoder_passes,
    loss_terms,
)
from nar_speech.search import ctc as ctc_search
from nar_speech.text.whisper_bpe import WhisperBpeTokenizer
from nar_speech.train import World, say, train
from nar_speech.train.recipe import InitSection, load_initial, run_recipe
from nar_speech.train.recognition import (
    RecognitionRecipe,
    Validator,
    make_data,
    make_frontend,
    make_tokenizer,
)
from nar_speech.train.verifier import VerifierSection, verifier_tokens


@dataclass(frozen=True, kw_only=True)
class Recipe(RecognitionRecipe):
    """Everything that can be set.

    Attributes:
        ctc_weight, parallel_weight: factors on the CTC loss and on the Paraformer's losses; the verifier's is
            in its section.
        init_verifier: initial weights of the verifier, as ``init`` of the rest.
    """

    verifier: VerifierSection
    init_verifier: InitSection = field(default_factory=InitSection)
    ctc_weight: float = 1.0
    parallel_weight: float = 0.0


def losses(
    config: Recipe, model: Paraformer, text: WhisperBpeTokenizer, feats, lengths, batch, noise, generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """All terms of a batch, and the branch's output (B, T', D) with its lengths (B,)."""
    trunk, trunk_lengths = model.encoder.trunk(feats, lengths)
    out, out_lengths = model.encoder.finish(trunk, trunk_lengths)
    log_probs = model.ctc_logits(out).float().log_softmax(-1)
    terms = {"loss_ctc": ctc_loss(log_probs, out_lengths, batch.tokens, batch.token_lengths, BLANK)}
    total = config.ctc_weight * terms["loss_ctc"]
    if config.verifier.weight > 0:
        rows, inputs, targets = verifier_tokens(text, batch.written, feats.device)
        memory, memory_lengths = trunk[rows], trunk_lengths[rows]
        terms["loss_verifier"], terms["acc_verifier"] = noisy_prefix_ce(
            lambda tokens: model.verifier(tokens, memory, memory_lengths),
            *(inputs, targets, noise, config.verifier.lsm_weight, generator),
        )
        total = total + config.verifier.weight * terms["loss_verifier"]
    if config.parallel_weight > 0:
        run = decoder_passes(model, out, out_lengths, batch.tokens, batch.token_lengths, generator)
        parallel = loss_terms(model, run, batch.tokens, batch.token_lengths)
        total = total + config.parallel_weight * parallel["loss"]
        terms.update(loss_parallel=parallel["loss"], loss_pre=parallel["loss_pre"], acc=parallel["acc"])
    return {"loss": total, **{k: v.detach() for k, v in terms.items()}}, out, out_lengths


def recipe(config: Recipe, world: World) -> None:
    """Tokenizers, frontend, model, data, loss, training: in this order."""
    folder, seed = config.train.output_dir, config.train.seed
    if config.verifier.tokenizer is None:
        raise ConfigError("verifier.tokenizer: name a file; recipes.paraformer needs none")
    text = WhisperBpeTokenizer(config.verifier.tokenizer)
    tokenizer = make_tokenizer(config.tokenizer, config.data, folder, world)
    frontend = make_frontend(config.frontend, config.data, folder, world).to(world.device)
    sizes = {"input_size": frontend.feature_size, "vocab_size": tokenizer.vocab_size}
    network = configs.from_dict(ParaformerConfig, {**config.network, **sizes}, "network")
    if network.encoder != "whisper" or network.ctc_weight <= 0:
        raise ConfigError("network: draft_verify needs encoder 'whisper' and a ctc_weight above 0")

    torch.manual_seed(seed)
    model = build_paraformer(network)
    say(world, load_initial(model, config.init))
    conf = {**config.verifier.conf, "vocab_size": text.vocab_size}
    verifier = WhisperDecoder(configs.from_dict(WhisperDecoderConfig, conf, "verifier.conf"))
    say(world, "verifier: " + load_initial(verifier, config.init_verifier))
    model.add_module("verifier", verifier)  # so the optimizer, the average and the checkpoints know it
    count = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    say(world, ", ".join(f"{name} {millions:.2f} M" for name, millions in count.items()) + f", {sizes}")

    data, dev = make_data(config, tokenizer.encode, world)

    def loss_step(model, batch, generator, step):
        feats, lengths = frontend(batch.waves, batch.wave_lengths)
        if config.specaug is not None:
            feats = spec_augment(feats, lengths, config.specaug, generator, config.frontend.lfr_m)
        return losses(config, model, text, feats, lengths, batch, config.verifier.prefix_noise, generator)[0]

    def evaluate(model, feats, lengths, batch):
        generator = torch.Generator(world.device).manual_seed(seed)
        terms, out, out_lengths = losses(config, model, text, feats, lengths, batch, 0.0, generator)
        log_probs = model.ctc_logits(out).float().log_softmax(-1)
        decoded = {"ctc": [h.tokens for h in ctc_search.greedy(log_probs, out_lengths, BLANK)]}
        if config.parallel_weight > 0:
            cif = model.predict(out, out_lengths)
            best = model.recognise(out, out_lengths, cif).argmax(-1).tolist()
            counts = cif.token_lengths.tolist()
            decoded[""] = [[i for i in row[:n] if i > EOS] for row, n in zip(best, counts, strict=True)]
        return terms, decoded

    validate = Validator(dev, frontend, tokenizer, evaluate, config.unit, world)
    result = train(config.train, model, loss_step, data, validate, world)
    if result.finished and world.main:
        save_safetensors(f"{folder}/final.safetensors", model)
        say(world, f"final weights: {folder}/final.safetensors ({result.weights_from})")


if __name__ == "__main__":
    sys.exit(run_recipe(Recipe, recipe, sys.argv[1:], __doc__))
