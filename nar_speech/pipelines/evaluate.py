"""Error rates of a recogniser on a manifest: JSON lines with ``path`` (relative to it) and ``text``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nar_speech.errors import ManifestError
from nar_speech.metrics import ErrorReport, alignment_text, char_error_rate, word_error_rate
from nar_speech.text.normalize import get_normalizer

if TYPE_CHECKING:
    from nar_speech.pipelines.transcribe import Progress, Transcriber

CHINESE = ("zh", "yue", "ja")


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest: an existing or missing file, and what is said in it."""

    line: int
    path: Path
    text: str


@dataclass(frozen=True)
class Item:
    """One scored utterance; ``reference`` and ``hypothesis`` as they were compared."""

    path: str
    reference: str
    hypothesis: str
    raw: str


@dataclass(frozen=True)
class Evaluation:
    """Error rates, what they were computed from, and what had to be left out.

    words, characters: the two rates. items: scored utterances. problems: a line for each that was left out.
    audio_seconds: of the scored ones; seconds: wall time of reading and recognising everything.
    """

    words: ErrorReport
    characters: ErrorReport
    items: tuple[Item, ...]
    problems: tuple[str, ...]
    audio_seconds: float
    seconds: float

    def to_dict(self) -> dict:
        """Both rates with their intervals, counts and speed, ready for JSON."""
        return {
            "wer": self.words.to_dict(),
            "cer": self.characters.to_dict(),
            "utterances": len(self.items),
            "excluded": len(self.problems),
            "problems": list(self.problems),
            "audio_seconds": self.audio_seconds,
            "seconds": self.seconds,
            "real_time_factor": self.seconds / self.audio_seconds if self.audio_seconds else None,
        }


def read_manifest(path: str | Path) -> tuple[list[Utterance], list[str]]:
    """Utterances of a manifest, and a line for each that can't be used.

    Raises:
        ManifestError: the file can't be read or has no line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ManifestError(f"{path}: can't be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: is not UTF-8 text; expected JSON lines with path and text") from error
    utterances, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            utterances.append(_parse(line, number, path))
        except ManifestError as error:
            problems.append(str(error))
    if not utterances and not problems:
        raise ManifestError(f"{path}: has no lines; expected JSON lines with path and text")
    return utterances, problems


def _parse(line: str, number: int, manifest: Path) -> Utterance:
    where = f"{manifest}:{number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ManifestError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(entry, dict):
        raise ManifestError(f'{where}: expected an object such as {{"path": "a.wav", "text": "hello"}}')
    for key in ("path", "text"):
        if not isinstance(entry.get(key), str):
            raise ManifestError(f"{where}: field '{key}' is missing or not a string; every line needs it")
    if not entry["path"]:
        raise ManifestError(f"{where}: field 'path' is empty; name the audio file")
    return Utterance(number, manifest.parent / entry["path"], entry["text"])


def evaluate(
    transcriber: Transcriber,
    manifest: str | Path,
    normalizer: str = "auto",
    batch_seconds: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Recognise every utterance of a manifest and compare.

    Args:
        normalizer: applied to both texts: ``en``, ``zh``, ``none``; ``auto`` goes by the model's languages.
        batch_seconds, progress, options: see :meth:`Transcriber.results`.

    Raises:
        ManifestError: nothing could be scored. InputError: wrong options.
    """
    normalize = get_normalizer(_normalizer_name(transcriber) if normalizer == "auto" else normalizer)
    utterances, problems = read_manifest(manifest)
    start = time.perf_counter()
    results = transcriber.results(
        [u.path for u in utterances], batch_seconds, times=False, progress=progress, **options
    )
    items, audio_seconds = [], 0.0
    for utterance, result in zip(utterances, results, strict=True):
        if result.transcript is None:
            problems.append(f"{manifest}:{utterance.line}: {result.error}")
            continue
        audio_seconds += result.transcript.duration
        raw = result.transcript.text
        items.append(Item(str(utterance.path), normalize(utterance.text), normalize(raw), raw))
    seconds = time.perf_counter() - start
    if not items:
        raise ManifestError(f"{manifest}: no utterance could be scored; the first problem: {problems[0]}")
    references, hypotheses = [i.reference for i in items], [i.hypothesis for i in items]
    return Evaluation(
        word_error_rate(references, hypotheses),
        char_error_rate(references, hypotheses),
        tuple(items),
        tuple(problems),
        audio_seconds,
        seconds,
    )


def report_lines(evaluation: Evaluation) -> Iterator[str]:
    """A text report: the rates, then every utterance with its errors marked, the worst first."""
    yield str(evaluation.words)
    yield str(evaluation.characters)
    yield from (f"excluded: {problem}" for problem in evaluation.problems)
    scored = zip(evaluation.items, evaluation.words.items, strict=True)
    for item, counts in sorted(scored, key=lambda pair: -pair[1].errors):
        yield ""
        yield f"{item.path}: {counts.errors} errors in {counts.reference} words"
        yield alignment_text(item.reference, item.hypothesis)


def _normalizer_name(transcriber: Transcriber) -> str:
    languages = transcriber.card.languages
    if any(language in CHINESE for language in languages):
        return "zh"
    return "en" if languages == ("en",) else "none"
