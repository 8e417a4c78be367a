"""MAGNeT (Ziv et al. 2024, arXiv 2401.04577): a masked, non-autoregressive model of K parallel code streams.

One Transformer sees all streams and the whole clip. It is trained to fill masked codes of one codebook (the
stage) given the codebooks before it; for codebooks after the first a position sees its neighbours only. How
clips are sampled from it is in :mod:`nar_speech.sampling`; :mod:`nar_speech.models.magnet_predictor` is the
network as that loop calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.config import check_range
from nar_speech.errors import InputError
from nar_speech.layers.band import band_mask, banded_attention
from nar_speech.layers.dot_product import attention_by_heads
from nar_speech.layers.multistream import Attend, MultiStreamConfig, MultiStreamNetwork, TextMemory
from nar_speech.losses.masked import MaskedBatch, masked_cross_entropy

MAX_CONTEXT, MAX_SPAN = 100_000, 10_000


@dataclass(frozen=True)
class MagnetConfig(MultiStreamConfig):
    """:class:`~nar_speech.layers.multistream.MultiStreamConfig` and what is MAGNeT's own.

    Attributes:
        context: frames on each side that a position sees in the stages after the first; -1: all.
        span_len: frames that are masked together.
    """

    context: int = 5
    span_len: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, -1, MAX_CONTEXT, "context")
        check_range(self, 1, MAX_SPAN, "span_len")


class Magnet(MultiStreamNetwork):
    """The network. A row's result does not depend on the other rows of its batch, nor on their padding."""

    config: MagnetConfig

    def __init__(self, config: MagnetConfig):
        super().__init__(config)

    def restricted(self, stage: int) -> bool:
        """Whether positions see only their neighbours in this stage."""
        return stage > 0 and self.config.context >= 0

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        condition: Tensor | None = None,
        condition_mask: Tensor | None = None,
        stage: int | Tensor = -1,
        *,
        only_stage: bool = False,
        official_padding: bool = False,
        allow_longer: bool = False,
    ) -> Tensor:
        """Logits of the codes at every position.

        Args:
            tokens: (B, K, T) int64 codes; ``config.mask_id`` where they are masked.
            lengths: (B,) int64 frames of each row; None: T.
            condition: (B, L, W) float32 states of the text encoder; None: no text.
            condition_mask: (B, L) bool, true on tokens; None: all are. A row without any is unconditional.
            stage: codebook that is being filled, for all rows or (B,); -1 lets every position see all others,
                as stage 0 does.
            only_stage: the logits of the stage's codebook alone.
            official_padding: attend to the padding of the text as audiocraft does (see ``remember``).
            allow_longer: let T exceed the segment of training. Position codes go on for ever, but the network
                has not seen those beyond; better make longer clips in windows.

        Returns:
            (B, K, T, V), or (B, T, V) with ``only_stage``. Those of padding mean nothing.

        Raises:
            InputError: more frames than the segment, a stage that does not exist, or shapes that don't fit.
        """
        self.check(tokens.shape[-1], allow_longer)
        if condition is not None and condition_mask is None:
            condition_mask = torch.ones(condition.shape[:2], dtype=torch.bool, device=condition.device)
        if isinstance(stage, Tensor):
            return self._mixed(
                tokens, lengths, condition, condition_mask, stage, only_stage, official_padding, allow_longer
            )
        low = 0 if only_stage else -1
        if not low <= stage < self.config.num_codebooks:
            raise InputError(f"stage: got {stage}; must be {low} to {self.config.num_codebooks - 1}")
        memory = None
        if condition is not None:
            memory = self.remember(condition, condition_mask, official_padding)
        x = self.run(tokens, lengths, self.restricted(stage), memory)
        return self.logits(x, stage if only_stage else None)

    def _mixed(self, tokens, lengths, condition, mask, stage, *options) -> Tensor:
        """Rows of several stages: one pass for the rows of each."""
        only_stage, official_padding, allow_longer = options
        parts, order = [], []
        for value in stage.unique().tolist():
            rows = (stage == value).nonzero()[:, 0]
            pick = [None if t is None else t[rows] for t in (tokens, lengths, condition, mask)]
            parts.append(
                self(
                    *pick,
                    int(value),
                    only_stage=only_stage,
                    official_padding=official_padding,
                    allow_longer=allow_longer,
                )
            )
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def check(self, frames: int, allow_longer: bool = False) -> None:
        """Whether a clip of so many frames can be modelled.

        Raises:
            InputError: none, or more than the segment of training.
        """
        if frames < 1:
            raise InputError("tokens: no frames; a clip has at least one")
        if frames > self.config.max_frames and not allow_longer:
            raise InputError(
                f"{frames} frames are more than the {self.config.max_frames} that this model was trained on"
                f" ({self.config.segment_seconds:g} s); make longer clips in windows, or set allow_longer"
            )

    def run(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        restricted: bool,
        memory: TextMemory | None,
        wanted: tuple[int, int] | None = None,
    ) -> Tensor:
        """Embeddings through the blocks: (B, K, T) to (B, T, D), before norm and heads.

        Args:
            wanted: with ``restricted`` and without ``lengths``, the frames from .. to (exclusive) whose
                outputs are needed: (B, to - from, D). What lies beyond their sight is not computed; the
                numbers stay the same.
        """
        frames = tokens.shape[2]
        if wanted is None or not restricted or lengths is not None:
            x = self.embed(tokens)
            attend = self.attention(len(tokens), frames, lengths, restricted)
            rotation = self.rotation(0, frames)
            for number, block in enumerate(self.blocks):
                x = block(number, x, attend, memory, rotation)
            return x if wanted is None else x[:, wanted[0] : wanted[1]]
        context, last = self.config.context, len(self.blocks) - 1
        ranges = [
            (max(0, wanted[0] - left * context), min(frames, wanted[1] + left * context))
            for left in range(last + 1, -1, -1)
        ]
        begin, end = ranges[0]
        x = self.embed(tokens[:, :, begin:end], begin)
        for number, block in enumerate(self.blocks):
            attend = self.attention(len(tokens), end - begin, None, True)
            x = block(number, x, attend, memory, self.rotation(begin, end - begin))
            low, high = ranges[number + 1]
            x, begin, end = x[:, low - begin : high - begin], low, high
        return x

    def attention(self, batch: int, frames: int, lengths: Tensor | None, restricted: bool) -> Attend:
        """Self attention of a pass of ``batch`` rows: over valid positions, or the near ones of them."""
        whole = lengths is None
        if restricted:
            context = self.config.context
            if whole:
                lengths = torch.full((batch,), frames, device=self.device)
            mask = band_mask(frames, context, lengths.to(self.device))

            def near(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                coarse = self.blocks[number].coarse
                return banded_attention(query, key, value, context, mask, coarse)

            return near
        mask = None
        if not whole:
            mask = torch.arange(frames, device=self.device) < lengths.to(self.device)[:, None].clamp_min(1)
            mask = mask[:, None, None]

        def everywhere(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = (part.transpose(1, 2) for part in (query, key, value))
            coarse = self.blocks[number].coarse
            return attention_by_heads(*parts, mask, coarse=coarse).transpose(1, 2)

        return everywhere


def magnet_loss(
    network: Magnet,
    batch: MaskedBatch,
    condition: Tensor | None,
    condition_mask: Tensor | None,
    official_padding: bool = False,
) -> Mapping[str, Tensor]:
    """Cross entropy of the masked codes of the batch's stage (arXiv 2401.04577, equation 2).

    Args:
        batch: of :func:`nar_speech.losses.masked.mask_codes`.
        condition, condition_mask: see :meth:`Magnet.forward`.
        official_padding: attend to the padding of text and sound, as audiocraft does.

    Returns:
        ``loss`` with gradient; ``acc``, part of the masked codes whose highest logit is right; ``masked``,
        how many there are.
    """
    lengths = None if official_padding else batch.lengths
    logits = network(
        *(batch.tokens, lengths, condition, condition_mask, batch.stage),
        only_stage=True,
        official_padding=official_padding,
    )
    return masked_cross_entropy(logits, batch.targets, batch.masked)
