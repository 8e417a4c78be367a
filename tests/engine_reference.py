"""Tools of the engine's tests; what a stream gives when it is alone, computed without an engine."""

import time
from collections import deque
from dataclasses import replace

import numpy as np
import torch

from benchmarks.toy_models import ToyStream
from nar_speech.engine import EndUtterance, Engine, EngineOptions, Final, SecondPass, SessionOptions
from nar_speech.engine.graphs import Pending
from nar_speech.layers.state import map_state, named_tensors


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def inline(model=None, clock=None, models=None, **options):
    """An engine without threads, whose steps the test makes."""
    options = {"max_sessions": 40, "fill_wait": 0.0, **options}
    models = models or {"toy": model or ToyStream()}
    return Engine(models, EngineOptions(**options), clock or Clock()).start(threads=False)


def opened(engine, settings=None, model="toy", **limits):
    """A session and the list of its events."""
    events = []
    return engine.open(model, SessionOptions(settings or {}, **limits), events.append), events


def size_of(engine):
    """A batch size to compute references with: all those in use agree."""
    return engine._core.lanes["toy"].sizes[0]


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.002)


class Late(Pending):
    """Results that are there only when they are waited for, as those of a CUDA device."""

    immediate = False


def noise(seed, count, scale=0.1):
    return (np.random.default_rng(seed).standard_normal(count) * scale).astype(np.float32)


@torch.inference_mode()
def alone(model, audio, marks=(), settings=None, size=4):
    """Events of one stream that hears ``audio`` and commits at the positions ``marks``.

    ``size``: rows of the batch it is stepped in, the others idle; one of the engine's exact sizes.
    """
    options = SessionOptions(settings or {})
    collector, state = model.collector(options), model.prepare(options)
    marks, place, begin, events = deque(marks), 0, 0, []
    width = max(model.chunk, model.first)
    while True:
        boundary = marks[0] if marks else len(audio)
        due = model.first if place == begin else model.chunk
        if boundary - place >= due:
            count, final = due, False
        elif boundary > begin:
            count, final = boundary - place, True
        elif marks:
            marks.popleft()
            continue
        else:
            return events
        chunk = torch.zeros(size, width)
        chunk[0, :count] = torch.from_numpy(audio[place : place + count])
        lengths, ends = torch.full((size,), model.first), torch.zeros(size, dtype=torch.bool)
        lengths[0], ends[0] = count, final
        batch = map_state(lambda own, idle: torch.cat([own, idle[1:]]), state, model.init_state(size))
        output, batch = model.step(chunk, lengths, ends, batch)
        state = map_state(lambda tensor: tensor[:1], batch)
        place += count
        if final:
            fresh = model.init_state(1)
            state = replace(fresh, **{name: getattr(state, name) for name in model.carried})
            begin = place
            if marks and marks[0] == place:
                marks.popleft()
        row = {name: tensor[0].numpy() for name, tensor in named_tensors(output)}
        for item in collector.push(row, place, final):
            if isinstance(item, EndUtterance):
                if place > begin and not (marks and marks[0] == place):
                    marks.appendleft(place)
            elif not isinstance(item, SecondPass):
                events.append(item)


def finals(events):
    return [event.text for event in events if isinstance(event, Final) and event.source == "online"]
