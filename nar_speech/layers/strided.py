"""Input layer of NeMo's conformers: 2-D convolutions of stride 2 with padding, depthwise separable or plain.

Attribute names follow NeMo (``conv.0`` ... and ``out``). Causal padding is two frames before and one behind
(and so on the frequencies), the other kind one on both sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nar_speech.errors import ConfigError
from nar_speech.layers.chunks import drop, join

KERNEL = 3
UNBOUNDED = 1 << 62  # more frames than any stream has


class StridedSubsampling(nn.Module):
    """Halve the frame rate several times, then one linear layer.

    Args:
        input_size: features F per input frame.
        output_size: width D of the result.
        channels: of the convolutions.
        factor: input frames per output frame, a power of 2.
        kind: ``dw_striding`` (first a plain, then depthwise and pointwise convolutions) or ``striding``.
        causal: see module.

    Attributes:
        frame_stride: ``factor``.
        past: input frames before its last one's group of ``factor`` that a causal output frame sees.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        channels: int,
        factor: int = 8,
        kind: str = "dw_striding",
        causal: bool = False,
    ):
        super().__init__()
        stages = factor.bit_length() - 1
        if factor < 2 or factor != 1 << stages:
            raise ConfigError(f"subsampling_factor: got {factor}; must be a power of 2")
        self.frame_stride, self.causal, self.past = factor, causal, 2 * factor - 2
        self.padding = (KERNEL - 1, 1) if causal else (1, 1)
        layers: list[nn.Module] = [nn.Conv2d(1, channels, KERNEL, 2), nn.ReLU()]
        self.stages = [(0, 1)]  # the layers of each halving
        frequencies = input_size
        for _ in range(stages):
            frequencies = (frequencies + sum(self.padding) - KERNEL) // 2 + 1
        for _ in range(stages - 1):
            depthwise = kind == "dw_striding"
            groups = channels if depthwise else 1
            more = [nn.Conv2d(channels, channels, KERNEL, 2, groups=groups)]
            more += [nn.Conv2d(channels, channels, 1)] if depthwise else []
            self.stages.append((len(layers), len(layers) + len(more)))
            layers += [*more, nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.out = nn.Linear(channels * frequencies, output_size)

    def stage_lengths(self, lengths: Tensor) -> list[Tensor]:
        """Frames (B,) before the first halving and after each; an empty recording stays empty."""
        counts = [lengths]
        for _ in self.stages:
            after = torch.div(counts[-1] + sum(self.padding) - KERNEL, 2, rounding_mode="floor") + 1
            counts.append(torch.where(lengths > 0, after, 0))
        return counts

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Output frames (B,) of inputs with ``lengths`` (B,) frames."""
        return self.stage_lengths(lengths)[-1]

    def _run(self, x: Tensor, keep: Callable[[int, int], Tensor], time: tuple[int, int]) -> Tensor:
        """(B, T, F) to (B, T', D).

        Args:
            keep: gives the mask (B, T_s) of the ``T_s`` frames after ``s`` halvings; the others become zero.
            time: frames of zeros to put before and behind in each halving.
        """
        x = x.masked_fill(~keep(0, x.shape[1]).unsqueeze(2), 0.0).unsqueeze(1)
        for number, (first, last) in enumerate(self.stages, start=1):
            x = pad(x, (*self.padding, *time))
            for layer in range(first, last + 1):
                x = self._layer(self.conv[layer], x)
            x = x.masked_fill(~keep(number, x.shape[2])[:, None, :, None], 0.0)
        return self.out(x.transpose(1, 2).flatten(2))

    def merge_projections(self) -> None:
        """Turn the pointwise convolutions into Linear layers, which can be packed; for inference."""
        for index, layer in enumerate(self.conv):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                linear = nn.Linear(layer.in_channels, layer.out_channels, device="meta")
                linear.weight = nn.Parameter(layer.weight.detach().flatten(1), False)
                linear.bias = nn.Parameter(layer.bias.detach(), False)
                self.conv[index] = linear.train(self.training)

    @staticmethod
    def _layer(layer: nn.Module, x: Tensor) -> Tensor:
        """One layer over (B, C, T, F)."""
        if isinstance(layer, nn.Conv2d | nn.ReLU):
            return layer(x)
        # What was a pointwise convolution reads rows of channels.
        return layer(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce the frame rate of ``x`` (B, T, F). Returns ((B, T', D), lengths (B,))."""
        counts = self.stage_lengths(lengths)
        if x.shape[1] == 0:
            return x.new_zeros(len(x), 0, self.out.out_features), counts[-1]

        def keep(stage: int, size: int) -> Tensor:
            return torch.arange(size, device=x.device) < counts[stage].unsqueeze(1)

        return self._run(x, keep, self.padding), counts[-1]

    def step(
        self,
        x: Tensor,
        lengths: Tensor,
        frames: Tensor,
        num_frames: Tensor,
        offset: Tensor,
        final: Tensor,
        official_start: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next frames of streams, causal only; gives what :meth:`forward` gives of the whole streams.

        A window of the last inputs is computed anew, without padding: frames before the beginning are zero
        at the input and after each halving, and so are those behind the end.

        Args:
            x: (B, C, F) with room for U = C // frame_stride output frames; ``lengths`` (B,) new frames.
            frames: (B, past, F) earlier inputs, ``num_frames`` (B,) of them. For a new stream all of them,
                zeros.
            offset: (B,) output frames so far.
            final: (B,) bool, whether the stream ends.
            official_start: repeat NeMo, whose second step takes missing past frames for frames of zeros. Only
                a first step of one frame is so short that it matters.

        Returns:
            (B, U, D); how many of them are valid (B,); the inputs to keep and their number.
        """
        factor, past = self.frame_stride, self.past
        room = x.shape[1] // factor
        window, filled = join(frames, num_frames, x.to(frames.dtype), lengths, past + factor * room)
        bounds = self.stage_lengths(factor * offset - past + filled)

        def keep(stage: int, size: int) -> Tensor:
            stride = factor >> stage
            index = (stride * offset - 2 * stride + 2).unsqueeze(1) + torch.arange(size, device=x.device)
            bound = torch.where(final, bounds[stage], UNBOUNDED).unsqueeze(1)
            begun = index >= 0
            if official_start and stage:
                begun = begun | (offset > 0).unsqueeze(1)
            return begun & (index < bound)

        complete = torch.div(filled - past - 1, factor, rounding_mode="floor") + 1
        count = torch.where(final, bounds[-1] - offset, complete).clamp(0, room)
        y = self._run(window, keep, (0, 0))
        return y, count, *drop(window, filled, count * factor, past)
