"""What turns speech into the features that a semantic codec codes: the interface."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from nar_speech.errors import AudioError, ConfigError


class SpeechFeatures(nn.Module, abc.ABC):
    """Frozen features of speech, normalised, at a constant rate. A row of a batch depends on itself alone.

    Attributes:
        name: for messages.
        sample_rate: of the sound, Hz.
        frame_rate: features per second.
        width: values of a feature H.
        fewest: samples that give at least one.
    """

    name: str
    sample_rate: int
    frame_rate: float
    width: int
    fewest: int

    @abc.abstractmethod
    def forward(self, waves: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of waves.

        Args:
            waves: (B, N) float32 in [-1, 1], at :attr:`sample_rate`.
            lengths: (B,) int64 samples of each row; None: all N.

        Returns:
            (B, T, H) float32, zeros behind the end of a row, and its lengths (B,) int64.

        Raises:
            AudioError: another shape, a row that is too short, values that are not finite.
        """

    def set_statistics(self, statistics: tuple[Tensor, Tensor] | None) -> None:
        """Mean (H,) and variance (H,) by which hidden states are normalised; None: 0 and 1.

        Raises:
            ConfigError: of another size, or a variance that is not above 0.
        """
        mean, variance = statistics or (torch.zeros(self.width), torch.ones(self.width))
        if mean.shape != (self.width,) or variance.shape != (self.width,) or not bool((variance > 0).all()):
            raise ConfigError(
                f"{self.name}: statistics of {tuple(mean.shape)} and {tuple(variance.shape)} values for"
                f" states of {self.width}; both need that many, and variances above 0"
            )
        self.register_buffer("mean", mean.float())
        self.register_buffer("variance", variance.float())

    def normalised(self, hidden: Tensor, counts: Tensor) -> Tensor:
        """Hidden states (B, T, H) by the statistics, zeros behind ``counts`` (B,) of each row."""
        there = torch.arange(hidden.shape[1], device=hidden.device) < counts[:, None]
        return ((hidden - self.mean) / self.variance.sqrt()).masked_fill(~there[..., None], 0.0)

    def check(self, waves: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Waves and lengths (B,), checked, on the device of the network."""
        device = next(self.parameters()).device
        if waves.dim() != 2 or not waves.is_floating_point() or not len(waves):
            raise AudioError(
                f"{self.name}: waves of shape {tuple(waves.shape)} {waves.dtype}; expected float (batch,"
                " samples)"
            )
        waves = waves.to(device, torch.float32)
        if lengths is None:
            lengths = torch.full((len(waves),), waves.shape[1])
        lengths = torch.as_tensor(lengths).to(device)
        if lengths.shape != (len(waves),) or int(lengths.max()) > waves.shape[1]:
            raise AudioError(f"{self.name}: lengths {lengths.tolist()} for waves {tuple(waves.shape)}")
        if int(lengths.min()) < self.fewest:
            raise AudioError(
                f"{self.name}: a recording of {int(lengths.min())} samples at {self.sample_rate} Hz; it needs"
                f" {self.fewest} or more"
            )
        waves = waves.masked_fill(torch.arange(waves.shape[1], device=device) >= lengths[:, None], 0.0)
        if not bool(torch.isfinite(waves).all()):
            raise AudioError(f"{self.name}: NaN or infinite samples; repair the recording")
        return waves, lengths
