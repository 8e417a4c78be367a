"""Other words in a recording: what is around them stays, sample by sample, and they are made in its voice.

The recording is transcribed with the times of its words. The codes of the words that go are masked and made
anew by the networks, which see all codes around them (in-painting; MaskGCT, section 4.4, "speech editing").
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nar_speech.audio import AudioSource, info, read_audio, resample
from nar_speech.errors import ConfigError, InputError
from nar_speech.pipelines.join import replace_part
from nar_speech.pipelines.speech_codes import Piece, make_codes
from nar_speech.pipelines.speech_length import check_frames, count_sounds, frames_for
from nar_speech.pipelines.speech_options import SynthesisConfig, change
from nar_speech.pipelines.speech_text import DIRECT, check_text
from nar_speech.pipelines.transcribe import name_of
from nar_speech.pipelines.voice import SILENCE, hold, loudest
from nar_speech.pipelines.watermark import add_watermark, load_watermark
from nar_speech.text.g2p.scripts import script_of
from nar_speech.text.realign import bare, retime
from nar_speech.types import Audio, Word

if TYPE_CHECKING:
    from nar_speech.pipelines.synthesize import Synthesizer

MAX_SECONDS = 3600.0
CONTEXT_SECONDS = 8.0  # on either side of the words that the networks see
LEAST_CONTEXT = 0.5  # of both sides together, or there is no voice to go by
MARGIN_SECONDS = 0.1  # of the pauses around the words that is made anew, at most half of them
MAX_PART_SECONDS = 12.0  # of the words that go
FADE_SECONDS = 0.02
HEARD = 60  # characters of a transcript in a message

Progress = Callable[[int, int], None]  # calls of the networks done, and at most


@dataclass(frozen=True)
class EditResult:
    """A recording with other words in it.

    Attributes:
        audio: float32, with the rate and channels of the recording; outside of ``start`` to ``end`` its
            samples are those of the recording.
        transcript: what it says now.
        start, end: of what is new, in seconds of the result.
        old_start, old_end: of what has gone, in seconds of the recording.
        seed: gives the same edit again.
        watermarked: whether what is new is marked as made by a machine.
        seconds: time of ``hearing``, ``sampling`` and ``decoding``.
    """

    audio: Audio
    transcript: str
    start: float
    end: float
    old_start: float
    old_end: float
    seed: int
    watermarked: bool
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Place:
    """Words ``first`` to ``last`` (exclusive), their time and the time that the networks see, in seconds."""

    first: int
    last: int
    start: float
    end: float
    seen: tuple[float, float]
    words: tuple[int, int]  # that lie in it


@torch.inference_mode()
def edit_speech(
    synthesizer: Synthesizer,
    source: AudioSource,
    old: str,
    new: str,
    *,
    transcript: str | None = None,
    occurrence: int | None = None,
    duration: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> EditResult:
    """Let a recording say ``new`` where it says ``old``.

    Args:
        synthesizer: with a transcriber that gives times of words.
        source: see :func:`nar_speech.audio.read_audio`; a bare array has the rate of the codec.
        old: some of the words, whole ones; case and punctuation don't matter.
        new: what is to be heard in their place.
        transcript: all of what the recording says; None: what the transcriber hears.
        occurrence: which one, from 1, where ``old`` is said several times.
        duration: seconds of the new words; None: as long as the old ones by the number of phones.
        progress: called after every call of a network.
        options: fields of :class:`nar_speech.pipelines.speech_options.SynthesisConfig`.

    Raises:
        InputError: words that aren't in the recording or are in it several times, a recording that can't be
            used, an impossible duration. ConfigError: wrong options. MissingExtraError: a package that a
            language or the watermark needs is not installed.
    """
    config = change(synthesizer.config, options)
    for text, what in ((old, "from"), (new, "to"), (transcript, "transcript")):
        if text is not None:
            check_text(text, config.language, what)
    if config.language == DIRECT:
        raise ConfigError("language: an edit takes words, not phones")
    if config.watermark:
        load_watermark()  # what is missing is said before the work
    started = time.perf_counter()
    held = hold(source, synthesizer.sample_rate)
    recording = _read(held, name_of(source))
    words = _hear(synthesizer, held, transcript)
    place = find_words(words, old, recording.duration, occurrence)
    times = {"hearing": time.perf_counter() - started}
    window = _Window.of(synthesizer, held, place)
    frames = _frames(synthesizer, window, old, new, duration, config)
    texts = [words[i].text for i in range(*place.words)]
    texts[place.first - place.words[0] : place.last - place.words[0]] = [new]
    phones = torch.tensor(synthesizer.reader(join_words(texts), config.language))
    started = time.perf_counter()
    done, most = 0, config.steps + config.acoustic_calls(synthesizer.parts.networks.layers)

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, most)

    piece = window.piece(phones, frames)
    draws = [torch.Generator(synthesizer.device).manual_seed(_checked(seed))]
    _, made = make_codes(
        synthesizer.parts.networks, [piece], draws, config, None if progress is None else step
    )
    times["sampling"] = time.perf_counter() - started
    started = time.perf_counter()
    part = _sound(synthesizer, window, made[0], frames, config, recording.sample_rate)
    begin, end = (
        min(round((place.seen[0] + frame / window.rate) * recording.sample_rate), _size(recording))
        for frame in (window.begin, window.end)
    )
    samples, _ = replace_part(
        np.atleast_2d(recording.samples), part, begin, end, round(FADE_SECONDS * recording.sample_rate)
    )
    times["decoding"] = time.perf_counter() - started
    said = [*(w.text for w in words[: place.first]), new, *(w.text for w in words[place.last :])]
    rate = recording.sample_rate
    audio = Audio(samples[0] if recording.samples.ndim == 1 else samples, rate)
    return EditResult(
        *(audio, join_words(said), begin / rate, (begin + len(part)) / rate, begin / rate, end / rate),
        *(seed, config.watermark, times),
    )


def find_words(words: Sequence[Word], old: str, duration: float, occurrence: int | None = None) -> _Place:
    """Where ``old`` is said.

    Args:
        words: of the recording. duration: of it, in seconds.
        occurrence: which one, from 1.

    Raises:
        InputError: nowhere, several times and none is chosen, or there is nothing else.
    """
    wanted, heard = _split(old), [bare(word.text) for word in words]
    size = len(wanted)
    places = [i for i in range(len(heard) - size + 1) if heard[i : i + size] == wanted]
    said = join_words([word.text for word in words])
    shown = said if len(said) <= HEARD else f"{said[:HEARD]}..."
    if not places:
        raise InputError(
            f"from: '{old}' is not said in the recording, in which was heard: '{shown}'; give words of it, or"
            " its transcript"
        )
    if occurrence is None and len(places) > 1:
        raise InputError(f"from: '{old}' is said {len(places)} times; choose one with occurrence, from 1")
    number = 1 if occurrence is None else occurrence
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(places):
        raise InputError(f"occurrence: got {occurrence}; '{old}' is said {len(places)} times")
    first, last = places[number - 1], places[number - 1] + size
    before = words[first - 1].end if first else 0.0
    after = words[last].start if last < len(words) else duration
    start = words[first].start - min(max(words[first].start - before, 0.0) / 2, MARGIN_SECONDS)
    end = words[last - 1].end + min(max(after - words[last - 1].end, 0.0) / 2, MARGIN_SECONDS)
    start, end = max(start, 0.0), min(max(end, start), duration)
    # Between which words may what is seen begin and end?
    gaps = [0.0, *((a.end + b.start) / 2 for a, b in itertools.pairwise(words)), duration]
    left = next(i for i in range(first + 1) if gaps[i] >= start - CONTEXT_SECONDS or i == first)
    right = next(i for i in range(len(words), last - 1, -1) if gaps[i] <= end + CONTEXT_SECONDS or i == last)
    seen = (
        min(max(gaps[left], start - CONTEXT_SECONDS), start),
        max(min(gaps[right], end + CONTEXT_SECONDS), end),
    )
    if end - start > MAX_PART_SECONDS:
        raise InputError(
            f"from: '{old[:HEARD]}' lasts {end - start:.1f} s; at most {MAX_PART_SECONDS:g} s are replaced at"
            " once"
        )
    if start - seen[0] + seen[1] - end < LEAST_CONTEXT:
        raise InputError(
            f"from: next to nothing of the recording stays beside '{old}'; use it as a prompt of synthesize"
        )
    return _Place(first, last, start, end, seen, (left, right))


@dataclass(frozen=True)
class _Window:
    """Codes of what the networks see: (T,) and (T, K), of which frames ``begin`` to ``end`` go."""

    semantic: Tensor
    acoustic: Tensor
    begin: int
    end: int
    rate: float  # frames per second

    @classmethod
    def of(cls, synthesizer: Synthesizer, held: AudioSource, place: _Place) -> _Window:
        """Of the part of a recording around a place in it."""
        codec, features = synthesizer.parts.codec, synthesizer.parts.features
        seconds = place.seen[1] - place.seen[0]
        low, high = (
            read_audio(held, rate, start=place.seen[0], duration=seconds).samples
            for rate in (features.sample_rate, codec.sample_rate)
        )
        semantic, acoustic = synthesizer.encode(low, high)
        size, rate = min(len(semantic), len(acoustic)), features.frame_rate
        begin = min(int((place.start - place.seen[0]) * rate), size - 1)
        end = min(max(math.ceil((place.end - place.seen[0]) * rate), begin + 1), size)
        return cls(semantic[:size], acoustic[:size], begin, end, rate)

    def piece(self, phones: Tensor, frames: int) -> Piece:
        """What is left of the words is the prompt, what is right of them is given."""
        mask = self.semantic.new_full((frames,), -1)
        layers = self.acoustic.shape[1]
        return Piece(
            phones,
            self.semantic[: self.begin],
            self.acoustic[: self.begin],
            frames + len(self.semantic) - self.end,
            torch.cat([mask, self.semantic[self.end :]]),
            torch.cat([mask.expand(layers, -1), self.acoustic[self.end :].T], 1),
        )


def join_words(texts: Sequence[str]) -> str:
    """Words in a row: a space between two, but not between Chinese or Japanese characters."""
    said = ""
    for text in texts:
        tight = said and text and {script_of(said[-1]), script_of(text[0])} <= {"Han", "Kana"}
        said += text if tight or not said else f" {text}"
    return said


def _split(text: str) -> list[str]:
    """Words of a text without case and punctuation; Chinese and Japanese characters one by one."""
    spaced = "".join(f" {c} " if script_of(c) in ("Han", "Kana") else c for c in text)
    return [bare(word) for word in spaced.split()]


def _read(held: AudioSource, name: str) -> Audio:
    """A recording in its own rate and channels."""
    if isinstance(held, Audio):
        rate = held.sample_rate
    else:
        rate = held[1] if isinstance(held, tuple) else info(held).sample_rate
    recording = read_audio(held, rate, mono=False, duration=MAX_SECONDS + 1)
    if recording.duration > MAX_SECONDS:
        raise InputError(f"{name}: longer than {MAX_SECONDS / 60:g} minutes; cut it")
    if loudest(np.atleast_2d(recording.samples).mean(0), rate) < SILENCE:
        raise InputError(f"{name}: is silent; give a recording of speech")
    return recording


def _hear(synthesizer: Synthesizer, held: AudioSource, transcript: str | None) -> list[Word]:
    """Words with times: heard ones, or those of a transcript at the times of what was heard."""
    rate = synthesizer.parts.features.sample_rate
    audio = read_audio(held, rate)
    heard = synthesizer.transcriber(audio).words
    if transcript is None:
        return list(heard)
    texts = "".join(f" {c} " if script_of(c) in ("Han", "Kana") else c for c in transcript).split()
    return list(retime(texts, [1.0] * len(texts), heard, audio.duration))


def _frames(
    synthesizer: Synthesizer,
    window: _Window,
    old: str,
    new: str,
    duration: float | None,
    config: SynthesisConfig,
) -> int:
    """Frames of the new words."""
    ids = synthesizer.reader(new, config.language, "to")
    if duration is not None:
        number = isinstance(duration, int | float) and not isinstance(duration, bool)
        if not number or not 0 < duration < float("inf"):
            raise InputError(f"duration: got {duration}; must be seconds above 0")
        if config.speed != 1:
            raise ConfigError("speed: has no say where a duration is given; leave one of them out")
        seconds = duration
    elif config.length == "rate":
        seconds = len(ids) / config.phones_per_second / config.speed
    else:
        share = len(ids) / len(synthesizer.reader(old, config.language, "from"))
        seconds = (window.end - window.begin) / window.rate * share / config.speed
    frames = max(frames_for(seconds, window.rate), 1)
    check_frames(frames, window.rate, count_sounds(ids, synthesizer.reader.vocabulary), True)
    return frames


def _sound(
    synthesizer: Synthesizer,
    window: _Window,
    made: Tensor,
    frames: int,
    config: SynthesisConfig,
    rate: int,
) -> np.ndarray:
    """Samples (M,) of the new words in the rate of the recording, decoded together with what is around."""
    whole = torch.cat([window.acoustic[: window.begin].T, made], 1)
    sound = synthesizer.decode(whole)
    own = synthesizer.sample_rate
    if config.watermark:
        sound = add_watermark(sound, own)
    begin, end = (round(frame / window.rate * rate) for frame in (window.begin, window.begin + frames))
    return resample(sound, own, rate)[begin:end]


def _size(recording: Audio) -> int:
    return recording.samples.shape[-1]


def _checked(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed: got {seed!r}; must be a whole number from 0")
    return seed
