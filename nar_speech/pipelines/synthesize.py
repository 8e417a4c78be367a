"""Text to speech in the voice of a prompt: the task object Synthesizer.

    synthesizer = load_model("amphion/MaskGCT")
    result = synthesizer("Hello there.", "somebody.wav", seed=1)

Speech is a function of its own text, voice, seed and options: whatever else is in the batch, its codes are
the same. A prompt is never decoded; its codes and phones are made once (:meth:`Synthesizer.voice`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nar_speech.audio import AudioSource
from nar_speech.errors import ConfigError, InputError
from nar_speech.pipelines.join import join_pieces
from nar_speech.pipelines.sound_options import per_item
from nar_speech.pipelines.speech_codes import Piece, make_codes
from nar_speech.pipelines.speech_edit import EditResult, edit_speech
from nar_speech.pipelines.speech_length import (
    LengthPredictor,
    check_frames,
    count_sounds,
    frames_for,
    seconds_for,
)
from nar_speech.pipelines.speech_model import SpeechParts, load_speech_parts
from nar_speech.pipelines.speech_options import SynthesisConfig, change
from nar_speech.pipelines.speech_text import DIRECT, SpeechText, Text, check_text
from nar_speech.pipelines.transcribe import pick_device, resolve_dtype
from nar_speech.pipelines.voice import Voice, read_prompt
from nar_speech.pipelines.watermark import add_watermark, load_watermark
from nar_speech.text.sentences import cut_text
from nar_speech.types import Audio, Codes

if TYPE_CHECKING:
    from nar_speech.pipelines.transcribe import Transcriber

BATCH = {"cpu": 4, "cuda": 16}  # pieces at once
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MAX_SEED = 2**63 - 1
STRIDE = 0x9E3779B97F4A7C15  # between the seeds of the pieces of a text

Progress = Callable[[int, int], None]  # calls of the networks done, and at most


@dataclass(frozen=True)
class SpokenPiece:
    """A part of a text that was made at once.

    Attributes:
        text: it; "" of ids of phones.
        start, end: seconds in the result.
        phones: ids.
        semantic: (T,) int64, on the CPU.
        acoustic: (K, T') int64, on the CPU.
    """

    text: str
    start: float
    end: float
    phones: tuple[int, ...]
    semantic: Tensor
    acoustic: Tensor


@dataclass(frozen=True)
class SpeechResult:
    """What was said.

    Attributes:
        audio: float32 samples in the codec's rate, without the prompt.
        text: what was asked for; "" of ids of phones.
        seed: gives the same speech again.
        pieces: of a long text; else one.
        prompt_text: what the prompt is taken to say.
        watermarked: whether the sound is marked as made by a machine.
        seconds: time of ``prompt``, ``sampling`` (of the whole batch) and ``decoding``.
    """

    audio: Audio
    text: str
    seed: int
    pieces: tuple[SpokenPiece, ...]
    prompt_text: str
    watermarked: bool
    seconds: dict[str, float]


@dataclass
class _Unit:
    """A piece that is being made."""

    text: str
    phones: tuple[int, ...]
    frames: int
    voice: Voice
    generator: torch.Generator
    semantic: Tensor | None = None
    acoustic: Tensor | None = None
    batch: int = 0  # which one it was made in
    seconds: float = 0.0  # that took


@dataclass
class _Job:
    """A text on its way."""

    text: Text
    seed: int
    voice: Voice
    units: list[_Unit] = field(default_factory=list)


class Synthesizer:
    """Speaks texts in the voices of prompts with a MaskGCT.

    Args:
        parts: on the device where they are to stay, ready for inference.
        config: options that a call does not name.
        transcriber: tells what a prompt says where its text is not given; None: the embedded recogniser,
            loaded when it is first needed.
        predictor: of durations, for the rule ``predictor``; None: the model's own, where it has one.

    Attributes:
        card: what the model is.
        sample_rate: of the speech.
    """

    def __init__(
        self,
        parts: SpeechParts,
        config: SynthesisConfig | None = None,
        transcriber: Transcriber | None = None,
        predictor: LengthPredictor | None = None,
    ):
        self.parts, self.card = parts, parts.card
        self.config = config or SynthesisConfig()
        self.reader = SpeechText(parts.phonemizer)
        self.predictor = predictor or parts.predictor
        self._transcriber = transcriber

    @classmethod
    def from_parts(
        cls,
        parts: SpeechParts,
        device: str = "auto",
        dtype: str = "float32",
        transcriber: Transcriber | None = None,
        predictor: LengthPredictor | None = None,
        **options: Any,
    ) -> Synthesizer:
        """Put the parts on a device, where they stay.

        Args:
            dtype: of the Transformers' products: ``float32``, ``bfloat16``, ``int8`` (CPU), ``auto``.
            options: fields of :class:`SynthesisConfig` in place of the model's.

        Raises:
            ConfigError: an unknown option or one that the model's file has wrong.
        """
        config = change(SynthesisConfig(), parts.synthesis, f"{parts.folder}: synthesis")
        place = pick_device(device)
        parts.prepare(place, resolve_dtype(DTYPES.get(dtype, dtype), place))
        return cls(parts, change(config, options), transcriber, predictor)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        device: str = "auto",
        dtype: str = "float32",
        cache_dir: str | Path | None = None,
        offline: bool | None = None,
        **options: Any,
    ) -> Synthesizer:
        """From a model folder of any supported layout.

        ``cache_dir``, ``offline``: for a speech model or codec that the folder only names, see
        :func:`nar_speech.locate.resolve`.
        """
        return cls.from_parts(load_speech_parts(folder, cache_dir, offline), device, dtype, **options)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.parts.codec.sample_rate

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self.parts.networks.t2s.device

    @property
    def transcriber(self) -> Transcriber:
        """What hears prompts."""
        if self._transcriber is None:
            from nar_speech.hub import load_parts, resolve
            from nar_speech.pipelines.transcribe import Transcriber

            self._transcriber = Transcriber.from_parts(load_parts(resolve("default")), str(self.device))
        return self._transcriber

    @transcriber.setter
    def transcriber(self, transcriber: Transcriber) -> None:
        self._transcriber = transcriber

    @torch.inference_mode()
    def voice(self, prompt: AudioSource, text: str | None = None, language: str | None = None) -> Voice:
        """What the networks need of a prompt, for any number of texts.

        Args:
            prompt: 0.5 to 30 s of one voice; see :func:`nar_speech.audio.read_audio`. A bare array has the
                rate of the codec.
            text: what is said in it; None: what the transcriber hears.
            language: of the text; None: ``prompt_language`` of the options.

        Raises:
            InputError: a prompt that is too short, too long, silent or without speech, or a text that can't
                be spoken.
        """
        features, codec = self.parts.features, self.parts.codec
        if text is not None:
            check_text(text, language or self.config.prompt_language, "prompt text")
        low, high, name = read_prompt(prompt, (features.sample_rate, codec.sample_rate))
        if text is None:
            text = self.transcriber(Audio(low, features.sample_rate)).text
            if not text.strip():
                raise InputError(f"{name}: no speech was recognised in the prompt; give its text, too")
        phones = self.reader(text, language or self.config.prompt_language, "prompt text")
        return Voice(*self.encode(low, high), phones, len(low), features.sample_rate, text, name)

    @torch.inference_mode()
    def encode(self, low: np.ndarray, high: np.ndarray) -> tuple[Tensor, Tensor]:
        """Semantic codes (P,) and acoustic codes (P', K) of a recording, alone, so that no mate changes it.

        Args:
            low: (N,) in the rate of the features. high: (N',) in that of the codec.
        """
        features, _ = self.parts.features(torch.from_numpy(low)[None])
        semantic = self.parts.semantic.encode(features)[0, 0]
        layers = self.parts.networks.layers
        codes = self.parts.codec.encode(torch.from_numpy(high)[None, None], num_codebooks=layers)
        return semantic, codes.tokens[0, :, : int(codes.lengths[0])].T.to(self.device)

    @torch.inference_mode()
    def __call__(
        self,
        texts: Text | list[Text],
        prompt: AudioSource | Voice | list[AudioSource | Voice],
        prompt_text: str | list[str | None] | None = None,
        duration: float | list[float | None] | None = None,
        seed: int | list[int] = 0,
        *,
        batch: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> SpeechResult | list[SpeechResult]:
        """Speak texts. Of ``prompt`` to ``duration`` a list has a value for each text.

        Args:
            texts: words, or a tuple of ids of phones; a list of such gives a list of results.
            prompt: whose voice it is: a recording or what :meth:`voice` made of one.
            prompt_text: what the recording says; None: what the transcriber hears.
            duration: seconds of speech; None: by the rule of the options.
            seed: of a single number every text takes the next: text i is made with ``seed + i``.
            batch: pieces made at once; changes no result.
            progress: called after every call of a network.
            options: fields of :class:`SynthesisConfig`.

        Raises:
            InputError: a text or prompt that can't be used, an impossible duration or seed. ConfigError:
                options that are wrong or don't go together. MissingExtraError: a package that a language or
                the watermark needs is not installed.
        """
        many = isinstance(texts, list)
        config = change(self.config, options)
        limit = BATCH.get(self.device.type, 4) if batch is None else batch
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"batch: got {limit!r}; must be a whole number above 0")
        if config.watermark:
            load_watermark()  # what is missing is said before the work
        started = time.perf_counter()
        jobs = self._jobs(texts if many else [texts], prompt, prompt_text, duration, seed, config)
        spent = time.perf_counter() - started
        units = [unit for job in jobs for unit in job.units]
        calls = config.steps + config.acoustic_calls(self.parts.networks.layers)
        groups = [units[i : i + limit] for i in range(0, len(units), limit)]
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            progress(done, calls * len(groups))

        for number, group in enumerate(groups):
            self._sample(group, number, config, None if progress is None else step)
        results = [self._result(job, config, spent) for job in jobs]
        return results if many else results[0]

    def edit(self, source: AudioSource, old: str, new: str, **options: Any) -> EditResult:
        """A recording with other words in it; see :func:`nar_speech.pipelines.speech_edit.edit_speech`."""
        return edit_speech(self, source, old, new, **options)

    # ---- what is given ----------------------------------------------------------------------------------

    def _jobs(
        self,
        texts: Sequence[Text],
        prompt: Any,
        prompt_text: Any,
        duration: Any,
        seed: Any,
        config: SynthesisConfig,
    ) -> list[_Job]:
        """Everything checked before anything is made; cheap checks first."""
        count = len(texts)
        prompts, words = per_item(prompt, count, "prompt"), per_item(prompt_text, count, "prompt_text")
        durations = per_item(duration, count, "duration")
        seeds = per_item(seed, count, "seed") if isinstance(seed, list) else None
        numbers = []
        for i, text in enumerate(texts):
            check_text(text, config.language)
            number = seeds[i] if seeds is not None else seed
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_SEED - count:
                raise InputError(f"seed: got {number!r}; must be a whole number from 0")
            numbers.append(number + (0 if seeds is not None else i))
            if durations[i] is not None:
                _check_duration(durations[i], config)
        voices: dict[Any, Voice] = {}
        jobs = []
        for i, text in enumerate(texts):
            key = (str(prompts[i]) if isinstance(prompts[i], str | Path) else id(prompts[i]), words[i])
            if key not in voices:
                voices[key] = self._voice(prompts[i], words[i], config)
            job = _Job(text, numbers[i], voices[key])
            self._cut(job, durations[i], config)
            jobs.append(job)
        return jobs

    def _voice(self, prompt: AudioSource | Voice, text: str | None, config: SynthesisConfig) -> Voice:
        if not isinstance(prompt, Voice):
            return self.voice(prompt, text, config.prompt_language)
        if text is not None:
            raise ConfigError("prompt_text: a voice has its text already; give it to voice()")
        return prompt

    def _cut(self, job: _Job, duration: float | None, config: SynthesisConfig) -> None:
        """Pieces of a text and their lengths."""
        voice, rate = job.voice, self.parts.features.frame_rate
        pieces: list[Text] = [job.text]
        if isinstance(job.text, str) and config.language != DIRECT:
            pace = config.phones_per_second
            if config.length != "rate" and voice.phones:
                pace = len(voice.phones) / voice.seconds
            pieces = list(cut_text(job.text, max(config.piece_seconds * pace * config.speed, 1.0)))
        phones = [self.reader(piece, config.language) for piece in pieces]
        sizes = [len(ids) for ids in phones]
        spare = None if duration is None else duration - config.pause * (len(pieces) - 1)
        for number, (piece, ids) in enumerate(zip(pieces, phones, strict=True)):
            generator = torch.Generator(self.device)
            generator.manual_seed((job.seed + number * STRIDE) % (MAX_SEED + 1))
            if spare is None:
                seconds = seconds_for(voice, ids, config, generator, self.predictor)
            else:
                seconds = max(spare, 0.0) * len(ids) / sum(sizes)
            frames = frames_for(seconds, rate)
            sounds = count_sounds(ids, self.reader.vocabulary)
            check_frames(frames, rate, sounds, duration is not None or config.speed != 1)
            shown = piece if isinstance(piece, str) else ""
            job.units.append(_Unit(shown, ids, frames, voice, generator))

    # ---- making -----------------------------------------------------------------------------------------

    def _sample(
        self,
        units: Sequence[_Unit],
        number: int,
        config: SynthesisConfig,
        report: Callable[[], None] | None,
    ) -> None:
        """Codes of the pieces of batch ``number``."""
        started = time.perf_counter()
        pieces = [
            Piece(
                torch.tensor([*unit.voice.phones, *unit.phones]),
                unit.voice.semantic,
                unit.voice.acoustic,
                unit.frames,
            )
            for unit in units
        ]
        draws = [unit.generator for unit in units]
        found = make_codes(self.parts.networks, pieces, draws, config, report)
        for unit, semantic, acoustic in zip(units, *found, strict=True):
            unit.semantic, unit.acoustic = semantic, acoustic
            unit.batch, unit.seconds = number, time.perf_counter() - started

    def decode(self, acoustic: Tensor) -> np.ndarray:
        """Samples (N,) of codes (K, T), alone, so that no mate changes them."""
        codec = self.parts.codec
        codes = Codes(acoustic[None], torch.tensor([acoustic.shape[1]]), codec.sample_rate, codec=codec.name)
        waves, lengths = codec.decode(codes)
        return waves[0, 0, : int(lengths[0])].float().clamp(-1.0, 1.0).cpu().numpy()

    def _result(self, job: _Job, config: SynthesisConfig, spent: float) -> SpeechResult:
        started = time.perf_counter()
        rate = self.sample_rate
        sounds = [self.decode(unit.acoustic) for unit in job.units]
        if config.watermark:
            sounds = [add_watermark(sound, rate) for sound in sounds]
        sound, places = join_pieces(sounds, rate, config.pause)
        pieces = tuple(
            SpokenPiece(
                *(unit.text, begin / rate, end / rate, unit.phones),
                *(unit.semantic.cpu(), unit.acoustic.cpu()),
            )
            for unit, (begin, end) in zip(job.units, places, strict=True)
        )
        seconds = {
            "prompt": spent,
            "sampling": sum({unit.batch: unit.seconds for unit in job.units}.values()),
            "decoding": time.perf_counter() - started,
        }
        text = job.text if isinstance(job.text, str) else ""
        audio = Audio(np.ascontiguousarray(sound), rate)
        return SpeechResult(audio, text, job.seed, pieces, job.voice.text, config.watermark, seconds)


def _check_duration(seconds: Any, config: SynthesisConfig) -> None:
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < float("inf"):
        raise InputError(f"duration: got {seconds}; must be seconds above 0")
    if config.speed != 1:
        raise ConfigError("speed: has no say where a duration is given; leave one of them out")
