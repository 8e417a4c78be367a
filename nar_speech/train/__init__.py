"""Training: one plain loop under torchrun, optimizer and schedules, checkpoints that survive a kill."""

from nar_speech.train.distributed import World, gather_lists, init_world, leave_world, say, sum_over
from nar_speech.train.loop import TrainConfig, TrainResult, train
from nar_speech.train.optim import Ema, OptimConfig, average_weights, learning_rate
from nar_speech.train.saver import Saver, write_atomic

__all__ = [
    "Ema",
    "OptimConfig",
    "Saver",
    "TrainConfig",
    "TrainResult",
    "World",
    "average_weights",
    "gather_lists",
    "init_world",
    "learning_rate",
    "leave_world",
    "say",
    "sum_over",
    "train",
    "write_atomic",
]
