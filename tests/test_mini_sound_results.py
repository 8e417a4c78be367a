"""egs/mini_sound/local/results.py: tables of scores, and both models in the package with their cards."""

import json

import pytest
import yaml

from tests.mini_sound_scripts import sound_scripts

CODEC = {
    "eval_speech": {
        "original": {"kbps": 256.0},
        "4 codebooks": {"kbps": 2.0, "mel": 0.41, "pesq": 1.9, "wer": 30.0},
    }
}
CLASSES = {"rain": {"clips": 4, "accuracy": 0.5}, "flute": {"clips": 2, "accuracy": 1.0}}


def scores(accuracy):
    return {"accuracy": accuracy, "clips": 6, "classes": CLASSES}


@pytest.fixture
def work(tmp_path):
    files = {
        "codec": CODEC,
        "classifier": {"a.jsonl.gz": scores(0.9)},
        "sounds": {"made/generated": scores(0.5), "made/coded": scores(0.8)},
    }
    (tmp_path / "scores").mkdir()
    for name, content in files.items():
        (tmp_path / f"scores/{name}.json").write_text(json.dumps(content))
    for folder, task in (("codec", "codec"), ("exp/magnet/model", "generate")):
        (tmp_path / folder).mkdir(parents=True)
        text = yaml.safe_dump(
            {"card": {"task": task}, "codec": "codec", "sha256": {"codec/a": "0", "b": "1"}}
        )
        (tmp_path / folder / "model.yaml").write_text(text)
    (tmp_path / "exp/magnet/model/codec").mkdir()
    rows = [{"step": 1, "seconds": 60.0}, {"step": 2, "seconds": 120.0}, {"step": 2, "dev": {"loss": 0.5}}]
    (tmp_path / "exp/magnet/train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["results.py", *map(str, words)])
    with sound_scripts() as scripts:
        scripts.results.main()


def test_tables_and_cards(work, monkeypatch):
    out, assets = work / "RESULTS.md", work / "assets"
    run(monkeypatch, "--work", work, "--out", out, "--assets", assets)
    text = out.read_text()
    assert "| 4 codebooks | 2 | 0.41 | 1.9 | 30 |" in text
    assert "| **all** | 90 % of 6 | 50 % of 6 | 80 % of 6 |" in text
    assert "| rain | 50 % | 50 % | 50 % |" in text
    assert "| magnet | 2 | 2 | loss 0.500 |" in text
    assert "0.5 to 6 kbit/s" in (assets / "mini_codec/README.md").read_text()
    assert "church bell" in (assets / "mini_sound/README.md").read_text()
    file = yaml.safe_load((assets / "mini_sound/model.yaml").read_text())
    assert file["codec"] == "mini_codec"
    assert file["sha256"] == {"b": "1"}
    assert not (assets / "mini_sound/codec").exists()


def test_missing_scores_are_named(work, monkeypatch, capsys):
    (work / "scores/sounds.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--work", work, "--out", work / "r.md")
    assert "sounds.json: no such file" in capsys.readouterr().err
