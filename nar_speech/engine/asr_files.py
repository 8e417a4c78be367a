"""Recordings, and one live microphone, through the engine: each as a stream of speech, chunk by chunk."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from nar_speech import hub
from nar_speech.audio import AudioSource, read_blocks
from nar_speech.engine.asr import load_stream
from nar_speech.engine.asr_offline import OfflineModel
from nar_speech.engine.engine import Engine, EngineOptions
from nar_speech.engine.events import Closed, Event, Failed, Final
from nar_speech.engine.model import SessionOptions, StreamModel
from nar_speech.errors import ConfigError, EngineError, NarSpeechError, SessionClosed
from nar_speech.models.paraformer import Paraformer
from nar_speech.pipelines.transcribe import Progress, Result, Transcriber, name_of
from nar_speech.pipelines.writers import join_texts
from nar_speech.types import ModelCard, Segment, Transcript

STREAM, SECOND = "stream", "second"  # names of the models in the engine
BLOCK_SECONDS = 10.0  # of a recording, fed at once
FOREVER = 1e9  # seconds
HISTORY = 120.0  # seconds kept for the second pass of an utterance
NO_SECOND_PASS = "none"

Watch: TypeAlias = Callable[[str, Event], None]


class StreamTranscriber:
    """Hears recordings as if somebody spoke them, many at once; a second model may correct each utterance.

    Args:
        model: of :func:`nar_speech.engine.asr.load_stream`.
        card: its model card.
        second: hears finished utterances again; its text replaces that of the stream.
        hotwords: words that the streaming model favours.
        max_streams: recordings heard at once.

    Raises:
        InputError: hotwords that the model does not take or can't spell.
    """

    def __init__(
        self,
        model: StreamModel,
        card: ModelCard,
        second: OfflineModel | None = None,
        hotwords: tuple[str, ...] = (),
        max_streams: int = 8,
    ):
        self.model, self.card, self.second, self.max_streams = model, card, second, max_streams
        self.sample_rate = model.sample_rate
        settings: dict[str, Any] = {"hotwords": list(hotwords)} if hotwords else {}
        self.models: dict[str, Any] = {STREAM: model}
        if second is not None:
            self.models[SECOND] = second
            settings["second_pass"] = {"model": SECOND, "options": {}}
            second.check({})
        self.options = SessionOptions(settings)
        model.collector(self.options)

    @classmethod
    def load(
        cls,
        name: str | Path = "default",
        second_pass: str | Path | None = None,
        device: str = "auto",
        dtype: str = "float32",
        chunk_size: int | None = None,
        left: int | None = None,
        cache_dir: str | Path | None = None,
        offline: bool | None = None,
        hotwords: tuple[str, ...] = (),
        max_streams: int = 8,
        **decoding: Any,
    ) -> StreamTranscriber:
        """Load a streaming model, and one for the second pass.

        Args:
            name: ``default`` for the embedded one, a name, folder or hub id.
            second_pass: the same of the other model, or ``none``; default: the embedded offline model for the
                embedded streaming one, for any other CTC model itself, for a Paraformer none.
            chunk_size, left: see :func:`nar_speech.engine.asr.chunking_of`.
            decoding: fields of :class:`nar_speech.model_folder.DecodingConfig` for the second pass.

        Raises:
            InputError: a model that can't be loaded or hears no streams, options that it does not have.
        """
        if str(name) in ("default", hub.DEFAULT_MODEL):
            name = hub.TWIN
        folder = hub.resolve(name, cache_dir, offline)
        parts = hub.load_parts(folder)
        again: Path | None = folder
        if second_pass is not None:
            again = None if second_pass == NO_SECOND_PASS else hub.resolve(second_pass, cache_dir, offline)
        elif name == hub.TWIN:
            again = hub.resolve(hub.DEFAULT_MODEL)
        elif isinstance(parts.network, Paraformer):
            again = None
        if again is None and decoding:
            raise ConfigError(
                f"{next(iter(decoding))}: is for a second pass, and there is none; leave it out, or name a"
                " model for that (second_pass)"
            )
        model = load_stream(parts, device, dtype, chunk_size, left)
        second = None
        if again is not None:
            words = {"hotwords": hotwords} if hotwords else {}
            second = OfflineModel(Transcriber.from_folder(again, device, dtype, **words, **decoding))
        return cls(model, parts.card, second, hotwords, max_streams)

    def results(
        self,
        sources: Iterable[AudioSource],
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> Iterator[Result]:
        """Transcribe recordings, several at once; one that fails does not harm the others.

        Args:
            sources: paths, file objects, bytes, arrays, as of :meth:`Transcriber.__call__`.
            progress: called with the seconds of audio that have just been read.
            watch: called with the name of a source and each of its events, as they come.

        Yields:
            A result for each input, in order.
        """
        engine = Engine(self.models, self._engine_options(self.max_streams, fill_wait=0.0))
        with contextlib.closing(engine.start(threads=False)):
            waiting, more = iter(sources), True
            jobs: deque[_Recording] = deque()
            while more or jobs:
                while more and sum(job.active for job in jobs) < self.max_streams:
                    source = next(waiting, None)
                    more = source is not None
                    if more:
                        jobs.append(_Recording(self, engine, source, progress, watch))
                for job in jobs:
                    job.feed()
                engine.run_until_idle()
                while jobs and not jobs[0].active:
                    yield jobs.popleft().result()

    def listen(self, blocks: Iterable[np.ndarray]) -> Listening:
        """Hear live speech: (N,) float32 blocks of samples in [-1, 1] at ``sample_rate``, as they come.

        Example:
            >>> with transcriber.listen(microphone()) as heard:
            ...     for event in heard:
            ...         print(event.text)
        """
        return Listening(self, blocks)

    def transcript(self, finals: Iterable[Final], seconds: float, source: str | None) -> Transcript:
        """The utterances of one recording of ``seconds``; those without text are left out."""
        segments = tuple(_segment(final) for final in finals if final.text)
        language = self.card.languages[0] if len(self.card.languages) == 1 else None
        return Transcript(join_texts(s.text for s in segments), segments, seconds, language, source)

    def _engine_options(self, streams: int, **more: Any) -> EngineOptions:
        sizes = [1]
        while sizes[-1] < min(streams, 32):
            sizes.append(2 * sizes[-1])
        return EngineOptions(
            max_sessions=streams,
            buckets=tuple(sizes),
            idle=FOREVER,
            longest=FOREVER,
            history=HISTORY,
            **more,
        )


class Settled:
    """Finals of one stream, in the order of what was said, once they will not change any more.

    ``twice``: whether utterances with text are heard again.
    """

    def __init__(self, twice: bool):
        self.twice = twice
        self._waiting: dict[int, Final] = {}
        self._next = 0

    def add(self, final: Final) -> list[Final]:
        """Those that are settled now."""
        if final.source == "offline" or not self.twice or not final.text:
            self._waiting[final.segment] = final
        settled = []
        while self._next in self._waiting:
            settled.append(self._waiting.pop(self._next))
            self._next += 1
        return settled


class _Recording:
    """One recording on its way through an engine without threads."""

    def __init__(
        self,
        owner: StreamTranscriber,
        engine: Engine,
        source: AudioSource,
        progress: Progress | None,
        watch: Watch | None,
    ):
        self.owner, self.progress, self.watch = owner, progress, watch
        self.name = name_of(source)
        self.path = str(source) if isinstance(source, str | Path) else None
        self.error: NarSpeechError | None = None
        self.active, self._reading = True, True
        self._samples = 0
        self._finals: list[Final] = []
        self._settled = Settled(owner.second is not None)
        self._blocks = read_blocks(source, owner.sample_rate, BLOCK_SECONDS)
        self._session = engine.open(STREAM, owner.options, self._hear)

    def feed(self) -> None:
        """Give the engine the next block, or tell it that there is none."""
        if not (self._reading and self.active):
            return
        try:
            block = next(self._blocks, None)
        except NarSpeechError as error:
            self.error, block = error, None
        if block is not None:
            self._samples += len(block)
            self._session.feed(block)
            if self.progress is not None:
                self.progress(len(block) / self.owner.sample_rate)
            return
        self._reading = False
        if self.error is None:
            self._session.finish()
        else:
            self._session.cancel()

    def result(self) -> Result:
        """When it is not active any more."""
        if self.error is not None:
            return Result(self.name, None, self.error)
        seconds = self._samples / self.owner.sample_rate
        return Result(self.name, self.owner.transcript(self._finals, seconds, self.path))

    def _hear(self, event: Event) -> None:
        if isinstance(event, Final):
            self._finals += self._settled.add(event)
        elif isinstance(event, Failed):
            self.error = NarSpeechError(f"{self.name}: recognition failed: {event.message}")
        elif isinstance(event, Closed):
            self.active = False
        if self.watch is not None:
            self.watch(self.name, event)


class Listening:
    """Live speech on its way; made by :meth:`StreamTranscriber.listen`. One thread iterates.

    Iterating gives every event up to the end of ``blocks``: ``SpeechStarted``, ``SpeechStopped``,
    ``Partial``, and one ``Final`` for each segment, in order: where there is a second pass, with its text.

    Attributes:
        finals: those that came.
        seconds: of audio fed so far.
    """

    def __init__(self, owner: StreamTranscriber, blocks: Iterable[np.ndarray]):
        self._owner, self._blocks = owner, blocks
        self.finals: list[Final] = []
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._settled = Settled(owner.second is not None)
        self._error: BaseException | None = None
        if owner.second is not None:
            owner.second.warm_up()
        self._engine = Engine(owner.models, owner._engine_options(1)).start()
        self._session = self._engine.open(STREAM, owner.options, self._events.put)
        threading.Thread(target=self._feed, name="nar-speech-audio", daemon=True).start()

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        """See above.

        Raises:
            Exception: what ``blocks`` raised, after all events.
            EngineError: recognition failed.
        """
        failed = ""
        while not isinstance(event := self._events.get(), Closed):
            if isinstance(event, Failed):
                failed = event.message
            elif isinstance(event, Final):
                settled = self._settled.add(event)
                self.finals += settled
                yield from settled
            else:
                yield event
        if self._error is not None:
            raise self._error
        if failed or event.reason != "finished":
            raise EngineError(f"recognition failed: {failed or event.reason}")

    @property
    def seconds(self) -> float:
        """Of audio fed so far."""
        return self._session.received

    def stop(self) -> None:
        """Take no more audio; what was fed is heard. For any thread, or a signal handler's."""
        self._session.finish()

    def close(self) -> None:
        """End at once. May be called again."""
        self._engine.close()

    def _feed(self) -> None:
        try:
            for block in self._blocks:
                self._session.feed(block, timeout=threading.TIMEOUT_MAX)
        except SessionClosed:
            return  # stopped or failed: the events say which
        except BaseException as error:  # of who gives the audio: raised to who listens
            self._error = error
        self._session.finish()


def _segment(final: Final) -> Segment:
    sure = [item.confidence for item in (final.tokens or final.words)]
    confidence = float(np.mean(sure)) if sure else 0.0
    return Segment(final.text, final.start, final.end, confidence, final.words, final.tokens)
