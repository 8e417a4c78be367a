"""Training an autoregressive text decoder (the verifier of draft and verify) on a recogniser's encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nar_speech.data.batch import IGNORE
from nar_speech.losses.label_smoothing import label_smoothed_ce
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


def verifier_loss(
    decode: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    noise: float,
    smoothing: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next token, with a prefix that holds errors as drafts do.

    Scheduled sampling in two parallel passes (Mihaylova and Martins 2019, arXiv 1906.07651): the first pass
    guesses every token, the second one sees some of the guesses in the place of the truth.

    Args:
        decode: inputs (R, U) to logits (R, U, V).
        inputs, targets: see :func:`verifier_tokens`.
        noise: largest share of the text that is replaced.
        smoothing: label smoothing.
        generator: on the tensors' device.

    Returns:
        float32 scalars: loss per utterance (a sum over its tokens, as CTC's), and share of right tokens.
    """
    valid = targets != IGNORE
    if noise > 0:
        with torch.no_grad():
            guesses = decode(inputs).argmax(-1)
        share = noise * torch.rand(len(inputs), 1, device=inputs.device, generator=generator)
        drawn = torch.rand(inputs.shape, device=inputs.device, generator=generator) < share
        # The guess at place u is of the token at place u + 1; only places that hold text are replaced.
        drawn[:, 1:] &= valid[:, :-1]
        drawn[:, 0] = False
        inputs = torch.where(drawn, guesses.roll(1, dims=1), inputs)
    logits = decode(inputs)
    loss = label_smoothed_ce(logits, targets, smoothing, False, IGNORE)
    right = ((logits.argmax(-1) == targets) & valid).sum() / valid.sum().clamp(min=1)
    return loss, right.float()
