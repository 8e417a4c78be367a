"""Searches over chunks find what the searches over all frames find, whatever the chunks and interruptions."""

import functools
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import InputError
from nar_speech.models.ctc_stream import frame_candidates
from nar_speech.search.ctc import ContextGraph, greedy, prefix_beam
from nar_speech.search.ctc_stream import BeamStream, GreedyStream
from nar_speech.search.word_lm import TokenLm
from nar_speech.text.kneser_ney import choose_vocabulary, estimate

cases = st.tuples(st.integers(0, 10_000), st.integers(0, 25), st.integers(2, 7))


def make(seed, frames, vocabulary, sharpness=3.0):
    """(T, V) log probabilities with runs of equal labels and of blanks."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(max(frames, 1), vocabulary, generator=generator)
    hold = torch.rand(len(logits), generator=generator) < 0.4
    for t in range(1, len(logits)):
        if hold[t]:
            logits[t] = logits[t - 1]
    return logits.log_softmax(-1)[:frames]


def cut(data, frames):
    """Borders of random chunks, empty ones among them."""
    borders = data.draw(st.lists(st.integers(0, frames), max_size=6))
    return [0, *sorted(borders), frames]


def feed(stream, log_probs, borders, count, blank, move=False):
    """Push chunks; with ``move`` the stream continues elsewhere after each."""
    for begin, end in pairwise(borders):
        chunk = frame_candidates(log_probs[None, begin:end], torch.tensor([end - begin]), count, blank)
        parts = [chunk.values[0].numpy(), chunk.symbols[0].numpy()]
        if isinstance(stream, BeamStream):
            parts.append(chunk.blanks[0].numpy())
        stream.push(*parts)
        if move:
            data = json.loads(json.dumps(stream.export(), allow_nan=False))
            stream = move()
            stream.restore(data)
    return stream


def assert_same(got, want):
    assert [h.tokens for h in got] == [h.tokens for h in want]
    assert [h.times for h in got] == [h.times for h in want]
    for name in ("score", "context_score", "lm_score"):
        mine, theirs = ([getattr(h, name) for h in hypotheses] for hypotheses in (got, want))
        assert mine == pytest.approx(theirs, abs=1e-6)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.confidences == pytest.approx(theirs.confidences, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(cases, st.booleans(), st.data())
def test_greedy_over_chunks(case, last, data):
    _, frames, vocabulary = case
    log_probs, blank = make(*case), vocabulary - 1 if last else 0
    borders = cut(data, frames)
    stream = feed(GreedyStream(blank), log_probs, borders, 1, blank)
    want = greedy(log_probs[None], torch.tensor([frames]), blank)
    assert_same([stream.hypothesis()], want)
    moved = feed(GreedyStream(blank), log_probs, borders, 1, blank, lambda: GreedyStream(blank))
    assert moved.hypothesis() == stream.hypothesis()
    best = log_probs.argmax(-1).tolist()
    spoken = [t for t, label in enumerate(best) if label != blank]
    assert stream.silence == moved.silence == frames - 1 - (spoken[-1] if spoken else -1)
    assert (stream.frames, stream.stable) == (frames, len(stream.tokens))


@functools.cache
def token_lm(vocabulary, blank):
    """A model of all tokens but the blank; where that is the last id, the model knows nothing of it."""
    pieces = ["<blank>" if i == blank else chr(ord("a") + i) for i in range(vocabulary)]
    words = [piece for piece in pieces if piece != "<blank>"]
    texts = [" ".join(words[(i * j) % len(words)] for j in range(5)) for i in range(1, 9)]
    counts = Counter(" ".join(texts).split())
    return TokenLm(estimate(texts, choose_vocabulary(counts), 2), pieces[: vocabulary - (blank > 0)])


@settings(deadline=None, max_examples=60)
@given(
    cases,
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([None, 0.6, 0.9]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.data(),
)
def test_beam_over_chunks(case, beam, last, blank_skip, floor, helped, data):
    _, frames, vocabulary = case
    log_probs, blank = make(*case), vocabulary - 1 if last else 0
    options = {"blank": blank, "blank_skip": blank_skip, "floor": floor}
    if helped:  # phrases and a language model go on from chunk to chunk
        tokens = [i for i in range(vocabulary) if i != blank]
        phrases = data.draw(st.lists(st.lists(st.sampled_from(tokens), min_size=1, max_size=3), max_size=2))
        options["context"] = ContextGraph(phrases, 1.5) if phrases else None
        options |= {
            "lm": token_lm(vocabulary, blank),
            "lm_weight": 0.7,
            "recombine": data.draw(st.booleans()),
        }
    candidates = min(beam + 1, vocabulary)
    borders = cut(data, frames)
    stream = feed(BeamStream(beam, **options), log_probs, borders, candidates, blank)
    stream.finish()
    want = prefix_beam(
        log_probs[None], torch.tensor([frames]), beam, candidates=candidates, nbest=beam, **options
    )[0]
    if frames:
        assert_same(stream.hypotheses(beam, finish=True), want)
    else:
        assert stream.hypothesis(finish=True).tokens == ()
    move = lambda: BeamStream(beam, **options)  # noqa: E731
    moved = feed(BeamStream(beam, **options), log_probs, borders, candidates, blank, move)
    moved.finish()
    assert moved.hypotheses(beam, finish=True) == stream.hypotheses(beam, finish=True)
    assert (moved.frames, moved.silence) == (frames, stream.silence)


@settings(deadline=None, max_examples=40)
@given(cases, st.integers(1, 5), st.data())
def test_stable_tokens_never_change(case, beam, data):
    _, frames, vocabulary = case
    log_probs, stream, promised = make(*case, sharpness=5.0), BeamStream(beam), ()
    for begin, end in zip(range(frames), range(1, frames + 1), strict=True):
        feed(stream, log_probs, [begin, end], min(beam, vocabulary), 0)
        for hypothesis in stream.hypotheses(beam):
            assert hypothesis.tokens[: len(promised)] == promised
        promised = stream.hypothesis().tokens[: stream.stable]
    stream.finish()
    for hypothesis in stream.hypotheses(beam, finish=True):
        assert hypothesis.tokens[: len(promised)] == promised


def test_a_margin_makes_old_tokens_stable():
    labels = [1, 2, 0, 3, 4, 0, 1, 2, 3]
    probs = torch.full((len(labels), 5), 0.001)
    probs[range(len(labels)), labels] = 0.996
    probs[1] = torch.tensor([0.001, 0.001, 0.9, 0.097, 0.001])
    exact, quick = BeamStream(4), BeamStream(4, margin=2.0)
    for stream in (exact, quick):
        feed(stream, probs.log(), [0, 3, 6, 9], 4, 0)
        assert stream.hypothesis().tokens == (1, 2, 3, 4, 1, 2, 3)
    assert exact.stable <= 1  # what the second token is stays open
    assert quick.stable == 7
    assert len(quick.hypotheses(4)) == 1


def test_a_partial_result_is_not_charged_for_its_end():
    log_probs = torch.full((1, 4), -20.0)
    log_probs[0, 1] = 0.0
    stream = feed(BeamStream(2, context=ContextGraph([[1, 2]], 4.0)), log_probs, [0, 1], 2, 0)
    assert stream.hypothesis().context_score == pytest.approx(4.0)
    assert stream.hypothesis(finish=True).context_score == pytest.approx(0.0)


def test_candidates_keep_the_blank_and_are_the_best():
    log_probs = torch.randn(2, 5, 9).log_softmax(-1)
    found = frame_candidates(log_probs, torch.tensor([5, 3]), 4, blank=8)
    values, symbols = log_probs.sort(-1, descending=True)
    torch.testing.assert_close(found.values, values[..., :4])
    assert torch.equal(found.symbols, symbols[..., :4])
    assert torch.equal(found.blanks, log_probs[..., 8])
    assert frame_candidates(log_probs, torch.tensor([5, 3]), 20).values.shape == (2, 5, 9)


def damaged(data):
    yield {}
    for name in data:
        yield {**data, name: "x"}
    for name in data.get("arrays", {}):
        arrays = {**data["arrays"]}
        yield {**data, "arrays": {k: v for k, v in arrays.items() if k != name}}
        yield {**data, "arrays": {**arrays, name: {**arrays[name], "data": "AA=="}}}
        yield {**data, "arrays": {**arrays, name: {**arrays[name], "dtype": "|O"}}}
        yield {**data, "arrays": {**arrays, name: {**arrays[name], "dtype": "<f4"}}}


@pytest.mark.parametrize("stream", [GreedyStream(), BeamStream(3)], ids=["greedy", "beam"])
def test_damaged_states_are_refused(stream):
    feed(stream, make(3, 9, 5), [0, 9], 3, 0)
    before, states = stream.export(), list(damaged(stream.export()))
    assert len(states) > 5
    for data in states:
        with pytest.raises(InputError):
            stream.restore(data)
    assert stream.export() == before  # nothing was taken over half
    with pytest.raises(InputError, match=r"another search|damaged"):
        BeamStream(4).restore(BeamStream(3).export())


def test_pointers_to_nowhere_are_refused():
    stream = feed(BeamStream(2), make(1, 6, 4), [0, 6], 2, 0)
    arrays = {name: np.array(array) for name, array in stream.search.export().items()}
    arrays["nodes"][0, 0, 0, 0] = 10**9
    with pytest.raises(InputError, match="damaged"):
        stream.search.restore(arrays)


def test_a_beam_holds_something():
    with pytest.raises(InputError, match="beam"):
        BeamStream(0)
