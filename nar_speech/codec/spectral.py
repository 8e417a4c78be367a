"""Our own codec: a cosine transform, two stacks of blocks with codes between them; small, and quick on a CPU.

Encoder and decoder read and write coefficients of the modified discrete cosine transform (Princen & Bradley
1987), as in MDCTCodec (Jiang et al. 2024): nothing but the transforms runs at the rate of samples. The path
from end to end beside the blocks' branches is linear. :meth:`SpectralCodec.start_transform` makes it a
transform codec before training, and the blocks learn the rest. All layers but the first of the decoder look
back only, so it streams with a delay of ``SpectralCodec.delay`` samples.
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

KNEE = 0.05  # compressed coefficients above it follow the square root, below it they are nearly linear
LEVELLING = 0.5  # power of a frame's level that its coefficients are divided by: quiet frames get codes too
LOUDEST = 5.0  # a decoded level is not above it; a square wave of full scale has 0
QUIET = 1e-4  # added to levels; digital silence has this one


@dataclass(frozen=True)
class SpectralCodecConfig:
    """Sizes; the network part of ``model.yaml``.

    Attributes:
        sample_rate: Hz.
        hop: samples of a frame, and coefficients of it; windows are twice as long. Even.
        width, expansion: channels of the blocks, and how many times more they have inside.
        encoder_blocks, decoder_blocks: ConvNeXt blocks.
        lookahead: frames after the current one that the decoder sees.
        quantizer: residual codebooks ("rvq") or rounded values ("fsq").
        num_codebooks, codebook_size, code_width: of the codebooks.
        steps: of each group of an FSQ.
        emphasis: coefficients are coded as if each sample had this part of the one before taken from it, so
            that codes tell more of high frequencies, which are weak in speech and music.
    """

    sample_rate: int = 16000
    hop: int = 320
    width: int = 256
    expansion: int = 3
    encoder_blocks: int = 5
    decoder_blocks: int = 9
    lookahead: int = 1
    quantizer: Literal["rvq", "fsq"] = "rvq"
    num_codebooks: int = 12
    codebook_size: int = 1024
    code_width: int = 64
    steps: list[int] | None = None
    emphasis: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.emphasis < 1:
            raise ConfigError(f"network.emphasis: must be at least 0 and below 1, got {self.emphasis}")
        for name in (
            "sample_rate",
            "hop",
            "width",
            "expansion",
            "num_codebooks",
            "codebook_size",
            "code_width",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"network.{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("encoder_blocks", "decoder_blocks", "lookahead"):
            if not 0 <= getattr(self, name) <= 100:
                raise ConfigError(f"network.{name}: must be 0 to 100, got {getattr(self, name)}")
        if self.hop % 2:
            raise ConfigError(f"network.hop: must be even, got {self.hop}")
        if self.code_width > self.width:
            raise ConfigError(f"network.code_width: at most network.width, got {self.code_width}")
        if (self.quantizer == "fsq") != (self.steps is not None):
            raise ConfigError("network.steps: belongs to network.quantizer=fsq, and only to it")


@dataclass(frozen=True)
class SpectralEncoderState:
    """Samples (B, P) that no window has passed yet, and the last frames of every block."""

    pending: Tensor
    blocks: tuple[Tensor, ...]
    num_codebooks: int


@dataclass(frozen=True)
class SpectralDecoderState:
    """What the decoder keeps of the past.

    Latents (B, P, D) that its first layer still needs, the last frames of every block, the samples that the
    next window will add to with the sum of squared windows there (B, hop), and how many samples to come lie
    before the signal.
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
        self.sample_rate, self.hop = c.sample_rate, c.hop
        self.frame_rate = c.sample_rate / c.hop
        self.edge = c.hop // 2  # samples of the first and last windows outside the signal
        self.delay = 2 * self.edge + c.lookahead * c.hop
        self.register_buffer(
            "window", torch.sin(math.pi * (torch.arange(2 * c.hop) + 0.5) / (2 * c.hop)), False
        )
        self.register_buffer("basis", cosine_basis(c.hop), persistent=False)
        self.register_buffer("tilt", emphasis_of_bins(c.hop, c.emphasis), persistent=False)

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(CausalConvNeXtBlock(c.width, c.width * c.expansion) for _ in range(count))

        self.spectrum_in = nn.Linear(c.hop + 1, c.width)
        self.encoder_blocks = blocks(c.encoder_blocks)
        if c.quantizer == "rvq":
            self.quantizer = ResidualVectorQuantizer(c.width, c.num_codebooks, c.codebook_size, c.code_width)
        else:
            self.quantizer = FiniteScalarQuantizer(c.width, c.num_codebooks, c.steps)
        self.num_codebooks, self.codebook_size = c.num_codebooks, self.quantizer.codebook_size
        self.past = 2  # frames before the current one in the decoder's first layer
        self.embed = nn.Conv1d(c.width, c.width, self.past + 1 + c.lookahead)
        self.decoder_blocks = blocks(c.decoder_blocks)
        self.spectrum_out = nn.Linear(c.width, c.hop + 1)

    # ---- beginning of a training ------------------------------------------------------------------------

    @torch.no_grad()
    def start_transform(self, waves: Tensor) -> None:
        """Make the linear path a transform codec: the level and the first principal components.

        They are ``code_width`` in all; with an FSQ as many as it has values. Without it the waveform gets
        through only after a long training.

        Args:
            waves: (B, N), N a multiple of ``hop``; some minutes of sound.
        """
        most = self.quantizer.project_in.out_features if self.config.quantizer == "fsq" else None
        size = min(most or self.config.code_width, self.config.width, self.hop + 1)
        spectra = self._analyse(waves).flatten(0, 1)
        coefficients = spectra[:, 1:]
        _, vectors = torch.linalg.eigh(coefficients.T @ coefficients)
        components = torch.zeros(self.hop + 1, size, device=waves.device)
        components[0, 0] = 1.0
        components[1:, 1:] = vectors.flip(1)[:, : size - 1]
        unit = torch.eye(self.config.width, device=waves.device)
        for layer in (self.spectrum_in, self.embed, self.spectrum_out):
            nn.init.zeros_(layer.bias)
        self.spectrum_in.weight[:size] = components.T
        self.quantizer.start_projections(unit[:size], spectra @ components)
        nn.init.normal_(self.embed.weight, std=1e-3)
        self.embed.weight[:, :, self.past] += unit
        nn.init.zeros_(self.spectrum_out.weight)
        self.spectrum_out.weight[:, :size] = components

    @torch.no_grad()
    def start_codebooks(self, waves: Tensor) -> None:
        """Let codebooks begin with what fits waves (B, N), N a multiple of ``hop``: some minutes of sound."""
        if self.config.quantizer == "rvq":
            latents = [self._latents(part) for part in waves.split(16)]
            self.quantizer.start(torch.cat(latents).flatten(0, 1))

    # ---- whole signals ----------------------------------------------------------------------------------

    def forward(
        self, waves: Tensor, levels: Tensor | None = None, quantize: bool = True
    ) -> tuple[Tensor, Quantized]:
        """Training: waves (B, N), N a multiple of ``hop``, to the decoded ones and the quantizer's output.

        Args:
            levels: (B,) codebooks each item may use, or None for all.
            quantize: False passes the latents on as they are, for the beginning of a training.
        """
        latents = self._latents(waves)
        quantized = self.quantizer(latents, levels) if quantize else self.quantizer.skip(latents)
        return self._synthesise(quantized.latents), quantized

    @torch.no_grad()
    def encode(self, waves: Tensor, lengths: Tensor | None = None, num_codebooks: int | None = None) -> Codes:
        """See :meth:`Codec.encode`; the tail of a row is padded to a whole frame with silence."""
        waves, lengths, num_codebooks = self.check_waves(waves, lengths, num_codebooks)
        waves = F.pad(waves[:, 0].float(), (0, -waves.shape[2] % self.hop))
        frames = torch.div(lengths + self.hop - 1, self.hop, rounding_mode="floor")
        if waves.shape[1]:
            tokens = self.quantizer.encode(self._latents(waves), num_codebooks)
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
        frames = max(0, pending.shape[1] // self.hop - 1)
        if not frames:
            tokens = torch.zeros(len(waves), state.num_codebooks, 0, dtype=torch.int64, device=waves.device)
            return tokens, replace(state, pending=pending)
        spectra = self._transform(pending[:, : (frames + 1) * self.hop])
        latents, blocks = self._encode_spectra(spectra, state.blocks)
        tokens = self.quantizer.encode(latents, state.num_codebooks)
        return tokens, replace(state, pending=pending[:, frames * self.hop :], blocks=blocks)

    def init_decoder(self, batch: int) -> SpectralDecoderState:
        """State of ``batch`` streams that go in lockstep."""
        blocks = tuple(block.init_state(batch, self.window.device) for block in self.decoder_blocks)
        tail = self.window.new_zeros(batch, self.hop)
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

    def _analyse(self, waves: Tensor) -> Tensor:
        """Levels and coefficients (B, T, 1 + hop) of waves (B, N), N a multiple of the hop."""
        return self._transform(F.pad(waves, (self.edge, self.edge)))

    def _latents(self, waves: Tensor) -> Tensor:
        """Latents (B, T, D) before quantization of waves (B, N), N a multiple of the hop."""
        return self._encode_spectra(self._analyse(waves), None)[0]

    def _transform(self, waves: Tensor) -> Tensor:
        """Level and coefficients (B, T, 1 + hop) of every whole window of ``waves`` (B, (T + 1) * hop).

        The level is a logarithm; coefficients are divided by a power of it and compressed.
        """
        with torch.autocast(waves.device.type, enabled=False):
            frames = waves.float().unfold(1, 2 * self.hop, self.hop) * self.window
            coefficients = frames @ self.basis * self.tilt
            level = (coefficients.square().mean(-1, keepdim=True).sqrt() + QUIET).log()
            coefficients = coefficients / (LEVELLING * level).exp()
            # The inverse of what _frames does: y (|y| + KNEE) = x.
            compressed = coefficients * 2 / (KNEE + (KNEE**2 + 4 * coefficients.abs()).sqrt())
            return torch.cat([level, compressed], -1)

    def _encode_spectra(
        self, spectra: Tensor, states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _through(self.encoder_blocks, self.spectrum_in(spectra), states)

    def _synthesise(self, latents: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waves (B, T * hop) of latents (B, T, D), of which ``lengths`` (B,) count."""
        there = None
        if lengths is not None:
            there = present(lengths, latents.shape[1])[:, :, None]
            latents = latents * there
        spectra, _ = self._decode_latents(F.pad(latents, (0, 0, self.past, self.config.lookahead)), None)
        tail = latents.new_zeros(len(latents), self.hop)
        waves, overlap, envelope = self._overlap_add(self._frames(spectra), tail, tail, there)
        waves = torch.cat([waves, overlap / envelope.clamp_min(1e-11)], 1)
        return waves[:, self.edge : self.edge + latents.shape[1] * self.hop]

    def _decode_latents(
        self, latents: Tensor, states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Levels and coefficients (B, T, 1 + hop) of latents and those that the first layer needs besides."""
        x, after = _through(self.decoder_blocks, self.embed(latents.transpose(1, 2)).transpose(1, 2), states)
        return self.spectrum_out(x), after

    def _frames(self, spectra: Tensor) -> Tensor:
        """Windowed samples (B, T, 2 * hop) of levels and coefficients (B, T, 1 + hop)."""
        with torch.autocast(spectra.device.type, enabled=False):
            level, compressed = spectra.float().split([1, self.hop], -1)
            coefficients = (
                compressed * (compressed.abs() + KNEE) * (LEVELLING * level.clamp(max=LOUDEST)).exp()
            )
            return (coefficients / self.tilt) @ self.basis.T * self.window

    def _overlap_add(
        self, frames: Tensor, overlap: Tensor, envelope: Tensor, there: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (B, T, 2 * hop) added up, after what earlier ones left over.

        Outside the signal there is silence, so the halves of the first and last windows that have no partner
        hold no aliases: dividing by the sum of squared windows makes them whole.

        Args:
            overlap, envelope: (B, hop), what an earlier call gave for them.
            there: (B, T, 1), which frames there are; None: all.

        Returns:
            (B, T * hop) finished samples, and what the next frame adds to: (B, hop) samples, not yet divided
            by the sum of squared windows, and that sum.
        """
        squares = self.window.square().expand_as(frames)
        if there is not None:
            frames, squares = frames * there, squares * there
        total, after = _add_halves(frames, overlap)
        weight, rest = _add_halves(squares, envelope)
        return total / weight.clamp_min(1e-11), after, rest


def cosine_basis(hop: int) -> Tensor:
    """(2 * hop, hop) cosines of the transform; with a sine window its frames add up to the signal again."""
    time = torch.arange(2 * hop, dtype=torch.float64) + 0.5 + hop / 2
    phase = math.pi / hop * time[:, None] * (torch.arange(hop, dtype=torch.float64) + 0.5)
    return (math.sqrt(2 / hop) * phase.cos()).float()


def emphasis_of_bins(hop: int, emphasis: float) -> Tensor:
    """(hop,) gains of the filter ``1 - emphasis z^-1`` at the frequencies of the coefficients."""
    angle = math.pi / hop * (torch.arange(hop, dtype=torch.float64) + 0.5)
    return (1 - 2 * emphasis * angle.cos() + emphasis**2).sqrt().float()


def _through(
    blocks: nn.ModuleList, x: Tensor, states: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Frames (B, T, D) through all blocks, and the states after them."""
    after = []
    for number, block in enumerate(blocks):
        x, state = block(x, states[number] if states else None)
        after.append(state)
    return x, tuple(after)


def _add_halves(frames: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T * hop) sums of frames (B, T, 2 * hop) laid half over each other, and the last half (B, hop)."""
    first, second = frames.chunk(2, -1)
    before = torch.cat([overlap[:, None], second[:, :-1]], 1)
    return (first + before).flatten(1), second[:, -1]
