"""Tokenizers, FunASR post-processing and the normalisers for scoring."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError, InputError
from nar_speech.text.normalize import (
    get_normalizer,
    normalize_chinese,
    normalize_english,
    spell_number,
    spell_ordinal,
    spell_year,
)
from nar_speech.text.postprocess import (
    group_sentencepieces,
    rich_transcription_postprocess,
    sentence_postprocess,
    sentence_postprocess_sentencepiece,
    split_tags,
)
from nar_speech.text.realign import is_annotation
from nar_speech.text.tokenizer import (
    BpeTokenizer,
    CharTokenizer,
    TokenizerConfig,
    load_tokenizer,
    read_pieces,
    read_seg_dict,
    train_bpe,
)

TEXTS = [
    "he hoped there would be stew for dinner",
    "turnips and carrots and bruised potatoes",
    "don't stuff it into you his belly counselled him",
    "after early nightfall the yellow lamps would light up",
] * 3
PIECES = [
    "<blank>",
    "<s>",
    "</s>",
    "我",
    "们",
    "用",
    "hel@@",
    "lo",
    "world",
    "a",
    "b",
    "1",
    "8",
    "don't",
    "<unk>",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(TEXTS, 70, tmp_path_factory.mktemp("bpe") / "tokenizer.model")


@pytest.fixture
def char():
    return CharTokenizer(PIECES)


def test_own_bpe_models_begin_with_the_four_special_ids(bpe):
    assert bpe.pieces([0, 1, 2, 3]) == ["<blank>", "<s>", "</s>", "<unk>"]
    assert bpe.vocab_size == 70
    assert min(bpe.encode(TEXTS[0])) > 3


@given(words=st.lists(st.sampled_from(" ".join(TEXTS).split()), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_bpe_round_trip_and_words(bpe, words):
    text = " ".join(words)
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.decode([0, 1, *ids, 2, 3]) == text
    count = len(ids)
    timed = bpe.words(
        ids, [0.1 * i for i in range(count)], [0.1 * i + 0.1 for i in range(count)], [0.5] * count
    )
    assert [word.text for word in timed] == words
    assert timed[-1].end == pytest.approx(0.1 * count)
    assert all(a.end <= b.start + 1e-9 for a, b in pairwise(timed))
    assert all(word.confidence == pytest.approx(0.5) for word in timed)


def test_bpe_training_is_deterministic_and_case_is_applied(bpe, tmp_path):
    again = train_bpe(iter(TEXTS), 70, tmp_path / "again.model")
    again.save(tmp_path)
    assert (tmp_path / "again.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    bpe.save(tmp_path)
    assert (tmp_path / "again.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    lower = load_tokenizer({"kind": "bpe", "file": "tokenizer.model", "case": "lower"}, tmp_path)
    assert lower.encode("He HOPED") == bpe.encode("he hoped")
    assert lower.to_config().case == "lower"


@pytest.mark.parametrize(("texts", "size"), [([], 50), (["  "], 50), (["a b"], 5000), (TEXTS, 6)])
def test_impossible_bpe_training_is_an_error(tmp_path, texts, size):
    with pytest.raises(ConfigError, match="train_bpe"):
        train_bpe(texts, size, tmp_path / "x.model")
    assert not (tmp_path / "x.model").exists()


def test_char_encode_and_decode(char):
    ids = char.encode("我们用Hello WORLD a b 18 Don't 龙!")
    assert char.pieces(ids) == [
        "我", "们", "用", "hel@@", "lo", "world", "a", "b", "1", "8", "don't", "<unk>", "<unk>",
    ]  # fmt: skip
    assert char.decode(ids) == "我们用hello world AB18don't"
    assert char.encode("") == []


def test_seg_dict_comes_first_and_unknown_pieces_in_it_are_unk():
    tokenizer = CharTokenizer(PIECES, {"hello": ["a", "b"], "我们": ["我", "们"], "x": ["nothing"]})
    assert tokenizer.pieces(tokenizer.encode("Hello 我们 x")) == ["a", "b", "我", "们", "<unk>"]


def test_a_vocabulary_without_unk_names_the_character():
    with pytest.raises(InputError, match="龙"):
        CharTokenizer(["<blank>", "我"]).encode("我龙")


def test_letters_with_a_space_piece():
    tokenizer = CharTokenizer(["<blank>", "<unk>", "▁", *"ABCDEHLOTW"])
    ids = tokenizer.encode("hello two")
    assert "".join(tokenizer.pieces(ids)) == "HELLO▁TWO"
    assert tokenizer.decode(ids) == "HELLO TWO"
    words = tokenizer.words(ids, range(9), range(1, 10), [1.0] * 9)
    assert [(w.text, w.start, w.end) for w in words] == [("HELLO", 0, 5), ("TWO", 6, 9)]


def test_char_words_take_times_and_mean_confidence(char):
    ids = [1, 3, 6, 7, 9, 10, 8, 2]
    confidences = [0, 0.9, 0.4, 0.8, 0.2, 0.6, 1.0, 0]
    words = char.words(ids, [i / 10 for i in range(8)], [i / 10 + 0.05 for i in range(8)], confidences)
    got = [(w.text, round(w.start, 3), round(w.end, 3), round(w.confidence, 3)) for w in words]
    assert got == [
        ("我", 0.1, 0.15, 0.9),
        ("hello", 0.2, 0.35, 0.6),
        ("AB", 0.4, 0.55, 0.4),
        ("world", 0.6, 0.65, 1.0),
    ]


def test_words_need_a_time_for_every_id(char, bpe):
    for tokenizer in (char, bpe):
        with pytest.raises(InputError, match="2 ids need as many"):
            tokenizer.words([3, 4], [0.0], [1.0], [1.0])


@pytest.mark.parametrize("ids", [[99999], [-1]])
def test_ids_outside_the_vocabulary_are_refused(char, bpe, ids):
    for tokenizer in (char, bpe):
        with pytest.raises(InputError, match="outside the vocabulary"):
            tokenizer.decode(ids)


def test_save_and_load_give_the_same_tokenizer(tmp_path, char, bpe):
    spelled = CharTokenizer(PIECES, {"hello": ["a", "b"]}, "lower")
    for number, tokenizer in enumerate((char, spelled, bpe)):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = tokenizer.save(folder)
        assert config == tokenizer.to_config()
        again = load_tokenizer(config, folder)
        assert again.to_config() == config
        assert again.pieces(range(again.vocab_size)) == tokenizer.pieces(range(tokenizer.vocab_size))
        assert again.encode("hello") == tokenizer.encode("hello")


def test_every_vocabulary_file_form(tmp_path):
    pieces = ["<blank>", "<unk>", "一", "hel@@", "'"]
    (tmp_path / "tokens.json").write_text(json.dumps(pieces))
    (tmp_path / "tokens.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    lines = [f"{piece} {number}" for number, piece in enumerate(pieces)]
    (tmp_path / "units.txt").write_text("\n".join(reversed(lines)), encoding="utf-8")
    for name in ("tokens.json", "tokens.txt", "units.txt"):
        assert read_pieces(tmp_path / name) == pieces
    (tmp_path / "seg_dict").write_text("hello hel@@ lo\n\nempty\n", encoding="utf-8")
    assert read_seg_dict(tmp_path / "seg_dict") == {"hello": ["hel@@", "lo"]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokens.json", b"{}"),
        ("tokens.json", b"[]"),
        ("tokens.json", b"[1]"),
        ("tokens.json", b"not json"),
        ("tokens.txt", b""),
        ("tokens.txt", b"\xff\xfe\x00"),
        ("units.txt", b"a 0\nb 2\n"),
        ("units.txt", b"a 0\nb 0\n"),
    ],
)
def test_malformed_vocabularies_are_errors_that_name_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(name)):
        load_tokenizer(TokenizerConfig("char", name), tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"random bytes that are no model"])
def test_a_bad_sentencepiece_model_is_an_error_that_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "bpe.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bpe\.model"):
        load_tokenizer({"kind": "bpe", "file": "bpe.model"}, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "word", "file": "x"},
        {"kind": "char"},
        {"kind": "char", "file": "x", "extra": 1},
        {"kind": "bpe", "file": "x", "seg_dict": "y"},
        {"kind": "char", "file": "missing.txt"},
    ],
)
def test_wrong_tokenizer_configurations_are_refused(tmp_path, config):
    with pytest.raises(ConfigError):
        load_tokenizer(config, tmp_path)


def test_sentencepiece_tags_can_be_kept(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=80,
        user_defined_symbols=["<|en|>", "<|HAPPY|>"],
        minloglevel=2,
    )
    tokenizer = BpeTokenizer(model.getvalue())
    ids = tokenizer.encode("<|en|><|HAPPY|>he hoped")
    assert tokenizer.decode(ids) == "he hoped"
    assert tokenizer.decode(ids, tags=True) == "<|en|><|HAPPY|>he hoped"
    count = len(ids)
    assert [w.text for w in tokenizer.words(ids, range(count), range(count), [1] * count)] == ["he", "hoped"]


def test_unfinished_and_interrupted_pieces_lose_no_text():
    assert sentence_postprocess(["hel@@"])[0] == "hel"
    assert sentence_postprocess(["hel@@", "你", "lo"])[0] == "hel你lo"
    assert sentence_postprocess(["hello", ",", "world", "mp3", "x"])[0] == "hello, world mp3 x"
    assert sentence_postprocess([])[0] == ""


@pytest.mark.parametrize(
    ("pieces", "want", "words"),
    [
        (["你", "hel@@"], "你", ["你"]),
        (["hel@@", "你", "lo"], "你hello", ["你", "hello"]),
        (["10", "3"], "103", ["10", "3"]),
        (["hello", ",", "你"], "hello 你", ["hello", "你"]),
        (["i", "am", "a", "u", "s", "citizen"], "i am AUS citizen", ["i", "am", "AUS", "citizen"]),
    ],
)
def test_habits_of_funasr_are_an_option(pieces, want, words):
    text, times, found = sentence_postprocess(pieces, official=True)
    assert (text, times, found) == (want, None, words)


def test_official_times_go_to_words_by_number():
    times = [[0, 9], [10, 19], [20, 29], [30, 39]]
    text, merged, words = sentence_postprocess(["ok", ".", "a", "b"], times, official=True)
    assert (text, words) == ("ok . AB", ["ok", ".", "AB"])
    assert merged == [[0, 9], [20, 29]]  # the full stop has no time of its own and takes the next word's
    assert sentence_postprocess_sentencepiece(["▁", "▁i", "▁"], official=True) == (" i ", ["", "I", ""])


def test_missing_timestamps_are_an_error():
    with pytest.raises(InputError, match="1 pairs for 2 pieces"):
        sentence_postprocess(["你", "好"], [[0, 1]])


def test_a_merged_abbreviation_spans_its_letters_in_mixed_text():
    pieces = ["我", "在", "a", "b", "b", "公", "司", "wor@@", "king"]
    times = [[10 * i, 10 * i + 9] for i in range(9)]
    text, merged, words = sentence_postprocess(pieces, times)
    assert text == "我 在 ABB 公 司 working"
    assert merged == [[0, 9], [10, 19], [20, 49], [50, 59], [60, 69], [70, 89]]
    assert words == ["我", "在", "ABB", "公", "司", "working"]


def test_sentencepieces_of_mixed_scripts():
    groups = group_sentencepieces(["<s>", "▁hel", "lo", ",", "▁今天", "天气", "。", "abc", "d", '▁"', "x"])
    assert [g.text for g in groups] == ["hello,", "今", "天", "天", "气。", "abcd", '"x']
    assert [(g.begin, g.end) for g in groups[:3]] == [(1, 3), (4, 4.5), (4.5, 5)]
    assert sentence_postprocess_sentencepiece(["▁i'm", "▁in"]) == ("i'm in", ["I'm", "in"])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<|nospeech|><|Event_UNK|>", "❓"),
        ("<|en|><|HAPPY|>one<|en|><|HAPPY|>two", "onetwo😊"),
        ("<|zh|><|BGM|>甲<|zh|><|BGM|>乙", "🎼甲乙"),
        ("<|zh|><|Applause|>甲<|zh|><|BGM|>乙", "👏甲🎼乙"),
        ("plain text", "plain text"),
        ("<|en|><|SAD|><|HAPPY|><|HAPPY|>x", "x😊"),
        ("", ""),
    ],
)
def test_rich_tags(text, want):
    assert rich_transcription_postprocess(text) == want


def test_split_tags():
    assert split_tags("<|zh|><|SAD|>你好<|woitn|>") == ("你好", ("zh", "SAD", "woitn"))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Hello, World!", "hello world"),
        ("It’s  John’s — don't", "it's john's don't"),
        ("'tis 'quoted' the dogs' goin' home", "'tis quoted the dogs' goin' home"),
        ("twenty-one", "twenty one"),
        ("21 and 105 and 1,234,567", "twenty one and one hundred five and"
         " one million two hundred thirty four thousand five hundred sixty seven"),
        ("the 21st, 3rd, 12th and 20th", "the twenty first third twelfth and twentieth"),
        ("3.14 or -5", "three point one four or minus five"),
        ("in 1999, 1905, 1900, 2005 and 2024", "in nineteen ninety nine nineteen oh five nineteen hundred"
         " two thousand five and twenty twenty four"),
        ("the 1990s and the 80's", "the nineteen nineties and the eighties"),
        ("March 3rd, 1999", "march third nineteen ninety nine"),
        ("2024-03-05", "march fifth twenty twenty four"),
        ("$5.20, $1 and £3 million", "five dollars and twenty cents one dollar and three million pounds"),
        ("50% of 007", "fifty percent of zero zero seven"),
        ("at 10:30 a.m., 9:05pm and 7:00", "at ten thirty am nine oh five pm and seven o clock"),
        ("Mr. Smith & Mrs. Jones", "mister smith and missus jones"),
        ("mp3", "mp three"),
        ("ＡＢＣ１２", "abc twelve"),
        ("½ cup", "one half cup"),
        ("", ""),
        ("...", ""),
    ],
)  # fmt: skip
def test_normalize_english(text, want):
    assert normalize_english(text) == want


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_normalised_english_is_clean_and_stays_so(text):
    once = normalize_english(text)
    assert not re.search(r"[^\w\s']|\s\s|^\s|\s$|_", once)
    assert not re.search(r"[0-9]", once)
    assert normalize_english(once) == once


@given(st.integers(0, 10**18 - 1))
def test_numbers_are_spelled_as_they_sum_up(number):
    values = {spell_number(n): n for n in [*range(20), *range(20, 100, 10)]}
    total = part = 0
    for word in spell_number(number).split():
        scale = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "quadrillion": 15}.get(word)
        if word == "hundred":
            part *= 100
        elif scale:
            total, part = total + part * 10**scale, 0
        else:
            part += values[word]
    assert total + part == number


def test_ordinals_and_years():
    ordinals = [spell_ordinal(n) for n in (1, 2, 3, 5, 8, 9, 12, 20, 100)]
    assert " ".join(ordinals) == "first second third fifth eighth ninth twelfth twentieth one hundredth"
    assert [spell_year(y) for y in (1066, 1100, 2000, 2010)] == [
        "one thousand sixty six", "eleven hundred", "two thousand", "twenty ten",
    ]  # fmt: skip


def test_numbers_of_any_length_do_not_fail():
    assert normalize_english("1" * 6000).split() == ["one"] * 6000
    assert normalize_english("$" + "9" * 5000 + "th")


def test_normalize_chinese():
    assert normalize_chinese("今天，天气ＡＢＣ不错。Don't 3点！") == "今 天 天 气 abc 不 错 don't 3 点"
    assert normalize_chinese("“你好”，'世界'") == "你 好 世 界"


def test_normalisers_by_name():
    assert get_normalizer("en") is normalize_english
    assert get_normalizer("none")(" A  b ") == "A b"
    with pytest.raises(InputError, match="valid names"):
        get_normalizer("xx")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[ Silence ]", True),
        ("(", True),
        ("[wind", True),
        ("(coughs) [noise].", True),
        ("Yes (he said).", False),
        ("Seven.", False),
        ("", False),
        ("...", False),
    ],
)
def test_remarks_are_no_speech(text, expected):
    assert is_annotation(text) is expected
