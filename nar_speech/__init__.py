"""Non-autoregressive speech: recognition, text to speech, sounds, neural codecs, in parallel passes.

    import nar_speech

    recogniser = nar_speech.load_model()
    print(recogniser("speech.wav").text)

What needs PyTorch is imported when it is first used, so that ``import nar_speech`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nar_speech.version import __version__

if TYPE_CHECKING:
    from nar_speech.hub import load_model
    from nar_speech.pipelines.generate import SoundGenerator
    from nar_speech.pipelines.synthesize import Synthesizer
    from nar_speech.pipelines.transcribe import Transcriber

__all__ = ["SoundGenerator", "Synthesizer", "Transcriber", "__version__", "load_model"]

_LAZY = {
    "load_model": "nar_speech.hub",
    "SoundGenerator": "nar_speech.pipelines.generate",
    "Synthesizer": "nar_speech.pipelines.synthesize",
    "Transcriber": "nar_speech.pipelines.transcribe",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nar_speech' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
