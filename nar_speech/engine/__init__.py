"""Many live sessions of any streaming models, batched on one device.

``engine`` is the public face; ``model`` says what a model has to offer, ``events`` what a client gets. Behind
it ``session`` and ``buffer`` take audio in, ``scheduler`` picks who is next, ``slots`` and ``graphs`` hold
the states and step them, and ``core`` is the thread that does it (``lane``: what it knows of a model and of a
stream). ``fanout`` hands events out, ``offline`` runs whole segments, ``snapshot`` moves sessions, ``stats``
counts. ``endpoint``, ``speech`` and ``partials`` are tools for models: where utterances end, what is stable.
Speech recognition is fitted to it in ``asr`` (streams), ``asr_offline`` (segments) and ``asr_files``
(recordings as streams); nothing else here knows of it.
"""

from nar_speech.engine.engine import Engine, EngineOptions
from nar_speech.engine.events import (
    AudioOut,
    Closed,
    Event,
    Failed,
    Final,
    Partial,
    SpeechStarted,
    SpeechStopped,
)
from nar_speech.engine.model import (
    BatchModel,
    Collector,
    EndUtterance,
    SecondPass,
    SessionOptions,
    StreamModel,
    TwoPassCollector,
)
from nar_speech.engine.session import Session
from nar_speech.engine.snapshot import Snapshot
from nar_speech.engine.stats import EngineStats, Health

__all__ = [
    "AudioOut",
    "BatchModel",
    "Closed",
    "Collector",
    "EndUtterance",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "Event",
    "Failed",
    "Final",
    "Health",
    "Partial",
    "SecondPass",
    "Session",
    "SessionOptions",
    "Snapshot",
    "SpeechStarted",
    "SpeechStopped",
    "StreamModel",
    "TwoPassCollector",
]
