"""Chinese text cut into words by jieba, with 一, 不 and 儿 joined to the words they belong to."""

from __future__ import annotations

import logging
import re
import warnings

from nar_speech.errors import MissingExtraError

# jieba needs time in the square of what has no mark in it; no sentence is as long as this.
_PIECE = re.compile(r"[^,.?!;:…]{1,500}[,.?!;:…]*|[,.?!;:…]+")


def cut_words(text: str, official: bool = False) -> list[str]:
    """Words (and marks) whose joined text is ``text``.

    Args:
        official: join as the official code does, which loses a 不 before another and at the end, and misses
            一 between repeated words behind the first such place.

    Raises:
        MissingExtraError: jieba is not installed.
    """
    try:
        with warnings.catch_warnings():  # its own about pkg_resources
            warnings.simplefilter("ignore")
            import jieba
    except ImportError as error:
        raise MissingExtraError("jieba", "tts", "cutting Chinese into words") from error
    jieba.setLogLevel(logging.WARNING)
    return join_words([word for piece in _PIECE.findall(text) for word in jieba.cut(piece)], official)


def join_words(words: list[str], official: bool = False) -> list[str]:
    """一, 不 and 儿 joined to the words they belong to; ``official`` as in :func:`cut_words`."""
    words = _join_yi_officially(words) if official else _join_yi(words)
    words = _join_next(words, "一")
    words = _join_bu_officially(words) if official else _join_next(words, "不")
    return _join_er(words)


def _join_yi(words: list[str]) -> list[str]:
    """看, 一, 看 becomes 看一看."""
    joined: list[str] = []
    at = 0
    while at < len(words):
        if words[at + 1 : at + 2] == ["一"] and words[at + 2 : at + 3] == [words[at]]:
            joined.append(f"{words[at]}一{words[at]}")
            at += 3
        else:
            joined.append(words[at])
            at += 1
    return joined


def _join_yi_officially(words: list[str]) -> list[str]:
    """The same with the official slip: positions of the input are used in the output, which is shorter."""
    joined: list[str] = []
    for at, word in enumerate(words):
        before = words[at - 1] if at else None
        if before is not None and word == "一" and words[at + 1 : at + 2] == [before]:
            if at - 1 < len(joined):
                joined[at - 1] += f"一{joined[at - 1]}"
            else:
                joined += [word, before]
        elif not (at >= 2 and before == "一" and words[at - 2] == word):
            joined.append(word)
    return joined


def _join_next(words: list[str], single: str) -> list[str]:
    """A word that is only ``single`` joined to the word behind it."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == single:
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def _join_bu_officially(words: list[str]) -> list[str]:
    """不 joined to the next word that is not 不, and lost where there is none."""
    joined: list[str] = []
    before = ""
    for word in words:
        if word != "不":
            joined.append(f"不{word}" if before == "不" else word)
        before = word
    return joined


def _join_er(words: list[str]) -> list[str]:
    joined: list[str] = []
    for word in words:
        if joined and word == "儿":
            joined[-1] += word
        else:
            joined.append(word)
    return joined
