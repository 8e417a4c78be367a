"""The folder of a codec of ours: ``model.yaml`` with ``card`` and ``network``, and ``model.safetensors``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.checkpoint import load_strict, read_weights, save_safetensors, sha256
from nar_speech.codec.spectral import SpectralCodec, SpectralCodecConfig
from nar_speech.compress import compress, expand
from nar_speech.errors import ConfigError
from nar_speech.model_folder import CONFIG_FILE, WEIGHTS_FILE
from nar_speech.types import ModelCard

TASK = "codec"


@dataclass(frozen=True)
class CodecFile:
    """``model.yaml`` of a codec.

    Attributes:
        card: ``task`` is ``codec``, ``model`` is ``spectral``.
        network: fields of :class:`~nar_speech.codec.spectral.SpectralCodecConfig`.
        sha256: sums of the folder's files.
    """

    card: ModelCard
    network: dict[str, Any]
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.card.task, self.card.model) != (TASK, SpectralCodec.name):
            raise ConfigError(
                f"card: task '{self.card.task}' and model '{self.card.model}'; a codec's folder has '{TASK}'"
                f" and '{SpectralCodec.name}'"
            )


def read_codec_folder(folder: str | Path) -> tuple[SpectralCodec, ModelCard]:
    """The codec in ``folder``, on the CPU, in float32 and evaluation mode, named as its card says.

    Raises:
        ConfigError, CheckpointError: a file is missing or damaged, or does not fit the other.
    """
    path = Path(folder) / CONFIG_FILE
    file = configs.from_dict(CodecFile, configs.read_yaml(path), str(path))
    codec = SpectralCodec(configs.from_dict(SpectralCodecConfig, file.network, f"{path}: network"))
    weights = Path(folder) / WEIGHTS_FILE
    load_strict(codec, _with_statistics(expand(read_weights(weights))), where=str(weights))
    codec.name = file.card.name
    return codec.eval(), file.card


def write_codec_folder(
    folder: str | Path,
    codec: SpectralCodec,
    card: ModelCard,
    store: Literal["float32", "float16", "int8"] = "float32",
) -> Path:
    """Write a codec's folder; ``model.yaml`` comes last, so a folder that has one is whole.

    Args:
        store: how the weights are written; int8 concerns matrices, not codebooks. What only training needs of
            the codebooks is left out except in float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = codec.state_dict()
    if store != "float32":
        books = {name: value for name, value in tensors.items() if _is_codebook(name)}
        rest = {name: value for name, value in tensors.items() if not _is_codebook(name)}
        kept = {name: value for name, value in books.items() if name.endswith(("embed", "started"))}
        tensors = {**compress(rest, store), **compress(kept, "float16")}
    save_safetensors(folder / WEIGHTS_FILE, tensors)
    sums = {WEIGHTS_FILE: sha256(folder / WEIGHTS_FILE)}
    configs.write_yaml(CodecFile(card, configs.to_dict(codec.config), sums), folder / CONFIG_FILE)
    return folder


def _with_statistics(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the moving averages of codebooks, where they were left out: every entry used alike."""
    for name, value in list(tensors.items()):
        if _is_codebook(name) and name.endswith(".embed"):
            tensors.setdefault(name.removesuffix("embed") + "usage", torch.ones(len(value)))
            tensors.setdefault(name.removesuffix("embed") + "total", value.clone())
    return tensors


def _is_codebook(name: str) -> bool:
    return name.startswith("quantizer.levels.")


def count_parameters(codec: nn.Module) -> int:
    """Values that are trained, codebooks included."""
    books = sum(v.numel() for n, v in codec.named_buffers() if n.endswith(".embed"))
    return books + sum(p.numel() for p in codec.parameters())
