"""An official Paraformer folder with random weights, and noise to recognise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nar_speech import config as configs
from nar_speech.models.paraformer import build_paraformer
from nar_speech.models.paraformer_official import convert_config

RATE = 16000
CIF_BIAS = -1.0  # random weights then give about 4.5 tokens a second, as speech does


@dataclass(frozen=True)
class Size:
    """Numbers of the random model."""

    blocks: int
    width: int
    units: int
    decoder_blocks: int
    vocab: int


SIZES = {"large": Size(50, 512, 2048, 16, 8404), "tiny": Size(2, 64, 96, 2, 60)}


def write_folder(folder: Path, size: Size, seed: int = 0) -> Path:
    """An official FunASR model folder with random weights; no dither, so that results can be compared."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = model_tree(folder, size)
    configs.write_yaml(tree, folder / "config.yaml")
    torch.manual_seed(seed)
    network = build_paraformer(convert_config(tree, 560, size.vocab))
    with torch.no_grad():
        network.predictor.cif_output.bias.fill_(CIF_BIAS)
    torch.save({"state_dict": network.state_dict()}, folder / "model.pt")
    write_lists(folder, size)
    return folder


def write_lists(folder: Path, size: Size) -> list[str]:
    """``tokens.json`` and ``am.mvn``; returns the tokens."""
    pieces = ["<blank>", "<s>", "</s>", *(chr(0x4E00 + n) for n in range(size.vocab - 4)), "<unk>"]
    (folder / "tokens.json").write_text(json.dumps(pieces))
    parts = [
        f"<{name}> 560 560\n<LearnRateCoef> 0 [ {' '.join([value] * 560)} ]\n"
        for name, value in (("AddShift", "-8.0"), ("Rescale", "0.25"))
    ]
    (folder / "am.mvn").write_text(f"<Nnet>\n<Splice> 560 560\n[ 0 ]\n{''.join(parts)}</Nnet>\n")
    return pieces


def model_tree(folder: Path, size: Size) -> dict:
    """The official ``config.yaml``."""
    return {
        "model": "Paraformer",
        "model_conf": {"ctc_weight": 0.0, "lsm_weight": 0.1, "predictor_bias": 1, "sampling_ratio": 0.75},
        "encoder": "SANMEncoder",
        "encoder_conf": {
            "output_size": size.width,
            "attention_heads": 4,
            "linear_units": size.units,
            "num_blocks": size.blocks,
            "input_layer": "pe",
            "pos_enc_class": "SinusoidalPositionEncoder",
            "normalize_before": True,
            "kernel_size": 11,
            "sanm_shfit": 0,
            "selfattention_layer_type": "sanm",
        },
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": {
            "attention_heads": 4,
            "linear_units": size.units,
            "num_blocks": size.decoder_blocks,
            "att_layer_num": size.decoder_blocks,
            "kernel_size": 11,
            "sanm_shfit": 0,
        },
        "predictor": "CifPredictorV2",
        "predictor_conf": {
            "idim": size.width,
            "threshold": 1.0,
            "l_order": 1,
            "r_order": 1,
            "tail_threshold": 0.45,
        },
        "frontend": "WavFrontend",
        "frontend_conf": {
            "fs": RATE,
            "window": "hamming",
            "n_mels": 80,
            "frame_length": 25,
            "frame_shift": 10,
            "lfr_m": 7,
            "lfr_n": 6,
            "dither": 0.0,
            "cmvn_file": str(folder / "am.mvn"),
        },
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {
            "token_list": str(folder / "tokens.json"),
            "unk_symbol": "<unk>",
            "split_with_space": True,
        },
    }


def online_tree(folder: Path, size: Size) -> dict:
    """The same of Paraformer-online."""
    tree = model_tree(folder, size)
    tree |= {
        "model": "ParaformerStreaming",
        "encoder": "SANMEncoderChunkOpt",
        "frontend": "WavFrontendOnline",
    }
    windows = {"input_layer": "pe_online", "chunk_size": [15], "stride": [10], "pad_left": [0]}
    del tree["encoder_conf"]["pos_enc_class"]
    tree["encoder_conf"] |= windows
    tree["decoder_conf"]["sanm_shfit"] = 5  # the token memory looks back only
    return tree


def noise(seconds: float, seed: int) -> np.ndarray:
    """(N,) float32 at 16 kHz: noise whose loudness goes up and down as syllables do."""
    random = np.random.default_rng(seed)
    samples = round(seconds * RATE)
    loudness = 0.05 * (1.1 + np.sin(2 * np.pi * 4 * np.arange(samples) / RATE))
    return (random.standard_normal(samples) * loudness).astype(np.float32)
