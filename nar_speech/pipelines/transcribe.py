"""Transcription of files, arrays, folders and lists of them.

Long recordings are cut at pauses, the pieces of all inputs are batched by length, and results come back in
the order of the inputs. Memory depends on the size of a batch, not on the length of a recording.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from nar_speech import config as configs
from nar_speech.audio import AudioSource, read_blocks
from nar_speech.errors import AudioError, ConfigError, InputError, NarSpeechError
from nar_speech.features import Frontend
from nar_speech.hub import LoadedModel, load_parts
from nar_speech.model_folder import DecodingConfig, VerifierConfig
from nar_speech.models.paraformer import Paraformer
from nar_speech.models.sensevoice import LANGUAGES, SenseVoice
from nar_speech.pipelines.recognize import (
    BEAMS,
    Bias,
    Recognized,
    Recognizer,
    choose,
    language_of,
    make_bias,
)
from nar_speech.pipelines.segment import Piece, Segmenter
from nar_speech.pipelines.writers import join_texts
from nar_speech.text.tokenizer import Tokenizer
from nar_speech.types import ModelCard, Segment, Token, Transcript

if TYPE_CHECKING:
    from nar_speech.pipelines.verify import Verifier

# fmt: off
AUDIO_SUFFIXES = frozenset((
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64", ".sph",
    ".m4a", ".mp4", ".aac", ".webm", ".mkv", ".mov", ".3gp", ".amr", ".wma", ".avi", ".flv",
))
# fmt: on
BATCH_SECONDS = {"cpu": 60.0, "cuda": 600.0}
MAX_BATCH = 256
POOL_BATCHES = 4  # pieces are sorted by length within this many batches
BLOCK_SECONDS = 30.0
# Longest to shortest piece of a batch. A CPU gains a tenth by batches, so padding must cost less than that.
MAX_LENGTH_RATIO = {"cpu": 1.1, "cuda": 1.5}

Progress: TypeAlias = Callable[[float], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The outcome of one input: a transcript, or the error that kept it from being made."""

    source: str
    transcript: Transcript | None
    error: NarSpeechError | None = None


@dataclass
class _Job:
    """One input on its way."""

    source: str
    path: str | None
    samples: int = 0
    starts: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    found: list[Recognized | None] = field(default_factory=list)
    waiting: int = 0
    closed: bool = False
    error: NarSpeechError | None = None

    @property
    def ready(self) -> bool:
        return self.error is not None or (self.closed and self.waiting == 0)


@dataclass(frozen=True)
class _Waiting:
    job: _Job
    slot: int
    samples: np.ndarray


class Transcriber:
    """A recogniser: network, frontend and tokenizer on one device, loaded once, used any number of times.

    Args:
        decoding: how outputs become text.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32``, ``bfloat16`` or (CPU only) ``int8``; ``auto``: the fastest on this processor, see
            :func:`nar_speech.layers.processor.fastest_dtype`.

    Raises:
        ConfigError: a device that is not there, an unknown dtype, int8 on a GPU, a decoder the model lacks.
    """

    def __init__(
        self,
        network: nn.Module,
        frontend: Frontend,
        tokenizer: Tokenizer,
        card: ModelCard,
        decoding: DecodingConfig | None = None,
        device: str = "auto",
        dtype: str = "float32",
    ):
        self.card, self.decoding = card, decoding or DecodingConfig()
        choose(network, self.decoding)
        place = pick_device(device)
        dtype = resolve_dtype(dtype, place)
        kind = pick_dtype(dtype)
        if dtype == "int8":
            if place.type != "cpu":
                raise ConfigError("dtype 'int8': runs on the CPU only; use --device cpu, or bfloat16")
            from nar_speech.layers.quantize import quantize_dynamic_int8

            network = quantize_dynamic_int8(network)
        self.recognizer = Recognizer(network, frontend, tokenizer, place, kind)
        self.segmenters: dict[Any, Segmenter] = {}
        self._vad = None
        self._biases: dict[tuple, Bias | None] = {}

    @classmethod
    def from_parts(
        cls, model: LoadedModel, device: str = "auto", dtype: str = "float32", **options: Any
    ) -> Transcriber:
        """From what :func:`nar_speech.hub.load_parts` read; ``options`` replace fields of its decoding."""
        decoding = change_decoding(model.decoding, options)
        new = cls(model.network, model.frontend, model.tokenizer, model.card, decoding, device, dtype)
        if model.verifier is not None:
            new._offer_verifier(model.folder, model.verifier)
        return new

    @classmethod
    def from_folder(
        cls, folder: str | Path, device: str = "auto", dtype: str = "float32", **options: Any
    ) -> Transcriber:
        """From a model folder of any supported layout."""
        return cls.from_parts(load_parts(folder), device, dtype, **options)

    def _offer_verifier(self, folder: Path, config: VerifierConfig) -> None:
        """Let the recogniser read the verifier when it is first needed."""
        if not isinstance(self.recognizer.network, Paraformer):
            raise ConfigError(f"{folder}: verifier: only models of the Paraformer family can have one")

        def load() -> Verifier:
            from nar_speech.layers.quantize import Int8Linear
            from nar_speech.pipelines.verify import Verifier

            int8 = any(isinstance(part, Int8Linear) for part in self.recognizer.network.modules())
            return Verifier.load(folder, config, self.device, self.recognizer.dtype, int8)

        self.recognizer.load_verifier = load

    @property
    def sample_rate(self) -> int:
        """Rate in Hz to which everything is resampled."""
        return self.recognizer.sample_rate

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.recognizer.device

    def __call__(
        self,
        inputs: AudioSource | Iterable[AudioSource],
        batch_seconds: float | None = None,
        times: bool = True,
        **options: Any,
    ) -> Transcript | list[Transcript]:
        """Transcribe one input, or a list or a folder of them.

        Args:
            inputs: a path, ``-`` (standard input), a file object, bytes, samples in the model's rate,
                (samples, rate), an Audio; or a list of such, or a folder.
            batch_seconds: padded audio in one batch; default 60 on a CPU, 600 on a GPU.
            times: whether words and tokens with times are wanted.
            options: fields of :class:`DecodingConfig` in place of the model's.

        Returns:
            One transcript, or a list in the order of the inputs.

        Raises:
            NarSpeechError: of the first input that fails; :meth:`results` goes on with the others.
        """
        folder = isinstance(inputs, str | Path) and str(inputs) != "-" and Path(inputs).is_dir()
        many = folder or isinstance(inputs, list | Iterator)
        sources: Iterable[AudioSource] = [inputs]
        if folder:
            sources = list_audio(inputs)
        elif many:
            sources = inputs
        transcripts = []
        for result in self.results(sources, batch_seconds, times, **options):
            if result.error is not None:
                raise result.error
            transcripts.append(result.transcript)
        return transcripts if many else transcripts[0]

    def results(
        self,
        sources: Iterable[AudioSource],
        batch_seconds: float | None = None,
        times: bool = True,
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[Result]:
        """Transcribe inputs one after the other; one that fails does not harm the others.

        Args:
            progress: called with the seconds of audio that have just been read.
            sources, batch_seconds, times, options: see :meth:`__call__`; folders are not expanded.

        Yields:
            A result for each input, in order.

        Raises:
            InputError: wrong options.
        """
        decoding = self.decoding_for(options)
        bias = self._bias(decoding)
        limit = BATCH_SECONDS.get(self.device.type, 60.0) if batch_seconds is None else batch_seconds
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
            raise ConfigError(f"batch_seconds: got {limit!r}; must be a number above 0")
        segmenter = self._segmenter(decoding)
        return self._run(
            sources, segmenter, _Batches(self.recognizer, decoding, bias, times, limit), progress
        )

    def decoding_for(self, options: dict[str, Any]) -> DecodingConfig:
        """The model's decoding with ``options`` in place, checked against what the model can do.

        Raises:
            ConfigError: an unknown option, a wrong value, or one that this model does not have.
        """
        decoding = change_decoding(self.decoding, options)
        if choose(self.recognizer.network, decoding) in BEAMS:
            self.recognizer.language_model(decoding)
        if decoding.verify:
            self.recognizer.verifier()
        self._check_language(decoding.language)
        if decoding.textnorm == "withitn" and not isinstance(self.recognizer.network, SenseVoice):
            raise ConfigError("textnorm: 'withitn' is a prompt of SenseVoice models; leave it out")
        return decoding

    def _run(
        self,
        sources: Iterable[AudioSource],
        segmenter: Segmenter,
        batches: _Batches,
        progress: Progress | None,
    ) -> Iterator[Result]:
        jobs: deque[_Job] = deque()
        for source in sources:
            job = _Job(name_of(source), str(source) if isinstance(source, str | Path) else None)
            jobs.append(job)
            try:
                for piece in segmenter(self._blocks(source, job, progress)):
                    batches.add(job, piece)
            except NarSpeechError as error:
                job.error = error
            job.closed = True
            while jobs and jobs[0].ready:
                yield self._result(jobs.popleft())
        batches.flush()
        while jobs:
            yield self._result(jobs.popleft())

    def _blocks(self, source: AudioSource, job: _Job, progress: Progress | None) -> Iterator[np.ndarray]:
        for block in read_blocks(source, self.sample_rate, BLOCK_SECONDS):
            job.samples += len(block)
            if progress is not None:
                progress(len(block) / self.sample_rate)
            yield block

    def _result(self, job: _Job) -> Result:
        if job.error is not None:
            return Result(job.source, None, job.error)
        segments = tuple(
            self._segment(found, start, length)
            for found, start, length in zip(job.found, job.starts, job.lengths, strict=True)
        )
        tags = tuple(dict.fromkeys(tag for found in job.found for tag in found.tags))
        language = language_of(tags)
        if language is None and len(self.card.languages) == 1:
            language = self.card.languages[0]
        text = join_texts(segment.text for segment in segments)
        duration = job.samples / self.sample_rate
        return Result(job.source, Transcript(text, segments, duration, language, job.path, tags))

    def _segment(self, found: Recognized, start: float, length: float) -> Segment:
        tokenizer = self.recognizer.tokenizer
        confidence = float(np.mean(found.confidences)) if found.confidences else 0.0
        words, tokens = (), ()
        if len(found.starts) == len(found.ids):
            starts, ends = [start + t for t in found.starts], [start + t for t in found.ends]
            words = tokenizer.words(found.ids, starts, ends, found.confidences)
            pieces = tokenizer.pieces(found.ids)
            tokens = tuple(
                map(Token, found.ids, pieces, starts, ends, found.confidences),
            )
        text = tokenizer.decode(found.ids)
        if found.verified is not None:
            text, confidence = found.verified.text, found.verified.confidence
            words, tokens = found.verified.words, found.verified.tokens
            words = tuple(replace(w, start=start + w.start, end=start + w.end) for w in words)
            tokens = tuple(replace(t, start=start + t.start, end=start + t.end) for t in tokens)
        return Segment(text, start, start + length, confidence, words, tokens, found.nbest)

    def _check_language(self, language: str) -> None:
        if isinstance(self.recognizer.network, SenseVoice):
            known: Iterable[str] = LANGUAGES
        else:
            known = ("auto", *self.card.languages) if self.card.languages else (language,)
        if language not in known:
            raise ConfigError(f"language: '{language}' is not one of this model's: {', '.join(known)}")

    def _bias(self, decoding: DecodingConfig) -> Bias | None:
        key = (decoding.hotwords, decoding.hotword_score)
        if key not in self._biases:
            self._biases = {key: make_bias(*key[:1], self.recognizer.tokenizer, decoding.hotword_score)}
        return self._biases[key]

    def _segmenter(self, decoding: DecodingConfig) -> Segmenter:
        """One for each configuration, so that the voice activity model is loaded once."""
        key = decoding.segments
        if key not in self.segmenters:
            vad = next((s.vad for s in self.segmenters.values() if s.vad is not None), None)
            self.segmenters[key] = Segmenter(key, self.sample_rate, vad)
        return self.segmenters[key]


class _Batches:
    """Collects pieces and recognises them in batches of similar length."""

    def __init__(
        self, recognizer: Recognizer, decoding: DecodingConfig, bias: Bias | None, times: bool, seconds: float
    ):
        self.recognizer, self.decoding, self.bias, self.times = recognizer, decoding, bias, times
        self.limit = seconds * recognizer.sample_rate
        self.pool: list[_Waiting] = []
        self.pooled = 0

    def add(self, job: _Job, piece: Piece) -> None:
        """Note one piece of ``job``; recognises what waits when that is enough."""
        slot = len(job.found)
        job.starts.append(piece.start)
        job.lengths.append(len(piece.samples) / self.recognizer.sample_rate)
        job.found.append(None)
        job.waiting += 1
        self.pool.append(_Waiting(job, slot, piece.samples))
        self.pooled += len(piece.samples)
        if self.pooled >= POOL_BATCHES * self.limit:
            self.flush()

    def flush(self) -> None:
        """Recognise everything that waits."""
        pool = sorted((w for w in self.pool if w.job.error is None), key=lambda w: -len(w.samples))
        self.pool, self.pooled = [], 0
        batch: list[_Waiting] = []
        for waiting in pool:
            if batch and not self._fits(batch, waiting):
                self._recognise(batch)
                batch = []
            batch.append(waiting)
        if batch:
            self._recognise(batch)

    def _fits(self, batch: list[_Waiting], waiting: _Waiting) -> bool:
        longest, ratio = len(batch[0].samples), MAX_LENGTH_RATIO.get(self.recognizer.device.type, 1.1)
        even = longest <= ratio * max(len(waiting.samples), self.recognizer.sample_rate)
        return even and len(batch) < MAX_BATCH and (len(batch) + 1) * longest <= self.limit

    def _recognise(self, batch: list[_Waiting]) -> None:
        """Recognise a batch; where it fails, its halves, down to the one item that is at fault."""
        batch = [waiting for waiting in batch if waiting.job.error is None]
        if not batch:
            return
        try:
            found = self.recognizer([w.samples for w in batch], self.decoding, self.bias, self.times)
        except (NarSpeechError, RuntimeError, ValueError, MemoryError) as error:
            if len(batch) == 1:
                batch[0].job.error = _failure(batch[0], error, self.recognizer.sample_rate)
                return
            logger.info("a batch of %d failed (%s); trying its halves", len(batch), type(error).__name__)
            middle = len(batch) // 2
            self._recognise(batch[:middle])
            self._recognise(batch[middle:])
            return
        for waiting, item in zip(batch, found, strict=True):
            waiting.job.found[waiting.slot] = item
            waiting.job.waiting -= 1


def _failure(waiting: _Waiting, error: BaseException, rate: int) -> NarSpeechError:
    job = waiting.job
    where = f"{job.source}: recognition failed at {job.starts[waiting.slot]:.1f} s"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, InputError):
        return InputError(f"{where}: {reason}")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        seconds = len(waiting.samples) / rate
        return NarSpeechError(
            f"{where}: out of memory on {seconds:.0f} s of audio; close other programs or use --device cpu"
        )
    return NarSpeechError(f"{where}: {reason}")


def change_decoding(decoding: DecodingConfig, options: dict[str, Any]) -> DecodingConfig:
    """``decoding`` with some fields replaced.

    Raises:
        ConfigError: an unknown or wrong option.
    """
    if not options:
        return decoding
    return configs.from_dict(DecodingConfig, {**vars(decoding), **options}, "options")


def pick_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` names.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ConfigError(f"device: got '{name}'; valid values: auto, cpu, cuda, cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            raise ConfigError(f"device: '{name}' is not there, {count} CUDA devices found; use cpu or auto")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> str:
    """``name``, or what ``auto`` stands for on this device."""
    if name != "auto":
        return name
    from nar_speech.layers.processor import fastest_dtype

    return fastest_dtype(device)


def pick_dtype(name: str) -> torch.dtype:
    """The dtype of activations: int8 models compute in float32 between their integer products.

    Raises:
        ConfigError: an unknown name.
    """
    kinds = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "int8": torch.float32,
    }
    if name not in kinds:
        raise ConfigError(f"dtype: got '{name}'; valid values: auto, float32, bfloat16, int8")
    return kinds[name]


def list_audio(folder: str | Path, recursive: bool = False) -> list[Path]:
    """Audio files of a folder by their suffixes, sorted; hidden ones are left out.

    Raises:
        AudioError: there is none.
    """
    folder = Path(folder)
    entries = folder.rglob("*") if recursive else folder.iterdir()
    found = sorted(
        path
        for path in entries
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        more = "" if recursive else "; --recursive looks into its subfolders"
        raise AudioError(f"{folder}: no audio file in this folder{more}")
    return found


def name_of(source: AudioSource | IO[bytes]) -> str:
    """What to call an input."""
    if isinstance(source, str | Path):
        return "standard input" if str(source) == "-" else str(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) and name else f"audio ({type(source).__name__})"
