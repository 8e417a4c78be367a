"""What the official MaskGCT computes, plainly, as the benchmark's baseline and a check of our results.

Written from the description of the algorithm, on the weights of our networks before they are laid out:
float32, attention by two products and an additive (B, 1, L, L) mask, the pass with prompt and the one without
one after the other; embedded steps, gains, phones and conditions anew in every pass; everything computed for
all positions, and a transfer to the host in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nar_speech.layers.diffllama import DiffLlama, rotary, step_embedding
from nar_speech.models.maskgct import S2A, T2S

Uniform = Callable[..., Tensor]  # (*shape) -> uniform numbers


def _norm(norm, x: Tensor, step: Tensor) -> Tensor:
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return norm.to_weight(step)[:, None] * scaled


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _attention(part, x: Tensor, mask: Tensor) -> Tensor:
    linears = part.q_proj, part.k_proj, part.v_proj
    query, key, value = (linear(x).unflatten(-1, (part.heads, -1)).transpose(1, 2) for linear in linears)
    size = query.shape[-1]
    cos, sin = rotary(torch.arange(x.shape[1], device=x.device), size)
    cos, sin = (torch.cat([t, t], -1)[None, :, 0, 0] for t in (cos, sin))
    query, key = _turn(query, cos, sin), _turn(key, cos, sin)
    weights = (query @ key.transpose(2, 3) / math.sqrt(size) + mask).softmax(-1)
    return part.o_proj((weights @ value).transpose(1, 2).flatten(2))


def transformer(
    core: DiffLlama,
    x: Tensor,
    time: float,
    before: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """(B, L, D) to (B, L, D).

    Args:
        time: diffusion step of all rows.
        before: (B, Lp, D) embedded phones, put before ``x``.
        added: (B, L, D) condition that is added to ``x``.
    """
    length = x.shape[1]
    if before is not None:
        x = torch.cat([core.cond_mlp(before), x], 1)
    if added is not None:
        x = x + core.cond_mlp(added)
    step = core.diff_step_mlp(step_embedding(torch.full((len(x),), time, device=x.device), core.config.width))
    seen = torch.ones(len(x), x.shape[1], device=x.device)
    mask = (1 - seen[:, None, None].expand(-1, 1, x.shape[1], -1)) * torch.finfo(x.dtype).min
    for layer in core.layers:
        x = x + _attention(layer.self_attn, _norm(layer.input_layernorm, x, step), mask)
        inner = _norm(layer.post_attention_layernorm, x, step)
        mlp = layer.mlp
        x = x + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner))
    return _norm(core.norm, x, step)[:, -length:]


def guide(plain: Tensor, bare: Tensor, cfg: float, rescale: float) -> Tensor:
    """Guided embeddings, brought back to the deviation of the plain ones for a part."""
    guided = plain + cfg * (plain - bare)
    return rescale * (guided * plain.std() / guided.std()) + (1 - rescale) * guided


def t2s_logits(
    network: T2S, phones: Tensor, prompt: Tensor, cfg: float, rescale: float
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Logits (B, T, V) as a function of codes (B, T), of where they are masked, and of the time."""

    def logits(seq: Tensor, mask: Tensor, time: float) -> Tensor:
        core = network.diff_estimator
        current = torch.where(mask[..., None], network.mask_emb.weight[0], network.cond_emb(seq))
        x = torch.cat([network.cond_emb(prompt), current], 1)
        out = transformer(core, x, time, before=network.phone_emb(phones))[:, prompt.shape[1] :]
        if cfg > 0:
            out = guide(out, transformer(core, current, time), cfg, rescale)
        return network.to_logit(out)

    return logits


def s2a_logits(
    network: S2A, semantic: Tensor, prompt: Tensor, known: Tensor, cfg: float, rescale: float
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The same of the layer behind ``known`` (B, layers, T); ``prompt`` (B, P, K)."""
    layer, count, size = known.shape[1], network.config.num_codebooks, prompt.shape[1]

    def logits(seq: Tensor, mask: Tensor, time: float) -> Tensor:
        core, masked = network.diff_estimator, network.mask_emb.weight[0]
        condition = network.cond_emb(semantic) + network.layer_emb.weight[layer]
        below = sum(network.token_emb[k](known[:, k]) for k in range(layer))
        current = below + torch.where(mask[..., None], masked, network.token_emb[layer](seq))
        current = current + masked * (count - 1 - layer)
        before = sum(network.token_emb[k](prompt[..., k]) for k in range(count))
        out = transformer(core, torch.cat([before, current], 1), time, added=condition)[:, size:]
        if cfg > 0:
            bare = transformer(core, current, time, added=condition[:, size:])
            out = guide(out, bare, cfg, rescale)
        return network.to_logits[layer](out)

    return logits


def gumbel(uniform: Tensor) -> Tensor:
    """Noise from uniform numbers."""
    return -torch.log(-torch.log(uniform + 1e-10) + 1e-10)


def step(
    logits: Callable[[Tensor, Tensor, float], Tensor],
    seq: Tensor,
    mask: Tensor,
    number: int,
    steps: int,
    temperature: float,
    threshold: float,
    uniform: Uniform,
) -> tuple[Tensor, Tensor]:
    """One step: codes (B, T) and which of them are masked after it."""
    time = 1.0 - number * (1.0 / steps)
    scores = logits(seq, mask, time)
    best, places = scores.topk(math.ceil((1 - threshold) * scores.shape[-1]), dim=-1)
    kept = torch.full_like(scores, float("-inf")).scatter(2, places, best)
    if number == steps - 1 and steps > 1:
        drawn = kept.argmax(-1)
    else:
        heat = 0.2 if steps == 1 else temperature * time
        drawn = (kept / max(heat, 1e-3) + gumbel(uniform(*kept.shape))).argmax(-1)
    seq = torch.where(mask, drawn, seq)
    sure = kept.softmax(-1).gather(2, drawn[..., None])[..., 0]
    doubt = 1 - (time * gumbel(uniform(*sure.shape)) + sure)
    later = torch.tensor(1.0 - (number + 1) * (1.0 / steps) if number + 1 < steps else 0.0)
    count = int((torch.sin(later * math.pi / 2) * seq.shape[1]).long())
    doubt = doubt.masked_fill(~mask, -torch.finfo(doubt.dtype).max)
    again = torch.zeros_like(mask).scatter(1, doubt.topk(count, dim=-1).indices, True)
    return seq.masked_fill(again, 0), again


def reverse(
    logits: Callable[[Tensor, Tensor, float], Tensor],
    shape: tuple[int, int],
    steps: int,
    temperature: float,
    threshold: float,
    uniform: Uniform,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Codes (B, T) of a whole reverse diffusion."""
    seq = torch.zeros(shape, dtype=torch.int64, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    for number in range(steps):
        seq, mask = step(logits, seq, mask, number, steps, temperature, threshold, uniform)
        if not bool(mask.any()):
            break
    return seq
