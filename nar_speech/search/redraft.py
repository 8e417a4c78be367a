"""New drafts out of old ones: where a draft goes on after an accepted text, which tokens of it to change.

Nothing here can change the outcome of a verification, only how many passes it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        texts: the V texts of the tokens, and
        encode: tokens of a text: with both, a word that is spelled otherwise is cut into tokens anew.
    """

    classes: np.ndarray
    kinds: np.ndarray
    texts: Sequence[str] | None = None
    encode: Callable[[str], list[int]] | None = None

    @classmethod
    def unknown(cls, size: int) -> TokenKinds:
        """Every token is a word of its own."""
        return cls(np.arange(size), np.full(size, START))

    def spell(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        return "".join(self.texts[token] for token in tokens) if self.texts is not None else ""


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


def rest_of_word(
    text: Sequence[int], draft: Sequence[int], place: int, kinds: TokenKinds
) -> tuple[list[int], int]:
    """How a word that the verifier has begun goes on, and where the draft goes on after that word.

    Args:
        text: what is accepted; its last token is the verifier's own.
        draft, place: the draft, which goes on at ``place`` after ``text``.

    Returns:
        Tokens that end the word, where it is the draft's word in other letters or pieces, and a place not
        before the given one: what the draft has left of a word that was replaced is passed over.
    """
    last = text[-1]
    same = place > 0 and kinds.classes[draft[place - 1]] == kinds.classes[last]
    if same or kinds.kinds[last] == MARK:
        return [], place
    end = place
    while end < len(draft) and kinds.kinds[draft[end]] == INSIDE:
        end += 1
    begin = _word_start(text, len(text) - 1, kinds)
    old = draft[_word_start(draft, place - 1, kinds) : end] if place > 0 else draft[:end]
    return _go_on(list(text[begin:]), old, kinds), end


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
    place, strange = 0, False  # strange: the word before was replaced, so no guess can go on with it
    while place < len(draft):
        token = draft[place]
        guess = guesses[place] if place < len(guesses) else None
        known = guess is not None and guess != end
        if not known or guess == token or (strange and kinds.kinds[guess] == INSIDE):
            new.append(token)
        elif place + 1 < len(draft) and guess == draft[place + 1]:
            new.append(guess)  # the verifier leaves this token out
            place += 1
        elif kinds.classes[guess] == kinds.classes[token]:
            new.append(guess)
        elif _belongs_before(kinds.kinds[guess], kinds.kinds[token]):
            new += [guess, token]
        else:
            stop = place + 1
            while stop < len(draft) and kinds.kinds[draft[stop]] == INSIDE:
                stop += 1
            if stop < len(draft) and guess == draft[stop]:
                place, strange = stop, False  # the verifier leaves this word out
                continue
            new += [guess, *_go_on([guess], draft[place:stop], kinds)]
            place, strange = stop, True
            continue
        place, strange = place + 1, False
    last = guesses[len(draft)] if len(guesses) > len(draft) else None
    known = last is not None and last != end and not (strange and kinds.kinds[last] == INSIDE)
    return [*new, last] if known else new


def said_again(text: Sequence[int], same: int = 3, most: int = 16) -> list[int]:
    """A draft where none is left: what followed the last ``same`` tokens when they were written before."""
    tail = list(text[-same:])
    for place in range(len(text) - 1, same - 1, -1):
        if list(text[place - same : place]) == tail:
            after = list(text[place:])
            return (after * (most // len(after) + 1))[:most]  # and goes on so, where the text loops
    return []


def _word_start(tokens: Sequence[int], place: int, kinds: TokenKinds) -> int:
    while place > 0 and kinds.kinds[tokens[place]] == INSIDE:
        place -= 1
    return place


def _go_on(begun: list[int], old: Sequence[int], kinds: TokenKinds) -> list[int]:
    """Tokens after ``begun`` that make it the word ``old``, if only case and pieces differ so far."""
    if kinds.encode is None or not len(old):
        return []
    start, whole = kinds.spell(begun), kinds.spell(old)
    if not whole.lower().startswith(start.lower()) or len(whole) == len(start):
        return []
    rest = whole[len(start) :]
    tokens = kinds.encode(start + rest)
    return tokens[len(begun) :] if tokens[: len(begun)] == begun else kinds.encode(rest)


def _belongs_before(guess: int, token: int) -> bool:
    """Whether a guess is rather added before a token than put in its place."""
    return (guess == MARK and token != MARK) or (guess == INSIDE and token == START)
