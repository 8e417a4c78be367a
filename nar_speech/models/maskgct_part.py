"""One trained network of a model that speaks, in a folder of its own, before all are put together.

``model.yaml`` has ``card``, whose ``model`` is the kind of network, and ``network``; ``model.safetensors``
the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from nar_speech import config as configs
from nar_speech.checkpoint import SkipInit, load_strict, read_weights, save_safetensors, sha256
from nar_speech.errors import ConfigError
from nar_speech.model_folder import CONFIG_FILE, WEIGHTS_FILE
from nar_speech.models.duration import Aligner, AlignerConfig, DurationConfig, DurationPredictor
from nar_speech.models.maskgct import S2A, T2S, S2AConfig, T2SConfig
from nar_speech.types import ModelCard

TASK = "speech_part"
KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "t2s": (T2S, T2SConfig),
    "s2a": (S2A, S2AConfig),
    "duration": (DurationPredictor, DurationConfig),
    "aligner": (Aligner, AlignerConfig),
}


@dataclass(frozen=True)
class PartFile:
    """``model.yaml``: ``network`` are fields of the configuration that ``card.model`` stands for."""

    card: ModelCard
    network: dict[str, Any]
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.card.task != TASK or self.card.model not in KINDS:
            raise ConfigError(
                f"card: task '{self.card.task}' and model '{self.card.model}'; a part of a model that"
                f" speaks has '{TASK}' and one of {', '.join(KINDS)}"
            )


def write_part(folder: str | Path, network: nn.Module, card: ModelCard) -> Path:
    """Write a folder in float32; ``model.yaml`` comes last, so a folder that has one is whole.

    Raises:
        ConfigError: a network of another kind than the card says.
    """
    folder = Path(folder)
    file = PartFile(card, configs.to_dict(network.config))
    if type(network) is not KINDS[card.model][0]:
        raise ConfigError(f"card.model: '{card.model}' is not what a {type(network).__name__} is")
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / WEIGHTS_FILE, network)
    sums = {WEIGHTS_FILE: sha256(folder / WEIGHTS_FILE)}
    configs.write_yaml(PartFile(card, file.network, sums), folder / CONFIG_FILE)
    return folder


def read_part(folder: str | Path, kind: str | None = None) -> tuple[nn.Module, ModelCard]:
    """The network, on the CPU and in evaluation mode, and its card.

    Args:
        kind: what it has to be; None: anything of ``KINDS``.

    Raises:
        ConfigError, CheckpointError: a file is missing, damaged, or of another kind.
    """
    folder = Path(folder)
    where = f"{folder / CONFIG_FILE}"
    file = configs.from_dict(PartFile, configs.read_yaml(where), where)
    if kind not in (None, file.card.model):
        raise ConfigError(f"{where}: is of kind '{file.card.model}'; '{kind}' is needed")
    network, config = KINDS[file.card.model]
    with SkipInit():
        built = network(configs.from_dict(config, file.network, f"{where}: network"))
    load_strict(built, read_weights(folder / WEIGHTS_FILE), where=folder / WEIGHTS_FILE)
    return built.eval(), file.card
