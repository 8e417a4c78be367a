"""The command line: output formats, files and folders, exit codes, speed of --help."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import typing
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import nar_speech
from nar_speech import cli, cli_options, cli_output, hub, locate
from nar_speech.model_folder import DecoderName
from tests.model_folders import ctc_folder, funasr_folder, paraformer_folder

torch.set_num_threads(1)
RATE = 16000


def noise(seconds, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, int(RATE * seconds)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ctc_folder(tmp_path_factory.mktemp("models") / "c")


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    base = tmp_path_factory.mktemp("audio")
    (base / "sub").mkdir()
    for name, seed in (("a.wav", 0), ("b.flac", 1), ("sub/c.wav", 2)):
        soundfile.write(base / name, noise(1.0, seed), RATE)
    (base / "notes.txt").write_text("not audio, and not asked for")
    return base


@pytest.fixture(scope="module")
def texts(folder, audio):
    model = nar_speech.load_model(folder, device="cpu")
    return {name: model(audio / name).text for name in ("a.wav", "b.flac", "sub/c.wav")}


@pytest.fixture
def run(folder, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*words, model=folder):
        words = [str(word) for word in words]
        if words[0] in ("transcribe", "evaluate"):
            words[1:1] = ["--model", str(model), "--device", "cpu"]
        try:
            code = cli.main(words)
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_one_file_is_its_text(run, audio, texts):
    assert run("transcribe", audio / "a.wav") == (0, texts["a.wav"] + "\n", "")


def test_several_files_and_folders_are_named(run, audio, texts):
    a, b, c = audio / "a.wav", audio / "b.flac", audio / "sub" / "c.wav"
    both = f"{a}\t{texts['a.wav']}\n{b}\t{texts['b.flac']}\n"
    assert run("transcribe", a, b) == (0, both, "")
    assert run("transcribe", audio) == (0, both, "")
    everything = f"{both}{c}\t{texts['sub/c.wav']}\n"
    assert run("transcribe", audio, "--recursive") == (0, everything, "")
    assert run("transcribe", audio, a, c) == (0, everything, "")


def test_json(run, audio, texts):
    code, out, err = run(
        "transcribe", audio / "a.wav", "--format", "json", "--decoder", "ctc_beam", "--nbest", 3
    )
    tree = json.loads(out)
    assert (code, err, tree["duration"]) == (0, "", 1.0)
    assert tree["segments"][0]["words"][0]["start"] >= 0
    assert 1 <= len(tree["segments"][0]["nbest"]) <= 3
    code, out, _ = run("transcribe", audio, "--format", "jsonl")
    assert [json.loads(line)["text"] for line in out.splitlines()] == [texts["a.wav"], texts["b.flac"]]


@pytest.mark.parametrize(
    ("name", "begin"),
    [("srt", "1\n00:00:0"), ("vtt", "WEBVTT\n\n00:00:0"), ("tsv", "start\tend\ttext\n0\t1000\t")],
)
def test_other_formats(run, audio, name, begin):
    code, out, _ = run("transcribe", audio / "a.wav", "--format", name)
    assert code == 0
    assert out.startswith(begin)


def test_word_times(run, audio):
    _, out, _ = run("transcribe", audio / "a.wav", "--word-times")
    start, end, confidence, word = out.splitlines()[0].split("\t")
    assert 0 <= float(start) <= float(end) <= 1
    assert 0 <= float(confidence) <= 1
    assert word
    _, out, _ = run("transcribe", audio, "--word-times")
    assert out.startswith(f"{audio / 'a.wav'}\t")


def test_output_file_and_folder(run, audio, texts, tmp_path):
    assert run("transcribe", audio, "-o", tmp_path / "all.txt") == (0, "", "")
    assert (tmp_path / "all.txt").read_text().count("\t") == 2
    assert run("transcribe", audio, "-o", f"{tmp_path}/out/", "--format", "srt")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.srt", "b.srt"]
    assert run("transcribe", audio / "a.wav", "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "a.txt").read_text() == texts["a.wav"] + "\n"


def test_output_folders_mirror_input_folders(run, audio, tmp_path):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "c.wav", noise(0.3), RATE)
    code, _, err = run("transcribe", audio, tmp_path / "in", "--recursive", "-o", f"{tmp_path}/out/")
    assert (code, err) == (0, "")
    made = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.txt"))
    assert made == ["a.txt", "b.txt", "c.txt", "sub/c.txt"]


def test_resume_skips_what_is_there(run, audio, texts, tmp_path):
    (tmp_path / "a.txt").write_text("kept")
    assert run("transcribe", audio, "-o", tmp_path, "--resume") == (0, "", "")
    assert (tmp_path / "a.txt").read_text() == "kept"
    assert (tmp_path / "b.txt").read_text() == texts["b.flac"] + "\n"
    assert run("transcribe", audio, "-o", tmp_path, "--resume", model="/nowhere") == (0, "", "")


def test_inputs_are_never_overwritten(run, audio, manifest, tmp_path):
    recording, link = tmp_path / "talk.wav", tmp_path / "link.wav"
    recording.write_bytes((audio / "a.wav").read_bytes())
    link.symlink_to(recording)
    files = (recording, manifest)
    kept = [file.read_bytes() for file in files]
    for words in (
        ("transcribe", recording, "-o", recording),
        ("transcribe", audio / "b.flac", recording, "-o", link),
        ("evaluate", manifest, "--report", manifest),
    ):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "is an input and would be overwritten" in err
        assert [file.read_bytes() for file in files] == kept


def test_names_that_clash(run, audio, tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(0.3), RATE)
    assert run("transcribe", audio / "a.wav", tmp_path / "a.flac", "-o", f"{tmp_path}/out/")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.flac.txt", "a.wav.txt"]
    code, _, err = run("transcribe", audio / "a.wav", audio / "sub/../a.wav", "-o", f"{tmp_path}/out/")
    assert code == 2
    assert "name each input once" in err
    assert err.count("\n") == 1


def test_equal_names_in_different_folders_keep_their_folders(run, tmp_path):
    for name in ("d1/a.wav", "d2/a.wav", "d2/b.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, noise(0.3), RATE)
    for out, inputs in (
        ("folders", (tmp_path / "d1", tmp_path / "d2")),
        ("files", (tmp_path / "d1/a.wav", tmp_path / "d2/b.wav", tmp_path / "d2/a.wav")),
    ):
        assert run("transcribe", *inputs, "-o", f"{tmp_path / out}/")[0] == 0
        written = sorted(str(p.relative_to(tmp_path / out)) for p in (tmp_path / out).rglob("*.txt"))
        assert written == ["b.txt", "d1/a.txt", "d2/a.txt"]


def test_an_output_file_is_emptied_only_by_a_result(run, audio, texts, tmp_path):
    out, bad = tmp_path / "out.txt", tmp_path / "bad.wav"
    bad.write_bytes(b"broken")
    assert run("transcribe", bad, "-o", out)[0] == 2
    assert not out.exists()
    out.write_text("of yesterday, and longer than anything that is written today" * 9)
    kept = out.read_text()
    assert run("transcribe", bad, "-o", out)[0] == 2
    assert out.read_text() == kept
    assert run("transcribe", audio / "a.wav", "-o", out)[0] == 0
    assert out.read_text() == texts["a.wav"] + "\n"
    assert run("transcribe", audio / "a.wav", "-o", "/dev/null") == (0, "", "")


def test_a_report_that_cannot_be_written_is_said_before_the_work(run, audio, tmp_path, monkeypatch):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"path": str(audio / "a.wav"), "text": "a"}) + "\n")
    monkeypatch.setattr(nar_speech.Transcriber, "results", None)
    code, _, err = run("evaluate", manifest, "--report", tmp_path / "gone" / "report.txt")
    assert (code, err.count("\n")) == (2, 1)
    assert "report.txt: can't write" in err


@pytest.mark.parametrize(("long", "short"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_short_names_of_dtypes(run, audio, long, short):
    found = run("transcribe", audio / "a.wav", "--dtype", short)
    assert found[0] == 0
    assert found == run("transcribe", audio / "a.wav", "--dtype", long)


def test_standard_input(run, audio, texts, monkeypatch):
    data = (audio / "a.wav").read_bytes()
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": BytesIO(data)}))
    assert run("transcribe", "-") == (0, texts["a.wav"] + "\n", "")


def test_a_pipe_is_read_once(run, audio, texts, tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # draws a progress bar, which looks at the inputs

    def write():
        pipe.write_bytes((audio / "a.wav").read_bytes())
        while True:  # later readers get nothing; without a writer they would wait for ever
            time.sleep(0.1)
            pipe.write_bytes(b"")

    threading.Thread(target=write, daemon=True).start()
    assert run("transcribe", pipe)[:2] == (0, texts["a.wav"] + "\n")


def test_a_closed_standard_input_is_one_line(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    code, out, err = run("transcribe", "-")
    assert (code, out) == (2, "")
    assert err == "nar-speech: error: standard input: is closed; send a recording, or name a file\n"


def test_hotwords_from_a_file_or_the_line(run, audio, tmp_path):
    (tmp_path / "words.txt").write_text("hello\n\nworld\n")
    options = ("--beam", 31, "--hotword-score", 30)
    from_file = run("transcribe", audio / "a.wav", "--hotwords", tmp_path / "words.txt", *options)
    from_line = run("transcribe", audio / "a.wav", "--hotwords", "hello, world", *options)
    assert from_file == from_line
    assert from_file[0] == 0
    assert from_file != run("transcribe", audio / "a.wav", "--decoder", "ctc_beam", *options[:2])
    assert {"hello", "world"} & set(re.findall("hello|world", from_file[1].replace(" ", "")))


def test_plot(run, audio, tmp_path):
    assert run("transcribe", audio / "a.wav", "--plot", tmp_path / "x.png")[0] == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_the_legend_of_a_plot_names_pieces_that_begin_a_word():
    from matplotlib.figure import Figure

    from nar_speech.pipelines import plot
    from nar_speech.pipelines.recognize import Analysis

    axis = Figure().subplots()
    analysis = Analysis(np.zeros((4, 2)), 0.01, 0.01, None, np.full((4, 3), 0.3), 0)
    plot._draw_output(axis, analysis, [1, 2], lambda ids: [("", "\u2581may", "be")[i] for i in ids])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["blank", " _may", " be"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.wav", "b.flac", "--format", "srt"], "--format srt holds one recording; add -o FOLDER/"),
        (["a.wav", "--resume"], "--resume: works with an output folder"),
        (["a.wav", "--nbest", "3"], "--nbest: hypotheses are listed in json only"),
        (["a.wav", "--word-times", "--format", "tsv"], "--word-times: tsv lists segments"),
        (["a.wav", "--word-times", "--format", "srt"], "--word-times: srt lists cues; use --format txt"),
        (
            ["a.wav", "--no-lm", "--lm-weight", "0.3", "--decoder", "ctc_beam"],
            "--lm-weight: there is no",
        ),
        (["a.wav", "--no-lm", "--word-bonus", "1"], "--word-bonus: decoder 'ctc_greedy' has no beam"),
        (["a.wav", "--beam", "3"], "--beam: decoder 'ctc_greedy' has no beam; use ctc_beam, or leave it out"),
        (
            ["a.wav", "--decoder", "ctc_beam", "--hotword-score", "3"],
            "--hotword-score: there are no",
        ),
        (
            ["a.wav", "--no-verify", "--max-passes", "2"],
            "--max-passes: there is no verification",
        ),
        (["a.wav", "b.flac", "--plot", "x.png"], "--plot: draws one file"),
        (["a.wav", "--decoder", "paraformer"], "decoder 'paraformer': this is a CTC model"),
        (["a.wav", "--hotwords", "ñ"], "hotword 'ñ'"),
        (["a.wav", "--hotwords", "gone.txt"], "--hotwords gone.txt: can't read this file"),
        (["a.wav", "--language", "zh"], "language: 'zh' is not one of this model's"),
        (["a.wav", "--device", "tpu"], "device: got 'tpu'; valid values: auto, cpu"),
        (["a.wav", "-o", "gone/x.txt"], "gone/x.txt: can't write"),
        (["a.wav", "--plot", "gone/x.png"], "gone/x.png: can't write the picture"),
    ],
)
def test_wrong_usage_is_one_line_and_2(run, audio, monkeypatch, words, message):
    monkeypatch.chdir(audio)
    code, out, err = run("transcribe", *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND; see 'nar-speech --help'"),
        (["nothing"], "'nothing'"),
        (["transcribe"], "are required: INPUT; see 'nar-speech transcribe --help'"),
        (["transcribe", "a.wav", "--beam", "0"], "--beam: got '0'; must be a whole number above 0"),
        (["transcribe", "a.wav", "--beam", "many"], "--beam: got 'many'; must be a whole number above 0"),
        (["transcribe", "a.wav", "--batch-seconds", "inf"], "--batch-seconds: got 'inf'; must be a number"),
        (["transcribe", "a.wav", "--hotword-score", "inf"], "--hotword-score: got 'inf'; must be a number"),
        (["transcribe", "a.wav", "--lm-weight", "a"], "--lm-weight: got 'a'; must be a number"),
        (["transcribe", "a.wav", "--threads", "100000"], "--threads: got 100000; must be 1 to 1024"),
        (["transcribe", "a.wav", "--decoder", "magic"], "--decoder: "),
        (["transcribe", "a.wav", "--dtype", "float8"], "--dtype: "),
        (["transcribe", "a.wav", "--bem", "3"], "--bem"),
        (["models"], "are required: ACTION; see 'nar-speech models --help'"),
        (["models", "import", "x"], "are required: target; see 'nar-speech models import --help'"),
    ],
)
def test_usage_errors_of_the_parser(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("nar-speech: error: ")
    assert line.count("\n") == 1
    assert message in line


def test_choices_are_those_of_the_library():
    assert set(cli_options.DECODERS) == set(typing.get_args(DecoderName))
    from nar_speech.pipelines.writers import WRITERS

    assert set(cli_output.FORMATS) == set(WRITERS)


@pytest.mark.parametrize(
    ("words", "shown"), [(["--version"], nar_speech.__version__), (["--help"], "transcribe")]
)
def test_help_and_version_are_quick(words, shown):
    code = (
        "import sys, time; start = time.perf_counter(); from nar_speech import cli\n"
        f"try: cli.main({words!r})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


def test_as_a_program(folder, audio, texts):
    command = [sys.executable, "-m", "nar_speech", "transcribe", "--model", str(folder), "--threads", "1"]
    done = subprocess.run([*command, str(audio / "a.wav")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, texts["a.wav"] + "\n", "")


def test_a_reader_that_goes_away_is_no_error(folder, audio):
    command = [sys.executable, "-m", "nar_speech", "transcribe", "--model", str(folder), "--threads", "1"]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [*command, str(audio / "a.wav")], stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (cli.BROKEN_PIPE, "")


def test_interrupt(run, audio, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "load_model", stop)
    code, _, err = run("transcribe", audio / "a.wav")
    assert (code, err) == (cli.INTERRUPTED, "nar-speech: error: interrupted\n")


# ---- evaluate ----


@pytest.fixture
def manifest(audio, texts, tmp_path):
    lines = [{"path": os.path.relpath(audio / name, tmp_path), "text": text} for name, text in texts.items()]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_evaluate(run, manifest, tmp_path):
    code, out, err = run("evaluate", manifest)
    assert (code, err) == (0, "")
    assert out.startswith("WER 0.00 % [0.00, 0.00]: 0 errors")
    assert "CER 0.00 %" in out
    assert "0 excluded" in out
    code, out, _ = run("evaluate", manifest, "--json", "--report", tmp_path / "r.txt")
    assert json.loads(out)["wer"]["rate"] == 0.0
    assert "REF:" in (tmp_path / "r.txt").read_text()


def test_evaluate_leaves_bad_lines_out(run, manifest):
    with manifest.open("a") as file:
        file.write('{"path": "gone.wav", "text": "x"}\nnonsense\n')
    code, out, err = run("evaluate", manifest, "--json")
    assert code == 1
    assert json.loads(out)["excluded"] == 2
    assert f"{manifest}:5: not JSON" in err
    assert "gone.wav: no such file" in err
    assert err.count("\n") == 2


def test_evaluate_without_anything_to_score(run, tmp_path):
    (tmp_path / "m.jsonl").write_text('{"path": "gone.wav", "text": "x"}\n')
    code, out, err = run("evaluate", tmp_path / "m.jsonl")
    assert (code, out) == (2, "")
    assert "no utterance could be scored" in err
    assert run("evaluate", tmp_path / "gone.jsonl")[0] == 2


# ---- models ----


def test_models_list(run, tmp_path, monkeypatch):
    paraformer_folder(tmp_path / hub.DEFAULT_MODEL)
    monkeypatch.setattr(locate, "ASSETS", tmp_path)
    code, out, _ = run("models", "list")
    assert code == 0
    assert out.startswith(f"* {hub.DEFAULT_MODEL}\ten\t")
    assert "hub: funasr/paraformer-zh" in out


def test_models_info_import_verify(run, tmp_path):
    official = funasr_folder(tmp_path / "official")
    code, out, _ = run("models", "info", official)
    assert (code, json.loads(out)["layout"]) == (0, "funasr")
    assert run("models", "import", official, tmp_path / "ours") == (0, f"{tmp_path / 'ours'}\n", "")
    code, out, _ = run("models", "verify", tmp_path / "ours")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "PASS folder",
        "PASS sha256",
        "PASS weights",
        "PASS run",
    ]
    weights = tmp_path / "ours" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    code, out, _ = run("models", "verify", tmp_path / "ours")
    assert code == 2
    assert "FAIL sha256: " in out
    code, _, err = run("models", "info", "gone/away@1")
    assert code == 2
    assert err.count("\n") == 1


def test_offline_is_handed_on(run, audio, monkeypatch):
    import huggingface_hub

    seen = {}

    def download(repository, **options):
        seen.update(options)
        raise RuntimeError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    code, _, err = run("transcribe", audio / "a.wav", "--offline", "--cache-dir", "/c", model="paraformer-zh")
    assert (code, seen["local_files_only"], seen["cache_dir"]) == (2, True, "/c")
    assert "paraformer-zh" in err


def test_every_command_explains_itself(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert len(shown) > 200
        assert "%%" not in shown
    assert Path(cli.__file__).is_file()
