"""From a NeMo model to ours: FastConformer encoders with a CTC head, alone or beside a transducer.

A model is a ``.nemo`` file (a tar archive), the folder with its unpacked files, or a folder with one
``.nemo`` file: ``model_config.yaml``, ``model_weights.ckpt`` and the files of the tokenizer. Of a hybrid
model only encoder and CTC head are read. Encoder tensors have the same names on both sides.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from nar_speech.checkpoint import SkipInit, load_strict, read_weights, rename_tensors
from nar_speech.config import blame, from_dict, to_dict
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.features import Frontend, FrontendConfig
from nar_speech.layers.fastconformer import FastConformerConfig
from nar_speech.models.ctc import CtcConfig, CtcModel
from nar_speech.models.funasr import ModelParts, require
from nar_speech.text.tokenizer import BpeTokenizer, CharTokenizer, Tokenizer
from nar_speech.types import ModelCard

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
SECTIONS = ("preprocessor", "encoder", "decoder", "aux_ctc", "tokenizer", "ctc_reduction", "labels")
MAX_MEMBERS, MAX_TEXT, MAX_WEIGHTS = 1000, 64 << 20, 64 << 30  # entries, bytes, bytes
MAX_EXPANSION = 20  # of a compressed archive; weights hardly shrink
# The CTC head is a convolution of kernel 1; transducer and constants of the features are left out.
RENAME: dict[str, str | None] = {
    r"(?:ctc_)?decoder\.decoder_layers\.0\.": "ctc.ctc_lo.",
    r"decoder\.prediction\.": None,
    r"joint\.": None,
    r"preprocessor\.": None,
    r"encoder\.pos_enc\.pe$": None,
}
# NeMo's own defaults for keys that a configuration leaves out.
ENCODER_DEFAULTS = {
    "subsampling": "striding",
    "subsampling_factor": 4,
    "subsampling_conv_channels": -1,
    "n_heads": 4,
    "conv_kernel_size": 31,
    "dropout_emb": 0.1,
    "dropout_att": 0.0,
}
# Keys that say nothing about results (speed, training, limits of tables) ...
ENCODER_IGNORED = {
    "_target_",
    "feat_in",
    "pos_emb_max_len",
    "sync_max_audio_length",
    "use_pytorch_sdpa",
    "use_pytorch_sdpa_backends",
    "subsampling_conv_chunking_factor",
    "reduction_factor",
    "stochastic_depth_drop_prob",
    "stochastic_depth_mode",
    "stochastic_depth_start_layer",
    "global_tokens_spacing",
    "global_attn_separate",
}
# ... and keys with values that mean what is built here, the first being NeMo's default.
ENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "self_attention_model": ("rel_pos",),
    "reduction": (None,),
    "reduction_position": (None,),
    "conv_context_style": ("regular",),
    "att_chunk_context_size": (None,),
    "global_tokens": (0,),
}
FRONTEND_IGNORED = {
    "_target_",
    "pad_to",
    "pad_value",
    "nb_augmentation_prob",
    "nb_max_freq",
    "rng",
    "use_torchaudio",
    "stft_conv",
    "stft_exact_pad",
    "dither",  # official results are without it
}
FRONTEND_FIXED: dict[str, tuple[Any, ...]] = {
    "preemph": (0.97,),
    "log": (True,),
    "log_zero_guard_type": ("add",),
    "log_zero_guard_value": (2**-24,),
    "frame_splicing": (1,),
    "exact_pad": (False,),
    "mag_power": (2.0, 2),
    "mel_norm": ("slaney",),
    "n_window_size": (None,),
    "n_window_stride": (None,),
}


def is_nemo(path: Path) -> bool:
    """Whether a path is a NeMo model in one of the forms above."""
    if path.is_file():
        return path.suffix == ".nemo"
    return (path / CONFIG).is_file() or any(path.glob("*.nemo"))


def load_nemo(path: str | Path) -> ModelParts:
    """Read a NeMo model; see the module's text.

    Returns:
        (network in eval mode, frontend, tokenizer, card).

    Raises:
        CheckpointError: no such file, a damaged or unsafe archive, a model without a CTC head, weights that
            do not fit.
        ConfigError: an unsupported option, or a file that is missing.
    """
    path = Path(path)
    with unpacked(path) as folder:
        where = f"{path}: {CONFIG}" if path.suffix == ".nemo" else str(folder / CONFIG)
        tree = read_config(folder / CONFIG, where)
        tensors = head_as_linear(read_weights(folder / WEIGHTS), path)
        with blame(where):
            config = convert_config(tree, tensors, where)
            frontend = build_frontend(_section(tree, "preprocessor", where), where)
            tokenizer = build_tokenizer(tree, folder, where)
            with SkipInit():
                network = CtcModel(config)
        _check_filters(frontend, tensors, where)
        tensors = rename_tensors(tensors, RENAME, path)
        if folder != path:  # the mapped file goes away
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        load_strict(network, tensors, where=path)
    if frontend.feature_size != config.input_size:
        raise ConfigError(
            f"{where}: encoder.feat_in is {config.input_size}, preprocessor.features {frontend.feature_size};"
            " they must be equal"
        )
    if tokenizer.vocab_size != config.vocab_size - 1:
        raise ConfigError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the CTC head {config.vocab_size - 1}"
            " and a blank; use the files of this model"
        )
    card = ModelCard(
        name=path.stem if path.suffix == ".nemo" else path.name,
        task="transcribe",
        model="ctc",
        sample_rate=frontend.config.sample_rate,
        licence="see the model's own page",
        source=f"NeMo, {path.name}",
    )
    return ModelParts(network.eval(), frontend, tokenizer, card)


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The folder with the files of a model; that of an archive lives inside the context only.

    Nothing is extracted under a name that the archive chose: files come out by their last name only, and
    links, devices and folders never do.

    Raises:
        CheckpointError: no such file, not a tar archive, too large, or files missing in it.
    """
    if path.is_dir():
        archives = sorted(path.glob("*.nemo"))
        if not (path / CONFIG).is_file():
            if len(archives) != 1:
                raise CheckpointError(
                    f"{path}: has no {CONFIG} and {len(archives)} .nemo files; name the one to load"
                )
            with unpacked(archives[0]) as folder:
                yield folder
            return
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(f"{path}: {WEIGHTS} is missing; unpack the whole archive")
        yield path
        return
    if not path.is_file():
        raise CheckpointError(f"{path}: no such model; check the path")
    with tempfile.TemporaryDirectory(prefix="nar_speech_nemo_") as folder:
        try:
            with tarfile.open(path, "r:*") as archive:
                _extract(archive, Path(folder), path)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a whole .nemo archive ({type(error).__name__}); get the file again"
            ) from error
        missing = [name for name in (CONFIG, WEIGHTS) if not (Path(folder) / name).is_file()]
        if missing:
            raise CheckpointError(f"{path}: holds no {missing[0]}; is it a model of NeMo's ASR?")
        yield Path(folder)


def _extract(archive: tarfile.TarFile, folder: Path, where: Path) -> None:
    """Configuration, weights and small files (tokenizers) of an archive into ``folder``."""
    room = (where.stat().st_size + (1 << 20)) * MAX_EXPANSION
    for number, member in enumerate(archive):
        if number >= MAX_MEMBERS:
            raise CheckpointError(f"{where}: holds more than {MAX_MEMBERS} files; it is no NeMo model")
        parts = PurePosixPath(member.name).parts
        if not member.isfile() or len(parts) != 1:
            continue  # folders, links, and what lies deeper or outside
        limit = MAX_WEIGHTS if parts[0] == WEIGHTS else MAX_TEXT
        if member.size > limit:
            raise CheckpointError(f"{where}: {parts[0]} claims {member.size} bytes; the limit is {limit}")
        room -= member.size
        if room < 0:
            raise CheckpointError(f"{where}: grows more than {MAX_EXPANSION}-fold; it is no NeMo model")
        target = folder / parts[0]
        if target.exists():
            raise CheckpointError(f"{where}: holds {parts[0]} twice; get the file again")
        with archive.extractfile(member) as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


def read_config(path: Path, where: str) -> dict[str, Any]:
    """The sections of a ``model_config.yaml`` that matter, references between keys resolved.

    Raises:
        ConfigError: not readable, or not a mapping.
    """
    try:
        tree = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            raise ValueError("not a mapping")
        # The rest (data sets, optimizer, trainer) may refer to things that are only there in a training.
        picked = {
            name: tree[name] for name in SECTIONS if name in tree and not OmegaConf.is_missing(tree, name)
        }
        return {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in picked.items()
        }
    except Exception as error:  # yaml's and omegaconf's errors have no common public base
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{where}: not a readable configuration ({reason}); get the file again") from error


def _section(tree: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = tree.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {name}: expected a mapping of keys to values")
    return dict(value)


def convert_encoder(section: Mapping[str, Any], where: str) -> tuple[int, FastConformerConfig]:
    """Input size and our configuration of an ``encoder`` section.

    Raises:
        ConfigError: another encoder, or an option that has no counterpart here.
    """
    where = f"{where}: encoder"
    values = {**ENCODER_DEFAULTS, **section}
    target = str(values.get("_target_", "ConformerEncoder"))
    if target.rpartition(".")[2] != "ConformerEncoder":
        raise ConfigError(f"{where}: _target_ {target} is not supported; expected ConformerEncoder")
    require(values, {key: ENCODER_FIXED[key] for key in values if key in ENCODER_FIXED}, where)
    width = values.pop("feat_out", None)
    if width not in (None, -1, values.get("d_model")):
        raise ConfigError(f"{where}: feat_out {width} is not supported; expected -1")
    values["conv_context_size"] = _conv_context(values, where)
    contexts = values.get("att_context_size") or [-1, -1]
    values["att_context_size"] = [contexts] if isinstance(contexts[0], int) else contexts
    values["att_context_probs"] = values.get("att_context_probs") or ()
    size = values.get("feat_in")
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"{where}: feat_in: got {size!r}; expected the number of mel bands")
    left_out = ENCODER_IGNORED | set(ENCODER_FIXED)
    kept = {key: value for key, value in values.items() if key not in left_out}
    return size, from_dict(FastConformerConfig, kept, where)


def _conv_context(values: Mapping[str, Any], where: str) -> str | None:
    """``causal`` or None (centred) for a name or a pair of numbers."""
    context, kernel = values.get("conv_context_size"), values.get("conv_kernel_size")
    if context in (None, "causal"):
        return context
    if list(context) == [kernel - 1, 0]:
        return "causal"
    if list(context) == [(kernel - 1) // 2, (kernel - 1) // 2]:
        return None
    raise ConfigError(f"{where}: conv_context_size {context} is not supported; expected causal or null")


def head_as_linear(tensors: Mapping[str, Tensor], where: Path | str) -> dict[str, Tensor]:
    """The tensors of a checkpoint with the CTC head's weight (V, D, 1) as that of a linear layer.

    Raises:
        CheckpointError: there is no CTC head.
    """
    name = next((n for n in tensors if re.fullmatch(r"(?:ctc_)?decoder\.decoder_layers\.0\.weight", n)), None)
    if name is None:
        what = "only a transducer" if any(n.startswith("joint.") for n in tensors) else "no CTC head"
        raise CheckpointError(f"{where}: the model has {what}; only CTC and hybrid models can be loaded")
    weight = tensors[name]
    if weight.dim() != 3 or weight.shape[2] != 1:
        raise CheckpointError(f"{where}: {name} has shape {list(weight.shape)}; expected (tokens, width, 1)")
    return {**tensors, name: weight.squeeze(2)}


def convert_config(tree: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> CtcConfig:
    """Our configuration of the network that a ``model_config.yaml`` describes.

    Args:
        tensors: from :func:`head_as_linear`, for the size of the vocabulary. The blank is its last id.
    """
    size, encoder = convert_encoder(_section(tree, "encoder", where), where)
    head = next(tensors[n] for n in tensors if n.endswith("decoder_layers.0.weight"))
    reduction = _section(tree, "aux_ctc", where).get("ctc_reduction", tree.get("ctc_reduction"))
    kinds = {"mean_batch": "batch_mean", "mean": "token_mean", "mean_volume": "mean_volume", "sum": "sum"}
    return CtcConfig(
        input_size=size,
        vocab_size=len(head),
        encoder="fastconformer",
        encoder_conf=to_dict(encoder),
        blank=len(head) - 1,
        ctc_reduction=kinds.get(reduction, "batch_mean"),
    )


def build_frontend(section: Mapping[str, Any], where: str) -> Frontend:
    """The log-mel features of a ``preprocessor`` section.

    Raises:
        ConfigError: other features, or an option that has no counterpart here.
    """
    where = f"{where}: preprocessor"
    target = str(section.get("_target_", "AudioToMelSpectrogramPreprocessor"))
    if target.rpartition(".")[2] != "AudioToMelSpectrogramPreprocessor":
        raise ConfigError(f"{where}: _target_ {target} is not supported; expected mel spectrograms")
    require(section, {key: FRONTEND_FIXED[key] for key in section if key in FRONTEND_FIXED}, where)
    names = {"sample_rate", "window_size", "window_stride", "window", "normalize", "n_fft", "features"}
    names |= {"lowfreq", "highfreq"}
    unknown = [key for key in section if key not in names | FRONTEND_IGNORED | set(FRONTEND_FIXED)]
    if unknown:
        raise ConfigError(f"{where}: unknown key '{unknown[0]}'; known keys: {', '.join(sorted(names))}")
    normalize = section.get("normalize", "per_feature")
    if normalize == "all_features" or isinstance(normalize, Mapping):
        raise ConfigError(f"{where}: normalize {normalize!r} is not supported; expected per_feature or NA")
    return Frontend(
        from_dict(
            FrontendConfig,
            {
                "kind": "nemo",
                "sample_rate": section.get("sample_rate", 16000),
                "num_mels": section.get("features", 64),
                "window": section.get("window", "hann"),
                "frame_ms": 1000.0 * section.get("window_size", 0.02),
                "shift_ms": 1000.0 * section.get("window_stride", 0.01),
                "fft_size": section.get("n_fft"),
                "low_hz": float(section.get("lowfreq") or 0),
                "high_hz": float(section.get("highfreq") or 0),
                "normalize": "per_feature" if normalize == "per_feature" else "none",
            },
            where,
        )
    )


def _check_filters(frontend: Frontend, tensors: Mapping[str, Tensor], where: str) -> None:
    """The checkpoint brings its mel filters: ours must be the same."""
    filters = tensors.get("preprocessor.featurizer.fb")
    if filters is None:
        return
    ours = frontend.mel.T
    if filters.shape[-2:] != ours.shape or (filters.float() - ours).abs().max() > 1e-4 * ours.abs().max():
        raise ConfigError(
            f"{where}: preprocessor: the mel filters in the weights are not those of this configuration"
        )


def build_tokenizer(tree: Mapping[str, Any], folder: Path, where: str) -> Tokenizer:
    """A sentencepiece model named in the configuration, or the list of characters in it.

    Raises:
        ConfigError: another kind, or a file that is missing.
    """
    section = _section(tree, "tokenizer", where)
    if not section:
        head = _section(_section(tree, "aux_ctc", where), "decoder", where) or _section(
            tree, "decoder", where
        )
        labels = head.get("vocabulary") or tree.get("labels")
        if not labels:
            raise ConfigError(f"{where}: neither tokenizer nor vocabulary; the model can't be read")
        return CharTokenizer(["<space>" if piece == " " else str(piece) for piece in labels])
    if str(section.get("type")).lower() != "bpe":
        raise ConfigError(f"{where}: tokenizer.type {section.get('type')!r} is not supported; expected bpe")
    # An archive names its own files as nemo:NAME, whatever folder they came from.
    name = PurePosixPath(str(section.get("model_path") or "tokenizer.model").removeprefix("nemo:")).name
    found = [folder / name] if (folder / name).is_file() else sorted(folder.glob("*tokenizer.model"))
    if len(found) != 1:
        raise ConfigError(f"{where}: tokenizer.model_path: no file {name} beside the configuration")
    return BpeTokenizer(found[0])
