"""From a name to the parts of a model that makes sound: ours, audiocraft's and transformers' folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nar_speech import config as configs
from nar_speech import hub
from nar_speech.codec.base import Codec
from nar_speech.codec.load import load_codec
from nar_speech.errors import ConfigError, HubError
from nar_speech.models.audiocraft_official import from_official, is_official_folder
from nar_speech.models.magnet import Magnet, MagnetConfig
from nar_speech.models.musicgen import MusicGen, MusicGenConfig
from nar_speech.sound_folder import codec_source, is_sound_folder, read_sound_file, read_sound_weights
from nar_speech.text.conditioner import TextConditioner, load_conditioner
from nar_speech.types import ModelCard

DEFAULT_SOUND_MODEL = "mini_sound"  # ships with the package
ALIASES = {
    **{
        name: f"facebook/{name}"
        for size in ("small", "medium")
        for name in (f"magnet-{size}-10secs", f"magnet-{size}-30secs", f"audio-magnet-{size}")
    },
    **{f"musicgen-{size}": f"facebook/musicgen-{size}" for size in ("small", "medium", "large")},
    "audiogen-medium": "facebook/audiogen-medium",
}
FAMILIES = {"magnet": (MagnetConfig, Magnet), "musicgen": (MusicGenConfig, MusicGen)}


@dataclass(frozen=True)
class SoundParts:
    """What a folder holds; the network is on the CPU, in float32 and evaluation mode.

    Attributes:
        generation: options of generation that the folder names.
    """

    network: Magnet | MusicGen
    codec: Codec
    conditioner: TextConditioner
    card: ModelCard
    folder: Path
    generation: dict[str, Any] = field(default_factory=dict)


def resolve_sound(
    name: str | Path = "default", cache_dir: str | Path | None = None, offline: bool | None = None
) -> Path:
    """The local folder of a model that makes sound.

    Args:
        name: ``default``, another embedded model, a folder, an alias such as ``magnet-small-10secs``, a hub
        id. cache_dir, offline: see :func:`nar_speech.hub.resolve`.

    Raises:
        HubError: there is none.
    """
    if isinstance(name, str):
        wanted = DEFAULT_SOUND_MODEL if name == "default" else name
        if wanted == DEFAULT_SOUND_MODEL and wanted not in hub.embedded_models():
            raise HubError(
                f"model '{name}': nar_speech/assets/{wanted} is not in this installation; install the package"
                " again, or name a model with --model"
            )
        name = ALIASES.get(wanted, wanted)
        if not ("/" in name or name in hub.embedded_models() or Path(name).expanduser().exists()):
            known = ", ".join((DEFAULT_SOUND_MODEL, *ALIASES))
            raise HubError(
                f"{name or '(empty name)'}: no such model or folder; give one of {known}, a folder or"
                " a hub id org/name"
            )
    return hub.resolve(name, cache_dir, offline)


def load_sound_parts(
    folder: str | Path, cache_dir: str | Path | None = None, offline: bool | None = None
) -> SoundParts:
    """Read a folder.

    Args:
        cache_dir, offline: for the codec and the text encoder, where the folder only names them.

    Raises:
        HubError, ConfigError, CheckpointError, MissingExtraError: what is wrong or missing.
    """
    folder = Path(folder)
    if is_sound_folder(folder):
        return _own(folder, cache_dir, offline)
    if not is_official_folder(folder):
        raise HubError(
            f"{folder}: not a model that makes sound; accepted: ours (model.yaml with task 'generate'),"
            " audiocraft's (state_dict.bin), MusicGen of transformers (config.json)"
        )
    found = from_official(folder)
    codec = load_codec(found.codec, cache_dir=cache_dir, offline=offline)
    conditioner = load_conditioner(found.conditioner, folder, cache_dir, offline)
    _check(found.network, codec, conditioner, folder)
    return SoundParts(found.network, codec, conditioner, found.card, folder)


def _own(folder: Path, cache_dir: str | Path | None, offline: bool | None) -> SoundParts:
    from nar_speech.checkpoint import SkipInit, load_strict
    from nar_speech.model_folder import CONFIG_FILE, WEIGHTS_FILE

    file, where = read_sound_file(folder), folder / CONFIG_FILE
    if file.card.model not in FAMILIES:
        raise ConfigError(
            f"{where}: card.model: unknown model '{file.card.model}'; valid values: {', '.join(FAMILIES)}"
        )
    config_class, build = FAMILIES[file.card.model]
    config = configs.from_dict(config_class, file.network, f"{where}: network")
    with SkipInit(), configs.blame(f"{where}: network"):
        network = build(config)
    load_strict(network, read_sound_weights(folder), where=folder / WEIGHTS_FILE)
    network.eval().requires_grad_(False)
    codec = load_codec(codec_source(folder, file), cache_dir=cache_dir, offline=offline)
    conditioner = load_conditioner(file.conditioner, folder, cache_dir, offline)
    _check(network, codec, conditioner, where)
    return SoundParts(network, codec, conditioner, file.card, folder, dict(file.generation))


def _check(network: Magnet | MusicGen, codec: Codec, conditioner: TextConditioner, where: str | Path) -> None:
    """Whether the parts belong together.

    Raises:
        ConfigError: they can't.
    """
    config = network.config
    if config.codebook_size != codec.codebook_size or config.num_codebooks > codec.num_codebooks:
        raise ConfigError(
            f"{where}: the network makes {config.num_codebooks} codebooks of {config.codebook_size} codes,"
            f" codec {codec.name} has {codec.num_codebooks} of {codec.codebook_size}; name the model's codec"
        )
    if codec.has_scales:
        raise ConfigError(
            f"{where}: codec {codec.name} needs a loudness for every chunk, which no model makes"
        )
    if abs(config.frame_rate - codec.frame_rate) > 0.01 * codec.frame_rate:
        raise ConfigError(
            f"{where}: the network has {config.frame_rate:g} frames per second, the codec {codec.name}"
            f" {codec.frame_rate:g}; it is another codec's model"
        )
    if config.text_width != conditioner.width:
        raise ConfigError(
            f"{where}: the network reads text states of width {config.text_width}, the text encoder"
            f" {conditioner.name} gives {conditioner.width}; name the one it was trained with"
        )
