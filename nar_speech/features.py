"""Waveforms to features: Kaldi filter banks with frame stacking and CMVN, Whisper's and NeMo's log-mel.

One :class:`Frontend` serves files and streams. ``forward`` takes whole utterances, ``step`` takes chunks and
carries a :class:`FrontendState`; both run the same code, so their outputs agree for every chunking.

Sources: Kaldi ``feat/feature-fbank.cc`` (filter bank), FunASR ``WavFrontend`` (frame stacking and CMVN),
Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2 (log-mel),
NeMo 3.0 ``FilterbankFeatures``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nar_speech.cmvn import read_json_cmvn, read_kaldi_cmvn
from nar_speech.config import check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.spectrum import (
    filled_frames,
    kaldi_mel_matrix,
    kaldi_spectrum_frames,
    log_energies,
    nemo_frames,
    nemo_log_energies,
    normalize_features,
    power_of_two,
    slaney_mel_matrix,
    whisper_log_energies,
    window_samples,
)

INT16_SCALE = 32768.0  # Kaldi works on 16-bit integers
CPU_BLOCK_FRAMES = 2048  # frames whose spectra are made at once on a CPU: they stay in its cache
WINDOWS = ("povey", "hamming", "hann", "blackman", "rectangular")


@dataclass(frozen=True)
class FrontendConfig:
    """The ``frontend`` part of a model.

    Args:
        kind: ``fbank`` (Kaldi, natural log, samples scaled to 16 bit), ``log_mel`` (Whisper: log10, floored 8
            below the utterance's maximum or ``peak``, then ``(x + 4) / 4``) or ``nemo`` (pre-emphasis,
            centred frames, natural log of the energy + 2^-24).
        window: of ``fbank`` and ``nemo``: ``povey`` (default of ``fbank``), ``hamming``, ``hann`` (default of
            ``nemo``), ``blackman`` or ``rectangular``. ``log_mel`` always uses ``hann``.
        frame_ms, shift_ms: length and hop of a frame in milliseconds.
        low_hz: lower edge of the filters; default 20 (``fbank``) or 0 (``log_mel``).
        high_hz: upper edge; 0 or less counts from half the sample rate.
        dither: standard deviation of the noise added in training mode, in 16-bit steps (not ``log_mel``).
        fft_size: of ``nemo``; default the next power of 2 above the frame.
        peak: of ``log_mel``: log10 of the energy that stands for every utterance's maximum. What is heard
            later changes nothing then, so such features can stream; a clip begins after zeros, not after its
            mirror image, and one shorter than the hop has no frame.
        normalize: ``per_feature`` (``nemo`` only): mean 0 and deviation 1 of each feature in each utterance.
        lfr_m, lfr_n: stack ``lfr_m`` frames every ``lfr_n`` frames (low frame rate); 1, 1 is off.
        cmvn: file in the model folder with mean and scale: ``*.mvn`` (Kaldi text) or ``*.json`` (WeNet).
    """

    kind: Literal["fbank", "log_mel", "nemo"] = "fbank"
    sample_rate: int = 16000
    num_mels: int = 80
    window: Literal["povey", "hamming", "hann", "blackman", "rectangular"] | None = None
    frame_ms: float = 25.0
    shift_ms: float = 10.0
    low_hz: float | None = None
    high_hz: float = 0.0
    dither: float = 0.0
    fft_size: int | None = None
    peak: float | None = None
    normalize: Literal["none", "per_feature"] = "none"
    lfr_m: int = 1
    lfr_n: int = 1
    cmvn: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("fbank", "log_mel", "nemo"):
            raise ConfigError(f"kind: got {self.kind!r}; valid values: fbank, log_mel, nemo")
        if self.window is not None and self.window not in WINDOWS:
            raise ConfigError(f"window: got {self.window!r}; valid values: {', '.join(WINDOWS)}")
        check_range(self, 1000, 768_000, "sample_rate")
        check_range(self, 1, 1000, "num_mels", "lfr_m", "lfr_n")
        check_range(self, 0, 1000, "frame_ms", "shift_ms")
        check_range(self, 0, INT16_SCALE, "dither")
        if self.frame_samples < 2 or self.shift_samples < 1:
            raise ConfigError(
                f"frame_ms {self.frame_ms:g} and shift_ms {self.shift_ms:g} are too short for"
                f" {self.sample_rate} Hz; need a frame of 2 samples and a shift of 1"
            )
        low, high = self.band
        if not 0 <= low < high <= self.sample_rate / 2:
            raise ConfigError(
                f"filters from {low:g} to {high:g} Hz do not fit 0 to {self.sample_rate / 2:g} Hz"
            )
        if not 1 <= self.lfr_n <= self.lfr_m:
            raise ConfigError(f"need 1 <= lfr_n <= lfr_m, got lfr_m {self.lfr_m}, lfr_n {self.lfr_n}")
        if self.kind == "log_mel" and self.window not in (None, "hann"):
            raise ConfigError(f"window: log_mel uses hann, got {self.window!r}; leave the key out")
        if self.kind == "log_mel" and self.dither:
            raise ConfigError("dither: kind log_mel has none; leave the key out")
        if self.kind != "nemo" and (self.fft_size is not None or self.normalize != "none"):
            raise ConfigError("fft_size, normalize: only kind nemo has them; leave the keys out")
        if self.peak is not None:
            if self.kind != "log_mel":
                raise ConfigError("peak: only kind log_mel has it; leave the key out")
            check_range(self, -10, 10, "peak")
        if self.fft_size is not None and not self.frame_samples <= self.fft_size <= 1 << 20:
            raise ConfigError(
                f"fft_size: got {self.fft_size}; must be {self.frame_samples} (a frame) to {1 << 20}"
            )

    @property
    def frame_samples(self) -> int:
        """Samples in one frame."""
        return int(self.sample_rate * self.frame_ms * 0.001)

    @property
    def shift_samples(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.shift_ms * 0.001)

    @property
    def band(self) -> tuple[float, float]:
        """Lower and upper edge of the filters in Hz."""
        low = self.low_hz if self.low_hz is not None else (20.0 if self.kind == "fbank" else 0.0)
        high = self.high_hz if self.high_hz > 0 else self.high_hz + self.sample_rate / 2
        return low, high


@dataclass(frozen=True)
class FrontendState:
    """What a stream carries from one ``step`` to the next. The first dimension of every tensor is the batch.

    Sizes do not depend on the chunks, so streams can be gathered, scattered and stacked freely.

    Args:
        samples: (B, S) float32 samples that wait for a full frame, left aligned; S = frame length - 1, one
            more for ``nemo``.
        num_samples: (B,) int64, how many of them are valid.
        frames: (B, P, M) float32 frames kept for the next stack, left aligned; P = lfr_m - 1.
        num_frames: (B,) int64, how many of them are valid.
        started: (B,) bool, whether the stream has given its first frame.
    """

    samples: Tensor
    num_samples: Tensor
    frames: Tensor
    num_frames: Tensor
    started: Tensor

    def to(self, device: torch.device | str) -> FrontendState:
        """The same state on another device."""
        return FrontendState(**{name: value.to(device) for name, value in vars(self).items()})


class Frontend(nn.Module):
    """Waveforms to features. It has no trainable parameters and nothing in its state dict.

    Its constants stay float32 under ``.half()`` and ``.to(dtype)``, and autocast is off inside: features
    are float32.

    Args:
        cmvn: (shift, scale), each (F,): the output is ``(stacked + shift) * scale``.

    Attributes:
        feature_size: F, values per output frame (``num_mels * lfr_m``).
        frame_shift: seconds per output frame.
    """

    def __init__(self, config: FrontendConfig, cmvn: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.config = config
        self.frame = config.frame_samples
        self.shift = config.shift_samples
        self.feature_size = config.num_mels * config.lfr_m
        self.frame_shift = self.shift / config.sample_rate * config.lfr_n
        low, high = config.band
        if config.kind == "fbank":
            self.fft_size = power_of_two(self.frame)
            window = window_samples(config.window or "povey", self.frame)
            mel = kaldi_mel_matrix(config.num_mels, self.fft_size, config.sample_rate, low, high)
        else:
            if config.kind == "nemo":
                self.fft_size = config.fft_size or power_of_two(self.frame)
                window = window_samples(config.window or "hann", self.frame)
            else:
                self.fft_size = self.frame
                window = torch.hann_window(self.frame, dtype=torch.float64)
            mel = slaney_mel_matrix(config.num_mels, self.fft_size, config.sample_rate, low, high)
        # Of centred frames: the samples one is made of (nemo: and one for the pre-emphasis), and how many of
        # them the first frame has before the beginning.
        emphasis = int(config.kind == "nemo")
        self.centred = config.kind == "nemo" or config.peak is not None
        self.span = self.frame + emphasis
        self.lead = self.fft_size // 2 - (self.fft_size - self.frame) // 2 + emphasis
        self.register_buffer("window", window.float(), persistent=False)
        self.register_buffer("mel", mel.float().T.contiguous(), persistent=False)
        for name, value in zip(("cmvn_shift", "cmvn_scale"), cmvn or (None, None), strict=True):
            if value is not None and tuple(value.shape) != (self.feature_size,):
                raise ConfigError(
                    f"frontend: {name} has shape {tuple(value.shape)}, the features have {self.feature_size}"
                    " values (num_mels * lfr_m); use the CMVN file that belongs to this frontend"
                )
            self.register_buffer(name, None if value is None else value.float(), persistent=False)

    def _apply(self, fn, recurse=True):
        """Follow the module to another device but never to another dtype."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def num_frames(self, samples: int | Tensor) -> int | Tensor:
        """Output frames of so many samples: 0 of an empty utterance, else at least 1 (with ``nemo`` 0)."""
        if isinstance(samples, Tensor):
            frames = self._whole_frames(samples)
            return torch.div(frames + self.config.lfr_n - 1, self.config.lfr_n, rounding_mode="floor")
        return int(self.num_frames(torch.tensor(samples)))

    def forward(
        self, waves: Tensor, lengths: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of whole utterances; a batch gives the same as its single items.

        A clip shorter than one frame gives one frame (``fbank``: with the window shortened to the clip, as
        FunASR does; ``log_mel``: the clip is followed by zeros); with ``nemo`` it gives none if it is shorter
        than the hop.

        Args:
            waves: (B, N) samples in [-1, 1]; what lies beyond ``lengths`` is ignored.
            lengths: (B,) int64, valid samples.
            generator: of the dither noise; default torch's global one.

        Returns:
            features (B, T, F) float32, rows beyond an item's length are zero; lengths (B,) int64.
        """
        with torch.autocast(waves.device.type, enabled=False):
            waves, lengths = self._check(waves, lengths)
            if self.config.kind == "log_mel" and not self.centred:
                frames, counts = self._log_mel(waves, lengths)
                return self._finish(*stack_frames(frames, counts, self.config.lfr_m, self.config.lfr_n))
            if self.centred:
                waves = nn.functional.pad(self._scale(waves, generator), (self.lead, 0))
                frames, counts = self.centred_mel(waves, lengths + self.lead, True)
                if self.config.normalize == "per_feature":
                    frames = normalize_features(frames, counts)
                return self._finish(*stack_frames(frames, counts, self.config.lfr_m, self.config.lfr_n))
            frames, counts = self.filter_bank(self._scale(waves, generator), lengths)
            short = (lengths > 0) & (lengths < self.frame)
            frames, counts = self._short_clips(waves, lengths, short, frames, counts)
            return self._finish(*stack_frames(frames, counts, self.config.lfr_m, self.config.lfr_n))

    def init_state(
        self, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> FrontendState:
        """The state of ``batch`` streams that have not begun. Always float32."""
        self._check_streaming()
        del dtype  # part of the common contract of streaming modules

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        return FrontendState(
            samples=zeros(self.span - 1, dtype=torch.float32),
            num_samples=zeros() + (self.lead if self.centred else 0),
            frames=zeros(self.config.lfr_m - 1, self.config.num_mels, dtype=torch.float32),
            num_frames=zeros(),
            started=zeros(dtype=torch.bool),
        )

    def step(
        self,
        waves: Tensor,
        lengths: Tensor,
        state: FrontendState,
        final: bool | Tensor = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, FrontendState]:
        """Features of the next chunk of every stream; concatenated they equal ``forward``.

        Args:
            waves: (B, N) new samples in [-1, 1]; N and any of ``lengths`` may be 0.
            lengths: (B,) int64, valid new samples.
            final: whether the stream ends with this chunk: one flag, or (B,) bool. What waits is then given
                out, and the stream's state is that of a new stream.

        Returns:
            features (B, T, F) float32, zero beyond ``lengths``; lengths (B,) int64; the next state.

        Raises:
            ConfigError: ``log_mel``, whose scaling needs the whole utterance.
        """
        self._check_streaming()
        with torch.autocast(waves.device.type, enabled=False):
            waves, lengths = self._check(waves, lengths)
            final = torch.as_tensor(final, dtype=torch.bool, device=waves.device).expand(len(waves))
            scaled = self._scale(waves, generator)
            buffer, filled = _append(state.samples, state.num_samples, scaled, lengths)
            fresh = self.lead if self.centred else 0  # samples of a new stream: zeros
            if self.centred:
                frames, counts = self.centred_mel(buffer, filled, final)
            else:
                frames, counts = self.filter_bank(buffer, filled)
                short = final & ~state.started & (filled > 0) & (filled < self.frame)
                frames, counts = self._short_clips(buffer / INT16_SCALE, filled, short, frames, counts)

            m, n = self.config.lfr_m, self.config.lfr_n
            first = ~state.started & (counts > 0)
            left = (m - 1) // 2
            if left and frames.shape[1]:  # a stream begins with copies of its first frame
                head = frames[:, :1].expand(-1, left, -1)
                held, held_counts = _append(state.frames, state.num_frames, head, first * left)
            else:
                held, held_counts = state.frames, state.num_frames
            frames_all, total = _append(held, held_counts, frames, counts)
            running = torch.div(total - m, n, rounding_mode="floor") + 1
            ending = torch.div(total - left + n - 1, n, rounding_mode="floor")
            emitted = torch.where(final, ending, running).clamp(min=0)
            stacked = _stack(frames_all, total, emitted, m, n, offset=0)
            features, emitted = self._finish(stacked, emitted)

            keep = ~final
            held = state.samples.shape[1]
            samples, num_samples = _drop(buffer, filled, counts * self.shift, held, keep)
            num_samples = torch.where(keep, num_samples, fresh)
            frames_kept, num_kept = _drop(frames_all, total, emitted * n, m - 1, keep)
            started = (state.started | first) & keep
            return features, emitted, FrontendState(samples, num_samples, frames_kept, num_kept, started)

    def _check_streaming(self) -> None:
        if self.config.kind == "log_mel" and not self.centred:
            raise ConfigError(
                "frontend.kind: log_mel is scaled by the maximum of the whole utterance and can't stream;"
                " use a model with kind fbank, or one that was trained with a fixed frontend.peak"
            )
        if self.config.normalize != "none":
            raise ConfigError(
                "frontend.normalize: per_feature needs the whole utterance, can't stream; use another model"
            )

    def _check(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if waves.ndim != 2 or lengths.shape != waves.shape[:1]:
            raise InputError(
                f"frontend: expected waves (B, N) and lengths (B,), got {tuple(waves.shape)} and"
                f" {tuple(lengths.shape)}"
            )
        if len(lengths) and int(lengths.max()) > waves.shape[1]:
            raise InputError(
                f"frontend: a length of {int(lengths.max())} samples, but the waves hold {waves.shape[1]}"
            )
        return waves.float(), lengths.to(waves.device)

    def _scale(self, waves: Tensor, generator: torch.Generator | None) -> Tensor:
        """Kaldi's scale, and dither in training."""
        scale = 1.0 if self.centred else INT16_SCALE
        waves = waves * scale
        if self.training and self.config.dither:
            noise = torch.randn(waves.shape, generator=generator, device=waves.device)
            waves = waves.add_(noise, alpha=self.config.dither * scale / INT16_SCALE)
        return waves

    def _whole_frames(self, samples: Tensor) -> Tensor:
        """Frames before stacking, short clips included."""
        if self.config.kind == "nemo":
            return torch.div(samples - self.fft_size % 2, self.shift, rounding_mode="floor").clamp(min=0)
        if self.config.kind == "log_mel":
            frames = torch.div(samples, self.shift, rounding_mode="floor")
            if self.centred:
                return frames.clamp(min=0)
        else:
            frames = torch.div(samples - self.frame, self.shift, rounding_mode="floor") + 1
        return torch.where(samples > 0, frames.clamp(min=1), 0)

    def filter_bank(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log mel energies (B, T, M) of the complete frames of ``waves`` (B, N), scaled to 16 bit."""
        counts = (torch.div(lengths - self.frame, self.shift, rounding_mode="floor") + 1).clamp(min=0)

        def energies(begin: int, end: int) -> Tensor:
            frames = kaldi_spectrum_frames(waves[:, begin:end], self.window, self.shift)
            return log_energies(frames, self.fft_size, self.mel)

        return self._in_blocks(waves, self.frame, energies), counts

    def centred_mel(self, waves: Tensor, filled: Tensor, final: bool | Tensor) -> tuple[Tensor, Tensor]:
        """Log mel energies (B, T, M) of streams, NeMo's or Whisper's under ``peak``, and their number (B,).

        Args:
            waves: (B, N) samples, of which ``filled`` (B,) are there. A stream begins with ``lead`` zeros,
                and what is kept of it begins at a multiple of the hop.
            final: whether the streams end here: then frames may reach behind their ends.
        """
        size, peak = self.span, self.config.peak
        waves = nn.functional.pad(waves, (0, max(size - self.lead - self.shift, 0)))
        running = torch.div(filled - size, self.shift, rounding_mode="floor") + 1
        ending = self._whole_frames(filled - self.lead)
        final = torch.as_tensor(final, device=filled.device)

        def energies(begin: int, end: int) -> Tensor:
            if peak is not None:
                frames = filled_frames(waves[:, begin:end], filled - begin, self.window, self.shift)
                return (
                    whisper_log_energies(frames, self.fft_size, self.mel).clamp_(min=peak - 8.0) / 4.0 + 1.0
                )
            frames = nemo_frames(waves[:, begin:end], filled - begin, self.window, self.shift)
            return nemo_log_energies(frames, self.fft_size, self.mel)

        return self._in_blocks(waves, size, energies), torch.where(final, ending, running).clamp(min=0)

    def _in_blocks(self, waves: Tensor, size: int, energies: Callable[[int, int], Tensor]) -> Tensor:
        """(B, T, M) of all frames of ``size`` samples, a block at a time on a CPU.

        ``energies`` gives those that lie in the samples from one number up to another.
        """
        if waves.shape[1] < size:
            return waves.new_zeros(len(waves), 0, self.config.num_mels)
        total = (waves.shape[1] - size) // self.shift + 1
        rows = max(CPU_BLOCK_FRAMES // max(len(waves), 1), 1) if waves.device.type == "cpu" else total
        blocks = []
        for first in range(0, total, rows):
            last = min(first + rows, total) - 1
            blocks.append(energies(first * self.shift, last * self.shift + size))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def _short_clips(
        self, waves: Tensor, lengths: Tensor, short: Tensor, frames: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Give the clips in ``short`` (B,) the single frame of a window as long as the clip.

        ``waves`` are in [-1, 1]. Such clips are rare, and each needs its own window, FFT size and filters, so
        this is the one place that looks at items one by one.
        """
        rows = short.nonzero().flatten().tolist()
        if not rows:
            return frames, counts
        if not frames.shape[1]:
            frames = frames.new_zeros(len(waves), 1, self.config.num_mels)
        config = self.config
        for row in rows:
            size = int(lengths[row])
            window = window_samples(config.window or "povey", size).to(waves)
            fft_size = power_of_two(max(size, 2))
            mel = kaldi_mel_matrix(config.num_mels, fft_size, config.sample_rate, *config.band).T.to(waves)
            clip = kaldi_spectrum_frames(waves[row : row + 1, :size] * INT16_SCALE, window, self.shift)
            frames[row, 0] = log_energies(clip, fft_size, mel)[0, 0]
        return frames, counts.masked_fill(short, 1)

    def _log_mel(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Whisper's log-mel (B, T, M): centred frames, the clip mirrored at its start, zeros after its end.

        With zeros after the end a result does not depend on padding, and it equals Whisper's, which pads
        every clip with zeros to 30 s.
        """
        half = self.frame // 2
        counts = self._whole_frames(lengths)
        total = max(int(counts.max()), 1) if len(counts) else 1
        size = max((total - 1) * self.shift + half, half + 1)
        position = torch.arange(waves.shape[1], device=waves.device)
        waves = waves.masked_fill(position >= lengths[:, None], 0.0)[:, :size]
        waves = nn.functional.pad(waves, (0, size - waves.shape[1]))
        waves = torch.cat([waves[:, 1 : half + 1].flip(1), waves], dim=1)
        frames = waves.unfold(1, self.frame, self.shift) * self.window
        energies = whisper_log_energies(frames, self.fft_size, self.mel)
        valid = torch.arange(energies.shape[1], device=waves.device) < counts[:, None]
        peak = energies.masked_fill(~valid[..., None], -math.inf).amax(dim=(1, 2), keepdim=True)
        return torch.maximum(energies, peak - 8.0).add_(4.0).div_(4.0), counts

    def _finish(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Apply CMVN, cut to the longest item, and zero the padding."""
        longest = int(lengths.max()) if len(lengths) else 0
        features = features[:, :longest]
        if self.cmvn_shift is not None:
            features = (features + self.cmvn_shift).mul_(self.cmvn_scale)
        padded = torch.arange(longest, device=features.device) >= lengths[:, None]
        return features.masked_fill(padded[..., None], 0.0), lengths


def build_frontend(config: FrontendConfig, folder: str | Path = ".") -> Frontend:
    """The frontend of a model folder: reads the CMVN file that ``config.cmvn`` names, if any."""
    if config.cmvn is None:
        return Frontend(config)
    path = Path(folder) / config.cmvn
    if path.suffix == ".json" or path.name == "global_cmvn":
        return Frontend(config, read_json_cmvn(path))
    return Frontend(config, read_kaldi_cmvn(path))


def stack_frames(frames: Tensor, lengths: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Low frame rate: stack ``m`` frames every ``n`` frames.

    Stack i holds frames ``n*i - (m-1)//2 ... n*i - (m-1)//2 + m - 1``; outside the utterance the first or
    last frame is repeated.

    Args:
        frames: (B, T, M); lengths: (B,) int64.

    Returns:
        (B, ceil(T / n), m * M) and (B,) ``ceil(lengths / n)``; rows beyond are not meaningful.
    """
    if m == 1 and n == 1:
        return frames, lengths
    stacks = torch.div(lengths + n - 1, n, rounding_mode="floor")
    return _stack(frames, lengths, stacks, m, n, offset=-((m - 1) // 2)), stacks


def _stack(frames: Tensor, lengths: Tensor, stacks: Tensor, m: int, n: int, offset: int) -> Tensor:
    """Stacks (B, max(stacks), m * M) that start at frame ``n*i + offset``, clamped to each item's frames."""
    batch, total, size = frames.shape
    rows = int(stacks.max()) if batch else 0
    if not rows:
        return frames.new_zeros(batch, 0, m * size)
    if m == 1 and n == 1:
        return frames[:, :rows]
    device = frames.device
    index = torch.arange(rows, device=device)[:, None] * n + torch.arange(m, device=device) + offset
    index = torch.minimum(index.flatten().clamp(min=0), (lengths - 1).clamp(min=0)[:, None])
    index = index + torch.arange(batch, device=device)[:, None] * total
    return frames.reshape(batch * total, size).index_select(0, index.flatten()).view(batch, rows, m * size)


def _append(held: Tensor, num_held: Tensor, new: Tensor, num_new: Tensor) -> tuple[Tensor, Tensor]:
    """Per item, the first ``num_held`` entries of ``held`` followed by ``new``: (B, S + N, ...), counts."""
    both = torch.cat([held, new], dim=1)
    size = held.shape[1]
    position = torch.arange(both.shape[1], device=both.device)
    index = torch.where(position < num_held[:, None], position, position - num_held[:, None] + size)
    index = index.clamp(max=max(both.shape[1] - 1, 0))
    return _take(both, index), num_held + num_new


def _drop(buffer: Tensor, filled: Tensor, count: Tensor, size: int, keep: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of each item after its first ``count`` entries, (B, size, ...); none unless ``keep``."""
    left = torch.where(keep, filled - count, 0).clamp(min=0)
    position = torch.arange(size, device=buffer.device)
    if not size or not buffer.shape[1]:
        return buffer.new_zeros(len(buffer), size, *buffer.shape[2:]), left
    index = (position + count[:, None]).clamp(max=buffer.shape[1] - 1)
    valid = (position < left[:, None]).view(len(buffer), size, *[1] * (buffer.ndim - 2))
    return torch.where(valid, _take(buffer, index), 0.0), left


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Entries ``index`` (B, K) of dimension 1 of ``values`` (B, S) or (B, S, M)."""
    if values.ndim == 3:
        index = index[..., None].expand(-1, -1, values.shape[2])
    return values.gather(1, index)


def select_streams(state: FrontendState, index: Tensor) -> FrontendState:
    """The states of the streams ``index`` (K,), as a batch of K."""
    return replace(state, **{name: value[index] for name, value in vars(state).items()})
