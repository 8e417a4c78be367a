"""Parts of the server that need no server: audio, keys, limits, settings, formats, growing texts."""

import tests.server_extra  # noqa: F401  skips this file where the extra is missing

# isort: split

import io
import json
import logging
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.engine import Final, Partial
from nar_speech.errors import AudioError, ConfigError
from nar_speech.server import formats, forms
from nar_speech.server.api_error import ApiError, told
from nar_speech.server.audio_in import RATES, WIDTHS, AudioIn, Resampler, decode, encoding_named
from nar_speech.server.auth import Identity, Keyring, Limits, read_keys
from nar_speech.server.funasr import parse_hotwords
from nar_speech.server.limits import Usage
from nar_speech.server.live import Appended, Endpoint
from nar_speech.server.logs import JsonLines
from nar_speech.server.realtime_session import RealtimeConfig
from nar_speech.server.settings import ModelSpec, Settings
from nar_speech.types import Segment, Token, Transcript, Word


def sine(rate, seconds=0.5, hertz=440.0):
    time = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


@pytest.mark.parametrize(("encoding", "subtype"), [("mulaw", "ULAW"), ("alaw", "ALAW")])
def test_companding_is_that_of_libsndfile(encoding, subtype):
    raw = bytes(range(256))
    expected, _ = soundfile.read(
        io.BytesIO(raw), samplerate=8000, channels=1, format="RAW", subtype=subtype, dtype="float32"
    )
    np.testing.assert_array_equal(decode(raw, encoding), expected)


@pytest.mark.parametrize(
    ("encoding", "subtype", "tolerance"),
    [("s16le", "PCM_16", 0), ("s24le", "PCM_24", 0), ("s32le", "PCM_32", 0), ("u8", "PCM_U8", 0)],
)
def test_integers_are_those_of_libsndfile(encoding, subtype, tolerance):
    raw = np.random.default_rng(0).integers(0, 256, 1200, dtype=np.uint8).tobytes()
    expected, _ = soundfile.read(
        io.BytesIO(raw), samplerate=8000, channels=1, format="RAW", subtype=subtype, dtype="float32"
    )
    np.testing.assert_allclose(decode(raw, encoding), expected, atol=1e-7 + tolerance)


@pytest.mark.parametrize("rate", [r for r in RATES if r != 16000])
def test_resampling_gives_the_same_sound(rate):
    resampler = Resampler(rate, 16000)
    out = np.concatenate([resampler.feed(sine(rate)), resampler.flush()])
    assert len(out) == 8000
    np.testing.assert_allclose(out[100:-100], sine(16000)[100:-100], atol=1e-4)


def test_what_lies_above_the_new_band_is_gone():
    resampler = Resampler(24000, 16000)
    out = resampler.feed(sine(24000, hertz=9500.0))
    assert np.abs(out[100:]).max() < 1e-4


@given(
    rate=st.sampled_from([8000, 16000, 24000, 44100]),
    cuts=st.lists(st.integers(1, 3000), max_size=12),
    encoding=st.sampled_from(sorted(WIDTHS)),
    channels=st.sampled_from([1, 2]),
)
@settings(max_examples=40, deadline=None)
def test_samples_do_not_depend_on_how_bytes_are_cut(rate, cuts, encoding, channels):
    random = np.random.default_rng(len(cuts))
    size = 2400 * WIDTHS[encoding]
    data = random.integers(0, 256, size, dtype=np.uint8).tobytes()
    if encoding == "f32le":
        data = random.normal(0, 0.1, 2400).astype("<f4").tobytes()
    whole, parts = (AudioIn(encoding, rate, 16000, channels) for _ in range(2))
    expected = np.concatenate([whole.feed(data), whole.flush()])
    out, place = [], 0
    for cut in cuts:
        out.append(parts.feed(data[place : place + cut]))
        place += cut
    out += [parts.feed(data[place:]), parts.flush()]
    np.testing.assert_array_equal(np.concatenate(out), expected)


def test_half_a_sample_waits_and_is_dropped_at_the_end():
    audio = AudioIn("s16le", 16000, 16000)
    assert len(audio.feed(b"\x01")) == 0
    assert audio.pending == 1
    assert len(audio.feed(b"\x00\x02")) == 1
    assert len(audio.flush()) == 0
    assert audio.pending == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("opus", 16000), "encoding"),
        (("s16le", 12345), "rate"),
        (("s16le", True), "rate"),
        (("s16le", 16000, 0), "channels"),
    ],
)
def test_what_the_audio_can_not_be(arguments, named):
    with pytest.raises(AudioError, match=named):
        AudioIn(arguments[0], arguments[1], 16000, *arguments[2:])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_floats_that_are_no_audio(value):
    with pytest.raises(AudioError, match="f32le"):
        decode(np.array([0.1, value], "<f4").tobytes(), "f32le")


def test_names_of_encodings():
    assert [encoding_named(n) for n in ("pcm16", "ulaw", "alaw")] == ["s16le", "mulaw", "alaw"]


def test_key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# keys\nsecret-one name=ada streams=2 minutes=1.5\n\nsecret-two\n")
    keyring = Keyring(read_keys(path, Limits(requests=10), "secret-three, secret-four"))
    assert keyring.check("secret-one") == Identity("ada", Limits(2, 10, 1.5))
    assert keyring.check("secret-two").limits == Limits(requests=10)
    assert keyring.check("secret-four").name.startswith("key-")
    for wrong in (None, "", "secret", "secret-one ", "\ud800"):
        assert keyring.check(wrong) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("short", "8 characters"),
        ("secret-one\nsecret-one", "twice"),
        ("secret-one color=3", "color=3"),
        ("secret-one streams=-1", "streams=-1"),
        ("# nothing", "no key"),
    ],
)
def test_key_files_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_keys(path, Limits(), "")
    with pytest.raises(ConfigError, match="can't read"):
        read_keys(tmp_path / "none", Limits(), "")


def test_without_keys_everybody_may_come_in_but_not_with_a_secret_that_has_ended():
    now = [100.0]
    keyring = Keyring({}, clock=lambda: now[0])
    assert keyring.check(None).name == keyring.check("anything").name == "anonymous"
    value, expires = keyring.make_secret(keyring.anonymous, {"type": "transcription"}, 60)
    assert keyring.check(value).session == {"type": "transcription"}
    assert expires == 160
    now[0] = 161.0
    assert keyring.check(value) is None


def test_secrets_take_little_memory():
    """However many lists of lists are in their sessions."""
    keyring = Keyring({})
    tracemalloc.start()
    value, _ = keyring.make_secret(keyring.anonymous, json.loads(f'{{"x": [{"[]," * 5000}[]]}}'), 60)
    for _ in range(99):
        keyring.make_secret(keyring.anonymous, json.loads(f'{{"x": [{"[]," * 5000}[]]}}'), 60)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 100 * 25_000
    assert keyring.check(value).session == {"x": [[]] * 5001}


def test_requests_a_minute_and_audio_a_day():
    now = [0.0]
    usage, who = Usage(lambda: now[0]), Identity("a", Limits(requests=2, minutes=1))
    usage.request(who)
    usage.request(who)
    with pytest.raises(ApiError, match="requests a minute") as refused:
        usage.request(who)
    assert (refused.value.status, refused.value.headers()["Retry-After"]) == (429, "30")
    now[0] = 30.0
    usage.request(who)
    usage.audio(who, 90.0)  # what is over is only known now
    now[0] = 60.0
    with pytest.raises(ApiError, match="minutes of audio"):
        usage.audio(who, 0.1)
    with pytest.raises(ApiError, match="minutes of audio"):
        usage.request(who)
    now[0] = 86_400.0
    usage.audio(who, 1.0)
    Usage().audio(Identity("b"), 1e9)


def test_streams_at_once():
    usage, who = Usage(), Identity("a", Limits(streams=1))
    with usage.stream(who):
        with pytest.raises(ApiError, match="1 streams"), usage.stream(who):
            pass
    with usage.stream(who):
        pass
    assert not usage.streams


@pytest.mark.parametrize(
    "fields",
    [
        {"models": ()},
        {"port": 8000, "funasr_port": 8000},
        {"port": 70000},
        {"max_streams": 0},
        {"idle_seconds": float("nan")},
        {"drain_seconds": -1},
        {"ssl_certfile": "x"},
        {"ssl_certfile": "no", "ssl_keyfile": "no"},
        {"aliases": {"a b": "c"}},
    ],
)
def test_settings_that_make_no_sense(fields):
    with pytest.raises(ConfigError):
        Settings(**fields)


def test_model_specs(tmp_path):
    assert ModelSpec.parse("default") == ModelSpec(None, ("default",))
    assert ModelSpec.parse("zh=a+b/c") == ModelSpec("zh", ("a", "b/c"))
    folder = tmp_path / "x=y+z"
    folder.mkdir()
    assert ModelSpec.parse(str(folder)) == ModelSpec(None, (str(folder),))
    for wrong in ("a=", "=a", "a=b+", "a=b+c+d", "-x=y"):
        with pytest.raises(ConfigError, match="--model"):
            ModelSpec.parse(wrong)


def transcript():
    words = (Word("one", 1.0, 1.5, 0.9), Word("two", 2.0, 2.5, 0.5))
    tokens = (Token(4, "one", 1.0, 1.5, 0.9), Token(5, "two", 2.0, 2.5, 0.5))
    return Transcript("one two", (Segment("one two", 0.5, 3.0, 0.7, words, tokens),), 4.0, "en")


def test_verbose_json():
    body = formats.verbose_body(transcript(), ("word", "segment"), None, 0.2)
    assert (body["language"], body["duration"], body["task"]) == ("english", 4.0, "transcribe")
    (segment,) = body["segments"]
    assert (segment["id"], segment["seek"], segment["tokens"]) == (0, 50, [4, 5])
    assert segment["avg_logprob"] == pytest.approx((np.log(0.9) + np.log(0.5)) / 2, abs=1e-4)
    assert body["words"][1] == {"word": "two", "start": 2.0, "end": 2.5}
    assert "words" not in formats.verbose_body(transcript(), (), None, 0.0)
    assert "segments" not in formats.verbose_body(transcript(), ("word",), None, 0.0)
    empty = Transcript("", (), 1.0)
    assert formats.verbose_body(empty, (), "de", 0.0)["language"] == "german"
    assert formats.token_usage(transcript())["total_tokens"] == 42


def test_log_probabilities_of_pieces():
    """Tokens as they read, as OpenAI's are: not in the letters of some tokenizer."""
    body = formats.log_prob(Token(7, "\u2581May", 0.0, 0.1, 1.0))
    assert body == {"token": " May", "bytes": list(b" May"), "logprob": 0.0}


def test_what_a_client_is_told_of_a_word_that_the_model_can_not_spell():
    error = told(ConfigError("hotword 'x: y': the model's vocabulary can't spell it; leave it out"))
    assert (error.status, error.param) == (400, "hotwords")


def test_languages():
    assert [formats.language_code(t) for t in ("en", "EN", "en-US", "en_GB", "English", " zh ")] == (
        ["en"] * 5 + ["zh"]
    )


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Ada, Lovelace, Charles Babbage", ("Ada", "Lovelace", "Charles Babbage")),
        ("张三、李四", ("张三", "李四")),
        ("The following is a talk about engines.", ()),
        ("Hello. We talk about engines, and then about the people who made them.", ()),
        ("Ada", ()),
        ("", ()),
    ],
)
def test_words_of_a_prompt(prompt, words):
    assert forms.words_of_prompt(prompt) == words


def test_half_characters_reach_no_tokenizer():
    assert forms.hotwords(["a\ud800b,c"]) == ("a?b", "c")
    assert forms.words_of_prompt("Ada, x\udfffy") == ("Ada", "x?y")


def test_hotwords_of_funasr():
    assert parse_hotwords('{"Ada": 20, "Charles Babbage": 30}') == ("Ada", "Charles Babbage")
    assert parse_hotwords("Ada Charles") == ("Ada", "Charles")
    assert parse_hotwords("Ada,Charles Babbage") == ("Ada", "Charles Babbage")
    assert parse_hotwords({"Ada": 1}) == ("Ada",)
    assert parse_hotwords("") == parse_hotwords(None) == parse_hotwords(7) == ()
    with pytest.raises(ApiError, match="500"):
        parse_hotwords(" ".join(f"w{i}" for i in range(501)))


def test_texts_that_only_grow():
    grown = Appended()
    assert grown.partial(Partial(0, "hello wor", 5, 0, 1)) == "hello"
    assert grown.partial(Partial(0, "hello world", 5, 0, 1)) == ""
    assert grown.final(Final(0, "hello world", (), (), 0, 1)) == " world"
    assert grown.partial(Partial(1, "again", 5, 1, 2)) == " again"
    assert grown.final(Final(1, "other", (), (), 1, 2)) == ""  # can't be taken back
    assert grown.partial(Partial(2, "你好", 2, 1, 2)) == " 你好"
    assert grown.partial(Partial(3, "吗", 1, 1, 2)) == "吗"
    assert grown.partial(Partial(4, "strangely baron", 15, 1, 2)) == " strangely baron"
    assert grown.final(Final(4, "strangely barren of adventure", (), (), 1, 2)) == " of adventure"


@given(st.lists(st.tuples(st.text("ab 你", max_size=6), st.integers(0, 6)), max_size=6))
def test_deltas_join_to_the_final_text(parts):
    grown, text, sent = Appended(), "", ""
    for more, stable in parts:
        text += more
        sent += grown.partial(Partial(0, text, min(max(stable, len(sent)), len(text)), 0, 1))
        assert text.startswith(sent)
    sent += grown.final(Final(0, text, (), (), 0, 1))
    assert sent == text


def test_realtime_sessions():
    config = RealtimeConfig().updated(
        {
            "type": "transcription",
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": 16000},
                    "transcription": {"model": "m", "language": "en-GB", "keywords": ["Ada"]},
                    "turn_detection": {"type": "server_vad", "silence_duration_ms": 250},
                }
            },
        }
    )
    assert (config.model, config.rate, config.endpoint()) == ("m", 16000, Endpoint(silence=0.25))
    assert (config.wish().language, config.wish().hotwords) == ("en", ("Ada",))
    changed = config.updated({"audio": {"input": {"turn_detection": None}}})
    assert changed.endpoint() is None
    assert changed.rate == 16000
    beta = RealtimeConfig().updated(
        {
            "input_audio_format": "g711_ulaw",
            "input_audio_transcription": {"model": "m", "prompt": "Ada, Bob"},
            "turn_detection": {"type": "semantic_vad", "eagerness": "low"},
        }
    )
    assert (beta.encoding, beta.rate, beta.wish().hints) == ("audio/pcmu", 8000, ("Ada", "Bob"))
    assert beta.endpoint().silence == 1.2
    assert beta.body("s")["audio"]["input"]["format"] == {"type": "audio/pcmu"}


@pytest.mark.parametrize(
    "session",
    [
        {"type": "realtime"},
        {"audio": []},
        {"audio": {"input": {"format": {"type": "audio/opus"}}}},
        {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 1}}}},
        {"audio": {"input": {"format": {"type": "audio/pcm", "rate": "x"}}}},
        {"input_audio_format": "wav"},
        {"audio": {"input": {"transcription": {"model": 3}}}},
        {"audio": {"input": {"transcription": {"keywords": "a"}}}},
        {"audio": {"input": {"transcription": {"delay": "now"}}}},
        {"audio": {"input": {"turn_detection": {"type": "magic"}}}},
        {"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 2}}}},
        {"audio": {"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": True}}}},
        {"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "very"}}}},
        {"audio": {"input": {"noise_reduction": "much"}}},
        {"include": "all"},
    ],
)
def test_realtime_sessions_that_are_wrong(session):
    with pytest.raises(ApiError) as error:
        RealtimeConfig().updated(session)
    assert error.value.status == 400


def test_log_lines_are_json():
    record = logging.makeLogRecord(
        {"msg": "request", "levelname": "INFO", "name": "n", "api": "x", "key": None}
    )
    line = json.loads(JsonLines().format(record))
    assert (line["event"], line["api"], line["level"]) == ("request", "x", "info")
    assert "key" not in line
