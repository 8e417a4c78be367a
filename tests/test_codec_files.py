"""Token files, the runner, and the command ``codec``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nar_speech import cli, locate
from nar_speech.audio import info, read_audio, write_audio
from nar_speech.cli_output import keep_inputs
from nar_speech.codec.folder import write_codec_folder
from nar_speech.codec.tokens import read_tokens, write_tokens
from nar_speech.errors import ConfigError, InputError
from nar_speech.pipelines.codec import CodecRunner
from nar_speech.types import ModelCard
from tests.codec_models import BUILDERS, codec, waves


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs ``nar-speech codec ...`` with a small spectral codec as the embedded one: code, stdout, stderr."""
    card = ModelCard(name="mini_codec", task="codec", model="spectral", sample_rate=2000)
    write_codec_folder(tmp_path / "assets" / "mini_codec", codec("spectral"), card)
    monkeypatch.setattr(locate, "ASSETS", tmp_path / "assets")

    def call(*words):
        try:
            code = cli.main(["codec", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def sounds(tmp_path):
    """Recordings of other rates and channels, one of them broken, in a folder."""
    folder = tmp_path / "sounds"
    (folder / "sub").mkdir(parents=True)
    draw = np.random.default_rng(0)
    write_audio(folder / "a.wav", draw.uniform(-0.5, 0.5, 4000).astype(np.float32), 4000)
    write_audio(folder / "b.flac", draw.uniform(-0.5, 0.5, (2, 8100)).astype(np.float32), 8000)
    write_audio(folder / "sub" / "a.wav", draw.uniform(-0.5, 0.5, 2001).astype(np.float32), 2000)
    return folder


def test_there_and_back(run, sounds, tmp_path):
    tokens, back = tmp_path / "a.safetensors", tmp_path / "back.wav"
    assert run("encode", sounds / "a.wav", "-o", tokens) == (0, "", "")
    file = read_tokens(tokens)
    made = codec("spectral")
    want = made.encode(torch.from_numpy(read_audio(sounds / "a.wav", 2000).samples)[None, None])
    assert torch.equal(file.codes.tokens, want.tokens)
    assert load_file(tokens)["tokens"].dtype == torch.uint8
    assert run("decode", tokens, "-o", back) == (0, "", "")
    header = info(back)
    assert (header.sample_rate, header.channels, header.frames) == (2000, 1, 2000)
    sound, _ = made.decode(want)
    np.testing.assert_allclose(read_audio(back, 2000).samples, sound[0, 0].clamp(-1, 1).numpy(), atol=2e-4)


def test_blocks_change_nothing(run, sounds, tmp_path):
    files = []
    for block in (10, 0.013):
        files.append(tmp_path / f"{block}.safetensors")
        assert run("encode", sounds / "a.wav", "-o", files[-1], "--block", block, "--codebooks", 2)[0] == 0
        assert run("decode", files[-1], "-o", tmp_path / f"{block}.wav", "--block", block)[0] == 0
    one, other = (read_tokens(file) for file in files)
    assert torch.equal(one.codes.tokens, other.codes.tokens)
    assert (one.seconds, one.fingerprint, one.bytes) == (other.seconds, other.fingerprint, other.bytes)
    assert read_tokens(files[0]).codes.tokens.shape[1] == 2
    first, second = (read_audio(f.with_suffix(".wav"), 2000).samples for f in files)
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_folders_and_one_bad_file(run, sounds, tmp_path):
    (sounds / "broken.wav").write_bytes(b"RIFF nothing")
    out, back = f"{tmp_path}/tokens/", f"{tmp_path}/back/"
    code, stdout, err = run("encode", sounds, "--recursive", "-o", out)
    assert (code, stdout) == (1, "")
    assert err.count("\n") == 1
    assert "broken.wav" in err
    names = sorted(str(p.relative_to(out)) for p in (tmp_path / "tokens").rglob("*.*"))
    assert names == ["a.safetensors", "b.safetensors", "sub/a.safetensors"]
    (tmp_path / "tokens" / "bad.safetensors").write_bytes(b"junk")
    code, _, err = run("decode", out, "--recursive", "-o", back, "--format", "flac")
    assert code == 1
    assert "bad.safetensors: not a token file" in err
    assert sorted(p.name for p in (tmp_path / "back").rglob("*.flac")) == ["a.flac", "a.flac", "b.flac"]
    assert not list((tmp_path / "back").rglob(".part*"))


def test_resume_leaves_what_is_there(run, sounds, tmp_path):
    out = tmp_path / "tokens"
    assert run("encode", sounds, "-o", f"{out}/")[0] == 0
    mark = (out / "a.safetensors").stat().st_mtime_ns
    (out / "b.safetensors").unlink()
    assert run("encode", sounds, "-o", f"{out}/", "--resume")[0] == 0
    assert (out / "b.safetensors").is_file()
    assert (out / "a.safetensors").stat().st_mtime_ns == mark


def test_reports(run, sounds, tmp_path):
    code, out, err = run("report", sounds / "a.wav", sounds / "missing.wav", "-o", tmp_path / "pictures")
    assert code == 1
    assert "missing.wav" in err
    line = json.loads(out)
    assert line["codebooks"] == len(line["used"]) == 3
    assert line["bits_per_second"] == pytest.approx(3 * 4 * 2000 / 16, rel=0.02)
    assert all(0 < share <= 1 for share in line["used"])
    assert all(1 <= number <= 16.001 for number in line["perplexity"])
    assert (tmp_path / "pictures" / "a.png").stat().st_size > 5000
    assert json.loads((tmp_path / "pictures" / "report.jsonl").read_text()) == line
    code, _, _ = run(
        "encode", sounds / "a.wav", "-o", tmp_path / "a.safetensors", "--report", tmp_path / "pictures"
    )
    assert code == 0
    assert (tmp_path / "pictures" / "a1.png").is_file()


def test_info(run, sounds, tmp_path):
    run("encode", sounds / "a.wav", "-o", tmp_path / "a.safetensors")
    code, out, _ = run("info", tmp_path / "a.safetensors")
    about = json.loads(out)
    assert (code, about["codec"], about["seconds"], about["codebooks"]) == (0, "mini_codec", 1.0, 3)
    code, out, _ = run("info", "mini_codec")
    about_codec = json.loads(out)
    assert (code, about_codec["kind"], about_codec["sample_rate"]) == (0, "spectral", 2000)
    assert about_codec["fingerprint"] == about["fingerprint"]


def test_wrong_usage(run, sounds, tmp_path):
    tokens = tmp_path / "a.safetensors"
    run("encode", sounds / "a.wav", "-o", tokens)
    before = (sounds / "a.wav").read_bytes()
    for words, wanted in (
        (("encode", sounds / "a.wav"), "--output"),
        (("encode", sounds, "-o", tmp_path / "one.safetensors"), "is one file for several inputs"),
        (("encode", sounds / "a.wav", "-o", sounds / "a.wav"), "would be overwritten"),
        (("encode", sounds / "a.wav", "-o", tokens, "--resume"), "works with an output folder"),
        (("encode", sounds / "a.wav", "-o", tokens, "--codebooks", 4), "codebooks: got 4"),
        (("encode", sounds / "a.wav", "-o", tokens, "--codebooks", 0), "must be a whole number above 0"),
        (("encode", sounds / "a.wav", "-o", tokens, "--block", 1e9), "block: got"),
        (("encode", sounds / "a.wav", "-o", tokens, "--codec", "nothing"), "no such codec"),
        (("encode", sounds / "missing.wav", "-o", tmp_path / "x"), "no such file"),
        (("decode", tokens, "-o", tmp_path / "x.unknown"), "can't tell the format"),
        (("decode", sounds / "a.wav", "-o", tmp_path / "x.wav"), "not a token file"),
        (("decode", tmp_path / "none", "-o", tmp_path / "x.wav"), "no such token file"),
        (("info", tmp_path / "none"), "none: no such"),
        (("encode", "-", "-o", tmp_path / "x", "--report", tmp_path / "x"), "can be read only once"),
        (("nonsense",), "invalid choice"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, ""), words
        assert wanted in err
        assert err.count("\n") == 1
    assert (sounds / "a.wav").read_bytes() == before
    assert not (tmp_path / "x.wav").exists()


def test_many_inputs_are_each_looked_at_once(tmp_path, monkeypatch):
    inputs, outputs = ([tmp_path / f"{n}.{end}" for n in range(30)] for end in ("wav", "safetensors"))
    for path in (*inputs, *outputs):
        path.touch()
    calls, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **more: calls.append(path) or stat(path, **more))
    keep_inputs("--output", outputs, inputs)
    assert len(calls) <= 4 * 30
    (tmp_path / "link").symlink_to(inputs[7])
    with pytest.raises(ConfigError, match="link: is an input and would be overwritten"):
        keep_inputs("--output", [*outputs, tmp_path / "link"], inputs)


def test_the_default_codec_that_is_not_there(run, sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "ASSETS", tmp_path / "nothing")
    code, _, err = run("encode", sounds / "a.wav", "-o", tmp_path / "x.safetensors")
    assert code == 2
    assert "mini_codec is not in this installation" in err


def test_help_of_every_action(run):
    for action in ("encode", "decode", "report", "info"):
        code, out, _ = run(action, "--help")
        assert code == 0
        assert "--offline" in out


@pytest.mark.parametrize("name", BUILDERS)
def test_every_codec_from_file_to_file(name, tmp_path):
    made = codec(name)
    sound = waves(made, 1, 331)[0].numpy()
    write_audio(tmp_path / "in.wav", sound.clip(-1, 1), made.sample_rate, subtype="FLOAT")
    runner = CodecRunner(made, block_seconds=0.03)
    runner.encode_file(tmp_path / "in.wav", tmp_path / "t.safetensors")
    want = made.encode(torch.from_numpy(sound.clip(-1, 1))[None])
    file = read_tokens(tmp_path / "t.safetensors")
    assert torch.equal(file.codes.tokens, want.tokens)
    runner.decode_file(tmp_path / "t.safetensors", tmp_path / "out.wav")
    decoded = made.decode(want)[0][0].clamp(-1, 1).numpy()
    got = read_audio(tmp_path / "out.wav", made.sample_rate, mono=False).samples
    np.testing.assert_allclose(np.atleast_2d(got), decoded, atol=3e-4)


def test_channels_are_mixed_to_what_the_codec_wants():
    mono, stereo = CodecRunner(codec("mimi")), CodecRunner(codec("encodec chunks, no overlap"))
    left, right = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 500)).astype(np.float32)
    both = np.stack([left, right])
    rate = stereo.codec.sample_rate
    assert torch.equal(
        stereo.encode((left, rate)).tokens, stereo.encode((np.stack([left, left]), rate)).tokens
    )
    middle = ((left + right) / 2).astype(np.float32)
    three = np.stack([left, right, middle])
    assert torch.equal(stereo.encode((three, rate)).tokens, stereo.encode((three.mean(0), rate)).tokens)
    rate = mono.codec.sample_rate
    assert torch.equal(mono.encode((both, rate)).tokens, mono.encode((both.mean(0), rate)).tokens)
    with pytest.raises(ConfigError, match="block"):
        CodecRunner(codec("mimi"), 0.0)


def test_codes_of_several_recordings_and_of_none():
    made = codec("spectral")
    runner = CodecRunner(made)
    with pytest.raises(InputError, match="2 recordings"):
        runner.decode(made.encode(waves(made, 2, 50)))
    assert runner.decode(made.encode(waves(made, 1, 1)[:, :, :0])).samples.shape == (0,)


def test_messages_name_the_file_that_was_asked_for(tmp_path, caplog):
    made = codec("spectral")
    runner = CodecRunner(made)
    runner.encode_file((waves(made, 1, 50)[0, 0].numpy(), 2000), tmp_path / "t.safetensors")
    runner.decode_blocks = lambda codes: iter([np.full((1, 50), 3.0, np.float32)])
    runner.decode_file(tmp_path / "t.safetensors", tmp_path / "out.wav")
    assert f"{tmp_path}/out.wav: samples reach 3" in caplog.text
    with pytest.raises(InputError, match=f"^{tmp_path}/out.unknown: can't tell the format"):
        runner.decode_file(tmp_path / "t.safetensors", tmp_path / "out.unknown")


def test_token_files_that_are_wrong(tmp_path):
    made = codec("encodec chunks")
    codes = made.encode(waves(made, 1, 400))
    good = tmp_path / "good.safetensors"
    write_tokens(good, codes, made)
    whole, tensors = good.read_bytes(), load_file(good)
    file = read_tokens(good)
    file.check(made, good)
    with pytest.raises(InputError, match="not of 'mimi'; decode with --codec encodec"):
        file.check(codec("mimi"), good)
    with pytest.raises(InputError, match="one recording"):
        write_tokens(good, made.encode(waves(made, 2, 400)), made)
    numbers = {"version": 1, "samples": 400, "sample_rate": 2000, "channels": 2, "hop": 12}
    numbers |= {"codebook_size": 16, "chunk_frames": 9}
    about = {"format": "nar_speech.tokens", "codec": "encodec", "fingerprint": ""}
    about |= {key: str(value) for key, value in numbers.items()}
    path = tmp_path / "bad.safetensors"

    def refused(words):
        with pytest.raises(InputError, match=words) as caught:
            read_tokens(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    save_file(tensors, path, about)
    read_tokens(path)
    for size in (0, 4, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("token file")
    for key, value, words in (
        ("format", "other", "not a token file"),
        ("version", "2", "of version 2"),
        ("samples", "-3", "samples is '-3'"),
        ("hop", "0", "hop is 0"),
        ("samples", "99999999", "samples can't be of"),
        ("codebook_size", "x", "codebook_size is 'x'"),
        ("codebook_size", "3", "is not in 0 to 2"),
        ("chunk_frames", "3", "scales of shape"),
    ):
        save_file(tensors, path, {**about, key: value})
        refused(words)
    for change in (tensors["tokens"].float(), tensors["tokens"][0], tensors["tokens"][:, :0]):
        save_file({**tensors, "tokens": change.contiguous()}, path, about)
        refused("expected")
    save_file({**tensors, "scales": tensors["scales"] * torch.inf}, path, about)
    refused("finite")


def test_large_codebooks_take_two_bytes(tmp_path):
    from nar_speech.codec.tokens import _smallest

    assert [_smallest(size) for size in (256, 257, 32768, 32769)] == [
        torch.uint8,
        torch.int16,
        torch.int16,
        torch.int32,
    ]
