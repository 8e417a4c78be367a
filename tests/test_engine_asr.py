"""Streaming recognisers in the engine: their texts, times, second passes, hotwords and snapshots."""

import itertools
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nar_speech import config as configs
from nar_speech import hub, inspection, locate
from nar_speech.audio import read_audio
from nar_speech.engine import (
    Closed,
    EndUtterance,
    Engine,
    EngineOptions,
    Final,
    Partial,
    SessionOptions,
    SpeechStarted,
    SpeechStopped,
)
from nar_speech.engine.asr import SpeechModel, TextCollector, can_stream, load_stream
from nar_speech.engine.asr_hearing import Heard, TokenHearing
from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.quantize import Int8Linear, int8_available
from nar_speech.model_folder import DecodingConfig, StreamConfig, read_model_file, write_model_folder
from nar_speech.models.ctc_stream import CtcStream
from nar_speech.models.paraformer_stream import ParaformerStream
from nar_speech.search.ctc_stream import GreedyStream
from nar_speech.types import Segment, Transcript, Word
from tests.model_folders import stream_folders
from tests.streams import drive

torch.set_num_threads(1)
RATE = 16000
OPTIONS = EngineOptions(max_sessions=4, buckets=(1, 2, 4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return stream_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def parts(folders):
    return {name: hub.load_parts(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def models(parts):
    made = {"ctc": CtcStream, "paraformer": ParaformerStream}
    return {
        name: SpeechModel(
            kind(parts[name].network, parts[name].frontend, **({"candidates": 8} if name == "ctc" else {})),
            parts[name].tokenizer,
            decoding=DecodingConfig(hotword_score=6.0),
        )
        for name, kind in made.items()
    }


def noise(seconds, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, round(RATE * seconds)).astype(np.float32)


class Batch:
    """An offline half that says how much it heard."""

    sample_rate = RATE

    def __init__(self):
        self.heard = []

    def run(self, waves, options):
        self.heard += [(len(wave) / RATE, option) for wave, option in zip(waves, options, strict=True)]
        words = (Word("second", 0.5, 1.0, 0.9),)
        text = Transcript("second", (Segment("second", 0.5, 1.0, 0.9, words),), 1.0)
        return [RuntimeError("no") if option.get("fail") else text for option in options]


def hear(model, waves, settings=None, piece=1237, batch=None):
    """Events of one session: ``waves`` are utterances, ended by commits."""
    events = []
    models = {"m": model} if batch is None else {"m": model, "b": batch}
    engine = Engine(models, OPTIONS).start(threads=False)
    session = engine.open("m", SessionOptions(settings or {}), events.append)
    for wave in waves:
        for begin in range(0, len(wave), piece):
            session.feed(wave[begin : begin + piece])
            engine.run_until_idle()
        session.commit()
    session.finish()
    engine.run_until_idle()
    engine.close()
    assert events.pop() == Closed("finished")
    return events


def expected(model, wave):
    """Token ids when the network alone is driven."""
    rows = []

    def step(x, lengths, state, final):
        output, state = model.step(x, lengths, final, state)
        rows.append(output)
        return x[:, :0], lengths * 0, state

    drive(step, model.init_state(1), [torch.from_numpy(wave)], model.first, model.chunk)
    search = GreedyStream(model.stream.network.config.blank) if model.ctc else TokenHearing(0.06)
    for row in rows:
        one = {name: value[0].numpy() for name, value in vars(row).items()}
        if model.ctc:
            count = int(one["counts"])
            search.push(one["values"][:count], one["symbols"][:count])
        else:
            search.push(one)
    return search.tokens if model.ctc else search.ids


@pytest.mark.parametrize("name", ["ctc", "paraformer"])
def test_texts_are_those_of_the_network(models, parts, name):
    model, tokenizer = models[name], parts[name].tokenizer
    waves = [noise(3.1), noise(2.2, 1)]
    events = hear(model, waves)
    finals = [e for e in events if isinstance(e, Final)]
    assert [f.text for f in finals] == [tokenizer.decode(expected(model, wave)) for wave in waves]
    assert all(f.text for f in finals)
    for number, final in enumerate(finals):
        offset = 0.0 if number == 0 else 3.1
        times = [t for token in final.tokens for t in (token.start, token.end)]
        assert times == sorted(times)
        assert offset <= times[0] <= times[-1] <= offset + len(waves[number]) / RATE + 1e-6
        assert (final.start, final.end) == (times[0], times[-1])
        assert "".join(w.text for w in final.words) == final.text.replace(" ", "")
        assert all(0 <= token.confidence <= 1 for token in final.tokens)
        partials = [e for e in events if isinstance(e, Partial) and e.segment == number]
        assert partials
        for partial in partials:
            assert final.text.startswith(partial.text[: partial.stable])


def test_pieces_of_any_size_give_the_same_events(models):
    def finals(piece):
        return [e for e in hear(models["ctc"], [noise(2.0)], piece=piece) if isinstance(e, Final)]

    assert finals(160) == finals(5000) == finals(32000)


def test_an_utterance_that_nobody_ends(models, monkeypatch):
    """It is cut, so that the work for each chunk stays small; no audio is lost."""
    monkeypatch.setattr("nar_speech.engine.asr.LONG", 1.0)
    monkeypatch.setattr("nar_speech.engine.asr.LONGEST", 2.0)
    finals = [e for e in hear(models["ctc"], [noise(9.0)]) if isinstance(e, Final)]
    assert len(finals) >= 3
    assert [f.segment for f in finals] == list(range(len(finals)))
    assert all(a.end <= b.start for a, b in itertools.pairwise(finals))
    assert finals[-1].end > 8.0


def test_hotwords(models):
    plain, favoured = (
        next(e.text for e in hear(models["ctc"], [noise(3.0)], settings) if isinstance(e, Final))
        for settings in ({}, {"hotwords": ["zzz"], "language": "en"})
    )
    assert plain != favoured
    assert favoured.count("z") > plain.count("z")
    for name, word in (("ctc", "日本"), ("paraformer", "ada")):
        with pytest.raises(InputError, match="hotword"):
            models[name].collector(SessionOptions({"hotwords": [word]}))
    models["paraformer"].collector(SessionOptions({"hotwords": ["ada"], "second_pass": {"model": "b"}}))
    for wrong in ({"colour": 1}, {"endpoint": {"threshold": 0.5}}, {"second_pass": "b"}):
        with pytest.raises(ConfigError):
            models["ctc"].collector(SessionOptions(wrong))


def test_silence_before_the_first_word_does_not_count_as_a_long_utterance():
    """After minutes of silence a sentence is not cut behind its first word."""

    class Late:
        agreement = 1

        def push(self, row):
            pass

        def heard(self, seconds, final):
            ids = tuple(range(int(seconds - 400.0)))  # a token each second, from 400 s on
            starts = tuple(400.0 + i for i in ids)
            return Heard(ids, starts, tuple(s + 0.9 for s in starts), (1.0,) * len(ids))

    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    model = SimpleNamespace(sample_rate=10, tokenizer=tokenizer, hearing=lambda graph: Late())
    collector, ended = TextCollector(model, None, None), []
    for second in range(1, 480):
        if any(isinstance(event, EndUtterance) for event in collector.push({}, 10 * second, False)):
            ended.append(second)
    assert ended[0] == 461  # said for more than a minute without a pause


def test_two_passes(models):
    batch, options = Batch(), {"hotwords": ["ada"]}
    settings = {"second_pass": {"model": "b", "options": options}}
    events = hear(models["ctc"], [noise(2.0), noise(1.0, 1)], settings, batch=batch)
    offline = [e for e in events if isinstance(e, Final) and e.source == "offline"]
    assert [(e.segment, e.text) for e in offline] == [(0, "second"), (1, "second")]
    assert [(e.start, e.end) for e in offline] == [(0.5, 1.0), (2.5, 3.0)]  # those of its words
    assert batch.heard == [(2.0, options), (1.0, options)]
    assert [e.words[0].start for e in offline] == [0.5, 2.5]
    settings["second_pass"]["options"] = {"fail": True}
    events = hear(models["ctc"], [noise(2.0)], settings, batch=Batch())
    online, offline = (e for e in events if isinstance(e, Final))
    assert (offline.text, offline.source) == (online.text, "offline")


def test_a_session_moves_in_the_middle(models):
    wave = noise(3.0)
    for settings in ({}, {"hotwords": ["zzz"]}, {"second_pass": {"model": "b"}}):
        batch = Batch()
        whole = hear(models["ctc"], [wave], settings, batch=batch)
        events = []
        one, two = (Engine({"m": models["ctc"], "b": batch}, OPTIONS).start(threads=False) for _ in range(2))
        session = one.open("m", SessionOptions(settings), events.append)
        session.feed(wave[:24001])
        one.run_until_idle()
        snapshot = one.snapshot(session)
        session = two.resume(snapshot.to_bytes(), events.append)
        session.feed(wave[24001:])
        session.finish()
        two.run_until_idle()
        one.close()
        two.close()
        finals = [e for e in whole if isinstance(e, Final)]
        assert [e for e in events if isinstance(e, Final)] == finals


def test_what_can_stream(parts, folders):
    assert [can_stream(parts[name]) for name in ("ctc", "paraformer", "offline")] == [True, True, False]
    with pytest.raises(ConfigError, match="files only"):
        load_stream(hub.load_parts(folders["offline"]), "cpu")


@pytest.mark.skipif(not int8_available(), reason="no int8 kernels")
@pytest.mark.parametrize("name", ["ctc", "paraformer"])
def test_int8_streams_hear_about_the_same_in_any_company(folders, name):
    model, plain = (load_stream(hub.load_parts(folders[name]), "cpu", d).model for d in ("int8", "float32"))
    assert any(isinstance(part, Int8Linear) for part in model.stream.network.modules())
    waves = torch.randn(8, max(model.first, model.chunk), generator=torch.Generator().manual_seed(0)) * 0.1
    lengths, final = torch.full((8,), model.first), torch.ones(8, dtype=torch.bool)

    def numbers(model, rows):
        found, _ = model.step(waves[rows], lengths[rows], final[rows], model.init_state(len(rows)))
        return {key: value for key, value in vars(found).items() if value.is_floating_point()}

    together, apart = numbers(model, [*range(8)]), numbers(model, [5])
    for key, value in numbers(plain, [*range(8)]).items():
        torch.testing.assert_close(together[key][5], apart[key][0], atol=2e-2, rtol=1e-2)
        assert torch.allclose(together[key], value, atol=0.3, rtol=0.1)


def test_chunks_come_from_model_yaml(parts, tmp_path):
    """How a model was trained for streams is how it is fed, here and on the server, unless told otherwise."""
    own = parts["ctc"]
    folder = write_model_folder(
        tmp_path / "m",
        own.network,
        own.card,
        own.frontend.config,
        own.network.config,
        own.tokenizer,
        stream=StreamConfig(chunk_size=4, left=12),
    )

    def chunks(folder, **more):
        chunking = load_stream(hub.load_parts(folder), "cpu", **more).model.stream.chunking
        return chunking.frames, chunking.left

    assert chunks(folder) == (4, 12)
    assert load_stream(hub.load_parts(folder), "cpu").chunk == 4 * 4 * RATE // 100  # 10 ms, subsampled by 4
    assert chunks(folder, chunk_size=6) == (6, 12)
    assert chunks(folder, chunk_size=6, left=24) == (6, 24)
    assert chunks(hub.import_model(folder, tmp_path / "copy")) == (4, 12)
    assert inspection.model_info(folder)["stream"] == {"chunk_size": 4, "left": 12}
    whole = read_model_file(folder)
    configs.write_yaml(replace(whole, stream=StreamConfig(4, -1)), folder / "model.yaml")
    assert chunks(folder) == (4, 16)  # all of the past: room for four chunks
    with pytest.raises(ConfigError, match="leave these out"):
        load_stream(parts["paraformer"], "cpu", chunk_size=4)


@pytest.mark.parametrize(
    ("name", "stream", "words"),
    [
        ("ctc", {"chunk_size": 0, "left": 4}, "model.yaml: stream: chunk_size: got 0"),
        ("ctc", {"chunk_size": 4}, "stream: key 'left' is required"),
        ("ctc", {"chunk_size": 4, "left": 4, "right": 1}, "unknown key 'right'"),
        ("offline", {"chunk_size": 4, "left": 4}, "model.yaml: stream: causal: false"),
        ("paraformer", {"chunk_size": 4, "left": 4}, "model.yaml: stream: is for CTC models"),
    ],
)
def test_chunks_that_are_wrong_are_named(folders, tmp_path, name, stream, words):
    shutil.copytree(folders[name], tmp_path / "m")
    tree = configs.read_yaml(tmp_path / "m/model.yaml")
    configs.write_yaml({**tree, "stream": stream}, tmp_path / "m/model.yaml")
    with pytest.raises(ConfigError, match=re.escape(words)):
        hub.load_parts(tmp_path / "m")


def test_speech_is_told_around_the_text(folders):
    model = load_stream(hub.load_parts(folders["ctc"]), "cpu")
    wave = np.concatenate([read_audio(locate.ASSETS / "sample.flac").samples, np.zeros(RATE, np.float32)])
    events = hear(model, [wave], {"endpoint": {"min_silence": 0.3}})
    started, stopped = (
        next(e for e in events if isinstance(e, kind)) for kind in (SpeechStarted, SpeechStopped)
    )
    assert 0 <= started.time < stopped.time <= len(wave) / RATE
