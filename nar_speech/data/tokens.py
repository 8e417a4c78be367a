"""Sound as codes with text states, computed once before training: written in shards, read in random crops.

A folder holds ``index.json`` (what made the codes, and the captions), ``texts.safetensors`` (states of every
caption, float16, one after another) and ``codes-00000.safetensors`` ... (codes of the clips, one after
another, and which captions are theirs). :mod:`recipes.prepare_sound` writes it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nar_speech.checkpoint import read_weights, save_safetensors
from nar_speech.config import check_range, from_dict
from nar_speech.data.seeding import derive_seed
from nar_speech.errors import ConfigError, ManifestError
from nar_speech.text.conditioner import ConditionerConfig

INDEX, TEXTS = "index.json", "texts.safetensors"
Index = TypeVar("Index")
NO_CAPTION = -1
# What codes that are learnt together have in common.
SAME = ("codec", "sample_rate", "frame_rate", "num_codebooks", "codebook_size", "conditioner", "text_width")


@dataclass(frozen=True)
class TokenIndex:
    """``index.json``.

    Attributes:
        codec: name or folder of the codec that made the codes.
        sample_rate: of the codec, Hz. frame_rate: frames per second.
        num_codebooks, codebook_size: of the codes.
        conditioner: the text encoder. text_width: width of its states.
        captions: every different caption; a clip's are named by their place here.
        shards: files of codes, in order.
    """

    codec: str
    sample_rate: int
    frame_rate: float
    num_codebooks: int
    codebook_size: int
    conditioner: ConditionerConfig
    text_width: int
    captions: list[str]
    shards: list[str]


@dataclass(frozen=True)
class TokenConfig:
    """Which clips, and how they are put into batches.

    Attributes:
        train, dev: folders of codes.
        seconds: longest crop; longer clips are cut at random places.
        batch_size: clips of one batch of one process.
        num_codebooks: how many of the codebooks to read; None: all.
        text_dropout: part of the clips that are shown without their caption, for guidance.
    """

    train: list[str] = field(default_factory=list)
    dev: list[str] = field(default_factory=list)
    seconds: float = 10.0
    batch_size: int = 16
    num_codebooks: int | None = None
    text_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, 0.01, 1e5, "seconds")
        check_range(self, 1, 1e6, "batch_size")
        check_range(self, 0.0, 1.0, "text_dropout")


@dataclass
class TokenBatch:
    """B clips, padded behind their end.

    Attributes:
        codes: (B, K, T) int64, 0 on padding.
        lengths: (B,) int64 frames.
        states: (B, L, W) float32 text states, zero on padding; mask: (B, L) bool.
        ids: of the clips. captions: as they were shown, empty where there was none.
        frame_rate: for ``seconds``.
    """

    codes: Tensor
    lengths: Tensor
    states: Tensor
    mask: Tensor
    ids: list[str]
    captions: list[str]
    frame_rate: float

    @property
    def seconds(self) -> float:
        """Seconds of sound without padding."""
        return float(self.lengths.sum()) / self.frame_rate

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch with its tensors on ``device``."""
        names = ("codes", "lengths", "states", "mask")
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})


def read_index(folder: Path, index: type[Index], recipe: str) -> Index:
    """The index of a folder that ``recipes.<recipe>`` makes, checked.

    Raises:
        ManifestError: it is missing or no JSON. ConfigError: an unknown, missing or wrong key.
    """
    path = folder / INDEX
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"{path}: can't be read ({type(error).__name__}); python -m recipes.{recipe} makes it"
        ) from error
    return from_dict(index, tree, str(path))


class TokenStore:
    """The clips of one folder.

    Raises:
        ManifestError: the folder, or a file or part of it, is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = read_index(self.folder, TokenIndex, "prepare_sound")
        texts = read_weights(self.folder / TEXTS)
        self._states, self._ends = texts["states"], texts["offsets"].tolist()
        self.clips: list[tuple[int, int, int]] = []  # shard, first frame, end
        self.captions: list[list[int]] = []
        self.ids: list[str] = []
        self._files = []
        for shard, name in enumerate(self.index.shards):
            try:
                file = safe_open(str(self.folder / name), framework="pt")
                ends, told = file.get_tensor("offsets").tolist(), file.get_tensor("captions").tolist()
                self.ids += json.loads((file.metadata() or {})["ids"])
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                raise ManifestError(
                    f"{self.folder / name}: missing or damaged ({error}); make it again"
                ) from error
            self._files.append(file)
            self.clips += [(shard, a, b) for a, b in itertools.pairwise(ends)]
            self.captions += [[c for c in row if c != NO_CAPTION] for row in told]
        if not len(self.clips) == len(self.captions) == len(self.ids):
            raise ManifestError(f"{self.folder}: clips, captions and ids differ in number; make it again")

    def __len__(self) -> int:
        return len(self.clips)

    def frames(self, clip: int) -> int:
        """Length of a clip."""
        _, begin, end = self.clips[clip]
        return end - begin

    def codes(self, clip: int, first: int, count: int, codebooks: int) -> Tensor:
        """(K, T) int64 of ``count`` frames from ``first`` on."""
        shard, begin, end = self.clips[clip]
        last = min(begin + first + count, end)
        return self._files[shard].get_slice("codes")[:codebooks, begin + first : last].long()

    def text(self, caption: int) -> Tensor:
        """(L, W) float32 states of a caption."""
        return self._states[self._ends[caption] : self._ends[caption + 1]].float()


class _Clips:
    """The clips of several folders that belong together."""

    def __init__(
        self, folders: Sequence[str], config: TokenConfig, where: str, like: TokenIndex | None = None
    ):
        if not folders:
            raise ManifestError(f"{where}: name at least one folder of codes")
        self.stores = [TokenStore(folder) for folder in folders]
        first = like or self.stores[0].index
        for store in self.stores:
            for name in SAME:
                if getattr(store.index, name) != getattr(first, name):
                    raise ConfigError(
                        f"{where}: {store.folder} differs in {name} from the codes before it; make all with"
                        " the same codec and text encoder"
                    )
        self.index, self.config = first, config
        self.codebooks = config.num_codebooks or first.num_codebooks
        if not 1 <= self.codebooks <= first.num_codebooks:
            raise ConfigError(
                f"{where}: {self.codebooks} codebooks asked for, there are {first.num_codebooks}"
            )
        self.places = [(s, c) for s, store in enumerate(self.stores) for c in range(len(store))]
        self.places = [(s, c) for s, c in self.places if self.stores[s].frames(c) > 0]
        if not self.places:
            raise ManifestError(f"{where}: {', '.join(folders)} hold no clips")
        self.frames = max(1, int(config.seconds * first.frame_rate))  # the segment of the network

    def batch(self, clips: Sequence[int], rngs: Sequence[np.random.Generator | None]) -> TokenBatch:
        """Crops with a caption; without a generator the beginning, with the first caption."""
        rows, texts, ids, captions = [], [], [], []
        for clip, rng in zip(clips, rngs, strict=True):
            s, c = self.places[clip]
            store = self.stores[s]
            spare, told = store.frames(c) - self.frames, store.captions[c]
            first = int(rng.integers(spare + 1)) if rng is not None and spare > 0 else 0
            caption = told[int(rng.integers(len(told))) if rng is not None else 0] if told else None
            if rng is not None and rng.random() < self.config.text_dropout:
                caption = None
            rows.append(store.codes(c, first, self.frames, self.codebooks))
            texts.append(torch.zeros(0, self.index.text_width) if caption is None else store.text(caption))
            ids.append(store.ids[c])
            captions.append("" if caption is None else store.index.captions[caption])
        lengths = torch.tensor([row.shape[1] for row in rows])
        codes = torch.zeros(len(rows), self.codebooks, int(lengths.max()), dtype=torch.int64)
        longest = max(1, *(len(text) for text in texts))
        states = torch.zeros(len(rows), longest, self.index.text_width)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for b, (row, text) in enumerate(zip(rows, texts, strict=True)):
            codes[b, :, : row.shape[1]] = row
            states[b, : len(text)], mask[b, : len(text)] = text, True
        return TokenBatch(codes, lengths, states, mask, ids, captions, self.index.frame_rate)


class TokenData:
    """Endless stream of training batches of this process, with a position (``train.loop.TrainStream``).

    One sequence of batches depends on the folders and the seed alone; rank r of W processes takes every W-th,
    from the r-th on.
    """

    def __init__(self, config: TokenConfig, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.clips = _Clips(config.train, config, "data.train")
        self.config, self.seed, self.rank, self.world_size = config, seed, rank, world_size
        self.size = min(config.batch_size, len(self.clips.places))
        self.per_epoch = len(self.clips.places) // self.size
        self._batch = 0  # batches of all processes handed out

    @property
    def index(self) -> TokenIndex:
        """What made the codes."""
        return self.clips.index

    def state_dict(self) -> dict:
        """Position after the batches handed out so far, the same in every process."""
        return {"batch": self._batch}

    def load_state_dict(self, state: dict) -> None:
        """Go to a position; the next ``iter`` starts there."""
        self._batch = int(state["batch"])

    def __iter__(self) -> Iterator[TokenBatch]:
        epoch, order = -1, np.empty(0)
        while True:
            number = self._batch + self.rank
            if number // self.per_epoch != epoch:
                epoch = number // self.per_epoch
                order = np.random.default_rng(derive_seed(self.seed, "order", epoch)).permutation(
                    len(self.clips.places)
                )
            place = number % self.per_epoch * self.size
            chosen = order[place : place + self.size].tolist()
            seeds = [derive_seed(self.seed, "crop", epoch, clip) for clip in chosen]
            batch = self.clips.batch(chosen, [np.random.default_rng(seed) for seed in seeds])
            self._batch += self.world_size
            yield batch


class TokenEval:
    """The evaluation batches of this process: beginnings of clips, each with its first caption.

    ``like``: what the codes of training were made with; others are a ConfigError.
    """

    def __init__(
        self, config: TokenConfig, rank: int = 0, world_size: int = 1, like: TokenIndex | None = None
    ):
        self.clips = _Clips(config.dev, config, "data.dev", like)
        count = len(self.clips.places)
        order = sorted(range(count), key=lambda clip: (self._frames(clip), clip))
        size = config.batch_size
        self.groups = [order[i : i + size] for i in range(0, count, size)][rank::world_size]

    def _frames(self, clip: int) -> int:
        store, place = self.clips.places[clip]
        return self.clips.stores[store].frames(place)

    def __iter__(self) -> Iterator[TokenBatch]:
        for group in self.groups:
            yield self.clips.batch(group, [None] * len(group))


def write_shard(
    path: str | Path, codes: Sequence[Tensor], captions: Sequence[Sequence[int]], ids: Sequence[str]
) -> None:
    """Write clips (K, T) with the numbers of their captions."""
    offsets = torch.tensor([0, *(c.shape[1] for c in codes)]).cumsum(0)
    width = max(1, *(len(row) for row in captions))
    told = torch.full((len(codes), width), NO_CAPTION, dtype=torch.int32)
    for row, numbers in enumerate(captions):
        told[row, : len(numbers)] = torch.tensor(list(numbers), dtype=torch.int32)
    joined = torch.cat(list(codes), dim=1)
    small = torch.int16 if not joined.numel() or int(joined.max()) < 2**15 else torch.int32
    tensors = {"codes": joined.to(small), "offsets": offsets, "captions": told}
    save_safetensors(path, tensors, {"ids": json.dumps(list(ids))})


def write_texts(folder: str | Path, states: Sequence[Tensor]) -> None:
    """Write the states (L, W) of every caption, in the order of ``TokenIndex.captions``."""
    offsets = torch.tensor([0, *(len(s) for s in states)]).cumsum(0)
    save_safetensors(Path(folder) / TEXTS, {"states": torch.cat(list(states)).half(), "offsets": offsets})


def write_index(folder: str | Path, index: TokenIndex) -> None:
    """Write ``index.json``, last: a folder that has one is whole."""
    draft = Path(folder) / f".{INDEX}"
    draft.write_text(json.dumps(asdict(index), indent=1, ensure_ascii=False), encoding="utf-8")
    draft.replace(Path(folder) / INDEX)


def captions_of(cut: object) -> list[str]:
    """All captions of a lhotse cut: the texts of its supervisions and their ``custom["captions"]``."""
    found: dict[str, None] = {}
    for supervision in cut.supervisions:
        custom: Mapping = supervision.custom or {}
        for text in (supervision.text, *(custom.get("captions") or ())):
            if text and text.strip():
                found[text.strip()] = None
    return list(found)
