"""SoundGenerator and ``nar-speech generate`` with small models of random weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech import cli
from nar_speech.errors import ConfigError, HubError, InputError
from nar_speech.pipelines.generate import Inpaint
from nar_speech.pipelines.loudness import loudness, normalize_loudness
from nar_speech.pipelines.plot_steps import AGAIN, GIVEN, MASKED, plot_steps, step_colours
from nar_speech.pipelines.sound_options import GenerationConfig, change, check_duration
from nar_speech.pipelines.sound_windows import count_windows, next_window
from nar_speech.sampling.trace import ItemTrace
from nar_speech.types import Audio
from tests.sound_models import CODEBOOKS, CODES, HOP, RATE, tiny_generator, tiny_partner

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def generator():
    return tiny_generator(partner=True)


@pytest.fixture(scope="module")
def recording():
    """3 seconds that are not silent."""
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * RATE).astype(np.float32)
    return Audio(noise, RATE)


def codes_of(result):
    return result.codes.tokens[0]


# --- clips
# ------------------------------------------------------------------------------------------------------


def test_a_clip_is_as_long_as_asked_and_its_codes_decode_to_it(generator):
    result = generator("rain on a roof", duration=1.37, seed=3, loudness=None)
    assert len(result.audio.samples) == round(1.37 * RATE)
    assert result.audio.sample_rate == RATE
    assert codes_of(result).shape == (CODEBOOKS, -(-round(1.37 * RATE) // HOP))
    assert 0 <= codes_of(result).min() <= codes_of(result).max() < CODES
    waves, _ = generator.codec.decode(result.codes)
    assert np.allclose(result.audio.samples, waves[0, 0].numpy(), atol=1e-6)
    assert result.calls == 8
    assert {"text", "sampling", "decoding"} <= result.seconds.keys()
    assert generator("rain on a roof").audio.duration == generator.segment_seconds == 2.0


def test_seed_prompt_and_options_make_the_clip(generator):
    first = generator("a dog", duration=1.0, seed=1)
    assert torch.equal(codes_of(generator("a dog", duration=1.0, seed=1)), codes_of(first))
    for other in (
        generator("a dog", duration=1.0, seed=2),
        generator("two cats", duration=1.0, seed=1),
        generator(None, duration=1.0, seed=1),
        generator("a dog", duration=1.0, seed=1, negative="two cats"),
        generator("a dog", duration=1.0, seed=1, arrangement="stride1"),
        generator("a dog", duration=1.0, seed=1, rescore=True, rescore_weight=1.0),
    ):
        assert not torch.equal(codes_of(other), codes_of(first))


@given(
    items=st.lists(
        st.tuples(st.sampled_from(["a dog barks", "rain", "two loud cats meow", None]), st.floats(0.05, 5.0)),
        min_size=2,
        max_size=4,
    ),
    seed=st.integers(0, 50),
    options=st.sampled_from(
        [{}, {"adaptive": "threshold", "adaptive_level": 0.4}, {"arrangement": "stride1"}, {"rescore": True}]
    ),
)
@settings(max_examples=6, deadline=None)
def test_a_batch_equals_its_singles(generator, items, seed, options):
    prompts, durations = [p for p, _ in items], [d for _, d in items]
    together = generator(prompts, durations, seed, **options)
    for i, (prompt, duration) in enumerate(items):
        alone = generator(prompt, duration, seed + i, **options)
        assert together[i].seed == seed + i
        assert torch.equal(codes_of(alone), codes_of(together[i]))
        assert np.allclose(alone.audio.samples, together[i].audio.samples, atol=1e-5)


def test_batch_size_changes_nothing(generator):
    prompts = ["a dog", "rain", "two cats"]
    whole = generator(prompts, 1.0, [5, 6, 7])
    parts = generator(prompts, 1.0, [5, 6, 7], batch=1)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(codes_of(a), codes_of(b))


def test_long_clips_are_made_in_windows(generator):
    done = []
    result = generator("rain", duration=5.0, trace=True, progress=lambda now, most: done.append((now, most)))
    assert codes_of(result).shape[1] == 125
    assert result.calls == 32
    assert [trace.masked.shape[1] for trace in result.traces] == [50, 50, 50, 50]
    assert [trace.begin for trace in result.traces] == [0, 30, 60, 75]
    assert result.traces[1].fixed.all(0).sum() == 20
    assert done[-1] == (32, 32)
    assert [now for now, _ in done] == sorted(now for now, _ in done)


# --- recordings
# -------------------------------------------------------------------------------------------------


def test_a_continuation_begins_with_the_recording(generator, recording):
    source = Audio(recording.samples[: RATE + 100], RATE)
    result = generator("rain", duration=2.5, continue_from=source, trace=True)
    known = generator.codec.encode(torch.from_numpy(source.samples[None, None, :RATE]))
    assert torch.equal(codes_of(result)[:, :25], known.tokens[0, :CODEBOOKS])
    assert result.audio.duration == 2.5
    loud = result.audio.samples
    gain = loud[:100] @ source.samples[:100] / (source.samples[:100] @ source.samples[:100])
    assert np.allclose(loud[: RATE - 200], gain * source.samples[: RATE - 200], atol=1e-4)
    assert result.traces[0].fixed[:, :20].all()  # as much as a window keeps of what is known
    assert not result.traces[0].fixed[:, 20:].any()


def test_a_recording_of_another_rate_and_two_channels_is_converted(generator, tmp_path):
    stereo = np.random.default_rng(1).normal(0, 0.1, (16000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "stereo.wav", stereo, 16000)
    result = generator("rain", duration=1.5, continue_from=tmp_path / "stereo.wav")
    assert result.audio.duration == 1.5


def test_a_gap_is_filled_and_the_rest_stays(generator, recording):
    result = generator("rain", inpaint=Inpaint(recording, 1.0, 1.5), trace=True)
    assert len(result.audio.samples) == len(recording.samples)
    fade = round(0.02 * RATE) + 1
    begin, end = RATE, round(1.5 * RATE)
    assert np.allclose(result.audio.samples[: begin - fade], recording.samples[: begin - fade], atol=1e-6)
    assert np.allclose(result.audio.samples[end + fade :], recording.samples[end + fade :], atol=1e-6)
    assert not np.allclose(result.audio.samples[begin:end], recording.samples[begin:end], atol=1e-3)
    known = generator.codec.encode(torch.from_numpy(recording.samples[None, None])).tokens[0, :CODEBOOKS]
    assert torch.equal(codes_of(result)[:, :25], known[:, :25])
    assert torch.equal(codes_of(result)[:, 38:], known[:, 38:])
    (trace,) = result.traces  # one window with known frames on both sides
    free = np.flatnonzero(~trace.fixed[0])
    assert len(free) == 13
    assert free[0] > 0
    assert free[-1] < trace.masked.shape[1] - 1


def test_a_partner_begins_the_clip(generator):
    result = generator("rain", duration=1.5, seed=4, hybrid_seconds=0.6)
    rules = GenerationConfig()
    assert rules.hybrid_top_k == 250
    plain = generator("rain", duration=1.5, seed=4)
    assert not torch.equal(codes_of(result), codes_of(plain))
    again = generator(["rain", "a dog"], 1.5, 4, hybrid_seconds=0.6)
    assert torch.equal(codes_of(again[0]), codes_of(result))


def test_a_partner_that_is_not_asked_changes_nothing():
    partner = tiny_partner()
    config = partner.network.config
    partner.network.config = type(config)(**{**vars(config), "segment_seconds": 1.0})
    alone, beside = tiny_generator(), tiny_generator()
    beside.partner = partner
    calls = {"prompts": "rain", "duration": 1.8, "trace": True}
    assert torch.equal(codes_of(alone(**calls)), codes_of(beside(**calls)))
    assert [trace.masked.shape[1] for trace in beside(**calls, rescore=True).traces] == [25, 25, 25]


def test_official_quirks_cut_the_length(generator):
    result = generator("rain", duration=1.0, official=True)
    assert codes_of(result).shape[1] == 24
    assert len(result.audio.samples) == 24 * HOP


# --- bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        ({"prompts": ""}, InputError, "empty"),
        ({"prompts": ["rain", "  "]}, InputError, "empty"),
        ({"prompts": "one two three four five six seven"}, InputError, "more than the 6"),
        ({"prompts": 5}, InputError, "must be a text"),
        ({"duration": 0}, InputError, "above 0"),
        ({"duration": -2.0}, InputError, "above 0"),
        ({"duration": float("nan")}, InputError, "above 0"),
        ({"duration": 601}, InputError, "at most 600"),
        ({"duration": [1.0, 2.0]}, ConfigError, "2 values for 1"),
        ({"seed": -1}, InputError, "seed"),
        ({"seed": 1.5}, InputError, "seed"),
        ({"batch": 0}, ConfigError, "batch"),
        ({"top_p": 2.0}, ConfigError, "top_p"),
        ({"colour": 1}, ConfigError, "unknown key 'colour'"),
        ({"steps": (0,)}, ConfigError, "steps"),
        ({"negative": "noise", "guidance": 1.0}, ConfigError, "guidance, which is off"),
        ({"rescore": True, "dilation": 4}, ConfigError, "dilation does not ask"),
        ({"hybrid_seconds": 2.0, "duration": 2.0}, InputError, "leave nothing"),
        ({"hybrid_seconds": 3.0, "duration": 5.0}, InputError, "at most"),
    ],
)
def test_bad_calls_say_what_is_wrong(generator, call, error, word):
    with pytest.raises(error, match=word):
        generator(**{"prompts": "rain", **call})


def test_bad_recordings_say_what_is_wrong(generator, recording):
    with pytest.raises(InputError, match="longer than what it continues"):
        generator("rain", duration=2.0, continue_from=recording)
    with pytest.raises(InputError, match="shorter than a frame"):
        generator("rain", continue_from=Audio(np.ones(10, np.float32), RATE))
    with pytest.raises(ConfigError, match="leave duration"):
        generator("rain", duration=2.0, inpaint=Inpaint(recording, 0.0, 1.0))
    with pytest.raises(ConfigError, match="begins a clip"):
        generator("rain", inpaint=Inpaint(recording, 0.0, 1.0), hybrid_seconds=0.5)
    for start, end in ((1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0, 4.0), (3.5, 4.0), (float("nan"), 1.0)):
        with pytest.raises(InputError, match="is not in the recording"):
            generator("rain", inpaint=Inpaint(recording, start, end))


def test_without_a_partner_there_is_no_rescoring():
    alone = tiny_generator()
    with pytest.raises(ConfigError, match="need a partner"):
        alone("rain", rescore=True)
    partner = tiny_partner()
    partner.network.config = type(partner.network.config)(
        **{**vars(partner.network.config), "codebook_size": 9}
    )
    with pytest.raises(ConfigError, match="codebook_size"):
        partner.check(alone.network)


# --- parts
# ------------------------------------------------------------------------------------------------------


@given(
    given_frames=st.lists(st.booleans(), min_size=1, max_size=80),
    most=st.integers(2, 30),
    share=st.floats(0, 0.9),
)
@settings(max_examples=100, deadline=None)
def test_windows_fill_everything(given_frames, most, share):
    given_frames = np.array(given_frames)
    context = min(int(share * most), most - 1)
    left = given_frames.copy()
    for _ in range(count_windows(given_frames, most, context)):
        begin, end = next_window(left, most, context)
        assert 0 <= begin < end <= len(left)
        assert end - begin <= most
        first = int(np.flatnonzero(~left)[0])
        assert begin <= first < end
        assert first - begin >= min(first, context) or not left[first:end].any() or end - begin == most
        left[begin:end] = True
    assert left.all()
    assert next_window(left, most, context) is None


def test_windows_put_gaps_in_the_middle():
    known = np.ones(100, bool)
    known[60:70] = False
    assert next_window(known, 50, 20) == (40, 90)
    assert next_window(known, 10, 4) == (56, 66)
    assert next_window(np.zeros(30, bool), 50, 20) == (0, 30)


def test_loudness_is_reached_without_clipping():
    noise = np.random.default_rng(0).normal(0, 0.01, RATE).astype(np.float32)
    assert loudness(normalize_loudness(noise, RATE, -20.0), RATE) == pytest.approx(-20, abs=0.1)
    spiky = noise.copy()
    spiky[100] = 0.5
    louder = normalize_loudness(spiky, RATE, -5.0)
    assert np.abs(louder).max() == pytest.approx(0.99)
    assert loudness(louder, RATE) < -5
    silence = np.zeros(100, np.float32)
    assert normalize_loudness(silence, RATE, -14.0) is silence
    short = normalize_loudness(noise[:500], RATE, -20.0)
    assert np.abs(short).max() > np.abs(noise[:500]).max()
    assert normalize_loudness(np.stack([noise, noise]), RATE, -20.0).shape == (2, RATE)


def test_options_replace_those_of_the_model():
    config = change(GenerationConfig(), {"steps": 7, "top_k": 5})
    assert (config.steps, config.top_k, config.top_p) == ((7,), 5, 0.0)
    assert change(config, {}) is config
    assert check_duration(2) == 2.0
    rules = GenerationConfig(span=0).codebooks(4)
    assert rules.rules.span == 4
    assert [rules.stage(k).steps for k in range(6)] == [20, 10, 10, 10, 10, 10]


def item_trace():
    masked = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]], bool)
    return ItemTrace(
        stage=np.array([0, 0, 0, 1, 1]),
        step=np.array([0, 1, 2, 0, 1]),
        masked=masked,
        tokens=np.zeros((5, 4), np.int32),
        confidence=np.zeros((5, 4), np.float32),
        temperature=np.ones(5, np.float32),
        guidance=np.ones(5, np.float32),
        fixed=np.array([[0, 0, 0, 1], [1, 0, 0, 1]], bool),
    )


def test_colours_of_the_steps(tmp_path):
    trace = item_trace()
    assert trace.fixed_at(0).tolist() == [3, 3, 2, 0]
    picture = step_colours(trace, 0)
    assert picture.shape == (3, 4, 3)
    assert np.allclose(picture[:, 3], GIVEN)
    assert np.allclose(picture[0, :3], MASKED)  # all are masked again or still
    assert np.allclose(picture[2, 0], picture[2, 1])  # both get their tokens in the last step
    assert not np.allclose(picture[1, 2], MASKED)
    again = ItemTrace(**{**vars(trace), "masked": np.vstack([trace.masked[:3], trace.masked[:2]])})
    assert np.allclose(step_colours(again, 0)[2, 1], picture[2, 1])
    later = trace.masked.copy()
    later[1, 1], later[2] = False, [0, 1, 0, 0]
    four = ItemTrace(**{**vars(trace), "stage": np.zeros(5, int), "masked": later})
    assert np.allclose(step_colours(four, 0)[2, 1], AGAIN)
    plot_steps(trace, tmp_path / "steps.png", 25.0, "cost $5")
    plot_steps([trace, replace(trace, begin=3)], tmp_path / "two.png", 25.0)
    assert (tmp_path / "two.png").stat().st_size > 1000
    with pytest.raises(InputError, match="can't write the picture"):
        plot_steps(trace, tmp_path / "no" / "steps.png", 25.0)


# --- command
# ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, generator):
    """Run ``nar-speech generate`` with the small model in place of what --model names."""
    from nar_speech.pipelines.generate import SoundGenerator

    monkeypatch.setattr("nar_speech.pipelines.sound_model.resolve_sound", lambda name, *place: name)
    monkeypatch.setattr(SoundGenerator, "from_folder", classmethod(lambda cls, *parts: generator))
    return lambda *words: cli.main(["generate", *map(str, words)])


def test_one_clip_is_written(command, tmp_path, capsys):
    out = tmp_path / "dog.wav"
    assert command("a dog", "--duration", 1, "--seed", 7, "-o", out, "--plot", tmp_path / "steps.png") == 0
    assert capsys.readouterr().out == f"{out}\n"
    samples, rate = soundfile.read(out)
    assert (len(samples), rate) == (RATE, RATE)
    assert (tmp_path / "steps.png").stat().st_size > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dog.wav", "steps.png"]


def test_several_clips_go_to_numbered_files_or_a_folder(command, tmp_path, capsys, generator):
    (tmp_path / "prompts.txt").write_text("rain\n\n two cats \n", encoding="utf-8")
    words = ("a dog", "--prompts", tmp_path / "prompts.txt", "--duration", 0.5, "--json")
    assert command(*words, "-o", tmp_path / "x.flac") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in lines] == [str(tmp_path / f"x_{i}.flac") for i in (1, 2, 3)]
    assert [line["prompt"] for line in lines] == ["a dog", "rain", "two cats"]
    assert [line["seed"] for line in lines] == [0, 1, 2]
    assert command(*words, "-o", f"{tmp_path}/all/") == 0
    names = [json.loads(line)["path"].rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert names == ["01_a_dog.wav", "02_rain.wav", "03_two_cats.wav"]
    (tmp_path / "all" / names[1]).unlink()
    assert command(*words, "-o", f"{tmp_path}/all/", "--resume") == 0
    again = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["seed"] for line in again] == [1]


def test_a_picture_is_drawn_again_with_its_clip(command, tmp_path):
    words = ("rain", "--duration", 0.5, "-o", tmp_path / "x.wav", "--resume")
    assert command(*words) == 0
    assert command(*words, "--plot", tmp_path / "x.png") == 0
    drawn = (tmp_path / "x.png").stat().st_mtime_ns
    assert command(*words, "--plot", tmp_path / "x.png") == 0
    assert (tmp_path / "x.png").stat().st_mtime_ns == drawn


def test_a_clip_that_cannot_be_written_leaves_nothing(command, tmp_path, monkeypatch, capsys):
    def full(path, audio, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nar_speech.audio.write_audio", full)
    assert command("rain", "--duration", 0.5, "-o", tmp_path / "x.wav") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bad_prompt_harms_no_other(command, tmp_path, capsys):
    long = "one two three four five six seven"
    assert command("rain", long, "--duration", 0.5, "-o", f"{tmp_path}/all/") == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "more than the 6" in captured.err
    assert command(long, "--duration", 0.5, "-o", tmp_path / "no.wav") == 2


def test_recordings_on_the_command_line(command, tmp_path, recording):
    source = tmp_path / "in.wav"
    soundfile.write(source, recording.samples, RATE)
    assert command("rain", "--continue", source, "--duration", 3.5, "-o", tmp_path / "more.wav") == 0
    assert len(soundfile.read(tmp_path / "more.wav")[0]) == 3.5 * RATE
    assert command("rain", "--inpaint", "0.5:1", source, "-o", tmp_path / "gap.wav") == 0
    assert len(soundfile.read(tmp_path / "gap.wav")[0]) == 3 * RATE
    assert len(soundfile.read(source)[0]) == 3 * RATE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no prompt"),
        (("",), "prompt: is empty"),
        (("rain", "--duration", "0"), "above 0"),
        (("rain", "--duration", "nan"), "must be a number"),
        (("rain", "--steps", "4,0"), "above 0"),
        (("rain", "--cfg", "1:2:3"), "must be a number, or two"),
        (("rain", "--top-p", "3"), "top_p"),
        (("rain", "--adaptive", "often"), "threshold"),
        (("rain", "--dilation", "12"), "power of two"),
        (("rain", "-o", "x.txt"), "suffix must be one of"),
        (("rain", "-o", "/no/such/x.wav"), "no such folder"),
        (("rain", "--format", "flac"), "output folder"),
        (("rain", "snow", "--plot", "x.png"), "single prompt"),
        (("rain", "--prompts", "/no/such/file"), "can't read this file"),
        (("rain", "--plot", "x.wav"), "not a picture's suffix"),
        (("rain", "--plot", "no/x.png"), "no such folder"),
        (("rain", "--dilation", "4", "--steps", "2"), "leave --steps"),
        (("rain", "--arrangement", "stride1", "--scoring", "max"), "leave --scoring"),
        (("rain", "--partner", "x", "--hybrid", "0"), "must be a number above 0"),
        (("rain", "--inpaint", "1-2", "x.wav"), "START:END"),
        (("rain", "--inpaint", "1:2", "/no/such.wav"), "no such file"),
        (("rain", "--inpaint", "1:2", "x.wav", "--duration", "2"), "leave --duration out"),
        (("rain", "--continue", "/no/such.wav"), "no such file"),
        (("rain", "--rescore", "0.5"), "--partner"),
        (("rain", "--partner", "x"), "nothing to do"),
        (("rain", "--seed", "-1"), "whole number from 0"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(command, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = command(*words)
    except SystemExit as stopped:  # argparse
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("nar-speech: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())  # said before the work
    assert not list(tmp_path.glob("*.wav"))


def test_inputs_are_not_overwritten(command, tmp_path, capsys, recording):
    source = tmp_path / "in.wav"
    soundfile.write(source, recording.samples, RATE)
    before = source.read_bytes()
    assert command("rain", "--inpaint", "0.5:1", source, "-o", source) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_without_the_embedded_model_the_error_says_so(tmp_path, capsys, monkeypatch):
    from nar_speech.pipelines import sound_model

    monkeypatch.setattr(sound_model.hub, "embedded_models", lambda: ["mini_en"])
    with pytest.raises(HubError, match="mini_sound is not in this installation"):
        sound_model.resolve_sound()
    assert cli.main(["generate", "rain", "-o", str(tmp_path / "x.wav")]) == 2
    assert "name a model with --model" in capsys.readouterr().err
    with pytest.raises(HubError, match="not a model that makes sound"):
        sound_model.load_sound_parts(tmp_path)


# --- benchmark
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--duration", "-1"), "above 0"),
        (("--seeds", "0"), "nothing to measure"),
        (("--prompts", "no.txt"), "no.txt"),
        (("--scorer", "nope"), "package.module:function"),
    ],
)
def test_the_benchmark_of_masked_sampling_says_what_is_wrong(
    generator, tmp_path, monkeypatch, capsys, words, message
):
    from benchmarks import masked_sampling as benchmark

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "resolve_sound", lambda name: name)
    monkeypatch.setattr(benchmark.SoundGenerator, "from_folder", classmethod(lambda cls, *parts: generator))
    assert benchmark.main(["model", "-o", str(tmp_path / "out"), "--quick", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_the_benchmark_of_masked_sampling_writes_its_files(generator, tmp_path, monkeypatch, capsys):
    from benchmarks import masked_sampling as benchmark

    monkeypatch.setattr(benchmark, "resolve_sound", lambda name: name)
    monkeypatch.setattr(
        benchmark, "load_scorer", lambda name: lambda clips, prompts: [c.duration for c in clips]
    )
    monkeypatch.setattr(benchmark.SoundGenerator, "from_folder", classmethod(lambda cls, *parts: generator))
    words = ["tiny", "-o", str(tmp_path / "out"), "--duration", "0.6", "--seeds", "1", "--quick"]
    assert benchmark.main([*words, "--scorer", "any:thing"]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    ways = [row["way"] for row in rows]
    assert len(set(ways)) == len(ways) == 8
    assert rows[0]["agreement"] == 1.0
    assert all(row["cross_entropy"] > 0 and row["score"] == pytest.approx(0.6, abs=0.01) for row in rows)
    calls = {row["way"]: row["calls"] for row in rows}
    assert calls["dilation"] < calls["schedule"]
    assert calls["adaptive threshold"] <= calls["schedule"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"table.md", "curves.png", "steps_schedule.png", "steps_adaptive_factor.png"} <= names
    assert capsys.readouterr().out.count("\n| ") == 8
    assert len(benchmark.settings()) > 20
    assert len({s.name for s in benchmark.settings()}) == len(benchmark.settings())
