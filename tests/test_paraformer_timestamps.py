"""CIF weights and peaks to token times."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.layers.cif import fire_track, prefix_sums
from nar_speech.text.timestamps import FIRE, fire_frames, fire_times, token_times

torch.set_num_threads(1)


def impulses(frames, places):
    alphas = torch.zeros(frames)
    alphas[places] = 1.0
    return alphas, fire_track(prefix_sums(alphas[None]))[0]


def test_a_token_lasts_from_its_fire_to_the_next():
    alphas, peaks = impulses(30, [4, 10, 20, 28])
    spans = fire_times(alphas, peaks, ["a", "b", "c"], frame_seconds=0.1, shift=0.0)
    assert [s.text for s in spans] == ["a", "b", "c"]
    assert [(round(s.start, 3), round(s.end, 3)) for s in spans] == [(0.4, 1.0), (1.0, 2.0), (2.0, 3.0)]


def test_silence_before_after_and_in_long_tokens():
    alphas, peaks = impulses(60, [10, 30, 40])
    spans = fire_times(alphas, peaks, ["a", "b"], frame_seconds=0.1, shift=0.0)
    assert [s.text for s in spans] == ["<sil>", "a", "<sil>", "b", "<sil>"]
    assert [round(s.end, 3) for s in spans] == [1.0, 2.2, 3.0, 5.0, 6.0]
    quiet = fire_times(alphas, peaks, ["a", "b"], frame_seconds=0.1, shift=0.0, mark_silence=False)
    assert [s.text for s in quiet] == ["a", "b"]


def test_an_offset_moves_everything_and_a_final_eos_is_dropped():
    alphas, peaks = impulses(30, [4, 10, 20])
    plain = fire_times(alphas, peaks, ["a", "b"], 0.1)
    moved = fire_times(alphas, peaks, ["a", "b", "</s>"], 0.1, offset=2.0)
    assert [s.text for s in plain] == [s.text for s in moved]
    assert all(m.start == pytest.approx(p.start + 2) for m, p in zip(moved, plain, strict=True))


def test_no_tokens_or_no_frames():
    alphas, peaks = impulses(5, [2])
    assert fire_times(alphas, peaks, []) == []
    assert fire_times(torch.zeros(0), torch.zeros(0), ["a"]) == []
    assert token_times(alphas, peaks, 0, 0.06) == ([], [])


def test_weights_are_not_changed():
    alphas, peaks = impulses(30, [4, 10])
    before = alphas.clone()
    fire_times(alphas, peaks, ["a", "b", "c", "d"])
    assert torch.equal(alphas, before)


@given(st.integers(1, 80), st.integers(0, 30), st.integers(0, 999), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_token_gets_ordered_times_within_the_sound(frames, tokens, seed, silent):
    """Also with more tokens than frames, and where all weights are zero."""
    generator = torch.Generator().manual_seed(seed)
    alphas = torch.zeros(frames) if silent else torch.rand(frames, generator=generator)
    peaks = fire_track(prefix_sums(alphas[None]))[0]
    starts, ends = token_times(alphas, peaks, tokens, 0.06)
    assert len(starts) == len(ends) == tokens
    assert all(0 <= a <= b <= frames * 0.06 + 1e-9 for a, b in zip(starts, ends, strict=True))
    assert starts == sorted(starts)


@given(st.integers(5, 80), st.integers(0, 999), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_recut_fires_equal_the_loop(frames, seed, count):
    alphas = torch.rand(frames, generator=torch.Generator().manual_seed(seed)) + 0.01
    scaled = alphas * (count / alphas.sum())
    if scaled.max() > 0.99:
        return
    want = (fire_track(prefix_sums(scaled[None]), FIRE, FIRE)[0] >= FIRE).nonzero().flatten().tolist()
    assert fire_frames(alphas, torch.zeros(frames), count).tolist() == want


def test_the_official_recut_places_one_end_a_frame():
    alphas = torch.tensor([0.1, 2.0, 2.0, 0.1, 0.1])
    assert fire_frames(alphas, torch.zeros(5), 4).tolist() == [1, 2, 2, 4]
    assert fire_frames(alphas, torch.zeros(5), 4, official=True).tolist() == [1, 2, 3, 4]
    alphas = torch.tensor([0.1, 0.1, 0.1, 0.1, 4.0])
    assert fire_frames(alphas, torch.zeros(5), 4, official=True).tolist() == [4]
    assert fire_times(alphas, torch.zeros(5), ["a", "b", "c"], official=True) == []
    assert len(fire_times(alphas, torch.zeros(5), ["a", "b", "c"])) == 3
