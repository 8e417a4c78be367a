"""Random changes of a waveform for training: speed, tempo, pitch, room, noise, telephone, codecs, volume.

Every draw comes from the generator passed in, which the loader seeds with (seed, epoch, utterance id):
neither the number of workers nor a restart changes what an utterance sounds like in a given epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nar_speech.data.codecs import check_codecs, through_codec
from nar_speech.data.warp import change_pitch
from nar_speech.errors import ConfigError, ManifestError


@dataclass(frozen=True)
class AugmentConfig:
    """What may happen to a training utterance, and with what probability (0 turns a change off).

    Attributes:
        speed: factors, one of which is drawn uniformly (1.1 = faster, shorter and higher).
        noise: manifest of a noise CutSet (JSONL.gz), or None; mixed at ``noise_snr`` (low, high) dB.
        rir: manifest of room impulse responses, or None; then a synthetic room is drawn.
        rt60: seconds, range of the reverberation time of synthetic rooms.
        telephone_prob: band limit to 300..3400 Hz.
        warp_prob: change tempo and pitch apart from each other (a phase vocoder; slower than ``speed``).
        tempo: range of the factor of such a change (1.1 = faster at the same pitch).
        pitch: range in semitones.
        codec_prob: code and decode with one of ``codecs``, after noise, room and telephone band.
        codecs: names of :data:`nar_speech.data.codecs.CODECS`.
        silence: up to this many seconds of silence on either side, drawn uniformly.
        volume_db: range of the gain in dB.
    """

    speed: tuple[float, ...] = (0.9, 1.0, 1.1)
    noise: str | None = None
    noise_prob: float = 0.5
    noise_snr: tuple[float, float] = (5.0, 25.0)
    rir: str | None = None
    reverb_prob: float = 0.0
    rt60: tuple[float, float] = (0.1, 0.6)
    telephone_prob: float = 0.0
    silence: float = 0.0
    volume_prob: float = 0.5
    volume_db: tuple[float, float] = (-10.0, 6.0)
    warp_prob: float = 0.0
    tempo: tuple[float, float] = (0.9, 1.15)
    pitch: tuple[float, float] = (-2.0, 2.0)
    codec_prob: float = 0.0
    codecs: tuple[str, ...] = ("ulaw", "adpcm", "gsm", "vorbis", "mp3", "opus")

    def __post_init__(self) -> None:
        if not self.speed or min(self.speed) <= 0:
            raise ValueError(
                f"augment.speed: expected positive factors such as [0.9, 1.0, 1.1], got {self.speed}"
            )
        for name in (
            "noise_prob", "reverb_prob", "telephone_prob", "volume_prob", "warp_prob", "codec_prob"
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name}: a probability lies in [0, 1], got {getattr(self, name)}")
        if self.silence < 0 or self.rt60[0] <= 0:
            raise ValueError("augment.silence must not be negative and augment.rt60 must be positive")
        if not 0.5 <= self.tempo[0] <= self.tempo[1] <= 2 or not -12 <= self.pitch[0] <= self.pitch[1] <= 12:
            raise ValueError(
                "augment.tempo: a range within 0.5..2; augment.pitch: one within -12..12 semitones"
            )
        if self.codec_prob > 0:
            if not self.codecs:
                raise ValueError("augment.codecs: name at least one, or set codec_prob to 0")
            check_codecs(self.codecs)


NO_AUGMENT = AugmentConfig(speed=(1.0,), noise_prob=0.0, volume_prob=0.0)


class Augmenter:
    """Applies an :class:`AugmentConfig` to (N,) float32 waves at ``sample_rate``."""

    def __init__(self, config: AugmentConfig, sample_rate: int = 16000):
        self.config = config
        self.sample_rate = sample_rate
        self.noises = _open(config.noise, "augment.noise") if config.noise_prob > 0 else []
        self.rirs = _open(config.rir, "augment.rir") if config.reverb_prob > 0 else []

    def __call__(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A changed copy of ``wave``; its length changes with speed, tempo and added silence only."""
        config = self.config
        # All decisions are drawn first and always, so that turning one change off leaves the others alone.
        speed = config.speed[rng.integers(len(config.speed))]
        reverb, noise, telephone, volume = rng.random(4) < (
            config.reverb_prob,
            config.noise_prob,
            config.telephone_prob,
            config.volume_prob,
        )
        before, after = rng.random(2) * config.silence
        gain_db = rng.uniform(*config.volume_db)
        noise_rng, rir_rng = (np.random.default_rng(seed) for seed in rng.integers(2**63, size=2))
        warp, coded = rng.random(2) < (config.warp_prob, config.codec_prob)
        tempo, semitones, strength = rng.uniform(*config.tempo), rng.uniform(*config.pitch), rng.random()
        codec = config.codecs[rng.integers(len(config.codecs))] if config.codecs else None

        wave = change_speed(wave, speed)
        if warp:
            wave = change_pitch(wave, semitones, tempo)
        if config.silence > 0:
            wave = np.pad(wave, (int(before * self.sample_rate), int(after * self.sample_rate)))
        if reverb:
            wave = convolve(wave, self._impulse_response(rir_rng))
        if noise and len(self.noises):
            wave = mix_at_snr(wave, self._noise(len(wave), noise_rng), noise_rng.uniform(*config.noise_snr))
        if telephone:
            wave = band_limit(wave, self.sample_rate)
        if coded:
            wave = through_codec(wave, self.sample_rate, codec, strength)
        if volume:
            wave = wave * np.float32(10 ** (gain_db / 20))
        return np.clip(wave, -1.0, 1.0).astype(np.float32, copy=False)

    def _noise(self, length: int, rng: np.random.Generator) -> np.ndarray:
        source = load_wave(self.noises[int(rng.integers(len(self.noises)))], self.sample_rate)
        start = int(rng.integers(max(1, len(source) - length + 1)))
        return np.resize(source, length) if len(source) < length else source[start : start + length]

    def _impulse_response(self, rng: np.random.Generator) -> np.ndarray:
        if len(self.rirs):
            return load_wave(self.rirs[int(rng.integers(len(self.rirs)))], self.sample_rate)
        return synthetic_room(self.sample_rate, rng.uniform(*self.config.rt60), rng)


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Play ``wave`` ``factor`` times as fast (tempo and pitch together, by resampling)."""
    if factor == 1.0:
        return wave
    import soxr

    return soxr.resample(wave, 1000 * factor, 1000, quality="MQ")


def mix_at_snr(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add ``noise`` (N,) to ``wave`` (N,) with ``snr_db`` between their mean powers; silence stays clean."""
    wave_power, noise_power = float(np.mean(wave**2)), float(np.mean(noise**2))
    if wave_power <= 0 or noise_power <= 0:
        return wave
    return wave + noise * np.float32(np.sqrt(wave_power / noise_power / 10 ** (snr_db / 10)))


def synthetic_room(sample_rate: int, rt60: float, rng: np.random.Generator) -> np.ndarray:
    """A direct path, and noise 5 to 15 dB below it in energy that decays by 60 dB in ``rt60`` seconds."""
    length = max(2, int(rt60 * sample_rate))
    tail = rng.standard_normal(length).astype(np.float32)
    tail *= 10 ** (-3 * np.arange(length, dtype=np.float32) / length)
    tail[: max(1, int(0.002 * sample_rate))] = 0  # the first echo comes after 2 ms
    tail *= np.float32(np.sqrt(10 ** (-rng.uniform(5.0, 15.0) / 10) / max(float(np.sum(tail**2)), 1e-9)))
    tail[0] = 1.0
    return tail


def convolve(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve, keep the length, align to the response's strongest tap, keep the mean power."""
    delay = int(np.argmax(np.abs(response)))
    size = 1 << (len(wave) + len(response) - 2).bit_length()
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(response, size)
    wet = np.fft.irfft(spectrum, size)[delay : delay + len(wave)].astype(np.float32)
    power = float(np.mean(wet**2))
    return wet * np.float32(np.sqrt(float(np.mean(wave**2)) / power)) if power > 0 else wave


def band_limit(wave: np.ndarray, sample_rate: int, low: float = 300.0, high: float = 3400.0) -> np.ndarray:
    """Keep ``low``..``high`` Hz, as a telephone line does (4th-order Butterworth gain, zero phase)."""
    if high >= sample_rate / 2:
        raise ConfigError(
            f"augment.telephone_prob: needs a sample rate above {2 * high:.0f} Hz, got {sample_rate}"
        )
    size = 1 << (len(wave) + sample_rate // 20 - 1).bit_length()  # 50 ms of padding against wrap-around
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / sample_rate), 1e-3)
    gain = 1 / np.sqrt((1 + (low / frequency) ** 8) * (1 + (frequency / high) ** 8))
    return np.fft.irfft(np.fft.rfft(wave, size) * gain, size)[: len(wave)].astype(np.float32)


def load_wave(cut, sample_rate: int) -> np.ndarray:
    """(N,) float32 samples of a lhotse cut at ``sample_rate``, channels averaged; kept in a cache."""
    return _load_wave(_Key(cut), sample_rate)


class _Key:
    """Hashes a cut by its id, which lhotse's mutable cuts don't."""

    def __init__(self, cut):
        self.cut = cut

    def __hash__(self) -> int:
        return hash(self.cut.id)

    def __eq__(self, other) -> bool:
        return self.cut is other.cut or self.cut == other.cut


@lru_cache(maxsize=512)
def _load_wave(key: _Key, sample_rate: int) -> np.ndarray:
    return read_cut(key.cut, sample_rate)


def read_cut(cut, sample_rate: int) -> np.ndarray:
    """(N,) float32 samples of a lhotse cut at ``sample_rate``, channels averaged.

    Raises:
        ManifestError: the cut's audio can't be read; the message names the cut.
    """
    try:
        samples = cut.load_audio()
    except Exception as error:  # lhotse passes on whatever its back ends raise
        raise ManifestError(
            f"cut {cut.id}: its audio can't be read: {' '.join(str(error).split())}"
        ) from error
    wave = samples.mean(0) if samples.shape[0] > 1 else samples[0]
    if cut.sampling_rate != sample_rate:
        import soxr

        wave = soxr.resample(wave, cut.sampling_rate, sample_rate)
    return wave.astype(np.float32, copy=False)


def _open(manifest: str | None, field: str) -> list:
    """All cuts of a noise or RIR manifest (these are small); an empty list for None."""
    if manifest is None:
        return []
    cuts = list(open_cuts(manifest, field))
    if not cuts:
        raise ManifestError(f"{field}: {manifest} holds no cuts")
    return cuts


def open_cuts(manifest: str, field: str):
    """Open a lhotse CutSet manifest lazily.

    Raises:
        ManifestError: no such file, an empty one, or not a CutSet.
    """
    from pathlib import Path

    from lhotse import CutSet

    if not Path(manifest).is_file():
        raise ManifestError(f"{field}: no such manifest {manifest}; run the corpus' prepare.sh first")
    try:
        cuts = CutSet.from_file(manifest)
    except Exception as error:
        raise ManifestError(
            f"{field}: {manifest} is not a lhotse CutSet: {' '.join(str(error).split())}"
        ) from error
    if cuts is None:  # what lhotse makes of an empty file
        raise ManifestError(f"{field}: {manifest} is empty; run the corpus' prepare.sh again")
    return cuts
