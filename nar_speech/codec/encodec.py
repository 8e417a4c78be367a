"""EnCodec (Défossez et al. 2022, "High Fidelity Neural Audio Compression") around transformers' network.

All variants: causal or not, constant or mirrored padding, mono or stereo, loudness normalised or not, in one
piece or, as the 48 kHz model, in chunks of a second that overlap and are coded alone (section 3.4).

A stream gives the numbers of the whole signal in the non-causal models too: their convolutions look ahead a
fixed number of samples, :attr:`EncodecCodec.delay`, and the LSTM looks back only. A model in chunks goes
chunk by chunk. One that normalises a recording as a whole (audiocraft's ``renormalize``) can't encode before
the end is heard; its decoder streams.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nar_speech.codec.rows import DecoderState, EncoderState, RowCodec
from nar_speech.codec.seanet import fold_weight_norm, seanet_ops
from nar_speech.codec.stream import Op
from nar_speech.errors import CheckpointError, ConfigError, InputError

CHUNKS_AT_ONCE = 8  # of the chunked model: more at once take memory and save no time
SCALE_FLOOR = 1e-8


@dataclass(frozen=True)
class HeldState(EncoderState):
    """Of an encoder that normalises: samples held (B, C, m), scales (B, chunks so far)."""

    held: Tensor
    scales: Tensor


@dataclass(frozen=True)
class ChunkDecoderState(DecoderState):
    """Of a decoder that undoes a normalisation.

    ``held`` (B, K, t) tokens of the chunk that is not complete (None before the first ones), ``scales``
    (B, chunks) of chunks to come, ``tail`` (B, C, m) samples to which the next chunk adds and ``weights``
    (m,) their weights so far.
    """

    held: Tensor | None
    scales: Tensor
    tail: Tensor
    weights: Tensor


class EncodecCodec(RowCodec):
    """EnCodec.

    Args:
        config: fields of transformers' ``EncodecConfig``, or one; as in ``config.json``.
        lstm: whether there is an LSTM at all (audiocraft can leave it out).
        name: for messages and token files.

    Raises:
        ConfigError: an impossible value.
    """

    def __init__(self, config: Any, lstm: bool = True, name: str = "encodec"):
        super().__init__()
        from transformers import EncodecConfig, EncodecModel

        try:
            c = config if isinstance(config, EncodecConfig) else EncodecConfig(**config)
            self.model = EncodecModel(c).eval()
        except ConfigError:
            raise
        except Exception as error:  # transformers' own checks raise many kinds
            raise ConfigError(f"{name}: impossible configuration ({' '.join(str(error).split())})") from error
        if not lstm:
            for half in (self.model.encoder, self.model.decoder):
                del half.layers[next(i for i, x in enumerate(half.layers) if hasattr(x, "lstm"))]
        self.config, self.name = c, name
        self.sample_rate, self.channels, self.hop = c.sampling_rate, c.audio_channels, c.hop_length
        self.num_codebooks, self.codebook_size = c.num_quantizers, c.codebook_size
        self.frame_rate = self.sample_rate / self.hop
        self.has_scales = c.normalize
        self.chunk = c.chunk_length
        if self.chunk is not None:
            self.stride = c.chunk_stride or self.chunk
            self.chunk_frames = -(-self.chunk // self.hop)
            self.can_stream, self.delay = True, self.chunk  # a chunk comes out when it is full
        elif c.norm_type == "time_group_norm":
            self.can_stream = False
        else:
            self.can_stream = True
            self.set_delay()

    def codebooks_for(self, bandwidth: float) -> int:
        """Codebooks that a bandwidth in kbit/s pays for, at least 1.

        Raises:
            ConfigError: not a bandwidth of this model.
        """
        if bandwidth <= 0 or not math.isfinite(bandwidth):
            raise ConfigError(f"bandwidth: got {bandwidth:g} kbit/s; must be above 0")
        count = int(bandwidth * 1000 / (math.log2(self.codebook_size) * self.config.frame_rate))
        if count > self.num_codebooks:
            most = self.num_codebooks * math.log2(self.codebook_size) * self.config.frame_rate / 1000
            raise ConfigError(f"bandwidth: got {bandwidth:g} kbit/s; {self.name} has up to {most:g}")
        return max(count, 1)

    def frames_of(self, samples: int) -> int:
        """See :meth:`Codec.frames_of`."""
        if self.chunk is None or samples <= 0:
            return max(super().frames_of(samples), 0)
        last = (samples - 1) // self.stride
        return last * self.chunk_frames + -(-min(samples - last * self.stride, self.chunk) // self.hop)

    # Whole rows

    def encode_rows(self, waves: Tensor, num_codebooks: int) -> tuple[Tensor, Tensor | None]:
        """See :class:`RowCodec`."""
        if self.chunk is None:
            return self._encode_piece(waves, num_codebooks)
        tokens, scales, _ = self._encode_chunks(waves, num_codebooks, True)
        return tokens, scales

    def decode_rows(self, tokens: Tensor, scales: Tensor | None) -> Tensor:
        """See :class:`RowCodec`."""
        if self.chunk is None:
            waves = self.decode_latents(self.latents(tokens))
            return waves if scales is None else waves * scales[:, :, None]
        state = self.init_decoder(tokens.shape[0])
        if scales is not None:
            state = self.give_scales(state, scales)
        return self._decode_chunks(tokens, state, True)[0]

    def quantize(self, latents: Tensor, num_codebooks: int) -> Tensor:
        """Tokens (B, K, T): nearest code vectors of what the levels before left over."""
        residual, tokens = latents, []
        for layer in self.model.quantizer.layers[:num_codebooks]:
            chosen = layer.encode(residual)
            tokens.append(chosen)
            if len(tokens) < num_codebooks:
                residual = residual - layer.decode(chosen)
        return torch.stack(tokens, 1)

    def latents(self, tokens: Tensor) -> Tensor:
        """See :meth:`Codec.latents`."""
        return self.model.quantizer.decode(self.check_tokens(tokens).transpose(0, 1))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See :meth:`Codec.decode_latents`; one piece, without overlap or scale."""
        return self.model.decoder(latents)

    def fold(self) -> EncodecCodec:
        """Compute the normalised weights once and for all, for inference."""
        fold_weight_norm(self.model)
        return self

    def _encode_piece(self, waves: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Tokens of one piece or chunk, and its scale (B, 1)."""
        scale = None
        if self.has_scales:
            scale = waves.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + SCALE_FLOOR
            waves, scale = waves / scale, scale[:, :, 0]
        return self.quantize(self.model.encoder(waves), count), scale

    # Streams

    def build_encoder_ops(self) -> Op:
        """See :class:`RowCodec`."""
        return seanet_ops(self.model.encoder.layers)

    def build_decoder_ops(self) -> Op:
        """See :class:`RowCodec`."""
        return seanet_ops(self.model.decoder.layers)

    @property
    def _by_ops(self) -> bool:
        """Whether the layers themselves are streamed."""
        return self.chunk is None and self.can_stream

    @property
    def pads_rows(self) -> bool:
        """See :class:`RowCodec`."""
        return self._by_ops and not self.has_scales

    def init_encoder(self, batch: int, num_codebooks: int | None = None) -> EncoderState:
        """See :meth:`Codec.init_encoder`."""
        if self._by_ops and not self.has_scales:
            return super().init_encoder(batch, num_codebooks)
        like = next(self.parameters())
        count = self.check_codebooks(num_codebooks)
        return HeldState(None, count, like.new_zeros(batch, self.channels, 0), like.new_zeros(batch, 0))

    @torch.no_grad()
    def encode_step(
        self, waves: Tensor, state: EncoderState, final: bool = False
    ) -> tuple[Tensor, EncoderState]:
        """See :meth:`Codec.encode_step`."""
        if not isinstance(state, HeldState):
            return super().encode_step(waves, state, final)
        waves = self.check_waves(waves)[0]
        self.check_rows(waves.shape[0], state)
        waves = torch.cat([state.held, waves], 2)
        if self.chunk is not None:
            tokens, scales, waves = self._encode_chunks(waves, state.codebooks, final)
        elif final and waves.shape[2]:
            tokens, scales = self._encode_piece(waves, state.codebooks)
            waves = waves[:, :, :0]
        else:
            tokens, scales = self._quantize_any(waves[:, :, :0], state.codebooks), None
        if scales is not None:
            scales = torch.cat([state.scales, scales], 1)
        return tokens, replace(state, held=waves, scales=state.scales if scales is None else scales)

    def init_decoder(self, batch: int) -> DecoderState:
        """See :meth:`Codec.init_decoder`."""
        if self._by_ops and not self.has_scales:
            return super().init_decoder(batch)
        like = next(self.parameters())
        layers = self.decoder_ops.init(batch, like) if self._by_ops else None
        tail = like.new_zeros(batch, self.channels, 0)
        return ChunkDecoderState(layers, None, like.new_zeros(batch, 0), tail, like.new_zeros(0))

    def give_scales(self, state: Any, scales: Tensor) -> Any:
        """See :meth:`Codec.give_scales`."""
        if not self.has_scales:
            return super().give_scales(state, scales)
        batch = len(state.scales)
        if not isinstance(scales, Tensor) or scales.dim() != 2 or len(scales) != batch:
            shape = tuple(scales.shape) if isinstance(scales, Tensor) else type(scales).__name__
            raise InputError(f"{self.name}: scales of shape {shape}; expected ({batch}, chunks)")
        if not bool(torch.isfinite(scales).all()):
            raise InputError(f"{self.name}: scales are NaN or infinite; encode the recording again")
        return replace(state, scales=torch.cat([state.scales, scales.to(state.scales)], 1))

    @torch.no_grad()
    def decode_step(
        self, tokens: Tensor, state: DecoderState, final: bool = False
    ) -> tuple[Tensor, DecoderState]:
        """See :meth:`Codec.decode_step`.

        Raises:
            InputError: the scale of a chunk whose tokens are there was not given (:meth:`give_scales`).
        """
        if not isinstance(state, ChunkDecoderState):
            return super().decode_step(tokens, state, final)
        tokens = self.check_tokens(tokens)
        self.check_rows(tokens.shape[0], state)
        if state.held is not None:
            if state.held.shape[1] != tokens.shape[1]:
                raise InputError(
                    f"{self.name}: {tokens.shape[1]} codebooks after {state.held.shape[1]} in one chunk"
                )
            tokens = torch.cat([state.held, tokens], 2)
        if self.chunk is not None:
            return self._decode_chunks(tokens, state, final)
        if self._by_ops:
            waves, layers = self.decoder_ops.step(self._latents_any(tokens), state.layers, final)
            return self._scaled(waves, state.scales, 0), replace(state, layers=layers)
        if not final or not tokens.shape[2]:
            return state.tail, replace(state, held=tokens)
        waves = self.decode_latents(self.latents(tokens))
        return self._scaled(waves, state.scales, 0), replace(state, held=tokens[:, :, :0])

    def _scaled(self, waves: Tensor, scales: Tensor, chunk: int) -> Tensor:
        """Waves (B, C, n) in their own loudness."""
        if not self.has_scales or not waves.shape[2]:
            return waves
        if chunk >= scales.shape[1]:
            raise InputError(f"{self.name}: the scales of the next chunk are missing; give them first")
        return waves * scales[:, chunk, None, None]

    # Chunks

    def _encode_chunks(self, waves: Tensor, count: int, final: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens and scales of the chunks that are complete, or of all, and the samples from the next one on.

        A chunk before the last that the recording's end cuts short is filled up with zeros to the fewest
        samples that make ``chunk_frames`` frames: every chunk but the last one then has as many.
        transformers has no rule here: it fails unless such a chunk has that many frames anyway.
        """
        length, stride = waves.shape[2], self.stride
        total = -(-length // stride) if final else max((length - self.chunk) // stride + 1, 0)
        full = min(total, max((length - self.chunk) // stride + 1, 0))
        tokens, scales = [], []
        for begin in range(0, full, CHUNKS_AT_ONCE):
            number = min(CHUNKS_AT_ONCE, full - begin)
            span = waves[:, :, begin * stride : (begin + number - 1) * stride + self.chunk]
            pieces = span.unfold(2, self.chunk, stride).transpose(1, 2).flatten(0, 1)
            part, scale = self._encode_piece(pieces, count)
            tokens.append(part.unflatten(0, (-1, number)).transpose(1, 2).flatten(2))
            if scale is not None:
                scales.append(scale.reshape(-1, number))
        for chunk in range(full, total):
            piece = waves[:, :, chunk * stride :]
            if chunk < total - 1:
                least = (self.chunk_frames - 1) * self.hop + 1
                piece = torch.nn.functional.pad(piece, (0, max(least - piece.shape[2], 0)))
            part, scale = self._encode_piece(piece, count)
            tokens.append(part)
            if scale is not None:
                scales.append(scale)
        if not tokens:
            return self._quantize_any(waves[:, :, :0], count), None, waves
        return torch.cat(tokens, 2), torch.cat(scales, 1) if scales else None, waves[:, :, total * stride :]

    def _decode_chunks(
        self, tokens: Tensor, state: ChunkDecoderState, final: bool
    ) -> tuple[Tensor, ChunkDecoderState]:
        """Samples that no later chunk changes; chunks fade into each other with triangular weights."""
        size, batch = self.chunk_frames, tokens.shape[0]
        full = tokens.shape[2] // size
        tail, weights, done, chunk = state.tail, state.weights, [], 0
        fade = _triangle(size * self.hop, tail)
        for begin in range(0, full, CHUNKS_AT_ONCE):
            number = min(CHUNKS_AT_ONCE, full - begin)
            span = tokens[:, :, begin * size : (begin + number) * size]
            pieces = span.unflatten(2, (number, size)).transpose(1, 2).flatten(0, 1)
            waves = self.decode_latents(self.latents(pieces)).unflatten(0, (batch, number))
            for i in range(number):
                piece = self._scaled(waves[:, i], state.scales, chunk)
                tail, weights = _added(tail, weights, piece, fade)
                done.append(tail[:, :, : self.stride] / weights[: self.stride])
                tail, weights, chunk = tail[:, :, self.stride :], weights[self.stride :], chunk + 1
        held = tokens[:, :, full * size :]
        if final:
            if held.shape[2]:
                piece = self._scaled(self.decode_latents(self.latents(held)), state.scales, chunk)
                tail, weights = _added(tail, weights, piece, fade)
                held, chunk = held[:, :, :0], chunk + 1
            done.append(tail / weights)
            tail, weights = tail[:, :, :0], weights[:0]
        waves = torch.cat(done, 2) if done else tail[:, :, :0]
        return waves, ChunkDecoderState(None, held, state.scales[:, chunk:], tail, weights)


def _triangle(length: int, like: Tensor) -> Tensor:
    """Weights (length,) that rise to the middle and fall, none of them 0."""
    place = torch.linspace(0, 1, length + 2, device=like.device, dtype=like.dtype)[1:-1]
    return 0.5 - (place - 0.5).abs()


def _added(tail: Tensor, weights: Tensor, piece: Tensor, fade: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (B, C, n) and weights (n,) with a piece added at their beginning."""
    fade = fade[: piece.shape[2]]
    longer = piece.shape[2] - tail.shape[2]
    pad = torch.nn.functional.pad
    if longer > 0:
        tail, weights = pad(tail, (0, longer)), pad(weights, (0, longer))
    return tail + pad(piece * fade, (0, max(-longer, 0))), weights + pad(fade, (0, max(-longer, 0)))


# Official files. transformers writes weight norm with the names of torch's parametrizations; files of before
# have weight_g and weight_v, as those of audiocraft and of the encodec package.

NORM_PAIR = {
    r"\.weight_g$": ".parametrizations.weight.original0",
    r"\.weight_v$": ".parametrizations.weight.original1",
}

SEANET_KEYS = {
    "dimension": "hidden_size",
    "n_filters": "num_filters",
    "n_residual_layers": "num_residual_layers",
    "ratios": "upsampling_ratios",
    "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "dilation_base": "dilation_growth_rate",
    "pad_mode": "pad_mode",
    "compress": "compress",
    "causal": "use_causal_conv",
    "trim_right_ratio": "trim_right_ratio",
}
"""Keys of audiocraft's SEANet and what transformers calls them."""

NORMS = {"weight_norm": "weight_norm", "time_group_norm": "time_group_norm"}

PACKAGE_MODELS: dict[int, dict[str, Any]] = {
    1: {"sampling_rate": 24000, "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0]},
    2: {
        "sampling_rate": 48000,
        "audio_channels": 2,
        "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
        "use_causal_conv": False,
        "norm_type": "time_group_norm",
        "normalize": True,
        "chunk_length_s": 1.0,
        "overlap": 0.01,
    },
}
"""The two models of the encodec package, by their number of channels; their files say nothing else."""


def rename_official(name: str) -> str:
    """Our name (of transformers) of a tensor in a file of audiocraft, the encodec package or transformers."""
    for half in ("encoder", "decoder"):
        if name.startswith(f"{half}.model."):
            name = name.replace(f"{half}.model.", f"{half}.layers.", 1)
            name = name.replace(".convtr.convtr.", ".conv.").replace(".convtr.norm.", ".norm.")
            name = name.replace(".conv.conv.", ".conv.").replace(".conv.norm.", ".norm.")
    name = re.sub(r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook.", name)
    for pattern, new in NORM_PAIR.items():
        name = re.sub(pattern, new, name)
    return name


def rename(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors of any official file under transformers' names; a CheckpointError for two of one name."""
    renamed = {rename_official(name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise CheckpointError(f"{where}: tensors of two files in one; get the weights again")
    return renamed


def bandwidths_for(count: int, bins: int, sample_rate: int, ratios: Sequence[int]) -> list[float]:
    """``target_bandwidths`` of which transformers makes so many codebooks.

    It divides the last one by the bandwidth of a codebook; half a codebook more is safe from rounding.
    """
    rate = math.ceil(sample_rate / math.prod(ratios))
    return [(count + 0.5) * rate * math.ceil(math.log2(bins)) / 1000]


def audiocraft_config(
    seanet: Mapping[str, Any],
    sample_rate: int,
    channels: int,
    num_codebooks: int,
    bins: int,
    renormalize: bool,
) -> tuple[dict[str, Any], bool]:
    """transformers' configuration of audiocraft's, and whether there is an LSTM.

    Raises:
        ConfigError: a missing key, or one whose value transformers' network can't have.
    """
    seanet = dict(seanet)
    decoder = dict(seanet.get("decoder") or {})
    missing = [key for key in ("dimension", "n_filters", "ratios") if key not in seanet]
    if missing:
        raise ConfigError(f"seanet: key '{missing[0]}' is missing; the configuration is not whole")
    if "trim_right_ratio" in decoder:
        seanet["trim_right_ratio"] = decoder["trim_right_ratio"]
    unsupported = {
        "activation": "ELU",
        "final_activation": None,
        "disable_norm_outer_blocks": 0,
    }
    for key, only in unsupported.items():
        value = seanet.get(key, decoder.get(key, only))
        if value != only:
            raise ConfigError(f"seanet.{key}: {value!r} is not supported; only {only!r} is")
    alpha = (seanet.get("activation_params") or {}).get("alpha", 1.0)
    norm = seanet.get("norm", "weight_norm")
    if alpha != 1.0 or norm not in NORMS:
        wrong = f"norm {norm!r}" if norm not in NORMS else f"activation_params.alpha {alpha}"
        raise ConfigError(f"seanet: {wrong} is not supported; only {', '.join(NORMS)} and alpha 1 are")
    config = {ours: seanet[key] for key, ours in SEANET_KEYS.items() if seanet.get(key) is not None}
    lstm = int(seanet.get("lstm", 0))
    config.update(
        upsampling_ratios=list(config["upsampling_ratios"]),
        sampling_rate=sample_rate,
        audio_channels=channels,
        normalize=renormalize,
        norm_type=NORMS[norm],
        use_causal_conv=bool(seanet.get("causal", False)),
        pad_mode=seanet.get("pad_mode", "reflect"),
        use_conv_shortcut=not seanet.get("true_skip", True),
        num_lstm_layers=max(lstm, 1),
        codebook_size=bins,
        codebook_dim=config["hidden_size"],
        target_bandwidths=bandwidths_for(num_codebooks, bins, sample_rate, config["upsampling_ratios"]),
    )
    return config, lstm > 0
