"""Files to tokens and back, in memory that does not grow with their length, and a report on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_speech.audio import AudioSource, read_audio, read_blocks, write_blocks
from nar_speech.codec.base import Codec
from nar_speech.codec.load import fingerprint, load_codec
from nar_speech.codec.tokens import TokenFile, read_tokens, write_tokens
from nar_speech.errors import AudioError, ConfigError, InputError
from nar_speech.metrics_audio import codebook_use, log_spectral_distance, mel_distance, si_sdr
from nar_speech.pipelines.transcribe import pick_device
from nar_speech.types import Audio, Codes

BLOCK_SECONDS = 10.0
REPORT_SECONDS = 120.0
SHORTEST_BLOCK, LONGEST_BLOCK = 0.001, 600.0

Progress = Callable[[float], Any]


@dataclass(frozen=True)
class CodecReport:
    """How a recording fared.

    Attributes:
        seconds: of the recording that were looked at.
        codebooks, frame_rate: of the tokens.
        bits_per_second: what they carry.
        si_sdr, mel_distance, log_spectral_distance: see :mod:`nar_speech.metrics_audio`.
        used, perplexity: of each codebook: share of codes that occur, perplexity of their frequencies.
    """

    source: str
    codec: str
    seconds: float
    codebooks: int
    frame_rate: float
    bits_per_second: float
    si_sdr: float
    mel_distance: float
    log_spectral_distance: float
    used: tuple[float, ...]
    perplexity: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; what is not finite becomes None."""
        plain = {}
        for key, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                value = None
            plain[key] = list(value) if isinstance(value, tuple) else value
        return plain

    def __str__(self) -> str:
        used = 100 * sum(self.used) / len(self.used)
        perplexity = sum(self.perplexity) / len(self.perplexity)
        return (
            f"{self.source}: {self.seconds:.1f} s, {self.bits_per_second / 1000:.2f} kbit/s, SI-SDR"
            f" {self.si_sdr:.2f} dB, mel distance {self.mel_distance:.3f}, log-spectral distance"
            f" {self.log_spectral_distance:.2f} dB, codes used {used:.1f} %, perplexity {perplexity:.1f}"
        )


class CodecRunner:
    """Encodes and decodes files with a codec.

    Args:
        codec: on the device where it runs.
        block_seconds: files are run in pieces of this length; the result does not depend on it.

    Raises:
        ConfigError: ``block_seconds`` is not between 1 ms and 10 min.
    """

    def __init__(self, codec: Codec, block_seconds: float = BLOCK_SECONDS):
        if not SHORTEST_BLOCK <= block_seconds <= LONGEST_BLOCK:
            raise ConfigError(
                f"block: got {block_seconds:g} s; must be {SHORTEST_BLOCK:g} to {LONGEST_BLOCK:g}"
            )
        self.codec, self.block_seconds = codec, block_seconds

    @classmethod
    def load(
        cls,
        name: str | Path = "default",
        device: str = "auto",
        cache_dir: str | Path | None = None,
        offline: bool | None = None,
        block_seconds: float = BLOCK_SECONDS,
    ) -> CodecRunner:
        """With a codec by name; see :func:`nar_speech.codec.load.load_codec`."""
        return cls(load_codec(name, pick_device(device), cache_dir, offline), block_seconds)

    def encode(
        self, source: AudioSource, num_codebooks: int | None = None, progress: Progress | None = None
    ) -> Codes:
        """Codes (B = 1, on the CPU) of a recording, resampled and mixed to what the codec wants.

        Args:
            progress: called with the seconds of each piece.

        Raises:
            AudioError: the recording can't be read. ConfigError: a number of codebooks it does not have.
        """
        codec = self.codec
        state = codec.init_encoder(1, codec.check_codebooks(num_codebooks))
        parts, samples = [], 0
        mono = codec.channels == 1
        for block in read_blocks(source, codec.sample_rate, self.block_seconds, mono=mono):
            wave = torch.from_numpy(np.ascontiguousarray(self._mixed(block)))[None]
            tokens, state = codec.encode_step(wave.to(codec.device), state)
            parts.append(tokens.cpu())
            samples += wave.shape[2]
            if progress is not None:
                progress(wave.shape[2] / codec.sample_rate)
        none = torch.zeros(1, codec.channels, 0, device=codec.device)
        tokens, state = codec.encode_step(none, state, True)
        parts.append(tokens.cpu())
        joined = torch.cat(parts, 2)
        scales = getattr(state, "scales", None)
        return Codes(
            tokens=joined,
            lengths=torch.tensor([joined.shape[2]]),
            sample_rate=codec.sample_rate,
            samples=torch.tensor([samples]),
            scales=None if scales is None or not scales.shape[1] else scales.cpu(),
            chunk_frames=codec.chunk_frames,
            codec=codec.name,
        )

    def decode_blocks(self, codes: Codes) -> Iterator[np.ndarray]:
        """The sound (C, n) of codes of one recording, piece by piece, as long as it was if that is known.

        Raises:
            InputError: codes of several recordings or of another codec, or scales that are missing.
        """
        codec = self.codec
        tokens, lengths, samples = codec.check_codes(codes)
        if len(tokens) != 1:
            raise InputError(
                f"codes of {len(tokens)} recordings; decode one, or all with codec.decode(codes)"
            )
        state = codec.init_decoder(1)
        if codes.scales is not None:
            state = codec.give_scales(state, codes.scales.to(codec.device))
        end, done = int(lengths[0]), 0
        most = math.inf if samples is None else int(samples[0])
        size = max(round(self.block_seconds * codec.frame_rate), 1)
        for begin in range(0, end, size):
            piece = tokens[:, :, begin : min(begin + size, end)]
            wave, state = codec.decode_step(piece, state, begin + size >= end)
            wave = wave[0, :, : int(min(wave.shape[2], most - done))]
            done += wave.shape[1]
            if wave.shape[1]:
                yield wave.cpu().numpy()

    def decode(self, codes: Codes) -> Audio:
        """The sound of codes of one recording; see :meth:`decode_blocks`."""
        samples = self._joined(codes)
        return Audio(samples[0] if self.codec.channels == 1 else samples, self.codec.sample_rate)

    def encode_file(
        self,
        source: AudioSource,
        target: str | Path,
        num_codebooks: int | None = None,
        progress: Progress | None = None,
    ) -> Codes:
        """Write the token file ``target`` of a recording.

        Raises:
            AudioError: the recording can't be read. InputError: the file can't be written.
        """
        codes = self.encode(source, num_codebooks, progress)
        try:
            write_tokens(target, codes, self.codec)
        except OSError as error:
            raise InputError(f"{target}: can't write ({error.strerror or error}); check the path") from error
        return codes

    def decode_file(self, source: str | Path, target: str | Path, progress: Progress | None = None) -> float:
        """Write the sound of a token file; the suffix of ``target`` names its format. Returns seconds.

        Raises:
            InputError: the token file is damaged, or of another codec. AudioError: it can't be written.
        """
        file = read_tokens(source)
        file.check(self.codec, source)
        rate, target = self.codec.sample_rate, Path(target)

        def blocks() -> Iterator[np.ndarray]:
            for block in self.decode_blocks(file.codes):
                yield block
                if progress is not None:
                    progress(block.shape[1] / rate)

        draft = target.with_name(f".part.{target.name}")
        try:
            written = write_blocks(draft, blocks(), rate, name=str(target))
            draft.replace(target)
        except OSError as error:
            raise AudioError(f"{target}: can't write ({error.strerror or error}); check the path") from error
        finally:
            draft.unlink(missing_ok=True)
        return written / rate

    def report(
        self,
        source: AudioSource,
        name: str,
        num_codebooks: int | None = None,
        seconds: float = REPORT_SECONDS,
        plot: str | Path | None = None,
    ) -> CodecReport:
        """Encode and decode the beginning of a recording and compare.

        Args:
            name: of the recording, for the report.
            seconds: looked at; metrics need both signals in memory.
            plot: a picture of both spectrograms is written there; its suffix names the format.

        Raises:
            AudioError: the recording can't be read. InputError: the picture can't be written.
        """
        codec = self.codec
        wave = read_audio(source, codec.sample_rate, mono=codec.channels == 1, duration=seconds).samples
        original = self._mixed(wave)
        codes = self.encode((original, codec.sample_rate), num_codebooks)
        decoded = self._joined(codes)
        tokens = codes.tokens[0]
        use = codebook_use(tokens, codec.codebook_size)
        length = original.shape[1] / codec.sample_rate
        if plot is not None:
            from nar_speech.pipelines.plot_codec import plot_codec

            plot_codec(original, decoded, codec.sample_rate, plot, f"{name}: {codec.name}")
        return CodecReport(
            source=name,
            codec=codec.name,
            seconds=length,
            codebooks=tokens.shape[0],
            frame_rate=codec.frame_rate,
            bits_per_second=tokens.numel() * math.log2(codec.codebook_size) / length,
            si_sdr=si_sdr(original, decoded),
            mel_distance=mel_distance(original, decoded, codec.sample_rate),
            log_spectral_distance=log_spectral_distance(original, decoded),
            used=tuple(item.used for item in use),
            perplexity=tuple(item.perplexity for item in use),
        )

    def _joined(self, codes: Codes) -> np.ndarray:
        """All blocks (C, N) of codes of one recording, N >= 0."""
        nothing = np.zeros((self.codec.channels, 0), np.float32)
        return np.concatenate([nothing, *self.decode_blocks(codes)], 1)

    def _mixed(self, block: np.ndarray) -> np.ndarray:
        """(N,) or (C, N) samples with the codec's channels: as they are, copied, or mixed down first."""
        block = block[None] if block.ndim == 1 else block
        if block.shape[0] != self.codec.channels:
            block = np.repeat(block.mean(0, keepdims=True), self.codec.channels, 0)
        return block


def describe_codec(codec: Codec) -> dict[str, Any]:
    """What a codec is, ready for JSON."""
    bits = math.log2(codec.codebook_size) * codec.frame_rate
    return {
        "codec": codec.name,
        "kind": type(codec).__name__.removesuffix("Codec").lower(),
        "sample_rate": codec.sample_rate,
        "channels": codec.channels,
        "hop": codec.hop,
        "frame_rate": codec.frame_rate,
        "codebooks": codec.num_codebooks,
        "codebook_size": codec.codebook_size,
        "bits_per_second_per_codebook": bits,
        "bits_per_second": bits * codec.num_codebooks,
        "streams": codec.can_stream,
        "delay_seconds": codec.delay / codec.sample_rate,
        "parameters": sum(p.numel() for p in codec.parameters()),
        "fingerprint": fingerprint(codec),
    }


def describe_tokens(file: TokenFile) -> dict[str, Any]:
    """What a token file holds, ready for JSON."""
    tokens: Tensor = file.codes.tokens[0]
    use = codebook_use(tokens, file.codebook_size)
    return {
        "codec": file.codes.codec,
        "fingerprint": file.fingerprint,
        "sample_rate": file.codes.sample_rate,
        "channels": file.channels,
        "seconds": file.seconds,
        "samples": int(file.codes.samples[0]),
        "frames": tokens.shape[1],
        "codebooks": tokens.shape[0],
        "codebook_size": file.codebook_size,
        "bits_per_second": file.bits_per_second,
        "bytes": file.bytes,
        "used": [item.used for item in use],
        "perplexity": [item.perplexity for item in use],
    }
