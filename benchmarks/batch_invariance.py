"""Which operations of a streaming network give a stream other bits in another company, and why.

The engine pads batches to sizes among which results agree to the last bit (``exact_batches``). Where those
are few or large, this names the operations that are at fault:

    python -m benchmarks.batch_invariance --layers 8      # Paraformer-online with random weights

What is computed from other values is not looked at: mend the first ones and run it again. Usual causes on a
CPU: plain matrix products and convolutions, whose kernels follow the number of rows (packed Linear layers
do not), and exp, tanh or sigmoid of a tensor whose size is no multiple of 32 floats: what is left over is
computed by other code. The cure of both is in ``nar_speech/layers/silero.py``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nar_speech.engine.graphs import stable_sizes

UNINITIALISED = ("empty", "new_empty", "empty_like", "empty_strided")


@dataclass(frozen=True)
class Culprit:
    """An operation whose inputs are the same for every stream and in every batch, but not its output.

    how: ``position``: rows of one batch differ; ``size``: they differ from those of a batch of one; ``path``:
    from here on other operations run.
    """

    operation: str
    shapes: tuple[tuple[int, ...], ...]
    size: int
    how: str


@dataclass
class _Call:
    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class _Recorder(TorchDispatchMode):
    """Keeps what goes into and comes out of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        outputs = _floats([result])
        if not function._schema.is_mutable:  # a view computes nothing; what it shows may not be written yet
            places = {t.untyped_storage().data_ptr() for t in _floats(args)}
            outputs = [t for t in outputs if t.untyped_storage().data_ptr() not in places]
        outputs = [t.clone() for t in outputs]
        self.calls.append(_Call(str(function), _floats(args), outputs))
        return result


def _floats(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, list | tuple):
            found += _floats(value)
        elif isinstance(value, Tensor) and value.is_floating_point() and not value.is_mkldnn and value.dim():
            found.append(value)
    return found


def _alike(one: Tensor, many: Tensor, size: int) -> str:
    """How the rows of ``many`` differ from those of ``one``, which stands for a batch of one; "" if not."""
    if one.shape == many.shape:
        return "" if torch.equal(one, many) else "size"
    if one.numel() * size != many.numel():
        return "size"
    rows = many.reshape(size, -1)
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        return "position"
    return "" if torch.equal(rows[0], one.reshape(-1)) else "size"


@torch.inference_mode()
def culprits(model: Any, sizes: Sequence[int] = (2, 3, 4, 8), steps: int = 2) -> list[Culprit]:
    """What is at fault in a :class:`nar_speech.engine.StreamModel`, each kind and shape once."""
    reference, found = _record(model, 1, steps), {}
    for size in sizes:
        for one, many in zip(reference, _record(model, size, steps), strict=False):
            if one.name != many.name:
                found.setdefault((many.name, "path", ()), Culprit(many.name, (), size, "path"))
                break
            if one.name.split(".")[1] in UNINITIALISED:
                continue
            inputs = zip(one.inputs, many.inputs, strict=True)
            if any(_alike(a, b, size) for a, b in inputs):
                continue
            for a, b in zip(one.outputs, many.outputs, strict=True):
                if how := _alike(a, b, size):
                    shapes = tuple(tuple(t.shape) for t in many.inputs)
                    found.setdefault((one.name, how, shapes), Culprit(one.name, shapes, size, how))
    return list(found.values())


def _record(model: Any, size: int, steps: int) -> list[_Call]:
    noise = torch.randn(steps, model.chunk, generator=torch.Generator().manual_seed(1)) * 0.1
    lengths, final = torch.full((size,), model.chunk), torch.zeros(size, dtype=torch.bool)
    state, calls = model.init_state(size), []
    for samples in noise:
        with _Recorder() as recorder:
            _, state = model.step(samples.repeat(size, 1), lengths, final, state)
        calls += recorder.calls
    return calls


def random_paraformer(folder: Path, layers: int) -> Any:
    """Paraformer-online with random weights, its Linear layers packed."""
    from benchmarks.asr.random_model import Size, write_folder
    from nar_speech.layers.packed import pack_linear_layers
    from nar_speech.layers.sanm_stream import StreamConfig
    from nar_speech.models.paraformer_official import load_official
    from nar_speech.models.paraformer_stream import ParaformerStream

    write_folder(folder, Size(layers, 512, 2048, max(layers // 3, 2), 8404))
    parts = load_official(folder)
    parts.network.eval().requires_grad_(False).stream = StreamConfig((5, 10, 5), 4, 1)
    return ParaformerStream(pack_linear_layers(parts.network), parts.frontend.eval())


def main() -> None:
    """Stable batch sizes of a random Paraformer-online, and what keeps the others from it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="encoder layers; Paraformer-large has 50")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = random_paraformer(Path(folder), args.layers)
    print("stable sizes:", *stable_sizes(model, (1, 2, 4, 8, 16, 32)))
    for culprit in culprits(model):
        print(f"{culprit.how:8} batch {culprit.size:2}  {culprit.operation}  {culprit.shapes}")


if __name__ == "__main__":
    main()
