"""Paraformer on streams: chunks of features or audio in, tokens out, with state of fixed shapes.

Streaming Paraformer is the encoder and decoder of SCAMA (arXiv 2006.01712) around a CIF that carries its open
token over. :func:`step` does one chunk of every stream of a batch, :func:`recognise_stream` a whole utterance
at once with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.errors import ConfigError
from nar_speech.features import Frontend
from nar_speech.layers.cif_stream import CifState, most_tokens
from nar_speech.layers.frontend_stream import ChunkFrontend, ChunkFrontendState
from nar_speech.layers.sanm_stream import (
    DecoderState,
    EncoderState,
    StreamConfig,
    check_grow,
)
from nar_speech.layers.state import named_tensors

if TYPE_CHECKING:
    from nar_speech.models.paraformer import Paraformer


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
    model: Paraformer, feats: Tensor, lengths: Tensor, state: ParaformerState, final: Tensor
) -> tuple[StreamOutput, ParaformerState]:
    """One chunk of every stream; see :meth:`Paraformer.step`."""
    config = stream_config(model)
    heard = state.encoder.frames
    before = state.encoder.feats.shape[1]
    encoded, rows, encoder = model.encoder.step(feats, lengths, state.encoder, config)
    silent = None if config.official else final & (heard + lengths == 0)
    cif, predictor = model.predictor.step(encoded, rows, state.predictor, final, config, silent)
    size = most_tokens(model.predictor, config, encoded.shape[1])
    used = _used(cif.counts, size)
    decoder, vocabulary = state.decoder, model.config.vocab_size
    log_probs = encoded.new_zeros(len(feats), size, vocabulary, dtype=torch.float32)
    if used:
        tokens = cif.embeds[:, :used]
        logits, decoder = model.decoder.step(tokens, cif.counts, encoded, rows, state.decoder, config)
        best = logits.float().log_softmax(dim=-1)
        missing = torch.arange(used, device=feats.device) >= cif.counts[:, None]
        log_probs = F.pad(best.masked_fill(missing[:, :, None], 0.0), (0, 0, 0, size - used))
    frames = (heard[:, None] + cif.rows - before).clamp_min(0).masked_fill(cif.rows < 0, -1)
    new = _begin_again(ParaformerState(encoder, predictor, decoder), final)
    return StreamOutput(log_probs, cif.counts, frames), new


def _used(counts: Tensor, size: int) -> int:
    """Token places to decode: all, except on a CPU, where it costs nothing to look how many are needed."""
    if counts.device.type != "cpu" or torch.compiler.is_compiling() or not counts.numel():
        return size
    return int(counts.max())


def _begin_again(state: ParaformerState, final: Tensor) -> ParaformerState:
    """The state with the streams ``final`` (B,) at their beginning; kept keys are forgotten, not cleared."""

    def clear(part, *names: str):
        values = {name: getattr(part, name) for name in names}
        shaped = {n: final.reshape(-1, *[1] * (v.dim() - 1)) for n, v in values.items()}
        return replace(part, **{n: v.masked_fill(shaped[n], 0) for n, v in values.items()})

    return ParaformerState(
        clear(state.encoder, "feats", "frames", "filled"),
        clear(state.predictor, "remainder", "hidden"),
        clear(state.decoder, "memory", "filled", "tokens"),
    )


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

    def __init__(self, network: Paraformer, frontend: Frontend, official_tail: bool = False):
        """``network``: in eval mode, with a ``stream``. ``official_tail``: see :class:`ChunkFrontend`."""
        self.network = network
        self.frontend = ChunkFrontend(frontend, stream_config(network).chunk[1], official_tail)
        self.sample_rate, self.chunk = frontend.config.sample_rate, self.frontend.chunk

    @property
    def device(self) -> torch.device:
        return self.network.encoder.after_norm.weight.device

    def init_state(self, slots: int) -> AudioState:
        """State of ``slots`` streams that have not begun."""
        return AudioState(
            self.frontend.init_state(slots, self.device), self.network.init_state(slots, self.device)
        )

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
        output, network = self.network.step(feats, rows, state.network, final)
        return output, AudioState(frontend, network)


def state_bytes(state: ParaformerState | AudioState) -> int:
    """Memory of one stream's state in bytes."""
    return sum(t[:1].numel() * t.element_size() for _, t in named_tensors(state))
