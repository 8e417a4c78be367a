"""The watermark: marked and unmarked sound is told apart, sound stays what it was, nothing unsafe is run."""

import importlib.metadata
import json
import sys

import numpy as np
import pytest
import torch

from nar_speech import cli
from nar_speech.audio import read_audio, resample, write_audio
from nar_speech.errors import MissingExtraError
from nar_speech.locate import ASSETS
from nar_speech.pipelines import watermark
from nar_speech.pipelines.watermark import add_watermark, find_watermark
from nar_speech.types import Audio
from tests.speech_models import QUICK, speech, tiny_synthesizer

try:
    importlib.metadata.distribution(watermark.PACKAGE)
except importlib.metadata.PackageNotFoundError:
    pytest.skip("resemble-perth is not installed", allow_module_level=True)

SPEECH = read_audio(ASSETS / "sample.flac", 24000, duration=6.0).samples


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def marked():
    return add_watermark(SPEECH, 24000)


def test_a_mark_is_found_where_there_is_one(marked):
    clean, found = find_watermark(SPEECH, 24000), find_watermark(marked, 24000)
    assert not any(part.marked for part in clean)
    assert all(part.marked for part in found)
    assert (found[0].start, found[0].end) == (0.0, pytest.approx(len(SPEECH) / 24000, abs=0.01))
    assert [part.start for part in found[1:]] == [0.0, 2.0]


def test_a_mark_lasts(marked, tmp_path):
    for suffix in ("mp3", "ogg"):
        write_audio(tmp_path / f"a.{suffix}", Audio(marked, 24000))
        again = read_audio(tmp_path / f"a.{suffix}", 16000, duration=3.5)
        assert find_watermark(again.samples, 16000)[0].marked
    assert find_watermark(0.1 * marked[:72_000], 24000)[0].marked
    assert find_watermark(marked[30_000:60_000], 24000)[0].marked


def test_the_sound_stays_what_it_was(marked):
    change = marked - SPEECH
    assert marked.shape == SPEECH.shape
    assert marked.dtype == np.float32
    assert np.abs(marked).max() <= 1
    assert (SPEECH**2).sum() > 10 * (change**2).sum()
    spectrum = np.abs(np.fft.rfft(change)) ** 2
    above = round(2500 / 12000 * len(spectrum))
    assert spectrum[above:].sum() < 1e-4 * spectrum.sum()


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_any_rate(rate):
    sound = resample(SPEECH[:72_000], 24000, rate)
    marked = add_watermark(sound, rate)
    assert marked.shape == sound.shape
    assert find_watermark(marked, rate)[0].marked


def test_silence_and_crumbs():
    for sound in (np.zeros(24000, np.float32), SPEECH[:300]):
        assert np.array_equal(add_watermark(sound, 24000), sound)
        assert not find_watermark(np.zeros_like(sound), 24000)[0].marked
    find_watermark(SPEECH[:300], 24000)


def test_long_sound_is_looked_at_in_windows(marked, monkeypatch):
    monkeypatch.setattr(watermark, "LONG_SECONDS", 5.0)
    found = find_watermark(marked, 24000)
    assert found[0].score == pytest.approx(sum(part.score for part in found[1:]) / len(found[1:]))


def test_speech_is_marked_unless_told_otherwise():
    voice = tiny_synthesizer().voice(speech(1.0), "48 5 4 30 13", "phones")
    ids = tuple(range(40, 60))
    options = {name: value for name, value in QUICK.items() if name != "watermark"}
    plain = tiny_synthesizer()(ids, voice, duration=3.0, **options, watermark=False)
    marked = tiny_synthesizer()(ids, voice, duration=3.0, **options, watermark=True)
    assert (plain.watermarked, marked.watermarked) == (False, True)
    assert np.array_equal(marked.audio.samples, add_watermark(plain.audio.samples, 24000))


def test_watermark_check(marked, tmp_path, capsys):
    part = np.concatenate([SPEECH[:96_000], marked[:96_000]])
    for name, sound in (("clean", SPEECH), ("marked", marked), ("part", part)):
        write_audio(tmp_path / f"{name}.wav", Audio(sound, 24000))
    files = [str(tmp_path / f"{name}.wav") for name in ("clean", "marked", "part")]
    assert cli.main(["models", "watermark-check", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1].split(" (")[0] for line in lines[:2]] == ["not marked", "marked"]
    assert cli.main(["models", "watermark-check", "--json", files[2]]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["windows"][-1]["marked"]
    assert not tree["windows"][0]["marked"]
    assert cli.main(["models", "watermark-check", files[0], str(tmp_path / "none.wav")]) == 1
    assert "none.wav" in capsys.readouterr().err
    assert cli.main(["models", "watermark-check", str(tmp_path / "none.wav")]) == 2


def test_without_the_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    watermark.load_watermark.cache_clear()
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(MissingExtraError, match=r"nar-speech\[tts\]"):
        tiny_synthesizer()("Hello.", speech(1.0), watermark=True)


def test_no_code_of_the_package_is_run(marked):
    assert not [name for name in sys.modules if name == "perth" or name.startswith("perth.")]


def test_only_new_words_are_marked():
    sound = speech(4.0)
    got = tiny_synthesizer().edit(sound, "three", "eleven twelve", duration=1.0, watermark=True)
    begin, end = round(got.start * 24000), round(got.end * 24000)
    assert got.watermarked
    assert np.array_equal(got.audio.samples[:begin], sound.samples[:begin])
    assert np.array_equal(got.audio.samples[end:], sound.samples[round(got.old_end * 24000) :])
    plain = tiny_synthesizer().edit(sound, "three", "eleven twelve", duration=1.0, watermark=False)
    assert not np.array_equal(plain.audio.samples[begin:end], got.audio.samples[begin:end])
