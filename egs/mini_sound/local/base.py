"""What the data scripts share: the helpers of mini_en, and clips of one length and loudness."""

import sys
from pathlib import Path

import numpy as np

# One set of helpers and one list of reserved recordings for both recipes. At the end of the path: the names
# of this folder come first.
MINI_EN = Path(__file__).resolve().parents[2] / "mini_en" / "local"
if str(MINI_EN) not in sys.path:
    sys.path.append(str(MINI_EN))

from common import RATE, hours, notice, read_16k, read_jsonl, share, write_flac, write_jsonl  # noqa: E402

__all__ = [
    "CLIP",
    "RATE",
    "fail",
    "fit",
    "hours",
    "level",
    "notice",
    "read_16k",
    "read_jsonl",
    "row",
    "share",
    "write_flac",
    "write_jsonl",
]

CLIP = 5 * RATE  # samples of a clip
LOUDNESS = -20.0  # dB full scale of the loudest 0.4 s
MOST_GAIN = 30.0  # dB; silence stays silence
PEAK = 0.9


def fail(message: str) -> None:
    """End the script with one line and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def level(samples: np.ndarray, loudness: float = LOUDNESS) -> np.ndarray:
    """`samples` (N,) with the loudest 0.4 s at `loudness` dB; peak at most 0.9, gain at most 30 dB."""
    window = min(len(samples), int(0.4 * RATE))
    if window == 0 or not np.any(samples):
        return samples
    total = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    power = (total[window:] - total[:-window]).max() / window
    gain = min(10 ** (loudness / 20) / np.sqrt(max(power, 1e-20)), 10 ** (MOST_GAIN / 20))
    return (samples * min(gain, PEAK / np.abs(samples).max())).astype(np.float32)


def fit(samples: np.ndarray, *, loop: bool = False, fade: float = 0.03) -> np.ndarray:
    """`samples` (N,) as one clip (CLIP,): cut with a short fade, or going round, or with silence after it."""
    if loop and 0 < len(samples) < CLIP:
        samples = np.tile(samples, -(-CLIP // len(samples)))
    if len(samples) > CLIP:
        samples = samples[:CLIP].astype(np.float32)
        tail = int(fade * RATE)
        samples[-tail:] *= np.linspace(1, 0, tail, dtype=np.float32)
    return np.pad(samples, (0, CLIP - len(samples))).astype(np.float32)


def row(source: str, name: str, kind: str, label: str, split: str, licence: str, **more) -> dict:
    """One line of work/sounds/<source>.jsonl.

    `kind` is a section of conf/vocabulary.yaml or "other" (no caption, for the codec only), `label` the
    class, `split` train, dev or eval; `more` has `labels` (what captions are made of) and where known
    `author`, `title`.
    """
    if split not in ("train", "dev", "eval"):
        raise ValueError(f"{source}/{name}: split {split}")
    return {
        "path": f"{source}/{name}.flac",
        "name": name,
        "source": source,
        "kind": kind,
        "label": label,
        "split": split,
        "licence": licence,
        "duration": CLIP / RATE,
        **more,
    }
