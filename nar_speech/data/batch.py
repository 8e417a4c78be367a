"""The batch every training step receives, and how one is made from single utterances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

IGNORE = -1  # padding of token ids; no loss looks at it


@dataclass
class Batch:
    """B utterances, padded on the right.

    Attributes:
        waves: (B, N) float32 samples in [-1, 1], padded with zeros.
        wave_lengths: (B,) int64, samples of each utterance.
        tokens: (B, U) int64 token ids, padded with -1.
        token_lengths: (B,) int64, tokens of each utterance.
        ids: B utterance ids.
        texts: B transcripts as they stand in the manifest.
        sample_rate: Hz, for ``seconds``.
        written: B transcripts with case and punctuation (``custom["written"]`` of the supervision), or None.
    """

    waves: Tensor
    wave_lengths: Tensor
    tokens: Tensor
    token_lengths: Tensor
    ids: list[str]
    texts: list[str]
    sample_rate: int = 16000
    written: list[str | None] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of audio without padding."""
        return float(self.wave_lengths.sum()) / self.sample_rate

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device`` (asynchronously from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Page-locked copy; the DataLoader calls this when its ``pin_memory`` is on."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> Batch:
        return Batch(
            function(self.waves),
            function(self.wave_lengths),
            function(self.tokens),
            function(self.token_lengths),
            self.ids,
            self.texts,
            self.sample_rate,
            self.written,
        )


def collate(
    waves: Sequence[np.ndarray],
    tokens: Sequence[Sequence[int]],
    ids: Sequence[str],
    texts: Sequence[str],
    sample_rate: int = 16000,
    written: Sequence[str | None] | None = None,
) -> Batch:
    """Pad B waves (N_b,) and B token lists (U_b) into one :class:`Batch`."""
    wave_lengths = torch.tensor([len(wave) for wave in waves])
    token_lengths = torch.tensor([len(row) for row in tokens])
    padded_waves = torch.zeros(len(waves), int(wave_lengths.max()))
    padded_tokens = torch.full((len(tokens), max(1, int(token_lengths.max()))), IGNORE)
    for b, (wave, row) in enumerate(zip(waves, tokens, strict=True)):
        padded_waves[b, : len(wave)] = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
        padded_tokens[b, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return Batch(
        padded_waves,
        wave_lengths,
        padded_tokens,
        token_lengths,
        list(ids),
        list(texts),
        sample_rate,
        list(written or [None] * len(texts)),
    )
