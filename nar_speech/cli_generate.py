"""``nar-speech generate``: sounds and music from texts."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nar_speech.cli_options import SUFFIXES, model_options, number, positive, steps, whole
from nar_speech.cli_output import FAILED, OK, SOME_FAILED, complain, keep_inputs, step_bar, write_sound
from nar_speech.errors import ConfigError, InputError

if TYPE_CHECKING:
    from nar_speech.pipelines.generate import SoundGenerator, SoundResult

NAME_LETTERS = 40  # of a prompt in a file name
ADAPTIVE = ("threshold", "factor", "entropy")


def describe_generate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what is to be heard")
    work = parser.add_argument_group("what to make")
    work.add_argument("--prompts", dest="file", metavar="FILE", help="a prompt a line; -: standard input")
    work.add_argument("--count", type=positive(int), default=1, metavar="N", help="clips of every prompt")
    work.add_argument(
        "--duration", type=number, metavar="S", help="seconds of a clip (default: a segment of the model)"
    )
    work.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="of the first clip; the next take N+1 ... (0)"
    )
    work.add_argument("--negative", metavar="TEXT", help="what is not to be heard")
    source = work.add_mutually_exclusive_group()
    source.add_argument(
        "--continue", dest="source", metavar="FILE", help="begin with this recording; --duration counts it"
    )
    source.add_argument(
        "--inpaint", nargs=2, metavar=("START:END", "FILE"), help="make a part of a recording anew (seconds)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        default="out.wav",
        metavar="PATH",
        help="a file, for several clips numbered; or a folder (exists or ends with /) (default: %(default)s)",
    )
    output.add_argument("--format", choices=SUFFIXES, help="of files in a folder (default: wav)")
    output.add_argument("--resume", action="store_true", help="skip clips whose file is there")
    output.add_argument("--json", action="store_true", help="a JSON line per clip on stdout")
    output.add_argument("--plot", metavar="PNG", help="draw the steps of the (one) clip")
    output.add_argument("--loudness", type=_loudness, metavar="LUFS|none", help="of clips (default: -14)")
    _sampling_options(parser)
    model_options(parser)


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: as the model's own model.yaml says)")
    group.add_argument("--steps", type=steps, metavar="N,N...", help="calls of the network per codebook")
    group.add_argument("--temperature", type=number, metavar="X", help="at the beginning")
    group.add_argument("--top-p", type=number, metavar="P", help="draw among the most probable codes")
    group.add_argument("--top-k", type=whole, metavar="K", help="draw among the K most probable codes")
    group.add_argument(
        "--cfg", type=_guidance, metavar="MAX[:MIN]", help="classifier-free guidance, from and to"
    )
    group.add_argument("--span", type=positive(int), metavar="N", help="frames masked together")
    group.add_argument("--arrangement", choices=("nonoverlap", "stride1"), help="of spans")
    group.add_argument("--scoring", choices=("max", "prod"), help="of spans")
    group.add_argument("--greedy", action="store_true", default=None, help="take the most probable codes")
    quick = parser.add_argument_group("fewer or cheaper steps (docs/masked_sampling.md)")
    quick.add_argument("--dilation", type=whole, metavar="N", help="unmask far-apart spans together")
    quick.add_argument(
        "--adaptive", type=_adaptive, metavar="RULE:X", help=f"end earlier where sure: {', '.join(ADAPTIVE)}"
    )
    quick.add_argument("--explore", type=number, metavar="SHARE", help="unmask uncertain spans early")
    quick.add_argument("--reuse", type=whole, metavar="N", help="keep keys and values for N steps")
    second = parser.add_argument_group("with an autoregressive partner")
    second.add_argument("--partner", metavar="NAME", help="name, folder or hub id of a MusicGen")
    second.add_argument("--rescore", type=number, metavar="W", help="weight of its probabilities (0.7)")
    second.add_argument("--hybrid", type=positive(float), metavar="S", help="let it make the first seconds")


def generate(options: argparse.Namespace) -> int:
    """See :func:`nar_speech.cli.generate`."""
    prompts = _prompts(options)
    targets = _targets(options, prompts)
    inputs = [p for p in (options.source, options.inpaint and options.inpaint[1], options.file) if p]
    for path in [*targets, *([options.plot] if options.plot else [])]:
        keep_inputs("--plot" if path == options.plot else "--output", str(path), inputs)
    gap = _gap(options)
    if options.plot:
        if len(targets) != 1:
            raise ConfigError("--plot: draws one clip; give a single prompt")
        from nar_speech.pipelines.plot import check_picture

        check_picture(options.plot)
    drawn = not options.plot or Path(options.plot).exists()
    jobs = [
        (prompt, options.seed + i, target)
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True))
        if not (options.resume and target.exists() and drawn)
    ]
    if not jobs:
        return OK
    generator, given = _load(options)
    failed = 0
    for prompt, seed, target in list(jobs):
        try:
            generator.check_prompt(prompt)
        except InputError as error:
            complain(str(error))
            failed += 1
            jobs.remove((prompt, seed, target))
    from nar_speech.pipelines.generate import BATCH

    limit = BATCH.get(generator.device.type, 4)
    for begin in range(0, len(jobs), limit):
        part = jobs[begin : begin + limit]
        with step_bar(f"{begin} of {len(jobs)} clips") as progress:
            results = generator(
                [prompt for prompt, _, _ in part],
                options.duration,
                [seed for _, seed, _ in part],
                continue_from=options.source,
                inpaint=gap,
                negative=options.negative,
                rescore=options.rescore is not None,
                hybrid_seconds=options.hybrid or 0.0,
                trace=options.plot is not None,
                progress=progress,
                **given,
            )
        for (_, _, target), result in zip(part, results, strict=True):
            _write(result, target, options, several=len(targets) > 1)
        if options.plot:
            _plot(generator, results[0], options.plot)
    if not failed:
        return OK
    return SOME_FAILED if jobs else FAILED


def _load(options: argparse.Namespace) -> tuple[SoundGenerator, dict[str, Any]]:
    """The generator that the options name, and the sampling options that were given."""
    import torch

    from nar_speech.pipelines.generate import SoundGenerator
    from nar_speech.pipelines.sound_model import resolve_sound
    from nar_speech.pipelines.sound_options import change, check_duration

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.duration is not None:
        check_duration(options.duration, "--duration")
    if options.partner is None and (options.rescore is not None or options.hybrid is not None):
        raise ConfigError("--rescore, --hybrid: need a second model; name one with --partner")
    if options.partner is not None and options.rescore is None and options.hybrid is None:
        raise ConfigError("--partner: has nothing to do; add --rescore W or --hybrid SECONDS")
    if options.dilation and (options.steps is not None or options.scoring is not None):
        raise ConfigError("--dilation: fixes steps and order; leave --steps and --scoring out")
    if options.arrangement == "stride1" and options.scoring == "max":
        raise ConfigError("--arrangement stride1: always scores by prod; leave --scoring out")
    names = ("steps", "temperature", "top_p", "top_k", "span", "arrangement", "scoring", "greedy", "dilation")
    given = {n: getattr(options, n) for n in (*names, "explore", "reuse") if getattr(options, n) is not None}
    if options.cfg is not None:
        given |= dict(zip(("guidance", "guidance_end"), options.cfg, strict=False))
    if options.adaptive is not None:
        given |= dict(zip(("adaptive", "adaptive_level"), options.adaptive, strict=True))
    if options.rescore is not None:
        given["rescore_weight"] = options.rescore
    if options.loudness is not None:
        given["loudness"] = None if math.isinf(options.loudness) else options.loudness
    place = (options.cache_dir, options.offline)
    folder = resolve_sound(options.model, *place)
    partner = None if options.partner is None else resolve_sound(options.partner, *place)
    generator = SoundGenerator.from_folder(folder, options.device, options.dtype, partner, *place)
    change(generator.generation, given)  # a wrong option is said before the work
    return generator, given


def _prompts(options: argparse.Namespace) -> list[str]:
    """Prompts of the command line and of the file, each ``--count`` times."""
    prompts = list(options.prompts)
    if options.file is not None:
        try:
            if options.file == "-":
                text = sys.stdin.read()
            else:
                text = Path(options.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--prompts {options.file}: can't read this file as UTF-8 text; check it"
            ) from error
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise InputError(f"--prompts {options.file}: has no prompt; write one a line")
        prompts += found
    if not prompts:
        raise ConfigError("no prompt: say what is to be heard, or name a file with --prompts")
    return [prompt for prompt in prompts for _ in range(options.count)]


def _targets(options: argparse.Namespace, prompts: list[str]) -> list[Path]:
    """The file of every clip."""
    path = Path(options.output)
    if options.output.endswith(("/", "\\")) or path.is_dir():
        suffix = options.format or "wav"
        digits = max(len(str(len(prompts))), 2)
        names = [re.sub(r"[^\w-]+", "_", prompt).strip("_")[:NAME_LETTERS].rstrip("_") for prompt in prompts]
        names = [f"{i:0{digits}d}_{name}".rstrip("_") for i, name in enumerate(names, 1)]
        return [path / f"{name}.{suffix}" for name in names]
    if options.format is not None:
        raise ConfigError("--format: is for an output folder; a file's suffix says its format")
    if path.suffix.lower()[1:] not in SUFFIXES:
        raise ConfigError(
            f"--output {options.output}: its suffix must be one of {', '.join(SUFFIXES)}; folders end with /"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--output {options.output}: no such folder; make it first")
    if len(prompts) == 1:
        return [path]
    digits = len(str(len(prompts)))
    return [path.with_name(f"{path.stem}_{i:0{digits}d}{path.suffix}") for i in range(1, len(prompts) + 1)]


def _gap(options: argparse.Namespace) -> Any:
    """The part of ``--inpaint`` that is made anew."""
    if options.inpaint is None:
        return None
    if options.duration is not None:
        raise ConfigError("--inpaint: keeps the recording's length; leave --duration out")
    from nar_speech.pipelines.generate import Inpaint

    start, colon, end = options.inpaint[0].partition(":")
    try:
        if not colon:
            raise ValueError
        return Inpaint(options.inpaint[1], float(start or 0), float(end))
    except ValueError as error:
        raise ConfigError(
            f"--inpaint: got '{options.inpaint[0]}'; expected START:END in seconds, for example 1.5:3"
        ) from error


def _write(result: SoundResult, target: Path, options: argparse.Namespace, several: bool) -> None:
    """Write one clip and tell of it."""
    write_sound(target, result.audio)
    if options.json:
        line = {
            "path": str(target),
            "prompt": result.prompt,
            "seed": result.seed,
            "duration": round(result.audio.duration, 4),
            "sample_rate": result.audio.sample_rate,
            "frames": int(result.codes.lengths[0]),
            "calls": result.calls,
            "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
    else:
        print(f"{target}\t{result.prompt}" if several else target, flush=True)


def _plot(generator: SoundGenerator, result: SoundResult, path: str) -> None:
    from nar_speech.pipelines.plot_steps import plot_steps

    plot_steps(result.traces, path, generator.codec.frame_rate, f"{result.prompt} (seed {result.seed})")


def _guidance(text: str) -> tuple[float, ...]:
    parts = text.split(":")
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"got '{text}'; must be a number, or two such as 10:1")
    return tuple(number(part) for part in parts)


def _adaptive(text: str) -> tuple[str, float]:
    rule, colon, level = text.partition(":")
    if rule not in ADAPTIVE or not colon:
        raise argparse.ArgumentTypeError(
            f"got '{text}'; must be one of {', '.join(ADAPTIVE)} and a number, such as threshold:0.9"
        )
    return rule, number(level)


def _loudness(text: str) -> float:
    return -math.inf if text == "none" else number(text)
