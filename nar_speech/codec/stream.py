"""Operators that run the layers of a network piece by piece, or on rows of several lengths.

Either way they give the numbers of a whole signal alone.

An operator reads the weights of a layer that it does not own: there is one network, and a stream is another
way to run it. Operators see (B, C, n) with any n, 0 too. A convolution keeps the input that later windows
need and gets its right padding at the last step, so convolutions that look ahead stream as well: what they
give comes that much later. :func:`lag` says how much. In a batch of several lengths every layer pads every
row where it ends.
"""

from __future__ import annotations

import abc
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_speech.codec.base import present

PadMode = Literal["constant", "reflect", "replicate"]


class Op(abc.ABC):
    """One step of a stream."""

    @abc.abstractmethod
    def init(self, batch: int, like: Tensor) -> Any:
        """The state of ``batch`` streams, on the device and of the dtype of ``like``."""

    @abc.abstractmethod
    def step(self, x: Tensor, state: Any, final: bool) -> tuple[Tensor, Any]:
        """(B, C, m) that are complete for (B, C, n) more; ``final`` gives all that is left."""

    @abc.abstractmethod
    def ready(self, inputs: int) -> int:
        """Outputs that are complete after so many inputs, before the last step."""

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Whole rows (B, C, N) of ``lengths`` (B,), each as if alone.

        Behind the end of a row there may be anything, in what comes in and in what is returned. This does one
        row after the other; operators that can do all at once have their own.

        Returns:
            (B, C, M) and lengths (B,).
        """
        alone = [
            self.step(row[None, :, :length], self.init(1, x), True)[0][0].T
            for row, length in zip(x, lengths.tolist(), strict=True)
        ]
        counts = torch.tensor([len(row) for row in alone], device=x.device)
        return nn.utils.rnn.pad_sequence(alone, batch_first=True).transpose(1, 2), counts


@dataclass(frozen=True)
class ConvState:
    """Inputs held (B, C, m) of a convolution, left padding included.

    ``skip`` of them lie before the next window; ``seen`` counts real inputs; ``started``: the left padding
    is there.
    """

    held: Tensor
    skip: int = 0
    seen: int = 0
    started: bool = False


class Conv(Op):
    """A Conv1d over the padded signal.

    Args:
        conv: the layer; its own ``padding`` is not used.
        left, right: padding.
        mode: ``reflect`` on a signal that is too short for it first appends zeros, as EnCodec does.
        fill: pad on the right besides, so that the last window is full and N inputs give ceil(N / stride).
    """

    def __init__(
        self, conv: nn.Conv1d, left: int, right: int, mode: PadMode = "constant", fill: bool = False
    ):
        self.conv, self.left, self.right, self.mode, self.fill = conv, left, right, mode, fill
        self.stride = conv.stride[0]
        self.window = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
        # The first window needs its mirror image; the last one that of up to right + stride - 1 samples.
        self.wait = left if mode == "reflect" else 0
        self.history = right + (self.stride - 1 if fill else 0) + 1 if mode != "constant" else 0

    def init(self, batch: int, like: Tensor) -> ConvState:
        """Nothing heard yet."""
        return ConvState(like.new_zeros(batch, self.conv.in_channels, 0))

    def step(self, x: Tensor, state: ConvState, final: bool) -> tuple[Tensor, ConvState]:
        """See :class:`Op`."""
        held = torch.cat([state.held, x], 2)
        seen, skip, started = state.seen + x.shape[2], state.skip, state.started
        if not started and (seen > self.wait or (final and seen)):
            behind = self._behind(seen) if final else 0
            whole = pad_ends(held, self.left, behind, self.mode)
            held, started = whole, True
        elif final and started:
            held = torch.cat([held, self._ending(held, seen)], 2)
        if not started:
            return self._nothing(held), replace(state, held=held, seen=seen)
        windows = (held.shape[2] - skip - self.window) // self.stride + 1
        if windows < 1:
            y = self._nothing(held)
        else:
            y = self._run(held[:, :, skip : skip + (windows - 1) * self.stride + self.window])
            skip += windows * self.stride
        drop = max(min(skip, held.shape[2] - self.history), 0)
        return y, ConvState(held[:, :, drop:], skip - drop, seen, True)

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        if inputs <= self.wait:
            return 0
        return max((inputs + self.left - self.window) // self.stride + 1, 0)

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Op`."""
        behind = self.right + (-lengths % self.stride if self.fill else torch.zeros_like(lengths))
        most = self.right + (self.stride - 1 if self.fill else 0)
        if self.mode == "constant":
            padded = F.pad(_kept(x, lengths), (self.left, most))
        else:
            padded = self._mirrored(x, lengths, behind, most)
        counts = (lengths + self.left + behind - self.window).div(self.stride, rounding_mode="floor") + 1
        if padded.shape[2] < self.window:
            return self._nothing(x), torch.zeros_like(lengths)
        return self._run(padded), counts.clamp(min=0)

    def _mirrored(self, x: Tensor, lengths: Tensor, behind: Tensor, most: int) -> Tensor:
        """Rows (B, C, N) padded on the left, and by ``behind`` (B,), at most ``most``, where they end."""
        after, size = torch.arange(most, device=x.device), x.shape[2] + most
        place = lengths[:, None] + after
        if self.mode == "reflect":
            # What is too short to be mirrored gets zeros first, up to here.
            end = torch.maximum(lengths, behind.clamp(min=self.left) + 1)[:, None]
            source = torch.where(place < end, place, 2 * (end - 1) - place).clamp(min=0)
            x = F.pad(_kept(x, lengths), (0, max(self.left, most) + 1))
            first = x[:, :, 1 : self.left + 1].flip(2)
        else:
            source = (lengths[:, None] - 1).expand_as(place)
            x = F.pad(_kept(x, lengths), (0, most))
            first = x[:, :, :1].expand(-1, -1, self.left)
        source = source[:, None].expand(-1, x.shape[1], -1)
        values = x.gather(2, source) * (after < behind[:, None])[:, None]
        ended = x.scatter(2, place[:, None].expand_as(source), values)
        return torch.cat([first, ended[:, :, :size]], 2)

    def _run(self, x: Tensor) -> Tensor:
        conv = self.conv
        return F.conv1d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    def _nothing(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.conv.out_channels, 0)

    def _behind(self, seen: int) -> int:
        """Padding on the right of a signal of so many samples."""
        return self.right + (-seen % self.stride if self.fill else 0)

    def _ending(self, held: Tensor, seen: int) -> Tensor:
        """The right padding (B, C, p) of a stream that ends after ``seen`` samples."""
        behind = self._behind(seen)
        if not behind or self.mode == "constant":
            return held.new_zeros(*held.shape[:2], behind)
        known = held[:, :, held.shape[2] - min(seen, self.history) :]
        # Where the signal is too short to be mirrored, all of it is known, and padded as a whole would be.
        left = self.left if seen <= behind else 0
        return pad_ends(known, left, behind, self.mode)[:, :, left + known.shape[2] :]


def pad_ends(x: Tensor, left: int, right: int, mode: PadMode) -> Tensor:
    """Pad (B, C, N); ``reflect`` on a signal not longer than the padding appends zeros first, then crops."""
    if mode != "reflect":
        return F.pad(x, (left, right), mode)
    short = max(max(left, right) - x.shape[2] + 1, 0)
    padded = F.pad(F.pad(x, (0, short)), (left, right), mode)
    return padded[:, :, : padded.shape[2] - short]


@dataclass(frozen=True)
class OverlapState:
    """Sums (B, C, m) to which later input adds; ``skip`` outputs are still to be trimmed on the left."""

    tail: Tensor
    skip: int
    seen: int = 0


class ConvTranspose(Op):
    """A ConvTranspose1d whose output is trimmed by ``left`` and ``right`` samples."""

    def __init__(self, conv: nn.ConvTranspose1d, left: int, right: int):
        self.conv, self.left, self.right = conv, left, right
        self.stride = conv.stride[0]
        self.overlap = conv.kernel_size[0] - self.stride
        if self.overlap < 0 or right > self.overlap or conv.dilation[0] != 1:
            raise ValueError("a transposed convolution must have kernel >= stride + right trim, dilation 1")

    def init(self, batch: int, like: Tensor) -> OverlapState:
        """Nothing heard yet."""
        return OverlapState(like.new_zeros(batch, self.conv.out_channels, self.overlap), self.left)

    def step(self, x: Tensor, state: OverlapState, final: bool) -> tuple[Tensor, OverlapState]:
        """See :class:`Op`."""
        conv, count, tail = self.conv, x.shape[2], state.tail
        if count:
            y = F.conv_transpose1d(x, conv.weight, None, conv.stride, groups=conv.groups)
            y[:, :, : self.overlap] += tail
            done, tail = y.split([count * self.stride, self.overlap], 2)
        else:
            done = tail[:, :, :0]
        seen = state.seen + count
        if final and seen:
            done = torch.cat([done, tail[:, :, : self.overlap - self.right]], 2)
        cut = min(state.skip, done.shape[2])
        done = done[:, :, cut:]
        if conv.bias is not None:
            done = done + conv.bias[:, None]
        return done, OverlapState(tail, state.skip - cut, seen)

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        return max(inputs * self.stride - self.left, 0)

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Op`."""
        conv = self.conv
        y = F.conv_transpose1d(_kept(x, lengths), conv.weight, conv.bias, conv.stride, groups=conv.groups)
        counts = lengths * self.stride + self.overlap - self.left - self.right
        return y[:, :, self.left : y.shape[2] - self.right], counts


class Pointwise(Op):
    """A function of each column, such as an activation or a norm over channels."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int | None = None):
        """``channels``: of the output, where it has others than the input."""
        self.function, self.channels = function, channels

    def init(self, batch: int, like: Tensor) -> None:
        """There is no state."""

    def step(self, x: Tensor, state: None, final: bool) -> tuple[Tensor, None]:
        """See :class:`Op`."""
        if x.shape[2]:
            return self.function(x), None
        return x.new_zeros(x.shape[0], self.channels or x.shape[1], 0), None

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        return inputs

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Op`."""
        return self.function(x), lengths


class PadToMultiple(Op):
    """Zeros at the end, up to a multiple of ``size``. The state is the number of samples seen."""

    def __init__(self, size: int):
        self.size = size

    def init(self, batch: int, like: Tensor) -> int:
        """Nothing heard yet."""
        return 0

    def step(self, x: Tensor, state: int, final: bool) -> tuple[Tensor, int]:
        """See :class:`Op`."""
        seen = state + x.shape[2]
        return (F.pad(x, (0, -seen % self.size)) if final else x), seen

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        return inputs

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Op`."""
        return F.pad(_kept(x, lengths), (0, -x.shape[2] % self.size)), lengths + -lengths % self.size


@dataclass(frozen=True)
class LstmState:
    """Hidden and cell values (B, layers, D)."""

    hidden: Tensor
    cell: Tensor


class ResidualLstm(Op):
    """An LSTM that looks back only, added to its input."""

    def __init__(self, lstm: nn.LSTM):
        self.lstm = lstm

    def init(self, batch: int, like: Tensor) -> LstmState:
        """Nothing heard yet."""
        zeros = like.new_zeros(batch, self.lstm.num_layers, self.lstm.hidden_size)
        return LstmState(zeros, zeros)

    def step(self, x: Tensor, state: LstmState, final: bool) -> tuple[Tensor, LstmState]:
        """See :class:`Op`."""
        if not x.shape[2]:
            return x, state
        steps = x.permute(2, 0, 1)
        before = (state.hidden.transpose(0, 1).contiguous(), state.cell.transpose(0, 1).contiguous())
        y, (hidden, cell) = self.lstm(steps, before)
        return (y + steps).permute(1, 2, 0), LstmState(hidden.transpose(0, 1), cell.transpose(0, 1))

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        return inputs

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Op`."""
        return self.step(x, self.init(x.shape[0], x), True)[0], lengths


@dataclass(frozen=True)
class ChainState:
    """The states of the parts."""

    parts: tuple[Any, ...]


class Chain(Op):
    """Operators one after the other."""

    def __init__(self, ops: Sequence[Op]):
        self.ops = tuple(ops)

    def init(self, batch: int, like: Tensor) -> ChainState:
        """Nothing heard yet."""
        return ChainState(tuple(op.init(batch, like) for op in self.ops))

    def step(self, x: Tensor, state: ChainState, final: bool) -> tuple[Tensor, ChainState]:
        """See :class:`Op`."""
        parts = []
        for op, part in zip(self.ops, state.parts, strict=True):
            x, part = op.step(x, part, final)
            parts.append(part)
        return x, ChainState(tuple(parts))

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        for op in self.ops:
            inputs = op.ready(inputs)
        return inputs

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Op`."""
        for op in self.ops:
            x, lengths = op.rows(x, lengths)
        return x, lengths


@dataclass(frozen=True)
class ResidualState:
    """The states of both ways, and shortcut values (B, C, m) that the block has not caught up with."""

    block: Any
    shortcut: Any
    pending: Tensor


class Residual(Op):
    """``shortcut(x) + block(x)``; the block may lag behind its input, the shortcut (None: x) may not."""

    def __init__(self, block: Op, channels: int, shortcut: Op | None = None):
        """``channels``: of the output."""
        self.block, self.channels, self.shortcut = block, channels, shortcut

    def init(self, batch: int, like: Tensor) -> ResidualState:
        """Nothing heard yet."""
        shortcut = None if self.shortcut is None else self.shortcut.init(batch, like)
        return ResidualState(self.block.init(batch, like), shortcut, like.new_zeros(batch, self.channels, 0))

    def step(self, x: Tensor, state: ResidualState, final: bool) -> tuple[Tensor, ResidualState]:
        """See :class:`Op`."""
        y, block = self.block.step(x, state.block, final)
        shortcut = state.shortcut
        if self.shortcut is not None:
            x, shortcut = self.shortcut.step(x, shortcut, final)
        pending = torch.cat([state.pending, x], 2)
        count = y.shape[2]
        return pending[:, :, :count] + y, ResidualState(block, shortcut, pending[:, :, count:])

    def ready(self, inputs: int) -> int:
        """See :class:`Op`."""
        return self.block.ready(inputs)

    def rows(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Op`."""
        y, counts = self.block.rows(x, lengths)
        if self.shortcut is not None:
            x, _ = self.shortcut.rows(x, lengths)
        return x + y, counts


def _kept(x: Tensor, lengths: Tensor) -> Tensor:
    """Rows (B, C, N) with zeros behind their ends."""
    return x.masked_fill(~present(lengths, x.shape[2])[:, None], 0.0)


def lag(op: Op, down: int, up: int = 1, frames: int = 64) -> int:
    """Most inputs, beyond those that it is about, that an output still needs.

    Args:
        down, up: the operator gives ``up`` outputs for ``down`` inputs in the long run.

    Returns:
        Inputs times ``up``: samples for an encoder (``up`` 1) and, of a decoder (``down`` 1), output samples.
    """
    if up == 1:
        # After twice the frames what the start needs besides is over, and half of the range is enough.
        most = range(4 * frames * down)
        outputs = range(frames, 2 * frames)
        return max(bisect_left(most, output, key=op.ready) - output * down for output in outputs)
    return max(inputs * up - op.ready(inputs) for inputs in range(frames, 2 * frames))
