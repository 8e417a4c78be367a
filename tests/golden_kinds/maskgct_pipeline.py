"""Golden handlers of MaskGCT's pipeline: features of w2v-BERT, and text to sound as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nar_speech.checkpoint import load_strict
from nar_speech.codec.maskgct import DecoderConfig, EncoderConfig, MaskGCTCodec
from nar_speech.codec.weight_norm import fold
from nar_speech.config import from_dict
from nar_speech.models.maskgct import S2A, T2S, S2AConfig, T2SConfig, without_empty
from nar_speech.models.w2vbert import W2vBert, unread
from nar_speech.pipelines.speech_codes import Networks, Piece, make_codes
from nar_speech.pipelines.speech_options import SynthesisConfig
from nar_speech.sampling.draws import RecordedDraws
from nar_speech.types import Codes
from tests.golden_kinds.maskgct import exponential, tolerance
from tests.golden_kinds.maskgct_codec import around, used

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


def pipeline(case: Case) -> Iterator[Check]:
    """All networks one after the other, and the decoder, with the recorded draws; the same as a batch."""
    io, call = case.io, case.meta["call"]
    networks, codec = parts(case)
    config = SynthesisConfig(
        steps=call["n_timesteps"],
        acoustic_steps=tuple(call["n_timesteps_s2a"]),
        cfg=max(call["cfg"], 0.0),
        acoustic_cfg=max(call["cfg"], 0.0),
        rescale=call["rescale_cfg"],
        temperature=call["t2s_temp"],
        acoustic_temperature=call["s2a_temp"],
        filter_threshold=call["filter_thres"],
    )
    piece = Piece(io["phone_id"][0], io["prompt_semantic"][0], io["prompt_acoustic"][0], call["target_len"])
    semantic, acoustic = make_codes(networks, [piece], drawn(io, 1), config)
    yield case.close("predict_semantic", semantic[0][None])
    yield case.close("combine_semantic", torch.cat([piece.semantic, semantic[0]])[None])
    yield case.close("predict_1layer", acoustic[0][:1].T[None])
    yield case.close("predict_full", acoustic[0].T[None])
    frames = torch.tensor([acoustic[0].shape[1]])
    waves, _ = codec.decode(Codes(acoustic[0][None], frames, codec.sample_rate))
    yield case.close("wav", waves)
    both = make_codes(networks, [piece, piece], drawn(io, 2), config)
    for row in range(2):
        yield case.close(f"row {row} of a batch: semantic", both[0][row], semantic[0])
        yield case.close(f"row {row} of a batch: acoustic", both[1][row], acoustic[0])


def parts(case: Case) -> tuple[Networks, MaskGCTCodec]:
    """The recorded networks; the codec has an encoder without a say."""
    conf = case.meta["config"]

    def of(prefix: str) -> dict[str, Tensor]:
        found = {n.removeprefix(prefix): t for n, t in case.weights.items() if n.startswith(prefix)}
        return without_empty(found, case.folder)

    t2s = T2S(T2SConfig.from_official(conf["t2s"]))
    first, full = (S2A(S2AConfig.from_official(conf[name])) for name in ("s2a_1layer", "s2a_full"))
    decoder = from_dict(DecoderConfig, used(conf["codec_decoder"]))
    codec = around(EncoderConfig(1, (decoder.hop,), decoder.in_channels), decoder)
    for network, prefix in (
        (t2s, "t2s."),
        (first, "s2a_1layer."),
        (full, "s2a_full."),
        (codec.decoder, "codec_decoder."),
    ):
        load_strict(network, of(prefix), where=case.folder)
    fold(codec)
    return Networks(t2s.eval(), first.eval(), full.eval()), codec.eval()


def drawn(io: Mapping[str, Tensor], copies: int) -> RecordedDraws:
    """The noise of all networks in the order of their runs, for so many equal items."""
    noise = {
        kind: [
            step.expand(copies, *step.shape[1:])
            for name in ("t2s", "s2a1", "s2af")
            for step in exponential(io[f"{name}_{kind}_u"])
        ]
        for kind in ("token", "score")
    }
    return RecordedDraws(noise["token"], noise["score"])


HANDLERS = {"w2vbert_features": w2vbert_features, "pipeline": pipeline}
