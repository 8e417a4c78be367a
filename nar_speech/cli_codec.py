"""The command ``codec``: files to tokens and back, and what a codec or a token file is."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nar_speech.cli_options import MAX_THREADS, positive, up_to
from nar_speech.cli_output import (
    FAILED,
    OK,
    SOME_FAILED,
    complain,
    expand,
    keep_inputs,
    name_targets,
    progress_bar,
)
from nar_speech.errors import ConfigError, InputError, NarSpeechError

if TYPE_CHECKING:
    from nar_speech.pipelines.codec import CodecRunner

TOKENS = "safetensors"
SOUNDS = ("wav", "flac", "ogg", "opus", "mp3")


def describe_codec(parser: argparse.ArgumentParser) -> None:
    """The actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    encode = actions.add_parser("encode", help="sound to token files")
    encode.add_argument("inputs", nargs="+", metavar="FILE", help="audio file or folder")
    encode.add_argument("--report", metavar="DIR", help="also compare with the original, as 'report' does")
    decode = actions.add_parser("decode", help="token files to sound")
    decode.add_argument("inputs", nargs="+", metavar="TOKENS", help="token file or folder")
    decode.add_argument(
        "--format", default="wav", choices=SOUNDS, help="in an output folder (default: %(default)s)"
    )
    report = actions.add_parser("report", help="encode, decode and compare; JSON lines on stdout")
    report.add_argument("inputs", nargs="+", metavar="FILE", help="audio file or folder")
    info = actions.add_parser("info", help="what a codec or a token file is, as JSON")
    info.add_argument(
        "inputs", nargs=1, metavar="TOKENS_OR_CODEC", help="token file, or a codec as in --codec"
    )
    for action in (encode, decode):
        action.add_argument(
            "-o",
            "--output",
            required=True,
            metavar="PATH",
            help="a file; or a folder (exists or ends with /): one file per input",
        )
        action.add_argument(
            "--resume", action="store_true", help="skip inputs whose file is in the output folder"
        )
    report.add_argument("-o", "--output", metavar="DIR", help="folder for pictures and report.jsonl")
    for action in (encode, report):
        action.add_argument("--codebooks", type=positive(int), metavar="N", help="codebooks (default: all)")
        action.add_argument(
            "--seconds",
            type=positive(float),
            default=120.0,
            metavar="S",
            help="a report looks at the first S seconds (default: %(default)g)",
        )
    for action in (encode, decode, report):
        action.add_argument("--recursive", action="store_true", help="look into the subfolders of folders")
        action.add_argument(
            "--block",
            type=positive(float),
            default=10.0,
            metavar="S",
            help="seconds run at once; changes memory and speed, not the result (default: %(default)g)",
        )
        action.add_argument(
            "--codec", default="default", metavar="NAME", help="name, folder, file or hub id of a codec"
        )
    for action in (encode, decode, report, info):
        action.add_argument(
            "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
        )
        action.add_argument("--threads", type=up_to(MAX_THREADS), metavar="N", help="CPU threads of PyTorch")
        action.add_argument("--offline", action="store_true", default=None, help="use downloaded codecs only")
        action.add_argument("--cache-dir", help="where downloaded codecs lie (default: $NAR_SPEECH_CACHE)")


@dataclass
class Tally:
    """How many inputs went well."""

    done: int = 0
    failed: int = 0

    @property
    def code(self) -> int:
        """Exit code."""
        if not self.failed:
            return OK
        return SOME_FAILED if self.done else FAILED

    def each(self, sources: list[str], act: Callable[[str], object]) -> None:
        """Do every input; one that fails is named and does not harm the others."""
        for source in sources:
            try:
                act(source)
                self.done += 1
            except NarSpeechError as error:
                text = str(error)
                complain(text if source in text else f"{source}: {text}")
                self.failed += 1


def codec(options: argparse.Namespace) -> int:
    """Run the action that the options name; returns the exit code."""
    return {"encode": encode, "decode": decode, "report": report, "info": info}[options.action](options)


def encode(options: argparse.Namespace) -> int:
    """Sound to token files."""
    sources, targets, tally = _plan(options, TOKENS, expand)
    if options.report and "-" in sources:
        raise ConfigError(
            "--report: standard input can be read only once; encode it, or give 'report' a file"
        )
    if options.report:
        _new_folder(options.report, "--report")
    if not sources:
        return tally.code
    runner = _runner(options)
    runner.codec.check_codebooks(options.codebooks)
    with progress_bar(sources) as progress:

        def act(source: str) -> None:
            target = _made(targets[source])
            runner.encode_file(source, target, options.codebooks, progress)
            if options.report:
                _report_one(runner, source, Path(options.report), options)

        tally.each(sources, act)
    return tally.code


def decode(options: argparse.Namespace) -> int:
    """Token files to sound."""
    sources, targets, tally = _plan(options, options.format, _token_files)
    if not sources:
        return tally.code
    runner = _runner(options)
    with progress_bar([]) as progress:
        tally.each(sources, lambda source: runner.decode_file(source, _made(targets[source]), progress))
    return tally.code


def report(options: argparse.Namespace) -> int:
    """Encode, decode, compare."""
    names, _, failed = expand(options.inputs, options.recursive)
    tally = Tally(failed=failed)
    if options.output:
        _new_folder(options.output, "--output")
    if not names:
        return tally.code
    runner = _runner(options)
    runner.codec.check_codebooks(options.codebooks)
    folder = Path(options.output) if options.output else None

    def act(source: str) -> None:
        print(_report_one(runner, source, folder, options), flush=True)

    tally.each(list(names), act)
    return tally.code


def info(options: argparse.Namespace) -> int:
    """What a codec or a token file is."""
    from nar_speech.codec.tokens import is_token_file, read_tokens
    from nar_speech.pipelines.codec import describe_codec, describe_tokens

    (name,) = options.inputs
    if Path(name).is_file() and (is_token_file(name) or Path(name).suffix == f".{TOKENS}"):
        found = describe_tokens(read_tokens(name))
    else:
        options.codec, options.block = name, 10.0
        found = describe_codec(_runner(options).codec)
    print(json.dumps(found, ensure_ascii=False, indent=2))
    return OK


def _runner(options: argparse.Namespace) -> CodecRunner:
    """The codec that the options name."""
    import torch

    from nar_speech.pipelines.codec import CodecRunner

    if options.threads:
        torch.set_num_threads(options.threads)
    return CodecRunner.load(
        options.codec, options.device, options.cache_dir, options.offline, block_seconds=options.block
    )


Expand = Callable[[list[str], bool], tuple[dict[str, Path], bool, int]]


def _plan(options: argparse.Namespace, suffix: str, find: Expand) -> tuple[list[str], dict[str, Path], Tally]:
    """What is to be done, and the output file of every input.

    Raises:
        ConfigError: several inputs and one output file, ``--resume`` without a folder, an output that is an
            input.
    """
    names, several, failed = find(options.inputs, options.recursive)
    output = options.output
    folder = output.endswith(os.sep) or Path(output).is_dir()
    if several and not folder:
        raise ConfigError(f"--output {output}: is one file for several inputs; name a folder, {output}/")
    if options.resume and not folder:
        raise ConfigError("--resume: works with an output folder; add -o FOLDER/")
    if folder:
        targets = name_targets(names, Path(output), suffix)
    else:
        targets = dict.fromkeys(names, Path(output))
    tally = Tally(failed=failed)
    sources = [source for source in names if not (options.resume and targets[source].exists())]
    tally.done = len(names) - len(sources)
    keep_inputs("--output", [targets[source] for source in sources], names)
    return sources, targets, tally


def _token_files(inputs: list[str], recursive: bool) -> tuple[dict[str, Path], bool, int]:
    """Token files of all inputs and their names in an output folder; whether several; how many failed."""
    found: dict[str, Path] = {}
    failed, folders = 0, False
    for item in inputs:
        if not Path(item).is_dir():
            found.setdefault(item, Path(Path(item).name))
            continue
        folders = True
        entries = Path(item).rglob(f"*.{TOKENS}") if recursive else Path(item).glob(f"*.{TOKENS}")
        files = sorted(path for path in entries if path.is_file() and not path.name.startswith("."))
        if not files:
            more = "" if recursive else "; --recursive looks into its subfolders"
            complain(f"{item}: no token file (.{TOKENS}) in this folder{more}")
            failed += 1
        for path in files:
            found.setdefault(str(path), path.relative_to(item))
    return found, folders or len(inputs) > 1, failed


def _report_one(runner: CodecRunner, source: str, folder: Path | None, options: argparse.Namespace) -> str:
    """The report of one recording as a line of JSON; also in a folder, with a picture."""
    plot = None
    if folder is not None:
        taken = {path.name for path in folder.glob("*.png")}
        stem = Path(source).stem if source != "-" else "stdin"
        plot = folder / next(
            name
            for name in (f"{stem}{number or ''}.png" for number in range(len(taken) + 1))
            if name not in taken
        )
    found = runner.report(source, source, options.codebooks, options.seconds, plot)
    line = json.dumps(found.to_dict(), ensure_ascii=False)
    if folder is not None:
        try:
            with open(folder / "report.jsonl", "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise InputError(f"{folder}/report.jsonl: can't write ({error.strerror})") from error
    return line


def _new_folder(path: str, option: str) -> None:
    """Make a folder for reports."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: can't be made a folder ({error.strerror}); name another"
        ) from error


def _made(target: Path) -> Path:
    """``target``, its folder made."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target}: can't write ({error.strerror}); check the path") from error
    return target
