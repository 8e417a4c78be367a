"""Whisper's text decoder (Radford et al. 2022, arXiv 2212.04356, section 2.2) with a key-value cache.

Two ways to the same logits: :meth:`WhisperDecoder.forward` scores whole token sequences, for training;
:meth:`WhisperDecoder.start` and :meth:`WhisperDecoder.step` score any number of further tokens of each
utterance, and a state can take some of them back, for greedy search and the verification of drafts.
Parameter names are those of the openai/whisper decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.packed import linear_gelu, merge_linears
from nar_speech.layers.sanm import make_keys, merge_heads, split_heads
from nar_speech.layers.whisper import WhisperAttention


@dataclass(frozen=True)
class WhisperDecoderConfig:
    """Numbers of a Whisper decoder; the defaults are those of Whisper tiny.

    Attributes:
        vocab_size: V.
        size: width D of the decoder and of the encoder output it reads.
        heads: attention heads; must divide D.
        linear_units: inner width of the feed-forward part.
        num_blocks: number of Transformer blocks.
        max_tokens: longest sequence, prompt included; 448 is what the official weights know.
        dropout: in training, on the embeddings and on the output of every attention and feed-forward part.
    """

    vocab_size: int
    size: int = 384
    heads: int = 6
    linear_units: int = 1536
    num_blocks: int = 4
    max_tokens: int = 448
    dropout: float = 0.0

    def __post_init__(self):
        if self.heads < 1 or self.size < 1 or self.size % self.heads:
            raise ConfigError(f"heads: {self.heads} does not divide the size {self.size}")
        for name in ("vocab_size", "linear_units", "num_blocks", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout: must be at least 0 and below 1, got {self.dropout}")


@dataclass(frozen=True)
class DecoderState:
    """What a decoder remembers of B utterances; made by :meth:`WhisperDecoder.start`.

    A step writes into the same buffers, behind ``lengths``: of the states that share them only the newest, or
    an older one from which on everything is fed again, gives right results.

    Attributes:
        keys, values: of the tokens, one (B, H, S, D / H) tensor a block; S is the room.
        lengths: (B,) int64, tokens of each utterance that count; what lies behind them does not matter.
        memory_keys, memory_values: of the encoder output, one (B, H, T, D / H) tensor a block.
        memory_mask: (B, 1, 1, T) bool, true where there is audio; None: everywhere.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor
    memory_keys: tuple[Tensor, ...]
    memory_values: tuple[Tensor, ...]
    memory_mask: Tensor | None

    @property
    def room(self) -> int:
        """Tokens that fit the buffers, S."""
        return self.keys[0].shape[2]

    def truncate(self, lengths: Tensor) -> DecoderState:
        """Forget the tokens of each utterance behind ``lengths`` (B,); copies nothing."""
        return replace(self, lengths=torch.minimum(self.lengths, lengths))

    def select(self, rows: Tensor) -> DecoderState:
        """The state of some utterances, ``rows`` (R,) int64, which may repeat; a copy."""
        return DecoderState(
            tuple(t[rows] for t in self.keys),
            tuple(t[rows] for t in self.values),
            self.lengths[rows],
            tuple(t[rows] for t in self.memory_keys),
            tuple(t[rows] for t in self.memory_values),
            None if self.memory_mask is None else self.memory_mask[rows],
        )

    def grow(self, room: int) -> DecoderState:
        """Buffers for at least ``room`` tokens."""
        more = room - self.room
        if more <= 0:
            return self
        return replace(
            self,
            keys=tuple(F.pad(t, (0, 0, 0, more)) for t in self.keys),
            values=tuple(F.pad(t, (0, 0, 0, more)) for t in self.values),
        )


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Queries (B, U, D) on keys and values (B, H, T, D / H) -> (B, U, D), before the output's projection.

    ``mask`` (B, 1, U or 1, T) bool is true where attention may look; None: everywhere.
    """
    query = split_heads(query, keys.shape[1])
    return merge_heads(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal))


class WhisperCrossAttention(nn.Module):
    """Multi-head attention of queries on keys and values that are projected apart; the keys have no bias."""

    def __init__(self, size: int):
        super().__init__()
        self.merged: nn.Module | None = None
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., D) of (..., D)."""
        if self.merged is None:
            return self.key(source), self.value(source)
        return self.merged(source).chunk(2, dim=-1)

    def merge_projections(self) -> None:
        """Make one product of the two projections of the audio, for inference."""
        if self.merged is None:
            self.merged = merge_linears([self.key, self.value])
            del self.key, self.value


class WhisperDecoderBlock(nn.Module):
    """Pre-norm block: attention on the tokens so far, attention on the audio, Linear, GELU, Linear."""

    def __init__(self, config: WhisperDecoderConfig):
        super().__init__()
        size = config.size
        self.dropout = config.dropout
        self.attn = WhisperAttention(size, config.heads)
        self.attn_ln = nn.LayerNorm(size)
        self.cross_attn = WhisperCrossAttention(size)
        self.cross_attn_ln = nn.LayerNorm(size)
        self.mlp = nn.Sequential(
            nn.Linear(size, config.linear_units), nn.GELU(), nn.Linear(config.linear_units, size)
        )
        self.mlp_ln = nn.LayerNorm(size)

    def add(self, x: Tensor, attention: nn.Module, context: Tensor) -> Tensor:
        """x with the output of an attention."""
        return x + F.dropout(attention.out(context), self.dropout, self.training)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x with the output of the feed-forward part."""
        inner = self.mlp[2](linear_gelu(self.mlp[0], self.mlp_ln(x)))
        return x + F.dropout(inner, self.dropout, self.training)


class WhisperDecoder(nn.Module):
    """Token and learnt position embeddings, blocks, LayerNorm; the token embedding gives the logits too."""

    def __init__(self, config: WhisperDecoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.size)
        self.positional_embedding = nn.Parameter(torch.empty(config.max_tokens, config.size))
        self.blocks = nn.ModuleList(WhisperDecoderBlock(config) for _ in range(config.num_blocks))
        self.ln = nn.LayerNorm(config.size)
        self.output: nn.Module | None = None
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, tokens: Tensor, memory: Tensor, memory_lengths: Tensor) -> Tensor:
        """Logits of the token after every token.

        Args:
            tokens: (B, U) int64, prompt first; what pads the end of a row changes nothing before it.
            memory: (B, T, D) encoder output; what lies beyond an utterance's length does not matter.
            memory_lengths: (B,) int64, at least 1.

        Returns:
            (B, U, V).

        Raises:
            InputError: more tokens than ``max_tokens``.
        """
        self._check(tokens.shape[1])
        mask = make_keys(memory_lengths, memory.shape[1])
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = F.dropout(x, self.config.dropout, self.training)
        heads = self.config.heads
        for block in self.blocks:
            query, *pair = block.attn.project(block.attn_ln(x))
            context = attend(query, *(split_heads(part, heads) for part in pair), None, causal=True)
            x = block.add(x, block.attn, context)
            query = block.cross_attn.query(block.cross_attn_ln(x))
            pair = [split_heads(part, heads) for part in block.cross_attn.project(memory)]
            x = block.add(x, block.cross_attn, attend(query, *pair, mask))
            x = block.feed_forward(x)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        x = self.ln(x)
        return F.linear(x, self.token_embedding.weight) if self.output is None else self.output(x)

    def untie(self) -> WhisperDecoder:
        """Make the output a Linear layer of its own, with the same weights, to be packed; for inference."""
        if self.output is None:
            size, vocab_size = self.config.size, self.config.vocab_size
            self.output = nn.Linear(size, vocab_size, bias=False, device="meta")
            self.output.weight = self.token_embedding.weight
            self.output.train(self.training)
        return self

    def start(self, memory: Tensor, memory_lengths: Tensor, room: int = 64) -> DecoderState:
        """State before the first token; the audio's keys and values are computed here, once.

        Args:
            memory: (B, T, D) encoder output.
            memory_lengths: (B,) int64, at least 1.
            room: tokens for which buffers are made; they grow when needed.
        """
        heads = self.config.heads
        pairs = [
            [split_heads(part, heads).contiguous() for part in block.cross_attn.project(memory)]
            for block in self.blocks
        ]
        shape = (memory.shape[0], heads, min(room, self.config.max_tokens), self.config.size // heads)
        return DecoderState(
            tuple(memory.new_zeros(shape) for _ in pairs),
            tuple(memory.new_zeros(shape) for _ in pairs),
            torch.zeros(memory.shape[0], dtype=torch.int64, device=memory.device),
            tuple(keys for keys, _ in pairs),
            tuple(values for _, values in pairs),
            make_keys(memory_lengths, memory.shape[1]),
        )

    def step(self, tokens: Tensor, counts: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Feed further tokens, as many as each utterance has.

        Args:
            tokens: (B, K) int64, padded at the end with any id.
            counts: (B,) int64, tokens of each utterance, 0 to K.
            state: from :meth:`start` or a step; its buffers are written to.

        Returns:
            logits (B, K, V) of the token after every new token; those of padding mean nothing. The new state.

        Raises:
            InputError: more tokens than ``max_tokens``.
        """
        new, longest = tokens.shape[1], int((state.lengths + counts).max())
        self._check(longest)
        needed = int(state.lengths.max()) + new  # padding is written too, behind what counts
        if needed > state.room:
            state = state.grow(max(needed, min(2 * state.room, self.config.max_tokens)))
        places = state.lengths[:, None] + torch.arange(new, device=tokens.device)
        mask = torch.arange(needed, device=tokens.device) <= places[:, None, :, None]
        rows = _Rows(counts, new)
        x = self.token_embedding(rows.pack(tokens))
        x = x + self.positional_embedding[rows.pack(places)]
        index = places[:, None, :, None].expand(-1, self.config.heads, -1, state.keys[0].shape[-1])
        for number, block in enumerate(self.blocks):
            query, *pair = block.attn.project(block.attn_ln(x))
            buffers = state.keys[number], state.values[number]
            for buffer, part in zip(buffers, pair, strict=True):
                buffer.scatter_(2, index, split_heads(rows.unpack(part), self.config.heads))
            keys, values = (buffer[:, :, :needed] for buffer in buffers)
            context = attend(rows.unpack(query), keys, values, mask)
            x = block.add(x, block.attn, rows.pack(context))
            query = rows.unpack(block.cross_attn.query(block.cross_attn_ln(x)))
            memory = state.memory_keys[number], state.memory_values[number], state.memory_mask
            x = block.add(x, block.cross_attn, rows.pack(attend(query, *memory)))
            x = block.feed_forward(x)
        return rows.unpack(self.logits(x)), replace(state, lengths=state.lengths + counts)

    def _check(self, tokens: int) -> None:
        if tokens > self.config.max_tokens:
            raise InputError(
                f"{tokens} tokens are more than the {self.config.max_tokens} (max_tokens) that this Whisper"
                " decoder can hold; cut the audio into shorter segments"
            )


class _Rows:
    """Takes padding out of (B, K, ...) tensors and puts it back, so that only attention computes it."""

    def __init__(self, counts: Tensor, width: int):
        self.shape = (len(counts), width)
        valid = (torch.arange(width, device=counts.device) < counts[:, None]).flatten()
        self.places = None if bool(valid.all()) else valid.nonzero()[:, 0]

    def pack(self, x: Tensor) -> Tensor:
        """(B, K, ...) -> (N, ...) without padding; as it is where there is none."""
        return x if self.places is None else x.flatten(0, 1)[self.places]

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse; padding is zero."""
        if self.places is None:
            return x
        padded = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return padded.index_copy_(0, self.places, x).unflatten(0, self.shape)
