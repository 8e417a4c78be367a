"""Measures of a reconstruction."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import InputError
from nar_speech.metrics_audio import codebook_use, log_spectral_distance, mel_distance, si_sdr

NOISE = np.random.default_rng(0).normal(0, 0.1, (2, 8000)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(level=st.floats(-30, 40), scale=st.floats(0.01, 100))
def test_si_sdr_of_noise_of_a_known_level(level, scale):
    target = NOISE[0] - NOISE[0].mean()
    noise = NOISE[1] - NOISE[1].mean()
    noise = noise - target * (noise @ target) / (target @ target)
    noise = noise * np.linalg.norm(target) / np.linalg.norm(noise) * 10 ** (-level / 20)
    assert si_sdr(target, scale * (target + noise)) == pytest.approx(level, abs=0.01)


def test_perfect_and_silent():
    assert si_sdr(NOISE, 0.3 * NOISE) > 80
    assert si_sdr(NOISE, np.zeros_like(NOISE)) == si_sdr(np.zeros_like(NOISE), NOISE) == -math.inf
    assert mel_distance(NOISE, NOISE, 16000) == log_spectral_distance(NOISE, NOISE) == 0


def test_distances_of_a_gain():
    assert mel_distance(NOISE, NOISE * 2, 16000) == pytest.approx(math.log(2), rel=1e-3)
    assert log_spectral_distance(NOISE, NOISE * 10) == pytest.approx(20, rel=1e-3)


def test_the_common_part_is_compared():
    longer = np.concatenate([NOISE, NOISE[:, :100]], 1)
    assert si_sdr(longer, NOISE) > 80
    for wrong in ((NOISE, NOISE[0]), (NOISE, NOISE[:, :0]), (NOISE[None], NOISE[None])):
        with pytest.raises(InputError, match="can't be compared"):
            si_sdr(*wrong)


def test_codebook_use():
    even, one = codebook_use(torch.stack([torch.arange(64) % 8, torch.zeros(64, dtype=torch.int64)]), 16)
    assert (even.used, one.used) == (0.5, 1 / 16)
    assert (even.perplexity, one.perplexity) == (pytest.approx(8), pytest.approx(1))
    for wrong in (torch.zeros(3, dtype=torch.int64), torch.full((1, 2), 16), torch.full((1, 2), -1)):
        with pytest.raises(InputError):
            codebook_use(wrong, 16)
