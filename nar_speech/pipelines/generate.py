"""Text to sound: the task object SoundGenerator.

    generator = SoundGenerator.from_folder(folder)
    result = generator("a dog barks twice", duration=4.0, seed=1)

A result is a function of its own prompt, seed and options: whatever else is in the batch, its codes are the
    same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_speech.audio import AudioSource, read_audio
from nar_speech.codec.base import Codec
from nar_speech.errors import ConfigError, InputError
from nar_speech.models.magnet import Magnet
from nar_speech.models.magnet_predictor import predictor
from nar_speech.pipelines.loudness import normalize_loudness
from nar_speech.pipelines.sound_model import SoundParts, load_sound_parts
from nar_speech.pipelines.sound_options import GenerationConfig, change, check_duration, per_item
from nar_speech.pipelines.sound_partner import Partner
from nar_speech.pipelines.sound_windows import count_windows, next_window
from nar_speech.pipelines.transcribe import name_of, pick_device, resolve_dtype
from nar_speech.sampling.autoregressive import AutoregressiveConfig
from nar_speech.sampling.codebooks import sample_codebooks
from nar_speech.sampling.trace import ItemTrace, Trace
from nar_speech.text.conditioner import TextConditioner
from nar_speech.types import Audio, Codes, ModelCard

BATCH = {"cpu": 4, "cuda": 32}  # clips at once
FADE_SECONDS = 0.02  # from a recording to what was made, and back
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MAX_SEED = 2**63 - 1

Progress = Callable[[int, int], None]  # calls of the network done, and at most


@dataclass(frozen=True)
class SoundResult:
    """One clip.

    Attributes:
        audio: float32 samples in the codec's rate.
        codes: (1, K, T), on the CPU.
        prompt: None: without one.
        seed: gives the same clip again.
        calls: of the network that the clip took part in.
        seconds: time of ``text``, ``sampling`` and ``decoding``; of sampling that of the whole batch.
        traces: the steps, one for each window; empty unless asked for.
    """

    audio: Audio
    codes: Codes
    prompt: str | None
    seed: int
    calls: int
    seconds: dict[str, float]
    traces: tuple[ItemTrace, ...] = ()


@dataclass(frozen=True)
class Inpaint:
    """Fill ``start`` to ``end`` seconds of a recording."""

    source: AudioSource
    start: float
    end: float


@dataclass
class _Clip:
    """A clip that is being made. K codebooks, T frames."""

    prompt: str | None
    negative: str | None
    seed: int
    samples: int
    codes: Tensor  # (K, T) int64
    given: np.ndarray  # (T,) bool, frames that are known
    generator: torch.Generator
    recording: np.ndarray | None = None  # (C, N) what stays of the input
    gap: tuple[int, int] = (0, 0)  # samples of the recording that do not stay
    level: bool = True  # whether loudness is normalised
    calls: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    traces: list[ItemTrace] = field(default_factory=list)


class SoundGenerator:
    """Makes sounds and music from texts with a MAGNeT.

    Attributes:
        card: what the model is.
        generation: options that a call does not name.
        sample_rate: of the sound.
        segment_seconds: longest clip that is made at once; longer ones are made in windows.
    """

    def __init__(
        self,
        network: Magnet,
        codec: Codec,
        conditioner: TextConditioner,
        card: ModelCard,
        generation: GenerationConfig | None = None,
        partner: Partner | None = None,
    ):
        self.network, self.codec, self.conditioner, self.card = network, codec, conditioner, card
        self.generation = generation or GenerationConfig()
        self.partner = partner
        if partner is not None:
            partner.check(network)

    @classmethod
    def from_parts(
        cls,
        parts: SoundParts,
        device: str = "auto",
        dtype: str = "float32",
        partner: Partner | None = None,
        **options: Any,
    ) -> SoundGenerator:
        """Put the parts on a device, where they stay.

        Args:
            dtype: of the network's products: ``float32``, ``bfloat16``, ``int8`` (CPU), ``auto``.
            options: fields of :class:`GenerationConfig` in place of the model's.

        Raises:
            ConfigError: a model of another kind, an unknown option or one the model's file has wrong.
        """
        if not isinstance(parts.network, Magnet):
            raise ConfigError(
                f"{parts.folder}: is autoregressive ({parts.card.model}); sounds are made by a masked model,"
                " and this one can be its partner"
            )
        generation = change(GenerationConfig(), parts.generation, f"{parts.folder}: generation")
        place = pick_device(device)
        parts.network.to(place).prepare(resolve_dtype(DTYPES.get(dtype, dtype), place))
        codec, conditioner = parts.codec.to(place), parts.conditioner.to(place)
        return cls(parts.network, codec, conditioner, parts.card, change(generation, options), partner)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        device: str = "auto",
        dtype: str = "float32",
        partner: str | Path | None = None,
        cache_dir: str | Path | None = None,
        offline: bool | None = None,
        **options: Any,
    ) -> SoundGenerator:
        """From a model folder of any supported layout; ``partner``: the folder of an autoregressive model.

        ``cache_dir``, ``offline``: for a codec or text encoder that the folder only names, see
        :func:`nar_speech.locate.resolve`.
        """
        parts = load_sound_parts(folder, cache_dir, offline)
        place = pick_device(device)
        second = None
        if partner is not None:
            kind = resolve_dtype(DTYPES.get(dtype, dtype), place)
            second = Partner.from_folder(partner, place, kind, cache_dir, offline)
        return cls.from_parts(parts, str(place), dtype, second, **options)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.codec.sample_rate

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.network.device

    @property
    def segment_seconds(self) -> float:
        """The longest clip that is made at once."""
        return self.network.config.max_frames / self.codec.frame_rate

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | list[str | None] | None,
        duration: float | list[float | None] | None = None,
        seed: int | list[int] = 0,
        *,
        continue_from: AudioSource | list[AudioSource | None] | None = None,
        inpaint: Inpaint | list[Inpaint | None] | None = None,
        negative: str | list[str | None] | None = None,
        rescore: bool = False,
        hybrid_seconds: float = 0.0,
        trace: bool = False,
        batch: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> SoundResult | list[SoundResult]:
        """Make clips. Of ``duration`` to ``negative`` a list has a value for each prompt.

        Args:
            prompts: what is to be heard; None: whatever the model likes. A list gives a list of results.
            duration: seconds of a clip, with what it continues; default: a segment of the model, or with
                ``continue_from`` a segment and with ``inpaint`` the recording.
            seed: of a single number every prompt takes the next: prompt i is made with ``seed + i``.
            continue_from: a recording that the clip begins with.
            inpaint: a recording of which a part is made anew.
            negative: what is not to be heard, in place of "anything" in classifier-free guidance.
            rescore: let the partner score what is drawn (``rescore_weight``).
            hybrid_seconds: let the partner make the beginning, so many seconds.
            trace: keep every step for pictures.
            batch: clips made at once; changes no result.
            progress: called after every call of the network.
            options: fields of :class:`GenerationConfig`.

        Raises:
            InputError: an empty or too long prompt, an impossible duration, gap or seed, a recording that
                can't be read. ConfigError: options that are wrong or don't go together.
        """
        many = isinstance(prompts, list)
        texts = prompts if many else [prompts]
        config = change(self.generation, options)
        if (rescore or hybrid_seconds) and self.partner is None:
            raise ConfigError(
                "rescore, hybrid_seconds: need a partner, an autoregressive model of the same codec"
            )
        if rescore and config.dilation:
            raise ConfigError("rescore: changes scores, which dilation does not ask for; choose one")
        unguided = config.guidance == config.guidance_end == 1
        if unguided and any(negative if isinstance(negative, list) else [negative]):
            raise ConfigError(
                "negative: acts through guidance, which is off at 1; raise it or leave this out"
            )
        limit = BATCH.get(self.device.type, 4) if batch is None else batch
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"batch: got {limit!r}; must be a whole number above 0")
        clips = self._clips(texts, duration, seed, continue_from, inpaint, negative, config)
        if hybrid_seconds:
            self._begin(clips, check_duration(hybrid_seconds, "hybrid_seconds"), config)
        most, context = self._window(config, rescore)
        groups = [clips[i : i + limit] for i in range(0, len(clips), limit)]
        per_window = config.codebooks(self.network.config.span_len).calls(self.network.config.num_codebooks)
        windows = [max(count_windows(clip.given, most, context) for clip in group) for group in groups]
        total, done = sum(windows) * per_window, 0
        for group, count in zip(groups, windows, strict=True):
            report = None
            if progress is not None:
                start = done
                report = lambda now, start=start: progress(start + now, total)  # noqa: E731
            self._sample(group, config, rescore, trace, report)
            done += count * per_window
        results = [self._result(clip, config) for clip in clips]
        return results if many else results[0]

    # ---- what is given ----------------------------------------------------------------------------------

    def _clips(
        self,
        texts: Sequence[str | None],
        duration: Any,
        seed: Any,
        continue_from: Any,
        inpaint: Any,
        negative: Any,
        config: GenerationConfig,
    ) -> list[_Clip]:
        """Everything checked before anything is made."""
        count = len(texts)
        durations = per_item(duration, count, "duration")
        sources = per_item(continue_from, count, "continue_from")
        gaps = per_item(inpaint, count, "inpaint")
        negatives = per_item(negative, count, "negative")
        seeds = per_item(seed, count, "seed") if isinstance(seed, list) else None
        clips = []
        for i, text in enumerate(texts):
            for prompt in (text, negatives[i]):
                self.check_prompt(prompt)
            number = seeds[i] if seeds is not None else seed
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_SEED - count:
                raise InputError(f"seed: got {number!r}; must be a whole number from 0")
            number += 0 if seeds is not None else i
            if gaps[i] is not None and (sources[i] is not None or durations[i] is not None):
                raise ConfigError(
                    "inpaint: keeps the recording's length; leave duration and continue_from out"
                )
            clip = _Clip(
                prompt=text,
                negative=negatives[i],
                seed=number,
                samples=0,
                codes=torch.zeros(
                    self.network.config.num_codebooks, 0, dtype=torch.int64, device=self.device
                ),
                given=np.zeros(0, bool),
                generator=torch.Generator(self.device).manual_seed(number),
            )
            if gaps[i] is not None:
                self._open_gap(clip, gaps[i])
            else:
                self._lay_out(clip, durations[i], sources[i], config)
            clips.append(clip)
        return clips

    def check_prompt(self, prompt: str | None) -> None:
        """Whether a prompt can be used; None is no prompt.

        Raises:
            InputError: it is empty, or longer than the text encoder takes.
        """
        if prompt is None:
            return
        if not isinstance(prompt, str):
            raise InputError(f"prompt: got {type(prompt).__name__}; must be a text")
        if not prompt.strip():
            raise InputError("prompt: is empty; say what is to be heard")
        self.conditioner.check(prompt)

    def _lay_out(
        self, clip: _Clip, duration: float | None, source: AudioSource | None, config: GenerationConfig
    ) -> None:
        """Frames of a clip from nothing, or behind a recording."""
        seconds = self.segment_seconds if duration is None else check_duration(duration)
        rate, hop = self.codec.sample_rate, self.codec.hop
        clip.samples = max(round(seconds * rate), 1)
        frames = -(-clip.samples // hop)
        span = config.span or self.network.config.span_len
        if config.official and config.arrangement == "nonoverlap":
            frames = frames // span * span
            if not frames:
                raise InputError(
                    f"duration: {seconds:g} s are less than a span of {span} frames; make it longer"
                )
            clip.samples = min(clip.samples, frames * hop)
        known = None
        if source is not None:
            clip.recording, known = self._encode(source)
            if known.shape[1] >= frames:
                raise InputError(
                    f"{name_of(source)}: lasts {known.shape[1] * hop / rate:.2f} s, the clip {seconds:g} s; a"
                    " continuation must be longer than what it continues"
                )
            clip.recording = clip.recording[:, : known.shape[1] * hop]
            clip.gap = clip.recording.shape[1], clip.samples
        clip.codes = clip.codes.new_zeros(clip.codes.shape[0], frames)
        clip.given = np.zeros(frames, bool)
        if known is not None:
            clip.codes[:, : known.shape[1]] = known
            clip.given[: known.shape[1]] = True

    def _open_gap(self, clip: _Clip, gap: Inpaint) -> None:
        """Frames of a recording, those of the gap unknown."""
        where = name_of(gap.source)
        clip.recording, clip.codes = self._encode(gap.source, whole=False)
        clip.samples, clip.level = clip.recording.shape[1], False
        rate, hop = self.codec.sample_rate, self.codec.hop
        length = clip.samples / rate
        numbers = all(
            isinstance(t, int | float) and not isinstance(t, bool) and np.isfinite(t)
            for t in (gap.start, gap.end)
        )
        if not numbers or not 0 <= gap.start < gap.end or gap.start >= length or gap.end > length + 0.01:
            raise InputError(
                f"{where}: the part {gap.start}:{gap.end} is not in the recording of {length:.2f} s; give"
                " START:END in seconds, START below END"
            )
        check_duration(length, f"{where}: length")
        begin, end = int(gap.start * rate), min(round(gap.end * rate), clip.samples)
        clip.gap = begin, end
        clip.given = np.ones(clip.codes.shape[1], bool)
        clip.given[begin // hop : -(-end // hop)] = False

    def _encode(self, source: AudioSource, whole: bool = True) -> tuple[np.ndarray, Tensor]:
        """A recording (C, N) in the codec's rate, and its codes (K, T); ``whole``: frames without padding."""
        channels, rate = self.codec.channels, self.codec.sample_rate
        samples = np.atleast_2d(read_audio(source, rate, mono=channels == 1).samples)
        if len(samples) == 1:
            samples = np.repeat(samples, channels, axis=0)
        elif len(samples) != channels:
            raise InputError(
                f"{name_of(source)}: {len(samples)} channels, the model has {channels}; mix it down first"
            )
        if whole:
            samples = samples[:, : samples.shape[1] // self.codec.hop * self.codec.hop]
            if not samples.shape[1]:
                raise InputError(
                    f"{name_of(source)}: is shorter than a frame of {1 / self.codec.frame_rate:.3f} s; give a"
                    " longer recording"
                )
        check_duration(samples.shape[1] / rate, f"{name_of(source)}: length")
        waves = torch.from_numpy(samples.copy())[None].to(self.device)
        codes = self.codec.encode(waves, num_codebooks=self.network.config.num_codebooks)
        return samples, codes.tokens[0, :, : int(codes.lengths[0])].to(self.device)

    def _begin(self, clips: list[_Clip], seconds: float, config: GenerationConfig) -> None:
        """Hybrid mode: the partner makes the first frames."""
        if any(clip.given.any() for clip in clips):
            raise ConfigError("hybrid_seconds: begins a clip, so it can't go with continue_from or inpaint")
        rules = AutoregressiveConfig(
            sample=not config.greedy,
            temperature=config.hybrid_temperature,
            top_k=config.hybrid_top_k,
            guidance=config.hybrid_guidance,
        )
        frames = max(round(seconds * self.codec.frame_rate), 1)
        for clip in clips:
            if frames >= len(clip.given):
                raise InputError(
                    f"hybrid_seconds: {seconds:g} s leave nothing of a clip of"
                    f" {clip.samples / self.sample_rate:g} s; begin with less"
                )
            started = time.perf_counter()
            clip.codes[:, :frames] = self.partner.begin(clip.prompt or "", frames, clip.generator, rules)
            clip.given[:frames] = True
            clip.seconds["beginning"] = time.perf_counter() - started

    # ---- making -----------------------------------------------------------------------------------------

    def _window(self, config: GenerationConfig, rescore: bool) -> tuple[int, int]:
        """Frames that are made at once, and those of them that are known beforehand in a long clip."""
        most = self.network.config.max_frames
        if rescore:  # the partner reads whole windows
            most = min(most, self.partner.network.config.max_frames)
        span = config.span or self.network.config.span_len
        if config.official and most > span:
            most = most // span * span
        return most, min(int(config.context * most), most - 1)

    def _sample(
        self,
        clips: list[_Clip],
        config: GenerationConfig,
        rescore: bool,
        trace: bool,
        report: Callable[[int], None] | None,
    ) -> None:
        """Fill the clips' codes, window after window, all clips at once."""
        most, context = self._window(config, rescore)
        started = time.perf_counter()
        states, mask = self.conditioner([clip.prompt or "" for clip in clips])
        null = None
        if any(clip.negative for clip in clips):
            null = self.conditioner([clip.negative or "" for clip in clips])
        text_seconds = time.perf_counter() - started
        rules = config.codebooks(self.network.config.span_len)
        done = 0
        while True:
            found = [(i, next_window(clip.given, most, context)) for i, clip in enumerate(clips)]
            found = [(i, window) for i, window in found if window is not None]
            if not found:
                break
            started = time.perf_counter()
            rows = [i for i, _ in found]
            longest = max(end - begin for _, (begin, end) in found)
            codes = torch.zeros(
                len(rows), clips[0].codes.shape[0], longest, dtype=torch.int64, device=self.device
            )
            given = torch.zeros(len(rows), longest, dtype=torch.bool, device=self.device)
            for row, (i, (begin, end)) in enumerate(found):
                codes[row, :, : end - begin] = clips[i].codes[:, begin:end]
                given[row, : end - begin] = torch.from_numpy(clips[i].given[begin:end])
            lengths = torch.tensor([end - begin for _, (begin, end) in found], device=self.device)
            record = Trace() if trace else None
            external = self.partner.rescorer([clips[i].prompt or "" for i in rows]) if rescore else None
            result = sample_codebooks(
                predictor(
                    self.network,
                    states[rows],
                    mask[rows],
                    None if null is None else (null[0][rows], null[1][rows]),
                    reuse=config.reuse,
                    official_padding=config.official,
                ),
                *(codes, given, lengths, rules, [clips[i].generator for i in rows]),
                mask_id=self.network.config.mask_id,
                rescore=external,
                trace=record,
                on_step=None if report is None else lambda now, _, done=done: report(done + now),
            )
            done += rules.calls(codes.shape[1])
            seconds = time.perf_counter() - started
            for row, (i, (begin, end)) in enumerate(found):
                clip = clips[i]
                end = min(end, begin + int(result.lengths[row]))
                clip.codes[:, begin:end] = result.tokens[row, :, : end - begin]
                clip.given[begin:end] = True
                clip.calls += result.item_calls[row]
                clip.seconds["text"] = text_seconds
                clip.seconds["sampling"] = clip.seconds.get("sampling", 0.0) + seconds
                if record is not None:
                    clip.traces.append(replace(record.item(row), begin=begin))

    def _result(self, clip: _Clip, config: GenerationConfig) -> SoundResult:
        """Codes to sound, alone, so that no mate changes it."""
        started = time.perf_counter()
        frames = torch.tensor([clip.codes.shape[1]])
        samples = torch.tensor([clip.samples])
        codes = Codes(clip.codes[None].cpu(), frames, self.sample_rate, samples, codec=self.codec.name)
        waves, lengths = self.codec.decode(codes)
        sound = waves[0, :, : int(lengths[0])].float().cpu().numpy()
        if clip.recording is not None:
            sound = _keep(sound, clip.recording, clip.gap, round(FADE_SECONDS * self.sample_rate))
        if config.loudness is not None and clip.level:
            sound = normalize_loudness(sound, self.sample_rate, config.loudness)
        sound = sound.clip(-1.0, 1.0)
        clip.seconds["decoding"] = time.perf_counter() - started
        audio = Audio(np.ascontiguousarray(sound[0] if len(sound) == 1 else sound), self.sample_rate)
        return SoundResult(audio, codes, clip.prompt, clip.seed, clip.calls, clip.seconds, tuple(clip.traces))


def _keep(sound: np.ndarray, recording: np.ndarray, gap: tuple[int, int], fade: int) -> np.ndarray:
    """The recording (C, N) with the sound in its gap; both fade into each other outside of the gap."""
    begin, end = gap
    weight = np.ones(sound.shape[1], np.float32)  # of the sound
    weight[:begin] = 0
    weight[end:] = 0
    for edge, step in ((begin, -1), (end, 1)):
        room = min(fade, edge if step < 0 else sound.shape[1] - edge)
        if room > 0:
            ramp = (np.arange(room, dtype=np.float32) + 0.5) / room
            if step < 0:
                weight[edge - room : edge] = ramp
            else:
                weight[edge : edge + room] = 1 - ramp
    kept = np.zeros_like(sound)
    size = min(recording.shape[1], sound.shape[1])
    kept[:, :size] = recording[:, :size]
    return (weight * sound + (1 - weight) * kept).astype(np.float32)
