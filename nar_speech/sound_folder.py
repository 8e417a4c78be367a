"""The folder of a model that makes sound: ``model.yaml``, ``model.safetensors`` and perhaps a codec's folder.

``model.yaml`` holds the parts ``card``, ``network``, ``codec``, ``conditioner`` and ``generation``. Every key
is checked: those of ``network`` by the model that ``card.model`` names, those of ``generation`` by
:mod:`nar_speech.pipelines.generate`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.checkpoint import read_weights, save_safetensors, sha256
from nar_speech.compress import compress, expand
from nar_speech.errors import ConfigError
from nar_speech.model_folder import CONFIG_FILE, WEIGHTS_FILE
from nar_speech.text.conditioner import ConditionerConfig
from nar_speech.types import ModelCard

CODEC_FOLDER = "codec"
TASK = "generate"

Store = Literal["float32", "float16", "int8"]


@dataclass(frozen=True)
class SoundFile:
    """``model.yaml`` of a model that makes sound.

    Attributes:
        card: ``task`` is ``generate``, ``model`` a name of :data:`nar_speech.models.MODELS`.
        network: fields of the model's configuration.
        codec: what :func:`nar_speech.codec.load.load_codec` takes: a name, a hub id, or a folder, which is
            looked for in the model folder first.
        conditioner: the text encoder, which is never part of the folder.
        generation: defaults of generation; missing keys take those of the code.
        sha256: sums of the folder's files.
    """

    card: ModelCard
    network: dict[str, Any]
    codec: str
    conditioner: ConditionerConfig
    generation: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.card.task != TASK:
            raise ConfigError(f"card.task: got '{self.card.task}'; a model that makes sound has '{TASK}'")
        if not self.codec:
            raise ConfigError("codec: the name is empty; name the codec whose codes the model makes")


def is_sound_folder(folder: str | Path) -> bool:
    """Whether ``folder`` has a ``model.yaml`` of a model that makes sound."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return False
    card = configs.read_yaml(path).get("card")
    return isinstance(card, Mapping) and card.get("task") == TASK


def read_sound_file(folder: str | Path) -> SoundFile:
    """Read and check ``model.yaml``.

    Raises:
        ConfigError: the file is missing, or has an unknown, missing or wrong key.
    """
    path = Path(folder) / CONFIG_FILE
    return configs.from_dict(SoundFile, configs.read_yaml(path), str(path))


def read_sound_weights(folder: str | Path) -> dict[str, Tensor]:
    """The network's weights, whatever form they are stored in: half-precision and int8 ones as float32.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return expand(read_weights(Path(folder) / WEIGHTS_FILE))


def codec_source(folder: str | Path, file: SoundFile) -> str:
    """What to give ``load_codec``: the codec's folder inside the model folder, or the name itself."""
    inside = Path(folder) / file.codec
    return str(inside) if inside.is_dir() else file.codec


def write_sound_folder(
    folder: str | Path,
    weights: nn.Module | Mapping[str, Tensor],
    card: ModelCard,
    network: Any,
    codec: str | Path,
    conditioner: ConditionerConfig,
    generation: Mapping[str, Any] | None = None,
    store: Store = "float32",
) -> Path:
    """Write a model folder; ``model.yaml`` comes last, so a folder that has one is whole.

    Args:
        network: the model's configuration dataclass.
        codec: name or hub id; a folder is copied into the model folder.
        generation: defaults of generation.
        store: how the weights are written; int8 matrices have a scale for each row (:mod:`.compress`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    if store not in ("float32", "float16", "int8"):
        raise ConfigError(f"store: got '{store}'; valid values: float32, float16, int8")
    save_safetensors(folder / WEIGHTS_FILE, tensors if store == "float32" else compress(tensors, store))
    files = [WEIGHTS_FILE]
    if Path(codec).is_dir():
        target = folder / CODEC_FOLDER
        if Path(codec).resolve() != target.resolve():
            shutil.copytree(codec, target, dirs_exist_ok=True)
        codec = CODEC_FOLDER
        files += sorted(str(p.relative_to(folder)) for p in target.rglob("*") if p.is_file())
    sums = {name: sha256(folder / name) for name in files}
    tree = SoundFile(
        card, configs.to_dict(network), str(codec), conditioner, configs.to_dict(generation or {}), sums
    )
    draft = folder / f".{CONFIG_FILE}"
    configs.write_yaml(tree, draft)
    draft.replace(folder / CONFIG_FILE)
    return folder
