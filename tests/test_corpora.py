"""egs/librispeech and egs/aishell on tiny made-up corpora in the real layout on disk."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nar_speech.data import corpora
from nar_speech.errors import ManifestError
from tests.corpus import spell, tone

ROOT = Path(__file__).parent.parent
CHARACTERS = dict(zip("abcdefgh", "一二三四五六七八", strict=True))
PARTS = {
    "librispeech": (["train-clean-5"], ["dev-clean"], ["test-clean", "test-other"]),
    "aishell": (["train"], ["dev"], ["test"]),
}


def write_librispeech(folder, sizes):
    """PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac and one .trans.txt a chapter."""
    rng = np.random.default_rng(0)
    for part, count in sizes.items():
        chapter = folder / part / "19" / "198"
        chapter.mkdir(parents=True)
        lines = []
        for i in range(count):
            text = "".join(rng.choice(list("abcdefgh"), 4))
            soundfile.write(chapter / f"19-198-{i:04d}.flac", spell(text, rng), 16000)
            lines.append(f"19-198-{i:04d} {text[:2].upper()} {text[2:].upper()}\n")
        (chapter / "19-198.trans.txt").write_text("".join(lines))


def write_aishell(folder, sizes):
    """data_aishell/wav/PART/SPEAKER/*.wav and one transcript of all."""
    rng = np.random.default_rng(0)
    transcript = folder / "data_aishell/transcript/aishell_transcript_v0.8.txt"
    transcript.parent.mkdir(parents=True)
    lines = []
    for part, count in sizes.items():
        speaker = folder / "data_aishell/wav" / part / f"S0{len(lines):03d}"
        speaker.mkdir(parents=True)
        for i in range(count):
            text = "".join(rng.choice(list("abcdefgh"), 4))
            name = f"BAC009{speaker.name}W{i:04d}"
            soundfile.write(speaker / f"{name}.wav", spell(text, rng), 16000)
            chinese = "".join(CHARACTERS[letter] for letter in text)
            lines.append(f"{name} {chinese[:2]} {chinese[2:]}\n")
    soundfile.write(speaker / "BAC009S0999W0000.wav", tone(0.5, 300), 16000)  # no transcript: left out
    transcript.write_text("".join(lines), encoding="utf-8")


WRITERS = {"librispeech": write_librispeech, "aishell": write_aishell}


def write(corpus, folder, train=12, other=3):
    parts = PARTS[corpus]
    WRITERS[corpus](
        folder, {**dict.fromkeys(parts[0], train), **dict.fromkeys([*parts[1], *parts[2]], other)}
    )


def cuts_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("corpus", PARTS)
def test_manifests(corpus, tmp_path):
    write(corpus, tmp_path / "corpus")
    sizes = corpora.prepare(corpus, tmp_path / "corpus", tmp_path / "data", *PARTS[corpus])
    train, dev, test = PARTS[corpus]
    assert {part: count for part, (count, _) in sizes.items()} == {
        **dict.fromkeys(train, 12),
        **dict.fromkeys([*dev, *test], 3),
    }
    cuts = cuts_of(tmp_path / "data/train.jsonl.gz")
    ids = [cut["id"] for cut in cuts]
    assert len(set(ids)) == 12
    assert ids != sorted(ids)
    assert len(cuts_of(tmp_path / "data/dev.jsonl.gz")) == 3
    for part in [*dev, *test]:
        rows = [json.loads(line) for line in (tmp_path / f"data/{part}.jsonl").read_text().splitlines()]
        assert len(rows) == 3
        for row in rows:
            assert Path(row["path"]).is_file()
            assert len(row["text"].replace(" ", "")) == 4
    text = cuts[0]["supervisions"][0]["text"]
    assert (" " in text) == (corpus == "librispeech")
    again = corpora.prepare(corpus, tmp_path / "corpus", tmp_path / "again", *PARTS[corpus])
    assert again == sizes
    assert [cut["id"] for cut in cuts_of(tmp_path / "again/train.jsonl.gz")] == ids


@pytest.mark.parametrize("corpus", PARTS)
def test_a_missing_part_is_named(corpus, tmp_path):
    with pytest.raises(ManifestError, match="no folder"):
        corpora.prepare(corpus, tmp_path / "nowhere", tmp_path / "data", *PARTS[corpus])
    write(corpus, tmp_path / "corpus", 1, 1)
    train, dev, _ = PARTS[corpus]
    with pytest.raises(ManifestError, match="test-b"):
        corpora.prepare(corpus, tmp_path / "corpus", tmp_path / "data", train, dev, ["test-b"])


def bash(script, *words):
    return subprocess.run(
        ["bash", str(ROOT / script), *map(str, words)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("corpus", PARTS)
@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("run.sh", [], "--corpus-dir is required"),
        ("prepare.sh", [], "--corpus-dir is required"),
        ("run.sh", ["--corpus"], "unknown option --corpus"),
        ("run.sh", ["--model"], "--model needs a value"),
        ("run.sh", ["--model", "rnn"], "paraformer or ctc, got 'rnn'"),
        ("run.sh", ["--stage", "x"], "--stage must be a whole number"),
        ("run.sh", ["--stage", "2", "--stop-stage", "1"], "--stage 2 is after --stop-stage 1"),
        ("run.sh", ["--stage", "3"], "--stage 3 is after --stop-stage 2"),
        ("run.sh", ["--stage", "1", "--data-dir", "/nowhere"], "run stage 0"),
        ("run.sh", ["--stage", "2", "--exp-dir", "/nowhere"], "run stage 1"),
        ("prepare.sh", ["--corpus-dir", "/nowhere"], "no folder /nowhere"),
    ],
)
def test_scripts_refuse_bad_options_with_exit_code_2(corpus, script, words, message):
    run = bash(f"egs/{corpus}/{script}", *words)
    assert run.returncode == 2
    assert message in run.stderr


def test_a_part_that_fails_does_not_keep_the_others_from_being_scored(tmp_path):
    (tmp_path / "exp/model").mkdir(parents=True)
    (tmp_path / "exp/model/model.yaml").touch()
    python = tmp_path / "python"  # stands for nar-speech evaluate; the first part has a bad file
    python.write_text('#!/bin/bash\necho "scored $4"\n[[ $4 != */a.jsonl ]]\n')
    python.chmod(0o755)
    words = ["--stage", 2, "--exp-dir", tmp_path / "exp", "--dev", "a", "--test", "b c", "--python", python]
    run = bash("egs/librispeech/run.sh", *words)
    assert run.returncode == 1
    assert run.stdout.count("scored") == 3
    assert (tmp_path / "exp/scores/summary.txt").read_text() == run.stdout


@pytest.mark.parametrize("corpus", PARTS)
@pytest.mark.parametrize("script", ["run.sh", "prepare.sh"])
def test_help_lists_every_option(corpus, script):
    run = bash(f"egs/{corpus}/{script}", "--help")
    assert run.returncode == 0
    text = (ROOT / f"egs/common/{script}").read_text()
    accepted = text.split("case $1 in")[1].split("*)")[0].split("-h | --help")[1]
    options = {word for word in accepted.replace("|", " ").replace(")", " ").split() if word.startswith("--")}
    assert len(options) > 5
    for option in options - {"--"}:
        assert option in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("corpus", "model"), [("librispeech", "paraformer"), ("aishell", "ctc")])
def test_all_stages(corpus, model, tmp_path):
    write(corpus, tmp_path / "corpus")
    train, dev, test = PARTS[corpus]
    words = [
        "--corpus-dir", tmp_path / "corpus", "--data-dir", tmp_path / "data", "--exp-dir", tmp_path / "exp",
        "--model", model, "--config", ROOT / f"configs/{model}/tiny.yaml", "--device", "cpu", "--jobs", 1,
        "--train", " ".join(train), "--dev", " ".join(dev), "--test", " ".join(test),
        "--", "train.max_steps=4", "train.validate_every=2",
    ]  # fmt: skip
    run = bash(f"egs/{corpus}/run.sh", *words)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "exp/model/model.yaml").is_file()
    assert (tmp_path / "exp/loss.png").is_file()
    summary = (tmp_path / "exp/scores/summary.txt").read_text()
    for part in [*dev, *test]:
        assert f"=== stage 2: {part}" in summary
        assert (tmp_path / f"exp/scores/{part}.txt").stat().st_size > 0
    assert "%" in summary
    again = bash(
        f"egs/{corpus}/run.sh", "--stage", 1, "--stop-stage", 1, *words[:-3], "--", "train.max_steps=6"
    )
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stderr
