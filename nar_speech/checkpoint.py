"""Weights: read safely, load strictly, write as safetensors.

``read_weights`` never runs code from a file: safetensors has none, and pickles go through PyTorch's
weights-only reader. ``load_strict`` fails on any name or shape that does not fit, with the names.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nar_speech.errors import CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model")
NAMES_SHOWN = 3

Rename = Mapping[str, str | None]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or a PyTorch pickle, told apart by content, onto the CPU.

    Zip pickles and safetensors are memory mapped. A state dict inside ``state_dict``, ``model_state_dict``
    or ``model`` is unwrapped, and the prefix ``module.`` of data-parallel training is dropped.

    Raises:
        CheckpointError: the file is missing, empty, truncated, not weights, or a pickle that runs code.
    """
    path = Path(path)
    if _kind_of(path) == "safetensors":
        try:
            return _without_module(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: damaged or truncated safetensors file ({_one_line(error)}); get the file again"
            ) from error
    return _without_module(_unwrap(read_tree(path), path))


def read_tree(path: str | Path) -> object:
    """What a PyTorch pickle holds besides tensors too: mappings, lists, texts and numbers. Runs no code.

    Raises:
        CheckpointError: the file is missing, empty, truncated, not PyTorch's, or a pickle that runs code.
    """
    path = Path(path)
    kind = _kind_of(path)
    if kind == "safetensors":
        raise CheckpointError(f"{path}: is a safetensors file; a PyTorch file is expected")
    try:
        with warnings.catch_warnings():  # about the protocol of a foreign pickle; it loads or it is refused
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        raise CheckpointError(_pickle_message(path, str(error))) from error
    except Exception as error:  # torch.load of a damaged file raises a dozen kinds of errors
        what = "damaged or truncated" if kind == "zip" else "neither safetensors nor a whole PyTorch file"
        raise CheckpointError(f"{path}: {what} ({type(error).__name__}); get the weights again") from error


def load_strict(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    rename: Rename | None = None,
    where: str | Path = "weights",
) -> None:
    """Load ``tensors`` into ``module``; every name and shape must fit.

    Floating point tensors become the dtype of the module's own (float16 files load into a float32 module).

    Args:
        rename: see :func:`rename_tensors`.
        where: named in errors, the weights file for example.

    Raises:
        CheckpointError: missing, unexpected or misshaped names (the first few and their count), or values
            that are not finite.
    """
    tensors = rename_tensors(tensors, rename, where)
    problems = compare_shapes(module, {name: tuple(t.shape) for name, t in tensors.items()})
    if problems:
        raise CheckpointError(
            f"{where}: the weights don't fit the model: {'; '.join(problems)}; the configuration and the"
            " weights must come from the same model"
        )
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise CheckpointError(f"{where}: NaN or infinite values in {_some(bad)}; get the file again")
    own = module.state_dict()
    ready = {name: tensor.to(own[name].device, own[name].dtype) for name, tensor in tensors.items()}
    # Taking the tensors themselves saves a copy and keeps the file mapped, but would untie shared parameters.
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    tied = len(names) != sum(1 for _ in module.parameters())
    module.load_state_dict(ready, strict=True, assign=not tied)


def rename_tensors(
    tensors: Mapping[str, Tensor], rename: Rename | None, where: str | Path = "weights"
) -> dict[str, Tensor]:
    """Names of a foreign checkpoint to ours.

    Args:
        rename: regular expression for the beginning of a name -> what to put there (``\\1`` is the first
            group), or None to leave the tensor out. The first expression that matches a name is applied.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    if not rename:
        return dict(tensors)
    rules = [(re.compile(pattern), new) for pattern, new in rename.items()]
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rule = next(((p, new) for p, new in rules if p.match(name)), None)
        if rule is None:
            new_name = name
        elif rule[1] is None:
            continue
        else:
            match = rule[0].match(name)
            new_name = match.expand(rule[1]) + name[match.end() :]
        if new_name in renamed:
            raise CheckpointError(f"{where}: two tensors would be called '{new_name}'; mend the rename table")
        renamed[new_name] = tensor
    return renamed


def compare_shapes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors of these names and shapes from fitting ``module``, in words; empty if they fit."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in own if name not in shapes]
    unexpected = [name for name in shapes if name not in own]
    misshaped = [
        f"{name} is {_shape(shapes[name])} in the file, {_shape(own[name])} in the model"
        for name in own
        if name in shapes and tuple(shapes[name]) != own[name]
    ]
    found = [("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)]
    return [f"{len(names)} {word}: {_some(names)}" for word, names in found if names]


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file without reading the tensors.

    Raises:
        CheckpointError: not a readable safetensors file.
    """
    if _kind_of(Path(path)) != "safetensors":
        raise CheckpointError(f"{path}: not a safetensors file; convert it with 'nar-speech models import'")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated safetensors file ({_one_line(error)}); get the file again"
        ) from error


def save_safetensors(
    path: str | Path, source: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (or a module's state) to ``path``; a crash never leaves half a file there."""
    path = Path(path)
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses two names for one memory
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensors[name] = tensor.clone()
        seen.add(place)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, draft, metadata=dict(metadata or {}) or None)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def sha256(path: str | Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors as hexadecimal digits, whatever their order and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN anywhere makes both NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


class SkipInit(TorchFunctionMode):
    """Inside this context modules are built without drawing initial values.

    Only for modules that :func:`load_strict` fills right after: it overwrites every parameter and buffer
    that is saved, so drawing 220 million random numbers first would be thrown away.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _kind_of(path: Path) -> str:
    """``safetensors``, ``zip`` (PyTorch since 1.6) or ``pickle`` (older), from the first bytes."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the weights file inside it")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such weights file; check the path") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be read ({error.strerror}); check the path and its rights"
        ) from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty; get the weights again")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{path}: is a web page, not weights; download the file itself, not the page about it"
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not weights; run 'git lfs pull' to get the file"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return "safetensors"
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: is not a safetensors file; get the file again")
    if head[:4] == b"PK\x03\x04":
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: damaged or truncated PyTorch file; get the file again")
        return "zip"
    return "pickle"


def _unwrap(tree: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside what a pickle held."""
    while isinstance(tree, Mapping):
        wrapper = next((key for key in WRAPPERS if isinstance(tree.get(key), Mapping)), None)
        if wrapper is None:
            break
        tree = tree[wrapper]
    if not isinstance(tree, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(tree).__name__}, expected a state dict (tensor names to tensors)"
        )
    wrong = [str(name) for name, value in tree.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(
            f"{path}: {_some(wrong)} is not a tensor; expected a state dict, or one under"
            f" {', '.join(WRAPPERS)}"
        )
    if not tree:
        raise CheckpointError(f"{path}: holds no tensors; get the weights again")
    return dict(tree)


def _without_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _pickle_message(path: Path, reason: str) -> str:
    refused = re.search(r"GLOBAL:? ([\w.]+)", reason)
    if refused:
        return (
            f"{path}: refused, the pickle asks for '{refused.group(1)}', which could run code; get the"
            " weights as safetensors or as a plain state dict, from a source you trust"
        )
    return (
        f"{path}: not a file of plain tensors (safetensors or a PyTorch state dict); get the weights again,"
        " from a source you trust"
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _some(names: list[str]) -> str:
    more = f", ... ({len(names) - NAMES_SHOWN} more)" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:160] or type(error).__name__
