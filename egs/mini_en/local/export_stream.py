"""Stage 4: the model folder of the streaming twin, weights as int8 with a scale a row, with its card.

    python export_stream.py --run work/exp/stream --teacher work/model --out work/stream_model

The run has written a folder with float32 weights (run/model): those of the best validated average.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from nar_speech.checkpoint import read_weights
from nar_speech.compress import compress
from nar_speech.config import from_dict
from nar_speech.errors import ConfigError
from nar_speech.model_folder import WEIGHTS_FILE, read_model_file, write_model_folder
from nar_speech.models.ctc import CtcConfig
from nar_speech.text.tokenizer import load_tokenizer

LIMIT = 16_000_000  # bytes of the whole folder
DESCRIPTION = (
    "Small English recogniser for live speech: the encoder and the CTC head of mini_en, taught by mini_en to "
    "hear in chunks of 640 ms with 5.1 s of memory in each block. It writes lower-case words while one "
    "speaks; mini_en hears a finished utterance again for the final text. See egs/mini_en."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="train.output_dir of recipes.ctc")
    parser.add_argument("--teacher", type=Path, required=True, help="model folder whose sources are named")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="mini_en_stream")
    args = parser.parse_args()
    source = args.run / "model"
    try:
        file = read_model_file(source)
    except ConfigError as error:
        raise SystemExit(f"{error}; let the training of {args.run} finish") from error
    teacher = read_model_file(args.teacher).card
    card = replace(
        file.card,
        name=args.name,
        description=DESCRIPTION,
        source=teacher.source,
        licence=teacher.licence,
    )
    tokenizer = load_tokenizer(file.tokenizer, source)
    network = from_dict(CtcConfig, file.network, "network")
    small = compress(read_weights(source / WEIGHTS_FILE), "int8")
    folder = write_model_folder(args.out, small, card, file.frontend, network, tokenizer, file.decoding)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LIMIT:
        raise SystemExit(f"{folder}: {size / 1e6:.1f} MB, the limit is {LIMIT / 1e6:.0f} MB")
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
