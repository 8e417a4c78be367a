"""The networks, by the name in a model folder's card."""

from __future__ import annotations

from torch import nn

from nar_speech.models.ctc import CtcModel
from nar_speech.models.magnet import Magnet
from nar_speech.models.musicgen import MusicGen
from nar_speech.models.paraformer import Paraformer
from nar_speech.models.sensevoice import SenseVoice

MODELS: dict[str, type[nn.Module]] = {
    "ctc": CtcModel,
    "magnet": Magnet,
    "musicgen": MusicGen,
    "paraformer": Paraformer,
    "sensevoice": SenseVoice,
}
