"""Streaming state: frozen dataclasses of tensors whose first dimension is the batch, or the slot of a stream.

A field is a tensor, another such dataclass, a tuple of either, or None. The functions here know nothing else
of a state, so an engine can keep the streams of any model in slots and step any subset of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """The same structure with ``function`` of the tensors that stand in the same place of all states."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state, *others)
    if isinstance(state, tuple):
        return tuple(map_state(function, *parts) for parts in zip(state, *others, strict=True))
    names = [field.name for field in dataclasses.fields(state)]
    parts = {name: map_state(function, *(getattr(s, name) for s in (state, *others))) for name in names}
    return dataclasses.replace(state, **parts)


def named_tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state with its path, such as ``blocks.3.keys``."""
    if isinstance(state, Tensor):
        yield prefix, state
    elif state is not None:
        if isinstance(state, tuple):
            parts = ((str(i), part) for i, part in enumerate(state))
        else:
            parts = ((field.name, getattr(state, field.name)) for field in dataclasses.fields(state))
        for name, part in parts:
            yield from named_tensors(part, f"{prefix}.{name}" if prefix else name)


def gather(store: State, slots: Tensor) -> State:
    """Rows of a store as a batch of their own, a copy; ``slots`` (R,) int64."""
    return map_state(lambda tensor: tensor.index_select(0, slots), store)


def scatter(store: State, slots: Tensor, rows: State) -> None:
    """Write a batch back into the rows of a store, in place; no slot may occur twice."""
    map_state(lambda tensor, new: tensor.index_copy_(0, slots, new.to(tensor.dtype)), store, rows)


def select(mask: Tensor, new: State, old: State) -> State:
    """Rows of ``new`` where ``mask`` (B,) is true, of ``old`` elsewhere."""
    return map_state(
        lambda a, b: torch.where(mask.reshape(-1, *[1] * (a.dim() - 1)), a, b.to(a.dtype)), new, old
    )


def export_row(store: Any, slot: int) -> dict[str, Tensor]:
    """One stream's state as named tensors on the CPU, without the slot's dimension."""
    return {name: tensor[slot].cpu().clone() for name, tensor in named_tensors(store)}


def import_row(store: Any, slot: int, tensors: Mapping[str, Tensor]) -> None:
    """Put what :func:`export_row` gave into a slot, in place.

    Raises:
        ValueError: other names or shapes than this store has.
    """
    own = dict(named_tensors(store))
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [n for n in own.keys() & tensors.keys() if own[n].shape[1:] != tensors[n].shape]
    if wrong:
        raise ValueError(f"stream state: {', '.join(wrong[:5])} missing, unknown or of another shape")
    for name, tensor in own.items():
        tensor[slot].copy_(tensors[name])
