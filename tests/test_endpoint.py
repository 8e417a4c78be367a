"""Where utterances begin and end: against the offline rules, in any chunks, with rules of their own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.engine.endpoint import (
    CUT,
    KALDI_RULES,
    STARTED,
    STOPPED,
    EndpointRules,
    EndpointState,
    SilenceRule,
    endpoint_step,
    silence_rule,
)
from nar_speech.errors import ConfigError
from nar_speech.layers.silero import WINDOW
from nar_speech.pipelines.segment import _Stretches

LEVELS = (0.0, 0.2, 0.4, 0.45, 0.6, 0.95)


def rules(**changes) -> EndpointRules:
    """Rules in windows: min_speech, min_silence, max_utterance; no padding unless told."""
    seconds = WINDOW / 16000
    values = {"min_speech": 3, "min_silence": 5, "max_utterance": 0, "pad_start": 0, "pad_end": 0, **changes}
    for name in ("min_speech", "min_silence", "max_utterance", "pad_start", "pad_end"):
        values[name] *= seconds
    return EndpointRules(**values)


def judge(probabilities, state, sizes=None):
    """(mark, time) of one stream fed in pieces of the given sizes."""
    found, place = [], 0
    for size in sizes or [len(probabilities)]:
        part = torch.tensor([probabilities[place : place + size]], dtype=torch.float32).reshape(1, -1)
        place += size
        marks, times, state = endpoint_step(part, torch.tensor([part.shape[1]]), state)
        found += [(m, t) for m, t in zip(marks[0].tolist(), times[0].tolist(), strict=True) if m]
    return found


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(LEVELS), st.integers(1, 8)), max_size=12),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_equals_the_offline_rules(runs, min_speech, min_silence):
    probabilities = [p for p, count in runs for _ in range(count)]
    offline = list(_Stretches(0.5, min_speech, min_silence, 10**9).feed(probabilities))
    live = rules(min_speech=min_speech, min_silence=min_silence)
    found = judge(probabilities, EndpointState.begin([live]))
    started = [t // WINDOW for m, t in found if m == STARTED]
    stopped = [t // WINDOW for m, t in found if m == STOPPED]
    assert list(zip(started, stopped, strict=False)) == [(a, b) for a, b, _ in offline]
    assert len(started) - len(stopped) in (0, 1)  # speech may still be under way
    assert [m for m, _ in found] == [STARTED, STOPPED] * (len(found) // 2) + [STARTED] * (len(found) % 2)


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_chunks_and_company_do_not_matter(data):
    total, streams = 36, 3
    own = [rules(max_utterance=m, min_silence=s) for m, s in ((0, 2), (32, 5), (34, 9))]
    lines = [
        data.draw(st.lists(st.sampled_from(LEVELS), min_size=total, max_size=total)) for _ in range(streams)
    ]
    alone = [judge(line, EndpointState.begin([rule])) for line, rule in zip(lines, own, strict=True)]
    state, places, found = EndpointState.begin(own), [0] * streams, [[] for _ in own]
    while min(places) < total:
        counts = [data.draw(st.integers(0, min(9, total - place))) for place in places]
        if not any(counts):
            counts = [min(9, total - place) for place in places]
        batch = torch.full((streams, 9), 0.7)  # what is not valid must not count
        for row, count in enumerate(counts):
            batch[row, :count] = torch.tensor(lines[row][places[row] : places[row] + count])
            places[row] += count
        marks, times, state = endpoint_step(batch, torch.tensor(counts), state)
        for row in range(streams):
            pairs = zip(marks[row].tolist(), times[row].tolist(), strict=True)
            found[row] += [(m, t) for m, t in pairs if m]
    assert found == alone


def test_long_speech_is_cut_and_goes_on():
    line = [1.0] * 100 + [0.0] * 10
    found = judge(line, EndpointState.begin([rules(max_utterance=40)]), [7] * 16)
    assert found == [(STARTED, 0), (CUT, 40 * WINDOW), (CUT, 80 * WINDOW), (STOPPED, 100 * WINDOW)]


def test_padding_stays_between_the_utterances():
    padded = rules(pad_start=4, pad_end=3)
    line = [0.0] * 2 + [1.0] * 5 + [0.0] * 5 + [1.0] * 5 + [0.0] * 9
    found = judge(line, EndpointState.begin([padded]))
    assert found == [
        (STARTED, 0),  # not before the stream
        (STOPPED, 10 * WINDOW),
        (STARTED, 10 * WINDOW),  # not before the end of the last one
        (STOPPED, 20 * WINDOW),
    ]


def test_no_windows_change_nothing():
    state = EndpointState.begin([rules()] * 2)
    marks, times, after = endpoint_step(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), state)
    assert marks.shape == times.shape == (2, 0)
    assert after is state


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"min_silence": -1.0}, "min_silence"),
        ({"pad_end": 0.6}, "pad_end"),
        ({"max_utterance": 0.2}, "max_utterance"),
    ],
)
def test_wrong_rules_are_refused(wrong, name):
    with pytest.raises(ConfigError, match=name):
        EndpointRules(**wrong)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_decoder_silence(kind):
    spoken = kind([False, False, True, True, True, False])
    silence = kind([2.3, 2.4, 1.1, 1.3, 0.0, 0.5])
    length = kind([2.3, 2.4, 8.0, 8.0, 20.0, 19.9])
    assert silence_rule(spoken, silence, length).tolist() == [0, 1, 0, 2, 3, 0]
    assert silence_rule(spoken, silence, length, KALDI_RULES[1:2]).tolist() == [0, 0, 0, 1, 0, 0]
    with pytest.raises(ConfigError, match="silence"):
        SilenceRule(True, -1.0, 0.0)
