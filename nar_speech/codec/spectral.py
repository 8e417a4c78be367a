"""Our own codec: log-mel spectra as codes, and a network that makes sound of them; small, and quick on a CPU.

The encoder reads a log-mel spectrogram, so codes tell how loud each band is and leave the phases to the
decoder. That is one of the kind of Vocos (Siuzdak 2023): blocks at the rate of spectral frames, magnitudes
and phases, an inverse Fourier transform. Beside its blocks a linear path leads from codes to spectrogram;
:meth:`SpectralCodec.start_transform` makes it principal components before training, and the magnitudes start
there. All layers but the first of the decoder look back only, so it streams with a delay of
``SpectralCodec.delay`` samples. No two sounds of one spectrogram are told apart: the decoded waveform has
phases of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.codec.base import Codec, present
from nar_speech.codec.quantize import FiniteScalarQuantizer, Quantized, ResidualVectorQuantizer
from nar_speech.errors import ConfigError
from nar_speech.layers.convnext import CausalConvNeXtBlock
from nar_speech.types import Codes

QUIET = 1e-4  # mel magnitudes are not below it
LOUDEST = 7.0  # log of the largest decoded magnitude; a tone of full scale has log(window / 4)
TINY = 1e-4  # square of the parts of a phase below which they don't count
SCALE = 0.2  # of log-mel values inside the network
LEAST_WINDOWS = 1e-3  # of the sum of squared windows by which the frames' sum is divided


@dataclass(frozen=True)
class SpectralCodecConfig:
    """Sizes; the network part of ``model.yaml``.

    Attributes:
        sample_rate: Hz.
        hop: samples of a frame of codes.
        splits: spectral frames in a frame of codes.
        overlap: how many spectral frames a window is long.
        mels: bands of the spectrogram.
        width, expansion: channels of the blocks, and how many times more they have inside.
        encoder_blocks, decoder_blocks: ConvNeXt blocks, at the rate of codes and of spectral frames.
        lookahead: frames of codes after the current one that the decoder sees.
        quantizer: residual codebooks ("rvq") or rounded values ("fsq").
        num_codebooks, codebook_size, code_width: of the codebooks.
        steps: of each group of an FSQ.
    """

    sample_rate: int = 16000
    hop: int = 320
    splits: int = 2
    overlap: int = 4
    mels: int = 96
    width: int = 256
    expansion: int = 3
    encoder_blocks: int = 4
    decoder_blocks: int = 9
    lookahead: int = 1
    quantizer: Literal["rvq", "fsq"] = "rvq"
    num_codebooks: int = 12
    codebook_size: int = 1024
    code_width: int = 64
    steps: list[int] | None = None

    def __post_init__(self) -> None:
        positive = "sample_rate hop splits mels width expansion num_codebooks codebook_size code_width"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"network.{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("encoder_blocks", "decoder_blocks", "lookahead"):
            if not 0 <= getattr(self, name) <= 100:
                raise ConfigError(f"network.{name}: must be 0 to 100, got {getattr(self, name)}")
        if self.overlap < 2:
            raise ConfigError(f"network.overlap: must be at least 2, got {self.overlap}")
        if self.hop % self.splits or self.stride * (self.overlap - 1) % 2:
            raise ConfigError(
                f"network.hop: must be a multiple of network.splits, and hop / splits even, got {self.hop}"
            )
        if self.code_width > self.width:
            raise ConfigError(f"network.code_width: at most network.width, got {self.code_width}")
        if (self.quantizer == "fsq") != (self.steps is not None):
            raise ConfigError("network.steps: belongs to network.quantizer=fsq, and only to it")

    @property
    def stride(self) -> int:
        """Samples from one spectral frame to the next."""
        return self.hop // self.splits


@dataclass(frozen=True)
class SpectralEncoderState:
    """Samples (B, P) that no window has passed yet, and the last frames of every block."""

    pending: Tensor
    blocks: tuple[Tensor, ...]
    num_codebooks: int


@dataclass(frozen=True)
class SpectralDecoderState:
    """What the decoder keeps of the past.

    Latents (B, P, D) that its first layer still needs, the last frames of every block, the samples that later
    windows will add to with the sum of squared windows there (B, window - stride), and how many samples to
    come lie before the signal.
    """

    pending: Tensor
    blocks: tuple[Tensor, ...]
    overlap: Tensor
    envelope: Tensor
    skip: int


@dataclass(frozen=True)
class SpectralOutput:
    """Of training.

    Attributes:
        waves: (B, N).
        quantized: what the quantizer gave.
        mel_error: scalar, mean absolute difference of the natural logarithms of mel magnitudes, of those that
            the codes tell and those of the input.
    """

    waves: Tensor
    quantized: Quantized
    mel_error: Tensor


class SpectralCodec(Codec):
    """Codec for mono audio. See the module's docstring; rows of a batch don't depend on each other."""

    channels = 1
    name = "spectral"

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.config = c = config
        self.sample_rate, self.hop = c.sample_rate, c.hop
        self.frame_rate = c.sample_rate / c.hop
        self.stride, size = c.stride, c.stride * c.overlap
        self.edge = (size - c.stride) // 2  # samples of the first and last windows outside the signal
        self.delay = 2 * self.edge + c.lookahead * c.hop
        bins = size // 2 + 1
        filters = mel_filters(c.sample_rate, bins, c.mels)
        self.register_buffer("window", torch.hann_window(size), persistent=False)
        self.register_buffer("filters", filters, persistent=False)
        # From log-mel values to log magnitudes: (mels, bins), and what is added.
        spread = F.normalize(filters, 1, 1).T
        level = -filters.sum(0).clamp_min(1e-6).log() @ spread
        self.register_buffer("spread", spread, persistent=False)
        self.register_buffer(
            "level", torch.where(filters.sum(1) > 0, level, math.log(QUIET)), persistent=False
        )

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(CausalConvNeXtBlock(c.width, c.width * c.expansion) for _ in range(count))

        self.mels_in = nn.Linear(c.splits * c.mels, c.width)
        self.encoder_blocks = blocks(c.encoder_blocks)
        if c.quantizer == "rvq":
            self.quantizer = ResidualVectorQuantizer(c.width, c.num_codebooks, c.codebook_size, c.code_width)
        else:
            self.quantizer = FiniteScalarQuantizer(c.width, c.num_codebooks, c.steps)
        self.num_codebooks, self.codebook_size = c.num_codebooks, self.quantizer.codebook_size
        self.mels_out = nn.Linear(c.width, c.splits * c.mels)
        nn.init.constant_(self.mels_out.bias, math.log(1e-2))  # soft sounds before any training
        self.past = 2  # frames before the current one in the decoder's first layer
        self.embed = nn.Conv1d(c.width, c.splits * c.width, self.past + 1 + c.lookahead)
        self.decoder_blocks = blocks(c.decoder_blocks)
        self.spectrum_out = nn.Linear(c.width, 3 * bins)

    # ---- beginning of a training ------------------------------------------------------------------------

    @torch.no_grad()
    def start_transform(self, waves: Tensor) -> None:
        """Make the path from the spectrogram to the codes and back principal components.

        They are ``code_width`` in all; with an FSQ as many as it has values.

        Args:
            waves: (B, N), N a multiple of ``hop``; some minutes of sound.
        """
        most = self.quantizer.project_in.out_features if self.config.quantizer == "fsq" else None
        size = min(most or self.config.code_width, self.config.width, self.mels_in.in_features)
        mels = self._analyse(waves).flatten(0, 1)
        mean = mels.mean(0)
        _, vectors = torch.linalg.eigh((mels - mean).T @ (mels - mean))
        components = vectors.flip(1)[:, :size]
        unit = torch.eye(self.config.width, device=waves.device)
        nn.init.zeros_(self.mels_in.bias)
        self.mels_in.weight[:size] = SCALE * components.T
        self.mels_in.bias[:size] = -SCALE * (mean @ components)
        self.quantizer.start_projections(unit[:size], SCALE * ((mels - mean) @ components))
        nn.init.zeros_(self.mels_out.weight)
        self.mels_out.weight[:, :size] = components / SCALE
        self.mels_out.bias.copy_(mean)
        bins = self.spectrum_out.out_features // 3
        for values in (self.spectrum_out.weight, self.spectrum_out.bias):
            nn.init.zeros_(values[:bins])

    @torch.no_grad()
    def start_codebooks(self, waves: Tensor) -> None:
        """Let codebooks begin with what fits waves (B, N), N a multiple of ``hop``: some minutes of sound."""
        if self.config.quantizer == "rvq":
            latents = [self._encode_mels(self._analyse(part), None)[0] for part in waves.split(16)]
            self.quantizer.start(torch.cat(latents).flatten(0, 1))

    # ---- whole signals ----------------------------------------------------------------------------------

    def forward(self, waves: Tensor, levels: Tensor | None = None, quantize: bool = True) -> SpectralOutput:
        """Training: waves (B, N), N a multiple of ``hop``, coded and decoded.

        Args:
            levels: (B,) codebooks each item may use, or None for all.
            quantize: False passes the latents on as they are, for the beginning of a training.
        """
        mels = self._analyse(waves)
        latents, _ = self._encode_mels(mels, None)
        quantized = self.quantizer(latents, levels) if quantize else self.quantizer.skip(latents)
        error = (self.mels_out(quantized.latents).float() - mels).abs().mean()
        return SpectralOutput(self._synthesise(quantized.latents), quantized, error)

    @torch.no_grad()
    def encode(self, waves: Tensor, lengths: Tensor | None = None, num_codebooks: int | None = None) -> Codes:
        """See :meth:`Codec.encode`; the tail of a row is padded to a whole frame with silence."""
        waves, lengths, num_codebooks = self.check_waves(waves, lengths, num_codebooks)
        waves = F.pad(waves[:, 0].float(), (0, -waves.shape[2] % self.hop))
        frames = torch.div(lengths + self.hop - 1, self.hop, rounding_mode="floor")
        if waves.shape[1]:
            latents, _ = self._encode_mels(self._analyse(waves), None)
            tokens = self.quantizer.encode(latents, num_codebooks)
        else:
            tokens = lengths.new_zeros(len(waves), num_codebooks, 0)
        tokens = tokens * present(frames, tokens.shape[2])[:, None]
        return Codes(tokens, frames, self.sample_rate, lengths, codec=self.name)

    @torch.no_grad()
    def decode(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """See :meth:`Codec.decode`."""
        tokens, frames, samples = self.check_codes(codes)
        ends = frames * self.hop
        lengths = ends if samples is None else torch.minimum(ends, samples)
        if not tokens.shape[2]:
            return self.window.new_zeros(len(tokens), 1, 0), lengths
        waves = self._synthesise(self.quantizer.decode(tokens), frames)[:, : int(lengths.max())]
        return (waves * present(lengths, waves.shape[1]))[:, None], lengths

    @torch.no_grad()
    def latents(self, tokens: Tensor) -> Tensor:
        """Codes (B, K, T) to the latents (B, D, T) that the decoder reads."""
        return self.quantizer.decode(self.check_tokens(tokens)).transpose(1, 2)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, D, T) to waves (B, 1, T * hop)."""
        return self._synthesise(latents.transpose(1, 2))[:, None]

    # ---- streams ----------------------------------------------------------------------------------------

    def init_encoder(self, batch: int, num_codebooks: int | None = None) -> SpectralEncoderState:
        """State of ``batch`` streams that go in lockstep."""
        blocks = [block.init_state(batch, self.window.device) for block in self.encoder_blocks]
        count = self.check_codebooks(num_codebooks)
        return SpectralEncoderState(self.window.new_zeros(batch, self.edge), tuple(blocks), count)

    @torch.no_grad()
    def encode_step(
        self, waves: Tensor, state: SpectralEncoderState, final: bool = False
    ) -> tuple[Tensor, SpectralEncoderState]:
        """Samples (B, 1, n), any n, to the codes (B, K, t) they complete; ``final`` pads the last frame."""
        waves, _, _ = self.check_waves(waves)
        self.check_rows(len(waves), state)
        pending = torch.cat([state.pending, waves[:, 0].float()], 1)
        if final:
            rest = pending.shape[1] - self.edge
            pending = F.pad(pending, (0, -rest % self.hop + self.edge))
        frames = max(0, (pending.shape[1] - 2 * self.edge) // self.hop)
        if not frames:
            tokens = torch.zeros(len(waves), state.num_codebooks, 0, dtype=torch.int64, device=waves.device)
            return tokens, replace(state, pending=pending)
        mels = self._mels(pending[:, : frames * self.hop + 2 * self.edge])
        latents, blocks = self._encode_mels(mels, state.blocks)
        tokens = self.quantizer.encode(latents, state.num_codebooks)
        return tokens, replace(state, pending=pending[:, frames * self.hop :], blocks=blocks)

    def init_decoder(self, batch: int) -> SpectralDecoderState:
        """State of ``batch`` streams that go in lockstep."""
        blocks = tuple(block.init_state(batch, self.window.device) for block in self.decoder_blocks)
        tail = self.window.new_zeros(batch, 2 * self.edge)
        pending = self.window.new_zeros(batch, self.past, self.config.width)
        return SpectralDecoderState(pending, blocks, tail, tail.clone(), self.edge)

    @torch.no_grad()
    def decode_step(
        self, tokens: Tensor, state: SpectralDecoderState, final: bool = False
    ) -> tuple[Tensor, SpectralDecoderState]:
        """Codes (B, K, t), any t, to the samples (B, 1, n) that are complete; ``final``: the rest."""
        tokens, pending = self.check_tokens(tokens), state.pending
        self.check_rows(len(tokens), state)
        if tokens.shape[2]:
            pending = torch.cat([pending, self.quantizer.decode(tokens)], 1)
        begun = pending.shape[1] > self.past or state.skip < self.edge
        if final and begun:
            pending = F.pad(pending, (0, 0, 0, self.config.lookahead))
        waves = self.window.new_zeros(len(pending), 0)
        if pending.shape[1] >= self.embed.kernel_size[0]:
            frames, blocks = self._decode_latents(pending, state.blocks)
            waves, overlap, envelope = self._overlap_add(frames, state.overlap, state.envelope)
            state = replace(state, blocks=blocks, overlap=overlap, envelope=envelope)
        keep = min(pending.shape[1], self.embed.kernel_size[0] - 1)
        state = replace(state, pending=pending[:, pending.shape[1] - keep :])
        if final and begun:
            rest = state.overlap / state.envelope.clamp_min(LEAST_WINDOWS)
            waves = torch.cat([waves, rest[:, : self.edge]], 1)
        skip = min(state.skip, waves.shape[1])
        return waves[:, None, skip:], replace(state, skip=state.skip - skip)

    # ---- parts ------------------------------------------------------------------------------------------

    def _analyse(self, waves: Tensor) -> Tensor:
        """Log-mel values (B, T, splits * mels) of waves (B, N), N a multiple of the hop."""
        return self._mels(F.pad(waves, (self.edge, self.edge)))

    def _mels(self, waves: Tensor) -> Tensor:
        """Of every whole window of ``waves`` (B, T * hop + 2 * edge)."""
        with torch.autocast(waves.device.type, enabled=False):
            frames = waves.float().unfold(1, len(self.window), self.stride) * self.window
            mels = (torch.fft.rfft(frames).abs() @ self.filters).clamp_min(QUIET).log()
            return mels.unflatten(1, (-1, self.config.splits)).flatten(2)

    def _encode_mels(
        self, mels: Tensor, states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _through(self.encoder_blocks, self.mels_in(mels), states)

    def _synthesise(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waves (B, T * hop) of latents (B, T, D), of which ``lengths`` (B,) count."""
        there = None
        if lengths is not None:
            there = present(lengths, latents.shape[1])[:, :, None]
            latents = latents * there
            there = there.repeat_interleave(self.config.splits, 1)
        frames, _ = self._decode_latents(F.pad(latents, (0, 0, self.past, self.config.lookahead)), None)
        tail = self.window.new_zeros(len(latents), 2 * self.edge)
        waves, overlap, envelope = self._overlap_add(frames, tail, tail, there)
        waves = torch.cat([waves, overlap / envelope.clamp_min(LEAST_WINDOWS)], 1)
        return waves[:, self.edge : self.edge + latents.shape[1] * self.hop]

    def _decode_latents(
        self, latents: Tensor, states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Windowed samples (B, T * splits, window) of latents (B, past + T + lookahead, D)."""
        splits, ahead = self.config.splits, self.config.lookahead
        x = self.embed(latents.transpose(1, 2)).transpose(1, 2)
        x, after = _through(self.decoder_blocks, x.unflatten(2, (splits, -1)).flatten(1, 2), states)
        mels = self.mels_out(latents[:, self.past : latents.shape[1] - ahead])
        with torch.autocast(latents.device.type, enabled=False):
            mels = mels.float().unflatten(2, (splits, -1)).flatten(1, 2)
            magnitude, real, imaginary = self.spectrum_out(x).float().chunk(3, -1)
            magnitude = magnitude + mels @ self.spread + self.level
            # Of length 1 but where both parts are tiny, whose direction is rounding.
            size = magnitude.clamp(max=LOUDEST).exp() * (real.square() + imaginary.square() + TINY).rsqrt()
            spectra = torch.complex(size * real, size * imaginary)
            return torch.fft.irfft(spectra, len(self.window)) * self.window, after

    def _overlap_add(
        self, frames: Tensor, overlap: Tensor, envelope: Tensor, there: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (B, F, window) added up, after what earlier ones left over, by the sum of squared windows.

        Args:
            overlap, envelope: (B, window - stride), what an earlier call gave for them.
            there: (B, F, 1), which frames there are; None: all.

        Returns:
            (B, F * stride) finished samples, and what the next frames add to: (B, window - stride) samples,
            not yet divided by the sum of squared windows, and that sum.
        """
        squares = self.window.square().expand_as(frames)
        if there is not None:
            frames, squares = frames * there, squares * there
        total, after = _add_up(frames, overlap, self.stride)
        weight, rest = _add_up(squares, envelope, self.stride)
        return total / weight.clamp_min(LEAST_WINDOWS), after, rest


def mel_filters(sample_rate: int, bins: int, mels: int) -> Tensor:
    """(bins, mels) triangles of equal area, from 0 to half the sample rate."""
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(bins, 0.0, sample_rate / 2, mels, sample_rate, norm="slaney")


def _through(
    blocks: nn.ModuleList, x: Tensor, states: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Frames (B, T, D) through all blocks, and the states after them."""
    after = []
    for number, block in enumerate(blocks):
        x, state = block(x, states[number] if states else None)
        after.append(state)
    return x, tuple(after)


def _add_up(frames: Tensor, overlap: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """(B, F * stride) sums of frames (B, F, W) that begin ``stride`` apart, and the W - stride after them."""
    batch, count, size = frames.shape
    pieces = frames.unflatten(2, (-1, stride))
    parts = size // stride
    total = frames.new_zeros(batch, count + parts - 1, stride)
    total[:, : parts - 1] = overlap.unflatten(1, (-1, stride))
    for part in range(parts):
        total[:, part : part + count] += pieces[:, :, part]
    return total[:, :count].flatten(1), total[:, count:].flatten(1)
