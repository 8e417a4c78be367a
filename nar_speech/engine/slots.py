"""The states of all streams of one model, in rows of preallocated tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nar_speech.errors import ConfigError, EngineBusy, SnapshotError
from nar_speech.layers import state as states

# Two rows belong to nobody. A stream that begins reads the pristine row and writes its own, so nothing has
# to be reset. The rows that pad a batch read the pristine one too and write the scratch row.
PRISTINE, SCRATCH, RESERVED = 0, 1, 2
SMALLEST = 8  # slots of a store that grows


@dataclass(frozen=True)
class Slot:
    """A row, and which of its users this is: a result that comes late finds that it has changed hands."""

    row: int
    generation: int


class SlotStore:
    """Rows of state for up to ``capacity`` streams.

    On a CPU the store starts small and doubles; on a CUDA device it is allocated whole, since graphs hold
    its addresses. Used by the engine's thread only.

    Args:
        model: a :class:`nar_speech.engine.model.StreamModel`.

    Raises:
        ConfigError: a field named in ``model.carried`` that its state does not have.
    """

    def __init__(self, model: Any, capacity: int):
        self.model, self.capacity = model, capacity
        grows = torch.device(model.device).type == "cpu"
        self.size = min(SMALLEST, capacity) if grows else capacity
        self.state = _own(model.init_state(self.size + RESERVED))
        names = [name for name, _ in states.named_tensors(self.state)]
        carried = tuple(getattr(model, "carried", ()))
        wrong = [c for c in carried if not any(_is_part(name, c) for name in names)]
        if wrong:
            raise ConfigError(f"carried: the model's state has no field {', '.join(wrong)}")
        self._carried = tuple(any(_is_part(name, c) for c in carried) for name in names)
        self._free = list(range(self.size + RESERVED - 1, RESERVED - 1, -1))
        self._generations = [0] * (self.size + RESERVED)
        self._room: Any = None  # see gather
        self._room_rows = 0

    @property
    def used(self) -> int:
        """Slots that are taken."""
        return self.size - len(self._free)

    @property
    def bytes(self) -> int:
        """Memory of the store."""
        return sum(t.numel() * t.element_size() for _, t in states.named_tensors(self.state))

    def acquire(self) -> Slot:
        """A free slot.

        Raises:
            EngineBusy: there is none.
        """
        if not self._free:
            self._grow()
        row = self._free.pop()
        return Slot(row, self._generations[row])

    def release(self, slot: Slot) -> None:
        """Give a slot back; from now on it is nobody's."""
        if self.owns(slot):
            self._generations[slot.row] += 1
            self._free.append(slot.row)

    def owns(self, slot: Slot) -> bool:
        """Whether the slot is still in the same hands."""
        return self._generations[slot.row] == slot.generation

    def gather(self, rows: Tensor, carried_rows: Tensor, reuse: bool = False) -> Any:
        """A batch of states.

        Args:
            rows: (B,) int64; PRISTINE where a stream begins an utterance.
            carried_rows: (B,) int64 for the fields that outlive an utterance; PRISTINE where a stream begins.
            reuse: the next such call overwrites what this one returns. On a CPU it takes longer to get
                memory for large states from the system than to copy them.
        """
        flags = iter(self._carried)  # map_state and named_tensors go through a state in the same order
        if not reuse:
            return states.map_state(
                lambda tensor: tensor.index_select(0, carried_rows if next(flags) else rows), self.state
            )
        count = len(rows)
        if count > self._room_rows:
            self._room = states.map_state(lambda t: t.new_empty(count, *t.shape[1:]), self.state)
            self._room_rows = count

        def pick(tensor: Tensor, room: Tensor) -> Tensor:
            return torch.index_select(tensor, 0, carried_rows if next(flags) else rows, out=room[:count])

        return states.map_state(pick, self.state, self._room)

    def scatter(self, rows: Tensor, batch: Any) -> None:
        """Write a batch back; only SCRATCH may occur more than once in ``rows`` (B,) int64."""
        states.scatter(self.state, rows, batch)

    def check(self, batch: Any, size: int) -> None:
        """Make sure that a step's new state of ``size`` rows fits the store.

        Raises:
            ConfigError: naming the fields that do not.
        """
        new = dict(states.named_tensors(batch))
        own = dict(states.named_tensors(self.state))
        wrong = sorted(own.keys() ^ new.keys())
        wrong += [n for n in own.keys() & new.keys() if new[n].shape != (size, *own[n].shape[1:])]
        wrong += [n for n in own.keys() & new.keys() if new[n].dtype != own[n].dtype]
        if wrong:
            raise ConfigError(
                f"{type(self.model).__name__}.step: state fields {', '.join(wrong[:5])} differ in name, shape"
                " or dtype from those of init_state"
            )

    def put(self, slot: Slot, row: Any) -> None:
        """Write the state of one stream, a batch of one."""
        self.scatter(torch.tensor([slot.row], device=self.model.device), row)

    def export(self, row: int) -> dict[str, Tensor]:
        """One row as named tensors on the CPU."""
        return states.export_row(self.state, row)

    def restore(self, slot: Slot, tensors: Mapping[str, Tensor]) -> None:
        """Put what :meth:`export` gave into a slot.

        Raises:
            SnapshotError: names, shapes or dtypes are not those of this model, or values are not finite.
        """
        own = dict(states.named_tensors(self.state))
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [
            n
            for n in own.keys() & tensors.keys()
            if own[n].shape[1:] != tensors[n].shape or own[n].dtype != tensors[n].dtype
        ]
        if wrong:
            raise SnapshotError(
                f"snapshot: state fields {', '.join(wrong[:5])} are missing, unknown or of another shape or"
                " dtype; resume it with the model that it was taken from"
            )
        unsound = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
        if unsound:
            raise SnapshotError(f"snapshot: state field {unsound[0]} is not finite; take another snapshot")
        states.import_row(self.state, slot.row, tensors)

    def _grow(self) -> None:
        size = min(2 * self.size, self.capacity)
        if size <= self.size:
            raise EngineBusy(f"all {self.capacity} slots of the model are taken; try again later")
        grown = _own(self.model.init_state(size + RESERVED))
        states.map_state(lambda new, old: new[: len(old)].copy_(old), grown, self.state)
        self._free += range(size + RESERVED - 1, self.size + RESERVED - 1, -1)
        self._generations += [0] * (size - self.size)
        self.state, self.size = grown, size


def finite_rows(parts: Iterable[Any], rows: int, device: torch.device) -> Tensor:
    """(B,) bool: whether all floats of a row are finite, in every tensor (B, ...) of the parts.

    One sum for each tensor: it is NaN or infinite where a value is. Finite values whose sum passes
    3e38 count as infinite.
    """
    sums = [
        tensor.reshape(rows, -1).sum(1, dtype=torch.float32)
        for part in parts
        for _, tensor in states.named_tensors(part)
        if tensor.is_floating_point() and tensor.numel()
    ]
    if not sums:
        return torch.ones(rows, dtype=torch.bool, device=device)
    return torch.stack(sums).isfinite().all(0)


def _own(state: Any) -> Any:
    """The state with memory of its own for every tensor: fields may have been made from one tensor."""
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place in seen or not tensor.is_contiguous():
            return tensor.clone(memory_format=torch.contiguous_format)
        seen.add(place)
        return tensor

    return states.map_state(own, state)


def _is_part(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
