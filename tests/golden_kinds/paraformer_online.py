"""Handlers of the recorded cases of streaming Paraformer: feature chunks, audio, and training masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nar_speech.cmvn import read_kaldi_cmvn
from nar_speech.features import Frontend
from nar_speech.layers.cif import prefix_track
from nar_speech.layers.cif_stream import step_cif, window_alphas
from nar_speech.layers.sanm_stream import (
    DecoderState,
    EncoderState,
    StreamConfig,
    WindowConfig,
    _window,
    step_decoder,
    step_encoder,
    token_memories,
)
from nar_speech.layers.sanm_windows import Windows, training_windows
from nar_speech.models.paraformer import Paraformer, loss_terms, training_pass
from nar_speech.models.paraformer_stream import (
    ParaformerState,
    ParaformerStream,
    WindowedCif,
    windowed_cif,
    windowed_passes,
)
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


def split_heads(past: Tensor, kept: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values (1, H, T, D) of the rows (1, M, 2 D) that exist."""
    used = past[:, kept[0]]
    key, value = used.chunk(2, dim=-1)
    return tuple(x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (key, value))


def append(old: EncoderState | DecoderState, fresh: list[Tensor], limit: int | None) -> dict[str, Tensor]:
    """``past`` and ``kept`` with new keys and values (1, T, 2 D) of each layer, the last ``limit`` rows."""
    past = torch.cat([old.past, torch.stack(fresh, dim=1)], dim=2)
    kept = torch.cat([old.kept, old.kept.new_ones(1, fresh[0].shape[1])], dim=1)
    if limit is not None:
        kept = kept & (torch.arange(kept.shape[1]) >= kept.shape[1] - limit)
    return {"past": past, "kept": kept}


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
        encoded, valid, encoder = step_encoder(model.encoder, config, feats, lengths, state.encoder)
        rows = int(valid.sum())
        if final:
            encoder = self._last_encoder(feats, lengths, encoder)
        cif, predictor = step_cif(model.predictor, config, encoded, valid, state.predictor, last)
        count = int(cif.counts[0])
        got = {
            "encoder_out": encoded[:, :rows],
            "token_num": cif.counts,
            "cif_alphas": predictor.remainder[:, None],
            "cif_hidden": predictor.hidden[:, None],
        }
        decoder = state.decoder
        if count:
            hidden, decoder = step_decoder(
                model.decoder, config, cif.embeds, cif.counts, encoded, valid, state.decoder
            )
            if final:
                decoder = self._last_decoder(rows, decoder)
            got["acoustic_embeds"] = cif.embeds[:, :count]
            got["log_probs"] = model.decoder.output_layer(hidden).log_softmax(-1)[:, :count]
        self.state = ParaformerState(encoder, predictor, decoder)
        return got

    def _last_encoder(self, feats: Tensor, lengths: Tensor, new: EncoderState) -> EncoderState:
        """The encoder's caches behind a last chunk of ``lengths`` frames."""
        config, old = self.config, self.state.encoder
        window, rows, _ = _window(self.model.encoder, config, feats, lengths, old)
        valid = window[:, rows[0]]
        keep = valid.shape[1] if config.widens else config.context
        new = dataclasses.replace(new, feats=valid[:, valid.shape[1] - keep :])
        if not config.encoder_reach:
            return new
        kept, size = max(valid.shape[1] - config.chunk[2], 0), self.model.encoder.output_size
        limit = config.encoder_reach * config.chunk[1] if config.encoder_reach > 0 and old.frames[0] else None
        fresh = [self.projected[f"encoder {i}"][:, :kept, size:] for i in range(old.past.shape[1])]
        return dataclasses.replace(new, **append(old, fresh, limit))

    def _last_decoder(self, rows: int, new: DecoderState) -> DecoderState:
        """The decoder's caches behind a last chunk with a window of ``rows`` rows."""
        config, old = self.config, self.state.decoder
        if not config.decoder_reach:
            return new
        limit = config.decoder_reach * config.chunk[1] if config.decoder_reach > 0 else None
        fresh = [self.projected[f"decoder {i}"][:, :rows] for i in range(old.past.shape[1])]
        return dataclasses.replace(new, **append(old, fresh, limit))

    def caches(self) -> dict[str, Tensor]:
        """The state under the names of the recorded tensors."""
        encoder, decoder = self.state.encoder, self.state.decoder
        got = {"final_enc_feats_cache": encoder.feats}
        heads = self.model.encoder.config.attention_heads
        for number in range(encoder.past.shape[1]):
            key, value = split_heads(encoder.past[:, number], encoder.kept, heads)
            got |= {f"final_enc_k_{number}": key, f"final_enc_v_{number}": value}
        heads = self.model.decoder.config.attention_heads
        for number in range(decoder.past.shape[1]):
            key, value = split_heads(decoder.past[:, number], decoder.kept, heads)
            got |= {f"final_dec_k_{number}": key, f"final_dec_v_{number}": value}
        for number in range(decoder.memory.shape[1]):
            got[f"final_dec_fsmn_{number}"] = decoder.memory[:, number].transpose(1, 2)
        return got


def check_gradients(case: Case, model: Paraformer, loss: Tensor) -> Iterator[Check]:
    """Recorded gradients, their norms, and which parameters have one."""
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in case.io:
        if name.startswith("grad."):
            yield case.close(name, gradients[name.removeprefix("grad.")])
    norms = case.meta.get("grad_norms", {})
    if norms:
        names = list(norms)
        mine = torch.stack([gradients[n].norm() if n in gradients else torch.zeros(()) for n in names])
        yield case.close("grad_norms", mine, torch.tensor([norms[n] for n in names]))
        yield case.equal("parameters with a gradient", sorted(gradients), sorted(norms))


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


def has_defect(model: Paraformer, config: StreamConfig) -> bool:
    """Whether the official code does anything with this model that ours does only when asked to."""
    decoder, conf = model.decoder, model.config.predictor_conf
    ahead = any(layer.self_attn.right != 0 for layer in token_memories(decoder))
    heavy = conf.smooth_factor - conf.noise_threshold > 1 or conf.tail_threshold > 1
    same_size = model.encoder.input_size == model.encoder.output_size
    return config.chunk[2] == 0 or config.decoder_look_back < 0 or ahead or heavy or same_size


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
    if not has_defect(model, config):
        set_stream(model, case.meta, official=False)
        state = model.init_state(1, grow=True)
        for number, (feats, length, final, _) in enumerate(chunks_of(case, model)):
            out, state = model.step(feats, torch.tensor([length]), state, torch.tensor([final]))
            want = case.io.get(f"c{number:02d}_log_probs", out.log_probs[:, :0])
            got = out.log_probs[:, : int(out.token_lengths[0])]
            yield case.close(f"chunk {number} log_probs (ours)", got, want)
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
    state, number = stream.init_state(1, grow=True), 0
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


class ChunkedAxis:
    """From our rows, windows side by side, to the official axis, which has zero rows in front of each."""

    def __init__(self, windows: Windows, shift: int, size: int):
        self.windows, self.shift, self.size = windows, shift, size

    def __call__(self, x: Tensor, dim: int = 1) -> Tensor:
        """Dimension ``dim`` of N W rows becomes the recorded one."""
        x = x.movedim(dim, -1).unflatten(-1, (self.windows.number, self.windows.size))
        x = torch.nn.functional.pad(x, (self.shift, 0)).flatten(-2)[..., : self.size]
        return x.movedim(-1, dim)


def _check_masks(case: Case, windows: Windows, axis: ChunkedAxis, left: int) -> Iterator[Check]:
    """The masks of ``overlap_chunk`` as our layout implies them. The longest utterance has every row."""
    lengths = case.io["speech_lengths"]
    longest = int(lengths.argmax())
    frames = int(lengths.max())
    there = axis(torch.ones(len(windows.frames)), 0)[:, None]
    shown = torch.arange(-left, frames) == windows.frames[:, None]
    own = windows.own[longest]
    taken = (torch.arange(frames)[:, None] == windows.frames) & own
    rest = windows.valid.long().mul(windows.window == windows.last[:, None]).sum(1)
    got = {
        "chunk_x_add_mask": axis(shown.float(), 0),
        "chunk_x_len_chunk": windows.last * (windows.size + axis.shift) + axis.shift + rest,
        "chunk_x_rm_mask": axis(taken.float(), 1),
        "chunk_x_len": lengths,
        "chunk_mask_shift_chunk": there,
        "chunk_mask_chunk_predictor": axis(own.float(), 0)[:, None],
        "chunk_mask_att_chunk_encoder": axis(axis(windows.sees.float(), 0), 1),
        "chunk_mask_shift_att_chunk_decoder": there,
    }
    for name, value in got.items():
        if name in case.io:
            yield case.close(name, value.to(case.io[name].dtype))


def _window_of(case: Case, model: Paraformer) -> int:
    """Which of the model's windows the recorded tensors show.

    The case states it, but the shared one states 1 where every tensor is that of 0: what it recorded decides.
    """
    shift = (model.encoder.config.kernel_size - 1) // 2

    def fits(number: int) -> bool:
        windows = training_windows(case.io["speech_lengths"], model.stream.windows[number], padded=True)
        rest = windows.valid.long().mul(windows.window == windows.last[:, None]).sum(1)
        sizes = windows.last * (windows.size + shift) + shift + rest
        return torch.equal(sizes.float(), case.io["chunk_x_len_chunk"].float())

    stated = int(case.meta.get("chunk_choice", 0))
    others = [i for i in range(len(model.stream.windows)) if i != stated]
    return next((i for i in [stated, *others] if fits(i)), stated)


def lost_vectors(peaks: Tensor, targets: Tensor) -> Tensor:
    """(B,) bool: where rounding left the official sum below its target and the last vector is missing."""
    return (peaks >= 1).sum(dim=1) == targets - 1


def without_last(embeds: Tensor, lengths: Tensor, lost: Tensor) -> Tensor:
    """Token vectors (B, L, D) with zeros in place of the last one where ``lost``."""
    last = torch.arange(embeds.shape[1]) == lengths[:, None] - 1
    return embeds.masked_fill((last & lost[:, None])[:, :, None], 0.0)


def _lose(parts: WindowedCif, io: dict[str, Tensor], conf: WindowConfig) -> WindowedCif:
    """What the official code goes on with where rounding loses it a last token, which ours never does.

    Its vector is zero where the parallel sum stays below the target. The place of the token, from another sum
    in float32, is then the last window of the whole batch, of which a shorter utterance may have nothing.
    """
    lengths, windows = parts.target_lengths, parts.windows
    embeds = without_last(parts.cif.embeds, lengths, lost_vectors(io["pred_peaks"], lengths))
    placeless = io["frame_alignments"].sum(dim=1) < lengths
    window, end = windows.window, windows.number - 1
    reach = (window == end) & windows.valid
    reach = reach | ((window < end) & (window >= end - conf.decoder_look_back) & windows.own)
    last = (torch.arange(embeds.shape[1]) == lengths[:, None] - 1) & placeless[:, None]
    reach = torch.where(last[:, None, :, None], reach[:, None, None], parts.reach)
    return dataclasses.replace(parts, cif=dataclasses.replace(parts.cif, embeds=embeds), reach=reach)


def online_train_masks(case: Case) -> Iterator[Check]:
    """Training on windows: masks, both passes with the recorded draws, the losses and gradients."""
    from tests.golden_kinds.paraformer import _draws, build

    model, io = build(case).train(), case.io
    number = _window_of(case, model)
    conf, shift = model.stream.windows[number], (model.encoder.config.kernel_size - 1) // 2
    batch = io["speech"], io["speech_lengths"], io["text"], io["text_lengths"]
    ours = windowed_cif(model, *batch, conf, official_padding=True)
    axis = ChunkedAxis(ours.windows, shift, io["chunk_mask_shift_chunk"].shape[0])
    yield from _check_masks(case, ours.windows, axis, conf.left)
    parts = _lose(ours, io, conf)
    draws = _draws(case, ours.targets.shape[1])
    run = windowed_passes(model, io["speech_lengths"], parts, conf, draws=draws)
    if parts.cif.embeds.equal(ours.cif.embeds) and parts.reach.equal(ours.reach):
        whole = training_pass(model, *batch, draws=draws, official_padding=True, window=number)
        yield case.close("logits (training_pass)", whole.logits, run.logits)
    terms = loss_terms(model, run, io["text"], io["text_lengths"])
    valid = run.targets != -1
    alphas = window_alphas(model.predictor, parts.rows, parts.windows)
    peaks = prefix_track(model.predictor.scale(axis(alphas), run.target_lengths)[1])
    # From the row of a lost last token on, the official track holds the whole weight instead.
    lost = lost_vectors(io["pred_peaks"], run.target_lengths)
    last = ours.ends.masked_fill(~valid, -1).amax(dim=1, keepdim=True)
    behind = (axis(torch.arange(len(parts.windows.frames)) == last).cumsum(dim=1) > 0) & lost[:, None]
    fires = torch.zeros(len(alphas), len(parts.windows.frames)).scatter_add(
        1, ours.ends.masked_fill(~valid, 0), valid.float()
    )
    placeless = io["frame_alignments"].sum(dim=1) < run.target_lengths
    fires = axis(fires.scatter_add(1, last, -placeless.float()[:, None]))
    # Windows behind an utterance hold numbers without meaning, other ones there than here.
    here = axis(parts.windows.window <= parts.windows.last[:, None])[:, :, None]
    got = {
        "pred_alphas": axis(run.cif.alphas),
        "pred_peaks": torch.where(behind, io["pred_peaks"], peaks),
        "pred_token_num": run.cif.token_num,
        "frame_alignments": fires,
        "frame_alignments_len": run.target_lengths - placeless.long(),
        "encoder_out_masked": torch.where(here, axis(parts.rows), io["encoder_out_masked"]),
        "pre_acoustic_embeds": run.cif.embeds,
        "semantic_embeds": run.embeds,
        "scama_mask": axis(parts.reach[:, 0].float() * valid[:, :, None], 2),
        "first_pass_logits": run.first_logits * valid[:, :, None],
        **{n: terms[n].reshape(1) for n in ("loss", "loss_att", "loss_pre", "loss_ctc") if n in terms},
    }
    for name, value in got.items():
        if name in io:
            yield case.close(name, value.to(io[name].dtype))
    yield from check_gradients(case, model, terms["loss"])


HANDLERS = {"online": online, "online_audio": online_audio, "online_train_masks": online_train_masks}
