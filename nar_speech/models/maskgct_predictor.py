"""MaskGCT's networks as the masked-sampling loop calls them, without what no result depends on.

Exact, against the plain forward pass to rounding:

- the embedded steps and all adaptive gains are made once for a number of steps;
- phones, prompt and what is added to the codes are embedded once for an item (and layer);
- both passes of guidance are one packed sequence without padding, see
  :meth:`nar_speech.layers.diffllama.DiffLlama.packed`; the second is left out where the coefficient is 1;
- the last block computes the target alone, and the head only positions whose logits are read;
- items one by one on a CPU: then an item's numbers are the same to the last bit in any batch. On a GPU items
  go in one pack, and mates change results by rounding only.

Approximate, an option (``reuse``): between full passes the keys and values of phones and prompt are kept and
only the target is computed (as in dKV-Cache, arXiv 2505.15781; Fast-dLLM, arXiv 2505.22618).

Guidance is done here, not in the loop, because MaskGCT guides what stands before the head: from e with prompt
(and phones) and u without, e + (g - 1) (e - u) is brought back to the deviation of e for a part of it. The
deviation is the item's own, so that mates have no say; the official one over the batch is an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nar_speech.config import MAX_WIDTH, check_range
from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.diffllama import Kept, PackedLayout
from nar_speech.models.maskgct import S2A, T2S, Conditions, S2AItem, T2SItem

CERTAIN = 1e-6  # guidance this close to 1 is 1
MAX_REUSE = 10_000
Sizes = tuple[tuple[int, int, int], ...]  # kept positions, length and wanted rows of packed sequences


@dataclass(frozen=True)
class PredictorOptions:
    """How the network is computed.

    Attributes:
        rescale: part of the guided embeddings that is brought back to the deviation of those with prompt.
        batch_deviation: that deviation over all items together, as the official code takes it.
        guided_layers: guide only so many first layers of acoustic codes, for speed; 0: all.
        reuse: a full pass every so many calls of a stage, approximate ones between; 0 or 1: all are full.
        one_by_one: items one after the other; None: on a CPU.
        all_positions: give logits (R, T, V) of all positions, not only of those that are read.
    """

    rescale: float = 0.75
    batch_deviation: bool = False
    guided_layers: int = 0
    reuse: int = 0
    one_by_one: bool | None = None
    all_positions: bool = False

    def __post_init__(self) -> None:
        check_range(self, 0.0, 1.0, "rescale")
        check_range(self, 0, MAX_WIDTH, "guided_layers")
        check_range(self, 0, MAX_REUSE, "reuse")
        if self.reuse and self.one_by_one is False:
            raise ConfigError("reuse: works on items one by one; leave one_by_one out")


class MaskGCTPredictor:
    """``predict`` of the masked loops (:mod:`nar_speech.sampling`) for one batch of items.

    Args:
        network: in eval mode, best after :meth:`~nar_speech.models.maskgct.MaskedNetwork.prepare`.
        items: one for each item of the batch.
    """

    def __init__(
        self,
        network: T2S | S2A,
        items: Sequence[T2SItem] | Sequence[S2AItem],
        options: PredictorOptions | None = None,
    ):
        self.network, self.items = network, tuple(items)
        self.options = options or PredictorOptions()
        alone = self.options.one_by_one
        self.one_by_one = network.device.type == "cpu" if alone is None else alone
        self.one_by_one = self.one_by_one or self.options.reuse > 1
        self.passes = 0  # passes of one item, for reports
        self._gains: dict[int, Tensor] = {}
        self._conditions: dict[int, tuple[int, int, Conditions]] = {}
        self._layouts: dict[Sizes, PackedLayout] = {}
        self._kept: dict[int, tuple[int, Kept]] = {}  # calls since, and what an item's full pass has left

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, step: Any) -> tuple[Tensor, None]:
        """Guided logits of the codes of ``step.stage``.

        Args:
            tokens: (R, T) int64, or (R, K, T) with layers.
            step: :class:`nar_speech.sampling.step.StepInfo`.

        Returns:
            Float32 logits (M, V) of the M active positions, in their order, or (R, T, V) with
            ``all_positions``; and None, because they are guided.

        Raises:
            InputError: more items than the predictor was made for, or conditions that do not fit.
        """
        if max(step.items, default=0) >= len(self.items):
            raise InputError(f"item {max(step.items)}: there are conditions for {len(self.items)} only")
        guided = step.guided and not 0 < self.options.guided_layers <= step.stage
        strength = [g - 1 if guided and abs(g - 1) > CERTAIN else 0.0 for g in step.guidance.tolist()]
        lengths = step.lengths.tolist()
        rows = range(len(lengths))
        parts = [
            pair
            for chosen in ([[row] for row in rows] if self.one_by_one else [list(rows)])
            for pair in self._passes(tokens, step, chosen, lengths, strength)
        ]
        out = self._guide(parts, strength)
        if not self.options.all_positions:
            read = [x[step.active[row, : lengths[row]]] for row, x in enumerate(out)]
            if self.one_by_one:  # the same product whatever the mates
                return torch.cat([self._head(x, step.stage) for x in read]), None
            return self._head(torch.cat(read), step.stage), None
        heads = [self._head(x, step.stage) for x in out]
        logits = heads[0].new_zeros(*step.active.shape, heads[0].shape[-1])
        for row, part in enumerate(heads):
            logits[row, : len(part)] = part
        return logits, None

    def _head(self, x: Tensor, stage: int) -> Tensor:
        return self.network.head(x, stage).float()

    def _passes(
        self, tokens: Tensor, step: Any, rows: list[int], lengths: list[int], strength: list[float]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Embeddings (T, D) of the targets of ``rows`` with their prompts, and without where guided."""
        packed, bare = [], []
        sizes, bare_sizes = [], []
        kept = None
        for row in rows:
            known = self._known(step.items[row], step.stage, lengths[row])
            target = self.network.embed(tokens[row, ..., : lengths[row]])
            target = target if known.target is None else target + known.target
            if self.options.reuse > 1:
                kept = self._reused(step.items[row], len(known.prefix))
            if kept is not None and kept.pairs:
                packed.append(target)
                sizes.append((kept.size, len(target), len(target)))
            else:
                packed += [known.prefix, target]
                sizes.append((0, len(known.prefix) + len(target), len(target)))
            if strength[row]:
                bare.append(target)
                bare_sizes.append((0, len(target), len(target)))
        self.passes += len(sizes) + len(bare_sizes)
        order = [*rows, *(row for row in rows if strength[row])]
        x = self._run(torch.cat(packed + bare), (*sizes, *bare_sizes), step, order, kept)
        outputs = x.split([wanted for _, _, wanted in (*sizes, *bare_sizes)])
        without = iter(outputs[len(rows) :])
        return [(outputs[i], next(without) if strength[row] else None) for i, row in enumerate(rows)]

    def _reused(self, item: int, size: int) -> Kept | None:
        """What is kept of an item's prefix of ``size`` positions, empty where a full pass is due."""
        if size == 0:
            return None
        age, kept = self._kept.get(item, (0, None))
        if kept is None or age >= self.options.reuse:
            age, kept = 0, Kept(size, [])
        self._kept[item] = age + 1, kept
        return kept

    def _run(self, x: Tensor, sizes: Sizes, step: Any, order: list[int], kept: Kept | None) -> Tensor:
        """The packed sequences at the steps of the rows ``order``."""
        core = self.network.diff_estimator
        if sizes not in self._layouts:
            if len(self._layouts) > 4 * len(self.items):  # items that have left the batch
                self._layouts.clear()
            before, lengths, wanted = zip(*sizes, strict=True)
            width = core.config.width // core.config.heads
            self._layouts[sizes] = PackedLayout.of(lengths, wanted, width, x.device, before)
        return core.packed(x, self._layouts[sizes], self._gains_at(step, order), kept)

    def _gains_at(self, step: Any, order: list[int]) -> Tensor:
        """Gains (2L + 1, 1, D) of the rows ``order``, or (2L + 1, R, D) where their steps differ."""
        at = step.step.tolist()
        places = [at[row] for row in order]
        alike = len(set(places)) == 1
        if max(places) >= step.steps:  # rounds that refine have a time of their own
            time = step.time[order[:1] if alike else order]
            return self.network.diff_estimator.gains(time.to(self.network.device))
        gains = self._table(step.steps)
        return gains[:, places[0]][:, None] if alike else gains[:, places]

    def _table(self, steps: int) -> Tensor:
        """Gains (2L + 1, steps, D) of a stage of so many steps."""
        if steps not in self._gains:
            time = torch.tensor([1.0 - i * (1.0 / steps) for i in range(steps)], device=self.network.device)
            self._gains[steps] = self.network.diff_estimator.gains(time)
        return self._gains[steps]

    def _known(self, item: int, stage: int, length: int) -> Conditions:
        """The embedded conditions of an item, made once for a stage."""
        kept = self._conditions.get(item)
        if kept is None or kept[:2] != (stage, length):
            known = self.network.condition(self.items[item], stage, length)
            self._kept.pop(item, None)
            kept = self._conditions[item] = stage, length, known
        return kept[2]

    def _guide(self, parts: list[tuple[Tensor, Tensor | None]], strength: list[float]) -> list[Tensor]:
        """Guided and rescaled embeddings (T, D) of each row."""
        guided = [
            with_prompt if without is None else with_prompt + s * (with_prompt - without)
            for (with_prompt, without), s in zip(parts, strength, strict=True)
        ]
        share = self.options.rescale
        if not share or not any(strength):
            return guided
        if self.options.batch_deviation:
            both = torch.cat([x for x, _ in parts]), torch.cat(guided)
            factor = deviation(both[0]) / deviation(both[1])
            return [share * (x * factor) + (1 - share) * x for x in guided]
        out = []
        for (plain, _), x, s in zip(parts, guided, strength, strict=True):
            if s:
                x = share * (x * (deviation(plain) / deviation(x))) + (1 - share) * x
            out.append(x)
        return out


def deviation(x: Tensor) -> Tensor:
    """Unbiased standard deviation of all values, above 0."""
    return x.std().clamp_min(1e-12)


def predictor(
    network: T2S | S2A, items: Sequence[T2SItem] | Sequence[S2AItem], **options: Any
) -> MaskGCTPredictor:
    """A :class:`MaskGCTPredictor`; ``options`` are fields of :class:`PredictorOptions`."""
    return MaskGCTPredictor(network, items, replace(PredictorOptions(), **options))
