"""Typed configuration: dataclass <- YAML files <- ``key=value`` words, in that order.

An unknown key is an error that lists the valid ones: a misspelt option must never be ignored.
"""

from __future__ import annotations

import dataclasses
import math
import types as pytypes
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nar_speech.errors import ConfigError

C = TypeVar("C")

# Sizes beyond these are mistakes that would fill the memory before anything else finds them.
MAX_WIDTH, MAX_BLOCKS, MAX_VOCABULARY = 100_000, 1000, 10_000_000


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file into a plain dictionary, interpolations resolved.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; check the path")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"{path}: interpolation or reading failed: {_one_line(error)}") from error
    except Exception as error:  # yaml's own errors have no common public base through omegaconf
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top level")
    return tree


def load(cls: type[C], files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> C:
    """Build the dataclass ``cls`` from YAML files and ``key.sub=value`` words; later ones win.

    Raises:
        ConfigError: unknown key, wrong type, missing value, or an unreadable file.
    """
    merged = OmegaConf.create({})
    for file in files:
        merged = OmegaConf.merge(merged, OmegaConf.create(read_yaml(file)))
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"'{word}': an override is written key=value, for example train.lr=0.001")
    try:
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        tree = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"overrides {' '.join(overrides)}: {_one_line(error)}") from error
    where = ", ".join(str(f) for f in files) or cls.__name__
    return from_dict(cls, tree, where)


def from_dict(cls: type[C], tree: Mapping[str, Any], where: str = "") -> C:
    """Build the dataclass ``cls`` (nested dataclasses too) from plain dictionaries, strictly.

    Args:
        tree: keys and values; a missing key takes the field's default.
        where: what to name in an error, a file for example.
    """
    where = where or cls.__name__
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(tree).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [str(k) for k in tree if k not in fields]
    if unknown:
        raise ConfigError(f"{where}: unknown key '{unknown[0]}'; valid keys: {', '.join(sorted(fields))}")
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key '{name}' is required")
    try:
        return cls(**values)
    except (ValueError, OverflowError) as error:  # a dataclass' own __post_init__ check
        raise ConfigError(f"{where}: {_one_line(error)}") from error


def check_range(config: Any, low: float, high: float, *names: str) -> None:
    """Check in a dataclass' ``__post_init__`` that fields lie between ``low`` and ``high``, both allowed.

    Raises:
        ConfigError: the first that does not, and its limits.
    """
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(f"{name}: got {value:g}; must be {low:g} to {high:g}")


@contextmanager
def blame(where: str) -> Iterator[None]:
    """Turn what fails inside into a ConfigError that names ``where``, a file and its part for example.

    For code that builds something from a configuration: a combination of values, each of them allowed, may
    still be impossible, and a library then raises whatever it likes.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = _one_line(error)[:200] or type(error).__name__
        raise ConfigError(f"{where}: can't be built from these values ({reason}); check them") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionaries of a config dataclass, tuples as lists, ready for YAML."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, Path):
            return str(value)
        return value

    return plain(config)


def write_yaml(config: Any, path: str | Path) -> None:
    """Write a config dataclass or a plain dictionary as YAML."""
    OmegaConf.save(OmegaConf.create(to_dict(config)), Path(path))


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check ``value`` against a type hint and convert what is safe to (int to float, list to tuple)."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, pytypes.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        error: ConfigError | None = None
        for option in (o for o in options if o is not type(None)):
            try:
                return _convert(option, value, where)
            except ConfigError as caught:
                error = error or caught
        raise error or ConfigError(f"{where}: must not be empty")
    if origin is typing.Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ConfigError(f"{where}: got {value!r}; valid values: {', '.join(map(str, options))}")
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if hint is Any:
        return value
    if origin in (list, tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        args = [a for a in typing.get_args(hint) if a is not Ellipsis]
        fixed = origin is tuple and Ellipsis not in typing.get_args(hint) and args
        if fixed and len(args) != len(value):
            raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}")
        kinds = args if fixed else (args or [Any]) * len(value)
        items = [_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=False))]
        return items if origin is list else tuple(items)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        key, kind = typing.get_args(hint) or (Any, Any)
        return {_key(key, k, where): _convert(kind, v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):  # nan compares false with everything: no later check would see it
            raise ConfigError(f"{where}: got {value}; must be a finite number")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where}: expected {name}, got {value!r}")


def _key(hint: Any, key: Any, where: str) -> Any:
    """The key of a mapping; ``to_dict`` writes numbers as text."""
    if hint is not int or isinstance(key, int):
        return key
    try:
        return int(key)
    except ValueError as error:
        raise ConfigError(f"{where}: expected whole numbers as keys, got {key!r}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
