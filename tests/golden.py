"""Run recorded cases of the official implementations through our code.

    python -m tests.golden CASE_DIR [CASE_DIR ...]

Searches the given folders recursively for ``meta.json``, rebuilds each case from it, and prints one line
per output: name, largest absolute difference, tolerance, PASS or FAIL. A case is chosen by ``system`` and
``kind`` in its ``meta.json`` alone, never by the folder's name. A kind that can't be run (yet) is reported
as UNSUPPORTED. Exit code 0 only if at least one case was found and every case passed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.golden_kinds import (
    codec,
    ctc,
    fastconformer,
    magnet,
    magnet_sampling,
    maskgct,
    maskgct_codec,
    maskgct_g2p,
    maskgct_pipeline,
    paraformer,
)


@dataclass(frozen=True)
class Check:
    """One compared output; ``difference`` is the largest absolute one (inf for shapes that differ)."""

    name: str
    difference: float
    tolerance: str
    passed: bool


class Case:
    """A recorded case: ``meta``, the tensors ``io`` and ``weights``, and helpers that compare with them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.system: str = self.meta["system"]
        self.kind: str = self.meta["kind"]
        io, weights = folder / "io.safetensors", folder / "weights.safetensors"
        self.io: dict[str, torch.Tensor] = load_file(io) if io.is_file() else {}
        self.weights: dict[str, torch.Tensor] = load_file(_linked(weights)) if weights.is_file() else {}
        self.atol, self.rtol = _tolerance(self.meta.get("tolerance"))

    def close(
        self, name: str, got: torch.Tensor, want: torch.Tensor | None = None, scale: float = 1.0
    ) -> Check:
        """Compare with ``want`` (default: the recorded tensor ``name``) within the case's tolerance.

        Integer and boolean tensors must be equal. ``scale`` multiplies the tolerance (gradients).
        """
        want = self.io[name] if want is None else want
        if tuple(got.shape) != tuple(want.shape):
            return Check(
                f"{name} shape {tuple(got.shape)} != {tuple(want.shape)}", float("inf"), "shape", False
            )
        if got.numel() == 0:
            return Check(name, 0.0, "empty", True)
        if not want.dtype.is_floating_point:
            different = (got.to(want.dtype) != want).sum().item()
            return Check(name, float(different), "equal", different == 0)
        got, want = got.detach().double(), want.double()
        infinite = ~torch.isfinite(want)
        same_infinite = bool((got[infinite] == want[infinite]).all())
        got, want = got.masked_fill(infinite, 0.0), want.masked_fill(infinite, 0.0)
        error = (got - want).abs()
        atol, rtol = self.atol * scale, self.rtol * scale
        passed = same_infinite and bool((error <= atol + rtol * want.abs()).all())
        return Check(name, error.max().item(), f"{atol:g}+{rtol:g}*|x|", passed)

    def equal(self, name: str, got: object, want: object) -> Check:
        """Compare two plain Python values exactly."""
        same = got == want
        return Check(
            name if same else f"{name}: got {got!r}, want {want!r}",
            0.0 if same else float("inf"),
            "exact",
            same,
        )


def _linked(path: Path) -> Path:
    """The file itself, or the one it names: links between cases that became files with the link's text."""
    if path.stat().st_size > 1000 or b"\0" in (text := path.read_bytes()):
        return path
    target = path.parent / text.decode("utf-8").strip()
    return _linked(target) if target.is_file() else path


Handler = Callable[[Case], Iterator[Check]]
HANDLERS: dict[tuple[str, str], Handler] = {
    **{("paraformer", kind): handler for kind, handler in paraformer.HANDLERS.items()},
    **{("ctc", kind): handler for kind, handler in ctc.HANDLERS.items()},
    **{("ctc", kind): handler for kind, handler in fastconformer.HANDLERS.items()},
    **{("magnet", kind): handler for kind, handler in magnet.HANDLERS.items()},
    **{("magnet", kind): handler for kind, handler in magnet_sampling.HANDLERS.items()},
    **{("codec", kind): handler for kind, handler in codec.HANDLERS.items()},
    **{("maskgct", kind): handler for kind, handler in maskgct.HANDLERS.items()},
    **{("maskgct", kind): handler for kind, handler in maskgct_codec.HANDLERS.items()},
    **{("maskgct", kind): handler for kind, handler in maskgct_g2p.HANDLERS.items()},
    **{("maskgct", kind): handler for kind, handler in maskgct_pipeline.HANDLERS.items()},
}


def find_cases(folders: list[Path]) -> list[Path]:
    """Folders that hold a ``meta.json``, sorted, links followed."""
    return sorted({meta.parent for folder in folders for meta in folder.rglob("meta.json")})


def run_case(folder: Path) -> tuple[str, list[Check]]:
    """Run one case. Returns ``PASS``, ``FAIL`` or ``UNSUPPORTED`` and its checks."""
    case = Case(folder)
    handler = HANDLERS.get((case.system, case.kind))
    if handler is None:
        return "UNSUPPORTED", []
    torch.manual_seed(0)
    checks = list(handler(case))
    return ("PASS" if checks and all(c.passed for c in checks) else "FAIL"), checks


def _tolerance(entry: dict | str | None) -> tuple[float, float]:
    """The case's (atol, rtol); cases state it as a mapping or as words such as ``atol 2e-5 rtol 1e-4``."""
    if isinstance(entry, dict):
        return float(entry.get("atol", 0.0)), float(entry.get("rtol", 0.0))
    if isinstance(entry, str):
        named = {k: float(v) for k, v in re.findall(r"(atol|rtol)\D*?([0-9.]+(?:e-?\d+)?)", entry)}
        if named:
            return named.get("atol", 0.0), named.get("rtol", 0.0)
        numbers = re.findall(r"\d(?:\.\d+)?e-\d+", entry)
        if numbers:
            return float(numbers[0]), float(numbers[0])
    return 0.0, 0.0


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="searched recursively for meta.json")
    parser.add_argument("--quiet", action="store_true", help="one line per case, and the failing outputs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the cases were recorded with one thread
    counts = {"PASS": 0, "FAIL": 0, "UNSUPPORTED": 0}
    folders = find_cases(options.folders)
    for folder in folders:
        try:
            verdict, checks = run_case(folder)
            detail = ""
        except Exception as error:
            verdict, checks, detail = "FAIL", [], f" ({type(error).__name__}: {error})"
            if not options.quiet:
                traceback.print_exc()
        counts[verdict] += 1
        print(f"{verdict:11s} {folder}{detail}")
        for check in checks:
            if not (options.quiet and check.passed):
                word = "PASS" if check.passed else "FAIL"
                size = f"max abs difference {check.difference:.3g}, tolerance {check.tolerance}"
                print(f"    {word} {check.name}: {size}")
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    if not folders:
        print("no meta.json found under the given folders", file=sys.stderr)
    return 0 if counts["PASS"] and counts["PASS"] == len(folders) else 1


if __name__ == "__main__":
    sys.exit(main())
