"""MaskGCT's codecs: official names, shapes and folders, quantizer, rows of several lengths, wrong input.

What holds for every codec (streams, batches, errors) is in test_codecs.py and test_codec_stream.py.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nar_speech import cli, inspection
from nar_speech.checkpoint import SkipInit, compare_shapes, save_safetensors
from nar_speech.codec.fvq import FvqConfig, ResidualFactorizedQuantizer
from nar_speech.codec.load import fingerprint, load_codec
from nar_speech.codec.maskgct import (
    DecoderConfig,
    EncoderConfig,
    MaskGCTCodec,
    MaskGCTCodecConfig,
    load_official,
)
from nar_speech.codec.repcodec import RepCodec, RepCodecConfig
from nar_speech.codec.weight_norm import NormedConv1d, NormedConvTranspose1d, fold
from nar_speech.errors import CheckpointError, ConfigError, HubError, InputError
from tests.codec_models import codec, maskgct, waves

GOLDEN = Path(__file__).parent / "golden" / "maskgct"
FULL = json.loads((GOLDEN / "state_dict_codecs.json").read_text())
SEMANTIC = RepCodecConfig(
    codebook_size=32,
    hidden_size=6,
    codebook_dim=4,
    vocos_dim=8,
    vocos_intermediate_dim=12,
    vocos_num_layers=2,
)
FEW = settings(max_examples=15, deadline=None)


def semantic(**changes):
    """A small semantic codec with weights that hide no wrong use."""
    torch.manual_seed(3)
    made = RepCodec(replace(SEMANTIC, **changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval().requires_grad_(False)


def features(batch, frames, seed=0):
    """Noise (B, T, H)."""
    return torch.randn(batch, frames, SEMANTIC.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder of MaskGCT with small codecs, strides and rate as released, and the acoustic one."""
    torch.manual_seed(1)
    encoder = EncoderConfig(d_model=2, out_channels=6)
    decoder = DecoderConfig(6, 3, 16, 4, vocos_dim=8, vocos_intermediate_dim=12, vocos_num_layers=2)
    made = MaskGCTCodec(MaskGCTCodecConfig(encoder, decoder))
    folder = tmp_path_factory.mktemp("hub") / "MaskGCT"
    for part in ("acoustic_codec", "semantic_codec", "t2s_model"):
        (folder / part).mkdir(parents=True)
    save_safetensors(folder / "acoustic_codec" / "model.safetensors", made.encoder)
    save_safetensors(folder / "acoustic_codec" / "model_1.safetensors", made.decoder)
    save_safetensors(folder / "semantic_codec" / "model.safetensors", semantic())
    return folder, made.eval().requires_grad_(False)


# ---- official files -------------------------------------------------------------------------------------


def test_full_size_names_and_shapes():
    with torch.device("meta"), SkipInit():
        acoustic, meaning = MaskGCTCodec(), RepCodec()
    for module, file in (
        (acoustic.encoder, "acoustic_codec/model.safetensors"),
        (acoustic.decoder, "acoustic_codec/model_1.safetensors"),
        (meaning, "semantic_codec/model.safetensors"),
    ):
        assert compare_shapes(module, {name: tuple(shape) for name, shape in FULL[file].items()}) == []
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (acoustic, meaning)]
    assert sizes == pytest.approx([42.54 + 128.20, 44.29], abs=0.02)
    assert (acoustic.hop, acoustic.frame_rate, acoustic.num_codebooks) == (480, 50, 12)
    assert acoustic.delay == acoustic.encoder_delay + 93 * 480 + 720  # three frames a layer, half an overlap


def test_an_official_folder_is_a_codec(official):
    folder, made = official
    sound = waves(made, 2, 2000)
    want = made.encode(sound, torch.tensor([2000, 1500]))
    for path, name in ((folder, "MaskGCT"), (folder / "acoustic_codec", "maskgct")):
        loaded = load_codec(path)
        assert (loaded.name, loaded.sample_rate, loaded.hop, loaded.training) == (name, 24000, 480, False)
        assert not any("weight_v" in part for part in loaded.state_dict())  # weight norm is folded
        got = loaded.encode(sound, torch.tensor([2000, 1500]))
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(loaded.decode(got)[0], made.decode(want)[0])
    assert len(fingerprint(loaded)) == 16


def test_the_convolutional_decoder_has_the_same_folder(tmp_path):
    torch.manual_seed(2)
    made = maskgct((3, 4), use_vocos=False, up_ratios=(4, 3), upsample_initial_channel=8)
    save_safetensors(tmp_path / "model.safetensors", made.encoder)
    save_safetensors(tmp_path / "model_1.safetensors", made.decoder)
    loaded = load_official(tmp_path)
    got, want = loaded.config.decoder, made.config.decoder
    for name in ("use_vocos", "up_ratios", "upsample_initial_channel", "in_channels", "num_quantizers"):
        assert getattr(got, name) == getattr(want, name)
    sound = waves(made, 1, 100)
    torch.testing.assert_close(loaded.decode(loaded.encode(sound))[0], made.decode(made.encode(sound))[0])


def test_the_command_line_knows_it(official, tmp_path, capsys):
    folder, _ = official
    (tmp_path / "a.wav").write_bytes(tone())
    tokens, again = tmp_path / "a.safetensors", tmp_path / "b.wav"
    place = str(folder / "acoustic_codec")
    assert cli.main(["codec", "encode", str(tmp_path / "a.wav"), "-o", str(tokens), "--codec", place]) == 0
    assert cli.main(["codec", "decode", str(tokens), "-o", str(again), "--codec", place]) == 0
    assert again.stat().st_size == pytest.approx(24000 * 0.5 * 2, rel=0.01)
    capsys.readouterr()
    for path in (place, str(folder)):
        assert cli.main(["models", "info", path]) == 0
        info = json.loads(capsys.readouterr().out)
        assert (info["kind"], info["frame_rate"], info["codebooks"]) == ("maskgct", 50, 3)
        checks = inspection.verify(path)
        assert [check.passed for check in checks] == [True] * 4, checks
        assert "(codec)" in checks[0].detail


def tone():
    """Half a second of a WAV file."""
    import io

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, torch.sin(torch.arange(8000) * 0.3).numpy() * 0.3, 16000, format="WAV")
    return buffer.getvalue()


def test_only_the_codec_is_downloaded(official, tmp_path, monkeypatch):
    folder, _ = official
    asked = []

    def download(repository, **options):
        asked.append((repository, options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for name in ("maskgct", "amphion/MaskGCT", "amphion/MaskGCT@main", "some/model"):
        assert load_codec(name).hop == 480
    assert asked == [("amphion/MaskGCT", ["acoustic_codec/*"])] * 3 + [("some/model", None)]


def put(part, name, tensor):
    """A function that writes the file ``part`` of a folder again with another tensor; None: without it."""

    def write(folder):
        tensors = load_file(folder / part)
        tensors.pop(name)
        save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / part)

    return write


def copied(source, target):
    """A function that puts one file of a folder in the place of another."""
    return lambda folder: (folder / target).write_bytes((folder / source).read_bytes())


ENCODER, DECODER = "model.safetensors", "model_1.safetensors"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / DECODER).unlink(), "model.safetensors without its config.json"),
        (lambda folder: (folder / ENCODER).unlink(), "model.safetensors: no such weights file"),
        (copied(DECODER, ENCODER), "block.0.weight_v is missing; not the weights of the acoustic encoder"),
        (copied(ENCODER, DECODER), "codebook.weight is missing; not the weights of the acoustic decoder"),
        (put(DECODER, "model.head.out.bias", None), "1 missing: model.head.out.bias"),
        (put(DECODER, "model.head.out.bias", torch.full((1922,), math.inf)), "NaN or infinite values"),
        (put(ENCODER, "block.0.weight_v", torch.ones(2, 7)), "expected 3 dimensions"),
        (put(DECODER, "model.backbone.embed.weight", torch.ones(8, 5, 7)), "decoder.in_channels 5"),
    ],
)
def test_official_files_that_are_wrong(official, tmp_path, spoil, words):
    folder = tmp_path / "acoustic_codec"
    folder.mkdir()
    for name in (ENCODER, DECODER):
        (folder / name).write_bytes((official[0] / "acoustic_codec" / name).read_bytes())
    spoil(folder)
    with pytest.raises((CheckpointError, ConfigError, HubError), match=words) as caught:
        load_codec(folder)
    assert "\n" not in str(caught.value)


def test_the_semantic_codec_of_a_folder(official):
    folder, _ = official
    want = semantic().encode(features(2, 9))
    for path in (folder, folder / "semantic_codec", folder / "semantic_codec" / "model.safetensors"):
        loaded = RepCodec.from_official(path)
        assert loaded.config == SEMANTIC
        assert torch.equal(loaded.encode(features(2, 9)), want)
    with pytest.raises(CheckpointError, match="not the weights of the semantic codec"):
        RepCodec.from_official(folder / "acoustic_codec")
    with pytest.raises(CheckpointError, match="no such weights file"):
        RepCodec.from_official(folder / "t2s_model")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EncoderConfig(up_ratios=()), "up_ratios"),
        (lambda: EncoderConfig(up_ratios=(3, 0)), "up_ratios"),
        (lambda: EncoderConfig(d_model=0), "d_model"),
        (lambda: EncoderConfig(d_model=90_000), "too wide for 4 blocks"),
        (lambda: DecoderConfig(n_fft=100), "hop_length 480 must not be above n_fft 100"),
        (lambda: DecoderConfig(use_vocos=False, upsample_initial_channel=15), "upsample_initial_channel"),
        (lambda: DecoderConfig(codebook_size=0), "codebook_size"),
        (lambda: DecoderConfig(quantizer_dropout=1.5), "quantizer_dropout"),
        (lambda: MaskGCTCodecConfig(EncoderConfig(out_channels=8)), "must equal decoder.in_channels 256"),
        (lambda: MaskGCTCodecConfig(EncoderConfig(up_ratios=(3, 4))), "frames of 12 samples in the encoder"),
        (lambda: RepCodecConfig(vocos_num_layers=0), "num_layers"),
        (lambda: RepCodecConfig(num_quantizers=0), "num_quantizers"),
    ],
)
def test_impossible_configurations(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# ---- acoustic codec -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [(3, 4, 5, 8), (2, 3), (5,), (3, 3)])
def test_frames_of_a_recording_as_in_the_official_code(ratios):
    made = maskgct(ratios, False, hop_size=math.prod(ratios), n_fft=math.prod(ratios) * 2).eval()
    for samples in range(1, 3 * made.hop + 3, max(made.hop // 40, 1)):
        codes = made.encode(waves(made, 1, samples))
        frames = made.frames_of(samples)
        assert codes.tokens.shape[2] == frames
        assert samples // made.hop <= frames <= -(-samples // made.hop)
        if frames:
            assert made.encoder(waves(made, 1, samples)).shape[2] == frames


def test_a_padded_tail_loses_nothing():
    made = codec("maskgct")
    codes = made.encode(waves(made, 1, 5 * made.hop + 1))
    assert codes.tokens.shape[2] == 6
    assert made.decode(codes)[0].shape[2] == 5 * made.hop + 1


def test_a_copy_streams_its_own_layers():
    made = codec("maskgct")
    twin = copy.deepcopy(made).double()
    tokens = made.encode(waves(made, 1, 100)).tokens
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.7)
    sound, _ = twin.decode_step(tokens, twin.init_decoder(1), True)
    torch.testing.assert_close(sound, twin.decode_latents(twin.latents(tokens)))
    assert not torch.allclose(sound.float(), made.decode_latents(made.latents(tokens)), atol=1e-4)


# ---- weight norm and quantizer --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NormedConv1d, NormedConvTranspose1d])
def test_weight_norm_folds(kind):
    torch.manual_seed(0)
    layer = kind(3, 4, 5, stride=2)
    assert list(layer.state_dict()) == ["bias", "weight_g", "weight_v"]
    old = torch.nn.utils.parametrizations.weight_norm(getattr(torch.nn, kind.__name__[6:])(3, 4, 5, stride=2))
    with torch.no_grad():
        layer.weight_g.mul_(torch.rand_like(layer.weight_g) + 0.5)
        old.load_state_dict(layer.state_dict())  # torch reads the old names
    x = torch.randn(2, 3, 20)
    want = layer(x)
    torch.testing.assert_close(old(x), want)
    want.sum().backward()
    assert layer.weight_g.grad is not None
    assert layer.weight_v.grad is not None
    layer.requires_grad_(False)
    fold(layer)
    fold(layer)
    assert list(layer.state_dict()) == ["bias", "weight"]
    assert not layer.weight.requires_grad
    torch.testing.assert_close(layer(x), want)
    with pytest.raises(AttributeError, match="no attribute 'weigth'"):
        _ = layer.weigth


def quantizer(**changes):
    torch.manual_seed(4)
    return ResidualFactorizedQuantizer(FvqConfig(**{**FVQ, **changes}))


FVQ = {"input_dim": 6, "num_quantizers": 4, "codebook_size": 16, "codebook_dim": 3}


def test_codes_go_by_direction_and_vectors_keep_their_length():
    made = quantizer(num_quantizers=1, input_dim=3)  # no projections
    x = torch.randn(2, 3, 7)
    tokens, total = made.encode(x)
    table = made.quantizers[0].codebook.weight
    cosine = torch.einsum("bdt,kd->btk", x, torch.nn.functional.normalize(table, dim=1))
    assert torch.equal(tokens[:, 0], cosine.argmax(2))
    torch.testing.assert_close(total.transpose(1, 2), table[tokens[:, 0]])
    by_distance = quantizer(num_quantizers=1, input_dim=3, use_l2_normlize=False)
    tokens, _ = by_distance.encode(x)
    nearest = torch.cdist(x.transpose(1, 2), by_distance.quantizers[0].codebook.weight).argmin(2)
    assert torch.equal(tokens[:, 0], nearest)


def test_levels_that_an_item_does_not_use():
    made, x = quantizer(), torch.randn(3, 6, 5)
    levels = torch.tensor([1, 2, 4])
    output, whole = made(x, levels), made(x)
    assert torch.equal(output.tokens, whole.tokens)  # later levels see the same rest
    for item, count in enumerate(levels.tolist()):
        torch.testing.assert_close(output.latents[item : item + 1], made.encode(x[item : item + 1], count)[1])
    assert (output.codebook[1:] < whole.codebook[1:]).all()
    torch.testing.assert_close(output.codebook[0], whole.codebook[0])
    alone = made(x[2:])
    torch.testing.assert_close(output.commitment[3], alone.commitment[3] / 3)  # one of three items counts
    torch.testing.assert_close(output.loss, (output.commitment + output.codebook).mean())


def test_draws_of_levels():
    made = quantizer()
    drawn = made.draw_levels(7, torch.Generator().manual_seed(0))
    want = torch.randint(1, 5, (7,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:3], want[:3])  # the first half, rounded down
    assert (drawn[3:] == 4).all()
    many = torch.cat([made.draw_levels(2) for _ in range(200)])[::2]
    assert set(many.tolist()) == {1, 2, 3, 4}
    assert (quantizer(quantizer_dropout=0.0).draw_levels(50) == 4).all()


def test_gradients_go_straight_through_and_to_the_codebook():
    made, x = quantizer(num_quantizers=1), torch.randn(2, 6, 5, requires_grad=True)
    output = made(x)
    level = made.quantizers[0]
    output.latents.sum().backward(retain_graph=True)
    assert x.grad.abs().sum() > 0
    assert level.codebook.weight.grad is None  # the codebook learns from its own term alone
    x.grad = None
    output.codebook.sum().backward(retain_graph=True)
    assert x.grad is None
    used = output.tokens.unique()
    moved = level.codebook.weight.grad.abs().sum(1) > 0
    assert torch.equal(moved.nonzero()[:, 0], used)
    level.codebook.weight.grad = None
    output.commitment.sum().backward()
    assert x.grad.abs().sum() > 0
    assert level.codebook.weight.grad is None


def test_frames_behind_the_end_count_in_no_term():
    made, x = quantizer(), torch.randn(2, 6, 9)
    present = torch.arange(9) < torch.tensor([[9], [4]])
    output = made(x, present=present)
    terms = [made(x[:1]), made(x[1:, :, :4])]
    for name in ("commitment", "codebook"):
        mean = sum(getattr(part, name) for part in terms) / 2
        torch.testing.assert_close(getattr(output, name), mean)


# ---- semantic codec -------------------------------------------------------------------------------------


@FEW
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    codebooks=st.integers(1, 3),
    behind=st.sampled_from([0.0, 5.0, math.nan]),
)
def test_a_row_gives_what_it_gives_alone(lengths, codebooks, behind):
    made = semantic(num_quantizers=codebooks)
    size = torch.tensor(lengths)
    present = torch.arange(max(lengths)) < size[:, None]
    x = features(len(lengths), max(lengths), sum(lengths)).masked_fill(~present[:, :, None], behind)
    tokens = made.encode(x, size)
    back = made.decode(tokens, size)
    assert tokens.shape == (len(lengths), codebooks, max(lengths))
    assert not tokens.masked_select(~present[:, None]).any()
    assert not back.masked_select(~present[:, :, None]).any()
    for row, length in enumerate(lengths):
        alone = made.encode(x[row : row + 1, :length])
        assert torch.equal(tokens[row : row + 1, :, :length], alone)
        torch.testing.assert_close(back[row : row + 1, :length], made.decode(alone), atol=1e-5, rtol=1e-4)


def test_training_terms_of_several_lengths_are_those_of_the_rows():
    made = semantic()
    x, lengths = features(2, 12), torch.tensor([12, 5])
    output = made(x, lengths)
    alone = [made(x[:1]), made(x[1:, :5])]
    torch.testing.assert_close(output.quantized.loss, sum(part.quantized.loss for part in alone) / 2)
    torch.testing.assert_close(output.features[1:, :5], alone[1].features, atol=1e-5, rtol=1e-4)


def test_a_few_steps_of_training_help():
    made = RepCodec(SEMANTIC).train()
    optimiser = torch.optim.Adam(made.parameters(), 3e-3)
    x, losses = features(4, 20), []
    for _ in range(60):
        output = made(x)
        loss = (output.features - x).abs().mean() + output.quantized.loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float((output.features - x).detach().abs().mean()))
    assert losses[-1] < 0.9 * losses[0]


def test_wrong_input_is_one_clear_line():
    made = semantic()
    x = features(2, 8)
    tokens = made.encode(x)
    assert torch.equal(made.encode(x.double()), tokens)
    nan = x.clone()
    nan[1, 3, 2] = math.nan
    for call, words in (
        (lambda: made.encode(x[0]), "features of shape"),
        (lambda: made.encode(x[:, :0]), "features of shape"),
        (lambda: made.encode(x[:, :, :5]), "at least one frame"),
        (lambda: made.encode(None), "expected float"),
        (lambda: made.decode(None), "expected integers"),
        (lambda: made.encode(x.long()), "expected float"),
        (lambda: made.encode(nan), "NaN or infinite"),
        (lambda: made.encode(x, torch.tensor([8])), "lengths"),
        (lambda: made.encode(x, torch.tensor([9, 8])), "1 to 8"),
        (lambda: made.encode(x, torch.tensor([0, 8])), "1 to 8"),
        (lambda: made.encode(x, torch.tensor([1.0, 8.0])), "whole numbers"),
        (lambda: made.decode(tokens[:, 0]), "tokens of shape"),
        (lambda: made.decode(tokens.float()), "expected integers"),
        (lambda: made.decode(tokens[:, :, :0]), "tokens of shape"),
        (lambda: made.decode(tokens.repeat(1, 2, 1)), "1 to 1 codebooks"),
        (lambda: made.decode(tokens + 32), "is not in 0 to 31"),
        (lambda: made.decode(tokens - 32), "is not in 0 to 31"),
        (lambda: made.decode(tokens, torch.tensor([9, 1])), "1 to 8"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert str(caught.value).startswith("semantic codec: ")
        assert "\n" not in str(caught.value)
