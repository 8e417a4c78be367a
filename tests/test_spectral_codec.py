"""Our own codec: streams equal whole signals, rows don't depend on their mates, folders keep weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.codec.folder import read_codec_folder, write_codec_folder
from nar_speech.codec.spectral import SpectralCodec, SpectralCodecConfig
from nar_speech.errors import AudioError, CheckpointError, ConfigError, InputError
from nar_speech.layers.discriminator import MultiResolutionDiscriminator
from nar_speech.losses import gan
from nar_speech.losses.spectral import mel_distance, mel_distances
from nar_speech.types import Codes, ModelCard

SMALL = {
    "hop": 80,
    "mels": 12,
    "width": 16,
    "encoder_blocks": 2,
    "decoder_blocks": 3,
    "num_codebooks": 3,
    "codebook_size": 32,
    "code_width": 8,
}
KINDS = {
    "default": {},
    "no look-ahead": {"lookahead": 0},
    "far look-ahead": {"lookahead": 3, "hop": 64},
    "fsq": {"quantizer": "fsq", "steps": [4, 3]},
    "no blocks": {"encoder_blocks": 0, "decoder_blocks": 0},
    "one spectrum a code": {"splits": 1, "overlap": 2},
    "many": {"hop": 96, "splits": 8, "overlap": 7},
}


def make_codec(kind="default"):
    torch.manual_seed(0)
    codec = SpectralCodec(SpectralCodecConfig(**{**SMALL, **KINDS[kind]})).train()
    for _ in range(3):
        codec(0.1 * torch.randn(2, 4 * codec.hop))
    return codec.eval()


CODECS = {kind: make_codec(kind) for kind in KINDS}


def noise(batch, samples, seed=0):
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@given(samples=st.integers(1, 4000), cuts=st.lists(st.integers(0, 1500), max_size=8), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_streams_equal_whole_signals(kind, samples, cuts, seed):
    codec = CODECS[kind]
    waves = noise(2, samples, seed)
    codes = codec.encode(waves)
    state, pieces, begin = codec.init_encoder(2), [], 0
    for size in [*cuts, samples]:
        end = min(samples, begin + size)
        tokens, state = codec.encode_step(waves[:, :, begin:end], state, final=end == samples)
        pieces.append(tokens)
        if end == samples:
            break
        begin = end
    assert torch.equal(torch.cat(pieces, 2), codes.tokens)

    whole = codec.decode_latents(codec.latents(codes.tokens))
    state, pieces, begin, frames = codec.init_decoder(2), [], 0, codes.tokens.shape[2]
    for size in [*(cut % 5 for cut in cuts), frames]:
        end = min(frames, begin + size)
        sound, state = codec.decode_step(codes.tokens[:, :, begin:end], state, final=end == frames)
        pieces.append(sound)
        if end == frames:
            break
        begin = end
    streamed = torch.cat(pieces, 2)
    assert streamed.shape == whole.shape == (2, 1, frames * codec.hop)
    torch.testing.assert_close(streamed, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@given(lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=4), levels=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_rows_do_not_depend_on_their_mates(kind, lengths, levels):
    codec = CODECS[kind]
    waves = noise(len(lengths), max(1, *lengths))
    codes = codec.encode(waves, torch.tensor(lengths), levels)
    sound, ends = codec.decode(codes)
    assert ends.tolist() == lengths
    for row, length in enumerate(lengths):
        alone = codec.encode(waves[row : row + 1, :, :length], None, levels)
        frames = int(codes.lengths[row])
        assert frames == -(-length // codec.hop) == alone.tokens.shape[2]
        assert torch.equal(codes.tokens[row, :, :frames], alone.tokens[0])
        single, _ = codec.decode(alone)
        peak = float(sound.abs().max()) if sound.numel() else 0.0
        torch.testing.assert_close(sound[row, :, :length], single[0], atol=1e-4 * peak, rtol=0)
        assert not sound[row, :, length:].any()


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_windows_that_are_added_up_are_the_signal(splits, frames):
    codec = SpectralCodec(SpectralCodecConfig(**{**SMALL, "splits": splits}))
    waves = noise(2, frames * 80)[:, 0]
    padded = torch.nn.functional.pad(waves, (codec.edge, codec.edge))
    windows = padded.unfold(1, len(codec.window), codec.stride) * codec.window**2
    silence = torch.zeros(2, 2 * codec.edge)
    joined = codec._overlap_add(windows, silence, silence)
    again = torch.cat([joined[0], joined[1] / joined[2].clamp_min(1e-9)], 1)
    again = again[:, codec.edge : codec.edge + frames * 80]
    torch.testing.assert_close(again, waves, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [{}, {"quantizer": "fsq", "steps": [9, 9], "num_codebooks": 8}])
def test_starts_with_the_spectrogram(kind):
    """Before any training the codes tell it, and the magnitudes follow it."""
    torch.manual_seed(0)
    sizes = {"mels": 32, "width": 32, "code_width": 16, "encoder_blocks": 0, "decoder_blocks": 0}
    codec = SpectralCodec(SpectralCodecConfig(**sizes, **kind)).eval()
    time = torch.arange(32000) / 16000
    waves = torch.stack([0.3 * torch.sin(2 * torch.pi * f * time) for f in (180.0, 310.0, 770.0, 1200.0)])
    waves = waves * torch.linspace(0.01, 1, 32000)
    before = codec(waves, quantize=False)
    codec.start_transform(waves)
    after = codec(waves, quantize=False)
    assert before.mel_error > 3
    assert after.mel_error < 0.3
    assert mel_distances(after.waves, waves, 16000)[1] < 0.7 * mel_distances(before.waves, waves, 16000)[1]
    codec.start_codebooks(waves)
    assert codec(waves).mel_error < 0.6


def test_a_stream_is_late_by_its_delay():
    codec = CODECS["default"]
    waves = noise(1, 40 * codec.hop)
    encoder, decoder, heard, given_out = codec.init_encoder(1), codec.init_decoder(1), 0, 0
    for begin in range(0, waves.shape[2], 100):
        tokens, encoder = codec.encode_step(waves[:, :, begin : begin + 100], encoder)
        sound, decoder = codec.decode_step(tokens, decoder)
        heard, given_out = begin + 100, given_out + sound.shape[2]
        assert heard - given_out < codec.delay + codec.hop + 100
    assert heard - given_out >= codec.delay


def test_training_output_is_what_decoding_gives():
    codec = make_codec()
    waves = noise(2, 6 * codec.hop)
    out = codec(waves[:, 0])
    codes = codec.encode(waves)
    assert torch.equal(codes.tokens, out.quantized.tokens)
    torch.testing.assert_close(codec.decode(codes)[0][:, 0], out.waves, atol=1e-5, rtol=1e-4)


def test_it_learns_to_reconstruct():
    torch.manual_seed(0)
    codec = SpectralCodec(SpectralCodecConfig(**{**SMALL, "codebook_size": 64})).train()
    time = torch.arange(8000) / 16000
    waves = torch.stack([0.3 * torch.sin(2 * torch.pi * f * time) for f in (220.0, 330.0, 550.0)])
    optimizer = torch.optim.Adam(codec.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        out = codec(waves)
        loss = mel_distance(out.waves, waves, 16000) + out.quantized.commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("store", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", ["default", "fsq"])
def test_folders(tmp_path, kind, store):
    codec, card = make_codec(kind), ModelCard("toy", "codec", "spectral")
    write_codec_folder(tmp_path, codec, card, store)
    again, read = read_codec_folder(tmp_path)
    assert read == card
    assert again.name == "toy"
    assert not again.training
    waves = noise(1, 3000)
    ours, theirs = codec.encode(waves), again.encode(waves)
    if store == "float32":
        assert torch.equal(ours.tokens, theirs.tokens)
    sound = codec.decode(ours)[0]
    torch.testing.assert_close(again.decode(ours)[0], sound, atol=0.03 * float(sound.abs().max()), rtol=0)


def test_folder_of_something_else(tmp_path):
    codec = make_codec()
    write_codec_folder(tmp_path, codec, ModelCard("toy", "codec", "spectral"))
    text = (tmp_path / "model.yaml").read_text()
    (tmp_path / "model.yaml").write_text(text.replace("\n  width: 16", "\n  width: 24"))
    with pytest.raises(CheckpointError, match="don't fit"):
        read_codec_folder(tmp_path)
    (tmp_path / "model.yaml").write_text(text.replace("task: codec", "task: generate"))
    with pytest.raises(ConfigError, match="codec"):
        read_codec_folder(tmp_path)


def test_wrong_input_is_refused():
    codec = CODECS["default"]
    with pytest.raises(AudioError, match="channels"):
        codec.encode(torch.zeros(1, 2, 500))
    with pytest.raises(ConfigError, match="codebooks"):
        codec.encode(torch.zeros(1, 1, 500), None, 4)
    for tokens in (torch.full((1, 3, 2), 32), torch.full((1, 3, 2), -1), torch.zeros(1, 4, 2).long()):
        with pytest.raises(InputError):
            codec.decode(Codes(tokens, torch.tensor([2]), 16000))
        with pytest.raises(InputError):
            codec.decode_step(tokens, codec.init_decoder(1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"hop": 81},
        {"hop": 82},
        {"lookahead": -1},
        {"quantizer": "fsq"},
        {"steps": [3]},
        {"width": 0},
        {"code_width": 999},
        {"overlap": 1},
        {"mels": 0},
    ],
)
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)) if "quantizer" not in wrong else "steps"):
        SpectralCodecConfig(**wrong)


def test_distances_are_zero_for_equal_spectra_and_see_level():
    waves = noise(2, 4000)[:, 0]
    assert float(mel_distance(waves, waves, 16000)) == 0.0
    assert float(mel_distance(-waves, waves, 16000)) < 1e-6
    torch.testing.assert_close(mel_distance(waves / 10, waves, 16000), torch.tensor(1.0), atol=0.01, rtol=0)
    assert mel_distances(waves / 10, waves, 16000)[1].item() == pytest.approx(1 - 10**-0.4, abs=0.01)
    assert mel_distances(waves, waves, 16000)[1] == 0.0


def test_what_a_distance_asks_for():
    """An error in silence is as bad as one in sound for the logarithm alone."""
    loud = torch.cat([noise(1, 8000)[:, 0], torch.zeros(1, 8000)], 1)
    wrong = loud + torch.cat([torch.zeros(1, 8000), 1e-3 * noise(1, 8000, 1)[:, 0]], 1)
    quiet, heard = mel_distances(wrong, loud, 16000)
    halved = loud * torch.cat([torch.full((8000,), 0.5), torch.ones(8000)])
    less_quiet, more_heard = mel_distances(halved, loud, 16000)
    assert less_quiet < quiet
    assert more_heard > 2 * heard


def test_adversarial_losses_by_hand():
    real, fake = [torch.tensor([2.0, 0.5])], [torch.tensor([-2.0, 0.0])]
    torch.testing.assert_close(gan.discriminator_loss(real, fake), torch.tensor(0.25 + 0.5))
    torch.testing.assert_close(gan.generator_loss(fake), torch.tensor(2.0))
    torch.testing.assert_close(
        gan.discriminator_loss(real, fake, "least_squares"), torch.tensor((1 + 0.25) / 2 + 4 / 2)
    )
    torch.testing.assert_close(gan.generator_loss(fake, "least_squares"), torch.tensor((9 + 1) / 2))
    maps = [[torch.tensor([1.0, 3.0])]], [[torch.tensor([2.0, 2.0])]]
    torch.testing.assert_close(gan.feature_loss(*maps), torch.tensor(0.5))


def test_discriminators_tell_noise_from_tones():
    torch.manual_seed(0)
    model = MultiResolutionDiscriminator([256, 512], channels=4, layers=3)
    time = torch.arange(4000) / 16000
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(25):
        tones = 0.3 * torch.sin(2 * torch.pi * (200.0 + 40 * step) * time).expand(2, -1)
        real, maps = model(tones)
        fake, _ = model(noise(2, 4000, step)[:, 0])
        loss = gan.discriminator_loss(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [score.shape[0] for score in real] == [2, 2]
    assert [len(part) for part in maps] == [3, 3]
    assert loss.item() < 0.5
