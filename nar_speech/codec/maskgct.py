"""The acoustic codec of MaskGCT: sound at 24 kHz to twelve codes of 10 bits, 50 times a second, and back.

    Wang et al. 2024, "MaskGCT", section 3.2.4 and appendix A.4; Kumar et al. 2023 (DAC; the encoder and the
    convolutional decoder); Siuzdak 2023 (Vocos; the released decoder).

Every convolution looks ahead and is padded with zeros, so streams have the numbers of the whole and a delay
(:attr:`MaskGCTCodec.delay`). Parameter names are the official ones: ``encoder`` is one file, ``decoder`` with
the quantizer the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.codec.fvq import FvqConfig, ResidualFactorizedQuantizer
from nar_speech.codec.rows import RowCodec
from nar_speech.codec.shapes import Shapes
from nar_speech.codec.stream import Chain, Conv, ConvTranspose, Op, PadToMultiple, Pointwise, Residual
from nar_speech.codec.vocos import BackboneConfig, Vocos, VocosConfig
from nar_speech.codec.vocos_heads import Head, HeadConfig, HeadState
from nar_speech.codec.weight_norm import NormedConv1d, NormedConvTranspose1d, fold
from nar_speech.errors import ConfigError

SAMPLE_RATE = 24000
DILATIONS = (1, 3, 9)  # of the residual units of a block


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder, with the official names.

    Args:
        d_model: channels of the first layer; every block doubles them.
        up_ratios: strides of the blocks.
        out_channels: width of the latents.
        use_tanh: bound the latents to -1 to 1.
    """

    d_model: int = 96
    up_ratios: tuple[int, ...] = (3, 4, 5, 8)
    out_channels: int = 256
    use_tanh: bool = False

    def __post_init__(self) -> None:
        configs.check_range(self, 1, configs.MAX_WIDTH, "d_model", "out_channels")
        _check_ratios(self.up_ratios)
        if self.d_model << len(self.up_ratios) > configs.MAX_WIDTH:
            raise ConfigError(f"d_model: {self.d_model} is too wide for {len(self.up_ratios)} blocks")

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.up_ratios)


@dataclass(frozen=True)
class DecoderConfig:
    """Quantizer and decoder, with the official names.

    Args:
        in_channels: width of the latents.
        num_quantizers, codebook_size, codebook_dim, quantizer_dropout, commitment, codebook_loss_weight,
            use_l2_normlize, quantizer_type: see :class:`~nar_speech.codec.fvq.FvqConfig`.
        use_vocos: the decoder is Vocos; else it has transposed convolutions.
        vocos_dim, vocos_intermediate_dim, vocos_num_layers, n_fft, hop_size, padding: of Vocos.
        upsample_initial_channel, up_ratios: of the convolutions: channels of the first layer, which every
            block halves, and strides of the blocks.
    """

    in_channels: int = 256
    num_quantizers: int = 12
    codebook_size: int = 1024
    codebook_dim: int = 8
    quantizer_dropout: float = 0.5
    commitment: float = 0.25
    codebook_loss_weight: float = 1.0
    use_l2_normlize: bool = True
    quantizer_type: Literal["fvq"] = "fvq"
    use_vocos: bool = True
    vocos_dim: int = 512
    vocos_intermediate_dim: int = 4096
    vocos_num_layers: int = 30
    n_fft: int = 1920
    hop_size: int = 480
    padding: Literal["center", "same"] = "same"
    upsample_initial_channel: int = 1536
    up_ratios: tuple[int, ...] = (8, 5, 4, 3)

    def __post_init__(self) -> None:
        self.quantizer()
        if self.use_vocos:
            self.vocos()
            return
        _check_ratios(self.up_ratios)
        least = 1 << len(self.up_ratios)
        configs.check_range(self, least, configs.MAX_WIDTH, "upsample_initial_channel")

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return self.hop_size if self.use_vocos else math.prod(self.up_ratios)

    def quantizer(self) -> FvqConfig:
        """Of the quantizer."""
        return FvqConfig.of(self, self.in_channels)

    def vocos(self) -> VocosConfig:
        """Of Vocos."""
        sizes = (self.in_channels, self.vocos_dim, self.vocos_intermediate_dim, self.vocos_num_layers)
        head = HeadConfig("istft", self.vocos_dim, self.n_fft, self.hop_size, padding=self.padding)
        return VocosConfig(BackboneConfig(*sizes), head)


@dataclass(frozen=True)
class MaskGCTCodecConfig:
    """The codec.

    Args:
        encoder, decoder: of either file.
        sample_rate: Hz.
        pad_tail: fill the last frame of a recording with silence, so that nothing of it is lost; False: leave
            a tail out that makes no frame, as the official code does.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    sample_rate: int = SAMPLE_RATE
    pad_tail: bool = True

    def __post_init__(self) -> None:
        configs.check_range(self, 1, 1_000_000, "sample_rate")
        if self.encoder.out_channels != self.decoder.in_channels:
            raise ConfigError(
                f"encoder.out_channels {self.encoder.out_channels} must equal decoder.in_channels"
                f" {self.decoder.in_channels}"
            )
        if self.encoder.hop != self.decoder.hop:
            raise ConfigError(
                f"frames of {self.encoder.hop} samples in the encoder, of {self.decoder.hop} in the decoder;"
                " make them equal"
            )


class Snake(nn.Module):
    """x + sin(a x)^2 / a, a learnt for every channel (Ziyin et al. 2020)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        return torch.addcmul(x, torch.sin(self.alpha * x).square(), (self.alpha + 1e-9).reciprocal())


class ResidualUnit(nn.Module):
    """Two convolutions added to their input."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.channels = channels
        self.block = nn.Sequential(
            Snake(channels),
            NormedConv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            Snake(channels),
            NormedConv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        return x + self.block(x)


class EncoderBlock(nn.Module):
    """Residual units, then a convolution with a stride to twice the channels."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.block = nn.Sequential(
            *(ResidualUnit(channels, dilation) for dilation in DILATIONS),
            Snake(channels),
            NormedConv1d(channels, 2 * channels, 2 * stride, stride, padding=math.ceil(stride / 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, 2 C, T / stride)."""
        return self.block(x)


class DecoderBlock(nn.Module):
    """A transposed convolution with a stride to ``outputs`` channels, then residual units."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.block = nn.Sequential(
            Snake(inputs),
            NormedConvTranspose1d(
                inputs, outputs, 2 * stride, stride, math.ceil(stride / 2), output_padding=stride % 2
            ),
            *(ResidualUnit(outputs, dilation) for dilation in DILATIONS),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C', T * stride)."""
        return self.block(x)


class AcousticEncoder(nn.Module):
    """Waves (B, 1, N) to latents (B, D, T); T is N / hop, rounded down but for a few samples' odds."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = c = config
        width = c.d_model
        layers: list[nn.Module] = [NormedConv1d(1, width, 7, padding=3)]
        for stride in c.up_ratios:
            layers.append(EncoderBlock(width, stride))
            width *= 2
        layers += [Snake(width), NormedConv1d(width, c.out_channels, 3, padding=1)]
        self.block = nn.Sequential(*layers, *([nn.Tanh()] if c.use_tanh else []))

    def forward(self, waves: Tensor) -> Tensor:
        """See the class; there must be samples for one frame."""
        return self.block(waves)

    def frames_of(self, samples: int) -> int:
        """Frames that so many samples give."""
        for stride in self.config.up_ratios:
            samples = max((samples + 2 * math.ceil(stride / 2)) // stride - 1, 0)
        return samples


class AcousticDecoder(nn.Module):
    """The quantizer, and what makes sound of its latents."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = c = config
        self.quantizer = ResidualFactorizedQuantizer(c.quantizer())
        self.model: Vocos | nn.Sequential = Vocos(c.vocos()) if c.use_vocos else _convolutions(c)

    def forward(self, latents: Tensor) -> Tensor:
        """Waves (B, 1, N) of latents (B, D, T), T >= 1."""
        return self.model(latents)[0][:, None] if self.config.use_vocos else self.model(latents)


def _convolutions(config: DecoderConfig) -> nn.Sequential:
    """The decoder of transposed convolutions."""
    first = config.upsample_initial_channel
    layers: list[nn.Module] = [NormedConv1d(config.in_channels, first, 7, padding=3)]
    for number, stride in enumerate(config.up_ratios):
        layers.append(DecoderBlock(first >> number, first >> number + 1, stride))
    last = first >> len(config.up_ratios)
    return nn.Sequential(*layers, Snake(last), NormedConv1d(last, 1, 7, padding=3), nn.Tanh())


class MaskGCTCodec(RowCodec):
    """The codec; see the module's docstring."""

    channels = 1

    def __init__(self, config: MaskGCTCodecConfig | None = None, name: str = "maskgct"):
        super().__init__()
        self.config = c = config or MaskGCTCodecConfig()
        self.name = name
        self.encoder, self.decoder = AcousticEncoder(c.encoder), AcousticDecoder(c.decoder)
        self.sample_rate, self.hop = c.sample_rate, c.encoder.hop
        self.frame_rate = self.sample_rate / self.hop
        self.num_codebooks, self.codebook_size = c.decoder.num_quantizers, c.decoder.codebook_size
        self.set_delay()

    def frames_of(self, samples: int) -> int:
        """See :meth:`Codec.frames_of`."""
        return super().frames_of(samples) if self.config.pad_tail else self.encoder.frames_of(samples)

    def encode_rows(self, waves: Tensor, num_codebooks: int) -> tuple[Tensor, None]:
        """See :class:`RowCodec`."""
        if self.config.pad_tail:
            waves = F.pad(waves, (0, -waves.shape[2] % self.hop))
        if not self.encoder.frames_of(waves.shape[2]):
            return torch.zeros(len(waves), num_codebooks, 0, dtype=torch.int64, device=waves.device), None
        return self.quantize(self.encoder(waves), num_codebooks), None

    def decode_rows(self, tokens: Tensor, scales: None) -> Tensor:
        """See :class:`RowCodec`."""
        return self.decode_latents(self.latents(tokens))

    def quantize(self, latents: Tensor, num_codebooks: int) -> Tensor:
        """See :class:`RowCodec`."""
        return self.decoder.quantizer.encode(latents, num_codebooks)[0]

    def latents(self, tokens: Tensor) -> Tensor:
        """See :meth:`Codec.latents`."""
        return self.decoder.quantizer.decode(self.check_tokens(tokens))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See :meth:`Codec.decode_latents`."""
        return self.decoder(latents)

    def build_encoder_ops(self) -> Op:
        """See :class:`RowCodec`."""
        ops = _layer_op(self.encoder.block)
        return Chain([PadToMultiple(self.hop), ops]) if self.config.pad_tail else ops

    def build_decoder_ops(self) -> Op:
        """See :class:`RowCodec`."""
        model = self.decoder.model
        return Chain([model.ops, HeadOp(model.head)]) if isinstance(model, Vocos) else _layer_op(model)


class HeadOp(Op):
    """The head of Vocos: frames (B, D, t) to waves (B, 1, n)."""

    def __init__(self, head: Head):
        self.head = head

    def init(self, batch: int, like: Tensor) -> HeadState:
        """Nothing heard yet."""
        return self.head.init_state(batch, like)

    def step(self, x: Tensor, state: HeadState, final: bool) -> tuple[Tensor, HeadState]:
        """See :class:`Op`."""
        waves, state = self.head.step(x.transpose(1, 2), state, final)
        return waves[:, None], state

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        return max(inputs * self.head.hop - self.head.delay, 0)

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Op`."""
        waves, counts = self.head.rows(x.transpose(1, 2), lengths)
        return waves[:, None], counts


def _layer_op(layer: nn.Module) -> Op:
    """The operator of a layer, or of the layers in it."""
    if isinstance(layer, nn.Sequential):
        return Chain([_layer_op(part) for part in layer])
    if isinstance(layer, ResidualUnit):
        return Residual(_layer_op(layer.block), layer.channels)
    if isinstance(layer, EncoderBlock | DecoderBlock):
        return _layer_op(layer.block)
    if isinstance(layer, nn.Conv1d):
        return Conv(layer, layer.padding[0], layer.padding[0])
    if isinstance(layer, nn.ConvTranspose1d):
        return ConvTranspose(layer, layer.padding[0], layer.padding[0] - layer.output_padding[0])
    return Pointwise(layer)


def _check_ratios(ratios: tuple[int, ...]) -> None:
    if not ratios or min(ratios) < 1 or math.prod(ratios) > configs.MAX_WIDTH:
        raise ConfigError(f"up_ratios: got {list(ratios)}; must be whole numbers of 1 or more")


# Official files: two of one folder, without a configuration. All sizes are in the shapes.

FOLDER, ENCODER_FILE, DECODER_FILE = "acoustic_codec", "model.safetensors", "model_1.safetensors"


def official_folder(folder: Path) -> Path | None:
    """The folder of the codec's files: ``folder`` itself, the one in a whole folder of MaskGCT, or None."""
    if (folder / FOLDER).is_dir():
        return folder / FOLDER
    return folder if (folder / DECODER_FILE).is_file() else None


def load_official(folder: Path, name: str = "maskgct", pad_tail: bool = True) -> MaskGCTCodec:
    """The codec of what :func:`official_folder` found, weight norm folded.

    Args:
        name: for messages and token files.
        pad_tail: see :class:`MaskGCTCodecConfig`.

    Raises:
        CheckpointError: a file is missing or damaged, or holds something else. ConfigError: they don't fit.
    """
    paths = (folder / ENCODER_FILE, folder / DECODER_FILE)
    tensors = [read_weights(path) for path in paths]
    encoder = official_encoder(Shapes(tensors[0], str(paths[0]), "the acoustic encoder of MaskGCT"))
    shapes = Shapes(tensors[1], str(paths[1]), "the acoustic decoder of MaskGCT")
    decoder = official_decoder(shapes, encoder.hop)
    with configs.blame(str(folder)), SkipInit():
        codec = MaskGCTCodec(MaskGCTCodecConfig(encoder, decoder, pad_tail=pad_tail), name)
    for part, values, path in zip((codec.encoder, codec.decoder), tensors, paths, strict=True):
        load_strict(part, values, where=path)
    fold(codec)
    return codec


def official_encoder(shapes: Shapes) -> EncoderConfig:
    """The sizes of the encoder's file.

    Raises:
        CheckpointError: a tensor that tells them is missing. ConfigError: an impossible size.
    """
    width, _, _ = shapes.of("block.0.weight_v", 3)
    blocks = shapes.count(r"block\.\d+\.block\.4\.weight_v")
    kernels = [shapes.of(f"block.{number + 1}.block.4.weight_v", 3)[2] for number in range(blocks)]
    out, _, _ = shapes.of(f"block.{blocks + 2}.weight_v", 3)
    with configs.blame(shapes.where):
        return EncoderConfig(width, tuple(kernel // 2 for kernel in kernels), out)


def official_decoder(shapes: Shapes, hop: int) -> DecoderConfig:
    """The sizes of the file of quantizer and decoder.

    Args:
        hop: samples per frame, of the encoder; the weights of Vocos don't tell it.

    Raises:
        CheckpointError: a tensor that tells them is missing. ConfigError: an impossible size.
    """
    size, inner = shapes.of("quantizer.quantizers.0.codebook.weight", 2)
    levels = shapes.count(r"quantizer\.quantizers\.\d+\.codebook\.weight")
    quantizer = {"num_quantizers": levels, "codebook_size": size, "codebook_dim": inner}
    if shapes.count(r"model\.backbone\..*"):
        dim, width, _ = shapes.of("model.backbone.embed.weight", 3)
        sizes = {
            "vocos_dim": dim,
            "vocos_intermediate_dim": shapes.of("model.backbone.convnext.0.pwconv1.weight", 2)[0],
            "vocos_num_layers": shapes.count(r"model\.backbone\.convnext\.\d+\.gamma"),
            "n_fft": shapes.of("model.head.istft.window", 1)[0],
            "hop_size": hop,
        }
    else:
        first, width, _ = shapes.of("model.0.weight_v", 3)
        blocks = shapes.count(r"model\.\d+\.block\.1\.weight_v")
        kernels = [shapes.of(f"model.{number + 1}.block.1.weight_v", 3)[2] for number in range(blocks)]
        ratios = tuple(kernel // 2 for kernel in kernels)
        sizes = {"use_vocos": False, "upsample_initial_channel": first, "up_ratios": ratios}
    with configs.blame(shapes.where):
        return DecoderConfig(in_channels=width, **quantizer, **sizes)
