"""Networks with random weights that say something, and sounds between which they tell."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nar_speech import hub

RATE = 16000
SPREAD = 5.0  # standard deviation of the logits of a sharpened CTC head
FACTOR = 30.0  # of the output layer of a Paraformer's decoder


@torch.no_grad()
def sharpened(folder: Path) -> Path:
    """A model folder whose network decides for other tokens at other sounds.

    What all frames have in common is taken out of the CTC head; then its weights are made large.
    """
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if "decoder.output_layer.weight" in tensors:
        tensors["decoder.output_layer.weight"] *= FACTOR
    if "ctc.ctc_lo.weight" in tensors:
        parts = hub.load_parts(folder)
        wave = torch.from_numpy(babble(5.0, seed=99))[None]
        encoded, _ = parts.network.encode(*parts.frontend(wave, torch.tensor([wave.shape[1]])))
        weight, mean = tensors["ctc.ctc_lo.weight"], encoded[0].mean(0)
        weight *= SPREAD / ((encoded[0] - mean) @ weight.T).std()
        tensors["ctc.ctc_lo.bias"] = -(weight @ mean)
    save_file(tensors, path)
    return folder


def babble(seconds: float, seed: int = 0) -> np.ndarray:
    """Float32 samples at 16 kHz: chords and hiss of changing pitch and loudness, each 50 to 250 ms long."""
    random = np.random.default_rng(seed)
    parts, count = [], 0
    while count < seconds * RATE:
        time = np.arange(random.integers(800, 4000)) / RATE
        chord = sum(np.sin(2 * np.pi * random.uniform(80, 6000) * time) for _ in range(4))
        parts.append(
            chord * random.uniform(0.02, 0.2) + random.normal(0, random.uniform(0.001, 0.05), len(time))
        )
        count += len(time)
    return np.concatenate(parts)[: round(seconds * RATE)].astype(np.float32)
