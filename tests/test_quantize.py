"""int8 Linear layers: closeness, independence of batch mates, what is left alone, refusals."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nar_speech.errors import InputError
from nar_speech.layers.quantize import Int8Linear, int8_available, quantize_dynamic_int8

pytestmark = pytest.mark.skipif(not int8_available(), reason="PyTorch has no int8 kernels for this CPU")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(40, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 32, bias=False), nn.Linear(32, 1)
    return nn.Sequential(*layers).eval()


def reference(linear: nn.Linear, x: torch.Tensor, levels: int) -> torch.Tensor:
    """The documented arithmetic with plain integers."""
    scale = linear.weight.abs().amax(1) / 127
    weight = (linear.weight / scale[:, None]).round().to(torch.int64)
    peak = x.abs().amax(1, keepdim=True).clamp_min(1e-12)
    integers = (x / peak * levels).round().to(torch.int64)
    return (integers @ weight.T) * scale * peak / levels + linear.bias


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 9), inputs=st.integers(1, 70), outputs=st.integers(16, 70), seed=st.integers(0, 99)
)
def test_equals_the_same_arithmetic_with_plain_integers(rows, inputs, outputs, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    x = torch.randn(rows, inputs) * torch.rand(rows, 1) * 10
    quantised = Int8Linear(linear)
    want = reference(linear, x, quantised.levels)
    # x / peak * levels may round to either side of a tie: one step of one input
    step = (linear.weight.abs().amax() * x.abs().amax() / quantised.levels).item()
    assert (quantised(x) - want).abs().max() <= step + 1e-5


def test_stays_close_to_float():
    torch.manual_seed(0)
    linear = nn.Linear(256, 128).requires_grad_(False)
    x = torch.randn(50, 256)
    error = (Int8Linear(linear)(x) - linear(x)).norm() / linear(x).norm()
    assert 0 < error < (0.02 if Int8Linear(linear).levels == 127 else 0.03)


def test_extreme_values_do_not_saturate():
    linear = nn.Linear(64, 16, bias=False).requires_grad_(False)
    linear.weight.fill_(1.0)
    got = Int8Linear(linear)(torch.stack([torch.full((64,), 3.0), torch.full((64,), -3.0), torch.zeros(64)]))
    torch.testing.assert_close(got, torch.tensor([[192.0], [-192.0], [0.0]]).expand(3, 16), rtol=1e-5, atol=0)


def test_result_does_not_depend_on_batch_mates():
    torch.manual_seed(0)
    net = quantize_dynamic_int8(network())[:4]
    x = torch.randn(3, 7, 40)
    alone = net(x[1:2])
    x[0] *= 1000
    assert torch.equal(net(x)[1:2], alone)


def test_replaces_wide_linear_layers_only():
    net = network()
    got = quantize_dynamic_int8(net)
    assert got is net
    assert [type(m) for m in net] == [Int8Linear, nn.ReLU, nn.LayerNorm, Int8Linear, nn.Linear]
    single = quantize_dynamic_int8(nn.Linear(4, 16).eval())
    assert isinstance(single, Int8Linear)


def test_shapes_dtypes_and_copies():
    net = quantize_dynamic_int8(network())
    assert net(torch.randn(0, 40)).shape == (0, 1)
    assert net(torch.randn(40)).shape == (1,)
    layer = net[0]
    assert layer(torch.randn(2, 3, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x = torch.randn(2, 5, 40)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    half = quantize_dynamic_int8(network().bfloat16())
    assert (half(x) - net(x)).abs().max() < 0.1


def test_refuses_training_mode_and_other_devices():
    with pytest.raises(InputError, match=r"inference only; call eval\(\)"):
        quantize_dynamic_int8(network().train())
    with pytest.raises(InputError, match="runs on the CPU only, the model is on 'meta'"):
        quantize_dynamic_int8(network().to("meta"))
    with pytest.raises(InputError, match="got input on 'meta'"):
        Int8Linear(nn.Linear(4, 16))(torch.zeros(1, 4, device="meta"))
