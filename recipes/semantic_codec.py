"""Train a semantic codec (RepCodec): one code a frame for features of a frozen speech model.

  python -m recipes.semantic_codec configs/maskgct/semantic.yaml data.train=[CUTS.jsonl.gz] data.dev=[...] ...
  torchrun --nproc-per-node 2 -m recipes.semantic_codec CONFIG.yaml ...

The same command goes on after any interruption. Results in train.output_dir: checkpoints, train.jsonl,
tensorboard/, loss.png and model/, the folder that python -m recipes.prepare_speech reads.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_speech import config as configs
from nar_speech.codec.repcodec import RepCodec, RepCodecConfig
from nar_speech.data.crops import CropConfig, CropData, CropEval
from nar_speech.errors import ConfigError
from nar_speech.models.speech_features import SpeechFeatures
from nar_speech.pipelines.semantic import (
    MODEL,
    TASK,
    load_features,
    start_codebooks,
    unquantized,
    write_semantic_folder,
)
from nar_speech.speech_folder import FeaturesConfig
from nar_speech.train import World, say, train
from nar_speech.train.distributed import sum_over
from nar_speech.train.loop import TrainConfig
from nar_speech.train.recipe import InitSection, load_initial, run_recipe
from nar_speech.types import ModelCard


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that can be set.

    Attributes:
        features: what is coded; frozen.
        network: fields of :class:`~nar_speech.codec.repcodec.RepCodecConfig`; the width is that of features,
            and there is one codebook.
        published_statistics: normalise by those that come with w2v-BERT; False: by those of the data.
        quantize_from: optimizer steps in which the decoder reads what the encoder gives, in as few dimensions
            as codes have; then every code becomes what some frame is.
        start_seconds: of sound from which statistics and codes are taken.
        store: how the weights are written: as those of the model that the codes are for will be.
    """

    train: TrainConfig
    data: CropConfig
    name: str = "semantic"
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    network: dict[str, Any] = field(default_factory=dict)
    init: InitSection = field(default_factory=InitSection)
    published_statistics: bool = False
    quantize_from: int = 0
    start_seconds: float = 600.0
    store: Literal["float32", "float16", "int8"] = "float32"

    def __post_init__(self) -> None:
        if self.published_statistics and self.features.kind != "w2vbert":
            raise ConfigError("published_statistics: there are none but those of w2vbert")


@torch.no_grad()
def features_of(features: SpeechFeatures, waves: Tensor, size: int = 32) -> Tensor:
    """(B, T, H) of many pieces (B, N), a few at once."""
    return torch.cat([features(part)[0] for part in waves.split(size)])


def recipe(config: Recipe, world: World) -> None:
    """Features and their statistics, model, data, loss, training, folder: in this order."""
    features = load_features(config.features).to(world.device)
    if config.data.sample_rate != features.sample_rate:
        raise ConfigError(f"data.sample_rate: {features.name} hears {features.sample_rate} Hz")
    data = CropData(config.data, 1, config.train.seed, world.rank, world.size)
    dev = CropEval(config.data, 1, world.rank, world.size)
    if not config.published_statistics:
        features.set_statistics(None)  # those of w2v-BERT come with it
        seen = features_of(features, data.sample(config.start_seconds).to(world.device)).flatten(0, 1)
        features.set_statistics((seen.mean(0), seen.var(0).clamp_min(1e-6)))
    sizes = {"hidden_size": features.width, "num_quantizers": 1, "quantizer_dropout": 0.0}
    network = configs.from_dict(RepCodecConfig, {**config.network, **sizes}, "network")
    torch.manual_seed(config.train.seed)
    codec = RepCodec(network)
    millions = sum(p.numel() for p in codec.parameters()) / 1e6
    say(world, f"semantic codec of {features.name}: {millions:.2f} M values, {network.codebook_size} codes")
    say(world, load_initial(codec, config.init))

    def loss_step(model, batch, generator, step):
        wanted = features_of(features, batch.waves)
        if step < config.quantize_from:
            loss = F.l1_loss(unquantized(model, wanted), wanted)
            return {"loss": loss, "l1": loss.detach()}
        if step == config.quantize_from and config.init.init_from is None:
            start_codebooks(model, features_of(features, data.sample(config.start_seconds).to(wanted)))
        out = model(wanted)
        l1, terms = F.l1_loss(out.features, wanted), out.quantized
        parts = {"l1": l1, "commitment": terms.commitment.mean(), "codebook": terms.codebook.mean()}
        return {"loss": l1 + terms.loss, **{name: value.detach() for name, value in parts.items()}}

    def validate(model):
        """``loss``: L1; ``variance``: part of it that codes explain; ``perplexity`` of the first codebook."""
        counts = torch.zeros(network.codebook_size, dtype=torch.float64)
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in dev:
            wanted = features_of(features, batch.to(world.device).waves)
            tokens = model.encode(wanted)
            got = model.decode(tokens)
            values = (got - wanted).abs().mean(), (got - wanted).square().mean(), wanted.square().mean()
            sums += torch.tensor([*map(float, values), 1.0], dtype=torch.float64) * len(wanted)
            counts += torch.bincount(tokens[:, 0].flatten().cpu(), minlength=len(counts))
        sums, counts = sum_over(world, sums), sum_over(world, counts)
        shares = counts / counts.sum().clamp_min(1)
        perplexity = float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
        explained = 1 - float(sums[1] / sums[2])
        return {"loss": float(sums[0] / sums[3]), "variance": explained, "perplexity": perplexity}

    result = train(config.train, codec, loss_step, data, validate, world)
    if result.finished and world.main:
        card = ModelCard(config.name, TASK, MODEL, features.sample_rate, metrics=result.metrics)
        parts = network, config.features, (features.mean.cpu(), features.variance.cpu()), card, config.store
        say(world, f"folder: {write_semantic_folder(f'{config.train.output_dir}/model', codec, *parts)}")


if __name__ == "__main__":
    sys.exit(run_recipe(Recipe, recipe, sys.argv[1:], __doc__))
