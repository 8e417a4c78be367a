"""The few things a training process needs to know about the other ones (torchrun, DDP)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nar_speech.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among the ones torchrun started; a plain ``python`` start is a world of one."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0


def init_world(device: str = "auto") -> World:
    """Join the process group named by torchrun's environment (nccl on CUDA, gloo on CPU).

    Args:
        device: "auto" (CUDA when there is one), "cpu" or "cuda".

    Raises:
        ConfigError: CUDA asked for and not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"train.device: got '{device}'; valid values: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: cuda was asked for but torch finds no CUDA device; use cpu or auto")
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(place)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_cuda else "gloo")
    return World(int(os.environ.get("RANK", "0")) if size > 1 else 0, size, place)


def leave_world(world: World) -> None:
    """Leave the process group, if there is one."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def sum_over(world: World, values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of a float64 vector over all processes, on the CPU."""
    if world.size > 1:
        values = values.to(world.device)
        dist.all_reduce(values)
    return values.cpu()


def gather_lists(world: World, items: list[Any]) -> list[Any]:
    """The lists of all processes one after another, in every process."""
    if world.size == 1:
        return items
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def barrier(world: World) -> None:
    """Wait for the other processes."""
    if world.size > 1:
        dist.barrier()


def say(world: World, text: str) -> None:
    """One line on stderr, above a progress bar if there is one, from the main process only."""
    if world.main:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
