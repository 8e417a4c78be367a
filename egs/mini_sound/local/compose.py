"""Short pieces of music as notes: progressions that end in a cadence, melodies, accompaniment, drums.

What is heard follows the labels: tempo sets the beat (and no note values hide it), happy is major, higher
and bouncy, sad is minor, lower and bound.
"""

from dataclasses import dataclass

import numpy as np
from midi import DRUMS, Note

Generator = np.random.Generator
LENGTH = 5.0  # seconds that are heard

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
# Degrees between the first chord (tonic) and the last two (dominant or subdominant, tonic).
MIDDLE = {"happy": (0, 3, 4, 3, 0), "sad": (0, 3, 5, 3, 4)}

# General MIDI program and the middle of the melody's range.
INSTRUMENTS = {
    "piano": (0, 67),
    "acoustic guitar": (25, 62),
    "strings": (48, 67),
    "flute": (73, 78),
    "trumpet": (56, 70),
    "organ": (16, 67),
    "bass guitar": (33, 38),
    "marimba": (12, 70),
    "music box": (10, 84),
    "synthesizer": (81, 69),
    "choir": (52, 66),
}
BASS = 33
# Velocities that bring the leads of bands to one loudness (FluidR3_GM), about that of the drums.
LEAD = {"piano": 94, "acoustic guitar": 66, "trumpet": 88, "flute": 82, "organ": 76, "synthesizer": 88}
# Note values in beats of one bar of four.
MELODY = {
    "happy": ((1, 0.5, 0.5, 1, 1), (0.5, 0.5, 1, 0.5, 0.5, 1), (1.5, 0.5, 1, 1), (1, 1, 0.5, 0.5, 0.5, 0.5)),
    "sad": ((1, 1, 1, 1), (1.5, 0.5, 1, 1), (1, 1, 1.5, 0.5), (1, 0.5, 0.5, 2)),
}
CHORDS = {"happy": ((1, 1, 1, 1), (1, 0.5, 0.5, 1, 1), (1, 1, 1, 0.5, 0.5)), "sad": ((1, 1, 1, 1), (2, 1, 1))}
STRUMS = ((1, 0.5, 1, 0.5, 0.5, 0.5), (1, 0.5, 0.5, 1, 0.5, 0.5), (1, 1, 0.5, 0.5, 0.5, 0.5))
RIFFS = (
    (0, 0, 4, 0, 0, 4, 7, 4),
    (0, 0, 0, 4, 0, 0, 7, 7),
    (0, 7, 4, 0, 0, 7, 4, 4),
    (0, 0, 2, 4, 0, 0, 4, 2),
)
KICK, SNARE, CLAP, CLOSED, OPEN, CRASH = 36, 38, 39, 42, 46, 49
TOMS = (41, 43, 45, 47, 48, 50)


@dataclass(frozen=True)
class Frame:
    """What all parts of a piece share. `chords` are scale degrees, one for `beats_per_chord` beats."""

    beat: float  # seconds
    start: float
    scale: tuple[int, ...]
    tonic: int  # pitch class
    mood: str
    chords: tuple[int, ...]
    beats_per_chord: int
    swing: float  # beats that an off-beat eighth comes late

    @property
    def beats(self) -> int:
        return len(self.chords) * self.beats_per_chord

    def degree(self, beat: float) -> int:
        """The chord at that beat."""
        return self.chords[min(int(beat / self.beats_per_chord + 1e-6), len(self.chords) - 1)]

    def pitch(self, step: int, raised: bool = False) -> int:
        """Pitch of a scale step counted from the tonic near MIDI 0; step 7 is an octave up."""
        octave, index = divmod(step, 7)
        return self.tonic + 12 * octave + self.scale[index] + int(raised)

    def seconds(self, beat: float) -> float:
        late = self.swing if abs(beat % 1 - 0.5) < 1e-6 else 0.0
        return self.start + (beat + late) * self.beat

    def near(self, degree: int, height: int) -> int:
        """The step of that degree of the scale whose pitch is nearest to `height`."""
        steps = [degree + 7 * octave for octave in range(11)]
        return min(steps, key=lambda step: abs(self.pitch(step) - height))


def new_frame(rng: Generator, bpm: float, mood: str) -> Frame:
    beat = 60 / bpm
    each = 4 if bpm > 130 else 2
    many = max(3, round((LENGTH - 0.1) / beat / each))
    middle = [int(rng.choice(MIDDLE[mood])) for _ in range(many - 3)]
    turn = int(rng.choice([4, 4, 3]))
    swing = float(rng.choice([0, 0, 0.12])) if mood == "happy" and bpm > 80 else 0.0
    scale = MAJOR if mood == "happy" else MINOR
    start, tonic = float(rng.uniform(0.02, 0.1)), int(rng.integers(12))
    return Frame(beat, start, scale, tonic, mood, (0, *middle, turn, 0), each, swing)


class Player:
    """Adds notes as a person would: a little early or late, louder on strong beats, never twice the same."""

    def __init__(self, rng: Generator, frame: Frame, channel: int, loud: float):
        self.rng, self.frame, self.channel, self.loud = rng, frame, channel, loud
        self.touch = rng.uniform(0.7, 0.9) if frame.mood == "happy" else rng.uniform(0.95, 1.05)
        self.notes: list[Note] = []

    def play(self, beat: float, beats: float, pitch: int, accent: float = 0.0, late: float = 0.0) -> None:
        start = self.frame.seconds(beat) + late + self.rng.normal(0, 0.006)
        if start > LENGTH - 0.05:
            return
        strong = 8 if beat % 2 < 1e-6 else (3 if beat % 1 < 1e-6 else -4)
        velocity = self.loud + strong + accent + self.rng.normal(0, 4)
        length = beats * self.frame.beat * self.touch
        self.notes.append(Note(max(start, 0), length, pitch, int(np.clip(velocity, 20, 125)), self.channel))


def rhythm(rng: Generator, frame: Frame, bars: tuple[tuple[float, ...], ...]) -> list[tuple[float, float]]:
    """(beat, note value) through the piece: two bars that take turns, as in a phrase and its answer."""
    chosen = [bars[i] for i in rng.integers(len(bars), size=2)]
    out, now, bar = [], 0.0, 0
    while now < frame.beats:
        for value in chosen[bar % 2]:
            if now < frame.beats:
                out.append((now, value))
            now += value
        bar += 1
    return out


def chord_steps(frame: Frame, degree: int, height: int) -> list[int]:
    """A triad in the position nearest to `height`."""
    return sorted(frame.near(degree + third, height) for third in (0, 2, 4))


def leading(frame: Frame, degree: int, step: int) -> bool:
    """Whether the note is the leading tone of the dominant, which minor raises."""
    return frame.scale is MINOR and degree == 4 and step % 7 == 6


def melody(player: Player, height: int) -> None:
    """Steps and small leaps; chord notes on strong beats; the last note is the tonic."""
    rng, frame = player.rng, player.frame
    step = frame.near(int(rng.choice([0, 2, 4])), height)
    beats = rhythm(rng, frame, MELODY[frame.mood])
    beats = [(beat, value) for beat, value in beats if frame.seconds(beat) < LENGTH - 0.3]
    for number, (beat, value) in enumerate(beats):
        degree = frame.degree(beat)
        pull = np.sign(height - frame.pitch(step)) * (abs(height - frame.pitch(step)) > 6)
        move = int(rng.choice([-2, -1, -1, 0, 1, 1, 2, 3])) + int(pull)
        step += move
        if number == len(beats) - 1:
            step, value = frame.near(0, frame.pitch(step)), 2.0
        elif beat % 2 < 1e-6 or move in (-2, 3):
            step = min(chord_steps(frame, degree, frame.pitch(step)), key=lambda s: abs(s - step))
        player.play(beat, value, frame.pitch(step, leading(frame, degree, step)), accent=4)


def chords(player: Player, height: int, instrument: str) -> None:
    """Chords in a steady rhythm; the guitar strums them, keyboards add a bass note."""
    rng, frame = player.rng, player.frame
    guitar = instrument == "acoustic guitar"
    beats = rhythm(rng, frame, STRUMS if guitar else CHORDS[frame.mood])
    for number, (beat, value) in enumerate(beats):
        degree = frame.degree(beat)
        steps = chord_steps(frame, degree, height)
        pitches = [frame.pitch(step, leading(frame, degree, step)) for step in steps]
        if guitar:
            root = frame.pitch(frame.near(degree, height - 14))
            pitches = sorted({root, root + 7, *pitches, pitches[0] + 12})
            up = number % 2 == 1 and value < 1
            spread = rng.uniform(0.010, 0.020)
            for place, pitch in enumerate(reversed(pitches) if up else pitches):
                player.play(beat, value, pitch, accent=-6 if up else 0, late=place * spread)
            continue
        if instrument == "piano" and beat % 2 < 1e-6:
            player.play(beat, 2, frame.pitch(frame.near(degree, height - 19)), accent=4)
        for pitch in pitches:
            player.play(beat, value, pitch)


def arpeggio(player: Player, height: int, instrument: str) -> None:
    """Broken chords in eighths: up, up and down, or low-high-middle-high."""
    rng, frame = player.rng, player.frame
    wide = instrument in ("piano", "acoustic guitar")
    order = ((0, 1, 2, 3), (0, 1, 2, 3, 2, 1), (0, 2, 1, 2), (0, 2, 1, 3))[rng.integers(4)]
    place, last = 0, None
    for half in range(2 * frame.beats):
        beat = half / 2
        degree = frame.degree(beat)
        if beat % frame.beats_per_chord < 1e-6 and degree != last:
            place, last = 0, degree
        steps = chord_steps(frame, degree, height)
        steps = [frame.near(degree, height - 12), *steps] if wide else [*steps, steps[0] + 7]
        step = steps[order[place % len(order)]]
        place += 1
        sounding = 1.5 if wide and frame.mood == "sad" else 0.5
        if half == 2 * frame.beats - 1 or frame.seconds(beat + 0.5) > LENGTH - 0.3:
            player.play(beat, 2, frame.pitch(frame.near(0, frame.pitch(step))))
            return
        player.play(beat, sounding, frame.pitch(step, leading(frame, degree, step)))


def riff(player: Player, height: int) -> None:
    """A bass line in eighths: the same figure over every chord."""
    rng, frame = player.rng, player.frame
    figure = RIFFS[rng.integers(len(RIFFS))]
    hold = set(rng.choice([1, 3, 5, 7], size=int(rng.integers(1, 3)), replace=False).tolist())
    for half in range(2 * frame.beats):
        if half % 8 in hold:
            continue
        beat, degree = half / 2, frame.degree(half / 2)
        step = frame.near(degree, height) + figure[half % 8]
        longer = 1.0 if (half + 1) % 8 in hold else 0.5
        player.play(beat, longer, frame.pitch(step, leading(frame, degree, step)))


def rock(beat: float, rng: Generator) -> list[tuple[int, float]]:
    hits = [(CLOSED, -14.0)]
    if beat % 4 in (0, 2) or (beat % 4 == 2.5 and rng.uniform() < 0.6):
        hits.append((KICK, 10.0))
    if beat % 4 in (1, 3):
        hits.append((SNARE, 8.0))
    if beat == 0:
        hits.append((CRASH, 0.0))
    return hits


def disco(beat: float, rng: Generator) -> list[tuple[int, float]]:
    if beat % 1 == 0.5:
        return [(OPEN, 0.0)]
    hits = [(KICK, 12.0), (CLOSED, -12.0)]
    return [*hits, (SNARE, 4.0), (CLAP, 0.0)] if beat % 2 == 1 else hits


def tom_figure(rng: Generator) -> list[list[tuple[int, float]]]:
    """One bar of eighths on the toms."""
    low, others = TOMS[int(rng.integers(2))], rng.choice(TOMS[2:], 3, replace=False)
    bar = []
    for half in range(8):
        if half % 4 == 0:
            bar.append([(low, 14.0)])
        elif rng.uniform() < 0.8:
            bar.append([(int(rng.choice(others)), 2.0)])
        else:
            bar.append([(low, -6.0)])
    return bar


def drums(player: Player, beat_name: str) -> None:
    """A drum beat in eighths: rock beat, disco beat, tom beat or snare march."""
    rng, frame = player.rng, player.frame
    toms = tom_figure(rng)
    rolls = set(rng.choice([1, 3, 5, 7], 2, replace=False).tolist())
    for half in range(int(2 * LENGTH / frame.beat) + 1):
        beat = half / 2
        if beat_name == "snare march":
            if half % 8 in rolls:  # a drag: three quick strokes
                for third in range(3):
                    player.play(beat + third / 6, 0.2, SNARE, accent=-16)
            else:
                player.play(beat, 0.4, SNARE, accent=14 if half % 4 == 0 else 0)
                if half % 8 == 0:  # a flam
                    player.play(beat, 0.2, SNARE, accent=-25, late=-0.03)
            continue
        if beat_name == "tom beat":
            hits = toms[half % 8]
        else:
            hits = {"rock beat": rock, "disco beat": disco}[beat_name](beat, rng)
        for key, accent in hits:
            player.play(beat, 0.4, key, accent)


def range_of(instrument: str, mood: str) -> int:
    """Middle of the range: sad music lies lower."""
    shift = {"bass guitar": (2, 0), "music box": (2, -6)}.get(instrument, (3, -4))
    return INSTRUMENTS[instrument][1] + shift[0 if mood == "happy" else 1]


def perform(player: Player, instrument: str, pattern: str) -> list[Note]:
    height = range_of(instrument, player.frame.mood)
    if pattern == "melody":
        melody(player, height)
    elif pattern == "chords":
        chords(player, height, instrument)
    elif pattern == "arpeggio":
        arpeggio(player, height, instrument)
    elif pattern == "riff":
        riff(player, height)
    else:
        raise ValueError(f"pattern {pattern!r}")
    return player.notes


def compose(rng: Generator, labels: dict[str, str], bpm: float) -> tuple[list[Note], dict[int, int]]:
    """Notes of five seconds and the programs of their channels, for labels of captions.music_labels()."""
    frame = new_frame(rng, bpm, labels.get("mood", "happy"))
    if labels["form"] == "drums":
        player = Player(rng, frame, DRUMS, 92)
        drums(player, labels["beat"])
        return player.notes, {}
    instrument = labels["instrument"]
    program = INSTRUMENTS[instrument][0]
    if labels["form"] == "solo":
        return perform(Player(rng, frame, 0, 86), instrument, labels["pattern"]), {0: program}
    accompanies = instrument in ("piano", "acoustic guitar", "organ") and rng.uniform() < 0.5
    pattern = "chords" if accompanies else "melody"
    notes = perform(Player(rng, frame, 0, LEAD[instrument]), instrument, pattern)
    bass, drummer = Player(rng, frame, 1, 90), Player(rng, frame, DRUMS, 106)
    riff(bass, range_of("bass guitar", frame.mood))
    drums(drummer, str(rng.choice(["rock beat", "disco beat"])))
    return notes + bass.notes + drummer.notes, {0: program, 1: BASS}
