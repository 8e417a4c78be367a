"""Where utterances begin and end: rules on speech probabilities, and on what the decoder finds.

Every stream is a row of tensors, its rules included, so one call serves a whole batch, inside a captured
graph too. Times are counted in windows of the voice activity network, or in samples of stream time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nar_speech.config import check_range
from nar_speech.errors import ConfigError
from nar_speech.layers.silero import SAMPLE_RATE, WINDOW

NOTHING, STARTED, STOPPED, CUT = range(4)  # marks
SECONDS = WINDOW / SAMPLE_RATE
NEVER = 2**40  # windows
LEAST = 0.01  # probability; below it is silence whatever the rules say


@dataclass(frozen=True)
class EndpointRules:
    """When somebody has begun to speak and when he has ended. Times in seconds.

    Args:
        threshold: from this probability on a window is speech.
        hysteresis: silence begins below ``threshold - hysteresis``, which counts as 0.01 at least, and lasts
            until a window is speech.
        min_speech: shorter speech is ignored.
        min_silence: so much silence ends the utterance.
        pad_start: how long before its first window speech is said to have begun.
        pad_end: how long after its last window it is said to have ended; at most ``min_silence``.
        max_utterance: speech of this length is cut, 0 for never; it goes on as the next utterance.
    """

    threshold: float = 0.5
    hysteresis: float = 0.15
    min_speech: float = 0.1
    min_silence: float = 0.5
    pad_start: float = 0.3
    pad_end: float = 0.1
    max_utterance: float = 20.0

    def __post_init__(self) -> None:
        check_range(self, 0.01, 1.0, "threshold")
        check_range(self, 0.0, 1.0, "hysteresis")
        check_range(self, 0.0, 3600.0, "min_speech", "min_silence", "pad_start", "pad_end", "max_utterance")
        if self.pad_end > self.min_silence:
            raise ConfigError(
                f"pad_end: got {self.pad_end:g}; must not exceed min_silence {self.min_silence:g}"
            )
        if self.max_utterance and self.max_utterance < max(4 * self.min_speech, 1.0):
            raise ConfigError(
                f"max_utterance: got {self.max_utterance:g}; must be 0 or at least 1 second and 4 times"
                " min_speech"
            )


@dataclass(frozen=True)
class RuleRows:
    """:class:`EndpointRules` of many streams, each field (B,).

    on, off: probabilities, float32. min_speech, min_silence, longest: windows, int64. pad_start, pad_end:
    samples, int64.
    """

    on: Tensor
    off: Tensor
    min_speech: Tensor
    min_silence: Tensor
    longest: Tensor
    pad_start: Tensor
    pad_end: Tensor

    @classmethod
    def of(cls, rules: Sequence[EndpointRules], device: torch.device | str = "cpu") -> RuleRows:
        """A row for each of the rules."""

        def row(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def windows(seconds: float) -> int:
            return max(round(seconds / SECONDS), 1)

        return cls(
            row([r.threshold for r in rules], torch.float32),
            row([max(r.threshold - r.hysteresis, LEAST) for r in rules], torch.float32),
            row([windows(r.min_speech) for r in rules], torch.int64),
            row([windows(r.min_silence) for r in rules], torch.int64),
            row([windows(r.max_utterance) if r.max_utterance else NEVER for r in rules], torch.int64),
            row([round(r.pad_start * SAMPLE_RATE) for r in rules], torch.int64),
            row([round(r.pad_end * SAMPLE_RATE) for r in rules], torch.int64),
        )


@dataclass(frozen=True)
class EndpointState:
    """Of many streams, each field (B,).

    position: int64 windows judged so far. onset: int64 first window of the speech under way, -1 without.
    quiet: int64 first window of the silence in it, -1 without. sure: bool, whether it is long enough and its
    beginning was told. ended: int64 sample where the last speech was said to end.
    """

    rules: RuleRows
    position: Tensor
    onset: Tensor
    quiet: Tensor
    sure: Tensor
    ended: Tensor

    @classmethod
    def begin(cls, rules: Sequence[EndpointRules], device: torch.device | str = "cpu") -> EndpointState:
        """Streams that begin, one for each of the rules."""

        def rows(value: int) -> Tensor:
            return torch.full((len(rules),), value, dtype=torch.int64, device=device)

        return cls(RuleRows.of(rules, device), rows(0), rows(-1), rows(-1), rows(0).bool(), rows(0))


def endpoint_step(
    probabilities: Tensor, counts: Tensor, state: EndpointState
) -> tuple[Tensor, Tensor, EndpointState]:
    """Judge the next windows of every stream.

    Args:
        probabilities: (B, W) of speech; counts: (B,) int64, how many are valid.

    Returns:
        (B, W) int64 marks, made with each window: NOTHING, STARTED (speech), STOPPED (by silence), CUT (too
        long; speech goes on with the next window); (B, W) int64 samples of stream time where that was; the
        next state.
    """
    rules, marks, times = state.rules, [], []
    position, onset, quiet = state.position, state.onset, state.quiet
    sure, ended = state.sure, state.ended
    for t in range(probabilities.shape[1]):
        valid, p = counts > t, probabilities[:, t]
        loud = valid & (p >= rules.on)
        onset = torch.where(loud & (onset < 0), position, onset)
        speaking = onset >= 0
        quiet = torch.where(loud, -1, quiet)
        quiet = torch.where(valid & speaking & (quiet < 0) & (p < rules.off), position, quiet)
        next_position = position + valid
        length = next_position - onset
        started = valid & speaking & ~sure & (quiet < 0) & (length >= rules.min_speech)
        silent = valid & (quiet >= 0) & (next_position - quiet >= rules.min_silence)
        sure = sure | started
        stopped = silent & sure
        cut = valid & speaking & sure & ~silent & (length >= rules.longest)
        mark = started * STARTED + stopped * STOPPED
        marks.append(torch.where(cut, CUT, mark))
        begin = torch.maximum(onset * WINDOW - rules.pad_start, ended)
        end = torch.minimum(quiet * WINDOW + rules.pad_end, next_position * WINDOW)
        time = started * begin + stopped * end
        time = torch.where(cut, next_position * WINDOW, time)
        times.append(time)
        ended = torch.where(stopped | cut, time, ended)
        # Speech that is cut goes on at once; it needs neither proof nor a new beginning.
        onset = torch.where(cut, next_position, torch.where(silent, -1, onset))
        quiet = torch.where(cut | silent, -1, quiet)
        sure = sure & ~silent
        position = next_position
    if not marks:
        empty = counts.new_zeros(len(counts), 0)
        return empty, empty, state
    after = EndpointState(rules, position, onset, quiet, sure, ended)
    return torch.stack(marks, 1), torch.stack(times, 1), after


@dataclass(frozen=True)
class SilenceRule:
    """A rule on the decoder's own silence (Kaldi's online endpointing). Times in seconds.

    It fires where something was decoded, or need not be (``spoken`` False), at least ``silence`` have passed
    since the last token, and the utterance is at least ``length`` long.
    """

    spoken: bool
    silence: float
    length: float

    def __post_init__(self) -> None:
        check_range(self, 0.0, 3600.0, "silence", "length")


KALDI_RULES = (SilenceRule(False, 2.4, 0.0), SilenceRule(True, 1.2, 0.0), SilenceRule(False, 0.0, 20.0))


def silence_rule(spoken: Any, silence: Any, length: Any, rules: Sequence[SilenceRule] = KALDI_RULES) -> Any:
    """The number of the first rule that fires, from 1 on; 0 for none.

    Args:
        spoken: (B,) bool, whether the utterance has a token.
        silence: (B,) seconds since the last token, or since the utterance began.
        length: (B,) seconds of the utterance. All three numpy arrays or all tensors.
    """
    fired = (length < 0) * 0
    for number, rule in zip(range(len(rules), 0, -1), reversed(rules), strict=True):
        fires = (silence >= rule.silence) & (length >= rule.length)
        if rule.spoken:
            fires = fires & spoken
        fired = fires * number + ~fires * fired
    return fired
