"""Options of speech synthesis: the part ``synthesis`` of ``model.yaml``, and of a single call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nar_speech import config as configs
from nar_speech.config import check_range
from nar_speech.errors import ConfigError
from nar_speech.pipelines.maskgct_stages import StageOptions
from nar_speech.sampling.config import MAX_STEPS
from nar_speech.text.g2p.scripts import LANGUAGES

SPOKEN = ("auto", *LANGUAGES, "phones")


@dataclass(frozen=True)
class SynthesisConfig:
    """How speech is made. The defaults are those of MaskGCT's official code.

    Attributes:
        steps: calls of the text-to-semantic network.
        acoustic_steps: of each layer of acoustic codes; the last number counts for all further ones.
        cfg, acoustic_cfg: strength w of guidance, e + w (e - u); 0: none.
        rescale: part of it that is brought back to the deviation of e.
        temperature, acoustic_temperature: at the first step; they fall to 0.
        filter_threshold: 1 minus the part of the codes that may be drawn.
        guided_layers: guide only so many first layers of acoustic codes, for speed; 0: all.
        reuse: keep keys and values of phones and prompt for so many steps, an approximation; 0: off.
        length: how long speech becomes where no duration is given: ``prompt``: by its speed, in phones per
            second (the official rule); ``rate``: by ``phones_per_second``, whatever the prompt's speed;
            ``predictor``: by the model's own predictor of durations, where it has one.
        phones_per_second: of the rule ``rate``; 13 is common for read English, marks and gaps counted.
        speed: the length by the rule is divided by this.
        piece_seconds: longer texts are cut into pieces of about so much, which are made in one batch.
        pause: seconds of silence between such pieces.
        language, prompt_language: of text and transcript: ``auto``, ``en`` ... or ``phones``, see
            :class:`nar_speech.text.g2p.phonemizer.PhonemizerConfig`.
        watermark: mark the sound, inaudibly, as made by a machine.
    """

    steps: int = 25
    acoustic_steps: tuple[int, ...] = (25, 10, 1)
    cfg: float = 2.5
    acoustic_cfg: float = 2.5
    rescale: float = 0.75
    temperature: float = 0.9
    acoustic_temperature: float = 1.5
    filter_threshold: float = 0.98
    guided_layers: int = 0
    reuse: int = 0
    length: Literal["prompt", "rate", "predictor"] = "prompt"
    phones_per_second: float = 13.0
    speed: float = 1.0
    piece_seconds: float = 15.0
    pause: float = 0.15
    language: str = "auto"
    prompt_language: str = "auto"
    watermark: bool = True

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_STEPS, "steps")
        check_range(self, 0, configs.MAX_WIDTH, "guided_layers")
        check_range(self, 0, MAX_STEPS, "reuse")
        check_range(self, 0.25, 4.0, "speed")
        check_range(self, 1.0, 60.0, "phones_per_second")
        check_range(self, 2.0, 30.0, "piece_seconds")
        check_range(self, 0.0, 5.0, "pause")
        for name in ("language", "prompt_language"):
            if getattr(self, name) not in SPOKEN:
                raise ConfigError(f"{name} '{getattr(self, name)}': valid are {', '.join(SPOKEN)}")
        for options in (self.semantic(), self.first(), self.full()):  # the rules check themselves
            options.config(2)

    def semantic(self) -> StageOptions:
        """Of the text-to-semantic network."""
        return StageOptions((self.steps,), self.cfg, self.rescale, self.temperature, self.filter_threshold)

    def first(self) -> StageOptions:
        """Of the network of the first layer."""
        return self._acoustic(self.acoustic_steps[:1])

    def full(self) -> StageOptions:
        """Of the network of all layers."""
        return self._acoustic(self.acoustic_steps)

    def predicting(self) -> dict[str, Any]:
        """Options of how the networks are computed."""
        return {"guided_layers": self.guided_layers, "reuse": self.reuse}

    def acoustic_calls(self, layers: int) -> int:
        """Calls of the networks for so many layers of acoustic codes, at most."""
        return sum(self.acoustic_steps[min(k, len(self.acoustic_steps) - 1)] for k in range(layers))

    def _acoustic(self, steps: tuple[int, ...]) -> StageOptions:
        return StageOptions(
            steps, self.acoustic_cfg, self.rescale, self.acoustic_temperature, self.filter_threshold
        )


def change(config: SynthesisConfig, options: Mapping[str, Any], where: str = "options") -> SynthesisConfig:
    """``config`` with some fields replaced; ``where`` they come from is named in errors.

    Raises:
        ConfigError: an unknown or wrong option.
    """
    if not options:
        return config
    options = dict(options)
    if isinstance(options.get("acoustic_steps"), int):
        options["acoustic_steps"] = (options["acoustic_steps"],)
    return configs.from_dict(SynthesisConfig, {**vars(config), **options}, where)
