"""Send a waveform through a real speech or music codec, in memory, as an augmentation.

The coders are libsndfile's (through soundfile), so no program is started and no file is written. G.711 mu-law
and A-law, GSM 06.10 full rate, IMA ADPCM and G.721/G.723 ADPCM work at 8 kHz as on telephone lines; Opus,
Vorbis and MP3 at 16 kHz and low bit rates as in messengers and old podcasts. On one core Opus takes 1/30 of
the sound's duration, MP3 and G.72x 1/190, GSM and Vorbis 1/370, the others less than 1/1500.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from nar_speech.errors import ConfigError


@dataclass(frozen=True)
class Codec:
    """A libsndfile coder.

    Attributes:
        container, subtype: what soundfile calls them.
        sample_rate: Hz at which it codes.
        levels: range of libsndfile's compression level (0 best, 1 smallest), or None where it has none.
    """

    container: str
    subtype: str
    sample_rate: int
    levels: tuple[float, float] | None = None


# With the bit rates of speech that were measured, in kbit/s.
CODECS = {
    "ulaw": Codec("WAV", "ULAW", 8000),  # 64
    "alaw": Codec("WAV", "ALAW", 8000),  # 64
    "adpcm": Codec("WAV", "IMA_ADPCM", 8000),  # 33
    "g721": Codec("AU", "G721_32", 8000),  # 32
    "g723": Codec("AU", "G723_24", 8000),  # 24
    "gsm": Codec("WAV", "GSM610", 8000),  # 13
    "vorbis": Codec("OGG", "VORBIS", 16000, (0.9, 1.0)),  # 25
    "mp3": Codec("MP3", "MPEG_LAYER_III", 16000, (0.7, 0.9)),  # 24 to 27
    "opus": Codec("OGG", "OPUS", 16000, (0.9, 1.0)),  # 7 to 32
}


def check_codecs(names: tuple[str, ...]) -> None:
    """Raise unless every name is known and this libsndfile has its coder.

    Raises:
        ConfigError: an unknown name, or a coder that the installed libsndfile lacks.
    """
    import soundfile

    for name in names:
        if name not in CODECS:
            raise ConfigError(f"augment.codecs: unknown codec '{name}'; valid names: {', '.join(CODECS)}")
        codec = CODECS[name]
        if codec.container not in soundfile.available_formats() or (
            codec.subtype not in soundfile.available_subtypes(codec.container)
        ):
            raise ConfigError(
                f"augment.codecs: libsndfile {soundfile.__libsndfile_version__} can't write {name}; "
                "install soundfile >= 0.13 with a newer libsndfile, or take it out of the list"
            )


def through_codec(wave: np.ndarray, sample_rate: int, name: str, strength: float = 0.5) -> np.ndarray:
    """Code and decode ``wave``.

    Args:
        wave: (N,) float32 in [-1, 1].
        sample_rate: of ``wave``, Hz.
        name: one of :data:`CODECS`.
        strength: 0..1, from the best to the smallest of the codec's bit rates; those with one rate ignore it.

    Returns:
        (N,) float32 at ``sample_rate``, in step with ``wave``.
    """
    import soundfile
    import soxr

    if len(wave) == 0:
        return wave
    codec = CODECS[name]
    coded = wave if sample_rate == codec.sample_rate else soxr.resample(wave, sample_rate, codec.sample_rate)
    level = None
    if codec.levels is not None:
        low, high = codec.levels
        level = low + (high - low) * strength
    buffer = io.BytesIO()
    soundfile.write(
        buffer,
        np.clip(coded, -1.0, 1.0),
        codec.sample_rate,
        format=codec.container,
        subtype=codec.subtype,
        compression_level=level,
    )
    buffer.seek(0)
    decoded, rate = soundfile.read(buffer, dtype="float32")
    if rate != sample_rate:
        decoded = soxr.resample(decoded, rate, sample_rate)
    out = np.zeros(len(wave), np.float32)  # block coders add a few samples at the end
    out[: len(decoded)] = decoded[: len(wave)]
    return out
