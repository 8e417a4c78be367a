"""Lhotse manifests in, :class:`~nar_speech.data.batch.Batch` out: an endless, resumable training stream
and a fixed list of evaluation batches.

The training stream is one sequence of batches that depends on the manifests and the seed alone. Rank r of W
processes takes the batches r, r + W, r + 2W, ..., so W processes see what one process with W times the
gradient accumulation sees, and a position in the stream means the same for every W.
"""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nar_speech.data.augment import NO_AUGMENT, AugmentConfig, Augmenter, open_cuts, read_cut
from nar_speech.data.batch import Batch, collate
from nar_speech.data.seeding import derive_seed
from nar_speech.errors import ManifestError

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class DataConfig:
    """Which utterances, and how they are put into batches.

    Attributes:
        train, dev: lhotse CutSet manifests (JSONL or JSONL.gz); several are mixed in random order.
        batch_seconds: most seconds of audio in one batch of one process, padding included.
        batch_size: most utterances in one batch, or None.
        min_seconds, max_seconds: shorter and longer training utterances are left out.
        max_tokens_per_second: utterances with more tokens a second are left out (CTC needs a frame for
            each token), or None.
        quadratic_seconds: lhotse's penalty for long utterances (15 to 40 for attention), or None.
        buckets, buffer_size: duration buckets, and utterances held for shuffling.
        workers: processes that read and augment audio; 0 does it in the training process.
        prefetch: batches each worker prepares ahead.
    """

    train: list[str] = field(default_factory=list)
    dev: list[str] = field(default_factory=list)
    sample_rate: int = 16000
    batch_seconds: float = 120.0
    batch_size: int | None = None
    min_seconds: float = 0.2
    max_seconds: float = 20.0
    max_tokens_per_second: float | None = None
    quadratic_seconds: float | None = None
    buckets: int = 20
    buffer_size: int = 20000
    workers: int = 1
    prefetch: int = 8


class TrainData:
    """Endless stream of training batches of this process.

    Args:
        config: see :class:`DataConfig`.
        tokenize: transcript to token ids; runs in the workers.
        augment: changes of the waveform, or None.
        seed: of order and augmentation.
        rank, world_size: of this process.
        group: batches of one optimizer step over all processes (world size x accumulation); lhotse draws them
            from one duration bucket, so that no process waits for another.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenize: Tokenize,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        group: int = 1,
    ):
        if not config.train:
            raise ManifestError("data.train: name at least one CutSet manifest")
        self.config, self.seed, self.rank, self.world_size, self.group = config, seed, rank, world_size, group
        self._reader = _Reader(tokenize, augment or NO_AUGMENT, seed, config.sample_rate)
        self._cuts = open_many(config.train, "data.train", seed)
        self._epoch = 0  # of the next global batch
        self._batch = 0  # number of that batch in its epoch

    def state_dict(self) -> dict:
        """Position after the batches handed out so far: {"epoch", "batch"}, the same in every process."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict) -> None:
        """Go to a position; the next ``iter`` starts there."""
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    @property
    def epoch(self) -> int:
        """Passes over the data completed so far."""
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        plan = _Plan(self)
        for batch, after in _loader(self._reader, plan, self.config):
            self._epoch, self._batch = after
            yield batch

    def plan(self) -> Iterator[tuple[tuple[int, int], int, object]]:
        """All batches of all processes from here on: ((epoch, batch) after it, epoch, CutSet)."""
        sampler = _sampler(self._cuts, self.config, self.seed, self.group)
        if self.config.max_tokens_per_second is not None:
            sampler.filter(_TokenRate(self._reader.tokenize, self.config.max_tokens_per_second))
        skip = self._batch
        for epoch in itertools.count(self._epoch):
            sampler.set_epoch(epoch)
            count = 0
            for count, cuts in enumerate(sampler, 1):
                if count > skip:
                    yield (epoch, count), epoch, cuts
            if count == 0:
                raise ManifestError(
                    f"data.train: no utterance of {', '.join(self.config.train)} passes data.min_seconds, "
                    "data.max_seconds and data.max_tokens_per_second"
                )
            skip = 0


class EvalData:
    """The evaluation batches of this process: no augmentation, sorted by length, the same in every pass.

    Args:
        cuts: lhotse cuts to use instead of those of ``config.dev``.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenize: Tokenize,
        rank: int = 0,
        world_size: int = 1,
        cuts: list | None = None,
    ):
        self.config = config
        self._reader = _Reader(tokenize, NO_AUGMENT, 0, config.sample_rate)
        if cuts is None:
            if not config.dev:
                raise ManifestError("data.dev: name at least one CutSet manifest")
            cuts = list(open_many(config.dev, "data.dev", 0))
        if not cuts:
            raise ManifestError(f"data.dev: {', '.join(config.dev)} hold no utterances")
        cuts = sorted(cuts, key=lambda cut: (cut.duration, cut.id))
        self._requests = [((0, 0), 0, group) for group in _pack(cuts, config)][rank::world_size]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in _loader(self._reader, self._requests, self.config):
            yield batch


def open_many(manifests: Sequence[str], where: str, seed: int):
    """One lazy CutSet of several manifests, mixed in proportion to their sizes."""
    from lhotse import CutSet

    sets = [open_cuts(manifest, where) for manifest in manifests]
    if len(sets) == 1:
        return sets[0]
    sizes = [sum(1 for _ in cuts) for cuts in sets]
    return CutSet.mux(*sets, weights=[max(1, size) for size in sizes], seed=derive_seed(seed, "mux") % 2**31)


def text_of(cut) -> str:
    """The transcript of a cut: the texts of its supervisions in order of time."""
    return " ".join(s.text.strip() for s in sorted(cut.supervisions, key=lambda s: s.start) if s.text)


def written_of(cut) -> str | None:
    """The transcript with case and punctuation, where every supervision of the cut has one."""
    parts = [(s.custom or {}).get("written") for s in sorted(cut.supervisions, key=lambda s: s.start)]
    return " ".join(parts) if parts and all(parts) else None


class _Reader:
    """Turns (epoch, cuts) into a batch; runs in the DataLoader's workers."""

    def __init__(self, tokenize: Tokenize, augment: AugmentConfig, seed: int, sample_rate: int):
        self.tokenize, self.seed, self.sample_rate = tokenize, seed, sample_rate
        self.augmenter = None if augment == NO_AUGMENT else Augmenter(augment, sample_rate)

    def __getitem__(self, request: tuple) -> tuple[Batch, tuple[int, int]]:
        after, epoch, cuts = request
        cuts = list(cuts)
        waves = [self._wave(cut, epoch) for cut in cuts]
        texts = [text_of(cut) for cut in cuts]
        tokens = [self.tokenize(text) for text in texts]
        written = [written_of(cut) for cut in cuts]
        return collate(waves, tokens, [cut.id for cut in cuts], texts, self.sample_rate, written), after

    def _wave(self, cut, epoch: int) -> np.ndarray:
        wave = read_cut(cut, self.sample_rate)
        if self.augmenter is None:
            return wave
        return self.augmenter(wave, np.random.default_rng(derive_seed(self.seed, "augment", epoch, cut.id)))


class _Plan:
    """The requests of one process: every ``world_size``-th batch of the stream, starting at ``rank``."""

    def __init__(self, data: TrainData):
        self.data = data

    def __iter__(self):
        world = self.data.world_size
        stream = self.data.plan()
        while True:
            turn = list(itertools.islice(stream, world))
            _, epoch, cuts = turn[self.data.rank]
            yield turn[-1][0], epoch, cuts  # the position after all processes' batches of this turn


class _TokenRate:
    """Keeps cuts with at most ``limit`` tokens a second."""

    def __init__(self, tokenize: Tokenize, limit: float):
        self.tokenize, self.limit = tokenize, limit

    def __call__(self, cut) -> bool:
        return len(self.tokenize(text_of(cut))) <= self.limit * cut.duration


class _Durations:
    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def __call__(self, cut) -> bool:
        return self.low <= cut.duration <= self.high


def _sampler(cuts, config: DataConfig, seed: int, group: int):
    """lhotse's dynamic bucketing, giving the batches of all ranks, ``group`` in a row from one bucket."""
    from lhotse.dataset import DynamicBucketingSampler

    class Sampler(DynamicBucketingSampler):
        def __iter__(self):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return super().__iter__()

        def __next__(self):
            self.allow_iter_to_reset_state()
            return self._next_batch()

    sampled = list(itertools.islice(cuts, 10000))
    if not sampled:
        raise ManifestError(f"data.train: {', '.join(config.train)} hold no utterances")
    buckets = max(2, min(config.buckets, len(sampled) // 50))  # 50 utterances make a bucket worth while
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on lazy sets and small corpora
        sampler = Sampler(
            cuts,
            max_duration=config.batch_seconds,
            max_cuts=config.batch_size,
            quadratic_duration=config.quadratic_seconds,
            duration_bins=_bins([cut.duration for cut in sampled], buckets),
            shuffle=True,
            buffer_size=config.buffer_size,
            world_size=group,
            rank=0,
            seed=derive_seed(seed, "sampler") % 2**31,
        )
    sampler.filter(_Durations(config.min_seconds, config.max_seconds))
    return sampler


def _bins(durations: list[float], buckets: int) -> list[float]:
    """Inner borders that split the total duration into ``buckets`` equal parts, duplicates removed."""
    ordered = np.sort(np.asarray(durations))
    total = np.cumsum(ordered)
    places = np.searchsorted(total, total[-1] * np.arange(1, buckets) / buckets)
    return sorted(set(ordered[places].tolist()))


def _pack(cuts: list, config: DataConfig) -> Iterator[list]:
    """Consecutive cuts, sorted by length, in batches within the limits of the config."""
    group: list = []
    for cut in cuts:
        size = len(group) + 1
        if group and (cut.duration * size > config.batch_seconds or size > (config.batch_size or size)):
            yield group
            group = []
        group.append(cut)
    if group:
        yield group


class _AsSampler(torch.utils.data.Sampler):
    def __init__(self, requests):
        self.requests = requests

    def __iter__(self):
        return iter(self.requests)


def _loader(reader: _Reader, requests, config: DataConfig):
    return torch.utils.data.DataLoader(
        reader,
        sampler=_AsSampler(requests),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
    )


def _start_worker(_: int) -> None:
    """One thread, and no death by a signal to the whole group: the training process stops and ends us."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
