"""What the data scripts share: 16 kHz FLAC files, JSONL manifests, reading files out of git repositories."""

import io
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 16000


def notice(message: str) -> None:
    """A line that nobody overlooks, for everything that is skipped."""
    print(f"!!! {message}", file=sys.stderr)


def read_16k(source: Path | bytes) -> np.ndarray:
    """Any file that libsndfile reads, as mono float32 samples at 16 kHz."""
    samples, rate = soundfile.read(
        io.BytesIO(source) if isinstance(source, bytes) else source, dtype="float32"
    )
    if samples.ndim > 1:
        samples = samples.mean(axis=1)
    return samples if rate == RATE else soxr.resample(samples, rate, RATE, quality="HQ")


def read_raw(path: Path) -> np.ndarray:
    """Headerless little-endian 16 bit samples at 16 kHz (PocketSphinx's .raw)."""
    return np.frombuffer(path.read_bytes(), "<i2").astype(np.float32) / 32768


def read_g722(path: Path) -> np.ndarray:
    """A raw G.722 file through ffmpeg, (samples,) float32 at 16 kHz."""
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-f",
        "g722",
        "-i",
        str(path),
        "-f",
        "s16le",
        "-ar",
        str(RATE),
        "-ac",
        "1",
        "-",
    ]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    return np.frombuffer(raw, "<i2").astype(np.float32) / 32768


def write_flac(path: Path, samples: np.ndarray) -> float:
    """Write 16 kHz 16 bit FLAC unless it is there; returns the duration in seconds."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        soundfile.write(part, np.clip(samples, -1, 1), RATE, subtype="PCM_16", format="FLAC")
        part.rename(path)
    return len(samples) / RATE


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.rename(path)


def hours(rows: Iterable[dict]) -> float:
    return sum(row["duration"] for row in rows) / 3600


def share(name: str) -> float:
    """A number in [0, 1) that depends on the name only, to split lists the same way on every machine."""
    return zlib.crc32(name.encode()) / 2**32


class Repository:
    """Files of a GitHub repository at its newest commit, from a mirror folder or cloned once.

    `origin` is a folder with `owner+name/repo` git directories or the address of a server ("https://github.com").
    """

    def __init__(self, origin: str, name: str, cache: Path):
        self.name = name
        mirror = Path(origin) / name.replace("/", "+") / "repo"
        if re.match(r"[a-z+]+://|git@", origin):
            self.git_dir = cache / f"{name.replace('/', '+')}.git"
            if not self.git_dir.exists():
                part = self.git_dir.with_suffix(".part")
                subprocess.run(["rm", "-rf", str(part)], check=True)
                clone = [
                    "git",
                    "clone",
                    "--quiet",
                    "--bare",
                    "--depth",
                    "1",
                    f"{origin.rstrip('/')}/{name}",
                    str(part),
                ]
                try:
                    subprocess.run(clone, check=True, timeout=1800, stdin=subprocess.DEVNULL)
                except (subprocess.SubprocessError, OSError) as error:
                    raise FileNotFoundError(f"{origin}/{name} can't be cloned: {error}") from error
                part.rename(self.git_dir)
        elif mirror.is_dir():
            self.git_dir = mirror / ".git" if (mirror / ".git").is_dir() else mirror
        else:
            raise FileNotFoundError(f"{mirror} is not there")

    def _git(self, *command: str) -> bytes:
        run = subprocess.run(["git", f"--git-dir={self.git_dir}", *command], capture_output=True)
        if run.returncode:
            raise FileNotFoundError(
                f"{self.name}: git {command[0]}: {run.stderr.decode(errors='replace').strip()}"
            )
        return run.stdout

    def names(self, folder: str) -> list[str]:
        """Paths of the files under `folder` ("" for all), sorted."""
        below = [f"{folder.rstrip('/')}/"] if folder else []
        out = self._git("ls-tree", "-r", "-z", "--name-only", "HEAD", *below)
        return sorted(name for name in out.decode().split("\0") if name)

    def read(self, path: str) -> bytes:
        """The file's bytes; FileNotFoundError where a mirror left a large file out."""
        return self._git("cat-file", "blob", f"HEAD:{path}")
