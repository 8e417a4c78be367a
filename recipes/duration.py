"""Train the predictor of phone durations, and the aligner that tells it the durations of recordings.

  python -m recipes.duration configs/maskgct/duration.yaml data.train=[data/train] ...
  torchrun --nproc-per-node 2 -m recipes.duration CONFIG.yaml ...

The aligner learns alone for some steps, then both. The same command goes on after any interruption. Results
in train.output_dir: checkpoints, train.jsonl, tensorboard/, loss.png, model/ and aligner/.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nar_speech import config as configs
from nar_speech.data.speech_tokens import SpeechTokenConfig, SpeechTokenData, SpeechTokenEval
from nar_speech.losses.flow import draw_durations
from nar_speech.models.duration import (
    Aligner,
    AlignerConfig,
    DurationConfig,
    DurationPredictor,
    aligner_terms,
    duration_loss,
)
from nar_speech.models.maskgct_part import TASK, write_part
from nar_speech.pipelines.maskgct_durations import DurationItem, sample_durations
from nar_speech.sampling.draws import seeded
from nar_speech.train import World, say, train
from nar_speech.train.distributed import sum_over
from nar_speech.train.loop import TrainConfig
from nar_speech.train.recipe import InitSection, load_initial, run_recipe
from nar_speech.types import ModelCard


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that can be set.

    Attributes:
        network: fields of DurationConfig, aligner: of AlignerConfig (:mod:`nar_speech.models.duration`).
        binarise_from: step from which the aligner is drawn to its best paths.
        predict_from: step from which the predictor learns their durations.
        binarisation: factor of that term of the aligner.
    """

    train: TrainConfig
    data: SpeechTokenConfig
    name: str = "duration"
    network: dict[str, Any] = field(default_factory=dict)
    aligner: dict[str, Any] = field(default_factory=dict)
    init: InitSection = field(default_factory=InitSection)
    binarise_from: int = 1000
    predict_from: int = 2000
    binarisation: float = 1.0

    def __post_init__(self) -> None:
        configs.check_range(self, 0, 1e9, "binarise_from", "predict_from", "binarisation")


def recipe(config: Recipe, world: World) -> None:
    """Data, models, loss, training, folders: in this order."""
    data = SpeechTokenData(config.data, config.train.seed, world.rank, world.size)
    sizes = {"codebook_size": data.index.semantic_size}
    torch.manual_seed(config.train.seed)
    aligner = Aligner(configs.from_dict(AlignerConfig, {**config.aligner, **sizes}, "aligner"))
    predictor = DurationPredictor(configs.from_dict(DurationConfig, config.network, "network"))
    model = nn.ModuleDict({"aligner": aligner, "duration": predictor})
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (aligner, predictor)]
    clips = f"{len(data.clips.places)} clips, {data.clips.left_out} left out"
    say(world, f"aligner {counts[0]:.2f} M, predictor {counts[1]:.2f} M parameters, {clips}")
    say(world, load_initial(model, config.init))

    def loss_step(model, batch, generator, step):
        sizes = batch.phone_lengths, batch.lengths
        found = aligner_terms(model["aligner"], batch.phones, batch.semantic, *sizes)
        terms = {"forward_sum": found.forward_sum, "binarisation": found.binarisation}
        loss = found.forward_sum
        if step >= config.binarise_from:
            loss = loss + config.binarisation * found.binarisation
        if step >= config.predict_from:
            draws = draw_durations(batch.phone_lengths, batch.phones.shape[1], generator)
            parts = batch.phones, found.durations, batch.phone_lengths, draws
            terms["flow"] = duration_loss(model["duration"], *parts)
            loss = loss + terms["flow"]
        return {"loss": loss, **{f"loss_{name}": value.detach() for name, value in terms.items()}}

    def validate(model):
        """The losses, and the mean error of sampled lengths of texts given the first third's durations."""
        sums = torch.zeros(5, dtype=torch.float64)
        for number, batch in enumerate(dev):
            generator = torch.Generator().manual_seed(number)
            draws = draw_durations(batch.phone_lengths, batch.phones.shape[1], generator)
            draws = type(draws)(
                *(getattr(draws, name).to(world.device) for name in draws.__dataclass_fields__)
            )
            batch = batch.to(world.device)
            found = aligner_terms(
                model["aligner"], batch.phones, batch.semantic, batch.phone_lengths, batch.lengths
            )
            flow = duration_loss(model["duration"], batch.phones, found.durations, batch.phone_lengths, draws)
            size = len(batch.ids)
            values = torch.stack([found.forward_sum, found.binarisation, flow]).double().cpu()
            error = length_error(model["duration"], batch, found.durations)
            sums += torch.cat([values * size, torch.tensor([error, size], dtype=torch.float64)])
        *sums, count = sum_over(world, sums)
        forward_sum, binarisation, flow, error = (torch.stack(sums) / count).tolist()
        metrics = {"forward_sum": forward_sum, "binarisation": binarisation, "flow": flow}
        return {"loss": forward_sum + flow, **metrics, "length_error": error}

    dev = SpeechTokenEval(config.data, world.rank, world.size, data.index) if config.data.dev else None
    result = train(config.train, model, loss_step, data, validate if dev is not None else None, world)
    if result.finished and world.main:
        for part, kind, folder in ((predictor, "duration", "model"), (aligner, "aligner", "aligner")):
            card = ModelCard(config.name, TASK, kind, data.index.sample_rate, metrics=result.metrics)
            say(world, f"folder: {write_part(f'{config.train.output_dir}/{folder}', part, card)}")


def length_error(predictor: DurationPredictor, batch, durations: torch.Tensor) -> float:
    """Summed relative errors of the sampled lengths of a batch, given the durations of each first third."""
    items, wanted = [], []
    for phones, frames, count in zip(batch.phones, durations, batch.phone_lengths.tolist(), strict=True):
        known = min(count // 3, count - 1)
        items.append(DurationItem(phones[:count], frames[:known].cpu()))
        wanted.append(float(frames[known:count].sum()))
    made = sample_durations(predictor, items, seeded(range(len(items))))
    return sum(abs(float(m.sum()) - w) / max(w, 1.0) for m, w in zip(made, wanted, strict=True))


if __name__ == "__main__":
    sys.exit(run_recipe(Recipe, recipe, sys.argv[1:], __doc__))
