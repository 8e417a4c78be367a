"""w2v-BERT 2.0 up to the layer whose hidden states the semantic codec of MaskGCT reads.

    Seamless Communication et al. 2023, "Seamless: Multilingual Expressive and Streaming Speech Translation",
    section 3.2.1 (w2v-BERT 2.0); Wang et al. 2024, "MaskGCT", section 3.2.1 (its 17th layer, normalised).

The network is transformers'. Layers behind the one that is read (7 of 24, 169 of 581 million parameters) are
neither built nor computed. Kaldi's filter banks come from our own front end, in batches, on any device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.features import Frontend, FrontendConfig
from nar_speech.locate import ASSETS
from nar_speech.models.speech_features import SpeechFeatures

LAYER = 17
HUB_NAME = "facebook/w2v-bert-2.0"
NEEDED = ("config.json", "model.safetensors")
STATISTICS = ASSETS / "maskgct" / "wav2vec2bert_stats.safetensors"  # of Emilia, from Amphion (MIT licence)
SMALLEST_VARIANCE = 1e-7  # added to the variance of a filter over an utterance
STACK = 2  # filter-bank frames of 10 ms in one feature


class W2vBert(SpeechFeatures):
    """Waves at 16 kHz to normalised hidden states, 50 a second.

    Args:
        config: fields of transformers' ``Wav2Vec2BertConfig``, as in ``config.json``.
        layer: how many layers are computed.
        statistics: mean (H,) and variance (H,) of the hidden states; None: 0 and 1.

    Raises:
        ConfigError: an impossible value.
    """

    name, sample_rate, frame_rate, fewest = "w2v-BERT", 16_000, 50.0, 560

    def __init__(
        self,
        config: Mapping[str, Any],
        layer: int = LAYER,
        statistics: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

        layers = config.get("num_hidden_layers", 24)
        if not 1 <= layer <= layers:
            raise ConfigError(f"{self.name}: layer {layer} of a network of {layers}; name one of them")
        changed = {"num_hidden_layers": layer, "add_adapter": False, "mask_time_prob": 0.0}
        changed |= {"use_intermediate_ffn_before_adapter": False, "mask_feature_prob": 0.0}
        try:
            c = Wav2Vec2BertConfig(**{**config, **changed})
            self.model = Wav2Vec2BertModel(c).eval().requires_grad_(False)
        except Exception as error:  # transformers' own checks raise many kinds
            raise ConfigError(
                f"{self.name}: impossible configuration ({' '.join(str(error).split())})"
            ) from error
        self.layer, self.width = layer, c.hidden_size
        self.frontend = Frontend(FrontendConfig(num_mels=c.feature_projection_input_dim // STACK))
        self.set_statistics(statistics)

    @torch.no_grad()
    def forward(self, waves: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`SpeechFeatures`. An odd last filter-bank frame makes a feature, too, of no input."""
        inputs, mask, counts = self.inputs(*self.check(waves, lengths))
        return self.normalised(self.hidden(inputs, mask), counts), counts

    def inputs(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the network reads, as transformers' ``SeamlessM4TFeatureExtractor`` makes it.

        Args:
            waves, lengths: as checked.

        Returns:
            (B, T, 2 M) pairs of normalised filter-bank frames; (B, T) bool, where both are there; features of
            each row (B,), which count a half one.
        """
        frames, counts = self.frontend(waves, lengths)
        there = (torch.arange(frames.shape[1], device=frames.device) < counts[:, None])[..., None]
        size = counts[:, None, None]
        centred = (frames - frames.sum(1, keepdim=True) / size).masked_fill(~there, 0.0)
        variance = centred.square().sum(1, keepdim=True) / (size - 1)
        frames = centred / (variance + SMALLEST_VARIANCE).sqrt()
        frames = torch.nn.functional.pad(frames, (0, 0, 0, frames.shape[1] % STACK))
        pairs = frames.reshape(len(frames), -1, STACK * frames.shape[2])
        places = torch.arange(pairs.shape[1], device=frames.device)
        return pairs, places < counts[:, None] // STACK, (counts + STACK - 1) // STACK

    def hidden(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (B, T, H) of the layer, of what :meth:`inputs` gives."""
        return self.model(input_features=inputs, attention_mask=mask).last_hidden_state

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        statistics: str | Path | tuple[Tensor, Tensor] | None = None,
        layer: int = LAYER,
    ) -> W2vBert:
        """A folder of transformers, as that of ``facebook/w2v-bert-2.0``.

        Args:
            statistics: mean and variance, or a file with ``mean`` and ``var``; None: the published ones,
                which come with the package.

        Raises:
            CheckpointError: a file is missing or damaged, or holds something else. ConfigError: a
                configuration that can't be.
        """
        folder = Path(folder)
        config = read_config(folder)
        weights = folder / "model.safetensors"
        tensors = read_weights(weights)
        if not isinstance(statistics, tuple):
            statistics = read_statistics(statistics or STATISTICS)
        with SkipInit():
            network = cls(config, layer, statistics)
        load_strict(network.model, tensors, unread(config, layer), weights)
        return network.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a w2v-BERT.

    Raises:
        ConfigError: it is missing, no JSON, or of another model.
    """
    where = folder / "config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: can't be read ({' '.join(str(error).split())}); get it again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "wav2vec2-bert":
        raise ConfigError(f"{where}: model_type '{kind}'; expected wav2vec2-bert")
    return config


def unread(config: Mapping[str, Any], layer: int) -> dict[str, None]:
    """Names of tensors that the first ``layer`` layers don't have, for ``load_strict``."""
    later = "|".join(str(number) for number in range(layer, config.get("num_hidden_layers", 24)))
    names = ["masked_spec_embed", r"adapter\.", r"intermediate_ffn\."]
    return dict.fromkeys([*names, *([rf"encoder\.layers\.({later})\."] if later else [])])


def read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Mean (H,) and variance (H,) of a file such as ``wav2vec2bert_stats.pt``.

    Raises:
        CheckpointError: it is missing or damaged, or holds something else.
    """
    tensors = read_weights(path)
    if set(tensors) != {"mean", "var"}:
        raise CheckpointError(f"{path}: holds {', '.join(sorted(tensors)[:5])}; expected mean and var alone")
    return tensors["mean"], tensors["var"]
