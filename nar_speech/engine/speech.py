"""Any stream model together with voice activity detection: speech events, utterances that end by rules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_speech.config import from_dict
from nar_speech.engine.endpoint import (
    CUT,
    STARTED,
    STOPPED,
    EndpointRules,
    EndpointState,
    endpoint_step,
)
from nar_speech.engine.events import Event, SpeechStarted, SpeechStopped
from nar_speech.engine.model import (
    Collector,
    Control,
    EndUtterance,
    SessionOptions,
    StreamModel,
    TwoPassCollector,
)
from nar_speech.errors import ConfigError
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.silero import SAMPLE_RATE, SileroStreamState, SileroVad

SETTING = "endpoint"  # of a session: rules in place of the model's, or False: only the client ends utterances
INNER = "inner."


@dataclass(frozen=True)
class SpeechState:
    """inner: of the model; vad, endpoint: see there."""

    inner: Any
    vad: SileroStreamState
    endpoint: EndpointState


@dataclass(frozen=True)
class SpeechOutput:
    """inner: of the model; marks, times: (B, W), see :func:`endpoint_step`; level: (B,) float32 highest
    probability of speech in the chunk."""

    inner: Any
    marks: Tensor
    times: Tensor
    level: Tensor


class WithVad:
    """A :class:`StreamModel` that also tells when somebody speaks, in the same batched step.

    Sessions get ``SpeechStarted`` and ``SpeechStopped``, and an utterance ends where speech does. Windows of
    the voice activity network are cut from the beginning of the stream and do not care about utterances.
    The model's own commit and endpoints go on working.

    Args:
        model: hears 16 kHz.
        rules: of sessions that do not set ``endpoint`` themselves, as a mapping of fields of
            :class:`EndpointRules`, or False for no endpoints.
    """

    def __init__(self, model: StreamModel, vad: SileroVad, rules: EndpointRules | None = None):
        if model.sample_rate != SAMPLE_RATE:
            raise ConfigError(
                f"sample_rate: voice activity detection needs {SAMPLE_RATE} Hz, the model hears"
                f" {model.sample_rate}"
            )
        self.model, self.rules = model, rules or EndpointRules()
        vad = copy.deepcopy(vad).to(model.device)
        self.vad = pack_linear_layers(vad) if torch.device(model.device).type == "cpu" else vad
        self.sample_rate, self.chunk, self.device = model.sample_rate, model.chunk, torch.device(model.device)
        self.first = getattr(model, "first", model.chunk)
        self.signature = f"{getattr(model, 'signature', '')}+silero"
        self.carried = ("vad", "endpoint", *(INNER + name for name in getattr(model, "carried", ())))

    def init_state(self, slots: int) -> SpeechState:
        """See :class:`StreamModel`."""
        endpoint = EndpointState.begin([self.rules] * slots, self.device)
        return SpeechState(self.model.init_state(slots), self.vad.init_stream(slots, self.device), endpoint)

    def prepare(self, options: SessionOptions) -> SpeechState:
        """The rules of one session."""
        begin = getattr(self.model, "prepare", None)
        inner = self.model.init_state(1) if begin is None else begin(_without_ours(options))
        endpoint = EndpointState.begin([self._rules(options) or self.rules], self.device)
        return SpeechState(inner, self.vad.init_stream(1, self.device), endpoint)

    def step(
        self, audio: Tensor, lengths: Tensor, final: Tensor, state: SpeechState
    ) -> tuple[SpeechOutput, SpeechState]:
        """See :class:`StreamModel`."""
        output, inner = self.model.step(audio, lengths, final, state.inner)
        probabilities, counts, vad = self.vad.step_stream(audio, lengths, state.vad)
        marks, times, endpoint = endpoint_step(probabilities, counts, state.endpoint)
        level = probabilities.amax(1) if probabilities.shape[1] else torch.zeros_like(audio[:, 0])
        return SpeechOutput(output, marks, times, level), SpeechState(inner, vad, endpoint)

    def collector(self, options: SessionOptions) -> Collector:
        """See :class:`StreamModel`; the model's own collector does not see ``endpoint``.

        Raises:
            ConfigError: rules that are wrong.
        """
        ends = self._rules(options) is not None
        inner = self.model.collector(_without_ours(options))
        kind = SpeechTwoPassCollector if isinstance(inner, TwoPassCollector) else SpeechCollector
        return kind(inner, ends)

    def _rules(self, options: SessionOptions) -> EndpointRules | None:
        """What holds for a session; None: no endpoints."""
        wanted = options.settings.get(SETTING)
        if wanted is None:
            return self.rules
        if wanted is False:
            return None
        own = {name: getattr(self.rules, name) for name in self.rules.__dataclass_fields__}
        return from_dict(EndpointRules, {**own, **_mapping(wanted)}, f"settings: {SETTING}")


class SpeechCollector:
    """Tells of speech and passes the rest on. ``ends``: whether utterances end with it."""

    def __init__(self, inner: Collector, ends: bool):
        self.inner, self.ends = inner, ends

    def push(self, row: dict[str, np.ndarray], samples: int, final: bool) -> Sequence[Event | Control]:
        """See :class:`Collector`; speech that began is told before the text of the chunk, its end after."""
        own = {name.removeprefix(INNER): array for name, array in row.items() if name.startswith(INNER)}
        before: list[Event | Control] = []
        after: list[Event | Control] = []
        for mark, time in zip(row["marks"].tolist(), row["times"].tolist(), strict=True):
            if mark == STARTED:
                (after if after else before).append(SpeechStarted(time / SAMPLE_RATE))
            elif mark == STOPPED:
                after.append(SpeechStopped(time / SAMPLE_RATE))
            if mark in (STOPPED, CUT) and self.ends:
                after.append(EndUtterance())
        return [*before, *self.inner.push(own, samples, final), *after]

    def export(self) -> dict[str, Any]:
        """See :class:`Collector`."""
        return self.inner.export()

    def restore(self, data: dict[str, Any]) -> None:
        """See :class:`Collector`."""
        self.inner.restore(data)


class SpeechTwoPassCollector(SpeechCollector):
    """The same around a :class:`TwoPassCollector`."""

    @property
    def needed(self) -> int | None:
        """First sample that a second pass may ask for."""
        return self.inner.needed

    def second(self, tag: Any, result: Any, error: BaseException | None) -> Sequence[Event | Control]:
        """See :class:`TwoPassCollector`."""
        return self.inner.second(tag, result, error)


def _without_ours(options: SessionOptions) -> SessionOptions:
    settings = {name: value for name, value in options.settings.items() if name != SETTING}
    return replace(options, settings=settings)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"settings: {SETTING}: expected a mapping of rules or false, got {value!r}")
    return value
