"""A language model and a label prior in the beam of a stream: the text of the offline search."""

import numpy as np
import pytest
import torch

from nar_speech import hub
from nar_speech.checkpoint import save_safetensors
from nar_speech.engine import Engine, EngineOptions, Final, SessionOptions
from nar_speech.engine.asr import load_stream
from nar_speech.engine.asr_hearing import BLANK_SKIP
from nar_speech.model_folder import change_model_decoding
from nar_speech.pipelines.language_model import PRIOR_NAME, LanguageModels
from nar_speech.pipelines.recognize import LM_CANDIDATES, LM_FLOOR
from nar_speech.search.ctc import prefix_beam
from nar_speech.search.prior import divide_by_prior
from recipes import ngram
from tests.model_folders import CONFORMER, PIECES, ctc_folder

torch.set_num_threads(1)
OPTIONS = EngineOptions(max_sessions=4, buckets=(1, 2, 4))
LETTERS = PIECES[5:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("lm")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(LETTERS, random.integers(1, 3))) for _ in range(60)]
    lines = [" ".join(random.choice(words, 6)) for _ in range(300)]
    (base / "text.txt").write_text("\n".join(lines))
    arguments = [str(base / "text.txt"), "--order", "2", "--output", str(base / "lm.safetensors")]
    assert ngram.main(arguments) == 0
    causal = {**CONFORMER, "causal": True, "use_dynamic_chunk": True}
    folder = ctc_folder(base / "model", encoder_conf=causal)
    prior = torch.randn(len(PIECES), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    save_safetensors(base / "prior.safetensors", {PRIOR_NAME: prior})
    change_model_decoding(
        folder,
        decoder="ctc_beam",
        beam=7,
        hotword_score=2.5,
        lm=str(base / "lm.safetensors"),
        lm_weight=0.4,
        prior=str(base / "prior.safetensors"),
        prior_weight=0.5,
    )
    return folder


def speech(seconds=4.0, seed=0):
    wave = np.random.default_rng(seed).normal(0, 0.1, round(16000 * seconds))
    return (wave * np.repeat(np.random.default_rng(seed).uniform(0, 2, 40), len(wave) // 40)).astype(
        "float32"
    )


def finals(engine, session, wave, piece=5000):
    for begin in range(0, len(wave), piece):
        session.feed(wave[begin : begin + piece])
        engine.run_until_idle()
    session.finish()
    engine.run_until_idle()


def hear(model, wave):
    events = []
    engine = Engine({"m": model}, OPTIONS).start(threads=False)
    finals(engine, engine.open("m", SessionOptions(), events.append), wave)
    engine.close()
    return [e for e in events if isinstance(e, Final)]


@torch.no_grad()
def test_a_stream_finds_what_the_offline_beam_finds(folder):
    parts, wave = hub.load_parts(folder), speech()
    stream = load_stream(hub.load_parts(folder), "cpu").model.stream
    feats, lengths = parts.frontend(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
    out = parts.network(feats, lengths, **parts.network.encoder.stream_mask(stream.chunking))
    decoding, models = parts.decoding, LanguageModels(parts.tokenizer)

    def search(log_probs, lm):
        limits = {"candidates": min(LM_CANDIDATES, len(PIECES)), "floor": LM_FLOOR, "recombine": True}
        return prefix_beam(
            log_probs, out.lengths, decoding.beam, lm=lm, lm_weight=1.0, blank_skip=BLANK_SKIP, **limits
        )[0][0].tokens

    lm, prior = models(decoding), models.prior(decoding, len(PIECES))
    want = search(divide_by_prior(out.log_probs, prior, decoding.prior_weight), lm)
    (final,) = hear(load_stream(hub.load_parts(folder), "cpu"), wave)
    assert [token.id for token in final.tokens] == list(want)
    assert final.text == parts.tokenizer.decode(want)
    assert list(want) != list(search(out.log_probs, lm))  # the prior has its say


def test_the_beam_is_as_wide_as_model_yaml_says(folder, tmp_path):
    copy = hub.import_model(folder, tmp_path / "copy")
    for skip in (None, 0.9):
        change_model_decoding(copy, blank_skip=skip)
        model = load_stream(hub.load_parts(copy), "cpu").model
        hearing = model.hearing(None)
        assert (hearing.search.search.beam, hearing.search.skip) == (7, np.log(skip or BLANK_SKIP))
        graph = model.collector(SessionOptions({"hotwords": ["ab"]})).graph
        first = model.tokenizer.encode("ab")[:1]
        assert graph.step(np.zeros(1, np.int64), np.array(first))[0] == 2.5


def test_a_session_with_a_language_model_moves(folder):
    wave, model, events = speech(seed=1), load_stream(hub.load_parts(folder), "cpu"), []
    one, two = (Engine({"m": model}, OPTIONS).start(threads=False) for _ in range(2))
    session = one.open("m", SessionOptions(), events.append)
    session.feed(wave[:30000])
    one.run_until_idle()
    session = two.resume(one.snapshot(session).to_bytes(), events.append)
    finals(two, session, wave[30000:])
    one.close()
    two.close()
    assert [e for e in events if isinstance(e, Final)] == hear(model, wave)


def test_greedy_folders_use_no_language_model(folder, tmp_path):
    copy = hub.import_model(folder, tmp_path / "copy")
    change_model_decoding(copy, decoder="ctc_greedy")
    wave = speech(seed=2)
    greedy, beam = (hear(load_stream(hub.load_parts(name), "cpu"), wave)[0] for name in (copy, folder))
    assert greedy.text
    assert greedy.text != beam.text
