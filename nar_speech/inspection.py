"""What a model folder is, and whether it is whole: recognisers, sound generators, synthesizers, codecs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nar_speech import config as configs
from nar_speech import hub
from nar_speech.errors import CheckpointError, NarSpeechError
from nar_speech.model_folder import CONFIG_FILE, check_sums

Kind = Literal["recogniser", "sound generator", "synthesizer", "codec"]
CODEC_TYPES = ("encodec", "dac", "mimi")  # model_type in transformers' config.json


@dataclass(frozen=True)
class Check:
    """One line of :func:`verify`."""

    name: str
    passed: bool
    detail: str


def find(
    name: str | Path, cache_dir: str | Path | None = None, offline: bool | None = None
) -> tuple[Path, Kind]:
    """The folder of a model of any kind, and its kind.

    Args:
        name, cache_dir, offline: see :func:`nar_speech.hub.resolve`; short names of codecs and of models that
            make sound or speak are known too.
    """
    from nar_speech.codec import load
    from nar_speech.pipelines import sound_model, speech_model

    names = {**load.ALIASES, **sound_model.ALIASES, **speech_model.ALIASES}
    if isinstance(name, str) and not Path(name).is_dir():
        name = names.get(name, name)
    folder = hub.resolve(name, cache_dir, offline)
    if hub.makes_sound(folder):
        return folder, "sound generator"
    if hub.speaks(folder):
        return folder, "synthesizer"
    return folder, "codec" if _is_codec(folder) else "recogniser"


def model_info(name: str | Path, cache_dir: str | Path | None = None, offline: bool | None = None) -> dict:
    """Card, sizes and folder of a model; loads it, so that what is said is true."""
    folder, kind = find(name, cache_dir, offline)
    if kind == "codec":
        return {"folder": str(folder), **_codec_info(folder, cache_dir, offline)}
    if kind == "sound generator":
        return {"folder": str(folder), **_sound_info(folder, cache_dir, offline)}
    if kind == "synthesizer":
        return {"folder": str(folder), **_speech_info(folder, cache_dir, offline)}
    model = hub.load_parts(folder)
    return {
        "folder": str(folder),
        "layout": model.layout,
        "card": configs.to_dict(model.card),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "vocabulary": model.tokenizer.vocab_size,
        "frontend": configs.to_dict(model.frontend.config),
        "decoding": configs.to_dict(model.decoding),
        "stream": None if model.stream is None else configs.to_dict(model.stream),
    }


def verify(name: str | Path, cache_dir: str | Path | None = None, offline: bool | None = None) -> list[Check]:
    """Check a model: layout, checksums, configuration, tensor names and shapes, finite values, a test run.

    Stops at the first check that fails; it is the last of the list.
    """
    checks: list[Check] = []
    state: dict[str, Any] = {}

    def folder_check() -> str:
        folder, kind = state["found"] = find(name, cache_dir, offline)
        layout = hub.detect(folder) if kind == "recogniser" else kind
        return f"{folder} ({layout})"

    def sums_check() -> str:
        return _compare_sums(state["found"][0])

    def weights_check() -> str:  # loading refuses wrong names, shapes and values that are not finite
        folder, kind = state["found"]
        network, state["run"] = LOADERS[kind](folder, cache_dir, offline)
        tensors = network.state_dict().values()
        return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors)} values, all finite"

    steps: tuple[tuple[str, Callable[[], str]], ...] = (
        ("folder", folder_check),
        ("sha256", sums_check),
        ("weights", weights_check),
        ("run", lambda: state["run"]()),
    )
    for step, check in steps:
        try:
            checks.append(Check(step, True, check()))
        except NarSpeechError as error:
            checks.append(Check(step, False, str(error)))
            break
    return checks


def _is_codec(folder: Path) -> bool:
    from nar_speech.codec import maskgct

    if not folder.is_dir():
        return False
    if (folder / CONFIG_FILE).is_file():
        card = configs.read_yaml(folder / CONFIG_FILE).get("card")
        return isinstance(card, dict) and card.get("task") == "codec"
    if (folder / "config.json").is_file():
        return configs.read_yaml(folder / "config.json").get("model_type") in CODEC_TYPES
    if maskgct.official_folder(folder) is not None:
        return True
    return any(
        path.suffix in (".th", ".pth") or path.name == "compression_state_dict.bin"
        for path in folder.iterdir()
    )


def _compare_sums(folder: Path) -> str:
    """The SHA-256 sums that a folder of ours records, of a codec inside it too."""
    files = [folder / CONFIG_FILE, folder / "codec" / CONFIG_FILE]
    count = 0
    for file in files:
        if not file.is_file():
            continue
        sums = configs.read_yaml(file).get("sha256") or {}
        if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
            raise CheckpointError(f"{file}: sha256: expected file names and sums; get the model again")
        check_sums(file.parent, sums)
        count += len(sums)
    if not files[0].is_file():
        return "none recorded (official folder)"
    return f"{count} files" if count else "none recorded"


def _codec_info(folder: Path, cache_dir: str | Path | None, offline: bool | None) -> dict[str, Any]:
    from nar_speech.codec.load import load_codec
    from nar_speech.pipelines.codec import describe_codec

    card = configs.read_yaml(folder / CONFIG_FILE)["card"] if (folder / CONFIG_FILE).is_file() else None
    codec = load_codec(folder, cache_dir=cache_dir, offline=offline)
    return {"card": card, **describe_codec(codec)}


def _sound_info(folder: Path, cache_dir: str | Path | None, offline: bool | None) -> dict[str, Any]:
    from nar_speech.pipelines.codec import describe_codec
    from nar_speech.pipelines.sound_model import load_sound_parts

    parts = load_sound_parts(folder, cache_dir, offline)
    return {
        "card": configs.to_dict(parts.card),
        "parameters": sum(p.numel() for p in parts.network.parameters()),
        "network": configs.to_dict(parts.network.config),
        "codec": describe_codec(parts.codec),
        "text_encoder": {"name": parts.conditioner.name, "width": parts.conditioner.width},
        "generation": parts.generation,
    }


def _speech_info(folder: Path, cache_dir: str | Path | None, offline: bool | None) -> dict[str, Any]:
    from nar_speech.pipelines.codec import describe_codec
    from nar_speech.pipelines.speech_model import load_speech_parts

    parts = load_speech_parts(folder, cache_dir, offline)
    modules = {**parts.modules(), "features": parts.features}
    return {
        "card": configs.to_dict(parts.card),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in modules.items()},
        "networks": {name: configs.to_dict(part.config) for name, part in parts.modules().items()},
        "features": {
            "name": parts.features.name,
            "width": parts.features.width,
            "frame_rate": parts.features.frame_rate,
        },
        "codec": describe_codec(parts.codec),
        "phonemizer": configs.to_dict(parts.phonemizer),
        "synthesis": parts.synthesis,
    }


def _load_recogniser(folder: Path, *_: Any) -> tuple[torch.nn.Module, Callable[[], str]]:
    model = hub.load_parts(folder)

    def run() -> str:
        from nar_speech.pipelines.transcribe import Transcriber

        noise = np.random.default_rng(0).normal(0.0, 0.1, model.card.sample_rate).astype(np.float32)
        result = Transcriber.from_parts(model, device="cpu")((noise, model.card.sample_rate))
        return f"1 s of noise -> {len(result.words)} words"

    return model.network, run


def _load_codec(
    folder: Path, cache_dir: str | Path | None, offline: bool | None
) -> tuple[torch.nn.Module, Callable[[], str]]:
    from nar_speech.codec.load import load_codec

    codec = load_codec(folder, cache_dir=cache_dir, offline=offline)  # a file may name another codec

    def run() -> str:
        generator = torch.Generator().manual_seed(0)
        noise = 0.1 * torch.randn(1, codec.channels, codec.sample_rate, generator=generator)
        codes = codec.encode(noise)
        sound, _ = codec.decode(codes)
        if not bool(torch.isfinite(sound).all()):
            raise CheckpointError(f"{folder}: decodes to values that are not finite; get the codec again")
        return f"1 s of noise -> {codes.tokens.numel()} codes -> {sound.shape[2]} samples"

    return codec, run


def _load_sound(
    folder: Path, cache_dir: str | Path | None, offline: bool | None
) -> tuple[torch.nn.Module, Callable[[], str]]:
    from nar_speech.models.magnet import Magnet
    from nar_speech.pipelines.generate import SoundGenerator
    from nar_speech.pipelines.sound_model import load_sound_parts

    parts = load_sound_parts(folder, cache_dir, offline)

    def run() -> str:
        if not isinstance(parts.network, Magnet):
            return "not run: it is a partner for MAGNeT"
        result = SoundGenerator.from_parts(parts, "cpu")(None, 0.5, steps=1)
        if not np.isfinite(result.audio.samples).all():
            raise CheckpointError(f"{folder}: makes values that are not finite; get the model again")
        return f"{result.audio.duration:.2f} s of sound in {result.calls} calls"

    return parts.network, run


def _load_speech(
    folder: Path, cache_dir: str | Path | None, offline: bool | None
) -> tuple[torch.nn.Module, Callable[[], str]]:
    from nar_speech.pipelines.speech_model import load_speech_parts
    from nar_speech.pipelines.synthesize import Synthesizer

    parts = load_speech_parts(folder, cache_dir, offline)
    networks = torch.nn.ModuleDict({**parts.modules(), "features": parts.features, "codec": parts.codec})

    def run() -> str:
        speaker = Synthesizer.from_parts(parts, "cpu")
        noise = np.random.default_rng(0).normal(0.0, 0.1, speaker.sample_rate).astype(np.float32)
        voice = speaker.voice((noise, speaker.sample_rate), "h|ə|l|oʊ", "phones")
        options = {"language": "phones", "steps": 1, "acoustic_steps": 1, "watermark": False}
        result = speaker("h|ə|l|oʊ", voice, duration=0.5, **options)
        if not np.isfinite(result.audio.samples).all():
            raise CheckpointError(f"{folder}: makes values that are not finite; get the model again")
        return f"1 s of noise, 4 phones -> {result.audio.duration:.2f} s of sound"

    return networks, run


LOADERS = {
    "recogniser": _load_recogniser,
    "sound generator": _load_sound,
    "synthesizer": _load_speech,
    "codec": _load_codec,
}
