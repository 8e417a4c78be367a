"""Cutting long recordings at pauses, block by block, with Silero VAD (Silero Team, MIT licence).

The voice activity model is recurrent. To be fast it runs over many stretches of the recording at once, each
started two seconds early so that its state has settled; memory does not grow with the recording.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from nar_speech.errors import ConfigError
from nar_speech.model_folder import SegmentConfig

WINDOW = 512  # samples of one probability at 16 kHz; 256 at 8 kHz
LANE_WINDOWS = 256  # windows of one lane: 8 s
LANES = 32  # lanes run at once: 4.4 minutes
WARM_UP = 64  # windows a lane starts early: 2 s. Then 0.5 % of decisions differ from those of one long run.
HYSTERESIS = 0.15

Probabilities = Callable[[np.ndarray], np.ndarray]
"""(L, S, window) samples of L lanes to (L, S) speech probabilities, each lane from a fresh state."""


@dataclass(frozen=True)
class Piece:
    """Samples (N,) float32 to recognise in one go, and where they begin in the recording, in seconds."""

    start: float
    samples: np.ndarray


class SileroVad:
    """Speech probabilities; one instance serves any number of recordings, one at a time.

    Args:
        sample_rate: 8000, 16000 or a multiple of 16000.
    """

    def __init__(self, sample_rate: int):
        if sample_rate != 8000 and sample_rate % 16000:
            raise ConfigError(
                f"sample_rate: recordings of {sample_rate} Hz can't be cut at pauses; 8000 and multiples of"
                " 16000 can"
            )
        threads = torch.get_num_threads()
        with warnings.catch_warnings():  # about how it loads its model
            warnings.simplefilter("ignore", DeprecationWarning)
            from silero_vad import load_silero_vad

            self.model = load_silero_vad()
        torch.set_num_threads(threads)  # importing it sets one thread for the whole process
        self.step = max(sample_rate // 16000, 1)
        self.rate = 8000 if sample_rate == 8000 else 16000

    @torch.inference_mode()
    def __call__(self, lanes: np.ndarray) -> np.ndarray:
        """(L, S, window) samples to (L, S) probabilities."""
        self.model.reset_states()
        windows = torch.from_numpy(np.ascontiguousarray(lanes[:, :, :: self.step]))
        return torch.cat([self.model(windows[:, t], self.rate) for t in range(windows.shape[1])], 1).numpy()


@dataclass
class _Stretches:
    """Turns probabilities, window by window, into stretches of speech (first window, end window, hard).

    A hard end lies inside speech: the next stretch goes on there.
    """

    threshold: float
    min_speech: int
    min_silence: int
    longest: int
    position: int = 0
    start: int | None = None
    quiet: int | None = None
    history: list[float] = field(default_factory=list)  # probabilities since ``start``
    split: bool = False  # whether ``start`` is where a longer stretch was cut

    def feed(self, probabilities: Iterable[float]) -> Iterator[tuple[int, int, bool]]:
        for p in probabilities:
            at = self.position
            self.position += 1
            if self.start is None:
                if p < self.threshold:
                    continue
                self.start, self.quiet, self.history = at, None, []
            self.history.append(p)
            if p >= self.threshold:
                self.quiet = None
            elif p < self.threshold - HYSTERESIS and self.quiet is None:
                self.quiet = at
            if self.quiet is not None and at + 1 - self.quiet >= self.min_silence:
                yield from self._close(self.quiet)
            elif at + 1 - self.start >= self.longest:
                yield self._split()

    def finish(self) -> Iterator[tuple[int, int, bool]]:
        if self.start is not None:
            yield from self._close(self.position if self.quiet is None else self.quiet)

    def _close(self, end: int) -> Iterator[tuple[int, int, bool]]:
        if end - self.start >= self.min_speech or self.split:
            yield self.start, end, False
        self.start, self.quiet, self.split = None, None, False

    def _split(self) -> tuple[int, int, bool]:
        """Cut the running stretch where speech is least likely, in its second half."""
        half = len(self.history) // 2
        cut = half + int(np.argmin(self.history[half:]))
        result = (self.start, self.start + cut, True)
        self.start, self.history, self.split = self.start + cut, self.history[cut:], True
        return result


class Segmenter:
    """Cuts recordings of one sample rate.

    Args:
        vad: probabilities of lanes of windows; default: Silero VAD, loaded with the first long recording.
    """

    def __init__(self, config: SegmentConfig, sample_rate: int, vad: Probabilities | None = None):
        self.config, self.sample_rate, self.vad = config, sample_rate, vad
        self.window = WINDOW * sample_rate // 16000

    def __call__(self, blocks: Iterable[np.ndarray]) -> Iterator[Piece]:
        """Pieces of a recording given as (N,) blocks, in order, as soon as they are known.

        A recording of at most ``config.whole`` seconds is one piece; a longer one without speech gives none.
        """
        blocks = iter(blocks)
        head: list[np.ndarray] = []
        limit = round(self.config.whole * self.sample_rate)
        size = 0
        for block in blocks:
            head.append(block)
            size += len(block)
            if size > limit:
                break
        else:
            if size:
                yield Piece(0.0, np.concatenate(head))
            return
        if self.vad is None:
            self.vad = SileroVad(self.sample_rate)

        def everything() -> Iterator[np.ndarray]:
            yield from head
            head.clear()
            yield from blocks

        yield from self._long(everything())

    def _long(self, blocks: Iterator[np.ndarray]) -> Iterator[Piece]:
        config, window = self.config, self.window
        seconds = window / self.sample_rate
        stretches = _Stretches(
            config.threshold,
            max(round(config.min_speech / seconds), 1),
            max(round(config.min_silence / seconds), 1),
            max(round(config.longest / seconds), 2),
        )
        joined = _Joined(config, self.sample_rate, window)
        audio = np.zeros(0, dtype=np.float32)  # samples from ``base`` on
        base = done = 0  # samples before ``audio``; windows already judged
        warm = np.zeros((WARM_UP, window), dtype=np.float32)
        for chunk, last in self._chunks(blocks):
            audio = np.concatenate([audio, chunk])
            first = done * window - base
            count = (len(audio) - first) // window if not last else -(-(len(audio) - first) // window)
            windows = np.zeros((count, window), dtype=np.float32)
            fresh = audio[first : first + count * window]
            windows.reshape(-1)[: len(fresh)] = fresh
            found = list(stretches.feed(self._probabilities(warm, windows).tolist()))
            done += count
            warm = np.concatenate([warm, windows[-WARM_UP:]])[-WARM_UP:]
            if last:
                found += stretches.finish()
            for stretch in found:
                yield from joined.add(*stretch, audio, base)
            if last:
                yield from joined.flush(audio, base)
                return
            yield from joined.flush_if_past(done if stretches.start is None else stretches.start, audio, base)
            keep = joined.needed(done if stretches.start is None else stretches.start)
            audio, base = audio[max(keep - base, 0) :], max(keep, base)

    def _chunks(self, blocks: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
        """The recording in parts that fill all lanes, and whether it is the last one, which is shorter."""
        size = LANES * LANE_WINDOWS * self.window
        held: list[np.ndarray] = []
        filled = 0
        for block in blocks:
            held.append(block)
            filled += len(block)
            if filled >= size:
                samples = np.concatenate(held)
                whole = filled // size * size
                yield from ((part, False) for part in samples[:whole].reshape(-1, size))
                held, filled = [samples[whole:]], filled - whole
        yield np.concatenate([*held, np.zeros(0, dtype=np.float32)]), True

    def _probabilities(self, warm: np.ndarray, windows: np.ndarray) -> np.ndarray:
        """Speech probability of each of the windows (W, window), of which ``warm`` come before."""
        count = len(windows)
        if not count:
            return np.zeros(0, dtype=np.float32)
        lanes = -(-count // LANE_WINDOWS)
        steps = min(count, LANE_WINDOWS)
        padded = np.zeros((WARM_UP + lanes * steps, self.window), dtype=np.float32)
        padded[:WARM_UP] = warm
        padded[WARM_UP : WARM_UP + count] = windows
        index = np.arange(lanes)[:, None] * steps + np.arange(WARM_UP + steps)
        return self.vad(padded[index])[:, WARM_UP:].reshape(-1)[:count]


class _Joined:
    """Joins neighbouring stretches (in windows) into pieces (samples) and pads them."""

    def __init__(self, config: SegmentConfig, sample_rate: int, window: int):
        self.window, self.rate = window, sample_rate
        self.gap, self.merge = config.gap * sample_rate, config.merge * sample_rate
        self.pad = round(config.pad * sample_rate)
        self.current: tuple[int, int, bool, bool] | None = None  # begin, end, begin and end inside speech
        self.previous_end = 0
        self.hard = False  # whether the next stretch goes on inside speech

    def add(self, start: int, end: int, hard: bool, audio: np.ndarray, base: int) -> Iterator[Piece]:
        begin, stop = start * self.window, end * self.window
        hard_begin, self.hard = self.hard, hard
        if self.current is not None:
            first, last, first_hard, last_hard = self.current
            fits = stop - first <= self.merge and begin - last <= self.gap
            if fits and not last_hard:
                self.current = (first, stop, first_hard, hard)
                return
            yield from self.flush(audio, base, begin)
        self.current = (begin, stop, hard_begin, hard)

    def flush_if_past(self, window: int, audio: np.ndarray, base: int) -> Iterator[Piece]:
        """Give the open piece out where no stretch that begins at ``window`` or later can join it."""
        if self.current is not None:
            first, last, _, hard = self.current
            begin = window * self.window
            if begin - last > max(self.gap, self.pad) or begin - first > self.merge or hard:
                yield from self.flush(audio, base, begin)

    def flush(self, audio: np.ndarray, base: int, limit: int | None = None) -> Iterator[Piece]:
        """Give the open piece out; ``limit`` is the sample where speech may begin again."""
        if self.current is None:
            return
        first, last, first_hard, last_hard = self.current
        begin = first if first_hard else max(first - self.pad, self.previous_end)
        end = min(last if last_hard else last + self.pad, base + len(audio))
        end = end if limit is None else max(min(end, limit), last)
        self.current, self.previous_end = None, end
        if end > begin:
            yield Piece(begin / self.rate, audio[begin - base : end - base].copy())

    def needed(self, window: int) -> int:
        """First sample that may still be used, if the next stretch begins at ``window`` at the earliest."""
        next_begin = window * self.window - self.pad
        first = next_begin if self.current is None else min(self.current[0] - self.pad, next_begin)
        return max(first, 0)
