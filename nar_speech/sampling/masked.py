"""The masked-sampling loop: predict all masked positions, keep the surest, mask the others again.

One loop serves MAGNeT (codebook by codebook, spans), MaskGCT (tokens, noise on the confidence) and Mask-CTC
(given tokens stay); :mod:`nar_speech.sampling.config` has the rules of each. It knows no model: the network
is a callable (:mod:`nar_speech.sampling.step`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nar_speech.errors import ConfigError, InputError, NarSpeechError
from nar_speech.sampling.confidence import confidence_of, gumbel
from nar_speech.sampling.config import MaskedConfig
from nar_speech.sampling.draws import Draws, GeneratorDraws
from nar_speech.sampling.filters import draw_tokens
from nar_speech.sampling.guidance import guide, rescale
from nar_speech.sampling.schedules import make_plan, unit_counts
from nar_speech.sampling.selection import dilated_groups, keep_masked, sure_units, unit_certainty
from nar_speech.sampling.spans import any_in_chunk, overlapping_mask, to_positions, unit_scores
from nar_speech.sampling.step import Predict, Rescore, StepInfo
from nar_speech.sampling.trace import Trace

SETTLED = -1e4  # the score of a token that is not masked, where spans overlap (official MAGNeT)


@dataclass(frozen=True)
class MaskedResult:
    """What the loop gives.

    Attributes:
        tokens: (B, T) int64; behind an item's length as they were given.
        calls: calls of the network.
        item_calls: (B,) in how many of them each item took part.
    """

    tokens: Tensor
    calls: int
    item_calls: tuple[int, ...]


def masked_sample(
    predict: Predict,
    tokens: Tensor,
    fixed: Tensor,
    lengths: Tensor,
    config: MaskedConfig,
    draws: Draws | Sequence[torch.Generator] | None,
    *,
    mask_id: int,
    stage: int = 0,
    first_call: int = 0,
    priority: Tensor | None = None,
    rescore: Rescore | None = None,
    trace: Trace | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> MaskedResult:
    """Sample the tokens that are not fixed.

    The result of an item depends neither on its batch mates nor on the padding, as far as ``predict``
    doesn't.

    Args:
        predict: the network.
        tokens: (B, T) int64; read where ``fixed``.
        fixed: (B, T) bool, positions that keep their tokens: prompts anywhere, the surroundings of a gap.
        lengths: (B,) int64, valid positions of each item; the others are never touched.
        config: the rules.
        draws: one generator per item, or recorded draws; None only where nothing is random.
        mask_id: token that stands for a masked position.
        stage, first_call: what the network is told; for loops over codebooks.
        priority: (B, n) float, units in a fixed order: those with the highest values stay masked longest, and
            confidence has no say (Metis' prescheduled order, PALLE's left-to-right rounds).
        rescore: an external model's probabilities of the drawn tokens, mixed into the scores.
        trace: is filled with every step.
        on_step: called with (calls done, calls at most).

    Raises:
        InputError: shapes that do not fit, no generators where something is drawn, or not one for each item.
        ConfigError: arguments that don't go with the rules.
        NarSpeechError: the network gives NaN.
    """
    if tokens.dim() != 2 or fixed.shape != tokens.shape or lengths.shape != tokens.shape[:1]:
        raise InputError(
            f"masked sampling: tokens {tuple(tokens.shape)}, fixed {tuple(fixed.shape)}, lengths"
            f" {tuple(lengths.shape)}; expected (B, T), (B, T), (B,)"
        )
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= tokens.shape[1]:
        raise InputError(f"masked sampling: lengths {lengths.tolist()}; must be 0 to {tokens.shape[1]}")
    if config.overlapping and priority is not None:
        raise ConfigError("priority: needs arrangement 'nonoverlap'; 'stride1' masks fixed tokens again")
    if config.order != "confidence" and priority is not None:
        raise ConfigError(f"order '{config.order}': fixes the order, so priority has no say; choose one")
    if config.dilation and (priority is not None or rescore is not None):
        raise ConfigError("dilation: fixes the order, so priority and rescore have no say; choose one")
    if isinstance(draws, Sequence) and len(draws) != len(tokens):
        raise InputError(f"masked sampling: {len(draws)} generators for {len(tokens)} items; give each one")
    loop = _Loop(predict, tokens, fixed, lengths, config, draws, mask_id, stage, first_call)
    loop.priority, loop.rescore, loop.trace, loop.on_step = priority, rescore, trace, on_step
    if trace is not None and trace.fixed is None:
        trace.begin(loop.given[:, None], lengths)
    return loop.run()


class _Loop:
    """One run. B items, R rows that are still sampled, T positions, n units, M positions drawn for."""

    priority: Tensor | None
    rescore: Rescore | None
    trace: Trace | None
    on_step: Callable[[int, int], None] | None

    def __init__(
        self,
        predict: Predict,
        tokens: Tensor,
        fixed: Tensor,
        lengths: Tensor,
        config: MaskedConfig,
        draws: Draws | Sequence[torch.Generator] | None,
        mask_id: int,
        stage: int,
        first_call: int,
    ):
        self.predict, self.config, self.mask_id = predict, config, mask_id
        self.stage, self.first_call, self.lengths = stage, first_call, lengths
        self.draws = GeneratorDraws(draws) if isinstance(draws, Sequence) else draws
        length = tokens.shape[1]
        self.valid = torch.arange(length, device=tokens.device)[None] < lengths[:, None]
        self.given = fixed & self.valid
        self.free = ~fixed & self.valid
        self.masked = self.free.clone()
        self.tokens = torch.where(self.masked, mask_id, tokens)
        self.seen = torch.full_like(tokens, -1)  # input of each item's previous call
        self.span = 1 if config.overlapping else config.span
        self.plan = make_plan(config)
        self.groups, self.counts = self._planned(self._units(self.free))
        self.live = [i for i, counts in enumerate(self.counts) if counts[0] > 0]
        # Step of each item in the plan; steps that would unmask nothing of a dilated order are left out.
        self.at = [self._skip(0, counts[0], counts) if config.dilation else 0 for counts in self.counts]
        self.item_calls = [0] * len(tokens)
        self.predicts_mask = False
        # For the rounds that refine: how sure tokens were, which have been masked again, and what they were.
        self.sure = torch.zeros(tokens.shape, device=tokens.device)
        self.again = torch.zeros_like(self.free)
        self.before = self.tokens.clone()

    def _planned(self, units: Tensor) -> tuple[Tensor | None, list[list[int]]]:
        """Groups (n,) of a dilated order, and how many units of each item are masked at every step."""
        if not self.config.dilation:
            return None, unit_counts(self.config, self.plan, units.sum(1).tolist())
        groups = dilated_groups(units.shape[1], self.config.dilation).to(units.device)
        per_step = [(units & (groups >= step)).sum(1) for step in range(self.plan.steps)]
        return groups, torch.stack(per_step, 1).tolist()

    def _skip(self, step: int, left: int, counts: list[int]) -> int:
        """The last step from ``step`` on that plans for at least ``left`` masked units."""
        while step + 1 < self.plan.steps and counts[step + 1] >= left:
            step += 1
        return step

    def run(self) -> MaskedResult:
        """All steps."""
        calls = 0
        while self.live:
            whole = len(self.live) == len(self.tokens) or not self.config.drop_finished
            items = list(range(len(self.tokens))) if whole else self.live
            rows = torch.tensor(items, device=self.tokens.device)
            info, masked, needed = self._step_info(rows, items, self.first_call + calls)
            drawn, confidence, certainty = self._predict(rows, info, needed)
            filled = torch.where(masked, drawn, self.tokens[rows])
            if self.rescore is not None:
                weight = self.config.rescore_weight
                external = self.rescore(filled, info).to(confidence)
                confidence = torch.where(needed, weight * external + (1 - weight) * confidence, 0.0)
            if self.trace is not None:
                self.trace.add(info, masked, filled, confidence.masked_fill(~masked, 0.0))
            calls += 1
            for item in self.live:
                self.item_calls[item] += 1
            kept = self._select(rows, items, masked, needed, confidence, certainty)
            if self.config.refine_rounds:
                filled, kept = self._refine(rows, items, masked, filled, confidence, kept)
            # A position whose prediction is the mask itself stays masked (Mask-CTC).
            kept = kept | (masked & (filled == self.mask_id))
            self.tokens[rows] = torch.where(kept, self.mask_id, filled)
            live = torch.tensor([item in self.live for item in items], device=rows.device)
            self.masked[rows] = kept & live[:, None]
            if self.on_step is not None:
                self.on_step(self.first_call + calls, self.first_call + self.config.calls)
        return MaskedResult(self.tokens, calls, tuple(self.item_calls))

    def _step_info(self, rows: Tensor, items: list[int], call: int) -> tuple[StepInfo, Tensor, Tensor]:
        """What the network is told, the masked positions (R, T), and those that tokens are drawn for."""
        device, plan = self.tokens.device, self.plan
        at = [min(self.at[item], len(plan.time) - 1) for item in items]
        masked = self.masked[rows]
        needed = masked
        if self.config.score_fixed and self.span > 1:
            touched = to_positions(any_in_chunk(masked, self.span), self.span, masked.shape[1])
            needed = masked | (touched & self.valid[rows])
        current = self.tokens[rows]

        def per_row(values: Sequence[float]) -> Tensor:
            return torch.tensor([values[step] for step in at], dtype=torch.float32, device=device)

        info = StepInfo(
            call=call,
            stage=self.stage,
            steps=plan.steps,
            step=torch.tensor(at, device=device),
            progress=per_row(plan.progress),
            time=per_row(plan.time),
            guidance=per_row(plan.guidance),
            guided=any(plan.guidance[step] != 1 for step in at),
            temperature=per_row(plan.temperature),
            lengths=self.lengths[rows],
            active=needed,
            changed=current != self.seen[rows],
            frozen=self._frozen(rows, masked),
            rows=rows,
            items=tuple(items),
        )
        self.seen[rows] = current
        return info, masked, needed

    def _predict(
        self, rows: Tensor, info: StepInfo, needed: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Drawn tokens and their confidence, (R, T) each; confidence and entropy of units where adaptive."""
        config = self.config
        logits = self._guided(info, needed)
        self.predicts_mask = logits.shape[1] > self.mask_id
        place = needed.nonzero()[:, 0]
        greedy = torch.full_like(info.step, config.greedy, dtype=torch.bool)
        if config.final_greedy and info.steps > 1:
            greedy |= info.step == info.steps - 1
        greedy |= info.step >= info.steps  # rounds that refine
        random = None
        if not bool(greedy.all()):
            drawing = needed & ~greedy[:, None]  # who draws nothing leaves its generator as it is
            drawn = self._source().tokens(info.items, drawing, logits.shape[1])
            random = drawn.new_ones((len(place), *drawn.shape[1:]))
            random[~greedy[place]] = drawn
        tokens, probabilities = draw_tokens(
            logits,
            info.temperature[place],
            random,
            config.top_k,
            config.top_p,
            config.tempered_confidence,
        )
        tokens = torch.where(greedy[place], logits.argmax(-1), tokens)
        certain = confidence_of(config.confidence, probabilities, tokens, logits)
        certainty = None
        if config.adaptive != "none":
            certainty = unit_certainty(torch.softmax(logits, -1), tokens, needed, self.span)
        drawn = torch.zeros_like(self.tokens[rows]).masked_scatter(needed, tokens)
        confidence = torch.zeros(needed.shape, device=needed.device).masked_scatter(needed, certain)
        return drawn, confidence, certainty

    def _guided(self, info: StepInfo, needed: Tensor) -> Tensor:
        """Guided float32 logits (M, V) of the needed positions."""
        conditional, unconditional = self.predict(self.tokens[info.rows], info)
        flat = conditional.dim() == 2
        if unconditional is not None:
            conditional, unconditional = conditional.float(), unconditional.float()
            if self.config.guidance_rescale:
                if flat:
                    raise ConfigError("guidance_rescale: needs logits of all positions from the network")
                guided = guide(conditional, unconditional, info.guidance)
                valid = self.valid[info.rows]
                conditional = rescale(guided, conditional, self.config.guidance_rescale, valid)
            else:
                if not flat:
                    conditional, unconditional = conditional[needed], unconditional[needed]
                    flat = True
                coefficient = info.guidance[needed.nonzero()[:, 0]]
                conditional = guide(conditional, unconditional, coefficient)
        logits = (conditional if flat else conditional[needed]).float()
        if bool(logits.isnan().any()):
            raise NarSpeechError(
                f"masked sampling: the network gave NaN at call {info.call}; use float32 or check the weights"
            )
        return logits

    def _source(self) -> Draws:
        if self.draws is None:
            raise InputError("masked sampling: nothing to draw with; give a generator for every item")
        return self.draws

    def _select(
        self,
        rows: Tensor,
        items: list[int],
        masked: Tensor,
        needed: Tensor,
        confidence: Tensor,
        certainty: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Positions (R, T) that are masked at the next step; moves every item on in the plan."""
        config, plan = self.config, self.plan
        at = [self.at[item] for item in items]
        later = [self.counts[i][s + 1] if s + 1 < plan.steps else 0 for i, s in zip(items, at, strict=True)]
        noise = self._noise(items, at, needed)
        if config.overlapping:
            scores = unit_scores(confidence, masked, 1, "prod", noise).masked_fill(~masked, SETTLED)
            wanted = torch.tensor(later, device=rows.device)
            chosen = overlapping_mask(scores, wanted, self.lengths[rows], config.span)
            kept = chosen & self.free[rows] & (wanted > 0)[:, None]
            self._advance(items, later, None)
            return kept
        candidates = self._units(masked)
        if config.dilation:
            scores = self.groups.float().expand(candidates.shape)
        elif config.order == "left":
            scores = torch.arange(candidates.shape[1], device=rows.device).float().expand(candidates.shape)
        elif self.priority is not None:
            scores = self.priority[rows].to(confidence)
        else:
            scores = unit_scores(confidence, needed, self.span, config.scoring, noise)
        present = [self.counts[item][min(step, plan.steps - 1)] for item, step in zip(items, at, strict=True)]
        if self.predicts_mask:  # predicted masks have stayed; the pace is that of the plan
            planned, present = present, candidates.sum(1).tolist()
            pairs = zip(present, planned, later, strict=True)
            later = [max(now - (was - then), 0) if then else 0 for now, was, then in pairs]
        elif certainty is not None:
            present = candidates.sum(1).tolist()
        explored = None
        if config.explore:
            shares = [
                round(config.explore * (now - then))
                if then and plan.time[min(step, plan.steps - 1)] > 0.5
                else 0
                for now, then, step in zip(present, later, at, strict=True)
            ]
            explored = torch.tensor(shares, device=rows.device)
        units = keep_masked(scores, candidates, torch.tensor(later, device=rows.device), explored)
        remaining = None
        if certainty is not None:
            units = units & ~sure_units(config.adaptive, config.adaptive_level, *certainty, candidates)
            remaining = units.sum(1).tolist()
        self._advance(items, later, remaining)
        return self._positions(units) & self.free[rows] & masked

    def _frozen(self, rows: Tensor, masked: Tensor) -> Tensor:
        """Positions (R, T) whose tokens stay to the end."""
        if self.config.overlapping:
            return self.given[rows]
        return ~(self.free[rows] & ~self.again[rows] | masked) if self.config.refine_rounds else ~masked

    def _refine(
        self,
        rows: Tensor,
        items: list[int],
        masked: Tensor,
        filled: Tensor,
        confidence: Tensor,
        kept: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Let items that have nothing left to unmask mask their least sure units again.

        Returns:
            The filled-in tokens (R, T), the old ones where a round predicts the mask itself; and positions
            (R, T) that are masked at the next step.
        """
        later = torch.tensor([self.at[item] > self.plan.steps for item in items], device=rows.device)
        old = later[:, None] & masked & (filled == self.mask_id)
        filled = torch.where(old, self.before[rows], filled)
        fixed = masked & ~kept & (filled != self.mask_id)
        self.sure[rows] = torch.where(fixed, confidence, self.sure[rows])
        free = self.free[rows]
        next_step = [max(self.at[item], self.plan.steps) for item in items]
        due = [
            item not in self.live and step < len(self.plan.time)
            for item, step in zip(items, next_step, strict=True)
        ]
        fresh = self._units(free & (filled != self.mask_id)) & ~self._units(self.again[rows])
        count = (self._units(free).sum(1) * self.config.refine_share + 1e-6).long()
        count = count * torch.tensor(due, device=rows.device)
        scores = unit_scores(self.sure[rows], free, self.span, "max")
        chosen = keep_masked(scores, fresh, count)
        for item, step, goes_on in zip(items, next_step, chosen.any(1).tolist(), strict=True):
            if goes_on:
                self.at[item] = step
                self.live = sorted({*self.live, item})
        places = self._positions(chosen) & free
        self.again[rows] |= places
        self.before[rows] = torch.where(places, filled, self.before[rows])
        return filled, torch.where(chosen.any(1, keepdim=True), places, kept)

    def _noise(self, items: list[int], at: list[int], needed: Tensor) -> Tensor | None:
        """Gumbel noise (R, T) on the confidence, as strong as the step has it."""
        if not self.config.confidence_noise:
            return None
        drawn = gumbel(self._source().noise(items, needed))
        noise = torch.zeros(needed.shape, device=needed.device).masked_scatter(needed, drawn)
        time = [self.plan.time[min(step, self.plan.steps - 1)] * self.config.confidence_noise for step in at]
        return noise * torch.tensor(time, device=needed.device)[:, None]

    def _advance(self, items: list[int], later: list[int], remaining: list[int] | None) -> None:
        """Move items to their next step; those with nothing left to do are finished.

        Items that have unmasked more than planned go on at the step whose plan they have reached.
        """
        unfinished = set(self.live)
        for row, item in enumerate(items):
            if item not in unfinished:
                continue
            left = later[row] if remaining is None else remaining[row]
            step = self.at[item] + 1
            if left and (remaining is not None or self.config.dilation):
                step = self._skip(step, left, self.counts[item])
            self.at[item] = step
            if not left or step >= self.plan.steps:
                unfinished.discard(item)
        self.live = sorted(unfinished)

    def _units(self, positions: Tensor) -> Tensor:
        """(R, n) which units have any of these positions."""
        return positions if self.span == 1 else any_in_chunk(positions, self.span)

    def _positions(self, units: Tensor) -> Tensor:
        """(R, T) positions of units."""
        return units if self.span == 1 else to_positions(units, self.span, self.tokens.shape[1])
