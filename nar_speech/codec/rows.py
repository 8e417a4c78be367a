"""Codecs that wrap a convolutional network: batches of rows, and streams of its layers."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nar_speech.codec.base import Codec, present
from nar_speech.codec.stream import Op, lag
from nar_speech.errors import InputError
from nar_speech.types import Codes

BLOCK_SECONDS = 10.0  # in which a row is run that is longer than LONGEST_SECONDS
LONGEST_SECONDS = 60.0
# Part of the longest row of a padded batch that its shortest one has: on a GPU, and on a CPU, where padding
# costs as much as sound.
LEAST_FILLED, LEAST_FILLED_CPU = 0.5, 0.9


@dataclass(frozen=True)
class EncoderState:
    """Of a network's layers, and the number of codebooks wanted."""

    layers: Any
    codebooks: int


@dataclass(frozen=True)
class DecoderState:
    """Of a network's layers."""

    layers: Any


class RowCodec(Codec):
    """``encode`` and ``decode`` of batches, and streams by operators over the network's layers.

    The network itself would let a row see the padding behind it, mirrored or through the bias of a layer. So
    it runs rows of one length only; rows of similar lengths are run by the operators, which pad every row
    where it ends, and others apart. Long rows are run as streams, so that memory for activations does not
    grow with their length.
    """

    _encoder_ops: Op | None = None
    _decoder_ops: Op | None = None

    @abc.abstractmethod
    def encode_rows(self, waves: Tensor, num_codebooks: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, K, T) of waves (B, C, N) of one length, N >= 1, and scales (B, chunks) or None."""

    @abc.abstractmethod
    def decode_rows(self, tokens: Tensor, scales: Tensor | None) -> Tensor:
        """Waves (B, C, N) of tokens (B, K, T) of one length, T >= 1, not trimmed."""

    @abc.abstractmethod
    def quantize(self, latents: Tensor, num_codebooks: int) -> Tensor:
        """Tokens (B, K, T) of the encoder's output (B, D, T)."""

    @abc.abstractmethod
    def build_encoder_ops(self) -> Op:
        """Operators that stream the encoder: waves to what ``quantize`` takes."""

    @abc.abstractmethod
    def build_decoder_ops(self) -> Op:
        """Operators that stream the decoder: latents to waves."""

    @property
    def pads_rows(self) -> bool:
        """Whether operators run rows of several lengths at once."""
        return True

    @property
    def encoder_ops(self) -> Op:
        """The encoder as a stream."""
        if self._encoder_ops is None:
            self._encoder_ops = self.build_encoder_ops()
        return self._encoder_ops

    @property
    def decoder_ops(self) -> Op:
        """The decoder as a stream."""
        if self._decoder_ops is None:
            self._decoder_ops = self.build_decoder_ops()
        return self._decoder_ops

    def set_delay(self) -> None:
        """Find out by how much a stream lags behind."""
        self.encoder_delay = lag(self.encoder_ops, self.hop)
        self.decoder_delay = lag(self.decoder_ops, 1, self.hop)
        self.delay = self.encoder_delay + self.decoder_delay

    @torch.no_grad()
    def encode(self, waves: Tensor, lengths: Tensor | None = None, num_codebooks: int | None = None) -> Codes:
        """See :meth:`Codec.encode`."""
        waves, lengths, count = self.check_waves(waves, lengths, num_codebooks)
        batch = len(lengths)
        tokens: list[tuple[list[int], Tensor]] = []
        scales: list[tuple[list[int], Tensor]] = []
        frames = torch.zeros_like(lengths)
        for length, rows in self._groups(lengths, self.sample_rate):
            counts = lengths[rows]
            if length is None:
                part, counts = self._encode_padded(waves[rows, :, : int(counts.max())], counts, count)
                scale = None
            else:
                part, scale = self._encode_whole(waves[rows, :, :length], count)
                counts = part.shape[2]
            tokens.append((rows, part))
            if scale is not None:
                scales.append((rows, scale))
            frames[rows] = counts
        return Codes(
            tokens=_joined(tokens, batch),
            lengths=frames,
            sample_rate=self.sample_rate,
            samples=lengths,
            scales=_joined(scales, batch) if scales else None,
            chunk_frames=self.chunk_frames,
            codec=self.name,
        )

    @torch.no_grad()
    def decode(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """See :meth:`Codec.decode`."""
        tokens, lengths, samples = self.check_codes(codes)
        scales = self._check_scales(codes, int(lengths.max()))
        ends = torch.zeros_like(lengths)
        pieces: list[tuple[list[int], Tensor]] = []
        for length, rows in self._groups(lengths, self.frame_rate):
            counts = lengths[rows]
            if length is None:
                longest = int(counts.max())
                waves, counts = self.decoder_ops.rows(self.latents(tokens[rows, :, :longest]), counts)
            else:
                part = None if scales is None else scales[rows, : self.chunks_of(length)]
                waves = self._decode_whole(tokens[rows, :, :length], part)
                counts = waves.shape[2]
            ends[rows] = counts
            pieces.append((rows, waves))
        if samples is not None:
            ends = torch.minimum(ends, samples)
        waves = _joined(pieces, len(lengths))[:, :, : int(ends.max())]
        behind = torch.arange(waves.shape[2], device=waves.device) >= ends[:, None]
        return waves.masked_fill(behind[:, None], 0.0), ends

    def chunks_of(self, frames: int) -> int:
        """Chunks that so many frames are of."""
        return min(frames, 1) if self.chunk_frames is None else -(-frames // self.chunk_frames)

    def init_encoder(self, batch: int, num_codebooks: int | None = None) -> EncoderState:
        """See :meth:`Codec.init_encoder`."""
        like = next(self.parameters())
        return EncoderState(self.encoder_ops.init(batch, like), self.check_codebooks(num_codebooks))

    @torch.no_grad()
    def encode_step(
        self, waves: Tensor, state: EncoderState, final: bool = False
    ) -> tuple[Tensor, EncoderState]:
        """See :meth:`Codec.encode_step`."""
        waves, _, _ = self.check_waves(waves)
        self.check_rows(waves.shape[0], state)
        latents, layers = self.encoder_ops.step(waves, state.layers, final)
        return self._quantize_any(latents, state.codebooks), EncoderState(layers, state.codebooks)

    def init_decoder(self, batch: int) -> DecoderState:
        """See :meth:`Codec.init_decoder`."""
        return DecoderState(self.decoder_ops.init(batch, next(self.parameters())))

    @torch.no_grad()
    def decode_step(
        self, tokens: Tensor, state: DecoderState, final: bool = False
    ) -> tuple[Tensor, DecoderState]:
        """See :meth:`Codec.decode_step`."""
        tokens = self.check_tokens(tokens)
        self.check_rows(tokens.shape[0], state)
        waves, layers = self.decoder_ops.step(self._latents_any(tokens), state.layers, final)
        return waves, DecoderState(layers)

    def _groups(self, lengths: Tensor, rate: float) -> Iterator[tuple[int | None, list[int]]]:
        """Rows to be run together, with their length; None: they have several.

        Args:
            lengths: (B,).
            rate: of these lengths in a second.
        """
        by_length = dict(rows_by_length(lengths))
        filled = LEAST_FILLED_CPU if self.device.type == "cpu" else LEAST_FILLED
        while by_length:
            longest = max(by_length)
            least = longest
            if self.pads_rows and 0 < longest <= LONGEST_SECONDS * rate:
                least = math.ceil(filled * longest)
            group = [length for length in by_length if length >= least]
            rows = sorted(row for length in group for row in by_length.pop(length))
            yield (longest if len(group) == 1 else None), rows

    def _encode_padded(self, waves: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, K, T), zeros behind a row, and frames of waves (B, C, N) of ``lengths`` (B,)."""
        latents, frames = self.encoder_ops.rows(waves, lengths)
        tokens = self.quantize(latents[:, :, : int(frames.max())], count)
        return tokens * present(frames, tokens.shape[2])[:, None], frames

    def _quantize_any(self, latents: Tensor, count: int) -> Tensor:
        """Tokens of latents of any length, 0 too."""
        if latents.shape[2]:
            return self.quantize(latents, count)
        return torch.zeros(latents.shape[0], count, 0, dtype=torch.int64, device=latents.device)

    def _latents_any(self, tokens: Tensor) -> Tensor:
        """Latents of tokens of any length, 0 too."""
        if tokens.shape[2]:
            return self.latents(tokens)
        return self.latents(tokens.new_zeros(*tokens.shape[:2], 1))[:, :, :0]

    def _encode_whole(self, waves: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Tokens and scales of rows of one length."""
        batch, length = waves.shape[0], waves.shape[2]
        if length and (not self.can_stream or length <= LONGEST_SECONDS * self.sample_rate):
            return self.encode_rows(waves, count)
        state = self.init_encoder(batch, count)
        parts = []
        for block, last in blocks(waves, round(BLOCK_SECONDS * self.sample_rate)):
            part, state = self.encode_step(block, state, last)
            parts.append(part)
        return torch.cat(parts, 2), state.scales if self.has_scales else None

    def _decode_whole(self, tokens: Tensor, scales: Tensor | None) -> Tensor:
        """Waves of rows of one length."""
        length = tokens.shape[2]
        if length and (not self.can_stream or length <= LONGEST_SECONDS * self.frame_rate):
            return self.decode_rows(tokens, scales)
        state, parts = self.init_decoder(tokens.shape[0]), []
        if scales is not None:
            state = self.give_scales(state, scales)
        for block, last in blocks(tokens, max(round(BLOCK_SECONDS * self.frame_rate), 1)):
            part, state = self.decode_step(block, state, last)
            parts.append(part)
        return torch.cat(parts, 2)

    def _check_scales(self, codes: Codes, frames: int) -> Tensor | None:
        """The scales of ``codes``, checked; None for a codec that has none."""
        if codes.chunk_frames != self.chunk_frames:
            raise InputError(
                f"{self.name}: the tokens are in chunks of {codes.chunk_frames} frames, this codec has"
                f" {self.chunk_frames}; decode with the codec that made them"
            )
        if not self.has_scales:
            return None
        if codes.scales is None:
            raise InputError(f"{self.name}: the tokens lack the loudness (scales) that this codec needs")
        need = (codes.tokens.shape[0], self.chunks_of(frames))
        if codes.scales.dim() != 2 or codes.scales.shape[0] != need[0] or codes.scales.shape[1] < need[1]:
            raise InputError(
                f"{self.name}: scales of shape {tuple(codes.scales.shape)}; expected {need[0]} x {need[1]}"
            )
        return codes.scales.to(self.device, torch.float32)


def rows_by_length(lengths: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Each length that occurs, with the rows that have it."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths.tolist()):
        groups.setdefault(length, []).append(row)
    yield from groups.items()


def blocks(whole: Tensor, size: int) -> Iterator[tuple[Tensor, bool]]:
    """``whole`` (..., N) in pieces of ``size``, and whether a piece is the last one; at least one piece."""
    for begin in range(0, max(whole.shape[-1], 1), size):
        yield whole[..., begin : begin + size], begin + size >= whole.shape[-1]


def _joined(pieces: list[tuple[list[int], Tensor]], batch: int) -> Tensor:
    """One tensor of rows that came in groups, zeros behind the shorter ones."""
    if len(pieces) == 1:
        return pieces[0][1]
    first = pieces[0][1]
    result = first.new_zeros(batch, *first.shape[1:-1], max(part.shape[-1] for _, part in pieces))
    for rows, part in pieces:
        result[rows, ..., : part.shape[-1]] = part
    return result
