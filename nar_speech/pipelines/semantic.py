"""Speech to semantic codes: frozen features of a speech model, and a codec of one codebook over them.

MaskGCT's pair is w2v-BERT 2.0 and its RepCodec; our small one reads the embedded recogniser's features. Our
folders hold ``model.yaml`` (``card``, ``features``, ``network``) and ``model.safetensors``, the weights of
the codec and the statistics of the features; the network that features come from is named, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech import hub
from nar_speech.checkpoint import SkipInit, load_strict, read_weights, save_safetensors, sha256
from nar_speech.codec.repcodec import RepCodec, RepCodecConfig
from nar_speech.codec.weight_norm import fold
from nar_speech.compress import compress, expand
from nar_speech.errors import ConfigError
from nar_speech.model_folder import CONFIG_FILE, WEIGHTS_FILE
from nar_speech.models.recogniser_features import RecogniserFeatures
from nar_speech.models.speech_features import SpeechFeatures
from nar_speech.models.w2vbert import NEEDED, W2vBert
from nar_speech.speech_folder import FeaturesConfig
from nar_speech.types import ModelCard

TASK, MODEL = "semantic", "repcodec"
STATISTICS = ("features.mean", "features.variance")


def load_features(
    config: FeaturesConfig,
    statistics: tuple[Tensor, Tensor] | None = None,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
) -> SpeechFeatures:
    """The features that ``config`` names, frozen, in evaluation mode.

    Args:
        statistics: mean (H,) and variance (H,); None: the published ones of w2v-BERT, 0 and 1 otherwise.
        cache_dir, offline: see :func:`nar_speech.locate.resolve`.

    Raises:
        HubError: there is no such model. ConfigError, CheckpointError: what is wrong with its files.
    """
    if config.kind == "recogniser":
        model = hub.load_parts(hub.resolve(config.source, cache_dir, offline))
        return RecogniserFeatures(model.network, model.frontend, statistics, model.card.name).eval()
    folder = hub.resolve(config.source, cache_dir, offline, NEEDED)
    return W2vBert.from_folder(folder, statistics, config.layer).eval()


@dataclass(frozen=True)
class SemanticFile:
    """``model.yaml`` of a semantic codec: ``network`` are fields of RepCodecConfig, ``sha256`` sums."""

    card: ModelCard
    features: FeaturesConfig
    network: dict[str, Any]
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.card.task, self.card.model) != (TASK, MODEL):
            raise ConfigError(
                f"card: task '{self.card.task}' and model '{self.card.model}'; a semantic codec's folder has"
                f" '{TASK}' and '{MODEL}'"
            )


class SemanticTokenizer(nn.Module):
    """Waves to semantic codes. Letters: B batch, N samples, T frames, H width of the features.

    Raises:
        ConfigError: features of another width than the codec's.
    """

    def __init__(self, features: SpeechFeatures, codec: RepCodec):
        super().__init__()
        if features.width != codec.config.hidden_size:
            raise ConfigError(
                f"semantic codec: reads features of {codec.config.hidden_size} values, {features.name} gives"
                f" {features.width}"
            )
        self.features, self.codec = features, codec

    @property
    def codebook_size(self) -> int:
        """Codes are 0 to this - 1."""
        return self.codec.codebook_size

    @torch.no_grad()
    def encode(self, waves: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes (B, T) int64 of waves (B, N), zeros behind the end of a row, and their lengths (B,).

        Raises:
            AudioError: see :class:`~nar_speech.models.speech_features.SpeechFeatures`.
        """
        features, counts = self.features(waves, lengths)
        return self.codec.encode(features, counts)[:, 0], counts


def read_semantic_file(folder: str | Path) -> SemanticFile:
    """Read and check ``model.yaml``.

    Raises:
        ConfigError: the file is missing, or has an unknown, missing or wrong key.
    """
    path = Path(folder) / CONFIG_FILE
    return configs.from_dict(SemanticFile, configs.read_yaml(path), str(path))


def features_source(folder: str | Path) -> FeaturesConfig:
    """Where the features of a semantic codec's folder are to be found: w2v-BERT for an official one.

    Raises:
        ConfigError: see :func:`read_semantic_file`.
    """
    return read_semantic_file(folder).features if (Path(folder) / CONFIG_FILE).is_file() else FeaturesConfig()


def load_semantic(
    folder: str | Path,
    features: FeaturesConfig | None = None,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
) -> SemanticTokenizer:
    """A semantic codec with its features, frozen, in evaluation mode.

    Args:
        folder: ours, or the official one (of MaskGCT as a whole, or ``semantic_codec``).
        features: where the features are to be found; None: where the folder says, w2v-BERT officially.
        cache_dir, offline: see :func:`nar_speech.locate.resolve`.

    Raises:
        ConfigError, CheckpointError, HubError: what is wrong with a file, or which is missing.
    """
    folder = Path(folder)
    source = features or features_source(folder)
    if not (folder / CONFIG_FILE).is_file():
        codec = RepCodec.from_official(folder)
        return SemanticTokenizer(load_features(source, None, cache_dir, offline), codec).eval()
    file = read_semantic_file(folder)
    tensors = expand(read_weights(folder / WEIGHTS_FILE))
    statistics = tuple(tensors.pop(name, None) for name in STATISTICS)
    if any(part is None for part in statistics):
        raise ConfigError(f"{folder / WEIGHTS_FILE}: lacks {' or '.join(STATISTICS)}; get the model again")
    with SkipInit():
        codec = RepCodec(configs.from_dict(RepCodecConfig, file.network, f"{folder}: network"))
    load_strict(codec, tensors, where=folder / WEIGHTS_FILE)
    fold(codec)
    states = load_features(source, statistics, cache_dir, offline)
    return SemanticTokenizer(states, codec.eval().requires_grad_(False)).eval()


def write_semantic_folder(
    folder: str | Path,
    codec: RepCodec | Mapping[str, Tensor],
    network: RepCodecConfig,
    features: FeaturesConfig,
    statistics: tuple[Tensor, Tensor],
    card: ModelCard,
    store: Literal["float32", "float16", "int8"] = "float32",
) -> Path:
    """Write a folder; ``model.yaml`` comes last, so a folder that has one is whole.

    Args:
        codec: under weight norm, as in training.
        store: how the weights are written (:mod:`nar_speech.compress`). A model that will be stored in int8
            should learn codes that were made with rounded weights: rounded once more they stay the same.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(codec.state_dict() if isinstance(codec, nn.Module) else codec)
    tensors = tensors if store == "float32" else compress(tensors, store)
    tensors |= dict(zip(STATISTICS, statistics, strict=True))
    save_safetensors(folder / WEIGHTS_FILE, tensors)
    sums = {WEIGHTS_FILE: sha256(folder / WEIGHTS_FILE)}
    configs.write_yaml(SemanticFile(card, features, configs.to_dict(network), sums), folder / CONFIG_FILE)
    return folder


def unquantized(codec: RepCodec, features: Tensor) -> Tensor:
    """Features (B, T, H) through both halves of a codec of one codebook, its projections, and no codes."""
    level = codec.quantizer.quantizers[0]
    return codec.synthesise(level.out_project(level.in_project(codec.analyse(features))))


@torch.no_grad()
def start_codebooks(codec: RepCodec, features: Tensor, seed: int = 0) -> None:
    """Let every code be what some frame of features (B, T, H) is, in a codec of one codebook.

    Codes at random are far from what the encoder gives, and most of them would never be used.
    """
    level = codec.quantizer.quantizers[0]
    vectors = level.in_project(codec.analyse(features)).transpose(1, 2).flatten(0, 1)
    picked = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))
    picked = picked.repeat(-(-codec.codebook_size // len(vectors)))[: codec.codebook_size]
    level.codebook.weight.copy_(vectors[picked.to(vectors.device)])
