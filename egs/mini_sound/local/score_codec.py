"""Stage 3: what the codec does to held-out speech and sounds, beside Opus.

    python score_codec.py --work work --codec work/codec --out work/scores/codec.json

For each evaluation set and each number of codebooks: bits per second, mel distance (losses/spectral.py) and
SI-SDR, for speech also PESQ (wide band), extended STOI and the word errors of the embedded recogniser. Opus
(opusenc, hard CBR, frames of 60 ms) is measured the same way. Needs opus-tools, pystoi and pesq.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from base import RATE, fail, notice
from lhotse import CutSet

from nar_speech.codec.folder import read_codec_folder
from nar_speech.data import read_cut, text_of
from nar_speech.losses.spectral import mel_distance
from nar_speech.metrics import word_error_rate

SETS = ("eval_speech", "eval_esc10", "eval_effects", "eval_music")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the recipe")
    parser.add_argument("--codec", type=Path, required=True, help="folder of the codec")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 4, 8, 12], help="numbers of codebooks")
    parser.add_argument(
        "--opus", type=float, nargs="*", default=[6, 8, 12], help="kbit/s; none: without Opus"
    )
    parser.add_argument("--clips", type=int, default=60, help="most clips of a set")
    parser.add_argument("--seconds", type=float, default=10.0, help="longer clips are cut")
    options = parser.parse_args()
    codec, _ = read_codec_folder(options.codec)
    systems = {"original": None}
    for levels in options.levels:
        systems[f"{levels} codebooks"] = lambda wave, k=levels: through_codec(codec, wave, k)
    for rate in options.opus:
        systems[f"Opus {rate:g} kbit/s"] = lambda wave, kbps=rate: through_opus(wave, kbps)
    results = {}
    for name in SETS:
        manifest = options.work / f"cuts/{name}.jsonl.gz"
        if not manifest.is_file():
            notice(f"{manifest}: missing, left out")
            continue
        cuts = list(CutSet.from_file(manifest))
        cuts = cuts[:: max(1, len(cuts) // options.clips)][: options.clips]
        results[name] = score_set(cuts, systems, name == "eval_speech", options.seconds)
        notice(f"{name}: {len(cuts)} clips")
        for system, row in results[name].items():
            print(
                f"{name:14s} {system:16s}",
                " ".join(f"{key} {value:.3f}" for key, value in row.items()),
                flush=True,
            )
    if not results:
        fail(f"{options.work}: no evaluation set in cuts/; run stage 1 first")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


def score_set(cuts: list, systems: dict, speech: bool, seconds: float) -> dict[str, dict[str, float]]:
    """System -> means of its measures over the clips."""
    recogniser = None
    if speech:
        from nar_speech import load_model

        recogniser = load_model("mini_en", decoder="ctc_beam", verify=False)
    longest = int(seconds * RATE)
    waves = [read_cut(cut, RATE)[:longest] for cut in cuts]
    whole = [len(wave) < longest for wave in waves]
    results = {}
    for system, run in systems.items():
        rows, heard = [], []
        for wave in waves:
            coded, bits = (wave, len(wave) * 16) if run is None else run(wave)
            row = {"kbps": bits / len(wave) * RATE / 1000}
            if run is not None:
                row |= distances(wave, coded, speech)
            rows.append(row)
            heard.append(coded)
        results[system] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        if recogniser is not None:
            texts = [
                (text_of(cut), recogniser((wave, RATE)).text)
                for cut, wave, all_of_it in zip(cuts, heard, whole, strict=True)
                if all_of_it
            ]
            results[system]["wer"] = 100 * word_error_rate(*zip(*texts, strict=True)).rate
    return results


def distances(wave: np.ndarray, coded: np.ndarray, speech: bool) -> dict[str, float]:
    """Measures of one coded clip."""
    pair = torch.from_numpy(coded)[None], torch.from_numpy(wave)[None]
    row = {"mel": float(mel_distance(*pair, RATE)), "si_sdr": si_sdr(coded, wave)}
    if speech:
        from pesq import pesq
        from pystoi import stoi

        row |= {"pesq": pesq(RATE, wave, coded, "wb"), "stoi": float(stoi(wave, coded, RATE, extended=True))}
    return row


def si_sdr(coded: np.ndarray, wave: np.ndarray) -> float:
    """Scale-invariant ratio of signal to distortion in dB (Le Roux et al. 2019), at least -30."""
    scale = float(coded @ wave) / max(float(wave @ wave), 1e-12)
    target = scale * wave
    noise = float(np.square(coded - target).sum())
    return max(-30.0, 10 * math.log10(max(float(np.square(target).sum()), 1e-12) / max(noise, 1e-12)))


def through_codec(codec, wave: np.ndarray, levels: int) -> tuple[np.ndarray, float]:
    """The decoded clip and its size in bits."""
    codes = codec.encode(torch.from_numpy(wave)[None, None], None, levels)
    sound, _ = codec.decode(codes)
    return sound[0, 0].numpy(), codes.tokens.numel() * math.log2(codec.codebook_size)


def through_opus(wave: np.ndarray, kbps: float) -> tuple[np.ndarray, float]:
    """The clip through opusenc and opusdec, and its size in bits without the container."""
    with tempfile.TemporaryDirectory() as folder:
        before, packed, after = (f"{folder}/{name}" for name in ("a.wav", "a.opus", "b.wav"))
        soundfile.write(before, wave, RATE)
        encode = [
            "opusenc",
            "--quiet",
            "--hard-cbr",
            "--framesize",
            "60",
            "--bitrate",
            f"{kbps:g}",
            before,
            packed,
        ]
        for command in (encode, ["opusdec", "--quiet", "--rate", str(RATE), "--force-wav", packed, after]):
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                fail(f"{command[0]}: {error}; install opus-tools, or give --opus without values")
        coded, _ = soundfile.read(after, dtype="float32")
    coded = np.pad(coded, (0, max(0, len(wave) - len(coded))))[: len(wave)]
    return coded.astype(np.float32), 1000 * kbps * len(wave) / RATE


if __name__ == "__main__":
    main()
