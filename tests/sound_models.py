"""A sound generator of random weights, small enough to run whole clips in a test."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nar_speech.codec.folder import write_codec_folder
from nar_speech.codec.spectral import SpectralCodec, SpectralCodecConfig
from nar_speech.models.magnet import Magnet, MagnetConfig
from nar_speech.models.musicgen import MusicGen, MusicGenConfig
from nar_speech.pipelines.generate import SoundGenerator
from nar_speech.pipelines.sound_options import GenerationConfig
from nar_speech.pipelines.sound_partner import Partner
from nar_speech.text.conditioner import TextConditioner
from nar_speech.types import ModelCard

RATE, HOP = 8000, 320  # 25 frames per second
CODEBOOKS, CODES, WIDTH = 3, 24, 12
SIZES = {
    "num_codebooks": CODEBOOKS,
    "codebook_size": CODES,
    "width": 16,
    "heads": 2,
    "num_blocks": 2,
    "text_width": WIDTH,
    "frame_rate": 25.0,
    "segment_seconds": 2.0,
}
QUICK = {"steps": (4, 2, 2), "temperature": 1.5, "guidance": 3.0}


class Words(TextConditioner):
    """A state for every word, made of its letters."""

    name, width, max_tokens = "words", WIDTH, 6

    def tokens(self, text: str) -> list[int]:
        return [sum(map(ord, word)) for word in text.split()]

    def encode(self, ids: Tensor) -> Tensor:
        rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(int(i))) for i in ids[0]]
        return torch.stack(rows)[None]

    def move(self, device: torch.device) -> None:
        pass


def tiny_codec() -> SpectralCodec:
    """Three codebooks of 24 codes at 25 Hz for sound of 8 kHz."""
    torch.manual_seed(3)
    config = SpectralCodecConfig(
        sample_rate=RATE,
        hop=HOP,
        width=8,
        encoder_blocks=1,
        decoder_blocks=1,
        num_codebooks=CODEBOOKS,
        codebook_size=CODES,
        code_width=4,
    )
    return SpectralCodec(config).eval().requires_grad_(False)


def sharp(network: torch.nn.Module) -> torch.nn.Module:
    """With logits far enough apart for choices to matter."""
    with torch.no_grad():
        for head in network.linears:
            head.weight.mul_(8)
    return network.eval().requires_grad_(False)


def tiny_magnet() -> Magnet:
    """Two blocks; sees two frames on each side in later codebooks."""
    torch.manual_seed(5)
    return sharp(Magnet(MagnetConfig(**SIZES, context=2, span_len=3)))


def tiny_partner() -> Partner:
    """An autoregressive model of the same codes."""
    torch.manual_seed(6)
    network = sharp(MusicGen(MusicGenConfig(**SIZES, stride_seconds=1.0)))
    return Partner(network, Words(), "tiny")


def tiny_generator(partner: bool = False, **generation) -> SoundGenerator:
    """Ready to make clips of 2 s at once."""
    card = ModelCard("tiny", "generate", "magnet", RATE)
    return SoundGenerator(
        tiny_magnet(),
        tiny_codec(),
        Words(),
        card,
        GenerationConfig(**{**QUICK, **generation}),
        tiny_partner() if partner else None,
    )


def write_codec(folder: Path) -> Path:
    """The codec as a folder of ours."""
    codec = tiny_codec()
    return write_codec_folder(folder, codec, ModelCard("tiny_codec", "codec", "spectral", RATE))
