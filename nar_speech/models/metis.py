"""Metis (arXiv 2502.03128): MaskGCT's first stage, tuned for more tasks than text to speech.

Voice conversion, enhancement, extraction of a speaker and lip reading condition the network on features of
the prompt and the source, which an adapter adds to the embeddings of the codes. Released tuned models are
whole files, or small files of LoRA factors (arXiv 2106.09685) and of the adapter for a base model; factors
are multiplied out on loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.config import MAX_WIDTH, check_range
from nar_speech.errors import CheckpointError, InputError
from nar_speech.layers.diffllama import INIT_STD
from nar_speech.models.maskgct import T2S, Conditions, T2SConfig, T2SItem, without_empty

LORA_ALPHA = 32.0
CONDITIONED = ("vc", "se", "tse", "l2s", "omni")
PREFIX = re.compile(r"^(base_model\.)?model\.")
FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight$")


@dataclass(frozen=True)
class MetisConfig(T2SConfig):
    """:class:`~nar_speech.models.maskgct.T2SConfig` and the adapter.

    Attributes:
        features: width F of what the adapter reads; 0: there is no adapter.
        gate: whether a learned factor, 0 at first, scales the adapter's output.
    """

    use_phones: bool = False
    features: int = 1024
    gate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, MAX_WIDTH, "features")

    @classmethod
    def from_official(cls, conf: Mapping[str, Any], task: str | None = None) -> MetisConfig:
        """From ``model.t2s_model`` of an official configuration and the task, for example ``vc``."""
        base = vars(T2SConfig.from_official(conf))
        task = conf.get("ft_type", task)
        adapted = task in CONDITIONED
        features = conf.get("ft_cond_dim", conf.get("cond_dim", 1024)) if adapted else 0
        gate = bool(conf.get("use_zero_gate_adapter", True)) and task != "l2s"
        return cls(**base | {"use_phones": conf.get("use_phone_cond", True)}, features=features, gate=gate)


class GatedAdapter(nn.Module):
    """Linear, SiLU, Linear, and a learned factor that begins with 0."""

    def __init__(self, features: int, width: int, hidden: int):
        super().__init__()
        self.in_linear = nn.Linear(features, hidden)
        self.out_linear = nn.Linear(hidden, width)
        self.gate_scale = nn.Parameter(torch.zeros(1))
        for part in (self.in_linear, self.out_linear):
            nn.init.normal_(part.weight, std=INIT_STD)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., D)."""
        return self.out_linear(F.silu(self.in_linear(x))) * self.gate_scale


class Metis(T2S):
    """The first stage: semantic codes given a prompt, perhaps phones, perhaps features."""

    config: MetisConfig

    def __init__(self, config: MetisConfig):
        super().__init__(config)
        hidden = config.hidden_scale * config.width
        if config.features and config.gate:
            self.cond_adapter = GatedAdapter(config.features, config.width, hidden)
        elif config.features:
            self.cond_adapter = nn.Sequential(
                nn.Linear(config.features, hidden), nn.SiLU(), nn.Linear(hidden, config.width)
            )

    def added(self, features: Tensor) -> Tensor:
        """Features (..., L, F) to what is added to the embeddings of prompt and target (..., L, D).

        Raises:
            InputError: no adapter, or features of another width.
        """
        width = self.config.features
        if not width:
            raise InputError("features: this network has no adapter")
        if features.shape[-1] != width:
            raise InputError(f"features: expected (..., positions, {width}), got {tuple(features.shape)}")
        return self.cond_adapter(features)

    def condition(self, item: T2SItem, stage: int, length: int) -> Conditions:
        """See :meth:`nar_speech.models.maskgct.T2S.condition`; features must cover prompt and target."""
        prefix, prompt = self._prefix(item), len(item.prompt)
        if item.features is None:
            return Conditions(prefix)
        if len(item.features) != prompt + length:
            raise InputError(
                f"features: {len(item.features)} frames for a prompt of {prompt} and a target of {length};"
                " they must cover both"
            )
        added = self.added(item.features.to(self.device))
        phones = len(prefix) - prompt
        return Conditions(torch.cat([prefix[:phones], prefix[phones:] + added[:prompt]]), added[prompt:])


def load_metis(
    config: MetisConfig,
    path: str | Path,
    lora: str | Path | None = None,
    adapter: str | Path | None = None,
    alpha: float = LORA_ALPHA,
) -> Metis:
    """Load a whole model, or a base model with files of LoRA factors and of the adapter.

    Args:
        path: weights; LoRA factors inside are multiplied out.
        lora: factors for the Linear layers of ``path``.
        adapter: weights of the adapter, which replace those of ``path``.
        alpha: the scale of the factors is alpha / rank; official models use 32 with rank 16.

    Returns:
        The network in eval mode.

    Raises:
        CheckpointError: names or shapes that do not fit, factors without a layer, or only one of a pair.
    """
    tensors = merge_lora(without_empty(_plain(read_weights(path)), path), alpha, path)
    if adapter is not None:
        parts = _plain(read_weights(adapter))
        foreign = [name for name in parts if not name.startswith("cond_adapter.")]
        if foreign:
            raise CheckpointError(f"{adapter}: {foreign[0]} is no weight of an adapter")
        tensors |= parts
    if lora is not None:
        factors = _plain(read_weights(lora))
        foreign = [name for name in factors if not FACTOR.match(name)]
        if foreign:
            raise CheckpointError(f"{lora}: {foreign[0]} is no LoRA factor")
        tensors = merge_lora(tensors | factors, alpha, lora)
    with SkipInit():
        network = Metis(config)
    load_strict(network, tensors, where=path)
    return network.eval()


def merge_lora(
    tensors: Mapping[str, Tensor], alpha: float = LORA_ALPHA, where: str | Path = "weights"
) -> dict[str, Tensor]:
    """Add the products of LoRA factors to the weights that they belong to: W + alpha / rank B A.

    Args:
        tensors: weights ``<layer>.weight`` or ``<layer>.base_layer.weight``, and factors
            ``<layer>.lora_A.<name>.weight`` (rank, in) and ``<layer>.lora_B.<name>.weight`` (out, rank).

    Raises:
        CheckpointError: a factor without its partner or its layer, or of another shape.
    """
    merged, factors = {}, {}
    for name, tensor in tensors.items():
        found = FACTOR.match(name)
        if found:
            factors.setdefault(found["layer"], {})[found["side"]] = tensor
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    for layer, pair in factors.items():
        weight = merged.get(f"{layer}.weight")
        if len(pair) != 2 or weight is None:
            missing = "the layer's weight" if len(pair) == 2 else "the other factor"
            raise CheckpointError(f"{where}: LoRA of {layer}: {missing} is missing")
        first, second = pair["A"].float(), pair["B"].float()
        if (len(second), first.shape[1]) != tuple(weight.shape) or second.shape[1] != len(first):
            raise CheckpointError(
                f"{where}: LoRA of {layer}: factors {tuple(first.shape)} and {tuple(second.shape)} do not fit"
                f" the weight {tuple(weight.shape)}"
            )
        merged[f"{layer}.weight"] = weight.float() + (second @ first) * (alpha / len(first))
    return merged


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that the tuning library puts before them."""
    return {PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
