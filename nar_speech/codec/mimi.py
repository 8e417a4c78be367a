"""Mimi (Défossez et al. 2024, "Moshi", section 3.3) around transformers' network.

Everything looks back only, so a stream gives each frame as soon as its samples are there. transformers'
own streaming loses the state of the decoder's convolutions, which is heard as clicks; here every convolution,
and the keys and values that the windows of the two Transformers still see, are carried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.codec.rows import RowCodec
from nar_speech.codec.seanet import layer_op, seanet_ops
from nar_speech.codec.stream import Chain, Op
from nar_speech.errors import ConfigError


class MimiCodec(RowCodec):
    """Mimi.

    Args:
        config: fields of transformers' ``MimiConfig``, or one; as in ``config.json``.
        name: for messages and token files.

    Raises:
        ConfigError: an impossible value.
    """

    def __init__(self, config: Any, name: str = "mimi"):
        super().__init__()
        from transformers import MimiConfig, MimiModel

        try:
            c = config if isinstance(config, MimiConfig) else MimiConfig(**config)
            self.model = MimiModel(c).eval()
        except Exception as error:  # transformers' own checks raise many kinds
            raise ConfigError(f"{name}: impossible configuration ({' '.join(str(error).split())})") from error
        if self.model.encoder is None or self.model.decoder is None or self.model.encoder.downsample is None:
            raise ConfigError(f"{name}: a model without encoder, decoder or downsampling is not supported")
        self.config, self.name = c, name
        self.sample_rate, self.channels = c.sampling_rate, c.audio_channels
        down = self.model.encoder.downsample.conv.stride[0]
        self.hop = math.prod(c.upsampling_ratios) * down
        self.num_codebooks, self.codebook_size = c.num_quantizers, c.codebook_size
        self.frame_rate = self.sample_rate / self.hop
        self.register_load_state_dict_post_hook(lambda codec, _: codec.forget_vectors())
        self.set_delay()

    def check_codebooks(self, count: int | None) -> int:
        """See :meth:`Codec.check_codebooks`; the semantic codebooks can't be left away."""
        count = super().check_codebooks(count)
        if count < self.config.num_semantic_quantizers:
            least = self.config.num_semantic_quantizers
            raise ConfigError(f"codebooks: got {count}; {self.name} has {least} to {self.num_codebooks}")
        return count

    def encode_rows(self, waves: Tensor, num_codebooks: int) -> tuple[Tensor, None]:
        """See :class:`RowCodec`."""
        return self.quantize(self.model.encoder(waves).latents, num_codebooks), None

    def decode_rows(self, tokens: Tensor, scales: None) -> Tensor:
        """See :class:`RowCodec`."""
        return self.decode_latents(self.latents(tokens))

    def quantize(self, latents: Tensor, num_codebooks: int) -> Tensor:
        """Tokens (B, K, T): the semantic codebooks, then the acoustic chain, which quantises anew."""
        return self.model.quantizer.encode(latents, num_codebooks).transpose(0, 1)

    def latents(self, tokens: Tensor) -> Tensor:
        """See :meth:`Codec.latents`."""
        return self.model.quantizer.decode(self.check_tokens(tokens))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See :meth:`Codec.decode_latents`."""
        return self.model.decoder(latents).audio_values

    def forget_vectors(self) -> None:
        """Drop the code vectors that transformers computes at first use and never again.

        They are sums divided by counts, both of which are loaded, moved and trained afterwards.
        """
        for module in self.modules():
            if hasattr(module, "embed_sum"):
                module._embed = None

    def _apply(self, *args: Any, **kwargs: Any) -> MimiCodec:
        super()._apply(*args, **kwargs)
        self.forget_vectors()
        return self

    def build_encoder_ops(self) -> Op:
        """See :class:`RowCodec`."""
        net = self.model.encoder
        convolutions = seanet_ops(net.encoder_seanet.layers)
        return Chain([convolutions, WindowedTransformer(net.encoder_transformer), layer_op(net.downsample)])

    def build_decoder_ops(self) -> Op:
        """See :class:`RowCodec`."""
        net = self.model.decoder
        convolutions = seanet_ops(net.decoder_seanet.layers)
        return Chain([layer_op(net.upsample), WindowedTransformer(net.decoder_transformer), convolutions])


@dataclass(frozen=True)
class TransformerState:
    """Keys and values (B, layers, H, m, D/H) that the next position may see, and that position."""

    keys: Tensor
    values: Tensor
    position: int = 0


class WindowedTransformer(Op):
    """A Transformer in which a position sees itself and the ``sliding_window - 1`` before it."""

    def __init__(self, model: nn.Module):
        self.model, self.window = model, model.config.sliding_window
        if not self.window or self.window < 1:
            raise ConfigError("sliding_window: a stream needs one, or its state would grow without end")

    def init(self, batch: int, like: Tensor) -> TransformerState:
        """Nothing heard yet."""
        c = self.model.config
        shape = (batch, len(self.model.layers), c.num_key_value_heads, 0, c.head_dim)
        return TransformerState(like.new_zeros(shape), like.new_zeros(shape))

    def step(self, x: Tensor, state: TransformerState, final: bool) -> tuple[Tensor, TransformerState]:
        """See :class:`Op`; a long input is taken in pieces, so that memory stays bounded."""
        size, parts = max(self.window, 64), []
        for begin in range(0, x.shape[2], size):
            part, state = self._piece(x[:, :, begin : begin + size].transpose(1, 2), state)
            parts.append(part.transpose(1, 2))
        return (torch.cat(parts, 2) if parts else x), state

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        return inputs

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Op`; nothing looks ahead, so what lies behind a row reaches nothing of it."""
        return self.step(x, self.init(x.shape[0], x), True)[0], lengths

    def _piece(self, x: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """(B, n, D) of (B, n, D)."""
        count, past = x.shape[1], state.keys.shape[3]
        place = torch.arange(count, device=x.device) + state.position
        cos, sin = (part.unsqueeze(1) for part in self.model.rotary_emb(x, place[None]))
        seen = torch.arange(-past, count, device=x.device) + state.position
        apart = place[:, None] - seen
        mask = (apart >= 0) & (apart < self.window)
        keys, values = [], []
        for number, layer in enumerate(self.model.layers):
            cache = (state.keys[:, number], state.values[:, number])
            y, key, value = _attention(layer.self_attn, layer.input_layernorm(x), cos, sin, mask, cache)
            x = x + layer.self_attn_layer_scale(y)
            x = x + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x)))
            keep = max(key.shape[2] - self.window + 1, 0)
            keys.append(key[:, :, keep:])
            values.append(value[:, :, keep:])
        return x, TransformerState(torch.stack(keys, 1), torch.stack(values, 1), state.position + count)


def _attention(
    layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, n, D) of a layer's attention over ``cache`` and ``x``; all keys and values."""

    def heads(projection: nn.Module) -> Tensor:
        return projection(x).unflatten(2, (-1, layer.head_dim)).transpose(1, 2)

    def turned(y: Tensor) -> Tensor:
        first, second = y.chunk(2, 3)
        return y * cos + torch.cat([-second, first], 3) * sin

    key = torch.cat([cache[0], turned(heads(layer.k_proj))], 2)
    value = torch.cat([cache[1], heads(layer.v_proj)], 2)
    grouped = layer.num_key_value_groups > 1
    y = F.scaled_dot_product_attention(
        turned(heads(layer.q_proj)), key, value, attn_mask=mask, scale=layer.scaling, enable_gqa=grouped
    )
    return layer.o_proj(y.transpose(1, 2).flatten(2)), key, value


# Official files. Before 5.23 transformers had the parts of both halves at the top level.

OLD_PARTS = {
    "encoder.layers.": "encoder.encoder_seanet.layers.",
    "encoder_transformer.": "encoder.encoder_transformer.",
    "downsample.": "encoder.downsample.",
    "upsample.": "decoder.upsample.",
    "decoder_transformer.": "decoder.decoder_transformer.",
    "decoder.layers.": "decoder.decoder_seanet.layers.",
}


def rename_official(name: str) -> str:
    """The name in transformers 5.23 of a tensor of any release."""
    for old, new in OLD_PARTS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of any release of transformers under the names of this one."""
    return {rename_official(name): tensor for name, tensor in tensors.items()}
