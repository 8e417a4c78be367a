"""A tiny training task for the tests of the loop; run as a script it is the process that gets killed.

Usage: python -m tests.training_task MANIFEST OUTPUT_DIR key=value ...
"""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import nn

from nar_speech import config as configs
from nar_speech.data import AugmentConfig, DataConfig, TrainData
from nar_speech.train import OptimConfig, TrainConfig, init_world, leave_world, train

AUGMENT = AugmentConfig(speed=(0.9, 1.0, 1.1), volume_prob=0.5, reverb_prob=0.5)


class TinyModel(nn.Module):
    """Frames of 160 samples -> dropout -> mean -> logits over 8 classes of the first token."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(160, 16)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 8)

    def forward(self, waves: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        frames = waves[:, : waves.shape[1] // 160 * 160].unflatten(1, (-1, 160))
        valid = torch.arange(frames.shape[1]) < (lengths // 160).unsqueeze(1)
        hidden = self.dropout(torch.relu(self.encoder(frames * 10))) * valid.unsqueeze(-1)
        return self.head(hidden.sum(1) / valid.sum(1, keepdim=True).clamp(min=1))


def loss_step(model, batch, generator, step):
    """Cross entropy with a little noise from the generator, so that its seeding matters too."""
    logits = model(batch.waves, batch.wave_lengths)
    noise = torch.rand(logits.shape, generator=generator) * 0.01
    loss = nn.functional.cross_entropy((logits + noise).float(), batch.tokens[:, 0])
    time.sleep(float(os.environ.get("STEP_SLEEP", "0")))
    return {"loss": loss, "accuracy": (logits.argmax(1) == batch.tokens[:, 0]).float().mean()}


def tokenize(text: str) -> list[int]:
    """The number in "speaker 3"."""
    return [int(text.split()[-1])]


def validate(model) -> dict[str, float]:
    """Deterministic stand-in for a dev set: a norm of the weights."""
    return {"loss": float(model.head.weight.norm())}


def run(manifest: str, config: TrainConfig, workers: int = 0):
    """Train from scratch or go on; returns (result, model)."""
    world = init_world("cpu")
    torch.manual_seed(config.seed)
    model = TinyModel()
    data = TrainData(
        DataConfig(train=[manifest], batch_seconds=3.0, buckets=2, workers=workers, min_seconds=0.0),
        tokenize,
        AUGMENT,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        group=2,
    )
    result = train(config, model, loss_step, data, validate, world)
    if world.main:
        torch.save(model.state_dict(), os.path.join(config.output_dir, "final.pt"))
    leave_world(world)
    return result, model


if __name__ == "__main__":
    torch.set_num_threads(1)
    defaults = TrainConfig(
        "", device="cpu", threads=1, max_steps=30, save_every=4, validate_every=10,
        optim=OptimConfig(lr=0.01, warmup_steps=5, ema_decay=0.9),
    )  # fmt: skip
    words = [f"output_dir={sys.argv[2]}", *sys.argv[3:]]
    base = {key: value for key, value in configs.to_dict(defaults).items() if key != "output_dir"}
    path = os.path.join(os.path.dirname(sys.argv[2]), "base.yaml")
    configs.write_yaml(base, path)
    run(sys.argv[1], configs.load(TrainConfig, [path], words), workers=1)
