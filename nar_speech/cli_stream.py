"""``nar-speech transcribe --stream``: files, or a live microphone, heard chunk by chunk."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from nar_speech.cli_options import decoding_of, refuse_idle
from nar_speech.cli_output import OK, Work, known_seconds, rendered, sink
from nar_speech.errors import AudioError, ConfigError, InputError

if TYPE_CHECKING:
    import numpy as np

    from nar_speech.engine import Event
    from nar_speech.engine.asr_files import Listening, StreamTranscriber
    from nar_speech.pipelines.transcribe import Result

MAX_STREAMS = 8
READ_BYTES = 8192  # at most at once; a pipe gives what it has
MAGIC = 4  # bytes that tell a file from samples
CONTAINERS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd", b"ID3", b"\x1aE\xdf\xa3")
REFRESH = 0.05  # seconds between two drawings of the status line
ERASE = "\r\x1b[K"
NOT_TAKEN = {  # options that have no meaning for streams
    "plot": "draws what a model makes of a whole file",
    "batch_seconds": "is of whole files; --max-streams says how many are heard at once",
}


def transcribe_stream(options: argparse.Namespace) -> int:
    """Run ``transcribe --stream``; returns the exit code.

    Raises:
        InputError: options that make no sense together, a model that can't be loaded or hears no streams.
    """
    name, second = check(options)
    work = Work.of(options)
    if not work.sources:
        return work.code
    transcriber = load(options, name, second)
    with without_advice(options.verbose), Status(sys.stderr) as status:
        if work.sources == ["-"]:
            return hear_live(options, work, transcriber, status)
        if status.on:
            status.total = known_seconds(work.sources)

        def results() -> Iterator[Result]:
            for result in transcriber.results(work.sources, status.read, status.watch):
                status.hide()
                yield result

        work.write(results())
    return work.code


@contextmanager
def without_advice(verbose: bool) -> Iterator[None]:
    """Keep back what the engine tells about callbacks that take long: here nobody else waits for them."""
    logger = logging.getLogger("nar_speech.engine.fanout")
    level = logger.level
    logger.setLevel(level if verbose else logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check(options: argparse.Namespace) -> tuple[str, str | None]:
    """Names of the streaming model and of the one for the second pass (None: not said).

    Raises:
        ConfigError: options that make no sense together.
    """
    from nar_speech.hub import DEFAULT_MODEL, TWIN
    from nar_speech.server.settings import ModelSpec

    for name, why in NOT_TAKEN.items():
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: {why}; leave it out with --stream")
    if options.nbest > 1:
        raise ConfigError("--nbest: streams have one hypothesis; leave it out with --stream")
    if "-" in options.inputs:
        if len(options.inputs) > 1:
            raise ConfigError("-: live speech is heard alone; leave the other inputs out")
        if options.max_streams is not None:
            raise ConfigError("--max-streams: is of files; leave it out with -")
        if sys.stdin is None:
            raise ConfigError("standard input: is closed; send samples, or name files")
        if sys.stdin.isatty():
            raise ConfigError(
                "standard input: is a terminal; send samples, for example: arecord -f S16_LE -r 16000 -c 1"
                " -t raw | nar-speech transcribe --stream -"
            )
    spec = ModelSpec.parse(options.model)
    if spec.id is not None:
        raise ConfigError(f"--model {options.model}: ID= is for servers; leave it out")
    if len(spec.sources) == 1:
        return spec.sources[0], options.second_pass
    if options.second_pass is not None:
        raise ConfigError(f"--second-pass: --model {options.model} names it already; leave one out")
    if spec.sources[1] in ("default", DEFAULT_MODEL):
        raise ConfigError(
            f"--model {options.model}: the second is the streaming model, and {spec.sources[1]} hears files"
            f" only; {DEFAULT_MODEL}+{TWIN} is the embedded pair"
        )
    return spec.sources[1], spec.sources[0]


def load(options: argparse.Namespace, name: str, second: str | None) -> StreamTranscriber:
    """The models that the options name.

    Raises:
        InputError: see :meth:`nar_speech.engine.asr_files.StreamTranscriber.load`.
    """
    decoding = decoding_of(options)
    given = tuple(decoding)
    hotwords = decoding.pop("hotwords", ())
    import torch

    from nar_speech.engine.asr_files import StreamTranscriber

    if options.threads:
        torch.set_num_threads(options.threads)
    transcriber = StreamTranscriber.load(
        name,
        second,
        options.device,
        options.dtype,
        options.chunk_size,
        options.left,
        options.cache_dir,
        options.offline,
        hotwords,
        options.max_streams or MAX_STREAMS,
        **decoding,
    )
    if transcriber.second is not None:
        refuse_idle(transcriber.second.transcriber, given)
    return transcriber


def hear_live(options: argparse.Namespace, work: Work, transcriber: StreamTranscriber, status: Status) -> int:
    """Standard input up to its end, or to Ctrl-C; what was said before is written in both cases.

    Text is written utterance by utterance; formats that hold a whole recording at the end.

    Raises:
        InputError: no audio, or not raw samples. EngineError: recognition failed.
    """
    from nar_speech.engine import Final

    at_once = options.format == "txt" and not work.folder
    with (
        sink(options.output, work.folder) as put,
        transcriber.listen(read_samples(sys.stdin.fileno())) as listening,
        ended_by_interrupt(listening),
    ):

        def text(finals: list[Final]) -> str:
            transcript = transcriber.transcript(finals, listening.seconds, "-")
            return rendered(transcript, options, named=False)

        for event in listening:
            if at_once and isinstance(event, Final) and event.text:
                status.hide()
                put(None, text([event]))
            status.watch("", event)
        status.hide()
        # Where nothing was said, an older file is emptied too.
        put(work.targets.get("-"), "" if at_once else text(listening.finals))
    return OK


def read_samples(descriptor: int) -> Iterator[np.ndarray]:
    """(N,) float32 in [-1, 1] from signed 16-bit little endian samples, as they come; half a one is dropped.

    Raises:
        AudioError: there is nothing. InputError: a file with a header.
    """
    import numpy as np

    rest, begun = b"", False
    while data := os.read(descriptor, READ_BYTES):
        data, rest = rest + data, b""
        if not begun and len(data) < MAGIC:
            rest = data
            continue
        if not begun and data.startswith(CONTAINERS):
            raise InputError(
                "standard input: is an audio file; --stream - takes raw samples (arecord -t raw, ffmpeg -f"
                " s16le -ar 16000 -ac 1), and files by their names"
            )
        begun = True
        whole = len(data) // 2 * 2
        rest = data[whole:]
        yield np.frombuffer(data[:whole], "<i2").astype(np.float32) / 32768
    if not begun and len(rest) < 2:
        raise AudioError("standard input: no audio; send signed 16-bit samples at 16 kHz, mono")
    if len(rest) > 1:
        yield np.frombuffer(rest[:2], "<i2").astype(np.float32) / 32768


@contextmanager
def ended_by_interrupt(listening: Listening) -> Iterator[None]:
    """Ctrl-C ends the audio; a second one the command."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        listening.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Status:
    """One line on a terminal that is written over: how far, and what is being said.

    On anything but a terminal it does nothing.

    Attributes:
        on: whether there is a terminal.
        total: seconds of audio in all; None: not known.
    """

    def __init__(self, stream: IO[str]):
        self.stream, self.on = stream, stream.isatty()
        self.total: float | None = None
        self._read, self._drawn, self._shown = 0.0, 0.0, False

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *error: object) -> None:
        self.hide()

    def read(self, seconds: float) -> None:
        """So much more audio was read."""
        self._read += seconds

    def watch(self, source: str, event: Event) -> None:
        """Show what is said in ``source``; "": there is only one."""
        from nar_speech.engine import Partial

        now = time.monotonic()
        if not (self.on and isinstance(event, Partial)) or now - self._drawn < REFRESH:
            return
        self._drawn, self._shown = now, True
        columns = shutil.get_terminal_size().columns - 1
        begin = fitting(f"{os.path.basename(source)}: ", columns // 2) if source else ""
        if self.total:
            begin = f"{min(self._read / self.total, 1.0):4.0%} {begin}"
        self.stream.write(f"{ERASE}{begin}{fitting(event.text, columns - columns_of(begin))}")
        self.stream.flush()

    def hide(self) -> None:
        """Clear the line, so that others may write there."""
        if self._shown:
            self.stream.write(ERASE)
            self.stream.flush()
            self._shown = False


def fitting(text: str, columns: int) -> str:
    """The end of ``text`` that fits; what would move the cursor is shown as a question mark."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    begin, width = len(text), 0
    while begin and (width := width + columns_of(text[begin - 1])) <= columns:
        begin -= 1
    return text[begin:]


def columns_of(text: str) -> int:
    """Columns of a terminal that ``text`` takes."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
