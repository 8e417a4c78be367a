"""Golden handlers of MAGNeT's and MusicGen's networks, the training loss and autoregressive sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nar_speech.checkpoint import load_strict
from nar_speech.layers.multistream import RENAME, MultiStreamNetwork
from nar_speech.losses.masked import MaskDraws, mask_codes, span_counts
from nar_speech.models.magnet import Magnet, MagnetConfig, magnet_loss
from nar_speech.models.musicgen import MusicGen, MusicGenConfig, delay_codes, undelay
from nar_speech.sampling.autoregressive import AutoregressiveConfig, autoregressive_sample
from nar_speech.sampling.draws import RecordedDraws

if TYPE_CHECKING:
    from tests.golden import Case, Check


def sizes(conf: Mapping[str, Any]) -> dict[str, Any]:
    """What the configurations of both networks share."""
    return {
        "num_codebooks": conf["n_q"],
        "codebook_size": conf["card"],
        "width": conf["dim"],
        "heads": conf["num_heads"],
        "num_blocks": conf["num_layers"],
        "hidden_scale": conf.get("hidden_scale", 4),
        "text_width": conf["t5_dim"],
    }


def magnet_network(conf: Mapping[str, Any], weights: Mapping[str, Tensor], where: object) -> Magnet:
    """The recorded MAGNeT in eval mode."""
    config = MagnetConfig(
        **sizes(conf),
        frame_rate=conf["framerate"],
        segment_seconds=conf["segment_duration"],
        context=conf["subcodes_context"],
        span_len=conf["span_len"],
    )
    return _load(Magnet(config), weights, where)


def musicgen_network(conf: Mapping[str, Any], weights: Mapping[str, Tensor], where: object) -> MusicGen:
    """The recorded MusicGen in eval mode."""
    return _load(MusicGen(MusicGenConfig(**sizes(conf))), weights, where)


def _load(network: MultiStreamNetwork, weights: Mapping[str, Tensor], where: object) -> Any:
    load_strict(network, weights, RENAME, where)
    return network.eval()


def projected(network: MultiStreamNetwork, case: Case) -> Tensor:
    """Text states after the projection, zero on padding."""
    return network.condition_proj(case.io["t5_hidden"]) * case.io["t5_mask"].unsqueeze(-1)


def forward(case: Case) -> Iterator[Check]:
    """Every stage with the official padding; then each row alone against ours."""
    io = case.io
    network = magnet_network(case.meta["config"], case.weights, case.folder)
    text = io["t5_hidden"], io["t5_mask"]
    activations: dict[str, Tensor] = {}
    _watch(network, activations)
    with torch.no_grad():
        yield case.close("cond", projected(network, case))
        for name in sorted(n for n in io if n.startswith("logits.stage")):
            stage = int(name.removeprefix("logits.stage"))
            activations.clear()
            logits = network(io["sequence"], None, *text, stage, official_padding=True)
            yield case.close(name, logits)
            for part, value in activations.items():
                recorded = f"act.stage{stage}.{part}"
                if recorded in io:
                    yield case.close(recorded, value)
            if f"attn_mask.stage{stage}" in io:
                yield _sight(case, network, stage)
            yield from _alone(case, network, stage)


def _watch(network: Magnet, found: dict[str, Tensor]) -> None:
    def keep(name: str):
        return lambda module, inputs, output: found.__setitem__(name, output)

    for number, block in enumerate(network.blocks):
        block.register_forward_hook(keep(f"layer{number}"))
        block.self_attn.out_proj.register_forward_hook(keep(f"layer{number}.self_attn"))
    network.blocks[0].register_forward_pre_hook(
        lambda module, inputs: found.__setitem__("input_plus_pos", inputs[1])
    )


def _sight(case: Case, network: Magnet, stage: int) -> Check:
    """Which positions a position sees: attention with equal scores over values that name their position."""
    recorded = case.io[f"attn_mask.stage{stage}"][0, 0]
    frames = case.io["sequence"].shape[2]
    attend = network.attention(1, frames, None, network.restricted(stage))
    same = torch.zeros(1, frames, 1, frames)
    weights = attend(0, same, same, torch.eye(frames)[None, :, None])[0, :, 0]
    return case.close(f"attn_mask.stage{stage}", weights > 0, recorded[:frames, :frames] == 0)


def _alone(case: Case, network: Magnet, stage: int) -> Iterator[Check]:
    """A row alone, its text not padded, officially computed; in the batch it must be the same."""
    io = case.io
    batched = network(io["sequence"], None, io["t5_hidden"], io["t5_mask"], stage)
    for row, size in enumerate(io["t5_mask"].sum(1).tolist()):
        item = slice(row, row + 1)
        text = io["t5_hidden"][item, : max(size, 1)], io["t5_mask"][item, : max(size, 1)]
        single = network(io["sequence"][item], None, *text, stage, official_padding=True)
        yield case.close(f"stage {stage}: row {row} in the batch", batched[item], single)


def train_loss(case: Case) -> Iterator[Check]:
    """Tables, masks, inputs, logits and loss of every stage."""
    io, conf = case.io, case.meta["config"]
    network = magnet_network(conf, case.weights, case.folder)
    for name in sorted(n for n in io if n.startswith("lut.")):
        span, frames = (int(part[1:]) for part in name.split(".")[1:])
        yield case.close(name, torch.tensor(span_counts(frames, span)))
    if "maskrate_to_u" in io:
        table = span_counts(io["codes"].shape[2], conf["span_len"])
        yield case.close("maskrate_to_u", torch.tensor(table))
    lengths = io["padding_mask"][:, 0].sum(1)
    text = io["t5_hidden"], io["t5_mask"]
    yield case.close("cond", projected(network, case).detach(), scale=max(1.0, 1e-5 / (case.atol or 1e-5)))
    for stage in sorted({int(n[1 : n.index(".")]) for n in io if n.startswith("s") and n[1].isdigit()}):
        draws = MaskDraws(io[f"s{stage}.rand_time"], io[f"s{stage}.rand_scores"])
        batch = mask_codes(
            *(io["codes"], lengths, stage, conf["span_len"], network.config.mask_id, draws), per_item=False
        )
        yield case.close(f"s{stage}.input", batch.tokens)
        yield case.close(f"s{stage}.stage_mask", batch.spans)
        with torch.no_grad():
            logits = network(batch.tokens, None, *text, stage, only_stage=True, official_padding=True)
            terms = magnet_loss(network, batch, *text, official_padding=True)
        yield _within(case, f"s{stage}.logits", logits, 2e-4, 1e-4)
        yield _within(case, f"s{stage}.loss", terms["loss"], 1e-7, 1e-5)


def _within(case: Case, name: str, got: Tensor, atol: float, rtol: float) -> Check:
    """Compare with tolerances of our own, where the case states them per kind of tensor."""
    before = case.atol, case.rtol
    case.atol, case.rtol = atol, rtol
    try:
        return case.close(name, got)
    finally:
        case.atol, case.rtol = before


def musicgen_forward(case: Case) -> Iterator[Check]:
    """Delay pattern, logits and cross entropy; then streaming against all at once."""
    io = case.io
    network = musicgen_network(case.meta["config"], case.weights, case.folder)
    codes, lags = io["codes"], network.config.lags
    batch, _, frames = codes.shape
    text = io["t5_hidden"][:batch], io["t5_mask"][:batch]
    sequence = delay_codes(codes, None, lags, network.config.mask_id)
    yield case.close("delay_sequence", sequence)
    yield case.close("delay_mask", delay_codes(torch.zeros_like(codes), None, lags, 1)[0] == 0)
    yield case.close("delay_sequence_valid_only", sequence[:, :, : io["delay_sequence_valid_only"].shape[2]])
    yield case.close("reverted_codes", undelay(sequence, frames, lags, 1))
    with torch.no_grad():
        yield case.close("cond", projected(network, case))
        yield case.close("seq_logits", network(sequence, *text, official_padding=True))
        aligned = network.aligned_logits(codes, None, *text, official_padding=True)
        mask = io["aligned_mask"]
        yield case.close("aligned_logits", aligned.masked_fill(~mask.unsqueeze(-1), 0.0))
        losses = torch.nn.functional.cross_entropy(aligned.flatten(0, 2), codes.flatten(), reduction="none")
        losses = (losses.view_as(codes) * mask).sum((0, 2)) / mask.sum((0, 2))
        yield case.close("ce_per_codebook", losses)
        yield case.close("ce", losses.mean())
        memory = network.remember(*text, official_padding=True)
        state = network.start(batch, 4, memory)
        for begin in range(0, sequence.shape[2], 5):
            new = sequence[:, :, begin : begin + 5]
            logits, state = network.step(new, state)
            last = begin + new.shape[2] - 1
            yield case.close(f"stream up to {last}", logits, io["seq_logits"][:, :, last])


def musicgen_generate(case: Case) -> Iterator[Check]:
    """The logits of every step, and the codes."""
    io, options = case.io, case.meta["generate"]
    network = musicgen_network(case.meta["config"], case.weights, case.folder)
    batch = options["batch"]
    text = io["t5_hidden"], io["t5_mask"]
    config = AutoregressiveConfig(
        sample=options["use_sampling"],
        temperature=options.get("temp", 1.0) or 1.0,
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 0.0),
        guidance=options["cfg_coef"],
    )
    null = text[0][batch:], text[1][batch:]
    inner = network.sampler(text[0][:batch], text[1][:batch], null, official_padding=True)
    steps: list[Tensor] = []

    def step(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = inner(tokens)
        steps.append(torch.cat(parts))
        return parts

    draws = RecordedDraws(list(io["exp_draws"])) if "exp_draws" in io else None
    lengths = torch.full((batch,), options["max_gen_len"])
    tokens = autoregressive_sample(
        step, lengths, network.config.lags, network.config.mask_id, config, draws, io.get("prompt")
    )
    yield _within(case, "step_logits", torch.stack(steps), 2e-4, 1e-4)
    yield case.close("tokens", tokens)


HANDLERS = {
    "forward": forward,
    "train_loss": train_loss,
    "musicgen_forward": musicgen_forward,
    "musicgen_generate": musicgen_generate,
}
