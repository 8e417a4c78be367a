"""What every codec is to the rest of the package: sound in, tokens out, and back, whole or as a stream.

    Zeghidour et al. 2021, "SoundStream": an encoder, residual vector quantisation, a decoder.

Letters: B batch, C channels, N samples, T frames, K codebooks, D width of the latents.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from nar_speech.errors import AudioError, ConfigError, InputError
from nar_speech.types import Codes


class Codec(nn.Module, abc.ABC):
    """A neural codec. A row of a batch never depends on its mates.

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
        frame_rate: frames per second, ``sample_rate / hop``.
        delay: samples by which a stream's decoded sound lags behind its input, beside the frame being filled.
        can_stream: whether a stream gives anything before its last step.
        chunk_frames: frames of the chunks that are coded alone; None: a recording is one piece.
        has_scales: whether sound is normalised, so that decoding needs ``Codes.scales``. A stream's encoder
            state has them as ``scales`` (B, chunks so far); :meth:`give_scales` adds them to a decoder's.
    """

    name: str
    sample_rate: int
    channels: int
    num_codebooks: int
    codebook_size: int
    hop: int
    frame_rate: float
    delay: int = 0
    can_stream: bool = True
    chunk_frames: int | None = None
    has_scales: bool = False

    @abc.abstractmethod
    def encode(self, waves: Tensor, lengths: Tensor | None = None, num_codebooks: int | None = None) -> Codes:
        """Tokens of sound.

        Args:
            waves: (B, C, N) float in [-1, 1], in the codec's own rate.
            lengths: (B,) samples of each row; None: all N. What lies behind is not looked at.
            num_codebooks: 1 to ``self.num_codebooks``; None: all.

        Raises:
            AudioError: another shape or number of channels, NaN or infinite samples.
            ConfigError: a number of codebooks that the codec does not have.
            InputError: lengths of another number, or beyond N.
        """

    @abc.abstractmethod
    def decode(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Sound of tokens.

        Returns:
            waves (B, C, N) float32, zeros behind the end of a row, and lengths (B,) samples: what was encoded
            where ``codes.samples`` says so, else all that the frames give.

        Raises:
            InputError: tokens of another shape, out of range, or of another codec; scales that are missing.
        """

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

    def give_scales(self, state: Any, scales: Tensor) -> Any:
        """A decoder's state with the scales (B, chunks) of the chunks whose tokens come next.

        Raises:
            InputError: this codec has none.
        """
        raise InputError(f"{self.name}: this codec does not normalise; leave the scales away")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def frames_of(self, samples: int) -> int:
        """Frames that so many samples give."""
        return -(-samples // self.hop)

    def check_waves(
        self, waves: Tensor, lengths: Tensor | None = None, num_codebooks: int | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """What ``encode`` was given, checked: waves and lengths (B,) int64 on the codec's device, codebooks.

        Waves get the dtype of the weights, and zeros behind the end of a row.

        Raises:
            AudioError, ConfigError, InputError: see :meth:`encode`.
        """
        if not isinstance(waves, Tensor) or waves.dim() != 3 or not waves.is_floating_point():
            raise AudioError(
                f"{self.name}: waves are {_shown(waves)}; expected float (batch, channels, samples)"
            )
        if waves.shape[1] != self.channels:
            raise AudioError(f"{self.name}: waves have {waves.shape[1]} channels, not {self.channels}")
        if waves.shape[0] < 1:
            raise AudioError(f"{self.name}: the batch is empty; give at least one recording")
        like = next(self.parameters())
        waves = waves.to(like.device, like.dtype)
        if lengths is None:
            lengths = torch.full((waves.shape[0],), waves.shape[2], device=waves.device)
        else:
            lengths = self.check_lengths(lengths, waves.shape[0], waves.shape[2], "lengths")
            waves = waves.masked_fill(~present(lengths, waves.shape[2])[:, None], 0.0)
        if not bool(torch.isfinite(waves).all()):
            raise AudioError(f"{self.name}: NaN or infinite samples; repair the recording")
        return waves, lengths, self.check_codebooks(num_codebooks)

    def check_rows(self, rows: int, state: Any) -> None:
        """Raise an InputError unless a step of a stream has as many rows as the streams of its state."""
        batch = _rows_of(state)
        if rows != batch:
            raise InputError(f"{self.name}: {rows} rows for a state of {batch} streams; give one for each")

    def check_codebooks(self, count: int | None) -> int:
        """``count`` or, for None, all codebooks; a ConfigError for a number that the codec does not have."""
        if count is None:
            return self.num_codebooks
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= self.num_codebooks:
            raise ConfigError(f"codebooks: got {count}; {self.name} has 1 to {self.num_codebooks}")
        return count

    def check_tokens(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tokens (B, K, T), T >= 0, checked, on the codec's device.

        Args:
            lengths: (B,) frames of each row; what lies behind is not looked at, and becomes 0.

        Raises:
            InputError: another shape, too many codebooks, codes out of range.
        """
        whole = isinstance(tokens, Tensor) and not (tokens.is_floating_point() or tokens.dtype == torch.bool)
        if not whole or tokens.dim() != 3 or tokens.shape[0] < 1:
            raise InputError(
                f"{self.name}: tokens are {_shown(tokens)}; expected integers (batch, codebooks, frames)"
            )
        if not 1 <= tokens.shape[1] <= self.num_codebooks:
            raise InputError(
                f"{self.name}: tokens of {tokens.shape[1]} codebooks; this codec has {self.num_codebooks}"
            )
        tokens = tokens.to(self.device)
        if lengths is not None:
            lengths = self.check_lengths(lengths, tokens.shape[0], tokens.shape[2], "codes: lengths")
            tokens = tokens.masked_fill(~present(lengths, tokens.shape[2])[:, None], 0)
        if tokens.numel():
            low, high = (int(bound) for bound in torch.aminmax(tokens))
            if low < 0 or high >= self.codebook_size:
                wrong = low if low < 0 else high
                raise InputError(f"{self.name}: code {wrong} is not in 0 to {self.codebook_size - 1}")
        return tokens.to(torch.int64)

    def check_codes(self, codes: Codes) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, lengths (B,) and samples (B,) of ``codes``, checked, on the codec's device.

        Raises:
            InputError: see :meth:`decode`.
        """
        if codes.sample_rate != self.sample_rate:
            of = f" ('{codes.codec}')" if codes.codec else ""
            raise InputError(
                f"{self.name}: the tokens are of a codec of {codes.sample_rate} Hz{of}, this one has"
                f" {self.sample_rate} Hz; decode with the codec that made them"
            )
        tokens = self.check_tokens(codes.tokens, codes.lengths)
        lengths = self.check_lengths(codes.lengths, tokens.shape[0], tokens.shape[2], "codes: lengths")
        if codes.samples is None:
            return tokens, lengths, None
        return tokens, lengths, self.check_lengths(codes.samples, tokens.shape[0], None, "codes: samples")

    def check_lengths(self, lengths: Tensor, batch: int, most: int | None, what: str) -> Tensor:
        """Lengths (B,) from 0 to ``most``, checked, int64 on the codec's device."""
        lengths = torch.as_tensor(lengths)
        if lengths.shape != (batch,) or lengths.is_floating_point():
            raise InputError(f"{self.name}: {what} are {_shown(lengths)}; expected {batch} whole numbers")
        low, high = (int(bound) for bound in torch.aminmax(lengths))
        if low < 0 or (most is not None and high > most):
            limit = "at least 0" if most is None else f"0 to {most}"
            raise InputError(f"{self.name}: {what}: got {low if low < 0 else high}; must be {limit}")
        return lengths.to(self.device, torch.int64)


def present(lengths: Tensor, size: int) -> Tensor:
    """(B, size) booleans: whether a position lies before the end of its row, of ``lengths`` (B,)."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _rows_of(state: Any) -> int | None:
    """Rows of the first tensor of a state; None: it has none."""
    if isinstance(state, Tensor):
        return state.shape[0]
    parts = state if isinstance(state, tuple) else ()
    if dataclasses.is_dataclass(state):
        parts = [getattr(state, field.name) for field in dataclasses.fields(state)]
    return next((rows for rows in map(_rows_of, parts) if rows is not None), None)


def _shown(value: Any) -> str:
    """Shape and type of what should have been a tensor."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
