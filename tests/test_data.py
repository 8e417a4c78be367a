"""Data: augmentation, SpecAugment, batches that resume and split over processes exactly."""

import itertools
import json

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.data import (
    IGNORE,
    AugmentConfig,
    Augmenter,
    DataConfig,
    EvalData,
    SpecAugmentConfig,
    TrainData,
    collate,
    derive_seed,
    spec_augment,
)
from nar_speech.data.augment import band_limit, change_speed, convolve, mix_at_snr, read_cut, synthetic_room
from nar_speech.errors import ConfigError, ManifestError
from tests.corpus import make_manifest, tone


def tokenize(text):
    return [ord(c) for c in text]


def short(text):
    return tokenize(text)[-1:]


def config(manifest, **changes):
    values = {"batch_seconds": 3.0, "buckets": 3, "workers": 0, "min_seconds": 0.0, **changes}
    return DataConfig(train=[manifest], dev=[manifest], **values)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_manifest(tmp_path_factory.mktemp("corpus"), 30)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return make_manifest(tmp_path_factory.mktemp("noise"), 3, name="noise")


def same(a, b):
    return a.ids == b.ids and torch.equal(a.waves, b.waves) and torch.equal(a.tokens, b.tokens)


# ---- batches ------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 9)), min_size=1, max_size=6))
def test_collate_pads_and_keeps_lengths(sizes):
    waves = [np.full(n, 0.5, np.float32) for n, _ in sizes]
    tokens = [list(range(5, 5 + u)) for _, u in sizes]
    names = [str(i) for i in range(len(sizes))]
    batch = collate(waves, tokens, names, names, 8000)
    assert batch.wave_lengths.tolist() == [n for n, _ in sizes]
    assert batch.token_lengths.tolist() == [u for _, u in sizes]
    assert batch.waves.shape == (len(sizes), max(n for n, _ in sizes))
    for b, (n, u) in enumerate(sizes):
        assert batch.waves[b, :n].eq(0.5).all()
        assert batch.waves[b, n:].eq(0).all()
        assert batch.tokens[b, :u].tolist() == tokens[b]
        assert batch.tokens[b, u:].eq(IGNORE).all()
    assert batch.seconds == pytest.approx(sum(n for n, _ in sizes) / 8000)


def test_an_epoch_has_every_utterance_once_within_the_limit(manifest):
    data = TrainData(config(manifest), tokenize)
    first, second = [], []
    for batch in data:
        (first if data.epoch == 0 else second).extend(batch.ids)
        assert batch.waves.shape[0] * batch.waves.shape[1] <= 3.0 * 16000 + 16
        if data.epoch == 2:
            break
    assert len(set(first)) == len(first) == 30
    assert sorted(first) == sorted(second[:30])
    assert first != second[:30]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("position", [1, 7, 19])  # within epochs 0, 0 or 1, and later
def test_a_resumed_stream_is_the_same_stream(manifest, workers, position):
    augment = AugmentConfig(reverb_prob=0.5, telephone_prob=0.5, silence=0.1)
    whole = TrainData(config(manifest), tokenize, augment, seed=3)
    stream = iter(whole)
    for _ in range(position):
        next(stream)
    state = json.loads(json.dumps(whole.state_dict()))
    rest = TrainData(config(manifest, workers=workers), tokenize, augment, seed=3)
    rest.load_state_dict(state)
    for ours, theirs in itertools.islice(zip(rest, stream, strict=False), 8):
        assert same(ours, theirs)
    assert rest.state_dict() == whole.state_dict()


def test_processes_share_the_stream_of_one(manifest):
    one = [b.ids for b in itertools.islice(TrainData(config(manifest), tokenize, group=2), 24)]
    parts = [TrainData(config(manifest), tokenize, rank=r, world_size=2, group=2) for r in (0, 1)]
    for r, data in enumerate(parts):
        assert [b.ids for b in itertools.islice(data, 12)] == one[r::2]
    assert parts[0].state_dict() == parts[1].state_dict()
    resumed = TrainData(config(manifest), tokenize, rank=1, world_size=2, group=2)
    resumed.load_state_dict(parts[0].state_dict())
    again = TrainData(config(manifest), tokenize, group=2)
    again.load_state_dict(parts[0].state_dict())
    expected = [b.ids for b in itertools.islice(again, 4)]
    assert [b.ids for b in itertools.islice(resumed, 2)] == expected[1::2]


def test_batches_of_a_step_have_like_lengths(tmp_path):
    manifest = make_manifest(tmp_path, 120)
    data = TrainData(config(manifest, batch_seconds=4.0), tokenize, group=2)
    means = [float(b.wave_lengths.float().mean()) for b in itertools.islice(data, 20)]
    within = np.mean([abs(a - b) for a, b in zip(means[::2], means[1::2], strict=True)])
    across = np.mean([abs(a - b) for a, b in itertools.combinations(means, 2)])
    assert within < 0.5 * across


def test_other_seed_other_order(manifest):
    orders = [
        [b.ids for b in itertools.islice(TrainData(config(manifest), tokenize, seed=s), 5)] for s in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_filters(manifest):
    data = TrainData(config(manifest, min_seconds=0.6, max_seconds=0.9, batch_size=2), tokenize)
    for batch in itertools.islice(data, 10):
        assert batch.wave_lengths.min() >= 0.6 * 16000 - 1
        assert batch.wave_lengths.max() <= 0.9 * 16000 + 1
        assert len(batch.ids) <= 2
    slow = TrainData(config(manifest, max_tokens_per_second=10.0), tokenize)  # "speaker 3" has 9 tokens
    for batch in itertools.islice(slow, 3):
        assert (batch.token_lengths <= 10.0 * batch.wave_lengths / 16000 + 1e-3).all()
    with pytest.raises(ManifestError, match=r"data\.min_seconds"):
        next(iter(TrainData(config(manifest, min_seconds=100.0, max_seconds=200.0), tokenize)))


def test_several_manifests_are_mixed(manifest, tmp_path):
    other = make_manifest(tmp_path, 10, name="other")
    data = TrainData(
        DataConfig(train=[manifest, other], batch_seconds=3, workers=0, min_seconds=0.0), tokenize
    )
    seen = set()
    for batch in data:
        if data.epoch == 1:
            break
        seen.update(batch.ids)
    assert len(seen) == 40
    again = TrainData(data.config, tokenize)
    assert [b.ids for b in itertools.islice(again, 3)] == [
        b.ids for b in itertools.islice(TrainData(data.config, tokenize), 3)
    ]


def test_evaluation_batches_are_fixed_sorted_and_shared(manifest):
    whole = EvalData(config(manifest), tokenize)
    batches = list(whole)
    lengths = [n for batch in batches for n in batch.wave_lengths.tolist()]
    assert lengths == sorted(lengths)
    assert len(lengths) == 30
    assert all(same(a, b) for a, b in zip(batches, whole, strict=True))
    parts = [EvalData(config(manifest), tokenize, rank=r, world_size=3) for r in range(3)]
    assert sum(map(len, parts)) == len(batches)
    assert sorted(i for part in parts for b in part for i in b.ids) == sorted(
        i for b in batches for i in b.ids
    )


def test_audio_of_another_rate_is_resampled(tmp_path):
    manifest = make_manifest(tmp_path, 4, rate=8000)
    for batch in EvalData(config(manifest), short):
        wave = batch.waves[0, : batch.wave_lengths[0]]
        spectrum = torch.fft.rfft(wave).abs()
        hertz = float(spectrum.argmax()) * 16000 / len(wave)
        assert hertz == pytest.approx(200 + 150 * (batch.tokens[0, 0].item() - ord("0")), abs=5)


def test_bad_manifests_are_named(tmp_path):
    with pytest.raises(ManifestError, match="nothing here"):
        TrainData(config(str(tmp_path / "nothing here.jsonl.gz")), tokenize)
    with pytest.raises(ManifestError, match=r"data\.train"):
        TrainData(DataConfig(), tokenize)
    manifest = make_manifest(tmp_path, 2)
    (tmp_path / "cuts-000.wav").write_bytes(b"not audio")
    with pytest.raises(ManifestError, match="cuts-000"):
        list(EvalData(config(manifest), tokenize))


def test_seeds_differ_and_are_stable():
    assert derive_seed(1, "a") == 4610687093479912873
    assert len({derive_seed(a, b) for a in range(20) for b in "abc"}) == 60
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("1") != derive_seed(1)


# ---- augmentation of waves ----------------------------------------------------------------------------


def test_speed_changes_length_and_pitch():
    wave = tone(1.0, 400)
    for factor in (0.9, 1.1):
        out = change_speed(wave, factor)
        assert len(out) == pytest.approx(16000 / factor, abs=1)
        hertz = np.abs(np.fft.rfft(out)).argmax() * 16000 / len(out)
        assert hertz == pytest.approx(400 * factor, abs=2)


@pytest.mark.parametrize("snr", [-5.0, 0.0, 20.0])
def test_noise_is_mixed_at_the_ratio_asked_for(snr):
    rng = np.random.default_rng(0)
    wave, noise_wave = tone(0.5, 300), rng.standard_normal(8000).astype(np.float32)
    added = mix_at_snr(wave, noise_wave, snr) - wave
    assert 10 * np.log10(np.mean(wave**2) / np.mean(added**2)) == pytest.approx(snr, abs=1e-2)
    silent = np.zeros(100, np.float32)
    assert np.array_equal(mix_at_snr(silent, noise_wave[:100], snr), silent)


def test_reverberation_is_a_convolution_of_equal_power_and_place():
    rng = np.random.default_rng(0)
    wave = rng.standard_normal(3000).astype(np.float32)
    room = synthetic_room(16000, 0.2, rng)
    assert room[0] == 1.0 == np.abs(room).max()
    wet = convolve(wave, room)
    plain = np.convolve(wave, room)[:3000]
    expected = plain * np.sqrt(np.mean(wave**2) / np.mean(plain**2))
    np.testing.assert_allclose(wet, expected, atol=1e-4)
    late = convolve(wave, np.concatenate([np.zeros(50), [1.0]]))  # a pure delay is taken out
    np.testing.assert_allclose(late, wave, atol=1e-4)
    energy = room**2
    assert energy[2400:].sum() < 1e-3 * energy[32:].sum()  # 45 dB down after three quarters of rt60


def test_telephone_band():
    def level(hertz):
        return np.std(band_limit(tone(0.5, hertz, seed=1), 16000)[1000:-1000]) / np.std(
            tone(0.5, hertz, seed=1)
        )

    assert level(1000) > 0.95
    assert level(100) < 0.1
    assert level(6000) < 0.15
    with pytest.raises(ConfigError, match="telephone"):
        band_limit(tone(0.1, 100, 6000), 6000)


def test_augmentation_depends_on_the_generator_alone(noise):
    augment = Augmenter(
        AugmentConfig(noise=noise, noise_prob=1.0, reverb_prob=0.5, telephone_prob=0.5, silence=0.2), 16000
    )
    wave = tone(0.8, 300)
    for seed in range(8):
        first, second = (augment(wave, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(first, second)
        assert first.dtype == np.float32
        assert np.abs(first).max() <= 1.0
    outs = [augment(wave, np.random.default_rng(seed)) for seed in range(8)]
    assert len({out.tobytes() for out in outs}) == 8
    assert np.array_equal(wave, tone(0.8, 300))


def test_turning_one_change_off_leaves_the_draws_of_the_others():
    wave = tone(0.8, 300)
    with_telephone = AugmentConfig(speed=(0.9, 1.1), telephone_prob=1.0, volume_prob=0.0)
    without = AugmentConfig(speed=(0.9, 1.1), telephone_prob=0.0, volume_prob=0.0)
    for seed in range(6):
        a = Augmenter(with_telephone)(wave, np.random.default_rng(seed))
        b = Augmenter(without)(wave, np.random.default_rng(seed))
        assert len(a) == len(b)
        np.testing.assert_allclose(a, band_limit(b, 16000), atol=1e-5)


def test_silence_and_volume():
    wave = tone(0.5, 300)
    out = Augmenter(AugmentConfig(speed=(1.0,), silence=0.5, volume_prob=0.0))(wave, np.random.default_rng(1))
    assert len(wave) < len(out) <= len(wave) + 16000
    place = int(np.flatnonzero(out)[0])
    np.testing.assert_array_equal(out[place : place + len(wave)], wave)
    loud = Augmenter(AugmentConfig(speed=(1.0,), volume_prob=1.0, volume_db=(-6.0, -6.0)))
    np.testing.assert_allclose(loud(wave, np.random.default_rng(1)), wave * 10**-0.3, rtol=1e-5)


def test_room_impulse_responses_from_a_manifest(tmp_path):
    from lhotse import CutSet, Recording

    response = np.zeros(800, np.float32)
    response[100], response[500] = 1.0, 0.5
    soundfile.write(tmp_path / "room.wav", response, 16000, subtype="FLOAT")
    cut = Recording.from_file(tmp_path / "room.wav").to_cut()
    CutSet.from_cuts([cut]).to_file(tmp_path / "rooms.jsonl.gz")
    conf = AugmentConfig(speed=(1.0,), volume_prob=0.0, reverb_prob=1.0, rir=str(tmp_path / "rooms.jsonl.gz"))
    wave = tone(0.2, 300)
    expected = wave.copy()
    expected[400:] += 0.5 * wave[:-400]
    expected *= np.sqrt(np.mean(wave**2) / np.mean(expected**2))
    np.testing.assert_allclose(Augmenter(conf)(wave, np.random.default_rng(0)), expected, atol=1e-4)


def test_channels_are_averaged(tmp_path):
    from lhotse import Recording

    stereo = np.stack([tone(0.2, 300), tone(0.2, 500)], 1)
    soundfile.write(tmp_path / "two.wav", stereo, 16000, subtype="FLOAT")
    cut = Recording.from_file(tmp_path / "two.wav").to_cut()
    np.testing.assert_allclose(read_cut(cut, 16000), stereo.mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("noise_prob", 1.5), ("speed", ()), ("speed", (0.0,)), ("silence", -1.0)]
)
def test_impossible_augmentation_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        AugmentConfig(**{field: value})


# ---- SpecAugment --------------------------------------------------------------------------------------


def spans(row):
    """(start, length) of the runs of True in a boolean list."""
    out, place = [], 0
    for value, group in itertools.groupby(row):
        size = len(list(group))
        out += [(place, size)] if value else []
        place += size
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 3),
    st.integers(0, 20), st.integers(0, 3), st.integers(0, 20), st.floats(0, 1), st.integers(0, 1000),
)  # fmt: skip
def test_masks_have_the_counts_widths_and_places_asked_for(
    batch, frames, bins, stack, freq_masks, freq_width, time_masks, time_width, ratio, seed
):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, frames + 1, (batch,), generator=generator)
    feats = torch.rand(batch, frames, bins * stack, generator=generator) + 1
    conf = SpecAugmentConfig(freq_masks, freq_width, time_masks, time_width, ratio)
    out = spec_augment(feats, lengths, conf, torch.Generator().manual_seed(seed), stack)
    masked = out == 0
    assert torch.equal(out[~masked], feats[~masked])
    for b, length in enumerate(lengths.tolist()):
        assert not masked[b, length:].any()
        stretches = masked[b, :length].all(1)
        limit = min(time_width, int(length * torch.tensor(ratio)))
        assert int(stretches.sum()) <= limit * time_masks or masked[b, :length].any(0).all()
        inside = masked[b, :length][~stretches]
        if len(inside):
            assert (inside == inside[0]).all()
            bands = inside[0].reshape(stack, bins)
            assert (bands == bands[0]).all()
            assert int(bands[0].sum()) <= freq_masks * min(freq_width, bins)
            assert len(spans(bands[0].tolist())) <= freq_masks


def test_masks_differ_by_item_and_follow_the_generator():
    feats = torch.rand(8, 100, 80) + 1
    lengths = torch.full((8,), 100)
    conf = SpecAugmentConfig()
    outs = [spec_augment(feats, lengths, conf, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert len({(out == 0).numpy().tobytes() for out in outs[0]}) == 8


def test_widths_are_uniform_up_to_the_largest():
    feats = torch.ones(4000, 30, 20)
    lengths = torch.full((4000,), 30)
    conf = SpecAugmentConfig(1, 4, 0, 0)
    widths = (spec_augment(feats, lengths, conf, torch.Generator().manual_seed(0)) == 0)[:, 0].sum(1)
    counts = torch.bincount(widths, minlength=5)
    assert len(counts) == 5
    assert counts.min() > 700  # 800 expected of each of 0, 1, 2, 3, 4


def test_mean_fill():
    feats = torch.rand(2, 50, 10)
    lengths = torch.tensor([50, 20])
    conf = SpecAugmentConfig(2, 4, 2, 10, 0.5, fill="mean")
    out = spec_augment(feats, lengths, conf, torch.Generator().manual_seed(0))
    for b, length in enumerate((50, 20)):
        changed = out[b] != feats[b]
        assert changed.any()
        torch.testing.assert_close(out[b][changed], feats[b, :length].mean().expand(int(changed.sum())))


def test_a_stack_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of stack 7"):
        spec_augment(torch.zeros(1, 4, 80), torch.tensor([4]), SpecAugmentConfig(), stack=7)
