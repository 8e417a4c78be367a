"""The folder of a model that speaks: ``model.yaml``, ``model.safetensors`` and perhaps a codec's folder.

``model.yaml`` holds the parts ``card``, ``t2s``, ``s2a_first``, ``s2a_full``, ``semantic``, ``duration``,
``features``, ``codec``, ``phonemizer`` and ``synthesis``; ``model.safetensors`` the tensors of all networks,
each with the name of its part and a dot before it, and ``features.mean`` and ``features.variance``. Every key
is checked: those of networks and of ``synthesis`` by :mod:`nar_speech.pipelines.speech_model`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nar_speech import config as configs
from nar_speech.checkpoint import read_weights, save_safetensors, sha256
from nar_speech.compress import compress, expand
from nar_speech.errors import ConfigError
from nar_speech.model_folder import CONFIG_FILE, WEIGHTS_FILE
from nar_speech.text.g2p import PhonemizerConfig
from nar_speech.types import ModelCard

CODEC_FOLDER, FEATURES_FOLDER = "codec", "features"
TASK = "synthesize"

Store = Literal["float32", "float16", "int8"]


@dataclass(frozen=True)
class FeaturesConfig:
    """What the semantic codec reads.

    Attributes:
        kind: ``w2vbert``: a layer of w2v-BERT 2.0; ``recogniser``: the encoder of one of our own models.
        source: name, hub id or folder of either; a folder is looked for in the model folder first.
        layer: of w2v-BERT.
    """

    kind: Literal["w2vbert", "recogniser"] = "w2vbert"
    source: str = "facebook/w2v-bert-2.0"
    layer: int = 17

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("source: the name is empty; name the speech model")


@dataclass(frozen=True)
class SpeechFile:
    """``model.yaml`` of a model that speaks.

    Attributes:
        card: ``task`` is ``synthesize``, ``model`` is ``maskgct``.
        t2s, s2a_full: fields of :class:`nar_speech.models.maskgct.T2SConfig` and ``S2AConfig``.
        s2a_first: likewise; None: the full network makes the first layer, too.
        semantic: fields of :class:`nar_speech.codec.repcodec.RepCodecConfig`.
        duration: fields of :class:`nar_speech.models.duration.DurationConfig`; None: durations are not
            predicted.
        features: what the semantic codec reads.
        codec: what :func:`nar_speech.codec.load.load_codec` takes: a name, a hub id, or a folder, which is
            looked for in the model folder first.
        phonemizer: how text became phones in training: language and style.
        synthesis: defaults of synthesis; missing keys take those of the code.
        sha256: sums of the folder's files.
    """

    card: ModelCard
    t2s: dict[str, Any]
    s2a_full: dict[str, Any]
    semantic: dict[str, Any]
    codec: str
    s2a_first: dict[str, Any] | None = None
    duration: dict[str, Any] | None = None
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    phonemizer: PhonemizerConfig = field(default_factory=PhonemizerConfig)
    synthesis: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.card.task, self.card.model) != (TASK, "maskgct"):
            raise ConfigError(
                f"card: task '{self.card.task}' and model '{self.card.model}'; a model that speaks has"
                f" '{TASK}' and 'maskgct'"
            )
        if not self.codec:
            raise ConfigError("codec: the name is empty; name the codec whose codes the model makes")


def is_speech_folder(folder: str | Path) -> bool:
    """Whether ``folder`` has a ``model.yaml`` of a model that speaks."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return False
    card = configs.read_yaml(path).get("card")
    return isinstance(card, Mapping) and card.get("task") == TASK


def read_speech_file(folder: str | Path) -> SpeechFile:
    """Read and check ``model.yaml``.

    Raises:
        ConfigError: the file is missing, or has an unknown, missing or wrong key.
    """
    path = Path(folder) / CONFIG_FILE
    return configs.from_dict(SpeechFile, configs.read_yaml(path), str(path))


def read_speech_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors, whatever form they are stored in: half-precision and int8 ones as float32.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return expand(read_weights(Path(folder) / WEIGHTS_FILE))


def inside(folder: str | Path, name: str) -> str:
    """A folder inside the model folder, or the name itself."""
    path = Path(folder) / name
    return str(path) if path.is_dir() else name


def write_speech_folder(
    folder: str | Path, weights: Mapping[str, Tensor], file: SpeechFile, store: Store = "float32"
) -> Path:
    """Write a model folder; ``model.yaml`` comes last, so a folder that has one is whole.

    Args:
        weights: tensors of all networks with the names of their parts before them.
        file: its ``codec`` and ``features.source`` are copied into the model folder where they are folders.
        store: how the weights are written; int8 matrices have a scale for each row (:mod:`.compress`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if store not in ("float32", "float16", "int8"):
        raise ConfigError(f"store: got '{store}'; valid values: float32, float16, int8")
    save_safetensors(folder / WEIGHTS_FILE, weights if store == "float32" else compress(weights, store))
    tree, files = configs.to_dict(file), [WEIGHTS_FILE]
    for source, name, part, key in (
        (file.codec, CODEC_FOLDER, tree, "codec"),
        (file.features.source, FEATURES_FOLDER, tree["features"], "source"),
    ):
        if not Path(source).is_dir():
            continue
        target = folder / name
        if Path(source).resolve() != target.resolve():
            shutil.copytree(source, target, dirs_exist_ok=True)
        part[key] = name
        files += sorted(str(p.relative_to(folder)) for p in target.rglob("*") if p.is_file())
    tree["sha256"] = {name: sha256(folder / name) for name in files}
    draft = folder / f".{CONFIG_FILE}"
    configs.write_yaml(tree, draft)
    draft.replace(folder / CONFIG_FILE)
    return folder
