"""Audio as it arrives on a socket: bytes of any size in, float32 samples in the model's rate out.

Everything that a piece of audio leaves behind is carried to the next one: half a sample, the filter of the
resampler. The samples that come out do not depend on how the bytes were cut.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import numpy as np

from nar_speech.errors import AudioError

RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000)
WIDTHS = {"u8": 1, "s16le": 2, "s24le": 3, "s32le": 4, "f32le": 4, "mulaw": 1, "alaw": 1}  # bytes a sample
NAMES = {"pcm16": "s16le", "pcm": "s16le", "f32": "f32le", "ulaw": "mulaw", "pcmu": "mulaw", "pcma": "alaw"}
ZERO_CROSSINGS = 16  # of the resampler's sinc to each side: 1 ms of delay at 16 kHz, -80 dB
ROLL_OFF, KAISER_BETA = 0.94, 9.0
LOUDEST = 256.0  # float samples beyond this are not audio


def encoding_named(name: str) -> str:
    """The key of :data:`WIDTHS` that ``name`` means.

    Raises:
        AudioError: an unknown encoding.
    """
    found = NAMES.get(name, name)
    if found not in WIDTHS:
        raise AudioError(f"encoding: got '{name}'; valid values: {', '.join([*WIDTHS, *NAMES])}")
    return found


class AudioIn:
    """Decoder and resampler of one stream.

    Args:
        encoding: a key of :data:`WIDTHS`.
        rate: of the bytes, one of :data:`RATES`.
        target: rate of the samples that come out.
        channels: interleaved; they are averaged.

    Raises:
        AudioError: an unknown encoding, a rate or a number of channels that is not supported.
    """

    def __init__(self, encoding: str, rate: int, target: int, channels: int = 1):
        self.encoding = encoding_named(encoding)
        if isinstance(rate, bool) or rate not in RATES:
            raise AudioError(f"rate: got {rate!r} Hz; valid values: {', '.join(map(str, RATES))}")
        if isinstance(channels, bool) or not isinstance(channels, int) or not 1 <= channels <= 8:
            raise AudioError(f"channels: got {channels!r}; must be 1 to 8")
        self.rate, self.target, self.channels = rate, target, channels
        self._frame = WIDTHS[self.encoding] * channels
        self._rest = b""
        self._resampler = None if rate == target else Resampler(rate, target)

    @property
    def bytes_per_second(self) -> int:
        """Of the incoming stream."""
        return self._frame * self.rate

    @property
    def pending(self) -> int:
        """Bytes of a sample that is not whole yet."""
        return len(self._rest)

    def feed(self, data: bytes) -> np.ndarray:
        """Samples (N,) float32 that ``data`` completes; N may be 0.

        Raises:
            AudioError: float samples that are NaN, infinite or far outside [-1, 1].
        """
        if self._rest:
            data = self._rest + data
        whole = len(data) - len(data) % self._frame
        self._rest = bytes(data[whole:])
        samples = decode(data[:whole], self.encoding)
        if self.channels > 1:
            samples = samples.reshape(-1, self.channels).mean(axis=1, dtype=np.float32)
        return samples if self._resampler is None else self._resampler.feed(samples)

    def flush(self) -> np.ndarray:
        """What the resampler still holds (N,); half a sample is dropped. The next audio starts afresh."""
        self._rest = b""
        return np.zeros(0, np.float32) if self._resampler is None else self._resampler.flush()


def decode(data: bytes | memoryview, encoding: str) -> np.ndarray:
    """Whole samples as (N,) float32 in [-1, 1].

    Raises:
        AudioError: float samples that are NaN, infinite or far outside [-1, 1].
    """
    if encoding == "s16le":
        return np.frombuffer(data, "<i2").astype(np.float32) * np.float32(1 / 32768)
    if encoding in ("mulaw", "alaw"):
        return companding_table(encoding)[np.frombuffer(data, np.uint8)]
    if encoding == "s32le":
        return np.frombuffer(data, "<i4").astype(np.float32) * np.float32(1 / (1 << 31))
    if encoding == "s24le":
        parts = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
        values = parts[:, 0] << 8 | parts[:, 1] << 16 | parts[:, 2] << 24
        return values.astype(np.float32) * np.float32(1 / (1 << 31))
    if encoding == "u8":
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) * np.float32(1 / 128)
    samples = np.frombuffer(data, "<f4").astype(np.float32)
    with np.errstate(invalid="ignore"):
        if not (np.abs(samples) <= LOUDEST).all():  # false for NaN too
            raise AudioError(
                "audio: float samples that are NaN, infinite or far outside [-1, 1];"
                " is this another encoding than f32le?"
            )
    return samples


@lru_cache(maxsize=2)
def companding_table(encoding: str) -> np.ndarray:
    """Float32 value of each byte of ``mulaw`` or ``alaw`` (ITU-T G.711)."""
    code = np.arange(256)
    if encoding == "mulaw":
        code = ~code & 0xFF
        magnitude = (((code & 0x0F) << 3) + 132 << (code >> 4 & 7)) - 132
        sign = np.where(code & 0x80, -1, 1)
    else:
        code = code ^ 0x55
        exponent, mantissa = code >> 4 & 7, (code & 0x0F) << 4
        magnitude = np.where(exponent == 0, mantissa + 8, (mantissa + 264) << np.maximum(exponent - 1, 0))
        sign = np.where(code & 0x80, 1, -1)
    return (sign * magnitude / 32768).astype(np.float32)


class Resampler:
    """Windowed sinc with state (polyphase): a sample comes out as soon as its filter is filled.

    soxr's stream holds up to 40 ms back at 24 kHz and 115 ms at 8 kHz, too much for live captions; this holds
    1 to 2 ms. N samples in give ceil(N * rate_out / rate_in) out after :meth:`flush`.
    """

    def __init__(self, rate: int, target: int):
        common = gcd(rate, target)
        self.up, self.down = target // common, rate // common
        self.table = filter_table(self.up, self.down)  # (up, taps)
        self.half = self.table.shape[1] // 2
        self._reset()

    def _reset(self) -> None:
        self._held = np.zeros(self.half - 1, np.float32)  # from input sample ``_base`` on
        self._base = 1 - self.half
        self._fed = self._made = 0

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """Samples (N,) float32 in the old rate; gives those of the new rate that are now known."""
        self._fed += len(samples)
        return self._make(samples, -((self.half - self._fed) * self.up // self.down))

    def flush(self) -> np.ndarray:
        """The samples that waited for more input, which is taken to be silence; starts afresh."""
        total = -(-self._fed * self.up // self.down)
        made = self._make(np.zeros(self.half + 1, np.float32), total)
        self._reset()
        return made

    def _make(self, samples: np.ndarray, until: int) -> np.ndarray:
        held = np.concatenate([self._held, samples])
        index = np.arange(self._made, max(until, self._made))
        first = index * self.down // self.up - self.half + 1 - self._base
        windows = np.lib.stride_tricks.sliding_window_view(held, 2 * self.half) if len(index) else held
        out = (
            np.einsum("nt,nt->n", windows[first], self.table[index * self.down % self.up])
            if len(index)
            else np.zeros(0, np.float32)
        )
        self._made += len(index)
        keep = self._made * self.down // self.up - self.half + 1
        self._held, self._base = held[max(keep - self._base, 0) :].copy(), max(keep, self._base)
        return out


@lru_cache(maxsize=32)
def filter_table(up: int, down: int) -> np.ndarray:
    """Weights (up, taps) of the input samples around an output sample, for each of its ``up`` phases."""
    cutoff = ROLL_OFF * min(1.0, up / down)  # in half the input rate
    half = int(np.ceil(ZERO_CROSSINGS / min(1.0, up / down)))
    # Output sample n lies at input position n * down / up = i + phase / up; tap t is input i - half + 1 + t.
    distance = np.arange(2 * half) - half + 1 - np.arange(up)[:, None] / up
    window = np.i0(KAISER_BETA * np.sqrt(np.maximum(1 - (distance / half) ** 2, 0))) / np.i0(KAISER_BETA)
    weights = cutoff * np.sinc(cutoff * distance) * window
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
