"""Tiny model folders with random weights, for tests of everything around the networks."""

from __future__ import annotations

import string
from pathlib import Path

import torch

from nar_speech import config as configs
from nar_speech.features import FrontendConfig
from nar_speech.model_folder import write_model_folder
from nar_speech.models.ctc import CtcConfig, CtcModel
from nar_speech.models.paraformer import ParaformerConfig, build_paraformer
from nar_speech.text.tokenizer import CharTokenizer
from nar_speech.types import ModelCard

PIECES = ["<blank>", "<s>", "</s>", "<unk>", "<space>", *string.ascii_lowercase]
SANM = {"output_size": 32, "attention_heads": 2, "linear_units": 48, "num_blocks": 2, "dropout": 0.0}
DECODER = {
    "attention_heads": 2,
    "linear_units": 48,
    "num_blocks": 2,
    "att_layer_num": 2,
    "kernel_size": 5,
    "dropout": 0.0,
}
CONFORMER = {"output_size": 32, "attention_heads": 2, "linear_units": 48, "num_blocks": 2}
LFR = FrontendConfig(kind="fbank", window="hamming", num_mels=20, lfr_m=7, lfr_n=6)


def paraformer_folder(
    folder: Path,
    seed: int = 0,
    decoding: dict | None = None,
    frontend: FrontendConfig = LFR,
    **network: object,
) -> Path:
    """A Paraformer with a CTC head; ``network`` replaces keys of its configuration."""
    tokenizer = CharTokenizer(PIECES, case="lower")
    tree = {
        "input_size": frontend.num_mels * frontend.lfr_m,
        "vocab_size": tokenizer.vocab_size,
        "encoder_conf": SANM,
        "predictor_conf": {"tail_threshold": 0.45},
        "decoder_conf": DECODER,
        "ctc_weight": 0.3,
        **network,
    }
    config = configs.from_dict(ParaformerConfig, tree)
    torch.manual_seed(seed)
    model = build_paraformer(config)
    return write_model_folder(folder, model, _card("paraformer"), frontend, config, tokenizer, decoding)


def ctc_folder(folder: Path, seed: int = 0, decoding: dict | None = None, **network: object) -> Path:
    """A WeNet type conformer with a CTC head and an attention decoder."""
    tokenizer = CharTokenizer(PIECES, case="lower")
    frontend = FrontendConfig(kind="fbank", num_mels=20)
    tree = {
        "input_size": 20,
        "vocab_size": tokenizer.vocab_size,
        "encoder_conf": CONFORMER,
        "decoder": "transformer",
        "decoder_conf": {"attention_heads": 2, "linear_units": 48, "num_blocks": 1},
        **network,
    }
    config = configs.from_dict(CtcConfig, tree)
    torch.manual_seed(seed)
    model = CtcModel(config)
    return write_model_folder(folder, model, _card("ctc"), frontend, config, tokenizer, decoding)


def _card(model: str) -> ModelCard:
    return ModelCard(name=f"tiny_{model}", task="transcribe", model=model, languages=("en",), licence="test")
