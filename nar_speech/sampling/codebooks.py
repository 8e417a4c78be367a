"""Codebook after codebook: the stages of MAGNeT (arXiv 2401.04577) on the masked-sampling loop.

Codebook 0 is sampled first, with all others masked; then codebook 1 given codebook 0, and so on. What is
given can lie anywhere: a prompt in front (continuation, or the codes of an autoregressive model: the hybrid
mode), both sides of a gap (in-painting), or whole codebooks (new details on the coarse codes of a recording).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nar_speech.errors import ConfigError, InputError
from nar_speech.sampling.config import MaskedConfig, magnet_config
from nar_speech.sampling.draws import Draws, GeneratorDraws
from nar_speech.sampling.masked import masked_sample
from nar_speech.sampling.step import PredictCodebook, Rescore, StepInfo
from nar_speech.sampling.trace import Trace


@dataclass(frozen=True)
class CodebookConfig:
    """How all codebooks are sampled.

    Attributes:
        steps: calls of the network for each codebook; the last number counts for all further codebooks.
        rules: of every codebook; ``steps`` there is not used.
        cut: cut every length down to a multiple of the span, as the official code does with non-overlapping
            spans. By default the last chunk is shorter instead, so a clip is as long as it was asked for;
            where the length is a multiple of the span both give the same.
    """

    steps: tuple[int, ...] = (20, 10, 10, 10)
    rules: MaskedConfig = field(default_factory=magnet_config)
    cut: bool = False

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1:
            raise ConfigError(f"steps: got {list(self.steps)}; must be whole numbers above 0, one a codebook")

    def stage(self, index: int) -> MaskedConfig:
        """The rules of one codebook."""
        return dataclasses.replace(self.rules, steps=self.steps[min(index, len(self.steps) - 1)])

    def calls(self, codebooks: int) -> int:
        """The most calls of the network."""
        return sum(self.stage(index).calls for index in range(codebooks))


@dataclass(frozen=True)
class CodesResult:
    """Sampled codes.

    Attributes:
        tokens: (B, K, T) int64, 0 behind an item's length.
        lengths: (B,) int64 frames.
        calls: calls of the network.
        item_calls: (B,) in how many of them each item took part.
    """

    tokens: Tensor
    lengths: Tensor
    calls: int
    item_calls: tuple[int, ...]


def sample_codebooks(
    predict: PredictCodebook,
    codes: Tensor,
    fixed: Tensor,
    lengths: Tensor,
    config: CodebookConfig,
    draws: Draws | Sequence[torch.Generator] | None,
    *,
    mask_id: int,
    rescore: Rescore | None = None,
    trace: Trace | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> CodesResult:
    """Sample all codes that are not fixed, one codebook after the other.

    Args:
        predict: the network, called with (R, K, T) ids: mask id in later codebooks and at masked positions.
        codes: (B, K, T) int64 in [0, mask_id); read where ``fixed``.
        fixed: (B, T) or (B, K, T) bool, what is given.
        lengths: (B,) int64 frames of each item.
        config: the rules.
        draws: one generator per item, which goes on from codebook to codebook, or recorded draws.
        mask_id: number of codes, the id that stands for a masked position.
        rescore: an external model, called with (R, K, T) ids: this codebook filled in, later ones masked.
        trace: is filled with every step.
        on_step: called with (calls done, calls at most).

    Raises:
        InputError: shapes that do not fit, given codes out of range.
    """
    if codes.dim() != 3 or fixed.shape not in (codes.shape, codes[:, 0].shape) or len(lengths) != len(codes):
        raise InputError(
            f"codebooks: codes {tuple(codes.shape)}, fixed {tuple(fixed.shape)}, lengths"
            f" {tuple(lengths.shape)}; expected (B, K, T), (B, T) or (B, K, T), (B,)"
        )
    if isinstance(draws, Sequence) and len(draws) != len(codes):
        raise InputError(f"codebooks: {len(draws)} generators for {len(codes)} items; give each one")
    count = codes.shape[1]
    fixed = fixed[:, None].expand_as(codes) if fixed.dim() == 2 else fixed
    if config.cut and config.rules.span > 1 and not config.rules.overlapping:
        lengths = lengths // config.rules.span * config.rules.span
        most = int(lengths.max()) if len(lengths) else 0
        codes, fixed = codes[..., :most], fixed[..., :most]
    valid = torch.arange(codes.shape[2], device=codes.device)[None, None] < lengths[:, None, None]
    fixed = fixed & valid
    given = codes[fixed]
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < mask_id:
        raise InputError(
            f"codes out of range: {int(given.min())} to {int(given.max())}; this model's codes are 0 to"
            f" {mask_id - 1}: was the codec another one?"
        )
    if trace is not None:
        trace.begin(fixed, lengths)
    draws = GeneratorDraws(draws) if isinstance(draws, Sequence) else draws
    stages = _Stages(predict, rescore, torch.where(fixed, codes, mask_id))
    total, calls, item_calls = config.calls(count), 0, [0] * len(codes)
    for stage in range(count):
        result = masked_sample(
            stages.predict,
            stages.codes[:, stage],
            fixed[:, stage],
            lengths,
            config.stage(stage),
            draws,
            mask_id=mask_id,
            stage=stage,
            first_call=calls,
            rescore=stages.rescore if rescore is not None else None,
            trace=trace,
            on_step=None if on_step is None else lambda done, _: on_step(done, total),
        )
        stages.codes[:, stage] = torch.where(valid[:, 0], result.tokens, mask_id)
        calls += result.calls
        item_calls = [a + b for a, b in zip(item_calls, result.item_calls, strict=True)]
    return CodesResult(stages.codes.masked_fill(~valid, 0), lengths, calls, tuple(item_calls))


class _Stages:
    """Puts the tokens of one codebook among the others."""

    def __init__(self, predict: PredictCodebook, rescore: Rescore | None, codes: Tensor):
        self._predict, self._rescore, self.codes = predict, rescore, codes
        self._seen = torch.full_like(codes, -1)  # input of each item's previous call

    def _whole(self, tokens: Tensor, info: StepInfo) -> Tensor:
        """(R, K, T) ids with the tokens (R, T) of this stage."""
        whole = self.codes[info.rows]
        inside = torch.arange(tokens.shape[1], device=tokens.device)[None] < info.lengths[:, None]
        whole[:, info.stage] = torch.where(inside, tokens, whole[:, info.stage])
        return whole

    def predict(self, tokens: Tensor, info: StepInfo) -> tuple[Tensor, Tensor | None]:
        """See :data:`nar_speech.sampling.step.Predict`."""
        whole = self._whole(tokens, info)
        changed = (whole != self._seen[info.rows]).any(1)
        self._seen[info.rows] = whole
        return self._predict(whole, dataclasses.replace(info, changed=changed))

    def rescore(self, tokens: Tensor, info: StepInfo) -> Tensor:
        """See :data:`nar_speech.sampling.step.Rescore`."""
        return self._rescore(self._whole(tokens, info), info)
