"""Attention with bfloat16 products: closeness, masks, blocks, and when it is left alone."""

import pytest
import torch
import torch.nn.functional as F

from nar_speech.layers import dot_product
from nar_speech.layers.dot_product import allow_coarse, dot_product_attention
from nar_speech.layers.sanm import CrossAttention, SANMAttention
from nar_speech.layers.whisper import WhisperAttention


@pytest.fixture(autouse=True)
def processor_with_bfloat16(monkeypatch):
    monkeypatch.setattr(dot_product, "_has_products", lambda device: device == "cpu")


def example(queries=17, keys=23):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, size, 8) for size in (queries, keys, keys))
    mask = torch.arange(keys)[None, None, None] < torch.tensor([keys, keys - 9])[:, None, None, None]
    return query, key, value, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1 << 20, 1])
def test_close_to_float32_with_and_without_blocks(monkeypatch, masked, block):
    monkeypatch.setattr(dot_product, "BLOCK_SCORES", block)
    query, key, value, mask = example(queries=70)
    mask = mask if masked else None
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with torch.inference_mode():
        got = dot_product_attention(query, key, value, mask, coarse=True)
    assert got.dtype == torch.float32
    assert 0 < (got - want).norm() / want.norm() < 0.01


def test_what_is_masked_does_not_matter():
    query, key, value, mask = example()
    with torch.inference_mode():
        before = dot_product_attention(query, key, value, mask, coarse=True)
        key[1, :, -9:], value[1, :, -9:] = 100.0, 100.0
        assert torch.equal(dot_product_attention(query, key, value, mask, coarse=True), before)


def test_float32_stays_exact_unless_asked():
    query, key, value, mask = example()
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with torch.inference_mode():
        assert torch.equal(dot_product_attention(query, key, value, mask), want)
    assert torch.equal(dot_product_attention(query, key, value, mask, coarse=True), want)  # with gradients


def test_bfloat16_models_use_it():
    tensors = [tensor.bfloat16() for tensor in example()[:3]]
    want = F.scaled_dot_product_attention(*(tensor.float() for tensor in tensors))
    with torch.inference_mode():
        got = dot_product_attention(*tensors)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.01


def test_layers_that_may():
    layers = torch.nn.ModuleList([SANMAttention(8, 8, 2, 3), CrossAttention(8, 2), WhisperAttention(8, 2)])
    assert not any(layer.coarse for layer in layers)
    allow_coarse(layers)
    assert all(layer.coarse for layer in layers)
