"""Our own codec: short-time spectra in, codes, short-time spectra out; small, and quick on a CPU.

The encoder reads complex spectra with compressed magnitudes, and the decoder predicts such spectra. Both are
stacks of ConvNeXt blocks as in Vocos (Siuzdak 2023, section 3), whose head gives magnitude and phase. Nothing
but the transforms runs at the rate of samples. All layers but the first of the decoder look back only, so it
streams with a delay of ``SpectralCodec.delay`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.codec.base import Codec
from nar_speech.codec.quantize import FiniteScalarQuantizer, Quantized, ResidualVectorQuantizer
from nar_speech.errors import ConfigError
from nar_speech.layers.convnext import CausalConvNeXtBlock
from nar_speech.types import Codes

COMPRESSION = 0.5  # power of the magnitudes that the encoder reads and the decoder writes
LOUDEST = 1e3  # largest magnitude of a bin; a sine of full scale has a quarter of the window in its bin


@dataclass(frozen=True)
class SpectralCodecConfig:
    """Sizes; the network part of ``model.yaml``.

    Attributes:
        sample_rate: Hz.
        window, hop: samples of a spectrum and from one to the next; the window is a multiple of 2 x hop.
        stride: spectra in a code frame.
        fine_width, width: channels at the rate of spectra and at the rate of code frames.
        expansion: width of the pointwise layers in these.
        encoder_fine, encoder_blocks, decoder_blocks, decoder_fine: ConvNeXt blocks along the signal's path.
        decoder_fine_width: channels of the last ones.
        lookahead: code frames after the current one that the decoder sees.
        quantizer: residual codebooks ("rvq") or rounded values ("fsq").
        num_codebooks, codebook_size, code_width: of the codebooks.
        steps: of each group of an FSQ.
    """

    sample_rate: int = 16000
    window: int = 640
    hop: int = 160
    stride: int = 2
    fine_width: int = 192
    width: int = 256
    expansion: int = 3
    encoder_fine: int = 3
    encoder_blocks: int = 4
    decoder_blocks: int = 6
    decoder_fine: int = 4
    decoder_fine_width: int = 256
    lookahead: int = 1
    quantizer: Literal["rvq", "fsq"] = "rvq"
    num_codebooks: int = 12
    codebook_size: int = 1024
    code_width: int = 64
    steps: list[int] | None = None

    def __post_init__(self) -> None:
        for name in (
            "sample_rate",
            "window",
            "hop",
            "stride",
            "fine_width",
            "width",
            "expansion",
            "num_codebooks",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"network.{name}: must be at least 1, got {getattr(self, name)}")
        if self.window % (2 * self.hop) or self.window < 2 * self.hop:
            raise ConfigError(
                f"network.window: must be a multiple of 2 x hop, got {self.window} and {self.hop}"
            )
        if not 0 <= self.lookahead <= 50:
            raise ConfigError(f"network.lookahead: 0 to 50 code frames, got {self.lookahead}")
        if (self.quantizer == "fsq") != (self.steps is not None):
            raise ConfigError("network.steps: belongs to network.quantizer=fsq, and only to it")


@dataclass(frozen=True)
class SpectralEncoderState:
    """Samples (B, P) that no spectrum has passed yet, and the last frames of every block."""

    pending: Tensor
    blocks: tuple[Tensor, ...]
    num_codebooks: int | None = None


@dataclass(frozen=True)
class SpectralDecoderState:
    """What the decoder keeps of the past.

    Latents (B, P, D) that its first layer still needs, the last frames of every block, the samples that later
    spectra will add to with the sum of squared windows there (B, window - hop), and how many samples to come
    lie before the signal.
    """

    pending: Tensor
    blocks: tuple[Tensor, ...]
    overlap: Tensor
    envelope: Tensor
    skip: int


class SpectralCodec(Codec):
    """Codec for mono audio. See the module's docstring; rows of a batch don't depend on each other."""

    channels = 1
    name = "spectral"

    def __init__(self, config: SpectralCodecConfig):
        super().__init__()
        self.config = c = config
        self.sample_rate, self.hop = c.sample_rate, c.hop * c.stride
        self.edge = (c.window - c.hop) // 2  # samples of the first and last windows outside the signal
        self.frame_rate = c.sample_rate / self.hop
        self.delay = 2 * self.edge + c.lookahead * self.hop
        bins = c.window // 2 + 1
        window = torch.hann_window(c.window)
        self.register_buffer("window", window, persistent=False)

        def blocks(count: int, width: int) -> nn.ModuleList:
            depth = max(1, c.encoder_fine + c.encoder_blocks + c.decoder_blocks + c.decoder_fine)
            scale = 1 / math.sqrt(depth)
            return nn.ModuleList(
                CausalConvNeXtBlock(width, width * c.expansion, scale=scale) for _ in range(count)
            )

        self.spectrum_in = nn.Linear(2 * bins, c.fine_width)
        self.norm_in = nn.LayerNorm(c.fine_width, eps=1e-6)
        self.encoder_fine = blocks(c.encoder_fine, c.fine_width)
        self.down = nn.Linear(c.stride * c.fine_width, c.width)
        self.encoder_blocks = blocks(c.encoder_blocks, c.width)
        self.norm_latent = nn.LayerNorm(c.width, eps=1e-6)
        if c.quantizer == "rvq":
            self.quantizer = ResidualVectorQuantizer(c.width, c.num_codebooks, c.codebook_size, c.code_width)
        else:
            self.quantizer = FiniteScalarQuantizer(c.width, c.num_codebooks, c.steps)
        self.num_codebooks, self.codebook_size = c.num_codebooks, self.quantizer.codebook_size
        self.past = 2  # frames before the current one in the decoder's first layer
        self.embed = nn.Conv1d(c.width, c.width, self.past + 1 + c.lookahead)
        self.norm_embed = nn.LayerNorm(c.width, eps=1e-6)
        self.decoder_blocks = blocks(c.decoder_blocks, c.width)
        self.up = nn.Linear(c.width, c.stride * c.decoder_fine_width)
        self.decoder_fine = blocks(c.decoder_fine, c.decoder_fine_width)
        self.norm_out = nn.LayerNorm(c.decoder_fine_width, eps=1e-6)
        self.spectrum_out = nn.Linear(c.decoder_fine_width, 2 * bins)

    # ---- whole signals ----------------------------------------------------------------------------------

    def forward(
        self, waves: Tensor, levels: Tensor | None = None, quantize: bool = True
    ) -> tuple[Tensor, Quantized]:
        """Training: waves (B, N), N a multiple of ``hop``, to the decoded ones and the quantizer's output.

        Args:
            levels: (B,) codebooks each item may use, or None for all.
            quantize: False passes the latents on as they are, for the beginning of a training.
        """
        latents = self._analyse(waves)
        quantized = self.quantizer(latents, levels) if quantize else self.quantizer.skip(latents)
        return self._synthesise(quantized.latents), quantized

    @torch.no_grad()
    def start_codebooks(self, waves: Tensor) -> None:
        """Let codebooks begin with what fits waves (B, N), N a multiple of ``hop``: some minutes of sound."""
        if self.config.quantizer == "rvq":
            latents = [self._analyse(part) for part in waves.split(16)]
            self.quantizer.start(torch.cat(latents).flatten(0, 1))

    @torch.no_grad()
    def encode(self, waves: Tensor, lengths: Tensor | None = None, num_codebooks: int | None = None) -> Codes:
        """See :meth:`Codec.encode`; the tail of a row is padded to a whole frame with silence."""
        waves, lengths, num_codebooks = self.check_waves(waves, lengths, num_codebooks)
        waves = waves[:, 0].float() * _present(lengths, waves.shape[2])
        waves = F.pad(waves, (0, -waves.shape[1] % self.hop))
        frames = torch.div(lengths + self.hop - 1, self.hop, rounding_mode="floor")
        if waves.shape[1]:
            tokens = self.quantizer.encode(self._analyse(waves), num_codebooks)
        else:
            tokens = lengths.new_zeros(len(waves), num_codebooks, 0)
        tokens = tokens * _present(frames, tokens.shape[2])[:, None]
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
        return (waves * _present(lengths, waves.shape[1]))[:, None], lengths

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
        blocks = [block.init_state(batch, self.window.device) for block in self._encoder_blocks()]
        return SpectralEncoderState(self.window.new_zeros(batch, self.edge), tuple(blocks), num_codebooks)

    @torch.no_grad()
    def encode_step(
        self, waves: Tensor, state: SpectralEncoderState, final: bool = False
    ) -> tuple[Tensor, SpectralEncoderState]:
        """Samples (B, 1, n), any n, to the codes (B, K, t) they complete; ``final`` pads the last frame."""
        pending = torch.cat([state.pending, waves[:, 0]], 1)
        if final:
            rest = pending.shape[1] - self.edge
            pending = F.pad(pending, (0, -rest % self.hop + self.edge))
        spectra = (pending.shape[1] - self.config.window) // self.config.hop + 1
        frames = max(0, spectra // self.config.stride)
        levels = state.num_codebooks or self.num_codebooks
        if not frames:
            tokens = torch.zeros(len(waves), levels, 0, dtype=torch.int64, device=waves.device)
            return tokens, replace(state, pending=pending)
        used = (frames * self.config.stride - 1) * self.config.hop + self.config.window
        latents, blocks = self._encode_spectra(self._spectra(pending[:, :used]), state.blocks)
        tokens = self.quantizer.encode(latents, levels)
        return tokens, replace(state, pending=pending[:, frames * self.hop :], blocks=blocks)

    def init_decoder(self, batch: int) -> SpectralDecoderState:
        """State of ``batch`` streams that go in lockstep."""
        blocks = tuple(block.init_state(batch, self.window.device) for block in self._decoder_blocks())
        tail = self.window.new_zeros(batch, self.config.window - self.config.hop)
        pending = self.window.new_zeros(batch, self.past, self.config.width)
        return SpectralDecoderState(pending, blocks, tail, tail.clone(), self.edge)

    @torch.no_grad()
    def decode_step(
        self, tokens: Tensor, state: SpectralDecoderState, final: bool = False
    ) -> tuple[Tensor, SpectralDecoderState]:
        """Codes (B, K, t), any t, to the samples (B, 1, n) that are complete; ``final``: the rest."""
        tokens, pending = self.check_tokens(tokens), state.pending
        if tokens.shape[2]:
            pending = torch.cat([pending, self.quantizer.decode(self.check_tokens(tokens))], 1)
        begun = pending.shape[1] > self.past or state.skip < self.edge
        if final and begun:
            pending = F.pad(pending, (0, 0, 0, self.config.lookahead))
        waves = self.window.new_zeros(len(pending), 0)
        if pending.shape[1] >= self.embed.kernel_size[0]:
            spectra, blocks = self._decode_latents(pending, state.blocks)
            waves, overlap, envelope = self._overlap_add(self._frames(spectra), state.overlap, state.envelope)
            state = replace(state, blocks=blocks, overlap=overlap, envelope=envelope)
        keep = min(pending.shape[1], self.embed.kernel_size[0] - 1)
        state = replace(state, pending=pending[:, pending.shape[1] - keep :])
        if final and begun:
            waves = torch.cat([waves, (state.overlap / state.envelope.clamp_min(1e-11))[:, : self.edge]], 1)
        skip = min(state.skip, waves.shape[1])
        return waves[:, None, skip:], replace(state, skip=state.skip - skip)

    # ---- parts ------------------------------------------------------------------------------------------

    def _encoder_blocks(self) -> Sequence[CausalConvNeXtBlock]:
        return [*self.encoder_fine, *self.encoder_blocks]

    def _decoder_blocks(self) -> Sequence[CausalConvNeXtBlock]:
        return [*self.decoder_blocks, *self.decoder_fine]

    def _analyse(self, waves: Tensor) -> Tensor:
        """Latents (B, T, D) before quantization of waves (B, N), N a multiple of the hop."""
        return self._encode_spectra(self._spectra(F.pad(waves, (self.edge, self.edge))), None)[0]

    def _spectra(self, waves: Tensor) -> Tensor:
        """Compressed real and imaginary parts (B, S, 2 * bins) of every whole window of ``waves`` (B, N)."""
        with torch.autocast(waves.device.type, enabled=False):
            frames = waves.float().unfold(1, self.config.window, self.config.hop) * self.window
            spectrum = torch.fft.rfft(frames)
            magnitude = spectrum.abs().clamp_min(1e-4)
            spectrum = spectrum * magnitude.pow(COMPRESSION - 1)
            return torch.cat([spectrum.real, spectrum.imag], -1)

    def _encode_spectra(
        self, spectra: Tensor, states: Sequence[Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, after = self.norm_in(self.spectrum_in(spectra)), []
        for number, block in enumerate(self._encoder_blocks()):
            if number == len(self.encoder_fine):
                x = self._downsample(x)
            x, state = block(x, states[number] if states else None)
            after.append(state)
        if not self.encoder_blocks:
            x = self._downsample(x)
        return self.norm_latent(x), tuple(after)

    def _downsample(self, x: Tensor) -> Tensor:
        return self.down(x.unflatten(1, (-1, self.config.stride)).flatten(2))

    def _synthesise(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waves (B, T * hop) of latents (B, T, D), of which ``lengths`` (B,) count."""
        present = None
        if lengths is not None:
            present = _present(lengths, latents.shape[1])
            latents = latents * present[:, :, None]
            present = present.repeat_interleave(self.config.stride, 1)[:, :, None]
        spectra, _ = self._decode_latents(F.pad(latents, (0, 0, self.past, self.config.lookahead)), None)
        tail = latents.new_zeros(len(latents), self.config.window - self.config.hop)
        waves, overlap, envelope = self._overlap_add(self._frames(spectra), tail, tail, present)
        waves = torch.cat([waves, overlap / envelope.clamp_min(1e-11)], 1)
        return waves[:, self.edge : self.edge + latents.shape[1] * self.hop]

    def _decode_latents(
        self, latents: Tensor, states: Sequence[Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output (B, S, 2 * bins) of the head for latents and those that the first layer needs besides."""
        x, after = self.norm_embed(self.embed(latents.transpose(1, 2)).transpose(1, 2)), []
        for number, block in enumerate(self._decoder_blocks()):
            if number == len(self.decoder_blocks):
                x = self._upsample(x)
            x, state = block(x, states[number] if states else None)
            after.append(state)
        if not self.decoder_fine:
            x = self._upsample(x)
        return self.spectrum_out(self.norm_out(x)), tuple(after)

    def _upsample(self, x: Tensor) -> Tensor:
        return self.up(x).unflatten(2, (self.config.stride, -1)).flatten(1, 2)

    def _frames(self, head: Tensor) -> Tensor:
        """Windowed samples (B, S, window) of the head's output."""
        with torch.autocast(head.device.type, enabled=False):
            real, imaginary = head.float().chunk(2, -1)
            power = (real.square() + imaginary.square()).clamp(1e-12, LOUDEST ** (2 * COMPRESSION))
            gain = power.pow((1 / COMPRESSION - 1) / 2)
            spectrum = torch.complex(real * gain, imaginary * gain)
            return torch.fft.irfft(spectrum, self.config.window) * self.window

    def _overlap_add(
        self, frames: Tensor, overlap: Tensor, envelope: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (B, S, window) added up, after what earlier ones left over.

        Args:
            overlap, envelope: (B, window - hop), what an earlier call gave for them.
            present: (B, S, 1), which frames there are; None: all.

        Returns:
            (B, S * hop) finished samples, and what later frames add to: (B, window - hop) samples, not yet
            divided by the sum of squared windows, and that sum.
        """
        hop, size = self.config.hop, overlap.shape[1]
        squares = self.window.square().expand_as(frames)
        if present is not None:
            frames, squares = frames * present, squares * present
        total, weight = _fold(frames, hop), _fold(squares, hop)
        total = torch.cat([total[:, :size] + overlap, total[:, size:]], 1)
        weight = torch.cat([weight[:, :size] + envelope, weight[:, size:]], 1)
        end = frames.shape[1] * hop
        return total[:, :end] / weight[:, :end].clamp_min(1e-11), total[:, end:], weight[:, end:]


def _present(lengths: Tensor, size: int) -> Tensor:
    """(B, size) booleans: whether a position lies before the end of its row."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _fold(frames: Tensor, hop: int) -> Tensor:
    """Sum (B, (S - 1) * hop + W) of frames (B, S, W) laid ``hop`` apart; W is a multiple of ``hop``."""
    batch, count, width = frames.shape
    parts = frames.unflatten(2, (width // hop, hop))
    total = frames.new_zeros(batch, count + width // hop - 1, hop)
    for shift in range(width // hop):
        total[:, shift : shift + count] += parts[:, :, shift]
    return total.flatten(1)
