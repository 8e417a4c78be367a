"""Augmentations that code a wave or change its tempo and pitch (data.codecs, data.warp)."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.data.augment import AugmentConfig, Augmenter
from nar_speech.data.codecs import CODECS, check_codecs, through_codec
from nar_speech.data.warp import change_pitch, change_tempo
from nar_speech.errors import ConfigError


def tone(seconds, hertz, rate=16000):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def hertz(wave, rate=16000):
    middle = wave[len(wave) // 4 : 3 * len(wave) // 4] * np.hanning(
        len(wave[len(wave) // 4 : 3 * len(wave) // 4])
    )
    return np.abs(np.fft.rfft(middle, 1 << 17)).argmax() * rate / (1 << 17)


def babble(seconds, seed=0, rate=16000):
    """Noise below 3 kHz with a changing level, so that a shift in time would show."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal(int(seconds * rate)))
    spectrum[int(3000 * seconds) :] = 0
    spectrum[: int(400 * seconds)] = 0
    wave = np.fft.irfft(spectrum, int(seconds * rate))
    wave *= 0.5 + np.repeat(rng.random(int(seconds * 20)), rate // 20)
    return (0.2 * wave / np.abs(wave).max()).astype(np.float32)


# ---- tempo and pitch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.8, 0.95, 1.2, 1.7])
def test_tempo_changes_length_but_neither_pitch_nor_level(factor):
    wave = tone(1.5, 440)
    out = change_tempo(wave, factor)
    assert len(out) == round(len(wave) / factor)
    assert out.dtype == np.float32
    assert hertz(out) == pytest.approx(440, abs=1.5)
    middle = slice(len(out) // 4, 3 * len(out) // 4)
    # The bins of a tone drift apart a little: phases aren't locked to the peak.
    assert np.std(out[middle]) == pytest.approx(np.std(wave), rel=0.15)


@pytest.mark.parametrize("factor", [0.85, 1.25])
def test_events_stay_in_their_places(factor):
    wave = np.zeros(32000, np.float32)
    for place in (6000, 15000, 27000):
        wave[place : place + 1600] = tone(0.1, 700)
    out = np.abs(change_tempo(wave, factor))
    for place in (6000, 15000, 27000):
        start, stop = int((place - 500) / factor), int((place + 2100) / factor)
        assert np.sum(out[start:stop] ** 2) > 0.2 * np.sum(out**2)
    assert np.sum(out[int(9500 / factor) : int(13500 / factor)] ** 2) < 1e-3 * np.sum(out**2)


@pytest.mark.parametrize("semitones", [-4.0, 2.0, 7.0])
def test_pitch_changes_frequency_but_not_length(semitones):
    wave = tone(1.0, 300)
    out = change_pitch(wave, semitones)
    assert len(out) == pytest.approx(len(wave), abs=4)
    assert hertz(out) == pytest.approx(300 * 2 ** (semitones / 12), rel=0.01)
    assert len(change_pitch(wave, semitones, 1.25)) == pytest.approx(len(wave) / 1.25, abs=4)


@given(length=st.integers(0, 3000), factor=st.floats(0.5, 2.0))
@settings(max_examples=60, deadline=None)
def test_any_length_can_be_stretched(length, factor):
    wave = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    out = change_tempo(wave, factor)
    assert np.isfinite(out).all()
    assert len(out) in (length, round(length / factor))
    assert np.array_equal(change_tempo(wave, 1.0), wave)


# ---- codecs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CODECS))
def test_codecs_change_the_wave_but_keep_it_recognisable_and_in_step(name):
    wave = babble(1.0)
    out = through_codec(wave, 16000, name, 0.5)
    assert out.shape == wave.shape
    assert out.dtype == np.float32
    correlation = np.fft.irfft(np.fft.rfft(out, 32768) * np.conj(np.fft.rfft(wave, 32768)))
    lag = int(np.argmax(correlation))
    assert min(lag, 32768 - lag) <= 2
    similarity = float(np.dot(out, wave) / np.linalg.norm(out) / np.linalg.norm(wave))
    assert similarity > 0.5
    assert not np.allclose(out, wave, atol=1e-4)
    assert through_codec(wave[:0], 16000, name).shape == (0,)


def test_stronger_coding_costs_more_of_the_signal():
    wave = babble(1.0, seed=3)
    errors = [np.std(through_codec(wave, 16000, "opus", strength) - wave) for strength in (0.0, 1.0)]
    assert errors[0] < errors[1]


def test_codecs_work_at_other_rates():
    wave = babble(0.5)[::2]
    assert through_codec(wave, 8000, "gsm").shape == wave.shape
    assert through_codec(np.repeat(babble(0.5), 3), 48000, "mp3", 1.0).shape == (24000,)


def test_unknown_codecs_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="ulaw"):
        check_codecs(("ulaw", "morse"))
    with pytest.raises(ConfigError, match="morse"):
        AugmentConfig(codec_prob=0.1, codecs=("morse",))
    with pytest.raises(ValueError, match="codecs"):
        AugmentConfig(codec_prob=0.1, codecs=())
    with pytest.raises(ValueError, match="tempo"):
        AugmentConfig(tempo=(1.2, 0.9))
    with pytest.raises(ValueError, match="pitch"):
        AugmentConfig(pitch=(-20.0, 0.0))
    import soundfile

    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": ""})
    with pytest.raises(ConfigError, match="libsndfile"):
        check_codecs(("mp3",))


# ---- inside the augmenter -----------------------------------------------------------------------------


def test_warp_and_codec_follow_their_probabilities_and_the_generator():
    wave = babble(1.0)
    plain = AugmentConfig(speed=(1.0,), volume_prob=0.0, noise_prob=0.0)
    assert np.array_equal(Augmenter(plain)(wave, np.random.default_rng(0)), wave)
    warped = AugmentConfig(speed=(1.0,), volume_prob=0.0, warp_prob=1.0)
    lengths = {len(Augmenter(warped)(wave, np.random.default_rng(seed))) for seed in range(12)}
    assert len(lengths) > 6
    assert all(16000 / 1.16 < length < 16000 / 0.89 for length in lengths)
    coded = AugmentConfig(speed=(1.0,), volume_prob=0.0, codec_prob=0.5)
    outs = [Augmenter(coded)(wave, np.random.default_rng(seed)) for seed in range(40)]
    changed = sum(not np.array_equal(out, wave) for out in outs)
    assert 8 <= changed <= 32
    again = [Augmenter(coded)(wave, np.random.default_rng(seed)) for seed in range(40)]
    assert all(np.array_equal(a, b) for a, b in zip(outs, again, strict=True))


@pytest.mark.slow
def test_a_worker_augments_300_times_as_fast_as_real_time():
    wave = babble(10.0)
    augment = Augmenter(
        AugmentConfig(reverb_prob=0.2, telephone_prob=0.05, silence=0.4, warp_prob=0.2, codec_prob=0.1)
    )
    rng = np.random.default_rng(0)
    augment(wave, rng)
    start = time.process_time()
    for _ in range(60):
        augment(wave, rng)
    assert 600 / (time.process_time() - start) > 300
