"""Attention decoders of WeNet's U2 and U2++ models, for rescoring CTC hypotheses and joint training.

They read a whole token sequence at once (teacher forcing), so scoring n hypotheses is one parallel pass.
U2++ (Wu et al. 2021, section 2.1) has a second decoder that reads the sequence from its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nar_speech.config import MAX_BLOCKS, MAX_WIDTH, check_range
from nar_speech.layers.attention import Attention
from nar_speech.layers.conformer import ACTIVATIONS, FeedForward
from nar_speech.layers.position import interleaved_sinusoid, valid_mask


@dataclass(frozen=True)
class AttentionDecoderConfig:
    """Numbers of a transformer decoder; names and defaults are those of WeNet's ``decoder_conf``.

    ``r_num_blocks`` > 0 adds the right-to-left decoder of U2++ (``bitransformer``).
    """

    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 6
    r_num_blocks: int = 0
    dropout_rate: float = 0.1
    positional_dropout_rate: float = 0.1
    self_attention_dropout_rate: float = 0.0
    src_attention_dropout_rate: float = 0.0
    normalize_before: bool = True
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    activation_type: Literal["relu", "swish", "gelu", "tanh", "hardtanh"] = "relu"
    norm_eps: float = 1e-5
    mlp_bias: bool = True

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_WIDTH, "attention_heads", "linear_units")
        check_range(self, 0, MAX_BLOCKS, "num_blocks", "r_num_blocks")
        check_range(self, 0, 1, "dropout_rate", "positional_dropout_rate", "norm_eps")
        check_range(self, 0, 1, "self_attention_dropout_rate", "src_attention_dropout_rate")


class DecoderLayer(nn.Module):
    """Causal self-attention, cross attention, feed forward, each with a residual and a norm."""

    def __init__(self, width: int, config: AttentionDecoderConfig):
        super().__init__()
        c = config
        biases = {"query_bias": c.query_bias, "key_bias": c.key_bias, "value_bias": c.value_bias}
        self.self_attn = Attention(c.attention_heads, width, c.self_attention_dropout_rate, **biases)
        self.src_attn = Attention(c.attention_heads, width, c.src_attention_dropout_rate)
        activation = ACTIVATIONS[c.activation_type]()
        self.feed_forward = FeedForward(width, c.linear_units, c.dropout_rate, activation, c.mlp_bias)
        self.norm1 = nn.LayerNorm(width, eps=c.norm_eps)
        self.norm2 = nn.LayerNorm(width, eps=c.norm_eps)
        self.norm3 = nn.LayerNorm(width, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.dropout_rate)
        self.normalize_before = c.normalize_before

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """One layer over ``x`` (B, U, D).

        Args:
            mask: (B, U, U) bool, where a token may look.
            memory, memory_mask: (B, T, D) encoder output and (B, 1, T) bool, its valid frames.
        """
        x = self._residual(x, self.norm1, lambda y: self.self_attn(y, self.self_attn.keys(y), mask))
        x = self._residual(x, self.norm2, lambda y: self.src_attn(y, self.src_attn.keys(memory), memory_mask))
        return self._residual(x, self.norm3, self.feed_forward)

    def _residual(self, x: Tensor, norm: nn.Module, part) -> Tensor:
        if self.normalize_before:
            return x + self.dropout(part(norm(x)))
        return norm(x + self.dropout(part(x)))


class PositionedEmbedding(nn.Embedding):
    """Token embeddings times sqrt(D) plus sinusoids."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, U) ids to (B, U, D)."""
        x = super().forward(tokens) * math.sqrt(self.embedding_dim)
        return x + interleaved_sinusoid(x.shape[1], x.shape[2], x.device).to(x.dtype)


class AttentionDecoder(nn.Module):
    """Transformer decoder over an encoder's output, one reading direction."""

    def __init__(self, vocab_size: int, width: int, config: AttentionDecoderConfig, num_blocks: int):
        super().__init__()
        # A Sequential keeps WeNet's name ``embed.0.weight``.
        self.embed = nn.Sequential(
            PositionedEmbedding(vocab_size, width), nn.Dropout(config.positional_dropout_rate)
        )
        self.decoders = nn.ModuleList(DecoderLayer(width, config) for _ in range(num_blocks))
        self.after_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.output_layer = nn.Linear(width, vocab_size)
        self.normalize_before = config.normalize_before

    def forward(
        self, memory: Tensor, memory_lengths: Tensor, tokens: Tensor, token_lengths: Tensor
    ) -> Tensor:
        """Scores of the token after each given one.

        Args:
            memory: (B, T, D) encoder output; T may be 0.
            memory_lengths: (B,).
            tokens: (B, U) ids, the first one <sos>; padding may be any id.
            token_lengths: (B,), <sos> included.

        Returns:
            (B, U, V) logits.
        """
        size = tokens.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool, device=tokens.device).tril()
        mask = causal & valid_mask(token_lengths, size).unsqueeze(1)
        if memory.shape[1] == 0:  # attention over nothing is zero; one silent frame behaves the same for all
            memory = memory.new_zeros(memory.shape[0], 1, memory.shape[2])
        memory_mask = valid_mask(memory_lengths, memory.shape[1]).unsqueeze(1)
        x = self.embed(tokens)
        for layer in self.decoders:
            x = layer(x, mask, memory, memory_mask)
        return self.output_layer(self.after_norm(x) if self.normalize_before else x)


class BiAttentionDecoder(nn.Module):
    """A left-to-right and a right-to-left decoder (U2++)."""

    def __init__(self, vocab_size: int, width: int, config: AttentionDecoderConfig):
        super().__init__()
        self.left_decoder = AttentionDecoder(vocab_size, width, config, config.num_blocks)
        self.right_decoder = AttentionDecoder(vocab_size, width, config, config.r_num_blocks)


def build_decoder(
    vocab_size: int, width: int, config: AttentionDecoderConfig
) -> AttentionDecoder | BiAttentionDecoder:
    """One decoder, or two where ``r_num_blocks`` > 0."""
    if config.r_num_blocks > 0:
        return BiAttentionDecoder(vocab_size, width, config)
    return AttentionDecoder(vocab_size, width, config, config.num_blocks)


def decoder_inputs(
    tokens: Tensor, lengths: Tensor, sos: int, eos: int, ignore: int = -1
) -> tuple[Tensor, Tensor]:
    """Shifted input and target of a decoder.

    Args:
        tokens: (B, U) ids; entries beyond ``lengths`` (B,) are not read.

    Returns:
        (B, U + 1) ``sos`` then tokens, padded with ``eos``; (B, U + 1) tokens then ``eos``, padded with
        ``ignore``.
    """
    batch, size = tokens.shape
    valid = valid_mask(lengths, size)
    first = tokens.new_full((batch, 1), sos)
    inputs = torch.cat([first, tokens.masked_fill(~valid, eos)], 1)
    targets = torch.cat([tokens.masked_fill(~valid, ignore), tokens.new_full((batch, 1), ignore)], 1)
    return inputs, targets.scatter(1, lengths.unsqueeze(1), eos)


def reverse_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence of ``tokens`` (B, U) from its end; entries beyond ``lengths`` (B,) stay."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mirrored = lengths.unsqueeze(1) - 1 - index
    return tokens.gather(1, torch.where(mirrored >= 0, mirrored, index))
