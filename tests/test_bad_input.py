"""Bad and unusual input through the real command line: one clear line each, the right exit code, no
traceback, and the results of good files kept."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from nar_speech import cli
from nar_speech import config as configs
from nar_speech.errors import ConfigError
from nar_speech.layers.whisper import WhisperEncoderConfig
from nar_speech.locate import ASSETS
from tests.model_folders import ctc_folder, funasr_folder, paraformer_folder

torch.set_num_threads(1)
RATE = 16000
EMBEDDED = ASSETS / "mini_en"


def noise(seconds, rate=RATE, channels=1):
    shape = (int(rate * seconds), channels) if channels > 1 else int(rate * seconds)
    return np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return paraformer_folder(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def good(tmp_path):
    soundfile.write(tmp_path / "good.wav", noise(1.0), RATE)
    return tmp_path / "good.wav"


@pytest.fixture
def run(model, capfd):
    """Run ``transcribe`` in this process; capfd also sees what C libraries write to stderr."""

    def call(*words, model=model):
        capfd.readouterr()
        code = cli.main(["transcribe", *map(str, words), "--model", str(model), "--device", "cpu"])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def wav(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path.read_bytes()


def bad_files(folder):
    """Name -> (bytes or None for no file, words that the message must hold)."""
    whole = wav(folder / "whole.wav", noise(1.0))
    flac = wav(folder / "whole.flac", noise(1.0))
    nothing = wav(folder / "nothing.wav", np.zeros(0, np.float32))
    nan, inf = noise(1.0), noise(1.0)
    nan[5000], inf[100] = np.nan, np.inf
    nan_bytes = wav(folder / "n.wav", nan, subtype="FLOAT")
    inf_bytes = wav(folder / "i.wav", inf, subtype="DOUBLE")
    for name in ("whole.wav", "whole.flac", "nothing.wav", "n.wav", "i.wav"):
        (folder / name).unlink()
    return {
        "missing.wav": (None, "no such file"),
        "empty.wav": (b"", "is empty (0 bytes)"),
        "header_only.wav": (whole[:44], "samples"),
        "cut_header.wav": (whole[:20], "not audio"),
        "cut.flac": (flac[:60], ""),
        "text.wav": (b"this is not audio at all, but a letter" * 20, "not audio"),
        "page.mp3": (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        "zeros.flac": (b"\0" * 5000, "not audio"),
        "samples.raw": (b"\1\2" * 5000, "has no header"),
        "nothing.wav": (nothing, "holds no samples"),
        "nan.wav": (nan_bytes, "NaN or infinite sample at 0.312 s"),
        "inf.wav": (inf_bytes, "NaN or infinite sample"),
    }


NAMES = [
    "missing.wav", "empty.wav", "header_only.wav", "cut_header.wav", "cut.flac", "text.wav", "page.mp3",
    "zeros.flac", "samples.raw", "nothing.wav", "nan.wav", "inf.wav",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_file_alone_and_beside_a_good_one(run, good, tmp_path, name):
    data, words = bad_files(tmp_path)[name]
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    code, out, err = run(path)
    assert (code, out) == (2, "")
    assert err.startswith("nar-speech: error: ")
    assert err.count("\n") == 1
    assert str(path) in err
    assert words in err
    _, text, _ = run(good)
    for inputs in ((path, good), (good, path)):
        code, out, err = run(*inputs)
        assert (code, out) == (1, f"{good}\t{text}")
        assert str(path) in err


def test_the_list_of_names_is_complete(tmp_path):
    assert list(bad_files(tmp_path)) == NAMES


def test_a_folder_with_one_bad_file(run, tmp_path):
    folder = tmp_path / "audio"
    folder.mkdir()
    for name in ("a.wav", "c.flac"):
        soundfile.write(folder / name, noise(0.5), RATE)
    (folder / "b.wav").write_bytes(b"broken")
    (folder / ".hidden.wav").write_bytes(b"broken")
    code, out, err = run(folder)
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == [
        str(folder / "a.wav"),
        str(folder / "c.flac"),
    ]
    assert err.count("\n") == 1
    assert str(folder / "b.wav") in err
    code, out, err = run(folder, "-o", f"{tmp_path}/out/")
    assert code == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.txt", "c.txt"]


def test_folders_without_audio(run, good, tmp_path):
    (tmp_path / "sub").mkdir()
    code, out, err = run(tmp_path / "sub")
    assert (code, out) == (2, "")
    assert "no audio file in this folder; --recursive" in err
    code, out, _ = run(tmp_path / "sub", good)
    assert (code, out.count("\n")) == (1, 1)


def test_a_truncated_recording_is_used_as_far_as_it_goes(run, tmp_path):
    data = wav(tmp_path / "x.wav", noise(2.0))
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    code, out, err = run(tmp_path / "cut.wav", "--format", "json")
    assert code == 0
    assert json.loads(out)["duration"] == pytest.approx(1.0, abs=0.01)
    assert "cut.wav: cut off or damaged" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 399, 400, 401])
def test_very_short_recordings(run, tmp_path, samples):
    soundfile.write(tmp_path / "x.wav", noise(1.0)[:samples], RATE)
    code, out, err = run(tmp_path / "x.wav", "--format", "json")
    assert (code, err) == (0, "")
    assert json.loads(out)["duration"] == pytest.approx(samples / RATE)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (192_000, 1), (16_000, 8), (44_100, 2), (1000, 1)])
def test_unusual_rates_and_channels(run, tmp_path, rate, channels):
    soundfile.write(tmp_path / "x.wav", noise(1.0, rate, channels), rate)
    code, out, err = run(tmp_path / "x.wav", "--format", "json")
    assert (code, err) == (0, "")
    assert json.loads(out)["duration"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("rate", [500, 1_000_000])
def test_impossible_rates(run, tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", np.zeros(1000, np.float32), rate)
    code, out, err = run(tmp_path / "x.wav")
    assert (code, out) == (2, "")
    assert f"sample rate is {rate} Hz; must be 1000 to 768000" in err


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0])
def test_silence_and_full_scale(run, tmp_path, level):
    soundfile.write(tmp_path / "x.wav", np.full(RATE, level, np.float32), RATE, subtype="FLOAT")
    code, _, err = run(tmp_path / "x.wav")
    assert (code, err) == (0, "")


def test_a_long_recording_of_silence_and_noise(run, tmp_path):
    """Ten minutes at a low rate; the silent parts give nothing."""
    samples = np.zeros(8000 * 600, np.float32)
    samples[8000 * 60 : 8000 * 70] = noise(10, 8000) * 0.05
    soundfile.write(tmp_path / "long.wav", samples, 8000)
    code, out, err = run(tmp_path / "long.wav", "--format", "json")
    assert (code, err) == (0, "")
    tree = json.loads(out)
    assert tree["duration"] == pytest.approx(600)
    assert all(50 < s["start"] < 80 for s in tree["segments"])


@pytest.mark.slow
def test_three_hours_in_bounded_memory(model, tmp_path):
    """In a process of its own: the peak must stay far below the 690 MB of the samples."""
    with soundfile.SoundFile(tmp_path / "long.flac", "w", RATE, 1) as file:
        for minute in range(180):
            part = np.zeros(RATE * 60, np.float32)
            part[: RATE * 5] = noise(5) * (0.2 if minute % 2 else 0.001)
            file.write(part)

    def peak(path):
        code = (
            "import resource, sys; from nar_speech import cli\n"
            f"code = cli.main(['transcribe', {str(path)!r}, '--model', {str(model)!r}, '--device', 'cpu',"
            " '--threads', '1', '--format', 'json'])\n"
            "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
            "print(peak, file=sys.stderr); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), int(done.stderr.split()[-1])

    soundfile.write(tmp_path / "short.flac", noise(30.0), RATE)
    _, short = peak(tmp_path / "short.flac")
    transcript, long = peak(tmp_path / "long.flac")
    assert transcript["duration"] == pytest.approx(180 * 60)
    assert long - short < 200


# ---- models ----


def error_line(run, good, folder):
    code, out, err = run(good, model=folder)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("nar-speech: error: ")
    return err


def test_a_misspelt_key_in_model_yaml(run, good, tmp_path):
    folder = paraformer_folder(tmp_path / "m")
    path = folder / "model.yaml"
    path.write_text(
        path.read_text().replace("sample_rate: 16000\n  num_mels", "sample_rat: 16000\n  num_mels")
    )
    line = error_line(run, good, folder)
    assert f"{path}: frontend: unknown key 'sample_rat'; valid keys: " in line
    path.write_text("card: [1\n")
    assert "not valid YAML" in error_line(run, good, folder)
    path.write_text("")
    assert "key 'card' is required" in error_line(run, good, folder)


def change(tree, keys, value):
    """Set ``tree[a][b]...``."""
    *parents, last = keys.split(".")
    for key in parents:
        tree = tree[key]
    tree[last] = value


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (paraformer_folder, "network.encoder_conf.linear_units", -1),
        (paraformer_folder, "network.encoder_conf.output_size", 10**7),
        (paraformer_folder, "network.encoder_conf.num_blocks", 10**9),
        (paraformer_folder, "network.encoder_conf.attention_heads", 0),
        (paraformer_folder, "network.decoder_conf.linear_units", -1),
        (paraformer_folder, "network.decoder_conf.kernel_size", -1),
        (paraformer_folder, "network.decoder_conf.attention_heads", 0),
        (paraformer_folder, "network.decoder_conf.attention_heads", 3),
        (paraformer_folder, "network.predictor_conf.l_order", 10**7),
        (paraformer_folder, "network.predictor_conf.l_order", "a"),
        (paraformer_folder, "network.hotword_conf.inner_dim", 0),
        (paraformer_folder, "network.encoder", "a"),
        (paraformer_folder, "network.predictor", None),
        (paraformer_folder, "frontend.frame_ms", 1e30),
        (paraformer_folder, "frontend.num_mels", 10**7),
        (paraformer_folder, "frontend.dither", float("inf")),
        (paraformer_folder, "tokenizer.file", ""),
        (paraformer_folder, "decoding.hotword_score", float("inf")),
        (paraformer_folder, "decoding.segments.pad", 1e30),
        (ctc_folder, "network.encoder_conf.cnn_module_kernel", 4),
        (ctc_folder, "network.encoder_conf.linear_units", -1),
        (ctc_folder, "network.encoder_conf.dropout_rate", 2.0),
        (ctc_folder, "network.decoder_conf.attention_heads", 0),
        (ctc_folder, "network.decoder_conf.num_blocks", -1),
        (ctc_folder, "network.vocab_size", 0),
        (ctc_folder, "network.sos", 10**6),
        (ctc_folder, "network.interctc_layers", [7]),
    ],
)
def test_an_impossible_value_in_model_yaml(run, good, tmp_path, make, key, value):
    folder = make(tmp_path / "m")
    path = folder / "model.yaml"
    tree = configs.read_yaml(path)
    change(tree, key, value)
    configs.write_yaml(tree, path)
    line = error_line(run, good, folder)
    assert f"{path}: {key.split('.')[0]}" in line
    assert key.split(".")[-1] in line or key == "tokenizer.file"


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_cut_vocabulary_is_called_damaged(run, good, tmp_path, keep):
    folder = tmp_path / "m"
    shutil.copytree(EMBEDDED, folder)
    path = folder / "tokenizer.model"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    line = error_line(run, good, folder)
    assert str(path) in line
    assert "damaged" in line or "not a sentencepiece model" in line


def test_the_encoder_of_whisper_checks_its_numbers():
    for key in ("output_size", "linear_units", "num_blocks", "max_positions", "attention_heads"):
        with pytest.raises(ConfigError, match=key):
            WhisperEncoderConfig(**{key: -1})


@pytest.mark.parametrize("make", [paraformer_folder, ctc_folder])
def test_checkpoints_that_do_not_fit(run, good, tmp_path, make):
    folder = make(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors, data = load_file(path), path.read_bytes()
    name = next(iter(tensors))
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != name}, f"1 missing: {name}"),
        ({**tensors, "more": torch.ones(2)}, "1 unexpected: more"),
        ({**tensors, name: torch.ones(3, 3)}, f"1 misshaped: {name} is 3x3 in the file"),
        ({**tensors, name: tensors[name] * torch.inf}, "NaN or infinite values"),
    ):
        save_file(changed, path)
        line = error_line(run, good, folder)
        assert words in line
        assert str(path) in line
    for broken, words in (
        (data[: len(data) // 2], "damaged or truncated"),
        (b"", "the file is empty"),
        (b"<html>login</html>", "is a web page"),
    ):
        path.write_bytes(broken)
        line = error_line(run, good, folder)
        assert words in line
        assert str(path) in line


class RunsCode:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_wants_to_run_code(run, good, tmp_path):
    folder = funasr_folder(tmp_path / "m")
    trap = tmp_path / "trap"
    torch.save({"state_dict": {"a": RunsCode(f"touch {trap}")}}, folder / "model.pt")
    line = error_line(run, good, folder)
    assert "model.pt: refused" in line
    assert "posix.system" in line
    assert not trap.exists()


def test_models_that_are_not_there(run, good, tmp_path):
    assert "no such model folder" in error_line(run, good, tmp_path / "gone")
    assert "not a model folder" in error_line(run, good, tmp_path)
    assert "is a file" in error_line(run, good, good)
    assert "did you mean 'paraformer-zh'?" in error_line(run, good, "paraformer_zh")


def test_through_a_process(model, good, tmp_path):
    """What users see: separate streams, the exit code of the process, nothing but the line."""
    (tmp_path / "bad.wav").write_bytes(b"broken")
    command = [sys.executable, "-m", "nar_speech", "transcribe", "--model", str(model), "--threads", "1"]
    done = subprocess.run(
        [*command, str(tmp_path / "bad.wav"), str(good)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.startswith(f"{good}\t")
    assert done.stdout.count("\n") == 1
    assert done.stderr.startswith(f"nar-speech: error: {tmp_path / 'bad.wav'}: ")
    assert done.stderr.count("\n") == 1


def test_a_file_name_that_is_not_utf8(model, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    soundfile.write(tmp_path / "x.wav", noise(0.5), RATE)
    os.rename(tmp_path / "x.wav", path)
    command = [sys.executable, "-m", "nar_speech", "transcribe", "--model", str(model), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(path + b"\t")
