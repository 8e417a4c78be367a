"""One batched step of one model: from pinned host memory to the device, through the network, and back.

On a CUDA device every batch size has a graph, captured once, that gathers the states, steps the network and
scatters the states; values come in through static tensors. The same code runs eagerly on a CPU.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nar_speech.engine.slots import PRISTINE, SCRATCH, SlotStore, finite_rows
from nar_speech.errors import ConfigError
from nar_speech.layers.state import named_tensors

logger = logging.getLogger(__name__)

ALIGN = 8  # bytes
WARM_UPS = 3  # eager steps before a capture
TRIALS = 2  # timed steps of each batch size
STAGES = 3  # host buffers of a batch size: one is filled while the device still reads the one before

LENGTHS, FINAL, ROWS, CARRIED, WRITE = range(5)  # rows of Staging.meta


class Staging:
    """Host memory of one batch, pinned where the device is CUDA.

    Attributes:
        audio: (B, N) float32 array; meta: (5, B) int64 array, see LENGTHS ... WRITE. Both share memory with
            the tensors ``audio_tensor`` and ``meta_tensor``.
    """

    def __init__(self, size: int, samples: int, pinned: bool):
        self.size, self.samples = size, samples
        self.audio_tensor = torch.zeros(size, samples, pin_memory=pinned)
        self.meta_tensor = torch.zeros(5, size, dtype=torch.int64, pin_memory=pinned)
        self.audio, self.meta = self.audio_tensor.numpy(), self.meta_tensor.numpy()
        self.read: torch.cuda.Event | None = None  # the device has read it

    def clear(self, length: int) -> None:
        """Make all rows padding: ``length`` samples of silence heard by a stream that begins."""
        if self.read is not None:
            self.read.synchronize()
        self.audio.fill(0.0)
        self.meta[LENGTHS], self.meta[FINAL] = length, 0
        self.meta[ROWS], self.meta[CARRIED], self.meta[WRITE] = PRISTINE, PRISTINE, SCRATCH

    def fill(self, row: int, samples: np.ndarray, final: bool, slot: int, fresh: bool, new: bool) -> None:
        """Put one stream into row ``row``.

        fresh: its utterance begins; new: the stream itself begins, with nothing carried over either.
        """
        self.audio[row, : len(samples)] = samples
        self.meta[LENGTHS, row], self.meta[FINAL, row] = len(samples), final
        self.meta[ROWS, row] = PRISTINE if fresh else slot
        self.meta[CARRIED, row] = PRISTINE if new else slot
        self.meta[WRITE, row] = slot


@dataclass(frozen=True)
class _Field:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


class Packing:
    """Lays all output tensors of a step into one (B, S) uint8 tensor, to be read back in one copy."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.fields: list[_Field] = []
        self.size = 0
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape[1:])
            count = math.prod(shape) * tensor.element_size()
            self.fields.append(_Field(name, tensor.dtype, shape, self.size, count))
            self.size += -(-count // ALIGN) * ALIGN

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(B, S) uint8."""
        parts = []
        for field in self.fields:
            tensor = tensors[field.name].contiguous()
            rows = len(tensor)
            parts.append(tensor.view(rows, -1).view(torch.uint8))
            parts.append(parts[-1].new_zeros(rows, -field.bytes % ALIGN))
        return torch.cat(parts, dim=1)

    def unpack(self, host: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays in (B, S) uint8 ``host``, as copies."""
        arrays = {}
        for field in self.fields:
            part = np.ascontiguousarray(host[:, field.start : field.start + field.bytes])
            dtype = torch.empty(0, dtype=field.dtype).numpy().dtype
            arrays[field.name] = part.view(dtype).reshape(len(host), *field.shape)
        return arrays


def readable(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by their names, in dtypes that numpy has."""
    return {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in named_tensors(output)}


class Pending:
    """A step whose results are on their way. ``immediate``: they are already there."""

    immediate = True

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._arrays = arrays

    def wait(self) -> dict[str, np.ndarray]:
        """Outputs (B, ...) by their names; ``SOUND`` (B,) bool tells which rows are finite."""
        return self._arrays


class PendingOnDevice(Pending):
    """Results that a CUDA device copies into pinned memory, which goes back to ``pool`` after reading."""

    immediate = False

    def __init__(self, packing: Packing, host: Tensor, done: torch.cuda.Event, pool: list[Tensor]):
        self._packing, self._host, self._done, self._pool = packing, host, done, pool

    def wait(self) -> dict[str, np.ndarray]:
        self._done.synchronize()  # lets other threads run meanwhile
        arrays = self._packing.unpack(self._host.numpy())
        self._pool.append(self._host)
        return arrays


SOUND = "__sound__"


class Stepper:
    """Steps batches of one model; used by the engine's thread only.

    Args:
        model: a :class:`nar_speech.engine.model.StreamModel`.
        graphs: ``on``: captured graphs, an error where that fails; ``auto``: eager where it fails, with a
            warning; ``off``: eager. On a CPU everything is eager.
        check_state: look for NaN in the states too, not only in the outputs.
    """

    def __init__(
        self,
        model: Any,
        store: SlotStore,
        graphs: Literal["auto", "on", "off"] = "auto",
        check_state: bool = True,
    ):
        self.model, self.store, self.graphs, self.check_state = model, store, graphs, check_state
        self.device = torch.device(model.device)
        self.cuda = self.device.type == "cuda"
        self.first = int(getattr(model, "first", model.chunk))
        self.samples = max(self.first, model.chunk)
        self.stream = torch.cuda.Stream(self.device, priority=-1) if self.cuda else None
        self.replays = self.eager = 0
        self._staging: dict[int, list[Staging]] = {}
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}  # static, on the device
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._packing: Packing | None = None
        self._hosts: dict[int, list[Tensor]] = {}
        self._pool: Any = None

    def on_stream(self) -> contextlib.AbstractContextManager:
        """Do whatever touches the store in the same CUDA stream as the steps, so that it keeps its turn."""
        return torch.cuda.stream(self.stream) if self.cuda else contextlib.nullcontext()

    def staging(self, size: int) -> Staging:
        """Host memory for the next batch of ``size`` rows, all padding; :meth:`launch` it before the next."""
        stages = self._staging.setdefault(size, [])
        if len(stages) < (STAGES if self.cuda else 1):
            stages.append(Staging(size, self.samples, self.cuda))
        else:
            stages.append(stages.pop(0))
        stages[-1].clear(self.first)
        return stages[-1]

    @torch.inference_mode()
    def launch(self, staging: Staging) -> Pending:
        """Start one step. States are written only when the whole step could be started without an error."""
        if not self.cuda:
            outputs = self._body(staging.audio_tensor, staging.meta_tensor)
            self.eager += 1
            return Pending({name: tensor.numpy() for name, tensor in outputs.items()})
        with torch.cuda.stream(self.stream):
            audio, meta = self._static(staging.size)
            audio.copy_(staging.audio_tensor, non_blocking=True)
            meta.copy_(staging.meta_tensor, non_blocking=True)
            staging.read = torch.cuda.Event()
            staging.read.record(self.stream)
            captured = self._captured.get(staging.size)
            if captured is None:
                packed = self._packed(audio, meta)
                self.eager += 1
            else:
                captured[0].replay()
                packed = captured[1]
                self.replays += 1
            pool = self._hosts.setdefault(staging.size, [])
            host = pool.pop() if pool else torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # waiting for it leaves the core to other threads
            done.record(self.stream)
        return PendingOnDevice(self._packing, host, done, pool)

    @torch.inference_mode()
    def warm_up(self, sizes: Sequence[int]) -> dict[int, float]:
        """Run every batch size, capture its graph on a CUDA device, and tell the seconds of a step.

        Raises:
            ConfigError: the model's state does not fit, or ``graphs`` is ``on`` and a capture fails.
        """
        self._check(min(sizes))
        if self.cuda:
            torch.cuda.synchronize(self.device)  # weights and states were made in the default stream
        seconds = {}
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            if self.cuda and self.graphs != "off":
                self._capture(size)
            self.launch(self.staging(size)).wait()
            trials = []
            for _ in range(TRIALS):
                begun = time.perf_counter()
                self.launch(self.staging(size)).wait()
                trials.append(time.perf_counter() - begun)
            seconds[size] = min(trials)
        self.replays = self.eager = 0
        return seconds

    def _body(self, audio: Tensor, meta: Tensor) -> dict[str, Tensor]:
        """Gather, step, check, scatter; nothing in it waits for the device."""
        states = self.store.gather(meta[ROWS], meta[CARRIED], reuse=not self.cuda)
        output, new = self.model.step(audio, meta[LENGTHS], meta[FINAL] != 0, states)
        checked = (output, new) if self.check_state else (output,)
        outputs = readable(output)
        outputs[SOUND] = finite_rows(checked, len(audio), audio.device)
        self.store.scatter(meta[WRITE], new)  # last, so that an error before leaves all states as they were
        return outputs

    def _packed(self, audio: Tensor, meta: Tensor) -> Tensor:
        outputs = self._body(audio, meta)
        if self._packing is None:
            self._packing = Packing(outputs)
        return self._packing.pack(outputs)

    def _static(self, size: int) -> tuple[Tensor, Tensor]:
        if size not in self._inputs:
            audio = torch.zeros(size, self.samples, device=self.device)
            meta = torch.zeros(5, size, dtype=torch.int64, device=self.device)
            meta[LENGTHS], meta[WRITE] = self.first, SCRATCH
            self._inputs[size] = audio, meta
        return self._inputs[size]

    def _check(self, size: int) -> None:
        rows = torch.zeros(size, dtype=torch.int64, device=self.device)
        lengths = torch.full_like(rows, self.first)
        audio = torch.zeros(size, self.samples, device=self.device)
        output, new = self.model.step(audio, lengths, rows != 0, self.store.gather(rows, rows))
        self.store.check(new, size)
        names = dict(named_tensors(output))
        wrong = [name for name, tensor in names.items() if tensor.shape[:1] != (size,)]
        if wrong or not names:
            raise ConfigError(
                f"{type(self.model).__name__}.step: its output needs tensors whose first dimension is the"
                f" batch; wrong: {', '.join(wrong) or 'it has none'}"
            )

    def _capture(self, size: int) -> None:
        """Record the step of one batch size, in the engine's own stream."""
        audio, meta = self._static(size)
        try:
            torch.cuda.synchronize(self.device)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    self._packed(audio, meta)
            self.stream.synchronize()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                packed = self._packed(audio, meta)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            if self.graphs == "on":
                raise ConfigError(
                    f"{type(self.model).__name__}: its step can't be captured as a CUDA graph ({reason});"
                    " set graphs to off"
                ) from error
            logger.warning("%s: no CUDA graph of batch %d: %s", type(self.model).__name__, size, reason)
            return
        self._captured[size] = graph, packed


@torch.inference_mode()
def stable_sizes(model: Any, sizes: Sequence[int], steps: int = 1) -> tuple[int, ...]:
    """Batch sizes among which a stream's results are the same to the last bit.

    Matrix kernels are chosen by the shape of a batch, and different ones may add in different orders. Here
    every row of a batch gets the same audio. A size counts as stable if all its rows agree; of the groups
    of stable sizes that agree with each other the largest is taken, and of several as large the one with
    the largest batch. That kernels are not chosen by values is what makes the answer hold for any audio.

    Returns:
        The sizes in ascending order; empty if no size is stable.
    """
    first = int(getattr(model, "first", model.chunk))
    width = max(first, model.chunk)
    noise = torch.randn(steps + 1, width, generator=torch.Generator().manual_seed(1)) * 0.1
    groups: list[tuple[list[Tensor], list[int]]] = []
    for size in sorted(sizes):
        outcome = _outcome(model, size, noise, first)
        if outcome is None:
            continue
        for reference, members in groups:
            if all(torch.equal(a, b) for a, b in zip(reference, outcome, strict=True)):
                members.append(size)
                break
        else:
            groups.append((outcome, [size]))
    best = max((members for _, members in groups), key=lambda m: (len(m), m[-1]), default=[])
    return tuple(best)


def _outcome(model: Any, size: int, noise: Tensor, first: int) -> list[Tensor] | None:
    """What one stream gives in a batch of ``size`` like ones; None if they differ."""
    device = torch.device(model.device)
    state = model.init_state(size)
    outcome = []
    for i, samples in enumerate(noise):
        final = i == len(noise) - 1
        count = 0 if final else (first if i == 0 else model.chunk)
        audio = torch.where(torch.arange(len(samples)) < count, samples, 0.0)
        audio = audio.to(device).repeat(size, 1)
        lengths = torch.full((size,), count, device=device)
        output, state = model.step(audio, lengths, torch.full_like(lengths, final, dtype=torch.bool), state)
        parts = [tensor for part in (output, state) for _, tensor in named_tensors(part)]
        if any(not torch.equal(part, part[:1].expand_as(part)) for part in parts):
            return None
        outcome += [part[0].cpu() for part in parts]
    return outcome
