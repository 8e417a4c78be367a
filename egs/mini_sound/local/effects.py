"""Stage 1: synthesised sound effects, 16 kinds with random parameters and exact captions.

    python effects.py --work work [--hours 2 --jobs 2 --seed 1]

Writes work/sounds/effects/*.flac and work/sounds/effects.jsonl. Every kind has the same number of clips.
Development and evaluation clips come from seeds of their own.
"""

import argparse

import numpy as np
from base import CLIP, RATE
from captions import effect_labels, vocabulary
from render import Clip, add_options, counts, plan, render
from synthesis import Generator, drift, gate, noise, onsets, place, room, seconds, strike, tone

LICENCE = "synthesised by this recipe"
LENGTH = CLIP / RATE  # seconds


def siren(rng: Generator, labels: dict) -> np.ndarray:
    """One voice between two pitches: every few seconds (slow) or several times a second (fast)."""
    slow = labels["speed"] == "slow"
    period = rng.uniform(2.6, 4.2) if slow else rng.uniform(0.22, 0.4)
    turn = (seconds() / period + rng.uniform()) % 1
    rise = rng.uniform(0.45, 0.6) if slow else rng.uniform(0.3, 0.6)
    height = np.where(turn < rise, turn / rise, (1 - turn) / (1 - rise))
    height = (1 - np.cos(np.pi * height)) / 2
    low, high = rng.uniform(450, 650), rng.uniform(1150, 1600)
    bright = rng.uniform(0.3, 0.65)
    sound = tone(low * (high / low) ** height, harmonics=tuple(bright ** np.arange(7)))
    return room(sound * (0.7 + 0.3 * drift(rng, CLIP, 0.5)), rng, 0.8, rng.uniform(0.05, 0.25))


def alarm_clock(rng: Generator, labels: dict) -> np.ndarray:
    """Square-like beeps: about one a second (slow) or five (fast)."""
    slow = labels["speed"] == "slow"
    rate = rng.uniform(0.8, 1.15) if slow else rng.uniform(4.2, 6.0)
    length = rng.uniform(0.25, 0.4) if slow else rng.uniform(0.4, 0.6) / rate
    starts = np.arange(rng.uniform(0.02, 0.3), LENGTH, 1 / rate)
    sound = tone(rng.uniform(1700, 2500), harmonics=(1, 0, rng.uniform(0.15, 0.4)))
    return room(sound * gate(starts, starts + length), rng, 0.3, 0.05)


def footsteps(rng: Generator, labels: dict) -> np.ndarray:
    """Heel and sole on a hard floor or on gravel, under two steps a second (slow) or about three (fast)."""
    rate = rng.uniform(1.5, 1.9) if labels["speed"] == "slow" else rng.uniform(2.7, 3.3)
    gravel = rng.uniform() < 0.4
    low, high = (700, 6500) if gravel else (rng.uniform(150, 300), rng.uniform(1500, 3500))
    pitch, events = rng.uniform(70, 130), []
    for number, start in enumerate(onsets(rng, rate, 0.04)):
        count = int(0.3 * RATE)
        time, foot = seconds(count), 1 + 0.12 * (number % 2)
        body = strike(pitch * foot * np.array([1, 2.3]), np.array([0.03, 0.02]), np.array([1.0, 0.5]), count)
        heel = noise(rng, count, low, high) * np.exp(-time / (0.05 if gravel else 0.018))
        late = np.maximum(time - rng.uniform(0.09, 0.13), 0)
        sole = noise(rng, count, low, high) * (late > 0) * np.exp(-late / 0.04) * rng.uniform(0.2, 0.4)
        if gravel:
            heel *= (rng.uniform(size=count) < 0.08) * 3.0
            sole *= (rng.uniform(size=count) < 0.08) * 3.0
        events.append((start, rng.uniform(0.8, 1.2) * ((0.4 if gravel else 1.0) * body + 0.6 * heel + sole)))
    return room(place(events), rng, rng.uniform(0.2, 0.6), rng.uniform(0.05, 0.25))


def telephone_ring(rng: Generator, labels: dict) -> np.ndarray:
    """Two small bells struck in turn about 24 times a second, in long rings or double rings."""
    rate, count = rng.uniform(20, 28), int(0.5 * RATE)
    ratios = np.array([1, 1.51, 2.08, 2.9, 3.7])
    bells = [
        strike(pitch * ratios, np.array([0.25, 0.18, 0.12, 0.08, 0.05]), rng.uniform(0.3, 1, 5), count)
        for pitch in rng.uniform(950, 1300) * np.array([1, rng.uniform(1.15, 1.3)])
    ]
    first = rng.uniform(0.02, 0.4)
    if rng.uniform() < 0.5:
        rings = [(first + begin, first + begin + 0.45) for begin in (0, 0.65, 2.6, 3.25)]
    else:
        length, gap = rng.uniform(1.4, 1.8), rng.uniform(0.9, 1.3)
        rings = [(first + n * (length + gap), first + n * (length + gap) + length) for n in range(3)]
    events = []
    for start, end in rings:
        times = np.arange(start, min(end, LENGTH), 1 / rate)
        events += [(time, bells[n % 2] * rng.uniform(0.8, 1)) for n, time in enumerate(times)]
    return room(place(events), rng, 0.4, rng.uniform(0.03, 0.15))


def dial_tone(rng: Generator, labels: dict) -> np.ndarray:
    """350 and 440 Hz together, without a pause, with a little hiss of the line."""
    off = rng.uniform(0.985, 1.015)
    pair = tone(350 * off, harmonics=(1, 0.03)) + rng.uniform(0.8, 1.2) * tone(440 * off, harmonics=(1, 0.03))
    return pair + rng.uniform(0.002, 0.02) * noise(rng, low=300, high=3400)


def white_noise(rng: Generator, labels: dict) -> np.ndarray:
    return noise(rng, low=20, high=8000, slope=rng.uniform(-0.4, 0.4))


def wind(rng: Generator, labels: dict) -> np.ndarray:
    """Noise through a whistling resonance that wanders with the gusts."""
    centres = np.geomspace(120, 1800, 22)
    gusts = drift(rng, CLIP, rng.uniform(0.5, 0.9))
    ridge = np.log(rng.uniform(220, 320)) + gusts * rng.uniform(0.7, 1.3)
    width = rng.uniform(0.1, 0.18)
    sound = 0.15 * noise(rng, low=40, high=400, slope=-3)
    for centre in centres:
        weight = np.exp(-0.5 * ((np.log(centre) - ridge) / width) ** 2)
        sound += weight * noise(rng, low=centre * 0.95, high=centre * 1.05) * 0.5
    return sound * (0.2 + gusts) ** 1.3


def church_bell(rng: Generator, labels: dict) -> np.ndarray:
    """Hum, prime, minor third, fifth, octave and above, with slow beats; a stroke every two seconds."""
    ratios = np.array([0.5, 1, 1.2, 1.5, 2, 2.5, 2.67, 3.01, 4.1, 5.4, 6.8])
    decays = np.array([6, 4, 3, 2.2, 2, 1.2, 1, 0.9, 0.5, 0.3, 0.2]) * rng.uniform(0.5, 0.9)
    loud = np.array([0.6, 0.8, 0.9, 0.4, 1, 0.4, 0.4, 0.5, 0.35, 0.25, 0.15]) * rng.uniform(0.7, 1.2, 11)
    prime = rng.uniform(230, 520)
    split = prime * ratios * (1 + rng.uniform(0.0005, 0.002, 11))
    frequencies, both = np.concatenate([prime * ratios, split]), np.concatenate([loud, 0.5 * loud])
    stroke = strike(frequencies, np.tile(decays, 2), both, CLIP)
    clapper = noise(rng, int(0.03 * RATE), 800, 6000) * np.exp(-seconds(int(0.03 * RATE)) / 0.006)
    stroke[: len(clapper)] += 0.8 * clapper
    times = np.arange(rng.uniform(0.02, 0.3), LENGTH, rng.uniform(1.6, 2.4))
    return room(place([(time, stroke * rng.uniform(0.8, 1)) for time in times]), rng, 1.5, 0.15)


def laser(rng: Generator, labels: dict) -> np.ndarray:
    """Short tones that fall from several kHz to a few hundred Hz, three to seven of them."""
    high, low = rng.uniform(3000, 6000), rng.uniform(150, 450)
    length, sharp = rng.uniform(0.14, 0.32), rng.uniform(1.0, 2.2)
    count = int(length * RATE)
    along = np.linspace(0, 1, count) ** (1 / sharp)
    shot = tone(high * (low / high) ** along, count, (1, 0.4, 0.2)) * (1 - np.linspace(0, 1, count)) ** 0.5
    times = onsets(rng, rng.uniform(0.8, 2.2), 0.25, rng.uniform(0.02, 0.3))
    return room(place([(time, shot) for time in times]), rng, 0.6, rng.uniform(0.05, 0.2))


def slide_whistle(rng: Generator, up: bool) -> np.ndarray:
    """A breathy sine that slides over an octave and a half, once to three times."""
    length, gap = rng.uniform(0.8, 1.7), rng.uniform(0.35, 0.9)
    low, high = rng.uniform(420, 650), rng.uniform(1400, 2200)
    count, events = int(length * RATE), []
    time = seconds(count)
    along = np.linspace(0, 1, count) ** rng.uniform(0.8, 1.5)
    frequency = low * (high / low) ** (along if up else 1 - along)
    frequency *= 1 + 0.012 * np.sin(2 * np.pi * rng.uniform(5, 7) * time)
    edge = np.minimum(1, np.minimum(time, length - time) / 0.05)
    for start in np.arange(rng.uniform(0.05, 0.4), LENGTH - 0.6 * length, length + gap):
        breath = noise(rng, count, 500, 4000) * rng.uniform(0.01, 0.04)
        events.append((start, (tone(frequency, count, (1, 0.12, 0.05)) + breath) * edge))
    return room(place(events), rng, 0.4, rng.uniform(0.03, 0.12))


def rising_whistle(rng: Generator, labels: dict) -> np.ndarray:
    return slide_whistle(rng, up=True)


def falling_whistle(rng: Generator, labels: dict) -> np.ndarray:
    return slide_whistle(rng, up=False)


def blast(rng: Generator) -> np.ndarray:
    """One explosion: high bands die first, a sinking boom and some debris remain."""
    count = int(4 * RATE)
    time, size = seconds(count), rng.uniform(0.7, 1.3)
    sound = np.zeros(count)
    bands = ((30, 120, 1.1, 1.2), (120, 350, 0.8, 1), (350, 1000, 0.45, 0.8), (1000, 2500, 0.2, 0.6))
    for low, high, decay, loud in (*bands, (2500, 7000, 0.09, 0.5)):
        sound += loud * noise(rng, count, low, high) * np.exp(-time / (decay * size))
    boom = tone(np.maximum(28, rng.uniform(70, 100) * np.exp(-time / 0.6)), count)
    sound += 2.0 * boom * np.exp(-time / (0.7 * size))
    debris = (rng.uniform(size=count) < 25 / RATE) * rng.uniform(0, 1, count) * np.exp(-time / 1.2) * 8
    crackle = np.convolve(debris, np.exp(-np.arange(160) / 30) * rng.standard_normal(160))[:count]
    return np.tanh(rng.uniform(0.8, 1.6) * (sound + crackle * 0.3)) * np.minimum(1, time / 0.003)


def explosion(rng: Generator, labels: dict) -> np.ndarray:
    first = rng.uniform(0.03, 0.5)
    events = [(first, blast(rng))]
    if rng.uniform() < 0.4:
        events.append((first + rng.uniform(1.6, 2.8), blast(rng) * rng.uniform(0.7, 1)))
    return room(place(events), rng, 2.0, rng.uniform(0.1, 0.25))


def bubbling_water(rng: Generator, labels: dict) -> np.ndarray:
    """Many small bubbles, each a decaying tone that rises a little, over faint stirring."""
    count, time = int(0.2 * RATE), seconds(int(0.2 * RATE))
    many = rng.poisson(rng.uniform(14, 30) * LENGTH)
    middle, events = rng.uniform(450, 750), []
    for start in rng.uniform(0, LENGTH, many):
        frequency = np.clip(middle * np.exp(rng.normal(0, 0.45)), 180, 2500)
        decay = 18.0 / frequency
        bubble = tone(frequency * (1 + rng.uniform(0.5, 3) * time), count) * np.exp(-time / decay)
        events.append((start, bubble * np.minimum(1, time / 0.002) * rng.uniform(0.2, 1) ** 2))
    return room(place(events) + 0.01 * noise(rng, low=200, high=2500, slope=-3), rng, 0.3, 0.08)


def car_horn(rng: Generator, labels: dict) -> np.ndarray:
    """Two buzzing notes a third apart, in one to four honks."""
    pitch = rng.uniform(290, 420)
    colour = 1 / (1 + (np.arange(1, 24) * pitch / rng.uniform(1500, 3000)) ** 2)
    both = sum(tone(pitch * ratio, harmonics=tuple(colour)) for ratio in (1, rng.uniform(1.19, 1.27)))
    starts, ends, now = [], [], rng.uniform(0.03, 0.4)
    for _ in range(rng.integers(1, 5)):
        length = rng.uniform(0.2, 0.4) if rng.uniform() < 0.5 else rng.uniform(0.7, 1.5)
        starts.append(now)
        ends.append(min(now + length, LENGTH - 0.05))
        now += length + rng.uniform(0.12, 0.5)
        if now > LENGTH - 0.4:
            break
    honks = both * gate(np.array(starts), np.array(ends), 0.015)
    return room(honks, rng, 0.9, rng.uniform(0.05, 0.25))


def crickets(rng: Generator, labels: dict) -> np.ndarray:
    """Two to four crickets, each a steady chirp of three or four pulses near 4.5 kHz."""
    sound = rng.uniform(0.005, 0.02) * noise(rng, low=100, high=3000, slope=-3)
    for number in range(rng.integers(2, 5)):
        pulses, spacing = rng.integers(3, 5), rng.uniform(0.026, 0.036)
        chirps = onsets(rng, rng.uniform(1.7, 3.2), 0.03, rng.uniform(0, 0.4))
        starts = np.sort((chirps[:, None] + np.arange(pulses) * spacing).reshape(-1))
        voice = tone(rng.uniform(3900, 5200)) * gate(starts, starts + spacing * 0.65, 0.004)
        sound += voice * (1.0 if number == 0 else rng.uniform(0.1, 0.5))
    return room(sound, rng, 0.3, 0.05)


def door_knock(rng: Generator, labels: dict) -> np.ndarray:
    """Three to five knuckle strokes on wood, once or twice."""
    modes = rng.uniform(110, 180) * np.array([1, 1.7, 2.6, 4.1, 6.3]) * rng.uniform(0.95, 1.05, 5)
    decays, count = np.array([0.05, 0.04, 0.025, 0.015, 0.01]), int(0.25 * RATE)
    events, now, spacing = [], rng.uniform(0.05, 0.5), rng.uniform(0.15, 0.24)
    for _ in range(rng.integers(1, 3)):
        for _ in range(rng.integers(3, 6)):
            knock = strike(modes, decays, np.array([1, 0.8, 0.6, 0.4, 0.3]) * rng.uniform(0.7, 1.2, 5), count)
            knock += 0.3 * noise(rng, count, 400, 3500) * np.exp(-seconds(count) / 0.005)
            events.append((now, knock * rng.uniform(0.8, 1.1)))
            now += spacing * rng.uniform(0.95, 1.05)
        now += rng.uniform(0.7, 1.5)
    return room(place(events), rng, rng.uniform(0.25, 0.5), rng.uniform(0.08, 0.25))


MAKERS = {
    "siren": siren,
    "alarm clock": alarm_clock,
    "footsteps": footsteps,
    "telephone ring": telephone_ring,
    "dial tone": dial_tone,
    "white noise": white_noise,
    "wind": wind,
    "church bell": church_bell,
    "laser": laser,
    "rising whistle": rising_whistle,
    "falling whistle": falling_whistle,
    "explosion": explosion,
    "bubbling water": bubbling_water,
    "car horn": car_horn,
    "crickets": crickets,
    "door knock": door_knock,
}


def make(clip: Clip) -> np.ndarray:
    """One effect (CLIP,), float32, not yet levelled; half of the clips have faint background noise."""
    rng = clip.generator()
    sound = MAKERS[clip.label](rng, clip.labels)
    if clip.label != "white noise" and rng.uniform() < 0.5:
        floor = np.sqrt((sound**2).mean()) * 10 ** (rng.uniform(-45, -30) / 20)
        sound = sound + floor * noise(rng, high=4000, slope=-3)
    return sound.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, hours=2.0, dev=96, held=160)
    args = parser.parse_args()
    if set(MAKERS) != set(vocabulary()["effects"]):
        raise AssertionError("conf/vocabulary.yaml and effects.py name different effects")
    clips = plan(effect_labels(), counts(args), args.seed)
    render("effects", "effects", clips, make, args.work, args.jobs, LICENCE)


if __name__ == "__main__":
    main()
