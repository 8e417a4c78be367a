"""MAGNeT as the masked-sampling loop calls it, with everything left out that no result depends on.

Exact, against the network's plain forward pass to rounding:

- the text's keys and values are made once for a prompt;
- rows without text skip the attention on it, which gives them exactly nothing: half of a guided batch;
- no unconditional pass where the guidance is 1, as in the last step of every stage;
- the head of the current codebook alone, and only at positions whose logits are read;
- banded attention in the stages after the first, and nothing computed out of sight of what is read: around a
  gap that is filled, or in the last steps;
- items one by one on a CPU, each cut to its own length: then an item's numbers are the same to the last bit
  in any batch. On a GPU items go in one batch, and mates change results by rounding only.

Approximate, an option (``reuse``): between full passes only positions that are read or changed since are
computed, against keys and values kept of the others (key-value reuse of masked diffusion models: dKV-Cache,
arXiv 2505.15781; Fast-dLLM, arXiv 2505.22618).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nar_speech.config import check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.dot_product import dot_product_attention
from nar_speech.layers.multistream import TextMemory, with_null
from nar_speech.models.magnet import Magnet

CERTAIN = 1e-6  # guidance this close to 1 is 1
MAX_REUSE = 10_000


@dataclass(frozen=True)
class PredictorOptions:
    """How the network is computed.

    Attributes:
        one_by_one: items one after the other; None: on a CPU.
        reuse: a full pass every so many calls of a stage, approximate ones between; 0 or 1: all are full.
        all_positions: give logits (R, T, V) of all positions, not only of those that are read.
        allow_longer: see :meth:`nar_speech.models.magnet.Magnet.forward`.
        official_padding: see there; all texts of the batch are then padded together.
    """

    one_by_one: bool | None = None
    reuse: int = 0
    all_positions: bool = False
    allow_longer: bool = False
    official_padding: bool = False

    def __post_init__(self) -> None:
        check_range(self, 0, MAX_REUSE, "reuse")
        if self.reuse and self.one_by_one is False:
            raise ConfigError("reuse: works on items one by one; leave one_by_one out")


@dataclass
class _Kept:
    """Keys and values of an item's last passes: one (2 or 1, H, T, d) tensor a block."""

    stage: int
    age: int
    keys: list[Tensor]
    values: list[Tensor]


class MagnetPredictor:
    """``predict`` of :func:`nar_speech.sampling.codebooks.sample_codebooks` for one batch of prompts.

    Args:
        network: in eval mode, best after :meth:`~nar_speech.layers.multistream.MultiStreamNetwork.prepare`.
        condition: (B, L, W) text states of each item.
        mask: (B, L) bool, true on tokens; an item without any is made without text.
        null: states and mask of the unconditional pass, (1 or B, L', W) and (1 or B, L'): a negative prompt,
            or what stands for "no text" in a model that learnt it; None: no text.
    """

    def __init__(
        self,
        network: Magnet,
        condition: Tensor,
        mask: Tensor,
        null: tuple[Tensor, Tensor] | None = None,
        options: PredictorOptions | None = None,
    ):
        if condition.dim() != 3 or mask.shape != condition.shape[:2]:
            raise InputError(
                f"condition {tuple(condition.shape)} and mask {tuple(mask.shape)}: expected (batch, tokens,"
                " width) and (batch, tokens)"
            )
        self.network = network
        self.options = options or PredictorOptions()
        alone = self.options.one_by_one
        self.one_by_one = network.device.type == "cpu" if alone is None else alone
        self.one_by_one = self.one_by_one or self.options.reuse > 0
        device = network.device
        self.texts = with_null(condition.to(device), mask.to(device).bool(), null)
        self.items = len(condition)
        self.passes = 0  # passes of one row, for reports
        self._memories: dict[tuple[tuple[int, ...], bool], TextMemory] = {}
        self._kept: dict[int, _Kept] = {}

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, step: Any) -> tuple[Tensor, Tensor | None]:
        """Logits of the codebook of the step.

        Args:
            tokens: (R, K, T) int64.
            step: :class:`nar_speech.sampling.step.StepInfo`.

        Returns:
            Conditional and unconditional float32 logits (M, V) of the M active positions, in their order, or
            (R, T, V) with ``all_positions``; None for the latter where nothing is guided.
        """
        self.network.check(tokens.shape[2], self.options.allow_longer)
        if max(step.items, default=0) >= self.items:
            raise InputError(f"item {max(step.items)}: there are texts for {self.items} items only")
        wanted = torch.ones_like(step.active) if self.options.all_positions else step.active
        guided = [step.guided and abs(g - 1) > CERTAIN for g in step.guidance.tolist()]
        if self.one_by_one:
            logits, null = self._each(tokens, step, wanted, guided)
        else:
            logits, null = self._together(tokens, step, wanted, any(guided))
        if self.options.all_positions:
            shape = (*wanted.shape, logits.shape[-1])
            logits = logits.view(shape)
            null = None if null is None else null.view(shape)
        return logits, null

    # ---- items one by one -------------------------------------------------------------------------------

    def _each(
        self, tokens: Tensor, step: Any, wanted: Tensor, guided: list[bool]
    ) -> tuple[Tensor, Tensor | None]:
        parts, nulls = [], []
        for row, (item, length) in enumerate(zip(step.items, step.lengths.tolist(), strict=True)):
            read = wanted[row].nonzero()[:, 0]
            inside = read[read < length]
            if len(inside) == 0:
                both = self._empty(len(read))
                both = both, both
            else:
                codes = tokens[row : row + 1, :, :length]
                both = self._item(codes, item, step, row, inside, guided[row])
                if len(inside) < len(read):  # positions of padding, asked for with all_positions
                    both = tuple(torch.cat([part, self._empty(len(read) - len(inside))]) for part in both)
            parts.append(both[0])
            nulls.append(both[1])
        return torch.cat(parts), torch.cat(nulls) if any(guided) else None

    def _item(
        self, codes: Tensor, item: int, step: Any, row: int, read: Tensor, guided: bool
    ) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional logits (A, V) of an item (1, K, T) at its A positions ``read``."""
        network, stage = self.network, step.stage
        memory = self._memory((item,), guided)
        codes = codes.repeat(1 + guided, 1, 1)
        self.passes += 1 + guided
        if self.options.reuse:
            x = self._reusing(codes, item, step, row, read, memory)
        else:
            low, high = int(read[0]), int(read[-1]) + 1
            x = network.run(codes, None, network.restricted(stage), memory, (low, high))[:, read - low]
        logits = network.logits(x, stage).float()
        return logits[0], logits[-1]

    def _empty(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.network.config.codebook_size, device=self.network.device)

    # ---- one batch --------------------------------------------------------------------------------------

    def _together(
        self, tokens: Tensor, step: Any, wanted: Tensor, guided: bool
    ) -> tuple[Tensor, Tensor | None]:
        network = self.network
        memory = self._memory(tuple(step.items), guided)
        lengths = step.lengths
        short = bool((lengths < tokens.shape[2]).any())
        times = 1 + guided
        self.passes += len(tokens) * times
        x = network.run(
            tokens.repeat(times, 1, 1),
            lengths.repeat(times) if short else None,
            network.restricted(step.stage),
            memory,
        )
        halves = [network.logits(half[wanted], step.stage).float() for half in x.chunk(times)]
        return halves[0], halves[1] if guided else None

    def _memory(self, items: tuple[int, ...], guided: bool) -> TextMemory:
        """The text of the rows: conditional ones, then the unconditional ones of a guided pass."""
        key = items, guided
        if key not in self._memories:
            if not self.one_by_one:  # batches of every combination of unfinished items would fill a GPU
                for old in [k for k in self._memories if k[0] != items]:
                    del self._memories[old]
            rows = [*items, *(self.items + item for item in items)] if guided else list(items)
            states, mask = (t[rows] for t in self.texts)
            if not self.options.official_padding:  # as it would be in any other batch
                longest = max(1, int(mask.sum(1).max()))
                if bool(mask[:, longest:].any()):
                    raise InputError("condition mask: the tokens of a text must come first, its padding last")
                states, mask = states[:, :longest], mask[:, :longest]
            self._memories[key] = self.network.remember(states, mask, self.options.official_padding)
        return self._memories[key]

    # ---- keys and values of earlier calls ---------------------------------------------------------------

    def _reusing(
        self, codes: Tensor, item: int, step: Any, row: int, read: Tensor, memory: TextMemory
    ) -> Tensor:
        """Outputs (2 or 1, A, D) at ``read``: a full pass now and then, and partial ones between."""
        kept, frames = self._kept.get(item), codes.shape[2]
        old = kept is None or kept.stage != step.stage or kept.age >= self.options.reuse
        if old or kept.keys[0].shape[2] != frames or kept.keys[0].shape[0] < len(codes):
            kept = self._kept[item] = _Kept(step.stage, 0, [], [])
            places = torch.arange(frames, device=codes.device)
        else:
            stale = step.changed[row, :frames].clone()
            stale[read] = True
            places = stale.nonzero()[:, 0]
            if len(codes) < kept.keys[0].shape[0]:
                kept.keys = [t[: len(codes)] for t in kept.keys]
                kept.values = [t[: len(codes)] for t in kept.values]
        kept.age += 1
        x = self._partial(codes, places, kept, step.stage, memory)
        return x[:, torch.searchsorted(places, read)]

    def _partial(self, codes: Tensor, places: Tensor, kept: _Kept, stage: int, memory: TextMemory) -> Tensor:
        """(R, A, D) at ``places``, whose keys and values replace the kept ones, or begin them."""
        network, context = self.network, self.network.config.context
        if len(places) == codes.shape[2]:
            plain = network.attention(len(codes), codes.shape[2], None, network.restricted(stage))

            def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                for store, new in ((kept.keys, key), (kept.values, value)):
                    new = new.transpose(1, 2).contiguous()
                    if len(store) > number:
                        store[number] = new
                    else:
                        store.append(new)
                return plain(number, query, key, value)

        else:
            mask = None
            if network.restricted(stage):
                frame = torch.arange(codes.shape[2], device=codes.device)
                mask = ((places[:, None] - frame).abs() <= context)[None, None]

            def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                keys, values = kept.keys[number], kept.values[number]
                keys[:, :, places], values[:, :, places] = key.transpose(1, 2), value.transpose(1, 2)
                coarse = network.blocks[number].coarse
                out = dot_product_attention(query.transpose(1, 2), keys, values, mask, coarse=coarse)
                return out.transpose(1, 2)

        x = network.embed(codes)[:, places]
        rotation = network.rotation(0, codes.shape[2])
        if rotation is not None:
            rotation = rotation[0][places], rotation[1][places]
        for number, block in enumerate(network.blocks):
            x = block(number, x, attend, memory, rotation)
        return x


def predictor(
    network: Magnet,
    condition: Tensor,
    mask: Tensor,
    null: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> MagnetPredictor:
    """A :class:`MagnetPredictor`; ``options`` are fields of :class:`PredictorOptions`."""
    return MagnetPredictor(network, condition, mask, null, replace(PredictorOptions(), **options))
