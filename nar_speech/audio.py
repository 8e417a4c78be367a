"""Read, resample and write audio.

Everything comes out as float32 in [-1, 1]. libsndfile reads wav, flac, ogg, opus, mp3, aiff, au and more;
other containers (m4a, mp4, webm, mkv, aac, wma, amr) need PyAV: ``pip install 'nar-speech[av]'``.

A file is decoded and resampled block by block, so a long recording needs memory for its result only, and
:func:`read_blocks` not even for that. Every failure is an :class:`AudioError` that names the source.
Data that ends before its header says is used as far as it decodes, and logged as a warning.
"""

from __future__ import annotations

import abc
import io
import logging
import math
import os
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import soundfile
import soxr

from nar_speech.audio_write import MAX_CHANNELS, check_rate, from_array, is_tensor, name_of, reason_of
from nar_speech.audio_write import write_audio as write_audio
from nar_speech.audio_write import write_blocks as write_blocks
from nar_speech.errors import AudioError, MissingExtraError
from nar_speech.types import Audio

AudioSource: TypeAlias = "str | Path | IO[bytes] | bytes | np.ndarray | tuple[np.ndarray, int] | Audio"
"""A path ('-' is standard input), a binary file object, the bytes of a file, samples in the wanted rate,
(samples, rate), or an :class:`Audio`. Samples are (N,) or (C, N)."""

BLOCK_VALUES = 1 << 21  # values decoded at once: 44 s of stereo at 24 kHz, 8 MiB
SALVAGE_FRAMES = 1024  # step in which a damaged file is read up to its damage
VORBIS_TAIL_SECONDS = 30  # no page is that long: it holds at most 255 packets
UNKNOWN_FRAMES = 1 << 62  # libsndfile's sign for "the header does not say"

logger = logging.getLogger(__name__)

# First bytes of containers that libsndfile does not read and PyAV does: (offset, bytes).
_CONTAINERS = (
    (4, b"ftyp"),  # mp4, m4a, mov, 3gp
    (0, b"\x1aE\xdf\xa3"),  # webm, mkv
    (0, b"ADIF"),
    (0, b"\xff\xf1"),  # aac, ADTS
    (0, b"\xff\xf9"),
    (0, b"#!AMR"),
    (0, b"0&\xb2u\x8ef\xcf\x11"),  # wma, asf
    (0, b"FLV\x01"),
    (8, b"AVI "),
)

# Time stamps here are good to a millisecond after seeking; elsewhere what comes before is decoded too.
_EXACT_TIMES = ("mov,mp4", "matroska")


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says; ``frames`` and ``duration`` (seconds) are None where it does not say."""

    sample_rate: int
    channels: int
    frames: int | None
    duration: float | None
    format: str


def info(source: str | Path | IO[bytes] | bytes) -> AudioInfo:
    """Rate, channels, length and format of a file without decoding it.

    Raises:
        AudioError: the source is missing or not audio. MissingExtraError: its container needs PyAV.
    """
    with _open(source) as reader:
        duration = None if reader.frames is None else reader.frames / reader.sample_rate
        return AudioInfo(reader.sample_rate, reader.channels, reader.frames, duration, reader.format)


def read_audio(
    source: AudioSource,
    sample_rate: int = 16000,
    mono: bool = True,
    start: float = 0.0,
    duration: float | None = None,
) -> Audio:
    """Read, cut and resample one recording.

    Args:
        sample_rate: wanted rate in Hz; also the rate that a bare array is taken to have.
        mono: average the channels, else keep them.
        start: seconds to skip (by seeking: what comes before is not decoded).
        duration: seconds to read; default and at most all that is left.

    Returns:
        float32 samples (N,), or (C, N) when several channels are kept; N >= 1.

    Raises:
        AudioError: missing, a folder, empty, not audio, without samples, NaN or infinite samples, a wrong
            array, a rate outside 1 to 768 kHz, ``start`` behind the end.
        MissingExtraError: the file's container needs PyAV.
    """
    blocks = list(_blocks(source, sample_rate, mono, start, duration))
    samples = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    samples = samples[:, 0] if samples.shape[1] == 1 else samples.T
    return Audio(np.ascontiguousarray(samples), sample_rate)


def read_blocks(
    source: AudioSource,
    sample_rate: int = 16000,
    block_seconds: float = 30.0,
    start: float = 0.0,
    duration: float | None = None,
    mono: bool = True,
) -> Iterator[np.ndarray]:
    """Read a recording of any length in blocks of ``block_seconds`` seconds, the last one shorter.

    Joined, the blocks equal ``read_audio``: the resampler keeps its state from one block to the next.

    Yields:
        (N,) float32 samples, or (C, N) unless ``mono``.

    Raises:
        AudioError: as ``read_audio``.
    """
    size = round(block_seconds * sample_rate)
    if size < 1:
        raise AudioError(f"block_seconds: got {block_seconds:g}; must hold at least one sample")
    held: list[np.ndarray] = []
    filled = 0
    for block in _blocks(source, sample_rate, mono, start, duration):
        held.append(block)
        filled += len(block)
        if filled >= size:
            samples = np.concatenate(held)
            whole = filled // size * size
            for begin in range(0, whole, size):
                piece = samples[begin : begin + size]
                yield piece[:, 0] if mono else piece.T
            held, filled = [samples[whole:]], filled - whole
    if filled:
        samples = np.concatenate(held)
        yield samples[:, 0] if mono else samples.T


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Resample (N,) or (C, N) samples with soxr (high quality); float32, at least one sample comes out.

    Raises:
        AudioError: a wrong array, NaN or infinite samples, a rate outside 1 to 768 kHz.
    """
    frames = from_array(samples, rate, "samples")
    result = np.concatenate(list(_resampled(iter([frames]), rate, new_rate, "samples")))
    return result[:, 0] if np.ndim(samples) == 1 else np.ascontiguousarray(result.T)


def _blocks(
    source: AudioSource, sample_rate: int, mono: bool, start: float, duration: float | None
) -> Iterator[np.ndarray]:
    """Blocks (N, C) in the wanted rate; at least one sample in all."""
    where = name_of(source)
    check_rate(sample_rate, "sample_rate")
    if not (math.isfinite(start) and start >= 0):
        raise AudioError(f"{where}: start is {start:g}; must be 0 or more seconds")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise AudioError(f"{where}: duration is {duration:g}; must be more than 0 seconds")
    array = _as_array(source, sample_rate)
    if array is not None:
        samples, rate = array
        frames = from_array(samples, rate, where)
        first = round(start * rate)
        stop = None if duration is None else first + max(round(duration * rate), 1)
        if first >= len(frames):
            raise AudioError(f"{where}: start {start:g} s is behind the end at {len(frames) / rate:g} s")
        parts = iter([frames[first:stop]])
        yield from _resampled(_mixed(parts, mono), rate, sample_rate, where)
        return
    with _open(source) as reader:
        parts = _decoded(reader, start, duration, where)
        yield from _resampled(_mixed(parts, mono), reader.sample_rate, sample_rate, where)


def _decoded(reader: _Reader, start: float, duration: float | None, where: str) -> Iterator[np.ndarray]:
    """Blocks (N, C) of a file in its own rate, checked."""
    rate, frames = reader.sample_rate, reader.frames
    first = round(start * rate)
    wanted = None if duration is None else max(round(duration * rate), 1)
    if frames == 0:
        raise AudioError(f"{where}: holds no samples; use a recording that is not empty")
    if frames is not None and first >= frames:
        raise AudioError(f"{where}: start {start:g} s is behind the end at {frames / rate:g} s")
    size = max(BLOCK_VALUES // reader.channels, 1)
    done = 0
    for block in reader.blocks(first, size, wanted):
        if not np.isfinite(block).all():
            at = (first + done + int(np.argmax(~np.isfinite(block).all(1)))) / rate
            raise AudioError(f"{where}: NaN or infinite sample at {at:.3f} s; repair the file")
        done += len(block)
        yield block
    if not done:
        reason = f": {reader.damage}" if reader.damage else ""
        if start and not reader.damage:
            raise AudioError(f"{where}: nothing at {start:g} s; the data ends before")
        raise AudioError(f"{where}: no sample can be decoded{reason}; the file is damaged or cut off")
    promised = None if frames is None else min(frames - first, wanted or frames)
    short = promised is not None and done < promised - rate // 10  # lossy codecs' headers are not exact
    if reader.damage or short:
        reason = reader.damage or f"the header promises {promised / rate:.3f} s"
        logger.warning("%s: cut off or damaged, using %.3f s (%s)", where, done / rate, reason)


def _mixed(blocks: Iterator[np.ndarray], mono: bool) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block.mean(axis=1, keepdims=True) if mono and block.shape[1] > 1 else block


def _resampled(blocks: Iterator[np.ndarray], rate: int, new_rate: int, where: str) -> Iterator[np.ndarray]:
    """Blocks (N, C) in another rate, as if resampled in one piece."""
    check_rate(new_rate, f"{where}: new rate")
    if rate == new_rate:
        yield from blocks
        return
    stream = first = None
    count = 0
    for block in blocks:
        if stream is None:
            stream = soxr.ResampleStream(rate, new_rate, block.shape[1], dtype="float32", quality="HQ")
            first = block[:1]
        out = stream.resample_chunk(np.ascontiguousarray(block))
        count += len(out)
        if len(out):
            yield out
    out = stream.resample_chunk(first[:0], last=True)
    if len(out) or count:
        yield out
    else:  # one or two samples can resample to none
        yield first


class _Reader(abc.ABC):
    """One open file. ``damage`` says why decoding stopped early, if it did."""

    sample_rate: int
    channels: int
    frames: int | None
    format: str
    damage: str = ""

    @abc.abstractmethod
    def blocks(self, first: int, size: int, wanted: int | None) -> Iterator[np.ndarray]:
        """Blocks (<= size, C) float32 from frame ``first`` on, ``wanted`` frames or all."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close what the reader opened itself."""

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ForwardFile(soundfile.SoundFile):
    """A sound file whose reads do not seek, and whose name need not be UTF-8.

    ``SoundFile.read`` seeks to where it already is. An mp3 frame may hold its data in up to 511 bytes before
    it, which a seek forgets: at low bit rates every block would begin with silence.
    """

    def __init__(self, file: str | IO[bytes]):
        super().__init__(os.fsencode(file) if isinstance(file, str) and os.name == "posix" else file)

    def seekable(self) -> bool:
        """Keeps ``read`` from seeking; ``seek`` itself works."""
        return False

    def go_to(self, first: int) -> None:
        """Go to exactly this frame, through frames before it where libsndfile's seek needs help."""
        place = first
        if self.format == "MP3":  # for the reason above
            place = first - self.samplerate
        elif self.subtype == "VORBIS":  # a seek into the last page (a few seconds) lands in a wrong place
            place = min(first, self.frames - VORBIS_TAIL_SECONDS * self.samplerate)
        place = max(place, 0)
        if place:
            self.seek(place)
        if place < first:
            self.read(first - place)


class _SoundFileReader(_Reader):
    """libsndfile. ``file`` is a path or a seekable binary file object."""

    def __init__(self, file: str | IO[bytes], where: str):
        self.file, self.where = file, where
        try:
            self.sound = _ForwardFile(file)
        except (soundfile.SoundFileError, OSError, ValueError, TypeError, AttributeError) as error:
            message = (
                f"{where}: not audio that can be decoded ({reason_of(error)}); convert it to wav or flac"
            )
            raise AudioError(message) from error
        self.sample_rate, self.channels = self.sound.samplerate, self.sound.channels
        self.frames = self.sound.frames if 0 <= self.sound.frames < UNKNOWN_FRAMES else None
        self.format = f"{self.sound.format}/{self.sound.subtype}"
        # libsndfile shortens a cut wav file without a word; only its log tells.
        cut = re.search(r"^data : (\d+) \(should be (\d+)\)", self.sound.extra_info, re.M)
        streamed = cut and int(cut[1]) in (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000)  # written without knowing
        if cut and not streamed and int(cut[1]) > int(cut[2]):
            self.damage = f"the header promises {cut[1]} bytes, {cut[2]} are there"

    def blocks(self, first: int, size: int, wanted: int | None) -> Iterator[np.ndarray]:
        """Blocks (<= size, C) float32 from frame ``first`` on, ``wanted`` frames or all."""
        done = 0
        try:
            self.sound.go_to(first)
            while wanted is None or done < wanted:
                count = size if wanted is None else min(size, wanted - done)
                block = self.sound.read(count, dtype="float32", always_2d=True)
                if not len(block):
                    return
                done += len(block)
                yield block
            return
        except (soundfile.SoundFileError, OSError) as error:
            self.damage = reason_of(error)
        # The block with the damage is lost as a whole, so decode again and go up to it in small steps.
        if wanted is not None:
            size = min(size, wanted - done)
        yield from self._salvage(first + done, size)

    def _salvage(self, first: int, limit: int) -> Iterator[np.ndarray]:
        if not isinstance(self.file, str):
            self.file.seek(0)
        try:
            with _ForwardFile(self.file) as sound:
                sound.go_to(first)
                for _ in range(0, limit, SALVAGE_FRAMES):
                    block = sound.read(SALVAGE_FRAMES, dtype="float32", always_2d=True)
                    if not len(block):
                        return
                    yield block
        except (soundfile.SoundFileError, OSError):
            return  # the damage that is already noted

    def close(self) -> None:
        """Close the sound file; a file object given by the caller stays open."""
        self.sound.close()


class _AvReader(_Reader):
    """FFmpeg through PyAV: containers that libsndfile does not read."""

    def __init__(self, file: str | IO[bytes], where: str):
        try:
            import av
        except ImportError as error:
            raise MissingExtraError("av", "av", f"{where}: reading this container") from error
        self.av, self.where = av, where
        try:
            self.container = av.open(file)
            streams = self.container.streams.audio
        except (av.FFmpegError, OSError, ValueError) as error:
            raise AudioError(
                f"{where}: can't be decoded ({reason_of(error)}); convert it to wav or flac"
            ) from error
        if not streams:
            self.container.close()
            raise AudioError(f"{where}: holds no audio track; use a file with sound")
        self.stream = streams[0]
        self.sample_rate, self.channels = self.stream.rate or 0, self.stream.channels
        self.format = f"{self.container.format.name}/{self.stream.codec_context.name}"
        if self.stream.duration is not None and self.stream.time_base is not None:
            self.frames = round(float(self.stream.duration * self.stream.time_base) * self.sample_rate)
        elif self.container.duration is not None:
            self.frames = round(self.container.duration / self.av.time_base * self.sample_rate)
        else:
            self.frames = None

    def blocks(self, first: int, size: int, wanted: int | None) -> Iterator[np.ndarray]:
        """Blocks of one packet (N, C) float32 from frame ``first`` on, ``wanted`` frames or all."""
        resampler = self.av.AudioResampler(format="fltp", layout=self.stream.layout, rate=self.sample_rate)
        done = 0
        try:
            seeking = first > 0 and self.container.format.name.startswith(_EXACT_TIMES)
            if seeking:  # a little early: decoders need some packets to settle
                self.container.seek(int(max(first / self.sample_rate - 0.5, 0) * self.av.time_base))
            place = None
            for frame in self.container.decode(self.stream):
                if place is None:  # time 0 is where the track begins
                    origin = float((self.stream.start_time or 0) * self.stream.time_base)
                    place = round(((frame.time or 0.0) - origin) * self.sample_rate) if seeking else 0
                for converted in resampler.resample(frame):
                    block = converted.to_ndarray().T
                    skip = max(first - place, 0)
                    place += len(block)
                    block = block[skip : None if wanted is None else skip + wanted - done]
                    if len(block):
                        done += len(block)
                        yield block
                if done == wanted:
                    return
        except (self.av.FFmpegError, OSError, ValueError) as error:
            self.damage = reason_of(error)

    def close(self) -> None:
        """Close the container."""
        self.container.close()


def _open(source: str | Path | IO[bytes] | bytes) -> _Reader:
    """A reader for a path, file object or bytes, chosen by the first bytes."""
    where = name_of(source)
    file = _as_file(source, where)
    try:
        if isinstance(file, str):
            with open(file, "rb") as handle:
                head = handle.read(16)
        else:
            file.seek(0)
            head = file.read(16)
            file.seek(0)
    except (OSError, ValueError) as error:
        raise AudioError(f"{where}: can't be read: {reason_of(error)}; check path and permissions") from error
    if not isinstance(head, bytes):
        raise AudioError(f"{where}: the file object gives text; open it with mode 'rb'")
    if not head:
        raise AudioError(f"{where}: is empty (0 bytes); use a recording")
    if head.lstrip()[:1] == b"<":  # no audio begins so, and libsndfile's MP3 decoder would chatter about it
        raise AudioError(f"{where}: is a web page, not audio; download the recording, not the page about it")
    container = any(head[offset : offset + len(magic)] == magic for offset, magic in _CONTAINERS)
    reader = (_AvReader if container else _SoundFileReader)(file, where)
    try:
        check_rate(reader.sample_rate, f"{where}: sample rate")
        if not 1 <= reader.channels <= MAX_CHANNELS:
            raise AudioError(f"{where}: {reader.channels} channels; can read 1 to {MAX_CHANNELS}")
    except AudioError:
        reader.close()
        raise
    return reader


def _as_file(source: Any, where: str) -> str | IO[bytes]:
    """A path of a regular file, or a seekable binary file object."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if isinstance(source, str | Path):
        if str(source) == "-":
            if sys.stdin is None:
                raise AudioError("standard input: is closed; send a recording, or name a file")
            return io.BytesIO(sys.stdin.buffer.read())
        path = Path(source)
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise AudioError(f"{where}: no such file; check the path") from error
        if stat.S_ISDIR(mode):
            raise AudioError(f"{where}: is a folder; give the files in it")
        if stat.S_ISFIFO(mode):
            return io.BytesIO(path.read_bytes())
        if not stat.S_ISREG(mode):
            raise AudioError(f"{where}: is not a regular file; give an audio file")
        if path.suffix.lower() == ".raw":
            raise AudioError(
                f"{where}: has no header, so its format is unknown; convert it to wav, or give an array"
            )
        return str(path)
    if hasattr(source, "read"):
        seekable = getattr(source, "seekable", None)
        if seekable is not None and seekable() and hasattr(source, "tell"):
            return source
        data = source.read()
        if not isinstance(data, bytes):
            raise AudioError(f"{where}: the file object gives text; open it with mode 'rb'")
        return io.BytesIO(data)
    kind = type(source).__name__
    raise AudioError(f"{where}: can't read audio from {kind}; give a path, file, bytes, array or Audio")


def _as_array(source: Any, sample_rate: int) -> tuple[Any, int] | None:
    """(samples, rate) if the source is not a file."""
    if isinstance(source, Audio):
        return source.samples, source.sample_rate
    if isinstance(source, tuple):
        if len(source) != 2 or isinstance(source[1], bool) or not isinstance(source[1], int | np.integer):
            raise AudioError("audio: a pair must be (array, sample rate in whole Hz)")
        return source[0], int(source[1])
    if isinstance(source, np.ndarray) or is_tensor(source):
        return source, sample_rate
    return None
