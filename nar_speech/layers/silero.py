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

from nar_speech.checkpoint import load_strict, rename_tensors
from nar_speech.errors import CheckpointError, MissingExtraError
from nar_speech.layers.packed import linear_relu

SAMPLE_RATE = 16000
WINDOW = 512  # samples of one probability: 32 ms
CONTEXT = 64  # samples of the window before that it sees
FRAME, HOP, BINS = 256, 128, 129
WIDTH = 128
PREFIX = "_model."  # of the 16 kHz network in the package's file; the other one is for 8 kHz

SIZES = ((BINS, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))  # of the convolutions: in, out, stride
KERNEL = 3
LANES = 32  # floats; elementwise functions of a CPU differ in the last bit where fewer are left over
RENAME = {
    r"stft\.forward_basis_buffer": "spectrum.weight",
    r"encoder\.(\d)\.reparam_conv": r"convs.\1",
    r"decoder\.rnn\.(weight|bias)_ih": r"input.\1",
    r"decoder\.rnn\.(weight|bias)_hh": r"recurrent.\1",
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
    """Probability of speech for every window of 512 samples at 16 kHz; always float32.

    Everything that multiplies is a Linear layer: convolutions over so few frames are faster as products of
    windows laid side by side, and packed for the CPU (:func:`nar_speech.layers.packed.pack_linear_layers`)
    they give a row the same bits in a batch of any size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Linear(FRAME, 2 * BINS, bias=False)
        self.convs = nn.ModuleList(nn.Linear(KERNEL * size, out) for size, out, _ in SIZES)
        self.input, self.recurrent = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.head = nn.Parameter(torch.zeros(WIDTH + 1))  # weights and bias of the output

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
        own = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        own = rename_tensors(own, RENAME, where)
        heads = [own.pop(f"head.{part}", torch.zeros(0)).flatten() for part in ("weight", "bias")]
        own["head"] = torch.cat(heads)
        for name, tensor in own.items():
            if name.endswith("weight") and tensor.ndim == 3:  # (O, I, K) to rows of windows
                own[name] = tensor.transpose(1, 2).flatten(1)
        model = cls()
        load_strict(model, own, None, where)
        return model.eval().requires_grad_(False)

    def init_state(self, batch: int, device: torch.device | str | None = None) -> SileroState:
        """Of ``batch`` streams that begin."""
        device = self.head.device if device is None else device
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
        inputs = self.input(features)
        hidden, cell, outputs = state.hidden, state.cell, []
        valid = torch.arange(total, device=windows.device) < counts[:, None]
        for t in range(total):
            gates = inputs[:, t] + self.recurrent(hidden)
            into, forget, new, out = gates.chunk(4, dim=1)
            new_cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
            new_hidden = out.sigmoid() * new_cell.tanh()
            hidden = torch.where(valid[:, t, None], new_hidden, hidden)
            cell = torch.where(valid[:, t, None], new_cell, cell)
            outputs.append(hidden)
        heads = (torch.stack(outputs, 1).relu() * self.head[:-1]).sum(-1) + self.head[-1]
        heads = F.pad(heads, (0, -total % LANES)).sigmoid()[:, :total]
        ends = torch.cat([state.context[:, None], windows[..., -CONTEXT:]], 1)
        index = counts[:, None, None].expand(-1, 1, CONTEXT)
        return heads * valid, SileroState(ends.gather(1, index)[:, 0], hidden, cell)

    def encode(self, samples: Tensor) -> Tensor:
        """(N, 576) samples, each a window behind its context, to (N, 128) features."""
        padded = F.pad(samples, (0, CONTEXT), mode="reflect")
        spectrum = self.spectrum(padded.unfold(1, FRAME, HOP).contiguous())  # (N, 4, 258)
        x = (spectrum[..., :BINS].square() + spectrum[..., BINS:].square()).sqrt()
        for layer, (size, _, stride) in zip(self.convs, SIZES, strict=True):
            x = F.pad(x, (0, 0, 1, 1))
            count = (x.shape[1] - KERNEL) // stride + 1
            strides = (x.shape[1] * size, stride * size, 1)
            x = linear_relu(layer, x.as_strided((len(x), count, KERNEL * size), strides))
        return x[:, 0]

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
