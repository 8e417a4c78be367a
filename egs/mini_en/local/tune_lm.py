"""Set the weights of the language model on the development set, and put it into the model folder.

    python tune_lm.py --model work/model --lm work/lm.safetensors --cuts work/cuts/dev.jsonl.gz \
        [--prior-cuts work/cuts/train.jsonl.gz] [--write]

The label prior is the mean posterior over some clips of the training set; its weight is tuned like the
others. The acoustic model runs once. Then a coarse grid over weight and word bonus, then one value after
the other, each time the one with the smallest sum of word and character error rate. Prints the error rates
of greedy search, of the beam without the model and with it, and the CPU time of each search per second of
audio.
"""

import argparse
import itertools
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lhotse import CutSet
from torch import Tensor

from nar_speech.checkpoint import save_safetensors
from nar_speech.errors import NarSpeechError
from nar_speech.hub import load_model
from nar_speech.metrics import char_error_rate, word_error_rate
from nar_speech.model_folder import DecodingConfig, change_model_decoding
from nar_speech.models.ctc import CtcModel
from nar_speech.models.paraformer import Paraformer
from nar_speech.pipelines.language_model import PRIOR_NAME
from nar_speech.pipelines.recognize import LM_CANDIDATES, LM_FLOOR, Recognizer
from nar_speech.search.ctc import greedy, prefix_beam
from nar_speech.search.prior import divide_by_prior, label_prior
from nar_speech.text.normalize import get_normalizer

WEIGHTS = (0.3, 0.45, 0.6)
BONUSES = (0.5, 1.0, 2.0)
STEPS = {  # tried one after the other, around the best so far
    "prior_weight": (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    "unknown_word": (-3.0, -2.0, -1.5, -1.0, -0.6),
    "lm_weight": (-0.1, 0.1),
    "word_bonus": (-0.5, 0.5),
}
ABSOLUTE = ("unknown_word", "prior_weight")  # values, not steps
BATCH_SECONDS = 60.0
PRIOR_CLIPS = 400


@dataclass(frozen=True)
class Batch:
    """CTC outputs of some utterances: (B, T, V), (B,), and the normalised texts."""

    log_probs: Tensor
    lengths: Tensor
    texts: list[str]


@torch.inference_mode()
def run_network(recognizer: Recognizer, cuts: list, normalize) -> list[Batch]:
    """Outputs of the CTC head, in batches of similar length, longest first."""
    batches, waiting = [], sorted(cuts, key=lambda cut: -cut.duration)
    while waiting:
        size = max(1, int(BATCH_SECONDS / waiting[0].duration))
        part, waiting = waiting[:size], waiting[size:]
        waves = [cut.resample(recognizer.sample_rate).load_audio()[0] for cut in part]
        feats, lengths = recognizer.features(waves)
        encoded, lengths = recognizer.network.encode(feats, lengths)
        log_probs = ctc_log_probs(recognizer.network, encoded)
        batches.append(Batch(log_probs, lengths, [normalize(cut.supervisions[0].text) for cut in part]))
    return batches


def ctc_log_probs(network: CtcModel | Paraformer, encoded: Tensor) -> Tensor:
    """(B, T, V) of encoder output (B, T, D)."""
    if isinstance(network, CtcModel):
        return network.ctc(encoded)
    return network.ctc_logits(encoded).float().log_softmax(-1)


def estimate_prior(batches: list[Batch]) -> Tensor:
    """(V,) log prior over all batches."""
    rows = [b.log_probs[i, : b.lengths[i]] for b in batches for i in range(len(b.lengths))]
    frames = torch.cat(rows)
    return label_prior(frames[None], torch.tensor([len(frames)]))


class Trial:
    """Error rates of a decoding on the batches."""

    def __init__(
        self, recognizer: Recognizer, batches: list[Batch], prior: Tensor | None, seconds: float, normalize
    ):
        self.recognizer, self.batches, self.prior, self.seconds = recognizer, batches, prior, seconds
        self.normalize, self.known = normalize, {}

    def __call__(self, decoding: DecodingConfig) -> tuple[float, float]:
        """Word and character error rate in per cent; prints them."""
        key = (decoding.decoder, decoding.beam, decoding.lm, decoding.lm_weight, decoding.word_bonus)
        key = (*key, decoding.unknown_word, decoding.prior_weight)
        if key in self.known:
            return self.known[key]
        references, hypotheses = [], []
        start = time.process_time()
        for batch in self.batches:
            references += batch.texts
            for found in self.search(batch, decoding):
                hypotheses.append(self.normalize(self.recognizer.tokenizer.decode(found.tokens)))
        cost = (time.process_time() - start) / self.seconds
        words = 100 * word_error_rate(references, hypotheses).rate
        characters = 100 * char_error_rate(references, hypotheses).rate
        label = decoding.decoder
        if decoding.decoder == "ctc_beam":
            label += f" {decoding.beam}"
            if decoding.lm:
                label += f", weight {decoding.lm_weight:.2f}, bonus {decoding.word_bonus:.2f}"
                label += f", unknown {decoding.unknown_word:.2f}, prior {decoding.prior_weight:.2f}"
        print(f"{label}: WER {words:.2f}, CER {characters:.2f}, {cost:.4f} CPU-s/s", flush=True)
        self.known[key] = words, characters
        return self.known[key]

    def search(self, batch: Batch, decoding: DecodingConfig) -> list:
        if decoding.decoder == "ctc_greedy":
            return greedy(batch.log_probs, batch.lengths)
        lm = self.recognizer.language_model(decoding)
        limits = {} if lm is None else {"candidates": max(decoding.beam, LM_CANDIDATES), "floor": LM_FLOOR}
        log_probs = batch.log_probs
        if lm is not None and self.prior is not None:
            log_probs = divide_by_prior(log_probs, self.prior, decoding.prior_weight)
        lists = prefix_beam(
            log_probs,
            batch.lengths,
            decoding.beam,
            lm=lm,
            lm_weight=1.0,
            blank_skip=decoding.blank_skip,
            recombine=lm is not None,
            **limits,
        )
        return [found[0] for found in lists]


def tune(trial: Trial, decoding: DecodingConfig) -> DecodingConfig:
    """The best decoding near ``decoding``."""
    grid = [
        replace(decoding, lm_weight=weight, word_bonus=bonus)
        for weight, bonus in itertools.product(WEIGHTS, BONUSES)
    ]

    def cost(candidate: DecodingConfig) -> float:
        # Words alone favour leaving out what is not sure; a draft should say what was heard.
        return sum(trial(candidate))

    best = min(grid, key=cost)
    names = ["unknown_word", "lm_weight", "word_bonus", "unknown_word"]
    if trial.prior is not None:
        names = ["prior_weight", *names, "prior_weight", "lm_weight", "word_bonus"]
    for name in names:
        start = 0.0 if name in ABSOLUTE else getattr(best, name)
        values = [round(start + step, 3) for step in STEPS[name]]
        best = min([best, *(replace(best, **{name: v}) for v in values)], key=cost)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--lm", type=Path, required=True, help="compact or ARPA file")
    parser.add_argument("--cuts", type=Path, required=True, help="manifest of the development set")
    parser.add_argument("--prior-cuts", type=Path, help="manifest to estimate the label prior on")
    parser.add_argument("--beam", type=int, default=24)
    parser.add_argument("--blank-skip", type=float, default=0.99)
    parser.add_argument("--write", action="store_true", help="put the model and its weights into the folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    normalize = get_normalizer("en")
    decoding = DecodingConfig(decoder="ctc_beam", beam=args.beam, lm=str(args.lm), blank_skip=args.blank_skip)
    recognizer = load_model(args.model, device="cpu").recognizer
    recognizer.language_model(decoding)  # a bad file fails before the network runs
    cuts = list(CutSet.from_file(args.cuts))
    start = time.process_time()
    batches = run_network(recognizer, cuts, normalize)
    seconds = sum(cut.duration for cut in cuts)
    cost = (time.process_time() - start) / seconds
    print(f"{len(cuts)} utterances, {seconds:.0f} s; network {cost:.4f} CPU-s/s", flush=True)
    prior = None
    if args.prior_cuts:
        known = list(CutSet.from_file(args.prior_cuts))
        some = random.Random(1).sample(known, min(PRIOR_CLIPS, len(known)))
        prior = estimate_prior(run_network(recognizer, some, normalize))
    trial = Trial(recognizer, batches, prior, seconds, normalize)
    trial(replace(decoding, decoder="ctc_greedy"))
    trial(replace(decoding, lm=None))
    best = tune(trial, decoding)
    print("best:", end=" ")
    trial.known.clear()
    trial(best)
    if args.write:
        names = ("decoder", "beam", "lm", "lm_weight", "word_bonus", "unknown_word", "blank_skip")
        found = {name: getattr(best, name) for name in names}
        if prior is not None:
            save_safetensors(args.model / "prior.safetensors", {PRIOR_NAME: prior})
            found |= {"prior": str(args.model / "prior.safetensors"), "prior_weight": best.prior_weight}
        change_model_decoding(args.model, **found)
        print(f"{args.model}: decoding written", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except NarSpeechError as error:
        sys.exit(f"error: {error}")
