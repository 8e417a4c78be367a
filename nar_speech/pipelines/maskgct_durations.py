"""Durations of phones by the flow-matching predictor, and the length of what is to be said.

An item's durations depend on its own phones, prompt and generator alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nar_speech.config import check_range
from nar_speech.errors import InputError, NarSpeechError
from nar_speech.layers.diffllama import PackedLayout
from nar_speech.models.duration import DurationPredictor, log_durations
from nar_speech.models.maskgct import check_ids
from nar_speech.sampling.ode import flow_times, integrate

LONGEST_PHONE = 500.0  # frames; a log duration beyond it is a broken network's


@dataclass(frozen=True)
class DurationItem:
    """One text.

    Attributes:
        phones: (N,) int64 of prompt and target.
        prompt: (P,) frames of the first P phones, perhaps none; P < N.
    """

    phones: Tensor
    prompt: Tensor


@dataclass(frozen=True)
class DurationOptions:
    """How durations are sampled.

    Attributes:
        steps: of the solver; the paper takes four.
        solver: ``midpoint`` (two passes of the network a step) or ``euler``.
        cfg: strength w of guidance, v + w (v - u); 0: none.
        temperature: deviation of the noise at the start; 0 gives the most even speech.
    """

    steps: int = 4
    solver: Literal["midpoint", "euler"] = "midpoint"
    cfg: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, 0.0, 100.0, "cfg")
        check_range(self, 0.0, 10.0, "temperature")
        flow_times(self.steps, self.solver)


@torch.inference_mode()
def sample_durations(
    network: DurationPredictor,
    items: Sequence[DurationItem],
    draws: Sequence[torch.Generator],
    options: DurationOptions | None = None,
) -> list[Tensor]:
    """Frames, float32 of at least 0, of the phones behind each item's prompt.

    Items go one by one on a CPU, so that a batch equals its singles to the last bit; on a GPU in one pack.

    Args:
        network: in evaluation mode.
        draws: a generator for each item.

    Raises:
        InputError: phones that don't exist, a prompt without a target, not a generator for each item.
        NarSpeechError: the network gives NaN.
    """
    options = options or DurationOptions()
    if len(draws) != len(items):
        raise InputError(f"durations: {len(draws)} generators for {len(items)} items; give each one")
    for item in items:
        check_ids("phones", item.phones, network.config.num_phones, 1)
        if item.prompt.dim() != 1 or not len(item.prompt) < len(item.phones):
            raise InputError(
                f"durations: {len(item.phones)} phones, of which the prompt has {item.prompt.numel()}; give"
                " at least one more"
            )
    noise = [
        torch.randn(len(item.phones) - len(item.prompt), generator=source, device=source.device)
        for item, source in zip(items, draws, strict=True)
    ]
    alone = network.device.type == "cpu"
    groups = [[i] for i in range(len(items))] if alone else [list(range(len(items)))]
    return [row for group in groups if group for row in _group(network, items, noise, group, options)]


def _group(
    network: DurationPredictor,
    items: Sequence[DurationItem],
    noise: Sequence[Tensor],
    group: Sequence[int],
    options: DurationOptions,
) -> list[Tensor]:
    """Durations of the items of one pack: sequences with prompt, then, with guidance, targets alone."""
    device, guided = network.device, options.cfg > 0
    phones, known = [], []
    for i in group:
        prompt = log_durations(items[i].prompt)
        phones.append(items[i].phones)
        known.append(torch.cat([prompt, torch.full((len(noise[i]),), torch.nan)]))
    for i in group if guided else ():
        phones.append(torch.full((len(noise[i]),), network.untold))
        known.append(torch.full((len(noise[i]),), torch.nan))
    lengths = [len(row) for row in phones]
    sizes = [len(noise[i]) for i in group]
    packed, values = torch.cat(phones).to(device), torch.cat(known).to(device)
    given = ~values.isnan()
    core = network.core
    head = core.config.width // core.config.heads
    layout = PackedLayout.of(lengths, sizes * (2 if guided else 1), head, device)
    times = flow_times(options.steps, options.solver)
    gains = core.gains(torch.tensor(times, device=device))

    def velocity(x: Tensor, number: int) -> Tensor:
        whole = values.masked_scatter(~given, torch.cat([x, x]) if guided else x)
        out = core.packed(network.embed(packed, whole, given), layout, gains[:, number : number + 1])
        both = network.to_velocity(out)[:, 0].float()
        if not guided:
            return both
        told, untold = both.chunk(2)
        return told + options.cfg * (told - untold)

    start = torch.cat([noise[i].to(device) for i in group]) * options.temperature
    logs = integrate(velocity, start, options.steps, options.solver)
    if not bool(logs.isfinite().all()):
        raise NarSpeechError("durations: the network gave NaN; check the weights")
    frames = torch.expm1(logs).clamp(0.0, LONGEST_PHONE)
    return list(frames.split(sizes))


def total_frames(durations: Tensor, speed: float = 1.0) -> int:
    """Frames that a text of these phone durations (N,) takes at a speed; at least 1.

    Raises:
        InputError: a speed that is not positive.
    """
    if not speed > 0:
        raise InputError(f"speed: got {speed:g}; must be above 0, 1.2 for example is a fifth faster")
    return max(1, round(float(durations.double().sum()) / speed))


class PredictedLength:
    """The length of speech by the predictor: a ``LengthPredictor`` of :mod:`.speech_length`.

    How long each phone of a prompt lasts is not known there, only the whole. So the predictor first says how
    the prompt's phones share its length, and then goes on from these durations.

    Args:
        network: in evaluation mode.
        frame_rate: frames a second of what the durations count.
    """

    def __init__(self, network: DurationPredictor, frame_rate: float, options: DurationOptions | None = None):
        self.network, self.frame_rate, self.options = network, frame_rate, options

    def __call__(
        self,
        prompt: Sequence[int],
        prompt_seconds: float,
        phones: Sequence[int],
        generator: torch.Generator,
    ) -> float:
        """Seconds of ``phones`` in the manner of a prompt of these phones and this length.

        Raises:
            InputError: see :func:`sample_durations`.
        """
        known = torch.zeros(0)
        if prompt:
            shares = self._sample(prompt, known, generator).cpu()
            known = shares + shares.sum().clamp_min(1.0) * 1e-3  # no phone without any time
            known = known * (prompt_seconds * self.frame_rate / known.sum())
        return float(self._sample([*prompt, *phones], known, generator).double().sum()) / self.frame_rate

    def _sample(self, phones: Sequence[int], known: Tensor, generator: torch.Generator) -> Tensor:
        item = DurationItem(torch.tensor(list(phones), dtype=torch.int64), known)
        return sample_durations(self.network, [item], [generator], self.options)[0]
