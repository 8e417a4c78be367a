"""What every recipe needs: the command line, and initial weights with a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from nar_speech import config as configs
from nar_speech.checkpoint import read_weights
from nar_speech.errors import CheckpointError, ConfigError, NarSpeechError
from nar_speech.train.distributed import World, init_world, leave_world
from nar_speech.train.saver import Saver

C = TypeVar("C")


@dataclass(frozen=True)
class InitSection:
    """Weights to start from.

    Attributes:
        init_from: safetensors or torch file, or None.
        prefix: name prefix there -> name prefix here; {"": ""} takes everything.
        partial: whether parameters under the prefixes may stay without a tensor of that name and shape.
    """

    init_from: str | None = None
    prefix: dict[str, str] = field(default_factory=lambda: {"": ""})
    partial: bool = False


def load_initial(model: nn.Module, section: InitSection) -> str:
    """Copy initial weights into ``model``; returns one line that says what was loaded.

    Raises:
        CheckpointError: nothing fits, or (unless ``partial``) a parameter under a prefix has no tensor of its
            name and shape.
    """
    if section.init_from is None:
        return "initial weights: random"
    tensors, own = read_weights(section.init_from), model.state_dict()
    found, strange, misfit = {}, [], []
    for name, value in tensors.items():
        prefix = max((p for p in section.prefix if name.startswith(p)), key=len, default=None)
        if prefix is None:
            continue
        target = section.prefix[prefix] + name[len(prefix) :]
        if target not in own:
            strange.append(name)
        elif own[target].shape != value.shape:
            misfit.append(f"{target} {tuple(value.shape)} for {tuple(own[target].shape)}")
        else:
            found[target] = value
    wanted = [name for name in own if any(name.startswith(p) for p in section.prefix.values())]
    missing = [name for name in wanted if name not in found]
    where = section.init_from
    if not found:
        raise CheckpointError(f"init.init_from: no tensor of {where} fits; its names: {_few(list(tensors))}")
    if (missing or misfit) and not section.partial:
        raise CheckpointError(
            f"init.init_from: {where} lacks {_few(missing)} (wrong shapes: {_few(misfit)}); "
            "set init.partial=true to start those at random"
        )
    model.load_state_dict(found, strict=False)
    values = sum(value.numel() for value in found.values())
    return (
        f"initial weights: {len(found)} tensors ({values / 1e6:.2f} M values) of {where}; left at "
        f"random: {_few(missing)}; not used: {_few(strange)}; wrong shapes: {_few(misfit)}"
    )


def run_recipe(cls: type[C], recipe: Callable[[C, World], None], argv: Sequence[str], doc: str | None) -> int:
    """The command line of a recipe: CONFIG.yaml ... key=value ...; returns the exit code."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="YAML files, then key=value words; later ones win")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the newest checkpoint of train.output_dir; --no-resume refuses such a folder",
    )
    options = parser.parse_args(argv)
    files = [word for word in options.config if "=" not in word]
    words = [word for word in options.config if "=" in word]
    world = None
    try:
        config = configs.load(cls, files, [*words, f"train.resume={str(options.resume).lower()}"])
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        world = init_world(config.train.device)
        if world.main:
            _write_config(config, Path(config.train.output_dir))
        recipe(config, world)
    except NarSpeechError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        if world is not None:
            leave_world(world)
    return 0


def _write_config(config: Any, folder: Path) -> None:
    """Keep the settings of a run, but not over those of one that it refuses to go on with."""
    if not config.train.resume and Saver(folder).steps():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        configs.write_yaml(config, folder / "config.yaml")
    except OSError as error:
        raise ConfigError(
            f"train.output_dir: can't write in {folder} ({error.strerror}); name another folder"
        ) from error


def _few(names: Sequence[str]) -> str:
    return (
        ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
    )
