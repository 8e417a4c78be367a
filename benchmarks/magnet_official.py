"""What audiocraft computes for MAGNeT and MusicGen, plainly, as the benchmark's baseline.

Written from the description of the algorithms, on the weights of our networks before they are laid out: every
step runs the conditional and the unconditional half through all layers, attends to an additive mask of
(2B, heads, T, T) that every layer copies, computes keys and values of the text anew, all heads, and draws
tokens for all positions. Attention is PyTorch's (audiocraft needs xformers, which computes the same).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.layers.multistream import MultiStreamNetwork
from nar_speech.models.magnet import Magnet
from nar_speech.models.musicgen import MusicGen


def _cross(block, x: Tensor, text: Tensor, heads: int) -> Tensor:
    query, key, value = block.cross_attention.in_proj_weight.chunk(3)
    parts = (F.linear(x, query), F.linear(text, key), F.linear(text, value))
    parts = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
    out = F.scaled_dot_product_attention(*parts)
    return block.cross_attention.out_proj(out.transpose(1, 2).flatten(2))


def _embed(network: MultiStreamNetwork, tokens: Tensor, start: int = 0) -> Tensor:
    x = sum(table(tokens[:, k]) for k, table in enumerate(network.emb))
    return x + network.position(start, tokens.shape[2]).to(x.dtype)


def magnet_forward(network: Magnet, tokens: Tensor, text: Tensor, stage: int) -> Tensor:
    """Logits (2B, K, T, V) of (2B, K, T) tokens and projected text (2B, L, D)."""
    heads, context, frames = network.config.heads, network.config.context, tokens.shape[2]
    mask = None
    if stage > 0 and context >= 0:
        padded = math.ceil(frames / 8) * 8
        place = torch.arange(padded)
        mask = torch.zeros(padded, padded).masked_fill_(
            (place[:, None] - place).abs() > context, float("-inf")
        )
        mask = mask.to(text.dtype).expand(len(tokens), heads, -1, -1).contiguous()
    x = _embed(network, tokens)
    for block in network.blocks:
        parts = (
            F.linear(block.norm1(x), block.self_attn.in_proj_weight).unflatten(-1, (3, heads, -1)).unbind(2)
        )
        bias = None if mask is None else mask.clone()[:, :, :frames, :frames]
        out = F.scaled_dot_product_attention(*(p.transpose(1, 2) for p in parts), attn_mask=bias)
        x = x + block.self_attn.out_proj(out.transpose(1, 2).flatten(2))
        x = x + _cross(block, block.norm_cross(x), text, heads)
        x = x + block.linear2(F.gelu(block.linear1(block.norm2(x))))
    x = network.out_norm(x)
    return torch.stack([linear(x) for linear in network.linears], dim=1)


def magnet_step(
    network: Magnet, tokens: Tensor, text: Tensor, stage: int, guidance: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """One step of a stage for tokens (B, K, T): drawn tokens (B, T) and their chunk scores (B, T / 3)."""
    logits = magnet_forward(network, tokens.repeat(2, 1, 1), text, stage)[:, stage].float()
    conditional, null = logits.chunk(2)
    logits = null + (conditional - null) * guidance
    probabilities = (logits / max(temperature, 0.01)).softmax(-1)
    ordered, places = probabilities.sort(dim=-1, descending=True)
    ordered = ordered * (ordered.cumsum(-1) - ordered <= 0.9)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    drawn = ordered.flatten(0, 1).multinomial(1).view(*ordered.shape[:2], 1)
    drawn = places.gather(-1, drawn)
    chosen = probabilities.gather(-1, drawn)[..., 0]
    span = network.config.span_len
    cut = chosen.shape[1] // span * span
    return drawn[..., 0], 1 - chosen[:, :cut].unflatten(1, (-1, span)).amax(-1)


def musicgen_step(
    network: MusicGen, tokens: Tensor, text: Tensor, cache: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits (2B, K, V) after one more position (2B, K, 1); keys and values are joined to the cache."""
    heads, new = network.config.heads, []
    start = cache[0][0].shape[2] if cache else 0
    x = _embed(network, tokens, start)
    for number, block in enumerate(network.blocks):
        parts = (
            F.linear(block.norm1(x), block.self_attn.in_proj_weight).unflatten(-1, (3, heads, -1)).unbind(2)
        )
        query, key, value = (p.transpose(1, 2) for p in parts)
        if cache:
            key, value = (
                torch.cat([old, part], 2) for old, part in zip(cache[number], (key, value), strict=True)
            )
        new.append((key, value))
        out = F.scaled_dot_product_attention(query, key, value)
        x = x + block.self_attn.out_proj(out.transpose(1, 2).flatten(2))
        x = x + _cross(block, block.norm_cross(x), text, heads)
        x = x + block.linear2(F.gelu(block.linear1(block.norm2(x))))
    x = network.out_norm(x)
    return torch.stack([linear(x[:, -1]) for linear in network.linears], dim=1), new
