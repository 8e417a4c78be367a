"""Many live sessions of any streaming models, batched on one device."""

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
