"""Text to the phones of MaskGCT."""

import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.cli import main
from nar_speech.errors import ConfigError, InputError, MissingExtraError
from nar_speech.text.g2p import Phonemizer, PhonemizerConfig, PhoneVocabulary
from nar_speech.text.g2p.chinese_words import join_words
from nar_speech.text.g2p.english_official import official_english
from nar_speech.text.g2p.japanese import kana_phones
from nar_speech.text.g2p.pinyin import Syllable, syllable_phones
from nar_speech.text.g2p.sandhi import change_tones
from nar_speech.text.g2p.scripts import detect_language, runs


def extra(*packages):
    """Skip what needs packages of the extra ``tts``."""
    for package in packages:
        pytest.importorskip(package)


@pytest.fixture
def english():
    extra("espeakng_loader")
    return Phonemizer(PhonemizerConfig("en"))


@pytest.fixture
def chinese():
    extra("jieba", "pypinyin", "cn2an")
    return Phonemizer(PhonemizerConfig("zh"))


# Vocabulary and direct input


def test_vocabulary_is_the_official_one():
    vocabulary = PhoneVocabulary.maskgct()
    assert len(vocabulary) == 363
    assert vocabulary.encode([",", "_", "oːɹ", "…"]) == [0, 4, 9, 362]
    assert vocabulary.decode(range(363)) == list(vocabulary.phones)
    # Two ways to write ç are two phones.
    assert vocabulary.encode(["\u00e7", "c\u0327"]) == [68, 323]


def test_phones_and_ids_are_taken_directly():
    vocabulary = PhoneVocabulary.maskgct()
    assert vocabulary.parse("w|iː|_|d|uː") == vocabulary.parse("48 5 4 30 13") == [48, 5, 4, 30, 13]
    assert vocabulary.parse("|w|iː|") == [48, 5]
    with pytest.raises(InputError, match="'qq'"):
        vocabulary.parse("w|qq")
    with pytest.raises(InputError, match="363: ids are 0 to 362"):
        vocabulary.parse("1 363")
    with pytest.raises(InputError, match="no phones"):
        vocabulary.parse("  ")


@given(st.lists(st.sampled_from(PhoneVocabulary.maskgct().phones), min_size=2))
def test_phone_strings_come_back(phones):
    vocabulary = PhoneVocabulary.maskgct()
    assert vocabulary.decode(vocabulary.parse("|".join(phones))) == phones


def test_vocabulary_files(tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"vocab": {"b": 1, "a": 0}}), encoding="utf-8")
    assert PhoneVocabulary.read(path).phones == ("a", "b")
    for bad in (
        '{"vocab": {"a": 1}}',
        '{"phones": ["a", "a"]}',
        "[]",
        "{",
        '["a|b"]',
        '{"vocab": {"a": "0"}}',
    ):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(ConfigError):
            PhoneVocabulary.read(path)


# Languages


def test_runs_of_languages():
    assert runs("我喜欢machine learning和深度") == [
        ("我喜欢", "zh"),
        ("machine learning", "en"),
        ("和深度", "zh"),
    ]
    assert runs("12 Hello世界, 3") == [("12 Hello", "en"), ("世界, 3", "zh")]
    assert runs("123") == [("123", "en")]
    assert runs("世界、の") == [("世界、の", "zh")]
    assert runs("去école") == [("去", "zh"), ("école", "en")]


@given(st.text())
def test_runs_keep_the_text(text):
    assert "".join(part for part, _ in runs(text)) == text


def test_languages_are_told_by_letters():
    assert detect_language("こんにちは") == "ja"
    assert detect_language("안녕") == "ko"
    assert detect_language("漢字 abc") == "en"


@pytest.mark.parametrize(
    ("language", "text", "name"),
    [
        ("en", "Привет", "Cyrillic"),
        ("auto", "नमस्ते", "Devanagari"),
        ("fr", "你好", "Han"),
        ("ko", "漢", "Han"),
    ],
)
def test_letters_of_other_scripts_are_refused(language, text, name):
    with pytest.raises(InputError, match=f"{name} letters"):
        Phonemizer(PhonemizerConfig(language))(text)


@pytest.mark.parametrize("text", ["", " \n", "...", "😀", "()"])
def test_nothing_to_say(text):
    extra("espeakng_loader")
    with pytest.raises(InputError, match=r"empty|nothing that can be said"):
        Phonemizer()(text)


def test_options_are_checked():
    with pytest.raises(ConfigError, match="language 'xx': valid are auto, en, zh"):
        PhonemizerConfig("xx")
    with pytest.raises(ConfigError, match="style"):
        PhonemizerConfig(style="other")
    with pytest.raises(ConfigError, match="unknown"):
        PhonemizerConfig(unknown="keep")


# English


def test_english(english):
    assert str(english("We do not break.")) == "w|iː|_|d|uː|n|ɑː|t|_|b|ɹ|eɪ|k|."
    # The merges: tɹ, dɹ, ts; the vowels of four and of quarter.
    assert str(english("tree, dry cats")) == "tɹ|iː|,|dɹ|aɪ|_|k|æ|ts"
    assert str(english("four quarters")) == "f|oːɹ|_|k|w|ɔːɹ|ɾ|ɚ|z"


def test_contractions_are_words_unless_the_official_way_is_asked_for(english):
    assert str(english("don't")) == "d|oʊ|n|t"
    assert str(english("'go'")) == "ɡ|oʊ"
    official = Phonemizer(PhonemizerConfig("en", "official"))
    assert str(official("don't")) == "d|ɑː|n|'|t|iː"


def test_numbers_are_said(english):
    said = english("It costs $3.50 on 2024-03-05 at 3:05 pm.")
    assert "three dollars and fifty cents" in said.spoken
    assert "March fifth" in said.spoken
    assert not any(character.isdigit() for character in said.spoken)


def test_a_word_gap_at_the_end_is_taken_back_only_there():
    extra("espeakng_loader", "jieba", "pypinyin", "cn2an")
    assert str(Phonemizer()("Hello世界")) == "h|ə|l|oʊ|_|s`ɹ↓|tʃ⁼|iɛ↓"
    assert str(Phonemizer()("世界hello")) == "s`ɹ↓|tʃ⁼|iɛ↓|h|ə|l|oʊ"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Dr. St. etc", "doctor. saint. et cetera"),
        ("1,234 12,500", " twelve thirty-four   twelve thousand, five hundred "),
        ("$1.05 £5 50%", "  one  dollar,  five  cents   five  pounds  fifty  percent "),
        ("1/2 3/4 2/3", " one half   three quarters   two third "),
        ("2000 2005 1999 2024 1900 1905", " two thousand   two thousand five   nineteen ninety-nine "
         "  twenty twenty-four   nineteen hundred   nineteen oh five "),
        ("21st 105", " twenty-first   one hundred five "),
        ("9" * 40, " " + " ".join(["nine"] * 40) + " "),
    ],
)  # fmt: skip
def test_official_numbers(text, words):
    assert official_english(text) == words


# The espeak-ng library


@pytest.mark.parametrize(
    "text", ["four floor store order", "quarter law for war", "Tuesday dawn north forty"]
)
def test_both_releases_of_espeak_agree(text):
    """The system's library (1.51 here) in a process of its own: two can't share one."""
    extra("espeakng_loader")
    code = (
        "import sys; from nar_speech.text.g2p.espeak import Espeak\n"
        "try: espeak = Espeak('libespeak-ng.so.1')\n"
        "except Exception as error: sys.exit('SKIP ' + str(error))\n"
        "print(espeak.version, espeak.words(sys.argv[1], 'en-us'))"
    )
    ran = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=False)
    if ran.stderr.startswith("SKIP"):
        pytest.skip("no espeak-ng in the system")
    version, words = ran.stdout.strip().split(" ", 1)
    from nar_speech.text.g2p.espeak import Espeak

    assert str(Espeak.find().words(text, "en-us")) == words, version


def test_espeak_that_is_missing_or_has_no_such_voice(monkeypatch):
    from nar_speech.text.g2p import espeak

    with pytest.raises(InputError, match="can't be loaded as espeak-ng"):
        espeak.Espeak("/no/such/library.so")
    with pytest.raises(InputError, match="more than 150 bytes"):
        espeak.Espeak("library.so", "/" + "x" * 200)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(espeak.ctypes.util, "find_library", lambda name: None)
    espeak.Espeak.find.__func__.cache_clear()
    with pytest.raises(MissingExtraError, match=r"nar-speech\[tts\]"):
        Phonemizer(PhonemizerConfig("en"))("hello")
    monkeypatch.undo()
    extra("espeakng_loader")
    with pytest.raises(InputError, match="no voice 'zz'"):
        espeak.Espeak.find().words("a", "zz")


def test_espeak_without_its_data(tmp_path):
    """In a process of its own: the library has one state."""
    loader = pytest.importorskip("espeakng_loader")
    code = "import sys; from nar_speech.text.g2p.espeak import Espeak; Espeak(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, loader.get_library_path(), str(tmp_path)[:140]]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "InputError" in ran.stderr
    assert "espeak-ng finds no data in" in ran.stderr


def test_threads_share_the_library():
    extra("espeakng_loader")
    texts = {"en": "four dogs", "de": "Hütte", "fr": "bonjour", "ko": "안녕"}

    def say(language):
        return str(Phonemizer(PhonemizerConfig(language))(texts[language]))

    expected = {language: say(language) for language in texts}
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(say, [*texts] * 25))
    assert said == [expected[language] for language in texts] * 25


@pytest.mark.parametrize("package", ["jieba", "pypinyin", "cn2an"])
def test_missing_packages_of_chinese(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"nar-speech\[tts\]"):
        Phonemizer()("你好")


def test_missing_package_of_japanese(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyopenjtalk", None)
    with pytest.raises(MissingExtraError, match=r"pyopenjtalk-plus.*nar-speech\[tts-ja\]"):
        Phonemizer()("こんにちは")


# Other languages


@pytest.mark.parametrize(
    ("language", "text", "phones"),
    [
        ("fr", "L’homme a 3,5 euros.", "l|ɔ|m|_|a|_|t|ʁ|w|a|_|v|i|ʁ|ɡ|y|l|_"),
        ("de", "Hütte; München", "h|y|t|ə|,|m|y|n|ç|ə|n"),
        ("fr", "e\u0301te\u0301", "e|t|e"),
        ("ko", "안녕하세요", "ɐ|n|n|j|ʌ|ŋ|h|ɐ|s|e|j|o"),
    ],
)
def test_languages_of_espeak(language, text, phones):
    extra("espeakng_loader")
    assert str(Phonemizer(PhonemizerConfig(language))(text)).startswith(phones)


def test_phones_the_model_lacks_are_told(caplog):
    extra("espeakng_loader")
    with caplog.at_level(logging.WARNING):
        said = Phonemizer(PhonemizerConfig("de"))("schön")
    assert said.dropped == ("øː",)
    assert "øː" in said.phones
    assert len(said.ids) == 2
    assert "left out, because the model has no such phones: 'øː'" in caplog.text
    with pytest.raises(InputError, match="'øː'"):
        Phonemizer(PhonemizerConfig("de", unknown="error"))("schön")


def test_kana():
    assert kana_phones("トーキョー") == ["t", "o", "o", "kj", "o", "o"]
    assert kana_phones("ヒャッカーン") == ["c\u0327j", "a", "q", "k", "a", "a", "ɴ"]
    assert kana_phones("ティツ") == ["t", "i", "tsɯ", "ɯ"]


def test_japanese():
    extra("pyopenjtalk")
    assert str(Phonemizer()("私は、行く！")) == "ɰᵝ|a|t|a|ɕ|i|ɰᵝ|a|,|i|k|ɯ|!"


# Chinese


def test_syllables():
    assert syllable_phones("zhang", 1) == ("ts`⁼", "ɑŋ→")
    assert syllable_phones("zhi", 3) == ("ts`⁼ɹ↓↑",)
    assert syllable_phones("zi", 5) == ("ts⁼",)
    assert syllable_phones("bo", 2) == ("p⁼wo↑",)
    assert syllable_phones("xue", 2) == syllable_phones("xve", 2) == ("ʃ", "ɥɛ↑")
    assert syllable_phones("nv", 3) == ("n", "ɥ↓↑")
    assert syllable_phones("nu", 3) == ("n", "u↓↑")
    assert syllable_phones("wei", 4) == ("ueɪ↓",)
    assert syllable_phones("gui", 4) == ("k⁼", "ueɪ↓")
    assert syllable_phones("blah", 1) is None


def test_all_readings_of_pypinyin_are_syllables_with_ids():
    pypinyin = pytest.importorskip("pypinyin")
    vocabulary = PhoneVocabulary.maskgct()
    style = pypinyin.Style.TONE3
    for code in pypinyin.constants.PINYIN_DICT:
        for read in pypinyin.pinyin(chr(code), style, heteronym=True, neutral_tone_with_five=True)[0]:
            assert not vocabulary.unknown(syllable_phones(read[:-1], int(read[-1]))), read


def tones(word, *pinyin, official=False):
    syllables = [Syllable(c, p[:-1], int(p[-1])) for c, p in zip(word, pinyin, strict=True)]
    return [one.tone for one in change_tones(word, syllables, official)]


def test_tones_change():
    assert tones("你好", "ni3", "hao3") == [2, 3]
    assert tones("展览馆", "zhan3", "lan3", "guan3") == [2, 2, 3]
    assert tones("不对", "bu4", "dui4") == [2, 4]
    assert tones("不好", "bu4", "hao3") == [4, 3]
    assert tones("好不好", "hao3", "bu4", "hao3") == [3, 5, 3]
    assert tones("一个", "yi1", "ge4") == [2, 4]
    assert tones("一年", "yi1", "nian2") == [4, 2]
    assert tones("第一次", "di4", "yi1", "ci4") == [4, 1, 4]
    assert tones("一月", "yi1", "yue4") == [1, 4]
    assert tones("看一看", "kan4", "yi1", "kan4") == [4, 5, 4]
    assert tones("十一", "shi2", "yi1") == [2, 1]
    assert tones("花儿", "hua1", "er2") == [1, 5]
    assert tones("女儿", "nv3", "er2") == [3, 2]


def test_official_third_tones_leave_stray_marks():
    said = [Syllable(c, p, 3) for c, p in zip("展览馆", ("zhan", "lan", "guan"), strict=True)]
    phones = [phone for one in change_tones("展览馆", said, official=True) for phone in one.phones()]
    assert "|".join(phones) == "ts`⁼|an↓↑|↑|l|an↓↑|↑|k⁼|uan↓↑"


def test_chinese(chinese):
    said = chinese("我们去银行，重庆的重量是25%。")
    assert said.spoken == "我们去银行,重庆的重量是百分之二十五."
    assert str(said).startswith("uo↓↑|m|ən|tʃʰ|ɥ↓|in↑|x|ɑŋ↑|,|ts`ʰ|ʊŋ↑|tʃʰ|iŋ↓|t⁼|ə|ts`⁼|ʊŋ↓")
    assert not said.dropped


def test_words_that_the_official_code_loses_are_kept(chinese):
    assert chinese("你去不").words == ("你", "去", "不")
    assert chinese("看一看，想一想").words == ("看一看", ",", "想一想")
    official = Phonemizer(PhonemizerConfig("zh", "official"))
    assert official("你去不").words == ("你", "去")


def test_words_are_joined():
    words = ["看", "一", "看", ",", "想", "一", "想", "不", "不", "去", "花", "儿", "不"]
    assert join_words(words) == ["看一看", ",", "想一想", "不不", "去", "花儿", "不"]
    assert join_words(words, official=True) == ["看一看", ",", "想", "一想", "不去", "花儿"]


def test_characters_without_a_reading_are_told(chinese, caplog):
    with caplog.at_level(logging.WARNING):
        said = chinese("你好\U0003134a")
    assert "\U0003134a" in said.dropped
    assert "\U0003134a" in caplog.text


def polyphone_folder(folder, lexicon=""):
    """A model with the official names and shapes that reads 行 as xing2 after 银 and as hang2 elsewhere."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    import numpy

    helper = onnx.helper
    symbols = ["[PAD]", "[UNK]", "[CLS]", "银", "行"]
    scores = numpy.zeros((len(symbols), 3), numpy.float32)
    scores[3, 1] = scores[0:3, 0] = 1.0
    scores[:, 2] = 9.0  # a reading of another character, never chosen
    nodes = [
        helper.make_node("Slice", ["input_ids", "start", "end", "axis"], ["before"]),
        helper.make_node("Gather", ["table", "before"], ["outputs"]),
    ]
    constants = {"start": [0], "end": [-1], "axis": [1]}
    values = [onnx.numpy_helper.from_array(numpy.array(v, numpy.int64), k) for k, v in constants.items()]
    graph = helper.make_graph(
        nodes,
        "polyphones",
        [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT32, [1, "n"])],
        [helper.make_tensor_value_info("outputs", onnx.TensorProto.FLOAT, [1, "m", 3])],
        [*values, onnx.numpy_helper.from_array(scores, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    inner = folder / "g2p_chinese_model"
    inner.mkdir()
    onnx.save(model, inner / "poly_bert_model.onnx")
    (inner / "vocab.txt").write_text("\n".join(symbols), encoding="utf-8")
    (inner / "polychar.txt").write_text("行\n了\n", encoding="utf-8")
    names = {"1": "行{hang2}", "2": "行{xing2}", "3": "了{le5}"}
    (inner / "polydict.json").write_text(json.dumps(names), encoding="utf-8")
    if lexicon:
        (folder / "chinese_lexicon.txt").write_text(lexicon, encoding="utf-8")
    return folder


def test_polyphone_model(chinese, tmp_path):
    folder = polyphone_folder(tmp_path)
    model = Phonemizer(PhonemizerConfig("zh", polyphones=str(folder)))
    assert str(model("他行。")) == "tʰ|a→|x|ɑŋ↑|."  # pypinyin would say xing2
    assert str(model("银行")) == "in↑|x|ɑŋ↑"  # a word of the dictionary
    from nar_speech.text.g2p.polyphone import PolyphoneModel

    assert PolyphoneModel(folder / "g2p_chinese_model").readings("银行。行") == {1: "xing2", 3: "hang2"}


def test_official_lexicon(chinese, tmp_path):
    folder = polyphone_folder(tmp_path, "你好\tni3 hao3\n公\tgong1\n")
    model = Phonemizer(PhonemizerConfig("zh", polyphones=str(folder)))
    assert str(model("你好公")) == "n|i↑|x|ɑʊ↓↑|k⁼|ʊŋ→"
    (folder / "chinese_lexicon.txt").write_text("你好 ni3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"chinese_lexicon.txt:1"):
        Phonemizer(PhonemizerConfig("zh", polyphones=str(folder)))("你好")


def test_damaged_polyphone_folders(chinese, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        Phonemizer(PhonemizerConfig("zh", polyphones=str(tmp_path / "none")))("你好")
    with pytest.raises(ConfigError, match="not the folder of a polyphone model"):
        Phonemizer(PhonemizerConfig("zh", polyphones=str(tmp_path)))("你好")
    folder = polyphone_folder(tmp_path)
    (folder / "g2p_chinese_model" / "poly_bert_model.onnx").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="can't be loaded"):
        Phonemizer(PhonemizerConfig("zh", polyphones=str(folder)))("你好")


# Any text


ANY = st.text(max_size=60) | st.text("abzé世界一不儿3.,'’$%/:-〇…\n\0|_ ０½日ア안", max_size=60)


@pytest.mark.parametrize("style", ["spoken", "official"])
@settings(max_examples=150, deadline=None)
@given(text=ANY)
def test_any_text_gives_phones_or_a_clear_error(style, text):
    extra("espeakng_loader", "jieba", "pypinyin", "cn2an")
    for language in ("en", "de") if style == "spoken" else ("zh",):
        try:
            said = Phonemizer(PhonemizerConfig(language, style))(text)
        except InputError as refused:
            one_line = len(str(refused).splitlines()) == 1
            assert one_line
            continue
        assert said.ids
        assert len(said.ids) == len(said.phones) - len(said.dropped)
        assert all(0 <= number < 363 for number in said.ids)


@pytest.mark.parametrize(
    "unit", ["Hello world, it is 5 pm. ", "我们今天去公园。", "我", "1", "$", "a.", "'", "x-"]
)
def test_time_is_linear_in_the_length(unit):
    extra("espeakng_loader", "jieba", "pypinyin", "cn2an")
    phonemizer = Phonemizer()
    phonemizer("a我")

    def seconds(length):
        start = time.process_time()
        assert phonemizer((unit * length)[:length] + "a").ids
        return time.process_time() - start

    short = max(seconds(2_000), 0.02)
    assert seconds(20_000) < 40 * short


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["It costs $5 at 3:05 pm. ", "我们今天去公园，", "1", "我"])
def test_long_texts(unit):
    extra("espeakng_loader", "jieba", "pypinyin", "cn2an")
    assert len(Phonemizer()((unit * 100_000)[:100_000]).ids) > 50_000


# Command line


def test_command(capsys, monkeypatch):
    extra("espeakng_loader")
    assert main(["phonemize", "four dogs"]) == 0
    assert capsys.readouterr().out == "f|oːɹ|_|d|ɑː|ɡ|z\n"
    assert main(["phonemize", "four dogs", "--ids"]) == 0
    assert capsys.readouterr().out == "33 9 4 30 12 32 38\n"
    assert main(["phonemize", "4 dogs", "--spoken"]) == 0
    assert capsys.readouterr().out == "four dogs\n"
    assert main(["phonemize", "--json", "four"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == [{"text": "four", "language": "en"}]
    assert main(["phonemize", "--language", "phones", "33 9"]) == 0
    assert capsys.readouterr().out == "f|oːɹ\n"
    assert main(["phonemize", "--language", "de", "--strict", "schön"]) == 2
    assert "'øː'" in capsys.readouterr().err
    assert main(["phonemize", ""]) == 2
    assert capsys.readouterr().err.count("\n") == 1
