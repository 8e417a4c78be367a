"""Draft and verify against plain greedy search of the same verifier: equal text, passes, CPU time.

    python -m benchmarks.draft_verify MANIFEST.jsonl ... [--model FOLDER] [--clips 200] [--dtype float32]

A manifest has lines {"path": ..., "text": ...} with paths relative to it. Every clip is decoded alone, both
ways in turns, and then all of them in batches; exit code 1 where a text differs. One thread unless --threads
says otherwise. Drafting and the encoder are not in the ratio: both ways share the encoder.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

import nar_speech
from nar_speech.audio import read_audio
from nar_speech.metrics import word_error_rate
from nar_speech.text.normalize import normalize_english

BATCH = 8


def read_manifests(paths: list[Path], count: int, seed: int) -> list[tuple[np.ndarray, str]]:
    """Samples (16 kHz mono) and texts of ``count`` clips of at most 28 s, drawn evenly from the manifests."""
    rng, out = random.Random(seed), []
    for path in paths:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [row for row in rows if 0.5 <= row.get("duration", 5.0) <= 28.0]
        for row in rng.sample(rows, min(len(rows), -(-count // len(paths)))):
            out.append((np.ravel(read_audio(path.parent / row["path"]).samples), row["text"]))
    return out[:count]


class Clock:
    """CPU seconds by name."""

    def __init__(self):
        self.sums: dict[str, float] = {}

    def __call__(self, name, function, *args):
        start = time.process_time()
        found = function(*args)
        self.sums[name] = self.sums.get(name, 0.0) + time.process_time() - start
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifests", nargs="+", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clips = read_manifests(options.manifests, options.clips, options.seed)
    model = nar_speech.load_model(options.model, device="cpu", dtype=options.dtype)
    recogniser, verifier = model.recognizer, model.recognizer.verifier()
    drafter = nar_speech.load_model(options.model, device="cpu", dtype=options.dtype, verify=False)
    seconds = sum(len(wave) for wave, _ in clips) / 16000
    drafts = [transcript.text for transcript in drafter([wave for wave, _ in clips])]

    def encode(waves):
        return recogniser.network.encoder.trunk(*recogniser.features(waves))

    clock, different, texts, counts = Clock(), 0, {"draft": drafts, "greedy": [], "verified": []}, np.zeros(3)
    with torch.inference_mode():
        for number, ((wave, _), draft) in enumerate(zip(clips, drafts, strict=True)):
            memory = clock("encoder", encode, [wave])
            ways = [("greedy", None), ("verified", [draft])]
            found = {}
            for name, given in ways if number % 2 else ways[::-1]:
                found[name] = clock(name, verifier, *memory, given, [len(wave) / 16000])[0]
                texts[name].append(verifier.tokenizer.decode(found[name].tokens).strip())
            different += found["greedy"].tokens != found["verified"].tokens
            counts += (len(found["greedy"].tokens), found["greedy"].passes, found["verified"].passes)
        batched = 0
        for first in range(0, len(clips), BATCH):
            waves = [wave for wave, _ in clips[first : first + BATCH]]
            rows = slice(first, first + BATCH)
            batch = verifier(*encode(waves), drafts[rows], [len(wave) / 16000 for wave in waves])
            batched += sum(
                verifier.tokenizer.decode(item.tokens).strip() != text
                for item, text in zip(batch, texts["verified"][rows], strict=True)
            )
    references = [normalize_english(text) for _, text in clips]
    print(f"{len(clips)} clips, {seconds:.0f} s, {options.dtype}, {options.threads} thread(s)")
    print(f"texts that differ from greedy search: {different} alone; batched from alone: {batched}")
    print(
        f"tokens {counts[0]:.0f}, passes: greedy {counts[1]:.0f}, verified {counts[2]:.0f} "
        f"({counts[0] / counts[2]:.2f} tokens a pass)"
    )
    for name, value in clock.sums.items():
        print(f"{name:9s} {value / seconds:.5f} CPU-s per second of audio")
    print(f"verifying is {clock.sums['greedy'] / clock.sums['verified']:.2f} times as fast as greedy search")
    for name, hypotheses in texts.items():
        print(f"WER {name:9s} {word_error_rate(references, [normalize_english(t) for t in hypotheses])}")
    return int(bool(different or batched))


if __name__ == "__main__":
    sys.exit(main())
