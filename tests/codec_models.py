"""Small codecs with random weights for tests: every kind and option, quick on one core."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from nar_speech.codec.base import Codec
from nar_speech.codec.dac import DacCodec
from nar_speech.codec.encodec import EncodecCodec
from nar_speech.codec.maskgct import DecoderConfig, EncoderConfig, MaskGCTCodec, MaskGCTCodecConfig
from nar_speech.codec.mimi import MimiCodec
from nar_speech.codec.spectral import SpectralCodec, SpectralCodecConfig
from nar_speech.codec.vocos import BackboneConfig, Vocos, VocosConfig
from nar_speech.codec.vocos_heads import HeadConfig

ENCODEC = {
    "sampling_rate": 2000,
    "hidden_size": 8,
    "num_filters": 2,
    "upsampling_ratios": [4, 3],
    "codebook_size": 16,
    "num_lstm_layers": 1,
    "target_bandwidths": [2.1],  # three codebooks
}
CHUNKED = {
    **ENCODEC,
    "num_filters": 4,
    "audio_channels": 2,
    "use_causal_conv": False,
    "norm_type": "time_group_norm",
    "normalize": True,
}
DAC = {
    "encoder_hidden_size": 2,
    "decoder_hidden_size": 8,
    "n_codebooks": 3,
    "codebook_size": 16,
    "codebook_dim": 4,
    "sampling_rate": 2000,
}
MIMI = {
    "sampling_rate": 2400,
    "hidden_size": 8,
    "num_filters": 2,
    "upsampling_ratios": [3, 2],
    "codebook_size": 16,
    "codebook_dim": 4,
    "num_quantizers": 3,
    "vector_quantization_hidden_dimension": 4,
    "upsample_groups": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "sliding_window": 7,
}
MASKGCT = {
    "in_channels": 6,
    "num_quantizers": 3,
    "codebook_size": 16,
    "codebook_dim": 4,
    "vocos_dim": 8,
    "vocos_intermediate_dim": 12,
    "vocos_num_layers": 2,
    "upsample_initial_channel": 12,
}
SPECTRAL = {
    "sample_rate": 2000,
    "hop": 16,
    "width": 8,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "num_codebooks": 3,
    "codebook_size": 16,
    "code_width": 4,
}

BUILDERS: dict[str, Callable[[], Codec]] = {
    "encodec causal reflect": lambda: EncodecCodec(ENCODEC),
    "encodec causal constant": lambda: EncodecCodec({**ENCODEC, "pad_mode": "constant"}),
    "encodec causal, half trimmed": lambda: EncodecCodec({**ENCODEC, "trim_right_ratio": 0.5}),
    "encodec reflect, odd strides": lambda: EncodecCodec(
        {**ENCODEC, "use_causal_conv": False, "upsampling_ratios": [3, 5], "num_residual_layers": 2}
    ),
    "encodec constant, no shortcut, stereo": lambda: EncodecCodec(
        {**ENCODEC, "use_causal_conv": False, "pad_mode": "constant", "use_conv_shortcut": False}
        | {"audio_channels": 2}
    ),
    "encodec without lstm": lambda: EncodecCodec({**ENCODEC, "use_causal_conv": False}, lstm=False),
    "encodec renormalised": lambda: EncodecCodec({**ENCODEC, "use_causal_conv": False, "normalize": True}),
    "encodec chunks": lambda: EncodecCodec({**CHUNKED, "chunk_length_s": 0.05, "overlap": 0.05}),
    "encodec chunks, long overlap": lambda: EncodecCodec({**CHUNKED, "chunk_length_s": 0.06, "overlap": 0.7}),
    "encodec chunks, no overlap": lambda: EncodecCodec({**CHUNKED, "chunk_length_s": 0.06}),
    "encodec norm over time": lambda: EncodecCodec({**CHUNKED, "normalize": False}),
    "dac": lambda: DacCodec({**DAC, "downsampling_ratios": [2, 4]}),
    "dac, odd strides": lambda: DacCodec({**DAC, "downsampling_ratios": [3, 5], "hidden_size": 6}),
    "mimi": lambda: MimiCodec(MIMI),
    "maskgct": lambda: maskgct((3, 4), hop_size=12, n_fft=48),
    "maskgct, no tail, centred, by distance": lambda: maskgct(
        (3, 3), False, hop_size=9, n_fft=20, padding="center", codebook_dim=6, use_l2_normlize=False
    ),
    "maskgct, convolutions": lambda: maskgct((3, 4), use_vocos=False, up_ratios=(4, 3)),
    "spectral": lambda: SpectralCodec(SpectralCodecConfig(**SPECTRAL)),
}


def maskgct(ratios: tuple[int, ...], pad_tail: bool = True, **decoder) -> MaskGCTCodec:
    """The acoustic codec of MaskGCT with strides ``ratios``."""
    encoder = EncoderConfig(2, ratios, MASKGCT["in_channels"], use_tanh=not pad_tail)
    config = MaskGCTCodecConfig(encoder, DecoderConfig(**{**MASKGCT, **decoder}), 2000, pad_tail)
    return MaskGCTCodec(config)


@cache
def codec(name: str) -> Codec:
    """One of ``BUILDERS`` with weights that let much of the signal through."""
    torch.manual_seed(len(name))
    made = BUILDERS[name]()
    with torch.no_grad():
        for part, tensor in made.named_buffers():
            if part.endswith(("embed", "embed_sum")):
                tensor.copy_(torch.randn_like(tensor))
            if part.endswith("started"):
                tensor.fill_(1)
        for layer in made.modules():
            if isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight)
            if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d) and layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
    return made.eval().requires_grad_(False)


def vocos(kind: str, padding: str = "same", bandwidths: int | None = None) -> Vocos:
    """A small vocoder."""
    torch.manual_seed(5)
    head = HeadConfig(kind, 12, 24, 6, 24, padding)
    made = Vocos(VocosConfig(BackboneConfig(5, 12, 16, 2, 0.5, bandwidths), head))
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            tensor.add_(0.3 * torch.randn_like(tensor) * (0.2 if "weight" in name else 1.0))
    return made.eval().requires_grad_(False)


def waves(made: Codec, batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    """Noise (B, C, N)."""
    draw = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(batch, made.channels, samples, generator=draw)
