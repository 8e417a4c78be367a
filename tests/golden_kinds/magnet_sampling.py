"""Golden handlers of MAGNeT's sampling: whole generations step by step, the hybrid mode, rescoring."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nar_speech.models.magnet import Magnet
from nar_speech.sampling.autoregressive import AutoregressiveConfig, autoregressive_sample
from nar_speech.sampling.codebooks import CodebookConfig, sample_codebooks
from nar_speech.sampling.config import MaskedConfig, magnet_config
from nar_speech.sampling.draws import RecordedDraws
from nar_speech.sampling.masked import masked_sample
from nar_speech.sampling.step import PredictCodebook, StepInfo
from nar_speech.sampling.trace import Trace
from tests.golden_kinds.magnet import magnet_network, musicgen_network

if TYPE_CHECKING:
    from tests.golden import Case, Check


def official_config(conf: Mapping[str, Any], call: Mapping[str, Any]) -> CodebookConfig:
    """The official rules, quirks included, of a recorded call; what it does not say is the API's default."""
    rules = magnet_config(
        span=conf["span_len"],
        arrangement=call.get("span_arrangement", "nonoverlap"),
        scoring=call.get("span_scoring", "max"),
        score_fixed=True,
        temperature=call.get("temp", 3.0),
        anneal="steps_left" if call.get("anneal_temp", True) else "none",
        greedy=not call.get("use_sampling", True),
        top_k=call.get("top_k", 0),
        top_p=call.get("top_p", 0.9),
        guidance=call.get("max_cfg_coef", 10.0),
        guidance_end=call.get("min_cfg_coef", 1.0),
    )
    return CodebookConfig(tuple(call.get("decoding_steps", (20, 10, 10, 10))), rules, cut=True)


def official_predictor(network: Magnet, hidden: Tensor, mask: Tensor) -> PredictCodebook:
    """One doubled batch in every step, padded text attended to; ``hidden`` (2B, L, W), null rows last."""

    def predict(tokens: Tensor, info: StepInfo) -> tuple[Tensor, Tensor]:
        rows = torch.cat([info.rows, info.rows + len(hidden) // 2])
        logits = network(
            tokens.repeat(2, 1, 1),
            None,
            hidden[rows],
            mask[rows],
            info.stage,
            only_stage=True,
            official_padding=True,
        )
        return logits.chunk(2)

    return predict


def _with_prompt(prompt: Tensor | None, batch: int, streams: int, frames: int) -> tuple[Tensor, Tensor]:
    """Codes (B, K, T) that begin with the prompt, and which of them are given (B, T)."""
    codes = torch.zeros(batch, streams, frames, dtype=torch.int64)
    given = torch.zeros(batch, frames, dtype=torch.bool)
    if prompt is not None:
        codes[..., : prompt.shape[2]] = prompt
        given[:, : prompt.shape[2]] = True
    return codes, given


def generate(case: Case) -> Iterator[Check]:
    """Inputs and logits of every call, and the codes; then the same from the recorded logits alone."""
    io, conf, call = case.io, case.meta["config"], case.meta["generate"]
    network = magnet_network(conf, case.weights, case.folder)
    batch, frames = call["batch"], call["max_gen_len"]
    codes, given = _with_prompt(io.get("prompt"), batch, conf["n_q"], frames)
    lengths = torch.full((batch,), frames)
    inner = official_predictor(network, io["t5_hidden"], io["t5_mask"])
    inputs: list[Tensor] = []
    stages: list[int] = []
    outputs: list[Tensor] = []

    def watched(tokens: Tensor, info: StepInfo) -> tuple[Tensor, Tensor]:
        parts = inner(tokens, info)
        inputs.append(tokens.repeat(2, 1, 1))
        stages.append(info.stage)
        outputs.append(torch.cat(parts))
        return parts

    def replayed(tokens: Tensor, info: StepInfo) -> tuple[Tensor, Tensor]:
        return io["step_stage_logits"][info.call].chunk(2)

    for name, predict in (("tokens", watched), ("tokens of the recorded logits", replayed)):
        draws = RecordedDraws([e[:, 0] for e in io["exp_draws"]]) if "exp_draws" in io else None
        with torch.inference_mode():
            result = sample_codebooks(
                predict, codes, given, lengths, official_config(conf, call), draws, mask_id=conf["card"]
            )
        yield case.close(name, result.tokens, io["tokens"])
    yield case.close("step_stage", torch.tensor(stages))
    yield case.close("step_sequence", torch.stack(inputs))
    if isinstance(case.meta["tolerance"], dict):  # words per kind of tensor
        words = case.meta["tolerance"].get("logits", "")
        numbers = dict(re.findall(r"(atol|rtol) ([\d.e+-]+)", words))
        case.atol, case.rtol = float(numbers.get("atol", case.atol)), float(numbers.get("rtol", case.rtol))
    yield case.close("step_stage_logits", torch.stack(outputs))


def hybrid(case: Case) -> Iterator[Check]:
    """The autoregressive model begins the clip, MAGNeT goes on; numbers stand in the case's note."""
    io, note = case.io, case.meta["note"]
    first, second = case.meta["config_ar"], case.meta["config_magnet"]
    parts = {
        prefix: {name.removeprefix(prefix): t for name, t in case.weights.items() if name.startswith(prefix)}
        for prefix in ("ar.", "magnet.")
    }
    partner = musicgen_network(first, parts["ar."], case.folder)
    network = magnet_network(second, parts["magnet."], case.folder)
    text, batch = (io["t5_hidden"], io["t5_mask"]), len(io["tokens"])
    guidance = _numbers(r"CFG ([\d.]+) for", note, [3.0])[0]
    step = partner.sampler(
        text[0][:batch], text[1][:batch], (text[0][batch:], text[1][batch:]), official_padding=True
    )
    prompt = autoregressive_sample(
        step,
        torch.full((batch,), io["ar_prompt"].shape[2]),
        partner.config.lags,
        partner.config.mask_id,
        AutoregressiveConfig(sample=False, guidance=guidance),
    )
    yield case.close("ar_prompt", prompt)
    most, least = _numbers(r"CFG ([\d.]+)->([\d.]+)", note, [10.0, 1.0])
    call = {
        "decoding_steps": [int(n) for n in re.search(r"steps \[([\d, ]+)\]", note)[1].split(",")],
        "use_sampling": False,
        "max_cfg_coef": most,
        "min_cfg_coef": least,
        "span_scoring": "prod" if re.search(r"\bprod\b", note) else "max",
        "span_arrangement": "stride1" if "stride1" in note else "nonoverlap",
    }
    frames = io["tokens"].shape[2]
    codes, given = _with_prompt(prompt, batch, second["n_q"], frames)
    with torch.inference_mode():
        result = sample_codebooks(
            official_predictor(network, *text),
            codes,
            given,
            torch.full((batch,), frames),
            official_config(second, call),
            None,
            mask_id=second["card"],
        )
    yield case.close("tokens", result.tokens)


def _numbers(pattern: str, note: str, default: list[float]) -> list[float]:
    found = re.search(pattern, note)
    return [float(text.rstrip(".")) for text in found.groups()] if found else default


def rescore(case: Case) -> Iterator[Check]:
    """The external probabilities, and the mixture as the loop makes it of them and of the model's own."""
    io, stage, weight = case.io, case.meta["stage"], case.meta["w"]
    network = musicgen_network(case.meta["config"], case.weights, case.folder)
    codes, own = io["codes"], io["magnet_token_prob"]
    text, size = (io["t5_hidden"], io["t5_mask"]), case.meta["config"]["card"]

    def external(tokens: Tensor, info: StepInfo) -> Tensor:
        whole = codes.clone()
        whole[:, info.stage] = tokens
        with torch.inference_mode():
            return network.token_probabilities(whole, None, *text, info.stage, official_padding=True)

    yield from _known(case, "rescorer_token_prob", external(codes[:, stage], _Stage(stage)))
    # A distribution in which the recorded token has the recorded probability, and draws that choose it.
    target = torch.nn.functional.one_hot(codes[:, stage], size).bool()
    logits = torch.where(target, own[..., None], (1 - own[..., None]) / (size - 1)).log()
    draws = RecordedDraws([torch.where(target, 1e-20, 1.0)])
    shape, trace = codes[:, stage].shape, Trace()
    result = masked_sample(
        lambda tokens, info: (logits, None),
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.bool),
        torch.full(shape[:1], shape[1]),
        MaskedConfig(steps=1, rescore_weight=weight),
        draws,
        mask_id=size,
        stage=stage,
        rescore=external,
        trace=trace,
    )
    yield case.close("codes", result.tokens, codes[:, stage])
    yield from _known(case, "rescored", trace.steps[0].confidence)


def _known(case: Case, name: str, got: Tensor) -> Iterator[Check]:
    """The official delay pattern ends with its first stream and has no logits (NaN) for the last codes of the
    others; ours has.
    """
    known = ~case.io[name].isnan()
    yield case.close(name, got[known], case.io[name][known])
    yield case.equal(f"{name}: probabilities everywhere", bool(((got >= 0) & (got <= 1)).all()), True)


class _Stage:
    """Of a StepInfo, what the rescorer reads."""

    def __init__(self, stage: int):
        self.stage = stage


HANDLERS = {"generate": generate, "hybrid": hybrid, "rescore": rescore}
