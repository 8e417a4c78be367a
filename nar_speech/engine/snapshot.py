"""A session on its way to another engine: a safetensors file with JSON metadata, checked when read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nar_speech.config import from_dict
from nar_speech.engine.events import Reason
from nar_speech.engine.model import SessionOptions
from nar_speech.engine.session import Inbox
from nar_speech.errors import ConfigError, SnapshotError

FORMAT = 1
KEY = "nar_speech.session"  # of the metadata
STATE = "state."  # prefix of the network's tensors
LARGEST = 2**48  # samples; positions beyond are nonsense


@dataclass(frozen=True)
class PassMeta:
    """A second pass that had not come back; its audio is tensor ``pass.<number>``."""

    model: str
    start: int
    end: int
    options: dict[str, Any]
    tag: Any


@dataclass(frozen=True)
class SnapshotMeta:
    """The JSON part. Positions are samples of stream time.

    Attributes:
        format: version of this layout.
        model, signature, sample_rate, chunk, first: of the model.
        options: of the session.
        collector: what its ``export`` gave.
        consumed, utterance, marks, ending: see :class:`nar_speech.engine.session.Inbox`.
        fresh, new: whether the utterance, the stream begins with the next step.
        history: where the kept audio begins, if there is any.
        passes: second passes under way.
        open_seconds: how long the session had been open.
    """

    format: int
    model: str
    signature: str
    sample_rate: int
    chunk: int
    first: int
    options: SessionOptions
    collector: dict[str, Any]
    consumed: int
    utterance: int
    marks: tuple[int, ...]
    ending: str | None
    fresh: bool
    new: bool
    history: int | None = None
    passes: tuple[PassMeta, ...] = ()
    open_seconds: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """A session at rest.

    Attributes:
        meta: counters, options and the collector's data.
        state: the network's state, one stream.
        audio: (N,) float32 that was fed and not heard.
        history: (N,) float32 that was heard and is kept for a second pass.
        waves: audio of ``meta.passes``.
    """

    meta: SnapshotMeta
    state: Mapping[str, Tensor]
    audio: np.ndarray
    history: np.ndarray
    waves: tuple[np.ndarray, ...] = field(default=())

    @property
    def inbox(self) -> Inbox:
        """What the new session's queue begins with."""
        m = self.meta
        return Inbox(self.audio, m.consumed, m.utterance, m.marks, m.ending)

    def to_bytes(self) -> bytes:
        """A safetensors file.

        Raises:
            SnapshotError: the collector exported, or the options hold, what JSON can't.
        """
        tensors = {STATE + name: tensor.contiguous() for name, tensor in self.state.items()}
        tensors["audio"] = torch.from_numpy(self.audio)
        tensors["history"] = torch.from_numpy(self.history)
        for number, wave in enumerate(self.waves):
            tensors[f"pass.{number}"] = torch.from_numpy(wave)
        return save(tensors, {KEY: plain_text(asdict(self.meta))})

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """Read what :meth:`to_bytes` gave.

        Raises:
            SnapshotError: damaged, of another version, or impossible values.
        """
        try:
            tensors = load(data)
            size = int.from_bytes(data[:8], "little")
            tree = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][KEY])
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise SnapshotError(f"snapshot: damaged, or no session's ({reason}); take another one") from error
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise SnapshotError(f"snapshot: not format {FORMAT}; use the version of nar_speech that made it")
        try:
            meta = from_dict(SnapshotMeta, tree, "snapshot")
        except ConfigError as error:
            raise SnapshotError(str(error)) from error
        waves = [_samples(tensors, f"pass.{i}") for i in range(len(meta.passes))]
        snapshot = cls(
            meta,
            {n.removeprefix(STATE): t for n, t in tensors.items() if n.startswith(STATE)},
            _samples(tensors, "audio"),
            _samples(tensors, "history"),
            tuple(waves),
        )
        snapshot._check()
        return snapshot

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_bytes` into a file."""
        Path(path).write_bytes(self.to_bytes())

    def _check(self) -> None:
        m = self.meta
        received = m.consumed + len(self.audio)
        places = (0, m.utterance, m.consumed, *m.marks, received, LARGEST)
        if any(a > b for a, b in itertools.pairwise(places)):
            raise SnapshotError("snapshot: its positions contradict each other; take another one")
        if (m.new and m.consumed) or (m.fresh and m.utterance != m.consumed):
            raise SnapshotError("snapshot: its flags contradict its positions; take another one")
        if m.history is not None and m.history + len(self.history) != m.consumed:
            raise SnapshotError("snapshot: history does not end where the audio begins; take another one")
        if m.ending is not None and m.ending not in get_args(Reason):
            raise SnapshotError(f"snapshot: ending: got '{m.ending}'; valid: {', '.join(get_args(Reason))}")


def plain_text(data: Any) -> str:
    """JSON.

    Raises:
        SnapshotError: something in it that JSON can't hold.
    """
    try:
        return json.dumps(data, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SnapshotError(
            f"snapshot: the session's settings or its collector's data are not plain data ({error})"
        ) from error


def _samples(tensors: Mapping[str, Tensor], name: str) -> np.ndarray:
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != 1 or tensor.dtype != torch.float32 or not tensor.isfinite().all():
        raise SnapshotError(f"snapshot: '{name}' has to be finite float32 samples (N,); take another one")
    return tensor.numpy()
