"""Handlers of the recorded cases of streaming Paraformer: feature chunks, audio, and training masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nar_speech.features import Frontend, read_kaldi_cmvn
from nar_speech.layers.cif_stream import step_cif
from nar_speech.layers.sanm_stream import (
    DecoderState,
    EncoderState,
    StreamConfig,
    _window,
    step_decoder,
    step_encoder,
)
from nar_speech.models.paraformer import Paraformer
from nar_speech.models.paraformer_stream import ParaformerState, ParaformerStream
from tests.golden_kinds.paraformer_frontend import frontend_config

if TYPE_CHECKING:
    from tests.golden import Case, Check


def set_stream(model: Paraformer, meta: dict[str, Any], official: bool = True) -> StreamConfig:
    """Let ``model`` stream as the case did."""
    model.stream = dataclasses.replace(
        model.stream,
        chunk=tuple(meta["chunk_size"]),
        encoder_look_back=meta["encoder_chunk_look_back"],
        decoder_look_back=meta["decoder_chunk_look_back"],
        official=official,
    )
    return model.stream


def split_heads(past: Tensor, filled: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values (1, H, T, D) of the rows (1, M, 2 D) that are in use."""
    used = past[:, past.shape[1] - int(filled[0]) :]
    key, value = used.chunk(2, dim=-1)
    return tuple(x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (key, value))


class Probe:
    """Runs the parts one after the other, as the network's step does, and keeps what the cases recorded.

    A step leaves the caches of a stream that has ended undefined; here they are put together from the last
    chunk's projections.
    """

    def __init__(self, model: Paraformer, config: StreamConfig):
        self.model, self.config = model, config
        self.state: ParaformerState = model.init_state(1, grow=True)
        self.projected: dict[str, Tensor] = {}
        for number, layer in enumerate([*model.encoder.encoders0, *model.encoder.encoders]):
            self._watch(layer.self_attn.linear_q_k_v, f"encoder {number}")
        for number, layer in enumerate(model.decoder.decoders):
            self._watch(layer.src_attn.linear_k_v, f"decoder {number}")

    def _watch(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _m, _i, out: self.projected.__setitem__(name, out))

    @torch.no_grad()
    def chunk(self, feats: Tensor, length: int, final: bool) -> dict[str, Tensor]:
        model, config, state = self.model, self.config, self.state
        lengths, last = torch.tensor([length]), torch.tensor([final])
        encoded, rows, encoder = step_encoder(model.encoder, config, feats, lengths, state.encoder)
        if final:
            encoder = self._last_encoder(feats, lengths, encoder)
        cif, predictor = step_cif(model.predictor, config, encoded, rows, state.predictor, last)
        count = int(cif.counts[0])
        got = {
            "encoder_out": encoded[:, : int(rows[0])],
            "token_num": cif.counts,
            "cif_alphas": predictor.remainder[:, None],
            "cif_hidden": predictor.hidden[:, None],
        }
        decoder = state.decoder
        if count:
            hidden, decoder = step_decoder(
                model.decoder, config, cif.embeds, cif.counts, encoded, rows, state.decoder
            )
            if final:
                decoder = self._last_decoder(int(rows[0]), decoder)
            got["acoustic_embeds"] = cif.embeds[:, :count]
            got["log_probs"] = model.decoder.output_layer(hidden).log_softmax(-1)[:, :count]
        self.state = ParaformerState(encoder, predictor, decoder)
        return got

    def _last_encoder(self, feats: Tensor, lengths: Tensor, new: EncoderState) -> EncoderState:
        """The encoder's caches behind a last chunk of ``lengths`` frames."""
        config, old = self.config, self.state.encoder
        window, rows, _ = _window(self.model.encoder, config, feats, lengths, old)
        valid = window[:, : int(rows[0])]
        keep = valid.shape[1] if config.widens else config.context
        new = dataclasses.replace(new, feats=valid[:, valid.shape[1] - keep :])
        if not config.encoder_reach:
            return new
        kept, size = max(int(rows[0]) - config.chunk[2], 0), self.model.encoder.output_size
        limit = old.filled + kept
        if config.encoder_reach > 0 and int(old.filled[0]):
            limit = limit.clamp_max(config.encoder_reach * config.chunk[1])
        fresh = [self.projected[f"encoder {i}"][:, :kept, size:] for i in range(old.past.shape[1])]
        return dataclasses.replace(
            new, past=torch.cat([old.past, torch.stack(fresh, dim=1)], dim=2), filled=limit
        )

    def _last_decoder(self, rows: int, new: DecoderState) -> DecoderState:
        """The decoder's caches behind a last chunk with a window of ``rows`` rows."""
        config, old = self.config, self.state.decoder
        if not config.decoder_reach:
            return new
        limit = old.filled + rows
        if config.decoder_reach > 0:
            limit = limit.clamp_max(config.decoder_reach * config.chunk[1])
        fresh = [self.projected[f"decoder {i}"][:, :rows] for i in range(old.past.shape[1])]
        return dataclasses.replace(
            new, past=torch.cat([old.past, torch.stack(fresh, dim=1)], dim=2), filled=limit
        )

    def caches(self) -> dict[str, Tensor]:
        """The state under the names of the recorded tensors."""
        encoder, decoder = self.state.encoder, self.state.decoder
        got = {"final_enc_feats_cache": encoder.feats}
        heads = self.model.encoder.config.attention_heads
        for number in range(encoder.past.shape[1]):
            key, value = split_heads(encoder.past[:, number], encoder.filled, heads)
            got |= {f"final_enc_k_{number}": key, f"final_enc_v_{number}": value}
        heads = self.model.decoder.config.attention_heads
        for number in range(decoder.past.shape[1]):
            key, value = split_heads(decoder.past[:, number], decoder.filled, heads)
            got |= {f"final_dec_k_{number}": key, f"final_dec_v_{number}": value}
        for number in range(decoder.memory.shape[1]):
            got[f"final_dec_fsmn_{number}"] = decoder.memory[:, number].transpose(1, 2)
        return got


def chunks_of(case: Case, model: Paraformer) -> Iterator[tuple[Tensor, int, bool, dict[str, Any]]]:
    """(features padded to a whole chunk, valid frames, last, what was recorded of it) of each chunk."""
    size, feats, begin = case.meta["chunk_size"][1], case.io["feats"], 0
    for entry in case.meta["chunks"]:
        length = 0 if entry["tail_chunk"] else entry["frames_in"]
        part = feats[:, begin : begin + length]
        begin += length
        yield torch.nn.functional.pad(part, (0, 0, 0, size - length)), length, entry["is_final"], entry


def kept_ids(log_probs: Tensor, count: int) -> list[int]:
    return [i for i in log_probs[0, :count].argmax(-1).tolist() if i > 2]


def online(case: Case) -> Iterator[Check]:
    """Chunk by chunk: every part and the caches as recorded, and the network's own step."""
    from tests.golden_kinds.paraformer import build

    model = build(case)
    config = set_stream(model, case.meta)
    probe, state = Probe(model, config), model.init_state(1, grow=True)
    for number, (feats, length, final, entry) in enumerate(chunks_of(case, model)):
        got = {f"c{number:02d}_{name}": value for name, value in probe.chunk(feats, length, final).items()}
        for name in sorted(name for name in case.io if name.startswith(f"c{number:02d}_")):
            if name in got:
                yield case.close(name, got[name])
            else:
                yield case.equal(name, "missing", "recorded")
        out, state = model.step(feats, torch.tensor([length]), state, torch.tensor([final]))
        count = int(out.token_lengths[0])
        ids = out.log_probs[0, :count].argmax(-1).tolist()
        yield case.equal(f"chunk {number} tokens", ids, entry["tokens"])
        if f"c{number:02d}_log_probs" in case.io:
            want = case.io[f"c{number:02d}_log_probs"]
            yield case.close(f"chunk {number} log_probs (step)", out.log_probs[:, :count], want)
    for name, value in probe.caches().items():
        if name in case.io:
            want = case.io[name]
            if "fsmn" in name:  # the official cache also holds the inputs of the last chunk itself
                want = want[..., -value.shape[-1] :]
            yield case.close(name, value, want)


def online_audio(case: Case) -> Iterator[Check]:
    """Audio in pieces of any size, held back until a chunk is full; the end with and without a rest."""
    from tests.golden_kinds.paraformer import build

    model = build(case)
    set_stream(model, case.meta)
    files = sorted(case.folder.glob("*.mvn"))
    conf = frontend_config(case.meta["frontend"])
    stream = ParaformerStream(
        model, Frontend(conf, read_kaldi_cmvn(files[0]) if files else None), official_tail=True
    )
    wave, held, position = case.io["wav"], torch.zeros(0), 0
    state, number = stream.init_state(1), 0
    for call, entry in enumerate(case.meta["calls"]):
        held = torch.cat([held, wave[position : position + entry["samples"]]])
        position += entry["samples"]
        full = len(held) // stream.chunk
        pieces = [held[i * stream.chunk : (i + 1) * stream.chunk] for i in range(full)]
        pieces += [held[full * stream.chunk :]] if entry["is_final"] else []
        held = held[full * stream.chunk :]
        yield case.equal(f"call {call} chunks", len(pieces), len(entry["model_chunks"]))
        for i, (piece, want) in enumerate(zip(pieces, entry["model_chunks"], strict=False)):
            final = entry["is_final"] and i == len(pieces) - 1
            audio = torch.nn.functional.pad(piece, (0, stream.chunk - len(piece)))[None]
            lengths, last = torch.tensor([len(piece)]), torch.tensor([final])
            feats, rows, _ = stream.frontend.step(audio, lengths, state.frontend, last)
            yield case.equal(f"chunk {number} is the last", final, want["is_final"])
            yield case.equal(f"chunk {number} has no features", int(rows[0]) == 0, want["tail_chunk"])
            if want["tail_chunk"]:  # the official code then hands over the frames it still keeps
                yield case.close(f"chunk{number:02d}_feats", state.network.encoder.feats)
            else:
                yield case.close(f"chunk{number:02d}_feats", feats[:, : int(rows[0])])
            out, state = stream.step(audio, lengths, last, state)
            ids = kept_ids(out.log_probs, int(out.token_lengths[0]))
            yield case.equal(f"chunk {number} tokens", ids, [int(t) for t in want["tokens"]])
            number += 1


HANDLERS = {"online": online, "online_audio": online_audio}
