"""English words to the phones of MaskGCT: espeak-ng's American voice and the official merges."""

from __future__ import annotations

from nar_speech.text.g2p.marks import read_words
from nar_speech.text.g2p.vocabulary import WORD_GAP

VOICE = "en-us"
# Applied one after another, each from left to right: what some phones or pairs of them become.
MERGES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("t", "ɹ"), "tɹ"),
    (("d", "ɹ"), "dɹ"),
    (("t", "s"), "ts"),
    (("d", "z"), "dz"),
    (("ɪ", "ɹ"), "ɪɹ"),
    (("ɐ",), "ɚ"),
    (("ᵻ",), "ɪ"),
    (("əl",), "l"),
    (("x",), "k"),
    (("ɬ",), "l"),
    (("ʔ",), "t"),
    (("n̩",), "n"),
    (("oː", "ɹ"), "oːɹ"),
)
# A text whose last letter is one of these gets a word gap at its end. (b, d, v, z ... are missing; who
# trains or runs the official models has it so.)
_GAP_AFTER = frozenset("p⁼ʰmftnlkxʃs`ɹaoəɛɪeɑʊŋiuɥwæjː")


def english_phones(text: str, whole_words: bool = False) -> list[str]:
    """Phones of English words and marks, numbers already in words; perhaps with a word gap at the end.

    Args:
        whole_words: read "don't" as a word; the official code reads "don", a mark and "t".
    """
    phones = read_words(text, VOICE, whole_words)
    if phones and phones[-1][-1] in _GAP_AFTER:
        phones.append(WORD_GAP)
    for parts, whole in MERGES:
        phones = _merge(phones, parts, whole)
    return phones


def _merge(phones: list[str], parts: tuple[str, ...], whole: str) -> list[str]:
    if len(parts) == 1:
        return [whole if phone == parts[0] else phone for phone in phones]
    merged: list[str] = []
    for phone in phones:
        if merged and (merged[-1], phone) == parts:
            merged[-1] = whole
        else:
            merged.append(phone)
    return merged
