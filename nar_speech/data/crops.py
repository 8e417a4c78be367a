"""Random pieces of recordings, all of one length: what codecs and vocoders train on."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nar_speech.data.augment import open_cuts, read_cut
from nar_speech.data.seeding import derive_seed
from nar_speech.errors import ManifestError


@dataclass(frozen=True)
class CropConfig:
    """Which recordings, and what is cut out of them.

    Attributes:
        train, dev: lhotse CutSet manifests (JSONL or JSONL.gz).
        weights: share of each training manifest, any positive numbers; None: by hours of audio.
        seconds: length of a piece; shorter recordings get silence around them.
        dev_seconds: of the pieces for validation, from the start of each recording.
        batch_size: pieces in a batch of one process.
        gain_db: range of the random gain of a piece; what would clip is turned down.
        workers: processes that read audio; 0 does it in the training process.
        prefetch: batches each worker prepares ahead.
    """

    train: list[str] = field(default_factory=list)
    dev: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    sample_rate: int = 16000
    seconds: float = 1.0
    dev_seconds: float = 4.0
    batch_size: int = 16
    gain_db: tuple[float, float] = (-12.0, 6.0)
    workers: int = 1
    prefetch: int = 8

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.dev_seconds <= 0 or self.batch_size < 1:
            raise ValueError("data.seconds, data.dev_seconds, data.batch_size: must be positive")
        if self.weights is not None and (len(self.weights) != len(self.train) or min(self.weights) <= 0):
            raise ValueError("data.weights: give a positive number for each manifest of data.train")


@dataclass
class CropBatch:
    """``waves`` (B, N) float32 of pieces, N samples each."""

    waves: Tensor
    sample_rate: int

    @property
    def seconds(self) -> float:
        """Seconds of audio."""
        return self.waves.numel() / self.sample_rate

    def to(self, device: torch.device | str) -> CropBatch:
        """The same batch on ``device``."""
        return CropBatch(self.waves.to(device, non_blocking=True), self.sample_rate)


class CropData:
    """Endless stream of batches of this process; batch n depends on the seed and n alone.

    Args:
        multiple: pieces are this many samples, or a multiple of it (the hop of a codec).
        seed, rank, world_size: rank r of W takes the batches r, r + W, ...
    """

    def __init__(
        self, config: CropConfig, multiple: int = 1, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.config, self.rank, self.world_size = config, rank, world_size
        self._reader = _Reader(config, multiple, seed)
        self._done = 0  # batches handed out to all processes

    def state_dict(self) -> dict:
        """Position: {"batches"} handed out so far, of all processes together."""
        return {"batches": self._done}

    def load_state_dict(self, state: dict) -> None:
        """Go to a position; the next ``iter`` starts there."""
        self._done = int(state["batches"])

    def sample(self, seconds: float) -> Tensor:
        """About so many seconds of other pieces (B, N), the same in every process; the position stays."""
        count = max(1, round(seconds / self.config.seconds / self.config.batch_size))
        return torch.cat([self._reader.read("sample", number) for number in range(count)])

    def __iter__(self) -> Iterator[CropBatch]:
        first = self._done
        loader = torch.utils.data.DataLoader(
            self._reader,
            sampler=_Count(first + self.rank, self.world_size),
            batch_size=None,
            num_workers=self.config.workers,
            prefetch_factor=self.config.prefetch if self.config.workers else None,
            worker_init_fn=_start_worker,
        )
        for waves in loader:
            self._done += self.world_size
            yield CropBatch(waves, self.config.sample_rate)


class CropEval:
    """The beginnings of the development recordings, one batch after the other, without changes."""

    def __init__(self, config: CropConfig, multiple: int = 1, rank: int = 0, world_size: int = 1):
        if not config.dev:
            raise ManifestError("data.dev: name at least one CutSet manifest")
        self.config, self._size = config, _samples(config.dev_seconds, config.sample_rate, multiple)
        cuts = [cut for manifest in config.dev for cut in open_cuts(manifest, "data.dev")]
        if not cuts:
            raise ManifestError(f"data.dev: {', '.join(config.dev)} hold no recordings")
        self._cuts = cuts[rank::world_size]

    def __iter__(self) -> Iterator[CropBatch]:
        for begin in range(0, len(self._cuts), self.config.batch_size):
            group = self._cuts[begin : begin + self.config.batch_size]
            waves = [_piece(cut, 0.0, self._size, self.config.sample_rate, 0.0) for cut in group]
            yield CropBatch(torch.from_numpy(np.stack(waves)), self.config.sample_rate)


class _Reader:
    """Batch number -> waves (B, N); runs in the DataLoader's workers."""

    def __init__(self, config: CropConfig, multiple: int, seed: int):
        if not config.train:
            raise ManifestError("data.train: name at least one CutSet manifest")
        self.config, self.seed = config, seed
        self.size = _samples(config.seconds, config.sample_rate, multiple)
        self.sets = [list(open_cuts(manifest, "data.train")) for manifest in config.train]
        for manifest, cuts in zip(config.train, self.sets, strict=True):
            if not cuts:
                raise ManifestError(f"data.train: {manifest} holds no recordings")
        hours = [np.cumsum([cut.duration for cut in cuts]) for cuts in self.sets]
        self.inside = [part / part[-1] for part in hours]
        shares = np.asarray(config.weights if config.weights is not None else [part[-1] for part in hours])
        self.shares = np.cumsum(shares) / shares.sum()

    def __getitem__(self, number: int) -> Tensor:
        return self.read("crops", number)

    def read(self, purpose: str, number: int) -> Tensor:
        """The pieces (B, N) of one batch; each purpose has batches of its own."""
        rng = np.random.default_rng(derive_seed(self.seed, purpose, number))
        return torch.from_numpy(np.stack([self._draw(rng) for _ in range(self.config.batch_size)]))

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        part = int(np.searchsorted(self.shares, rng.random(), side="right"))
        cut = self.sets[part][int(np.searchsorted(self.inside[part], rng.random(), side="right"))]
        spare = cut.duration - self.size / self.config.sample_rate
        wave = _piece(cut, rng.random() * max(spare, 0.0), self.size, self.config.sample_rate, rng.random())
        gain = 10 ** (rng.uniform(*self.config.gain_db) / 20)
        return (wave * min(gain, 0.99 / max(float(np.abs(wave).max()), 1e-9))).astype(np.float32)


class _Count(torch.utils.data.Sampler):
    def __init__(self, first: int, step: int):
        self.first, self.step = first, step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first, self.step)


def _samples(seconds: float, sample_rate: int, multiple: int) -> int:
    return max(1, round(seconds * sample_rate / multiple)) * multiple


def _piece(cut, offset: float, size: int, sample_rate: int, place: float) -> np.ndarray:
    """``size`` samples of a cut from ``offset`` s on; a shorter one at ``place`` (0 to 1) in silence."""
    if offset > 0 or cut.duration > size / sample_rate:
        cut = cut.truncate(offset=offset, duration=min(size / sample_rate, cut.duration - offset))
    wave = read_cut(cut, sample_rate)[:size]
    spare = size - len(wave)
    before = int(spare * place)
    return np.pad(wave, (before, spare - before))


def _start_worker(_: int) -> None:
    """One thread, and no death by a signal to the whole group: the training process stops and ends us."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
