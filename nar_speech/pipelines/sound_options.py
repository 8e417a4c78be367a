"""Options of sound generation: the part ``generation`` of ``model.yaml``, and of a single call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nar_speech import config as configs
from nar_speech.config import check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.sampling.codebooks import CodebookConfig
from nar_speech.sampling.config import MAX_STEPS, magnet_config

MAX_SECONDS = 600.0


@dataclass(frozen=True)
class GenerationConfig:
    """How clips are made. The defaults are those of MAGNeT's public API; the fields without a word here are
    those of :class:`nar_speech.sampling.config.MaskedConfig`.

    Attributes:
        steps: calls of the network per codebook; the last number counts for all further ones.
        anneal: let the temperature fall to zero in every codebook.
        greedy: take the most probable codes; top_k and top_p have then no say.
        top_p: 0 if not given where ``top_k`` is, which it would win over.
        span: frames that are masked together; 0: as the model was trained.
        reuse: keep keys and values of frames that did not change, with a full pass every so many steps; 0:
            off. An approximation (dKV-Cache, arXiv 2505.15781; Fast-dLLM, arXiv 2505.22618).
        hybrid_guidance, hybrid_top_k, hybrid_temperature: of the autoregressive partner that begins a clip.
        context: share of the model's segment that a window of a long clip shares with what is known before
            it.
        official: the quirks of the official code too: lengths cut to a multiple of the span, padded text
            attended to, given frames counted in the scores.
        loudness: LUFS that clips are brought to without clipping; None: as the model made them. Filled gaps
            keep the level of their recording.
    """

    steps: tuple[int, ...] = (20, 10, 10, 10)
    schedule: str = "cosine"
    temperature: float = 3.0
    anneal: bool = True
    greedy: bool = False
    top_k: int = 0
    top_p: float = 0.9
    guidance: float = 10.0
    guidance_end: float = 1.0
    span: int = 0
    arrangement: Literal["nonoverlap", "stride1"] = "nonoverlap"
    scoring: Literal["max", "prod"] = "max"
    dilation: int = 0
    adaptive: Literal["none", "threshold", "factor", "entropy"] = "none"
    adaptive_level: float = 0.9
    explore: float = 0.0
    reuse: int = 0
    rescore_weight: float = 0.7
    hybrid_guidance: float = 3.0
    hybrid_top_k: int = 250
    hybrid_temperature: float = 1.0
    context: float = 0.4
    official: bool = False
    loudness: float | None = -14.0

    def __post_init__(self) -> None:
        check_range(self, 0, 1000, "span")
        check_range(self, 0, MAX_STEPS, "reuse")
        check_range(self, 0.0, 0.9, "context")
        if self.loudness is not None:
            check_range(self, -70.0, 0.0, "loudness")
        self.codebooks(3)  # the rules check themselves

    def codebooks(self, trained_span: int) -> CodebookConfig:
        """The rules for a model that was trained on spans of so many frames."""
        rules = magnet_config(
            schedule=self.schedule,
            span=self.span or trained_span,
            arrangement=self.arrangement,
            scoring=self.scoring,
            score_fixed=self.official,
            temperature=self.temperature,
            anneal="steps_left" if self.anneal else "none",
            greedy=self.greedy,
            top_k=self.top_k,
            top_p=self.top_p,
            guidance=self.guidance,
            guidance_end=self.guidance_end,
            dilation=self.dilation,
            adaptive=self.adaptive,
            adaptive_level=self.adaptive_level,
            explore=self.explore,
            rescore_weight=self.rescore_weight,
        )
        return CodebookConfig(self.steps, rules)


def change(config: GenerationConfig, options: Mapping[str, Any], where: str = "options") -> GenerationConfig:
    """``config`` with some fields replaced; ``where`` they come from is named in errors.

    Raises:
        ConfigError: an unknown or wrong option.
    """
    if not options:
        return config
    options = dict(options)
    if isinstance(options.get("steps"), int):
        options["steps"] = (options["steps"],)
    if options.get("top_k") and "top_p" not in options:
        options["top_p"] = 0.0  # top_p would win
    return configs.from_dict(GenerationConfig, {**vars(config), **options}, where)


def check_duration(seconds: Any, what: str = "duration") -> float:
    """A length of a clip.

    Raises:
        InputError: not a number, not above 0, or beyond the limit.
    """
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds)
    if not number or not 0 < seconds <= MAX_SECONDS:
        raise InputError(f"{what}: got {seconds}; must be above 0 and at most {MAX_SECONDS:g} seconds")
    return float(seconds)


def per_item(value: Any, count: int, what: str) -> list[Any]:
    """A list with one value for each item: a list as it is, anything else for all.

    Raises:
        ConfigError: a list of another length.
    """
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ConfigError(
            f"{what}: {len(value)} values for {count} prompts; give one for each, or one for all"
        )
    return value
