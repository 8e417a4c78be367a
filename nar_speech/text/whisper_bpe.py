"""Whisper's byte-level BPE with case and punctuation, whole or pruned to its most useful pieces.

The file is a ``tokenizer.json`` of the library HF tokenizers. Pieces are made of the 256 bytes, so any text
can be encoded and comes back as it was. Special ids stand outside the text: ``encode`` never gives one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from nar_speech.errors import ConfigError, InputError
from nar_speech.text.postprocess import PieceGroup
from nar_speech.text.tokenizer import TokenizerConfig, change_case, look_up, timed
from nar_speech.types import Word

START, NO_TIMESTAMPS, END = "<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"
SPECIALS = (START, NO_TIMESTAMPS, END)


class WhisperBpeTokenizer:
    """Text to Whisper's ids and back.

    Args:
        source: path of a tokenizer.json, or its content.
        case: what is done to text before it is encoded.

    Attributes:
        prompt_ids: what the decoder is given before the text: start of transcript, no timestamps.
        eot: id that ends a text.

    Raises:
        ConfigError: a missing file, or one that is not such a tokenizer.
    """

    FILE = "verifier.json"

    def __init__(
        self, source: str | Path | Mapping[str, Any], case: Literal["keep", "lower", "upper"] = "keep"
    ):
        where = "tokenizer" if isinstance(source, Mapping) else str(source)
        self._tree = dict(source) if isinstance(source, Mapping) else _read_tree(source)
        special = {token["content"]: token["id"] for token in self._tree.get("added_tokens", ())}
        missing = [name for name in SPECIALS if name not in special]
        if missing:
            raise ConfigError(f"{where}: has no token {missing[0]}; give a tokenizer.json of Whisper")
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(self._tree))
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(
                f"{where}: not a tokenizer.json ({' '.join(str(error).split())[:100]})"
            ) from error
        self._model.encode_special_tokens = True  # "<|endoftext|>" within a text is text
        self.case = case
        self.prompt_ids = (special[START], special[NO_TIMESTAMPS])
        self.eot = special[END]
        self._special = frozenset(special.values())
        vocab = self._model.get_vocab()
        self._pieces = [""] * len(vocab)
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ConfigError(f"{where}: ids must be 0 to {len(vocab) - 1}, each once")
        for piece, number in vocab.items():
            self._pieces[number] = piece
        self._bytes = [b"" if i in self._special else _to_bytes(p, where) for i, p in enumerate(self._pieces)]

    @property
    def vocab_size(self) -> int:
        """Number of ids, V, special ones included."""
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones. Whisper writes a space before the first word."""
        try:
            return self._model.encode(change_case(text, self.case), add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError("text: holds half a character (a lone surrogate); remove it") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, spaces at its ends included; special ids give nothing, broken UTF-8 gives U+FFFD."""
        self.pieces(ids)  # checks the ids
        return self._text(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id, in the file's letters for bytes (a space is a G with a dot)."""
        return look_up(self._pieces, ids)

    def words(
        self,
        ids: Sequence[int],
        starts: Sequence[float],
        ends: Sequence[float],
        confidences: Sequence[float],
    ) -> tuple[Word, ...]:
        """Words, parted by white space, with times in seconds and the mean confidence of their pieces."""
        self.pieces(ids)
        groups = [
            PieceGroup(self._text([int(ids[i]) for i in places]).strip(), places[0], places[-1] + 1, True)
            for places in self.group(ids)
        ]
        return timed(groups, starts, ends, confidences, len(ids))

    def group(self, ids: Sequence[int]) -> list[list[int]]:
        """Places in ``ids`` of the pieces of each word; pieces that are only white space belong to none."""
        groups: list[list[int]] = []
        after_space = True
        for place, number in enumerate(map(int, ids)):
            content = self._bytes[number]
            if not content:
                continue
            if not content.strip():
                after_space = True
                continue
            if after_space or content[:1].isspace():
                groups.append([])
            groups[-1].append(place)
            after_space = content[-1:].isspace()
        return groups

    def texts(self) -> list[str]:
        """The text of every id by itself; special ids give nothing."""
        return [content.decode("utf-8", "replace") for content in self._bytes]

    def kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """What :class:`nar_speech.search.redraft.TokenKinds` wants to know of every id.

        Returns:
            (V,) int64, equal for pieces that differ in case only; (V,) int64: 0 only punctuation, 1 begins a
            word, 2 goes on with a word.
        """
        first: dict[str, int] = {}
        classes = np.empty(self.vocab_size, dtype=np.int64)
        kinds = np.empty(self.vocab_size, dtype=np.int64)
        for number, (piece, text) in enumerate(zip(self._pieces, self.texts(), strict=True)):
            classes[number] = first.setdefault(text.lower() if "\ufffd" not in text else piece, number)
            letters = any(letter.isalnum() or letter == "\ufffd" for letter in text)
            kinds[number] = (1 if text[:1].isspace() else 2) if letters else 0
        return classes, kinds

    def to_config(self) -> TokenizerConfig:
        """The configuration with which ``load_tokenizer`` gives this tokenizer back, once saved."""
        return TokenizerConfig(kind="whisper_bpe", file=self.FILE, case=self.case)

    def save(self, folder: str | Path, name: str | None = None) -> TokenizerConfig:
        """Write the file (``verifier.json``) into ``folder``; returns the configuration that names it."""
        name = name or self.FILE
        text = json.dumps(self._tree, ensure_ascii=False, separators=(",", ":"))
        Path(folder, name).write_text(text + "\n", encoding="utf-8")
        return replace(self.to_config(), file=name)

    def _text(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[int(i)] for i in ids).decode("utf-8", "replace")


def prune(
    tree: Mapping[str, Any], counts: Mapping[int, int], size: int, first: int = 0
) -> tuple[dict, list[int]]:
    """A smaller tokenizer, and the ids of its entries in the large one.

    Kept are all bytes, the special ids that :class:`WhisperBpeTokenizer` needs, the ``first`` ids of the
    large vocabulary (merges are learnt in the order of their frequency), then the most counted pieces. With
    a piece its two halves are kept, down to bytes, so every kept piece can still be merged. Ids keep their
    order.

    Args:
        tree: content of a tokenizer.json.
        counts: how often the large tokenizer gives an id on typical texts.
        size: number of ids to keep at most; pieces that were never counted are not used to fill it.

    Returns:
        The pruned tree, and (V,) ids of the large vocabulary: row ``i`` of a pruned embedding is ``ids[i]``.

    Raises:
        ConfigError: a tree of another kind, or a size that can't hold the bytes and the first ids.
    """
    model = tree.get("model", {})
    vocab: dict[str, int] = model.get("vocab", {})
    if model.get("type") != "BPE" or not vocab:
        raise ConfigError("tokenizer: not a BPE tokenizer.json")
    special = [token for token in tree.get("added_tokens", ()) if token["content"] in SPECIALS]
    halves: dict[str, tuple[str, str]] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        halves.setdefault(left + right, (left, right))
    names = {number: piece for piece, number in vocab.items()}
    outside = {token["id"] for token in tree.get("added_tokens", ())}
    kept = {piece for piece, number in vocab.items() if piece not in halves and number not in outside}

    def closure(piece: str) -> set[str]:
        new, open_ = set(), [piece]
        while open_:
            piece = open_.pop()
            if piece not in kept and piece not in new:
                new.add(piece)
                open_.extend(halves[piece])
        return new

    room = size - len(special)
    for number in range(first):
        if number in names and number not in outside:
            kept |= closure(names[number])
    if len(kept) > room:
        raise ConfigError(f"size: {size} can't hold the {len(kept) + len(special)} ids that are always kept")
    for number in sorted((n for n in counts if counts[n] > 0 and n in names), key=lambda n: (-counts[n], n)):
        new = closure(names[number]) if number not in outside else set()
        if len(kept) + len(new) <= room:
            kept |= new
    ids = sorted({vocab[piece] for piece in kept} | {token["id"] for token in special})
    rank = {number: place for place, number in enumerate(ids)}
    merges = [
        merge
        for merge in model["merges"]
        if "".join(merge.split(" ") if isinstance(merge, str) else merge) in kept
    ]
    pruned = {
        **tree,
        "added_tokens": [{**token, "id": rank[token["id"]]} for token in special],
        "post_processor": None,
        "model": {
            **model,
            "vocab": {piece: rank[number] for piece, number in vocab.items() if number in rank},
            "merges": merges,
        },
    }
    return pruned, ids


def _read_tree(path: str | Path) -> dict[str, Any]:
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: can't read the tokenizer ({type(error).__name__}); check the file"
        ) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise ConfigError(f"{path}: not a tokenizer.json of the library tokenizers")
    return tree


def _alphabet() -> dict[str, int]:
    """The byte of every letter of byte-level BPE: printable Latin-1 is itself, the rest from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _alphabet()


def _to_bytes(piece: str, where: str) -> bytes:
    try:
        return bytes(_BYTE_OF[letter] for letter in piece)
    except KeyError as error:
        raise ConfigError(
            f"{where}: piece '{piece}' is not made of bytes; give a tokenizer.json of Whisper"
        ) from error
