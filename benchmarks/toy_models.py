"""A small deterministic streaming network and a batch model, to exercise the engine without weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nar_speech.engine import EndUtterance, Event, Final, Partial, SecondPass, SessionOptions
from nar_speech.errors import ConfigError, InputError

HOP, WINDOW, LETTERS = 80, 128, 26
ERROR_LEVEL, NAN_LEVEL = 8.0, 4.0  # samples above make the step raise, or the state NaN


@dataclass(frozen=True)
class ToyState:
    """tail (B, 48) last samples; hidden (B, D); frames (B,) of the utterance; total (B,) of the stream;
    shift (B,): a session's option, added to every letter. ``total`` and ``shift`` are carried."""

    tail: Tensor
    hidden: Tensor
    frames: Tensor
    total: Tensor
    shift: Tensor


@dataclass(frozen=True)
class ToyOutput:
    """letters (B, T) int64, counts (B,) how many are valid, level (B,) mean square, total (B,)."""

    letters: Tensor
    counts: Tensor
    level: Tensor
    total: Tensor


class ToyStream:
    """A causal convolution and a GRU that give a letter every 80 samples.

    Args:
        chunk, first: samples of a step, and of an utterance's first; multiples of 80.
    """

    sample_rate = 16000
    carried = ("total", "shift")

    def __init__(
        self, chunk: int = 320, first: int | None = None, width: int = 32, seed: int = 0, device: str = "cpu"
    ):
        self.chunk, self.first, self.width = chunk, first or chunk, width
        self.device = torch.device(device)
        self.signature = f"toy-{seed}"
        generator = torch.Generator().manual_seed(seed)
        self.conv, self.cell = nn.Linear(WINDOW, width), nn.GRUCell(width, width)
        self.head = nn.Linear(width, LETTERS)
        for module in (self.conv, self.cell, self.head):
            for weight in module.parameters():
                weight.requires_grad_(False).copy_(torch.randn(weight.shape, generator=generator) * 0.4)
            module.to(self.device)
        self.seconds = 0.0  # slept in a step
        self.steps = 0

    def init_state(self, slots: int) -> ToyState:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=self.device)

        tail, hidden = (zeros(n, dtype=torch.float32) for n in (WINDOW - HOP, self.width))
        return ToyState(tail, hidden, zeros(), zeros(), zeros())

    def prepare(self, options: SessionOptions) -> ToyState:
        state = self.init_state(1)
        state.shift.fill_(options.settings.get("shift", 0))
        return state

    def step(self, audio: Tensor, lengths: Tensor, final: Tensor, state: ToyState) -> tuple[Any, ToyState]:
        self.steps += 1
        if self.seconds:
            time.sleep(self.seconds)
        loudest = audio.abs().amax(1)
        if self.device.type == "cpu" and bool((loudest > ERROR_LEVEL).any()):
            raise ZeroDivisionError("a poisoned stream")
        samples = torch.cat([state.tail, audio], 1)
        frames = self.conv(samples.unfold(1, WINDOW, HOP)).tanh()
        counts = torch.where(final, (lengths + HOP - 1) // HOP, lengths // HOP)
        hidden, letters = state.hidden, []
        for t in range(frames.shape[1]):
            new = self.cell(frames[:, t], hidden)
            hidden = torch.where((t < counts)[:, None], new, hidden)
            letters.append((self.head(hidden).argmax(1) + state.shift) % LETTERS)
        hidden = torch.where((loudest > NAN_LEVEL)[:, None], float("nan"), hidden)
        index = lengths[:, None] + torch.arange(WINDOW - HOP, device=self.device)
        level = audio.square().sum(1) / lengths.clamp(min=1)
        total = state.total + counts
        state = ToyState(samples.gather(1, index), hidden, state.frames + counts, total, state.shift)
        return ToyOutput(torch.stack(letters, 1), counts, level, total), state

    def collector(self, options: SessionOptions) -> ToyCollector:
        return (ToyTwoPass if "second" in options.settings else ToyCollector)(options.settings)


class ToyCollector:
    """Letters into text. Settings: shift; quiet: end the utterance after a chunk below this level."""

    known = ("shift", "quiet")

    def __init__(self, settings: Mapping[str, Any]):
        unknown = [key for key in settings if key not in self.known]
        if unknown:
            raise ConfigError(f"settings: unknown key '{unknown[0]}'; valid keys: {', '.join(self.known)}")
        self.quiet = settings.get("quiet", -1.0)
        self.text, self.segment, self.begin = "", 0, 0

    def push(self, row: dict[str, np.ndarray], samples: int, final: bool) -> list[Any]:
        self.text += "".join(chr(97 + int(i)) for i in row["letters"][: int(row["counts"])])
        start, end = self.begin / 16000, samples / 16000
        if final:
            events: list[Event] = [Final(self.segment, self.text, (), (), start, end)]
            self.text, self.segment, self.begin = "", self.segment + 1, samples
            return events
        out = [Partial(self.segment, self.text, len(self.text), start, end)]
        return [*out, EndUtterance()] if float(row["level"]) < self.quiet else out

    def export(self) -> dict[str, Any]:
        return {"text": self.text, "segment": self.segment, "begin": self.begin}

    def restore(self, data: dict[str, Any]) -> None:
        if not isinstance(data.get("text"), str):
            raise InputError("text: missing")
        self.text, self.segment, self.begin = data["text"], int(data["segment"]), int(data["begin"])


class ToyTwoPass(ToyCollector):
    """Has every utterance recognised again by the batch model that setting ``second`` names."""

    known = (*ToyCollector.known, "second")

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__(settings)
        self.model = settings["second"]
        self.needed: int | None = 0

    def push(self, row: dict[str, np.ndarray], samples: int, final: bool) -> list[Any]:
        start, segment, text = self.begin, self.segment, self.text
        out = super().push(row, samples, final)
        if final:
            tag = {"segment": segment, "start": start, "end": samples, "text": text}
            out.append(SecondPass(self.model, start, samples, {}, tag))
            self.needed = samples
        return out

    def second(self, tag: Any, result: Any, error: BaseException | None) -> list[Event]:
        text = f"?{type(error).__name__}" if error else result
        times = tag["start"] / 16000, tag["end"] / 16000
        return [Final(tag["segment"], text, (), (), *times, "offline")]

    def restore(self, data: dict[str, Any]) -> None:
        super().restore(data)
        self.needed = self.begin


class ToyBatch:
    """A batch model that tells how many samples it got and their sum. Poison as above."""

    sample_rate = 16000

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seconds = 0.0

    def run(self, waves: list[np.ndarray], options: list[dict[str, Any]]) -> list[str]:
        self.batches.append(len(waves))
        time.sleep(self.seconds)
        if any(len(wave) and np.abs(wave).max() > ERROR_LEVEL for wave in waves):
            raise ZeroDivisionError("a poisoned segment")
        return [f"{len(wave)}:{float(wave.sum()):.3f}" for wave in waves]
