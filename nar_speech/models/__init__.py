"""The networks, by the name in a model folder's card."""

from __future__ import annotations

from torch import nn

from nar_speech.models.ctc import CtcModel
from nar_speech.models.paraformer import Paraformer
from nar_speech.models.sensevoice import SenseVoice

MODELS: dict[str, type[nn.Module]] = {
    "ctc": CtcModel,
    "paraformer": Paraformer,
    "sensevoice": SenseVoice,
}
