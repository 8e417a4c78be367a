"""Continuous integrate-and-fire chunk by chunk: the weight and vector of the open token are carried over.

The open token is one more frame in front of the next chunk, with its weight and its mean vector, so a chunk
is the computation of :mod:`nar_speech.layers.cif` on prefix sums and has no loop over frames either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech.layers.cif import (
    CifOutput,
    CifPredictorV2,
    fire_counts,
    integrate,
    one_fire_weights,
    overlap_weights,
    prefix_sums,
    prefix_track,
)
from nar_speech.layers.precision import no_autocast
from nar_speech.layers.sanm_stream import StreamConfig
from nar_speech.layers.sanm_windows import Windows


@dataclass(frozen=True)
class CifState:
    """The open token of streams (B), float32: remainder (B,) its weight, hidden (B, D) its mean vector."""

    remainder: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class CifChunk:
    """Tokens a chunk has completed.

    embeds: (B, U, D) one vector per token, zero past ``counts``. counts: (B,) int64. rows: (B, U) int64 row
    of the window in which each token ended (W: behind its end), -1 past ``counts``. alphas: (B, W) float32
    the weights that counted in this step.
    """

    embeds: Tensor
    counts: Tensor
    rows: Tensor
    alphas: Tensor


def init_cif(predictor: CifPredictorV2, batch: int, device: torch.device | str | None = None) -> CifState:
    """State of ``batch`` streams that have not begun; the device defaults to that of the weights."""
    device = device or predictor.device
    return CifState(torch.zeros(batch, device=device), torch.zeros(batch, predictor.size, device=device))


def most_tokens(predictor: CifPredictorV2, config: StreamConfig, rows: int) -> int:
    """How many tokens a step can complete at most, with a window of ``rows`` rows."""
    conf = predictor.config
    weight = max(conf.smooth_factor - conf.noise_threshold, 0.0)
    bound = math.floor(1 + weight * (rows - config.chunk[0]) + conf.tail_threshold)
    return min(bound, config.max_tokens or bound)


def step_cif(
    predictor: CifPredictorV2,
    config: StreamConfig,
    hidden: Tensor,
    valid: Tensor,
    state: CifState,
    final: Tensor,
    silent: Tensor | None = None,
) -> tuple[CifChunk, CifState]:
    """Tokens that end in this chunk.

    Args:
        hidden: (B, W, D) encoder output of the window, zero where ``valid`` (B, W) bool is false.
        final: (B,) bool, where the stream ends: the look-ahead counts too, and the tail weight is added.
        silent: (B,) bool, streams without any audio, which have no tokens; default none.

    Returns:
        the tokens, and the next state, which means nothing for a stream that has ended.
    """
    with no_autocast(hidden):
        left, size, _ = config.chunk
        places = torch.arange(hidden.shape[1], device=hidden.device)
        rows = ((places + 1) * valid).amax(dim=1)
        alphas = predictor.alphas(hidden, rows)
        counted = valid & (places >= left) & ((places < left + size) | final[:, None])
        if silent is not None:
            counted = counted & ~silent[:, None]
        alphas = alphas * counted
        columns = torch.arange(hidden.shape[1] + 2, device=hidden.device)  # open token, window, tail
        tail = final[:, None] & (columns == 1 + rows[:, None])
        weights = torch.cat([state.remainder[:, None], F.pad(alphas, (0, 1))], dim=1)
        weights = weights + tail * predictor.config.tail_threshold
        frames = F.pad(torch.cat([state.hidden[:, None], hidden.float()], dim=1), (0, 0, 0, 1))
        sums = prefix_sums(weights)
        tokens = most_tokens(predictor, config, hidden.shape[1])
        numbers = torch.arange(tokens, device=sums.device, dtype=sums.dtype).expand(len(sums), -1)
        if config.official:  # the loop: a sum above 1 goes on to the next frame, if there is one
            there = columns < (1 + rows + final)[:, None]
            fired = fire_counts(sums)
            done = fired.masked_fill(~there, 0).amax(dim=-1)
            shares = one_fire_weights(weights, sums, _with_open(numbers, done), sequential=True)
            shares = shares * there[:, None]
        else:
            fired = sums.floor()
            done = fired[:, -1]
            shares = overlap_weights(sums, _with_open(numbers, done))
        exists = numbers < done[:, None]
        embeds = (shares[:, :-1] * exists[:, :, None]).float() @ frames
        remainder = sums[:, -1] - done
        mean = shares[:, -1:] / remainder.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
        open_token = (mean.float() @ frames).squeeze(1)
        ends = (fired[:, None] <= numbers[:, :, None]).sum(dim=-1) - 1
        counts = done.long().clamp_max(tokens)
        chunk = CifChunk(embeds.to(hidden.dtype), counts, ends.masked_fill(~exists, -1), alphas)
        return chunk, CifState(remainder.float(), open_token)


def _with_open(numbers: Tensor, done: Tensor) -> Tensor:
    """The tokens' numbers (B, U) and, last, that of the open token, which follows the ``done`` (B,) ones."""
    return torch.cat([numbers, done[:, None]], dim=1)


def window_alphas(predictor: CifPredictorV2, rows: Tensor, windows: Windows) -> Tensor:
    """Weights (B, N W) float32 of windows side by side (B, N W, D), zero at rows a window does not own."""
    with no_autocast(rows):
        folded = rows.unflatten(1, (-1, windows.size)).flatten(0, 1)
        full = torch.full((len(folded),), windows.size, device=rows.device)
        return predictor.alphas(folded, full).reshape(windows.own.shape) * windows.own


def token_ends(sums: Tensor, tokens: int) -> Tensor:
    """Row (B, U) int64 in which each token ends, T where it does not; ``sums`` (B, T) prefix sums."""
    numbers = torch.arange(tokens, device=sums.device, dtype=sums.dtype)
    return (sums[:, None] < numbers[:, None] + 1).sum(dim=-1)


def train_windows(
    predictor: CifPredictorV2, rows: Tensor, alphas: Tensor, targets: Tensor, official: bool = False
) -> tuple[CifOutput, Tensor]:
    """Training: weights scaled to sum to ``targets`` (B,), and the row (B, U) in which each token ends."""
    with no_autocast(rows):
        output = predictor.to_targets(rows, alphas, targets, official)
        _, sums, _ = predictor.scale(alphas, targets)
        return output, token_ends(sums, output.embeds.shape[1])


def infer_windows(
    predictor: CifPredictorV2, rows: Tensor, alphas: Tensor, silent: Tensor
) -> tuple[CifOutput, Tensor]:
    """The tokens of whole streams, with the tail weight behind, and the row (B, U) in which each one ends.

    Args:
        rows: (B, N W, D) windows, zero where they are not valid; alphas: (B, N W) float32 their weights.
        silent: (B,) bool, streams without any audio, which have no tokens.
    """
    with no_autocast(rows):
        weights = F.pad(alphas, (0, 1), value=predictor.config.tail_threshold).masked_fill(silent[:, None], 0)
        sums = prefix_sums(weights)
        counts = sums[:, -1].floor().long()
        tokens = int(counts.max()) if counts.numel() else 0
        embeds = integrate(F.pad(rows, (0, 0, 0, 1)), weights, sums, counts, tokens)
        output = CifOutput(embeds, counts.float(), counts, weights, prefix_track(sums))
        return output, token_ends(sums, tokens)
