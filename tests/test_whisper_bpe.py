"""Whisper's tokenizer: lossless on any text, whole and pruned; pruning keeps what it must."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError, InputError
from nar_speech.text.tokenizer import TokenizerConfig, load_tokenizer
from nar_speech.text.whisper_bpe import SPECIALS, WhisperBpeTokenizer, prune

TEXTS = [
    " The quick brown fox, the lazy dog.",
    " Turn the kitchen light on at 7:30, please!",
    " Don't you think that it's there? They think so.",
    " Über-Größe naïve café",
]


def whisper_like(size: int = 400) -> dict:
    """A byte-level BPE trained on a few sentences, with special tokens at Whisper's places: the end first."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXTS * 20, trainer)
    model.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|notimestamps|>"])
    return json.loads(model.to_str())


TREE = whisper_like()
FULL = WhisperBpeTokenizer(TREE)
COUNTS = Counter(i for text in TEXTS for i in FULL.encode(text))
SMALL_TREE, KEPT = prune(TREE, COUNTS, size=330, first=270)
SMALL = WhisperBpeTokenizer(SMALL_TREE)


@given(st.text())
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("tokenizer", [FULL, SMALL], ids=["full", "pruned"])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("tokenizer", [FULL, SMALL], ids=["full", "pruned"])
def test_special_tokens_are_outside_the_text(tokenizer):
    text = " a <|endoftext|> b <|notimestamps|>"
    ids = tokenizer.encode(text)
    specials = {*tokenizer.prompt_ids, tokenizer.eot}
    assert len(specials) == 3
    assert not specials & set(ids)
    assert tokenizer.decode([*tokenizer.prompt_ids, *ids, tokenizer.eot]) == text


def test_pruning_keeps_bytes_specials_and_halves():
    pieces = FULL.pieces(KEPT)
    assert sorted(KEPT) == KEPT
    assert len(KEPT) == SMALL.vocab_size <= 330
    assert set(SPECIALS) <= set(pieces)
    assert "<|en|>" not in pieces
    assert sum(len(piece) == 1 for piece in pieces) == 256
    assert SMALL.pieces(range(SMALL.vocab_size)) == pieces  # row i of a sliced embedding is entry i
    assert {SMALL.pieces([i])[0] for i in (*SMALL.prompt_ids, SMALL.eot)} == set(SPECIALS)
    merged = {"".join(m.split(" ") if isinstance(m, str) else m) for m in SMALL_TREE["model"]["merges"]}
    assert merged == {p for p in pieces if len(p) > 1 and p not in SPECIALS}
    for merge in SMALL_TREE["model"]["merges"]:
        assert set(merge.split(" ") if isinstance(merge, str) else merge) <= set(pieces)


def test_pruning_to_everything_changes_no_encoding():
    tree, ids = prune(TREE, {}, FULL.vocab_size, first=FULL.vocab_size)
    same = WhisperBpeTokenizer(tree)
    for text in TEXTS:
        assert [ids[i] for i in same.encode(text)] == FULL.encode(text)


def test_pruning_prefers_counted_pieces():
    wanted = FULL.encode(" think")[0]
    _, ids = prune(TREE, {wanted: 5}, size=270)
    assert wanted in ids
    _, ids = prune(TREE, {}, size=270)
    assert wanted not in ids
    assert len(ids) == 259


def test_pruning_refuses_too_small_a_size():
    with pytest.raises(ConfigError, match="always kept"):
        prune(TREE, COUNTS, size=200)


def test_words_have_times_and_confidences():
    ids = [*SMALL.prompt_ids, *SMALL.encode(" The fox,  don't!"), SMALL.eot]
    starts = [float(i) for i in range(len(ids))]
    words = SMALL.words(ids, starts, [s + 1 for s in starts], [0.5] * len(ids))
    assert [word.text for word in words] == ["The", "fox,", "don't!"]
    assert words[0].start == 2.0
    assert words[-1].end == len(ids) - 1
    assert all(a.end <= b.start and a.confidence == 0.5 for a, b in pairwise(words))


def test_saved_folder_gives_the_tokenizer_back(tmp_path):
    config = SMALL.save(tmp_path)
    assert config == TokenizerConfig("whisper_bpe", "verifier.json")
    again = load_tokenizer(config, tmp_path)
    assert isinstance(again, WhisperBpeTokenizer)
    assert again.prompt_ids == SMALL.prompt_ids
    assert again.eot == SMALL.eot
    for text in TEXTS:
        assert again.encode(text) == SMALL.encode(text)
    lower = load_tokenizer({"kind": "whisper_bpe", "file": "verifier.json", "case": "lower"}, tmp_path)
    assert lower.decode(lower.encode("The FOX")) == "the fox"


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.json"):
        WhisperBpeTokenizer(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(ConfigError, match="no token"):
        WhisperBpeTokenizer(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="seg_dict"):
        load_tokenizer({"kind": "whisper_bpe", "file": "verifier.json", "seg_dict": "x"}, tmp_path)
    with pytest.raises(InputError, match="outside the vocabulary"):
        SMALL.decode([SMALL.vocab_size])
    with pytest.raises(InputError, match="surrogate"):
        SMALL.encode("\ud800")
