"""Golden handler of SenseVoice: all prompts, greedy ids, training loss and gradient norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nar_speech.checkpoint import load_strict
from nar_speech.models.sensevoice import SenseVoice, convert_config, sensevoice_loss
from nar_speech.search.ctc import greedy

if TYPE_CHECKING:
    from tests.golden import Case, Check


def sensevoice_model(case: Case) -> SenseVoice:
    """The recorded model with its weights, in eval mode."""
    conf, tables = case.meta["config"], case.meta.get("train_id_tables", {})
    tree = {
        "model": "SenseVoiceSmall",
        "encoder": "SenseVoiceEncoderSmall",
        "encoder_conf": conf["encoder_conf"],
        "model_conf": conf,
    }
    config = convert_config(tree, conf["input_size"], conf["vocab_size"], str(case.folder))
    for ours, official in (("language_tokens", "lid_int_dict"), ("textnorm_tokens", "textnorm_int_dict")):
        if official in tables:
            config = replace(config, **{ours: {int(k): v for k, v in tables[official].items()}})
    model = SenseVoice(config)
    load_strict(model, case.weights, where=case.folder)
    return model.eval()


def sensevoice(case: Case) -> Iterator[Check]:
    """Every recorded prompt, then the training loss."""
    io, model = case.io, sensevoice_model(case)
    feats, lengths = io["speech"], io["speech_lengths"]
    for name, want in case.meta["greedy_ids_by_prompt"].items():
        language, textnorm = name.split("_")
        with torch.no_grad():
            out = model(feats, lengths, language, textnorm)
        got = [list(h.tokens) for h in greedy(out.log_probs, out.lengths, model.config.blank)]
        yield case.equal(f"{name} greedy", got, [[int(i) for i in row.split()] for row in want])
        if f"{name}_log_probs" not in io:
            continue
        yield case.close(f"{name}_lens", out.lengths)
        for row, size in enumerate(out.lengths.tolist()):
            encoded = io[f"{name}_encoder_out"][row, :size]
            yield case.close(f"{name}_encoder_out[{row}]", out.encoder_out[row, :size], encoded)
            wanted = io[f"{name}_log_probs"][row, :size]
            yield case.close(f"{name}_log_probs[{row}]", out.log_probs[row, :size], wanted)
            with torch.no_grad():
                item = slice(row, row + 1)
                single = model(feats[item, : lengths[row]], lengths[item], language, textnorm)
            yield case.close(f"{name}_log_probs[{row}] alone", single.log_probs[0], wanted)
    if "loss" not in io:
        return
    got = sensevoice_loss(model, feats, lengths, io["text"], io["text_lengths"], io["lid_draws"])
    for name in ("loss", "loss_ctc", "loss_rich", "acc_rich"):
        yield case.close(name, got[name].reshape(io[name].shape))
    got["loss"].backward()
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    for name, want in case.meta.get("grad_norms", {}).items():
        yield case.close(f"gradient norm {name}", norms[name], torch.tensor(want))


HANDLERS = {"sensevoice": sensevoice}
