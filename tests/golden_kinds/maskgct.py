"""Golden handlers of MaskGCT's and Metis' Transformers: forward passes, losses, reverse runs, schedules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nar_speech.checkpoint import load_strict
from nar_speech.layers.diffllama import step_embedding
from nar_speech.losses.masked import masked_cross_entropy
from nar_speech.losses.maskgct import (
    SEMANTIC_FLOOR,
    SHORTEST_TIME,
    MaskedCodes,
    StepDraws,
    mask_acoustic,
    mask_probability,
    mask_semantic,
)
from nar_speech.models.maskgct import (
    S2A,
    T2S,
    S2AConfig,
    S2AItem,
    T2SConfig,
    T2SItem,
    target_frames,
    without_empty,
)
from nar_speech.models.maskgct_predictor import predictor
from nar_speech.models.metis import Metis, MetisConfig
from nar_speech.pipelines.maskgct_stages import StageOptions, sample_layers, sample_semantic
from nar_speech.sampling.codebooks import CodebookConfig, sample_codebooks
from nar_speech.sampling.config import maskgct_config
from nar_speech.sampling.draws import RecordedDraws
from nar_speech.sampling.masked import masked_sample
from nar_speech.sampling.schedules import make_plan, unit_counts
from nar_speech.sampling.step import StepInfo

if TYPE_CHECKING:
    from tests.golden import Case, Check

THRESHOLDS = (0.98, 0.95, 0.9)


def load(network: Any, case: Case) -> Any:
    """The recorded weights in eval mode."""
    load_strict(network, without_empty(case.weights, case.folder), where=case.folder)
    return network.eval()


def t2s_network(case: Case) -> T2S:
    """The recorded text-to-semantic network."""
    return load(T2S(T2SConfig.from_official(case.meta["config"])), case)


def s2a_network(case: Case) -> S2A:
    """The recorded semantic-to-acoustic network."""
    return load(S2A(S2AConfig.from_official(case.meta["config"])), case)


@contextmanager
def tolerance(case: Case, atol: float, rtol: float) -> Iterator[None]:
    """Another tolerance for some checks of a case."""
    kept = case.atol, case.rtol
    case.atol, case.rtol = atol, rtol
    yield
    case.atol, case.rtol = kept


def stated(case: Case, what: str, default: float) -> float:
    """A number that the case's tolerance states for ``what``, for example ``loss atol 1e-5``."""
    words = str(case.meta.get("tolerance"))
    found = re.search(rf"{what} (?:atol|rtol) ([\d.]+(?:e-?\d+)?)", words)
    return float(found[1]) if found else default


# ---- forward passes -------------------------------------------------------------------------------------


def t2s_forward(case: Case) -> Iterator[Check]:
    """The padded official batch with what lies inside, the unconditional pass, and ours: items contiguous."""
    io, network = case.io, t2s_network(case)
    core = network.diff_estimator
    tokens = io["codes"].masked_fill(io["is_masked"], network.mask_id)
    valid, phones = io["x_mask"].bool(), io["phone_mask"].bool()
    both = torch.cat([phones, valid], 1)
    lengths = valid.sum(1), phones.sum(1)
    inner: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda *a, n=name: inner.__setitem__(n, a[2]))
        for name, module in (("attn0", core.layers[0].self_attn.o_proj), ("layer0", core.layers[0]))
    ]
    with torch.no_grad():
        time = io["t"]
        yield case.close("sin_emb", step_embedding(time, network.config.width))
        yield case.close("step_emb", core.diff_step_mlp(step_embedding(time, network.config.width)))
        yield case.close("phone_cond", network.prefix(io["phone_id"]))
        yield case.close("x", network.embed(tokens))
        parts = tokens, time, lengths[0], io["phone_id"], lengths[1]
        hidden = network.hidden(*parts, official_padding=True)
        for name, value in inner.items():
            yield case.close(name, value[both], io[name][both])
        for hook in hooks:
            hook.remove()
        yield case.close("embeds", hidden[valid], io["embeds"][valid])
        logits = network(*parts, official_padding=True)
        yield case.close("logits", logits[valid], io["logits"][valid])
        alone = network.hidden(tokens, time, lengths[0])
        yield case.close("embeds_without_phones", alone[valid], io["embeds_without_phones"][valid])
        ours = network.hidden(*parts)
        yield case.close("embeds_unpadded", ours[valid], io["embeds_unpadded"][valid])


def s2a_forward(case: Case) -> Iterator[Check]:
    """From the recorded input of the Transformer to the logits of a layer."""
    io, network, stage = case.io, s2a_network(case), case.meta["layer"]
    core, valid = network.diff_estimator, case.io["x_mask"].bool()
    inner: list[Tensor] = []
    hook = core.layers[0].register_forward_hook(lambda *a: inner.append(a[2]))
    with torch.no_grad():
        condition = network.cond_emb(io["cond_code"]) + network.layer_emb.weight[stage]
        yield case.close("cond", condition)
        added = network.added(io["cond_code"], stage)
        yield case.close("cond_mlp_out", added)
        hidden = core(io["x"] + added, io["t"], valid)
        hook.remove()
        yield case.close("layer0", inner[0][valid], io["layer0"][valid])
        yield case.close("embeds", hidden[valid], io["embeds"][valid])
        yield case.close("logits", network.head(hidden, stage)[valid], io["logits"][valid])


# ---- losses ---------------------------------------------------------------------------------------------


def recorded_draws(case: Case) -> tuple[StepDraws, Tensor]:
    """The draws of a loss, and the lengths (B,)."""
    io = case.io
    time = io["draw_t"].clamp(SHORTEST_TIME, 1.0)
    dropped = bool(io["draw_prompt_drop"] <= case.meta["config"]["cfg_scale"])
    prompts = torch.zeros_like(io["prompt_len"]) if dropped else io["prompt_len"]
    return StepDraws(time, prompts, io["draw_bernoulli"].bool()), io["x_mask"].bool().sum(1)


def check_loss(
    case: Case, batch: MaskedCodes, logits: Tensor, floor: float, parameters: list[Tensor]
) -> Iterator[Check]:
    """What a recorded loss says: masks, logits, loss, accuracy and gradients."""
    io, valid = case.io, case.io["x_mask"].bool()
    yield case.close("prompt_len", recorded_draws(case)[0].prompts, io["prompt_len"])
    with tolerance(case, 1e-6, 0.0):
        yield case.close("mask_prob", mask_probability(batch.time, floor))
        yield case.close("final_mask", batch.masked[..., None].float())
    with tolerance(case, stated(case, "logits", 1e-4), 0.0):
        yield case.close("logits", logits[valid], io["logits"][valid])
    values = masked_cross_entropy(logits, batch.targets, batch.masked)
    with tolerance(case, stated(case, "loss", 1e-5), 0.0):
        yield case.close("loss", values["loss"])
        if "top10_acc" in io:
            best = logits[batch.masked].topk(10, dim=-1).indices
            hit = (best == batch.targets[batch.masked][:, None]).any(-1)
            yield case.close("top10_acc", hit.float().mean())
    values["loss"].backward()
    norms = torch.stack([parameter.grad.norm() for parameter in parameters])
    with tolerance(case, 1e-6, stated(case, "grad norms", 1e-3)):
        yield case.close("grad_norms", norms)


def t2s_loss(case: Case) -> Iterator[Check]:
    """Masks, logits, loss and gradients from the recorded draws."""
    io, network = case.io, t2s_network(case)
    draws, lengths = recorded_draws(case)
    batch = mask_semantic(io["x0"], lengths, draws, network.mask_id, official_padding=True)
    phones = io["phone_id"], io["phone_mask"].bool().sum(1)
    logits = network(batch.tokens, batch.time, lengths, *phones, official_padding=True)
    core = network.diff_estimator
    parameters = [
        network.cond_emb.weight,
        core.layers[0].self_attn.q_proj.weight,
        network.mask_emb.weight,
        core.norm.to_weight.weight,
    ]
    yield from check_loss(case, batch, logits, SEMANTIC_FLOOR, parameters)


def s2a_loss(case: Case) -> Iterator[Check]:
    """The same of acoustic codes, of the recorded layer."""
    io, network = case.io, s2a_network(case)
    draws, lengths = recorded_draws(case)
    stage = int(io["mask_layer"])
    codes = io["x0"].transpose(1, 2)
    batch = mask_acoustic(codes, lengths, draws, stage, network.mask_id, official_padding=True)
    logits = network(batch.tokens, batch.time, io["cond_code"], stage, lengths)
    parameters = [
        network.cond_emb.weight,
        network.diff_estimator.layers[0].self_attn.q_proj.weight,
        network.mask_emb.weight,
        network.layer_emb.weight,
    ]
    yield from check_loss(case, batch, logits, 0.0, parameters)


# ---- reverse diffusion ----------------------------------------------------------------------------------


Calls = list[tuple[Tensor, Tensor, Tensor]]  # masked positions, time and logits of each


def watched(predict: Callable, calls: Calls) -> Callable:
    """``predict``, keeping what it is asked and what it answers."""

    def call(tokens: Tensor, step: StepInfo) -> tuple[Tensor, None]:
        logits, _ = predict(tokens, step)
        calls.append((step.active, step.time, logits))
        return logits, None

    return call


def exponential(uniform: Tensor) -> list[Tensor]:
    """Exp(1) draws whose negative logarithms are the official Gumbel noise of these uniform numbers."""
    return list(-torch.log(uniform + 1e-10) + 1e-10)


def recorded(io: Mapping[str, Tensor]) -> RecordedDraws:
    """The noise of a reverse diffusion."""
    return RecordedDraws(exponential(io["token_noise_u"]), exponential(io["score_noise_u"]))


def stage_options(call: Mapping[str, Any], temperature: float) -> StageOptions:
    """The options of a recorded call; what it does not say is the official default."""
    steps = call.get("n_timesteps", 40)
    return StageOptions(
        steps=tuple(steps) if isinstance(steps, list) else (steps,),
        cfg=max(call.get("cfg", 1.0), 0.0),
        rescale=call.get("rescale_cfg", 1.0),
        temperature=call.get("temp", temperature),
        filter_threshold=call.get("filter_thres", 0.98),
    )


def check_run(case: Case, official: Callable[[Calls], Tensor], run: Callable[..., Tensor]) -> Iterator[Check]:
    """The official result step by step; then ours item by item, and the same in one batch.

    ``official`` gives the codes with the deviation over the batch, and fills in the calls;
    ``run(rows, draws, **options)`` gives the stacked codes of some items by ours.
    """
    io = case.io
    batch = len(io["codes"])
    calls: Calls = []
    yield case.close("codes", official(calls))
    masked, time, logits = (torch.stack(part) for part in zip(*calls, strict=True))
    yield case.close("logits_per_step", logits)
    if "mask_per_step" in io:
        yield case.close("mask_per_step", masked)
    if "t_per_step" in io:
        with tolerance(case, 1e-6, 0.0):
            yield case.close("t_per_step", time)
    rows = range(batch)
    single = [{n: t[:, row : row + 1] for n, t in io.items() if n.endswith("noise_u")} for row in rows]
    alone = torch.cat([run([row], recorded(noise)) for row, noise in zip(rows, single, strict=True)])
    if batch == 1:
        yield case.close("codes, logits of masked positions alone", alone, io["codes"])
    yield case.close("a batch gives what its items give", run(list(rows), recorded(io)), alone)
    yield case.close("in one pack too", run(list(rows), recorded(io), one_by_one=False), alone)


def semantic_items(case: Case) -> list[T2SItem]:
    """The items of a recorded semantic run."""
    io = case.io
    return [
        T2SItem(
            io["phone_id"][row] if "phone_id" in io else None,
            io["prompt"][row],
            io["finetune_cond"][row] if "finetune_cond" in io else None,
        )
        for row in range(len(io["prompt"]))
    ]


def semantic_reverse(case: Case, network: T2S) -> Iterator[Check]:
    """Semantic codes, in the order of confidence or a recorded one."""
    call, items = case.meta["call"], semantic_items(case)
    length, priority = call["target_len"], None
    if "preschedule" in case.io:  # what comes first in it stays masked longest
        order = case.io["preschedule"]
        priority = torch.empty(length).scatter_(0, order, torch.arange(length, 0, -1).float())[None]

    options = stage_options(call, 0.9)

    def official(calls: Calls) -> Tensor:
        predict = predictor(network, items, rescale=options.rescale, batch_deviation=True, all_positions=True)
        shape = len(items), length
        return masked_sample(
            watched(predict, calls),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.bool),
            torch.full(shape[:1], length),
            options.config(network.mask_id),
            recorded(case.io),
            mask_id=network.mask_id,
            priority=None if priority is None else priority.expand(shape),
        ).tokens

    def run(rows: list[int], draws: RecordedDraws, **changes: Any) -> Tensor:
        chosen = [items[row] for row in rows]
        ranks = None if priority is None else priority.expand(len(rows), -1)
        lengths = [length] * len(rows)
        return torch.stack(
            sample_semantic(network, chosen, lengths, draws, options, priority=ranks, **changes)
        )

    yield from check_run(case, official, run)


def t2s_reverse(case: Case) -> Iterator[Check]:
    """MaskGCT's first stage."""
    yield from semantic_reverse(case, t2s_network(case))


def metis_reverse(case: Case) -> Iterator[Check]:
    """Metis' first stage."""
    network = load(Metis(MetisConfig.from_official(case.meta["config"])), case)
    yield from semantic_reverse(case, network)


def s2a_reverse(case: Case) -> Iterator[Check]:
    """Layers of acoustic codes, perhaps behind a given first one."""
    io, network = case.io, s2a_network(case)

    options = stage_options(case.meta["call"], 1.5)
    items = [S2AItem(*pair) for pair in zip(io["cond_code"].unbind(0), io["prompt"].unbind(0), strict=True)]
    given = [row.T for row in io["gt_code"]] if "gt_code" in io else None

    def official(calls: Calls) -> Tensor:
        predict = predictor(network, items, rescale=options.rescale, batch_deviation=True, all_positions=True)
        codes = torch.zeros_like(io["codes"].transpose(1, 2))
        fixed = torch.zeros_like(codes, dtype=torch.bool)
        for row, part in enumerate(given or ()):
            codes[row, : len(part)], fixed[row, : len(part)] = part, True
        rules = CodebookConfig(options.steps, options.config(network.mask_id))
        lengths = torch.full(codes.shape[:1], codes.shape[2])
        result = sample_codebooks(
            *(watched(predict, calls), codes, fixed, lengths, rules, recorded(io)), mask_id=network.mask_id
        )
        return result.tokens.transpose(1, 2)

    def run(rows: list[int], draws: RecordedDraws, **changes: Any) -> Tensor:
        chosen = [items[row] for row in rows]
        known = None if given is None else [given[row] for row in rows]
        made = sample_layers(network, chosen, draws, options, given=known, **changes)
        return torch.stack(made).transpose(1, 2)

    yield from check_run(case, official, run)


# ---- schedules ------------------------------------------------------------------------------------------


def schedules(case: Case) -> Iterator[Check]:
    """Masked positions after every step, codes that may be drawn, and the length of a target."""
    for name, counts in case.io.items():
        found = re.fullmatch(r"T(\d+)_S(\d+)", name)
        if found is None:
            continue
        length, steps = int(found[1]), int(found[2])
        config = maskgct_config(steps, 2)
        left = [*unit_counts(config, make_plan(config), [length])[0][1:], 0]
        yield case.close(name, torch.tensor(left), counts)
    rows = case.io["topk"].tolist()
    kept = [
        maskgct_config(2, size, THRESHOLDS[i % len(THRESHOLDS)]).top_k for i, (size, _) in enumerate(rows)
    ]
    yield case.close("topk", torch.tensor(kept), case.io["topk"][:, 1])
    lengths = [target_frames(*row) for row in case.io["dur_in"].tolist()]
    yield case.close("dur_out", torch.tensor(lengths))


HANDLERS = {
    "metis_reverse": metis_reverse,
    "s2a_forward": s2a_forward,
    "s2a_loss": s2a_loss,
    "s2a_reverse": s2a_reverse,
    "schedules": schedules,
    "t2s_forward": t2s_forward,
    "t2s_loss": t2s_loss,
    "t2s_reverse": t2s_reverse,
}
