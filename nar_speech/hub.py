"""From a name to a model: embedded models, local folders (ours and official ones), hub repositories.

``resolve`` (of :mod:`nar_speech.locate`) gives a local folder, ``load_parts`` what is in it, ``load_model``
the task object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nar_speech import config as configs
from nar_speech.errors import ConfigError, HubError
from nar_speech.locate import ALIASES as ALIASES
from nar_speech.locate import DEFAULT_MODEL as DEFAULT_MODEL
from nar_speech.locate import TWIN as TWIN
from nar_speech.locate import embedded_models as embedded_models
from nar_speech.locate import read_card as read_card
from nar_speech.locate import resolve as resolve
from nar_speech.types import ModelCard

if TYPE_CHECKING:
    from torch import nn

    from nar_speech.features import Frontend
    from nar_speech.model_folder import DecodingConfig, StreamConfig, VerifierConfig
    from nar_speech.pipelines.generate import SoundGenerator
    from nar_speech.pipelines.synthesize import Synthesizer
    from nar_speech.pipelines.transcribe import Transcriber
    from nar_speech.text.tokenizer import Tokenizer

Layout = Literal["nar_speech", "funasr", "sensevoice", "wenet", "nemo"]
LAYOUTS = (
    "ours (model.yaml + model.safetensors), FunASR and SenseVoice (config.yaml + model.pt),"
    " WeNet (train.yaml + final.pt), NeMo (a .nemo file)"
)
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
    if speaks(folder):
        raise HubError(f"{folder}: speaks and recognises no speech; use it with nar-speech synthesize")
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
) -> Transcriber | SoundGenerator | Synthesizer:
    """Load a model by name, folder or hub id: a Transcriber, or what else its folder is made for.

    A model that makes sound gives a SoundGenerator, one that speaks, ``amphion/MaskGCT`` for example, a
    Synthesizer.

    Args:
        name, cache_dir, offline: see :func:`resolve`.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``float32``, ``bfloat16`` or (CPU only) ``int8``.
        options: fields of :class:`nar_speech.model_folder.DecodingConfig`, of
            :class:`nar_speech.pipelines.sound_options.GenerationConfig` or of
            :class:`nar_speech.pipelines.speech_options.SynthesisConfig`, in place of the model's own.

    Raises:
        InputError: the model can't be found or loaded, or an option is wrong.
    """
    from nar_speech.pipelines.transcribe import Transcriber

    folder = resolve(name, cache_dir, offline)
    if makes_sound(folder):
        from nar_speech.pipelines.generate import SoundGenerator

        return SoundGenerator.from_folder(
            folder, device, dtype, cache_dir=cache_dir, offline=offline, **options
        )
    if speaks(folder):
        from nar_speech.pipelines.synthesize import Synthesizer

        return Synthesizer.from_folder(folder, device, dtype, cache_dir, offline, **options)
    return Transcriber.from_parts(load_parts(folder), device, dtype, **options)


def speaks(folder: str | Path) -> bool:
    """Whether a folder holds a model of text to speech: ours, or the official layout of MaskGCT."""
    from nar_speech.pipelines.speech_model import is_official_folder
    from nar_speech.speech_folder import is_speech_folder

    return Path(folder).is_dir() and (is_speech_folder(folder) or is_official_folder(folder))


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
