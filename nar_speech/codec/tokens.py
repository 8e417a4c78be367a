"""Token files: the codes of one recording as compact safetensors, with what is needed to decode them.

tokens   (K, T) uint8, int16 or int32, the smallest that holds the codebook
scales   (chunks,) float32, of codecs that normalise loudness only
metadata format, version, codec, fingerprint, sample_rate, channels, hop, codebook_size, samples,
         chunk_frames, nar_speech
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nar_speech.checkpoint import save_safetensors
from nar_speech.codec.base import Codec
from nar_speech.codec.load import fingerprint
from nar_speech.errors import InputError
from nar_speech.types import Codes
from nar_speech.version import __version__

FORMAT, VERSION = "nar_speech.tokens", 1
NUMBERS = ("sample_rate", "channels", "hop", "codebook_size", "samples", "chunk_frames", "version")
SUFFIX = "safetensors"


@dataclass(frozen=True)
class TokenFile:
    """What a token file holds.

    Attributes:
        codes: of one recording (B = 1).
        fingerprint: of the codec that made it (:func:`nar_speech.codec.load.fingerprint`).
        channels, hop, codebook_size: of that codec.
        bytes: size of the file.
    """

    codes: Codes
    fingerprint: str
    channels: int
    hop: int
    codebook_size: int
    bytes: int = 0

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return int(self.codes.samples[0]) / self.codes.sample_rate

    @property
    def bits_per_second(self) -> float:
        """What the codes carry: log2 of the codebook's size for each, scales left away."""
        return self.codes.tokens.numel() * math.log2(self.codebook_size) / max(self.seconds, 1e-9)

    def check(self, codec: Codec, where: str | Path) -> None:
        """Raise an InputError unless ``codec`` has the codebooks of the one that made the file."""
        mine = (codec.sample_rate, codec.channels, codec.hop, codec.codebook_size, codec.chunk_frames)
        own = (self.codes.sample_rate, self.channels, self.hop, self.codebook_size, self.codes.chunk_frames)
        count = self.codes.tokens.shape[1]
        if mine != own or count > codec.num_codebooks or fingerprint(codec) != self.fingerprint:
            raise InputError(
                f"{where}: tokens of the codec '{self.codes.codec}' ({self.codes.sample_rate} Hz, {count}"
                f" codebooks of {self.codebook_size}), not of '{codec.name}'; decode with --codec"
                f" {self.codes.codec or 'the one that made them'}"
            )


def write_tokens(path: str | Path, codes: Codes, codec: Codec) -> None:
    """Write the codes of one recording; a crash never leaves half a file.

    Raises:
        InputError: codes of several recordings, or of unknown length.
    """
    if codes.tokens.shape[0] != 1 or codes.samples is None:
        raise InputError(f"{path}: a token file holds one recording whose length is known")
    frames = int(codes.lengths[0])
    tensors = {"tokens": codes.tokens[0, :, :frames].to(_smallest(codec.codebook_size))}
    if codes.scales is not None:
        tensors["scales"] = codes.scales[0].float()
    numbers = {
        "version": VERSION,
        "sample_rate": codes.sample_rate,
        "channels": codec.channels,
        "hop": codec.hop,
        "codebook_size": codec.codebook_size,
        "samples": int(codes.samples[0]),
        "chunk_frames": codes.chunk_frames or 0,
    }
    texts = {
        "format": FORMAT,
        "codec": codes.codec,
        "fingerprint": fingerprint(codec),
        "nar_speech": __version__,
    }
    save_safetensors(path, tensors, {**texts, **{key: str(value) for key, value in numbers.items()}})


def is_token_file(path: str | Path) -> bool:
    """Whether this is a token file, perhaps a damaged one, rather than anything else."""
    try:
        with open(path, "rb") as file:
            return FORMAT.encode() in file.read(4096)
    except OSError:
        return False


def read_tokens(path: str | Path) -> TokenFile:
    """Read and check a token file.

    Raises:
        InputError: it is missing, damaged, truncated, not a token file, of a newer version, or its codes are
            out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such token file; check the path")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        what = "damaged or truncated token file" if is_token_file(path) else "not a token file"
        raise InputError(f"{path}: {what} ({' '.join(str(error).split())}); encode it again") from error
    if about.get("format") != FORMAT or "tokens" not in tensors:
        raise InputError(f"{path}: not a token file; make one with 'nar-speech codec encode'")
    numbers = {}
    for key in NUMBERS:
        text = about.get(key, "")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise InputError(f"{path}: {key} is '{text[:40]}'; the token file is damaged, encode it again")
        numbers[key] = int(text)
    if numbers["version"] > VERSION:
        raise InputError(f"{path}: token file of version {numbers['version']}; update nar-speech to read it")
    tokens, scales = tensors["tokens"], tensors.get("scales")
    _check(path, tokens, scales, numbers)
    codes = Codes(
        tokens=tokens.long()[None],
        lengths=torch.tensor([tokens.shape[1]]),
        sample_rate=numbers["sample_rate"],
        samples=torch.tensor([numbers["samples"]]),
        scales=None if scales is None else scales.float()[None],
        chunk_frames=numbers["chunk_frames"] or None,
        codec=about.get("codec", ""),
    )
    size = path.stat().st_size
    parts = (about.get("fingerprint", ""), numbers["channels"], numbers["hop"], numbers["codebook_size"])
    return TokenFile(codes, *parts, bytes=size)


def _check(path: Path, tokens: Tensor, scales: Tensor | None, numbers: dict[str, int]) -> None:
    """Raise an InputError for tensors that no encoder writes."""
    size, kinds = numbers["codebook_size"], (torch.uint8, torch.int16, torch.int32)
    if tokens.dim() != 2 or tokens.dtype not in kinds or 0 in tokens.shape:
        raise InputError(f"{path}: tokens of shape {tuple(tokens.shape)}; expected (codebooks, frames)")
    for key in ("sample_rate", "channels", "hop", "codebook_size", "samples"):
        if numbers[key] < 1:
            raise InputError(f"{path}: {key} is {numbers[key]}; the token file is damaged, encode it again")
    low, high = (int(bound) for bound in torch.aminmax(tokens))
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise InputError(f"{path}: code {wrong} is not in 0 to {size - 1}; the file is damaged")
    if numbers["samples"] > tokens.shape[1] * numbers["hop"]:
        raise InputError(
            f"{path}: {numbers['samples']} samples can't be of {tokens.shape[1]} frames of {numbers['hop']};"
            " the token file is damaged, encode it again"
        )
    chunks = -(-tokens.shape[1] // numbers["chunk_frames"]) if numbers["chunk_frames"] else 1
    if scales is not None and (scales.shape != (chunks,) or not bool(torch.isfinite(scales).all())):
        raise InputError(f"{path}: scales of shape {tuple(scales.shape)}; expected {chunks} finite ones")


def _smallest(size: int) -> torch.dtype:
    """The smallest type that holds codes 0 to ``size - 1``."""
    if size <= 1 << 8:
        return torch.uint8
    return torch.int16 if size <= 1 << 15 else torch.int32
