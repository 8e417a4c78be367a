"""From a name to the parts of a model that speaks: our folders, and the official one of MaskGCT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech import hub
from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.codec import maskgct as acoustic
from nar_speech.codec import repcodec
from nar_speech.codec.base import Codec
from nar_speech.codec.load import load_codec
from nar_speech.codec.repcodec import RepCodec, RepCodecConfig
from nar_speech.codec.shapes import Shapes
from nar_speech.codec.weight_norm import fold
from nar_speech.errors import CheckpointError, ConfigError, HubError
from nar_speech.model_folder import CONFIG_FILE, WEIGHTS_FILE
from nar_speech.models.duration import DurationConfig, DurationPredictor
from nar_speech.models.maskgct import S2A, T2S, S2AConfig, T2SConfig, without_empty
from nar_speech.models.recogniser_features import RecogniserFeatures
from nar_speech.models.speech_features import SpeechFeatures
from nar_speech.models.w2vbert import HUB_NAME, NEEDED, STATISTICS, W2vBert
from nar_speech.pipelines.maskgct_durations import PredictedLength
from nar_speech.pipelines.speech_codes import Networks
from nar_speech.speech_folder import (
    FeaturesConfig,
    inside,
    is_speech_folder,
    read_speech_file,
    read_speech_weights,
)
from nar_speech.text.g2p import PhonemizerConfig
from nar_speech.types import ModelCard

DEFAULT_SPEECH_MODEL = "mini_tts"  # ships with the package
ALIASES = {"maskgct": "amphion/MaskGCT"}
T2S_FILE = "t2s_model/model.safetensors"
FIRST_FILE = "s2a_model/s2a_model_1layer/model.safetensors"
FULL_FILE = "s2a_model/s2a_model_full/model.safetensors"
OFFICIAL = (T2S_FILE, FIRST_FILE, FULL_FILE, f"{repcodec.FOLDER}/{repcodec.FILE}")
OFFICIAL += (f"{acoustic.FOLDER}/{acoustic.ENCODER_FILE}", f"{acoustic.FOLDER}/{acoustic.DECODER_FILE}")
STATISTICS_FILE = "wav2vec2bert_stats.pt"
FEATURES_FOLDERS = ("w2v-bert-2.0", "w2v-bert")  # inside an official folder

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class SpeechParts:
    """What a folder holds; the networks are on the CPU, in float32 and evaluation mode.

    Attributes:
        networks: the Transformers.
        features, semantic: what a prompt's semantic codes are made with.
        codec: of the acoustic codes.
        duration: predicts durations of phones; None: there is none.
        phonemizer: how texts become phones.
        synthesis: options of synthesis that the folder names.
    """

    networks: Networks
    features: SpeechFeatures
    semantic: RepCodec
    codec: Codec
    phonemizer: PhonemizerConfig
    card: ModelCard
    folder: Path
    synthesis: dict[str, Any] = field(default_factory=dict)
    duration: DurationPredictor | None = None

    @property
    def predictor(self) -> PredictedLength | None:
        """The rule ``predictor`` of lengths, where the model has one."""
        return None if self.duration is None else PredictedLength(self.duration, self.codec.frame_rate)

    def modules(self) -> dict[str, nn.Module]:
        """The networks by the names of their parts in ``model.yaml``."""
        named = {"t2s": self.networks.t2s, "s2a_first": self.networks.first, "s2a_full": self.networks.full}
        named["duration"] = self.duration
        return {name: part for name, part in named.items() if part is not None} | {"semantic": self.semantic}

    def prepare(self, device: torch.device, dtype: str) -> None:
        """Put everything on a device, and get the Transformers ready to compute in ``dtype``."""
        for part in (self.networks.t2s, self.networks.first, self.networks.full):
            if part is not None:
                part.to(device).prepare(dtype)
        for part in (self.features, self.semantic, self.codec, self.duration):
            if part is not None:
                part.to(device)


def resolve_speech(
    name: str | Path = "default", cache_dir: str | Path | None = None, offline: bool | None = None
) -> Path:
    """The local folder of a model that speaks.

    Args:
        name: ``default``, another embedded model, a folder, ``maskgct``, a hub id. cache_dir, offline: see
            :func:`nar_speech.hub.resolve`.

    Raises:
        HubError: there is none.
    """
    if isinstance(name, str):
        wanted = DEFAULT_SPEECH_MODEL if name == "default" else name
        if wanted == DEFAULT_SPEECH_MODEL and wanted not in hub.embedded_models():
            raise HubError(
                f"model '{name}': no model that speaks ships with this version; name one with --model, for"
                " example --model maskgct (weights for non-commercial use)"
            )
        name = ALIASES.get(wanted, wanted)
    return hub.resolve(name, cache_dir, offline, OFFICIAL if name in ALIASES.values() else None)


def is_official_folder(folder: str | Path) -> bool:
    """Whether a folder has the layout of ``amphion/MaskGCT``."""
    return (Path(folder) / T2S_FILE).is_file() or (Path(folder) / FULL_FILE).is_file()


def load_speech_parts(
    folder: str | Path, cache_dir: str | Path | None = None, offline: bool | None = None
) -> SpeechParts:
    """Read a model that speaks, of any supported layout.

    Args:
        cache_dir, offline: for w2v-BERT and the codec, where the folder only names them.

    Raises:
        HubError, ConfigError, CheckpointError: what is wrong or missing.
    """
    folder = Path(folder)
    if is_speech_folder(folder):
        return _own(folder, cache_dir, offline)
    if not is_official_folder(folder):
        raise HubError(
            f"{folder}: not a model that speaks; accepted: ours (model.yaml with task 'synthesize'),"
            " MaskGCT's (t2s_model, s2a_model, semantic_codec, acoustic_codec)"
        )
    return _official(folder, cache_dir, offline)


def part_weights(parts: Mapping[str, nn.Module], features: SpeechFeatures) -> dict[str, Tensor]:
    """Tensors for :func:`nar_speech.speech_folder.write_speech_folder`: of all parts, and the statistics."""
    found = {
        f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()
    }
    return found | {"features.mean": features.mean, "features.variance": features.variance}


# ---- official ---------------------------------------------------------------------------------------------


def _official(folder: Path, cache_dir: str | Path | None, offline: bool | None) -> SpeechParts:
    missing = [name for name in OFFICIAL if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is missing; get the model again")
    t2s = _network(folder / T2S_FILE, T2S, official_t2s)
    first = _network(folder / FIRST_FILE, S2A, official_s2a)
    full = _network(folder / FULL_FILE, S2A, official_s2a)
    place = next((folder / name for name in FEATURES_FOLDERS if (folder / name).is_dir()), None)
    statistics = folder / STATISTICS_FILE
    features = W2vBert.from_folder(
        place or hub.resolve(HUB_NAME, cache_dir, offline, NEEDED),
        statistics if statistics.is_file() else STATISTICS,
    )
    codec = acoustic.load_official(folder / acoustic.FOLDER, pad_tail=False)  # the official prompt codes
    card = ModelCard(
        name=folder.name if folder.name != "snapshots" else "MaskGCT",
        task="synthesize",
        model="maskgct",
        sample_rate=codec.sample_rate,
        languages=("en", "zh", "ko", "ja", "fr", "de"),
        licence="CC-BY-NC-4.0",
        source="https://huggingface.co/amphion/MaskGCT",
        description="MaskGCT (Wang et al. 2024), official weights",
    )
    parts = SpeechParts(
        Networks(t2s, first, full),
        features,
        RepCodec.from_official(folder),
        codec.eval().requires_grad_(False),
        PhonemizerConfig(),
        card,
        folder,
    )
    _check(parts, str(folder))
    return parts


def _network(path: Path, kind: type[N], read: Any) -> N:
    """A Transformer of an official file, whose tensors tell all sizes but that of a head."""
    tensors = without_empty(read_weights(path), path)
    config = read(Shapes(tensors, str(path), "a network of MaskGCT"))
    with configs.blame(str(path)), SkipInit():
        network = kind(config)
    load_strict(network, tensors, where=path)
    return network.eval().requires_grad_(False)


def official_t2s(shapes: Shapes) -> T2SConfig:
    """Sizes of an official text-to-semantic network; all of them have 16 heads.

    Raises:
        CheckpointError: a tensor that tells them is missing. ConfigError: an impossible size.
    """
    size, width = shapes.of("cond_emb.weight", 2)
    core, phones = _core(shapes, width), shapes.of("phone_emb.weight", 2)[0]
    with configs.blame(shapes.where):
        return T2SConfig(**core, codebook_size=size, num_phones=phones)


def official_s2a(shapes: Shapes) -> S2AConfig:
    """Sizes of an official semantic-to-acoustic network; errors as of :func:`official_t2s`."""
    size, width = shapes.of("cond_emb.weight", 2)
    core, codes = _core(shapes, width), shapes.of("token_emb.0.weight", 2)[0]
    layers = shapes.count(r"token_emb\.\d+\.weight")
    with configs.blame(shapes.where):
        return S2AConfig(**core, num_codebooks=layers, codebook_size=codes, semantic_size=size)


def _core(shapes: Shapes, width: int) -> dict[str, int]:
    hidden, _ = shapes.of("diff_estimator.layers.0.mlp.gate_proj.weight", 2)
    blocks = shapes.count(r"diff_estimator\.layers\.\d+\.self_attn\.q_proj\.weight")
    return {"width": width, "num_blocks": blocks, "hidden_scale": hidden // width}


# ---- ours -------------------------------------------------------------------------------------------------


def _own(folder: Path, cache_dir: str | Path | None, offline: bool | None) -> SpeechParts:
    file, where = read_speech_file(folder), folder / CONFIG_FILE
    tensors = read_speech_weights(folder)
    parts = {
        "t2s": _part(T2S, T2SConfig, file.t2s, "t2s", tensors, folder),
        "s2a_full": _part(S2A, S2AConfig, file.s2a_full, "s2a_full", tensors, folder),
        "semantic": _part(RepCodec, RepCodecConfig, file.semantic, "semantic", tensors, folder),
    }
    if file.s2a_first is not None:
        parts["s2a_first"] = _part(S2A, S2AConfig, file.s2a_first, "s2a_first", tensors, folder)
    if file.duration is not None:
        parts["duration"] = _part(
            DurationPredictor, DurationConfig, file.duration, "duration", tensors, folder
        )
    known = tuple(f"{name}." for name in (*parts, "features"))
    strange = [name for name in tensors if not name.startswith(known)]
    if strange:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {len(strange)} tensors of no part, {strange[0]} for example"
        )
    features = _features(file.features, tensors, folder, cache_dir, offline)
    source = inside(folder, file.codec)
    official = None if (Path(source) / CONFIG_FILE).is_file() else acoustic.official_folder(Path(source))
    if official is not None:
        codec = acoustic.load_official(official, pad_tail=False).eval().requires_grad_(False)
    else:
        codec = load_codec(source, cache_dir=cache_dir, offline=offline)
    found = SpeechParts(
        Networks(parts["t2s"], parts.get("s2a_first"), parts["s2a_full"]),
        *(features, parts["semantic"], codec, file.phonemizer, file.card, folder, dict(file.synthesis)),
        duration=parts.get("duration"),
    )
    _check(found, str(where))
    return found


def _part(
    kind: type[N],
    config: type,
    fields: Mapping[str, Any],
    name: str,
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> N:
    """One network of our folder. Weight norm of the semantic codec is stored folded."""
    where = f"{folder / CONFIG_FILE}: {name}"
    numbers = configs.from_dict(config, fields, where)
    with configs.blame(where), SkipInit():
        network = kind(numbers)
    if isinstance(network, RepCodec):
        fold(network)
    own = {
        key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
    }
    load_strict(network, own, where=f"{folder / WEIGHTS_FILE}: {name}")
    return network.eval().requires_grad_(False)


def _features(
    config: FeaturesConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
    cache_dir: str | Path | None,
    offline: bool | None,
) -> SpeechFeatures:
    names = ("features.mean", "features.variance")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: {missing[0]} is missing; get the model again")
    statistics = (tensors[names[0]], tensors[names[1]])
    source = inside(folder, config.source)
    if config.kind == "w2vbert":
        place = source if Path(source).is_dir() else hub.resolve(source, cache_dir, offline, NEEDED)
        return W2vBert.from_folder(place, statistics, config.layer)
    model = hub.load_parts(hub.resolve(source, cache_dir, offline))
    return RecogniserFeatures(model.network, model.frontend, statistics, model.card.name)


def _check(parts: SpeechParts, where: str) -> None:
    """Whether the parts belong together.

    Raises:
        ConfigError: they can't.
    """
    t2s, first, full = (
        None if part is None else part.config
        for part in (parts.networks.t2s, parts.networks.first, parts.networks.full)
    )
    semantic, codec, features = parts.semantic.config, parts.codec, parts.features
    sizes = {"t2s": t2s.codebook_size, "s2a_full": full.semantic_size, "semantic": semantic.codebook_size}
    sizes |= {} if first is None else {"s2a_first": first.semantic_size}
    if len(set(sizes.values())) != 1 or semantic.num_quantizers != 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"{where}: semantic codes: {told}, {semantic.num_quantizers} codebooks; all must know the same"
            " codes of one codebook"
        )
    if semantic.hidden_size != features.width:
        raise ConfigError(
            f"{where}: the semantic codec reads features of {semantic.hidden_size} values, {features.name}"
            f" gives {features.width}"
        )
    if not t2s.use_phones:
        raise ConfigError(f"{where}: t2s: was made without phones, so it can read no text")
    books = {full.codebook_size, codec.codebook_size, *([] if first is None else [first.codebook_size])}
    wrong = first is not None and first.num_codebooks >= full.num_codebooks
    if len(books) != 1 or full.num_codebooks > codec.num_codebooks or wrong:
        raise ConfigError(
            f"{where}: the networks make {full.num_codebooks} codebooks of {full.codebook_size} codes, codec"
            f" {codec.name} has {codec.num_codebooks} of {codec.codebook_size}; name the model's codec"
        )
    if codec.has_scales or codec.channels != 1:
        raise ConfigError(f"{where}: codec {codec.name} is not one of mono sound without scales")
    if abs(features.frame_rate - codec.frame_rate) > 0.01 * codec.frame_rate:
        raise ConfigError(
            f"{where}: {features.frame_rate:g} semantic codes per second, but {codec.frame_rate:g} frames of"
            f" codec {codec.name}; both must be as many"
        )
