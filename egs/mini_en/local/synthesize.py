"""Speak sentences with one synthesiser until there are enough hours; resumable, seeded.

    python synthesize.py --engine piper --text text.jsonl --hours 5 --shard 0/2 --out DIR

Writes DIR/<engine>/<id>.flac (16 kHz mono) and appends one line a clip to DIR/<engine>.<shard>.jsonl:
{"path" (relative to DIR), "text", "written" (what was spoken, with case and punctuation), "speaker",
"source", "name", "duration", "licence"}.
Runs in the tools environment: needs numpy, soundfile, soxr, onnxruntime and the engine, not nar_speech.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr

sys.path.insert(0, str(Path(__file__).parent))
from voices import ENGINES

RATE = 16000
LICENCES = {
    "piper": "synthetic; voice en_US joe CC0 by its card",
    "flite": "synthetic; flite voices, BSD-like",
    "kokoro": "synthetic; Kokoro-82M Apache-2.0",
}
# The tract/pitch warp by resampling gives the few fixed voices more speakers; Kokoro has its mixes already.
WARP = {"piper": (0.86, 1.18), "flite": (0.88, 1.15), "kokoro": (0.95, 1.06)}


def trim(samples: np.ndarray, threshold: float = 0.01) -> np.ndarray:
    """Cut what is quieter than `threshold` x peak at both ends."""
    loud = np.flatnonzero(np.abs(samples) > threshold * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples[:0]


def finish(samples: np.ndarray, rate: int, engine: str, rng: random.Random) -> np.ndarray:
    """Resample to 16 kHz with a random warp, 0.05 to 0.35 s of near silence at both ends, random level."""
    warp = rng.uniform(*WARP[engine])
    samples = soxr.resample(trim(samples), rate * warp, RATE, quality="HQ")
    samples = samples / max(np.abs(samples).max(), 1e-4) * 10 ** (rng.uniform(-20, -1) / 20)
    ends = [np.zeros(int(RATE * rng.uniform(0.05, 0.35))) for _ in range(2)]
    return np.concatenate([ends[0], samples, ends[1]]).astype(np.float32)


def read_done(path: Path) -> dict[str, float]:
    """id -> duration of the finished clips; a torn last line (a killed run) is passed over."""
    done = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[row["name"]] = row["duration"]
    return done


def mend(path: Path) -> None:
    """Cut a torn last line off, so that the next line starts where a line should."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def run(args: argparse.Namespace) -> float:
    """Make the clips of one shard; returns its hours."""
    index, count = (int(part) for part in args.shard.split("/"))
    items = [json.loads(line) for line in args.text.read_text(encoding="utf-8").splitlines()]
    # Each engine goes through the sentences in another order, so together they cover more of them.
    random.Random(f"{args.seed}-{args.engine}").shuffle(items)
    items = items[index::count]
    folder = args.out / args.engine
    folder.mkdir(parents=True, exist_ok=True)
    manifest = args.out / f"{args.engine}.{index}of{count}.jsonl"
    mend(manifest)
    # Clips of all shards count, so that a run may go on with another number of processes.
    done: dict[str, float] = {}
    for other in args.out.glob(f"{args.engine}.*of*.jsonl"):
        done |= read_done(other)
    seconds, target, engine = sum(done.values()) / count, args.hours * 3600 / count, None
    start, shown, first = time.monotonic(), 0.0, seconds
    with manifest.open("a", encoding="utf-8") as out:
        for item in items:
            if seconds >= target or (args.minutes and time.monotonic() - start > 60 * args.minutes):
                break
            if item["id"] in done:
                continue
            engine = engine or ENGINES[args.engine](args.out)
            rng = random.Random(f"{args.seed}-{args.engine}-{item['id']}")
            samples, rate, voice = engine.speak(item, rng)
            samples = finish(samples, rate, args.engine, rng)
            duration = len(samples) / RATE
            words = len(item["text"].split())
            if not 0.12 * words < duration < 1.5 + 1.1 * words:
                continue  # the synthesiser stumbled: far too short or too long for its words
            path = folder / f"{item['id']}.flac"
            soundfile.write(path, samples, RATE, subtype="PCM_16")
            row = {
                "path": str(path.relative_to(args.out)),
                "text": item["text"],
                "written": item["spoken"],
                "speaker": voice,
                "source": f"synthetic_{args.engine}",
                "name": item["id"],
                "duration": round(duration, 3),
                "licence": LICENCES[args.engine],
            }
            out.write(json.dumps(row) + "\n")
            out.flush()
            seconds += duration
            if time.monotonic() - shown > 15:
                shown = time.monotonic()
                speed = (seconds - first) / max(shown - start, 1e-3)
                print(f"{args.engine} {args.shard}: {seconds / 3600:.2f} of {target / 3600:.2f} h, "
                      f"{speed:.1f} s of audio a second", file=sys.stderr)  # fmt: skip
    if seconds < target and not args.minutes:
        print(f"{args.engine} {args.shard}: all sentences spoken, {seconds / 3600:.2f} h", file=sys.stderr)
    return seconds / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=sorted(ENGINES), required=True)
    parser.add_argument("--text", type=Path, required=True, help="text.jsonl of make_text.py")
    parser.add_argument("--hours", type=float, required=True, help="hours over all shards")
    parser.add_argument("--minutes", type=float, help="stop after this much wall time")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(f"{args.engine} {args.shard}: {run(args):.2f} h", file=sys.stderr)


if __name__ == "__main__":
    main()
