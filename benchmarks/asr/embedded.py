"""The embedded English model against faster-whisper (Whisper tiny.en, int8) and PocketSphinx on real clips.

Ours run in this process, each of the others in one of its own (:mod:`benchmarks.asr.rivals`); at every clip
all of them take their turn. Everything from decoded samples to text counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.asr import timing
from nar_speech.audio import read_audio
from nar_speech.errors import InputError, NarSpeechError
from nar_speech.metrics import ErrorReport, word_error_rate
from nar_speech.pipelines.evaluate import read_manifest
from nar_speech.text.normalize import normalize_english

RIVALS = ("faster-whisper greedy", "faster-whisper beam 5", "pocketsphinx")
REFERENCE = RIVALS[0]
DECODERS = ("ctc_greedy", "paraformer", "ctc_beam", "verify")
SECONDS_TO_START = 600


@dataclass(frozen=True)
class Clip:
    """One utterance. samples: (N,) float32 at 16 kHz."""

    path: str
    text: str
    samples: np.ndarray

    @property
    def seconds(self) -> float:
        return len(self.samples) / 16000


@dataclass
class Score:
    """What one system did: times[repeat][clip] = (CPU, wall) seconds, and its texts."""

    name: str
    description: str
    times: list[list[tuple[float, float]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def seconds(self, column: int) -> float:
        """Median over the repeats of the sum over the clips: CPU (0) or wall (1)."""
        return statistics.median(sum(pair[column] for pair in row) for row in self.times)


class OursEmbedded:
    """The embedded model, or a folder, with one decoder in one dtype.

    Raises:
        NarSpeechError: this model lacks the decoder, or the processor the dtype.
    """

    def __init__(self, model: str, decoder: str, dtype: str):
        from nar_speech.hub import load_model

        verify = decoder == "verify"  # of what the model's own decoder drafts
        self.options: dict[str, Any] = {"verify": True} if verify else {"decoder": decoder, "verify": False}
        self.transcriber = load_model(model, device="cpu", dtype=dtype)
        self.transcriber.decoding_for(self.options)
        self.name, self.description = f"nar_speech {decoder} {dtype}", ""

    def __call__(self, clip: Clip) -> tuple[str, float, float]:
        """Text, CPU and wall seconds."""
        return timing.timed(lambda: self.transcriber(clip.samples, times=False, **self.options).text)


class Rival:
    """Another recogniser in a process of its own.

    Raises:
        InputError: a package is missing there, or the process ended.
    """

    def __init__(self, name: str, python: Path, threads: int):
        self.name = name
        if not python.exists():
            raise InputError(f"no interpreter {python}")
        script = Path(__file__).resolve().parent / "rivals.py"
        limits = {key: str(threads) for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self.process = subprocess.Popen(
            [str(python), str(script), name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits},
        )
        first = self._answer()
        if "missing" in first:
            self.close()
            raise InputError(first["missing"])
        self.description = first["description"]

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"its process ended with status {self.process.wait(SECONDS_TO_START)}")
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        return answer

    def __call__(self, clip: Clip) -> tuple[str, float, float]:
        self.process.stdin.write(json.dumps({"path": str(Path(clip.path).resolve())}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["text"], answer["cpu"], answer["wall"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(SECONDS_TO_START)


def read_clips(manifests: Sequence[Path], every: int = 1) -> list[Clip]:
    """Clips of some manifests; every n-th of each.

    Raises:
        InputError: a line that can't be used.
    """
    clips = []
    for manifest in manifests:
        utterances, problems = read_manifest(manifest)
        if problems:
            raise InputError(problems[0])
        for utterance in utterances[::every]:
            samples = read_audio(utterance.path, 16000).samples
            clips.append(Clip(str(utterance.path), utterance.text, samples))
    return clips


def start(
    model: str,
    decoders: Sequence[str],
    dtypes: Sequence[str],
    rivals: Sequence[str],
    python: Path,
    threads: int,
) -> tuple[list[OursEmbedded | Rival], list[str]]:
    """Every system that can run, and a line for each that can't."""
    systems: list[OursEmbedded | Rival] = []
    skipped = []
    for name in rivals:
        try:
            systems.append(Rival(name, python, threads))
        except InputError as error:
            skipped.append(f"{name}: skipped, {error}; see benchmarks/README.md")
    for decoder in decoders:
        for dtype in dtypes:
            try:
                systems.append(OursEmbedded(model, decoder, dtype))
            except NarSpeechError as error:
                skipped.append(f"nar_speech {decoder} {dtype}: skipped, {error}")
    return systems, skipped


def measure(systems: Sequence[OursEmbedded | Rival], clips: Sequence[Clip], repeats: int) -> list[Score]:
    """All systems on all clips, in turns at every clip, ``repeats`` times; one clip beforehand, not timed."""
    scores = [Score(system.name, system.description) for system in systems]
    for system in systems:
        system(clips[0])
    for repeat in range(repeats):
        for score in scores:
            score.times.append([])
        for clip in clips:
            for system, score in zip(systems, scores, strict=True):
                text, cpu, wall = system(clip)
                score.times[-1].append((cpu, wall))
                if repeat == 0:
                    score.texts.append(text)
    return scores


def errors(clips: Sequence[Clip], texts: Sequence[str]) -> ErrorReport:
    """Word errors after the package's English normalisation of both sides."""
    return word_error_rate(
        [normalize_english(clip.text) for clip in clips], [normalize_english(text) for text in texts]
    )


def table(scores: Sequence[Score], clips: Sequence[Clip]) -> str:
    """A Markdown table."""
    names = list(dict.fromkeys(Path(clip.path).parent.name for clip in clips))
    audio = sum(clip.seconds for clip in clips)
    reference = next((score for score in scores if score.name == REFERENCE), None)
    lines = [["system", "CPU-s/s", "wall-s/s", "speed-up CPU", "wall", "WER all", *names]]
    lines.append(["---"] * len(lines[0]))
    for score in scores:
        times = [score.seconds(column) for column in (0, 1)]
        gains = [f"{reference.seconds(c) / t:.2f}x" if reference else "" for c, t in enumerate(times)]
        report = errors(clips, score.texts)
        rates = [f"{100 * report.rate:.1f} [{100 * report.low:.1f}, {100 * report.high:.1f}]"]
        for name in names:
            rows = [i for i, clip in enumerate(clips) if Path(clip.path).parent.name == name]
            part = errors([clips[i] for i in rows], [score.texts[i] for i in rows])
            rates.append(f"{100 * part.rate:.1f}")
        lines.append([score.name, *(f"{t / audio:.4f}" for t in times), *gains, *rates])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows(scores: Sequence[Score], clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """The numbers of :func:`table`, ready for JSON."""
    audio = sum(clip.seconds for clip in clips)
    return [
        {
            "system": score.name,
            "description": score.description,
            "audio_seconds": audio,
            "cpu": score.seconds(0),
            "wall": score.seconds(1),
            "wer": errors(clips, score.texts).to_dict(),
            "texts": score.texts,
        }
        for score in scores
    ]


def run(args: Any) -> list[dict[str, Any]]:
    """The whole part, as the command line asks for it; prints the table."""
    torch.set_num_threads(1)
    clips = read_clips(args.clips, 10 if args.quick else 1)
    systems, skipped = start(args.model, args.decoders, args.dtypes, args.rivals, args.rivals_python, 1)
    try:
        scores = measure(systems, clips, args.repeats)
    finally:
        for system in systems:
            if isinstance(system, Rival):
                system.close()
    audio = sum(clip.seconds for clip in clips)
    descriptions = ", ".join(dict.fromkeys(s.description for s in scores if s.description))
    print(
        f"{len(clips)} clips, {audio:.0f} s, 1 thread, medians of {args.repeats} in turns;"
        f" {timing.machine(['torch'])}, {descriptions}; load {timing.load()}\n"
    )
    print(table(scores, clips), flush=True)
    for line in skipped:
        print(f"\n{line}")
    return rows(scores, clips)
