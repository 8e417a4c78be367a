"""Golden handlers of NeMo's FastConformer: offline, under chunk masks, and step by step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nar_speech.checkpoint import load_strict
from nar_speech.layers.fastconformer import FastConformerEncoder, FastConformerState
from nar_speech.models.nemo_official import convert_encoder

if TYPE_CHECKING:
    from tests.golden import Case, Check


def load_encoder(case: Case) -> FastConformerEncoder:
    """The recorded encoder with its weights, in eval mode."""
    input_size, config = convert_encoder(case.meta["config"], str(case.folder))
    encoder = FastConformerEncoder(input_size, config)
    load_strict(encoder, case.weights, where=case.folder)
    return encoder.eval()


def rows(x: Tensor, lengths: Tensor) -> list[Tensor]:
    """The valid part of each item of (B, T, D)."""
    return [item[:count] for item, count in zip(x, lengths.tolist(), strict=True)]


def compare(case: Case, name: str, got: list[Tensor], want: list[Tensor]) -> Iterator[Check]:
    """One check for each item."""
    yield case.equal(f"{name} items", len(got), len(want))
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        yield case.close(f"{name} item {number}", ours, theirs)


def _pre_encode(case: Case, encoder: FastConformerEncoder) -> Iterator[Check]:
    io = case.io
    x, lengths = encoder.pre_encode(io["feats"].transpose(1, 2), io["feat_lens"])
    yield case.close("pre_encode_lens", lengths)
    yield from compare(case, "pre_encode", rows(x, lengths), rows(io["pre_encode"], lengths))


def _alone(case: Case, encoder: FastConformerEncoder, **options: object) -> Iterator[Check]:
    """Every item of the batch equals the item alone."""
    feats, lengths = case.io["feats"].transpose(1, 2), case.io["feat_lens"]
    together, out_lengths = encoder(feats, lengths, **options)
    for row, frames in enumerate(lengths.tolist()):
        single, _ = encoder(feats[row : row + 1, :frames], lengths[row : row + 1], **options)
        yield case.close(f"item {row} alone", together[row, : out_lengths[row]], single[0])


@torch.no_grad()
def offline(case: Case) -> Iterator[Check]:
    """The encoder over whole utterances."""
    io, encoder = case.io, load_encoder(case)
    yield from _pre_encode(case, encoder)
    out, lengths = encoder(io["feats"].transpose(1, 2), io["feat_lens"])
    yield case.close("out_lens", lengths)
    yield from compare(case, "out", rows(out, lengths), rows(io["out"].transpose(1, 2), lengths))
    yield from _alone(case, encoder)


@torch.no_grad()
def streaming(case: Case) -> Iterator[Check]:
    """All contexts: masked, NeMo's steps with their caches, and our steps, which lose and leak nothing."""
    io, encoder = case.io, load_encoder(case)
    yield from _pre_encode(case, encoder)
    for name in sorted(io):
        setting = re.fullmatch(r"(ctx(-?\d+)_(-?\d+))_offline", name)
        if not setting:
            continue
        context = int(setting[2]), int(setting[3])
        out, lengths = encoder(io["feats"].transpose(1, 2), io["feat_lens"], context=context)
        yield case.close(f"{name}_lens", lengths)
        yield from compare(case, name, rows(out, lengths), rows(io[name].transpose(1, 2), lengths))
        yield from _alone(case, encoder, context=context)
        if context[1] < 0:
            continue  # nothing can be heard before the end
        if f"{setting[1]}_stream" in io:
            yield from _official_steps(case, encoder, setting[1], context)
        yield from _our_steps(case, encoder, setting[1], context, rows(out, lengths))


def _official_steps(
    case: Case, encoder: FastConformerEncoder, name: str, context: tuple[int, int]
) -> Iterator[Check]:
    """The recorded feeding, NeMo's defect at the start included; caches after the recorded steps."""
    io, feats, lengths = case.io, case.io["feats"].transpose(1, 2), case.io["feat_lens"]
    batch, steps = len(feats), io[f"{name}_steps"].tolist()
    chunking = encoder.chunking(context[1] + 1, context[0])
    options = {"grow": chunking.left < 0, "official_start": True}
    state, place = encoder.init_state(batch, chunking=chunking), 0
    recorded = io[f"{name}_stream"].transpose(1, 2)
    got: list[list[Tensor]] = [[] for _ in range(batch)]
    want: list[list[Tensor]] = [[] for _ in range(batch)]
    for number, (begin, fed, given, *numbers) in enumerate(steps):
        size = fed - (encoder.frame_stride + 1 if number else 0)  # without those that NeMo feeds again
        part = feats[:, begin : begin + size]
        part = torch.nn.functional.pad(part, (0, 0, 0, chunking.width - part.shape[1]))
        new, before = (lengths - begin).clamp(0, size), state
        y, counts, state = encoder.step(part, new, before, begin + size >= lengths, **options)
        theirs = torch.tensor(numbers[:batch])
        yield case.close(f"{name}_steps {number}", counts, theirs)
        for row, count in enumerate(theirs.tolist()):
            got[row].append(y[row, :count])
            want[row].append(recorded[row, place : place + count])
        place += given
        prefix = f"{name}_step{number}"
        if f"{prefix}_cache_last_channel" in io:
            # A stream that ends forgets its caches: look at them as if it went on.
            _, _, kept = encoder.step(part, new, before, False, **options)
            yield from _caches(case, encoder, prefix, kept, begin + size <= lengths)
    ends = [torch.cat(row) for row in got], [torch.cat(row) for row in want]
    yield from compare(case, f"{name}_stream", *ends)


def _caches(
    case: Case, encoder: FastConformerEncoder, prefix: str, state: FastConformerState, full: Tensor
) -> Iterator[Check]:
    """Of rows with a ``full`` chunk. NeMo keeps the attention inputs, we the keys and values made of them."""
    inputs, frames = case.io[f"{prefix}_cache_last_channel"], case.io[f"{prefix}_cache_last_time"]
    for row, count in enumerate(case.io[f"{prefix}_cache_len"].tolist()):
        if not full[row]:
            continue
        yield case.equal(f"{prefix}_cache_len {row}", int(state.count[row]), count)
        size = state.attention[0].shape[1]
        ours = torch.stack([cache[row, size - count :] for cache in state.attention])
        theirs = []
        for layer, kept in zip(encoder.layers, inputs[:, row], strict=True):
            kept = kept[kept.shape[0] - count :]
            theirs.append(torch.cat([layer.self_attn.linear_k(kept), layer.self_attn.linear_v(kept)], -1))
        yield case.close(f"{prefix}_cache_last_channel {row}", ours, torch.stack(theirs))
        ours = torch.stack([cache[row].T for cache in state.convolution])
        yield case.close(f"{prefix}_cache_last_time {row}", ours, frames[:, row])


def _our_steps(
    case: Case,
    encoder: FastConformerEncoder,
    name: str,
    context: tuple[int, int],
    masked: list[Tensor],
) -> Iterator[Check]:
    """Our default: every frame of every item, equal to the masked encoder."""
    feats, lengths = case.io["feats"].transpose(1, 2), case.io["feat_lens"]
    chunking = encoder.chunking(context[1] + 1, context[0])
    state = encoder.init_state(len(feats), chunking=chunking)
    out: list[list[Tensor]] = [[] for _ in masked]
    begin, size, ended = 0, chunking.first, torch.zeros(len(feats), dtype=torch.bool)
    while not ended.all():
        part = feats[:, begin : begin + size]
        part = torch.nn.functional.pad(part, (0, 0, 0, chunking.width - part.shape[1]))
        new = (lengths - begin).clamp(0, size)
        final = (new < size) & ~ended
        y, counts, state = encoder.step(part, new, state, final, grow=chunking.left < 0)
        for row, count in enumerate(counts.tolist()):
            out[row].append(y[row, : 0 if ended[row] else count])
        ended |= final
        begin, size = begin + size, chunking.later
    yield from compare(case, f"{name} ours", [torch.cat(row) for row in out], masked)


HANDLERS = {"fastconformer_offline": offline, "fastconformer_streaming": streaming}
