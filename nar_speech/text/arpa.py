"""ARPA files: the text format of back-off n-gram models (SRILM, kenlm)."""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from nar_speech.errors import ConfigError
from nar_speech.text.ngram import END, START, UNKNOWN, Level, NgramModel

LOG10 = math.log(10.0)
NEVER = -99.0  # log10 of what is never predicted, <s>
_COUNT = re.compile(r"ngram\s+(\d+)\s*=\s*(\d+)")


def write_arpa(model: NgramModel, path: str | Path) -> Path:
    """Write ``model`` as ARPA text; gzipped where the name ends in ``.gz``."""
    with _open(path, "wt") as file:
        file.write("\\data\\\n")
        for k, count in enumerate(model.num_ngrams, start=1):
            file.write(f"ngram {k}={count}\n")
        texts: list[str] = []
        for k, level in enumerate(model.levels, start=1):
            file.write(f"\n\\{k}-grams:\n")
            words = [model.words[i] for i in level.words.tolist()]
            if k > 1:
                parents = level.parents.tolist()
                words = [f"{texts[p]} {word}" for p, word in zip(parents, words, strict=True)]
            texts = words
            scores = np.maximum(level.log_probs / LOG10, NEVER).tolist()
            if k == model.order:
                file.writelines(f"{score:.7g}\t{text}\n" for score, text in zip(scores, texts, strict=True))
                break
            weights = (level.backoffs / LOG10).tolist()
            file.writelines(
                f"{score:.7g}\t{text}\t{weight:.7g}\n"
                for score, text, weight in zip(scores, texts, weights, strict=True)
            )
        file.write("\n\\end\\\n")
    return Path(path)


def read_arpa(path: str | Path) -> NgramModel:
    """Read ARPA text, plain or gzipped.

    A vocabulary without ``<unk>`` gets one that is never predicted. Contexts that are no n-gram themselves
    (pruned models of SRILM) are an error: they cannot be reached.

    Raises:
        ConfigError: a missing file, one that is not ARPA text, wrong counts or n-grams.
    """
    try:
        with _open(path, "rt") as file:
            return _read(file, str(path))
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{path}: can't read the language model ({reason}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not ARPA text; a kenlm binary can't be read, give the ARPA file it was made from"
        ) from error


def _open(path: str | Path, mode: str) -> TextIO:
    opener = gzip.open if Path(path).suffix == ".gz" else open
    return opener(path, mode, encoding="utf-8", newline="\n")


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    return ((number, line.strip()) for number, line in enumerate(file, start=1) if line.strip())


def _read(file: TextIO, where: str) -> NgramModel:
    lines = _lines(file)
    for _, line in lines:
        if line == "\\data\\":
            break
    else:
        raise ConfigError(f"{where}: not ARPA text, it has no line \\data\\; check the file")
    counts: list[int] = []
    heading = ""
    for number, line in lines:
        match = _COUNT.fullmatch(line)
        if match is None:
            heading = line
            break
        if int(match[1]) != len(counts) + 1:
            raise ConfigError(f"{where}:{number}: expected the count of order {len(counts) + 1}")
        counts.append(int(match[2]))
    if not counts:
        raise ConfigError(f"{where}: no line 'ngram 1=...' after \\data\\; check the file")
    words: list[str] = []
    ids: dict[str, int] = {}
    levels: list[Level] = []
    for order, count in enumerate(counts, start=1):
        if heading != f"\\{order}-grams:":
            raise ConfigError(f"{where}: expected \\{order}-grams:, found '{heading[:40]}'")
        rows, heading = _section(lines, order, count, where)
        if order == 1:
            words = [row[1] for row in rows]
            ids = {word: i for i, word in enumerate(words)}
            levels.append(_words(rows, words, ids))
        else:
            levels.append(_level(rows, ids, levels, where))
    if heading != "\\end\\":
        raise ConfigError(f"{where}: no line \\end\\ after the last n-gram; the file was cut off")
    for special in (START, END):
        if special not in ids:
            raise ConfigError(f"{where}: '{special}' is not among the words; every model has it")
    return NgramModel(words, levels)


def _section(lines: Iterator[tuple[int, str]], order: int, count: int, where: str) -> tuple[list, str]:
    """Rows (log10 P, word ..., log10 weight) of one order, and the line after them."""
    rows = []
    for number, line in lines:
        if line[0] == "\\":
            if len(rows) != count:
                raise ConfigError(
                    f"{where}:{number}: {len(rows)} n-grams of order {order}, {count} announced;"
                    " check the file"
                )
            return rows, line
        fields = line.split()
        if len(fields) == order + 1:
            fields.append("0")
        try:
            if len(fields) != order + 2:
                raise ValueError
            rows.append((float(fields[0]), *fields[1:-1], float(fields[-1])))
        except ValueError:
            raise ConfigError(
                f"{where}:{number}: expected log10 P, {order} words and a weight, found '{line[:60]}'"
            ) from None
    raise ConfigError(f"{where}: ends inside the n-grams of order {order}; the file was cut off")


def _words(rows: list, words: list[str], ids: dict[str, int]) -> Level:
    scores, weights = [row[0] for row in rows], [row[2] for row in rows]
    if UNKNOWN not in ids:
        ids[UNKNOWN] = len(words)
        words.append(UNKNOWN)
        scores, weights = [*scores, NEVER], [*weights, 0.0]
    count = np.arange(len(words))
    return Level(np.zeros_like(count), count, np.array(scores) * LOG10, np.array(weights) * LOG10)


def _level(rows: list, ids: dict[str, int], levels: list[Level], where: str) -> Level:
    size, length = len(ids), len(levels) + 1
    try:
        table = np.array([[ids[word] for word in row[1:-1]] for row in rows], dtype=np.int64)
    except KeyError as error:
        raise ConfigError(f"{where}: {error} is in an n-gram of order {length}, but no word") from error
    table = table.reshape(len(rows), length)
    parents = table[:, 0]
    for level, column in zip(levels[1:], table.T[1:-1], strict=True):
        keys = level.parents * size + level.words
        wanted = parents * size + column
        parents = np.searchsorted(keys, wanted)
        there = np.append(keys, -1)[parents] == wanted
        if not there.all():
            text = " ".join(rows[int((~there).argmax())][1:-1])
            raise ConfigError(f"{where}: the context of '{text}' is not among the shorter n-grams")
    order = np.lexsort((table[:, -1], parents))
    scores = np.array([row[0] for row in rows])[order] * LOG10
    weights = np.array([row[-1] for row in rows])[order] * LOG10
    return Level(parents[order], table[order, -1], scores, weights)
