"""Where the command line's results go: stdout, a file, a folder; progress and complaints on stderr."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nar_speech.errors import ConfigError, InputError, NarSpeechError

if TYPE_CHECKING:
    from nar_speech.pipelines.transcribe import Result
    from nar_speech.types import Audio

OK, SOME_FAILED, FAILED = 0, 1, 2
FORMATS = ("txt", "json", "jsonl", "srt", "vtt", "tsv")
JOINABLE = ("txt", "jsonl")  # formats in which one stream can hold several recordings
TIMED = ("json", "jsonl", "srt", "vtt")  # formats that need the times of words
PROGRESS_DELAY = 3.0  # seconds before a progress bar appears


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"nar-speech: error: {' '.join(message.split())}", file=sys.stderr)


@dataclass
class Work:
    """What ``transcribe`` has to do, and how much of it is done.

    Attributes:
        options: of the command line.
        sources: inputs that are to be recognised.
        targets: the output file of each input, where there is an output folder.
        several: whether results are named by their inputs.
        folder: whether there is an output folder.
        done, failed: inputs.
    """

    options: argparse.Namespace
    sources: list[str]
    several: bool
    folder: bool
    targets: dict[str, Path] = field(default_factory=dict)
    done: int = 0
    failed: int = 0

    @classmethod
    def of(cls, options: argparse.Namespace) -> Work:
        """Find the inputs, leave out those that are done.

        Raises:
            ConfigError: options that make no sense together, outputs that would lie on inputs.
        """
        names, several, failed = expand(options.inputs, options.recursive)
        output = options.output
        folder = output is not None and (output.endswith(os.sep) or Path(output).is_dir())
        work = cls(options, list(names), several, folder, failed=failed)
        _check(options, len(names), several, folder)
        if output is not None and not folder:
            keep_inputs("--output", output, work.sources)
        if folder:
            work.targets = name_targets(names, Path(output), options.format)
            if options.resume:
                work.sources = [source for source in names if not work.targets[source].exists()]
            work.done = len(names) - len(work.sources)
        return work

    def write(self, results: Iterable[Result]) -> None:
        """Write the results of ``sources``, in this order, as they come; complain of those that failed."""
        with sink(self.options.output, self.folder) as put:
            for source, result in zip(self.sources, results, strict=True):
                if result.transcript is None:
                    complain(str(result.error))
                    self.failed += 1
                    continue
                named = self.several and not self.folder
                put(self.targets.get(source), rendered(result.transcript, self.options, named))
                self.done += 1

    @property
    def code(self) -> int:
        """Exit code."""
        if not self.failed:
            return OK
        return SOME_FAILED if self.done else FAILED


def expand(inputs: Sequence[str], recursive: bool) -> tuple[dict[str, Path], bool, int]:
    """Files of all inputs and their names in an output folder; whether they are several; how many failed."""
    from nar_speech.pipelines.transcribe import list_audio

    sources: dict[str, Path] = {}
    failed, folders = 0, False
    for item in inputs:
        if item != "-" and Path(item).is_dir():
            folders = True
            try:
                found = list_audio(item, recursive)
            except InputError as error:
                complain(str(error))
                failed += 1
                continue
            for path in found:
                sources.setdefault(str(path), path.relative_to(item))
        else:
            sources.setdefault(item, Path("stdin" if item == "-" else Path(item).name))
    return sources, folders or len(inputs) > 1, failed


def _check(options: argparse.Namespace, count: int, several: bool, folder: bool) -> None:
    """Combinations of options that make no sense.

    Raises:
        ConfigError: which, and what to do.
    """
    if several and not folder and options.format not in JOINABLE:
        raise ConfigError(
            f"--format {options.format} holds one recording; add -o FOLDER/ for a file per input"
        )
    if options.resume and not folder:
        raise ConfigError("--resume: works with an output folder; add -o FOLDER/")
    if options.word_times and options.format not in ("txt", "json", "jsonl"):
        content = "segments" if options.format == "tsv" else "cues"
        raise ConfigError(f"--word-times: {options.format} lists {content}; use --format txt or json")
    if options.nbest > 1 and options.format not in ("json", "jsonl"):
        raise ConfigError("--nbest: hypotheses are listed in json only; add --format json")
    if options.plot and (count != 1 or options.inputs[0] == "-"):
        raise ConfigError("--plot: draws one file; give a single input that is a file")


def keep_inputs(option: str, output: str | Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Refuse to write over a file that is about to be read.

    Raises:
        ConfigError: ``output``, or one of them, is one of ``inputs``, perhaps by another name.
    """
    outputs = [Path(output)] if isinstance(output, str) else list(output)
    present = [target for target in outputs if target.is_file()]
    if not present:
        return
    read = {_identity(source) for source in map(Path, inputs) if source.exists()}
    for target in present:
        if _identity(target) in read:
            raise ConfigError(f"{option} {target}: is an input and would be overwritten; name another file")


def _identity(path: Path) -> tuple[int, int]:
    """What all names of a file have in common."""
    status = path.stat()
    return status.st_dev, status.st_ino


def name_targets(names: Mapping[str, Path], folder: Path, suffix: str) -> dict[str, Path]:
    """The output file of every input: its name with another suffix, or one more where two would clash.

    Inputs of different folders with the same name keep as much of their paths as tells them apart.

    Raises:
        ConfigError: an input that is named twice.
    """
    names = _told_apart(names)
    plain = Counter(name.with_suffix("") for name in names.values())
    targets = {
        source: folder / (name.with_suffix("") if plain[name.with_suffix("")] == 1 else name)
        for source, name in names.items()
    }
    count = Counter(targets.values())
    clash = next((source for source, target in targets.items() if count[target] > 1), None)
    if clash is not None:
        raise ConfigError(f"{clash}: another input would be written to the same file; name each input once")
    return {source: target.with_name(f"{target.name}.{suffix}") for source, target in targets.items()}


def _told_apart(names: Mapping[str, Path]) -> dict[str, Path]:
    """``names``; where several inputs have the same, their paths below the folder that they share."""
    groups: dict[Path, list[str]] = {}
    for source, name in names.items():
        groups.setdefault(name, []).append(source)
    apart = dict(names)
    for group in groups.values():
        paths = {source: os.path.abspath(source) for source in group}
        if len(group) > 1 and len(set(paths.values())) == len(group):
            shared = os.path.commonpath([os.path.dirname(path) for path in paths.values()])
            apart.update((source, Path(os.path.relpath(path, shared))) for source, path in paths.items())
    return apart


def rendered(transcript: Any, options: argparse.Namespace, named: bool) -> str:
    """The transcript in the format asked for; ``named``: with its path in front of every line of text."""
    from nar_speech.pipelines.writers import WRITERS, write_words

    if options.format != "txt":
        return WRITERS[options.format](transcript)
    text = write_words(transcript) if options.word_times else WRITERS["txt"](transcript)
    if named:
        return "".join(f"{transcript.source}\t{line}\n" for line in text.splitlines())
    return text


@contextmanager
def sink(output: str | None, folder: bool):
    """A function that writes a text to its own file (folder), to the one file ``output``, or to stdout."""
    try:
        if folder:
            yield _write_whole
        elif output is not None:
            with _late_file(output) as write:
                yield lambda _, text: write(text)
        else:
            yield lambda _, text: (sys.stdout.write(text), sys.stdout.flush())
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(
            f"{error.filename or output}: can't write ({error.strerror}); check the path"
        ) from error


@contextmanager
def _late_file(path: str) -> Iterator[Callable[[str], None]]:
    """A function that writes to a file.

    The file is opened at once, so that a bad path is an early error, and emptied at the first write: where
    nothing is written an older file stays as it was, and a new one does not stay.
    """
    new = not os.path.lexists(path)
    with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        regular, started = stat.S_ISREG(os.fstat(file.fileno()).st_mode), False

        def write(text: str) -> None:
            nonlocal started
            if regular and not started:
                file.truncate(0)
            started = True
            file.write(text)
            file.flush()

        try:
            yield write
        finally:
            if new and regular and not started:
                os.unlink(path)


def _write_whole(path: Path, text: str) -> None:
    """Write under a temporary name first, so that an interrupted run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8", errors="surrogateescape")
    draft.replace(path)


def write_sound(target: Path, audio: Audio, subtype: str | None = None) -> None:
    """Write sound under a temporary name first, so that an interrupted run leaves no half file.

    Args:
        subtype: see :func:`nar_speech.audio.write_audio`.

    Raises:
        InputError: the file can't be written.
    """
    from nar_speech.audio import write_audio

    draft = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_audio(draft, audio, subtype=subtype)
        draft.replace(target)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise InputError(f"{target}: can't write ({error.strerror}); check the path") from error
    except NarSpeechError as error:
        draft.unlink(missing_ok=True)
        raise InputError(str(error).replace(str(draft), str(target))) from error


@contextmanager
def step_bar(description: str) -> Iterator[Callable[[int, int], None] | None]:
    """A function to call with the networks' calls done and at most; draws a bar on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="step", delay=PROGRESS_DELAY, leave=False, desc=description) as bar:

        def report(now: int, most: int) -> None:
            bar.total = most
            bar.update(now - bar.n)

        yield report


@contextmanager
def progress_bar(sources: Sequence[Any]):
    """A function to call with seconds of audio read; draws a bar on a terminal after some seconds."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    total = known_seconds(sources)
    with tqdm(total=total or None, unit="s", delay=PROGRESS_DELAY, leave=False, unit_scale=True) as bar:
        yield bar.update


def known_seconds(sources: Sequence[str]) -> float:
    """Seconds of audio in those files whose headers say it."""
    from nar_speech.audio import info

    total = 0.0
    for source in sources:
        try:
            if Path(source).is_file():  # what a pipe holds can be read only once
                total += info(source).duration or 0.0
        except NarSpeechError:
            continue  # it is reported when its turn comes
    return total
