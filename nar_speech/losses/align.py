"""Learning and reading an alignment of a text and its frames without any labels.

    Badlani et al. 2021, "One TTS Alignment To Rule Them All" (arXiv 2108.10447): a soft alignment by distance
    (equation 1), the sum over all monotonic paths (section 2.1), a prior along the diagonal (section 2.2), a
    term that makes soft paths hard (section 2.3). The best path is the monotonic alignment search of Glow-TTS
    (Kim et al. 2020, arXiv 2005.11129, algorithm 1).

A path goes through all symbols in order, each of which has one frame at least. Letters: B items, T frames,
N symbols of text, D width. Functions of tensors; no randomness.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.errors import InputError

LEAST = -1e6  # scores of the search below it count as this, so that sums of them stay exact
NEVER = -1e4  # score of what is impossible: its exponential is 0, and gradients have no -inf
SHARPNESS = 5e-4  # of the squared distance in the authors' code


def beta_binomial_prior(
    frame_lengths: Tensor, text_lengths: Tensor, scale: float = 1.0, size: tuple[int, int] | None = None
) -> Tensor:
    """Log probabilities (B, T, N) float32 that favour the diagonal; 0 on padding.

    At frame t = 1 .. T the symbol is beta-binomial over 0 .. N - 1 with a = ``scale`` t and
    b = ``scale`` (T - t + 1): the first frame favours the first symbol, the last frame the last one. A larger
    scale is a narrower band.

    Args:
        frame_lengths, text_lengths: (B,) int64, at least 1.
        size: T and N; None: the longest.
    """
    device = frame_lengths.device
    frames, symbols = frame_lengths.double()[:, None, None], text_lengths.to(device).double()[:, None, None]
    most, longest = size or (int(frame_lengths.max()), int(text_lengths.max()))
    t = torch.arange(1, most + 1, device=device, dtype=torch.float64)[None, :, None]
    k = torch.arange(longest, device=device, dtype=torch.float64)[None, None]
    there = (t <= frames) & (k < symbols)
    a, b = scale * t, scale * (frames - t + 1).clamp_min(1)
    left = (symbols - 1 - k).clamp_min(0)
    choose = torch.lgamma(symbols) - torch.lgamma(k + 1) - torch.lgamma(left + 1)
    log_prob = choose + _log_beta(k + a, left + b) - _log_beta(a, b)
    return log_prob.masked_fill(~there, 0.0).float()


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def soft_alignment(
    text: Tensor,
    frames: Tensor,
    text_lengths: Tensor,
    prior: Tensor | None = None,
    sharpness: float = SHARPNESS,
) -> Tensor:
    """Log probabilities (B, T, N) of the symbols at every frame, by their distance.

    Args:
        text: (B, N, D). frames: (B, T, D).
        text_lengths: (B,); what lies behind has probability 0.
        prior: (B, T, N) of :func:`beta_binomial_prior`; None: none.
        sharpness: factor of the squared distance.
    """
    with torch.autocast(text.device.type, enabled=False):
        text, frames = text.float(), frames.float()
        distance = frames.square().sum(2)[:, :, None] + text.square().sum(2)[:, None] - 2 * frames @ text.mT
    behind = torch.arange(text.shape[1], device=text.device) >= text_lengths.to(text.device)[:, None]
    scores = (-sharpness * distance).masked_fill(behind[:, None], NEVER)
    if prior is not None:
        scores = scores.log_softmax(2) + prior
    return scores.log_softmax(2)


def forward_sum_loss(
    log_probs: Tensor, frame_lengths: Tensor, text_lengths: Tensor, blank: float | None = -1.0
) -> Tensor:
    """Minus the log of the summed probability of all paths, a symbol, as the mean of the batch.

    It is the CTC loss of the labels 1, 2, ..., N.

    Args:
        log_probs: (B, T, N) of :func:`soft_alignment`; they are normalised again with the blank.
        blank: log score of a frame that belongs to no symbol (-1 in the authors' code); None: every frame
            belongs to one.

    Raises:
        InputError: lengths that don't fit, or an item with fewer frames than symbols.
    """
    frame_lengths, text_lengths = _checked(log_probs, frame_lengths, text_lengths)
    symbols = log_probs.shape[2]
    behind = torch.arange(symbols, device=log_probs.device) >= text_lengths[:, None]
    scores = log_probs.float().masked_fill(behind[:, None], NEVER)
    scores = F.pad(scores, (1, 0), value=NEVER if blank is None else blank).log_softmax(2)
    labels = torch.arange(1, symbols + 1, device=log_probs.device).expand(len(log_probs), -1)
    losses = F.ctc_loss(scores.transpose(0, 1), labels, frame_lengths, text_lengths, reduction="none")
    return (losses / text_lengths).mean()


@torch.no_grad()
def best_durations(scores: Tensor, frame_lengths: Tensor, text_lengths: Tensor) -> Tensor:
    """Frames of every symbol on the path of the highest sum of scores: monotonic alignment search.

    With C_n(t) the sum of symbol n's scores over its first t frames, the best sum of n symbols in t frames is
    max over s < t of best_{n-1}(s) - C_n(s), plus C_n(t): one running maximum over the frames. So the loop
    goes over the symbols, which are fewer than the frames, and each turn takes all frames and items at once.

    Args:
        scores: (B, T, N) log probabilities or any other scores; computed in float64.
        frame_lengths, text_lengths: (B,) int64.

    Returns:
        (B, N) int64, at least 1 each, their sum the item's frames; 0 behind the end of a text.

    Raises:
        InputError: lengths that don't fit, an item with fewer frames than symbols, NaN.
    """
    frame_lengths, text_lengths = _checked(scores, frame_lengths, text_lengths)
    batch, frames, symbols = scores.shape
    device = scores.device
    known = torch.arange(frames, device=device)[None, :, None] < frame_lengths[:, None, None]
    known = known & (torch.arange(symbols, device=device)[None, None] < text_lengths[:, None, None])
    scores = scores.double().masked_fill(~known, 0.0)
    if bool(scores.isnan().any()):
        raise InputError("alignment: NaN among the scores; check the weights, or train with float32")
    total = F.pad(scores.clamp_min(LEAST).cumsum(1), (0, 0, 1, 0))  # C_n(t), (B, T + 1, N)
    best = torch.full((batch, frames + 1), -torch.inf, dtype=torch.float64, device=device)
    best[:, 0] = 0.0
    starts = []
    for n in range(symbols):
        gain, start = (best[:, :-1] - total[:, :-1, n]).cummax(1)
        best = F.pad(gain + total[:, 1:, n], (1, 0), value=-torch.inf)
        starts.append(start)
    durations = torch.zeros(batch, symbols, dtype=torch.int64, device=device)
    end = frame_lengths
    for n in reversed(range(symbols)):
        there = n < text_lengths
        start = starts[n].gather(1, end[:, None] - 1)[:, 0]
        durations[:, n] = torch.where(there, end - start, 0)
        end = torch.where(there, start, end).clamp_min(1)
    return durations


def symbols_of_frames(durations: Tensor, frames: int) -> Tensor:
    """Which symbol (B, T) int64 each of ``frames`` frames belongs to; -1 behind the end of an item.

    Args:
        durations: (B, N) int64 frames of each symbol.
    """
    ends = durations.cumsum(1)
    place = torch.arange(frames, device=durations.device).expand(len(durations), -1).contiguous()
    symbol = torch.searchsorted(ends, place, right=True)
    return symbol.masked_fill(place >= ends[:, -1:], -1)


def binarisation_loss(log_probs: Tensor, durations: Tensor) -> Tensor:
    """Minus the mean log probability of a hard path's symbols; it pulls the soft alignment to that path.

    Args:
        log_probs: (B, T, N) of :func:`soft_alignment`.
        durations: (B, N) of :func:`best_durations`.
    """
    symbol = symbols_of_frames(durations, log_probs.shape[1])
    chosen = log_probs.gather(2, symbol.clamp_min(0)[:, :, None])[:, :, 0]
    return -chosen[symbol >= 0].mean()


def _checked(scores: Tensor, frame_lengths: Tensor, text_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (B,) on the device of the scores (B, T, N)."""
    batch, frames, symbols = scores.shape
    frame_lengths, text_lengths = (n.to(scores.device) for n in (frame_lengths, text_lengths))
    if frame_lengths.shape != (batch,) or text_lengths.shape != (batch,):
        raise InputError(f"alignment: {len(frame_lengths)} and {len(text_lengths)} lengths for {batch} items")
    short = (text_lengths < 1) | (text_lengths > symbols) | (frame_lengths > frames)
    bad = short | (frame_lengths < text_lengths)
    if bool(bad.any()):
        row = int(bad.long().argmax())
        raise InputError(
            f"alignment: item {row} has {int(text_lengths[row])} symbols, {int(frame_lengths[row])} frames;"
            f" needs 1 to {symbols} symbols, at most {frames} frames, and a frame for every symbol"
        )
    return frame_lengths, text_lengths
