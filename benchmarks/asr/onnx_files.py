"""ONNX files of an official model folder, made by the funasr package.

    python -m benchmarks.asr.onnx_files FOLDER

Writes FOLDER/model.onnx and FOLDER/model_quant.onnx: dynamic int8 of the matrix products by
onnxruntime.quantization with FunASR's own settings (per channel, QUInt8 weights, output layer left out).
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.asr.official import auto_model

NEEDED = ("funasr", "onnx", "onnxruntime")
FILES = {"float32": "model.onnx", "int8": "model_quant.onnx"}


def lacking() -> list[str]:
    """Packages that are needed and not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def make(folder: Path) -> None:
    """Make the files of ``folder`` where they are not there yet, in a process of its own: the export leaves
    the official model changed.

    Raises:
        RuntimeError: the export failed.
    """
    if all((folder / name).exists() for name in FILES.values()):
        return
    root = Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, "-m", "benchmarks.asr.onnx_files", str(folder.resolve())]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(f"the ONNX export failed: {(out.stderr or out.stdout).strip()[-500:]}")


def export(folder: Path) -> None:
    """FunASR's own export and quantisation, in this process."""
    # It relies on the exporter that was PyTorch's default before 2.9.
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    auto_model(folder).export(type="onnx", quantize=True, output_dir=str(folder))


if __name__ == "__main__":
    export(Path(sys.argv[1]))
