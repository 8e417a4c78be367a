"""Golden handlers of the system 'ctc': alignment and loss, prefix beam search, WeNet's encoder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from nar_speech.checkpoint import load_strict
from nar_speech.layers.conformer import ConformerEncoderConfig, chunk_from_draw
from nar_speech.layers.position import valid_mask
from nar_speech.losses.ctc import ctc_loss
from nar_speech.models.ctc import CtcConfig, CtcModel, ctc_model_loss
from nar_speech.models.ctc_official import RENAME
from nar_speech.search.align import _paths_at_once, forced_align, token_spans
from nar_speech.search.ctc import ContextGraph, CtcHypothesis, greedy, prefix_beam, token_borders
from nar_speech.search.rescore import attention_rescore

if TYPE_CHECKING:
    from tests.golden import Case, Check


def padded(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """(N, width) tensor of ragged rows, -1 behind their ends; wider if a row is longer."""
    width = max([width, *map(len, rows)])
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=dtype).reshape(-1, width)


def ragged(rows: torch.Tensor) -> list[tuple[int, ...]]:
    """Rows without their -1 padding."""
    return [tuple(value for value in row if value != -1) for row in rows.tolist()]


def ctc_align(case: Case) -> Iterator[Check]:
    """Forced alignment in both implementations, spans, and CTC losses with their gradient."""
    io, blank = case.io, case.meta["config"].get("blank", 0)
    log_probs, lengths = io["logp"], io["lens"]
    targets, target_lengths = io["target"], io["target_lens"]
    alignment = forced_align(log_probs, lengths, targets, target_lengths, blank)
    yield case.close("align", alignment.labels)
    yield case.close("align_logp", alignment.log_probs)
    yield case.close("path_score", alignment.scores)
    inside = valid_mask(target_lengths, targets.shape[1])
    batched = _paths_at_once(log_probs, lengths, targets.masked_fill(~inside, blank), target_lengths, blank)
    batched = batched.masked_fill(~valid_mask(lengths, log_probs.shape[1]), -1)
    yield case.close("align, batched search", batched, io["align"])
    spans = [(i, span) for i, item in enumerate(token_spans(alignment)) for span in item]
    yield case.close("spans", torch.tensor([[i, s.token, s.start, s.end] for i, s in spans]))
    yield case.close("span_scores", torch.tensor([span.score for _, span in spans]))
    if "best_path" in io:
        yield case.close("best_path", log_probs.argmax(-1))
    for reduction, name in (("none", "none"), ("token_mean", "mean"), ("sum", "sum")):
        if f"ctc_loss_{name}" not in io:
            continue
        leaf = log_probs.clone().requires_grad_()
        loss = ctc_loss(leaf, lengths, targets, target_lengths, blank, reduction, zero_infinity=False)
        yield case.close(f"ctc_loss_{name}", loss)
        loss.sum().backward()
        if f"ctc_grad_{name}" in io:
            yield case.close(f"ctc_grad_{name}", leaf.grad)


def nbest_checks(
    case: Case, name: str, got: Sequence[Sequence[CtcHypothesis]], counts: Sequence[int]
) -> Iterator[Check]:
    """Scores in order; tokens and times in order too, but for hypotheses whose scores tie within 1e-5."""
    tokens, scores = ragged(case.io[f"{name}_tokens"]), case.io[f"{name}_scores"]
    times = ragged(case.io[f"{name}_times"]) if f"{name}_times" in case.io else None
    possible = torch.isfinite(scores).tolist()  # ours drops sequences of probability zero
    start, want_tokens, want_times, mine, order = 0, [], [], [], []
    for count, hypotheses in zip(counts, got, strict=True):
        rows = [row for row in range(start, start + count) if possible[row]]
        start += count
        left = list(hypotheses)
        for row in rows:
            ties = [h for h in left if abs(h.score - scores[row].item()) < 1e-5 and h.tokens == tokens[row]]
            chosen = ties[0] if ties else (left[0] if left else None)
            if chosen is not None:
                left.remove(chosen)
            mine.append(chosen)
            order.append(row)
        yield case.equal(f"{name} number of hypotheses", len(hypotheses), len(rows))
    empty = CtcHypothesis((), float("nan"), (), ())
    mine = [h or empty for h in mine]
    want_tokens = [tokens[row] for row in order]
    yield case.equal(f"{name}_tokens", [h.tokens for h in mine], want_tokens)
    yield case.close(f"{name}_scores", torch.tensor([h.score for h in mine]), scores[order])
    if times is not None:
        want_times = [times[row] for row in order]
        yield case.equal(f"{name}_times", [h.times for h in mine], want_times)


def beam_search(case: Case) -> Iterator[Check]:
    """Greedy search, beams, phrase biasing with WeNet's habits, and the automaton itself."""
    io, conf = case.io, case.meta["config"]
    blank, log_probs, lengths = conf.get("blank", 0), io["logp"], io["lens"]
    hypotheses = greedy(log_probs, lengths, blank)
    yield case.close("greedy", padded([h.tokens for h in hypotheses], io["greedy"].shape[1]))
    peaks = [h.times for h in hypotheses]
    yield case.close("greedy_peak_times", padded(peaks, io["greedy_peak_times"].shape[1]))
    for name in io:
        item = re.fullmatch(r"greedy_timestamps_b(\d+)", name)
        if item:
            row, shift = int(item[1]), conf.get("frame_rate", 0.04)
            borders = token_borders(peaks[row], float(lengths[row]) * shift, shift)
            yield case.close(name, torch.tensor(borders).reshape(-1, 2))
    topk = conf.get("per_frame_topk")
    topk = topk if isinstance(topk, int) else None
    for name in [n.removesuffix("_tokens") for n in io if re.fullmatch(r"beam\d+_tokens", n)]:
        got = prefix_beam(log_probs, lengths, int(name.removeprefix("beam")), blank=blank, candidates=topk)
        yield from nbest_checks(case, name, got, io[f"{name}_counts"].tolist())
    if "ctx_phrases" not in io:
        return
    phrases = ragged(io["ctx_phrases"])
    if "ctx_tokens" in io:
        graph = ContextGraph(phrases, conf["context_score"], official=True)
        got = prefix_beam(log_probs, lengths, conf["beam"], blank=blank, candidates=topk, context=graph)
        yield from nbest_checks(case, "ctx", got, io["ctx_counts"].tolist())
        right = ContextGraph(phrases, conf["context_score"])
        got = prefix_beam(log_probs, lengths, conf["beam"], blank=blank, candidates=topk, context=right)
        yield from _corrected_context(case, got, right)
    if "walk_tokens" in io:
        graph = ContextGraph(phrases, conf["context_score"], official=True)
        scores, states = walk(graph, io["walk_tokens"].tolist())
        yield case.close("walk_scores", torch.tensor(scores, dtype=torch.float32))
        yield case.close("walk_states", torch.tensor(states))


def walk(graph: ContextGraph, tokens: Sequence[int]) -> tuple[list[float], list[int]]:
    """Score change and state after each token."""
    state, scores, states = np.array([graph.start]), [], []
    for token in tokens:
        score, state = graph.step(state, np.array([token]))
        scores.append(float(score[0]))
        states.append(int(state[0]))
    return scores, states


def _corrected_context(
    case: Case, got: Sequence[Sequence[CtcHypothesis]], graph: ContextGraph
) -> Iterator[Check]:
    """Our default: the score holds the whole context score, and the list is sorted by it."""
    differences, ordered = [0.0], True
    for hypotheses in got:
        for hypothesis in hypotheses:
            scores, states = walk(graph, hypothesis.tokens)
            last = np.array([states[-1] if states else graph.start])
            differences.append(sum(scores) + float(graph.finish(last)[0]) - hypothesis.context_score)
        values = [h.score for h in hypotheses]
        ordered &= values == sorted(values, reverse=True)
    zero = torch.zeros(len(differences))
    yield case.close("corrected context scores", torch.tensor(differences), zero)
    yield case.equal("corrected context order", ordered, True)


def wenet_model(case: Case) -> CtcModel:
    """The recorded model with its weights, in eval mode."""
    conf, meta = case.meta["config"], case.meta
    names = ConformerEncoderConfig.__dataclass_fields__
    encoder = {key: value for key, value in conf.items() if key in names}
    encoder["global_cmvn"] = "encoder.global_cmvn.mean" in case.weights
    encoder.setdefault("use_dynamic_chunk", True)
    right = conf.get("r_layers", 0)
    decoder = "none"
    if any(name.startswith("decoder.") for name in case.weights):
        decoder = "bitransformer" if right else "transformer"
    special = str(meta.get("special_tokens", ""))
    ids = {key: re.search(rf"{key}\W+(?:=\s*eos\W+)?(\d+)", special) for key in ("sos", "eos")}
    model = CtcModel(
        CtcConfig(
            input_size=conf["input_size"],
            vocab_size=conf["vocab"],
            encoder_conf=encoder,
            blank=conf.get("blank", 0),
            decoder=decoder,
            decoder_conf={
                "attention_heads": conf.get("dec_heads", conf["attention_heads"]),
                "linear_units": conf["dec_units"],
                "num_blocks": conf["dec_layers"],
                "r_num_blocks": right,
            }
            if decoder != "none"
            else {},
            ctc_weight=meta.get("ctc_weight", 1.0),
            lsm_weight=meta.get("lsm_weight", 0.0),
            reverse_weight=meta.get("reverse_weight", 0.0) if right else 0.0,
            **{key: int(found[1]) for key, found in ids.items() if found},
        )
    )
    load_strict(model, case.weights, RENAME, case.folder)
    return model.eval()


@torch.no_grad()
def wenet_encoder(case: Case) -> Iterator[Check]:
    """Full and chunk-masked encoder, streams, CTC, searches, rescoring, training loss."""
    io, model = case.io, wenet_model(case)
    feats, feat_lengths = io["feats"], io["feat_lens"]
    # The bias of a non-causal convolution leaks from WeNet's padding: the recorded batch needs its way.
    official = {} if model.encoder.config.causal else {"official_padding": True}
    out = model(feats, feat_lengths, **official)
    valid = io["enc_mask"].squeeze(1)
    yield case.close("enc_mask", valid_mask(out.lengths, valid.shape[1]).unsqueeze(1))
    yield case.close("enc_full", out.encoder_out[valid], io["enc_full"][valid])
    yield case.close("ctc_full", out.log_probs[valid], io["ctc_full"][valid])
    for name in io:
        setting = re.fullmatch(r"enc_chunk(\d+)_left(-?\d+)", name)
        if setting:
            chunks = {"chunk_size": int(setting[1]), "left_chunks": int(setting[2])}
            if not model.encoder.config.use_dynamic_chunk:  # WeNet takes the static size then
                del chunks["chunk_size"]
            got, _ = model.encode(feats, feat_lengths, **chunks, **official)
            yield case.close(name, got[valid], io[name][valid])
    yield from _alone(case, model)
    for name in io:
        setting = re.fullmatch(r"stream_left(-?\d+)_out", name)
        if setting:
            yield from _wenet_stream(case, model, int(setting[1]))
    if "greedy" in io:
        hypotheses = greedy(out.log_probs, out.lengths, model.config.blank)
        yield case.close("greedy", padded([h.tokens for h in hypotheses], io["greedy"].shape[1]))
    if "beam_tokens" in io:
        count = len(io["beam_tokens"]) // len(feats)
        words = re.search(r"prefix beam (\d+)", str(case.meta.get("description", "")))
        beam = int(words[1]) if words else count
        nbest = prefix_beam(out.log_probs, out.lengths, beam, blank=model.config.blank)
        yield from nbest_checks(case, "beam", nbest, [count] * len(feats))
        yield from _rescoring(case, model, out.encoder_out, out.lengths, nbest)
    if "loss" in io:
        chunks = {}
        if "chunk_draw" in io:  # the chunk size, and the left chunks where these are drawn too
            draws = io["chunk_draw"].tolist()
            size = chunk_from_draw(draws[0], valid.shape[1], model.encoder.max_chunk)
            chunks = {"chunk_size": size, "left_chunks": draws[1] if len(draws) > 1 else -1}
        got = ctc_model_loss(
            model, feats, feat_lengths, io["target"], io["target_lens"], **chunks, **official
        )
        for name in ("loss", "loss_ctc", "loss_att"):
            if name in io:
                yield case.close(name, got[name])


def _wenet_stream(case: Case, model: CtcModel, left_chunks: int) -> Iterator[Check]:
    """The whole batch in steps: the recorded row and its caches, every row against the masked encoder."""
    io, encoder = case.io, model.encoder
    feats, lengths, row = io["feats"], io["feat_lens"], int(io["stream_index"])
    size = case.meta["chunk_size"]
    chunking = encoder.chunking(size, left_chunks * size)
    grow = left_chunks < 0
    state, parts, ends = model.init_state(len(feats), chunking=chunking), [], []
    name = f"stream_left{left_chunks}"
    while not ends or ends[-1] < feats.shape[1]:
        begin, end = ends[-1] if ends else 0, (ends[-1] + chunking.later) if ends else chunking.first
        number, before = len(ends), state
        new = (lengths - begin).clamp(0, end - begin)
        x = feats[:, begin:end]
        x = torch.nn.functional.pad(x, (0, 0, 0, chunking.width - x.shape[1]))
        out, state = model.step(x, new, before, end >= lengths, grow=grow)
        parts.append([out.encoder_out[i, :n] for i, n in enumerate(out.lengths.tolist())])
        ends.append(end)
        if f"{name}_chunk{number}_att_cache" in io:
            # A stream that ends forgets its caches: look at them as if it went on.
            kept = model.step(x, new, before, False, grow=grow)[1]
            count = int(kept.count[row])
            split = torch.stack([cache[row] for cache in kept.attention])
            split = split[:, split.shape[1] - count :].unflatten(-1, (encoder.config.attention_heads, -1))
            d_k = encoder.output_size // encoder.config.attention_heads
            got = torch.cat([split[..., :d_k], split[..., -d_k:]], -1).transpose(1, 2)
            yield case.close(f"{name}_chunk{number}_att_cache", got)
            if io[f"{name}_chunk{number}_cnn_cache"].numel():
                got = torch.stack([cache[row].T for cache in kept.convolution]).unsqueeze(1)
                yield case.close(f"{name}_chunk{number}_cnn_cache", got)
    recorded = io["stream_starts_len"][:, 1]
    fed = torch.tensor(ends[: len(recorded)]).clamp(max=lengths[row])
    yield case.close(f"{name} windows", fed, recorded)
    streams = [torch.cat(row_parts) for row_parts in zip(*parts, strict=True)]
    yield case.close(f"{name}_out", streams[row][None])
    masked, out_lengths = encoder(feats, lengths, chunk_size=size, left_chunks=left_chunks)
    for i, stream in enumerate(streams):
        yield case.close(f"{name} item {i} masked", stream, masked[i, : out_lengths[i]])


def _alone(case: Case, model: CtcModel) -> Iterator[Check]:
    """Our default padding: every item of the batch equals the item alone, the longest the recorded one."""
    feats, lengths = case.io["feats"], case.io["feat_lens"]
    together, out_lengths = model.encode(feats, lengths)
    for row, frames in enumerate(lengths.tolist()):
        single, _ = model.encode(feats[row : row + 1, :frames], lengths[row : row + 1])
        size = int(out_lengths[row])
        yield case.close(f"item {row} alone", together[row, :size], single[0])
        if frames == feats.shape[1]:
            yield case.close(f"item {row} recorded", single[0], case.io["enc_full"][row, :size])


def _rescoring(
    case: Case,
    model: CtcModel,
    encoder_out: torch.Tensor,
    lengths: torch.Tensor,
    nbest: Sequence[Sequence[CtcHypothesis]],
) -> Iterator[Check]:
    words = str(case.meta.get("description", {}).get("rescore_*", ""))
    found = re.search(r"ctc_weight ([\d.]+)", words)
    ctc_weight = float(found[1]) if found else 0.5

    def score(rows: torch.Tensor, tokens: torch.Tensor, token_lengths: torch.Tensor):
        return model.decode_tokens(encoder_out[rows], lengths[rows], tokens, token_lengths)

    for name in [n for n in case.io if re.fullmatch(r"rescore_rw[\d.]+_tokens", n)]:
        prefix = name.removesuffix("_tokens")
        weight = float(prefix.removeprefix("rescore_rw"))
        best = attention_rescore(nbest, score, model.eos, ctc_weight, weight)
        width = case.io[name].shape[1]
        yield case.close(name, padded([h.tokens for h, _ in best], width))
        yield case.close(f"{prefix}_score", torch.tensor([h.score for h, _ in best]))
        yield case.close(f"{prefix}_confidence", torch.tensor([c for _, c in best]))
        sure = padded([h.confidences for h, _ in best], width, torch.float32)
        yield case.close(f"{prefix}_token_conf", sure)


HANDLERS = {"ctc_align": ctc_align, "prefix_beam": beam_search, "wenet_encoder": wenet_encoder}
