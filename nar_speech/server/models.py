"""Loads the models that a server was told to serve."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from nar_speech import hub
from nar_speech.engine.asr import can_stream, load_stream
from nar_speech.engine.asr_offline import OfflineModel
from nar_speech.errors import ConfigError
from nar_speech.hub import TWIN
from nar_speech.models.paraformer import Paraformer
from nar_speech.pipelines.transcribe import Transcriber
from nar_speech.server.logs import logger
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
    """One model with its halves. A single source that can do both gives both.

    Raises:
        InputError: see :func:`load_models`.
    """
    sources = with_twin(spec.sources)
    halves: dict[str, Any] = {}
    entry = ModelEntry(spec.id or "", created=int(time.time()))
    for number, source in enumerate(sources):
        begin = time.monotonic()
        folder = hub.resolve(source)
        parts = hub.load_parts(folder)
        if not entry.id:
            entry = replace(entry, id=parts.card.name)
        live = can_stream(parts)
        whole = not (live and isinstance(parts.network, Paraformer))  # an online one needs its chunks
        if len(sources) == 2:  # the first is the offline half, the second the streaming one
            live, whole = live and number == 1, whole and number == 0
        if not (live or whole):
            half = ("offline", "streaming")[number]
            raise ConfigError(f"--model {'+'.join(sources)}: '{source}' can't be the {half} half")
        if live:
            own = hub.load_parts(folder) if whole else parts
            chunks = (settings.chunk_size, settings.left)
            model = load_stream(own, settings.device, settings.dtype, *chunks)
            entry = replace(entry, stream_key=f"{entry.id}:online", stream_rate=model.sample_rate)
            halves[entry.stream_key] = model
        if whole:
            offline = OfflineModel(Transcriber.from_parts(parts, settings.device, settings.dtype))
            offline.warm_up()
            entry = replace(
                entry,
                batch_key=f"{entry.id}:offline",
                batch_rate=offline.sample_rate,
                segments=offline.transcriber.decoding.segments,
                offline=offline,
            )
            halves[entry.batch_key] = offline
        if number == 0:
            languages = tuple(parts.card.languages)
            entry = replace(entry, languages=languages, description=parts.card.description)
        seconds = round(time.monotonic() - begin, 2)
        fields = {"model": entry.id, "source": source, "live": live, "offline": whole, "seconds": seconds}
        logger.info("model loaded", extra=fields)
    return entry, halves


def with_twin(sources: tuple[str, ...]) -> tuple[str, ...]:
    """The default model together with its streaming twin, where that ships with the package."""
    if sources in (("default",), (hub.DEFAULT_MODEL,)) and TWIN in hub.embedded_models():
        return (hub.DEFAULT_MODEL, TWIN)
    return sources


def load_stream_model(
    name: str, device: str, dtype: str, chunk_size: int | None = None, left: int | None = None
) -> tuple[str, Any, dict[str, Any]]:
    """A streaming model for the load tool: its name in an engine, the model, settings of its sessions.

    Args:
        chunk_size, left: see :func:`nar_speech.engine.asr.chunking_of`.

    Raises:
        InputError: it can't be loaded, or hears no streams.
    """
    parts = hub.load_parts(hub.resolve(with_twin((name,))[-1]))
    return parts.card.name, load_stream(parts, device, dtype, chunk_size, left), {"endpoint": False}
