"""Golden handlers of MaskGCT's pipeline: features of w2v-BERT, and text to sound as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nar_speech.checkpoint import load_strict
from nar_speech.models.w2vbert import W2vBert, unread
from tests.golden_kinds.maskgct import tolerance

if TYPE_CHECKING:
    from tests.golden import Case, Check


def w2vbert_features(case: Case) -> Iterator[Check]:
    """Inputs, hidden states and features of every recording alone, of all as a batch, and of one layer."""
    io, config, layer = case.io, case.meta["config"], case.meta["layer"]
    network = W2vBert(config, layer, (io["stat_mean"], io["stat_var"]))
    load_strict(network.model, case.weights, unread(config, layer))
    stated = [float(x) for x in re.findall(r"atol ([\d.e-]+)", str(case.meta.get("tolerance")))]
    loose = stated[0] if stated else 2e-3
    case.atol, case.rtol = (stated[1], 1e-3) if len(stated) > 1 else (case.atol, case.rtol)
    names = sorted(name for name in io if re.fullmatch(r"wav_\d+", name))
    for name in names:
        number = name.removeprefix("wav_")
        wave = io[name][None]
        inputs, mask, counts = network.inputs(wave, torch.tensor([wave.shape[1]]))
        yield case.equal(f"features of {name}", int(counts), io[f"input_features_{number}"].shape[1])
        with tolerance(case, loose, 0.0):
            yield case.close(f"input_features_{number}", inputs)
        yield case.close(f"attention_mask_{number}", mask)
        hidden = network.hidden(inputs, mask)
        yield case.close(f"hidden{layer}_{number}", hidden)
        yield case.close(f"feat_{number}", network(wave)[0])
        if f"hidden1_{number}" in io:
            first = W2vBert(config, 1)
            load_strict(first.model, case.weights, unread(config, 1))
            yield case.close(f"hidden1_{number}", first.hidden(inputs, mask))
    if "batch_features" not in io:
        return
    waves, lengths = padded([io[name] for name in names])
    inputs, mask, _ = network.inputs(waves, lengths)
    yield case.close("batch_mask", mask)
    there = io["batch_mask"].bool()
    with tolerance(case, loose, 0.0):
        yield case.close("batch_features", inputs[there], io["batch_features"][there])
    hidden = network.hidden(inputs, mask)
    yield case.close(f"batch_hidden{layer}", hidden[there], io[f"batch_hidden{layer}"][there])
    features, counts = network(waves, lengths)
    for row, name in enumerate(names):
        size = int(counts[row])
        yield case.close(f"{name} in a batch", features[row : row + 1, :size], network(io[name][None])[0])


def padded(waves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, N) with zeros behind the end of a row, and lengths (B,)."""
    return torch.nn.utils.rnn.pad_sequence(waves, True), torch.tensor([len(wave) for wave in waves])


HANDLERS = {"w2vbert_features": w2vbert_features}
