"""Other words in a recording: everything else stays as it was, to the last bit; places; wrong input."""

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.audio import read_audio, write_audio
from nar_speech.errors import ConfigError, InputError
from nar_speech.pipelines.speech_edit import CONTEXT_SECONDS, find_words, join_words
from nar_speech.pipelines.speech_options import SynthesisConfig
from nar_speech.pipelines.synthesize import Synthesizer
from nar_speech.types import Audio, Word
from tests.speech_models import QUICK, Hearing, speech, tiny_synthesizer

pytest.importorskip("espeakng_loader")
TEXT = "one two three four five six"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def editor(text=TEXT):
    return Synthesizer(tiny_synthesizer().parts, SynthesisConfig(**QUICK), Hearing(text))


def sixteen_bits(seconds, rate, channels=1):
    """Noise whose samples are those of 16-bit files."""
    generator = np.random.default_rng(0)
    shape = (channels, round(seconds * rate)) if channels > 1 else round(seconds * rate)
    return Audio(generator.integers(-9000, 9000, shape).astype(np.float32) / 32768, rate)


def words_of(text, size=0.5, silence=0.1):
    return [Word(word, i * size + silence, (i + 1) * size, 1.0) for i, word in enumerate(text.split())]


@settings(max_examples=6, deadline=None)
@given(
    rate=st.sampled_from([8000, 16000, 24000, 44100]),
    channels=st.integers(1, 2),
    words=st.sampled_from(["one", "two three", "four five", "six", "three four five six"]),
    new=st.sampled_from(["seven", "twenty five more"]),
    seconds=st.floats(2.5, 4.0),
)
def test_what_is_around_stays_to_the_last_bit(rate, channels, words, new, seconds):
    recording = sixteen_bits(seconds, rate, channels)
    got = editor().edit(recording, words, new, seed=1)
    old, made = np.atleast_2d(recording.samples), np.atleast_2d(got.audio.samples)
    begin, end = round(got.start * rate), round(got.end * rate)
    last = round(got.old_end * rate)
    assert got.audio.sample_rate == rate
    assert made.shape[0] == channels
    assert np.array_equal(made[:, :begin], old[:, :begin])
    assert np.array_equal(made[:, end:], old[:, last:])
    assert got.start == got.old_start
    assert not np.array_equal(made[:, begin:end], old[:, begin : begin + end - begin])
    assert got.transcript == TEXT.replace(words, new)
    assert np.isfinite(made).all()


def test_files_are_exact_too(tmp_path):
    source, target = tmp_path / "in.wav", tmp_path / "out.wav"
    recording = sixteen_bits(3.0, 16000)
    soundfile.write(source, recording.samples, 16000, subtype="PCM_16")
    got = editor().edit(source, "three", "eleven")
    write_audio(target, got.audio)
    before, after = (soundfile.read(path, dtype="int16")[0] for path in (source, target))
    begin, end = round(got.start * 16000), round(got.end * 16000)
    assert np.array_equal(after[:begin], before[:begin])
    assert np.array_equal(after[end:], before[round(got.old_end * 16000) :])


def test_the_new_words_fade_in_and_out():
    recording = Audio(np.full(3 * 24000, 0.25, np.float32) + sixteen_bits(3, 24000).samples, 24000)
    got = editor().edit(recording, "three", "eleven")
    begin, end = round(got.start * 24000), round(got.end * 24000)
    # The first and last new samples are nearly those that were there.
    assert abs(got.audio.samples[begin] - recording.samples[begin]) < 0.01
    assert abs(got.audio.samples[end - 1] - recording.samples[round(got.old_end * 24000) - 1]) < 0.01


def test_a_seed_gives_the_same_edit_again():
    first, again = (editor().edit(speech(3), "three", "eleven", seed=4) for _ in range(2))
    other = editor().edit(speech(3), "three", "eleven", seed=5)
    assert np.array_equal(first.audio.samples, again.audio.samples)
    assert not np.array_equal(first.audio.samples, other.audio.samples)


def test_length_of_the_new_words():
    usual = editor().edit(speech(3), "three", "three")
    assert usual.end - usual.start == pytest.approx(usual.old_end - usual.old_start, abs=0.03)
    fast = editor().edit(speech(3), "three", "three", speed=2.0)
    assert fast.end - fast.start == pytest.approx((usual.end - usual.start) / 2, abs=0.03)
    given_ = editor().edit(speech(3), "three", "three", duration=0.8)
    assert given_.end - given_.start == pytest.approx(0.8, abs=0.01)
    assert given_.audio.duration == pytest.approx(3 + 0.8 - (usual.old_end - usual.old_start), abs=0.03)
    with pytest.raises(ConfigError, match="speed"):
        editor().edit(speech(3), "three", "three", duration=0.8, speed=2.0)


def test_a_transcript_may_be_given():
    speaker = editor("one too tree for five six")
    got = speaker.edit(speech(3), "Three", "eleven", transcript="One two, three four five six.")
    assert got.transcript == "One two, eleven four five six."
    assert 0.8 < got.old_start < 1.1


def test_a_long_recording_is_seen_in_part():
    text = " ".join(f"w{i}" for i in range(80))
    seen = []

    speaker = editor(text)
    encode = speaker.encode
    speaker.encode = lambda low, high: (seen.append(len(low) / 16000), encode(low, high))[1]
    recording = speech(40)
    got = speaker.edit(recording, "w40", "seven")
    assert seen[0] <= 2 * CONTEXT_SECONDS + 1
    assert 19.5 < got.start < 20.5
    begin = round(got.start * 24000)
    assert np.array_equal(got.audio.samples[:begin], recording.samples[:begin])


def test_progress():
    seen = []
    editor().edit(speech(3), "three", "eleven", progress=lambda *call: seen.append(call))
    assert [now for now, _ in seen] == list(range(1, len(seen) + 1))
    assert len(seen) <= seen[0][1]


# ---- places ---------------------------------------------------------------------------------------------


def test_words_are_found_whatever_their_case_and_marks():
    words = words_of("Well, I'd like two coffees, please. Two!")
    place = find_words(words, "TWO coffees", 4.0)
    assert (place.first, place.last) == (3, 5)
    assert words[2].end <= place.start <= words[3].start
    assert words[4].end <= place.end <= words[5].start
    with pytest.raises(InputError, match="is said 2 times; choose one"):
        find_words(words, "two", 4.0)
    assert find_words(words, "two", 4.0, 2).first == 6
    for wrong in (0, 3, True, "1"):
        with pytest.raises(InputError, match="is said 2 times"):
            find_words(words, "two", 4.0, wrong)


def test_chinese_characters_are_words():
    words = [Word(c, 0.3 * i, 0.3 * i + 0.2, 1.0) for i, c in enumerate("我喜欢喝茶")]
    place = find_words(words, "喝茶", 1.5)
    assert (place.first, place.last) == (3, 5)
    assert join_words(["我", "喜", "欢", "coffee", "and", "茶"]) == "我喜欢 coffee and 茶"


@settings(max_examples=100, deadline=None)
@given(count=st.integers(2, 60), at=st.integers(0, 59), size=st.floats(0.2, 2.0))
def test_what_is_seen_has_whole_words(count, at, size):
    at %= count
    words = words_of(" ".join(f"w{i}" for i in range(count)), size, 0.05)
    if size * (count - 1) < 1.0:
        return
    place = find_words(words, f"w{at}", count * size)
    first, last = place.words
    assert first <= place.first < place.last <= last
    assert place.seen[0] <= place.start < place.end <= place.seen[1]
    for i, word in enumerate(words):
        inside = word.start >= place.seen[0] - 1e-9 and word.end <= place.seen[1] + 1e-9
        assert inside == (first <= i < last)


# ---- wrong input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "a", "from: is empty"),
        ("three", " ", "to: is empty"),
        ("nine", "ten", "'nine' is not said in the recording, in which was heard: 'one two"),
        ("thre", "ten", "is not said"),
        ("three five", "ten", "is not said"),
        (TEXT, "ten", "next to nothing of the recording stays"),
        ("three", "Привет", "Cyrillic"),
        ("three", "x" * 30_000, "at most 20000"),
    ],
)
def test_words_that_cant_be_edited(old, new, message):
    with pytest.raises(InputError, match=message):
        editor().edit(speech(3), old, new)


def test_other_wrong_input(tmp_path):
    with pytest.raises(InputError, match="is silent"):
        editor().edit(Audio(np.zeros(48000, np.float32), 24000), "three", "four")
    with pytest.raises(InputError, match="no such file"):
        editor().edit(tmp_path / "none.wav", "three", "four")
    with pytest.raises(InputError, match="are too short for"):
        editor().edit(speech(3), "three", "a very long sentence indeed", duration=0.1)
    with pytest.raises(InputError, match="seed"):
        editor().edit(speech(3), "three", "four", seed=-1)
    with pytest.raises(ConfigError, match="takes words"):
        editor().edit(speech(3), "three", "four", language="phones")
    with pytest.raises(InputError, match=r"lasts 20\.0 s"):
        find_words([Word("a", 0, 1, 1), Word("b", 1, 21, 1), Word("c", 21, 22, 1)], "b", 22)
    with pytest.raises(InputError, match="heard: ''"):
        editor(" ").edit(speech(3), "three", "four")


def test_the_source_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, speech(3, 44100).samples, 44100, subtype="PCM_24")
    got = editor().edit(path, "three", "eleven")
    want = read_audio(path, 44100).samples
    assert got.audio.sample_rate == 44100
    assert np.array_equal(got.audio.samples[: round(got.start * 44100)], want[: round(got.start * 44100)])
