"""A second, autoregressive model (MusicGen) beside MAGNeT: it rescores what is drawn, or begins the clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nar_speech.errors import ConfigError, InputError
from nar_speech.models.magnet import Magnet
from nar_speech.models.musicgen import MusicGen
from nar_speech.pipelines.sound_model import load_sound_parts
from nar_speech.sampling.autoregressive import AutoregressiveConfig, autoregressive_sample
from nar_speech.sampling.draws import GeneratorDraws
from nar_speech.sampling.step import Rescore, StepInfo
from nar_speech.text.conditioner import TextConditioner


class Partner:
    """An autoregressive model of the same codec's codes (MAGNeT, arXiv 2401.04577, sections 3.4 and 4)."""

    def __init__(self, network: MusicGen, conditioner: TextConditioner, name: str = "partner"):
        self.network, self.conditioner, self.name = network, conditioner, name

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        device: torch.device,
        dtype: str = "float32",
        cache_dir: str | Path | None = None,
        offline: bool | None = None,
    ) -> Partner:
        """From a model folder; ``cache_dir``, ``offline``: see :func:`load_sound_parts`.

        Raises:
            ConfigError: it is not autoregressive. Else as :func:`load_sound_parts`.
        """
        parts = load_sound_parts(folder, cache_dir, offline)
        if not isinstance(parts.network, MusicGen):
            raise ConfigError(
                f"{folder}: a partner must be autoregressive, a MusicGen; this is {parts.card.model}"
            )
        parts.network.to(device).prepare(dtype)
        return cls(parts.network, parts.conditioner.to(device), parts.card.name)

    def check(self, network: Magnet) -> None:
        """Whether both speak of the same codes.

        Raises:
            ConfigError: they don't.
        """
        mine, other = self.network.config, network.config
        names = ("num_codebooks", "codebook_size", "frame_rate")
        wrong = [n for n in names if getattr(mine, n) != getattr(other, n)]
        if wrong:
            raise ConfigError(
                f"partner {self.name}: {wrong[0]} is {getattr(mine, wrong[0])}, the model's"
                f" {getattr(other, wrong[0])}; both must make codes of the same codec"
            )

    def rescorer(self, prompts: Sequence[str]) -> Rescore:
        """What :func:`nar_speech.sampling.codebooks.sample_codebooks` takes, for a batch of prompts."""
        states, mask = self.conditioner(prompts)

        def rescore(tokens: Tensor, info: StepInfo) -> Tensor:
            # One by one and cut to its length: an item's numbers do not depend on its mates.
            found = torch.zeros(tokens.shape[0], tokens.shape[2], device=tokens.device)
            for row, (item, length) in enumerate(zip(info.items, info.lengths.tolist(), strict=True)):
                size = max(int(mask[item].sum()), 1)
                text = states[item : item + 1, :size], mask[item : item + 1, :size]
                codes = tokens[row : row + 1, :, :length]
                found[row, :length] = self.network.token_probabilities(codes, None, *text, info.stage)[0]
            return found

        return rescore

    @torch.inference_mode()
    def begin(
        self, prompt: str, frames: int, generator: torch.Generator, config: AutoregressiveConfig
    ) -> Tensor:
        """The first ``frames`` of a clip, codes (K, frames) int64.

        Raises:
            InputError: more frames than this model makes at once.
        """
        if not 1 <= frames <= self.network.config.max_frames:
            raise InputError(
                f"hybrid: the first {frames / self.network.config.frame_rate:g} s; partner {self.name} makes"
                f" {self.network.config.segment_seconds:g} s at most"
            )
        states, mask = self.conditioner([prompt])
        step = self.network.sampler(states, mask, guided=config.guidance != 1)
        codes = autoregressive_sample(
            step,
            torch.tensor([frames], device=states.device),
            self.network.config.lags,
            self.network.config.mask_id,
            config,
            GeneratorDraws([generator]),
        )
        return codes[0]
