"""Golden handlers of MaskGCT's codecs: semantic codec, quantizer, acoustic encoder and decoders.

Besides the recorded outputs they check what these imply for us: a stream of uneven pieces gives the whole,
and a row of a batch of several lengths what it gives alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nar_speech.checkpoint import load_strict
from nar_speech.codec.fvq import FvqConfig, ResidualFactorizedQuantizer
from nar_speech.codec.maskgct import (
    DecoderConfig,
    EncoderConfig,
    MaskGCTCodec,
    MaskGCTCodecConfig,
)
from nar_speech.codec.repcodec import RepCodec, RepCodecConfig
from nar_speech.codec.stream import Op
from nar_speech.codec.vocos import Vocos
from nar_speech.codec.weight_norm import fold
from nar_speech.config import from_dict
from nar_speech.types import Codes
from tests.golden_kinds.codec import uneven

if TYPE_CHECKING:
    from tests.golden import Case, Check

# Of official configurations: for quantizers of other types, and a layer that the official code leaves out.
UNUSED = ("codebook_type", "decay", "eps", "kmeans_init", "kmeans_iters", "threshold_ema_dead_code")
UNUSED += ("weight_init", "downsample_scale", "in_channel")


def used(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say something about the network."""
    return {key: value for key, value in config.items() if key not in UNUSED}


def close(case: Case, name: str, got: Tensor, want: Tensor | None = None) -> Check:
    """Compare within the tolerance stated for this output, or for all."""
    stated = re.findall(r"(\w+) atol ([\d.e-]+)(?: rtol ([\d.e-]+))?", str(case.meta.get("tolerance")))
    limits = {title: (float(atol), float(rtol or 0)) for title, atol, rtol in stated}
    if limits:
        case.atol, case.rtol = limits.get(name, next(iter(limits.values())))
    return case.close(name, got, want)


def streamed(op: Op, x: Tensor, unit: int) -> Tensor:
    """What an operator gives for (B, C, N) in uneven pieces."""
    state, parts = op.init(x.shape[0], x), []
    for begin, end in uneven(x.shape[2], unit):
        part, state = op.step(x[:, :, begin:end], state, False)
        parts.append(part)
    parts.append(op.step(x[:, :, :0], state, True)[0])
    return torch.cat(parts, 2)


def shorter(case: Case, length: int, batch: int) -> Tensor:
    """Lengths (B,) of which all but the last one are shorter than ``length``."""
    return torch.tensor([max(length - 3 * (batch - 1 - row), 1) for row in range(batch)])


@torch.no_grad()
def semantic_codec(case: Case) -> Iterator[Check]:
    """Codes and features in evaluation mode, the training terms, rows of several lengths."""
    io = case.io
    codec = RepCodec(from_dict(RepCodecConfig, used(case.meta["config"])))
    load_strict(codec, case.weights)
    features = io["features"]
    batch, frames, _ = features.shape
    output = codec(features)
    yield close(case, "train_codebook_loss", output.quantized.loss)
    yield close(case, "train_x_rec", output.features)
    yield close(case, "x_rec", output.features)
    fold(codec)
    latents = codec.analyse(features)
    yield close(case, "encoder_out", latents.transpose(1, 2))
    tokens = codec.encode(features)
    yield close(case, "codes", tokens[:, 0] if io["codes"].dim() == 2 else tokens.transpose(0, 1))
    yield close(case, "quantized", codec.quantizer.encode(latents)[1].transpose(1, 2))
    recorded = io["codes"][:, None] if io["codes"].dim() == 2 else io["codes"].transpose(0, 1)
    yield close(case, "decoded_from_codes", codec.decode(recorded))
    lengths = shorter(case, frames, batch)
    ragged, decoded = codec.encode(features, lengths), codec.decode(recorded, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = codec.encode(features[row : row + 1, :length])
        yield close(case, f"row {row} of a ragged batch: codes", ragged[row : row + 1, :, :length], alone)
        alone = codec.decode(recorded[row : row + 1, :, :length])
        yield close(case, f"row {row} of a ragged batch", decoded[row : row + 1, :length], alone)


@torch.no_grad()
def rvq(case: Case) -> Iterator[Check]:
    """Codes and sums by number of levels, and the training terms under the recorded draw."""
    io, c = case.io, case.meta["config"]
    quantizer = ResidualFactorizedQuantizer(from_dict(FvqConfig, used(c)))
    load_strict(quantizer, case.weights)
    latent = io["latent"]
    tokens, total = quantizer.encode(latent)
    yield close(case, "codes", tokens.transpose(0, 1))
    yield close(case, "quantized", total)
    levels = zip(quantizer.quantizers, io["codes"], strict=True)
    yield close(case, "all_quantized", torch.stack([level.decode(chosen) for level, chosen in levels]))
    yield close(case, "emb_from_codes", quantizer.decode(io["codes"].transpose(0, 1)))
    if "codes_partial" in io:
        count = io["codes_partial"].shape[0]
        tokens, total = quantizer.encode(latent, count)
        yield close(case, "codes_partial", tokens.transpose(0, 1))
        yield close(case, "quantized_partial", total)
        part = quantizer.decode(io["codes"].transpose(0, 1)[:, :count])
        yield close(case, "emb_from_codes_partial", part)
    levels = torch.full((len(latent),), quantizer.config.num_quantizers)
    dropped = int(len(latent) * quantizer.config.quantizer_dropout)
    yield case.equal("items with fewer levels", dropped, case.meta.get("n_dropout_items", dropped))
    levels[:dropped] = io["train_dropout_draw"][:dropped]
    output = quantizer(latent, levels)
    yield close(case, "train_quantized", output.latents)
    yield close(case, "train_commit_losses", output.commitment)
    yield close(case, "train_codebook_losses", output.codebook)


@torch.no_grad()
def acoustic_encoder(case: Case) -> Iterator[Check]:
    """Latents of every recorded length, layers of the first one, and streams."""
    io, c = case.io, from_dict(EncoderConfig, used(case.meta["config"]))
    other = DecoderConfig(
        in_channels=c.out_channels,
        num_quantizers=1,
        use_vocos=False,
        upsample_initial_channel=1 << len(c.up_ratios),
        up_ratios=c.up_ratios,
    )
    codec = around(c, other)
    load_strict(codec.encoder, case.weights)
    encoder = copy.deepcopy(codec.encoder)
    x = io["wav_0"]
    for number, part in enumerate(encoder.block):
        x = part(x)
        name = "conv_in" if number == 0 else f"block{number}"
        if name in io:
            yield close(case, name, x)
    fold(codec)
    codec = codec.double()
    for name in sorted(name for name in io if name.startswith("wav_")):
        waves, latents = io[name], io[name.replace("wav", "latent")]
        yield case.equal(f"{name}: frames", codec.frames_of(waves.shape[2]), latents.shape[2])
        yield close(case, name.replace("wav", "latent"), encoder(waves))
        got = streamed(codec.encoder_ops, waves.double(), codec.hop)
        yield close(case, f"{name}: stream", got, codec.encoder(waves.double()))


@torch.no_grad()
def acoustic_decoder(case: Case) -> Iterator[Check]:
    """Latents, sound and codes again; parts of Vocos; streams and rows of several lengths."""
    io, c = case.io, from_dict(DecoderConfig, used(case.meta["config"]))
    codec = around(EncoderConfig(1, (c.hop,), c.in_channels), c)
    decoder = codec.decoder
    load_strict(decoder, case.weights)
    tokens = io["codes"].transpose(0, 1)
    yield close(case, "emb", decoder.quantizer.decode(tokens))
    yield close(case, "requant_codes", decoder.quantizer.encode(io["emb"])[0].transpose(0, 1))
    yield close(case, "wav", decoder(io["emb"]))
    if isinstance(decoder.model, Vocos):
        yield from parts_of_vocos(case, decoder.model)
    fold(codec)
    codec = codec.double()
    latents = codec.latents(tokens)
    whole = codec.decode_latents(latents)
    yield close(case, "stream", streamed(codec.decoder_ops, latents, 2), whole)
    lengths = shorter(case, tokens.shape[2], len(tokens))
    waves, ends = codec.decode(Codes(tokens, lengths, codec.sample_rate))
    for row, length in enumerate(lengths.tolist()):
        alone = codec.decode_latents(latents[row : row + 1, :, :length])
        yield close(case, f"row {row} of a ragged batch", waves[row : row + 1, :, : int(ends[row])], alone)


def parts_of_vocos(case: Case, model: Vocos) -> Iterator[Check]:
    """Backbone, and what the head makes of given spectra and of frames that are too loud."""
    io = case.io
    if "backbone" in io:
        yield close(case, "backbone", model.backbone(io["emb"]))
    if "istft_out" in io:  # of spectra that belong to no frames
        head = copy.deepcopy(model.head)
        spectra = torch.complex(io["spec_real"], io["spec_imag"]).transpose(1, 2)
        head.spectra = lambda _: spectra
        yield close(case, "istft_out", head(io["spec_real"].transpose(1, 2)))
    if "head_in_large" in io:
        yield close(case, "head_out_large", model.head(io["head_in_large"]))


def around(encoder: EncoderConfig, decoder: DecoderConfig) -> MaskGCTCodec:
    """A codec of both halves, as the official code runs them."""
    return MaskGCTCodec(MaskGCTCodecConfig(encoder, decoder, pad_tail=False)).requires_grad_(False)


HANDLERS = {
    "semantic_codec": semantic_codec,
    "rvq": rvq,
    "acoustic_encoder": acoustic_encoder,
    "acoustic_decoder_vocos": acoustic_decoder,
    "acoustic_decoder_conv": acoustic_decoder,
}
