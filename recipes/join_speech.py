"""Put the trained networks of a MaskGCT together: the folder that nar-speech synthesize reads.

  python -m recipes.join_speech CARD.yaml -o exp/model --t2s exp/t2s/model --s2a exp/s2a/model \\
    --semantic exp/semantic/model --codec mini_codec --duration exp/duration/model --store int8 cfg=2.0

CARD.yaml: fields of nar_speech.types.ModelCard; words key=value are defaults of synthesis.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from nar_speech import config as configs
from nar_speech.errors import NarSpeechError
from nar_speech.locate import embedded_models
from nar_speech.models.maskgct_part import read_part
from nar_speech.pipelines.semantic import features_source, load_semantic
from nar_speech.pipelines.speech_model import load_speech_parts, part_weights
from nar_speech.pipelines.speech_options import SynthesisConfig, change
from nar_speech.speech_folder import TASK, SpeechFile, write_speech_folder
from nar_speech.text.g2p import PhonemizerConfig
from nar_speech.types import ModelCard


def join(options: argparse.Namespace) -> Path:
    """Read all parts, write the folder, and read it again.

    Raises:
        ConfigError, CheckpointError, HubError: a part is missing, damaged, or does not fit the others.
    """
    words = dict(word.partition("=")[::2] for word in options.synthesis)
    chosen = {key: yaml.safe_load(value) for key, value in words.items()}
    change(SynthesisConfig(), chosen, "synthesis")
    named = {"t2s": (options.t2s, "t2s"), "s2a_first": (options.s2a_first, "s2a")}
    named |= {"s2a_full": (options.s2a, "s2a"), "duration": (options.duration, "duration")}
    parts = {name: read_part(folder, kind)[0] for name, (folder, kind) in named.items() if folder}
    tokenizer, source = load_semantic(options.semantic), features_source(options.semantic)
    fields = configs.read_yaml(options.card) | {"task": TASK, "model": "maskgct"}
    local = options.codec not in embedded_models() and Path(options.codec).is_dir()
    file = SpeechFile(
        card=configs.from_dict(ModelCard, fields, options.card),
        codec=str(Path(options.codec).resolve()) if local else options.codec,
        **{name: configs.to_dict(part.config) for name, part in parts.items()},
        semantic=configs.to_dict(tokenizer.codec.config),
        features=source,
        phonemizer=PhonemizerConfig(options.language),
        synthesis=chosen,
    )
    weights = part_weights({**parts, "semantic": tokenizer.codec}, tokenizer.features)
    folder = write_speech_folder(options.output, weights, file, options.store)
    load_speech_parts(folder)  # whether all fits
    return folder


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="YAML file")
    parser.add_argument("synthesis", nargs="*", metavar="key=value", help="defaults of synthesis")
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument("--t2s", required=True, help="folder of recipes.maskgct, kind=t2s")
    parser.add_argument("--s2a", required=True, help="folder of recipes.maskgct, kind=s2a")
    parser.add_argument("--s2a-first", help="likewise, of the first layer (default: --s2a makes it)")
    parser.add_argument("--duration", help="folder of recipes.duration (default: none)")
    parser.add_argument("--semantic", required=True, help="folder of recipes.semantic_codec")
    parser.add_argument("--codec", default="mini_codec", help="name or folder, copied (default: %(default)s)")
    parser.add_argument("--language", default="auto", help="of texts (default: %(default)s)")
    parser.add_argument("--store", choices=("float32", "float16", "int8"), default="float32")
    try:
        folder = join(parser.parse_intermixed_args(argv))
    except NarSpeechError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
