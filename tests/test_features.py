"""The frontend against Kaldi, Whisper and itself: batches equal singles, streams equal files."""

import json
from dataclasses import fields, replace

import librosa
import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.cmvn import read_json_cmvn, read_kaldi_cmvn
from nar_speech.errors import ConfigError, InputError
from nar_speech.features import (
    Frontend,
    FrontendConfig,
    build_frontend,
    select_streams,
    slaney_mel_matrix,
    stack_frames,
)

FUNASR = FrontendConfig(window="hamming", lfr_m=7, lfr_n=6)
SMALL = FrontendConfig(window="hamming", num_mels=40, lfr_m=5, lfr_n=4)
WENET = FrontendConfig()
WHISPER = FrontendConfig(kind="log_mel")
WHISPER_STREAM = FrontendConfig(kind="log_mel", peak=1.0)
NEMO = FrontendConfig(kind="nemo", fft_size=512)
NEMO_OFFLINE = FrontendConfig(kind="nemo", num_mels=64, frame_ms=20.0, normalize="per_feature")
ODD = FrontendConfig(kind="nemo", num_mels=20, frame_ms=20.0625, fft_size=601, window="hamming", low_hz=50.0)


def speech(samples, seed=0, level=0.1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, generator=generator)
    tone = torch.sin(torch.arange(samples) * 2 * torch.pi * 300 / 16000)
    return level * (noise + tone)


def single(frontend, wave):
    features, lengths = frontend(wave[None], torch.tensor([len(wave)]))
    assert features.shape[1] == lengths.item()
    return features[0]


@pytest.mark.parametrize("window", ["povey", "hamming", "hann", "blackman", "rectangular"])
@pytest.mark.parametrize(("rate", "mels", "low", "high"), [(16000, 80, 20, 0), (8000, 40, 60, -200)])
def test_fbank_matches_torchaudio(window, rate, mels, low, high):
    wave = speech(20001)
    config = FrontendConfig(
        window=window, sample_rate=rate, num_mels=mels, low_hz=float(low), high_hz=float(high)
    )
    got = single(Frontend(config), wave)
    want = torchaudio.compliance.kaldi.fbank(
        wave[None] * 32768,
        num_mel_bins=mels,
        sample_frequency=rate,
        window_type="hanning" if window == "hann" else window,
        low_freq=low,
        high_freq=high,
        energy_floor=0.0,
    )
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-4)


def test_fbank_survives_silence_and_a_large_offset():
    frontend = Frontend(WENET)
    assert torch.allclose(single(frontend, torch.zeros(800)), torch.tensor(np.log(np.finfo("f").eps)).float())
    wave = speech(8000)
    torch.testing.assert_close(single(frontend, wave + 0.5), single(frontend, wave), atol=0.05, rtol=0)


@given(samples=st.integers(1, 2000))
@settings(max_examples=40, deadline=None)
def test_whisper_log_mel_equals_the_definition_with_zeros_after_the_clip(samples):
    wave = speech(samples, seed=samples)
    padded = torch.nn.functional.pad(wave, (0, 16000))
    window = torch.hann_window(400)
    spectrum = torch.stft(padded, 400, 160, window=window, center=True, return_complex=True)
    mel = torch.tensor(librosa.filters.mel(sr=16000, n_fft=400, n_mels=80))
    log_spec = (mel @ spectrum.abs().square()).clamp(min=1e-10).log10()
    rows = max(samples // 160, 1)
    log_spec = log_spec[:, :rows]
    want = ((torch.maximum(log_spec, log_spec.max() - 8.0) + 4.0) / 4.0).T
    frontend = Frontend(WHISPER)
    assert frontend.num_frames(samples) == rows
    torch.testing.assert_close(single(frontend, wave), want, atol=1e-4, rtol=1e-4)


def test_a_fixed_peak_gives_whisper_features_of_clips_that_reach_it():
    wave = torch.cat([torch.zeros(400), speech(4000, level=0.02)])
    whole, counts = Frontend(WHISPER)(wave[None], torch.tensor([len(wave)]))
    peak = whole[0, : counts[0]].max().item() * 4.0 - 4.0
    fixed = single(Frontend(replace(WHISPER, peak=peak)), wave)
    torch.testing.assert_close(fixed, whole[0], atol=1e-5, rtol=1e-5)
    louder = single(Frontend(replace(WHISPER, peak=peak + 4.0)), wave)
    assert louder.min().item() == pytest.approx((peak + 4.0 - 8.0 + 4.0) / 4.0)


@pytest.mark.parametrize("config", [NEMO, NEMO_OFFLINE, ODD], ids=["streaming", "offline", "odd"])
@given(samples=st.integers(0, 4000))
@settings(max_examples=25, deadline=None)
def test_nemo_features_by_their_definition(config, samples):
    frontend, wave = Frontend(config), speech(samples, seed=samples)
    emphasised = wave.clone()
    emphasised[1:] -= 0.97 * wave[:-1]
    size, fft = config.frame_samples, frontend.fft_size
    make = torch.hamming_window if config.window == "hamming" else torch.hann_window
    spectrum = torch.stft(
        torch.nn.functional.pad(emphasised, (0, fft)),
        fft,
        160,
        size,
        make(size, periodic=False),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    low, high = config.band
    mel = librosa.filters.mel(sr=16000, n_fft=fft, n_mels=config.num_mels, fmin=low, fmax=high)
    rows = max((samples + 2 * (fft // 2) - fft) // 160, 0)
    want = (torch.tensor(mel) @ spectrum.abs().square() + 2**-24).log().T[:rows]
    if config.normalize == "per_feature" and rows:
        deviation = want.std(0) if rows > 1 else torch.zeros(config.num_mels)
        want = (want - want.mean(0)) / (deviation + 1e-5)
    assert frontend.num_frames(samples) == rows
    torch.testing.assert_close(single(frontend, wave), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("mels", "fft", "rate"), [(80, 400, 16000), (128, 400, 16000), (80, 1024, 24000)])
def test_slaney_filters_equal_librosa(mels, fft, rate):
    want = librosa.filters.mel(sr=rate, n_fft=fft, n_mels=mels)
    np.testing.assert_allclose(slaney_mel_matrix(mels, fft, rate, 0.0, rate / 2).numpy(), want, atol=1e-7)


@pytest.mark.parametrize(
    "config",
    [FUNASR, SMALL, WENET, WHISPER, WHISPER_STREAM, NEMO, NEMO_OFFLINE],
    ids=["funasr", "small", "wenet", "whisper", "whisper_stream", "nemo", "nemo_offline"],
)
@given(lengths=st.lists(st.integers(0, 6000), min_size=1, max_size=5), data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_ragged_batch_equals_its_singles(config, lengths, data):
    frontend = Frontend(config)
    size = max(lengths) + data.draw(st.integers(0, 700))
    waves = torch.full((len(lengths), size), 7.0)  # what is in the padding must not matter
    for row, length in enumerate(lengths):
        waves[row, :length] = speech(length, seed=row)
    features, counts = frontend(waves, torch.tensor(lengths))
    assert counts.tolist() == [frontend.num_frames(n) for n in lengths]
    assert features.shape == (len(lengths), max(counts), frontend.feature_size)
    for row, length in enumerate(lengths):
        rows = counts[row]
        assert (features[row, rows:] == 0).all()
        if length:
            want = single(frontend, speech(length, seed=row))
            torch.testing.assert_close(features[row, :rows], want, atol=1e-5, rtol=1e-5)


@given(frames=st.integers(1, 40), m=st.integers(1, 8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_stacking_by_its_definition(frames, m, data):
    n = data.draw(st.integers(1, m))
    x = torch.arange(frames * 2.0).view(1, frames, 2)
    got, rows = stack_frames(x, torch.tensor([frames]), m, n)
    want = [
        torch.cat([x[0, min(max(i * n + k - (m - 1) // 2, 0), frames - 1)] for k in range(m)])
        for i in range(-(-frames // n))
    ]
    assert rows.item() == len(want)
    assert torch.equal(got[0], torch.stack(want))


def cut(length, sizes):
    """Consecutive (begin, end) of ``sizes``, which are used again and again until ``length`` is reached."""
    edges, place, number = [], 0, 0
    while place < length or number < len(sizes):
        size = sizes[number % len(sizes)]
        edges.append((place, min(place + size, length)))
        place, number = min(place + size, length), number + 1
    return edges


sizes = st.lists(st.integers(0, 1500), min_size=1, max_size=6).filter(lambda s: sum(s) > 200)


STREAMS = {
    "funasr": FUNASR,
    "small": SMALL,
    "wenet": WENET,
    "nemo": NEMO,
    "odd": ODD,
    "whisper": WHISPER_STREAM,
}


@pytest.mark.parametrize("config", STREAMS.values(), ids=STREAMS)
@given(length=st.integers(0, 6000), sizes=sizes)
@settings(max_examples=50, deadline=None)
def test_a_stream_equals_the_file_for_every_chunking(config, length, sizes):
    frontend = Frontend(config)
    wave = speech(length, seed=length)
    state, outputs = frontend.init_state(1), []
    edges = cut(length, sizes)
    for number, (begin, end) in enumerate(edges):
        final = number == len(edges) - 1
        features, counts, state = frontend.step(
            wave[None, begin:end], torch.tensor([end - begin]), state, final
        )
        outputs.append(features[0, : counts[0]])
    want = single(frontend, wave) if length else torch.zeros(0, frontend.feature_size)
    torch.testing.assert_close(torch.cat(outputs), want, atol=1e-5, rtol=1e-5)


@given(lengths=st.lists(st.integers(0, 5000), min_size=2, max_size=4), data=st.data())
@settings(max_examples=25, deadline=None)
def test_streams_of_a_batch_begin_and_end_on_their_own(lengths, data):
    frontend = Frontend(data.draw(st.sampled_from([SMALL, NEMO, WHISPER_STREAM])))
    waves = [speech(n, seed=row) for row, n in enumerate(lengths)]
    edges = [cut(n, data.draw(sizes)) for n in lengths]
    outputs = [[] for _ in lengths]
    state = frontend.init_state(len(lengths))
    for tick in range(max(map(len, edges))):
        now = [e[tick] if tick < len(e) else (0, 0) for e in edges]
        final = torch.tensor([tick == len(e) - 1 for e in edges])
        chunk = torch.full((len(lengths), max(end - begin for begin, end in now)), 5.0)
        for row, (begin, end) in enumerate(now):
            chunk[row, : end - begin] = waves[row][begin:end]
        sizes_now = torch.tensor([end - begin for begin, end in now])
        features, counts, state = frontend.step(chunk, sizes_now, state, final)
        for row in range(len(lengths)):
            outputs[row].append(features[row, : counts[row]])
    for row, wave in enumerate(waves):
        want = single(frontend, wave) if len(wave) else torch.zeros(0, frontend.feature_size)
        torch.testing.assert_close(torch.cat(outputs[row]), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [FUNASR, NEMO], ids=["funasr", "nemo"])
def test_a_finished_stream_begins_anew_and_states_can_be_regrouped(config):
    frontend = Frontend(config)
    waves = torch.stack([speech(3000, seed=1), speech(3000, seed=2)])
    lengths = torch.tensor([3000, 3000])
    _, _, state = frontend.step(waves, lengths, frontend.init_state(2), torch.tensor([True, False]))
    fresh = frontend.init_state(1)
    for field in fields(state):
        value = getattr(select_streams(state, torch.tensor([0])), field.name)
        assert torch.equal(value, getattr(fresh, field.name)), field.name
    swapped = select_streams(state, torch.tensor([1, 0]))
    got, _, _ = frontend.step(waves.flip(0), lengths, swapped, True)
    again, counts, _ = frontend.step(waves, lengths, state, True)
    torch.testing.assert_close(got, again.flip(0)[:, : got.shape[1]])
    torch.testing.assert_close(again[0, : counts[0]], single(frontend, waves[0]), atol=1e-5, rtol=1e-5)


def test_a_tail_of_less_than_one_stack_is_not_lost():
    frontend = Frontend(FUNASR)
    wave = speech(400 + 2 * 160)  # 3 frames: fewer than the 7 of a stack, even with the copies before them
    features, counts, _ = frontend.step(wave[None], torch.tensor([len(wave)]), frontend.init_state(1), True)
    assert counts.tolist() == [1]
    torch.testing.assert_close(features[0], single(frontend, wave))


@pytest.mark.parametrize("size", [1, 2, 3, 17, 200, 399])
def test_a_clip_shorter_than_a_frame_gives_one_finite_frame(size):
    features = single(Frontend(WENET), speech(size))
    assert features.shape == (1, 80)
    assert features.isfinite().all()
    if size >= 17:
        want = torchaudio.compliance.kaldi.fbank(
            speech(size)[None] * 32768, num_mel_bins=80, frame_length=size / 16, energy_floor=0.0
        )
        torch.testing.assert_close(features, want, atol=2e-3, rtol=1e-4)


def test_features_stay_float32_under_half_and_autocast():
    wave, frontend = speech(4000), Frontend(FUNASR, (torch.ones(560), torch.ones(560)))
    want = single(frontend, wave)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(single(frontend, wave), want)
    assert torch.equal(single(frontend.half(), wave), want)
    assert not list(frontend.parameters())
    assert not frontend.state_dict()


@pytest.mark.parametrize(("kind", "least"), [("fbank", -5), ("nemo", -16.6)])
def test_dither_is_seeded_and_only_in_training(kind, least):
    frontend = Frontend(FrontendConfig(kind=kind, dither=1.0))
    wave = torch.zeros(1, 4000)
    length = torch.tensor([4000])

    def draw(seed):
        return frontend(wave, length, generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert draw(1).mean() > least  # noise of one 16-bit step
    frontend.eval()
    assert torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("config", [FUNASR, NEMO], ids=["funasr", "nemo"])
def test_blocks_of_the_spectrum_do_not_show(config, monkeypatch):
    waves, lengths = torch.stack([speech(9000, seed=1), speech(9000, seed=2)]), torch.tensor([9000, 8000])
    want = Frontend(config)(waves, lengths)[0]
    monkeypatch.setattr("nar_speech.features.CPU_BLOCK_FRAMES", 14)
    torch.testing.assert_close(Frontend(config)(waves, lengths)[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [FUNASR, WENET, WHISPER, NEMO_OFFLINE])
def test_cuda_equals_cpu(config):
    waves, lengths = torch.stack([speech(9000, seed=1), speech(9000, seed=2)]), torch.tensor([9000, 300])
    want, rows = Frontend(config)(waves, lengths)
    got, rows_got = Frontend(config).cuda()(waves.cuda(), lengths.cuda())
    assert rows_got.tolist() == rows.tolist()
    torch.testing.assert_close(got.cpu(), want, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("config", [WHISPER, NEMO_OFFLINE], ids=["log_mel", "normalised"])
def test_what_needs_the_whole_utterance_can_not_stream(config):
    with pytest.raises(ConfigError, match="whole utterance"):
        Frontend(config).init_state(1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "mfcc"}, "kind"),
        ({"window": "kaiser"}, "window"),
        ({"kind": "log_mel", "window": "povey"}, "log_mel uses hann"),
        ({"kind": "log_mel", "dither": 1.0}, "dither"),
        ({"dither": -1.0}, "dither"),
        ({"peak": 1.0}, "only kind log_mel"),
        ({"kind": "log_mel", "peak": 11.0}, "peak"),
        ({"fft_size": 512}, "only kind nemo"),
        ({"normalize": "per_feature"}, "only kind nemo"),
        ({"kind": "nemo", "fft_size": 399}, "fft_size: got 399"),
        ({"lfr_m": 2, "lfr_n": 3}, "lfr_n <= lfr_m"),
        ({"low_hz": 9000.0}, "filters from"),
        ({"num_mels": 0}, "num_mels"),
        ({"sample_rate": 5}, "sample_rate"),
        ({"shift_ms": 0.0}, "too short"),
    ],
)
def test_impossible_configurations_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        FrontendConfig(**values)


def test_wrong_shapes_are_refused():
    with pytest.raises(InputError, match="expected waves"):
        Frontend(WENET)(torch.zeros(400), torch.tensor([400]))
    with pytest.raises(InputError, match="401 samples, but the waves hold 400"):
        Frontend(WENET)(torch.zeros(1, 400), torch.tensor([401]))
    with pytest.raises(ConfigError, match="560 values"):
        Frontend(FUNASR, (torch.zeros(80), torch.ones(80)))


MVN = "<Nnet>\n<AddShift> 2 2\n<LearnRateCoef> 0 [ {} ]\n<Rescale> 2 2\n<LearnRateCoef> 0 [ {} ]\n</Nnet>\n"


def test_kaldi_cmvn_is_applied_after_stacking(tmp_path):
    (tmp_path / "am.mvn").write_text(MVN.format(" ".join(["-1.5"] * 80), " ".join(["2"] * 80)))
    frontend = build_frontend(FrontendConfig(cmvn="am.mvn"), tmp_path)
    wave = speech(2000)
    torch.testing.assert_close(single(frontend, wave), (single(Frontend(WENET), wave) - 1.5) * 2)


@pytest.mark.parametrize(
    "text",
    ["", "<Nnet> hello", MVN.format("1 2", "x y"), MVN.format("1 2", ""), MVN.format("1 nan", "1 2"),
     MVN.format("1 2 3", "1 2"), MVN.format("1 2", "1 2").replace("]", "")],
)  # fmt: skip
def test_malformed_kaldi_cmvn_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "am.mvn").write_text(text)
    with pytest.raises(ConfigError, match=r"am\.mvn"):
        read_kaldi_cmvn(tmp_path / "am.mvn")


def test_a_missing_or_binary_cmvn_file_is_an_error(tmp_path):
    (tmp_path / "binary.mvn").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("missing.mvn", "binary.mvn"):
        with pytest.raises(ConfigError, match=name):
            read_kaldi_cmvn(tmp_path / name)


def test_json_cmvn_standardises(tmp_path):
    data = torch.randn(500, 80, dtype=torch.float64) * 3 + 2
    stats = {
        "mean_stat": data.sum(0).tolist(),
        "var_stat": data.square().sum(0).tolist(),
        "frame_num": len(data),
    }
    path = tmp_path / "global_cmvn"
    path.write_text(json.dumps(stats))
    shift, scale = read_json_cmvn(path)
    normal = (data.float() + shift) * scale
    torch.testing.assert_close(normal.mean(0), torch.zeros(80), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(80), atol=1e-4, rtol=0)
    assert build_frontend(FrontendConfig(cmvn="global_cmvn"), tmp_path).cmvn_shift is not None


@pytest.mark.parametrize(
    "tree",
    ["[]", "{}", '{"mean_stat": [1], "var_stat": [1, 2], "frame_num": 2}', "not json",
     '{"mean_stat": [1], "var_stat": [1], "frame_num": 0}',
     '{"mean_stat": ["a"], "var_stat": [1], "frame_num": 1}'],
)  # fmt: skip
def test_malformed_json_cmvn_is_an_error_that_names_the_file(tmp_path, tree):
    (tmp_path / "global_cmvn").write_text(tree)
    with pytest.raises(ConfigError, match="global_cmvn"):
        read_json_cmvn(tmp_path / "global_cmvn")
