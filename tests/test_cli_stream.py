"""``nar-speech transcribe --stream``: files and live samples on the command line."""

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import soundfile
import torch

from nar_speech import cli, load_model, locate
from nar_speech.audio import read_audio
from nar_speech.cli_stream import ERASE, Status, columns_of, fitting
from nar_speech.engine import Final, Partial
from nar_speech.engine.asr_files import StreamTranscriber
from nar_speech.engine.asr_offline import OfflineModel
from tests.babble import RATE, babble, sharpened
from tests.model_folders import CONFORMER, ctc_folder, paraformer_folder

torch.set_num_threads(1)
SERVER_PACKAGES = ("fastapi", "uvicorn", "starlette", "websockets", "multipart", "prometheus_client")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    causal = {**CONFORMER, "causal": True, "use_dynamic_chunk": True}
    folders = {
        "ctc": ctc_folder(base / "ctc", encoder_conf=causal),
        "paraformer": paraformer_folder(base / "paraformer", stream={"chunk": [5, 10, 5]}, predictor="v2"),
        "offline": ctc_folder(base / "offline", seed=1),
    }
    return {name: sharpened(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    base = tmp_path_factory.mktemp("audio")
    (base / "sub").mkdir()
    for name, seconds, seed in (("a.wav", 1.0, 0), ("b.flac", 2.3, 1), ("sub/c.wav", 1.7, 2)):
        soundfile.write(base / name, babble(seconds, seed), RATE)
    return base


@pytest.fixture(scope="module")
def texts(folders, audio):
    """Of the stream, and of the second pass."""
    online = StreamTranscriber.load(folders["ctc"], "none", "cpu")
    offline = load_model(folders["ctc"], device="cpu")
    names = ("a.wav", "b.flac", "sub/c.wav")
    first = [result.transcript.text for result in online.results([audio / name for name in names])]
    assert all(first)
    return {name: (text, offline(audio / name).text) for name, text in zip(names, first, strict=True)}


@pytest.fixture
def run(folders, capsys):
    """Run ``transcribe --stream`` in this process: (exit code, stdout, stderr)."""

    def call(*words, model="ctc"):
        words = ["transcribe", "--stream", "--model", str(folders.get(model, model)), "--device", "cpu"] + [
            str(word) for word in words
        ]
        try:
            code = cli.main(words)
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_one_file_is_its_text(run, audio, texts):
    online, offline = texts["a.wav"]
    assert online != offline
    assert run(audio / "a.wav", "--second-pass", "none") == (0, online + "\n", "")
    assert run(audio / "a.wav") == (0, offline + "\n", "")


def test_several_files_are_named_and_in_order_however_many_are_heard_at_once(run, audio, texts):
    paths = [audio / name for name in texts]
    everything = "".join(f"{path}\t{texts[str(path.relative_to(audio))][0]}\n" for path in paths)
    for streams in (1, 2, 8):
        words = ("--second-pass", "none", "--max-streams", streams)
        assert run(*paths, *words) == (0, everything, "")
    assert run(audio, "--recursive", "--second-pass", "none") == (0, everything, "")


def test_another_model_for_the_second_pass(run, folders, audio, texts):
    wanted = load_model(folders["offline"], device="cpu")(audio / "a.wav").text + "\n"
    assert run(audio / "a.wav", "--second-pass", folders["offline"]) == (0, wanted, "")
    assert run(audio / "a.wav", model=f"{folders['offline']}+{folders['ctc']}") == (0, wanted, "")
    lone = run(audio / "b.flac", model="paraformer")
    assert lone[0] == 0
    assert lone[1].strip()
    assert lone != run(audio / "b.flac", "--second-pass", folders["offline"], model="paraformer")


def test_options_of_the_second_pass(run, folders, audio):
    wanted = load_model(folders["ctc"], device="cpu", decoder="ctc_beam", beam=3, hotwords=("zz",))
    words = (audio / "a.wav", "--decoder", "ctc_beam", "--beam", 3, "--hotwords", "zz")
    assert run(*words) == (0, wanted(audio / "a.wav").text + "\n", "")


def test_chunks_change_what_is_heard(run, audio, texts):
    words = (audio / "b.flac", "--second-pass", "none")
    assert run(*words, "--chunk-size", 16, "--left", 64)[1] == run(*words)[1]  # the defaults
    assert run(*words, "--chunk-size", 4, "--left", 0)[1] != run(*words)[1]


def test_formats_and_times(run, audio, texts):
    code, out, err = run(audio / "b.flac", "--format", "json")
    tree = json.loads(out)
    assert (code, err, tree["text"]) == (0, "", texts["b.flac"][1])
    assert (tree["duration"], tree["source"], tree["language"]) == (2.3, str(audio / "b.flac"), "en")
    (segment,) = tree["segments"]
    times = [t for word in segment["words"] for t in (word["start"], word["end"])]
    assert times == sorted(times)
    assert 0 <= segment["start"] <= segment["end"] <= 2.3
    assert 0 < segment["confidence"] <= 1
    assert run(audio / "a.wav", "--format", "srt")[1].startswith("1\n00:00:0")
    assert run(audio / "a.wav", "--format", "vtt")[1].startswith("WEBVTT\n\n00:00:0")
    assert run(audio / "a.wav", "--format", "tsv")[1].startswith("start\tend\ttext\n")
    assert len(run(audio / "a.wav", "--word-times")[1].split("\t")) >= 4


def test_output_folder_and_resume(run, audio, texts, tmp_path):
    (tmp_path / "a.txt").write_text("kept")
    words = (audio, "-o", tmp_path, "--resume", "--second-pass", "none")
    assert run(*words) == (0, "", "")
    assert (tmp_path / "a.txt").read_text() == "kept"
    assert (tmp_path / "b.txt").read_text() == texts["b.flac"][0] + "\n"
    assert run(*words, model="/nowhere") == (0, "", "")  # nothing is left to do


def test_one_bad_file_does_not_stop_the_others(run, audio, texts, tmp_path):
    bad, short = tmp_path / "bad.wav", tmp_path / "cut.flac"
    bad.write_bytes(b"broken")
    whole = (audio / "b.flac").read_bytes()
    short.write_bytes(whole[: len(whole) // 2])
    code, out, err = run(bad, audio / "a.wav", tmp_path / "gone.wav", "--second-pass", "none")
    assert (code, out) == (1, f"{audio / 'a.wav'}\t{texts['a.wav'][0]}\n")
    assert [line.count("nar-speech: error: ") for line in err.splitlines()] == [1, 1]
    assert "bad.wav" in err.splitlines()[0]
    assert "gone.wav" in err.splitlines()[1]
    assert run(bad, "--second-pass", "none")[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plot", "x.png"), "--plot: draws"),
        (("--batch-seconds", "9"), "--batch-seconds: is of whole files"),
        (("--nbest", "2", "--format", "json"), "--nbest: streams have one hypothesis"),
        (
            ("--second-pass", "none", "--beam", "3"),
            "for a second pass, and there is none; leave it",
        ),
        (("--beam", "3"), "--beam: decoder 'ctc_greedy' has no beam"),
        (("--no-lm", "--lm-weight", "0.3"), "--lm-weight: "),
        (("--word-times", "--format", "vtt"), "--word-times: vtt lists cues"),
        (("--max-streams", "257"), "--max-streams: got 257; must be 1 to 256"),
        (("--chunk-size", "100000"), "--chunk-size: got 100000; must be 1 to 1024"),
        (("--left", "9999999"), "--left: got '9999999'; must be a whole number, 0 to 8192"),
        (("--chunk-size", "0"), "--chunk-size: got '0'; must be a whole number above 0"),
        (("--left", "-1"), "--left"),
        (("--max-streams", "x"), "--max-streams: got 'x'"),
        (("--hotwords", "日本"), "日本"),
        (("-",), "live speech is heard alone"),
        (("--second-pass", "no such"), "no such model or folder"),
    ],
)
def test_options_that_make_no_sense_are_one_line(run, audio, words, message):
    code, out, err = run(audio / "a.wav", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_models_that_make_no_sense_are_one_line(run, folders, audio):
    a = audio / "a.wav"
    both = f"{folders['offline']}+{folders['ctc']}"
    for words, model, message in (
        ((), "offline", "recognises files only"),
        ((), f"x={folders['ctc']}", "ID= is for servers"),
        (("--second-pass", "none"), both, "names it already"),
        (
            (),
            f"{folders['ctc']}+mini_en",
            "mini_en hears files only; mini_en+mini_en_stream",
        ),
        (("--chunk-size", "4"), "paraformer", "leave these out"),
        (("--hotwords", "ada"), "paraformer", "use one with a second pass"),
    ):
        code, out, err = run(a, *words, model=model)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


@pytest.mark.parametrize("option", ["--second-pass=none", "--max-streams=2", "--chunk-size=4", "--left=0"])
def test_options_of_streams_need_streams(folders, audio, option, capsys):
    assert cli.main(["transcribe", str(audio / "a.wav"), "--model", str(folders["ctc"]), option]) == 2
    assert capsys.readouterr().err == (
        f"nar-speech: error: {option.split('=')[0]}: is for live speech; add --stream\n"
    )


def test_the_embedded_model_that_is_missing_is_named(run, audio, tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "ASSETS", tmp_path)
    for name in ("default", "mini_en", "mini_en_stream"):
        code, _, err = run(audio / "a.wav", model=name)
        assert (code, err.count("\n")) == (2, 1)
        assert "assets/mini_en_stream is not in this installation" in err


def test_ctrl_c_is_not_taken_for_a_fault_of_a_file(run, audio, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(OfflineModel, "run", interrupted)
    assert run(audio / "a.wav", audio / "b.flac") == (130, "", "nar-speech: error: interrupted\n")


# Live samples on standard input.

COMMAND = [sys.executable, "-m", "nar_speech", "transcribe", "--stream", "--device", "cpu", "--threads", "1"]


def sixteen_bits(samples):
    return (samples * 32767).astype("<i2").astype(np.float32) / 32768


def pcm(samples):
    return (samples * 32768).astype("<i2").tobytes()


BABBLE = sixteen_bits(babble(1.0))


@pytest.fixture(scope="module")
def speech():
    """A sentence, and the silence that ends it."""
    sentence = read_audio(locate.ASSETS / "sample.flac").samples
    return sixteen_bits(np.concatenate([sentence, np.zeros(RATE, np.float32)]))


@pytest.fixture
def live(folders):
    """A process that hears what is written to its ``stdin``."""
    started = []

    def start(*words, **more):
        pipe = subprocess.PIPE
        command = [*COMMAND, "--model", str(folders["ctc"]), *map(str, words), "-"]
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, **more))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def utterances(folders, speech):
    model = StreamTranscriber.load(folders["ctc"], "none", "cpu")
    (result,) = model.results([(np.concatenate([speech, BABBLE]), RATE)])
    found = [segment.text for segment in result.transcript.segments]
    assert len(found) == 2
    return found


def test_utterances_are_printed_as_they_end(live, speech, utterances):
    process = live("--second-pass", "none")
    data = pcm(np.concatenate([speech, BABBLE]))
    at = 2 * len(speech)
    process.stdin.write(data[: at - 1])  # odd bytes, as pipes give them
    process.stdin.flush()
    assert process.stdout.readline().decode() == utterances[0] + "\n"  # the pipe is still open
    out, err = process.communicate(data[at - 1 :], timeout=120)
    assert (out.decode(), err.decode(), process.returncode) == (utterances[1] + "\n", "", 0)


def waiting(pipe):
    """Bytes that nobody has read yet."""
    number = bytearray(4)
    fcntl.ioctl(pipe.fileno(), termios.FIONREAD, number)
    return int.from_bytes(number, sys.byteorder)


def test_ctrl_c_ends_live_speech_with_all_that_was_said(live, speech, utterances):
    process = live("--second-pass", "none")
    process.stdin.write(pcm(speech))
    process.stdin.flush()
    assert process.stdout.readline().decode() == utterances[0] + "\n"
    process.stdin.write(pcm(BABBLE))
    process.stdin.flush()
    while waiting(process.stdin):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1.0)  # from the pipe to the engine
    process.send_signal(signal.SIGINT)  # the pipe stays open
    assert process.wait(120) == 0
    assert (process.stdout.read().decode(), process.stderr.read()) == (utterances[1] + "\n", b"")


def test_formats_of_a_whole_recording_are_written_at_the_end(live, folders, speech, utterances, tmp_path):
    process = live("-o", f"{tmp_path}/out/", "--format", "json")
    out, err = process.communicate(pcm(speech), timeout=120)
    assert (out, err, process.returncode) == (b"", b"", 0)
    tree = json.loads((tmp_path / "out" / "stdin.json").read_text())
    (result,) = StreamTranscriber.load(folders["ctc"], device="cpu").results([(speech, RATE)])
    wanted = result.transcript
    assert [tree[name] for name in ("text", "source", "duration")] == [wanted.text, "-", wanted.duration]
    assert [(s["start"], s["end"]) for s in tree["segments"]] == [(s.start, s.end) for s in wanted.segments]
    assert tree["segments"][0]["text"] != utterances[0]  # of the second pass
    done = live("-o", f"{tmp_path}/out/", "--format", "json", "--resume")
    assert (done.communicate(timeout=120), done.returncode) == ((b"", b""), 0)


def test_silence_empties_an_older_file(live, tmp_path):
    (tmp_path / "old.txt").write_text("what was said yesterday")
    process = live("-o", tmp_path / "old.txt", "--second-pass", "none")
    out, err = process.communicate(bytes(64), timeout=120)
    assert (out, err, process.returncode) == (b"", b"", 0)
    assert (tmp_path / "old.txt").read_text() == ""


def test_live_speech_needs_no_package_of_the_server(folders, speech):
    block = f"import sys; sys.modules.update(dict.fromkeys({SERVER_PACKAGES!r}))"
    words = [*COMMAND[3:], "--model", str(folders["ctc"]), "-"]
    call = f"from nar_speech import cli; sys.exit(cli.main({words}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{block}; {call}"], input=pcm(speech), capture_output=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.strip()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_input_that_is_no_live_speech(run, monkeypatch, folders):
    wav = io.BytesIO()
    soundfile.write(wav, babble(0.5), RATE, format="WAV")
    assert "--max-streams: is of files" in run("-", "--max-streams", 2)[2]
    for data, message in (
        (b"\x1aE\xdf\xa3webm", "standard input: is an audio file"),
        (b"ID3\x04mp3", "standard input: is an audio file"),
        (b"", "standard input: no audio; send signed 16-bit samples"),
        (b"\0", "standard input: no audio"),
        (wav.getvalue(), "standard input: is an audio file; --stream - takes raw samples"),
    ):
        source, target = os.pipe()
        os.write(target, data)
        os.close(target)
        with os.fdopen(source, "rb") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code, out, err = run("-")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    monkeypatch.setattr(sys, "stdin", None)
    assert run("-") == (2, "", "nar-speech: error: standard input: is closed; send samples, or name files\n")
    monkeypatch.setattr(sys, "stdin", Terminal())
    code, out, err = run("-")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is a terminal; send samples, for example: arecord" in err


# The line on a terminal.


def test_partial_texts_are_shown_on_a_terminal_only(run, audio, texts, monkeypatch):
    monkeypatch.setattr("nar_speech.cli_stream.REFRESH", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    code, out, _ = run(audio / "b.flac", "--second-pass", "none")
    assert (code, out) == (0, texts["b.flac"][0] + "\n")  # nothing of it in the results
    drawn = terminal.getvalue().split(ERASE)
    assert (drawn[0], drawn[-1]) == ("", "")  # every drawing wipes the one before; the last is wiped
    shown = [line.split("b.flac: ", 1) for line in drawn[1:-1]]
    assert len(shown) > 2
    assert {begin.strip() for begin, _ in shown} == {"100%"}
    assert all(text for _, text in shown)
    assert texts["b.flac"][0].startswith(shown[0][1][:3])


def test_the_line_fits_and_can_not_be_moved_by_what_is_said(monkeypatch):
    monkeypatch.setenv("COLUMNS", "21")
    monkeypatch.setattr("nar_speech.cli_stream.REFRESH", 0.0)
    status = Status(terminal := Terminal())
    status.watch("a\x1b[2Jlong name.wav", Partial(0, "some words and more of them", 0, 0.0, 1.0))
    line = terminal.getvalue().removeprefix(ERASE)
    assert line == "name.wav: re of them"
    status.hide()
    status.hide()
    assert terminal.getvalue().endswith(line + ERASE)
    status.watch("a", Final(0, "text", (), (), 0.0, 1.0))
    assert terminal.getvalue().endswith(line + ERASE)


@pytest.mark.parametrize(
    ("text", "columns", "shown"),
    [
        ("abcdef", 3, "def"),
        ("abc", 3, "abc"),
        ("", 3, ""),
        ("今天好", 5, "天好"),
        ("cafe\u0301", 4, "cafe\u0301"),
        ("a\tb\n", 9, "a?b?"),
        ("abc", 0, ""),
    ],
)
def test_the_end_that_fits(text, columns, shown):
    assert fitting(text, columns) == shown
    assert columns_of(shown) <= columns
