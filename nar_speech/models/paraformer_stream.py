"""Paraformer on streams: chunks of features or audio in, tokens out, with state of fixed shapes.

Streaming Paraformer is the encoder and decoder of SCAMA (arXiv 2006.01712) around a CIF that carries its open
token over. :func:`step` does one chunk of every stream of a batch, :func:`recognise_stream` a whole utterance
at once with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.errors import ConfigError
from nar_speech.features import Frontend
from nar_speech.layers.cif import CifOutput
from nar_speech.layers.cif_stream import (
    CifState,
    infer_windows,
    most_tokens,
    train_windows,
    window_alphas,
)
from nar_speech.layers.frontend_stream import ChunkFrontend, ChunkFrontendState
from nar_speech.layers.sanm import Padding, make_padding
from nar_speech.layers.sanm_stream import (
    DecoderState,
    EncoderState,
    StreamConfig,
    WindowConfig,
    check_grow,
)
from nar_speech.layers.sanm_windows import (
    Windows,
    check_streams_exactly,
    encode_windows,
    owned_frames,
    stream_reach,
    stream_windows,
    token_windows,
    training_reach,
    training_windows,
)
from nar_speech.layers.state import named_tensors
from nar_speech.models.paraformer import Paraformer, TrainingPass, glance, training_targets


@dataclass(frozen=True)
class ParaformerState:
    """What the network keeps of a batch of streams; see the parts."""

    encoder: EncoderState
    predictor: CifState
    decoder: DecoderState


@dataclass(frozen=True)
class StreamOutput:
    """The tokens that one step has finished.

    log_probs: (B, U, V) float32, zero past ``token_lengths`` (B,) int64; U depends on the configuration
    alone. frames: (B, U) int64 frame of the stream, from 0, in which each token ended; -1 past the last one.
    """

    log_probs: Tensor
    token_lengths: Tensor
    frames: Tensor


def init_state(
    model: Paraformer,
    batch: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    grow: bool = False,
) -> ParaformerState:
    """State of ``batch`` streams that have not begun; see :meth:`Paraformer.init_state`."""
    config = stream_config(model)
    check_grow(config, grow)
    return ParaformerState(
        model.encoder.init_state(batch, config, device, dtype),
        model.predictor.init_state(batch, device),
        model.decoder.init_state(batch, config, device, dtype),
    )


def stream_config(model: Paraformer) -> StreamConfig:
    """How ``model`` streams.

    Raises:
        ConfigError: it does not.
    """
    if model.stream is None:
        raise ConfigError(
            "stream: this Paraformer was not trained to stream; use an online model, or set its attribute"
            " stream to a StreamConfig to try (encoder kind sanm only)"
        )
    return model.stream


@torch.no_grad()
def step(
    model: Paraformer,
    feats: Tensor,
    lengths: Tensor,
    state: ParaformerState,
    final: Tensor,
    in_place: bool = False,
) -> tuple[StreamOutput, ParaformerState]:
    """One chunk of every stream; see :meth:`Paraformer.step`."""
    config = stream_config(model)
    heard = state.encoder.frames
    before = state.encoder.feats.shape[1]
    encoded, rows, encoder = model.encoder.step(feats, lengths, state.encoder, config, in_place)
    silent = None if config.official else final & (heard + lengths == 0)
    cif, predictor = model.predictor.step(encoded, rows, state.predictor, final, config, silent)
    size = most_tokens(model.predictor, config, encoded.shape[1])
    used = _used(cif.counts, size)
    decoder, vocabulary = state.decoder, model.config.vocab_size
    log_probs = encoded.new_zeros(len(feats), size, vocabulary, dtype=torch.float32)
    if used:
        tokens = cif.embeds[:, :used]
        logits, decoder = model.decoder.step(
            tokens, cif.counts, encoded, rows, state.decoder, config, in_place
        )
        best = logits.float().log_softmax(dim=-1)
        missing = torch.arange(used, device=feats.device) >= cif.counts[:, None]
        log_probs = F.pad(best.masked_fill(missing[:, :, None], 0.0), (0, 0, 0, size - used))
    frames = (heard[:, None] + cif.rows - before).clamp_min(0).masked_fill(cif.rows < 0, -1)
    new = _begin_again(ParaformerState(encoder, predictor, decoder), final)
    return StreamOutput(log_probs, cif.counts, frames), new


def _used(counts: Tensor, size: int) -> int:
    """Token places to decode: all, except on a CPU, where it costs nothing to look how many are needed.

    Not one: products of a single row are computed in another order than those of several.
    """
    if counts.device.type != "cpu" or torch.compiler.is_compiling() or not counts.numel():
        return size
    most = int(counts.max())
    return min(max(most, 2), size) if most else 0


def _begin_again(state: ParaformerState, final: Tensor) -> ParaformerState:
    """The state with the streams ``final`` (B,) at their beginning; kept keys are forgotten, not cleared."""

    def clear(part, *names: str):
        values = {name: getattr(part, name) for name in names}
        shaped = {n: final.reshape(-1, *[1] * (v.dim() - 1)) for n, v in values.items()}
        return replace(part, **{n: v.masked_fill(shaped[n], 0) for n, v in values.items()})

    return ParaformerState(
        clear(state.encoder, "feats", "frames", "kept"),
        clear(state.predictor, "remainder", "hidden"),
        clear(state.decoder, "memory", "kept", "tokens"),
    )


@torch.no_grad()
def recognise_stream(
    model: Paraformer, feats: Tensor, lengths: Tensor, last_frames: Tensor | None = None
) -> StreamOutput:
    """What a stream of each utterance gives, all its steps together, computed in one piece.

    Args:
        feats: (B, T, F); not changed. lengths: (B,) int64.
        last_frames: (B,) int64 frames of the last step, 0 to C, the rest being a multiple of C; default: 1 to
            C. Streams of audio end with 0 where the audio is a whole number of chunks.

    Raises:
        ConfigError: a model that does not stream, or with ``stream.official``.
    """
    config = stream_config(model)
    check_streams_exactly(config)
    size = config.chunk[1]
    if last_frames is None:
        last_frames = torch.where(lengths > 0, (lengths - 1) % size + 1, 0)
    windows = stream_windows(lengths, last_frames, config)
    rows = encode_windows(model.encoder, feats, lengths, windows)
    rows = rows.masked_fill(~windows.valid[:, :, None], 0.0)
    alphas = window_alphas(model.predictor, rows, windows)
    cif, ends = infer_windows(model.predictor, rows, alphas, lengths == 0)
    counts, tokens = cif.token_lengths, cif.embeds.shape[1]
    missing = torch.arange(tokens, device=feats.device) >= counts[:, None]
    reach = stream_reach(windows, config, ends, counts)
    groups = token_windows(windows, ends)
    padding = Padding((~missing)[:, :, None].to(rows.dtype), reach, groups=groups)
    log_probs = feats.new_zeros(len(feats), 0, model.config.vocab_size)
    if tokens:
        hidden = model.decoder.states(cif.embeds, padding, rows, reach)
        log_probs = model.decoder.output_layer(hidden).float().log_softmax(dim=-1)
    shown = windows.frames[ends.clamp_max(len(windows.frames) - 1)]
    frames = torch.where(ends >= len(windows.frames), lengths[:, None], shown)  # behind all: by the tail
    return StreamOutput(
        log_probs.masked_fill(missing[:, :, None], 0.0),
        counts,
        frames.clamp_min(0).masked_fill(missing, -1),
    )


@dataclass(frozen=True)
class WindowedCif:
    """Training up to the predictor's tokens.

    windows, and their encodings rows (B, N W, D); targets (B, L), -1 at padding, and target_lengths (B,);
    cif: scaled to the targets; ends: (B, L) int64 row in which each token ends; reach: (B, 1, L, N W) bool
    rows that the decoder looks at for it.
    """

    windows: Windows
    rows: Tensor
    targets: Tensor
    target_lengths: Tensor
    cif: CifOutput
    ends: Tensor
    reach: Tensor


def windowed_cif(
    model: Paraformer,
    feats: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    token_lengths: Tensor,
    config: WindowConfig,
    official_padding: bool = False,
) -> WindowedCif:
    """Encode windows and predict the tokens of the targets; arguments as of ``training_pass``."""
    windows = training_windows(lengths, config, stream_config(model).padded)
    rows = encode_windows(model.encoder, feats, lengths, windows)
    # The official code lets the predictor see padding, but where it has cut out frames for a CTC loss before.
    padded = official_padding and model.config.ctc_weight == 0
    there = windows.valid.any(dim=0) if padded else windows.valid
    rows = rows.masked_fill(~there[..., None], 0.0)
    targets, target_lengths = training_targets(model, tokens, token_lengths)
    alphas = window_alphas(model.predictor, rows, windows)
    cif, ends = train_windows(model.predictor, rows, alphas, target_lengths, official_padding)
    reach = training_reach(windows, config, ends)
    return WindowedCif(windows, rows, targets, target_lengths, cif, ends, reach)


def windowed_passes(
    model: Paraformer,
    lengths: Tensor,
    parts: WindowedCif,
    config: WindowConfig,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
) -> TrainingPass:
    """Both passes of the decoder over ``parts``; ``lengths`` (B,) of the features."""
    targets, target_lengths, rows = parts.targets, parts.target_lengths, parts.rows
    padding = make_padding(target_lengths, targets.shape[1], rows.dtype)

    def decode(embeds: Tensor) -> Tensor:
        return model.decoder.output_layer(model.decoder.states(embeds, padding, rows, parts.reach))

    passes = glance(model, parts.cif.embeds, targets, target_lengths, decode, generator, draws)
    encoder_out = owned_frames(rows, config, int(lengths.max()))
    return TrainingPass(encoder_out, lengths, parts.cif, targets, target_lengths, *passes)


def windowed_pass(
    model: Paraformer,
    feats: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    token_lengths: Tensor,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
    official_padding: bool = False,
    window: int | None = None,
) -> TrainingPass:
    """:func:`nar_speech.models.paraformer.training_pass` of a model that learns to stream."""
    choices = stream_config(model).windows
    if window is None and model.training:
        device = None if generator is None else generator.device
        window = int(torch.randint(len(choices), (1,), generator=generator, device=device))
    config = choices[window or 0]
    parts = windowed_cif(model, feats, lengths, tokens, token_lengths, config, official_padding)
    return windowed_passes(model, lengths, parts, config, generator, draws)


@dataclass(frozen=True)
class AudioState:
    """What :class:`ParaformerStream` keeps of a batch of streams."""

    frontend: ChunkFrontendState
    network: ParaformerState


class ParaformerStream:
    """Audio chunks to tokens: the features of :class:`ChunkFrontend` and the network's step.

    Attributes:
        sample_rate: in Hz. chunk: samples of one step. device: of the network.
    """

    def __init__(
        self, network: Paraformer, frontend: Frontend, official_tail: bool = False, in_place: bool = False
    ):
        """Build.

        Args:
            network: in eval mode, with a ``stream``.
            official_tail: see :class:`ChunkFrontend`.
            in_place: steps may overwrite the states they are given; for an engine, which gives copies.
        """
        self.network, self.in_place = network, in_place
        self.frontend = ChunkFrontend(frontend, stream_config(network).chunk[1], official_tail)
        self.sample_rate, self.chunk = frontend.config.sample_rate, self.frontend.chunk

    @property
    def device(self) -> torch.device:
        return self.network.encoder.after_norm.weight.device

    def init_state(self, slots: int, grow: bool = False) -> AudioState:
        """State of ``slots`` streams that have not begun; ``grow``: see :meth:`Paraformer.init_state`."""
        frontend = self.frontend.init_state(slots, self.device)
        return AudioState(frontend, self.network.init_state(slots, self.device, grow=grow))

    @torch.no_grad()
    def step(
        self, audio: Tensor, lengths: Tensor, final: Tensor, state: AudioState
    ) -> tuple[StreamOutput, AudioState]:
        """Tokens of the next chunk of every stream.

        Args:
            audio: (B, chunk) float32 in [-1, 1]. lengths: (B,) int64 valid samples, ``chunk`` unless final.
            final: (B,) bool, where the stream ends; its next state is that of a new stream.
        """
        feats, rows, frontend = self.frontend.step(audio, lengths, state.frontend, final)
        output, network = self.network.step(feats, rows, state.network, final, self.in_place)
        return output, AudioState(frontend, network)


def state_bytes(state: ParaformerState | AudioState) -> int:
    """Memory of one stream's state in bytes."""
    return sum(t[:1].numel() * t.element_size() for _, t in named_tensors(state))
