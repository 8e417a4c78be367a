"""The scorer of benchmarks/masked_sampling.py: 1 for a clip in which the classifier hears what was asked for.

    python heard.py --prompts prompts.txt          # one caption of each class
    MINI_SOUND_CLASSIFIER=work/classifier.safetensors PYTHONPATH=egs/mini_sound/local \\
      python -m benchmarks.masked_sampling mini_sound -o DIR --prompts prompts.txt --scorer heard:heard
"""

import argparse
import os
from functools import cache
from pathlib import Path

import torch
from base import fail, fit
from captions import all_captions, classes
from classifier import LogMel, SoundNet, load

VARIABLE = "MINI_SOUND_CLASSIFIER"


@cache
def classifier() -> tuple[SoundNet, list[str]]:
    """The one that the variable names."""
    if VARIABLE not in os.environ:
        fail(f"{VARIABLE} is not set; name the classifier.safetensors of stage 1")
    return load(Path(os.environ[VARIABLE]))


@torch.inference_mode()
def heard(clips: list, prompts: list[str]) -> list[float]:
    """One number for each clip (:class:`nar_speech.types.Audio`, 16 kHz) and its caption."""
    network, known = classifier()
    front, meaning = LogMel(), all_captions()
    found = []
    for clip, prompt in zip(clips, prompts, strict=True):
        if prompt not in meaning:
            fail(f"'{prompt}' is no caption of conf/vocabulary.yaml; heard.py --prompts writes some")
        wave = torch.from_numpy(fit(clip.samples.reshape(-1)))[None]
        best = network(front.compress(front.power(wave))).argmax(-1)
        found.append(float(known[int(best)] in meaning[prompt]))
    return found


def prompts() -> list[str]:
    """The plainest caption of each class that stands for no other."""
    shortest: dict[str, str] = {}
    for caption, names in all_captions().items():
        if len(names) == 1 and len(caption) < len(shortest.get(names[0], caption + " ")):
            shortest[names[0]] = caption
    return [shortest[name] for name in classes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="file to write, one caption a line")
    options = parser.parse_args()
    options.prompts.write_text("".join(f"{line}\n" for line in prompts()), encoding="utf-8")


if __name__ == "__main__":
    main()
