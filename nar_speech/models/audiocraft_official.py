"""Official MAGNeT and MusicGen checkpoints: audiocraft's ``state_dict.bin``, transformers' MusicGen folders.

``state_dict.bin`` holds the tensors ``best_state`` and, as text, the training configuration ``xp.cfg``, from
which the network's numbers come. The codec lies beside it (``compression_state_dict.bin``), the text encoder
is named. Pickles are read by PyTorch's weights-only reader.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from nar_speech.checkpoint import SkipInit, load_strict, read_weights, rename_tensors
from nar_speech.config import blame
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.layers.multistream import CONDITION, RENAME
from nar_speech.models.magnet import Magnet, MagnetConfig
from nar_speech.models.musicgen import MusicGen, MusicGenConfig
from nar_speech.text.conditioner import ConditionerConfig
from nar_speech.types import ModelCard

WEIGHTS, CODEC = "state_dict.bin", "compression_state_dict.bin"
MAGNET, MUSICGEN = "transformer_lm_magnet", "transformer_lm"
T5_SIZES = ("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b")
LICENCE = "CC-BY-NC 4.0 (see the model card)"

# Options that the released models share; others would need another network.
FIXED = {
    "norm": ("layer_norm",),
    "norm_first": (True,),
    "activation": ("gelu",),
    "positional_embedding": ("sin", "rope", "sin_rope"),
    "xpos": (False,),
    "positional_scale": (1.0,),
    "bias_ff": (False,),
    "bias_attn": (False,),
    "bias_proj": (False,),
    "layer_scale": (None,),
    "qk_layer_norm": (False,),
    "qk_layer_norm_cross": (False,),
    "kv_repeat": (1,),
    "cross_attention_pos_emb": (False,),
    "attention_as_float32": (False, True),
}

# Of transformers' MusicgenForConditionalGeneration, once query, key and value are one.
_LAYER = r"decoder\.model\.decoder\.layers\.(\d+)\."
TRANSFORMERS_RENAME = {
    r"text_encoder\.": None,
    r"audio_encoder\.": None,
    r"decoder\.model\.decoder\.embed_positions": None,
    r"enc_to_dec_proj": "condition_proj",
    r"decoder\.model\.decoder\.embed_tokens": "emb",
    r"decoder\.model\.decoder\.layer_norm": "out_norm",
    r"decoder\.lm_heads": "linears",
    _LAYER + "self_attn_layer_norm": r"transformer.layers.\1.norm1",
    _LAYER + "encoder_attn_layer_norm": r"transformer.layers.\1.norm_cross",
    _LAYER + "final_layer_norm": r"transformer.layers.\1.norm2",
    _LAYER + "encoder_attn": r"transformer.layers.\1.cross_attention",
    _LAYER + "fc": r"transformer.layers.\1.linear",
    _LAYER: r"transformer.layers.\1.",
}


@dataclass(frozen=True)
class OfficialSound:
    """What an official folder gives.

    Attributes:
        network: in eval mode, float32, on the CPU.
        codec: what :func:`nar_speech.codec.load.load_codec` takes.
        conditioner: the text encoder.
        generation: the numbers of the configuration's part ``generate.lm``, under their official names; the
            official API does not use them.
    """

    network: Magnet | MusicGen
    card: ModelCard
    codec: str
    conditioner: ConditionerConfig
    generation: dict[str, Any] = field(default_factory=dict)


def is_official_folder(folder: str | Path) -> bool:
    """Whether ``folder`` is one of audiocraft's language models or a MusicGen of transformers."""
    folder = Path(folder)
    return (folder / WEIGHTS).is_file() or _is_transformers(folder)


def from_official(folder: str | Path) -> OfficialSound:
    """Load an official folder.

    Raises:
        CheckpointError: weights that are missing, unsafe, or don't fit their configuration.
        ConfigError: a model of a kind that is not supported (melody and stereo MusicGen, others than T5).
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return _audiocraft(folder)
    if _is_transformers(folder):
        return _transformers(folder)
    raise CheckpointError(f"{folder}: neither {WEIGHTS} nor a MusicGen's config.json; check the path")


def read_package(path: str | Path) -> tuple[dict[str, Tensor], DictConfig]:
    """The tensors and the configuration of one of audiocraft's exported files.

    Raises:
        CheckpointError: the file is missing, damaged, asks for code, or lacks one of the two.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; it belongs to the model")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file torch.load raises a dozen kinds
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{path}: damaged, or not a plain audiocraft export ({type(error).__name__}: {reason}); get it"
            " again, from a source you trust"
        ) from error
    state = tree.get("best_state") if isinstance(tree, Mapping) else None
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    text = tree.get("xp.cfg") if isinstance(tree, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path}: has no tensors under 'best_state'; expected an audiocraft export")
    if not isinstance(text, str):
        raise CheckpointError(
            f"{path}: has no 'xp.cfg'; expected an audiocraft export with its configuration"
        )
    try:
        config = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{path}: xp.cfg is not valid YAML ({reason}); get the file again") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: xp.cfg is not a mapping of keys to values; get the file again")
    return dict(state), config


def _audiocraft(folder: Path) -> OfficialSound:
    path = folder / WEIGHTS
    tensors, config = read_package(path)
    where = f"{path}: xp.cfg"
    kind = _get(config, "lm_model")
    if kind not in (MAGNET, MUSICGEN):
        raise ConfigError(f"{where}: lm_model '{kind}' is not supported; expected {MAGNET} or {MUSICGEN}")
    for key, allowed in FIXED.items():
        value = _get(config, f"transformer_lm.{key}", allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{where}: transformer_lm.{key} {value!r} is not supported; expected {allowed[0]!r}"
            )
    encoder = _get(config, "conditioners.description.t5.name")
    others = [k for k in _get(config, "conditioners", {}) if k not in ("description", "args")]
    stereo = _get(config, "interleave_stereo_codebooks.use", False)
    if encoder is None or others or stereo:
        what = "stereo codes" if stereo else f"conditioners {', '.join(others) or 'other than T5'}"
        raise ConfigError(f"{where}: {what} are not supported; expected a mono model of text alone, with T5")
    numbers = _numbers(config, tensors, where)
    with blame(where):
        network_config = _magnet(config, numbers) if kind == MAGNET else _musicgen(config, numbers)
        with SkipInit():
            network = (Magnet if kind == MAGNET else MusicGen)(network_config)
    load_strict(network, tensors, RENAME, path)
    codec = folder / CODEC
    source = str(codec) if codec.is_file() else _get(config, "compression_model_checkpoint")
    if not isinstance(source, str):
        raise ConfigError(f"{folder}: {CODEC} is missing; it belongs to the model")
    name = {MAGNET: "magnet", MUSICGEN: "musicgen"}[kind]
    return OfficialSound(
        network.eval(),
        _card(folder, name, int(_get(config, "sample_rate", 32000))),
        source.removeprefix("//pretrained/"),
        ConditionerConfig("t5", _t5(str(encoder))),
        _plain(_get(config, "generate.lm", {})),
    )


def _numbers(config: DictConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """What both configurations share; the width of the text encoder is read off the weights."""
    projection = tensors.get(f"{CONDITION}.weight")
    if projection is None or projection.dim() != 2:
        raise CheckpointError(f"{where}: the weights lack {CONDITION}.weight; expected a model of text")
    names = {
        "num_codebooks": "n_q",
        "codebook_size": "card",
        "width": "dim",
        "heads": "num_heads",
        "num_blocks": "num_layers",
        "hidden_scale": "hidden_scale",
    }
    numbers = {}
    for ours, official in names.items():
        value = _get(config, f"transformer_lm.{official}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{where}: transformer_lm.{official}: expected a whole number, got {value!r}")
        numbers[ours] = value
    return {
        **numbers,
        "text_width": projection.shape[1],
        "frame_rate": float(_get(config, "transformer_lm.compression_model_framerate", 50)),
        "segment_seconds": float(_get(config, "dataset.segment_duration", 30)),
        "positions": str(_get(config, "transformer_lm.positional_embedding", "sin")),
    }


def _magnet(config: DictConfig, numbers: Mapping[str, Any]) -> MagnetConfig:
    if _get(config, "transformer_lm.causal", False):
        raise ConfigError("transformer_lm.causal: true does not go with a masked model")
    return MagnetConfig(
        **numbers,
        context=int(_get(config, "transformer_lm.subcodes_context", -1)),
        span_len=int(_get(config, "masking.span_len", 3)),
    )


def _musicgen(config: DictConfig, numbers: Mapping[str, Any]) -> MusicGenConfig:
    pattern = _get(config, "codebooks_pattern.modeling", "delay")
    if pattern != "delay" or _get(config, "codebooks_pattern.delay.flatten_first", 0):
        raise ConfigError(f"codebooks_pattern: '{pattern}' is not supported; expected plain 'delay'")
    delays = _plain(_get(config, "codebooks_pattern.delay.delays"))
    stride = float(_get(config, "generate.extend_stride", 18))
    return MusicGenConfig(**numbers, delays=None if delays is None else tuple(delays), stride_seconds=stride)


def _transformers(folder: Path) -> OfficialSound:
    """A folder of transformers' MusicgenForConditionalGeneration."""
    tree = _json(folder / "config.json")
    decoder, encoder, audio = (tree.get(k) or {} for k in ("decoder", "text_encoder", "audio_encoder"))
    where = str(folder / "config.json")
    if decoder.get("audio_channels", 1) != 1:
        raise ConfigError(f"{where}: stereo models are not supported; expected a mono one")
    if encoder.get("model_type", "t5") != "t5":
        raise ConfigError(
            f"{where}: text encoder '{encoder.get('model_type')}' is not supported; expected t5"
        )
    tensors = _join_projections(read_folder_weights(folder))
    width, text = decoder.get("hidden_size", 1024), encoder.get("d_model", 768)
    with blame(where):
        config = MusicGenConfig(
            num_codebooks=decoder.get("num_codebooks", 4),
            codebook_size=decoder.get("vocab_size", 2048),
            width=width,
            heads=decoder.get("num_attention_heads", 16),
            num_blocks=decoder.get("num_hidden_layers", 24),
            hidden_scale=decoder.get("ffn_dim", 4 * width) // width,
            text_width=text,
            frame_rate=_frame_rate(audio),
        )
        with SkipInit():
            network = MusicGen(config)
    renamed = rename_tensors(tensors, TRANSFORMERS_RENAME, folder)
    if text == width and "condition_proj.weight" not in renamed:  # it has none where none is needed
        renamed |= {"condition_proj.weight": torch.eye(width), "condition_proj.bias": torch.zeros(width)}
    load_strict(network, renamed, where=folder)
    codec = audio.get("_name_or_path") or "facebook/encodec_32khz"
    rate = int(audio.get("sampling_rate", 32000))
    return OfficialSound(
        network.eval(), _card(folder, "musicgen", rate), codec, ConditionerConfig("t5", str(folder))
    )


def _frame_rate(audio: Mapping[str, Any]) -> float:
    hop = 1
    for ratio in audio.get("upsampling_ratios", (8, 5, 4, 4)):
        hop *= ratio
    return audio.get("sampling_rate", 32000) / hop


def _join_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value weights one under the other, as audiocraft has them."""
    joined = dict(tensors)
    for name in [n for n in tensors if n.startswith("decoder.") and n.endswith(".q_proj.weight")]:
        base = name.removesuffix(".q_proj.weight")
        parts = [joined.pop(f"{base}.{p}_proj.weight", None) for p in "qkv"]
        if any(p is None for p in parts):
            raise CheckpointError(f"{base}: one of its projections is missing; get the weights again")
        joined[f"{base}.in_proj_weight"] = torch.cat(parts)
    return joined


def read_folder_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of transformers, in one file or several."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set((_json(index).get("weight_map") or {}).values()))
        return {k: v for name in names for k, v in read_weights(folder / Path(name).name).items()}
    found = [folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: no model.safetensors; it belongs to the model")
    return read_weights(found[0])


def _is_transformers(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and _json(path).get("model_type") == "musicgen"


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable JSON ({type(error).__name__}); get it again") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return tree


def _card(folder: Path, model: str, sample_rate: int) -> ModelCard:
    return ModelCard(
        name=folder.name,
        task="generate",
        model=model,
        sample_rate=sample_rate,
        licence=LICENCE,
        source="Meta",
    )


def _t5(name: str) -> str:
    return f"google-t5/{name}" if name in T5_SIZES else name


def _get(config: DictConfig, key: str, default: Any = None) -> Any:
    """A value of the configuration; those whose interpolation leads nowhere count as missing."""
    value = OmegaConf.select(config, key, throw_on_resolution_failure=False)
    return default if value is None else value


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
