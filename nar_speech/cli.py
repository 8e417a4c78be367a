"""The command line: results on stdout, messages and progress on stderr.

Exit codes: 0 all went well, 1 some inputs failed (each named on stderr), 2 bad usage, or nothing worked.
Nothing here imports PyTorch before a command runs, so ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nar_speech.errors import ConfigError, InputError, NarSpeechError
from nar_speech.version import __version__

if TYPE_CHECKING:
    from nar_speech.pipelines.transcribe import Transcriber

OK, SOME_FAILED, FAILED = 0, 1, 2
INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells report SIGINT and SIGPIPE
FORMATS = ("txt", "json", "jsonl", "srt", "vtt", "tsv")
JOINABLE = ("txt", "jsonl")  # formats in which one stream can hold several recordings
DECODERS = ("auto", "paraformer", "ctc_greedy", "ctc_beam", "attention_rescoring")
MAX_THREADS = 1024
PROGRESS_DELAY = 3.0  # seconds before a progress bar appears


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``nar-speech``; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="nar-speech: %(levelname)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    if hasattr(sys.stdout, "reconfigure"):  # file names may hold bytes that are not UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except NarSpeechError as error:
        complain(str(error))
        return FAILED
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; keep Python from failing once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said; ``--help`` has the usage."""

    def error(self, message: str) -> NoReturn:
        """Complain and exit with code 2."""
        if message.startswith("argument "):
            message = message.removeprefix("argument ")
        complain(f"{message}; see '{self.prog} --help'")
        self.exit(FAILED)


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"nar-speech: error: {' '.join(message.split())}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = Parser(
        prog="nar-speech", description="Non-autoregressive speech recognition: audio in, text out."
    )
    parser.add_argument("--version", action="version", version=f"nar-speech {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (describe, run) in COMMANDS.items():
        lines = (run.__doc__ or "").strip().split("\n")
        command = commands.add_parser(
            name,
            help=lines[0].replace("%", "%%"),  # argparse formats help, but not the description
            description="\n".join(line.strip() for line in lines),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        describe(command)
        command.add_argument("-v", "--verbose", action="store_true", help="more messages on stderr")
        command.set_defaults(run=run)
    return parser


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got '{text}'; must be a number")
    return value


def _positive(kind: type) -> Callable[[str], Any]:
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


def _threads(text: str) -> int:
    """PyTorch starts as many as it is told; thousands bring the machine down."""
    threads = _positive(int)(text)
    if threads > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"got {threads}; must be 1 to {MAX_THREADS}")
    return threads


def _model_options(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument("--threads", type=_threads, metavar="N", help="CPU threads of PyTorch")


def _decoding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding (default: as the model's own model.yaml says)")
    group.add_argument("--decoder", choices=DECODERS)
    group.add_argument("--beam", type=_positive(int), metavar="N", help="beam size of ctc_beam")
    lm = group.add_mutually_exclusive_group()
    lm.add_argument("--lm", metavar="FILE", help="n-gram model for ctc_beam: compact or ARPA")
    lm.add_argument("--no-lm", action="store_true", help="ctc_beam without the model's own language model")
    group.add_argument("--lm-weight", type=_number, metavar="X", help="weight of the language model")
    group.add_argument("--word-bonus", type=_number, metavar="X", help="added per word with a language model")
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="let the model's verifier check the text and write it with case and punctuation",
    )
    group.add_argument(
        "--max-passes", type=_positive(int), metavar="N", help="of the verifier; fewer: faster"
    )
    group.add_argument("--hotwords", metavar="FILE|WORDS", help="a file with one a line, or a,b,c")
    group.add_argument("--hotword-score", type=_number, metavar="X", help="bonus per token in ctc_beam")
    group.add_argument("--language", help="language of the speech, where the model can be told")
    group.add_argument("--textnorm", choices=("withitn", "woitn"), help="SenseVoice: written or spoken form")
    group.add_argument(
        "--batch-seconds", type=_positive(float), metavar="S", help="padded audio per batch (60; GPU 600)"
    )


def _load(options: argparse.Namespace, **decoding: Any) -> Transcriber:
    """The task object that the options name, its decoding changed by those that were given."""
    import torch

    from nar_speech.hub import load_model

    if options.threads:
        torch.set_num_threads(options.threads)
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
    return load_model(
        options.model, options.device, options.dtype, options.cache_dir, options.offline, **decoding
    )


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


def _describe_transcribe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="audio file, folder, or - for stdin")
    output = parser.add_argument_group("output")
    output.add_argument("--format", default="txt", choices=FORMATS, help="(default: %(default)s)")
    output.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="a file; or a folder (exists or ends with /): one file per input",
    )
    output.add_argument(
        "--resume", action="store_true", help="skip inputs whose file is in the output folder"
    )
    output.add_argument("--recursive", action="store_true", help="look into the subfolders of folders")
    output.add_argument(
        "--word-times", action="store_true", help="txt: a line per word: start, end, confidence"
    )
    output.add_argument("--nbest", type=_positive(int), default=1, metavar="N", help="json: N hypotheses")
    output.add_argument("--plot", metavar="PNG", help="draw the recognition of the (one) input")
    _decoding_options(parser)
    _model_options(parser)


def transcribe(options: argparse.Namespace) -> int:
    """Recognise speech in files.

    One file gives its text on one line; several files, or a folder, give a line 'PATH<TAB>TEXT' each.
    """
    from nar_speech.pipelines.transcribe import BATCH_SECONDS

    names, several, failed = _expand(options.inputs, options.recursive)
    sources = list(names)
    folder = options.output is not None and (options.output.endswith(os.sep) or Path(options.output).is_dir())
    _check_output(options, len(sources), several, folder)
    if options.output is not None and not folder:
        _keep_inputs("--output", options.output, sources)
    targets = _targets(names, Path(options.output), options.format) if folder else {}
    if folder and options.resume:
        sources = [source for source in sources if not targets[source].exists()]
    done = len(targets) - len(sources) if folder else 0
    if sources:
        transcriber = _load(options, nbest=options.nbest)
        with _progress(sources) as progress:
            results = transcriber.results(
                sources,
                options.batch_seconds or BATCH_SECONDS.get(transcriber.device.type),
                times=options.word_times or options.format in ("json", "jsonl", "srt", "vtt"),
                progress=progress,
            )
            with _sink(options.output, folder) as write:
                for source, result in zip(sources, results, strict=True):
                    if result.transcript is None:
                        complain(str(result.error))
                        failed += 1
                        continue
                    write(targets.get(source), _rendered(result.transcript, options, several and not folder))
                    done += 1
        if options.plot and done:
            from nar_speech.pipelines.plot import plot_recognition

            plot_recognition(transcriber, sources[0], options.plot)
    if not failed:
        return OK
    return SOME_FAILED if done else FAILED


def _expand(inputs: Sequence[str], recursive: bool) -> tuple[dict[str, Path], bool, int]:
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


def _check_output(options: argparse.Namespace, count: int, several: bool, folder: bool) -> None:
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
    if options.word_times and options.format == "tsv":
        raise ConfigError("--word-times: tsv lists segments; use --format txt or json")
    if options.nbest > 1 and options.format not in ("json", "jsonl"):
        raise ConfigError("--nbest: hypotheses are listed in json only; add --format json")
    if options.plot and (count != 1 or options.inputs[0] == "-"):
        raise ConfigError("--plot: draws one file; give a single input that is a file")


def _keep_inputs(option: str, output: str, inputs: Sequence[str | Path]) -> None:
    """Refuse to write over a file that is about to be read.

    Raises:
        ConfigError: ``output`` is one of ``inputs``, perhaps by another name.
    """
    target = Path(output)
    for source in map(Path, inputs):
        if target.is_file() and source.exists() and target.samefile(source):
            raise ConfigError(f"{option} {output}: is an input and would be overwritten; name another file")


def _targets(names: Mapping[str, Path], folder: Path, suffix: str) -> dict[str, Path]:
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


def _rendered(transcript: Any, options: argparse.Namespace, named: bool) -> str:
    """The transcript in the format asked for; ``named``: with its path in front of every line of text."""
    from nar_speech.pipelines.writers import WRITERS, write_words

    if options.format != "txt":
        return WRITERS[options.format](transcript)
    text = write_words(transcript) if options.word_times else WRITERS["txt"](transcript)
    if named:
        return "".join(f"{transcript.source}\t{line}\n" for line in text.splitlines())
    return text


@contextmanager
def _sink(output: str | None, folder: bool):
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


@contextmanager
def _progress(sources: Sequence[Any]):
    """A function to call with seconds of audio read; draws a bar on a terminal after some seconds."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    from nar_speech.audio import info

    total = 0.0
    for source in sources:
        try:
            if Path(source).is_file():  # what a pipe holds can be read only once
                total += info(source).duration or 0.0
        except NarSpeechError:
            continue  # it is reported when its turn comes
    with tqdm(total=total or None, unit="s", delay=PROGRESS_DELAY, leave=False, unit_scale=True) as bar:
        yield bar.update


def _describe_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help='JSON lines {"path": ..., "text": ...}, paths relative to the file')
    parser.add_argument("--json", action="store_true", help="all numbers as JSON on stdout")
    parser.add_argument("--report", metavar="FILE", help="write every utterance with its errors marked")
    parser.add_argument(
        "--normalize", default="auto", choices=("auto", "en", "zh", "none"), help="(default: %(default)s)"
    )
    _decoding_options(parser)
    _model_options(parser)


def evaluate(options: argparse.Namespace) -> int:
    """Word and character error rate on a manifest, with 95 % confidence intervals.

    Lines and files that can't be used are named on stderr, counted, and left out (exit code 1).
    """
    from nar_speech.pipelines.evaluate import evaluate as run
    from nar_speech.pipelines.evaluate import read_manifest, report_lines

    paths = [utterance.path for utterance in read_manifest(options.manifest)[0]]
    if options.report:
        _keep_inputs("--report", options.report, [options.manifest, *paths])
    transcriber = _load(options)
    with _sink(options.report, folder=False) as write:  # before the work: a path that is wrong is said first
        with _progress(paths) as progress:
            found = run(transcriber, options.manifest, options.normalize, options.batch_seconds, progress)
        for problem in found.problems:
            complain(problem)
        if options.report:
            for line in report_lines(found):
                write(None, f"{line}\n")
    if options.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False, indent=2))
    else:
        print(found.words)
        print(found.characters)
        factor = found.seconds / found.audio_seconds
        print(
            f"{found.audio_seconds:.1f} s of audio in {found.seconds:.1f} s (real time factor {factor:.4f}),"
            f" {len(found.problems)} excluded"
        )
    return SOME_FAILED if found.problems else OK


def _describe_models(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="models that ship with the package, and known names of the hub")
    shown = actions.add_parser("info", help="what a model is")
    taken = actions.add_parser("import", help="convert a FunASR, SenseVoice or WeNet folder into ours")
    taken.add_argument("source", help="name, folder or hub id")
    taken.add_argument("target", help="new folder")
    checked = actions.add_parser("verify", help="check files, names, shapes and values, and run it once")
    for parser_ in (shown, checked):
        parser_.add_argument("source", metavar="NAME", help="name, folder or hub id")
    for parser_ in (shown, taken, checked):
        parser_.add_argument("--offline", action="store_true", default=None)
        parser_.add_argument("--cache-dir")


def models(options: argparse.Namespace) -> int:
    """List, describe, convert and check models."""
    from nar_speech import hub

    if options.action == "list":
        for name in hub.embedded_models():
            card = hub.read_card(name)
            mark = "*" if name == hub.DEFAULT_MODEL else " "
            print(f"{mark} {name}\t{','.join(card.languages)}\t{card.description}")
        for name, repository in hub.ALIASES.items():
            print(f"  {name}\t\thub: {repository}")
        return OK
    place = (options.cache_dir, options.offline)
    if options.action == "info":
        print(json.dumps(hub.model_info(options.source, *place), ensure_ascii=False, indent=2))
        return OK
    if options.action == "import":
        print(hub.import_model(options.source, options.target, *place))
        return OK
    checks = hub.verify(options.source, *place)
    for check in checks:
        print(f"{'PASS' if check.passed else 'FAIL'} {check.name}: {check.detail}")
    return OK if all(check.passed for check in checks) else FAILED


def _describe_serve(parser: argparse.ArgumentParser) -> None:
    from nar_speech.server.command import describe_serve

    describe_serve(parser)


def serve(options: argparse.Namespace) -> int:
    """Serve transcription: OpenAI HTTP and Realtime, FunASR, Wyoming, plain PCM over WebSocket.

    Runs until SIGTERM or Ctrl-C, then lets open streams finish; docs/serving.md has the protocols.
    """
    from nar_speech.server.command import serve as run

    return run(options)


def _describe_bench(parser: argparse.ArgumentParser) -> None:
    from nar_speech.server.command import describe_bench

    describe_bench(parser)


def bench(options: argparse.Namespace) -> int:
    """Measure: live streams held at once, their latency, and the errors of the same run."""
    from nar_speech.server.command import bench as run

    return run(options)


Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
COMMANDS: dict[str, Command] = {
    "transcribe": (_describe_transcribe, transcribe),
    "evaluate": (_describe_evaluate, evaluate),
    "models": (_describe_models, models),
    "serve": (_describe_serve, serve),
    "bench": (_describe_bench, bench),
}


if __name__ == "__main__":
    sys.exit(main())
