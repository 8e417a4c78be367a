"""How long every phone lasts: the flow-matching model of MaskGCT (arXiv 2409.00750, appendix A.5).

Neither its code nor its weights are published; the paper says: log(1 + duration) of phones, flow matching, a
Transformer of 12 blocks, 12 heads and width 768, given phones and the durations of a prompt, sampled in four
midpoint steps; the sum is the length that the masked networks fill. What it leaves open is decided here: the
core is that of MaskGCT's other networks, given durations enter as values with a flag, and for guidance some
items are learnt without phones and prompt.

:class:`Aligner` (One TTS Alignment, arXiv 2108.10447) tells the durations of recordings that both learn from.

Letters: B items, N phones, T frames, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nar_speech.config import MAX_VOCABULARY, MAX_WIDTH, check_range
from nar_speech.errors import ConfigError
from nar_speech.layers.diffllama import INIT_STD, DiffLlama, DiffLlamaConfig
from nar_speech.losses.align import (
    SHARPNESS,
    best_durations,
    beta_binomial_prior,
    binarisation_loss,
    forward_sum_loss,
    soft_alignment,
)
from nar_speech.losses.flow import DurationDraws, flow_loss, straight_path


@dataclass(frozen=True)
class DurationConfig:
    """Numbers of the duration predictor; the defaults are those of the paper.

    Attributes:
        width, num_blocks, heads, hidden_scale: see :class:`~nar_speech.layers.diffllama.DiffLlamaConfig`.
        num_phones: rows of the table of phones; the last stands for padding, and for phones not told.
    """

    width: int = 768
    num_blocks: int = 12
    heads: int = 12
    hidden_scale: int = 4
    num_phones: int = 1024

    def __post_init__(self) -> None:
        check_range(self, 2, MAX_VOCABULARY, "num_phones")

    @property
    def core(self) -> DiffLlamaConfig:
        """The Transformer."""
        return DiffLlamaConfig(self.width, self.num_blocks, self.heads, self.hidden_scale, condition=False)


class DurationPredictor(nn.Module):
    """Phones, some durations and noisy others in; the velocity of the others out."""

    def __init__(self, config: DurationConfig):
        super().__init__()
        self.config = config
        self.phone_emb = nn.Embedding(config.num_phones, config.width, padding_idx=config.num_phones - 1)
        self.from_values = nn.Linear(3, config.width)
        self.core = DiffLlama(config.core)
        self.to_velocity = nn.Linear(config.width, 1)
        nn.init.normal_(self.phone_emb.weight, std=INIT_STD)
        with torch.no_grad():
            self.phone_emb.weight[-1].zero_()

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.phone_emb.weight.device

    @property
    def untold(self) -> int:
        """The phone that stands for one the network is not told."""
        return self.config.num_phones - 1

    def embed(self, phones: Tensor, values: Tensor, given: Tensor) -> Tensor:
        """(..., N, D) of phones (..., N), log durations (..., N), and which of these are given (..., N)."""
        flag = given.to(values.dtype)
        parts = torch.stack([values * (1 - flag), values * flag, flag], -1)
        return self.phone_emb(phones) + self.from_values(parts)

    def forward(
        self, phones: Tensor, values: Tensor, given: Tensor, time: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Velocities (B, N) float32; where durations are given, and on padding, they mean nothing.

        Args:
            phones: (B, N) int64, :attr:`untold` where they are not told.
            values: (B, N) log durations, clean where ``given`` (B, N), at ``time`` (B,) elsewhere.
            lengths: (B,) int64 phones of each item; None: N.
        """
        mask = None
        if lengths is not None:
            mask = torch.arange(phones.shape[1], device=phones.device) < lengths.to(phones.device)[:, None]
        x = self.core(self.embed(phones, values, given), time, mask)
        return self.to_velocity(x)[..., 0].float()


def log_durations(frames: Tensor) -> Tensor:
    """log(1 + frames), which the network is about."""
    return torch.log1p(frames.float())


def duration_loss(
    network: DurationPredictor, phones: Tensor, durations: Tensor, lengths: Tensor, draws: DurationDraws
) -> Tensor:
    """Flow-matching loss of the durations behind each item's prompt.

    Args:
        phones: (B, N) int64. durations: (B, N) frames of each.
        lengths: (B,) int64 phones of each item, at least 1.
        draws: of :func:`nar_speech.losses.flow.draw_durations`.
    """
    place = torch.arange(phones.shape[1], device=phones.device)
    told = draws.conditional[:, None]
    given = told & (place < draws.prompts[:, None])
    counts = ~given & (place < lengths.to(phones.device)[:, None])
    clean = log_durations(durations)
    noisy, wanted = straight_path(clean, draws.noise, draws.time)
    values = torch.where(given, clean, noisy)
    velocity = network(phones.where(told, network.untold), values, given, draws.time, lengths)
    return flow_loss(velocity, wanted, counts)


@dataclass(frozen=True)
class AlignerConfig:
    """Numbers of the aligner.

    Attributes:
        num_phones: as of the duration predictor.
        codebook_size: semantic codes.
        width: of the convolutions. size: of the vectors that are compared.
        kernel: of the convolutions over the text; those over frames see as much. Odd.
        sharpness: factor of the squared distance of vectors.
    """

    num_phones: int = 1024
    codebook_size: int = 8192
    width: int = 256
    size: int = 80
    kernel: int = 3
    sharpness: float = SHARPNESS

    def __post_init__(self) -> None:
        check_range(self, 2, MAX_VOCABULARY, "num_phones", "codebook_size")
        check_range(self, 1, MAX_WIDTH, "width", "size")
        check_range(self, 1e-6, 1e3, "sharpness")
        if not (self.kernel % 2 and 1 <= self.kernel <= 99):
            raise ConfigError(f"kernel: got {self.kernel}; must be odd, 1 to 99")


class _Reader(nn.Module):
    """Symbols (B, L) to vectors (B, L, size): a table and convolutions that don't see padding."""

    def __init__(self, count: int, config: AlignerConfig, convolutions: int):
        super().__init__()
        self.table = nn.Embedding(count, config.width)
        self.layers = nn.ModuleList(
            nn.Conv1d(config.width, config.width, config.kernel, padding=config.kernel // 2)
            for _ in range(convolutions)
        )
        self.output = nn.Linear(config.width, config.size)

    def forward(self, symbols: Tensor, lengths: Tensor) -> Tensor:
        """Vectors; those behind ``lengths`` (B,) mean nothing."""
        there = torch.arange(symbols.shape[1], device=symbols.device) < lengths.to(symbols.device)[:, None]
        x = self.table(symbols).mT
        for layer in self.layers:
            x = torch.relu(layer(x * there[:, None]))
        return self.output(x.mT)


class Aligner(nn.Module):
    """Which phone each frame of semantic codes belongs to."""

    def __init__(self, config: AlignerConfig):
        super().__init__()
        self.config = config
        self.text = _Reader(config.num_phones, config, 1)
        self.frames = _Reader(config.codebook_size, config, 2)

    def forward(self, phones: Tensor, codes: Tensor, phone_lengths: Tensor, frame_lengths: Tensor) -> Tensor:
        """Log probabilities (B, T, N) of the phones at every frame, with the prior along the diagonal.

        Args:
            phones: (B, N) int64. codes: (B, T) int64 semantic codes; padding may hold any of them.
            phone_lengths, frame_lengths: (B,) int64.
        """
        text, frames = self.text(phones, phone_lengths), self.frames(codes, frame_lengths)
        lengths = frame_lengths.to(codes.device), phone_lengths.to(codes.device)
        prior = beta_binomial_prior(*lengths, size=(codes.shape[1], phones.shape[1]))
        return soft_alignment(text, frames, phone_lengths, prior, self.config.sharpness)

    @torch.no_grad()
    def align(self, phones: Tensor, codes: Tensor, phone_lengths: Tensor, frame_lengths: Tensor) -> Tensor:
        """Frames (B, N) int64 of every phone on the best path.

        Raises:
            InputError: an item with fewer frames than phones.
        """
        log_probs = self(phones, codes, phone_lengths, frame_lengths)
        return best_durations(log_probs, frame_lengths, phone_lengths)


@dataclass(frozen=True)
class AlignerOutput:
    """Terms of the aligner's training, scalars, and what it found: durations (B, N) int64."""

    forward_sum: Tensor
    binarisation: Tensor
    durations: Tensor


def aligner_terms(
    network: Aligner, phones: Tensor, codes: Tensor, phone_lengths: Tensor, frame_lengths: Tensor
) -> AlignerOutput:
    """What the aligner learns by; args and errors as of :meth:`Aligner.align`."""
    log_probs = network(phones, codes, phone_lengths, frame_lengths)
    durations = best_durations(log_probs, frame_lengths, phone_lengths)
    summed = forward_sum_loss(log_probs, frame_lengths, phone_lengths)
    return AlignerOutput(summed, binarisation_loss(log_probs, durations), durations)
