"""Vocos (Siuzdak 2023): a vocoder whose only upsampling is an inverse Fourier transform, or an inverse MDCT.

A backbone of ConvNeXt blocks at the rate of frames, then a head that predicts each frame's spectrum. It reads
log-mel spectra, or the code vectors of EnCodec under one of several bandwidths (adaptive layer norms).

Parameter names are the official ones. Streams give the numbers of the whole, :attr:`Vocos.delay` samples
later: every block looks three frames ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.checkpoint import load_strict, read_weights
from nar_speech.codec.rows import rows_by_length
from nar_speech.codec.stream import Chain, Conv, Op, Pointwise, Residual
from nar_speech.codec.vocos_heads import Head, HeadConfig, HeadState, build_head
from nar_speech.errors import ConfigError, InputError

KERNEL = 7


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes of the backbone, with the official names.

    Args:
        input_channels: of the features.
        dim, intermediate_dim: width of the blocks, and between their pointwise layers.
        num_layers: blocks.
        layer_scale_init_value: what a block is multiplied with at first; None: 1 / ``num_layers``.
        adanorm_num_embeddings: bandwidths that condition the norms; None: none do.
    """

    input_channels: int
    dim: int
    intermediate_dim: int
    num_layers: int
    layer_scale_init_value: float | None = None
    adanorm_num_embeddings: int | None = None

    def __post_init__(self) -> None:
        configs.check_range(self, 1, configs.MAX_WIDTH, "input_channels", "dim", "intermediate_dim")
        configs.check_range(self, 1, configs.MAX_BLOCKS, "num_layers")


@dataclass(frozen=True)
class MelConfig:
    """Log-mel features, with the official names; padding by half a window or (n_fft - hop) / 2."""

    sample_rate: int = 24000
    n_fft: int = 1024
    hop_length: int = 256
    n_mels: int = 100
    padding: Literal["center", "same"] = "center"


@dataclass(frozen=True)
class CodesConfig:
    """Features from EnCodec's codes, with the official names.

    Args:
        encodec_model: of the encodec package.
        bandwidths: kbit/s; a vocoder's ``bandwidth_id`` is a place in this list.
        train_codebooks: whether training changes the code vectors.
        num_q, bins, dimension: codebooks, their size, and the width of code vectors.
    """

    encodec_model: str = "encodec_24khz"
    bandwidths: tuple[float, ...] = (1.5, 3.0, 6.0, 12.0)
    train_codebooks: bool = False
    num_q: int = 16
    bins: int = 1024
    dimension: int = 128


@dataclass(frozen=True)
class VocosConfig:
    """A vocoder: backbone, head, and the features it reads (neither ``mel`` nor ``codes``: yours)."""

    backbone: BackboneConfig
    head: HeadConfig
    mel: MelConfig | None = None
    codes: CodesConfig | None = None

    def __post_init__(self) -> None:
        if self.head.dim != self.backbone.dim:
            raise ConfigError(f"head.dim {self.head.dim} must equal backbone.dim {self.backbone.dim}")
        given = [c for c in (self.mel and self.mel.n_mels, self.codes and self.codes.dimension) if c]
        if len(given) > 1 or (given and given[0] != self.backbone.input_channels):
            raise ConfigError(
                f"features of {given} channels, but backbone.input_channels is"
                f" {self.backbone.input_channels}; make them equal"
            )


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale and shift are looked up by bandwidth."""

    def __init__(self, bandwidths: int, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps, self.width = eps, width
        self.scale = nn.Embedding(bandwidths, width)
        self.shift = nn.Embedding(bandwidths, width)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, bandwidth: Tensor) -> Tensor:
        """Frames (B, T, D) under ``bandwidth`` (B,) int64."""
        normed = F.layer_norm(x, (self.width,), eps=self.eps)
        return normed * self.scale(bandwidth)[:, None] + self.shift(bandwidth)[:, None]


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, two pointwise layers, scaled and added to the input (section 3.1)."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        c = config
        self.dwconv = nn.Conv1d(c.dim, c.dim, KERNEL, padding=KERNEL // 2, groups=c.dim)
        self.norm = _norm(c)
        self.pwconv1 = nn.Linear(c.dim, c.intermediate_dim)
        self.pwconv2 = nn.Linear(c.intermediate_dim, c.dim)
        scale = 1 / c.num_layers if c.layer_scale_init_value is None else c.layer_scale_init_value
        self.gamma = nn.Parameter(torch.full((c.dim,), scale))

    def forward(self, x: Tensor, bandwidth: Tensor | None) -> Tensor:
        """Frames (B, D, T) to (B, D, T)."""
        y = _normed(self.norm, self.dwconv(x).transpose(1, 2), bandwidth)
        return x + self.pointwise(y)

    def pointwise(self, y: Tensor) -> Tensor:
        """What follows the norm: (B, T, D) to (B, D, T)."""
        return (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).transpose(1, 2)


class Backbone(nn.Module):
    """Features to the frames that a head reads."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        c = config
        self.embed = nn.Conv1d(c.input_channels, c.dim, KERNEL, padding=KERNEL // 2)
        self.norm = _norm(c)
        self.convnext = nn.ModuleList([ConvNeXtBlock(c) for _ in range(c.num_layers)])
        self.final_layer_norm = nn.LayerNorm(c.dim, eps=1e-6)
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(
        self, features: Tensor, bandwidth: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor:
        """Features (B, C, T) to (B, T, D).

        Args:
            present: (B, T) booleans, which frames there are; others are like the padding of a row that ends
                there, so that a row gives what it gives alone. None: all.
        """
        behind = None if present is None else ~present[:, None]

        def ended(x: Tensor) -> Tensor:
            return x if behind is None else x.masked_fill(behind, 0.0)

        x = _normed(self.norm, self.embed(ended(features)).transpose(1, 2), bandwidth).transpose(1, 2)
        for block in self.convnext:
            x = block(ended(x), bandwidth)
        return self.final_layer_norm(x.transpose(1, 2))


def _norm(config: BackboneConfig) -> nn.Module:
    if config.adanorm_num_embeddings is None:
        return nn.LayerNorm(config.dim, eps=1e-6)
    return AdaptiveNorm(config.adanorm_num_embeddings, config.dim)


def _normed(norm: nn.Module, x: Tensor, bandwidth: Tensor | None) -> Tensor:
    return norm(x, bandwidth) if isinstance(norm, AdaptiveNorm) else norm(x)


class MelFeatures(nn.Module):
    """Natural logarithm of magnitudes in mel bands (HTK's scale), floored at 1e-7."""

    def __init__(self, config: MelConfig):
        super().__init__()
        from torchaudio.transforms import MelSpectrogram

        c = config
        center = c.padding == "center"
        self.side = 0 if center else (c.n_fft - c.hop_length) // 2
        self.mel_spec = MelSpectrogram(
            c.sample_rate, c.n_fft, hop_length=c.hop_length, n_mels=c.n_mels, power=1, center=center
        )

    def forward(self, waves: Tensor) -> Tensor:
        """Waves (B, N) to features (B, n_mels, T)."""
        if self.side:
            waves = F.pad(waves[:, None], (self.side, self.side), mode="reflect")[:, 0]
        return self.mel_spec(waves).clamp(min=1e-7).log()


class CodeFeatures(nn.Module):
    """Sums of EnCodec's code vectors, all codebooks in one table."""

    def __init__(self, config: CodesConfig):
        super().__init__()
        self.bins = config.bins
        table = torch.zeros(config.num_q * config.bins, config.dimension)
        self.codebook_weights = nn.Parameter(table, requires_grad=config.train_codebooks)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, K, T) to features (B, D, T); an InputError for tokens that the table does not have."""
        low, high = (int(v) for v in torch.aminmax(tokens)) if tokens.numel() else (0, 0)
        if low < 0 or high >= self.bins or tokens.shape[1] * self.bins > len(self.codebook_weights):
            raise InputError(
                f"vocos: tokens of {tokens.shape[1]} codebooks from {low} to {high}; it has"
                f" {len(self.codebook_weights) // self.bins} codebooks of {self.bins}"
            )
        places = tokens + self.bins * torch.arange(tokens.shape[1], device=tokens.device)[:, None]
        return F.embedding(places, self.codebook_weights).sum(1).transpose(1, 2)


@dataclass(frozen=True)
class BandwidthState:
    """The bandwidth (B,) of each stream."""

    bandwidth: Tensor


class NormOp(Op):
    """An adaptive norm over (B, D, n), followed by a block's pointwise layers if ``block`` is given."""

    def __init__(self, norm: AdaptiveNorm, block: ConvNeXtBlock | None = None):
        self.norm, self.block = norm, block

    def init(self, batch: int, like: Tensor) -> BandwidthState:
        """The first bandwidth; :meth:`Vocos.init_state` puts in another."""
        return BandwidthState(torch.zeros(batch, dtype=torch.int64, device=like.device))

    def step(self, x: Tensor, state: BandwidthState, final: bool) -> tuple[Tensor, BandwidthState]:
        """See :class:`Op`."""
        y = self.norm(x.transpose(1, 2), state.bandwidth)
        return (y.transpose(1, 2) if self.block is None else self.block.pointwise(y)), state

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        return inputs


@dataclass(frozen=True)
class VocosState:
    """Of the backbone's layers and of the head."""

    layers: Any
    head: HeadState


class Vocos(nn.Module):
    """The vocoder.

    Attributes:
        hop: samples per frame.
        delay: samples by which a stream's sound lags behind its features.
    """

    def __init__(self, config: VocosConfig):
        super().__init__()
        self.config = config
        if config.mel is not None:
            self.feature_extractor = MelFeatures(config.mel)
        elif config.codes is not None:
            self.feature_extractor = CodeFeatures(config.codes)
        self.backbone = Backbone(config.backbone)
        self.head: Head = build_head(config.head)
        self.hop = self.head.hop
        self.ops = self._build_ops()
        ahead = (KERNEL // 2) * (config.backbone.num_layers + 1)
        self.delay = ahead * self.hop + self.head.delay

    def forward(
        self, features: Tensor, lengths: Tensor | None = None, bandwidth: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sound of features.

        Args:
            features: (B, C, T) float32, T >= 1.
            lengths: (B,) frames of each row; None: all T.
            bandwidth: place in the list of bandwidths, (B,) or one for all; of conditioned vocoders only.

        Returns:
            waves (B, N), zeros behind the end of a row, and lengths (B,) samples.

        Raises:
            InputError: another shape, a bandwidth that is missing, unknown or not wanted.
        """
        batch = self._check(features)
        bandwidths = self._bandwidths(bandwidth, batch)
        if lengths is None:
            lengths = torch.full((batch,), features.shape[2])
        ends = torch.zeros(batch, dtype=torch.int64)
        pieces = []
        for length, rows in rows_by_length(lengths):
            part = None if bandwidths is None else bandwidths[rows]
            waves = self.head(self.backbone(features[rows, :, :length], part))
            ends[rows] = waves.shape[1]
            pieces.append((rows, waves))
        result = features.new_zeros(batch, int(ends.max()))
        for rows, waves in pieces:
            result[rows, : waves.shape[1]] = waves
        return result, ends.to(features.device)

    def features(self, source: Tensor) -> Tensor:
        """Features (B, C, T) of waves (B, N), or of EnCodec's tokens (B, K, T).

        Raises:
            InputError: this vocoder brings no features, or tokens are out of range.
        """
        if not hasattr(self, "feature_extractor"):
            raise InputError("vocos: this vocoder brings no features; compute them as its model wants them")
        return self.feature_extractor(source)

    def init_state(self, batch: int, bandwidth: Tensor | int | None = None) -> VocosState:
        """The state of ``batch`` streams; ``bandwidth`` as in :meth:`forward`."""
        like = self.backbone.embed.weight
        layers = self.ops.init(batch, like)
        bandwidths = self._bandwidths(bandwidth, batch)
        if bandwidths is not None:
            layers = _under(layers, BandwidthState(bandwidths))
        return VocosState(layers, self.head.init_state(batch, like))

    def step(self, features: Tensor, state: VocosState, final: bool = False) -> tuple[Tensor, VocosState]:
        """Samples (B, n) that are complete now for more features (B, C, t), t >= 0."""
        self._check(features)
        frames, layers = self.ops.step(features, state.layers, final)
        waves, head = self.head.step(frames.transpose(1, 2), state.head, final)
        return waves, VocosState(layers, head)

    def _build_ops(self) -> Chain:
        net = self.backbone
        ops: list[Op] = [_conv(net.embed)]
        if isinstance(net.norm, AdaptiveNorm):
            ops.append(NormOp(net.norm))
        else:
            ops.append(Pointwise(_columns(net.norm)))
        for block in net.convnext:
            if isinstance(block.norm, AdaptiveNorm):
                rest: Op = NormOp(block.norm, block)
            else:
                rest = Pointwise(_rest(block))
            ops.append(Residual(Chain([_conv(block.dwconv), rest]), block.dwconv.out_channels))
        return Chain([*ops, Pointwise(_columns(net.final_layer_norm))])

    def _check(self, features: Tensor) -> int:
        channels = self.config.backbone.input_channels
        if features.dim() != 3 or features.shape[1] != channels or not features.is_floating_point():
            raise InputError(
                f"vocos: features of shape {tuple(features.shape)}; expected float (B, {channels}, frames)"
            )
        return features.shape[0]

    def _bandwidths(self, bandwidth: Tensor | int | None, batch: int) -> Tensor | None:
        """(B,) int64, checked; None where nothing is conditioned."""
        count = self.config.backbone.adanorm_num_embeddings
        if count is None:
            if bandwidth is not None:
                raise InputError("vocos: this vocoder has no bandwidths; leave the bandwidth away")
            return None
        if bandwidth is None:
            raise InputError(f"vocos: this vocoder needs a bandwidth, 0 to {count - 1}")
        wanted = torch.as_tensor(bandwidth).flatten()
        if (
            len(wanted) not in (1, batch)
            or wanted.is_floating_point()
            or not 0 <= wanted.min() <= wanted.max() < count
        ):
            raise InputError(
                f"vocos: bandwidth {wanted.tolist()}; expected one or {batch} of 0 to {count - 1}"
            )
        return wanted.expand(batch).to(self.backbone.embed.weight.device)

    @classmethod
    def from_official(cls, folder: str | Path) -> Vocos:
        """A vocoder from the folder of a released one: ``config.yaml`` and ``pytorch_model.bin``.

        Raises:
            ConfigError, CheckpointError: what is wrong with either file.
        """
        folder = Path(folder)
        config = official_config(configs.read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
        weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[-1])
        tensors = read_weights(weights)
        table = tensors.get("feature_extractor.codebook_weights")
        if config.codes is not None and table is not None:
            codes = replace(config.codes, num_q=len(table) // config.codes.bins, dimension=table.shape[1])
            config = replace(config, codes=codes)
        with configs.blame(str(folder / "config.yaml")):
            model = cls(config)
        load_strict(model, tensors, RENAME, weights)
        return model.eval().requires_grad_(False)


def _conv(conv: nn.Conv1d) -> Conv:
    return Conv(conv, conv.padding[0], conv.padding[0])


# Partial functions and no lambdas: a copy of the network must get operators over its own layers.


def _columns(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return partial(_over_channels, norm)


def _over_channels(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.transpose(1, 2)).transpose(1, 2)


def _rest(block: ConvNeXtBlock) -> Callable[[Tensor], Tensor]:
    return partial(_behind_norm, block)


def _behind_norm(block: ConvNeXtBlock, x: Tensor) -> Tensor:
    return block.pointwise(block.norm(x.transpose(1, 2)))


def _under(state: Any, bandwidth: BandwidthState) -> Any:
    """A backbone's state with the bandwidth in every adaptive norm."""
    if isinstance(state, BandwidthState):
        return bandwidth
    if hasattr(state, "parts"):
        return replace(state, parts=tuple(_under(part, bandwidth) for part in state.parts))
    if hasattr(state, "block"):
        return replace(state, block=_under(state.block, bandwidth))
    return state


# Official files. The names of tensors are ours; EnCodec's own weights, where a file has them, are not needed.

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
RENAME: dict[str, str | None] = {r"feature_extractor\.encodec\.": None}
HEADS = {"ISTFTHead": "istft", "IMDCTSymExpHead": "symexp", "IMDCTCosHead": "cos"}


def official_config(tree: Mapping[str, Any], where: str = "config.yaml") -> VocosConfig:
    """The configuration of a released vocoder's ``config.yaml``.

    Raises:
        ConfigError: a missing part, a class that is not supported, an unknown or wrong key.
    """
    parts: dict[str, tuple[str, dict[str, Any]]] = {}
    for part in ("feature_extractor", "backbone", "head"):
        entry = tree.get(part)
        if not isinstance(entry, Mapping) or not isinstance(entry.get("class_path"), str):
            raise ConfigError(
                f"{where}: '{part}' with class_path and init_args is missing; not a Vocos model"
            )
        parts[part] = (entry["class_path"].rsplit(".", 1)[-1], dict(entry.get("init_args") or {}))
    name, arguments = parts["backbone"]
    if name != "VocosBackbone":
        raise ConfigError(f"{where}: backbone {name} is not supported; only VocosBackbone is")
    backbone = configs.from_dict(BackboneConfig, arguments, f"{where}: backbone")
    name, arguments = parts["head"]
    if name not in HEADS:
        raise ConfigError(f"{where}: head {name} is not supported; supported: {', '.join(HEADS)}")
    head = configs.from_dict(HeadConfig, {"kind": HEADS[name], **arguments}, f"{where}: head")
    name, arguments = parts["feature_extractor"]
    if name == "MelSpectrogramFeatures":
        mel = configs.from_dict(MelConfig, arguments, f"{where}: feature_extractor")
        return VocosConfig(backbone, head, mel=mel)
    if name != "EncodecFeatures":
        raise ConfigError(f"{where}: features {name} are not supported; mel spectra and EnCodec's codes are")
    codes = configs.from_dict(CodesConfig, arguments, f"{where}: feature_extractor")
    return VocosConfig(backbone, head, codes=codes)
