"""Speech as phones, semantic and acoustic codes, computed once before training: in shards, read in batches.

A folder holds ``index.json`` (what made the codes) and ``speech-00000.safetensors`` ... (phones and codes of
the clips, one after another). :mod:`recipes.prepare_speech` writes it; the networks of MaskGCT learn from it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nar_speech.checkpoint import save_safetensors
from nar_speech.config import check_range
from nar_speech.data.seeding import derive_seed
from nar_speech.data.tokens import INDEX, read_index
from nar_speech.errors import ConfigError, ManifestError

# What codes that are learnt together have in common.
SAME = ("codec", "sample_rate", "frame_rate", "num_codebooks", "codebook_size", "semantic", "semantic_size")


@dataclass(frozen=True)
class SpeechIndex:
    """``index.json``.

    Attributes:
        codec: name or folder of the codec of the acoustic codes. semantic: folder of the semantic codec.
        sample_rate: of the codec, Hz. frame_rate: of all codes, per second.
        num_codebooks, codebook_size: of the acoustic codes. semantic_size: of the semantic ones.
        shards: files, in order.
    """

    codec: str
    sample_rate: int
    frame_rate: float
    num_codebooks: int
    codebook_size: int
    semantic: str
    semantic_size: int
    shards: list[str]


@dataclass(frozen=True)
class SpeechTokenConfig:
    """Which clips, and how they are put into batches.

    Attributes:
        train, dev: folders of codes.
        batch_seconds: most seconds of codes in one batch of one process, padding included.
        batch_size: most clips in it.
        min_seconds, max_seconds: clips that are shorter or longer are left out.
        max_phones_per_second: so are clips with more phones a second, which no alignment fits.
        num_codebooks: how many layers of acoustic codes to read; None: all.
    """

    train: list[str] = field(default_factory=list)
    dev: list[str] = field(default_factory=list)
    batch_seconds: float = 120.0
    batch_size: int = 64
    min_seconds: float = 0.3
    max_seconds: float = 20.0
    max_phones_per_second: float = 40.0
    num_codebooks: int | None = None

    def __post_init__(self) -> None:
        check_range(self, 0.02, 1e6, "batch_seconds", "max_seconds", "max_phones_per_second")
        check_range(self, 0.0, self.max_seconds, "min_seconds")
        check_range(self, 1, 1e6, "batch_size")


@dataclass
class SpeechTokenBatch:
    """B clips, padded behind their end.

    Attributes:
        phones: (B, N) int64, 0 on padding. phone_lengths: (B,) int64.
        semantic: (B, T) int64, acoustic: (B, K, T) int64, 0 on padding. lengths: (B,) int64 frames.
        ids: of the clips.
        frame_rate: for ``seconds``.
    """

    phones: Tensor
    phone_lengths: Tensor
    semantic: Tensor
    acoustic: Tensor
    lengths: Tensor
    ids: list[str]
    frame_rate: float

    @property
    def seconds(self) -> float:
        """Seconds of speech without padding."""
        return float(self.lengths.sum()) / self.frame_rate

    def to(self, device: torch.device | str) -> SpeechTokenBatch:
        """The same batch with its tensors on ``device``."""
        names = ("phones", "phone_lengths", "semantic", "acoustic", "lengths")
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})


@dataclass(frozen=True)
class SpeechClip:
    """One recording: phones (N,), semantic codes (T,), acoustic codes (K, T), int64."""

    id: str
    phones: Tensor
    semantic: Tensor
    acoustic: Tensor


class SpeechTokenStore:
    """The clips of one folder.

    Raises:
        ManifestError: the folder, or a file or part of it, is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = read_index(self.folder, SpeechIndex, "prepare_speech")
        self._files, self._places = [], []
        self.ids: list[str] = []
        for number, name in enumerate(self.index.shards):
            try:
                file = safe_open(str(self.folder / name), framework="pt")
                frames, phones = (file.get_tensor(f"{part}.offsets").tolist() for part in ("codes", "phones"))
                self.ids += json.loads((file.metadata() or {})["ids"])
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                raise ManifestError(
                    f"{self.folder / name}: missing or damaged ({error}); make it again"
                ) from error
            self._files.append(file)
            spans = zip(itertools.pairwise(frames), itertools.pairwise(phones), strict=True)
            self._places += [(number, *codes, *text) for codes, text in spans]
        if len(self._places) != len(self.ids):
            raise ManifestError(f"{self.folder}: clips and ids differ in number; make it again")

    def __len__(self) -> int:
        return len(self._places)

    def frames(self, clip: int) -> int:
        """Length of a clip."""
        _, begin, end, _, _ = self._places[clip]
        return end - begin

    def phones(self, clip: int) -> int:
        """How many phones a clip has."""
        return self._places[clip][4] - self._places[clip][3]

    def clip(self, clip: int, num_codebooks: int | None = None) -> SpeechClip:
        """One clip, with all or the first layers of its acoustic codes."""
        shard, begin, end, first, last = self._places[clip]
        file = self._files[shard]
        return SpeechClip(
            self.ids[clip],
            file.get_slice("phones")[first:last].long(),
            file.get_slice("semantic")[begin:end].long(),
            file.get_slice("acoustic")[:num_codebooks, begin:end].long(),
        )


class SpeechTokens:
    """The clips of several folders that belong together and can be learnt from.

    Raises:
        ManifestError: no folders, or no clip that fits. ConfigError: codes of different codecs, or fewer
            codebooks than are wanted.
    """

    def __init__(
        self,
        folders: Sequence[str],
        config: SpeechTokenConfig,
        where: str,
        like: SpeechIndex | None = None,
    ):
        if not folders:
            raise ManifestError(f"{where}: name at least one folder of codes")
        self.stores = [SpeechTokenStore(folder) for folder in folders]
        self.index = like or self.stores[0].index
        for store in self.stores:
            for name in SAME:
                if getattr(store.index, name) != getattr(self.index, name):
                    raise ConfigError(
                        f"{where}: {store.folder} differs in {name} from the codes before it; make all with"
                        " the same codecs"
                    )
        self.codebooks = config.num_codebooks or self.index.num_codebooks
        if self.codebooks > self.index.num_codebooks:
            raise ConfigError(
                f"data.num_codebooks: {self.codebooks}; {self.stores[0].folder} has"
                f" {self.index.num_codebooks} codebooks"
            )
        self.config = config
        every = [(s, c) for s, store in enumerate(self.stores) for c in range(len(store))]
        self.places = [place for place in every if self._fits(*place)]
        self.left_out = len(every) - len(self.places)
        if not self.places:
            raise ManifestError(
                f"{where}: of {len(every)} clips in {', '.join(folders)} none has {config.min_seconds:g} to"
                f" {config.max_seconds:g} s and at most {config.max_phones_per_second:g} phones a second"
            )

    def _fits(self, store: int, clip: int) -> bool:
        frames, phones = self.stores[store].frames(clip), self.stores[store].phones(clip)
        rate, config = self.index.frame_rate, self.config
        inside = config.min_seconds * rate <= frames <= config.max_seconds * rate
        return inside and 1 <= phones <= min(frames, config.max_phones_per_second * frames / rate)

    def frames(self, number: int) -> int:
        """Frames of the clip at a place of :attr:`places`."""
        store, clip = self.places[number]
        return self.stores[store].frames(clip)

    def group(self, order: Sequence[int]) -> list[list[int]]:
        """Cut a sequence of clips into batches of at most the wanted size, padding included."""
        most = self.config.batch_seconds * self.index.frame_rate
        groups: list[list[int]] = []
        longest = 0
        for number in order:
            longest = max(longest, self.frames(number))
            full = not groups or len(groups[-1]) == self.config.batch_size
            if full or longest * (len(groups[-1]) + 1) > most:
                groups.append([])
                longest = self.frames(number)
            groups[-1].append(number)
        return groups

    def batch(self, numbers: Sequence[int]) -> SpeechTokenBatch:
        """The clips at these places."""
        clips = [self.stores[s].clip(c, self.codebooks) for s, c in (self.places[n] for n in numbers)]
        pad = torch.nn.utils.rnn.pad_sequence
        return SpeechTokenBatch(
            phones=pad([clip.phones for clip in clips], batch_first=True),
            phone_lengths=torch.tensor([len(clip.phones) for clip in clips]),
            semantic=pad([clip.semantic for clip in clips], batch_first=True),
            acoustic=pad([clip.acoustic.T for clip in clips], batch_first=True).transpose(1, 2),
            lengths=torch.tensor([len(clip.semantic) for clip in clips]),
            ids=[clip.id for clip in clips],
            frame_rate=self.index.frame_rate,
        )


class SpeechTokenData:
    """Endless stream of training batches of this process, with a position (``train.loop.TrainStream``).

    An epoch has every clip once: clips of about one length together, in an order of its own. One sequence of
    batches depends on the folders and the seed alone; rank r of W processes takes every W-th, from the r-th.
    """

    JITTER = 0.2  # of lengths before they are sorted, so that batches are not the same in every epoch

    def __init__(self, config: SpeechTokenConfig, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.clips = SpeechTokens(config.train, config, "data.train")
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._epoch, self._place = 0, 0  # of the next batch of all processes
        self._plans: dict[int, list[list[int]]] = {}

    @property
    def index(self) -> SpeechIndex:
        """What made the codes."""
        return self.clips.index

    def state_dict(self) -> dict:
        """Position after the batches handed out so far, the same in every process."""
        return {"epoch": self._epoch, "place": self._place}

    def load_state_dict(self, state: dict) -> None:
        """Go to a position; the next ``iter`` starts there."""
        self._epoch, self._place = int(state["epoch"]), int(state["place"])

    def __iter__(self) -> Iterator[SpeechTokenBatch]:
        while True:
            epoch, place = self._later(self.rank)
            batch = self.clips.batch(self._plan(epoch)[place])
            self._epoch, self._place = self._later(self.world_size)
            yield batch

    def _later(self, count: int) -> tuple[int, int]:
        """The epoch and the place in it, so many batches later."""
        epoch, place = self._epoch, self._place + count
        while place >= len(self._plan(epoch)):
            place -= len(self._plan(epoch))
            epoch += 1
        return epoch, place

    def _plan(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch."""
        if epoch not in self._plans:
            for old in [e for e in self._plans if e < self._epoch]:
                del self._plans[old]
            rng = np.random.default_rng(derive_seed(self.seed, "batches", epoch))
            lengths = np.array([self.clips.frames(n) for n in range(len(self.clips.places))])
            order = np.argsort(lengths * rng.uniform(1 - self.JITTER, 1 + self.JITTER, len(lengths)))
            groups = self.clips.group(order.tolist())
            self._plans[epoch] = [groups[i] for i in rng.permutation(len(groups))]
        return self._plans[epoch]


class SpeechTokenEval:
    """The evaluation batches of this process: every clip once, by length.

    ``like``: what the codes of training were made with; others are a ConfigError.
    """

    def __init__(
        self,
        config: SpeechTokenConfig,
        rank: int = 0,
        world_size: int = 1,
        like: SpeechIndex | None = None,
    ):
        self.clips = SpeechTokens(config.dev, config, "data.dev", like)
        order = sorted(range(len(self.clips.places)), key=lambda n: (self.clips.frames(n), n))
        self.groups = self.clips.group(order)[rank::world_size]

    def __iter__(self) -> Iterator[SpeechTokenBatch]:
        for group in self.groups:
            yield self.clips.batch(group)


def write_speech_shard(path: str | Path, clips: Sequence[SpeechClip]) -> None:
    """Write clips, whose semantic and acoustic codes are equally long.

    Raises:
        ManifestError: they are not.
    """
    for clip in clips:
        if len(clip.semantic) != clip.acoustic.shape[1]:
            raise ManifestError(
                f"{clip.id}: {len(clip.semantic)} semantic and {clip.acoustic.shape[1]} acoustic codes"
            )
    tensors = {
        "phones": torch.cat([clip.phones for clip in clips]).to(torch.int32),
        "phones.offsets": torch.tensor([0, *(len(clip.phones) for clip in clips)]).cumsum(0),
        "semantic": torch.cat([clip.semantic for clip in clips]).to(torch.int32),
        "acoustic": torch.cat([clip.acoustic for clip in clips], 1).to(torch.int32),
        "codes.offsets": torch.tensor([0, *(len(clip.semantic) for clip in clips)]).cumsum(0),
    }
    save_safetensors(path, tensors, {"ids": json.dumps([clip.id for clip in clips])})


def write_speech_index(folder: str | Path, index: SpeechIndex) -> None:
    """Write ``index.json``, last: a folder that has one is whole."""
    draft = Path(folder) / f".{INDEX}"
    draft.write_text(json.dumps(asdict(index), indent=1, ensure_ascii=False), encoding="utf-8")
    draft.replace(Path(folder) / INDEX)
