"""Next-token loss of an autoregressive decoder that will meet prefixes with errors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nar_speech.losses.label_smoothing import label_smoothed_ce


def noisy_prefix_ce(
    decode: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    noise: float,
    smoothing: float,
    generator: torch.Generator,
    ignore: int = -1,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next token, with a prefix that holds errors as drafts do.

    Scheduled sampling in two parallel passes (Mihaylova and Martins 2019, arXiv 1906.07651): the first pass
    guesses every token, the second one sees some of the guesses in the place of the truth.

    Args:
        decode: inputs (R, U) to logits (R, U, V).
        inputs, targets: (R, U) ids; the target of a place is the token after it, ``ignore``: none.
        noise: largest share of the text that is replaced.
        smoothing: label smoothing.
        generator: on the tensors' device.

    Returns:
        float32 scalars: loss per utterance (a sum over its tokens, as CTC's), and share of right tokens.
    """
    valid = targets != ignore
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
    loss = label_smoothed_ce(logits, targets, smoothing, False, ignore)
    right = ((logits.argmax(-1) == targets) & valid).sum() / valid.sum().clamp(min=1)
    return loss, right.float()
