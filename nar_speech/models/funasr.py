"""Reading official FunASR model folders: which file is what, and the parts all FunASR models share.

A folder holds ``config.yaml``, weights (``model.pt``, older ``model.pb``), ``tokens.json`` or ``tokens.txt``
or a sentencepiece model, ``am.mvn`` and maybe ``seg_dict``; ``configuration.json`` may give them other names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from nar_speech.cmvn import read_kaldi_cmvn
from nar_speech.config import read_yaml
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.features import Frontend, FrontendConfig
from nar_speech.text.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from nar_speech.types import ModelCard

KALDI_WINDOWS = {"hanning": "hann"}  # Kaldi's name -> ours, where they differ
LICENCE = "FunASR Model Open Source License 1.1 (see the model card)"


class ModelParts(NamedTuple):
    """What ``from_official`` returns: everything a task object is made of."""

    network: nn.Module
    frontend: Frontend
    tokenizer: Tokenizer
    card: ModelCard


@dataclass(frozen=True)
class FunasrFolder:
    """An official folder: its configuration and the paths of its files (None: not there)."""

    path: Path
    config: dict[str, Any]
    weights: Path
    tokens: Path | None
    seg_dict: Path | None
    sentencepiece: Path | None
    cmvn: Path | None

    def section(self, name: str) -> dict[str, Any]:
        """The mapping ``name`` of config.yaml, empty where it is missing."""
        value = self.config.get(name) or {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.path / 'config.yaml'}: {name}: expected a mapping of keys to values")
        return dict(value)


def read_folder(folder: str | Path) -> FunasrFolder:
    """Find the files of an official folder.

    Raises:
        CheckpointError: no folder, or no weights in it.
        ConfigError: a configuration that is missing or not readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; check the path")
    metas = _file_path_metas(folder)
    config = read_yaml(_named(folder, metas.get("config")) or folder / "config.yaml")
    tokens = _entry(metas, "tokenizer_conf", "token_list")
    seg_dict = _entry(metas, "tokenizer_conf", "seg_dict_file") or _entry(metas, "tokenizer_conf", "seg_dict")
    piece = _entry(metas, "tokenizer_conf", "bpemodel")
    weights = _named(folder, metas.get("init_param")) or _first(folder, "model.pt", "model.pb")
    if weights is None or not weights.is_file():
        raise CheckpointError(f"{folder}: no weights; expected model.pt or model.pb")
    bpe = _named(folder, piece) or next(iter(sorted(folder.glob("*bpe.model"))), None)
    return FunasrFolder(
        path=folder,
        config=config,
        weights=weights,
        tokens=_named(folder, tokens) or _first(folder, "tokens.json", "tokens.txt"),
        seg_dict=_named(folder, seg_dict) or _first(folder, "seg_dict"),
        sentencepiece=bpe,
        cmvn=_named(folder, _entry(metas, "frontend_conf", "cmvn_file")) or _first(folder, "am.mvn"),
    )


def build_frontend(folder: FunasrFolder) -> Frontend:
    """The filter bank front end (WavFrontend) of the folder. The dither of its config is not taken over.

    Raises:
        ConfigError: another front end, an unknown key, or no am.mvn.
    """
    where = folder.path / "config.yaml"
    kind = folder.config.get("frontend")
    if kind not in ("WavFrontend", "WavFrontendOnline"):
        raise ConfigError(f"{where}: frontend '{kind}' is not supported; expected WavFrontend")
    conf = folder.section("frontend_conf")
    conf.pop("dither", None)  # official results are not repeatable with it; the C++ runtime uses none
    conf.pop("cmvn_file", None)
    if folder.cmvn is None:
        raise ConfigError(f"{folder.path}: am.mvn is missing; it belongs to the model")
    names = {
        "fs": "sample_rate",
        "window": "window",
        "n_mels": "num_mels",
        "frame_length": "frame_ms",
        "frame_shift": "shift_ms",
        "lfr_m": "lfr_m",
        "lfr_n": "lfr_n",
    }
    unknown = [key for key in conf if key not in names]
    if unknown:
        raise ConfigError(
            f"{where}: frontend_conf: unknown key '{unknown[0]}'; valid keys: {', '.join(names)}"
        )
    values = {"window": "hamming", **{names[key]: value for key, value in conf.items()}}
    values["window"] = KALDI_WINDOWS.get(values["window"], values["window"])
    config = FrontendConfig(kind="fbank", cmvn=folder.cmvn.name, **values)
    return Frontend(config, read_kaldi_cmvn(folder.cmvn))


def build_tokenizer(folder: FunasrFolder) -> Tokenizer:
    """The tokenizer of the folder: a list of pieces (CharTokenizer) or a sentencepiece model.

    Raises:
        ConfigError: an unknown kind, or the file it needs is missing.
    """
    kind = folder.config.get("tokenizer", "CharTokenizer")
    where = folder.path / "config.yaml"
    if kind == "CharTokenizer":
        if folder.tokens is None:
            raise ConfigError(f"{folder.path}: tokens.json or tokens.txt is missing; it belongs to the model")
        seg_dict = None if folder.seg_dict is None else str(folder.seg_dict.relative_to(folder.path))
        file = str(folder.tokens.relative_to(folder.path))
        return load_tokenizer(TokenizerConfig("char", file, seg_dict), folder.path)
    if kind == "SentencepiecesTokenizer":
        if folder.sentencepiece is None:
            raise ConfigError(f"{folder.path}: the sentencepiece model (*bpe.model) is missing")
        file = str(folder.sentencepiece.relative_to(folder.path))
        return load_tokenizer(TokenizerConfig("bpe", file), folder.path)
    raise ConfigError(f"{where}: tokenizer '{kind}' is not supported; expected CharTokenizer")


def build_card(folder: FunasrFolder, model: str, sample_rate: int) -> ModelCard:
    """A card that says where the model comes from."""
    return ModelCard(
        name=folder.path.name,
        task="transcribe",
        model=model,
        sample_rate=sample_rate,
        licence=LICENCE,
        source=str(folder.config.get("model", "FunASR")) + " of FunASR, folder " + folder.path.name,
    )


def take(
    section: Mapping[str, Any], names: Mapping[str, str], ignored: frozenset[str], where: str
) -> dict[str, Any]:
    """Translate an official section to our key names; values of None take our default.

    Raises:
        ConfigError: a key that is neither known nor harmless.
    """
    unknown = [key for key in section if key not in names and key not in ignored]
    if unknown:
        raise ConfigError(f"{where}: unknown key '{unknown[0]}'; known keys: {', '.join(names)}")
    return {ours: section[name] for name, ours in names.items() if section.get(name) is not None}


def require(section: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Check options that have one supported value (the first is the default where the key is missing).

    Raises:
        ConfigError: another value.
    """
    for key, values in allowed.items():
        value = section.get(key, values[0])
        if value not in values:
            raise ConfigError(f"{where}: {key} {value!r} is not supported; expected {values[0]!r}")


def _file_path_metas(folder: Path) -> dict[str, Any]:
    path = folder / "configuration.json"
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not readable JSON ({type(error).__name__}); get the file again"
        ) from error
    metas = tree.get("file_path_metas") if isinstance(tree, dict) else None
    return metas if isinstance(metas, dict) else {}


def _entry(metas: Mapping[str, Any], section: str, key: str) -> Any:
    inner = metas.get(section)
    return inner.get(key) if isinstance(inner, Mapping) else None


def _named(folder: Path, name: Any) -> Path | None:
    """The file configuration.json names, if it is inside the folder and exists."""
    if not isinstance(name, str) or not name:
        return None
    path = folder / name
    if folder.resolve() not in path.resolve().parents:
        raise ConfigError(f"{folder / 'configuration.json'}: '{name}' points outside the model folder")
    return path if path.is_file() else None


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
