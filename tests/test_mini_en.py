"""The mini_en recipe: reserved recordings, sentences, manifests, scripts (egs/mini_en)."""

import json
import random
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from nar_speech.errors import NarSpeechError
from nar_speech.features import FrontendConfig, build_frontend
from nar_speech.layers.sanm import SANMDecoderConfig
from nar_speech.models.paraformer import ParaformerConfig, build_paraformer
from nar_speech.text.tokenizer import train_bpe
from tests.mini_en_scripts import RECIPE, commit_all, git, recipe_scripts


@pytest.fixture(scope="module")
def local():
    with recipe_scripts() as scripts:
        yield scripts


# ---- reserved recordings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "speaker"),
    [
        ("asterisk", "vm-goodbye", "allison"),
        ("asterisk", "you-entered", "allison"),
        ("fsdd", "7_jackson_4", "fsdd-jackson"),
        ("speechocean762", "060670012", "so762-6067"),
        ("speechocean762", "096470012", None),
        ("dctts_reader", "LJ003-0059", "dctts-author"),
        ("dctts_reader", "LJ003-0098", None),
        ("other", "p225_003", None),
        ("other", "anything", "p228"),
        ("other", "1688-142285-0003", None),
        ("other", "jfk", None),
        ("librispeech_other", "x", None),
    ],
)
def test_reserved_recordings_are_refused(local, source, name, speaker):
    good = {"source": "librispeech251", "name": "103-1240-0000", "speaker": "libri-103"}
    with pytest.raises(local.reserved.ReservedDataError, match=re.escape(f"{source}/{name}")):
        local.reserved.check_not_reserved(
            [good, {"source": source, "name": name, "speaker": speaker}], "list"
        )


@pytest.mark.parametrize(
    ("source", "name", "speaker"),
    [
        ("asterisk", "yes-dear", "allison"),
        ("fsdd", "7_jackson_5", "fsdd-jackson"),
        ("fsdd", "7_jackson_14", "fsdd-jackson"),
        ("speechocean762", "000010011", "so762-0001"),
        ("dctts_reader", "LJ003-0058", None),
        ("dctts_reader", "LJ001-0060", None),
        ("synthetic_piper", "LJ003-0060", "piper-joe"),  # a voice that never spoke in the reserved clip
        ("librispeech251", "2911-12359-0000", "libri-2911"),
    ],
)
def test_other_recordings_pass(local, source, name, speaker):
    rows = [{"source": source, "name": name, "speaker": speaker}]
    assert local.reserved.check_not_reserved(rows, "list") == 1


# ---- sentences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Mr. Smith's “café”, isn't IT?", "mister smith's cafe isn't it"),
        ("fifty-nine -- 'quoted' words'", "fifty nine quoted words"),
        ("at the St. James, Dr. Who", "at the saint james doctor who"),
        ("...", ""),
    ],
)
def test_words(local, text, words):
    assert local.words.to_words(text) == words


@given(text=st.text(alphabet="abz Mr.,;'-éÉ”9", max_size=60))
def test_words_are_plain_and_stable(local, text):
    words = local.words.to_words(text)
    assert re.fullmatch(r"([a-z]+('+[a-z]+)*( |$))*", words)
    assert local.words.to_words(words) == words


@given(
    text=st.lists(st.sampled_from(["one", "two,", "three;", "four:"]), min_size=1, max_size=40).map(" ".join),
    longest=st.integers(3, 20),
)
def test_pieces_lose_no_word_and_none_is_a_stump(local, text, longest):
    parts = local.words.pieces(text, longest)
    assert " ".join(parts).split() == text.split()
    assert len(parts) == 1 or min(len(part.split()) for part in parts) >= 3


@given(number=st.integers(0, 10**7))
def test_numbers_are_read_back(local, number):
    names = {word: value for value, word in enumerate(local.templates.ONES)}
    names |= {word: 10 * value for value, word in enumerate(local.templates.TENS) if value > 1}
    total = part = 0
    for word in local.templates.cardinal(number).split():
        if word == "hundred":
            part *= 100
        elif word in ("thousand", "million"):
            total, part = total + part * {"thousand": 1000, "million": 10**6}[word], 0
        else:
            part += names[word]
    assert total + part == number


def test_ordinals(local):
    spoken = [local.templates.ordinal(number) for number in (1, 12, 20, 21, 30, 90, 99)]
    assert spoken == [
        "first",
        "twelfth",
        "twentieth",
        "twenty first",
        "thirtieth",
        "ninetieth",
        "ninety ninth",
    ]


def test_templates_are_seeded_and_spelled_out(local):
    some = local.templates.sentences(500, seed=3)
    assert some == local.templates.sentences(500, seed=3)
    assert some != local.templates.sentences(500, seed=4)
    assert len(set(some)) == 500
    assert not any(re.search(r"\d", sentence) for sentence in some)


def test_held_out_sentences_are_not_spoken(local):
    held = "in being comparatively modern"
    prose = [
        ("LJ001-0001", "Printing, in the only sense"),
        ("LJ001-0002", f"{held.capitalize()}."),
        ("LJ050-0001", f"And so it was {held}, they said"),
        ("LJ003-0060", "a chapter with reserved recordings"),
    ]
    rows = local.make_text.build(prose, {held}, count=20, seed=1)
    texts = [row["text"] for row in rows if row["kind"] == "prose"]
    assert texts == ["printing in the only sense"]
    assert sum(row["kind"] == "template" for row in rows) == 20


def test_asterisk_numbers(local):
    spell = local.asterisk.spell_numbers
    assert spell("press 1 to mute, 12 to exit.") == "press one to mute, twelve to exit."
    assert spell("dial 500 now") is None
    assert spell("28.8 kilobit") is None
    assert spell("3D audio") is None


def test_kokoro_alphabet(local):
    ipa = "ðə tʃˈeɪɚɹ ɪz ɐ dʒˈɔɪ bˈɑːɾəl hˈɜːts əʊ"
    assert local.voices.kokoro_phonemes(ipa) == "ðə ʧˈAəɹ ɪz ə ʤˈY bˈɑTᵊl hˈɜɹts Q"


# ---- synthesis ------------------------------------------------------------------------------------------


class Tone:
    """Speaks a tone whose length depends on the number of words."""

    spoken: ClassVar[list[str]] = []

    def __init__(self, cache):
        pass

    def speak(self, item, rng):
        Tone.spoken.append(item["id"])
        seconds = 0.4 * len(item["text"].split()) * rng.uniform(0.9, 1.1)
        return np.sin(np.arange(int(seconds * 8000)) * 0.3).astype(np.float32), 8000, "tone"


def synthesis(local, tmp_path, monkeypatch, **changes):
    monkeypatch.setitem(local.synthesize.ENGINES, "flite", Tone)
    text = tmp_path / "text.jsonl"
    rows = [{"id": f"T{n}", "spoken": "one two three", "text": "one two three"} for n in range(30)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"engine": "flite", "text": text, "hours": 9 / 3600, "minutes": None, "shard": "0/1", "seed": 1}
    Tone.spoken = []
    return local.synthesize.run(Namespace(**values | changes | {"out": tmp_path / "out"})) * 3600


def test_synthesis_goes_on_after_a_torn_line(local, tmp_path, monkeypatch):
    made = synthesis(local, tmp_path, monkeypatch)
    assert 9 <= made < 12
    manifest = tmp_path / "out" / "flite.0of1.jsonl"
    first = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in first:
        samples, rate = soundfile.read(tmp_path / "out" / row["path"])
        assert rate == 16000
        assert len(samples) / rate == pytest.approx(row["duration"], abs=1e-3)
    assert synthesis(local, tmp_path, monkeypatch) == pytest.approx(made, abs=0.01)
    assert Tone.spoken == []  # enough is there
    torn = manifest.read_text()[:-20]
    manifest.write_text(torn)
    again = synthesis(local, tmp_path, monkeypatch, hours=15 / 3600)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert again >= 15
    assert rows[: len(first) - 1] == first[:-1]
    assert rows[len(first) - 1] == first[-1]  # the torn clip is made again, with the same random numbers
    assert len({row["name"] for row in rows}) == len(rows)


def test_shards_share_the_sentences(local, tmp_path, monkeypatch):
    for shard in ("0/2", "1/2"):
        synthesis(local, tmp_path, monkeypatch, hours=1.0, shard=shard)
    names = [
        json.loads(line)["name"]
        for path in (tmp_path / "out").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert sorted(names) == sorted(f"T{n}" for n in range(30))


def test_finish_trims_and_scales(local):
    quiet = np.zeros(8000, np.float32)
    tone = np.sin(np.arange(16000) * 0.3).astype(np.float32)
    wave = local.synthesize.finish(np.concatenate([quiet, tone, quiet]), 16000, "kokoro", random.Random(1))
    assert np.abs(wave).max() <= 10 ** (-1 / 20) + 1e-3
    assert 1.0 / 1.06 + 0.1 <= len(wave) / 16000 <= 1.0 / 0.95 + 0.7


# ---- files and manifests ----------------------------------------------------------------------------------


def test_files_of_a_mirrored_repository(local, tmp_path):
    source = tmp_path / "owner+name" / "repo"
    (source / "data").mkdir(parents=True)
    (source / "data" / "a.txt").write_bytes(b"\x00content")
    commit_all(source)
    mirrored = local.common.Repository(str(tmp_path), "owner/name", tmp_path / "cache")
    assert mirrored.names("data") == ["data/a.txt"]
    assert mirrored.read("data/a.txt") == b"\x00content"
    with pytest.raises(FileNotFoundError, match="owner/name"):
        mirrored.read("data/b.txt")
    with pytest.raises(FileNotFoundError, match=r"other\+name"):
        local.common.Repository(str(tmp_path), "other/name", tmp_path / "cache")
    (tmp_path / "server" / "owner").mkdir(parents=True)
    git("clone", "-q", "--bare", str(source), str(tmp_path / "server" / "owner" / "name"), cwd=tmp_path)
    cloned = local.common.Repository(f"file://{tmp_path}/server", "owner/name", tmp_path / "cache")
    assert cloned.read("data/a.txt") == b"\x00content"
    with pytest.raises(FileNotFoundError, match="cloned"):
        local.common.Repository(f"file://{tmp_path}/server", "owner/absent", tmp_path / "cache")


def test_sources_from_their_own_repositories(local, tmp_path):
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    files = {
        "Jakobovski+free-spoken-digit-dataset": ["recordings/7_theo_4.wav", "recordings/7_theo_5.wav"],
        "jimbozhang+speechocean762": ["WAVE/SPEAKER0001/000010011.WAV", "WAVE/SPEAKER6067/060670011.WAV"],
    }
    for name, paths in files.items():
        repo = tmp_path / "none" / name / "repo"
        for path in paths:
            (repo / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(repo / path, wave, 16000)
        for part, text in (("train", "000010011\tWE CALL IT BEAR\n"), ("test", "060670011\tNO\n")):
            (repo / part).mkdir()
            (repo / part / "text").write_text(text)
        commit_all(repo)
    wanted = options(tmp_path, shared_data=None)
    (digit,) = local.prepare_real.prepare_source("fsdd", wanted)
    assert (digit["text"], digit["speaker"], digit["name"]) == ("seven", "fsdd-theo", "7_theo_5")
    (clip,) = local.prepare_real.prepare_source("speechocean762", wanted)
    assert (clip["text"], clip["speaker"], clip["duration"]) == ("we call it bear", "so762-0001", 1.0)


def shared_source(folder: Path, rows: list[dict]) -> None:
    (folder / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for row in rows:
        samples = rng.standard_normal(int(8000 * row.pop("seconds", 1.0))).astype(np.float32) * 0.1
        soundfile.write(folder / row["path"], samples, 8000)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(tmp_path, **changes) -> Namespace:
    values = {"work": tmp_path / "work", "shared_data": tmp_path / "shared", "github": str(tmp_path / "none")}
    return Namespace(**values | {"speechocean_adults": "drop", "fsdd_takes": 2} | changes)


def test_real_sources_leave_out_what_is_reserved_or_unwanted(local, tmp_path):
    shared = tmp_path / "shared"
    takes = [{"path": f"audio/3_theo_{n}.wav", "text": "three", "speaker": "fsdd-theo"} for n in range(9)]
    shared_source(shared / "fsdd", takes)
    people = [
        {"path": f"audio/0{who}0011.wav", "text": "WE CALL it", "speaker": f"so762-{who}", "seconds": seconds}
        for who, seconds in (("0001", 1.0), ("6067", 1.0), ("9601", 1.0), ("9700", 1.0), ("0002", 21.0))
    ]
    shared_source(shared / "speechocean762", people)
    fsdd = local.prepare_real.prepare_source("fsdd", options(tmp_path))
    assert [row["name"] for row in fsdd] == ["3_theo_5", "3_theo_6"]
    kept = local.prepare_real.prepare_source("speechocean762", options(tmp_path))
    assert [(row["speaker"], row["text"]) for row in kept] == [("so762-0001", "we call it")]
    wider = local.prepare_real.prepare_source("speechocean762", options(tmp_path, speechocean_adults="keep"))
    assert [row["speaker"] for row in wider] == ["so762-0001", "so762-9700"]
    info = soundfile.info(tmp_path / "work" / "real" / fsdd[0]["path"])
    assert (info.samplerate, info.channels) == (16000, 1)


def test_sources_that_are_nowhere_are_named(local, tmp_path):
    with pytest.raises(FileNotFoundError, match="--shared-data"):
        local.prepare_real.prepare_source("librispeech251", options(tmp_path, shared_data=None))
    with pytest.raises(FileNotFoundError, match="Jakobovski"):
        local.prepare_real.prepare_source("fsdd", options(tmp_path, shared_data=None))


def made_up_work(local, work: Path, names=("103-1240-0000", "118-1-0001", "200-1-0000")) -> None:
    """A work folder with a few real and synthetic clips."""
    real = []
    for source, clips in (("librispeech251", names), ("ljspeech32", ("LJ001-0001",))):
        rows = []
        for name in clips:
            local.common.write_flac(work / "real" / source / f"{name}.flac", np.zeros(16000, np.float32))
            text = "printing in the only sense" if source == "ljspeech32" else f"some words of {source}"
            rows.append(
                {"path": f"{source}/{name}.flac", "text": text, "speaker": f"libri-{name.split('-')[0]}"}
            )
            rows[-1] |= {"source": source, "name": name, "duration": 1.0}
        local.common.write_jsonl(work / "real" / f"{source}.jsonl", rows)
        real += rows
    spoken = [
        ("LJ001-0001", "printing in the only sense"),
        ("T1", "turn on the light"),
        ("T2", "hello there"),
    ]
    rows = []
    for name, text in spoken:
        local.common.write_flac(work / "synth" / "flite" / f"{name}.flac", np.zeros(16000, np.float32))
        row = {
            "path": f"flite/{name}.flac",
            "text": text,
            "speaker": "flite-slt",
            "source": "synthetic_flite",
        }
        rows.append(row | {"name": name, "duration": 1.0})
    local.common.write_jsonl(work / "synth" / "flite.0of1.jsonl", rows)
    written = [{"id": name, "text": text, "spoken": f"{text.capitalize()}."} for name, text in spoken]
    local.common.write_jsonl(work / "synth" / "text.jsonl", written)


def cuts(local, work: Path, monkeypatch, *words: str) -> list:
    from lhotse import CutSet

    monkeypatch.setattr(sys, "argv", ["make_cuts", "--work", str(work), "--vocab-size", "40", *words])
    local.make_cuts.main()
    return list(CutSet.from_file(work / "cuts" / "train.jsonl.gz"))


def test_manifests_of_training(local, tmp_path, monkeypatch):
    made_up_work(local, tmp_path)
    train = cuts(local, tmp_path, monkeypatch, "--repeat", "librispeech251=2")
    texts = [cut.supervisions[0].text for cut in train]
    assert "printing in the only sense" not in texts  # it is a sentence of the development set
    assert texts.count("turn on the light") == 1
    assert len({cut.id for cut in train}) == len(train)
    assert sum(cut.id.startswith("librispeech251") for cut in train) % 2 == 0
    assert train[0].load_audio().shape == (1, 16000)
    written = {cut.supervisions[0].text: cut.supervisions[0].custom.get("written") for cut in train}
    assert written["turn on the light"] == "Turn on the light."
    pieces = (tmp_path / "bpe.model").read_bytes()
    local.common.write_jsonl(
        tmp_path / "synth" / "text.jsonl", [{"id": "x", "text": "quite other words", "spoken": "X."}]
    )
    limited = cuts(local, tmp_path, monkeypatch, "--limit", f"synthetic_flite={1.5 / 3600}")
    assert sum(cut.id.startswith("synthetic") for cut in limited) == 1
    assert (tmp_path / "bpe.model").read_bytes() == pieces  # weights that were trained with them stay valid
    cuts(local, tmp_path, monkeypatch, "--vocab-size", "30")
    assert (tmp_path / "bpe.model").read_bytes() != pieces


def test_a_reserved_clip_stops_the_manifests(local, tmp_path, monkeypatch):
    made_up_work(local, tmp_path, names=("103-1240-0000", "1688-142285-0000"))
    monkeypatch.setattr(local.development, "is_dev", lambda row: row["source"] == "ljspeech32")
    with pytest.raises(local.reserved.ReservedDataError, match="1688-142285-0000"):
        cuts(local, tmp_path, monkeypatch)
    assert not (tmp_path / "cuts" / "train.jsonl.gz").exists()


def test_unlikely_transcripts_are_dropped(local, tmp_path):
    rows = [{"source": "speechocean762", "name": name} for name in "ab"] + [{"source": "fsdd", "name": "a"}]
    scores = tmp_path / "scores.jsonl"
    local.common.write_jsonl(scores, [{"name": "a", "score": -3.0}, {"name": "b", "score": -1.0}])
    assert local.make_cuts.likely(rows, scores, None) == rows
    assert local.make_cuts.likely(rows, scores, -2.0) == rows[1:]


@torch.no_grad()
def test_scores_of_transcripts(local, tmp_path):
    tokenizer = train_bpe(["ab ba a b"], 9, tmp_path / "bpe.model")
    config = ParaformerConfig(
        input_size=80,
        vocab_size=tokenizer.vocab_size,
        encoder="whisper",
        encoder_conf={"output_size": 32, "attention_heads": 2, "linear_units": 32, "num_blocks": 1},
        decoder_conf=SANMDecoderConfig(attention_heads=2, linear_units=32, num_blocks=1, att_layer_num=1),
        ctc_weight=0.3,
    )
    network = build_paraformer(config).eval()
    network.ctc.ctc_lo.bias[tokenizer.encode("a")[-1]] += 5.0
    model = Namespace(
        network=network, tokenizer=tokenizer, frontend=build_frontend(FrontendConfig(kind="log_mel"))
    )
    rows = []
    for name, text, seconds in (("x", "a", 0.5), ("y", "b", 0.9)):
        local.common.write_flac(tmp_path / f"{name}.flac", np.zeros(int(16000 * seconds), np.float32))
        rows.append({"path": f"{name}.flac", "text": text})
    found = local.filter_speechocean.scores(model, rows, tmp_path)
    alone = [local.filter_speechocean.scores(model, [row], tmp_path)[0] for row in rows]
    assert found == pytest.approx(alone, abs=1e-3)
    likely, unlikely = (
        local.filter_speechocean.scores(model, [{"path": "x.flac", "text": text}], tmp_path)[0]
        for text in ("a", "b")
    )
    assert likely > unlikely + 2


def test_a_finished_list_of_scores_is_kept(local, tmp_path, monkeypatch, capsys):
    rows = [
        {"name": name, "path": f"speechocean762/{name}.flac", "text": "a", "duration": 1.0} for name in "xy"
    ]
    local.common.write_jsonl(tmp_path / "real" / "speechocean762.jsonl", rows)
    scores = tmp_path / "cuts" / "speechocean_scores.jsonl"
    local.common.write_jsonl(scores, [{"name": name, "score": -1.0} for name in "xyz"])
    monkeypatch.setattr(
        sys, "argv", ["filter_speechocean", "--work", str(tmp_path), "--model", str(tmp_path / "none")]
    )
    local.filter_speechocean.main()
    assert str(scores) in capsys.readouterr().out
    local.common.write_jsonl(scores, [{"name": "x", "score": -1.0}])
    with pytest.raises(NarSpeechError, match="none"):  # one is missing: now the model is needed
        local.filter_speechocean.main()


# ---- export, scores, results -------------------------------------------------------------------------------


def test_best_weights_of_a_run(local, tmp_path):
    for step in (10, 20, 30):
        (tmp_path / f"weights-{step:08d}.safetensors").touch()
    log = [
        {"step": step, "dev": {"wer": wer, "ctc_wer": 0.3}} for step, wer in ((10, 0.5), (20, 0.2), (30, 0.4))
    ]
    local.common.write_jsonl(tmp_path / "train.jsonl", [{"step": 1, "loss": 3.0}, *log])
    names = [path.name for path in local.export.best_steps(tmp_path, 2)]
    assert names == ["weights-00000020.safetensors", "weights-00000030.safetensors"]
    local.common.write_jsonl(tmp_path / "train.jsonl", [{"step": 1, "loss": 3.0}])
    with pytest.raises(FileNotFoundError, match="no validated weights"):
        local.export.best_steps(tmp_path, 2)


def test_pools_of_the_evaluation_sets(local, tmp_path, capsys):
    for name, count in (("vctk", 2), ("jfk", 1), ("fsdd_test", 3)):
        rows = [{"path": f"{name}/{n}.flac", "text": "a"} for n in range(count)]
        local.common.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    for _ in range(2):  # what the first call wrote is not a set of the second
        pools = local.score.pools(tmp_path)
        assert list(pools) == ["fsdd_test", "jfk", "vctk", "fluent", "all"]
    assert pools["fluent"] == ("vctk", "jfk")
    assert pools["all"] == ("fsdd_test", "jfk", "vctk")
    assert len(local.common.read_jsonl(tmp_path / "all.jsonl")) == 6
    assert "librispeech_other" in capsys.readouterr().err


def test_scores_of_a_part(local):
    from nar_speech.metrics import char_error_rate, word_error_rate
    from nar_speech.pipelines.evaluate import Evaluation, Item

    pairs = [("vctk", "a b", "a b"), ("jfk", "a b", "a c"), ("fsdd_test", "a b", "")]
    items = tuple(Item(f"eval/{name}/x.flac", said, heard, heard) for name, said, heard in pairs)
    said, heard = [item.reference for item in items], [item.hypothesis for item in items]
    found = Evaluation(word_error_rate(said, heard), char_error_rate(said, heard), items, (), 3.0, 1.0)
    rates = [local.score.part(found, members).words.rate for members in (("vctk",), ("vctk", "jfk"))]
    assert rates == [0.0, 0.25]


def test_results_tables(local, tmp_path):
    table = [{"part": "train", "source": "fsdd", "clips": 7, "hours": 1.5, "times": 2}]
    local.common.write_jsonl(tmp_path / "cuts" / "table.jsonl", table)
    (tmp_path / "scores").mkdir()
    wer = {"rate": 0.1234, "low": 0.1, "high": 0.15, "reference": 917}
    for name in ("vctk", "all"):
        for decoder in local.score.DECODERS:
            score = json.dumps({"wer": wer, "real_time_factor": 0.02})
            (tmp_path / "scores" / f"{name}.{decoder}.json").write_text(score)
    steps = [{"step": n, "seconds": 2.0 * n, "audio_per_second": 30.0, "loss": 1.0} for n in (1, 2)]
    dev = {"step": 2, "dev": {"loss": 9.0, "wer": 0.5, "ctc_wer": 0.25}}
    local.common.write_jsonl(tmp_path / "exp" / "joint" / "train.jsonl", [*steps, dev])
    local.common.write_jsonl(
        tmp_path / "exp" / "stream" / "train.jsonl", [*steps, {"step": 2, "dev": {"loss": 9.0, "wer": 0.375}}]
    )
    (tmp_path / "scores_stream").mkdir()
    for decoder in local.score.STREAM_DECODERS:
        score = json.dumps({"wer": {**wer, "rate": 0.4321}, "real_time_factor": 0.01})
        (tmp_path / "scores_stream" / f"all.{decoder}.json").write_text(score)
    text = local.results.report(Namespace(work=tmp_path))
    assert "| 43.2 (10.0 to 15.0) | 43.2 (10.0 to 15.0) | 43.2 (10.0 to 15.0) |\n" in text
    assert "`stream`: 2 steps" in text
    assert "| 2 | 9.00 | 37.5% |\n" in text
    assert "| 917 | 12.3 (10.0 to 15.0) | 12.3 (10.0 to 15.0) | 12.3 (10.0 to 15.0) |" in text
    assert "| train | fsdd | 7 | 1.50 | 2 |" in text
    assert "3.00 h an epoch" in text
    assert "`joint`: 2 steps" in text
    assert "| 2 | 9.00 | 25.0% | 50.0% |" in text


# ---- run.sh -----------------------------------------------------------------------------------------------


def run_sh(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(RECIPE / "run.sh"), *words], capture_output=True, text=True, timeout=60
    )


def test_run_sh_lists_its_options():
    text = run_sh("--help").stdout
    script = (RECIPE / "run.sh").read_text()
    options = set(re.findall(r"--[a-z-]+", re.search(r"case \$option in(.*?)esac", script, re.S)[1]))
    assert len(options) > 10
    for name in options - {"--help"}:
        assert re.search(rf"{name} |{name}$", text, re.M), f"{name} is not in --help"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nonsense", "1"), "unknown option --nonsense"),
        (("--stage",), "--stage needs a value"),
        (("--stage", "two"), "--stage must be a whole number, got 'two'"),
        (("--hours-piper", "-1"), "--hours-piper must be a number, got '-1'"),
        (("--shared-data", "/no/such/folder"), "no folder /no/such/folder"),
    ],
)
def test_run_sh_refuses_wrong_options(words, message):
    found = run_sh(*words)
    assert found.returncode == 2
    assert message in found.stderr


def test_run_sh_skips_finished_parts(tmp_path):
    (tmp_path / "done").mkdir()
    for part in ("4-language_model", "4-export", "4-stream", "5-scores", "5-stream_scores"):
        (tmp_path / "done" / part).touch()
    found = run_sh("--stage", "4", "--stop-stage", "5", "--work", str(tmp_path), "--python", "false")
    assert found.returncode == 0
    assert found.stdout.count("done before") == 5


def test_a_failing_part_leaves_no_marker(tmp_path):
    found = run_sh("--stage", "4", "--stop-stage", "4", "--work", str(tmp_path), "--python", "false")
    assert found.returncode != 0
    assert list((tmp_path / "done").iterdir()) == []


@pytest.mark.parametrize(
    ("phase", "trained"),
    [
        ("heads", {"encoder.branch", "ctc"}),
        ("joint", {"encoder", "encoder.branch", "ctc", "verifier"}),
        ("decoder", {"predictor", "decoder", "verifier"}),
    ],
)
def test_training_settings_are_valid(phase, trained):
    from nar_speech import config as configs
    from recipes.draft_verify import Recipe

    files = [RECIPE.parents[1] / "configs/draft_verify/mini_en.yaml", RECIPE / "conf" / f"{phase}.yaml"]
    recipe = configs.load(Recipe, files, ["train.output_dir=x", "train.max_minutes=1"])
    frozen = recipe.train.optim.freeze
    names = {
        "encoder": "encoder.blocks.0.attn.key.weight",
        "encoder.branch": "encoder.branch.merge.weight",
        "ctc": "ctc.ctc_lo.weight",
        "verifier": "verifier.ln.weight",
        "predictor": "predictor.cif_output.weight",
        "decoder": "decoder.output_layer.weight",
    }
    assert {part for part, name in names.items() if not name.startswith(tuple(frozen))} == trained
