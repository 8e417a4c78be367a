"""What the streaming engine promises, with small real networks (random weights) on the CPU in float32.

The same promises of the protocols: ``test_server_http.py`` and ``test_server_realtime.py`` have the official
``openai`` client, ``test_server_funasr.py`` FunASR's WebSocket client.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nar_speech import hub
from nar_speech.engine import Closed, Engine, EngineOptions, Failed, Final, Partial, SessionOptions
from nar_speech.engine.asr import load_stream
from tests.babble import RATE, babble, sharpened
from tests.model_folders import FASTCONFORMER, ctc_folder, paraformer_folder

torch.set_num_threads(1)
COMPANIONS = 32
OPTIONS = EngineOptions(max_sessions=COMPANIONS + 1, fill_wait=0.0)
SETTINGS = {"endpoint": False}  # utterances end where the test says
LOUD = 5.0  # samples above poison a step of :class:`Poisoned`


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Paraformer-online and a cache-aware FastConformer CTC, each with voice activity detection."""
    base = tmp_path_factory.mktemp("models")
    plain = {"decoder": "none", "decoder_conf": {}}
    folders = {
        "paraformer": paraformer_folder(base / "p", stream={"chunk": [5, 10, 5]}, predictor="v2"),
        "fastconformer": ctc_folder(base / "f", encoder="fastconformer", encoder_conf=FASTCONFORMER, **plain),
    }
    return {name: load_stream(hub.load_parts(sharpened(folder)), "cpu") for name, folder in folders.items()}


@pytest.fixture(scope="module", params=["paraformer", "fastconformer"])
def model(request, models):
    return models[request.param]


def sounds(count):
    lengths = np.random.default_rng(5).uniform(1.5, 3.0, count)
    return [babble(length, seed) for seed, length in enumerate(lengths)]


def engine_of(model):
    return Engine({"m": model}, OPTIONS).start(threads=False)


def opened(engine):
    events = []
    return engine.open("m", SessionOptions(SETTINGS), events.append), events


def alone(model, waves):
    """Finals of each wave when nothing else is in the engine."""
    engine, finals = engine_of(model), []
    for wave in waves:
        session, events = opened(engine)
        session.feed(wave)
        session.finish()
        engine.run_until_idle()
        assert events[-1] == Closed("finished")
        finals.append(said(events))
    engine.close()
    return finals


def said(events):
    """What was recognised: texts; ids, times and confidences of tokens."""
    finals = [event for event in events if isinstance(event, Final)]
    return [
        (f.text, f.start, f.end, [(t.id, t.start, t.end, t.confidence) for t in f.tokens]) for f in finals
    ]


@pytest.fixture(scope="module")
def references(model):
    """Sounds and their finals alone; worth comparing: long texts, each another."""
    waves = sounds(COMPANIONS + 1)
    finals = alone(model, waves)
    texts = ["".join(text for text, *_ in found) for found in finals]
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= 3
    assert len(set("".join(texts))) >= 8
    return waves, finals


def test_same_text_alone_and_among_32_random_companions(model, references):
    """Token for token, with their times, in batches of many sizes fed in random pieces."""
    waves, wanted = references
    engine, random = engine_of(model), np.random.default_rng(6)
    sessions = [opened(engine) for _ in waves]
    places = [0] * len(waves)
    while any(place < len(wave) for place, wave in zip(places, waves, strict=True)):
        for i in random.permutation(len(waves))[: random.integers(1, len(waves))]:
            piece = waves[i][places[i] : places[i] + int(random.integers(1, 2 * model.chunk))]
            if len(piece):
                sessions[i][0].feed(piece)
                places[i] += len(piece)
                if places[i] == len(waves[i]):
                    sessions[i][0].finish()
        engine.tick()
    engine.run_until_idle()
    assert len(engine.stats().online["m"].sizes) > 1
    for (_, events), finals in zip(sessions, wanted, strict=True):
        assert events[-1] == Closed("finished")
        assert said(events) == finals
        assert any(isinstance(event, Partial) for event in events)
    engine.close()


@pytest.mark.parametrize("place", [0.37, 0.61])
def test_a_session_moves_to_another_engine_mid_sentence_with_identical_text(model, references, place):
    waves, wanted = references
    here, there = engine_of(model), engine_of(model)
    for engine, wave in ((here, waves[1]), (there, waves[2])):  # company, in other slots
        for _ in range(1 if engine is here else 3):
            opened(engine)[0].feed(wave)
        engine.run_until_idle()
    session, events = opened(here)
    cut = round(place * len(waves[0]))
    session.feed(waves[0][:cut])
    here.run_until_idle()
    assert isinstance(events[-1], Partial)  # in the middle of a sentence
    data = here.snapshot(session).to_bytes()
    assert events.pop() == Closed("moved")
    here.close()
    moved = there.resume(data, events.append)
    moved.feed(waves[0][cut:])
    moved.finish()
    there.run_until_idle()
    there.close()
    assert events[-1] == Closed("finished")
    assert said(events) == wanted[0]


class Poisoned:
    """A model that fails, or gives NaN, where a stream is too loud."""

    def __init__(self, model, how):
        self._model, self.how = model, how

    def __getattr__(self, name):
        return getattr(self._model, name)

    def step(self, audio, lengths, final, state):
        loud = audio.abs().amax(1) > LOUD
        if self.how == "raises" and bool(loud.any()):
            raise ValueError("poison")
        output, state = self._model.step(audio, lengths, final, state)
        if self.how == "nan":
            name = "values" if hasattr(output.inner, "values") else "sure"
            values = getattr(output.inner, name)
            mask = loud.reshape(-1, *[1] * (values.dim() - 1))
            output = replace(output, inner=replace(output.inner, **{name: values.masked_fill(mask, np.nan)}))
        return output, state


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_poison_in_one_of_32_streams_leaves_31_with_the_right_text(model, references, how):
    waves, wanted = (part[:COMPANIONS] for part in references)
    bad = 17
    waves = [wave.copy() for wave in waves]
    waves[bad][RATE:] *= 1e3  # its second second
    engine = engine_of(Poisoned(model, how))
    sessions = [opened(engine) for _ in waves]
    for (session, _), wave in zip(sessions, waves, strict=True):
        session.feed(wave)
        session.finish()
    engine.run_until_idle()
    for number, ((_, events), finals) in enumerate(zip(sessions, wanted, strict=True)):
        if number == bad:
            assert isinstance(events[-2], Failed)
            assert events[-1] == Closed("failed")
            assert not any(isinstance(event, Final) for event in events)
        else:
            assert events[-1] == Closed("finished")
            assert said(events) == finals
    stats = engine.stats().online["m"]
    assert (stats.poisoned, stats.closed) == (1, {"failed": 1, "finished": COMPANIONS - 1})
    engine.close()
