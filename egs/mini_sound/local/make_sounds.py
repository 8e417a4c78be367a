"""Stage 4: clips that the model makes of captions, and what the codec leaves of others, for the classifier.

    python make_sounds.py generate --model work/model --out work/made/generated [--each 6] [key=value ...]
    python make_sounds.py code --codec work/codec --out work/made/coded --codebooks 4 MANIFEST ...

Both write one folder for each class, as `classifier.py score` reads them. Clips that are there are kept; a
folder made by another model or with other options is refused.
key=value: options of generation, such as steps=[20,10,10,10] or guidance=5.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import yaml
from base import RATE, fail, notice, write_flac
from captions import all_captions, classes
from lhotse import CutSet

from nar_speech.checkpoint import sha256
from nar_speech.codec.folder import read_codec_folder
from nar_speech.data import read_cut
from nar_speech.errors import NarSpeechError
from nar_speech.pipelines.generate import SoundGenerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="clips of captions")
    make.add_argument("--model", type=Path, required=True, help="model folder")
    make.add_argument("--each", type=int, default=6, help="clips of a class (default %(default)s)")
    make.add_argument("--seconds", type=float, default=5.0)
    make.add_argument("options", nargs="*", help="key=value")
    make.set_defaults(run=generate)
    code = commands.add_parser("code", help="recordings and renders through the codec")
    code.add_argument("--codec", type=Path, required=True, help="codec folder")
    code.add_argument("--codebooks", type=int, default=4)
    code.add_argument("--each", type=int, default=20, help="clips of a class (default %(default)s)")
    code.add_argument("manifest", type=Path, nargs="+", help="lhotse cuts whose custom field has a label")
    code.set_defaults(run=through_codec)
    for command in (make, code):
        command.add_argument("--out", type=Path, required=True, help="folder to write")
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        args.run(args)
    except NarSpeechError as error:
        fail(str(error))


def generate(args: argparse.Namespace) -> None:
    """Captions of each class in random order, one clip each, seeds that depend on nothing else."""
    if wrong := [word for word in args.options if "=" not in word]:
        fail(f"{wrong[0]}: expected key=value, for example guidance=5")
    options = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in args.options)}
    generator = SoundGenerator.from_folder(args.model)
    same_maker(args.out, args.model, args.each, args.seconds, args.seed, options)
    captions = defaultdict(list)
    for caption, names in all_captions().items():
        captions[names[0]].append(caption)
    prompts, seeds, paths = [], [], []
    for number, name in enumerate(classes()):
        choice = random.Random(f"{args.seed} {name}")
        wanted = [choice.choice(captions[name]) for _ in range(args.each)]
        for n, caption in enumerate(wanted):
            path = args.out / name / f"{n:02d}_{caption.replace(' ', '-').replace(',', '')}.flac"
            if not path.is_file():
                prompts.append(caption)
                seeds.append(1_000_000 * args.seed + 1000 * number + n)
                paths.append(path)
    for begin in range(0, len(prompts), 8):
        part = slice(begin, begin + 8)
        results = generator(prompts[part], args.seconds, seeds[part], batch=8, **options)
        for path, result in zip(paths[part], results, strict=True):
            write_flac(path, result.audio.samples)
        notice(f"{min(begin + 8, len(prompts))} of {len(prompts)} clips")


def same_maker(out: Path, model: Path, *settings: object) -> None:
    """Note in ``out`` what makes its clips; end where something else has begun it."""
    note = out / "made.json"
    maker = json.dumps([sha256(model / "model.safetensors"), *settings])
    if note.is_file() and note.read_text() != maker:
        fail(f"{out}: has clips of another model or other options; remove it or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(maker)


def through_codec(args: argparse.Namespace) -> None:
    """The first clips of each class."""
    codec, _ = read_codec_folder(args.codec)
    if missing := [path for path in args.manifest if not path.is_file()]:
        fail(f"{missing[0]}: no such file")
    same_maker(args.out, args.codec, args.codebooks, args.each)
    count: dict[str, int] = defaultdict(int)
    known = set(classes())
    for manifest in args.manifest:
        for cut in CutSet.from_file(manifest):
            name = (cut.supervisions[0].custom or {}).get("label") if cut.supervisions else None
            if name not in known or count[name] >= args.each:
                continue
            count[name] += 1
            path = args.out / name / f"{count[name]:02d}_{cut.id}.flac"
            if not path.is_file():
                wave = torch.from_numpy(np.ascontiguousarray(read_cut(cut, RATE)))[None, None]
                sound, _ = codec.decode(codec.encode(wave, None, args.codebooks))
                write_flac(path, sound[0, 0].numpy())
    notice(f"{args.out}: {sum(count.values())} clips of {len(count)} classes")


if __name__ == "__main__":
    main()
