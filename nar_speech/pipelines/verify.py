"""The verifier of a model: an autoregressive text decoder on the same encoder that checks the fast draft."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nar_speech import config as configs
from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.compress import expand
from nar_speech.errors import ConfigError
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.whisper_decoder import WhisperDecoder, WhisperDecoderConfig
from nar_speech.model_folder import CONFIG_FILE, VerifierConfig
from nar_speech.search.redraft import TokenKinds
from nar_speech.search.verify import Decoded, greedy, verify
from nar_speech.text.realign import as_written, is_annotation, retime
from nar_speech.text.tokenizer import load_tokenizer
from nar_speech.text.whisper_bpe import WhisperBpeTokenizer
from nar_speech.types import Token, Word


@dataclass(frozen=True)
class Verified:
    """What the verifier says of one waveform; times in seconds from its beginning.

    Attributes:
        text: with case and punctuation.
        words, tokens: with times, () where not asked for.
        confidence: geometric mean of the tokens' probabilities.
        passes: passes over the verifier.
        complete: False where ``max_passes`` ended the verification.
    """

    text: str
    confidence: float
    words: tuple[Word, ...] = ()
    tokens: tuple[Token, ...] = ()
    passes: int = 0
    complete: bool = True


class Verifier:
    """Turns drafts into the text that greedy search of the autoregressive decoder gives, in a few passes.

    Args:
        decoder: in evaluation mode, on the CPU, float32.
        dtype: in which it computes.
        int8: whether its products are int8 (CPU only).
    """

    def __init__(
        self,
        decoder: WhisperDecoder,
        tokenizer: WhisperBpeTokenizer,
        config: VerifierConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
    ):
        decoder = decoder.untie()
        if int8:
            from nar_speech.layers.quantize import quantize_dynamic_int8

            decoder = quantize_dynamic_int8(decoder)
        decoder = decoder.to(device, dtype)
        self.decoder = pack_linear_layers(decoder) if device.type == "cpu" else decoder
        self.tokenizer, self.config, self.dtype = tokenizer, config, dtype
        self.kinds = TokenKinds(*tokenizer.kinds(), tokenizer.texts(), tokenizer.encode)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        config: VerifierConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
    ) -> Verifier:
        """Read the verifier of a model folder.

        Raises:
            ConfigError: sizes that don't fit, or a tokenizer of another kind.
            CheckpointError: weights that are missing or don't fit.
        """
        folder = Path(folder)
        where = f"{folder / CONFIG_FILE}: verifier"
        tokenizer = load_tokenizer(config.tokenizer, folder)
        if not isinstance(tokenizer, WhisperBpeTokenizer):
            raise ConfigError(f"{where}.tokenizer: kind '{config.tokenizer.kind}'; must be whisper_bpe")
        network = configs.from_dict(WhisperDecoderConfig, config.network, f"{where}.network")
        if network.vocab_size != tokenizer.vocab_size:
            raise ConfigError(
                f"{where}.network.vocab_size is {network.vocab_size}, but the tokenizer has"
                f" {tokenizer.vocab_size}; make them equal"
            )
        with SkipInit():
            decoder = WhisperDecoder(network)
        path = folder / config.weights
        load_strict(decoder, expand(read_weights(path)), where=path)
        return cls(decoder.eval().requires_grad_(False), tokenizer, config, device, dtype, int8)

    @torch.inference_mode()
    def __call__(
        self,
        memory: Tensor,
        lengths: Tensor,
        drafts: Sequence[str] | None,
        durations: Sequence[float],
        max_passes: int | None = None,
    ) -> list[Decoded]:
        """Tokens of the verified texts.

        Args:
            memory: (B, T, D) encoder output that the decoder was trained on.
            lengths: (B,) int64.
            drafts: B texts, cased or not; None: plain greedy search, token by token.
            durations: of the audio, s.
            max_passes: see :func:`nar_speech.search.verify.verify`.
        """
        prompt, end = self.tokenizer.prompt_ids, self.tokenizer.eot
        most = self.decoder.config.max_tokens - len(prompt)
        limits = [
            min(most, self.config.extra_tokens + math.ceil(self.config.tokens_per_second * seconds))
            for seconds in durations
        ]
        ids = [self.encode(draft) for draft in drafts or ()]
        room = max([2 * len(prompt) + len(row) + 16 for row in ids], default=64)
        state = self.decoder.start(memory.to(self.dtype), lengths, room)
        if drafts is None:
            return greedy(self.decoder.step, state, prompt, end, limits, prompt)
        return verify(self.decoder.step, state, prompt, ids, end, limits, self.kinds, prompt, max_passes)

    def encode(self, draft: str) -> list[int]:
        """Tokens of a draft in the form in which the decoder writes."""
        text = as_written(draft)
        return self.tokenizer.encode(" " + text) if text else []

    def describe(
        self, found: Decoded, draft: Sequence[Word], duration: float, times: bool = True
    ) -> Verified:
        """Text, words and tokens of a verified waveform.

        Args:
            draft: words of the draft with times, from which the times are taken.
            duration: of the audio, s.
        """
        ids, known = list(found.tokens), [p for p in found.log_probs if not math.isnan(p)]
        mean = math.exp(sum(known) / len(known)) if known else 0.0
        text = self.tokenizer.decode(ids).strip()
        if is_annotation(text):  # nobody speaks
            ids, text = [], ""
        words: tuple[Word, ...] = ()
        tokens: list[Token] = []
        if times:
            groups = self.tokenizer.group(ids)
            sure = [mean if math.isnan(p) else math.exp(p) for p in found.log_probs]
            texts = [self.tokenizer.decode([ids[i] for i in group]).strip() for group in groups]
            confidences = [float(np.mean([sure[i] for i in group])) for group in groups]
            words = retime(texts, confidences, draft, duration)
            pieces = [self.kinds.texts[i] for i in ids]  # as they read: pieces are letters for bytes
            for word, group in zip(words, groups, strict=True):
                step = (word.end - word.start) / len(group)
                tokens += [
                    Token(ids[i], pieces[i], word.start + k * step, word.start + (k + 1) * step, sure[i])
                    for k, i in enumerate(group)
                ]
        return Verified(text, mean, words, tuple(tokens), found.passes, found.complete)
