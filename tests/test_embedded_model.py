"""The embedded model on real recordings: three clips in the public domain that it was not trained on."""

import json
import re
from pathlib import Path

import pytest

from nar_speech import load_model
from nar_speech.metrics import word_error_rate
from nar_speech.text.normalize import normalize_english

FOLDER = Path(__file__).parent / "data" / "real"
ROWS = [json.loads(line) for line in (FOLDER / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
REFERENCES = [row["text"] for row in ROWS]


@pytest.fixture(scope="module")
def verified():
    return load_model(device="cpu", dtype="float32")


def error_rate(model, **options):
    texts = [model(str(FOLDER / row["path"]), **options).text for row in ROWS]
    return word_error_rate(REFERENCES, [normalize_english(text) for text in texts]).rate, texts


def test_the_default_writes_what_a_person_would_accept(verified):
    rate, texts = error_rate(verified)
    assert rate <= 0.15, texts
    # Written text; a clip that begins within a sentence begins in lower case.
    assert any(re.match(r"[A-Z].*[.?]$", text) for text in texts), texts


def test_drafts_alone_are_words_and_most_of_them_right():
    rate, texts = error_rate(load_model(device="cpu", dtype="float32", verify=False))
    assert rate <= 0.35, texts
    assert all(re.fullmatch(r"[a-z' ]+", text) for text in texts), texts


def test_a_batch_gives_the_texts_of_single_clips(verified):
    paths = [str(FOLDER / row["path"]) for row in ROWS]
    together = [transcript.text for transcript in verified(paths)]
    assert together == [verified(path).text for path in paths]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_coarse_types_write_nearly_the_same(dtype):
    rate, texts = error_rate(load_model(device="cpu", dtype=dtype))
    assert rate <= 0.15, texts
