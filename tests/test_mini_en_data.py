"""Text and data at scale of the mini_en recipe: books, held-out text, templates, packing (egs/mini_en)."""

import gzip
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from tests.mini_en_scripts import commit_all, recipe_scripts


@pytest.fixture(scope="module")
def local():
    with recipe_scripts() as scripts:
        yield scripts


# ---- books ----------------------------------------------------------------------------------------------

BOOK = """CHAPTER XII

Mr. Smith met Capt. Brown--an old friend, etc. in town. "What?" he said. "I never
knew that!" It was J. B. Priestley's house [see note] in 1897.

LOUIS XIV was king. He came. Henry VIII did not.
"""


def test_books_fall_into_sentences(local):
    found = local.books.sentences(BOOK)
    assert found == [
        "Mister Smith met Captain Brown, an old friend, etc. in town.",
        '"What?" he said.',
        '"I never knew that!"',
        "It was J. B. Priestley's house in 1897.",
        "He came.",
    ]
    spoken = [local.find_books.transcript(sentence) for sentence in found]
    assert spoken[0] == "mister smith met captain brown an old friend etc in town"
    assert spoken[3] == "it was j b priestley's house in eighteen ninety seven"
    assert local.find_books.speakable(found[0], 11)
    assert not local.find_books.speakable(found[3], 10)  # figures
    assert not local.find_books.speakable("no capital letter at the start.", 6)
    assert not local.find_books.speakable("He came.", 2)


@given(text=st.text(alphabet="abcI. ,;:!?'\"-—“”é\n[]XV19", max_size=200))
def test_no_text_breaks_the_reader(local, text):
    for sentence in local.books.sentences(text):
        assert sentence == sentence.strip()
        assert sentence.isascii()
        assert re.fullmatch(r"([a-z]+('+[a-z]+)*( |$))*", local.find_books.transcript(sentence))


def test_readers(local):
    books = local.books
    page = "# Title: A\n\n## Year: {}\n\n-------\n\n## Chapter I\n\n> _One_ *two* [three](http://x) four.\n"
    assert books.markdown("a.md", page.format(1903)).strip() == "One two three four."
    assert books.markdown("a.md", page.format(1951)) is None
    assert books.markdown("README.md", "# No header") is None
    assert books.dated_text("Woolf_Years_1937.txt", "x") is None
    assert books.dated_text("Eliot_Adam_1859.txt", "x") == "x"
    tei = "<teiHeader><p>no</p></teiHeader><p>One &amp; <hi>two</hi><note><p>no</p></note>.</p><p>Three.</p>"
    assert " ".join(books.markup("a.xml", tei).split()) == "One & two . Three."
    assert books.speech("1962_john_f_kennedy_d.txt", "x") is None
    assert books.speech("1862_abraham_lincoln_r.txt", "x") == "x"


def test_books_make_a_text_and_leave_out_what_is_evaluated(local, tmp_path, monkeypatch, capsys):
    work, mirror = tmp_path / "work", tmp_path / "mirror" / "owner+books" / "repo"
    (work / "eval").mkdir(parents=True)
    (work / "real").mkdir()
    reference = "one morning the old captain walked slowly down to the quiet harbour alone"
    (work / "eval" / "a.jsonl").write_text(json.dumps({"text": reference}) + "\n")
    filler = " ".join(f"It was the {word} of the day that he had for her." for word in "abcdefghij" * 5)
    mirror.mkdir(parents=True)
    first = "The dog saw the cat. In the evening the old captain walked slowly down to it. Twice 3 is 6."
    (mirror / "a.txt").write_text(f"{first} {filler}\n\nThe dog saw the cat in the long garden.")
    (mirror / "b.txt").write_text(f"The dog saw the cat in the long garden. A new one came. {filler}")
    (mirror / "read.txt").write_text(f"So. {reference.capitalize()}. {filler}")
    (mirror / "french.txt").write_text("Le chien voit le chat dans son jardin. " * 100)
    commit_all(mirror)
    source = local.books.Books("owner/books", "", local.books.any_text, "public domain")
    absent = local.books.Books("owner/absent", "", local.books.any_text, "public domain")
    monkeypatch.setattr(local.find_books, "SOURCES", {"some": source, "none": absent})
    monkeypatch.setattr(local.books, "SOURCES", local.find_books.SOURCES)
    monkeypatch.setattr(
        sys, "argv", f"find_books.py --work {work} --github {tmp_path / 'mirror'} --jobs 1".split()
    )
    local.find_books.main()
    lines = (work / "lm" / "text.txt").read_text().splitlines()
    assert "the dog saw the cat" in lines
    assert "twice three is six" in lines
    assert lines.count("the dog saw the cat in the long garden") == 1
    assert not any("old captain walked" in line for line in lines)
    assert not any("chien" in line for line in lines)
    (row,) = local.common.read_jsonl(work / "lm" / "table.jsonl")
    assert row["books"] == 2
    assert row["read_out"] == ["read"]
    assert row["held_out"] == 1
    assert row["words"] == sum(len(line.split()) for line in lines)
    assert "none SKIPPED" in capsys.readouterr().err
    for line in (work / "synth" / "books.txt").read_text().splitlines():
        assert re.fullmatch(r"B[0-9a-f]{16}\t[A-Z\"'].*[.!?]", line)


def test_held_out_text(local):
    held = local.overlap.HeldOut(["a b c d e f g h i j k l", "please say yes", "no"])
    assert held.shares("x y c d e f g h z")
    assert not held.shares("c d e f g x h")
    assert held.shares("please say yes")
    assert not held.shares("please say yes now")
    assert not held.shares("no")
    assert held.is_read(["x", "b c d e f g h i j k"])
    assert not held.is_read(["b c d e f g h i j x"])


# ---- sentences ------------------------------------------------------------------------------------------


def test_everyday_sentences_are_seeded_spelled_out_and_speakable(local):
    some = local.everyday.sentences(3000, seed=3)
    assert some == local.everyday.sentences(3000, seed=3)
    assert len(set(some)) == 3000
    assert all(re.fullmatch(r"[A-Za-z ,.!?'-]+", sentence) for sentence in some)
    assert sum(local.words.to_words(sentence) == "" for sentence in some) == 0
    words = {word for sentence in some for word in local.words.to_words(sentence).split()}
    assert {"dollars", "cents", "twelfth", "spelled", "because", "percent", "o'clock"} <= words
    assert len(words) > 700


def test_books_do_not_change_the_names_of_other_sentences(local):
    prose = [("LJ001-0001", "Printing, in the only sense")]
    books = [("B1", 'He said, "Come in," and then the long evening began, at last, for both of them.')]
    few = local.make_text.build(prose, set(), 30, 1)
    more = local.make_text.build(prose, set(), 30, 1, books, 40)
    names = {row["id"]: row["text"] for row in more}
    assert {row["id"]: row["text"] for row in few}.items() <= names.items()
    assert sum(row["kind"] == "book" for row in more) >= 1
    assert all('"' not in row["spoken"] for row in more)
    assert sum(name.startswith("E") for name in names) == 40
    assert len(names) == len(more)


# ---- packing --------------------------------------------------------------------------------------------


def recipe_cuts(local, tmp_path) -> Path:
    """A working folder with manifests of tones whose pitch tells the clip."""
    work = tmp_path / "work"
    rows = []
    for number in range(12):
        seconds = 0.6 + 0.1 * (number % 4)
        wave = 0.4 * np.sin(2 * np.pi * (300 + 60 * number) * np.arange(int(seconds * 16000)) / 16000)
        path = work / "audio" / f"{number}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave.astype(np.float32), 16000)
        source = ["fsdd", "synthetic_piper", "synthetic_flite"][number % 3]
        rows.append(
            {"file": path, "source": source, "name": f"n{number}", "duration": len(wave) / 16000}
            | {"text": f"tone {number}", "speaker": f"s{number}", "written": f"Tone {number}."}
        )
    local.make_cuts.write_cuts(work / "cuts" / "train.jsonl.gz", rows[:9], {"fsdd": 2})
    local.make_cuts.write_cuts(work / "cuts" / "dev.jsonl.gz", rows[9:], {})
    (work / "bpe.model").write_bytes(b"pieces")
    return work


def packed(work, out, **changes) -> Namespace:
    values = {"work": work, "out": out, "mib": 60, "kbps": 24, "limit": [], "seed": 1, "jobs": 1}
    return Namespace(**values | changes)


def test_packing_there_and_back(local, tmp_path, monkeypatch, capsys):
    from lhotse import CutSet

    monkeypatch.setattr(local.pack, "SHARD_SECONDS", 3)
    work, out = recipe_cuts(local, tmp_path), tmp_path / "packed"
    local.pack.pack(packed(work, out))
    assert "noise" in capsys.readouterr().err  # named, because it isn't there
    shards = sorted(out.glob("*.opus"))
    assert len(shards) > 1
    times = {path: path.stat().st_mtime_ns for path in shards}
    local.pack.pack(packed(work, out))
    assert {
        path: path.stat().st_mtime_ns for path in out.glob("*.opus")
    } == times  # goes on, makes nothing anew
    other = tmp_path / "other"
    local.pack.unpack(Namespace(packed=out, work=other, jobs=1))
    assert (other / "bpe.model").read_bytes() == b"pieces"
    for part in ("train", "dev"):
        before = {cut.id: cut for cut in CutSet.from_file(work / "cuts" / f"{part}.jsonl.gz")}
        after = {cut.id: cut for cut in CutSet.from_file(other / "cuts" / f"{part}.jsonl.gz")}
        assert before.keys() == after.keys()
        for name, cut in before.items():
            restored = after[name]
            assert restored.num_samples == cut.num_samples
            text, same = cut.supervisions[0], restored.supervisions[0]
            assert (text.text, text.speaker, text.custom) == (same.text, same.speaker, same.custom)
            wave, again = cut.load_audio()[0], restored.load_audio()[0]
            assert wave.shape == again.shape
            middle = slice(2000, -2000)
            correlation = np.corrcoef(wave[middle], again[middle])[0, 1]
            assert correlation > 0.9


def test_the_budget_prefers_real_speech(local, tmp_path):
    work = recipe_cuts(local, tmp_path)
    clips = local.pack.collect(work)
    assert len(clips) == 12
    everything = local.pack.choose(clips, 60, 16, {}, 1)
    assert len(everything) == 12
    bytes_of = sum(
        (clip.seconds + 0.05) * 16 * 125 for clip in clips if clip.part == "dev" or clip.source == "fsdd"
    )
    some = local.pack.choose(clips, (bytes_of + 2500 + 2**20) * 1.06 / 2**20, 16, {}, 1)
    assert {clip.source for clip in some if clip.part == "train"} <= {"fsdd", "synthetic_piper"}
    assert sum(clip.source == "fsdd" and clip.part == "train" for clip in some) == 3
    none = local.pack.choose(clips, 60, 16, {"synthetic_piper": 0.0}, 1)
    assert not any(clip.source == "synthetic_piper" and clip.part == "train" for clip in none)
    with pytest.raises(ValueError, match="--mib"):
        local.pack.choose(clips, 1.0, 16, {}, 1)


def test_a_lost_shard_is_named(local, tmp_path, monkeypatch):
    monkeypatch.setattr(local.pack, "SHARD_SECONDS", 3)
    work, out = recipe_cuts(local, tmp_path), tmp_path / "packed"
    local.pack.pack(packed(work, out))
    lost = sorted(out.glob("*.opus"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        local.pack.unpack(Namespace(packed=out, work=tmp_path / "other", jobs=1))
    rows = [
        json.loads(line) for line in gzip.decompress((out / "manifest.jsonl.gz").read_bytes()).splitlines()
    ]
    assert lost.name in {row["shard"] for row in rows}


# ---- recordings -----------------------------------------------------------------------------------------


def test_wake_words_come_from_their_folders(local, tmp_path):
    mirror = tmp_path / "none" / "Picovoice+wake-word-benchmark" / "repo"
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32) * 0.1
    for name in ("alexa/0.flac", "smart mirror/1.flac"):
        (mirror / "audio" / name).parent.mkdir(parents=True)
        soundfile.write(mirror / "audio" / name, wave, 16000)
    (mirror / "audio" / "smart mirror" / "2.flac").write_bytes(b"fLaC torn")
    soundfile.write(mirror / "audio" / "multiple_keywords.wav", wave, 16000)
    commit_all(mirror)
    args = Namespace(work=tmp_path / "work", shared_data=None, github=str(tmp_path / "none"), wake_share=1.0)
    rows = local.prepare_real.prepare_source("wake_words", args)
    assert [(row["name"], row["text"]) for row in rows] == [
        ("alexa_0", "alexa"),
        ("smart-mirror_1", "smart mirror"),
    ]
    args.wake_share = 0.0
    assert local.prepare_real.prepare_source("wake_words", args) == []
