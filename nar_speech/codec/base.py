"""What every codec is to the rest of the package: sound in, tokens out, and back, whole or as a stream.

    Zeghidour et al. 2021, "SoundStream": an encoder, residual vector quantisation, a decoder.

Letters: B batch, C channels, N samples, T frames, K codebooks, D width of the latents.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nar_speech.errors import AudioError, ConfigError, InputError
from nar_speech.types import Codes


class Codec(nn.Module, abc.ABC):
    """A neural codec.

    ``encode`` and ``decode`` check what they are given and call ``encode_rows`` and ``decode_rows`` with rows
    of one length, so a row of a batch never depends on its mates.

    A stream has rows that go in lockstep. The joined outputs of its steps equal the one-shot result, however
    the input is cut (pieces of no samples too); the last step is given ``final=True``. States are frozen
    dataclasses of tensors, batch first, and of whole numbers that all rows share.

    Attributes:
        name: of the kind or of the model, for messages and token files.
        sample_rate: Hz.
        channels: of the sound.
        num_codebooks: K at most.
        codebook_size: tokens are 0 to this - 1.
        hop: samples per frame.
        can_stream: whether the stream methods give sound before the last step.
        encoder_delay: samples behind a frame's end that must be heard before its tokens come out.
        decoder_delay: samples by which the decoded sound lags behind its tokens.
    """

    name: str
    sample_rate: int
    channels: int
    num_codebooks: int
    codebook_size: int
    hop: int
    can_stream: bool = True
    encoder_delay: int = 0
    decoder_delay: int = 0
    chunk_frames: int | None = None

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop

    @property
    def delay(self) -> int:
        """Samples by which a stream's decoded sound lags behind its input, beside the frame being filled."""
        return self.encoder_delay + self.decoder_delay

    @abc.abstractmethod
    def encode_rows(self, waves: Tensor, num_codebooks: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, K, T) of waves (B, C, N) of one length, N >= 1, and scales (B, chunks) or None."""

    @abc.abstractmethod
    def decode_rows(self, tokens: Tensor, scales: Tensor | None) -> Tensor:
        """Waves (B, C, N) of tokens (B, K, T) of one length, T >= 1, not trimmed."""

    @abc.abstractmethod
    def latents(self, tokens: Tensor) -> Tensor:
        """What the decoder reads: the sum of code vectors (B, D, T) of tokens (B, K, T)."""

    @abc.abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Waves (B, C, N) of latents (B, D, T), T >= 1."""

    @abc.abstractmethod
    def init_encoder(self, batch: int, num_codebooks: int | None = None) -> Any:
        """The state of ``batch`` streams to encode."""

    @abc.abstractmethod
    def encode_step(self, waves: Tensor, state: Any, final: bool = False) -> tuple[Tensor, Any]:
        """Tokens (B, K, t) that are complete now, t >= 0, for more samples (B, C, n), n >= 0."""

    @abc.abstractmethod
    def init_decoder(self, batch: int) -> Any:
        """The state of ``batch`` streams to decode."""

    @abc.abstractmethod
    def decode_step(self, tokens: Tensor, state: Any, final: bool = False) -> tuple[Tensor, Any]:
        """Waves (B, C, n) that are complete now, n >= 0, for more tokens (B, K, t), t >= 0."""

    def frames_of(self, samples: int) -> int:
        """Frames that so many samples give."""
        return -(-samples // self.hop)

    def encode(self, waves: Tensor, lengths: Tensor | None = None, num_codebooks: int | None = None) -> Codes:
        """Tokens of sound.

        Args:
            waves: (B, C, N) float32 in [-1, 1], in the codec's own rate.
            lengths: (B,) samples of each row; None: all N. What lies behind is not looked at.
            num_codebooks: 1 to ``self.num_codebooks``; None: all.

        Raises:
            AudioError: another shape or number of channels, no samples, NaN or infinite ones.
            ConfigError: a number of codebooks that the codec does not have.
        """
        self.check_waves(waves)
        count = self.check_codebooks(num_codebooks)
        if lengths is None:
            lengths = torch.full((waves.shape[0],), waves.shape[2], dtype=torch.int64)
        lengths = self._check_lengths(lengths, waves.shape[0], waves.shape[2], "lengths", 1)
        pieces: list[tuple[list[int], Tensor, Tensor | None]] = []
        for length, rows in rows_by_length(lengths):
            tokens, scales = self.encode_rows(waves[rows, :, :length], count)
            pieces.append((rows, tokens, scales))
        frames = torch.zeros(len(lengths), dtype=torch.int64)
        for rows, tokens, _ in pieces:
            frames[rows] = tokens.shape[2]
        scaled = pieces[0][2] is not None
        return Codes(
            tokens=_joined([(rows, tokens) for rows, tokens, _ in pieces], len(lengths)),
            lengths=frames,
            sample_rate=self.sample_rate,
            samples=lengths,
            scales=_joined([(rows, scales) for rows, _, scales in pieces], len(lengths)) if scaled else None,
            chunk_frames=self.chunk_frames,
            codec=self.name,
        )

    def decode(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Sound of tokens.

        Returns:
            waves (B, C, N) float32, zeros behind the end of a row, and lengths (B,) samples: what was encoded
            where ``codes.samples`` says so, else all that the frames give.

        Raises:
            InputError: tokens of another shape, out of range, of another codec's rate, scales that are missing.
        """
        self.check_codes(codes)
        tokens, batch = codes.tokens.to(self.device), codes.tokens.shape[0]
        frames = self._check_lengths(codes.lengths, batch, tokens.shape[2], "codes: lengths", 0)
        samples = frames * self.hop * 2 if codes.samples is None else codes.samples.cpu()
        ends = torch.zeros(batch, dtype=torch.int64)
        pieces: list[tuple[list[int], Tensor]] = []
        for length, rows in rows_by_length(frames):
            if not length:
                pieces.append((rows, torch.zeros(len(rows), self.channels, 0, device=self.device)))
                continue
            scales = None if codes.scales is None else self.row_scales(codes.scales[rows], length)
            waves = self.decode_rows(tokens[rows, :, :length], scales)
            ends[rows] = samples[rows].clamp(max=waves.shape[2])
            pieces.append((rows, waves))
        waves = _joined(pieces, batch)[:, :, : int(ends.max())]
        behind = torch.arange(waves.shape[2], device=waves.device) >= ends.to(waves.device)[:, None]
        return waves.masked_fill(behind[:, None], 0.0), ends

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def row_scales(self, scales: Tensor, frames: int) -> Tensor:
        """The scales (B, chunks) of rows of so many frames."""
        chunks = 1 if self.chunk_frames is None else -(-frames // self.chunk_frames)
        return scales[:, :chunks].to(self.device)

    def check_waves(self, waves: Tensor) -> None:
        """Raise an AudioError unless ``waves`` is (B, C, N) float, B and N at least 1, and finite."""
        if not isinstance(waves, Tensor) or waves.dim() != 3 or not waves.is_floating_point():
            got = f"{tuple(waves.shape)} {waves.dtype}" if isinstance(waves, Tensor) else type(waves).__name__
            raise AudioError(f"{self.name}: waves are {got}; expected float (batch, channels, samples)")
        if waves.shape[1] != self.channels:
            raise AudioError(
                f"{self.name}: waves have {waves.shape[1]} channels; this codec needs {self.channels}"
            )
        if 0 in waves.shape:
            raise AudioError(f"{self.name}: waves of shape {tuple(waves.shape)} hold no samples; give some")
        if not bool(torch.isfinite(waves).all()):
            raise AudioError(f"{self.name}: NaN or infinite samples; repair the recording")

    def check_codebooks(self, count: int | None) -> int:
        """``count`` or, for None, all codebooks; a ConfigError for a number that the codec does not have."""
        if count is None:
            return self.num_codebooks
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= self.num_codebooks:
            raise ConfigError(f"codebooks: got {count}; {self.name} has 1 to {self.num_codebooks}")
        return count

    def check_tokens(self, tokens: Tensor, empty: bool = False) -> None:
        """Raise an InputError unless ``tokens`` is (B, K, T) of whole numbers that the codebooks have."""
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or tokens.is_floating_point():
            got = (
                f"{tuple(tokens.shape)} {tokens.dtype}"
                if isinstance(tokens, Tensor)
                else type(tokens).__name__
            )
            raise InputError(f"{self.name}: tokens are {got}; expected integers (batch, codebooks, frames)")
        if not 1 <= tokens.shape[1] <= self.num_codebooks:
            raise InputError(
                f"{self.name}: tokens have {tokens.shape[1]} codebooks; this codec has {self.num_codebooks}"
            )
        if tokens.shape[0] < 1 or (tokens.shape[2] < 1 and not empty):
            raise InputError(f"{self.name}: tokens of shape {tuple(tokens.shape)} hold no frame; give some")
        if tokens.numel():
            low, high = (int(v) for v in torch.aminmax(tokens))
            if low < 0 or high >= self.codebook_size:
                raise InputError(
                    f"{self.name}: token {low if low < 0 else high} is out of range; codes are 0 to"
                    f" {self.codebook_size - 1}"
                )

    def check_codes(self, codes: Codes) -> None:
        """Raise an InputError unless ``codes`` can be of this codec."""
        self.check_tokens(codes.tokens)
        if codes.sample_rate != self.sample_rate:
            raise InputError(
                f"{self.name}: the tokens are of a codec of {codes.sample_rate} Hz, this one has"
                f" {self.sample_rate} Hz; decode with the codec '{codes.codec}'"
            )
        batch = codes.tokens.shape[0]
        if codes.samples is not None:
            self._check_lengths(codes.samples, batch, None, "codes: samples", 0)
        if codes.scales is not None and codes.scales.shape[0] != batch:
            raise InputError(
                f"{self.name}: scales of shape {tuple(codes.scales.shape)}; need a row for each of {batch}"
            )

    def _check_lengths(self, lengths: Tensor, batch: int, most: int | None, what: str, least: int) -> Tensor:
        """(B,) int64 on the CPU, checked."""
        lengths = torch.as_tensor(lengths).cpu()
        if lengths.shape != (batch,) or lengths.is_floating_point():
            raise InputError(f"{self.name}: {what} {tuple(lengths.shape)}; expected {batch} whole numbers")
        low, high = int(lengths.min()), int(lengths.max())
        if low < least or (most is not None and high > most):
            wrong = low if low < least else high
            limit = f"{least} to {most}" if most is not None else f"at least {least}"
            raise InputError(f"{self.name}: {what}: got {wrong}; must be {limit}")
        return lengths.to(torch.int64)


def rows_by_length(lengths: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Each length that occurs, with the rows that have it."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths.tolist()):
        groups.setdefault(length, []).append(row)
    yield from groups.items()


def _joined(pieces: list[tuple[list[int], Tensor]], batch: int) -> Tensor:
    """One tensor of rows that came in groups, zeros behind the shorter ones."""
    if len(pieces) == 1:
        return pieces[0][1]
    first = pieces[0][1]
    longest = max(part.shape[-1] for _, part in pieces)
    result = first.new_zeros(batch, *first.shape[1:-1], longest)
    for rows, part in pieces:
        result[rows, ..., : part.shape[-1]] = part
    return result


Step = Callable[[Tensor, Any, bool], tuple[Tensor, Any]]


def run_stream(
    step: Step, state: Any, whole: Tensor, size: int, finish: bool = True
) -> Iterator[tuple[Tensor, Any]]:
    """Feed ``whole`` (..., N) to ``step`` in pieces of ``size``; yields each output and the state after it."""
    for begin in range(0, max(whole.shape[-1], 1), size):
        last = begin + size >= whole.shape[-1]
        output, state = step(whole[..., begin : begin + size], state, last and finish)
        yield output, state
