"""Loads the models that a server was told to serve."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from nar_speech import hub
from nar_speech.errors import ConfigError
from nar_speech.pipelines.transcribe import Transcriber
from nar_speech.server.logs import logger
from nar_speech.server.offline import OfflineModel
from nar_speech.server.service import ModelEntry
from nar_speech.server.settings import ModelSpec, Settings


def load_models(settings: Settings) -> tuple[list[ModelEntry], dict[str, Any]]:
    """Entries for the catalog, and the engine's models by name.

    Raises:
        InputError: a model that can't be found or loaded, two halves of one kind.
    """
    entries: list[ModelEntry] = []
    models: dict[str, Any] = {}
    for spec in settings.models:
        entry, halves = load_entry(spec, settings)
        entries.append(entry)
        models.update(halves)
    return entries, models


def load_entry(spec: ModelSpec, settings: Settings) -> tuple[ModelEntry, dict[str, Any]]:
    """One model with its halves."""
    entry, halves = ModelEntry(spec.id or "", created=int(time.time())), {}
    for source in spec.sources:
        begin = time.monotonic()
        parts = hub.load_parts(hub.resolve(source))
        transcriber = Transcriber.from_parts(parts, settings.device, settings.dtype)
        name = spec.id or entry.id or parts.card.name
        if entry.batch_key is not None:
            raise ConfigError(
                f"--model {'+'.join(spec.sources)}: two offline models; use two --model options"
            )
        offline = OfflineModel(transcriber)
        warm_up(offline)
        entry = replace(
            entry,
            id=name,
            batch_key=f"{name}:offline",
            batch_rate=offline.sample_rate,
            languages=tuple(parts.card.languages),
            description=parts.card.description,
            segments=transcriber.decoding.segments,
            offline=offline,
        )
        halves[entry.batch_key] = offline
        logger.info(
            "model loaded",
            extra={"model": name, "source": source, "seconds": round(time.monotonic() - begin, 2)},
        )
    return entry, halves


def warm_up(model: OfflineModel) -> None:
    """Run once, so that everything that is loaded late is there before the first client comes."""
    noise = np.random.default_rng(0).normal(0, 0.01, model.sample_rate).astype(np.float32)
    result = model.run([noise], [{}])[0]
    if isinstance(result, Exception):
        raise result
