"""Which part of a changing text will not change any more: pure functions and values."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import takewhile


def units(text: str) -> tuple[str, ...]:
    """Words with the spaces before them, and single characters of scripts without spaces.

    They put together are ``text``. A partial text is only ever stable up to the end of a unit.
    """
    found: list[str] = []
    begin = True  # of a unit
    for character in text:
        if is_ideographic(character):
            if found and found[-1].isspace():
                found[-1] += character
            else:
                found.append(character)
            begin = True
        elif character.isspace():
            if found and found[-1].isspace():
                found[-1] += character
            else:
                found.append(character)
            begin = False
        elif begin or not found:
            found.append(character)
            begin = False
        else:
            found[-1] += character
    return tuple(found)


def is_ideographic(character: str) -> bool:
    """Whether a character stands for itself: Chinese, Japanese kana, Thai and the like."""
    if character < "\u0e00":
        return False
    name = unicodedata.name(character, "")
    return name.startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO ", "KHMER", "MYANMAR"))


def common_prefix(texts: Sequence[str]) -> str:
    """The longest beginning of whole units that all texts share; of the beams of a search, for example."""
    split = [units(text) for text in texts]
    if not split:
        return ""
    same = takewhile(lambda group: len(set(group)) == 1, zip(*split, strict=False))
    return "".join(group[0] for group in same)


@dataclass(frozen=True)
class StablePrefix:
    """Follows the hypotheses of one segment and says how much of them to promise (local agreement).

    What ``agreement`` hypotheses in a row have in common, without the last ``hold`` units of the newest one,
    is promised and never taken back: where a later hypothesis contradicts it, the promised text stays and
    what the hypothesis has beyond it is put behind (Liu et al., "Low-latency sequence-to-sequence speech
    recognition and translation by partial hypothesis selection", Interspeech 2020, section 3).

    Attributes:
        promised: the text that will not change.
        text: the newest text to show; begins with ``promised``.
    """

    agreement: int = 2
    hold: int = 1
    promised: str = ""
    text: str = ""
    recent: tuple[str, ...] = ()

    @property
    def stable(self) -> int:
        """Characters of ``text`` that will not change: of an event ``Partial``."""
        return len(self.promised)

    def update(self, hypothesis: str) -> StablePrefix:
        """After the next hypothesis of the whole segment."""
        text = keep_promise(self.promised, hypothesis)
        recent = (*self.recent, text)[-self.agreement :]
        promised = self.promised
        if len(recent) == self.agreement:
            whole = units(text)
            held = "".join(whole[: max(len(whole) - self.hold, 0)])
            agreed = common_prefix([*recent, held])
            if len(agreed) > len(promised):
                promised = agreed
        return replace(self, promised=promised, text=text, recent=recent)

    def export(self) -> dict[str, object]:
        """Plain data for a snapshot."""
        return {"promised": self.promised, "text": self.text, "recent": list(self.recent)}

    def restore(self, data: dict[str, object]) -> StablePrefix:
        """With what :meth:`export` gave."""
        recent = tuple(str(text) for text in data["recent"])[-self.agreement :]
        return replace(self, promised=str(data["promised"]), text=str(data["text"]), recent=recent)


def keep_promise(promised: str, hypothesis: str) -> str:
    """``hypothesis`` with ``promised`` as its beginning, whatever stood there.

    The two are aligned by the units they share; what follows the place in the hypothesis where the promise
    ends is kept.
    """
    if hypothesis.startswith(promised):
        return hypothesis
    old, new = units(promised), units(hypothesis)
    matcher = SequenceMatcher(None, [u.strip() for u in old], [u.strip() for u in new], autojunk=False)
    blocks = [block for block in matcher.get_matching_blocks() if block.size]
    if not blocks:
        rest = new[len(old) :]
    else:
        last = blocks[-1]
        # Units of the promise behind the last match stand for as many of the hypothesis.
        rest = new[last.b + last.size + len(old) - last.a - last.size :]
    return promised + "".join(rest)
