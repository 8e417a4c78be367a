"""Handlers of the recorded Paraformer cases: kind -> function from a case to its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nar_speech.checkpoint import load_strict
from nar_speech.config import from_dict
from nar_speech.layers.cif import (
    PREDICTORS,
    CifOutput,
    PredictorConfig,
    fire_track,
    integrate,
    prefix_sums,
    prefix_track,
)
from nar_speech.models.paraformer import (
    Paraformer,
    ParaformerConfig,
    build_paraformer,
    loss_terms,
    training_pass,
)
from nar_speech.models.paraformer_official import PREDICTOR_KINDS, convert_config, predictor_conf
from nar_speech.text.timestamps import fire_times
from tests.golden_kinds import paraformer_frontend, paraformer_online, sensevoice
from tests.golden_kinds.paraformer_online import lost_vectors, without_last

if TYPE_CHECKING:
    from tests.golden import Case, Check


def official_config(meta: dict[str, Any]) -> ParaformerConfig:
    """The network of a case: its own class names where it has them, else those the class list implies."""
    conf, classes = meta["config"], meta["classes"]
    tree = {
        "model": classes[0],
        "encoder": conf.get("encoder", "SANMEncoder"),
        "decoder": conf.get("decoder", "ParaformerSANMDecoder"),
        "predictor": conf.get("predictor", "CifPredictorV2"),
        **{key: value for key, value in conf.items() if key.endswith("_conf")},
    }
    return convert_config(tree, conf["input_size"], conf["vocab_size"], "meta.json: config")


def build(case: Case) -> Paraformer:
    """The case's network with its weights, in eval mode."""
    model = build_paraformer(official_config(case.meta))
    load_strict(model, case.weights, where=case.folder / "weights.safetensors")
    return model.eval()


class Recorder:
    """Collects outputs of submodules under the names of the recorded tensors."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}

    def watch(self, module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _m, _i, output: self.outputs.__setitem__(name, output))


def watch_layers(model: Paraformer) -> Recorder:
    """Hooks on every layer the offline cases record."""
    seen = Recorder()
    encoder, decoder = model.encoder, model.decoder
    seen.watch(encoder.embed, "enc_after_pos")
    for i, layer in enumerate([*encoder.encoders0, *encoder.encoders]):
        seen.watch(layer, f"enc_layer_{i:02d}")
        seen.watch(layer.self_attn, f"enc_layer_{i:02d}_selfattn")
    for i, layer in enumerate(decoder.decoders):
        seen.watch(layer, f"dec_layer_{i:02d}")
        seen.watch(layer.feed_forward, f"dec_layer_{i:02d}_ffn")
        seen.watch(layer.self_attn, f"dec_layer_{i:02d}_fsmn")
        seen.watch(layer.src_attn, f"dec_layer_{i:02d}_srcattn")
    for group in ("decoders2", "decoders3"):
        for i, layer in enumerate(getattr(decoder, group, ())):
            seen.watch(layer, f"dec{group[-1]}_layer_{i:02d}")
    seen.watch(decoder.output_layer, "decoder_logits")
    return seen


def greedy(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Best ids (B, U), -1 past the length."""
    padded = torch.arange(log_probs.shape[1]) >= lengths[:, None]
    return log_probs.argmax(-1).masked_fill(padded, -1)


def check_close(case: Case, got: dict[str, Tensor]) -> Iterator[Check]:
    """Compare every recorded tensor that we have."""
    for name, value in got.items():
        if name in case.io:
            yield case.close(name, value)


def offline(case: Case) -> Iterator[Check]:
    """Whole model: batched with the official padding, then our default against single items, and batched."""
    model = build(case)
    feats, lengths = case.io["speech"], case.io["speech_lengths"]
    with torch.no_grad():
        ours = model(feats, lengths)
        seen = watch_layers(model)
        out = model(feats, lengths, official_padding=True)
        cif = model.predict(out.encoder_out, out.encoder_lengths, official_padding=True)
    layers = dict(seen.outputs)  # later runs overwrite what the hooks hold
    ids = greedy(out.log_probs, out.token_lengths)
    got = {
        **layers,
        "encoder_out": out.encoder_out,
        "encoder_out_lens": out.encoder_lengths,
        "acoustic_embeds": cif.embeds,
        "token_num": cif.token_num,
        "alphas": cif.alphas,
        "cif_peak": cif.peaks,
        "token_lens": out.token_lengths,
        "log_probs": out.log_probs,
        "greedy_ids": ids,
    }
    yield from check_close(case, got)
    if "inference_token_int" in case.meta:
        kept = [[i for i in row if i > 2] for row in ids.tolist()]
        yield case.equal("inference_token_int", kept, case.meta["inference_token_int"])
    for b in range(len(lengths)):
        if any(name.startswith(f"single{b}_") for name in case.io):
            yield from _check_single(case, model, ours, b)


def _check_single(case: Case, model: Paraformer, batched: Any, b: int) -> Iterator[Check]:
    """Item ``b`` alone, and the same item out of our batch, against the recorded single run."""
    item = slice(b, b + 1)
    size = case.io["speech_lengths"][item]
    feats = case.io["speech"][item, : int(size)]
    with torch.no_grad():
        alone = model(feats, size)
        official = model(feats, size, official_padding=True)  # differs where a weight is above 1
        token_num = model.predict(official.encoder_out, size, official_padding=True).token_num
    conf, tokens = model.config.predictor_conf, int(alone.token_lengths[0])
    weights = batched.alphas[item, : int(size)]
    if conf.tail_threshold > 0:  # stands in the batch's last column without the tail mask
        place = int(size) if conf.tail_mask else batched.alphas.shape[1] - 1
        weights = torch.cat([weights, batched.alphas[item, place : place + 1]], dim=1)
    parts = {
        "encoder_out": (official.encoder_out, alone.encoder_out, batched.encoder_out[item, : int(size)]),
        "alphas": (official.alphas, alone.alphas, weights),
        "token_num": (token_num, None, None),
        "log_probs": (official.log_probs, alone.log_probs, batched.log_probs[item, :tokens]),
    }
    same = bool((official.alphas <= 1).all())  # then our vectors are the official ones
    for name, (want, single, row) in parts.items():
        if f"single{b}_{name}" not in case.io:
            continue
        yield case.close(f"single{b}_{name}", want)
        if single is not None:
            if same:
                yield case.close(f"single{b}_{name} (ours)", single, case.io[f"single{b}_{name}"])
            yield case.close(f"single{b}_{name} (row of our batch)", row, single)
    yield case.equal(f"single{b} tokens (row of our batch)", int(batched.token_lengths[b]), tokens)


def predictor(case: Case) -> Iterator[Check]:
    """CIF predictors alone, and the bare integrate-and-fire functions."""
    hidden, lengths = case.io["hidden"], case.io["lens"]
    for name, variant in case.meta["variants"].items():
        conf = from_dict(PredictorConfig, predictor_conf(variant["class"], variant["conf"]), name)
        module = PREDICTORS[PREDICTOR_KINDS[variant["class"]]](hidden.shape[-1], conf).eval()
        own = {k.removeprefix(name + "."): v for k, v in case.weights.items() if k.startswith(name + ".")}
        load_strict(module, own, where=f"{name} of {case.folder}")
        targets = None
        if "target_label" in name:
            targets = (case.io["target_label"] != -1).sum(dim=1)
        elif "target_len" in name:
            targets = case.io["target_label_length"].flatten()
        with torch.no_grad():
            official = module(hidden, lengths, targets, official=True)
            ours = module(hidden, lengths, targets)
        embeds, peaks = case.io[f"{name}_acoustic_embeds"], case.io[f"{name}_peaks"]
        lost = torch.zeros(len(lengths), dtype=torch.bool)
        if targets is not None:
            lost = _lost_fires(peaks, targets)
            yield case.equal(
                f"{name} tokens (ours)", (ours.peaks >= 1).sum(1).tolist(), targets.long().tolist()
            )
        kept = torch.arange(embeds.shape[1]) < (official.token_lengths - lost.long())[:, None]
        yield case.close(f"{name}_acoustic_embeds", official.embeds * kept[:, :, None], embeds)
        yield case.close(f"{name}_token_num", official.token_num)
        yield case.close(f"{name}_alphas", official.alphas)
        last = torch.arange(peaks.shape[1]) == (lengths - 1)[:, None]
        # From the lost fire on, the official track holds the whole weight that ours has given to the token.
        behind = (torch.arange(peaks.shape[1]) >= (lengths - 1)[:, None]) & lost[:, None]
        yield case.close(f"{name}_peaks", official.peaks.masked_fill(behind, 0), peaks.masked_fill(behind, 0))
        if bool((official.alphas <= 1).all()):
            yield case.close(f"{name}_acoustic_embeds (ours)", ours.embeds * kept[:, :, None], embeds)
        if "fires" in variant:
            fired = (official.peaks >= 1) & ~(last & lost[:, None])
            yield case.equal(
                f"{name} fires", [row.nonzero().flatten().tolist() for row in fired], variant["fires"]
            )
    yield from _bare_cif(case)


def _lost_fires(peaks: Tensor, targets: Tensor) -> Tensor:
    """(B,) items whose last token the official code loses: rounding leaves the sum just below its target."""
    short = (peaks >= 1).sum(dim=1) == targets - 1
    return short & ((peaks[:, -1] - 1).abs() < 1e-4)


def _bare_cif(case: Case) -> Iterator[Check]:
    """Parallel and sequential integrate-and-fire on recorded weights."""
    for prefix, hidden_name in (("cif_v1", "cif_v1_hidden"), ("cif_nofire", None)):
        if f"{prefix}_alphas" not in case.io:
            continue
        alphas = case.io[f"{prefix}_alphas"]
        sums = prefix_sums(alphas)
        want = case.io[f"{prefix}_embeds"]
        hidden = case.io[hidden_name] if hidden_name else torch.ones(*alphas.shape, want.shape[-1])
        counts, tokens = sums[:, -1].floor().long(), int(sums[:, -1].round().max())
        yield case.close(f"{prefix}_peaks", prefix_track(sums))
        yield case.close(f"{prefix}_embeds", integrate(hidden, alphas, sums, counts, tokens, "prefix"))
        if bool((alphas <= 1).all()):
            yield case.close(f"{prefix}_embeds (ours)", integrate(hidden, alphas, sums, counts, tokens), want)
        if prefix == "cif_v1" and "cif_loop_embeds" in case.io:
            fired = (fire_track(sums) >= 1).sum(dim=1)
            yield case.close("cif_loop_peaks", fire_track(sums))
            yield case.close("cif_loop_embeds", integrate(hidden, alphas, sums, fired, tokens, "sequential"))


def bicif(case: Case) -> Iterator[Check]:
    """Second CIF head and the time stamps made from it."""
    model = build(case)
    with torch.no_grad():
        out = model(case.io["speech"], case.io["speech_lengths"], official_padding=True)
        cif = model.predict(out.encoder_out, out.encoder_lengths, official_padding=True)
        times = model.times(out.encoder_out, out.encoder_lengths, cif.token_lengths, official_padding=True)
    got = {
        "encoder_out": out.encoder_out,
        "encoder_out_lens": out.encoder_lengths,
        "acoustic_embeds": cif.embeds,
        "token_num": cif.token_num,
        "alphas": cif.alphas,
        "cif_peak": cif.peaks,
        "log_probs": out.log_probs,
        "token_num2": times.token_num,
        "ds_alphas": times.frame_alphas,
        "ds_peaks": times.frame_peaks,
        "us_alphas": times.alphas,
        "us_peaks": times.peaks,
    }
    yield from check_close(case, got)
    for entry in case.meta.get("timestamps", ()):
        b = entry["utt"]
        size = int(out.encoder_lengths[b]) * entry["upsample_rate"]
        yield from _check_times(
            case, f"timestamps of {b}, {len(entry['chars'])} tokens", times.alphas[b, :size],
            times.peaks[b, :size], entry, {"upsample_rate": entry["upsample_rate"]},
        )  # fmt: skip
    yield from _check_invariance(model, case)


def timestamps(case: Case) -> Iterator[Check]:
    """Weights and fire track to token times."""
    for entry in case.meta["cases"]:
        tag = entry["tag"]
        yield from _check_times(
            case, tag, case.io[f"{tag}_alphas"], case.io[f"{tag}_peaks"], entry, entry["kwargs"]
        )


def _check_times(
    case: Case, name: str, alphas: Tensor, peaks: Tensor, entry: dict[str, Any], options: dict[str, Any]
) -> Iterator[Check]:
    """The official strings: ``token start end;`` with silences, and whole milliseconds without."""
    spans = fire_times(
        alphas,
        peaks,
        entry["chars"],
        frame_seconds=0.06 / options.get("upsample_rate", 3),
        offset=options.get("vad_offset", 0.0) / 1000,
        shift=options.get("force_time_shift", -1.5),
        mark_silence=options.get("sil_in_str", True),
        official=True,
    )
    shown = [(s.text, str(s.start + 0.0005)[:5], str(s.end + 0.0005)[:5]) for s in spans]  # as printed there
    text = "".join(f"{name} {start} {end};" for name, start, end in shown)
    yield case.equal(f"{name} text", text, entry["expect_text"])
    ms = [[int(s.start * 1000), int(s.end * 1000)] for s in spans if s.text != "<sil>"]
    yield case.equal(f"{name} ms", ms, entry["expect_ms"])


def _check_invariance(model: Paraformer, case: Case) -> Iterator[Check]:
    """Our default: every item of the batch as it is alone (no recorded tensor; tolerance of the case)."""
    feats, lengths = case.io["speech"], case.io["speech_lengths"]
    with torch.no_grad():
        batch = model(feats, lengths)
        for b, size in enumerate(lengths.tolist()):
            alone = model(feats[b : b + 1, :size], torch.tensor([size]))
            tokens = int(alone.token_lengths[0])
            yield case.equal(f"tokens of {b}: batch and alone", int(batch.token_lengths[b]), tokens)
            yield case.close(f"log_probs of {b}: batch", batch.log_probs[b, :tokens], alone.log_probs[0])
            if alone.us_peaks is not None:
                fine = alone.us_peaks.shape[1]
                yield case.close(f"us_peaks of {b}: batch", batch.us_peaks[b, :fine], alone.us_peaks[0])


def _user_hotwords(case: Case) -> list[list[int]]:
    """The recorded list ends with the entry for "no hotword", which we add ourselves."""
    entries = case.meta["hotwords"]
    return entries[:-1] if entries[-1] == [1] else entries


def contextual(case: Case) -> Iterator[Check]:
    """Hotwords in the decoder: none, some, and some at other scales."""
    model = build(case)
    hotwords = _user_hotwords(case)
    with torch.no_grad():
        encoder_out, lengths = model.encode(case.io["speech"], case.io["speech_lengths"])
        cif = model.predict(encoder_out, lengths, official_padding=True)
        context = model.context(hotwords)

        def log_probs(context: Tensor | None, scale: float = 1.0) -> Tensor:
            logits = model.decode(encoder_out, lengths, cif.embeds, cif.token_lengths, context, scale)
            return logits.log_softmax(-1)

        got = {
            "encoder_out": encoder_out,
            "encoder_out_lens": lengths,
            "acoustic_embeds": cif.embeds,
            "token_lens": cif.token_lengths,
            "hotword_embeds": context,
            "log_probs_no_hotword": log_probs(model.context(None)),
            "log_probs_hotword": log_probs(context),
        }
        for name in case.io:
            if name.startswith("log_probs_hotword_scale"):
                digits = name.removeprefix("log_probs_hotword_scale")
                scale = float(digits) if "." in digits else int(digits) / 10 ** (len(digits) - 1)
                got[name] = log_probs(context, scale)
        yield from check_close(case, got)
        whole = model(case.io["speech"], case.io["speech_lengths"], hotwords, official_padding=True)
    yield case.close("log_probs_hotword (forward)", whole.log_probs, case.io["log_probs_hotword"])
    yield from _check_invariance(model, case)


def seaco(case: Case) -> Iterator[Check]:
    """Hotword decoder: without hotwords, with all, and with those that pass the attention filter."""
    hotwords, limit = _user_hotwords(case), case.meta["nfilter_in_filtered"]
    model = build(case)
    feats, lengths = case.io["speech"], case.io["speech_lengths"]
    with torch.no_grad():
        plain = model(feats, lengths, official_padding=True)
        cif = model.predict(plain.encoder_out, plain.encoder_lengths, official_padding=True)
        hidden = model.decoder.hidden(cif.embeds, cif.token_lengths, plain.encoder_out, plain.encoder_lengths)
        states = model.hotword_states(hotwords)  # the list may hold the entry for "no hotword" alone
        got = {
            "encoder_out": plain.encoder_out,
            "encoder_out_lens": plain.encoder_lengths,
            "acoustic_embeds": cif.embeds,
            "token_lens": cif.token_lengths,
            "hotword_embeds": states,
            "log_probs_no_hotword": plain.log_probs,
            "log_probs_hotword": model.favour(hidden, cif, states, official_padding=True),
        }
        if hotwords:
            whole = model(feats, lengths, hotwords, official_padding=True)
            yield case.close("log_probs_hotword (forward)", whole.log_probs, case.io["log_probs_hotword"])
        conf = dataclasses.replace(model.config.hotword_conf, filter_size=limit)
        model.config = dataclasses.replace(model.config, hotword_conf=conf)
        got["log_probs_hotword_filtered"] = model.favour(hidden, cif, states, official_padding=True)
        yield from check_close(case, got)
        batch = model(feats, lengths, hotwords)
        for b, size in enumerate(lengths.tolist()):
            alone = model(feats[b : b + 1, :size], torch.tensor([size]), hotwords)
            tokens = int(alone.token_lengths[0])
            yield case.close(
                f"filtered log_probs of {b}: batch", batch.log_probs[b, :tokens], alone.log_probs[0]
            )


def _draws(case: Case, width: int) -> Tensor:
    """(B, width) recorded permutations, -1 behind them; all -1 where an utterance needed none."""
    rows = torch.full((len(case.io["text"]), width), -1)
    for b, row in enumerate(rows):
        order = case.io.get(f"perm_{b}", row[:0])[:width]
        row[: len(order)] = order
    return rows


def loss(case: Case) -> Iterator[Check]:
    """Both passes of training with the recorded draws, every loss term, and gradients."""
    model = build(case)
    io = case.io
    draws = None
    if model.config.sampling_ratio > 0:
        draws = _draws(case, int(io["text_lengths"].max()) + model.config.predictor_bias)
    hotwords = None
    if "hotword_pad" in io:
        sizes = io["hotword_lengths" if "hotword_lengths" in io else "hotword_lens"].flatten().tolist()
        hotwords = [row[:size] for row, size in zip(io["hotword_pad"].tolist(), sizes, strict=True)]
        hotwords = hotwords[:-1] if hotwords[-1] == [1] else hotwords
    lost = None
    if "pred_peaks" in io and model.predictor.official_mode == "prefix":
        lost = lost_vectors(io["pred_peaks"], io["text_lengths"] + model.config.predictor_bias)
        predict = model.predict

        def losing(*arguments: Any) -> CifOutput:  # as rounding made the official code do
            cif = predict(*arguments)
            return dataclasses.replace(cif, embeds=without_last(cif.embeds, cif.token_lengths, lost))

        model.predict = losing
    run = training_pass(
        model,
        io["speech"],
        io["speech_lengths"],
        io["text"],
        io["text_lengths"],
        draws=draws,
        hotwords=hotwords,
        official_padding=True,
    )
    terms = loss_terms(model, run, io["text"], io["text_lengths"])
    valid = run.targets != -1
    peaks = run.cif.peaks
    if lost is not None:  # where a fire is lost the official track holds the whole weight from there on
        behind = ((peaks >= 1).cumsum(dim=1) == run.target_lengths[:, None]) & lost[:, None]
        peaks = torch.where(behind, io["pred_peaks"], peaks)
    got = {
        "target_with_eos": run.targets,
        "pred_token_num": run.cif.token_num,
        "pred_alphas": run.cif.alphas,
        "pred_peaks": peaks,
        "pre_acoustic_embeds": run.cif.embeds,
        "keep_acoustic_mask": run.keep,
        "semantic_embeds": run.embeds,
        "acc": terms["acc"],
        "batch_weight": terms["weight"][None],
        **{
            n: terms[n].reshape(1)
            for n in ("loss", "loss_att", "loss_pre", "loss_pre2", "loss_ctc")
            if n in terms
        },
    }
    if run.first_logits is not None:
        got["first_pass_logits"] = run.first_logits * valid[:, :, None]
    yield from check_close(case, got)
    yield from paraformer_online.check_gradients(case, model, terms["loss"])


HANDLERS = {
    "offline": offline,
    "predictor": predictor,
    "bicif": bicif,
    "contextual": contextual,
    "seaco": seaco,
    "loss": loss,
    "timestamps": timestamps,
    **paraformer_frontend.HANDLERS,
    **paraformer_online.HANDLERS,
    **sensevoice.HANDLERS,
}
