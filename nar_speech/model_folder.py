"""Our model folder: ``model.yaml``, ``model.safetensors`` and tokenizer files.

``model.yaml`` holds the parts ``card``, ``frontend``, ``network``, ``tokenizer``, ``decoding`` and, after an
import, ``sha256`` of the files. Every key is checked: a misspelt one is an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.checkpoint import save_safetensors, sha256
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.features import FrontendConfig
from nar_speech.text.tokenizer import Tokenizer, TokenizerConfig
from nar_speech.types import ModelCard

CONFIG_FILE = "model.yaml"
WEIGHTS_FILE = "model.safetensors"

DecoderName = Literal["auto", "paraformer", "ctc_greedy", "ctc_beam", "attention_rescoring"]


@dataclass(frozen=True)
class SegmentConfig:
    """How recordings are cut before recognition; times in seconds.

    Args:
        whole: a recording up to this length is not cut.
        merge: neighbouring stretches of speech are joined up to this length.
        longest: a stretch longer than this is cut where speech is least likely.
        gap: stretches further apart than this are not joined.
        threshold: speech probability at which a stretch begins; it ends 0.15 below.
        min_speech, min_silence: shorter stretches are dropped, shorter pauses bridged.
        pad: kept before and after a stretch.
    """

    whole: float = 20.0
    merge: float = 20.0
    longest: float = 28.0
    gap: float = 2.0
    threshold: float = 0.5
    min_speech: float = 0.2
    min_silence: float = 0.3
    pad: float = 0.2

    def __post_init__(self) -> None:
        if not 0.2 < self.threshold < 1:
            raise ConfigError(f"segments.threshold: got {self.threshold:g}; must be above 0.2 and below 1")
        if min(self.whole, self.gap, self.min_speech, self.min_silence, self.pad) < 0:
            raise ConfigError("segments: times must not be negative")
        if not 1 <= self.merge <= self.longest:
            raise ConfigError(
                f"segments: need 1 <= merge <= longest, got merge {self.merge:g}, longest {self.longest:g}"
            )


@dataclass(frozen=True)
class DecodingConfig:
    """How a model's output becomes text.

    Args:
        decoder: ``paraformer``, ``ctc_greedy``, ``ctc_beam`` or ``attention_rescoring`` (U2 models: the best
            of ``ctc_beam`` by the attention decoder); ``auto``: see ``choose`` of
            :mod:`nar_speech.pipelines.recognize`.
        beam: prefixes kept by ``ctc_beam``.
        blank_skip: see :func:`nar_speech.search.prefix_beam.prefix_beam`.
        ctc_weight, reverse_weight: see :func:`nar_speech.search.rescore.attention_rescore`.
        nbest: hypotheses listed per segment; 1 lists none.
        hotwords: words or phrases to favour.
        hotword_score: natural-log bonus per hotword token in ``ctc_beam``.
        language, textnorm: prompts of SenseVoice; ``withitn`` asks for punctuation and digits.
        segments: how recordings are cut.
    """

    decoder: DecoderName = "auto"
    beam: int = 10
    blank_skip: float | None = None
    ctc_weight: float = 0.5
    reverse_weight: float = 0.0
    nbest: int = 1
    hotwords: tuple[str, ...] = ()
    hotword_score: float = 3.0
    language: str = "auto"
    textnorm: Literal["withitn", "woitn"] = "woitn"
    segments: SegmentConfig = field(default_factory=SegmentConfig)

    def __post_init__(self) -> None:
        for name in ("beam", "nbest"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}; must be at least 1")
        if self.blank_skip is not None and not 0 < self.blank_skip < 1:
            raise ConfigError(f"blank_skip: got {self.blank_skip:g}; must be between 0 and 1")


@dataclass(frozen=True)
class ModelFile:
    """``model.yaml``. ``network`` is checked by the model that ``card.model`` names."""

    card: ModelCard
    network: dict[str, Any]
    tokenizer: TokenizerConfig
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    sha256: dict[str, str] = field(default_factory=dict)


def read_model_file(folder: str | Path) -> ModelFile:
    """Read and check ``model.yaml``.

    Raises:
        ConfigError: the file is missing, or has an unknown, missing or wrong key.
    """
    path = Path(folder) / CONFIG_FILE
    return configs.from_dict(ModelFile, configs.read_yaml(path), str(path))


def write_model_folder(
    folder: str | Path,
    weights: nn.Module | Mapping[str, Tensor],
    card: ModelCard,
    frontend: FrontendConfig,
    network: Any,
    tokenizer: Tokenizer,
    decoding: DecodingConfig | Mapping[str, Any] | None = None,
    cmvn_from: str | Path = ".",
) -> Path:
    """Write a model folder; ``model.yaml`` comes last, so a folder that has one is whole.

    Args:
        network: the model's configuration dataclass.
        cmvn_from: folder with the file that ``frontend.cmvn`` names.

    Raises:
        ConfigError: the CMVN file is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / WEIGHTS_FILE, weights)
    tokenizer_config = tokenizer.save(folder)
    files = [WEIGHTS_FILE, *filter(None, (tokenizer_config.file, tokenizer_config.seg_dict))]
    if frontend.cmvn is not None:
        source = Path(cmvn_from) / frontend.cmvn
        if not source.is_file():
            raise ConfigError(f"frontend.cmvn: no file {source}; it belongs to the model")
        target = folder / frontend.cmvn
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
        files.append(frontend.cmvn)
    if decoding is None or isinstance(decoding, Mapping):
        decoding = configs.from_dict(DecodingConfig, decoding or {}, "decoding")
    sums = {name: sha256(folder / name) for name in files}
    tree = ModelFile(card, configs.to_dict(network), tokenizer_config, frontend, decoding, sums)
    draft = folder / f".{CONFIG_FILE}"
    configs.write_yaml(tree, draft)
    draft.replace(folder / CONFIG_FILE)
    return folder


def check_sums(folder: str | Path, sums: Mapping[str, str]) -> None:
    """Compare the files of a folder with recorded SHA-256 sums.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    for name, wanted in sums.items():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; get the model again")
        if sha256(path) != wanted.lower():
            raise CheckpointError(
                f"{path}: SHA-256 differs from the one in {CONFIG_FILE}; the file is damaged or was changed:"
                " get the model again"
            )
