"""One transcript by another of the same audio: times of words; and what is no transcript at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher

from nar_speech.types import Word

_SIGNS = re.compile(r"[^\w']+")
_REMARK = re.compile(r"\[[^\]]*\]?|\([^)]*\)?")


def bare(word: str) -> str:
    """A word without case and punctuation; the word itself where nothing else is left."""
    return _SIGNS.sub("", word.lower()) or word


def retime(
    texts: Sequence[str], confidences: Sequence[float], timed: Sequence[Word], duration: float
) -> tuple[Word, ...]:
    """Give words the times of the same words in ``timed``, which differ in case and punctuation at most.

    Words between two that were found share the time of the words that stand there in ``timed``, or else the
    pause between the two, in proportion to their letters; where there is no pause, half of the word before.

    Args:
        texts, confidences: the words, as many as there are.
        timed: words with times in seconds, in order.
        duration: of the audio, s.
    """
    words: list[Word] = []
    matcher = SequenceMatcher(None, [bare(t) for t in texts], [bare(w.text) for w in timed], autojunk=False)
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        if kind == "equal":
            words += [
                Word(texts[a0 + k], timed[b0 + k].start, timed[b0 + k].end, confidences[a0 + k])
                for k in range(a1 - a0)
            ]
            continue
        if a0 == a1:
            continue
        before = timed[b0 - 1].end if b0 > 0 else 0.0
        after = timed[b1].start if b1 < len(timed) else duration
        start, end = (timed[b0].start, timed[b1 - 1].end) if b1 > b0 else (before, max(before, after))
        if end <= start and words:  # no pause: the word before gives half of its time
            last = words[-1]
            start, end = (last.start + last.end) / 2, last.end
            words[-1] = replace(last, end=start)
        whole = sum(len(text) for text in texts[a0:a1]) or 1
        done = 0
        for text, confidence in zip(texts[a0:a1], confidences[a0:a1], strict=True):
            first = start + (end - start) * done / whole
            done += len(text)
            words.append(Word(text, first, start + (end - start) * done / whole, confidence))
    return tuple(words)


def as_written(text: str) -> str:
    """A draft of the written form of an English transcript in small letters: a capital, I, a full stop.

    Text that has capital letters or punctuation already is not changed.
    """
    text = text.strip()
    if not text or text != text.lower() or re.search(r"[.,!?;:]", text):
        return text
    text = re.sub(r"\bi\b(?=$|\s|')", "I", text)
    return text[0].upper() + text[1:] + "."


def is_annotation(text: str) -> bool:
    """Whether a text is nothing but a remark on the sound, as Whisper writes "[ Silence ]" or "(wind"."""
    rest = _REMARK.sub("", text)
    return rest != text and not any(character.isalnum() for character in rest)
