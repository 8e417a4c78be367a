"""The two stages of MaskGCT: semantic codes from phones, acoustic codes from semantic ones, in batches.

An item's codes depend on its own inputs and generator alone: a batch gives what its items give one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nar_speech.config import check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.models.maskgct import S2A, T2S, S2AItem, T2SItem
from nar_speech.models.maskgct_predictor import predictor
from nar_speech.sampling.codebooks import CodebookConfig, sample_codebooks
from nar_speech.sampling.config import MaskedConfig, maskgct_config
from nar_speech.sampling.draws import Draws, GeneratorDraws
from nar_speech.sampling.masked import masked_sample
from nar_speech.sampling.trace import Trace

FREE = -1  # a code that is to be made
Source = Draws | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class StageOptions:
    """How one network is sampled; the defaults are those of the official text-to-semantic stage.

    Attributes:
        steps: of each layer of codes; the last number counts for all further layers. The full acoustic
            network begins with its second layer and reads the second number first, as officially.
        cfg: strength w of guidance, e + w (e - u); 0: none.
        rescale: part of it that is brought back to the deviation of e.
        temperature: at the first step; it falls to 0. A layer of one step always takes 0.2.
        filter_threshold: 1 minus the part of the codes that may be drawn.
        rules: further fields of :class:`nar_speech.sampling.config.MaskedConfig`.
    """

    steps: tuple[int, ...] = (25,)
    cfg: float = 2.5
    rescale: float = 0.75
    temperature: float = 0.9
    filter_threshold: float = 0.98
    rules: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.steps:
            raise ConfigError("steps: there is no number; give one for each layer of codes")
        check_range(self, 0.0, 100.0, "cfg")
        check_range(self, 0.0, 1.0, "rescale")
        check_range(self, 0.0, 0.999999, "filter_threshold")

    def config(self, vocabulary: int) -> MaskedConfig:
        """The rules of the loop for one codebook of so many codes."""
        return maskgct_config(
            self.steps[0],
            vocabulary,
            self.filter_threshold,
            **{"guidance": 1 + self.cfg, "temperature": self.temperature} | dict(self.rules),
        )


SEMANTIC = StageOptions()
FIRST_LAYER = StageOptions(temperature=1.5)
ALL_LAYERS = StageOptions(steps=(25, 10, 1), temperature=1.5)


def sample_semantic(
    network: T2S,
    items: Sequence[T2SItem],
    lengths: Sequence[int],
    draws: Source,
    options: StageOptions = SEMANTIC,
    *,
    given: Sequence[Tensor] | None = None,
    priority: Tensor | None = None,
    trace: Trace | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **predicting: Any,
) -> list[Tensor]:
    """Make semantic codes.

    Args:
        items: phones and prompts.
        lengths: frames to make of each, at least 1.
        draws: a generator for each item, or recorded draws.
        given: (T,) int64 codes of each item that stay as they are, -1 where one is to be made.
        priority: see :func:`nar_speech.sampling.masked.masked_sample`.
        trace: is filled with every step.
        on_step: called with (calls done, calls at most).
        predicting: fields of :class:`nar_speech.models.maskgct_predictor.PredictorOptions`.

    Returns:
        (T,) int64 codes of each item's target.

    Raises:
        InputError: inputs that do not fit each other or the network.
    """
    codes = [row[None] for row in given] if given is not None else None
    tokens, fixed, sizes = _canvas(len(items), lengths, 1, codes, network)
    result = masked_sample(
        predictor(network, items, **{"rescale": options.rescale} | predicting),
        tokens[:, 0],
        fixed[:, 0],
        sizes,
        options.config(network.mask_id),
        draws,
        mask_id=network.mask_id,
        priority=priority,
        trace=trace,
        on_step=on_step,
    )
    return [row[:length] for row, length in zip(result.tokens, lengths, strict=True)]


def sample_layers(
    network: S2A,
    items: Sequence[S2AItem],
    draws: Source,
    options: StageOptions = FIRST_LAYER,
    *,
    given: Sequence[Tensor] | None = None,
    trace: Trace | None = None,
    on_step: Callable[[int, int], None] | None = None,
    **predicting: Any,
) -> list[Tensor]:
    """Make the layers of acoustic codes of one network, one after the other.

    Args:
        items: semantic codes and acoustic prompts; a target is as long as the former without the latter.
        given: (K', T) int64 codes of each item's first layers that stay, -1 where one is to be made.
        draws, trace, on_step, predicting: see :func:`sample_semantic`.

    Returns:
        (K, T) int64 codes of each item's target.

    Raises:
        InputError: inputs that do not fit each other or the network.
    """
    lengths = [len(item.semantic) - len(item.prompt) for item in items]
    tokens, fixed, sizes = _canvas(len(items), lengths, network.config.num_codebooks, given, network)
    result = sample_codebooks(
        predictor(network, items, **{"rescale": options.rescale} | predicting),
        tokens,
        fixed,
        sizes,
        CodebookConfig(options.steps, options.config(network.mask_id)),
        draws,
        mask_id=network.mask_id,
        trace=trace,
        on_step=on_step,
    )
    return [row[:, :length] for row, length in zip(result.tokens, lengths, strict=True)]


def sample_acoustic(
    first: S2A,
    full: S2A,
    items: Sequence[S2AItem],
    draws: Source,
    first_options: StageOptions = FIRST_LAYER,
    full_options: StageOptions = ALL_LAYERS,
    *,
    given: Sequence[Tensor] | None = None,
    **predicting: Any,
) -> list[Tensor]:
    """Make all layers of acoustic codes: the first by a network of its own, the rest by the full one.

    Args and errors as in :func:`sample_layers`; ``given`` (K, T).

    Returns:
        (K, T) int64 codes of each item's target.
    """
    if isinstance(draws, Sequence):
        if len(draws) != len(items):
            raise InputError(f"sampling: {len(draws)} generators for {len(items)} items; give each one")
        draws = GeneratorDraws(draws)  # they go on from network to network
    coarse = None if given is None else [codes[: first.config.num_codebooks] for codes in given]
    made = sample_layers(first, items, draws, first_options, given=coarse, **predicting)
    if given is not None:
        made = [torch.cat([new, codes[len(new) :].to(new)]) for new, codes in zip(made, given, strict=True)]
    return sample_layers(full, items, draws, full_options, given=made, **predicting)


def _canvas(
    count: int, lengths: Sequence[int], layers: int, given: Sequence[Tensor] | None, network: T2S | S2A
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (B, K, T), which of them are given (B, K, T), and lengths (B,)."""
    if len(lengths) != count or (given is not None and len(given) != count):
        raise InputError(f"sampling: {count} items, but another number of lengths or of given codes")
    if count == 0:
        raise InputError("sampling: there are no items")
    if min(lengths) < 1:
        raise InputError(
            f"sampling: a target of {min(lengths)} frames; it must have at least one behind the prompt"
        )
    codes = torch.full((count, layers, max(lengths)), FREE)
    for row, part in enumerate(given or ()):
        if part.dim() != 2 or len(part) > layers or part.shape[1] != lengths[row]:
            raise InputError(
                f"given codes: {tuple(part.shape)} for item {row} of {layers} layers, {lengths[row]} frames"
            )
        codes[row, : len(part), : lengths[row]] = part.cpu()
    codes = codes.to(network.device)
    fixed = codes != FREE
    wrong = codes[fixed & ((codes < 0) | (codes >= network.mask_id))]
    if len(wrong):
        raise InputError(f"given codes: {int(wrong[0])} does not exist; they are 0 to {network.mask_id - 1}")
    return codes.clamp_min(0), fixed, torch.tensor(list(lengths), device=network.device)
