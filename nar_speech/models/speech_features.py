"""What turns speech into the features that a semantic codec codes: the interface."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from nar_speech.errors import AudioError


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
