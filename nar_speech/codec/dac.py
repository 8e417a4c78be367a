"""DAC around transformers' network.

    Kumar et al. 2023, "High-Fidelity Audio Compression with Improved RVQGAN".

Its convolutions look ahead and are padded with zeros, so a stream has the numbers of the whole and a delay
(:attr:`DacCodec.delay`). Sound is padded on the right to a multiple of the hop. With an odd stride the
decoder gives a few samples less than frames times hop: a decoded recording may be that much shorter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nar_speech.codec.rows import RowCodec
from nar_speech.codec.stream import Chain, Conv, ConvTranspose, Op, PadToMultiple, Pointwise, Residual
from nar_speech.errors import CheckpointError, ConfigError


class DacCodec(RowCodec):
    """DAC.

    Args:
        config: fields of transformers' ``DacConfig``, or one; ``hidden_size`` (width of the latents) and
            ``upsampling_ratios`` may differ from what it derives.
        name: for messages and token files.

    Raises:
        ConfigError: an impossible value.
    """

    channels = 1

    def __init__(self, config: Any, name: str = "dac"):
        super().__init__()
        from transformers import DacConfig, DacModel

        try:
            if isinstance(config, DacConfig):
                c = config
            else:
                own = ("hidden_size", "upsampling_ratios", "hop_length")
                c = DacConfig(**{key: value for key, value in config.items() if key not in own})
                for key in own[:2]:  # DacConfig computes them and overwrites what it is given
                    if config.get(key) is not None:
                        setattr(c, key, config[key])
            self.model = DacModel(c).eval()
        except Exception as error:  # transformers' own checks raise many kinds
            raise ConfigError(f"{name}: impossible configuration ({' '.join(str(error).split())})") from error
        self.config, self.name = c, name
        self.sample_rate, self.hop = c.sampling_rate, c.hop_length
        self.num_codebooks, self.codebook_size = c.n_codebooks, c.codebook_size
        self.frame_rate = self.sample_rate / self.hop
        self.set_delay()

    @property
    def blocks(self) -> int:
        """Blocks of the encoder, and of the decoder."""
        return len(self.model.encoder.block)

    def encode_rows(self, waves: Tensor, num_codebooks: int) -> tuple[Tensor, None]:
        """See :class:`RowCodec`."""
        waves = nn.functional.pad(waves, (0, -waves.shape[2] % self.hop))
        return self.quantize(self.model.encoder(waves), num_codebooks), None

    def decode_rows(self, tokens: Tensor, scales: None) -> Tensor:
        """See :class:`RowCodec`."""
        return self.decode_latents(self.latents(tokens))

    def quantize(self, latents: Tensor, num_codebooks: int) -> Tensor:
        """Tokens (B, K, T): in each level the code vector of the nearest direction (appendix A)."""
        return self.quantize_levels(latents, num_codebooks)[0]

    def quantize_levels(self, latents: Tensor, num_codebooks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, K, T), the levels' projected inputs (B, K * d, T), the sum of code vectors (B, D, T)."""
        residual, total = latents, torch.zeros_like(latents)
        tokens, inputs = [], []
        for level in self.model.quantizer.quantizers[:num_codebooks]:
            projected = level.in_proj(residual)
            vectors, chosen = level.decode_latents(projected)
            # As in training, where gradients go straight through: it rounds, and the next level sees that.
            vectors = level.out_proj(projected + (vectors - projected))
            residual, total = residual - vectors, total + vectors
            tokens.append(chosen)
            inputs.append(projected)
        return torch.stack(tokens, 1), torch.cat(inputs, 1), total

    def latents(self, tokens: Tensor) -> Tensor:
        """See :meth:`Codec.latents`."""
        return self.model.quantizer.from_codes(self.check_tokens(tokens))[0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See :meth:`Codec.decode_latents`."""
        return self.model.decoder(latents)

    def build_encoder_ops(self) -> Op:
        """See :class:`RowCodec`."""
        net = self.model.encoder
        ops: list[Op] = [PadToMultiple(self.hop), _conv(net.conv1)]
        for block in net.block:
            ops += [_unit(unit) for unit in (block.res_unit1, block.res_unit2, block.res_unit3)]
            ops += [Pointwise(block.snake1), _conv(block.conv1)]
        return Chain([*ops, Pointwise(net.snake1), _conv(net.conv2)])

    def build_decoder_ops(self) -> Op:
        """See :class:`RowCodec`."""
        net = self.model.decoder
        ops: list[Op] = [_conv(net.conv1)]
        for block in net.block:
            trim = block.conv_t1.padding[0]
            ops += [Pointwise(block.snake1), ConvTranspose(block.conv_t1, trim, trim)]
            ops += [_unit(unit) for unit in (block.res_unit1, block.res_unit2, block.res_unit3)]
        return Chain([*ops, Pointwise(net.snake1), _conv(net.conv2), Pointwise(net.tanh)])


def _conv(conv: nn.Conv1d) -> Conv:
    return Conv(conv, conv.padding[0], conv.padding[0])


def _unit(unit: nn.Module) -> Residual:
    block = [Pointwise(unit.snake1), _conv(unit.conv1), Pointwise(unit.snake2), _conv(unit.conv2)]
    return Residual(Chain(block), unit.conv2.out_channels)


# Official files. descript-audio-codec numbers its layers and keeps weight-norm pairs; transformers has names
# and plain weights.

ENCODER_UNIT = {"0": "snake1", "1": "conv1", "2": "snake2", "3": "conv2"}


def official_config(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' configuration of the arguments of the official class (``metadata.kwargs`` of a file).

    Raises:
        ConfigError: a missing key, or a value that transformers' network can't have.
    """
    needed = ("encoder_dim", "encoder_rates", "decoder_dim", "decoder_rates", "n_codebooks", "codebook_size")
    missing = [key for key in (*needed, "codebook_dim", "sample_rate") if key not in kwargs]
    if missing:
        raise ConfigError(f"DAC: key '{missing[0]}' is missing; the configuration is not whole")
    width = kwargs["codebook_dim"]
    if not isinstance(width, int):
        if len(set(width)) != 1:
            raise ConfigError(f"DAC: codebook_dim {list(width)}: levels of several widths are not supported")
        width = width[0]
    rates = [int(rate) for rate in kwargs["encoder_rates"]]
    return {
        "encoder_hidden_size": kwargs["encoder_dim"],
        "downsampling_ratios": rates,
        "upsampling_ratios": [int(rate) for rate in kwargs["decoder_rates"]],
        "decoder_hidden_size": kwargs["decoder_dim"],
        "hidden_size": kwargs.get("latent_dim") or kwargs["encoder_dim"] * 2 ** len(rates),
        "n_codebooks": kwargs["n_codebooks"],
        "codebook_size": kwargs["codebook_size"],
        "codebook_dim": width,
        "sampling_rate": kwargs["sample_rate"],
    }


def rename_official(name: str, blocks: int) -> str:
    """Our name (of transformers) of a tensor of descript-audio-codec; each half has ``blocks`` blocks."""
    match = re.match(r"(encoder\.block|decoder\.model)\.(\d+)\.(.*)", name)
    if match is None:
        return name
    half, place, rest = match[1].split(".")[0], int(match[2]), match[3]
    outer = {0: "conv1", blocks + 1: "snake1", blocks + 2: "conv2"}
    if place in outer and "." not in rest:
        return f"{half}.{outer[place]}.{rest}"
    # In a block of the encoder the units come first, in one of the decoder last.
    units, ends = (0, ("snake1", "conv1")) if half == "encoder" else (2, ("snake1", "conv_t1"))
    inner = re.match(r"block\.(\d+)\.(?:block\.(\d+)\.)?(.*)", rest)
    if inner is None or place > blocks + 2:
        return name
    part = int(inner[1])
    if inner[2] is not None and units <= part < units + 3:
        return f"{half}.block.{place - 1}.res_unit{part - units + 1}.{ENCODER_UNIT[inner[2]]}.{inner[3]}"
    end = part - 3 if half == "encoder" else part
    if not 0 <= end < 2:
        return name
    return f"{half}.block.{place - 1}.{ends[end]}.{inner[3]}"


def rename(tensors: Mapping[str, Tensor], blocks: int, where: str) -> dict[str, Tensor]:
    """Tensors of any official file under transformers' names, weight-norm pairs folded.

    Raises:
        CheckpointError: half of a pair is missing.
    """
    pairs = {"weight_g": "weight_v", "parametrizations.weight.original0": "parametrizations.weight.original1"}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, ending = next(((name[: -len(e)], e) for e in pairs if name.endswith("." + e)), (name, None))
        if any(name.endswith("." + second) for second in pairs.values()):
            continue
        if ending is None:
            renamed[rename_official(name, blocks)] = tensor
            continue
        direction = tensors.get(stem + pairs[ending])
        if direction is None:
            raise CheckpointError(f"{where}: {stem}{pairs[ending]} is missing; get the weights again")
        weight = torch._weight_norm(direction.float(), tensor.float(), 0)
        renamed[rename_official(f"{stem}weight", blocks)] = weight
    return renamed
