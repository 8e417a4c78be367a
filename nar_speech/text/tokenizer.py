"""Tokenizers: text to ids and back, and pieces to timed words.

Own models: ids 0 ``<blank>``, 1 ``<s>``, 2 ``</s>``, 3 ``<unk>``. Official vocabularies keep their own ids.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import sentencepiece

from nar_speech.config import from_dict
from nar_speech.errors import ConfigError, InputError
from nar_speech.text.postprocess import (
    CJK,
    JOINER,
    WORD_START,
    PieceGroup,
    group_pieces,
    group_sentencepieces,
    is_special,
    join_words,
    split_tags,
)
from nar_speech.types import Word

_LETTER = rf"(?!{CJK})[^\W\d_]"
_UNITS = re.compile(rf"{CJK}|(?:{_LETTER})+(?:'(?:{_LETTER})+)*|\S")
_SPACES = (WORD_START, "<space>")


@dataclass(frozen=True)
class TokenizerConfig:
    """The ``tokenizer`` part of a model.

    Args:
        kind: ``bpe`` (sentencepiece model), ``char`` (list of pieces) or ``whisper_bpe`` (Whisper's
            vocabulary, whole or pruned).
        file: in the model folder: a sentencepiece model, or FunASR's tokens.json or tokens.txt, or WeNet's
            units.txt, or a tokenizer.json.
        seg_dict: FunASR's table of English words and their ``@@`` pieces (``char`` only).
        case: what is done to text before it is encoded.
    """

    kind: Literal["bpe", "char", "whisper_bpe"]
    file: str
    seg_dict: str | None = None
    case: Literal["keep", "lower", "upper"] = "keep"


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, V."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without sentence marks."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids give nothing."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id."""

    def words(
        self,
        ids: Sequence[int],
        starts: Sequence[float],
        ends: Sequence[float],
        confidences: Sequence[float],
    ) -> tuple[Word, ...]:
        """Words of ids with times in seconds and the mean confidence of their pieces."""

    def to_config(self) -> TokenizerConfig:
        """The configuration with which ``load_tokenizer`` gives this tokenizer back, once saved."""

    def save(self, folder: str | Path) -> TokenizerConfig:
        """Write the files that ``to_config`` names into ``folder``; returns that configuration."""


class BpeTokenizer:
    """A sentencepiece model.

    Args:
        model: path of a ``.model`` file, or its bytes.
        case: what is done to text before it is encoded.

    Raises:
        ConfigError: a missing file, or one that is not a sentencepiece model.
    """

    FILE = "tokenizer.model"

    def __init__(self, model: str | Path | bytes, case: Literal["keep", "lower", "upper"] = "keep"):
        where = "sentencepiece model" if isinstance(model, bytes) else str(model)
        try:
            data = model if isinstance(model, bytes) else Path(model).read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data) if data else None
        except OSError as error:
            raise ConfigError(f"{where}: can't read the sentencepiece model; check the path") from error
        except RuntimeError as error:
            raise ConfigError(
                f"{where}: not a sentencepiece model; use the model's own .model file"
            ) from error
        if self._model is None:
            raise ConfigError(f"{where}: the file is empty; use the model's own .model file")
        self.case = case
        self._pieces = [self._model.id_to_piece(i) for i in range(self._model.vocab_size())]
        control = (self._model.is_control(i) or self._model.is_unknown(i) for i in range(len(self._pieces)))
        self._silent = [c or is_special(p) for c, p in zip(control, self._pieces, strict=True)]

    @property
    def vocab_size(self) -> int:
        """Number of ids, V."""
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without sentence marks."""
        return self._model.encode(change_case(text, self.case))

    def decode(self, ids: Sequence[int], tags: bool = False) -> str:
        """Text of ids; special ids give nothing, or with ``tags`` SenseVoice's ``<|tags|>`` are kept."""
        self.pieces(ids)  # checks the ids
        if not tags:
            return self._model.decode([i for i in map(int, ids) if not self._silent[i]]).strip()
        kept = [p for p in self.pieces(ids) if not is_special(p) or split_tags(p)[1]]
        return "".join(kept).replace(WORD_START, " ").strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id."""
        return look_up(self._pieces, ids)

    def words(
        self,
        ids: Sequence[int],
        starts: Sequence[float],
        ends: Sequence[float],
        confidences: Sequence[float],
    ) -> tuple[Word, ...]:
        """Words of ids with times in seconds and the mean confidence of their pieces."""
        pieces = ["<s>" if self._silent[int(i)] else p for i, p in zip(ids, self.pieces(ids), strict=True)]
        return timed(group_sentencepieces(pieces), starts, ends, confidences, len(pieces))

    def to_config(self) -> TokenizerConfig:
        """The configuration with which ``load_tokenizer`` gives this tokenizer back, once saved."""
        return TokenizerConfig(kind="bpe", file=self.FILE, case=self.case)

    def save(self, folder: str | Path) -> TokenizerConfig:
        """Write the model into ``folder``; returns the configuration that names it."""
        Path(folder, self.FILE).write_bytes(self._model.serialized_model_proto())
        return self.to_config()


class CharTokenizer:
    """A list of pieces: Chinese characters, letters, English words cut with ``@@``.

    Text is cut at spaces, then into Chinese characters, digits, words and signs. A word is looked up in
    ``seg_dict``, then as a piece, then cut into the longest ``@@`` pieces there are, then spelled. Each is
    tried as written, in lower and in upper case. A piece for the space, if any, goes between words.

    Args:
        pieces: the piece of every id.
        seg_dict: word to pieces.

    Raises:
        ConfigError: an empty list.
    """

    FILE, SEG_DICT_FILE = "tokens.json", "seg_dict"

    def __init__(
        self,
        pieces: Sequence[str],
        seg_dict: Mapping[str, Sequence[str]] | None = None,
        case: Literal["keep", "lower", "upper"] = "keep",
    ):
        if not pieces:
            raise ConfigError("tokenizer: the list of pieces is empty")
        self._pieces = list(pieces)
        self.case = case
        self.seg_dict = {word: list(parts) for word, parts in (seg_dict or {}).items()}
        self._ids = {piece: i for i, piece in reversed(list(enumerate(self._pieces)))}
        self._unknown = next((self._ids[p] for p in ("<unk>", "<OOV>") if p in self._ids), None)
        self._longest = max(len(piece) for piece in self._pieces)
        self._space = next((self._ids[p] for p in _SPACES if p in self._ids), None)
        self._marked = any(len(p) > 1 and p.startswith(WORD_START) for p in self._pieces)

    @property
    def vocab_size(self) -> int:
        """Number of ids, V."""
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without sentence marks.

        Raises:
            InputError: a character that is not in a vocabulary without ``<unk>``.
        """
        ids: list[int] = []
        for word in change_case(text, self.case).split():
            if ids and self._space is not None and not self._marked:
                ids.append(self._space)
            known = self._find(word)
            units = [] if known else _UNITS.findall(word)
            ids.extend(known or (i for unit in units for i in self._encode_unit(unit)))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids as FunASR writes it; special ids give nothing."""
        return join_words(self._groups(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id."""
        return look_up(self._pieces, ids)

    def words(
        self,
        ids: Sequence[int],
        starts: Sequence[float],
        ends: Sequence[float],
        confidences: Sequence[float],
    ) -> tuple[Word, ...]:
        """Words of ids with times in seconds and the mean confidence of their pieces."""
        return timed(self._groups(ids), starts, ends, confidences, len(ids))

    def to_config(self) -> TokenizerConfig:
        """The configuration with which ``load_tokenizer`` gives this tokenizer back, once saved."""
        seg_dict = self.SEG_DICT_FILE if self.seg_dict else None
        return TokenizerConfig(kind="char", file=self.FILE, seg_dict=seg_dict, case=self.case)

    def save(self, folder: str | Path) -> TokenizerConfig:
        """Write ``tokens.json`` (and ``seg_dict``) into ``folder``; returns the configuration."""
        folder = Path(folder)
        text = json.dumps(self._pieces, ensure_ascii=False, indent=0)
        (folder / self.FILE).write_text(text + "\n", encoding="utf-8")
        if self.seg_dict:
            lines = "".join(f"{word}\t{' '.join(parts)}\n" for word, parts in self.seg_dict.items())
            (folder / self.SEG_DICT_FILE).write_text(lines, encoding="utf-8")
        return self.to_config()

    def _groups(self, ids: Sequence[int]) -> list[PieceGroup]:
        pieces = self.pieces(ids)
        if not self._marked and self._space is None:
            return group_pieces(pieces)
        return group_sentencepieces([WORD_START if piece in _SPACES else piece for piece in pieces])

    def _find(self, word: str) -> list[int]:
        """Ids of a word that the tables know as a whole; empty if they don't."""
        for form in (word, word.lower(), word.upper()):
            if form in self.seg_dict:
                return [self._id(piece) for piece in self.seg_dict[form]]
            for piece in (form, WORD_START + form) if self._marked else (form,):
                if piece in self._ids and not is_special(piece):
                    return [self._ids[piece]]
        return []

    def _encode_unit(self, unit: str) -> list[int]:
        """Ids of one character, or of a word as a whole, in ``@@`` pieces, or spelled."""
        whole = self._find(unit)
        if whole:
            return whole
        for form in (unit, unit.lower(), unit.upper()):
            cut = self._cut(form)
            if cut:
                return cut
        return [i for character in unit for i in self._find(character) or [self._id(character)]]

    def _cut(self, word: str) -> list[int]:
        """Longest pieces first, all but the last marked with ``@@``; empty if the word can't be cut so."""
        ids, begin = [], 0
        while begin < len(word):
            for end in range(min(len(word), begin + self._longest), begin, -1):
                piece = word[begin:end] + (JOINER if end < len(word) else "")
                if piece in self._ids:
                    ids.append(self._ids[piece])
                    begin = end
                    break
            else:
                return []
        return ids

    def _id(self, piece: str) -> int:
        """Id of a piece, or of ``<unk>``."""
        number = self._ids.get(piece, self._unknown)
        if number is None:
            raise InputError(f"text: '{piece}' is not in the vocabulary, which has no <unk>; remove it")
        return number


def read_pieces(path: str | Path) -> list[str]:
    """Pieces in the order of their ids, of tokens.json (list), tokens.txt or units.txt (``piece id`` lines).

    Raises:
        ConfigError: a missing or malformed file, ids that do not count from 0.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: can't read the vocabulary ({type(error).__name__}); check the file"
        ) from error
    if path.suffix == ".json":
        if not isinstance(tree, list) or not tree or not all(isinstance(piece, str) for piece in tree):
            raise ConfigError(f"{path}: expected a JSON list of pieces")
        return tree
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    fields = [line.rsplit(maxsplit=1) for line in lines]
    if not lines:
        raise ConfigError(f"{path}: the vocabulary is empty")
    if not all(len(field) == 2 and field[1].isdecimal() for field in fields):
        return [line.strip() for line in lines]
    table = {int(number): piece for piece, number in fields}
    if sorted(table) != list(range(len(lines))):
        raise ConfigError(
            f"{path}: ids must be 0 to {len(lines) - 1}, each once; use the model's own units.txt"
        )
    return [table[i] for i in range(len(lines))]


def read_seg_dict(path: str | Path) -> dict[str, list[str]]:
    """FunASR's seg_dict: a word and its pieces on each line.

    Raises:
        ConfigError: a missing file, or one that is not text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't read seg_dict ({type(error).__name__}); check the path") from error
    fields = [line.split() for line in lines]
    return {field[0]: field[1:] for field in fields if len(field) > 1}


def load_tokenizer(config: TokenizerConfig | Mapping[str, Any], folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        ConfigError: unknown keys, missing or malformed files.
    """
    if not isinstance(config, TokenizerConfig):
        config = from_dict(TokenizerConfig, config, "tokenizer")
    folder = Path(folder)
    if config.kind != "char" and config.seg_dict is not None:
        raise ConfigError("seg_dict: only kind char has one; leave the key out")
    if config.kind == "bpe":
        return BpeTokenizer(folder / config.file, config.case)
    if config.kind == "whisper_bpe":
        from nar_speech.text.whisper_bpe import WhisperBpeTokenizer

        return WhisperBpeTokenizer(folder / config.file, config.case)
    seg_dict = read_seg_dict(folder / config.seg_dict) if config.seg_dict else None
    return CharTokenizer(read_pieces(folder / config.file), seg_dict, config.case)


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> BpeTokenizer:
    """Train a BPE model on ``texts`` and write it to ``path``; the same texts give the same file.

    Ids 0 ``<blank>``, 1 ``<s>``, 2 ``</s>``, 3 ``<unk>``; every character of the texts is covered.

    Raises:
        ConfigError: no text, or a size that the texts can't fill or that can't hold their characters.
    """
    model = io.BytesIO()
    lines = [line for line in (text.strip() for text in texts) if line]
    if not lines:
        raise ConfigError("train_bpe: there is no text to train on")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="<blank>",
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"train_bpe: vocab_size {vocab_size} does not fit the texts: {reason}") from error
    Path(path).write_bytes(model.getvalue())
    return BpeTokenizer(model.getvalue())


def change_case(text: str, case: str) -> str:
    return {"keep": str, "lower": str.lower, "upper": str.upper}[case](text)


def look_up(pieces: list[str], ids: Sequence[int]) -> list[str]:
    ids = [int(i) for i in ids]
    wrong = [i for i in ids if not 0 <= i < len(pieces)]
    if wrong:
        raise InputError(
            f"ids: {wrong[0]} is outside the vocabulary of {len(pieces)}; is it the right tokenizer?"
        )
    return [pieces[i] for i in ids]


def timed(
    groups: Sequence[PieceGroup],
    starts: Sequence[float],
    ends: Sequence[float],
    confidences: Sequence[float],
    count: int,
) -> tuple[Word, ...]:
    """Give words the times and the mean confidence of their pieces."""
    if not len(starts) == len(ends) == len(confidences) == count:
        raise InputError(
            f"words: {count} ids need as many starts, ends and confidences; got {len(starts)}, {len(ends)},"
            f" {len(confidences)}"
        )
    words = []
    for group in groups:
        first, last = int(group.begin), math.ceil(group.end) - 1
        start = starts[first] + (group.begin - first) * (ends[first] - starts[first])
        end = starts[last] + (group.end - last) * (ends[last] - starts[last])
        inside = confidences[first : last + 1]
        words.append(Word(group.text, float(start), float(end), float(sum(inside) / len(inside))))
    return tuple(words)
