"""egs/mini_tts and egs/libritts: lists, tables, manifests, command lines."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml
from lhotse import CutSet

from nar_speech.config import from_dict
from nar_speech.data import corpora
from nar_speech.errors import ManifestError
from nar_speech.types import ModelCard
from tests.corpus import tone

ROOT = Path(__file__).parent.parent
LOCAL = ROOT / "egs/mini_tts/local"
NAMES = ("base", "tts_cuts", "tts_results", "common", "development", "reserved")


@pytest.fixture
def scripts(monkeypatch):
    """Scripts of egs/mini_tts/local; other recipes have modules of the same names."""
    kept = {name: sys.modules.pop(name, None) for name in NAMES}
    monkeypatch.syspath_prepend(str(LOCAL))
    monkeypatch.syspath_prepend(str(ROOT / "egs/mini_en/local"))
    monkeypatch.syspath_prepend(str(LOCAL))
    yield {name: importlib.import_module(name) for name in NAMES[:3]}
    for name in NAMES:
        sys.modules.pop(name, None)
        if kept[name] is not None:
            sys.modules[name] = kept[name]


def listing(folder, source, names, seconds=4.0, **more):
    """A list of clips as mini_en writes it, with sound."""
    (folder / source).mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names:
        soundfile.write(folder / source / f"{name}.flac", tone(seconds, 300), 16000)
        row = {"path": f"{source}/{name}.flac", "text": f"words of {name}", "source": source, "name": name}
        rows.append(row | {"duration": seconds, "speaker": f"{source}-{name}", "licence": "some"} | more)
    file = folder / f"{more.get('list', source)}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def speech(tmp_path):
    """A small work folder of mini_en."""
    base = tmp_path / "mini_en"
    listing(base / "real", "librispeech251", [f"{i}-1-0000" for i in range(60)])
    listing(base / "real", "dctts_reader", ["LJ001-0001", "LJ001-0002"])
    listing(base / "real", "ljspeech32", ["LJ001-0001"])
    listing(base / "real", "speechocean762", [f"00011{i:04d}" for i in range(20)])
    (base / "real/cased").mkdir()
    cased = {"name": "LJ001-0001", "cased": "Words, of one."}
    (base / "real/cased/dctts_reader.jsonl").write_text(json.dumps(cased) + "\n")
    names = [f"LJ002-{i:04d}" for i in range(80)]
    rows = listing(base / "synth", "kokoro", names, 0.5, written="Words.")
    (base / "synth/kokoro.jsonl").rename(base / "synth/kokoro.0of1.jsonl")
    for row in rows:
        assert (base / "synth" / row["path"]).exists()
    judged = [f"{speaker}-7-{i:04d}" for speaker in (1688, 1998) for i in range(6)]
    listing(base / "eval", "librispeech_other", judged)
    return base


def test_lists_keep_evaluation_and_development_apart(scripts, speech, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tts_cuts", "--work", str(tmp_path / "work"), "--speech", str(speech)])
    scripts["tts_cuts"].main()
    told = capsys.readouterr()
    assert "coffee_commands SKIPPED" in told.err
    assert "voice piper SKIPPED" in told.err
    parts = {
        name: list(CutSet.from_file(tmp_path / f"work/cuts/{name}.jsonl.gz"))
        for name in ("speech_train", "tts_train", "tts_dev")
    }
    ids = {name: {cut.id for cut in cuts} for name, cuts in parts.items()}
    assert not ids["tts_dev"] & (ids["tts_train"] | ids["speech_train"])
    assert ids["tts_train"] < ids["speech_train"]
    assert not any("speechocean" in name for name in ids["tts_train"] | ids["tts_dev"])
    assert any("kokoro" in name for name in ids["tts_dev"])
    assert not any("librispeech_other" in name for name in ids["speech_train"])
    texts = {cut.id: cut.supervisions[0].text for cuts in parts.values() for cut in cuts}
    assert texts["dctts_reader-LJ001-0001"] == "Words, of one."
    assert texts["dctts_reader-LJ001-0002"] == "words of LJ001-0002"
    assert texts["kokoro-kokoro-LJ002-0001"] == "Words."
    assert "dctts_reader-LJ001-0001" in ids["speech_train"], "a name of ljspeech32 is another recording"
    pairs = [json.loads(line) for line in (tmp_path / "work/cuts/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 10
    for pair in pairs:
        assert pair["prompt"] != pair["target"]
        assert Path(pair["prompt"]).name.split("-")[0] == pair["speaker"] == pair["name"].split("-")[0]
        assert pair["text"] == f"words of {pair['name']}"


def test_missing_speech_is_named(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tts_cuts", "--work", str(tmp_path), "--speech", str(tmp_path)])
    with pytest.raises(SystemExit):
        scripts["tts_cuts"].main()
    assert "run stage 0" in capsys.readouterr().err


def test_results_are_written_and_embedded(scripts, tmp_path, monkeypatch, capsys):
    work, assets = tmp_path / "work", tmp_path / "assets"
    monkeypatch.setattr(
        sys,
        "argv",
        ["x", "--work", str(work), "--out", str(tmp_path / "RESULTS.md"), "--assets", str(assets)],
    )
    with pytest.raises(SystemExit):
        scripts["tts_results"].main()
    assert "run stage 6" in capsys.readouterr().err
    row = {"wer": 0.25, "wer_low": 0.2, "wer_high": 0.3, "similarity": 0.7, "seconds": 200.0}
    scores = dict.fromkeys(("model", "codec", "recording"), row)
    scores = scores | {"model": row | {"real_time_factor": 1.5}, "recording": row | {"wer": 0.1}}
    (work / "scores").mkdir(parents=True)
    (work / "scores/tts.json").write_text(json.dumps(scores))
    (work / "exp/t2s").mkdir(parents=True)
    log = [{"step": 5, "seconds": 60.0, "loss": 1.0}, {"step": 5, "seconds": 60.0, "dev": {"loss": 2.0}}]
    (work / "exp/t2s/train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (work / "model").mkdir()
    card = yaml.safe_load((ROOT / "egs/mini_tts/conf/card.yaml").read_text())
    tree = {"card": card | {"task": "synthesize", "model": "maskgct"}, "codec": "mini_codec"}
    (work / "model/model.yaml").write_text(yaml.safe_dump(tree))
    scripts["tts_results"].main()
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| the model | 25.0 % (20.0 to 30.0) | 0.700 | 200 |" in text
    assert "| t2s | 5 | 1 | loss 2.000 |" in text
    embedded = yaml.safe_load((assets / "mini_tts/model.yaml").read_text())
    assert embedded["card"]["metrics"] == {"wer": 0.25, "similarity": 0.7, "real_time_factor": 1.5}
    assert "25.0 %" in (assets / "mini_tts/README.md").read_text()
    (work / "model/model.yaml").write_text(yaml.safe_dump(tree | {"codec": "codec"}))
    with pytest.raises(SystemExit):
        scripts["tts_results"].main()
    assert "embedded codec" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["mini_tts/conf/card.yaml", "libritts/card.yaml"])
def test_cards_are_cards(path):
    fields = yaml.safe_load((ROOT / "egs" / path).read_text())
    assert from_dict(ModelCard, fields | {"task": "synthesize", "model": "maskgct"}).languages == ("en",)


def shell(*words):
    return subprocess.run(["bash", *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["mini_tts", "libritts"])
def test_command_lines_of_the_recipes(name, tmp_path):
    script = ROOT / "egs" / name / "run.sh"
    assert shell(script, "--help").returncode == 0
    place = ("--work", tmp_path) if name == "mini_tts" else ("--exp-dir", tmp_path, "--data-dir", tmp_path)
    for words, message in (
        (["--colour", "red"], "unknown option --colour"),
        (["--stage"], "needs a value"),
        (["--processes", "two"], "whole number"),
    ):
        done = shell(script, *place, *words)
        assert done.returncode == 2
        assert message in done.stderr
    if name == "libritts":
        assert "--corpus-dir is required" in shell(script, *place, "--stop-stage", "0").stderr
    else:
        assert "no folder" in shell(script, *place, "--speech", tmp_path / "none").stderr


def test_libritts_is_read_in_its_layout(tmp_path):
    for part, count in (("train-clean-100", 3), ("dev-clean", 1), ("test-clean", 1)):
        chapter = tmp_path / "LibriTTS" / part / "84" / "121123"
        chapter.mkdir(parents=True)
        names = [f"84_121123_00000{i}_000000" for i in range(count)]
        for name in names:
            soundfile.write(chapter / f"{name}.wav", tone(0.5, 300, 24000), 24000)
        rows = "".join(f"{name}\tThe 1st text.\tThe first text.\n" for name in names)
        (chapter / "84_121123.trans.tsv").write_text(rows)
        (chapter / "84_121123.book.tsv").write_text("".join(f"{name}\tx\ty\t20.0\n" for name in names))
    parts = ["train-clean-100"], ["dev-clean"], ["test-clean"]
    sizes = corpora.prepare("libritts", tmp_path / "LibriTTS", tmp_path / "data", *parts)
    assert {name: count for name, (count, _) in sizes.items()} == {
        "train-clean-100": 3,
        "dev-clean": 1,
        "test-clean": 1,
    }
    cut = next(iter(CutSet.from_file(tmp_path / "data/train.jsonl.gz")))
    assert (cut.sampling_rate, cut.supervisions[0].text) == (24000, "The first text.")
    with pytest.raises(ManifestError, match="no folder 'dev-other'"):
        corpora.prepare("libritts", tmp_path / "LibriTTS", tmp_path / "data", parts[0], ["dev-other"], [])
