"""The command line: results on stdout, messages and progress on stderr.

Exit codes: 0 all went well, 1 some inputs failed (each named on stderr), 2 bad usage, or nothing worked.
Nothing here imports PyTorch before a command runs, so ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from nar_speech.cli_options import (
    decoding_of,
    decoding_options,
    model_options,
    positive,
    refuse_idle,
    refuse_stream_options,
    stream_options,
)
from nar_speech.cli_output import (
    FAILED,
    FORMATS,
    OK,
    SOME_FAILED,
    TIMED,
    Work,
    complain,
    keep_inputs,
    progress_bar,
    sink,
)
from nar_speech.errors import ConfigError, NarSpeechError
from nar_speech.version import __version__

if TYPE_CHECKING:
    from nar_speech.pipelines.transcribe import Transcriber

INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells report SIGINT and SIGPIPE


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


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = Parser(
        prog="nar-speech",
        description="Non-autoregressive speech: recognition, text to speech, sounds, codecs.",
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


def _load(options: argparse.Namespace, **decoding: Any) -> Transcriber:
    """The task object that the options name, its decoding changed by those that were given."""
    import torch

    from nar_speech.hub import embedded_models, load_model, makes_sound, resolve, speaks

    if options.threads:
        torch.set_num_threads(options.threads)
    local = options.model in embedded_models() or os.path.isdir(options.model)
    if local and makes_sound(resolve(options.model)):
        raise ConfigError(f"--model {options.model}: makes sound and recognises no speech; see generate")
    if local and speaks(resolve(options.model)):
        raise ConfigError(f"--model {options.model}: speaks and recognises no speech; see synthesize")
    decoding.update(decoding_of(options))
    transcriber = load_model(
        options.model, options.device, options.dtype, options.cache_dir, options.offline, **decoding
    )
    refuse_idle(transcriber, decoding)
    return transcriber


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
    output.add_argument("--nbest", type=positive(int), default=1, metavar="N", help="json: N hypotheses")
    output.add_argument("--plot", metavar="PNG", help="draw the recognition of the (one) input")
    stream_options(parser)
    decoding_options(parser)
    model_options(parser)


def transcribe(options: argparse.Namespace) -> int:
    """Recognise speech in files.

    One file gives its text on one line; several files, or a folder, give a line 'PATH<TAB>TEXT' each.
    With --stream they are heard as live speech is, by a streaming model; with --stream - a microphone:
    arecord -f S16_LE -r 16000 -c 1 -t raw | nar-speech transcribe --stream -
    """
    if options.stream:
        from nar_speech.cli_stream import transcribe_stream

        return transcribe_stream(options)
    refuse_stream_options(options)
    from nar_speech.pipelines.transcribe import BATCH_SECONDS

    work = Work.of(options)
    if work.sources:
        transcriber = _load(options, nbest=options.nbest)
        with progress_bar(work.sources) as progress:
            results = transcriber.results(
                work.sources,
                options.batch_seconds or BATCH_SECONDS.get(transcriber.device.type),
                times=options.word_times or options.format in TIMED,
                progress=progress,
            )
            work.write(results)
        if options.plot and work.done:
            from nar_speech.pipelines.plot import plot_recognition

            plot_recognition(transcriber, work.sources[0], options.plot)
    return work.code


def _describe_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help='JSON lines {"path": ..., "text": ...}, paths relative to the file')
    parser.add_argument("--json", action="store_true", help="all numbers as JSON on stdout")
    parser.add_argument("--report", metavar="FILE", help="write every utterance with its errors marked")
    parser.add_argument(
        "--normalize", default="auto", choices=("auto", "en", "zh", "none"), help="(default: %(default)s)"
    )
    decoding_options(parser)
    model_options(parser)


def evaluate(options: argparse.Namespace) -> int:
    """Word and character error rate on a manifest, with 95 % confidence intervals.

    Lines and files that can't be used are named on stderr, counted, and left out (exit code 1).
    """
    from nar_speech.pipelines.evaluate import evaluate as run
    from nar_speech.pipelines.evaluate import read_manifest, report_lines

    paths = [utterance.path for utterance in read_manifest(options.manifest)[0]]
    if options.report:
        keep_inputs("--report", options.report, [options.manifest, *paths])
    transcriber = _load(options)
    with sink(options.report, folder=False) as write:  # before the work: a path that is wrong is said first
        with progress_bar(paths) as progress:
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


def _describe_generate(parser: argparse.ArgumentParser) -> None:
    from nar_speech.cli_generate import describe_generate

    describe_generate(parser)


def generate(options: argparse.Namespace) -> int:
    """Make sounds and music from texts.

    The clips' files are named on stdout. The same prompt, seed and options give the same clip again.
    nar-speech generate "rain on a tin roof" --duration 5 -o rain.wav
    """
    from nar_speech.cli_generate import generate as run

    return run(options)


def _describe_synthesize(parser: argparse.ArgumentParser) -> None:
    from nar_speech.cli_synthesize import describe_synthesize

    describe_synthesize(parser)


def synthesize(options: argparse.Namespace) -> int:
    """Speak a text in the voice of a short recording.

    English, Chinese, French, German, Japanese, Korean; long texts are cut at sentences. The result carries an
    inaudible watermark. The same text, prompt, seed and options give the same speech again.
    nar-speech synthesize "Hello there." --prompt voice.wav --model maskgct -o hello.wav
    """
    from nar_speech.cli_synthesize import synthesize as run

    return run(options)


def _describe_edit(parser: argparse.ArgumentParser) -> None:
    from nar_speech.cli_synthesize import describe_edit

    describe_edit(parser)


def edit(options: argparse.Namespace) -> int:
    """Change words in a recording, in its own voice; all other samples stay as they are.

    nar-speech edit talk.wav --from "on Monday" --to "on Tuesday morning" --model maskgct -o new.wav
    """
    from nar_speech.cli_synthesize import edit as run

    return run(options)


def _describe_models(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="models that ship with the package, and known names of the hub")
    shown = actions.add_parser("info", help="what a model is")
    taken = actions.add_parser("import", help="convert a FunASR, SenseVoice, WeNet or NeMo model into ours")
    taken.add_argument("source", help="name, folder or hub id")
    taken.add_argument("target", help="new folder")
    checked = actions.add_parser("verify", help="check files, names, shapes and values, and run it once")
    heard = actions.add_parser("watermark-check", help="tell whether sound is marked as made by a machine")
    heard.add_argument("files", nargs="+", metavar="FILE", help="audio file")
    heard.add_argument("--json", action="store_true", help="a JSON line per file, with its windows of 4 s")
    for parser_ in (shown, checked):
        parser_.add_argument("source", metavar="NAME", help="name, folder or hub id")
    for parser_ in (shown, taken, checked):
        parser_.add_argument("--offline", action="store_true", default=None)
        parser_.add_argument("--cache-dir")


def models(options: argparse.Namespace) -> int:
    """List, describe, convert and check models; find the watermark of generated speech."""
    from nar_speech import hub, inspection

    if options.action == "watermark-check":
        from nar_speech.cli_synthesize import check_watermarks

        return check_watermarks(options)
    if options.action == "list":
        for name in hub.embedded_models():
            card = hub.read_card(name)
            mark = "*" if name == hub.DEFAULT_MODEL else " "
            print(f"{mark} {name}\t{','.join(card.languages) or card.task}\t{card.description}")
        for name, repository in hub.ALIASES.items():
            print(f"  {name}\t\thub: {repository}")
        return OK
    place = (options.cache_dir, options.offline)
    if options.action == "info":
        print(json.dumps(inspection.model_info(options.source, *place), ensure_ascii=False, indent=2))
        return OK
    if options.action == "import":
        print(hub.import_model(options.source, options.target, *place))
        return OK
    checks = inspection.verify(options.source, *place)
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


def _describe_codec(parser: argparse.ArgumentParser) -> None:
    from nar_speech.cli_codec import describe_codec

    describe_codec(parser)


def codec(options: argparse.Namespace) -> int:
    """Turn sound into the tokens of a neural codec, and back: encode, decode, report, info.

    Files of any rate and number of channels are resampled and mixed to what the codec wants; files of any
    length are run in pieces. docs/codec.md has the format of token files.
    """
    from nar_speech.cli_codec import codec as run

    return run(options)


def _describe_phonemize(parser: argparse.ArgumentParser) -> None:
    from nar_speech.cli_phonemize import describe_phonemize

    describe_phonemize(parser)


def phonemize(options: argparse.Namespace) -> int:
    """Show the phones that a text becomes before it is spoken.

    English, Chinese, the two mixed, French, German, Japanese, Korean; docs/text.md has the rules.
    nar-speech phonemize "It costs $3.50." gives ɪ|t|_|k|ɔ|s|ts|_|θ|ɹ|iː ...
    """
    from nar_speech.cli_phonemize import phonemize as run

    return run(options)


Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
COMMANDS: dict[str, Command] = {
    "transcribe": (_describe_transcribe, transcribe),
    "evaluate": (_describe_evaluate, evaluate),
    "generate": (_describe_generate, generate),
    "synthesize": (_describe_synthesize, synthesize),
    "edit": (_describe_edit, edit),
    "models": (_describe_models, models),
    "codec": (_describe_codec, codec),
    "phonemize": (_describe_phonemize, phonemize),
    "serve": (_describe_serve, serve),
    "bench": (_describe_bench, bench),
}


if __name__ == "__main__":
    sys.exit(main())
