"""Encoder with a CTC head: plain, with intermediate predictions, self-conditioned; WeNet's U2 and U2++.

CTC: Graves et al. 2006. Intermediate CTC: Lee and Watanabe 2021. Self-conditioned CTC: Nozaki and Komatsu
2021, equation 7. U2: Zhang et al. 2020; U2++: Wu et al. 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nar_speech import config as typed
from nar_speech.config import MAX_VOCABULARY, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError
from nar_speech.layers.chunks import Chunking
from nar_speech.layers.encoder import build_encoder
from nar_speech.layers.intermediate import Tap
from nar_speech.losses.ctc import ctc_loss, interctc_loss
from nar_speech.losses.label_smoothing import label_smoothed_ce
from nar_speech.models.ctc_decoder import (
    AttentionDecoderConfig,
    BiAttentionDecoder,
    build_decoder,
    decoder_inputs,
    reverse_tokens,
)
from nar_speech.models.funasr import ModelParts


@dataclass(frozen=True)
class CtcConfig:
    """Network part of a CTC model's ``model.yaml``.

    Attributes:
        input_size: features per frame.
        vocab_size: V, blank included.
        encoder, encoder_conf: kind and numbers of the encoder (:mod:`nar_speech.layers.encoder`).
        blank: id of the blank.
        dropout_rate: on the encoder output before the CTC head, in training.
        interctc_layers: layers (first is 1) with a CTC prediction of their own, made by the same head.
        interctc_weight: share of their mean loss in the CTC loss.
        self_conditioning: feed these predictions back into the next layer.
        decoder: attention decoder of a U2 (``transformer``) or U2++ (``bitransformer``) model.
        sos, eos: ids of the decoder; -1: the last id.
        ctc_weight: share of the CTC loss where there is a decoder.
        reverse_weight: share of the right-to-left decoder in the attention loss.
        lsm_weight, length_normalized_loss: of the attention loss.
        ctc_reduction: see :func:`nar_speech.losses.ctc.ctc_loss`.
    """

    input_size: int
    vocab_size: int
    encoder: str = "conformer"
    encoder_conf: dict[str, Any] = field(default_factory=dict)
    blank: int = 0
    dropout_rate: float = 0.0
    interctc_layers: tuple[int, ...] = ()
    interctc_weight: float = 0.3
    self_conditioning: bool = False
    decoder: Literal["none", "transformer", "bitransformer"] = "none"
    decoder_conf: dict[str, Any] = field(default_factory=dict)
    sos: int = -1
    eos: int = -1
    ctc_weight: float = 0.3
    reverse_weight: float = 0.0
    lsm_weight: float = 0.0
    length_normalized_loss: bool = False
    ctc_reduction: Literal["batch_mean", "token_mean", "mean_volume", "sum"] = "batch_mean"

    def __post_init__(self):
        check_range(self, 1, MAX_WIDTH, "input_size")
        check_range(self, 1, MAX_VOCABULARY, "vocab_size")
        check_range(self, -1, self.vocab_size - 1, "sos", "eos")
        check_range(
            self, 0, 1, "dropout_rate", "interctc_weight", "ctc_weight", "reverse_weight", "lsm_weight"
        )
        if not 0 <= self.blank < self.vocab_size:
            raise ConfigError(f"blank: {self.blank} is not an id below vocab_size {self.vocab_size}")
        if self.self_conditioning and not self.interctc_layers:
            raise ConfigError("self_conditioning: name the layers in interctc_layers, for example [3, 6, 9]")
        if self.decoder != "bitransformer" and self.reverse_weight > 0:
            raise ConfigError("reverse_weight: needs decoder 'bitransformer'")


@dataclass(frozen=True)
class CtcOutput:
    """What a CTC model computes.

    Attributes:
        log_probs: (B, T', V) float32.
        lengths: (B,) valid frames.
        encoder_out: (B, T', D).
        intermediate: (B, T', V) float32 log probabilities of each layer in ``interctc_layers``.
    """

    log_probs: Tensor
    lengths: Tensor
    encoder_out: Tensor
    intermediate: tuple[Tensor, ...] = ()


class CtcHead(nn.Module):
    """Linear layer to the vocabulary; log softmax in float32."""

    def __init__(self, width: int, vocab_size: int, dropout: float = 0.0):
        super().__init__()
        self.ctc_lo = nn.Linear(width, vocab_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, V) float32 log probabilities."""
        return self.ctc_lo(self.dropout(x)).float().log_softmax(-1)


class CtcModel(nn.Module):
    """Encoder, CTC head and, in U2 models, attention decoders."""

    def __init__(self, config: CtcConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.encoder, config.input_size, config.encoder_conf)
        width = self.encoder.output_size
        blocks = self.encoder.config.num_blocks
        outside = [layer for layer in config.interctc_layers if not 1 <= layer <= blocks]
        if outside:
            raise ConfigError(f"interctc_layers: layer {outside[0]} is not one of 1 to {blocks}")
        self.ctc = CtcHead(width, config.vocab_size, config.dropout_rate)
        if config.self_conditioning:
            self.conditioning_layer = nn.Linear(config.vocab_size, width)
        self.decoder = None
        if config.decoder != "none":
            conf = typed.from_dict(AttentionDecoderConfig, config.decoder_conf, "decoder_conf")
            if (config.decoder == "bitransformer") != (conf.r_num_blocks > 0):
                raise ConfigError(
                    "decoder_conf: r_num_blocks must be above 0 for 'bitransformer' and only there"
                )
            self.decoder = build_decoder(config.vocab_size, width, conf)
        self.sos = config.sos if config.sos >= 0 else config.vocab_size - 1
        self.eos = config.eos if config.eos >= 0 else config.vocab_size - 1

    @staticmethod
    def from_official(folder: str | Path) -> ModelParts:
        """Read a model of WeNet or of NeMo.

        WeNet: a folder with ``final.pt``, ``train.yaml``, ``units.txt``, a U2 or U2++ conformer. NeMo: a
        FastConformer with a CTC head, see :mod:`nar_speech.models.nemo_official`.

        Returns:
            (network in eval mode, frontend, tokenizer, card).

        Raises:
            ConfigError, CheckpointError: a missing file, an unsupported option, weights that do not fit.
        """
        from nar_speech.models.ctc_official import load_official
        from nar_speech.models.nemo_official import is_nemo, load_nemo

        return load_nemo(folder) if is_nemo(Path(folder)) else load_official(folder)

    def encode(self, feats: Tensor, lengths: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Encoder output (B, T', D) and lengths (B,); arguments as in :meth:`forward`."""
        if self.config.self_conditioning:  # the head takes part in the encoder then
            out = self.forward(feats, lengths, **options)
            return out.encoder_out, out.lengths
        return self.encoder(feats, lengths, **options)

    def forward(self, feats: Tensor, lengths: Tensor, **options: Any) -> CtcOutput:
        """Log probabilities of every frame.

        Args:
            feats: (B, T, F) features.
            lengths: (B,) int64 valid frames.
            options: of the encoder, for example ``chunk_size`` and ``left_chunks`` of a conformer.
        """
        tap, intermediate = self._tap()
        if tap is not None:
            options["tap"] = tap
        encoded, lengths = self.encoder(feats, lengths, **options)
        return CtcOutput(self.ctc(encoded), lengths, encoded, tuple(intermediate))

    def _tap(self) -> tuple[Tap | None, list[Tensor]]:
        """What the encoder calls on its way for intermediate predictions, and the list they will be in."""
        intermediate: list[Tensor] = []
        if not self.config.interctc_layers:
            return None, intermediate

        def observe(x: Tensor, normed: Tensor) -> Tensor:
            intermediate.append(self.ctc(normed))
            if self.config.self_conditioning:
                x = x + self.conditioning_layer(intermediate[-1].exp().to(x.dtype))
            return x

        return Tap(self.config.interctc_layers, observe), intermediate

    def chunking(self, chunk_size: int | None = None, left: int | None = None) -> Chunking:
        """How streams are fed: chunks of ``chunk_size`` output frames that see ``left`` frames before them.

        Raises:
            ConfigError: sizes the encoder does not take, or an encoder that takes no streams.
        """
        self._check_streaming()
        return self.encoder.chunking(chunk_size, left)

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunking: Chunking | None = None,
    ) -> Any:
        """The encoder's state of ``batch`` streams that have not begun, a dataclass of tensors (batch first).

        Raises:
            ConfigError: an encoder that takes no streams.
        """
        self._check_streaming()
        return self.encoder.init_state(batch, device, dtype, chunking)

    def step(
        self, feats: Tensor, lengths: Tensor, state: Any, final: bool | Tensor = False, **options: Any
    ) -> tuple[CtcOutput, Any]:
        """Log probabilities of the next chunk of every stream.

        Args:
            feats: (B, C, F) features; how many a step takes says :meth:`chunking`.
            lengths: (B,) int64 new frames.
            state: from :meth:`init_state` or the step before.
            final: whether the stream ends here, one flag or (B,) bool.
            options: of the encoder's ``step``.

        Returns:
            the output, (B, U, V) with U fixed by C, and the next state.
        """
        tap, intermediate = self._tap()
        if tap is not None:
            options["tap"] = tap
        encoded, lengths, state = self.encoder.step(feats, lengths, state, final, **options)
        return CtcOutput(self.ctc(encoded), lengths, encoded, tuple(intermediate)), state

    def _check_streaming(self) -> None:
        if not hasattr(self.encoder, "chunking"):
            raise ConfigError(
                f"encoder: '{self.config.encoder}' takes no streams; use a causal conformer or fastconformer"
            )

    def decode_tokens(
        self, encoder_out: Tensor, encoder_lengths: Tensor, tokens: Tensor, token_lengths: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attention decoder scores of given token sequences.

        Args:
            encoder_out: (B, T', D).
            encoder_lengths: (B,).
            tokens: (B, U) ids; entries beyond ``token_lengths`` (B,) are not read.

        Returns:
            (B, U + 1, V) logits, position u predicts token u and the last one ``eos``; the same for the
            reversed sequence, or None without a right-to-left decoder.

        Raises:
            ConfigError: the model has no decoder.
        """
        if self.decoder is None:
            raise ConfigError("decoder: this model has no attention decoder; rescoring needs one")
        inputs, _ = decoder_inputs(tokens, token_lengths, self.sos, self.eos)
        if not isinstance(self.decoder, BiAttentionDecoder):
            return self.decoder(encoder_out, encoder_lengths, inputs, token_lengths + 1), None
        left = self.decoder.left_decoder(encoder_out, encoder_lengths, inputs, token_lengths + 1)
        backward = reverse_tokens(tokens, token_lengths)
        inputs, _ = decoder_inputs(backward, token_lengths, self.sos, self.eos)
        return left, self.decoder.right_decoder(encoder_out, encoder_lengths, inputs, token_lengths + 1)


def attention_loss(
    model: CtcModel, encoder_out: Tensor, encoder_lengths: Tensor, tokens: Tensor, token_lengths: Tensor
) -> Tensor:
    """Label-smoothed cross entropy of the attention decoders, both directions mixed by ``reverse_weight``."""
    c = model.config
    left, right = model.decode_tokens(encoder_out, encoder_lengths, tokens, token_lengths)
    _, targets = decoder_inputs(tokens, token_lengths, model.sos, model.eos)
    loss = label_smoothed_ce(left, targets, c.lsm_weight, c.length_normalized_loss)
    if c.reverse_weight == 0.0:
        return loss
    _, targets = decoder_inputs(reverse_tokens(tokens, token_lengths), token_lengths, model.sos, model.eos)
    backward = label_smoothed_ce(right, targets, c.lsm_weight, c.length_normalized_loss)
    return (1.0 - c.reverse_weight) * loss + c.reverse_weight * backward


def ctc_model_loss(
    model: CtcModel, feats: Tensor, lengths: Tensor, tokens: Tensor, token_lengths: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Training loss of a batch: :func:`ctc_output_loss` of what the model makes of ``feats`` (B, T, F).

    ``lengths`` (B,) int64; ``options``: of the encoder.
    """
    return ctc_output_loss(model, model(feats, lengths, **options), tokens, token_lengths)


def ctc_output_loss(
    model: CtcModel, out: CtcOutput, tokens: Tensor, token_lengths: Tensor
) -> dict[str, Tensor]:
    """Training loss of a batch.

    Args:
        out: what ``model`` gives for it.
        tokens: (B, U) ids, padded with -1.
        token_lengths: (B,) int64.

    Returns:
        ``loss`` (float32 scalar with gradient) and its detached parts: ``loss_ctc`` of the last layer,
        ``loss_interctc`` (mean of the intermediate ones), ``loss_att``.
    """
    c = model.config

    def ctc(log_probs: Tensor) -> Tensor:
        return ctc_loss(log_probs, out.lengths, tokens, token_lengths, c.blank, c.ctc_reduction)

    last = ctc(out.log_probs)
    middle = [ctc(log_probs) for log_probs in out.intermediate]
    loss = interctc_loss(last, middle, c.interctc_weight)
    parts = {"loss_ctc": last.detach()}
    if middle:
        parts["loss_interctc"] = (sum(middle) / len(middle)).detach()
    if model.decoder is not None:
        attention = attention_loss(model, out.encoder_out, out.lengths, tokens, token_lengths)
        loss = c.ctc_weight * loss + (1.0 - c.ctc_weight) * attention
        parts["loss_att"] = attention.detach()
    return {"loss": loss, **parts}
