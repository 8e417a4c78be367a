"""Features of one of our own recognisers for a semantic codec: hidden states of its encoder, normalised.

For small models that must not depend on w2v-BERT. Of a Whisper encoder with a branch the trunk is read, which
has twice the branch's rate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nar_speech.features import Frontend
from nar_speech.layers.whisper import WhisperEncoder
from nar_speech.models.speech_features import SpeechFeatures


class RecogniserFeatures(SpeechFeatures):
    """Waves to normalised hidden states.

    Args:
        network: a recogniser's, with ``encode`` and ``encoder``.
        frontend: its own.
        statistics: mean (H,) and variance (H,) of the hidden states; None: 0 and 1.
        name: of the recogniser.

    Raises:
        ConfigError: statistics of another size.
    """

    def __init__(
        self,
        network: nn.Module,
        frontend: Frontend,
        statistics: tuple[Tensor, Tensor] | None = None,
        name: str = "recogniser",
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.frontend, self.name = frontend, name
        self.sample_rate = frontend.config.sample_rate
        encoder = network.encoder
        self.trunk = encoder.trunk if isinstance(encoder, WhisperEncoder) else None
        stride = 2 if self.trunk is not None else float(encoder.frame_stride)
        self.frame_rate = 1 / (frontend.frame_shift * stride)
        self.width = encoder.output_size
        self.fewest = frontend.config.frame_samples
        self.set_statistics(statistics)

    @torch.no_grad()
    def forward(self, waves: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`SpeechFeatures`."""
        features, counts = self.frontend(*self.check(waves, lengths))
        hidden, counts = (self.trunk or self.network.encode)(features, counts)
        return self.normalised(hidden.float(), counts), counts
