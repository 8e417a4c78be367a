"""From a name to a model: embedded models, local folders (ours and official ones), hub repositories.

``resolve`` gives a local folder, ``load_parts`` what is in it, ``load_model`` the task object.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nar_speech import config as configs
from nar_speech.errors import ConfigError, HubError
from nar_speech.types import ModelCard

if TYPE_CHECKING:
    from torch import nn

    from nar_speech.features import Frontend
    from nar_speech.model_folder import DecodingConfig, StreamConfig, VerifierConfig
    from nar_speech.pipelines.generate import SoundGenerator
    from nar_speech.pipelines.transcribe import Transcriber
    from nar_speech.text.tokenizer import Tokenizer

ASSETS = Path(__file__).parent / "assets"
DEFAULT_MODEL = "mini_en"
TWIN = "mini_en_stream"  # the embedded model that hears live speech
ALIASES = {  # names that FunASR's users know -> hub repository
    "paraformer-zh": "funasr/paraformer-zh",
    "paraformer-en": "funasr/paraformer-en",
    "SenseVoiceSmall": "FunAudioLLM/SenseVoiceSmall",
}
CACHE_VARIABLE = "NAR_SPEECH_CACHE"

Layout = Literal["nar_speech", "funasr", "sensevoice", "wenet", "nemo"]
LAYOUTS = (
    "ours (model.yaml + model.safetensors), FunASR and SenseVoice (config.yaml + model.pt),"
    " WeNet (train.yaml + final.pt), NeMo (a .nemo file)"
)
_HUB_ID = re.compile(r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?$")
_OFFICIAL_FUNASR = (
    "Paraformer",
    "ParaformerStreaming",
    "BiCifParaformer",
    "ContextualParaformer",
    "SeacoParaformer",
    "SenseVoiceSmall",
)


@dataclass(frozen=True)
class LoadedModel:
    """Everything a task object is made of; the network is on the CPU, in float32 and evaluation mode."""

    network: nn.Module
    frontend: Frontend
    tokenizer: Tokenizer
    card: ModelCard
    decoding: DecodingConfig
    folder: Path
    layout: Layout
    verifier: VerifierConfig | None = None
    stream: StreamConfig | None = None


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/model.yaml"))


def read_card(name: str) -> ModelCard:
    """The card of an embedded model; reads nothing else."""
    path = ASSETS / name / "model.yaml"
    return configs.from_dict(ModelCard, configs.read_yaml(path).get("card") or {}, f"{path}: card")


def resolve(
    name: str | Path = "default", cache_dir: str | Path | None = None, offline: bool | None = None
) -> Path:
    """The local folder of a model, or its ``.nemo`` file, downloaded first if need be.

    Args:
        name: ``default`` or another embedded model, a folder, a ``.nemo`` file, an alias such as
            ``paraformer-zh``, or a hub id ``org/name`` or ``org/name@revision``. A folder named like a model
            is given as ``./name``.
        cache_dir: of downloads; default: the environment variable NAR_SPEECH_CACHE, else the hub's own.
        offline: use only what has been downloaded before; default: the environment variable HF_HUB_OFFLINE.

    Raises:
        HubError: unknown name, no such folder, no network, no such repository; the message says which.
    """
    text = str(name)
    if isinstance(name, str):
        wanted = DEFAULT_MODEL if name == "default" else name
        if wanted in embedded_models():
            return ASSETS / wanted
        if name in ("default", TWIN):
            raise HubError(
                f"model '{name}': nar_speech/assets/{wanted} is not in this installation; install the package"
                " again, or name a model with --model"
            )
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".nemo":
            return path
        raise HubError(f"{text}: is a file; name the model folder it lies in")
    if text.startswith((".", "/", "~")) or isinstance(name, Path):
        raise HubError(f"{text}: no such model folder; check the path")
    match = _HUB_ID.match(ALIASES.get(text, text))
    if match is None:
        raise HubError(_unknown(text))
    return _download(text, match[1], match[2], cache_dir, offline)


def detect(folder: str | Path) -> Layout:
    """Which layout a model folder has.

    Raises:
        HubError, ConfigError, CheckpointError: an unknown layout, or something is missing.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix == ".nemo":
        return "nemo"
    if not folder.is_dir():
        raise HubError(f"{folder}: no such model folder; check the path")

    def there(*names: str) -> bool:
        return any((folder / name).is_file() for name in names)

    if there("model.yaml"):
        if not there("model.safetensors"):
            raise HubError(f"{folder}: has model.yaml but no model.safetensors; get the weights again")
        return "nar_speech"
    if there("config.yaml", "configuration.json"):
        from nar_speech.models.funasr import read_folder

        model = read_folder(folder).config.get("model")
        if model not in _OFFICIAL_FUNASR:
            raise HubError(
                f"{folder}: FunASR model '{model}' is not supported; supported: {', '.join(_OFFICIAL_FUNASR)}"
            )
        return "sensevoice" if model == "SenseVoiceSmall" else "funasr"
    if there("train.yaml"):
        return "wenet"
    if there("model_config.yaml") or any(folder.glob("*.nemo")):
        return "nemo"
    if there("model.safetensors"):
        raise HubError(f"{folder}: has model.safetensors but no model.yaml; get the model again")
    weights = next((p.name for p in sorted(folder.iterdir()) if p.suffix in (".pt", ".pb", ".onnx")), None)
    found = f"only {weights} without its configuration" if weights else "neither configuration nor weights"
    raise HubError(f"{folder}: not a model folder, {found}; accepted: {LAYOUTS}")


def load_parts(folder: str | Path) -> LoadedModel:
    """Read a model folder of any supported layout.

    Raises:
        HubError, ConfigError, CheckpointError: what is wrong with the folder, its configuration, its weights.
    """
    from nar_speech.model_folder import DecodingConfig

    folder = Path(folder)
    if makes_sound(folder):
        raise HubError(f"{folder}: makes sound and recognises no speech; use it with nar-speech generate")
    layout = detect(folder)
    if layout == "nar_speech":
        return _load_own(folder)
    parts = _official_loader(layout)(folder)
    return LoadedModel(*parts, decoding=DecodingConfig(), folder=folder, layout=layout)


def load_model(
    name: str | Path = "default",
    device: str = "auto",
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    **options: Any,
) -> Transcriber | SoundGenerator:
    """Load a model by name, folder or hub id: a Transcriber, or a SoundGenerator where it makes sound.

    Args:
        name, cache_dir, offline: see :func:`resolve`.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``float32``, ``bfloat16`` or (CPU only) ``int8``.
        options: fields of :class:`nar_speech.model_folder.DecodingConfig`, or of
            :class:`nar_speech.pipelines.sound_options.GenerationConfig`, in place of the model's own.

    Raises:
        InputError: the model can't be found or loaded, or an option is wrong.
    """
    from nar_speech.pipelines.transcribe import Transcriber

    folder = resolve(name, cache_dir, offline)
    if makes_sound(folder):
        from nar_speech.pipelines.generate import SoundGenerator

        return SoundGenerator.from_folder(folder, device, dtype, **options)
    return Transcriber.from_parts(load_parts(folder), device, dtype, **options)


def makes_sound(folder: str | Path) -> bool:
    """Whether a folder holds a model of sound generation: ours, audiocraft's, a MusicGen of transformers."""
    from nar_speech.models.audiocraft_official import is_official_folder
    from nar_speech.sound_folder import is_sound_folder

    return Path(folder).is_dir() and (is_sound_folder(folder) or is_official_folder(folder))


def import_model(
    source: str | Path, target: str | Path, cache_dir: str | Path | None = None, offline: bool | None = None
) -> Path:
    """Convert a model of any layout into our folder ``target``, which must be new or empty.

    Raises:
        HubError: ``target`` has files in it, or can't be written. Else as :func:`load_parts`.
    """
    from nar_speech.model_folder import copy_verifier, write_model_folder

    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HubError(f"{target}: is there already and not an empty folder; name a new one")
    folder = resolve(source, cache_dir, offline)
    model = load_parts(folder)
    try:
        write_model_folder(
            target,
            model.network,
            model.card,
            model.frontend.config,
            model.network.config,
            model.tokenizer,
            model.decoding,
            cmvn_from=folder,
            stream=model.stream,
        )
        if model.verifier is not None:
            copy_verifier(folder, target)
        return target
    except OSError as error:
        raise HubError(f"{target}: can't write ({error.strerror or error}); check path and space") from error


def _load_own(folder: Path) -> LoadedModel:
    from nar_speech.checkpoint import SkipInit, load_strict, read_weights
    from nar_speech.compress import expand
    from nar_speech.features import build_frontend
    from nar_speech.model_folder import CONFIG_FILE, WEIGHTS_FILE, check_sums, find_files, read_model_file
    from nar_speech.text.tokenizer import load_tokenizer

    file = read_model_file(folder)
    where = folder / CONFIG_FILE
    config_class, build = _network_class(file.card.model, where)
    with configs.blame(f"{where}: frontend"):
        frontend = build_frontend(file.frontend, folder)
    with configs.blame(f"{where}: tokenizer"):
        tokenizer = load_tokenizer(file.tokenizer, folder)
    config = configs.from_dict(config_class, file.network, f"{where}: network")
    # A blank behind the last token, as NeMo has it, is nothing that the tokenizer knows.
    beside = getattr(config, "blank", 0) == tokenizer.vocab_size
    for name, ours, theirs in (
        ("input_size", config.input_size, frontend.feature_size),
        ("vocab_size", config.vocab_size, tokenizer.vocab_size + beside),
    ):
        if ours != theirs:
            # A cut file can still be read in part: say that it is damaged, not that the sizes are wrong.
            check_sums(folder, {name: sum_ for name, sum_ in file.sha256.items() if name != WEIGHTS_FILE})
            part = "frontend" if name == "input_size" else "tokenizer"
            raise ConfigError(
                f"{where}: network.{name} is {ours}, but the {part} gives {theirs}; make them equal"
            )
    if file.card.sample_rate != file.frontend.sample_rate:
        raise ConfigError(
            f"{where}: card.sample_rate is {file.card.sample_rate}, frontend.sample_rate"
            f" {file.frontend.sample_rate}; make them equal"
        )
    with SkipInit(), configs.blame(f"{where}: network"):
        network = build(config)
    if file.stream is not None:
        with configs.blame(f"{where}: stream"):
            if file.card.model != "ctc":
                raise ConfigError("is for CTC models; others have their chunks in network")
            network.chunking(file.stream.chunk_size, file.stream.left)
    load_strict(network, expand(read_weights(folder / WEIGHTS_FILE)), where=folder / WEIGHTS_FILE)
    network.eval().requires_grad_(False)
    decoding = find_files(file.decoding, folder)
    parts = (network, frontend, tokenizer, file.card, decoding, folder, "nar_speech")
    return LoadedModel(*parts, file.verifier, file.stream)


def _network_class(name: str, where: Path) -> tuple[type, Callable[[Any], nn.Module]]:
    """Configuration class and builder of the model family a card names."""
    from nar_speech.models.ctc import CtcConfig, CtcModel
    from nar_speech.models.paraformer import ParaformerConfig, build_paraformer
    from nar_speech.models.sensevoice import SenseVoice, SenseVoiceConfig

    families = {
        "paraformer": (ParaformerConfig, build_paraformer),
        "ctc": (CtcConfig, CtcModel),
        "sensevoice": (SenseVoiceConfig, SenseVoice),
    }
    if name not in families:
        raise ConfigError(f"{where}: card.model: unknown model '{name}'; valid values: {', '.join(families)}")
    return families[name]


def _official_loader(layout: Layout) -> Callable[[Path], tuple]:
    from nar_speech.models.ctc import CtcModel
    from nar_speech.models.paraformer import Paraformer
    from nar_speech.models.sensevoice import SenseVoice

    return {
        "funasr": Paraformer.from_official,
        "sensevoice": SenseVoice.from_official,
        "wenet": CtcModel.from_official,
        "nemo": CtcModel.from_official,
    }[layout]


def _download(
    name: str, repository: str, revision: str | None, cache_dir: str | Path | None, offline: bool | None
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = name if name.partition("@")[0] == repository else f"{name} ({repository})"
    cache = cache_dir or os.environ.get(CACHE_VARIABLE) or None
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache,
                local_files_only=offline,
                # Weights, configurations, vocabularies: no code, no pictures, no sample recordings.
                ignore_patterns=[
                    "*.py",
                    "*.md",
                    "*.png",
                    "*.jpg",
                    "*.gif",
                    "*.mp3",
                    "*.wav",
                    "*.onnx",
                    "example/*",
                ],
            )
        )
    except RevisionNotFoundError as error:
        raise HubError(f"{where}: has no revision '{revision}'; check it on the hub") from error
    except GatedRepoError as error:
        raise HubError(
            f"{where}: asks for consent; accept its terms on huggingface.co and log in first"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{where}: no such repository on huggingface.co; {_known(name)}") from error
    except HFValidationError as error:
        raise HubError(_unknown(name)) from error
    except LocalEntryNotFoundError as error:
        if offline:
            raise HubError(
                f"{where}: has not been downloaded and offline mode is on; run once without"
                f" --offline and HF_HUB_OFFLINE, or set {CACHE_VARIABLE} to the cache that has it"
            ) from error
        raise HubError(_no_network(name)) from error
    except Exception as error:  # the hub client lets the errors of its HTTP library through
        raise HubError(_no_network(name)) from error


def _no_network(name: str) -> str:
    return (
        f"{name}: huggingface.co can't be reached and the model has not been downloaded before; check the"
        " network, or give a local folder"
    )


def _unknown(name: str) -> str:
    return f"{name or '(empty name)'}: no such model or folder; {_known(name)}"


def _known(name: str) -> str:
    known = ["default", *embedded_models(), *ALIASES]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}give a folder, a hub id org/name, or one of {', '.join(known)}"
