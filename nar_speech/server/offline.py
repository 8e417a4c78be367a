"""Voice activity detection for the files of all uploads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from nar_speech.pipelines.segment import SileroVad


class SharedVad:
    """One voice activity model for the threads of all uploads; loaded when first used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[int, SileroVad] = {}

    def at(self, rate: int) -> Any:
        """Speech probabilities of lanes of windows, for audio of this rate."""

        def probabilities(lanes: np.ndarray) -> np.ndarray:
            with self._lock:
                if rate not in self._models:
                    self._models[rate] = SileroVad(rate)
                return self._models[rate](lanes)

        return probabilities
