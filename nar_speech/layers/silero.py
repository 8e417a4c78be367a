"""Silero's voice activity network as a batched module whose state is a value (Silero Team, MIT licence).

The package's own model keeps the state of one batch inside itself, all of whose streams begin and end
together. Here every row is a stream of its own. The weights are read from the installed package.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.checkpoint import load_strict
from nar_speech.errors import CheckpointError, MissingExtraError

SAMPLE_RATE = 16000
WINDOW = 512  # samples of one probability: 32 ms
CONTEXT = 64  # samples of the window before that it sees
FRAME, HOP, BINS = 256, 128, 129
WIDTH = 128
PREFIX = "_model."  # of the 16 kHz network in the package's file; the other one is for 8 kHz

RENAME = {
    r"stft\.forward_basis_buffer": "basis",
    r"encoder\.(\d)\.reparam_conv": r"encoder.\1",
    r"decoder\.rnn": "cell",
    r"decoder\.decoder\.2": "head",
}


@dataclass(frozen=True)
class SileroState:
    """context (B, 64) float32: the last samples; hidden, cell (B, 128) float32: of the recurrent layer."""

    context: Tensor
    hidden: Tensor
    cell: Tensor


@dataclass(frozen=True)
class SileroStreamState:
    """Of streams whose chunks are no whole windows.

    network: see :class:`SileroState`; samples (B, 511) float32: those that wait for a full window, left
    aligned; waiting (B,) int64: how many they are.
    """

    network: SileroState
    samples: Tensor
    waiting: Tensor


class SileroVad(nn.Module):
    """Probability of speech for every window of 512 samples at 16 kHz; always float32."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.zeros(2 * BINS, 1, FRAME), requires_grad=False)
        sizes = ((BINS, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.encoder = nn.ModuleList(nn.Conv1d(i, o, 3, stride, padding=1) for i, o, stride in sizes)
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.head = nn.Conv1d(WIDTH, 1, 1)

    @classmethod
    def from_package(cls) -> SileroVad:
        """The network of the installed silero-vad.

        The package itself is not imported: it would set PyTorch to one thread.

        Raises:
            MissingExtraError: it is not installed.
            CheckpointError: its file holds another network.
        """
        spec = importlib.util.find_spec("silero_vad")
        if spec is None or spec.origin is None:
            raise MissingExtraError("silero-vad", "serve", "voice activity detection")
        path = Path(spec.origin).parent / "data" / "silero_vad.jit"
        try:
            with warnings.catch_warnings():  # about the format, which is the package's choice
                warnings.simplefilter("ignore", DeprecationWarning)
                tensors = torch.jit.load(path, map_location="cpu").state_dict()
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: can't be read; install silero-vad again") from error
        return cls.from_state_dict(tensors, path)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], where: str | Path) -> SileroVad:
        """From the package's tensors; ``where`` is named in errors.

        Raises:
            CheckpointError: missing, unknown or misshaped ones.
        """
        model = cls()
        own = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        load_strict(model, own, RENAME, where)
        return model.eval().requires_grad_(False)

    def init_state(self, batch: int, device: torch.device | str | None = None) -> SileroState:
        """Of ``batch`` streams that begin."""
        device = self.basis.device if device is None else device
        sizes = (CONTEXT, WIDTH, WIDTH)
        return SileroState(*(torch.zeros(batch, size, device=device) for size in sizes))

    def step(self, windows: Tensor, state: SileroState) -> tuple[Tensor, SileroState]:
        """(B, 512) samples in [-1, 1] to (B,) probabilities, and the next state."""
        count = torch.ones(len(windows), dtype=torch.int64, device=windows.device)
        probabilities, state = self.windows(windows[:, None], count, state)
        return probabilities[:, 0], state

    def windows(self, windows: Tensor, counts: Tensor, state: SileroState) -> tuple[Tensor, SileroState]:
        """Several windows in a row: only the recurrent layer goes through them one by one.

        Args:
            windows: (B, W, 512) samples; counts: (B,) int64, how many of a stream's are valid.

        Returns:
            (B, W) probabilities, 0 beyond ``counts``; the state behind the last valid window.
        """
        batch, total = windows.shape[:2]
        before = torch.cat([state.context[:, None], windows[:, :-1, -CONTEXT:]], 1)
        features = self.encode(torch.cat([before, windows], 2).flatten(0, 1)).view(batch, total, WIDTH)
        hidden, cell, outputs = state.hidden, state.cell, []
        valid = torch.arange(total, device=windows.device) < counts[:, None]
        for t in range(total):
            new_hidden, new_cell = self.cell(features[:, t], (hidden, cell))
            hidden = torch.where(valid[:, t, None], new_hidden, hidden)
            cell = torch.where(valid[:, t, None], new_cell, cell)
            outputs.append(hidden)
        heads = torch.stack(outputs, 1).relu() @ self.head.weight[0, :, 0] + self.head.bias
        ends = torch.cat([state.context[:, None], windows[..., -CONTEXT:]], 1)
        index = counts[:, None, None].expand(-1, 1, CONTEXT)
        return heads.sigmoid() * valid, SileroState(ends.gather(1, index)[:, 0], hidden, cell)

    def encode(self, samples: Tensor) -> Tensor:
        """(N, 576) samples, each a window behind its context, to (N, 128) features."""
        padded = F.pad(samples, (0, CONTEXT), mode="reflect")
        spectrum = padded.unfold(1, FRAME, HOP) @ self.basis[:, 0].T  # (N, 4, 258)
        x = (spectrum[..., :BINS].square() + spectrum[..., BINS:].square()).sqrt().transpose(1, 2)
        for layer in self.encoder:
            x = layer(x).relu()
        return x.squeeze(-1)

    def init_stream(self, batch: int, device: torch.device | str | None = None) -> SileroStreamState:
        """Of ``batch`` streams that begin, for :meth:`step_stream`."""
        network = self.init_state(batch, device)
        device = network.hidden.device
        samples = torch.zeros(batch, WINDOW - 1, device=device)
        return SileroStreamState(network, samples, torch.zeros(batch, dtype=torch.int64, device=device))

    def step_stream(
        self, audio: Tensor, lengths: Tensor, state: SileroStreamState
    ) -> tuple[Tensor, Tensor, SileroStreamState]:
        """Chunks of any size; windows are cut from the beginning of each stream, whatever the chunks are.

        Args:
            audio: (B, N) samples in [-1, 1]; lengths: (B,) int64 valid ones.

        Returns:
            (B, W) probabilities of the windows that are complete, W the most there can be, 0 beyond the
            counts; (B,) int64 counts; the next state.
        """
        batch, size = audio.shape
        device, held = audio.device, WINDOW - 1
        most = (size + held) // WINDOW
        both = torch.cat([state.samples, audio], 1)
        filled = state.waiting + lengths
        counts = filled // WINDOW
        # What waits, then what is new; a position p behind what waits is sample p - waiting of ``audio``.
        place = torch.arange(most * WINDOW + held, device=device).expand(batch, -1)
        waits = state.waiting[:, None]
        index = torch.where(place < waits, place, place - waits + held).clamp(max=both.shape[1] - 1)
        line = both.gather(1, index)
        line = torch.where(place < filled[:, None], line, 0.0)
        windows = line[:, : most * WINDOW].view(batch, most, WINDOW)
        rest = counts[:, None] * WINDOW + torch.arange(held, device=device)
        rest = line.gather(1, rest.clamp(max=line.shape[1] - 1))
        left = filled - counts * WINDOW
        rest = torch.where(torch.arange(held, device=device) < left[:, None], rest, 0.0)
        if most:
            probabilities, network = self.windows(windows, counts, state.network)
        else:
            probabilities, network = audio.new_zeros(batch, 0), state.network
        return probabilities, counts, SileroStreamState(network, rest, left)
