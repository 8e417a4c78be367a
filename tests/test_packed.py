"""Packed Linear layers: the same numbers, what is left alone, the fused ReLU."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nar_speech.errors import InputError
from nar_speech.layers.packed import (
    PackedLinear,
    WindowProduct,
    keep_plain,
    linear_gelu,
    linear_relu,
    merge_linears,
    pack_linear_layers,
)
from nar_speech.layers.quantize import Int8Linear, quantize_dynamic_int8
from nar_speech.layers.sanm import SANMDecoder, SANMDecoderConfig, SANMEncoder, SANMEncoderConfig
from nar_speech.layers.whisper import WhisperEncoder, WhisperEncoderConfig

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 300), inputs=st.integers(1, 70), outputs=st.integers(1, 70), bias=st.booleans())
def test_equals_the_plain_layer(rows, inputs, outputs, bias):
    torch.manual_seed(rows)
    linear = nn.Linear(inputs, outputs, bias).requires_grad_(False).eval()
    x = torch.randn(2, rows, inputs)
    packed = PackedLinear(linear)
    torch.testing.assert_close(packed(x), linear(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed(x[0, 0]), linear(x[0, 0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear_relu(packed, x), linear(x).relu(), atol=1e-5, rtol=1e-5)
    gelu = nn.functional.gelu(linear(x))
    torch.testing.assert_close(linear_gelu(packed, x), gelu, atol=1e-5, rtol=1e-5)
    assert torch.equal(linear_gelu(linear, x), gelu)


def test_views_and_empty_inputs():
    linear = nn.Linear(16, 24).requires_grad_(False)
    x = torch.randn(3, 16, 5).transpose(1, 2)
    packed = PackedLinear(linear)
    torch.testing.assert_close(packed(x), linear(x))
    torch.testing.assert_close(packed(x[:, ::2]), linear(x[:, ::2]))
    assert packed(x[:0]).shape == (0, 5, 24)


def test_bfloat16_stays_bfloat16():
    linear = nn.Linear(64, 32).requires_grad_(False).bfloat16()
    x = torch.randn(10, 64).bfloat16()
    got = PackedLinear(linear)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, linear(x), atol=2e-2, rtol=2e-2)


def test_packs_all_linear_layers_and_copies():
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2))).eval()
    plain = copy.deepcopy(net)
    assert pack_linear_layers(net) is net
    assert [type(m) for m in (net[0], net[2][0])] == [PackedLinear] * 2
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(x))
        assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert isinstance(pack_linear_layers(nn.Linear(4, 2).eval()), PackedLinear)


def test_leaves_alone_what_must_stay_plain():
    class Special(nn.Linear):
        pass

    table = nn.Linear(8, 32)
    keep_plain(table)
    others = [Special(8, 32), table, nn.Linear(8, 32).double(), nn.Linear(8, 32, device="meta")]
    net = nn.ModuleList([*others, nn.Linear(8, 32)])
    assert pack_linear_layers(net.train()) is net
    assert list(net)[4].__class__ is nn.Linear
    pack_linear_layers(net.eval())
    assert list(net)[:4] == others
    assert isinstance(net[4], PackedLinear)
    net = quantize_dynamic_int8(nn.ModuleList([Special(8, 32), table, nn.Linear(8, 32)]).eval())
    assert [type(m) for m in net] == [Special, nn.Linear, Int8Linear]


def test_a_packed_module_can_not_be_moved_or_quantised():
    net = pack_linear_layers(nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32)).eval())
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(net.to("cpu", torch.float32)(x), net(x))
    with pytest.raises(InputError, match=r"laid out for torch.float32 on the CPU .* torch.bfloat16"):
        net.to(torch.bfloat16)
    with pytest.raises(InputError, match="used in another dtype before; load it again"):
        quantize_dynamic_int8(net)


def test_linear_relu_of_a_plain_layer_has_the_right_gradients():
    linear = nn.Linear(5, 7).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return linear_relu(lambda x: nn.functional.linear(x, weight, bias), x)

    assert torch.autograd.gradcheck(function, (x, *linear.parameters()))


def test_merged_layers_give_the_parts_side_by_side():
    parts = [nn.Linear(8, 4), nn.Linear(8, 3, bias=False), nn.Linear(8, 5)]
    x = torch.randn(2, 6, 8)
    merged = merge_linears(parts)
    want = torch.cat([part(x) for part in parts], dim=-1)
    torch.testing.assert_close(merged(x), want)
    assert (merged.in_features, merged.out_features) == (8, 12)
    assert not any(p.requires_grad for p in merged.parameters())


@settings(deadline=None, max_examples=20)
@given(
    frames=st.integers(3, 30),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    batch=st.integers(1, 3),
)
def test_a_convolution_as_a_product_of_windows(frames, kernel, stride, padding, batch):
    frames = max(frames, kernel)
    conv = nn.Conv1d(5, 6, kernel, stride, padding).requires_grad_(False)
    x = torch.randn(batch, 5, frames).transpose(1, 2)
    want = nn.functional.gelu(conv(x.transpose(1, 2))).transpose(1, 2)
    torch.testing.assert_close(WindowProduct(conv)(x, linear_gelu), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(61, 61), (61, 40)])
def test_a_packed_whisper_encoder_gives_the_same(lengths):
    torch.manual_seed(0)
    config = WhisperEncoderConfig(32, 2, 64, 2, 50, branch_blocks=1, branch_stride=2)
    plain = WhisperEncoder(10, config).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, lengths = torch.randn(2, 61, 10), torch.tensor(lengths)
    with torch.inference_mode():
        packed = pack_linear_layers(copy.deepcopy(plain))
        assert {type(b.attn.merged) for b in (*packed.blocks, *packed.branch.blocks)} == {PackedLinear}
        torch.testing.assert_close(packed(x, lengths)[0], plain(x, lengths)[0], atol=1e-5, rtol=1e-5)
        assert isinstance(packed.conv1.linear, PackedLinear)
        small = quantize_dynamic_int8(copy.deepcopy(plain))
        assert type(small.conv1.linear) is nn.Linear
        assert isinstance(small.conv2.linear, Int8Linear)
        assert isinstance(small.blocks[0].attn.merged, Int8Linear)
        error = (small(x, lengths)[0] - plain(x, lengths)[0]).norm() / plain(x, lengths)[0].norm()
        assert 0 < error < 0.05
    assert plain.blocks[0].attn.merged is None


@pytest.mark.parametrize("lengths", [(9, 9), (9, 6)])
def test_packed_san_m_layers_give_the_same(lengths):
    torch.manual_seed(0)
    encoder = SANMEncoder(20, SANMEncoderConfig(32, 4, 48, 3, kernel_size=5))
    config = SANMDecoderConfig(4, 48, 2, 2, kernel_size=5)
    plain = nn.ModuleList([encoder, SANMDecoder(32, 40, config)]).eval()
    x, tokens, lengths = torch.randn(2, 9, 20), torch.randn(2, 4, 32), torch.tensor(lengths)

    def run(net):
        encoded, _ = net[0](x, lengths)
        return encoded, net[1](tokens, torch.tensor([4, 3]), encoded, lengths)

    with torch.inference_mode():
        packed = run(pack_linear_layers(copy.deepcopy(plain)))
        coarse = run(quantize_dynamic_int8(copy.deepcopy(plain)))
        for got, small, want in zip(packed, coarse, run(plain), strict=True):
            for row, size in enumerate(lengths if want.shape[1] == 9 else (4, 3)):
                torch.testing.assert_close(got[row, :size], want[row, :size], atol=1e-5, rtol=1e-5)
                error = (small - want)[row, :size].norm() / want[row, :size].norm()
                assert 0 < error < 0.1
