"""Mean and scale of features, as toolkits write them: Kaldi's network text and WeNet's sums."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from nar_speech.errors import ConfigError


def read_kaldi_cmvn(path: str | Path) -> tuple[Tensor, Tensor]:
    """(shift, scale), each (F,) float32, of a Kaldi network in text form (FunASR's ``am.mvn``).

    Raises:
        ConfigError: a missing file, a section that is missing or empty, values that are not finite numbers.
    """
    words = _read_text(path).split()
    shift = _kaldi_section(words, "<AddShift>", path)
    scale = _kaldi_section(words, "<Rescale>", path)
    if len(shift) != len(scale):
        raise ConfigError(
            f"{path}: <AddShift> has {len(shift)} values, <Rescale> has {len(scale)}; need as many"
        )
    return shift, scale


def _kaldi_section(words: list[str], name: str, path: str | Path) -> Tensor:
    """The values between the brackets that follow the section ``name``."""
    try:
        begin = words.index("[", words.index(name))
        end = words.index("]", begin)
        values = torch.tensor([float(word) for word in words[begin + 1 : end]])
    except ValueError as error:
        raise ConfigError(
            f"{path}: no readable values [ ... ] after {name}; is it a Kaldi CMVN file?"
        ) from error
    if not len(values) or not values.isfinite().all():
        raise ConfigError(f"{path}: the values after {name} are empty or not finite; use an intact file")
    return values


def read_json_cmvn(path: str | Path) -> tuple[Tensor, Tensor]:
    """(shift, scale), each (F,) float32: minus the mean and the inverse deviation of WeNet's ``global_cmvn``.

    The file holds the sums ``mean_stat``, ``var_stat`` (of squares) and ``frame_num``.

    Raises:
        ConfigError: a missing or malformed file.
    """
    try:
        tree = json.loads(_read_text(path))
        count = float(tree["frame_num"])
        sums = torch.tensor(tree["mean_stat"], dtype=torch.float64)
        squares = torch.tensor(tree["var_stat"], dtype=torch.float64)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not a WeNet CMVN file with mean_stat, var_stat and frame_num") from error
    if count <= 0 or sums.ndim != 1 or sums.shape != squares.shape or not len(sums):
        raise ConfigError(f"{path}: need frame_num > 0 and mean_stat, var_stat of the same length")
    mean = sums / count
    deviation = (squares / count - mean.square()).clamp(min=1e-20).sqrt()
    if not (mean.isfinite().all() and deviation.isfinite().all()):
        raise ConfigError(f"{path}: the statistics are not finite; use an intact file")
    return -mean.float(), deviation.reciprocal().float()


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: can't read the CMVN file ({type(error).__name__}); check the path"
        ) from error
