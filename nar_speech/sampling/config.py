"""Options of the masked-sampling loop.

The defaults are plain MaskGIT-style sampling of single tokens. :func:`magnet_config` and
:func:`maskgct_config` give the rules of the official implementations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from nar_speech.config import check_range
from nar_speech.errors import ConfigError

Schedule = Literal["cosine", "linear", "arccos", "square", "cubic", "sqrt", "even"]
MAX_STEPS = 10_000


@dataclass(frozen=True)
class MaskedConfig:
    """How one codebook is sampled.

    A unit is what is masked and fixed as a whole: a token (``span`` 1), a chunk of ``span`` neighbouring
    tokens (``nonoverlap``), or single tokens under overlapping spans (``stride1``).

    Attributes:
        steps: calls of the network; an upper limit with ``adaptive``, without a say with ``dilation``.
        schedule: share of masked units as a function of the progress u. ``cosine``, ``linear``, ``arccos``,
            ``square`` 1-u^2, ``cubic`` 1-u^3, ``sqrt`` 1-sqrt(u) (MaskGIT, arXiv 2202.04200, section 4);
            ``even``: the same whole number of units in every step, the rest in the last (Mask-CTC, arXiv
            2005.08700).
        progress: ``inclusive`` u = i/(N-1), the last step masks ``minimum`` units (MAGNeT); ``exclusive``
            u = i/N (MaskGIT, MaskGCT).
        minimum: units masked at least in every step; 0 ends an item as soon as nothing would be masked.
        span: tokens of a unit.
        arrangement: of spans (MAGNeT, arXiv 2401.04577, section 3.1): ``nonoverlap``, or ``stride1``, which
            may mask what was fixed before.
        scoring: of a unit: ``max`` 1 - its highest confidence; ``prod`` sum of -log confidence. Overlapping
            spans always take ``prod``, and so do single tokens of MAGNeT; ``dilation`` asks for no score.
        score_fixed: let fixed positions of a chunk that is partly fixed count in its score, with tokens drawn
            for them (official MAGNeT); otherwise its free positions alone count.
        temperature: of the softmax that tokens are drawn from.
        anneal: ``steps_left`` times (N-1-i)/N (MAGNeT), ``time`` times 1 - i/N (MaskGCT), or ``none``.
        temperature_floor: the lowest temperature.
        single_temperature: that of a stage of one step, in place of the others; 0: the same (MaskGCT: 0.2).
        greedy: the most probable token instead of a drawn one, whatever top_k and top_p are.
        final_greedy: so in the last of several steps only (MaskGCT).
        top_k, top_p: draw among the k most probable tokens (ties stay), or among the most probable ones
            before which less than p has been summed up; 0 is off. top_p wins over top_k (official MAGNeT).
        confidence: of a drawn token: its ``probability``; or of its distribution: ``purity`` highest
            probability, ``margin`` between the first two, ``entropy`` 1 - entropy / log V. Of the filtered
            distribution with top_k, of the whole one with top_p (official). ``logit``: of the token, without
            a softmax (Mask-CTC).
        tempered_confidence: take it after the temperature (MAGNeT) or before (MaskGCT).
        confidence_noise: added to it: this times Gumbel noise times the time 1 - i/N (choice temperature).
        guidance: coefficient g of classifier-free guidance, uncond + g (cond - uncond); 1 is off.
        guidance_end: what it is annealed to; the same as ``guidance`` if not given.
        guidance_anneal: along the share of masked units (``mask_ratio``, MAGNeT), or ``linear`` in u.
        guidance_rescale: share of the guided logits that is rescaled to the deviation of the conditional ones
            (arXiv 2305.08891, section 3.4).
        rescore_weight: w of p = w p_external + (1-w) p_model, for scores only (MAGNeT, section 3.4).
        dilation: block length, a power of two; 0 is off. Units are unmasked in log2(dilation)+1 steps, in
            groups of units far apart from each other: every ``dilation``-th first, then the middles between
            them (Dilated Unmasking Scheduler, arXiv 2506.19037).
        adaptive: unmask more than the schedule where the model is sure, and so end earlier: ``threshold``
            every unit of at least this confidence, ``factor`` the most n with (n+1)(1 - n-th confidence)
            below it (Fast-dLLM, arXiv 2505.22618), ``entropy`` the most whose entropies sum, without the
            largest, to at most so many nats (EB-Sampler, arXiv 2505.24857). Never less than the schedule.
        adaptive_level: threshold, factor, or bound.
        order: which units stay masked: those of low ``confidence``, or all but the ``left``most ones, so that
            an item grows from its beginning in spans (the pseudo-autoregressive stage of PALLE, arXiv
            2504.10352); where everything that is masked is predicted, but the nearest is kept.
        refine_rounds: calls after the last step. Each masks the least sure tokens again that have not been
            masked again before, and takes the most probable ones instead (the second stage of PALLE). A
            network that reads the time is given the one at which as much would be masked.
        refine_share: part of the free units of an item that a round masks, rounded down.
        explore: share of the units unmasked in a step of the first half that are the least certain ones
            instead of the most certain: they carry the most information for the others. After the idea of
            Explore-Then-Exploit (arXiv 2511.21103).
        drop_finished: take finished items out of the batch; exact where the network's rows are independent.
            False keeps the shapes of all calls the same.
    """

    steps: int = 16
    schedule: Schedule = "cosine"
    progress: Literal["inclusive", "exclusive"] = "exclusive"
    minimum: int = 0
    span: int = 1
    arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap"
    scoring: Literal["max", "prod"] = "max"
    score_fixed: bool = False
    temperature: float = 1.0
    anneal: Literal["none", "steps_left", "time"] = "none"
    temperature_floor: float = 0.01
    single_temperature: float = 0.0
    greedy: bool = False
    final_greedy: bool = False
    top_k: int = 0
    top_p: float = 0.0
    confidence: Literal["probability", "purity", "margin", "entropy", "logit"] = "probability"
    tempered_confidence: bool = True
    confidence_noise: float = 0.0
    guidance: float = 1.0
    guidance_end: float | None = None
    guidance_anneal: Literal["mask_ratio", "linear"] = "mask_ratio"
    guidance_rescale: float = 0.0
    rescore_weight: float = 0.7
    dilation: int = 0
    adaptive: Literal["none", "threshold", "factor", "entropy"] = "none"
    adaptive_level: float = 0.9
    order: Literal["confidence", "left"] = "confidence"
    refine_rounds: int = 0
    refine_share: float = 0.1
    explore: float = 0.0
    drop_finished: bool = True

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_STEPS, "steps")
        check_range(self, 0, MAX_STEPS, "minimum", "top_k", "refine_rounds")
        check_range(self, 1, 1000, "span")
        check_range(self, 0.0, 1.0, "top_p", "guidance_rescale", "rescore_weight", "explore", "refine_share")
        check_range(self, 0.0, 100.0, "temperature", "single_temperature", "confidence_noise")
        check_range(self, 1e-6, 100.0, "temperature_floor")
        check_range(self, -1000.0, 1000.0, "guidance")
        check_range(self, 0.0, 1e6, "adaptive_level")
        if self.guidance_end is not None:
            check_range(self, -1000.0, 1000.0, "guidance_end")
        self._check_accelerations()

    def _check_accelerations(self) -> None:
        if self.dilation and (self.dilation < 2 or self.dilation & (self.dilation - 1)):
            raise ConfigError(f"dilation: got {self.dilation}; must be a power of two such as 16, or 0")
        overlapping = self.arrangement == "stride1" and self.span > 1
        ordered = self.order != "confidence"
        named = {"dilation": self.dilation, "order": ordered}
        named |= {"adaptive": self.adaptive != "none", "explore": self.explore}
        used = [name for name, value in named.items() if value]
        if overlapping and (used or self.refine_rounds):
            raise ConfigError(
                f"{[*used, 'refine_rounds'][0]}: needs arrangement 'nonoverlap'; 'stride1' masks fixed tokens"
                " again"
            )
        if (self.dilation or ordered) and len(used) > 1:
            raise ConfigError(f"{used[0]}: fixes the order, so it can't go with {used[1]}; choose one")
        if self.confidence == "logit" and (self.scoring == "prod" or overlapping):
            raise ConfigError("confidence 'logit': can be negative, so it needs scoring 'max' and no overlap")
        if self.adaptive == "threshold" and self.adaptive_level > 1:
            raise ConfigError(f"adaptive_level: got {self.adaptive_level:g}; a threshold is at most 1")

    @property
    def planned(self) -> int:
        """Steps until every unit has been unmasked, at most."""
        return self.dilation.bit_length() if self.dilation else self.steps

    @property
    def calls(self) -> int:
        """The most calls of the network."""
        return self.planned + self.refine_rounds

    @property
    def overlapping(self) -> bool:
        """Whether spans overlap, so that fixed tokens can be masked again."""
        return self.arrangement == "stride1" and self.span > 1


def magnet_config(**options: Any) -> MaskedConfig:
    """MAGNeT's rules and the defaults of its public API (fact sheet, section 4); ``options`` replace some.

    ``score_fixed`` is False here: the official quirk is an option.
    """
    values: dict[str, Any] = {
        "steps": 20,
        "progress": "inclusive",
        "minimum": 1,
        "span": 3,
        "temperature": 3.0,
        "anneal": "steps_left",
        "top_p": 0.9,
        "guidance": 10.0,
        "guidance_end": 1.0,
    } | options
    if values["span"] == 1:  # single tokens are always scored by -log p there
        values["scoring"] = "prod"
    return MaskedConfig(**values)


def maskgct_config(
    steps: int, vocabulary: int, filter_threshold: float = 0.98, **options: Any
) -> MaskedConfig:
    """MaskGCT's rules: sine schedule in float32, top-k, Gumbel noise on the confidence, greedy last step.

    Args:
        vocabulary: number of tokens V; the best ceil((1 - filter_threshold) V) may be drawn.
        options: replace fields, for example ``temperature`` (0.9 by default; a single step always takes 0.2).
    """
    values: dict[str, Any] = {
        "temperature": 0.9,
        "anneal": "time",
        "temperature_floor": 1e-3,
        "single_temperature": 0.2,
        "final_greedy": True,
        "top_k": math.ceil((1 - filter_threshold) * vocabulary),
        "tempered_confidence": False,
        "confidence_noise": 1.0,
    } | options
    return MaskedConfig(steps=steps, **values)


def mask_ctc_config(iterations: int, **options: Any) -> MaskedConfig:
    """Mask-CTC's easy-first refinement: greedy, the same number of tokens fixed in every step."""
    return MaskedConfig(steps=iterations, schedule="even", greedy=True, **{"confidence": "logit"} | options)


def palle_config(steps: int = 100, rounds: int = 7, **options: Any) -> MaskedConfig:
    """The policies of PALLE (arXiv 2504.10352): spans from left to right, then rounds that refine.

    Of T free positions each step keeps T / ``steps``, the most probable tokens; where T is no multiple, spans
    differ by one.
    """
    values: dict[str, Any] = {"schedule": "linear", "order": "left", "greedy": True, "refine_rounds": rounds}
    return MaskedConfig(steps=steps, **(values | options))
