"""From a WeNet model folder to ours. Tensor names are the same on both sides, but for stored position tables.

A folder holds ``final.pt`` (or ``model.pt``, ``avg_*.pt``), ``train.yaml``, ``units.txt`` and maybe
``global_cmvn`` (JSON), which the checkpoint usually holds too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.cmvn import read_json_cmvn
from nar_speech.config import from_dict, read_yaml
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.features import Frontend, FrontendConfig
from nar_speech.layers.conformer import ConformerEncoderConfig
from nar_speech.models.ctc import CtcConfig, CtcModel
from nar_speech.models.ctc_decoder import AttentionDecoderConfig
from nar_speech.models.funasr import ModelParts, require
from nar_speech.text.tokenizer import TokenizerConfig, load_tokenizer
from nar_speech.types import ModelCard

# Position codes are computed here; some WeNet versions store their tables.
RENAME: dict[str, None] = {r"(?:.*\.)?(?:pos_enc|embed\.1)\.pe$": None}
WEIGHTS = ("final.pt", "model.pt", "final.safetensors", "model.safetensors")
# Options that change nothing here (speed, training only, or unused by WeNet itself) ...
IGNORED = {"use_sdpa", "gradient_checkpointing", "positionwise_conv_kernel_size", "tie_word_embedding"}
# ... and options with one supported value, the first.
ONE_VALUE = {
    "layer_norm_type": ("layer_norm",),
    "mlp_type": ("position_wise_feed_forward",),
    "n_kv_head": (None,),
    "head_dim": (None,),
    "conv_inner_factor": (2,),
    "n_expert": (8,),
    "n_expert_activated": (2,),
    "input_layer": ("embed",),
    "use_output_layer": (True,),
    "src_attention": (True,),
    "src_query_bias": (True,),
    "src_key_bias": (True,),
    "src_value_bias": (True,),
    "efficient_conf": (None,),
}


def _section(tree: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = tree.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {name}: expected a mapping of keys to values")
    return dict(value)


def _known(section: dict[str, Any], config_class: type, where: str) -> dict[str, Any]:
    """The keys of a WeNet section that our configuration has; others must be harmless."""
    names = {field.name for field in fields(config_class)}
    one_value = {key: values for key, values in ONE_VALUE.items() if key not in names}
    require(section, {key: one_value[key] for key in section if key in one_value}, where)
    return {k: v for k, v in section.items() if k not in IGNORED and k not in one_value}


def convert_config(
    tree: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = "train.yaml"
) -> CtcConfig:
    """Our configuration of the network a WeNet ``train.yaml`` describes.

    Args:
        tree: the official keys ``encoder``, ``encoder_conf``, ``decoder``, ``model_conf`` and so on.
        tensors: the checkpoint, for the sizes of features and vocabulary.
        where: named in errors.

    Raises:
        ConfigError: a model, option or key that has no counterpart here.
        CheckpointError: the checkpoint has no CTC head.
    """
    require(tree, {"model": ("asr_model", None), "ctc": ("ctc", None)}, where)
    require(tree, {"encoder": ("conformer",)}, where)
    head = tensors.get("ctc.ctc_lo.weight")
    if head is None:
        raise CheckpointError(
            f"{where}: the weights beside it hold no ctc.ctc_lo.weight; this is no CTC model"
        )
    features = _section(_section(tree, "dataset_conf", where), "fbank_conf", where)
    encoder = _known(_section(tree, "encoder_conf", where), ConformerEncoderConfig, f"{where}: encoder_conf")
    encoder["global_cmvn"] = "encoder.global_cmvn.mean" in tensors or tree.get("cmvn") == "global_cmvn"
    kind = tree.get("decoder", "bitransformer") or "none"
    decoder = _known(_section(tree, "decoder_conf", where), AttentionDecoderConfig, f"{where}: decoder_conf")
    if kind == "bitransformer" and not decoder.get("r_num_blocks"):
        raise ConfigError(f"{where}: decoder_conf: 'bitransformer' needs r_num_blocks above 0")
    model = _section(tree, "model_conf", where)
    special = _section(_section(tree, "tokenizer_conf", where), "special_tokens", where)
    known = ("ctc_weight", "reverse_weight", "lsm_weight", "length_normalized_loss")
    return from_dict(
        CtcConfig,
        {
            "input_size": tree.get("input_dim") or features.get("num_mel_bins", 80),
            "vocab_size": head.shape[0],
            "encoder": "conformer",
            "encoder_conf": encoder,
            "blank": _section(tree, "ctc_conf", where).get("ctc_blank_id", 0),
            "decoder": kind,
            "decoder_conf": decoder if kind != "none" else {},
            "sos": special.get("<sos>", head.shape[0] - 1),
            "eos": special.get("<eos>", head.shape[0] - 1),
            **{key: model[key] for key in known if key in model},
        },
        where,
    )


def build_frontend(tree: Mapping[str, Any], where: str) -> Frontend:
    """Kaldi filter bank of a ``train.yaml``; CMVN is inside the encoder and dither is for training only."""
    dataset = _section(tree, "dataset_conf", where)
    require(dataset, {"feats_type": ("fbank",)}, f"{where}: dataset_conf")
    fbank = _section(dataset, "fbank_conf", where)
    return Frontend(
        FrontendConfig(
            kind="fbank",
            sample_rate=_section(dataset, "resample_conf", where).get("resample_rate", 16000),
            num_mels=fbank.get("num_mel_bins", 80),
            window=fbank.get("window_type", "povey"),
            frame_ms=float(fbank.get("frame_length", 25)),
            shift_ms=float(fbank.get("frame_shift", 10)),
        )
    )


def load_official(folder: str | Path) -> ModelParts:
    """Read a WeNet folder; see :meth:`nar_speech.models.ctc.CtcModel.from_official`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder; check the path")
    where = str(folder / "train.yaml")
    tree = read_yaml(where)
    candidates = [folder / name for name in WEIGHTS] + sorted(folder.glob("avg_*.pt"))
    weights = next((path for path in candidates if path.is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder}: no weights; expected final.pt, model.pt or avg_*.pt")
    tensors = read_weights(weights)
    config = convert_config(tree, tensors, where)
    if config.encoder_conf["global_cmvn"] and "encoder.global_cmvn.mean" not in tensors:
        shift, scale = read_json_cmvn(folder / "global_cmvn")
        tensors |= {"encoder.global_cmvn.mean": -shift, "encoder.global_cmvn.istd": scale}
    with SkipInit():
        network = CtcModel(config)
    load_strict(network, tensors, RENAME, weights)
    frontend = build_frontend(tree, where)
    if frontend.feature_size != config.input_size:
        raise ConfigError(
            f"{where}: input_dim is {config.input_size}, fbank_conf.num_mel_bins {frontend.feature_size};"
            " they must be equal"
        )
    tokenizer = load_tokenizer(_tokenizer_config(tree, folder, where), folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the weights {config.vocab_size}; "
            "use the units.txt of this model"
        )
    card = ModelCard(
        name=folder.name,
        task="transcribe",
        model="ctc",
        sample_rate=frontend.config.sample_rate,
        licence="see the model's own page",
        source=f"WeNet, folder {folder.name}",
    )
    return ModelParts(network.eval(), frontend, tokenizer, card)


def _tokenizer_config(tree: Mapping[str, Any], folder: Path, where: str) -> TokenizerConfig:
    """``units.txt`` holds the pieces of character and BPE models alike."""
    names = ("units.txt", "lang_char.txt", "words.txt")
    units = next((name for name in names if (folder / name).is_file()), None)
    if units is None:
        raise ConfigError(f"{folder}: units.txt is missing; it lists the tokens of the model")
    require(tree, {"tokenizer": ("char", "bpe", None)}, where)
    return TokenizerConfig("char", units)
