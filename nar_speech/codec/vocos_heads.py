"""The heads of Vocos: frames to sound by an inverse Fourier transform or an inverse MDCT; streams too.

Siuzdak 2023, section 3.2 (Fourier) and appendix (MDCT); Princen and Bradley 1986 (MDCT).
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.codec.base import present
from nar_speech.errors import ConfigError

LARGEST = 100.0  # magnitude of a spectrum's value


@dataclass(frozen=True)
class HeadConfig:
    """A head, with the official names.

    Args:
        kind: ``istft``; ``symexp`` and ``cos`` are inverse MDCTs.
        dim: width of the backbone.
        n_fft, hop_length: of ``istft``.
        mdct_frame_len: of the others; the hop is half of it.
        padding: what is trimmed at both ends: ``center`` half a window, ``same`` (window - hop) / 2.
        sample_rate: where it is given, ``symexp`` starts training with coefficients like those of speech.
        clip_audio: limit samples to [-1, 1]; not of ``istft``.
    """

    kind: Literal["istft", "symexp", "cos"]
    dim: int
    n_fft: int | None = None
    hop_length: int | None = None
    mdct_frame_len: int | None = None
    padding: Literal["center", "same"] = "same"
    sample_rate: int | None = None
    clip_audio: bool = False

    def __post_init__(self) -> None:
        configs.check_range(self, 1, configs.MAX_WIDTH, "dim")
        needed = ("n_fft", "hop_length") if self.kind == "istft" else ("mdct_frame_len",)
        for name in needed:
            if getattr(self, name) is None:
                raise ConfigError(f"{name}: is needed by a head of kind {self.kind}")
            configs.check_range(self, 1, configs.MAX_WIDTH, name)
        if self.kind == "istft" and self.hop_length > self.n_fft:
            raise ConfigError(f"hop_length {self.hop_length} must not be above n_fft {self.n_fft}")
        if self.kind != "istft" and self.mdct_frame_len % 4:
            raise ConfigError(f"mdct_frame_len: got {self.mdct_frame_len}; must be a multiple of 4")


@dataclass(frozen=True)
class HeadState:
    """Sums (B, m) to which later frames add or that may be trimmed; of squared windows (B, m) or None.

    ``skip`` samples are still to be trimmed at the beginning; ``seen`` counts frames.
    """

    sums: Tensor
    weights: Tensor | None
    skip: int
    seen: int = 0


class Head(nn.Module, abc.ABC):
    """Frames (B, T, D) to sound by overlap-add.

    Attributes:
        window_size, hop: samples of a frame and between frames.
        trim: samples left out at both ends of the sum.
        delay: samples by which a stream lags behind its frames.
    """

    window_size: int
    hop: int
    trim: int
    squared: Tensor | None  # squared window, by whose sums is divided

    @abc.abstractmethod
    def frames(self, x: Tensor) -> Tensor:
        """Windowed pieces of sound (B, T, window_size) of frames (B, T, D)."""

    def finished(self, waves: Tensor) -> Tensor:
        """Samples as they leave the head."""
        return waves

    @property
    def delay(self) -> int:
        """See the class."""
        return max(self.trim, self.trim - (self.window_size - self.hop) + self.trim)

    def forward(self, x: Tensor) -> Tensor:
        """Waves (B, N) of frames (B, T, D), T >= 1."""
        return self.step(x, self.init_state(x.shape[0], x), True)[0]

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of several lengths, each as if alone; behind the end of one there may be anything.

        Args:
            x: (B, T, D).
            lengths: (B,) frames.

        Returns:
            waves (B, N) and lengths (B,) samples.
        """
        there = present(lengths, x.shape[1])[:, :, None]
        waves = _overlapped(self.frames(x).masked_fill(~there, 0.0), self.hop)
        if self.squared is not None:
            waves = waves / _overlapped(self.squared * there, self.hop).clamp(min=1e-11)
        ends = (lengths - 1) * self.hop + self.window_size - 2 * self.trim
        return self.finished(waves[:, self.trim :]), ends.clamp(min=0) * (lengths > 0)

    def init_state(self, batch: int, like: Tensor) -> HeadState:
        """The state of ``batch`` streams."""
        zeros = like.new_zeros(batch, self.window_size - self.hop)
        return HeadState(zeros, None if self.squared is None else zeros, self.trim)

    def step(self, x: Tensor, state: HeadState, final: bool = False) -> tuple[Tensor, HeadState]:
        """Samples (B, n) that are complete now for more frames (B, t, D), t >= 0."""
        sums, weights, count = state.sums, state.weights, x.shape[1]
        overlap = self.window_size - self.hop
        if count:
            sums = _joined(sums, _overlapped(self.frames(x), self.hop), overlap)
            if self.squared is not None:
                windows = self.squared.expand(1, count, -1)
                weights = _joined(weights, _overlapped(windows, self.hop).expand(len(x), -1), overlap)
        seen = state.seen + count
        # Nothing of the last ``overlap`` sums is complete, and ``trim`` samples at the end may be left out.
        ready = sums.shape[1] - (self.trim if final else max(overlap, self.trim))
        ready = max(ready, 0) if seen else 0
        waves = sums[:, :ready]
        if weights is not None:
            waves = waves / weights[:, :ready].clamp(min=1e-11)
            weights = weights[:, ready:]
        cut = min(state.skip, ready)
        return self.finished(waves[:, cut:]), HeadState(sums[:, ready:], weights, state.skip - cut, seen)


def _overlapped(pieces: Tensor, hop: int) -> Tensor:
    """Sum (B, (T - 1) * hop + W) of pieces (B, T, W)."""
    length = (pieces.shape[1] - 1) * hop + pieces.shape[2]
    return F.fold(pieces.transpose(1, 2), (1, length), (1, pieces.shape[2]), stride=(1, hop))[:, 0, 0]


def _joined(before: Tensor, after: Tensor, overlap: int) -> Tensor:
    """Two sums of which the last ``overlap`` samples of the first are the first ones of the second."""
    return F.pad(before, (0, after.shape[1] - overlap)) + F.pad(after, (before.shape[1] - overlap, 0))


def _trim(padding: str, window: int, hop: int) -> int:
    return window // 2 if padding == "center" else (window - hop) // 2


class FourierWindow(nn.Module):
    """Holds the window under the official name."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("window", torch.hann_window(size))


class IstftHead(Head):
    """Magnitude and phase of every bin, and an inverse Fourier transform."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        c = config
        self.window_size, self.hop = c.n_fft, c.hop_length
        self.trim = _trim(c.padding, c.n_fft, c.hop_length)
        self.out = nn.Linear(c.dim, c.n_fft // 2 * 2 + 2)
        self.istft = FourierWindow(c.n_fft)

    @property
    def squared(self) -> Tensor:
        """The squared window."""
        return self.istft.window.square()

    def spectra(self, x: Tensor) -> Tensor:
        """Complex spectra (B, T, n_fft / 2 + 1) of frames (B, T, D)."""
        magnitude, phase = self.out(x).chunk(2, 2)
        return torch.polar(magnitude.exp().clamp(max=LARGEST), phase)

    def frames(self, x: Tensor) -> Tensor:
        """See :class:`Head`."""
        return torch.fft.irfft(self.spectra(x), self.window_size, dim=2) * self.istft.window


class Mdct(nn.Module):
    """Inverse MDCT of N coefficients to 2 N windowed samples, by one complex Fourier transform of 2 N."""

    def __init__(self, size: int):
        super().__init__()
        half, place = size // 2, torch.arange(size)
        shift = (half + 1) / 2
        self.register_buffer("window", torch.sin(math.pi / size * (place + 0.5)))
        before = torch.polar(torch.ones(size), math.pi * shift * place / half)
        after = torch.polar(torch.ones(size), math.pi * (place + shift) / size)
        self.register_buffer("pre_twiddle", torch.view_as_real(before))
        self.register_buffer("post_twiddle", torch.view_as_real(after))

    def forward(self, coefficients: Tensor) -> Tensor:
        """(B, T, N) to (B, T, 2 N)."""
        half = coefficients.shape[2]
        whole = torch.cat([coefficients, -coefficients.flip(2)], 2)
        y = torch.fft.ifft(whole * torch.view_as_complex(self.pre_twiddle), dim=2)
        return (y * torch.view_as_complex(self.post_twiddle)).real * math.sqrt(2 * half) * self.window


class MdctHead(Head):
    """Coefficients and an inverse MDCT.

    ``symexp`` predicts them on a scale that is logarithmic for large values of either sign, ``cos`` as
    magnitude and the cosine of a phase.
    """

    squared = None

    def __init__(self, config: HeadConfig):
        super().__init__()
        c = config
        self.kind, self.clip = c.kind, c.clip_audio
        self.window_size, self.hop = c.mdct_frame_len, c.mdct_frame_len // 2
        # Half of the window, or (window - hop) / 2, which is a quarter.
        self.trim = _trim(c.padding, self.window_size, self.hop)
        self.out = nn.Linear(c.dim, self.hop if c.kind == "symexp" else self.window_size)
        self.imdct = Mdct(self.window_size)
        if c.kind == "symexp" and c.sample_rate is not None:
            # Power falls with frequency, so the first bins start larger.
            mel = torch.linspace(0, 2595 * math.log10(1 + c.sample_rate / 1400), self.hop)
            frequency = 10 ** (mel / 2595) - 1
            with torch.no_grad():
                self.out.weight.mul_((1 - frequency / frequency.max())[:, None])

    def frames(self, x: Tensor) -> Tensor:
        """See :class:`Head`."""
        x = self.out(x)
        if self.kind == "symexp":
            coefficients = (x.sign() * x.abs().expm1()).clamp(-LARGEST, LARGEST)
        else:
            magnitude, phase = x.chunk(2, 2)
            coefficients = magnitude.exp().clamp(max=LARGEST) * phase.cos()
        return self.imdct(coefficients)

    def finished(self, waves: Tensor) -> Tensor:
        """See :class:`Head`."""
        return waves.clamp(-1.0, 1.0) if self.clip else waves


def build_head(config: HeadConfig) -> Head:
    """The head that a configuration describes."""
    return IstftHead(config) if config.kind == "istft" else MdctHead(config)
