"""Options that several commands share, and what they mean. Nothing heavy is imported."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nar_speech.errors import ConfigError, InputError

if TYPE_CHECKING:
    from nar_speech.pipelines.transcribe import Transcriber

DECODERS = ("auto", "paraformer", "ctc_greedy", "ctc_beam", "attention_rescoring")
SUFFIXES = ("wav", "flac", "ogg", "opus", "mp3", "aiff")  # of sound that is written
MAX_THREADS, MAX_STREAMS = 1024, 256
MAX_CHUNK, MAX_LEFT = 1024, 8192  # frames of an encoder: each stream holds so many


def number(text: str) -> float:
    """A parser of finite numbers."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got '{text}'; must be a number")
    return value


def positive(kind: type) -> Callable[[str], Any]:
    """A parser of numbers of this kind above 0."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            article = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got '{text}'; must be {article} above 0")
        return value

    return parse


def whole(text: str) -> int:
    """A parser of whole numbers from 0."""
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise argparse.ArgumentTypeError(f"got '{text}'; must be a whole number from 0")
    return int(text)


def steps(text: str) -> tuple[int, ...]:
    """A parser of numbers of steps, one for each layer of codes."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 10_000 for part in parts):
        raise argparse.ArgumentTypeError(f"got '{text}'; must be whole numbers above 0 such as 20,10,10,10")
    return tuple(int(part) for part in parts)


def _left(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_LEFT):
        raise argparse.ArgumentTypeError(f"got '{text}'; must be a whole number, 0 to {MAX_LEFT}")
    return int(text)


def up_to(most: int) -> Callable[[str], int]:
    """A parser of whole numbers from 1: no more threads, open files or frames than a machine bears."""

    def parse(text: str) -> int:
        number = positive(int)(text)
        if number > most:
            raise argparse.ArgumentTypeError(f"got {number}; must be 1 to {most}")
        return number

    return parse


def model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="default", help="name, folder or hub id org/name[@revision] (default: %(default)s)"
    )
    group.add_argument("--offline", action="store_true", default=None, help="use downloaded models only")
    group.add_argument("--cache-dir", help="where downloaded models lie (default: $NAR_SPEECH_CACHE)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument(
        "--dtype",
        default="float32",
        choices=("auto", "float32", "fp32", "bfloat16", "bf16", "int8"),
        help="auto: what this processor computes fastest; int8: CPU only",
    )
    group.add_argument("--threads", type=up_to(MAX_THREADS), metavar="N", help="CPU threads of PyTorch")


def decoding_options(parser: argparse.ArgumentParser) -> None:
    """How outputs become text."""
    group = parser.add_argument_group("decoding (default: as the model's own model.yaml says)")
    group.add_argument("--decoder", choices=DECODERS)
    group.add_argument("--beam", type=positive(int), metavar="N", help="beam size of ctc_beam")
    lm = group.add_mutually_exclusive_group()
    lm.add_argument("--lm", metavar="FILE", help="n-gram model for ctc_beam: compact or ARPA")
    lm.add_argument("--no-lm", action="store_true", help="ctc_beam without the model's own language model")
    group.add_argument("--lm-weight", type=number, metavar="X", help="weight of the language model")
    group.add_argument("--word-bonus", type=number, metavar="X", help="added per word with a language model")
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="let the model's verifier check the text and write it with case and punctuation",
    )
    group.add_argument("--max-passes", type=positive(int), metavar="N", help="of the verifier; fewer: faster")
    group.add_argument("--hotwords", metavar="FILE|WORDS", help="a file with one a line, or a,b,c")
    group.add_argument("--hotword-score", type=number, metavar="X", help="bonus per token in ctc_beam")
    group.add_argument("--language", help="language of the speech, where the model can be told")
    group.add_argument("--textnorm", choices=("withitn", "woitn"), help="SenseVoice: written or spoken form")
    group.add_argument(
        "--batch-seconds", type=positive(float), metavar="S", help="padded audio per batch (60; GPU 600)"
    )


def decoding_of(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of DecodingConfig that were given.

    Raises:
        InputError: options that make no sense together, a file of hotwords that can't be read.
    """
    decoding: dict[str, Any] = {}
    if options.lm is not None:
        if options.decoder not in (None, "auto", "ctc_beam", "attention_rescoring"):
            raise ConfigError(f"--lm: decoder '{options.decoder}' takes no language model; use ctc_beam")
        decoding.update(lm=options.lm, decoder="ctc_beam")
    elif options.no_lm:
        decoding["lm"] = None
    names = ("decoder", "beam", "lm_weight", "word_bonus", "hotword_score", "language", "textnorm")
    for name in (*names, "verify", "max_passes"):
        value = getattr(options, name)
        if value is not None:
            decoding[name] = value
    if options.hotwords is not None:
        decoding["hotwords"] = _hotwords(options.hotwords)
    return decoding


def refuse_idle(transcriber: Transcriber, given: Collection[str]) -> None:
    """Options of :func:`decoding_of` that change nothing with this model and the other options.

    Raises:
        ConfigError: which, and what to do.
    """
    from nar_speech.pipelines.recognize import idle_option

    idle = idle_option(transcriber.recognizer.network, transcriber.decoding, given)
    if idle is not None:
        raise ConfigError(f"--{idle[0].replace('_', '-')}: {idle[1]}")


def _hotwords(text: str) -> tuple[str, ...]:
    """Lines of the file ``text``, or its parts between commas."""
    path = Path(text)
    parts = text.split(",")
    if path.suffix == ".txt" or path.is_file():
        try:
            parts = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--hotwords {text}: can't read this file as UTF-8 text; check it") from error
    return tuple(part.strip() for part in parts if part.strip())


STREAM_OPTIONS = ("second_pass", "max_streams", "chunk_size", "left")


def stream_options(parser: argparse.ArgumentParser) -> None:
    """Of ``transcribe --stream``."""
    group = parser.add_argument_group("as live speech")
    group.add_argument(
        "--stream",
        action="store_true",
        help="hear the inputs chunk by chunk, as if somebody spoke; -: raw 16-bit mono samples at 16 kHz",
    )
    group.add_argument(
        "--second-pass",
        metavar="NAME|none",
        help="offline model that corrects finished utterances (default: the embedded one for the embedded"
        " streaming model; else the model itself, where it can)",
    )
    group.add_argument("--max-streams", type=up_to(MAX_STREAMS), metavar="N", help="files heard at once (8)")
    group.add_argument(
        "--chunk-size",
        type=up_to(MAX_CHUNK),
        metavar="N",
        help="of CTC models: encoder frames of a chunk (default: as model.yaml says)",
    )
    group.add_argument("--left", type=_left, metavar="N", help="frames before a chunk that it sees")


def refuse_stream_options(options: argparse.Namespace) -> None:
    """Without ``--stream``.

    Raises:
        ConfigError: an option that needs it.
    """
    for name in STREAM_OPTIONS:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: is for live speech; add --stream")
