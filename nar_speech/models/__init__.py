"""The networks, by the name in a model folder's card."""

from __future__ import annotations

from torch import nn

from nar_speech.models.paraformer import Paraformer

MODELS: dict[str, type[nn.Module]] = {
    "paraformer": Paraformer,
}
