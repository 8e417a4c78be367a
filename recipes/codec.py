"""Train a codec: reconstruction of spectra, adversarial losses, codebooks of moving averages.

  python -m recipes.codec configs/codec/mini.yaml train.output_dir=exp/codec key=value ...
  torchrun --nproc-per-node 2 -m recipes.codec CONFIG.yaml ...

The same command goes on after any interruption. Results in train.output_dir: checkpoints, train.jsonl,
tensorboard/, loss.png and model/, the folder that nar-speech codec reads.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nar_speech import config as configs
from nar_speech.codec.folder import count_parameters, write_codec_folder
from nar_speech.codec.spectral import SpectralCodec, SpectralCodecConfig
from nar_speech.data.crops import CropConfig, CropData, CropEval
from nar_speech.errors import ConfigError
from nar_speech.layers.discriminator import MultiResolutionDiscriminator
from nar_speech.losses.gan import adversarial_losses
from nar_speech.losses.spectral import mel_distances
from nar_speech.train import World, say, train
from nar_speech.train.distributed import sum_over
from nar_speech.train.loop import TrainConfig
from nar_speech.train.recipe import InitSection, load_initial, run_recipe
from nar_speech.types import ModelCard


@dataclass(frozen=True)
class LossSection:
    """Factors of the losses; zero leaves one out. ``codes``: of the spectrogram that the codes tell."""

    mel: float = 15.0
    loudness: float = 10.0
    codes: float = 2.0
    commitment: float = 2.0
    adversarial: float = 1.0
    features: float = 2.0


@dataclass(frozen=True)
class GanSection:
    """Sizes of :class:`~nar_speech.layers.discriminator.MultiResolutionDiscriminator`.

    Attributes:
        start: optimizer steps without it.
    """

    start: int = 0
    windows: list[int] = field(default_factory=lambda: [256, 512, 1024])
    channels: int = 16
    layers: int = 4


@dataclass(frozen=True)
class Recipe:
    """Everything that can be set.

    Attributes:
        network: fields of :class:`~nar_speech.codec.spectral.SpectralCodecConfig`.
        levels: numbers of codebooks, one of which is drawn for each piece of a batch (quantizer dropout).
        quantize_from: optimizer steps in which the decoder reads the latents as they are.
        transform: begin with principal components; not with weights from elsewhere (``init``).
        start_seconds: of sound to which components and codebooks are fitted.
        validate_levels: numbers of codebooks that validation measures.
    """

    card: ModelCard
    network: dict[str, Any]
    data: CropConfig
    train: TrainConfig
    levels: list[int]
    validate_levels: list[int]
    quantize_from: int = 0
    transform: bool = True
    start_seconds: float = 400.0
    losses: LossSection = LossSection()
    gan: GanSection = GanSection()
    init: InitSection = field(default_factory=InitSection)


def recipe(config: Recipe, world: World) -> None:
    """Model, data, loss, training, model folder: in this order."""
    network = configs.from_dict(SpectralCodecConfig, config.network, "network")
    for levels in (config.levels, config.validate_levels):
        if not levels or not 1 <= min(levels) <= max(levels) <= network.num_codebooks:
            raise ConfigError(f"levels, validate_levels: name some of 1 to {network.num_codebooks} codebooks")
    if not config.data.sample_rate == config.card.sample_rate == network.sample_rate:
        raise ConfigError("data.sample_rate, card.sample_rate, network.sample_rate: must be equal")
    torch.manual_seed(config.train.seed)
    codec = SpectralCodec(network)
    judges = MultiResolutionDiscriminator(config.gan.windows, config.gan.channels, config.gan.layers)
    model = nn.ModuleDict({"codec": codec, "discriminator": judges})  # one optimizer moves both
    say(world, f"codec: {count_parameters(codec) / 1e6:.2f} M values, {codec.frame_rate:g} frames a second")
    say(world, load_initial(model, config.init))
    seed, rate = config.train.seed, config.data.sample_rate
    data = CropData(config.data, codec.hop, seed, world.rank, world.size)
    dev = CropEval(config.data, codec.hop, world.rank, world.size)
    choices = torch.tensor(config.levels, device=world.device)

    def loss_step(model, batch, generator, step):
        waves = batch.waves
        if step == 0 and config.transform:
            codec.start_transform(data.sample(config.start_seconds).to(waves))
        if step == config.quantize_from > 0:
            codec.start_codebooks(data.sample(config.start_seconds).to(waves))
        pick = torch.randint(len(choices), (len(waves),), generator=generator, device=waves.device)
        out = codec(waves, choices[pick], step >= config.quantize_from)
        mel, loudness = mel_distances(out.waves, waves, rate)
        terms = {"mel": mel, "loudness": loudness, "codes": out.mel_error}
        terms["commitment"] = out.quantized.commitment
        if step >= config.gan.start:
            own, terms["adversarial"], terms["features"] = adversarial_losses(judges, out.waves, waves)
            terms["discriminator"] = own
        loss = sum(getattr(config.losses, name, 1.0) * value for name, value in terms.items())
        return {"loss": loss, **{f"loss_{name}": value.detach() for name, value in terms.items()}}

    def validate(model):
        sums = torch.zeros(2 * len(config.validate_levels) + 1, dtype=torch.float64)
        for batch in dev:
            batch = batch.to(world.device)
            for n, levels in enumerate(config.validate_levels):
                out = codec(batch.waves, choices.new_full((len(batch.waves),), levels))
                distances = mel_distances(out.waves, batch.waves, rate)
                sums[2 * n : 2 * n + 2] += torch.stack(distances).double().cpu() * len(batch.waves)
            sums[-1] += len(batch.waves)
        *sums, count = sum_over(world, sums)
        means = (torch.stack(sums) / count).view(-1, 2).tolist()
        metrics = {"loss": sum(row[0] for row in means) / len(means)}
        for n, row in zip(config.validate_levels, means, strict=True):
            metrics[f"mel_{n}"], metrics[f"loudness_{n}"] = row
        return metrics

    result = train(config.train, model, loss_step, data, validate, world)
    if result.finished and world.main:
        card = replace(config.card, metrics=result.metrics)
        say(world, f"model folder: {write_codec_folder(f'{config.train.output_dir}/model', codec, card)}")


if __name__ == "__main__":
    sys.exit(run_recipe(Recipe, recipe, sys.argv[1:], __doc__))
