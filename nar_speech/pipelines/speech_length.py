"""How long speech becomes: the rules, and what is too short or too long for a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from nar_speech.errors import ConfigError, InputError
from nar_speech.pipelines.speech_options import SynthesisConfig
from nar_speech.pipelines.voice import Voice
from nar_speech.text.g2p.marks import MARKS
from nar_speech.text.g2p.vocabulary import WORD_GAP, PhoneVocabulary

FASTEST = 30.0  # sounds per second: nobody speaks faster, and a model only swallows them
MAX_PIECE_SECONDS = 60.0  # of what is made at once


class LengthPredictor(Protocol):
    """A model's predictor of durations."""

    def __call__(
        self,
        prompt: Sequence[int],
        prompt_seconds: float,
        phones: Sequence[int],
        generator: torch.Generator,
    ) -> float:
        """Seconds of ``phones`` in the manner of a prompt of these phones and this length."""


def count_sounds(phones: Sequence[int], vocabulary: PhoneVocabulary) -> int:
    """Phones that take time to say: neither marks nor gaps between words."""
    silent = {number for number, phone in enumerate(vocabulary.phones) if phone in MARKS or phone == WORD_GAP}
    return sum(phone not in silent for phone in phones)


def seconds_for(
    voice: Voice,
    phones: Sequence[int],
    config: SynthesisConfig,
    generator: torch.Generator,
    predictor: LengthPredictor | None = None,
) -> float:
    """Seconds of ``phones`` in a voice by the rule that ``config`` names, at its speed.

    Args:
        generator: for what the predictor draws.

    Raises:
        InputError: a prompt without phones, whose speed is not known. ConfigError: no predictor.
    """
    if config.length == "predictor":
        if predictor is None:
            raise ConfigError("length: this model has no predictor of durations; use 'prompt' or 'rate'")
        seconds = predictor(voice.phones, voice.seconds, phones, generator)
    elif config.length == "rate":
        seconds = len(phones) / config.phones_per_second
    elif not voice.phones:
        raise InputError("prompt text: has no phones, so its speed is not known; give a duration")
    else:  # in the official order, so that its roundings are the same
        seconds = voice.samples * len(phones) / len(voice.phones) / voice.sample_rate
    return seconds / config.speed


def frames_for(seconds: float, frame_rate: float) -> int:
    """Whole frames in ``seconds``, rounded down as officially."""
    return int(seconds * frame_rate)


def check_frames(frames: int, frame_rate: float, sounds: int, given: bool) -> None:
    """Whether a text of so many sounds can be said in so many frames.

    Args:
        given: whether the length was asked for, and not told by a rule.

    Raises:
        InputError: it can't, or it is more than is made at once.
    """
    seconds, least = frames / frame_rate, sounds / FASTEST
    if frames < 1 or seconds < least:
        hint = "make it longer" if given else "is the prompt's text what it says? Else give a duration"
        raise InputError(
            f"duration: {seconds:.2f} s are too short for {sounds} sounds, which need {least:.2f} s; {hint}"
        )
    if seconds > MAX_PIECE_SECONDS:
        hint = "give less, or a longer text" if given else "is the prompt's text what it says?"
        raise InputError(
            f"duration: {seconds:.1f} s for {sounds} sounds, of which at most {MAX_PIECE_SECONDS:g} s are"
            f" made at once; {hint}"
        )
