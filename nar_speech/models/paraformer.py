"""Paraformer: one-pass (non-autoregressive) recognition with CIF token vectors (arXiv 2206.08317).

The encoder turns features into frames, a CIF predictor into one vector per token, and a parallel decoder
reads all tokens at once. BiCif adds time stamps; the variants with hotwords (Contextual, SeACo) are in the
sibling file; :func:`build_paraformer` picks the class a configuration names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nar_speech.config import MAX_VOCABULARY, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError
from nar_speech.layers.cif import PREDICTORS, CifOutput, CifPredictorV3, CifTimes, PredictorConfig
from nar_speech.layers.encoder import build_encoder
from nar_speech.layers.packed import keep_plain
from nar_speech.layers.sanm import SANMDecoder, SANMDecoderConfig, make_padding
from nar_speech.layers.sanm_stream import StreamConfig
from nar_speech.losses.cif import (
    append_eos,
    glancing_mask,
    quantity_loss,
    random_orders,
    token_accuracy,
)
from nar_speech.losses.ctc import ctc_loss
from nar_speech.losses.label_smoothing import label_smoothed_ce

if TYPE_CHECKING:
    from nar_speech.models.funasr import ModelParts
    from nar_speech.models.paraformer_stream import ParaformerState, StreamOutput

BLANK, SOS, EOS, IGNORE = 0, 1, 2, -1

Hotwords = Sequence[Sequence[int]]  # token ids of each word or phrase to favour


@dataclass(frozen=True)
class HotwordConfig:
    """Numbers of the hotword branch of the variants "contextual" and "seaco".

    inner_dim: width of the hotword LSTM, that of the encoder output. scale: factor of the hotword part
    (Contextual). The rest is SeACo's: bidirectional: its LSTM; decoder: the hotword decoder, which has
    ``att_layer_num`` blocks; no_bias: the id that means "not a hotword" in its output; filter_size: with more
    entries than this only as many are kept, those it attends to most, 0: never; weight: share of the
    hotword scores where it names a hotword; lsm_weight, length_normalized_loss: of its loss.
    """

    inner_dim: int = 512
    scale: float = 1.0
    bidirectional: bool = False
    decoder: SANMDecoderConfig = field(
        default_factory=lambda: SANMDecoderConfig(
            linear_units=1024, num_blocks=4, att_layer_num=6, kernel_size=21, embed=False, output_layer=False
        )
    )
    no_bias: int = 8377
    filter_size: int = 50
    weight: float = 1.0
    lsm_weight: float = 0.1
    length_normalized_loss: bool = True

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_WIDTH, "inner_dim")
        check_range(self, 0, MAX_VOCABULARY, "no_bias", "filter_size")
        check_range(self, 0, 1, "weight", "lsm_weight")
        check_range(self, 0, 1000, "scale")


@dataclass(frozen=True)
class ParaformerConfig:
    """Network part of ``model.yaml``; the defaults are those of Paraformer-large (Chinese, 8404 tokens).

    encoder: "sanm", "conformer" or "whisper" (:mod:`nar_speech.layers.encoder`); encoder_conf: its numbers.
    ctc_weight: share of a CTC loss on the encoder; the model has a CTC head where it is above 0.
    sampling_ratio: lambda of the glancing sampler. predictor_weight: factor of the quantity loss.
    predictor_bias: 1 where the token count includes the end-of-sentence token, else 0.
    lsm_weight, length_normalized_loss: label smoothing, and division by tokens instead of utterances.
    share_embedding: the sampler embeds labels with the output layer's rows; there is no own embedding.
    stream: how an online model streams and is trained to; None: the model hears whole utterances.
    """

    input_size: int = 560
    vocab_size: int = 8404
    variant: Literal["paraformer", "bicif", "contextual", "seaco"] = "paraformer"
    encoder: str = "sanm"
    encoder_conf: dict[str, Any] = field(default_factory=dict)
    predictor: Literal["v1", "v2", "v3"] = "v2"
    predictor_conf: PredictorConfig = field(default_factory=PredictorConfig)
    decoder_conf: SANMDecoderConfig = field(default_factory=SANMDecoderConfig)
    hotword_conf: HotwordConfig = field(default_factory=HotwordConfig)
    ctc_weight: float = 0.0
    lsm_weight: float = 0.1
    length_normalized_loss: bool = True
    predictor_weight: float = 1.0
    predictor_bias: int = 1
    sampling_ratio: float = 0.75
    share_embedding: bool = False
    stream: StreamConfig | None = None

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_WIDTH, "input_size")
        check_range(self, 1, MAX_VOCABULARY, "vocab_size")
        check_range(self, 0, 1, "lsm_weight")
        check_range(self, 0, 1000, "predictor_weight")
        if self.predictor_bias not in (0, 1):
            raise ConfigError(f"predictor_bias: must be 0 or 1, got {self.predictor_bias}")
        if not 0 <= self.ctc_weight < 1:
            raise ConfigError(f"ctc_weight: must be at least 0 and below 1, got {self.ctc_weight}")
        if self.sampling_ratio < 0:
            raise ConfigError(f"sampling_ratio: must not be negative, got {self.sampling_ratio}")
        if not self.share_embedding and not self.decoder_conf.embed:
            raise ConfigError("decoder_conf.embed: must be true unless share_embedding is true")
        if self.stream and (self.encoder != "sanm" or self.variant != "paraformer" or self.predictor == "v3"):
            raise ConfigError("stream: needs encoder 'sanm', variant 'paraformer' and predictor 'v1' or 'v2'")


@dataclass(frozen=True)
class ParaformerOutput:
    """Result of one pass over a batch.

    log_probs: (B, U, V) float32. token_lengths: (B,) int64 valid tokens, the end-of-sentence token included
    where the model predicts it. alphas, peaks: CIF weights and fire track (B, T + 1), one entry per encoder
    frame and one for the tail. encoder_out: (B, T, D) and encoder_lengths (B,). us_alphas, us_peaks: weights
    and track (B, R * T) of a time stamp head at R times the frame rate, None without such a head.
    """

    log_probs: Tensor
    token_lengths: Tensor
    alphas: Tensor
    peaks: Tensor
    encoder_out: Tensor
    encoder_lengths: Tensor
    us_alphas: Tensor | None = None
    us_peaks: Tensor | None = None


class CtcHead(nn.Module):
    """Projection of the encoder output to the vocabulary, for a joint CTC loss (names as in FunASR)."""

    def __init__(self, size: int, vocab_size: int):
        super().__init__()
        self.ctc_lo = nn.Linear(size, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> logits (B, T, V)."""
        return self.ctc_lo(x)


class Paraformer(nn.Module):
    """Encoder, CIF predictor, parallel decoder and, where ``ctc_weight`` is above 0, a CTC head."""

    variant: ClassVar[str] = "paraformer"

    def __init__(self, config: ParaformerConfig):
        """Raises ConfigError where ``config`` names another variant (use :func:`build_paraformer`)."""
        super().__init__()
        if config.variant != self.variant:
            raise ConfigError(
                f"variant: {type(self).__name__} needs '{self.variant}', the config has '{config.variant}'"
            )
        self.config = config
        self.stream = config.stream  # may be replaced before init_state: chunks and look-back are free
        self.encoder = build_encoder(config.encoder, config.input_size, config.encoder_conf)
        size = self.encoder.output_size
        self.predictor = PREDICTORS[config.predictor](size, config.predictor_conf)
        self.decoder = self._build_decoder(size)
        if config.share_embedding:
            if hasattr(self.decoder, "embed"):
                del self.decoder.embed
            keep_plain(self.decoder.output_layer)
        if config.ctc_weight > 0:
            self.ctc = CtcHead(size, config.vocab_size)

    def _build_decoder(self, size: int) -> SANMDecoder:
        return SANMDecoder(size, self.config.vocab_size, self.config.decoder_conf)

    @classmethod
    def build(cls, config: ParaformerConfig) -> Paraformer:
        """Build the class that ``config.variant`` names."""
        return build_paraformer(config)

    @classmethod
    def from_official(cls, folder: str | Path) -> ModelParts:
        """Read an official FunASR folder (Paraformer, BiCif, Contextual or SeACo).

        Returns:
            (network in eval mode on the CPU, frontend, tokenizer, card).

        Raises:
            ConfigError: a class or option that has no counterpart here, or a missing file.
            CheckpointError: weights that are missing or don't fit; names are listed.
        """
        from nar_speech.models.paraformer_official import load_official

        return load_official(folder)

    @property
    def frame_stride(self):
        """Input frames per encoder frame (int or Fraction)."""
        return self.encoder.frame_stride

    def encode(self, feats: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F) features and (B,) lengths -> (B, T', D) frames and (B,) lengths.

        Rows past an item's length hold numbers without meaning.
        """
        return self.encoder(feats, lengths)

    def predict(
        self,
        encoder_out: Tensor,
        lengths: Tensor,
        target_lengths: Tensor | None = None,
        official_padding: bool = False,
    ) -> CifOutput:
        """One vector per token.

        Args:
            encoder_out: (B, T, D).
            lengths: (B,) int64.
            target_lengths: (B,) int64 in training, the end-of-sentence token included.
            official_padding: let the predictor see the encoder's rows past the lengths, as the official code
                does. Then the last weights of an item depend on the batch it is in.
        """
        if not official_padding:
            encoder_out = clear_padding(encoder_out, lengths)
        return self.predictor(encoder_out, lengths, target_lengths, official_padding)

    def context(self, hotwords: Hotwords | None) -> Tensor | None:
        """What :meth:`decode` needs to know of the hotwords; None in a model without a hotword branch.

        Raises:
            ConfigError: hotwords were given to such a model.
        """
        if hotwords:
            raise ConfigError(f"hotwords: a model of variant '{self.variant}' takes none")
        return None

    def decode(
        self,
        encoder_out: Tensor,
        encoder_lengths: Tensor,
        embeds: Tensor,
        token_lengths: Tensor,
        context: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, U, V) of the tokens whose vectors are ``embeds`` (B, U, D); ``context``: see there."""
        if embeds.shape[1] == 0:
            return embeds.new_zeros(len(embeds), 0, self.config.vocab_size)
        return self.decoder(embeds, token_lengths, encoder_out, encoder_lengths)

    def ctc_logits(self, encoder_out: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V) logits of the joint CTC head.

        Raises:
            ConfigError: the model was configured with ``ctc_weight: 0`` and has no such head.
        """
        if self.config.ctc_weight <= 0:
            raise ConfigError("ctc_weight: this Paraformer has no CTC head; it needs a value above 0")
        return self.ctc(encoder_out)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, U, D) of token ids (B, U); negative ids (padding) read row 0."""
        if self.config.share_embedding:
            return self.decoder.output_layer.weight[tokens.clamp_min(0)]
        return self.decoder.embed(tokens.clamp_min(0))

    def forward(
        self,
        feats: Tensor,
        lengths: Tensor,
        hotwords: Hotwords | None = None,
        official_padding: bool = False,
    ) -> ParaformerOutput:
        """Recognise a batch.

        Args:
            feats: (B, T, F) float; not changed.
            lengths: (B,) int64 valid frames.
            hotwords: token ids of words to favour; only the hotword variants accept any.
            official_padding: see :meth:`predict`.

        Raises:
            ConfigError: see :meth:`context`.
        """
        encoder_out, encoder_lengths = self.encode(feats, lengths)
        cif = self.predict(encoder_out, encoder_lengths, official_padding=official_padding)
        log_probs = self.recognise(encoder_out, encoder_lengths, cif, hotwords, official_padding)
        times = self.times(encoder_out, encoder_lengths, cif.token_lengths, official_padding)
        return ParaformerOutput(
            log_probs,
            cif.token_lengths,
            cif.alphas,
            cif.peaks,
            encoder_out,
            encoder_lengths,
            None if times is None else times.alphas,
            None if times is None else times.peaks,
        )

    def recognise(
        self,
        encoder_out: Tensor,
        encoder_lengths: Tensor,
        cif: CifOutput,
        hotwords: Hotwords | None = None,
        official_padding: bool = False,
    ) -> Tensor:
        """Log probabilities (B, U, V) float32 of the predicted tokens."""
        context = self.context(hotwords)
        logits = self.decode(encoder_out, encoder_lengths, cif.embeds, cif.token_lengths, context)
        return logits.float().log_softmax(dim=-1)

    def times(
        self, encoder_out: Tensor, lengths: Tensor, token_num: Tensor, official_padding: bool = False
    ) -> CifTimes | None:
        """Weights and fire tracks of the predictor's time stamp head; None where it has none (V1, V2).

        Args:
            encoder_out: (B, T, D); lengths: (B,) int64.
            token_num: (B,) tokens that were predicted.
        """
        if not isinstance(self.predictor, CifPredictorV3):
            return None
        if not official_padding:
            encoder_out = clear_padding(encoder_out, lengths)
        return self.predictor.times(encoder_out, lengths, token_num, official_padding)

    def init_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        grow: bool = False,
    ) -> ParaformerState:
        """State of ``batch`` streams that have not begun; device and dtype default to those of the weights.

        Args:
            grow: allow a state that grows with every step, which a look-back of -1 needs.

        Raises:
            ConfigError: a model without ``stream``, or a state that would have to grow.
        """
        from nar_speech.models.paraformer_stream import init_state

        return init_state(self, batch, device, dtype, grow)

    def step(
        self, feats: Tensor, lengths: Tensor, state: ParaformerState, final: Tensor, in_place: bool = False
    ) -> tuple[StreamOutput, ParaformerState]:
        """Recognise the next chunk of every stream; without gradient, for a model in eval mode.

        Args:
            feats: (B, C, F) the next C frames, C the middle of ``stream.chunk``.
            lengths: (B,) int64 valid frames: C unless ``final``; 0 there gives out what is still open.
            final: (B,) bool, where the stream ends; its next state is that of a new stream.
            in_place: ``state`` may be overwritten, which saves the time to allocate the next one.
        """
        from nar_speech.models.paraformer_stream import step

        return step(self, feats, lengths, state, final, in_place)


def clear_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, D) with rows past ``lengths`` zero; the tensor itself where nothing is padded."""
    padding = make_padding(lengths, x.shape[1], x.dtype)
    return x if padding is None else x.masked_fill(padding.keys[:, 0, 0, :, None].logical_not(), 0.0)


class BiCifParaformer(Paraformer):
    """Paraformer whose predictor has a second head for time stamps (predictor "v3")."""

    variant = "bicif"

    def __init__(self, config: ParaformerConfig):
        """Raises ConfigError where the predictor is another one."""
        if config.predictor != "v3":
            raise ConfigError(f"predictor: variant '{config.variant}' needs 'v3', got '{config.predictor}'")
        super().__init__(config)


def build_paraformer(config: ParaformerConfig) -> Paraformer:
    """The network that ``config.variant`` names, with fresh weights."""
    from nar_speech.models.paraformer_hotword import ContextualParaformer, SeacoParaformer

    classes: tuple[type[Paraformer], ...] = (
        Paraformer,
        BiCifParaformer,
        ContextualParaformer,
        SeacoParaformer,
    )
    return {c.variant: c for c in classes}[config.variant](config)


@dataclass(frozen=True)
class TrainingPass:
    """Everything the training loss is made of (L: targets with the end-of-sentence token).

    encoder_out (B, T, D), encoder_lengths (B,); cif: predictor output, scaled to the targets; targets (B, L),
    -1 at padding, and target_lengths (B,); first_logits (B, L, V) of pass 1, no gradient, None without
    sampling; keep (B, L) bool, where the decoder input is the acoustic vector; embeds (B, L, D) decoder input
    of pass 2; logits (B, L, V) of pass 2.
    """

    encoder_out: Tensor
    encoder_lengths: Tensor
    cif: CifOutput
    targets: Tensor
    target_lengths: Tensor
    first_logits: Tensor | None
    keep: Tensor
    embeds: Tensor
    logits: Tensor


def training_pass(
    model: Paraformer,
    feats: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    token_lengths: Tensor,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
    hotwords: Hotwords | None = None,
    official_padding: bool = False,
    window: int | None = None,
) -> TrainingPass:
    """The two passes of training with the glancing sampler (section 3.3).

    Args:
        feats: (B, T, F); lengths: (B,) int64.
        tokens: (B, U) label ids without end-of-sentence; token_lengths: (B,) int64.
        generator: source of the sampler's randomness; default: torch's global one.
        draws: (B, L) int64 permutations instead (see :func:`nar_speech.losses.cif.glancing_mask`).
        hotwords: of the whole batch (Contextual).
        official_padding: see :meth:`Paraformer.predict`.
        window: of a model with ``stream``: which of its windows; default: one drawn with ``generator`` in
            training mode, else the first.
    """
    if model.stream is not None and model.stream.windows:
        from nar_speech.models.paraformer_stream import windowed_pass

        return windowed_pass(
            model, feats, lengths, tokens, token_lengths, generator, draws, official_padding, window
        )
    return decoder_passes(
        model,
        *model.encode(feats, lengths),
        tokens,
        token_lengths,
        generator,
        draws,
        hotwords,
        official_padding,
    )


def decoder_passes(
    model: Paraformer,
    encoder_out: Tensor,
    encoder_lengths: Tensor,
    tokens: Tensor,
    token_lengths: Tensor,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
    hotwords: Hotwords | None = None,
    official_padding: bool = False,
) -> TrainingPass:
    """:func:`training_pass` from the encoder's output (B, T, D) and lengths (B,) on."""
    targets, target_lengths = training_targets(model, tokens, token_lengths)
    cif = model.predict(encoder_out, encoder_lengths, target_lengths, official_padding)
    context = model.context(hotwords)

    def decode(embeds: Tensor) -> Tensor:
        return model.decode(encoder_out, encoder_lengths, embeds, target_lengths, context)

    passes = glance(model, cif.embeds, targets, target_lengths, decode, generator, draws)
    return TrainingPass(encoder_out, encoder_lengths, cif, targets, target_lengths, *passes)


def training_targets(model: Paraformer, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Targets (B, L), -1 at padding, with the end-of-sentence token if the model has it, and lengths (B,)."""
    if model.config.predictor_bias == 1:
        return append_eos(tokens, lengths, EOS, IGNORE)
    targets = tokens[:, : int(lengths.max())]
    places = torch.arange(targets.shape[1], device=targets.device)
    return targets.masked_fill(places >= lengths[:, None], IGNORE), lengths


def glance(
    model: Paraformer,
    acoustic: Tensor,
    targets: Tensor,
    lengths: Tensor,
    decode: Callable[[Tensor], Tensor],
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Decode ``acoustic`` (B, L, D), put labels where the sampler says, decode again.

    Args:
        targets: (B, L), -1 at padding; lengths: (B,).
        decode: token vectors (B, L, D) to logits (B, L, V).

    Returns:
        ``first_logits``, ``keep``, ``embeds`` and ``logits`` of :class:`TrainingPass`.
    """
    keep = valid = targets != IGNORE
    embeds, first_logits = acoustic, None
    if model.config.sampling_ratio > 0:
        with torch.no_grad():
            first_logits = decode(acoustic)
        if draws is None:
            draws = random_orders(lengths, targets.shape[1], generator)
        keep, _ = glancing_mask(first_logits.argmax(-1), targets, model.config.sampling_ratio, draws, IGNORE)
        labels = model.embed_tokens(targets).to(acoustic.dtype)
        embeds = torch.where(keep[:, :, None], acoustic, labels) * valid[:, :, None]
    return first_logits, keep, embeds, decode(embeds)


def paraformer_loss(
    model: Paraformer,
    feats: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    token_lengths: Tensor,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
    hotwords: Hotwords | None = None,
    official_padding: bool = False,
    window: int | None = None,
) -> dict[str, Tensor]:
    """The training loss of a Paraformer or BiCif model; arguments as :func:`training_pass`.

    loss = (1 - w) * loss_att + w * loss_ctc + predictor_weight * (loss_pre + 0.5 * loss_pre2), w: ctc_weight;
    the CTC and the second quantity term exist only in models that have these heads.

    Returns:
        float32 scalars: loss (with gradient), loss_att, loss_pre, [loss_ctc], [loss_pre2], acc (token
        accuracy of pass 1), and weight: what the loss was divided by (target tokens, or utterances).
    """
    run = training_pass(
        model, feats, lengths, tokens, token_lengths, generator, draws, hotwords, official_padding, window
    )
    return loss_terms(model, run, tokens, token_lengths)


def loss_terms(
    model: Paraformer, run: TrainingPass, tokens: Tensor, token_lengths: Tensor
) -> dict[str, Tensor]:
    """The terms of :func:`paraformer_loss` from a finished :func:`training_pass`."""
    config, normalized = model.config, model.config.length_normalized_loss
    loss_att = label_smoothed_ce(run.logits, run.targets, config.lsm_weight, normalized, IGNORE)
    loss_pre = quantity_loss(run.cif.token_num, run.target_lengths, normalized)
    loss = (1 - config.ctc_weight) * loss_att + config.predictor_weight * loss_pre
    terms = {"loss_att": loss_att.detach(), "loss_pre": loss_pre.detach()}
    if config.ctc_weight > 0:
        log_probs = model.ctc_logits(run.encoder_out).float().log_softmax(dim=-1)
        loss_ctc = ctc_loss(log_probs, run.encoder_lengths, tokens, token_lengths, BLANK)
        loss = loss + config.ctc_weight * loss_ctc
        terms["loss_ctc"] = loss_ctc.detach()
    if run.cif.token_num2 is not None:
        loss_pre2 = quantity_loss(run.cif.token_num2, run.target_lengths, normalized)
        loss = loss + 0.5 * config.predictor_weight * loss_pre2
        terms["loss_pre2"] = loss_pre2.detach()
    shown = run.logits if run.first_logits is None else run.first_logits
    terms["acc"] = token_accuracy(shown.argmax(-1), run.targets, IGNORE)
    weight = run.target_lengths.sum() if normalized else torch.tensor(len(tokens), device=loss.device)
    return {"loss": loss, **terms, "weight": weight.float()}
