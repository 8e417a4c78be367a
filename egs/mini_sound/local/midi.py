"""Notes to a Standard MIDI File (format 0) whose tick is a millisecond."""

import struct
from dataclasses import dataclass

DRUMS = 9  # the channel of percussion in General MIDI


@dataclass(frozen=True)
class Note:
    """`start` and `length` in seconds, `pitch` 0 to 127 (60 is middle C), `velocity` 1 to 127."""

    start: float
    length: float
    pitch: int
    velocity: int
    channel: int = 0


def variable_length(number: int) -> bytes:
    """A MIDI variable-length quantity: seven bits a byte, highest first, all but the last with bit 7."""
    out = [number & 127]
    while number := number >> 7:
        out.append((number & 127) | 128)
    return bytes(reversed(out))


def midi_file(notes: list[Note], programs: dict[int, int], end: float) -> bytes:
    """The file of `end` seconds; `programs` maps channels to General MIDI programs counted from 0."""
    events = [(0, 0, bytes([0xC0 | channel, program])) for channel, program in programs.items()]
    again: dict[tuple[int, int], int] = {}  # where a key is pressed the next time
    for note in sorted(notes, key=lambda note: -note.start):
        first = max(round(note.start * 1000), 0)
        last = first + max(round(note.length * 1000), 10)
        # The key of a repeated note is let go before, or the end of the first would silence the second.
        last = min(last, max(again.get((note.channel, note.pitch), last + 5) - 5, first + 1))
        again[note.channel, note.pitch] = first
        pitch, velocity = min(max(note.pitch, 0), 127), min(max(note.velocity, 1), 127)
        # At the same tick a key is let go before it is pressed again.
        events.append((first, 2, bytes([0x90 | note.channel, pitch, velocity])))
        events.append((last, 1, bytes([0x80 | note.channel, pitch, 0])))
    events.sort()
    # Nothing rings on after the end: FluidSynth would render it to the last of it.
    events = [event for event in events if event[0] < round(end * 1000)]
    events += [(round(end * 1000), 3, bytes([0xB0 | channel, 120, 0])) for channel in {*programs, DRUMS}]
    events.append((round(end * 1000), 4, b"\xff\x2f\x00"))
    track, now = b"\x00\xff\x51\x03" + (500_000).to_bytes(3, "big"), 0  # 500 ticks in 0.5 s
    for time, _, message in events:
        track += variable_length(time - now) + message
        now = time
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 500) + b"MTrk" + struct.pack(">I", len(track)) + track
