"""From the official configuration of a FunASR Paraformer to ours. Tensor names are the same on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.config import from_dict
from nar_speech.errors import ConfigError
from nar_speech.models.funasr import (
    ModelParts,
    build_card,
    build_frontend,
    build_tokenizer,
    read_folder,
    require,
    take,
)
from nar_speech.models.paraformer import Paraformer, ParaformerConfig, build_paraformer

VARIANTS = {
    "Paraformer": "paraformer",
    "ParaformerStreaming": "paraformer",
    "BiCifParaformer": "bicif",
    "ContextualParaformer": "contextual",
    "SeacoParaformer": "seaco",
}
PREDICTOR_KINDS = {"CifPredictor": "v1", "CifPredictorV2": "v2", "CifPredictorV3": "v3"}
TENSORFLOW = frozenset({"tf2torch_tensor_name_prefix_torch", "tf2torch_tensor_name_prefix_tf"})

ENCODER_DEFAULTS = {"output_size": 256, "num_blocks": 6, "attention_dropout_rate": 0.0}
ENCODER_KEYS = {
    "output_size": "output_size",
    "attention_heads": "attention_heads",
    "linear_units": "linear_units",
    "num_blocks": "num_blocks",
    "kernel_size": "kernel_size",
    "sanm_shfit": "shift",
    "dropout_rate": "dropout",
    "attention_dropout_rate": "attention_dropout",
}
ENCODER_ONE_VALUE = {
    "input_layer": ("pe", "pe_online"),
    "normalize_before": (True,),
    "concat_after": (False,),
    "selfattention_layer_type": ("sanm",),
    "positionwise_layer_type": ("linear",),
    "interctc_use_conditioning": (False,),
    "lora_list": (None,),
}
ENCODER_IGNORED = TENSORFLOW | {
    "pos_enc_class",
    "positional_dropout_rate",  # the official code never applies it
    "padding_idx",
    "positionwise_conv_kernel_size",
    "interctc_layer_idx",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
}

STREAM_ENCODER = "SANMEncoderChunkOpt"
WINDOW_KEYS = {  # lists of one value for each kind of window, and their defaults
    "chunk_size": ("size", 16),
    "stride": ("stride", 10),
    "pad_left": ("left", 0),
    "encoder_att_look_back_factor": ("encoder_look_back", 1),
    "decoder_att_look_back_factor": ("decoder_look_back", 1),
}

DECODER_DEFAULTS = {
    "num_blocks": 6,
    "att_layer_num": 6,
    "kernel_size": 21,
    "self_attention_dropout_rate": 0.0,
    "src_attention_dropout_rate": 0.0,
}
DECODER_KEYS = {
    "attention_heads": "attention_heads",
    "linear_units": "linear_units",
    "num_blocks": "num_blocks",
    "att_layer_num": "att_layer_num",
    "kernel_size": "kernel_size",
    "sanm_shfit": "shift",
    "dropout_rate": "dropout",
    "self_attention_dropout_rate": "self_attention_dropout",
    "src_attention_dropout_rate": "src_attention_dropout",
    "use_output_layer": "output_layer",
}
DECODER_ONE_VALUE = {
    "input_layer": ("embed",),
    "normalize_before": (True,),
    "concat_after": (False,),
    "lora_list": (None,),
}
DECODER_IGNORED = TENSORFLOW | {
    "pos_enc_class",
    "positional_dropout_rate",
    "wo_input_layer",  # handled below
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "chunk_multiply_factor",
}

PREDICTOR_KEYS = {
    "l_order": "l_order",
    "r_order": "r_order",
    "tail_threshold": "tail_threshold",
    "tail_mask": "tail_mask",
    "smooth_factor": "smooth_factor",
    "noise_threshold": "noise_threshold",
    "dropout": "dropout",
    "smooth_factor2": "smooth_factor2",
    "noise_threshold2": "noise_threshold2",
    "upsample_times": "upsample_times",
    "upsample_type": "upsample_type",
    "use_cif1_cnn": "use_cif1_cnn",
}
PREDICTOR_V3_DEFAULTS = {
    "smooth_factor2": 1.0,
    "noise_threshold2": 0.0,
    "upsample_times": 5,
    "upsample_type": "cnn",
    "use_cif1_cnn": True,
}

MODEL_DEFAULTS = {
    "ctc_weight": 0.5,
    "lsm_weight": 0.0,
    "length_normalized_loss": False,
    "predictor_weight": 0.0,
    "predictor_bias": 0,
    "sampling_ratio": 0.2,
    "share_embedding": False,
}


def encoder_conf(section: Mapping[str, Any], where: str = "encoder_conf") -> dict[str, Any]:
    """Numbers of an official SANMEncoder as those of :class:`nar_speech.layers.sanm.SANMEncoderConfig`."""
    require({"input_layer": "conv2d", **section}, ENCODER_ONE_VALUE, where)
    ignored = ENCODER_IGNORED | set(ENCODER_ONE_VALUE) | set(WINDOW_KEYS)
    return take({**ENCODER_DEFAULTS, **section}, ENCODER_KEYS, ignored, where)


def stream_conf(section: Mapping[str, Any], where: str = "encoder_conf") -> dict[str, Any]:
    """What an official SANMEncoderChunkOpt's section says of windows, as values of ``StreamConfig``.

    It leaves open how the model streams: that is 600 ms at a time with 300 ms of look-ahead here, and the
    look-back it was trained with for windows of that size.

    Raises:
        ConfigError: windows that are not numbers, or lists of them of different lengths.
    """
    if section.get("chunk_size") is None:
        return {"padded": True}
    columns = {}
    for key, (name, default) in WINDOW_KEYS.items():
        value = section.get(key)
        column = [default] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        columns[name] = column
    number = len(columns["size"])
    for name, column in columns.items():
        if not column or (len(column) < number and name == "stride"):
            raise ConfigError(f"{where}: stride: expected {number} values, as many as chunk_size has")
    # As there: too short a list stands for its first value.
    columns = {n: c if len(c) >= number else c[:1] * number for n, c in columns.items()}
    windows = [{name: column[i] for name, column in columns.items()} for i in range(number)]
    return {
        "encoder_look_back": columns["encoder_look_back"][-1],
        "decoder_look_back": columns["decoder_look_back"][-1],
        "windows": windows,
        "padded": True,
    }


def decoder_conf(section: Mapping[str, Any], where: str = "decoder_conf") -> dict[str, Any]:
    """Numbers of an official ParaformerSANMDecoder as those of SANMDecoderConfig."""
    require(section, DECODER_ONE_VALUE, where)
    ignored = DECODER_IGNORED | set(DECODER_ONE_VALUE)
    conf = take({**DECODER_DEFAULTS, **section}, DECODER_KEYS, ignored, where)
    if "sanm_shfit" in section and section["sanm_shfit"] is None:
        conf["shift"] = (conf["kernel_size"] - 1) // 2
    return {**conf, "embed": not section.get("wo_input_layer", False)}


def predictor_conf(kind: str, section: Mapping[str, Any], where: str = "predictor_conf") -> dict[str, Any]:
    """Numbers of an official CIF predictor as those of :class:`nar_speech.layers.cif.PredictorConfig`."""
    if kind != "CifPredictorV2":  # whose code reads the option and does not use it
        require(section, {"threshold": (1.0,)}, where)
    defaults: dict[str, Any] = {"tail_threshold": 0.45 if kind == "CifPredictor" else 0.0}
    ignored = TENSORFLOW | {"idim", "threshold"}
    if kind == "CifPredictorV3":
        defaults |= PREDICTOR_V3_DEFAULTS
        # Its code reads tail_mask and always puts the tail after the last valid frame.
        section = {key: value for key, value in section.items() if key != "tail_mask"}
    return take({**defaults, **section}, PREDICTOR_KEYS, ignored, where)


def convert_config(
    tree: Mapping[str, Any], input_size: int, vocab_size: int, where: str = "config.yaml"
) -> ParaformerConfig:
    """Our configuration of the network an official ``config.yaml`` describes.

    Args:
        tree: the official keys ``model``, ``model_conf``, ``encoder``, ``encoder_conf`` and so on.
        input_size: features per frame; vocab_size: number of tokens (the official yaml states neither).
        where: named in errors.

    Raises:
        ConfigError: a class, option or key that has no counterpart here.
    """
    _class(tree, "model", VARIANTS, where)
    _class(tree, "encoder", {"SANMEncoder": "", STREAM_ENCODER: ""}, where)
    _class(tree, "decoder", {"ParaformerSANMDecoder": "", "ContextualParaformerDecoder": ""}, where)
    kind = _class(tree, "predictor", PREDICTOR_KINDS, where)
    model = _section(tree, "model_conf", where)
    variant = VARIANTS[tree["model"]]
    streams = tree["model"] == "ParaformerStreaming" or tree["encoder"] == STREAM_ENCODER
    contextual_decoder = tree["decoder"] == "ContextualParaformerDecoder"
    if contextual_decoder != (variant == "contextual"):
        raise ConfigError(f"{where}: decoder '{tree['decoder']}' does not go with model '{tree['model']}'")
    return from_dict(
        ParaformerConfig,
        {
            "input_size": input_size,
            "vocab_size": vocab_size,
            "variant": variant,
            "encoder": "sanm",
            "encoder_conf": encoder_conf(_section(tree, "encoder_conf", where), f"{where}: encoder_conf"),
            "predictor": kind,
            "predictor_conf": predictor_conf(
                tree["predictor"], _section(tree, "predictor_conf", where), f"{where}: predictor_conf"
            ),
            "decoder_conf": decoder_conf(_section(tree, "decoder_conf", where), f"{where}: decoder_conf"),
            "hotword_conf": _hotword_conf(variant, tree, model, where),
            "stream": stream_conf(_section(tree, "encoder_conf", where), where) if streams else None,
            **{key: model.get(key, default) for key, default in MODEL_DEFAULTS.items()},
        },
        where,
    )


def _section(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = tree.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key}: expected a mapping of keys to values")
    return dict(value)


def _class(tree: Mapping[str, Any], key: str, known: Mapping[str, str], where: str) -> str:
    value = tree.get(key)
    if value not in known:
        raise ConfigError(f"{where}: {key} '{value}' is not supported; supported: {', '.join(known)}")
    return known[value]


def _hotword_conf(
    variant: str, tree: Mapping[str, Any], model: Mapping[str, Any], where: str
) -> dict[str, Any]:
    if variant not in ("contextual", "seaco"):
        return {}
    require(
        model, {"bias_encoder_type": ("lstm",), "use_decoder_embedding": (False,)}, f"{where}: model_conf"
    )
    conf: dict[str, Any] = {"inner_dim": model.get("inner_dim", 256)}
    if variant == "seaco":
        section = _section({**model, **tree}, "seaco_decoder_conf", where)
        conf |= {
            "bidirectional": model.get("bias_encoder_bid", False),
            "decoder": decoder_conf(section, f"{where}: seaco_decoder_conf"),
            "no_bias": model.get("NO_BIAS", 8377),
            "lsm_weight": model.get("seaco_lsm_weight", 0.0),
            "length_normalized_loss": model.get("seaco_length_normalized_loss", True),
        }
    return conf


def load_official(folder: str | Path) -> ModelParts:
    """Read an official folder; see :meth:`nar_speech.models.paraformer.Paraformer.from_official`."""
    found = read_folder(folder)
    frontend, tokenizer = build_frontend(found), build_tokenizer(found)
    config = convert_config(
        found.config, frontend.feature_size, tokenizer.vocab_size, str(found.path / "config.yaml")
    )
    with SkipInit():
        network: Paraformer = build_paraformer(config)
    load_strict(network, read_weights(found.weights), where=found.weights)
    card = build_card(found, "paraformer", frontend.config.sample_rate)
    return ModelParts(network.eval(), frontend, tokenizer, card)
