"""Paraformer with hotwords: Contextual (CLAS in the decoder) and SeACo (own decoder, arXiv 2308.03266)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from nar_speech.errors import ConfigError
from nar_speech.layers.cif import CifOutput
from nar_speech.layers.sanm import CrossAttention, SANMDecoder, SANMDecoderConfig, make_keys, make_padding
from nar_speech.models.paraformer import (
    SOS,
    BiCifParaformer,
    Hotwords,
    Paraformer,
    ParaformerConfig,
)

FILTER_BLOCK = 6  # the hotword decoder's block whose attention decides which hotwords are kept


def pad_hotwords(entries: Sequence[Sequence[int]], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids (N, L), zero padded, and lengths (N,) of hotwords, on the CPU.

    Raises:
        ConfigError: an empty hotword, or an id outside the vocabulary.
    """
    for entry in entries:
        if len(entry) == 0:
            raise ConfigError("hotwords: one of them has no tokens; leave it out")
        if not 0 <= min(entry) <= max(entry) < vocab_size:
            raise ConfigError(f"hotwords: ids {list(entry)} exceed the vocabulary of {vocab_size} tokens")
    ids = pad_sequence([torch.tensor(entry, dtype=torch.long) for entry in entries], batch_first=True)
    return ids, torch.tensor([len(entry) for entry in entries])


class BiasDecoder(nn.Module):
    """Cross attention of token states over the hotwords."""

    def __init__(self, size: int, config: SANMDecoderConfig):
        super().__init__()
        self.src_attn = CrossAttention(size, config.attention_heads, config.src_attention_dropout)
        self.norm3 = nn.LayerNorm(size, eps=config.norm_eps)
        self.dropout = config.dropout

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, U, D) states, (B, N, D) hotwords -> (B, U, D)."""
        return F.dropout(self.src_attn(self.norm3(x), context), self.dropout, self.training)


class ContextualDecoder(SANMDecoder):
    """SAN-M decoder whose last cross-attention block also looks at the hotwords."""

    def __init__(self, size: int, vocab_size: int, config: SANMDecoderConfig | None = None):
        super().__init__(size, vocab_size, config)
        self.last_decoder = self._layer(self.config.shift, cross=True)
        self.bias_decoder = BiasDecoder(size, self.config)
        self.bias_output = nn.Conv1d(2 * size, size, 1, bias=False)

    def _cross_layers(self) -> int:
        return self.config.att_layer_num - 1

    def forward(
        self,
        tokens: Tensor,
        token_lengths: Tensor,
        memory: Tensor,
        lengths: Tensor,
        context: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """As :meth:`SANMDecoder.forward`, with hotwords ``context`` (N, D) weighted by ``scale``."""
        padding = make_padding(token_lengths, tokens.shape[1], tokens.dtype)
        keys = make_keys(lengths, memory.shape[1])
        x = tokens
        for layer in self.decoders:
            x = layer(x, padding, memory, keys)
        last = self.last_decoder
        x = last.remember(x, padding)
        heard = last.src_attn(last.norm3(x), memory, keys)
        favoured = self.bias_decoder(x, context.expand(len(x), -1, -1)) * scale
        mixed = F.linear(torch.cat([heard, favoured], dim=-1), self.bias_output.weight.squeeze(-1))
        x = x + F.dropout(mixed, self.config.dropout, self.training)
        if self.config.num_blocks > self.config.att_layer_num:
            for layer in self.decoders2:
                x = layer(x, padding)
        for layer in self.decoders3:
            x = layer(x, padding)
        return self.output_layer(self.after_norm(x))


class ContextualParaformer(Paraformer):
    """Hotwords as an extra attention memory of the decoder's last block."""

    variant = "contextual"

    def __init__(self, config: ParaformerConfig):
        super().__init__(config)
        size = config.hotword_conf.inner_dim
        _same_width(size, self.encoder.output_size)
        self.bias_encoder = nn.LSTM(size, size, batch_first=True)
        self.bias_embed = nn.Embedding(config.vocab_size, size)

    def _build_decoder(self, size: int) -> SANMDecoder:
        return ContextualDecoder(size, self.config.vocab_size, self.config.decoder_conf)

    def context(self, hotwords: Hotwords | None) -> Tensor:
        """One vector per hotword and a last one for "none of them": (N + 1, D)."""
        ids, lengths = pad_hotwords([*(hotwords or ()), [SOS]], self.config.vocab_size)
        embedded = self.bias_embed(ids.to(self.bias_embed.weight.device))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        return self.bias_encoder(packed)[1][0][0]

    def decode(
        self,
        encoder_out: Tensor,
        encoder_lengths: Tensor,
        embeds: Tensor,
        token_lengths: Tensor,
        context: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Logits (B, U, V); ``context``: :meth:`context` (default: no hotwords), ``scale``: its factor."""
        if embeds.shape[1] == 0:
            return embeds.new_zeros(len(embeds), 0, self.config.vocab_size)
        context = self.context(None) if context is None else context
        scale = self.config.hotword_conf.scale if scale is None else scale
        return self.decoder(embeds, token_lengths, encoder_out, encoder_lengths, context, scale)


class SeacoParaformer(BiCifParaformer):
    """Hotwords in a decoder of their own whose tokens replace the main decoder's where it names any."""

    variant = "seaco"

    def __init__(self, config: ParaformerConfig):
        super().__init__(config)
        conf = config.hotword_conf
        _same_width(conf.inner_dim, self.encoder.output_size)
        if config.share_embedding:
            raise ConfigError("share_embedding: variant 'seaco' embeds hotwords with the decoder's embedding")
        self.bias_encoder = nn.LSTM(
            conf.inner_dim, conf.inner_dim, 2, batch_first=True, bidirectional=conf.bidirectional
        )
        if conf.bidirectional:
            self.lstm_proj = nn.Linear(2 * conf.inner_dim, conf.inner_dim)
        self.seaco_decoder = SANMDecoder(conf.inner_dim, config.vocab_size, conf.decoder)
        self.hotword_output_layer = nn.Linear(conf.inner_dim, config.vocab_size)

    def context(self, hotwords: Hotwords | None) -> None:
        """The main decoder knows nothing of hotwords; see :meth:`hotword_states`."""
        return

    def hotword_states(self, hotwords: Hotwords) -> Tensor:
        """One vector per hotword and a last one for "none of them": (N + 1, D)."""
        ids, lengths = pad_hotwords([*hotwords, [SOS]], self.config.vocab_size)
        embedded = self.embed_tokens(ids.to(next(self.parameters()).device))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states = pad_packed_sequence(self.bias_encoder(packed)[0], batch_first=True)[0]
        if self.config.hotword_conf.bidirectional:
            states = self.lstm_proj(states)
        return states[torch.arange(len(lengths)), lengths - 1]

    def keep_hotwords(
        self, states: Tensor, hidden: Tensor, token_lengths: Tensor, size: int, official: bool = False
    ) -> Tensor:
        """Attention score filter: the ``size`` hotwords each utterance attends to most, and the last one.

        Args:
            states: (N + 1, D) of :meth:`hotword_states`.
            hidden: (B, U, D) states of the main decoder.
            token_lengths: (B,) int64.
            official: let the first utterance, with its padding, decide for the whole batch.

        Returns:
            (B, size + 1, D).
        """
        padding = make_padding(token_lengths, hidden.shape[1], hidden.dtype)
        memory = states.expand(len(hidden), -1, -1)
        blocks = self.seaco_decoder.decoders[:FILTER_BLOCK]
        x = hidden
        for layer in blocks[:-1]:
            x = layer(x, padding, memory)
        last = blocks[-1]
        weights = last.src_attn.weights(last.norm3(last.remember(x, padding)), memory).sum(dim=1)
        if padding is not None and not official:
            weights = weights * padding.frames
        scores = weights.sum(dim=1)  # (B, N + 1)
        if official:
            scores = scores[:1].expand(len(hidden), -1)
        kept = scores.topk(min(size, len(states) - 1), dim=1).indices
        return torch.cat([states[kept], memory[:, -1:]], dim=1)

    def hotword_logits(self, embeds: Tensor, hidden: Tensor, token_lengths: Tensor, states: Tensor) -> Tensor:
        """Logits (B, U, V) of the hotword decoder.

        Args:
            embeds, hidden: (B, U, D) acoustic vectors and states of the main decoder.
            states: (N + 1, D), or (B, N + 1, D) where the hotwords differ.
        """
        memory = states.expand(len(embeds), -1, -1)
        number = token_lengths.new_full((len(embeds),), memory.shape[1])
        heard = self.seaco_decoder.hidden(embeds, token_lengths, memory, number)
        read = self.seaco_decoder.hidden(hidden, token_lengths, memory, number)
        return self.hotword_output_layer(heard + read)

    def recognise(
        self,
        encoder_out: Tensor,
        encoder_lengths: Tensor,
        cif: CifOutput,
        hotwords: Hotwords | None = None,
        official_padding: bool = False,
    ) -> Tensor:
        """Log probabilities (B, U, V), the hotword decoder's where its best id is not ``no_bias``."""
        if not hotwords or cif.embeds.shape[1] == 0:
            return super().recognise(encoder_out, encoder_lengths, cif)
        hidden = self.decoder.hidden(cif.embeds, cif.token_lengths, encoder_out, encoder_lengths)
        return self.favour(hidden, cif, self.hotword_states(hotwords), official_padding)

    def favour(
        self, hidden: Tensor, cif: CifOutput, states: Tensor, official_padding: bool = False
    ) -> Tensor:
        """Log probabilities (B, U, V) of both decoders together.

        Args:
            hidden: (B, U, D) states of the main decoder.
            states: (N + 1, D) of :meth:`hotword_states`.
            official_padding: see :meth:`keep_hotwords`.
        """
        conf = self.config.hotword_conf
        plain = self.decoder.output_layer(hidden).float().log_softmax(dim=-1)
        if 0 < conf.filter_size < len(states):
            states = self.keep_hotwords(states, hidden, cif.token_lengths, conf.filter_size, official_padding)
        logits = self.hotword_logits(cif.embeds, hidden, cif.token_lengths, states)
        favoured = logits.float().log_softmax(dim=-1)
        share = conf.weight * (favoured.argmax(dim=-1, keepdim=True) != conf.no_bias)
        return plain * (1 - share) + favoured * share


def _same_width(inner_dim: int, size: int) -> None:
    if inner_dim != size:
        raise ConfigError(f"hotword_conf.inner_dim: must be the encoder's width {size}, got {inner_dim}")
