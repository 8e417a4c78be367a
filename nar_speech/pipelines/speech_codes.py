"""From phones to codes of speech: the networks of MaskGCT one after the other, for a batch of pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.errors import InputError
from nar_speech.models.maskgct import S2A, T2S, S2AItem, T2SItem
from nar_speech.pipelines.maskgct_stages import Source, sample_acoustic, sample_layers, sample_semantic
from nar_speech.pipelines.speech_options import SynthesisConfig
from nar_speech.sampling.draws import GeneratorDraws


@dataclass(frozen=True)
class Networks:
    """The Transformers of one model.

    Attributes:
        t2s: phones to semantic codes.
        first: makes the first layer of acoustic codes; None: ``full`` makes it, too.
        full: makes all other layers.
    """

    t2s: T2S
    first: S2A | None
    full: S2A

    @property
    def layers(self) -> int:
        """Of acoustic codes."""
        return self.full.config.num_codebooks


@dataclass(frozen=True)
class Piece:
    """What is made at once. All tensors int64.

    Attributes:
        phones: (L,) of the prompt and of the target.
        semantic: (P,) codes of the prompt, perhaps none.
        acoustic: (P', K) codes of the prompt, perhaps none.
        frames: of the target.
        given_semantic: (frames,) codes of the target that stay, -1 where one is to be made; None: all are.
        given_acoustic: (K, P + frames - P') likewise.
    """

    phones: Tensor
    semantic: Tensor
    acoustic: Tensor
    frames: int
    given_semantic: Tensor | None = None
    given_acoustic: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.semantic) + self.frames <= len(self.acoustic):
            raise InputError(
                f"{self.frames} frames behind a prompt of {len(self.semantic)} semantic and"
                f" {len(self.acoustic)} acoustic codes leave nothing to make; make it longer"
            )


def make_codes(
    networks: Networks,
    pieces: Sequence[Piece],
    draws: Source,
    config: SynthesisConfig,
    on_step: Callable[[], None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Codes of the targets.

    Args:
        draws: a generator for each piece, which all networks go on with, or recorded draws.
        on_step: called after every call of a network.

    Returns:
        (T,) int64 semantic codes of each piece, and (K, T') int64 acoustic ones. T' makes prompt and target
        together as long in acoustic as in semantic codes.

    Raises:
        InputError: codes or phones that don't exist, or that don't fit each other.
    """
    if isinstance(draws, Sequence):
        if len(draws) != len(pieces):
            raise InputError(f"{len(draws)} generators for {len(pieces)} pieces; give each one")
        draws = GeneratorDraws(draws)
    report = None if on_step is None else lambda *_: on_step()
    given = [piece.given_semantic for piece in pieces]
    semantic = sample_semantic(
        networks.t2s,
        [T2SItem(piece.phones, piece.semantic) for piece in pieces],
        [piece.frames for piece in pieces],
        draws,
        config.semantic(),
        given=_all(given, [(piece.frames,) for piece in pieces]),
        on_step=report,
        reuse=config.reuse,
    )
    items = [
        S2AItem(torch.cat([piece.semantic.to(made), made]), piece.acoustic)
        for piece, made in zip(pieces, semantic, strict=True)
    ]
    sizes = [(networks.layers, len(item.semantic) - len(item.prompt)) for item in items]
    known = _all([piece.given_acoustic for piece in pieces], sizes)
    if networks.first is None:
        acoustic = sample_layers(
            *(networks.full, items, draws, config.full()), given=known, on_step=report, **config.predicting()
        )
    else:
        acoustic = sample_acoustic(
            *(networks.first, networks.full, items, draws, config.first(), config.full()),
            given=known,
            on_step=report,
            **config.predicting(),
        )
    return semantic, acoustic


def _all(given: list[Tensor | None], sizes: Sequence[tuple[int, ...]]) -> list[Tensor] | None:
    """Given codes of each piece, -1 for those of which none are given; None: of no piece are any."""
    if all(codes is None for codes in given):
        return None
    return [
        torch.full(size, -1) if codes is None else codes for codes, size in zip(given, sizes, strict=True)
    ]
