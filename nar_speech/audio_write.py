"""Write audio, and check arrays of samples; :mod:`nar_speech.audio` reads it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile

from nar_speech.errors import AudioError
from nar_speech.types import Audio

MIN_RATE, MAX_RATE = 1000, 768_000
MAX_CHANNELS = 256
WRITE_FRAMES = 1 << 16

logger = logging.getLogger(__name__)


def write_audio(
    target: str | Path | IO[bytes],
    audio: Audio | np.ndarray,
    sample_rate: int | None = None,
    format: str | None = None,
    subtype: str | None = None,
) -> None:
    """Write samples to a file; what exceeds [-1, 1] is clipped, and logged as a warning.

    Args:
        target: a path whose suffix names the format (wav, flac, ogg, mp3 ...), or a file object.
        audio: an :class:`Audio`, or an array (N,) or (C, N) with ``sample_rate``.
        format: libsndfile's name of the format; needed for file objects.
        subtype: libsndfile's name of the encoding; default 16 bit for wav and flac.

    Raises:
        AudioError: wrong samples, an unknown format, a target that can't be written.
    """
    where = name_of(target)
    if isinstance(audio, Audio):
        audio, sample_rate = audio.samples, audio.sample_rate
    if sample_rate is None:
        raise AudioError(f"{where}: sample_rate is needed to write a bare array")
    array = np.asarray(audio.detach().cpu() if is_tensor(audio) else audio)
    write_blocks(target, [array], sample_rate, format, subtype)


def write_blocks(
    target: str | Path | IO[bytes],
    blocks: Iterable[np.ndarray],
    sample_rate: int,
    format: str | None = None,
    subtype: str | None = None,
    name: str | None = None,
) -> int:
    """Write samples that come in blocks (N,) or (C, N) to a file; at least one, empty ones are left out.

    Args:
        target, format, subtype: see :func:`write_audio`.
        name: what messages call the target.

    Returns:
        Samples written of each channel.

    Raises:
        AudioError: as :func:`write_audio`; also blocks of different numbers of channels.
    """
    where = name or name_of(target)
    if format is None:
        suffix = Path(target).suffix[1:].upper() if isinstance(target, str | Path) else ""
        format = {"OPUS": "OGG", "AIF": "AIFF"}.get(suffix, suffix)
        subtype = subtype or ("OPUS" if suffix == "OPUS" else None)
    file, peak, written = None, 0.0, 0
    target = str(target) if isinstance(target, str | Path) else target
    try:
        for block in blocks:
            if np.shape(block)[-1:] == (0,) and file is not None:
                continue
            frames = from_array(block, sample_rate, where)
            peak = max(peak, float(np.abs(frames).max()))
            if file is None:
                if format.upper() not in soundfile.available_formats() or format.upper() == "RAW":
                    raise AudioError(
                        f"{where}: can't tell the format to write; use a suffix such as .wav or .flac, or"
                        " format="
                    )
                file = soundfile.SoundFile(target, "w", sample_rate, frames.shape[1], subtype, format=format)
            if frames.shape[1] != file.channels:
                raise AudioError(f"{where}: {frames.shape[1]} channels after {file.channels}; give as many")
            frames = frames.clip(-1.0, 1.0)
            # libsndfile's ogg writer crashes on a long piece.
            for begin in range(0, len(frames), WRITE_FRAMES):
                file.write(frames[begin : begin + WRITE_FRAMES])
            written += len(frames)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(
            f"{where}: can't write: {reason_of(error)}; check the folder and the format"
        ) from error
    finally:
        if file is not None:
            file.close()
    if peak > 1.0:
        logger.warning("%s: samples reach %.3g and are clipped to 1", where, peak)
    return written


def from_array(samples: Any, rate: int, where: str) -> np.ndarray:
    """Checked samples as (N, C) float32 in [-1, 1]. Integers are scaled by their type's range."""
    check_rate(rate, f"{where}: sample rate")
    if is_tensor(samples):
        samples = samples.detach().cpu().numpy()
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2):
        raise AudioError(
            f"{where}: array of shape {samples.shape}; expected (samples,) or (channels, samples)"
        )
    if samples.ndim == 2 and not 1 <= samples.shape[0] <= MAX_CHANNELS:
        raise AudioError(
            f"{where}: array of shape {samples.shape}; expected (channels, samples): transpose it?"
        )
    if samples.shape[-1] == 0:
        raise AudioError(f"{where}: holds no samples; use a recording that is not empty")
    if samples.dtype in (np.int8, np.int16, np.int32):
        samples = samples * np.float32(1.0 / (np.iinfo(samples.dtype).max + 1.0))
    elif samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128.0) / 128.0
    elif samples.dtype not in (np.float16, np.float32, np.float64):
        raise AudioError(f"{where}: array of {samples.dtype}; expected float, int16, int32, int8 or uint8")
    else:
        if not np.isfinite(samples).all():
            raise AudioError(f"{where}: NaN or infinite samples; repair the array")
        if np.abs(samples).max() > 256:
            raise AudioError(
                f"{where}: float samples reach {np.abs(samples).max():g}; divide to bring them to [-1, 1]"
            )
    samples = samples.astype(np.float32, copy=False)
    return samples[:, None] if samples.ndim == 1 else samples.T


def is_tensor(source: Any) -> bool:
    """Whether it is a torch tensor, without importing torch."""
    return hasattr(source, "detach") and hasattr(source, "cpu")


def check_rate(rate: int, where: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{where} is {rate} Hz; must be {MIN_RATE} to {MAX_RATE}")


def name_of(source: Any) -> str:
    """What to call a source in a message."""
    if isinstance(source, str | Path):
        return "standard input" if str(source) == "-" else str(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"audio ({len(source)} bytes)"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) and name else f"audio ({type(source).__name__})"


def reason_of(error: BaseException) -> str:
    """One line of why something failed, without the words that _name already says."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()).rstrip(".") or type(error).__name__
