"""The encoders a model can be built with, by the name in its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nar_speech import config
from nar_speech.errors import ConfigError
from nar_speech.layers.conformer import ConformerEncoder, ConformerEncoderConfig
from nar_speech.layers.fastconformer import FastConformerConfig, FastConformerEncoder
from nar_speech.layers.sanm import SANMEncoder, SANMEncoderConfig
from nar_speech.layers.whisper import WhisperEncoder, WhisperEncoderConfig

ENCODERS: dict[str, tuple[type[nn.Module], type]] = {
    "conformer": (ConformerEncoder, ConformerEncoderConfig),
    "fastconformer": (FastConformerEncoder, FastConformerConfig),
    "sanm": (SANMEncoder, SANMEncoderConfig),
    "whisper": (WhisperEncoder, WhisperEncoderConfig),
}


def build_encoder(kind: str, input_size: int, conf: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the encoder ``kind`` for features of ``input_size`` values a frame.

    Every encoder maps (x (B, T, F), lengths (B,)) to (y (B, T', D), lengths (B,)) and has the attributes
    ``output_size`` (D) and ``frame_stride`` (input frames per output frame).

    Raises:
        ConfigError: an unknown kind, or a key in ``conf`` that this encoder does not have.
    """
    if kind not in ENCODERS:
        raise ConfigError(f"encoder: unknown kind '{kind}'; valid kinds: {', '.join(ENCODERS)}")
    encoder_class, config_class = ENCODERS[kind]
    return encoder_class(input_size, config.from_dict(config_class, conf or {}, f"encoder_conf ({kind})"))
