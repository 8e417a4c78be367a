"""What an autoregressive text decoder (the verifier of draft and verify) is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nar_speech.data.batch import IGNORE
from nar_speech.text.whisper_bpe import WhisperBpeTokenizer


@dataclass(frozen=True)
class VerifierSection:
    """The decoder and its share of the loss.

    Attributes:
        tokenizer: file of a Whisper tokenizer (:mod:`nar_speech.text.whisper_bpe`); None: no verifier.
        conf: sizes of the decoder (:class:`nar_speech.layers.whisper_decoder.WhisperDecoderConfig`).
        weight: of its cross entropy in the total loss.
        prefix_noise: largest share of the prefix that is replaced by the decoder's own guesses; the share of
            each utterance is drawn between 0 and this.
        lsm_weight: label smoothing.
    """

    tokenizer: str | None = None
    conf: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    prefix_noise: float = 0.3
    lsm_weight: float = 0.0


def verifier_tokens(
    tokenizer: WhisperBpeTokenizer, written: Sequence[str | None], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoder inputs and targets of the utterances whose written transcript is known.

    Returns:
        rows (R,): which utterances; inputs (R, U): prompt and text, padded with the end token; targets
        (R, U): the next token everywhere, -1 where there is nothing to predict. R is at least 1: where no
        transcript is known there is one row without targets, so every parameter takes part in every step.
    """
    rows = [b for b, text in enumerate(written) if text] or [0]
    prompt = list(tokenizer.prompt_ids)
    texts = [tokenizer.encode(" " + written[b].strip()) if written and written[b] else None for b in rows]
    longest = max(len(text or ()) for text in texts) + len(prompt)
    inputs = torch.full((len(rows), longest), tokenizer.eot)
    targets = torch.full((len(rows), longest), IGNORE)
    for row, text in enumerate(texts):
        ids = torch.tensor(prompt + (text or []))
        inputs[row, : len(ids)] = ids
        if text is not None:
            after = torch.tensor([*text, tokenizer.eot])
            targets[row, len(prompt) - 1 : len(prompt) - 1 + len(after)] = after
    return torch.tensor(rows, device=device), inputs.to(device), targets.to(device)
