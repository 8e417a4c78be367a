"""Files: decoded and cut at pauses in a thread, recognised by the engine, handed out piece by piece."""

from __future__ import annotations

import asyncio
import tempfile
import wave
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np

from nar_speech.audio import info, read_blocks
from nar_speech.engine import Failed, Final
from nar_speech.errors import AudioError, EngineBusy, EngineError, NarSpeechError
from nar_speech.pipelines.segment import Piece, Segmenter
from nar_speech.pipelines.writers import join_texts
from nar_speech.server.api_error import ApiError, told
from nar_speech.server.audio_in import AudioIn
from nar_speech.server.auth import Identity
from nar_speech.server.live import Wish
from nar_speech.server.service import ModelEntry, Service, engine_down
from nar_speech.types import Segment, Transcript

PIECES_AHEAD = 4  # of one file, given to the engine before their turn
BLOCK_SECONDS = 30.0
SPOOL_BYTES = 1 << 20  # of a temporary file that are kept in memory


@dataclass
class Upload:
    """One file on its way to text.

    Args:
        file: any audio file or container.
        options: decoding options as plain data; the model has been asked whether it takes them.
        where: what to call the file in messages.
    """

    service: Service
    entry: ModelEntry
    who: Identity
    api: str
    file: IO[bytes]
    options: dict[str, Any]
    where: str = "file"

    def __post_init__(self) -> None:
        self.samples = 0
        self.paid = 0.0
        self.language: str | None = None
        self.tags: tuple[str, ...] = ()
        self.rate = self.entry.batch_rate if self.entry.batch_key else self.entry.stream_rate

    @property
    def seconds(self) -> float:
        """Audio decoded so far; all of it once the segments are through."""
        return self.samples / self.rate

    async def segments(self) -> AsyncIterator[Segment]:
        """Segments in order, each as soon as it is known.

        Raises:
            ApiError: not audio, too long, over the key's limits; the model failed.
        """
        await self._in_thread(self._check_length)
        source = self._offline() if self.entry.batch_key else self._online()
        async with aclosing(source) as segments:
            async for segment in segments:
                yield segment

    def transcript(self, segments: list[Segment]) -> Transcript:
        """All segments as one result."""
        language = self.language
        if language is None and len(self.entry.languages) == 1:
            language = self.entry.languages[0]
        text = join_texts(s.text for s in segments)
        return Transcript(text, tuple(segments), self.seconds, language, None, self.tags)

    def _check_length(self) -> None:
        try:
            length = info(self.file).duration
        except AudioError as error:
            raise AudioError(self._named(error)) from error
        if length is not None and length > self.service.settings.max_upload_seconds:
            raise self._too_long()
        self.file.seek(0)

    def _blocks(self) -> Iterator[np.ndarray]:
        limit = self.service.settings.max_upload_seconds * self.rate
        try:
            for block in read_blocks(self.file, self.rate, BLOCK_SECONDS):
                self.samples += len(block)
                if self.samples > limit:
                    raise self._too_long()
                yield block
        except AudioError as error:
            raise AudioError(self._named(error)) from error

    def _named(self, error: AudioError) -> str:
        """The message without the name of our temporary file."""
        return f"{self.where}: {str(error).partition(': ')[2] or error}"

    def _too_long(self) -> ApiError:
        limit = self.service.settings.max_upload_seconds
        return ApiError(413, f"the recording is longer than {limit:g} s; cut it", "audio_too_long", "file")

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        """Run in the pool of uploads. When cancelled, wait all the same: the thread holds our file."""
        future = asyncio.get_running_loop().run_in_executor(self.service.pool, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise
        except NarSpeechError as error:
            raise told(error) from error

    def _pay(self) -> None:
        """Count the audio decoded since the last time."""
        self.service.usage.audio(self.who, self.seconds - self.paid)
        self.service.metrics.audio_seconds.labels(self.api).inc(self.seconds - self.paid)
        self.paid = self.seconds

    async def _offline(self) -> AsyncIterator[Segment]:
        vad = self.service.vad.at(self.rate)
        pieces = Segmenter(self.entry.segments, self.rate, vad)(self._blocks())
        waiting: deque[tuple[Piece, asyncio.Future]] = deque()
        try:
            more = True
            while more or waiting:
                while more and len(waiting) < PIECES_AHEAD:
                    piece = await self._in_thread(next, pieces, None)
                    self._pay()
                    more = piece is not None
                    if more:
                        waiting.append((piece, await self._submit(piece.samples)))
                if waiting:
                    piece, future = waiting[0]
                    result = await self._result(future)
                    waiting.popleft()
                    for segment in self._placed(result, piece):
                        yield segment
        finally:
            for _, future in waiting:
                future.cancel()
            pieces.close()  # and with it the reader of the file

    async def _submit(self, samples: np.ndarray) -> asyncio.Future:
        """Give a piece to the engine, waiting for room as long as a client would."""
        for attempt in range(50):
            try:
                job = self.service.engine.submit(self.entry.batch_key, samples, self.options)
                return asyncio.wrap_future(job)
            except EngineBusy as error:
                await asyncio.sleep(min(error.retry_after, 0.05 * 2**attempt, 1.0))
            except EngineError as error:
                raise engine_down(error) from error
        raise self.service.busy("uploads")

    async def _result(self, future: asyncio.Future) -> Transcript:
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled():  # by the engine, which is closing
                raise ApiError(503, "the server is shutting down", "draining", retry_after=5) from None
            raise
        except EngineError as error:
            raise engine_down(error) from error
        except NarSpeechError as error:
            raise told(error) from error

    def _placed(self, result: Transcript, piece: Piece) -> Iterator[Segment]:
        """The segments of a piece, in the time of the file."""
        self.language = self.language or result.language
        self.tags = tuple(dict.fromkeys((*self.tags, *result.tags)))
        for segment in result.segments:
            yield shifted(segment, piece.start)

    async def _online(self) -> AsyncIterator[Segment]:
        """By the streaming half, as fast as the engine takes it."""
        audio = AudioIn("f32le", self.rate, self.rate)
        wish = Wish(self.options.get("language"), tuple(self.options.get("hotwords", ())))
        async with self.service.open_stream(self.entry, self.who, self.api, audio, wish) as stream:

            async def feed() -> None:
                blocks = self._blocks()
                while (block := await self._in_thread(next, blocks, None)) is not None:
                    await stream.feed(block.tobytes())
                await stream.finish()

            def stop(task: asyncio.Task) -> None:
                if not task.cancelled() and task.exception() is not None:
                    stream.cancel()

            feeder = asyncio.create_task(feed())
            feeder.add_done_callback(stop)
            try:
                async for event in stream.events():
                    if isinstance(event, Failed):
                        raise ApiError(500, event.message, "recognition_failed")
                    if isinstance(event, Final) and event.text:
                        yield segment_of(event)
                await feeder
            finally:
                feeder.cancel()


def wave_file(data: bytes, rate: int, width: int = 2, channels: int = 1) -> IO[bytes]:
    """Raw samples of ``width`` bytes as a file with a header; part of a sample at the end is dropped."""
    target = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115
    with wave.open(target, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(data[: len(data) // (width * channels) * width * channels])
    target.seek(0)
    return target


def shifted(segment: Segment, start: float) -> Segment:
    """The same segment, later by ``start`` seconds."""
    if not start:
        return segment
    words = tuple(replace(w, start=w.start + start, end=w.end + start) for w in segment.words)
    tokens = tuple(replace(t, start=t.start + start, end=t.end + start) for t in segment.tokens)
    return replace(segment, start=segment.start + start, end=segment.end + start, words=words, tokens=tokens)


def segment_of(event: Final) -> Segment:
    """What a live stream said, as a segment of a file."""
    marks = [t.confidence for t in event.tokens] or [w.confidence for w in event.words]
    confidence = float(np.mean(marks)) if marks else 0.0
    return Segment(event.text, event.start, event.end, confidence, event.words, event.tokens)
