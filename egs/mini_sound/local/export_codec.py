"""Stage 3: the trained codec as a small model folder.

    python export_codec.py --model work/exp/codec/model --out work/codec [--store int8] [--scores FILE]

Writes the weights with int8 matrices and float16 codebooks; with --scores the card gets the numbers of
score_codec.py.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from base import fail, notice

from nar_speech.codec.folder import read_codec_folder, write_codec_folder
from nar_speech.errors import NarSpeechError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder that the recipe wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--store", choices=("float32", "float16", "int8"), default="int8")
    parser.add_argument("--name", default="mini_codec")
    parser.add_argument("--scores", type=Path, help="JSON file of score_codec.py")
    options = parser.parse_args()
    try:
        codec, card = read_codec_folder(options.model)
    except NarSpeechError as error:
        fail(str(error))
    metrics = dict(card.metrics)
    if options.scores is not None:
        if not options.scores.is_file():
            fail(f"{options.scores}: no such file; run score_codec.py first")
        metrics = flat(json.loads(options.scores.read_text()))
    out = write_codec_folder(
        options.out, codec, replace(card, name=options.name, metrics=metrics), options.store
    )
    size = sum(path.stat().st_size for path in out.iterdir())
    notice(f"{out}: {size / 1e6:.2f} MB")


def flat(scores: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """ "eval_speech", "4 codebooks", "pesq" -> "speech.4_codebooks.pesq"."""
    return {
        f"{name.removeprefix('eval_')}.{system.replace(' ', '_')}.{key}": round(value, 4)
        for name, systems in scores.items()
        for system, row in systems.items()
        if "codebooks" in system
        for key, value in row.items()
    }


if __name__ == "__main__":
    main()
