"""Data for training: lhotse manifests in, tensors out."""

from nar_speech.data.augment import AugmentConfig, Augmenter, open_cuts, read_cut
from nar_speech.data.batch import IGNORE, Batch, collate
from nar_speech.data.loader import DataConfig, EvalData, TrainData, text_of
from nar_speech.data.seeding import derive_seed
from nar_speech.data.specaug import SpecAugmentConfig, spec_augment

__all__ = [
    "IGNORE",
    "AugmentConfig",
    "Augmenter",
    "Batch",
    "DataConfig",
    "EvalData",
    "SpecAugmentConfig",
    "TrainData",
    "collate",
    "derive_seed",
    "open_cuts",
    "read_cut",
    "spec_augment",
    "text_of",
]
