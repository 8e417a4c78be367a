"""New drafts out of old ones: where a draft goes on after an accepted text, which tokens of it to change.

Nothing here can change the outcome of a verification, only how many passes it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MARK, START, INSIDE = 0, 1, 2
# Costs of an alignment: punctuation comes and goes easily, a piece within a word more easily than a word.
CASE, SAME_KIND, OTHER_KIND = 1, 9, 13
ADD, SKIP = np.array((1, 10, 6)), np.array((1, 5, 4))  # of MARK, START, INSIDE


@dataclass(frozen=True)
class TokenKinds:
    """What is known about the tokens of a vocabulary of V.

    Attributes:
        classes: (V,) int64; tokens of the same class differ in case only.
        kinds: (V,) int64; MARK: only punctuation, START: begins a word, INSIDE: goes on with a word.
    """

    classes: np.ndarray
    kinds: np.ndarray

    @classmethod
    def unknown(cls, size: int) -> TokenKinds:
        """Every token is a word of its own."""
        return cls(np.arange(size), np.full(size, START))


def continue_at(text: Sequence[int], draft: Sequence[int], kinds: TokenKinds) -> int:
    """Where ``draft`` goes on after ``text``: ``draft[:place]`` is the beginning that is nearest to ``text``.

    By edit distance; a strange token rather replaces one of the draft than adds to it, unless it comes next
    but one: then one is left out.
    """
    if not len(draft):
        return 0
    old = np.asarray(draft)
    class_of, kind_of = kinds.classes[old], kinds.kinds[old]
    skipped = np.concatenate([[0], np.cumsum(SKIP[kind_of])])  # cost of leaving out draft[:j]
    row = skipped
    for token in text:
        kind = kinds.kinds[token]
        change = np.where(kind_of == kind, SAME_KIND, OTHER_KIND)
        change = np.where(class_of == kinds.classes[token], np.where(old == token, 0, CASE), change)
        new = row + ADD[kind]
        np.minimum(new[1:], row[:-1] + change, out=new[1:])
        row = np.minimum.accumulate(new - skipped) + skipped
    return int(np.flatnonzero(row == row.min())[-1])


def mend(draft: Sequence[int], guesses: Sequence[int | None], kinds: TokenKinds, end: int) -> list[int]:
    """Change the tokens of a draft that the verifier would have written otherwise.

    Every guess was made behind the draft's own, partly wrong, tokens (as in Jacobi decoding): it is right
    where the verifier finds its place again after an error.

    Args:
        draft: U tokens.
        guesses: what the verifier expects in the place of each token, and one more behind the last; None: no
            guess. A guess may be missing at the end.
        end: the id that ends a text; as a guess it is left alone.
    """
    new: list[int] = []
    place = 0
    while place < len(draft):
        token = draft[place]
        guess = guesses[place] if place < len(guesses) else None
        if guess is None or guess in (token, end):
            new.append(token)
        elif place + 1 < len(draft) and guess == draft[place + 1]:
            new.append(guess)  # the verifier leaves this token out
            place += 1
        elif kinds.classes[guess] == kinds.classes[token]:
            new.append(guess)
        elif _belongs_before(kinds.kinds[guess], kinds.kinds[token]):
            new += [guess, token]
        else:
            rest = _word_end(draft, place, kinds)
            # A new word, or the end of this one, makes what is left of the old word meaningless. Where the
            # verifier went on within the word its next piece is as likely to be mended as to be wrong.
            if kinds.kinds[guess] == INSIDE:
                rest = place + 1
            if rest == len(draft) or guess != draft[rest]:
                new.append(guess)
            place = rest - 1
        place += 1
    last = guesses[len(draft)] if len(guesses) > len(draft) else None
    return new if last is None or last == end else [*new, last]


def _word_end(draft: Sequence[int], place: int, kinds: TokenKinds) -> int:
    """Where the word that holds ``place`` ends."""
    place += 1
    while place < len(draft) and kinds.kinds[draft[place]] == INSIDE:
        place += 1
    return place


def _belongs_before(guess: int, token: int) -> bool:
    """Whether a guess is rather added before a token than put in its place."""
    return (guess == MARK and token != MARK) or (guess == INSIDE and token == START)
