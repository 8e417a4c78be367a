"""MusicGen's language model (Copet et al. 2023, arXiv 2306.05284): autoregressive over delayed code streams.

Here it is MAGNeT's partner: it scores codes for rescoring and begins clips in the hybrid mode, and it makes
whole clips to compare with. The sampling loop is :mod:`nar_speech.sampling.autoregressive`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.config import check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.multistream import (
    Attend,
    MultiStreamConfig,
    MultiStreamNetwork,
    TextMemory,
    with_null,
)

MAX_DELAY = 10_000


@dataclass(frozen=True)
class MusicGenConfig(MultiStreamConfig):
    """:class:`~nar_speech.layers.multistream.MultiStreamConfig` and the delays of the streams.

    Attributes:
        delays: steps by which each stream lags behind; None: 0, 1, ..., K - 1.
        stride_seconds: of the windows in which clips longer than a segment are made.
    """

    segment_seconds: float = 30.0
    delays: tuple[int, ...] | None = None
    stride_seconds: float = 18.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delays is not None:
            if len(self.delays) != self.num_codebooks or not all(0 <= d <= MAX_DELAY for d in self.delays):
                raise ConfigError(f"delays: expected {self.num_codebooks} whole numbers from 0 on")
            if min(self.delays) > 0:
                raise ConfigError("delays: at least one stream must have none")
        check_range(self, 0, 1e6, "stride_seconds")

    @property
    def lags(self) -> tuple[int, ...]:
        """The delay of every stream."""
        return self.delays if self.delays is not None else tuple(range(self.num_codebooks))


@dataclass(frozen=True)
class MusicGenState:
    """What a stream of steps remembers; made by :meth:`MusicGen.start`.

    A step writes into the same buffers behind ``size``: only the newest state, or an older one from which on
    everything is fed again, gives right results.

    Attributes:
        keys, values: one (B, H, S, d) tensor a block; S is the room.
        size: positions fed so far, the same for all rows.
        memory: the text.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    size: int
    memory: TextMemory | None

    @property
    def room(self) -> int:
        """Positions that fit the buffers."""
        return self.keys[0].shape[2]

    def grow(self, room: int) -> MusicGenState:
        """Buffers for at least ``room`` positions."""
        more = room - self.room
        if more <= 0:
            return self
        keys = tuple(F.pad(t, (0, 0, 0, more)) for t in self.keys)
        return replace(self, keys=keys, values=tuple(F.pad(t, (0, 0, 0, more)) for t in self.values))


def delay_codes(codes: Tensor, lengths: Tensor | None, lags: tuple[int, ...], special: int) -> Tensor:
    """Codes (B, K, T) as the model reads them: (B, K, S) with S = T + max(lags) + 1.

    Stream k of position s is code s - 1 - lags[k]; ``special`` stands where there is none, at position 0 too.
    """
    frames = codes.shape[2]
    if lengths is not None:
        valid = torch.arange(frames, device=codes.device) < lengths.to(codes.device)[:, None]
        codes = codes.masked_fill(~valid[:, None], special)
    size = frames + max(lags) + 1
    rows = [
        F.pad(codes[:, k], (lag + 1, size - frames - lag - 1), value=special) for k, lag in enumerate(lags)
    ]
    return torch.stack(rows, dim=1)


def undelay(sequence: Tensor, frames: int, lags: tuple[int, ...], first: int) -> Tensor:
    """The inverse: entry s of stream k (B, K, S, ...) to frame s - first - lags[k]; (B, K, frames, ...)."""
    return torch.stack([sequence[:, k, lag + first :][:, :frames] for k, lag in enumerate(lags)], dim=1)


class MusicGen(MultiStreamNetwork):
    """The network. A row's result does not depend on the other rows of its batch, nor on their padding."""

    config: MusicGenConfig

    def __init__(self, config: MusicGenConfig):
        super().__init__(config)

    def forward(
        self,
        sequence: Tensor,
        condition: Tensor | None = None,
        condition_mask: Tensor | None = None,
        official_padding: bool = False,
    ) -> Tensor:
        """Logits of what follows every position of delayed codes.

        Args:
            sequence: (B, K, S) int64, of :func:`delay_codes`.
            condition, condition_mask, official_padding: see :meth:`nar_speech.models.magnet.Magnet.forward`.

        Returns:
            (B, K, S, V).
        """
        memory = self._memory(condition, condition_mask, official_padding)

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = (part.transpose(1, 2) for part in (query, key, value))
            return F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)

        return self.logits(self._run(self.embed(sequence), 0, attend, memory))

    def aligned_logits(
        self,
        codes: Tensor,
        lengths: Tensor | None = None,
        condition: Tensor | None = None,
        condition_mask: Tensor | None = None,
        official_padding: bool = False,
    ) -> Tensor:
        """Teacher-forced logits of every code given those before it.

        Args:
            codes: (B, K, T) int64; ``config.mask_id`` where a code is not known.
            lengths: (B,) frames of each row; None: T.

        Returns:
            (B, K, T, V).
        """
        lags = self.config.lags
        sequence = delay_codes(codes, lengths, lags, self.config.mask_id)
        logits = self(sequence[:, :, :-1], condition, condition_mask, official_padding)
        return undelay(logits, codes.shape[2], lags, 0)

    def token_probabilities(
        self,
        codes: Tensor,
        lengths: Tensor | None = None,
        condition: Tensor | None = None,
        condition_mask: Tensor | None = None,
        stage: int | None = None,
        temperature: float = 1.0,
        official_padding: bool = False,
    ) -> Tensor:
        """Probability that the model gives every code, teacher forced, without guidance (MAGNeT's rescoring).

        Args:
            stage: codebook that is scored; those after it count as unknown. None: all.
            temperature: of the softmax.

        Returns:
            (B, T) for one codebook, else (B, K, T); 0 where a code is ``config.mask_id``.
        """
        special = self.config.mask_id
        if stage is not None:
            codes = codes.clone()
            codes[:, stage + 1 :] = special
        logits = self.aligned_logits(codes, lengths, condition, condition_mask, official_padding)
        if stage is not None:
            logits, codes = logits[:, stage], codes[:, stage]
        known = codes < special
        chosen = codes.masked_fill(~known, 0).unsqueeze(-1)
        probabilities = (logits.float() / temperature).softmax(-1).gather(-1, chosen)[..., 0]
        return probabilities * known

    def start(self, batch: int, room: int, memory: TextMemory | None = None) -> MusicGenState:
        """State before the first position, with buffers for ``room`` positions; they grow when needed."""
        block = self.blocks[0]
        dtype = block.compute or torch.float32
        size = self.config.width // self.config.heads
        shape = (batch, self.config.heads, max(room, 1), size)
        keys = tuple(torch.zeros(shape, dtype=dtype, device=self.device) for _ in self.blocks)
        return MusicGenState(keys, tuple(torch.zeros_like(t) for t in keys), 0, memory)

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: MusicGenState) -> tuple[Tensor, MusicGenState]:
        """Feed further positions.

        Args:
            tokens: (B, K, n) of the delayed sequence.
            state: its buffers are written to.

        Returns:
            logits (B, K, V) of what follows the last position; the new state.
        """
        new = tokens.shape[2]
        begin, end = state.size, state.size + new
        if end > state.room:
            state = state.grow(max(end, 2 * state.room))
        mask = None
        if new > 1:
            places = torch.arange(begin, end, device=self.device)[:, None]
            mask = torch.arange(end, device=self.device) <= places

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = state.keys[number], state.values[number]
            keys[:, :, begin:end] = key.transpose(1, 2)
            values[:, :, begin:end] = value.transpose(1, 2)
            pair = keys[:, :, :end].to(query.dtype), values[:, :, :end].to(query.dtype)
            return F.scaled_dot_product_attention(query.transpose(1, 2), *pair, attn_mask=mask).transpose(
                1, 2
            )

        x = self._run(self.embed(tokens, begin), begin, attend, state.memory)
        return self.logits(x[:, -1:])[:, :, 0], replace(state, size=end)

    def sampler(
        self,
        condition: Tensor,
        condition_mask: Tensor,
        null: tuple[Tensor, Tensor] | None = None,
        guided: bool = True,
        room: int = 512,
        official_padding: bool = False,
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """What :func:`nar_speech.sampling.autoregressive.autoregressive_sample` calls at every step.

        Args:
            condition, condition_mask: (B, L, W) and (B, L) text of each row.
            null: the same of the unconditional pass, a negative prompt for example; None: no text.
            guided: whether there is an unconditional pass.

        Returns:
            tokens (B, K, n) -> conditional and unconditional logits (B, K, V), or None for the latter.
        """
        batch = len(condition)
        with torch.inference_mode():
            if guided:
                condition, condition_mask = with_null(condition, condition_mask, null)
            memory = self.remember(condition, condition_mask, official_padding)
            state = self.start(len(condition), room, memory)

        def step(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            nonlocal state
            logits, state = self.step(tokens.repeat(2, 1, 1) if guided else tokens, state)
            logits = logits.float()
            return logits[:batch], logits[batch:] if guided else None

        return step

    def check(self, frames: int) -> None:
        """Whether a clip of so many frames can be made at once.

        Raises:
            InputError: none, or more than a segment.
        """
        if not 1 <= frames <= self.config.max_frames:
            raise InputError(
                f"{frames} frames: this model makes 1 to {self.config.max_frames} at once"
                f" ({self.config.segment_seconds:g} s); make longer clips in windows"
            )

    def _memory(self, condition, mask, official_padding) -> TextMemory | None:
        if condition is None:
            return None
        if mask is None:
            mask = torch.ones(condition.shape[:2], dtype=torch.bool, device=condition.device)
        return self.remember(condition, mask, official_padding)

    def _run(self, x: Tensor, begin: int, attend: Attend, memory: TextMemory | None) -> Tensor:
        """The blocks on (B, n, D) of the positions from ``begin`` on."""
        rotation = self.rotation(begin, x.shape[1])
        for number, block in enumerate(self.blocks):
            x = block(number, x, attend, memory, rotation)
        return x
