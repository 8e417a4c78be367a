"""WeNet's conformer encoder: lengths, masks, padding, configuration errors. Numbers: recorded cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError
from nar_speech.layers.conformer import ConformerEncoder, ConformerEncoderConfig, chunk_from_draw, chunk_mask
from nar_speech.layers.encoder import ENCODERS, build_encoder
from nar_speech.layers.intermediate import Tap
from nar_speech.layers.position import interleaved_sinusoid
from nar_speech.layers.subsampling import CONVOLUTIONS, Conv2dSubsampling

SMALL = {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2, "cnn_module_kernel": 5}


def make_encoder(input_size=23, **conf):
    """A small encoder in eval mode, norms and statistics not trivial."""
    torch.manual_seed(0)
    encoder = ConformerEncoder(input_size, ConformerEncoderConfig(**{**SMALL, **conf}))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        for name, buffer in encoder.named_buffers():
            if name.endswith(("running_var", "istd")):
                buffer.copy_(0.5 + torch.rand_like(buffer))
            elif name.endswith(("running_mean", "cmvn.mean")):
                buffer.copy_(torch.randn_like(buffer))
    return encoder.eval()


VARIANTS = {
    "causal_layer_norm": {"causal": True, "cnn_module_norm": "layer_norm", "cnn_module_kernel": 8},
    "centred_batch_norm": {"causal": False, "global_cmvn": True},
    "conv2d6": {"input_layer": "conv2d6", "causal": True},
    "conv2d8": {"input_layer": "conv2d8"},
    "linear": {"input_layer": "linear"},
    "absolute": {"pos_enc_layer_type": "abs_pos", "selfattention_layer_type": "selfattn"},
    "no_positions": {"pos_enc_layer_type": "no_pos", "selfattention_layer_type": "selfattn"},
    "post_norm": {"normalize_before": False, "macaron_style": False},
    "no_convolution": {"use_cnn_module": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_batch_equals_single_and_padding_does_not_matter(variant):
    encoder = make_encoder(**VARIANTS[variant])
    lengths = torch.tensor([71, 40, 5, 16, 15])
    x = torch.randn(5, 71, 23)
    noisy = torch.where((torch.arange(71) < lengths[:, None])[:, :, None], x, 100 * torch.randn_like(x))
    for options in ({}, {"chunk_size": 3, "left_chunks": 1}, {"chunk_size": 4, "left_chunks": 0}):
        together, out_lengths = encoder(noisy, lengths, **options)
        for row, frames in enumerate(lengths.tolist()):
            alone, one = encoder(x[row : row + 1, :frames], lengths[row : row + 1], **options)
            assert alone.shape[1] == one.item() == out_lengths[row]
            assert torch.allclose(together[row, : one.item()], alone[0], atol=1e-5)
            assert (together[row, one.item() :] == 0).all()


def test_official_padding_leaks_and_ours_does_not():
    encoder = make_encoder(causal=False)
    x, lengths = torch.randn(2, 60, 23), torch.tensor([60, 41])
    with torch.no_grad():
        alone, size = encoder(x[1:, :41], lengths[1:])
        leaky, _ = encoder(x, lengths, official_padding=True)
    assert not torch.allclose(leaky[1, : size.item()], alone[0], atol=1e-4)


@given(st.sampled_from(sorted(CONVOLUTIONS)), st.lists(st.integers(0, 60), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_subsampled_lengths_are_those_of_the_convolutions(kind, lengths):
    layer = Conv2dSubsampling(23, 4, kind)
    lengths = torch.tensor(lengths)
    x = torch.randn(len(lengths), int(lengths.max()), 23)
    out, out_lengths = layer(x, lengths)
    assert out.shape == (len(lengths), int(out_lengths.max()), 4)
    for frames, size in zip(lengths.tolist(), out_lengths.tolist(), strict=True):
        if frames < layer.receptive_field:
            assert size == 0
        else:
            assert size == layer.conv(torch.zeros(1, 1, frames, 23)).shape[2]


@pytest.mark.parametrize("frames", range(1, 9))
def test_a_short_input_gives_no_frames(frames):
    encoder = make_encoder()
    y, lengths = encoder(torch.randn(2, frames, 23), torch.tensor([frames, 1]))
    assert y.shape == (2, int(frames >= 7), 16)
    assert lengths.tolist() == [int(frames >= 7), 0]
    assert torch.isfinite(y).all()


@given(st.integers(1, 20), st.integers(1, 7), st.integers(-1, 4))
@settings(deadline=None)
def test_chunk_mask(frames, chunk, left):
    mask = chunk_mask(frames, chunk, left, torch.device("cpu"))
    for i in range(frames):
        first = 0 if left < 0 else max(0, (i // chunk - left) * chunk)
        seen = range(first, min(frames, (i // chunk + 1) * chunk))
        assert mask[i].nonzero().flatten().tolist() == list(seen)


def test_a_chunk_does_not_see_later_ones():
    encoder = make_encoder(causal=True)
    x, lengths = torch.randn(1, 83, 23), torch.tensor([83])
    changed = x.clone()
    changed[:, 47:] = torch.randn_like(changed[:, 47:])  # frames 0 .. 10 see inputs 0 .. 46
    with torch.no_grad():
        a, b = encoder(x, lengths, chunk_size=3)[0], encoder(changed, lengths, chunk_size=3)[0]
        full = encoder(changed, lengths)[0] - encoder(x, lengths)[0]
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-6)
    assert (a[:, 12:] - b[:, 12:]).abs().max() > 1e-3
    assert full[:, :9].abs().max() > 1e-3


def test_chunk_sizes_of_dynamic_training():
    assert chunk_from_draw(16, 31) == 31
    assert chunk_from_draw(15, 31) == 16
    assert chunk_from_draw(25, 60) == 1
    encoder = make_encoder(
        causal=True,
        cnn_module_norm="layer_norm",
        use_dynamic_chunk=True,
        use_dynamic_left_chunk=True,
        dropout_rate=0.0,
        positional_dropout_rate=0.0,
    )
    x, lengths = torch.randn(1, 203, 23), torch.tensor([203])
    full = encoder(x, lengths)[0]
    assert torch.equal(full, encoder(x, lengths, chunk_size=-1)[0])  # eval: full context
    encoder.train()
    torch.manual_seed(1)
    outputs = [encoder(x, lengths)[0] for _ in range(8)]
    whole = [torch.allclose(y, full, atol=1e-5) for y in outputs]
    assert any(whole)
    assert not all(whole)
    assert encoder(x[:, :7], torch.tensor([7]))[0].shape[1] == 1  # one frame: nothing to draw


def test_static_chunks_are_the_default_of_their_encoder():
    encoder = make_encoder(causal=True, static_chunk_size=4)
    x, lengths = torch.randn(1, 63, 23), torch.tensor([63])
    assert torch.equal(encoder(x, lengths)[0], encoder(x, lengths, chunk_size=4)[0])
    assert not torch.allclose(encoder(x, lengths)[0], encoder(x, lengths, chunk_size=0)[0], atol=1e-4)


def test_positions_have_no_longest_length():
    code = interleaved_sinusoid(6000, 8, torch.device("cpu"))
    late = interleaved_sinusoid(10, 8, torch.device("cpu"), offset=5990)
    assert torch.equal(code[5990:], late)
    assert code[1, 0].item() == pytest.approx(0.841471, abs=1e-6)
    assert code[0].tolist() == [0.0, 1.0] * 4


def test_training_mode_gives_gradients_to_every_parameter():
    encoder = make_encoder(global_cmvn=True).train()
    encoder(torch.randn(2, 50, 23), torch.tensor([50, 33]))[0].square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"cnn_module_kernel": 4}, "cnn_module_kernel: 4 is even"),
        ({"attention_heads": 3}, "attention_heads: 3 does not divide"),
        ({"input_layer": "conv2d3"}, "input_layer: got 'conv2d3'"),
        ({"pos_enc_layer_type": "abs_pos"}, "selfattn"),
        ({"output_sise": 8}, "unknown key 'output_sise'"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(conf, message):
    with pytest.raises(ConfigError, match=message):
        build_encoder("conformer", 23, {**SMALL, **conf})


def test_too_few_features():
    with pytest.raises(ConfigError, match="input_size: 6"):
        build_encoder("conformer", 6, SMALL)


CONFS = {
    "conformer": SMALL,
    "fastconformer": {"d_model": 16, "n_heads": 2, "n_layers": 2, "subsampling_conv_channels": 8},
    "sanm": {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2},
    "whisper": {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2},
}


@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_every_encoder_keeps_the_contract(kind):
    encoder = build_encoder(kind, 24, CONFS[kind]).eval()
    x, lengths = torch.randn(2, 40, 24), torch.tensor([40, 29])
    seen = []

    def observe(h, normed):
        seen.append((h, normed))
        return h + 1.0

    with torch.no_grad():
        y, out_lengths = encoder(x, lengths)
        tapped, _ = encoder(x, lengths, tap=Tap((1, 2), observe))
    assert y.shape == (2, int(out_lengths[0]), encoder.output_size)
    assert abs(out_lengths[0] - 40 / encoder.frame_stride) <= 2
    assert [h.shape for h, _ in seen] == [y.shape] * 2
    assert all(normed.mean(-1).abs().max() < 1e-5 for _, normed in seen)
    assert not torch.allclose(tapped, y)


def test_unknown_encoder():
    with pytest.raises(ConfigError, match="unknown kind 'lstm'"):
        build_encoder("lstm", 24, {})
