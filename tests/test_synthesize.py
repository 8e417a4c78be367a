"""The Synthesizer: batches against singles, lengths, prompts, long texts, wrong input."""

import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError, InputError
from nar_speech.models.maskgct import target_frames
from nar_speech.pipelines.join import join_pieces, replace_part
from nar_speech.pipelines.speech_codes import Piece, make_codes
from nar_speech.pipelines.speech_length import frames_for, seconds_for
from nar_speech.pipelines.speech_options import SynthesisConfig, change
from nar_speech.pipelines.synthesize import Synthesizer
from nar_speech.pipelines.voice import Voice
from nar_speech.sampling.draws import seeded
from nar_speech.types import Audio
from tests.speech_models import CODES, LAYERS, QUICK, SEMANTIC, Hearing, speech, tiny_networks, tiny_parts
from tests.speech_models import tiny_synthesizer as tiny

pytest.importorskip("espeakng_loader")
IDS = tuple(range(40, 60))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def voice():
    return tiny().voice(speech(1.0), "Good morning to you.")


def same(one, other):
    """Whether two results are the same to the last bit."""
    assert np.array_equal(one.audio.samples, other.audio.samples)
    assert len(one.pieces) == len(other.pieces)
    for a, b in zip(one.pieces, other.pieces, strict=True):
        assert torch.equal(a.semantic, b.semantic)
        assert torch.equal(a.acoustic, b.acoustic)
        assert (a.text, a.start, a.end, a.phones) == (b.text, b.start, b.end, b.phones)


# ---- speech ---------------------------------------------------------------------------------------------


def test_a_text_becomes_speech(voice):
    result = tiny()("Hello there.", voice, seed=3)
    piece = result.pieces[0]
    assert result.audio.sample_rate == 24000
    assert result.audio.samples.dtype == np.float32
    assert np.isfinite(result.audio.samples).all()
    assert result.audio.duration == pytest.approx(piece.end)
    assert piece.acoustic.shape == (LAYERS, len(result.audio.samples) // 480)
    assert int(piece.acoustic.max()) < CODES
    assert int(piece.semantic.max()) < SEMANTIC
    # Prompt and target are together as long in both kinds of codes.
    assert len(voice.semantic) + len(piece.semantic) == len(voice.acoustic) + piece.acoustic.shape[1]
    assert (result.text, result.prompt_text, result.seed) == ("Hello there.", "Good morning to you.", 3)
    assert set(result.seconds) == {"prompt", "sampling", "decoding"}


def test_a_seed_gives_the_same_speech_and_another_one_other_speech(voice):
    first = tiny()("Hello there.", voice, seed=3)
    same(first, tiny()("Hello there.", voice, seed=3))
    assert not np.array_equal(first.audio.samples, tiny()("Hello there.", voice, seed=4).audio.samples)


@settings(max_examples=4, deadline=None)
@given(
    texts=st.lists(
        st.sampled_from(["Hi you.", "What a day it was!", "It costs five dollars, I think.", IDS, IDS[:7]]),
        min_size=2,
        max_size=4,
    ),
    seeds=st.integers(0, 999),
    batch=st.integers(1, 5),
)
def test_a_ragged_batch_equals_its_singles(voice, texts, seeds, batch):
    other = tiny().voice(speech(0.7, seed=1), "Well then.")
    voices = [voice if i % 2 else other for i in range(len(texts))]
    numbers = [seeds + 7 * i for i in range(len(texts))]
    together = tiny()(list(texts), voices, seed=numbers, batch=batch, steps=4)
    for text, one, number, got in zip(texts, voices, numbers, together, strict=True):
        same(tiny()(text, one, seed=number, steps=4), got)


def test_a_number_is_the_seed_of_the_first_text(voice):
    together = tiny()(["Hello.", "Hello.", "Hello."], voice, seed=5)
    assert [result.seed for result in together] == [5, 6, 7]
    same(together[2], tiny()("Hello.", voice, seed=7))


def test_progress_counts_calls(voice):
    seen = []
    tiny()(["Hello.", "Good day."], voice, batch=1, progress=lambda *call: seen.append(call))
    total = 2 * (3 + 2 + 1 + 1)
    assert [most for _, most in seen] == [total] * len(seen)
    assert [now for now, _ in seen] == list(range(1, len(seen) + 1))
    assert len(seen) <= total


def test_one_network_can_make_all_layers():
    networks = replace(tiny_networks(), first=None)
    generator = torch.Generator().manual_seed(0)
    piece = Piece(
        torch.randint(300, (9,), generator=generator),
        torch.randint(SEMANTIC, (5,), generator=generator),
        torch.randint(CODES, (6, LAYERS), generator=generator),
        8,
    )
    config = SynthesisConfig(**QUICK)
    semantic, acoustic = make_codes(networks, [piece], seeded([1]), config)
    assert semantic[0].shape == (8,)
    assert acoustic[0].shape == (LAYERS, 7)
    with pytest.raises(InputError, match="generators for"):
        make_codes(networks, [piece], seeded([1, 2]), config)
    with pytest.raises(InputError, match="leave nothing to make"):
        replace(piece, frames=1)


# ---- lengths --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(samples=st.integers(8000, 480_000), prompt=st.integers(1, 300), target=st.integers(1, 600))
def test_the_rule_is_the_official_one(samples, prompt, target):
    none = torch.zeros(0, dtype=torch.int64)
    voice = Voice(none, none[:, None], (0,) * prompt, samples, 16_000, "", "")
    seconds = seconds_for(voice, (0,) * target, SynthesisConfig(), torch.Generator())
    assert frames_for(seconds, 50.0) == target_frames(samples, prompt, target)


def test_speed_and_duration_change_the_length(voice):
    text = "Hello there, my friend."
    usual = tiny()(text, voice).audio.duration
    assert tiny()(text, voice, speed=2.0).audio.duration == pytest.approx(usual / 2, abs=0.05)
    assert tiny()(text, voice, speed=0.5).audio.duration == pytest.approx(usual * 2, abs=0.08)
    assert tiny()(text, voice, duration=2.4).audio.duration == pytest.approx(2.4, abs=0.03)
    rate = tiny()(text, voice, length="rate", phones_per_second=10.0)
    assert rate.audio.duration == pytest.approx(len(rate.pieces[0].phones) / 10, abs=0.05)
    with pytest.raises(ConfigError, match="speed: has no say"):
        tiny()(text, voice, duration=2.0, speed=1.5)


def test_a_predictor_of_durations_can_be_given(voice):
    asked = []

    def predict(prompt, seconds, phones, generator):
        asked.append((prompt, seconds, len(phones), float(torch.rand((), generator=generator))))
        return 1.5

    speaker = Synthesizer(tiny().parts, SynthesisConfig(**QUICK), Hearing(), predict)
    assert speaker("Hello there.", voice, length="predictor").audio.duration == pytest.approx(1.5, abs=0.03)
    assert asked[0][:2] == (voice.phones, voice.seconds)
    with pytest.raises(ConfigError, match="no predictor"):
        tiny()("Hello there.", voice, length="predictor")


@pytest.mark.parametrize(
    ("text", "duration", "message"),
    [
        ("Hello there, my old friend.", 0.2, r"0.20 s are too short for \d+ sounds"),
        ("Hello there, my old friend.", 100.0, "at most 60 s are made at once"),
        ("Hello.", 0.0, "must be seconds above 0"),
        ("Hello.", float("nan"), "must be seconds above 0"),
        ("Hello.", "2", "must be seconds above 0"),
    ],
)
def test_impossible_durations_are_refused(voice, text, duration, message):
    with pytest.raises(InputError, match=message):
        tiny()(text, voice, duration=duration)


def test_a_text_that_does_not_fit_the_prompt_is_refused():
    wrong = tiny().voice(speech(0.5), "This is far too much to be said by anybody in half a second, I fear.")
    with pytest.raises(InputError, match="is the prompt's text what it says"):
        tiny()("Hello there, my old friend.", wrong)


# ---- prompts --------------------------------------------------------------------------------------------


def test_a_prompt_is_heard_where_its_text_is_not_given():
    speaker = Synthesizer(tiny().parts, SynthesisConfig(**QUICK), Hearing("well hello"))
    result = speaker(["One.", "Two."], speech(1.0))
    assert speaker.transcriber.calls == 1
    assert result[0].prompt_text == "well hello"
    with pytest.raises(InputError, match="no speech was recognised"):
        Synthesizer(tiny().parts, SynthesisConfig(**QUICK), Hearing(" "))("One.", speech(1.0))


def test_prompts_of_any_kind_give_the_same_voice(tmp_path):
    sound = speech(0.8)
    soundfile.write(tmp_path / "a.wav", sound.samples, 24000, subtype="FLOAT")
    data = (tmp_path / "a.wav").read_bytes()
    want = tiny().voice(sound, "Hello.")
    for source in (tmp_path / "a.wav", data, io.BytesIO(data), sound.samples, (sound.samples, 24000)):
        got = tiny().voice(source, "Hello.")
        assert torch.equal(got.semantic, want.semantic)
        assert torch.equal(got.acoustic, want.acoustic)
        assert got.phones == want.phones
        assert got.seconds == want.seconds == 0.8


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (speech(0.45), "lasts 0.45 s; give at least 0.5 s"),
        (speech(31), "longer than 30 s"),
        (Audio(np.zeros(24000, np.float32), 24000), "is silent"),
        (Audio(speech(1.0).samples * np.float32(1e-3), 24000), "is silent"),
        (Audio(np.full(24000, np.nan, np.float32), 24000), "NaN"),
    ],
)
def test_prompts_that_are_no_use_are_refused(sound, message):
    with pytest.raises(InputError, match=message):
        tiny().voice(sound, "Hello.")


def test_a_noisy_prompt_is_taken():
    noise = np.random.default_rng(0).normal(0, 0.2, 24000).astype(np.float32)
    assert len(tiny().voice(Audio(noise, 24000), "Hello.").acoustic) == 50


def test_the_prompt_is_encoded_as_officially():
    for samples in (24000, 24001, 24479, 24480, 12345):
        made = tiny().voice(Audio(speech(2).samples[:samples], 24000), "Hello.")
        assert len(made.acoustic) == tiny().parts.codec.encoder.frames_of(samples)


# ---- long texts -----------------------------------------------------------------------------------------

LONG = (
    "The first thing is this. Dr. Smith paid 3.50 dollars for it! Did he? Yes, he did, and he was glad of it,"
    " as he told me later.\nThen came the others."
)


def test_a_long_text_is_cut_and_joined(voice):
    result = tiny()(LONG, voice, piece_seconds=2.0, seed=2)
    assert len(result.pieces) > 2
    assert " ".join(piece.text for piece in result.pieces).split() == LONG.split()
    for before, after in zip(result.pieces, result.pieces[1:], strict=False):
        assert after.start - before.end == pytest.approx(0.15, abs=1e-4)
        gap = result.audio.samples[round(before.end * 24000) : round(after.start * 24000)]
        assert not gap.any()
        assert abs(result.audio.samples[round(before.end * 24000) - 1]) < 0.01  # faded
    # The first piece is made as it would be alone.
    alone = tiny()(result.pieces[0].text, voice, seed=2)
    assert torch.equal(alone.pieces[0].acoustic, result.pieces[0].acoustic)
    same(result, tiny()(["Hi.", LONG], voice, seed=[9, 2], piece_seconds=2.0, batch=3)[1])


def test_a_duration_is_shared_by_the_pieces(voice):
    result = tiny()(LONG, voice, duration=14.0, piece_seconds=3.0)
    assert len(result.pieces) > 1
    assert result.audio.duration == pytest.approx(14.0, abs=0.04 * len(result.pieces))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 900), min_size=1, max_size=4), pause=st.sampled_from([0.0, 0.02]))
def test_joined_pieces_have_no_jumps(sizes, pause):
    parts = [np.ones(size, np.float32) for size in sizes]
    sound, places = join_pieces(parts, 8000, pause)
    assert len(sound) == sum(sizes) + (len(sizes) - 1) * round(pause * 8000)
    assert [end - begin for begin, end in places] == sizes
    assert all((part == 1).all() for part in parts)  # what was given is not changed
    if len(sizes) == 1:
        assert (sound == 1).all()
    if min(sizes) >= 160:
        assert np.abs(np.diff(sound)).max() < 0.02


@settings(max_examples=50, deadline=None)
@given(
    total=st.integers(40, 300),
    new=st.integers(0, 200),
    cut=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    channels=st.integers(1, 2),
)
def test_what_is_not_replaced_stays(total, new, cut, channels):
    begin, end = sorted(min(place, total) for place in cut)
    recording = np.random.default_rng(0).normal(size=(channels, total)).astype(np.float32)
    part = np.zeros(new, np.float32)
    got, fade = replace_part(recording, part, begin, end, 16)
    assert got.shape == (channels, total - end + begin + new)
    assert np.array_equal(got[:, :begin], recording[:, :begin])
    assert np.array_equal(got[:, begin + new :], recording[:, end:])
    assert not got[:, begin + fade : begin + new - fade].any()


# ---- wrong input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text: is empty"),
        (" \n", "text: is empty"),
        ("x" * 100_000, "100000 characters; at most 20000"),
        ("Привет", "Cyrillic"),
        ("!!!", "nothing that can be said"),
        ((), "no phones"),
        ((5000,), "5000"),
    ],
)
def test_texts_that_cant_be_spoken_are_refused(voice, text, message):
    with pytest.raises(InputError, match=message):
        tiny()(text, voice)


def test_options_that_are_wrong_are_refused(voice):
    for options, message in (
        ({"steps": 0}, "steps"),
        ({"speed": 0.0}, "speed"),
        ({"stepz": 5}, "unknown key 'stepz'"),
        ({"language": "fi"}, "valid are"),
        ({"acoustic_steps": ()}, "steps"),
        ({"batch": 0}, "batch"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny()("Hello.", voice, **options)
    with pytest.raises(InputError, match="seed"):
        tiny()("Hello.", voice, seed=-1)
    with pytest.raises(ConfigError, match="2 values for 1"):
        tiny()(["Hello."], voice, duration=[1.0, 2.0])
    with pytest.raises(ConfigError, match="has its text already"):
        tiny()("Hello.", voice, "Hello.")
    assert change(SynthesisConfig(), {"acoustic_steps": 4}).acoustic_steps == (4,)


def test_parts_must_fit_each_other():
    from nar_speech.pipelines.speech_model import _check

    parts = tiny_parts()
    _check(parts, "here")
    networks = parts.networks
    with pytest.raises(ConfigError, match="here: the networks make 3 codebooks"):
        _check(replace(parts, networks=replace(networks, first=networks.full)), "here")
