"""From a name to a codec: our folders, transformers', MaskGCT's, files of audiocraft, encodec and DAC.

``load_codec`` tells them apart by what is in them; every failure is one line that names the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from nar_speech import config as configs
from nar_speech import locate
from nar_speech.checkpoint import SkipInit, load_strict, read_tree, read_weights
from nar_speech.codec import dac, encodec, maskgct, mimi
from nar_speech.codec.base import Codec
from nar_speech.codec.dac import DacCodec
from nar_speech.codec.encodec import EncodecCodec
from nar_speech.codec.mimi import MimiCodec
from nar_speech.errors import CheckpointError, ConfigError, HubError

DEFAULT_CODEC = "mini_codec"  # ships with the package
ALIASES = {
    "encodec_24khz": "facebook/encodec_24khz",
    "encodec_32khz": "facebook/encodec_32khz",
    "encodec_48khz": "facebook/encodec_48khz",
    "dac_16khz": "descript/dac_16khz",
    "dac_24khz": "descript/dac_24khz",
    "dac_44khz": "descript/dac_44khz",
    "mimi": "kyutai/mimi",
    "maskgct": "amphion/MaskGCT",
}
PARTS = {"amphion/MaskGCT": (f"{maskgct.FOLDER}/*",)}  # of a repository that holds more than the codec
ACCEPTED = (
    "our folder (model.yaml), a folder of transformers (config.json of encodec, dac or mimi), audiocraft's"
    " compression_state_dict.bin, a .th file of the encodec package, DAC's weights.pth, a folder of MaskGCT"
    " (acoustic_codec)"
)
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
AUDIOCRAFT_FILE = "compression_state_dict.bin"

logger = logging.getLogger(__name__)


def load_codec(
    name: str | Path = "default",
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
) -> Codec:
    """Load a codec, in float32 and evaluation mode, without gradients.

    Args:
        name: ``default``, an embedded codec, a folder, a file, one of ``ALIASES``, or a hub id.
        device: where it goes.
        cache_dir, offline: see :func:`nar_speech.locate.resolve`.

    Raises:
        HubError: there is no such codec. ConfigError, CheckpointError: what is wrong with its files.
    """
    codec = _load(name, cache_dir, offline, ())
    return codec.eval().requires_grad_(False).to(device)


def _load(
    name: str | Path, cache_dir: str | Path | None, offline: bool | None, seen: tuple[str, ...]
) -> Codec:
    """The codec; ``seen``: the names that led here, each of which only named the next."""
    text = str(name)
    if text in seen or len(seen) > 3:
        raise CheckpointError(
            f"{' -> '.join((*seen, text))}: files that name each other; get the codec again"
        )
    place = _place(name, cache_dir, offline)
    title = re.sub(r"@.*", "", text.rstrip("/")).rsplit("/", 1)[-1]
    title = place.name if title in ("default", ".", "..", "") else title
    if place.is_dir():
        loaded = _from_folder(place, title)
    else:
        loaded = _from_file(place, Path(title).stem if title != AUDIOCRAFT_FILE else place.parent.name)
    return loaded if isinstance(loaded, Codec) else _load(loaded, cache_dir, offline, (*seen, text))


def _place(name: str | Path, cache_dir: str | Path | None, offline: bool | None) -> Path:
    """The folder or file of a codec."""
    wanted = DEFAULT_CODEC if name == "default" else name
    path = Path(str(wanted)).expanduser()
    embedded = isinstance(wanted, str) and (locate.ASSETS / wanted / "model.yaml").is_file() and wanted
    if embedded:
        return locate.ASSETS / wanted
    if wanted == DEFAULT_CODEC and not path.is_dir():
        raise HubError(
            f"codec '{DEFAULT_CODEC}': nar_speech/assets/{DEFAULT_CODEC} is not in this installation; install"
            " the package again, or name a codec with --codec"
        )
    if wanted != "" and (path.is_file() or path.is_dir()):
        return path
    if isinstance(wanted, str) and wanted in ALIASES:
        wanted = ALIASES[wanted]
    if "/" not in str(wanted):
        known = ", ".join((DEFAULT_CODEC, *ALIASES))
        raise HubError(
            f"{wanted or '(empty name)'}: no such codec or file; give one of {known}, a path or a hub id"
        )
    return locate.resolve(wanted, cache_dir, offline, PARTS.get(str(wanted).partition("@")[0]))


def _from_folder(folder: Path, title: str) -> Codec | str:
    """The codec in a folder, or the name of another that the folder stands for."""
    if (folder / "model.yaml").is_file():
        from nar_speech.codec.folder import TASK, read_codec_folder

        card = configs.read_yaml(folder / "model.yaml").get("card")
        task = card.get("task") if isinstance(card, Mapping) else None
        if task != TASK:
            raise ConfigError(f"{folder}/model.yaml: is a model for '{task}', not a codec (task '{TASK}')")
        return read_codec_folder(folder)[0]
    if (folder / "config.json").is_file():
        return _from_transformers(folder, title)
    official = maskgct.official_folder(folder)
    if official is not None:
        return maskgct.load_official(official, "maskgct" if title == maskgct.FOLDER else title)
    if (folder / "config.yaml").is_file() and "head" in configs.read_yaml(folder / "config.yaml"):
        raise ConfigError(f"{folder}: is a vocoder (Vocos), which has no tokens; a codec is needed")
    found = [folder / AUDIOCRAFT_FILE] if (folder / AUDIOCRAFT_FILE).is_file() else []
    found = found or sorted(p for p in folder.iterdir() if p.suffix in (".th", ".pth"))
    if len(found) > 1:
        raise HubError(f"{folder}: has {len(found)} weights files; name the one that is meant")
    if found:
        return _from_file(found[0], title)
    weights = next((p.name for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin")), None)
    what = f"{weights} without its config.json" if weights else "neither configuration nor weights"
    raise HubError(f"{folder}: not a codec's folder, {what}; accepted: {ACCEPTED}")


def _from_transformers(folder: Path, title: str) -> Codec:
    """A folder with ``config.json``."""
    where = folder / "config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: not valid JSON ({' '.join(str(error).split())}); get the file again"
        ) from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("encodec", "dac", "mimi"):
        raise ConfigError(f"{where}: model_type '{kind}' is not a codec; supported: encodec, dac, mimi")
    weights = next((folder / name for name in HF_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder}: has config.json but no {' or '.join(HF_WEIGHTS)}; get the weights")
    tensors = read_weights(weights)
    config = {key: value for key, value in config.items() if key != "model_type"}
    shortcuts = any(".shortcut." in name for name in tensors)
    if kind == "encodec" and config.get("use_conv_shortcut", True) and not shortcuts:
        # So it is in an early config.json of encodec_32khz.
        logger.warning("%s: use_conv_shortcut is true, but the weights have no such layers; not used", where)
        config["use_conv_shortcut"] = False
    return _built(kind, config, tensors, str(where), weights, title)


def _built(
    kind: str, config: dict[str, Any], tensors: Mapping[str, Tensor], where: str, weights: Path, title: str
) -> Codec:
    """A codec with these weights, under any of the names that they may have."""
    make: dict[str, Callable[[], Codec]] = {
        "encodec": lambda: EncodecCodec(config, name=title),
        "dac": lambda: DacCodec(config, title),
        "mimi": lambda: MimiCodec(config, title),
    }
    with configs.blame(where), SkipInit():
        codec = make[kind]()
    return _filled(codec, tensors, weights)


def _filled(
    codec: EncodecCodec | DacCodec | MimiCodec, tensors: Mapping[str, Tensor], weights: Path
) -> Codec:
    """``codec`` with its weights."""
    if isinstance(codec, EncodecCodec):
        tensors = encodec.rename(tensors, str(weights))
    elif isinstance(codec, DacCodec):
        tensors = dac.rename(tensors, codec.blocks, str(weights))
    else:
        tensors = mimi.rename(tensors)
    load_strict(codec.model, tensors, where=weights)
    if isinstance(codec, MimiCodec):
        codec.forget_vectors()
    return codec.fold() if isinstance(codec, EncodecCodec) else codec


def _from_file(path: Path, title: str) -> Codec | str:
    """The codec in a weights file that brings its configuration, or the name of another."""
    if path.suffix in (".safetensors", ".json", ".yaml"):
        raise CheckpointError(f"{path}: is only a part of a codec; name the folder that it lies in")
    tree = read_tree(path)
    if isinstance(tree, Mapping) and isinstance(tree.get("pretrained"), str):
        return tree["pretrained"]
    if isinstance(tree, Mapping) and "best_state" in tree:
        return _from_audiocraft(tree, path, title)
    if isinstance(tree, Mapping) and "state_dict" in tree and "metadata" in tree:
        kwargs = tree["metadata"].get("kwargs") if isinstance(tree["metadata"], Mapping) else None
        if not isinstance(kwargs, Mapping):
            raise CheckpointError(f"{path}: has no metadata.kwargs; expected a file of descript-audio-codec")
        with configs.blame(str(path)):
            config = dac.official_config(kwargs)
        return _built("dac", config, _tensors(tree["state_dict"], path), str(path), path, title)
    tensors = read_weights(path)
    if not any(name.startswith("quantizer.vq.layers.0.") for name in tensors):
        raise CheckpointError(f"{path}: not the weights of a codec known here; accepted: {ACCEPTED}")
    config = _package_config(tensors, path)
    return _built("encodec", config, tensors, str(path), path, title)


def _from_audiocraft(tree: Mapping[str, Any], path: Path, title: str) -> Codec:
    """``best_state`` and ``xp.cfg`` of an export."""
    state, text = tree["best_state"], tree.get("xp.cfg")
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    tensors = _tensors(state, path)
    with configs.blame(f"{path}: xp.cfg"):
        if not isinstance(text, str | Mapping):
            raise ConfigError("is missing; expected an audiocraft export with its configuration")
        cfg = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
        if not isinstance(cfg, dict) or cfg.get("compression_model") not in (None, "encodec"):
            kind = cfg.get("compression_model") if isinstance(cfg, dict) else None
            raise ConfigError(f"compression_model '{kind}' is not supported; only encodec is")
        for part in ("seanet", "rvq"):
            if not isinstance(cfg.get(part), dict):
                raise ConfigError(f"part '{part}' is missing; is this the checkpoint of a codec?")
        section = cfg.get("encodec") or {}
        numbers = {}
        for key, source in (
            ("sample_rate", cfg),
            ("channels", cfg),
            ("n_q", cfg["rvq"]),
            ("bins", cfg["rvq"]),
        ):
            value = section.get(key, source.get(key)) if source is cfg else source.get(key)
            if not isinstance(value, int):
                raise ConfigError(f"{key}: got {value!r}; must be a whole number")
            numbers[key] = value
        seanet = {**cfg["seanet"], "causal": section.get("causal", cfg["seanet"].get("causal", False))}
        config, lstm = encodec.audiocraft_config(
            seanet,
            numbers["sample_rate"],
            numbers["channels"],
            numbers["n_q"],
            numbers["bins"],
            bool(section.get("renormalize", False)),
        )
        with SkipInit():
            codec = EncodecCodec(config, lstm, title)
    return _filled(codec, tensors, path)


def _package_config(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The configuration of a file of the encodec package, which does not say it: by names and shapes."""

    def shape(*names: str) -> tuple[int, ...]:
        for name in names:
            if name in tensors:
                return tuple(tensors[name].shape)
        raise CheckpointError(f"{path}: {names[0]} is missing; expected a file of the encodec package")

    first = shape("encoder.model.0.conv.conv.weight_v", "encoder.model.0.conv.conv.weight")
    if first[1] not in encodec.PACKAGE_MODELS:
        raise CheckpointError(f"{path}: a codec of {first[1]} channels; the encodec package has 1 and 2")
    strides = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"decoder\.model\.(\d+)\.convtr\.convtr\.(weight_v|weight)", name)
        if match:
            strides[int(match[1])] = tensor.shape[2] // 2
    bins, width = shape("quantizer.vq.layers.0._codebook.embed")
    ratios = [strides[place] for place in sorted(strides)]
    levels = sum(name.endswith("._codebook.embed") for name in tensors)
    known = encodec.PACKAGE_MODELS[first[1]]
    return {
        **known,
        "target_bandwidths": encodec.bandwidths_for(levels, bins, known["sampling_rate"], ratios),
        "num_filters": first[0],
        "hidden_size": width,
        "codebook_size": bins,
        "upsampling_ratios": ratios,
    }


def _tensors(state: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path}: holds no plain tensors where the weights should be; get the file again"
        )
    return dict(state)


def fingerprint(codec: Codec) -> str:
    """What tells a codec's codebooks from any other's, 16 hexadecimal digits; "" where it has none."""
    digest, found = hashlib.sha256(), False
    for name, tensor in sorted(codec.state_dict().items()):
        if "quantizer" in name and name.endswith((".embed", ".embed_sum", ".codebook.weight")):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            found = True
    return digest.hexdigest()[:16] if found else ""
