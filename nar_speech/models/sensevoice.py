"""SenseVoiceSmall (FunASR): SAN-M encoder with prompts in front of the features and a CTC head.

Four prompt rows come first: language, event, emotion, text normalisation; the first four output frames
answer with tags of the same kinds. An et al. 2024, "FunAudioLLM", arXiv 2407.04051, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nar_speech import config as typed
from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.config import MAX_VOCABULARY, MAX_WIDTH, check_range
from nar_speech.errors import InputError
from nar_speech.layers.sanm import SANMEncoder, SANMEncoderConfig
from nar_speech.losses.ctc import ctc_loss
from nar_speech.losses.label_smoothing import label_smoothed_ce
from nar_speech.models.ctc import CtcHead, CtcOutput
from nar_speech.models.funasr import (
    ModelParts,
    build_card,
    build_frontend,
    build_tokenizer,
    read_folder,
    require,
)
from nar_speech.models.paraformer_official import encoder_conf

LANGUAGES = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}
TEXT_NORMS = {"withitn": 14, "woitn": 15}
EVENT, EMOTION = 1, 2
PROMPT_FRAMES = 4
NUM_PROMPTS = 16


def _official_language_tokens() -> dict[int, int]:
    return {24884: 3, 24885: 4, 24888: 7, 24892: 11, 24896: 12, 24992: 13}


def _official_textnorm_tokens() -> dict[int, int]:
    return {25016: 14, 25017: 15}


@dataclass(frozen=True)
class SenseVoiceConfig:
    """Network part of a SenseVoice ``model.yaml``.

    Attributes:
        input_size: features per (stacked) frame.
        vocab_size: V, blank included.
        encoder_conf: of :class:`SANMEncoderConfig`; SenseVoice has ``tp_blocks`` and ``norm_eps`` 1e-5.
        blank: id of the blank.
        lsm_weight, length_normalized_loss: of the cross entropy on the four tags.
        auto_language: probability that training hides the language (prompt ``auto``).
        language_tokens, textnorm_tokens: token id of a tag -> prompt id, for training.
    """

    input_size: int = 560
    vocab_size: int = 25055
    encoder_conf: dict[str, Any] = field(default_factory=lambda: {"tp_blocks": 20, "norm_eps": 1e-5})
    blank: int = 0
    lsm_weight: float = 0.1
    length_normalized_loss: bool = True
    auto_language: float = 0.2
    language_tokens: dict[int, int] = field(default_factory=_official_language_tokens)
    textnorm_tokens: dict[int, int] = field(default_factory=_official_textnorm_tokens)

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_WIDTH, "input_size")
        check_range(self, 1, MAX_VOCABULARY, "vocab_size")
        check_range(self, 0, self.vocab_size - 1, "blank")
        check_range(self, 0, 1, "lsm_weight", "auto_language")


class SenseVoice(nn.Module):
    """SenseVoiceSmall; parameter names are FunASR's."""

    def __init__(self, config: SenseVoiceConfig | None = None):
        super().__init__()
        config = config or SenseVoiceConfig()
        self.config = config
        encoder_conf = typed.from_dict(SANMEncoderConfig, config.encoder_conf, "encoder_conf")
        self.encoder = SANMEncoder(config.input_size, encoder_conf)
        self.ctc = CtcHead(encoder_conf.output_size, config.vocab_size)
        self.embed = nn.Embedding(NUM_PROMPTS, config.input_size)

    @staticmethod
    def from_official(folder: str | Path) -> ModelParts:
        """Read a FunASR folder (``model.pt``, ``config.yaml``, ``am.mvn``, ``*.bpe.model``).

        Returns:
            (network in eval mode, frontend, tokenizer, card).

        Raises:
            ConfigError, CheckpointError: a missing file, an unsupported option, weights that do not fit.
        """
        found = read_folder(folder)
        where = str(found.path / "config.yaml")
        frontend, tokenizer = build_frontend(found), build_tokenizer(found)
        config = convert_config(found.config, frontend.feature_size, tokenizer.vocab_size, where)
        with SkipInit():
            network = SenseVoice(config)
        load_strict(network, read_weights(found.weights), where=found.weights)
        card = build_card(found, "sensevoice", frontend.config.sample_rate)
        card = replace(card, languages=("zh", "en", "yue", "ja", "ko"))
        return ModelParts(network.eval(), frontend, tokenizer, card)

    def encode(
        self,
        feats: Tensor,
        lengths: Tensor,
        language: str | Sequence[str] | Tensor = "auto",
        textnorm: str | Sequence[str] | Tensor = "woitn",
    ) -> tuple[Tensor, Tensor]:
        """Encoder output with the four prompt frames in front.

        Args:
            feats: (B, T, F) features.
            lengths: (B,) int64 valid frames.
            language: ``auto``, ``zh``, ``en``, ``yue``, ``ja``, ``ko`` or ``nospeech``, one for all or one an
                utterance; or prompt ids (B,) int64.
            textnorm: ``withitn`` (numbers, punctuation as written) or ``woitn``; or prompt ids.

        Returns:
            ((B, T + 4, D), lengths + 4).

        Raises:
            InputError: an unknown language or text normalisation.
        """
        batch = feats.shape[0]
        prompts = torch.empty(batch, PROMPT_FRAMES, dtype=torch.int64, device=feats.device)
        prompts[:, 0] = prompt_ids("language", LANGUAGES, language, batch).to(feats.device)
        prompts[:, 1], prompts[:, 2] = EVENT, EMOTION
        prompts[:, 3] = prompt_ids("textnorm", TEXT_NORMS, textnorm, batch).to(feats.device)
        x = torch.cat([self.embed(prompts).to(feats.dtype), feats], 1)
        return self.encoder(x, lengths + PROMPT_FRAMES)

    def forward(
        self,
        feats: Tensor,
        lengths: Tensor,
        language: str | Sequence[str] | Tensor = "auto",
        textnorm: str | Sequence[str] | Tensor = "woitn",
    ) -> CtcOutput:
        """Log probabilities (B, T + 4, V); arguments as :meth:`encode`. Frames 0 to 3 hold the tags."""
        encoded, lengths = self.encode(feats, lengths, language, textnorm)
        return CtcOutput(self.ctc(encoded), lengths, encoded)


def convert_config(
    tree: Mapping[str, Any], input_size: int, vocab_size: int, where: str = "config.yaml"
) -> SenseVoiceConfig:
    """Our configuration of the network an official ``config.yaml`` describes.

    Args:
        tree: the official keys ``model``, ``model_conf``, ``encoder_conf`` and so on.
        input_size: features per frame; vocab_size: number of tokens (the official yaml states neither).
        where: named in errors.

    Raises:
        ConfigError: a class, option or key that has no counterpart here.
    """
    require(tree, {"model": ("SenseVoiceSmall",), "encoder": ("SenseVoiceEncoderSmall",)}, where)
    section = {"normalize_before": True, **(tree.get("encoder_conf") or {})}
    blocks = section.pop("tp_blocks", 0)
    model = tree.get("model_conf") or {}
    return SenseVoiceConfig(
        input_size=input_size,
        vocab_size=vocab_size,
        encoder_conf={
            **encoder_conf(section, f"{where}: encoder_conf"),
            "tp_blocks": blocks,
            "norm_eps": 1e-5,
        },
        blank=model.get("blank_id", 0),
        lsm_weight=float(model.get("lsm_weight", 0.0)),
        length_normalized_loss=model.get("length_normalized_loss", False),
    )


def prompt_ids(name: str, table: dict[str, int], value: str | Sequence[str] | Tensor, batch: int) -> Tensor:
    """(B,) int64 prompt ids of one name for all utterances, of one name each, or of ids."""
    if isinstance(value, Tensor):
        return value.expand(batch)
    names = [value] * batch if isinstance(value, str) else list(value)
    if len(names) != batch:
        raise InputError(f"{name}: got {len(names)} names for {batch} utterances; give one or one each")
    unknown = next((item for item in names if item not in table), None)
    if unknown is not None:
        raise InputError(f"{name}: unknown value {unknown!r}; valid values: {', '.join(table)}")
    return torch.tensor([table[item] for item in names], dtype=torch.int64)


def _prompts_of(tokens: Tensor, table: dict[int, int], default: int) -> Tensor:
    """Prompt ids of tag tokens (B,), ``default`` for a token that is not in the table."""
    prompts = torch.full_like(tokens, default)
    for token, prompt in table.items():
        prompts = prompts.masked_fill(tokens == token, prompt)
    return prompts


def sensevoice_loss(
    model: SenseVoice,
    feats: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    token_lengths: Tensor,
    draws: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Training loss: CTC on the speech frames plus cross entropy on the four tag frames.

    Args:
        feats: (B, T, F); lengths: (B,) int64.
        tokens: (B, U) ids, padded with -1; the first four are the tags (language, event, emotion, textnorm).
        token_lengths: (B,) int64, tags included.
        draws: (B,) uniform numbers in [0, 1); the language prompt is ``auto`` where they are not above
            ``auto_language``. Drawn from ``generator`` when None.

    Returns:
        ``loss`` (float32 scalar with gradient), detached ``loss_ctc``, ``loss_rich`` and ``acc_rich``.

    Raises:
        InputError: the fourth token of an utterance is not a text normalisation tag.
    """
    c = model.config
    if draws is None:
        device = tokens.device if generator is None else generator.device
        draws = torch.rand(len(tokens), generator=generator, device=device)
    shown = draws.to(tokens.device) > c.auto_language
    language = _prompts_of(tokens[:, 0], c.language_tokens, 0) * shown
    textnorm = _prompts_of(tokens[:, 3], c.textnorm_tokens, -1)
    if bool((textnorm < 0).any()):
        row = int((textnorm < 0).long().argmax())
        raise InputError(
            f"tokens: the fourth token of utterance {row} is {int(tokens[row, 3])}, not a text normalisation"
            f" tag ({', '.join(map(str, c.textnorm_tokens))}); start the text with the four tags"
        )
    encoded, encoded_lengths = model.encode(feats, lengths, language, textnorm)
    log_probs = model.ctc(encoded)
    n = PROMPT_FRAMES
    loss_ctc = ctc_loss(log_probs[:, n:], encoded_lengths - n, tokens[:, n:], token_lengths - n, c.blank)
    rich, tags = log_probs[:, :n], tokens[:, :n]
    loss_rich = label_smoothed_ce(rich, tags, c.lsm_weight, c.length_normalized_loss)
    return {
        "loss": loss_ctc + loss_rich,
        "loss_ctc": loss_ctc.detach(),
        "loss_rich": loss_rich.detach(),
        "acc_rich": (rich.argmax(-1) == tags).float().mean(),
    }
