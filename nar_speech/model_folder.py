"""Our model folder: ``model.yaml``, ``model.safetensors`` and tokenizer files.

``model.yaml`` holds the parts ``card``, ``frontend``, ``network``, ``tokenizer``, ``decoding``, perhaps
``stream`` and ``verifier`` and, after an import, ``sha256`` of the files. Every key is checked: a misspelt
one is an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from nar_speech import config as configs
from nar_speech.checkpoint import save_safetensors, sha256
from nar_speech.compress import compress
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.features import FrontendConfig
from nar_speech.text.tokenizer import Tokenizer, TokenizerConfig
from nar_speech.types import ModelCard

CONFIG_FILE = "model.yaml"
WEIGHTS_FILE = "model.safetensors"

LONGEST = 86_400.0  # seconds
TIMES = ("whole", "merge", "longest", "gap", "min_speech", "min_silence", "pad")
MAX_BEAM, MAX_BONUS = 10_000, 1e6
MAX_FRAMES = 100_000

DecoderName = Literal["auto", "paraformer", "ctc_greedy", "ctc_beam", "attention_rescoring"]


@dataclass(frozen=True)
class SegmentConfig:
    """How recordings are cut before recognition; times in seconds.

    Args:
        whole: a recording up to this length is not cut.
        merge: neighbouring stretches of speech are joined up to this length.
        longest: a stretch longer than this is cut where speech is least likely.
        gap: stretches further apart than this are not joined.
        threshold: speech probability at which a stretch begins; it ends 0.15 below.
        min_speech, min_silence: shorter stretches are dropped, shorter pauses bridged.
        pad: kept before and after a stretch.
    """

    whole: float = 20.0
    merge: float = 20.0
    longest: float = 28.0
    gap: float = 2.0
    threshold: float = 0.5
    min_speech: float = 0.2
    min_silence: float = 0.3
    pad: float = 0.2

    def __post_init__(self) -> None:
        if not 0.2 < self.threshold < 1:
            raise ConfigError(f"threshold: got {self.threshold:g}; must be above 0.2 and below 1")
        configs.check_range(self, 0, LONGEST, *TIMES)
        if not 1 <= self.merge <= self.longest:
            raise ConfigError(
                f"need 1 <= merge <= longest, got merge {self.merge:g}, longest {self.longest:g}"
            )


BROUGHT = ("lm", "prior")  # fields of the decoding that name files of the model folder


@dataclass(frozen=True)
class DecodingConfig:
    """How a model's output becomes text.

    Args:
        decoder: ``paraformer``, ``ctc_greedy``, ``ctc_beam`` or ``attention_rescoring`` (U2 models: the best
            of ``ctc_beam`` by the attention decoder); ``auto``: see ``choose`` of
            :mod:`nar_speech.pipelines.recognize`.
        beam: prefixes kept by ``ctc_beam``.
        lm: n-gram model that ``ctc_beam`` follows, a file in the model folder or a path: compact
            (``.safetensors``, of ``python -m recipes.ngram``) or ARPA text. None: none.
        lm_weight, word_bonus, unknown_word: see :class:`nar_speech.search.word_lm.WordLm`.
        prior: label prior of the CTC head, a file like ``lm`` with the tensor ``log_prior`` (V,); used with
            a language model only (:mod:`nar_speech.search.prior`). None: none.
        prior_weight: power of the prior by which the posteriors are divided.
        blank_skip: see :func:`nar_speech.search.prefix_beam.prefix_beam`.
        ctc_weight, reverse_weight: see :func:`nar_speech.search.rescore.attention_rescore`.
        nbest: hypotheses listed per segment; 1 lists none.
        hotwords: words or phrases to favour.
        hotword_score: natural-log bonus per hotword token in ``ctc_beam``.
        language, textnorm: prompts of SenseVoice; ``withitn`` asks for punctuation and digits.
        verify: whether the model's verifier checks the text and writes it with case and punctuation.
        max_passes: of the verifier over a segment; None: as many as it takes, then the text is that of its
            own greedy search.
        segments: how recordings are cut.
    """

    decoder: DecoderName = "auto"
    beam: int = 10
    lm: str | None = None
    lm_weight: float = 0.5
    word_bonus: float = 2.0
    unknown_word: float = -1.5
    prior: str | None = None
    prior_weight: float = 0.3
    blank_skip: float | None = None
    ctc_weight: float = 0.5
    reverse_weight: float = 0.0
    nbest: int = 1
    hotwords: tuple[str, ...] = ()
    hotword_score: float = 3.0
    language: str = "auto"
    textnorm: Literal["withitn", "woitn"] = "woitn"
    verify: bool = False
    max_passes: int | None = None
    segments: SegmentConfig = field(default_factory=SegmentConfig)

    def __post_init__(self) -> None:
        configs.check_range(self, 1, MAX_BEAM, "beam", "nbest")
        configs.check_range(self, 0, MAX_BONUS, "lm_weight", "hotword_score")
        configs.check_range(self, 0, 1, "ctc_weight", "reverse_weight", "prior_weight")
        configs.check_range(self, -MAX_BONUS, MAX_BONUS, "word_bonus", "unknown_word")
        if self.unknown_word > 0:
            raise ConfigError(f"unknown_word: got {self.unknown_word:g}; it is a penalty, at most 0")
        if self.max_passes is not None and self.max_passes < 1:
            raise ConfigError(f"max_passes: got {self.max_passes}; must be at least 1")
        for name in BROUGHT:
            if getattr(self, name) == "":
                raise ConfigError(f"{name}: the name is empty; name a file, or leave the key out")
        if self.blank_skip is not None and not 0 < self.blank_skip < 1:
            raise ConfigError(f"blank_skip: got {self.blank_skip:g}; must be between 0 and 1")


@dataclass(frozen=True)
class VerifierConfig:
    """The ``verifier`` part of a model: an autoregressive text decoder on the model's encoder.

    Args:
        tokenizer: of kind ``whisper_bpe``.
        network: numbers of :class:`nar_speech.layers.whisper_decoder.WhisperDecoderConfig`.
        weights: file in the model folder; float16, or int8 with scales (:mod:`nar_speech.compress`).
        tokens_per_second, extra_tokens: longest text of an utterance.
    """

    tokenizer: TokenizerConfig
    network: dict[str, Any]
    weights: str = "verifier.safetensors"
    tokens_per_second: float = 12.0
    extra_tokens: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.tokens_per_second < 1000 or self.extra_tokens < 0:
            raise ConfigError(
                f"verifier: tokens_per_second {self.tokens_per_second:g} must be above 0 and extra_tokens"
                f" {self.extra_tokens} not negative"
            )


@dataclass(frozen=True)
class StreamConfig:
    """The ``stream`` part of a CTC model: how it is fed with live speech, in output frames of its encoder.

    Args:
        chunk_size: frames of a chunk; text comes chunk by chunk.
        left: frames before a chunk that it sees; -1: a stream has room for four chunks.
    """

    chunk_size: int
    left: int

    def __post_init__(self) -> None:
        configs.check_range(self, 1, MAX_FRAMES, "chunk_size")
        configs.check_range(self, -1, MAX_FRAMES, "left")


@dataclass(frozen=True)
class ModelFile:
    """``model.yaml``. ``network`` is checked by the model that ``card.model`` names."""

    card: ModelCard
    network: dict[str, Any]
    tokenizer: TokenizerConfig
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    stream: StreamConfig | None = None
    verifier: VerifierConfig | None = None
    sha256: dict[str, str] = field(default_factory=dict)


def read_model_file(folder: str | Path) -> ModelFile:
    """Read and check ``model.yaml``.

    Raises:
        ConfigError: the file is missing, or has an unknown, missing or wrong key.
    """
    path = Path(folder) / CONFIG_FILE
    return configs.from_dict(ModelFile, configs.read_yaml(path), str(path))


def write_model_folder(
    folder: str | Path,
    weights: nn.Module | Mapping[str, Tensor],
    card: ModelCard,
    frontend: FrontendConfig,
    network: Any,
    tokenizer: Tokenizer,
    decoding: DecodingConfig | Mapping[str, Any] | None = None,
    cmvn_from: str | Path = ".",
    stream: StreamConfig | None = None,
) -> Path:
    """Write a model folder; ``model.yaml`` comes last, so a folder that has one is whole.

    Args:
        network: the model's configuration dataclass.
        cmvn_from: folder with the file that ``frontend.cmvn`` names.
        decoding: its ``lm`` and ``prior``, paths, are copied into the folder.
        stream: of a CTC model that hears streams; None: as its encoder does by default.

    Raises:
        ConfigError: the CMVN file or a file that ``decoding`` names is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / WEIGHTS_FILE, weights)
    tokenizer_config = tokenizer.save(folder)
    files = [WEIGHTS_FILE, *filter(None, (tokenizer_config.file, tokenizer_config.seg_dict))]
    if frontend.cmvn is not None:
        _bring(Path(cmvn_from) / frontend.cmvn, folder / frontend.cmvn, "frontend.cmvn")
        files.append(frontend.cmvn)
    if decoding is None or isinstance(decoding, Mapping):
        decoding = configs.from_dict(DecodingConfig, decoding or {}, "decoding")
    for key in BROUGHT:
        if getattr(decoding, key) is not None:
            source = Path(getattr(decoding, key))
            _bring(source, folder / source.name, f"decoding.{key}")
            decoding = replace(decoding, **{key: source.name})
            files.append(source.name)
    sums = {name: sha256(folder / name) for name in files}
    tree = ModelFile(
        card, configs.to_dict(network), tokenizer_config, frontend, decoding, stream, sha256=sums
    )
    _write_model_file(tree, folder)
    return folder


def change_model_decoding(folder: str | Path, **options: Any) -> ModelFile:
    """Change fields of the ``decoding`` part of a model folder; returns the new ``model.yaml``.

    Args:
        options: fields of :class:`DecodingConfig`. ``lm`` and ``prior`` are paths; the files are copied into
            the folder.

    Raises:
        ConfigError: an unknown field or a wrong value, or a file is missing.
    """
    folder = Path(folder)
    file = read_model_file(folder)
    sums = dict(file.sha256)
    for key in BROUGHT:
        before = getattr(file.decoding, key)
        if options.get(key) is not None:
            source = Path(options[key])
            _bring(source, folder / source.name, f"decoding.{key}")
            options[key] = source.name
            sums[source.name] = sha256(folder / source.name)
        if key in options and before not in (None, options[key]):
            sums.pop(before, None)
            (folder / before).unlink(missing_ok=True)
    decoding = configs.from_dict(DecodingConfig, {**vars(file.decoding), **options}, "decoding")
    tree = replace(file, decoding=decoding, sha256=sums)
    _write_model_file(tree, folder)
    return tree


def add_verifier(
    folder: str | Path,
    weights: nn.Module | Mapping[str, Tensor],
    network: Any,
    tokenizer: Tokenizer,
    store: Literal["float16", "int8"] = "int8",
    **options: Any,
) -> ModelFile:
    """Give a model folder a verifier; returns the new ``model.yaml``.

    Args:
        weights: of a :class:`nar_speech.layers.whisper_decoder.WhisperDecoder`.
        network: its configuration dataclass.
        tokenizer: of kind ``whisper_bpe``.
        store: how the weights are written (:mod:`nar_speech.compress`).
        options: other fields of :class:`VerifierConfig`.
    """
    folder = Path(folder)
    file = read_model_file(folder)
    config = VerifierConfig(tokenizer.save(folder), configs.to_dict(network), **options)
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    save_safetensors(folder / config.weights, compress(tensors, store))
    names = (config.weights, config.tokenizer.file)
    sums = {**file.sha256, **{name: sha256(folder / name) for name in names}}
    tree = replace(file, verifier=config, sha256=sums)
    _write_model_file(tree, folder)
    return tree


def copy_verifier(source: str | Path, target: str | Path) -> None:
    """Copy the verifier of a model folder, if it has one, into another folder of the same model."""
    source, target = Path(source), Path(target)
    config = read_model_file(source).verifier
    if config is None:
        return
    file = read_model_file(target)
    sums = dict(file.sha256)
    for name in (config.weights, config.tokenizer.file):
        _bring(source / name, target / name, "verifier")
        sums[name] = sha256(target / name)
    _write_model_file(replace(file, verifier=config, sha256=sums), target)


def find_files(decoding: DecodingConfig, folder: str | Path) -> DecodingConfig:
    """``decoding`` of a ``model.yaml`` with whole paths of the files of its folder that it names."""
    named = {key: getattr(decoding, key) for key in BROUGHT if getattr(decoding, key) is not None}
    return replace(decoding, **{key: str(Path(folder) / name) for key, name in named.items()})


def _bring(source: Path, target: Path, key: str) -> None:
    """Copy a file of the model unless it is there already."""
    if not source.is_file():
        raise ConfigError(f"{key}: no file {source}; it belongs to the model")
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def _write_model_file(tree: ModelFile, folder: Path) -> None:
    draft = folder / f".{CONFIG_FILE}"
    configs.write_yaml(tree, draft)
    draft.replace(folder / CONFIG_FILE)


def check_sums(folder: str | Path, sums: Mapping[str, str]) -> None:
    """Compare the files of a folder with recorded SHA-256 sums.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    for name, wanted in sums.items():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; get the model again")
        if sha256(path) != wanted.lower():
            raise CheckpointError(
                f"{path}: SHA-256 differs from the one in {CONFIG_FILE}; the file is damaged or was changed:"
                " get the model again"
            )
