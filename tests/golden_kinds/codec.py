"""Golden handlers of the system 'codec': EnCodec (audiocraft's and transformers'), DAC, Mimi, Vocos.

Besides the recorded outputs every case checks what they imply for us: a stream of uneven pieces gives the
tokens and the sound of the whole, and a row of the batch gives what it gives alone.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nar_speech.checkpoint import load_strict
from nar_speech.codec import dac, encodec, mimi, vocos
from nar_speech.codec.base import Codec
from nar_speech.codec.vocos_heads import HeadConfig
from nar_speech.config import from_dict
from nar_speech.types import Codes

if TYPE_CHECKING:
    from tests.golden import Case, Check


def tolerances(case: Case) -> dict[str, float]:
    """The absolute tolerance of each named output."""
    found = {}
    for name, words in (case.meta.get("tolerance") or {}).items():
        number = re.search(r"atol ([0-9.e-]+)", words)
        if number:
            found[name] = float(number[1])
    return found


def close(case: Case, name: str, got: Tensor, kind: str, want: Tensor | None = None) -> Check:
    """Compare within the tolerance of this kind of output, scaled by the deviation of what is expected."""
    want = case.io[name] if want is None else want
    limits = tolerances(case)
    limit = limits.get(kind, max(limits.values(), default=2e-4))
    case.atol, case.rtol = limit, 0.0
    spread = float(want.double().std()) if want.is_floating_point() and want.numel() > 1 else 1.0
    return case.close(name, got, want, max(1.0, spread))


def codes_of(codec: Codec, tokens: Tensor, scales: Tensor | None = None) -> Codes:
    """Codes of a batch of full length whose number of samples is not known."""
    lengths = torch.full((tokens.shape[0],), tokens.shape[2])
    return Codes(tokens, lengths, codec.sample_rate, None, scales, codec.chunk_frames, codec.name)


def uneven(length: int, unit: int) -> Iterator[tuple[int, int]]:
    """Borders of pieces that fit no frame; some are empty."""
    sizes, begin, turn = (unit // 3 + 1, 0, 2 * unit + 5, 1, unit), 0, 0
    while begin < length or not turn:
        size = sizes[turn % len(sizes)]
        yield begin, min(begin + size, length)
        begin, turn = begin + size, turn + 1


def stream_encode(codec: Codec, waves: Tensor, count: int) -> tuple[Tensor, object]:
    """Tokens of uneven pieces, and the last state."""
    state = codec.init_encoder(waves.shape[0], count)
    parts = []
    for begin, end in uneven(waves.shape[2], codec.hop):
        part, state = codec.encode_step(waves[:, :, begin:end], state)
        parts.append(part)
    part, state = codec.encode_step(waves[:, :, :0], state, final=True)
    return torch.cat([*parts, part], 2), state


def stream_decode(codec: Codec, tokens: Tensor, scales: Tensor | None = None) -> Tensor:
    """Sound of uneven pieces."""
    state = codec.init_decoder(tokens.shape[0])
    if scales is not None:
        state = codec.give_scales(state, scales)
    parts = []
    for begin, end in uneven(tokens.shape[2], 4):
        part, state = codec.decode_step(tokens[:, :, begin:end], state)
        parts.append(part)
    part, _ = codec.decode_step(tokens[:, :, :0], state, final=True)
    return torch.cat([*parts, part], 2)


def consequences(case: Case, codec: Codec, waves: Tensor, count: int) -> Iterator[Check]:
    """Streams give the whole, and rows of the batch what they give alone.

    In double precision: with the random weights of some cases roundings of float32 grow to a thousandth.
    """
    codec = copy.deepcopy(codec).double()
    waves = waves.double()
    codes = codec.encode(waves, num_codebooks=count)
    sound = codec.decode(dataclasses.replace(codes, samples=None))[0]
    streamed, state = stream_encode(codec, waves, count)
    yield case.equal(f"{count} codebooks, stream: tokens", bool(torch.equal(streamed, codes.tokens)), True)
    got = stream_decode(codec, codes.tokens, getattr(state, "scales", None))
    yield close(case, f"{count} codebooks, stream: sound", got, "wav", sound)
    single = codec.encode(waves[:1], num_codebooks=count)
    yield case.equal("row alone: tokens", bool(torch.equal(single.tokens, codes.tokens[:1])), True)


def named(case: Case, pattern: str) -> list[tuple[str, re.Match[str]]]:
    """Recorded tensors whose name matches."""
    found = [(name, re.fullmatch(pattern, name)) for name in case.io]
    return [(name, match) for name, match in found if match]


def encodec_audiocraft(case: Case) -> Iterator[Check]:
    """Latents, codes and sound by number of codebooks; the reconstruction trimmed to the input."""
    io, c = case.io, case.meta["config"]
    config, lstm = encodec.audiocraft_config(
        c, c["sample_rate"], c["channels"], c["n_q"], c["bins"], c.get("renormalize", False)
    )
    codec = encodec.EncodecCodec(config, lstm)
    load_strict(codec.model, encodec.rename(case.weights, "weights"))
    codec.fold()
    waves = io["wav"]
    if "latent" in io:
        scale = 1.0
        if codec.has_scales:
            scale = waves.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + encodec.SCALE_FLOOR
        with torch.no_grad():
            yield close(case, "latent", codec.model.encoder(waves / scale), "latent")
    for name, match in named(case, r"codes\.nq(\d+)"):
        count = int(match[1])
        codes = codec.encode(waves, num_codebooks=count)
        yield close(case, name, codes.tokens, "codes")
        if "scale" in io:
            yield close(case, "scale", codes.scales, "latent", io["scale"].reshape(codes.scales.shape))
        if f"quantized.nq{count}" in io:
            yield close(case, f"quantized.nq{count}", codec.latents(io[name]), "latent")
        sound = codec.decode(codes_of(codec, io[name], codes.scales))[0]
        if f"wav_out.nq{count}" in io:
            yield close(case, f"wav_out.nq{count}", sound, "wav")
        yield from consequences(case, codec, waves, count)
    if "forward.x" in io:
        yield close(case, "forward.x", codec.decode(codec.encode(waves))[0], "wav")
    if "random_codes_wav" in io:
        tokens = io["random_codes"]
        scales = torch.ones(tokens.shape[0], 1) if codec.has_scales else None
        yield close(case, "random_codes_wav", codec.decode(codes_of(codec, tokens, scales))[0], "wav")


def encodec_hf(case: Case) -> Iterator[Check]:
    """Codes, scales and sound by bandwidth, in one piece or in chunks.

    The official batch codes the padding of its shorter rows: so recorded, and compared with rows that are
    silent there. Ours leaves it away; then a row gives what it gives alone.
    """
    io = case.io
    codec = encodec.EncodecCodec(case.meta["config"])
    load_strict(codec.model, encodec.rename(case.weights, "weights"))
    codec.fold()
    waves, lengths = io["wav"], None
    if "padding_mask" in io:
        mask = io["padding_mask"].reshape(waves.shape[0], -1, waves.shape[2])[:, :1].bool()
        waves, lengths = waves * mask, mask.sum(2)[:, 0]
    for name, match in named(case, r"codes\.bw([\d.]+)"):
        key = match[1]
        count = codec.codebooks_for(float(key))
        codes = codec.encode(waves, num_codebooks=count)
        chunks, size = io[name].shape[0], io[name].shape[3]
        short = int(io[f"last_frame_pad.bw{key}"]) if f"last_frame_pad.bw{key}" in io else 0
        frames = torch.nn.functional.pad(codes.tokens, (0, chunks * size - codes.tokens.shape[2]))
        yield case.equal(f"{name}: padding of the last chunk", chunks * size - codes.tokens.shape[2], short)
        yield close(case, name, frames.unflatten(2, (chunks, size)).permute(2, 0, 1, 3), "codes")
        if f"scales.bw{key}" in io:
            scales = codes.scales.T.reshape(io[f"scales.bw{key}"].shape)
            yield close(case, f"scales.bw{key}", scales, "wav")
        tokens = io[name].permute(1, 2, 0, 3).flatten(2)[:, :, : chunks * size - short]
        sound = codec.decode(codes_of(codec, tokens, codes.scales))[0]
        trimmed = sound if lengths is None else sound[:, :, : waves.shape[2]]  # official: to the mask
        yield close(case, f"wav_out.bw{key}", trimmed, "wav")
        yield from consequences(case, codec, waves, count)
        if lengths is not None:
            yield from ragged(case, codec, waves, lengths, count)


def ragged(case: Case, codec: Codec, waves: Tensor, lengths: Tensor, count: int) -> Iterator[Check]:
    """Rows of different lengths give what each gives alone."""
    batch = codec.encode(waves, lengths, count)
    sound, ends = codec.decode(batch)
    for row, length in enumerate(lengths.tolist()):
        alone = codec.encode(waves[row : row + 1, :, :length], num_codebooks=count)
        frames = int(batch.lengths[row])
        same = torch.equal(batch.tokens[row : row + 1, :, :frames], alone.tokens)
        yield case.equal(f"row {row} of a ragged batch: tokens", same, True)
        want = codec.decode(alone)[0]
        got = sound[row : row + 1, :, : int(ends[row])]
        yield close(case, f"row {row} of a ragged batch: sound", got, "wav", want)


def dac_official(case: Case) -> Iterator[Check]:
    """Encoder output, codes, projected inputs, quantised sum and sound by number of codebooks.

    The sound is of the quantised sum as the encoder has it: of the codes' own vectors it differs in the last
    bits, which the random weights of a case may make audible.
    """
    io = case.io
    codec = dac.DacCodec(dac.official_config(case.meta["config"]))
    load_strict(codec.model, dac.rename(case.weights, codec.blocks, "weights"))
    with torch.no_grad():
        hidden = codec.model.encoder(io["wav"])
    if "encoder_out" in io:
        yield close(case, "encoder_out", hidden, "z")
    for name, match in named(case, r"codes\.nq(\d+)"):
        count = int(match[1])
        yield close(case, name, codec.encode(io["wav"], num_codebooks=count).tokens, "codes")
        with torch.no_grad():
            _, inputs, total = codec.quantize_levels(hidden, count)
        yield close(case, f"latents.nq{count}", inputs, "z")
        yield close(case, f"z.nq{count}", total, "z")
        yield close(case, f"z_from_codes.nq{count}", codec.latents(io[name]), "z")
        yield close(case, f"wav_out.nq{count}", codec.decode_latents(total), "wav")
        yield from consequences(case, codec, io["wav"], count)


def mimi_hf(case: Case) -> Iterator[Check]:
    """Latents, codes and sound by number of codebooks; the codes of whole chunks as a stream."""
    io = case.io
    codec = mimi.MimiCodec(case.meta["config"])
    load_strict(codec.model, mimi.rename(case.weights))
    codec.forget_vectors()
    if "latents" in io:
        with torch.no_grad():
            yield close(case, "latents", codec.model.encoder(io["wav"]).latents, "wav")
    for name, match in named(case, r"codes\.nq(\d+)"):
        count = int(match[1])
        yield close(case, name, codec.encode(io["wav"], num_codebooks=count).tokens, "codes")
        sound = codec.decode(codes_of(codec, io[name]))[0]
        yield close(case, f"wav_out.nq{count}", sound, "wav")
        yield from consequences(case, codec, io["wav"], count)
        if count == codec.num_codebooks and "quantized" in io:
            yield close(case, "quantized", codec.latents(io[name]), "wav")
        state, parts = codec.init_decoder(io[name].shape[0]), []
        for frame in range(io[name].shape[2]):
            part, state = codec.decode_step(io[name][:, :, frame : frame + 1], state)
            yield case.equal(f"frame {frame} alone gives a frame", part.shape[2], codec.hop)
            parts.append(part)
        yield close(case, f"wav_out.nq{count}, frame by frame", torch.cat(parts, 2), "wav", sound)
    if "stream_codes" in io:
        size, parts = case.meta["chunk"], []
        state = codec.init_encoder(io["wav"].shape[0], io["stream_codes"].shape[1])
        for begin in range(0, io["wav"].shape[2], size):
            part, state = codec.encode_step(io["wav"][:, :, begin : begin + size], state)
            parts.append(part)
        yield close(case, "stream_codes", torch.cat(parts, 2), "codes")


def vocos_case(case: Case) -> Iterator[Check]:
    """Features, backbone and sound, for every bandwidth where there are several; streams and single rows."""
    io, c = case.io, case.meta["config"]
    kinds = {"istft": "istft", "symexp": "symexp", "imdct_symexp": "symexp", "cos": "cos", "imdct_cos": "cos"}
    config = vocos.VocosConfig(
        from_dict(vocos.BackboneConfig, c["backbone"]),
        from_dict(HeadConfig, {"kind": kinds[c["head_type"]], **c["head"]}),
        from_dict(vocos.MelConfig, c["mel"]) if c.get("mel") else None,
    )
    model = vocos.Vocos(config)
    load_strict(model, case.weights, vocos.RENAME)
    model.eval().requires_grad_(False)
    if "mel" in io and "audio" in io:
        yield close(case, "mel", model.features(io["audio"]), "spec")
    for name, match in named(case, r"wav(?:\.bw(\d+))?"):
        bandwidth = None if match[1] is None else int(match[1])
        given = None if bandwidth is None else torch.full((io["features"].shape[0],), bandwidth)
        suffix = "" if bandwidth is None else f".bw{bandwidth}"
        if f"backbone{suffix}" in io:
            yield close(case, f"backbone{suffix}", model.backbone(io["features"], given), "spec")
        waves = model(io["features"], bandwidth=bandwidth)[0]
        yield close(case, name, waves, "wav")
        state, parts = model.init_state(io["features"].shape[0], bandwidth), []
        for begin, end in uneven(io["features"].shape[2], 3):
            part, state = model.step(io["features"][:, :, begin:end], state)
            parts.append(part)
        parts.append(model.step(io["features"][:, :, :0], state, final=True)[0])
        yield close(case, f"{name}: stream", torch.cat(parts, 1), "wav", waves)
        lengths = torch.full((io["features"].shape[0],), io["features"].shape[2])
        lengths[0] = lengths[0] - 5 if lengths[0] > 5 else lengths[0]
        alone = model(io["features"][:1, :, : lengths[0]], bandwidth=bandwidth)[0]
        ragged_waves, ends = model(io["features"], lengths, bandwidth)
        yield close(case, f"{name}: shorter row", ragged_waves[:1, : ends[0]], "wav", alone)


HANDLERS = {
    "vocos": vocos_case,
    "dac": dac_official,
    "mimi": mimi_hf,
    "encodec_audiocraft": encodec_audiocraft,
    "encodec_hf": encodec_hf,
}
