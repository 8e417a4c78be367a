"""Small made-up corpora for the tests: tones in wav or flac files, and lhotse manifests of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile


def tone(seconds: float, hertz: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """(N,) float32: a sine with a little noise."""
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (0.3 * np.sin(2 * np.pi * hertz * t) + 0.01 * noise).astype(np.float32)


def spell(text: str, rng: np.random.Generator, rate: int = 16000) -> np.ndarray:
    """Sound of ``text``: a tone of 0.15 to 0.25 s for each of the letters a to h, short pauses between."""
    parts = []
    for letter in text:
        parts += [
            tone(rng.uniform(0.15, 0.25), 200 + 250 * (ord(letter) - ord("a")), rate),
            np.zeros(rate // 25),
        ]
    return np.concatenate(parts).astype(np.float32)


def make_spelled(folder: Path, count: int, name: str) -> str:
    """A manifest of ``count`` spelled strings of 2 to 5 letters."""
    from lhotse import CutSet, Recording, SupervisionSegment
    from lhotse.cut import MonoCut

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([count, len(name)])
    cuts = []
    for i in range(count):
        text = "".join(rng.choice(list("abcdefgh"), rng.integers(2, 6)))
        path = folder / f"{name}-{i:03d}.wav"
        soundfile.write(path, spell(text, rng), 16000)
        recording = Recording.from_file(path)
        supervision = SupervisionSegment(recording.id, recording.id, 0.0, recording.duration, text=text)
        cuts.append(MonoCut(recording.id, 0.0, recording.duration, 0, [supervision], recording=recording))
    manifest = folder / f"{name}.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(manifest)
    return str(manifest)


def make_manifest(
    folder: Path, count: int = 24, texts: list[str] | None = None, name: str = "cuts", rate: int = 16000
) -> str:
    """``count`` tones of 0.4 to 1.2 s as wav files and a CutSet; text "speaker K" unless given."""
    from lhotse import CutSet, Recording, SupervisionSegment
    from lhotse.cut import MonoCut

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    cuts = []
    for i in range(count):
        kind = i % 8
        seconds = float(rng.uniform(0.4, 1.2))
        path = folder / f"{name}-{i:03d}.wav"
        soundfile.write(path, tone(seconds, 200 + 150 * kind, rate, i), rate)
        recording = Recording.from_file(path, recording_id=f"{name}-{i:03d}")
        text = texts[i % len(texts)] if texts else f"speaker {kind}"
        supervision = SupervisionSegment(recording.id, recording.id, 0.0, recording.duration, text=text)
        cuts.append(MonoCut(recording.id, 0.0, recording.duration, 0, [supervision], recording=recording))
    manifest = folder / f"{name}.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(manifest)
    return str(manifest)
