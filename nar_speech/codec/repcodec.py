"""The semantic codec of MaskGCT: features of a speech model to one code a frame, and back.

    Wang et al. 2024, "MaskGCT", section 3.2.1; after Huang et al. 2023, "RepCodec".

Two backbones of Vocos around a factorised quantizer. It reads hidden states of w2v-BERT 2.0 that are
normalised by their mean and variance, at 50 Hz; synthesis uses the codes only, the decoder trains them.

Parameter names are the official ones. Letters: B batch, T frames, H width of the features, K codebooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.codec.base import present
from nar_speech.codec.fvq import FvqConfig, FvqOutput, ResidualFactorizedQuantizer
from nar_speech.codec.shapes import Shapes
from nar_speech.codec.vocos import Backbone, BackboneConfig
from nar_speech.codec.weight_norm import fold
from nar_speech.errors import InputError

FOLDER, FILE = "semantic_codec", "model.safetensors"


@dataclass(frozen=True)
class RepCodecConfig:
    """Sizes, with the official names.

    Args:
        codebook_size, codebook_dim, num_quantizers: of the quantizer.
        hidden_size: of the features H.
        vocos_dim, vocos_intermediate_dim, vocos_num_layers: of either backbone.
        commitment, codebook_loss_weight, quantizer_dropout: see :class:`~nar_speech.codec.fvq.FvqConfig`.
    """

    codebook_size: int = 8192
    hidden_size: int = 1024
    codebook_dim: int = 8
    vocos_dim: int = 384
    vocos_intermediate_dim: int = 2048
    vocos_num_layers: int = 12
    num_quantizers: int = 1
    commitment: float = 0.15
    codebook_loss_weight: float = 1.0
    quantizer_dropout: float = 0.0

    def __post_init__(self) -> None:
        self.backbone()
        self.quantizer()

    def backbone(self) -> BackboneConfig:
        """Of either half."""
        return BackboneConfig(
            self.hidden_size, self.vocos_dim, self.vocos_intermediate_dim, self.vocos_num_layers
        )

    def quantizer(self) -> FvqConfig:
        """Between both."""
        return FvqConfig.of(self, self.hidden_size)


@dataclass(frozen=True)
class RepCodecOutput:
    """What training needs: reconstructed features (B, T, H), and what the quantizer gave."""

    features: Tensor
    quantized: FvqOutput


class RepCodec(nn.Module):
    """The codec. Rows of a batch don't depend on their mates, and what lies behind a row is not looked at."""

    def __init__(self, config: RepCodecConfig | None = None):
        super().__init__()
        self.config = c = config or RepCodecConfig()
        self.encoder = nn.Sequential(Backbone(c.backbone()), nn.Linear(c.vocos_dim, c.hidden_size))
        self.decoder = nn.Sequential(Backbone(c.backbone()), nn.Linear(c.vocos_dim, c.hidden_size))
        self.quantizer = ResidualFactorizedQuantizer(c.quantizer())
        for half in (self.encoder, self.decoder):
            nn.init.trunc_normal_(half[1].weight, std=0.02)
            nn.init.zeros_(half[1].bias)

    @property
    def num_codebooks(self) -> int:
        """K."""
        return self.config.num_quantizers

    @property
    def codebook_size(self) -> int:
        """Codes are 0 to this - 1."""
        return self.config.codebook_size

    def forward(
        self, features: Tensor, lengths: Tensor | None = None, levels: Tensor | None = None
    ) -> RepCodecOutput:
        """Training: features (B, T, H), reconstructed, and the terms of the quantizer.

        Args:
            lengths: (B,) frames of each row; None: all T. The terms don't count what lies behind.
            levels: (B,) codebooks that each item uses; None: all.

        Raises:
            InputError: another shape, features that are not finite, lengths that are not 1 to T.
        """
        features, there = self._checked(features, lengths)
        quantized = self.quantizer(self.analyse(features, there), levels, there)
        return RepCodecOutput(self.synthesise(quantized.latents, there), quantized)

    @torch.no_grad()
    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, K, T) int64 of features (B, T, H), zeros behind the end of a row.

        Raises:
            InputError: see :meth:`forward`.
        """
        features, there = self._checked(features, lengths)
        tokens, _ = self.quantizer.encode(self.analyse(features, there))
        return tokens if there is None else tokens.masked_fill(~there[:, None], 0)

    @torch.no_grad()
    def decode(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B, T, H) of codes (B, K, T), zeros behind the end of a row.

        Raises:
            InputError: another shape, codes out of range, lengths that are not 1 to T.
        """
        latents = self.latents(tokens)
        there = self._lengths(lengths, len(tokens), tokens.shape[2])
        features = self.synthesise(latents, there)
        return features if there is None else features.masked_fill(~there[:, :, None], 0.0)

    def latents(self, tokens: Tensor) -> Tensor:
        """What the decoder reads, (B, H, T), of codes (B, K, T) of some or all codebooks.

        Raises:
            InputError: another shape, codes out of range.
        """
        right = isinstance(tokens, Tensor) and tokens.dim() == 3 and 0 not in tokens.shape
        right = right and not tokens.is_floating_point() and tokens.dtype != torch.bool
        if not right or tokens.shape[1] > self.num_codebooks:
            shown = f"of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens)
            raise InputError(
                f"semantic codec: tokens {shown}; expected integers (batch, 1 to {self.num_codebooks}"
                " codebooks, frames)"
            )
        low, high = (int(bound) for bound in torch.aminmax(tokens))
        if low < 0 or high >= self.codebook_size:
            wrong = low if low < 0 else high
            raise InputError(f"semantic codec: code {wrong} is not in 0 to {self.codebook_size - 1}")
        return self.quantizer.decode(tokens.to(self.encoder[1].weight.device))

    def analyse(self, features: Tensor, there: Tensor | None = None) -> Tensor:
        """What the quantizer reads, (B, H, T), of features (B, T, H); ``there`` (B, T): those there are."""
        backbone, projection = self.encoder
        return projection(backbone(features.transpose(1, 2), present=there)).transpose(1, 2)

    def synthesise(self, latents: Tensor, there: Tensor | None = None) -> Tensor:
        """Features (B, T, H) of what the quantizer gave, (B, H, T)."""
        backbone, projection = self.decoder
        return projection(backbone(latents, present=there))

    def _checked(self, features: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features as the weights are, and which frames there are, (B, T); None: all."""
        size, like = self.config.hidden_size, self.encoder[1].weight
        if not isinstance(features, Tensor) or not features.is_floating_point() or features.dim() != 3:
            shown = f"of shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features)
            raise InputError(f"semantic codec: features {shown}; expected float (batch, frames, {size})")
        if features.shape[2] != size or 0 in features.shape:
            raise InputError(
                f"semantic codec: features of shape {tuple(features.shape)}; expected (batch, frames, {size})"
                " with at least one frame"
            )
        features = features.to(like.device, like.dtype)
        there = self._lengths(lengths, *features.shape[:2])
        seen = features if there is None else features.masked_fill(~there[:, :, None], 0.0)
        if not bool(torch.isfinite(seen).all()):
            raise InputError("semantic codec: NaN or infinite features; check the recording")
        return features, there

    def _lengths(self, lengths: Tensor | None, batch: int, frames: int) -> Tensor | None:
        """Which frames there are, (B, T), of ``lengths`` (B,); None: all."""
        if lengths is None:
            return None
        lengths = torch.as_tensor(lengths, device=self.encoder[1].weight.device)
        wrong = lengths.shape != (batch,) or lengths.is_floating_point()
        if wrong or not 1 <= int(lengths.min()) <= int(lengths.max()) <= frames:
            raise InputError(
                f"semantic codec: lengths {lengths.tolist()}; expected {batch} whole numbers of 1 to {frames}"
            )
        there = present(lengths, frames)
        return None if bool(there.all()) else there

    @classmethod
    def from_official(cls, path: str | Path) -> RepCodec:
        """The codec of a weights file, of the folder it lies in, or of a whole folder of MaskGCT.

        Sizes are those of the tensors. Returned in evaluation mode, without gradients, weight norm folded.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
        """
        path = Path(path)
        if path.is_dir():
            path = (path / FOLDER if (path / FOLDER).is_dir() else path) / FILE
        tensors = read_weights(path)
        config = official_config(Shapes(tensors, str(path), "the semantic codec of MaskGCT"))
        with SkipInit():
            model = cls(config)
        load_strict(model, tensors, where=path)
        fold(model)
        return model.eval().requires_grad_(False)


def official_config(shapes: Shapes) -> RepCodecConfig:
    """The sizes of an official file.

    Raises:
        CheckpointError: a tensor that tells them is missing. ConfigError: an impossible size.
    """
    hidden, dim = shapes.of("encoder.1.weight", 2)
    size, width = shapes.of("quantizer.quantizers.0.codebook.weight", 2)
    intermediate, _ = shapes.of("encoder.0.convnext.0.pwconv1.weight", 2)
    with configs.blame(shapes.where):
        return RepCodecConfig(
            codebook_size=size,
            hidden_size=hidden,
            codebook_dim=width,
            vocos_dim=dim,
            vocos_intermediate_dim=intermediate,
            vocos_num_layers=shapes.count(r"encoder\.0\.convnext\.\d+\.gamma"),
            num_quantizers=shapes.count(r"quantizer\.quantizers\.\d+\.codebook\.weight"),
        )
