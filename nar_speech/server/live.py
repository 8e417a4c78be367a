"""What a client of any protocol may wish of a live stream, and the same as settings of the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nar_speech.engine import Final, Partial
from nar_speech.engine.partials import keep_promise
from nar_speech.pipelines.writers import join_texts
from nar_speech.server.api_error import bad_request

MAX_SILENCE, MAX_PADDING = 10.0, 5.0  # seconds
LEAST_THRESHOLD = 0.01  # of the engine's rules
PAD_END = 0.1  # seconds after the last speech that still count as speech


@dataclass(frozen=True)
class Endpoint:
    """When an utterance begins and ends.

    Args:
        threshold: speech probability above which somebody speaks.
        silence: seconds without speech that end an utterance.
        prefix: seconds before speech was noticed that belong to it.
    """

    threshold: float = 0.5
    silence: float = 0.5
    prefix: float = 0.3

    def __post_init__(self) -> None:
        for name, low, high in (
            ("threshold", 0.0, 1.0),
            ("silence", 0.0, MAX_SILENCE),
            ("prefix", 0.0, MAX_PADDING),
        ):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and low <= value <= high):
                raise bad_request(f"{name}: got {value!r}; must be a number from {low:g} to {high:g}", name)


@dataclass(frozen=True)
class Wish:
    """A live stream as its client wants it.

    Args:
        endpoint: None: only the client ends utterances.
        hotwords: words to favour; hints: the same, dropped where the model does not take them.
        two_pass: whether the offline half of the model, if there is one, corrects finished utterances.
        written: whether text in written form (digits, punctuation) is wanted; None: as the model does.
    """

    language: str | None = None
    hotwords: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    endpoint: Endpoint | None = field(default_factory=Endpoint)
    two_pass: bool = True
    written: bool | None = None

    def without_hints(self) -> Wish:
        """The same without what may be dropped."""
        return replace(self, hints=())


def session_settings(wish: Wish, second: dict[str, Any] | None) -> dict[str, Any]:
    """Settings of a session of an ASR stream model, as plain data.

    ``endpoint`` is that of :class:`nar_speech.engine.speech.WithVad`: rules, or False.

    Args:
        second: of the second pass: ``model``, the offline half in the engine, and its ``options``.
    """
    settings: dict[str, Any] = {"endpoint": False}
    if wish.endpoint is not None:
        silence = wish.endpoint.silence
        settings["endpoint"] = {
            "threshold": max(wish.endpoint.threshold, LEAST_THRESHOLD),
            "min_silence": silence,
            "pad_start": wish.endpoint.prefix,
            "pad_end": min(PAD_END, silence),
        }
    if wish.language is not None:
        settings["language"] = wish.language
    if wish.hotwords or wish.hints:
        settings["hotwords"] = list(wish.hotwords or wish.hints)
    if second is not None:
        settings["second_pass"] = second
    return settings


class Appended:
    """Texts of segments as something that only ever grows, for clients that can append and nothing else."""

    def __init__(self) -> None:
        self.segment = -1
        self.sent = ""  # of this segment
        self.before = ""  # the end of what was sent before this segment

    def partial(self, event: Partial) -> str:
        """What to append now: the part of the open segment that will not change, beyond what was sent."""
        return self._grow(event.segment, event.text[: event.stable])

    def final(self, event: Final) -> str:
        """The rest of a segment. What was sent can't be taken back: where the text begins otherwise, this is
        what it has beyond that."""
        sent = self.sent if event.segment == self.segment else ""
        return self._grow(event.segment, keep_promise(sent, event.text))

    def _grow(self, segment: int, text: str) -> str:
        if segment != self.segment:
            self.before = (self.before + self.sent)[-1:]
            self.segment, self.sent = segment, ""
        if not text.startswith(self.sent) or len(text) == len(self.sent):
            return ""
        gap = "" if self.sent else join_texts([self.before, text])[len(self.before) : -len(text)]
        new = gap + text[len(self.sent) :]
        self.sent = text
        return new
