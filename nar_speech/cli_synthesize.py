"""``nar-speech synthesize``, ``edit`` and ``models watermark-check``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nar_speech.cli_options import SUFFIXES, model_options, number, positive, steps, whole
from nar_speech.cli_output import FAILED, OK, SOME_FAILED, complain, keep_inputs, step_bar, write_sound
from nar_speech.errors import ConfigError, InputError

if TYPE_CHECKING:
    from nar_speech.pipelines.synthesize import Synthesizer
    from nar_speech.types import Audio

LANGUAGES = ("auto", "en", "zh", "fr", "de", "ja", "ko")
RULES = ("prompt", "rate", "predictor")
# Options of the command line that are fields of SynthesisConfig.
FIELDS = ("steps", "acoustic_steps", "cfg", "temperature", "speed", "length", "pause", "language")
FIELDS += ("prompt_language", "guided_layers", "reuse", "watermark")


def describe_synthesize(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("text", metavar="TEXT", help="what to say; -: standard input")
    work = parser.add_argument_group("what to make")
    work.add_argument(
        "--prompt", required=True, metavar="FILE", help="whose voice: 0.5 to 30 s of speech, best 3 to 10"
    )
    work.add_argument(
        "--prompt-text", metavar="TEXT", help="what the prompt says (default: what is recognised)"
    )
    work.add_argument("--duration", type=positive(float), metavar="S", help="seconds of speech")
    work.add_argument("--length", choices=RULES, help="without --duration: the rule of its length")
    work.add_argument("--pause", type=number, metavar="S", help="between the pieces of a long text (0.15)")
    work.add_argument(
        "--language", choices=(*LANGUAGES, "phones"), help="of the text; phones: w|iː|_|d|uː, or ids"
    )
    work.add_argument("--prompt-language", choices=(*LANGUAGES, "phones"), help="of the prompt's text")
    _shared_options(parser, work)


def describe_edit(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("audio", metavar="AUDIO", help="recording")
    work = parser.add_argument_group("what to change")
    work.add_argument("--from", dest="old", required=True, metavar="WORDS", help="words that it says")
    work.add_argument("--to", dest="new", required=True, metavar="WORDS", help="what it is to say there")
    work.add_argument("--occurrence", type=positive(int), metavar="N", help="which one, if said repeatedly")
    work.add_argument("--text", dest="transcript", metavar="TEXT", help="all that the recording says")
    work.add_argument("--duration", type=positive(float), metavar="S", help="seconds of the new words")
    work.add_argument("--language", choices=LANGUAGES, help="of the words")
    _shared_options(parser, work)


def _shared_options(parser: argparse.ArgumentParser, work: Any) -> None:
    work.add_argument("--speed", type=number, metavar="X", help="1.2 is a fifth faster (default: 1)")
    work.add_argument("--seed", type=whole, default=0, metavar="N", help="(default: %(default)s)")
    work.add_argument("--transcriber", metavar="NAME", help="recogniser (default: the embedded one, English)")
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", default="out.wav", metavar="FILE", help="(default: %(default)s)")
    output.add_argument("--json", action="store_true", help="a JSON line on stdout")
    output.add_argument(
        "--no-watermark",
        dest="watermark",
        action="store_false",
        default=None,
        help="leave out the inaudible mark of generated speech",
    )
    group = parser.add_argument_group("sampling (default: as the model's own model.yaml says)")
    group.add_argument("--steps", type=positive(int), metavar="N", help="from text to semantic codes")
    group.add_argument(
        "--acoustic-steps", type=steps, metavar="N,N...", help="for each layer of acoustic codes"
    )
    group.add_argument("--cfg", type=number, metavar="W", help="classifier-free guidance, 0: none")
    group.add_argument("--temperature", type=number, metavar="X", help="at the first step")
    group.add_argument("--guided-layers", type=whole, metavar="N", help="guide the first N layers only")
    group.add_argument("--reuse", type=whole, metavar="N", help="keep keys and values for N steps")
    model_options(parser)


def synthesize(options: argparse.Namespace) -> int:
    """Speak one text into a file."""
    from nar_speech.pipelines.speech_text import check_text
    from nar_speech.pipelines.voice import hold, read_prompt

    if options.text == "-" and options.prompt == "-":
        raise ConfigError("TEXT, --prompt: only one of them can be standard input")
    text = _text(options.text)
    target = _target(options, [options.prompt])
    check_text(text, options.language or "auto")
    if options.prompt_text is not None:
        check_text(options.prompt_text, options.prompt_language or "auto", "--prompt-text")
    prompt = hold(options.prompt, 24_000)
    read_prompt(prompt, (16_000, 24_000))  # what is wrong with it is said before the model is loaded
    speaker, given = _load(options)
    with step_bar("speech") as progress:
        result = speaker(
            text, prompt, options.prompt_text, options.duration, options.seed, progress=progress, **given
        )
    write_sound(target, result.audio)
    told = {
        "text": result.text,
        "prompt_text": result.prompt_text,
        "pieces": [
            {"text": piece.text, "start": round(piece.start, 4), "end": round(piece.end, 4)}
            for piece in result.pieces
        ],
    }
    _tell(options, target, result, told)
    return OK


def edit(options: argparse.Namespace) -> int:
    """Write a recording with other words in it."""
    from nar_speech.pipelines.speech_text import check_text

    target = _target(options, [options.audio])
    for text, name in ((options.old, "--from"), (options.new, "--to"), (options.transcript, "--text")):
        if text is not None:
            check_text(text, options.language or "auto", name)
    subtype = _subtype(options.audio, target)
    speaker, given = _load(options)
    with step_bar("edit") as progress:
        result = speaker.edit(
            options.audio,
            options.old,
            options.new,
            transcript=options.transcript,
            occurrence=options.occurrence,
            duration=options.duration,
            seed=options.seed,
            progress=progress,
            **given,
        )
    write_sound(target, result.audio, subtype)
    told = {"transcript": result.transcript, "start": round(result.start, 4), "end": round(result.end, 4)}
    _tell(options, target, result, told)
    return OK


def check_watermarks(options: argparse.Namespace) -> int:
    """Tell of every file whether it, or a part of it, is marked."""
    from nar_speech.audio import read_audio
    from nar_speech.pipelines.watermark import SAMPLE_RATE, find_watermark, load_watermark

    load_watermark()
    failed = 0
    for file in options.files:
        try:
            whole_file, *windows = find_watermark(read_audio(file, SAMPLE_RATE).samples, SAMPLE_RATE)
        except InputError as error:
            complain(str(error))
            failed += 1
            continue
        if options.json:
            parts = [{**vars(part), "marked": part.marked} for part in windows]
            line = {"path": file, **vars(whole_file), "marked": whole_file.marked, "windows": parts}
            print(json.dumps(line))
            continue
        inside = [part for part in windows if part.marked]
        said = "marked" if whole_file.marked else "not marked"
        if inside and len(inside) < len(windows):
            places = ", ".join(f"{part.start:g}-{part.end:g} s" for part in inside)
            said = f"marked in part: {places}"
        print(f"{file}\t{said} (score {whole_file.score:.2f})")
    if not failed:
        return OK
    return FAILED if failed == len(options.files) else SOME_FAILED


def _load(options: argparse.Namespace) -> tuple[Synthesizer, dict[str, Any]]:
    """The synthesizer that the options name, and the fields of its configuration that were given."""
    import torch

    from nar_speech.hub import load_model
    from nar_speech.pipelines.speech_model import resolve_speech
    from nar_speech.pipelines.speech_options import change
    from nar_speech.pipelines.synthesize import Synthesizer
    from nar_speech.pipelines.transcribe import Transcriber

    if options.threads:
        torch.set_num_threads(options.threads)
    found = ((name, getattr(options, name, None)) for name in FIELDS)
    given = {name: value for name, value in found if value is not None}
    if "cfg" in given:
        given["acoustic_cfg"] = given["cfg"]
    place = (options.cache_dir, options.offline)
    folder = resolve_speech(options.model, *place)
    speaker = Synthesizer.from_folder(folder, options.device, options.dtype, *place)
    change(speaker.config, given)  # a wrong option is said before the work
    if options.transcriber is not None:
        heard = load_model(options.transcriber, options.device, "float32", *place)
        if not isinstance(heard, Transcriber):
            raise ConfigError(f"--transcriber {options.transcriber}: recognises no speech")
        speaker.transcriber = heard
    return speaker, given


def _text(text: str) -> str:
    if text != "-":
        return text
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: is not UTF-8 text ({error.reason})") from error


def _target(options: argparse.Namespace, inputs: list[str]) -> Path:
    """The output file, checked before any work."""
    path = Path(options.output)
    if path.suffix.lower()[1:] not in SUFFIXES:
        raise ConfigError(f"--output {options.output}: its suffix must be one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {options.output}: no such folder; make it first")
    keep_inputs("--output", options.output, inputs)
    return path


def _subtype(source: str, target: Path) -> str | None:
    """The encoding of the recording where the output can have it, so that its samples stay exact."""
    import soundfile

    form = {"aif": "AIFF"}.get(target.suffix[1:].lower(), target.suffix[1:].upper())
    if form not in ("WAV", "FLAC", "AIFF") or not Path(source).is_file():
        return None
    try:
        subtype = soundfile.info(source).subtype
    except soundfile.SoundFileError:
        return None  # PyAV reads it, or its reading fails with a message
    return subtype if soundfile.check_format(form, subtype) and subtype.startswith(("PCM", "FL")) else None


def _tell(options: argparse.Namespace, target: Path, result: Any, told: dict[str, Any]) -> None:
    """Name the file on stdout."""
    if not options.json:
        print(target, flush=True)
        return
    audio: Audio = result.audio
    line = {
        "path": str(target),
        **told,
        "seed": result.seed,
        "duration": round(audio.duration, 4),
        "sample_rate": audio.sample_rate,
        "watermarked": result.watermarked,
        "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)
