"""Codecs: rows of a batch, official names and shapes at full size, and input that is wrong."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.checkpoint import compare_shapes
from nar_speech.codec import CODECS, dac, encodec, mimi, rows
from nar_speech.codec.dac import DacCodec
from nar_speech.codec.encodec import EncodecCodec
from nar_speech.codec.mimi import MimiCodec
from nar_speech.codec.vocos import BackboneConfig, CodesConfig, Vocos, VocosConfig
from nar_speech.codec.vocos_heads import HeadConfig
from nar_speech.errors import AudioError, ConfigError, InputError
from tests.codec_models import BUILDERS, CHUNKED, ENCODEC, codec, vocos, waves

FULL = json.loads((Path(__file__).parent / "golden" / "codec" / "full_size.json").read_text())


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 260), min_size=1, max_size=4))
def test_a_row_gives_what_it_gives_alone(name, lengths):
    made = codec(name)
    sound = waves(made, len(lengths), max(lengths), seed=sum(lengths))
    codes = made.encode(sound, torch.tensor(lengths))
    wave, ends = made.decode(codes)
    for row, length in enumerate(lengths):
        alone = made.encode(sound[row : row + 1, :, :length])
        frames = int(codes.lengths[row])
        assert torch.equal(codes.tokens[row, :, :frames], alone.tokens[0])
        assert frames == int(alone.lengths[0]) == made.frames_of(length)
        single, end = made.decode(alone)
        assert int(ends[row]) == int(end[0]) <= length
        torch.testing.assert_close(wave[row, :, : ends[row]], single[0, :, : end[0]], atol=1e-5, rtol=1e-4)
        assert not wave[row, :, ends[row] :].any()


PADDED = [
    n for n in BUILDERS if not any(word in n for word in ("chunks", "renormalised", "norm over", "spec"))
]


@pytest.mark.parametrize("name", PADDED)
def test_rows_of_several_lengths_run_at_once_and_as_if_alone(name, monkeypatch):
    made, draw = codec(name), torch.Generator().manual_seed(0)
    monkeypatch.setattr(rows, "LEAST_FILLED_CPU", 0.01)
    for longest in (3, 2 * made.hop, 400):
        lengths = torch.randint(1, longest, (4,), generator=draw)
        lengths[1] = longest
        sound = waves(made, 4, longest, seed=longest)
        assert [length for length, _ in made._groups(lengths, made.sample_rate)] == [None]
        codes = made.encode(sound, lengths, 2)
        wave, ends = made.decode(codes)
        for row, length in enumerate(lengths.tolist()):
            alone = made.encode(sound[row : row + 1, :, :length], None, 2)
            frames, end = int(codes.lengths[row]), int(ends[row])
            assert torch.equal(codes.tokens[row, :, :frames], alone.tokens[0])
            assert not codes.tokens[row, :, frames:].any()
            single = made.decode(alone)[0][0]
            assert single.shape[1] == end
            torch.testing.assert_close(wave[row, :, :end], single, atol=1e-5, rtol=1e-4)
            assert not wave[row, :, end:].any()


def test_only_rows_of_similar_lengths_are_padded():
    made = codec("mimi")
    lengths = torch.tensor([100, 50, 95, 0, 50, 30])
    assert list(made._groups(lengths, made.sample_rate)) == [
        (None, [0, 2]),
        (50, [1, 4]),
        (30, [5]),
        (0, [3]),
    ]
    hour = torch.tensor([3600, 3590]) * made.sample_rate
    assert list(made._groups(hour, made.sample_rate)) == [(int(n), [row]) for row, n in enumerate(hour)]


@pytest.mark.parametrize("name", BUILDERS)
def test_what_lies_behind_a_row_is_not_looked_at(name):
    made = codec(name)
    sound = waves(made, 2, 200)
    lengths = torch.tensor([200, 90])
    codes = made.encode(sound, lengths)
    frames = int(codes.lengths[1])
    for what in (7.0, math.nan):
        sound[1, :, 90:] = what
        again = made.encode(sound, lengths)
        assert torch.equal(again.tokens[1, :, :frames], codes.tokens[1, :, :frames])
    tokens = codes.tokens.clone()
    tokens[1, :, frames:] = -1
    again = made.decode(dataclasses.replace(codes, tokens=tokens))[0]
    torch.testing.assert_close(again, made.decode(codes)[0])


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_becomes_nothing_and_a_row_of_nothing_harms_no_other(name):
    made = codec(name)
    sound = waves(made, 2, 40)
    codes = made.encode(sound[:, :, :0])
    assert codes.tokens.shape == (2, made.num_codebooks, 0)
    wave, ends = made.decode(codes)
    assert (wave.shape, ends.tolist()) == ((2, made.channels, 0), [0, 0])
    codes = made.encode(sound, torch.tensor([0, 40]))
    alone = made.encode(sound[1:])
    assert codes.lengths.tolist() == [0, alone.tokens.shape[2]]
    torch.testing.assert_close(made.decode(codes)[0][1:], made.decode(alone)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_samples_of_any_float_type(name):
    made = codec(name)
    sound = waves(made, 1, 60).half()
    assert torch.equal(made.encode(sound).tokens, made.encode(sound.double()).tokens)


@pytest.mark.parametrize("name", BUILDERS)
def test_wrong_steps_of_a_stream_are_one_clear_line(name):
    made = codec(name)
    sound = waves(made, 2, 40)
    encoder, decoder = made.init_encoder(2), made.init_decoder(2)
    tokens = torch.zeros(3, made.num_codebooks, 2, dtype=torch.int64)
    for call, error in (
        (lambda: made.encode_step(torch.cat([sound, sound], 1), encoder), AudioError),
        (lambda: made.encode_step(sound * math.nan, encoder), AudioError),
        (lambda: made.encode_step(sound[:1], encoder), InputError),
        (lambda: made.decode_step(tokens, decoder), InputError),
        (lambda: made.init_encoder(1, made.num_codebooks + 1), ConfigError),
    ):
        with pytest.raises(error) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert made.name in str(caught.value)
    if made.has_scales:
        for scales in (torch.ones(3, 1), torch.ones(2), torch.ones(2, 1) * math.nan, None):
            with pytest.raises(InputError, match="scales"):
                made.give_scales(decoder, scales)


@pytest.mark.parametrize("name", BUILDERS)
def test_fewer_codebooks_are_the_first_ones(name):
    made = codec(name)
    sound = waves(made, 1, 150)
    whole = made.encode(sound).tokens
    assert torch.equal(made.encode(sound, num_codebooks=2).tokens, whole[:, :2])


@pytest.mark.parametrize("name", [n for n in BUILDERS if "chunks" not in n and "renormalised" not in n])
def test_latents_are_what_the_decoder_reads(name):
    made = codec(name)
    codes = dataclasses.replace(made.encode(waves(made, 1, 150)), samples=None)
    direct = made.decode_latents(made.latents(codes.tokens))
    torch.testing.assert_close(made.decode(codes)[0], direct)


@pytest.mark.parametrize("name", BUILDERS)
def test_wrong_input_is_one_clear_line(name):
    made = codec(name)
    sound = waves(made, 2, 100)
    codes = made.encode(sound)
    for bad, error in (
        (sound[0], AudioError),
        (sound[:, :, None], AudioError),
        (sound.long(), AudioError),
        (torch.cat([sound, sound, sound], 1), AudioError),
        (sound * math.nan, AudioError),
        (sound[:0], AudioError),
        (None, AudioError),
    ):
        with pytest.raises(error) as caught:
            made.encode(bad)
        assert "\n" not in str(caught.value)
        assert made.name in str(caught.value)
    for lengths in (torch.tensor([100]), torch.tensor([101, 5]), torch.tensor([-1, 5]), torch.ones(2)):
        with pytest.raises(InputError, match="lengths"):
            made.encode(sound, lengths)
    for count in (0, -1, made.num_codebooks + 1, True, 1.0):
        with pytest.raises(ConfigError, match="codebooks: got"):
            made.encode(sound, num_codebooks=count)
    tokens = codes.tokens
    for bad in (tokens + made.codebook_size, -1 - tokens, tokens.float(), tokens[0], tokens.repeat(1, 9, 1)):
        with pytest.raises(InputError, match=made.name):
            made.decode(dataclasses.replace(codes, tokens=bad))
        with pytest.raises(InputError, match=made.name):
            made.decode_step(bad, made.init_decoder(2))
    with pytest.raises(InputError, match="decode with the codec that made them"):
        made.decode(dataclasses.replace(codes, sample_rate=1234, codec="other"))


def test_every_kind_is_listed():
    assert set(CODECS) == {"encodec", "dac", "mimi", "spectral", "maskgct"}
    assert {type(codec(name)) for name in BUILDERS} == set(CODECS.values())


def test_bandwidths():
    made = codec("encodec causal reflect")
    each = 4 * math.ceil(2000 / 12) / 1000
    assert [made.codebooks_for(each * n) for n in (0.2, 1, 1.9, 2.01, 3.01)] == [1, 1, 1, 2, 3]
    for wrong in (0.0, -1.0, math.inf, 100.0):
        with pytest.raises(ConfigError, match="bandwidth"):
            made.codebooks_for(wrong)


def test_chunks_that_the_end_cuts_short_have_all_frames():
    """A length where transformers fails: the chunk before the last is short too."""
    made = EncodecCodec({**CHUNKED, "chunk_length_s": 0.06, "overlap": 0.1})
    assert (made.chunk, made.stride, made.chunk_frames) == (120, 108, 10)
    length = 108 * 2 + 105  # the third chunk has 105 samples, nine frames; a fourth none
    assert made.frames_of(length) == 2 * 10 + 9
    length = 108 * 2 + 109  # now the third chunk has 109, ten frames, and the fourth one sample
    assert made.frames_of(length) == 3 * 10 + 1
    sound = waves(made, 1, length)
    codes = made.encode(sound)
    assert codes.tokens.shape[2] == made.frames_of(length)
    assert made.decode(codes)[0].shape[2] == length


def test_mimi_forgets_its_vectors_when_the_sums_change():
    made = MimiCodec(BUILDERS["mimi"]().config)
    torch.manual_seed(0)
    tokens = torch.zeros(1, 3, 2, dtype=torch.int64)
    before = made.latents(tokens)
    state = made.state_dict()
    for name, tensor in state.items():
        if name.endswith("embed_sum"):
            state[name] = torch.randn_like(tensor)
    made.load_state_dict(state)
    after = made.latents(tokens)
    assert not torch.equal(before, after)
    assert made.double().latents(tokens).dtype == torch.float64
    with pytest.raises(ConfigError, match="codebooks: got 1"):
        MimiCodec({**made.config.to_dict(), "num_semantic_quantizers": 2}).check_codebooks(1)


def test_impossible_configurations_are_named():
    for make in (
        lambda: EncodecCodec({**ENCODEC, "codebook_size": 15}),
        lambda: EncodecCodec({**ENCODEC, "norm_type": "none"}),
        lambda: EncodecCodec({**ENCODEC, "upsampling_ratios": "x"}),
        lambda: DacCodec({"n_codebooks": 2, "codebook_size": 15}),
        lambda: MimiCodec({"num_quantizers": 1}),
    ):
        with pytest.raises(ConfigError, match="impossible configuration"):
            make()
    seanet = {"dimension": 8, "n_filters": 2, "ratios": [2, 2]}
    for wrong in ({"activation": "ReLU"}, {"norm": "spectral_norm"}, {"activation_params": {"alpha": 2.0}}):
        with pytest.raises(ConfigError, match="not supported"):
            encodec.audiocraft_config({**seanet, **wrong}, 16000, 1, 4, 16, False)
    with pytest.raises(ConfigError, match="'ratios' is missing"):
        encodec.audiocraft_config({"dimension": 8, "n_filters": 2}, 16000, 1, 4, 16, False)
    with pytest.raises(ConfigError, match="'decoder_dim' is missing"):
        dac.official_config({"encoder_dim": 4, "encoder_rates": [2]})


SEANET = {
    "dimension": 128,
    "n_filters": 64,
    "n_residual_layers": 1,
    "ratios": [8, 5, 4, 4],
    "lstm": 2,
    "true_skip": True,
    "pad_mode": "constant",
}
DAC44 = {
    "encoder_dim": 64,
    "encoder_rates": [2, 4, 8, 8],
    "decoder_dim": 1536,
    "decoder_rates": [8, 8, 4, 2],
    "n_codebooks": 9,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "sample_rate": 44100,
}
DAC24 = {**DAC44, "encoder_rates": [2, 4, 5, 8], "decoder_rates": [8, 5, 4, 2], "n_codebooks": 32}
HF32 = {
    "sampling_rate": 32000,
    "num_filters": 64,
    "upsampling_ratios": [8, 5, 4, 4],
    "codebook_size": 2048,
    "codebook_dim": 128,
    "target_bandwidths": [2.2],
    "use_causal_conv": False,
    "use_conv_shortcut": False,
}


def audiocraft(sample_rate, count, bins, **changes):
    config, lstm = encodec.audiocraft_config({**SEANET, **changes}, sample_rate, 1, count, bins, False)
    return EncodecCodec(config, lstm)


FULL_SIZE = {
    "audiocraft encodec_32khz": lambda: audiocraft(32000, 4, 2048),
    "audiocraft encodec_16khz": lambda: audiocraft(16000, 4, 2048, ratios=[8, 5, 4, 2]),
    "audiocraft encodec_24khz": lambda: audiocraft(
        24000, 32, 1024, ratios=[8, 5, 4, 2], n_filters=32, causal=True
    ),
    "transformers EncodecModel facebook/encodec_32khz": lambda: EncodecCodec(HF32),
    "transformers EncodecModel facebook/encodec_24khz": lambda: EncodecCodec(encodec.PACKAGE_MODELS[1]),
    "transformers EncodecModel facebook/encodec_48khz": lambda: EncodecCodec(encodec.PACKAGE_MODELS[2]),
    "encodec package 24khz": lambda: EncodecCodec(encodec.PACKAGE_MODELS[1]),
    "encodec package 48khz": lambda: EncodecCodec(encodec.PACKAGE_MODELS[2]),
    "descript-audio-codec weights_44khz": lambda: DacCodec(dac.official_config(DAC44)),
    "descript-audio-codec weights_24khz": lambda: DacCodec(
        dac.official_config({**DAC24, "sample_rate": 24000})
    ),
    "descript-audio-codec weights_16khz": lambda: DacCodec(
        dac.official_config({**DAC24, "n_codebooks": 12, "sample_rate": 16000})
    ),
    "transformers DacModel dac_44khz": lambda: DacCodec(dac.official_config(DAC44)),
    "transformers DacModel dac_24khz": lambda: DacCodec(dac.official_config({**DAC24, "sample_rate": 24000})),
    "transformers DacModel dac_16khz": lambda: DacCodec(
        dac.official_config({**DAC24, "n_codebooks": 12, "sample_rate": 16000})
    ),
    "transformers MimiModel kyutai/mimi": lambda: MimiCodec({}),
}


@pytest.mark.parametrize("title", FULL)
def test_full_size_names_and_shapes(title):
    entry = FULL[title]
    if title.startswith("vocos"):
        with torch.device("meta"):
            made = full_vocos(title)
        own = {n: tuple(t.shape) for n, t in made.state_dict().items() if not n.startswith("feature_")}
        assert {name: tuple(shape) for name, shape in entry["tensors"].items()} == own
        assert (
            sum(p.numel() for n, p in made.named_parameters() if not n.startswith("feature_"))
            == entry["n_params"]
        )
        return
    build = next(make for name, make in FULL_SIZE.items() if title.startswith(name))
    with torch.device("meta"):
        made = build()
        tensors = {name: torch.empty(shape) for name, shape in entry["tensors"].items()}
        if isinstance(made, EncodecCodec):
            tensors = encodec.rename(tensors, title)
        elif isinstance(made, DacCodec):
            tensors = dac.rename(tensors, made.blocks, title)
        else:
            tensors = mimi.rename(tensors)
    assert compare_shapes(made.model, {name: tuple(t.shape) for name, t in tensors.items()}) == []


def full_vocos(title):
    if "mel" in title:
        head = HeadConfig("istft", 512, 1024, 256, padding="center")
        return Vocos(VocosConfig(BackboneConfig(100, 512, 1536, 8), head))
    head = HeadConfig("istft", 384, 1280, 320, padding="same")
    backbone = BackboneConfig(128, 384, 1152, 8, adanorm_num_embeddings=4)
    return Vocos(VocosConfig(backbone, head, codes=CodesConfig()))


def test_old_names_of_mimi():
    new = FULL["transformers MimiModel kyutai/mimi (transformers 5.23.0 naming)"]["tensors"]
    old = {}
    for name in new:
        for before, after in mimi.OLD_PARTS.items():
            if name.startswith(after):
                old[before + name.removeprefix(after)] = name
    assert len(old) > 100
    assert all(mimi.rename_official(name) == want for name, want in old.items())
    assert all(mimi.rename_official(name) == name for name in new)


def test_vocos_refuses_what_it_cannot_use():
    plain, conditioned = vocos("istft"), vocos("istft", bandwidths=3)
    features = torch.zeros(2, 5, 4)
    for model, bandwidth in ((plain, 0), (conditioned, None), (conditioned, 3), (conditioned, -1)):
        with pytest.raises(InputError, match="bandwidth"):
            model(features, bandwidth=bandwidth)
    with pytest.raises(InputError, match="features of shape"):
        plain(features[:, :4])
    with pytest.raises(InputError, match="brings no features"):
        plain.features(torch.zeros(1, 100))
    codes = Vocos(
        VocosConfig(
            BackboneConfig(4, 6, 8, 1),
            HeadConfig("istft", 6, 8, 4),
            codes=CodesConfig(num_q=2, bins=8, dimension=4),
        )
    )
    torch.nn.init.normal_(codes.feature_extractor.codebook_weights)
    table = codes.feature_extractor.codebook_weights
    got = codes.features(torch.tensor([[[1, 7], [0, 3]]]))
    torch.testing.assert_close(got[0].T, table[[1, 7]] + table[[8, 11]])
    for wrong in (torch.full((1, 2, 3), 8), torch.full((1, 3, 3), 0), torch.full((1, 1, 1), -1)):
        with pytest.raises(InputError, match="tokens of"):
            codes.features(wrong)
