"""``nar-speech synthesize`` and ``edit`` with random weights: files, options, one line per error."""

import io
import json

import numpy as np
import pytest
import soundfile
import torch

from nar_speech import cli
from nar_speech.audio import read_audio
from nar_speech.locate import ASSETS
from nar_speech.pipelines import watermark
from nar_speech.text.g2p.espeak import Espeak
from tests.speech_models import speech, write_official, write_own

pytest.importorskip("espeakng_loader")
SAMPLE = ASSETS / "sample.flac"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    source, folder = (tmp_path_factory.mktemp(name) for name in ("official", "own"))
    write_official(source)
    write_own(folder / "tiny", source / "acoustic_codec", source / "w2v-bert-2.0")
    return folder / "tiny"


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "prompt.wav"
    soundfile.write(path, speech(1.2).samples, 24000)
    return path


@pytest.fixture
def run(capsys, model):
    def call(*words):
        code = cli.main([*map(str, words), "--model", str(model), "--device", "cpu"])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_speech_is_written(run, prompt, tmp_path):
    target = tmp_path / "out.wav"
    words = ("synthesize", "Hello there.", "--prompt", prompt, "--prompt-text", "Good morning.", "-o", target)
    code, out, err = run(*words)
    assert (code, out, err) == (0, f"{target}\n", "")
    first = target.read_bytes()
    assert soundfile.info(target).samplerate == 24000
    assert run(*words)[0] == 0
    assert target.read_bytes() == first
    assert run(*words, "--seed", 1)[0] == 0
    assert target.read_bytes() != first


def test_options_have_a_say(run, prompt, tmp_path):
    target = tmp_path / "out.flac"
    code, out, _ = run(
        *("synthesize", "Hello there. How are you?", "--prompt", prompt, "--prompt-text", "Good morning."),
        *("--duration", 2.5, "--steps", 2, "--acoustic-steps", "2,1", "--cfg", 0, "--temperature", 0.5),
        *("--guided-layers", 1, "--json", "-o", target),
    )
    told = json.loads(out)
    assert code == 0
    assert told["duration"] == pytest.approx(2.5, abs=0.03)
    assert told["pieces"][0]["text"] == "Hello there. How are you?"
    assert (told["prompt_text"], told["watermarked"], told["seed"]) == ("Good morning.", False, 0)


def test_phones_and_standard_input(run, prompt, tmp_path, monkeypatch):
    target = tmp_path / "out.wav"
    given = ("--prompt", prompt, "--prompt-text", "Hello.", "-o", target)
    assert run("synthesize", "h|ə|l|oʊ", "--language", "phones", *given)[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe."))
    assert run("synthesize", "-", *given)[0] == 0
    prompt_bytes = prompt.read_bytes()
    monkeypatch.setattr("sys.stdin", type("Pipe", (), {"buffer": io.BytesIO(prompt_bytes)})())
    assert run("synthesize", "Hello.", "--prompt", "-", "--prompt-text", "Hello.", "-o", target)[0] == 0


def test_the_prompt_is_recognised(run, tmp_path):
    code, out, _ = run("synthesize", "Hello.", "--prompt", SAMPLE, "--json", "-o", tmp_path / "out.wav")
    assert code == 0
    assert len(json.loads(out)["prompt_text"].split()) > 5


def test_an_edit_leaves_everything_else(run, tmp_path):
    source, target = tmp_path / "in.wav", tmp_path / "out.wav"
    recording = read_audio(SAMPLE, 16000)
    soundfile.write(source, recording.samples, 16000, subtype="PCM_24")
    said = run("transcribe", SAMPLE)
    assert said[0] == 2  # it is no model that recognises
    heard = (ASSETS / "sample.txt").read_text().split()
    word = heard[3]
    words = ("edit", source, "--from", word, "--to", "something else entirely", "--json", "-o", target)
    code, out, err = run(*words, "--occurrence", 1)
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert "something else entirely" in told["transcript"]
    assert soundfile.info(target).subtype == "PCM_24"
    before, after = (soundfile.read(path, dtype="int32")[0] for path in (source, target))
    begin, end = round(told["start"] * 16000), round(told["end"] * 16000)
    assert 0 < begin < end < len(after)
    assert np.array_equal(after[:begin], before[:begin])
    assert np.array_equal(after[end:], before[len(before) - len(after) + end :])
    code, _, err = run("edit", source, "--from", "xylophone", "--to", "b", "-o", target)
    assert code == 2
    assert "'xylophone' is not said in the recording" in err


def wrong(run, *words):
    """The one line on stderr of a command that fails with code 2."""
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("nar-speech: error: ")
    return err


@pytest.mark.parametrize(
    ("text", "extra", "message"),
    [
        ("", (), "text: is empty"),
        ("Привет", (), "Cyrillic"),
        ("你好", ("--language", "fr"), "Han letters"),
        ("...", (), "nothing that can be said"),
        ("word " * 20_000, (), "100000 characters; at most 20000"),
        ("Hello there, my friend.", ("--duration", "0.1"), "are too short for"),
        ("Hello.", ("--duration", "99"), "at most 60 s are made at once"),
        ("Hello.", ("--speed", "9"), "speed: got 9; must be 0.25 to 4"),
        ("Hello.", ("--length", "predictor"), "no predictor of durations"),
        ("Hello.", ("-o", "x.txt"), "suffix must be one of"),
        ("Hello.", ("-o", "/none/x.wav"), "no such folder"),
    ],
)
def test_a_wrong_text_or_option_is_one_line(run, prompt, tmp_path, monkeypatch, text, extra, message):
    monkeypatch.chdir(tmp_path)
    given = ("--prompt", prompt, "--prompt-text", "Good morning.", *extra)
    assert message in wrong(run, "synthesize", text, *given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (speech(0.4).samples, "lasts 0.40 s; give at least 0.5 s"),
        (speech(33).samples, "longer than 30 s"),
        (np.zeros(48000, np.float32), "is silent"),
        (None, "no such file"),
    ],
)
def test_a_wrong_prompt_is_one_line(run, tmp_path, samples, message):
    path = tmp_path / "prompt.wav"
    if samples is not None:
        soundfile.write(path, samples, 24000)
    given = ("--prompt", path, "--prompt-text", "Good morning.", "-o", tmp_path / "x.wav")
    err = wrong(run, "synthesize", "Hello.", *given)
    assert message in err
    assert "prompt.wav" in err


def test_what_is_not_installed_is_said(run, prompt, tmp_path, monkeypatch):
    given = ("--prompt", prompt, "--prompt-text", "Good morning.", "-o", tmp_path / "x.wav")

    def missing(name):
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(name)

    watermark.load_watermark.cache_clear()
    monkeypatch.setattr("importlib.metadata.distribution", missing)
    from nar_speech.errors import MissingExtraError

    def no_espeak():
        raise MissingExtraError("espeakng-loader", "tts", "English text to phones")

    monkeypatch.setattr(Espeak, "find", staticmethod(no_espeak))
    err = wrong(run, "synthesize", "Hello.", *given)
    assert "English text to phones needs the package" in err
    assert "nar-speech[tts]" in err


def test_a_silent_or_missing_recording_cant_be_edited(run, tmp_path):
    path = tmp_path / "in.wav"
    given = ("--from", "a", "--to", "b", "-o", tmp_path / "out.wav")
    assert "no such file" in wrong(run, "edit", path, *given)
    soundfile.write(path, np.zeros(48000), 24000)
    assert "is silent" in wrong(run, "edit", path, *given)
    assert "--to: is empty" in wrong(run, "edit", path, "--from", "a", "--to", "", "-o", tmp_path / "o.wav")
    assert "would be overwritten" in wrong(run, "edit", path, "--from", "a", "--to", "b", "-o", path)


def test_no_model_ships_yet_or_it_is_named(capsys, prompt, tmp_path):
    words = [
        "synthesize",
        "Hello.",
        "--prompt",
        str(prompt),
        "--prompt-text",
        "Hi.",
        "-o",
        str(tmp_path / "x.wav"),
    ]
    assert cli.main([*words, "--model", "mini_en", "--device", "cpu"]) == 2
    assert "not a model that speaks" in capsys.readouterr().err
