"""Stage 1: music with exact captions, composed by a program and played by FluidSynth.

    python render_music.py --work work [--hours 3 --jobs 2 --seed 1 --sound-font FILE.sf2]

Writes work/sounds/music/*.flac and work/sounds/music.jsonl: solo instruments (chords, arpeggio, melody,
riff), drum beats and bands of drums, bass and a lead, slow, medium and fast, happy (major) and sad (minor).
Every instrument has the same number of clips. Development and evaluation clips come from seeds of their own.
"""

import argparse
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from base import CLIP, RATE, fail, read_16k
from captions import music_class, music_labels, vocabulary
from compose import INSTRUMENTS, compose
from midi import midi_file
from render import Clip, add_options, counts, plan, render

FONTS = Path("/usr/share/sounds/sf2")
FONT = FONTS / "FluidR3_GM.sf2"  # MIT; TimGM6mb.sf2 is GPL-2
LICENCE = "rendered by this recipe with {font}"


def play(data: bytes, font: Path, reverb: float, room: float) -> np.ndarray:
    """A MIDI file as mono float32 samples at 16 kHz; RuntimeError with FluidSynth's words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        score, wave = Path(folder) / "score.mid", Path(folder) / "out.wav"
        score.write_bytes(data)
        # What FluidSynth folds back at 32 kHz stays above 10 kHz; at 16 kHz it would be heard.
        options = ["-ni", "-q", "-r", "32000", "-g", "0.6", "-o", "synth.dynamic-sample-loading=1"]
        options += ["-o", f"synth.reverb.level={reverb:.3f}", "-o", f"synth.reverb.room-size={room:.3f}"]
        options += ["-o", "synth.chorus.active=0", "-F", str(wave)]
        run = subprocess.run(
            ["fluidsynth", *options, str(font), str(score)], capture_output=True, timeout=120
        )
        if run.returncode or not wave.exists():
            raise RuntimeError(f"fluidsynth: {run.stderr.decode(errors='replace').strip()[-200:]}")
        return read_16k(wave)


def make(clip: Clip, font: Path) -> np.ndarray:
    """One clip (CLIP,), float32, not yet levelled."""
    rng = clip.generator()
    low, high = vocabulary()["music"]["tempos"][clip.labels["tempo"]]
    notes, programs = compose(rng, clip.labels, float(rng.uniform(low, high)))
    score = midi_file(notes, programs, CLIP / RATE + 0.2)
    return play(score, font, rng.uniform(0.1, 0.6), rng.uniform(0.1, 0.6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, hours=3.0, dev=200, held=200)
    parser.add_argument(
        "--sound-font", type=Path, default=FONT, help="General MIDI, .sf2 (default %(default)s)"
    )
    args = parser.parse_args()
    if not shutil.which("fluidsynth"):
        fail("the program fluidsynth is not there: apt-get install fluidsynth fluid-soundfont-gm")
    if not args.sound_font.is_file():
        fail(f"--sound-font {args.sound_font}: no such file: apt-get install fluid-soundfont-gm")
    if set(INSTRUMENTS) != set(vocabulary()["music"]["instruments"]):
        raise AssertionError("conf/vocabulary.yaml and compose.py name different instruments")
    font = args.sound_font.stem
    groups = [(music_class(labels), labels) for labels in music_labels()]
    clips = plan(groups, counts(args), args.seed, tag="" if args.sound_font == FONT else font)
    licence = LICENCE.format(font=f"{font} (MIT)" if args.sound_font == FONT else font)
    render("music", "music", clips, partial(make, font=args.sound_font), args.work, args.jobs, licence)


if __name__ == "__main__":
    main()
