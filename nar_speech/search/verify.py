"""Greedy text of an autoregressive model, token by token or by verifying drafts in parallel.

After 'Lossless Acceleration for Seq2seq Generation with Aggressive Decoding' (Ge et al. 2022, arXiv
2205.10350). A draft from anywhere, such as a non-autoregressive model, is scored in one pass. It is accepted
up to the first token that the model would not have written; there the model's own token is taken, a new draft
is made of the rest of the old one (:mod:`nar_speech.search.redraft`), and so on. The outcome is the greedy
text, whatever the drafts.

Both searches take the token with the largest logit, of equal ones the lowest id, and end a text by the same
rules: the end token, the limit of its length, or a loop (:func:`loop_rest`), of which one round is kept. A
pass over many tokens rounds otherwise than one over a single token: where two logits are closer than that
(about 1e-5 in float32) the texts may differ, as they may between batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from nar_speech.errors import InputError
from nar_speech.search.redraft import TokenKinds, continue_at, mend, rest_of_word, said_again

SHORT_LOOP = 6  # tokens of a loop that fills half of what a clip can hold
LOOP_ROUNDS, LOOP_TOKENS = 4, 20  # a loop is something said at least so often, and at least so many tokens;
LONG_LOOPS = {16: 2, 8: 3}  # something of at least so many tokens need not be said as often
ANCHOR = 8  # accepted tokens in a row after which the draft's place is certain

S = TypeVar("S", bound="State")


class State(Protocol):
    """What an autoregressive model remembers of B utterances, such as a key-value cache."""

    lengths: Tensor

    def truncate(self: S, lengths: Tensor) -> S:
        """Forget the tokens behind ``lengths`` (B,)."""

    def select(self: S, rows: Tensor) -> S:
        """The state of the utterances ``rows`` (R,), which may repeat."""


# (tokens (B, K), counts (B,), state) -> logits (B, K, V) of the token after each of the first counts, state
Step = Callable[[Tensor, Tensor, S], tuple[Tensor, S]]


@dataclass(frozen=True)
class Decoded:
    """The text of one utterance.

    Attributes:
        tokens: without prompt and end.
        log_probs: natural logarithm of the model's probability of each token; NaN behind a first part that
            alone was verified.
        accepted: new tokens of every pass over the model.
        complete: False where the passes ran out before the draft was verified; then the tokens behind the
            first ``sum(accepted)`` are the draft's, mended.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    accepted: tuple[int, ...] = ()
    complete: bool = True

    @property
    def passes(self) -> int:
        """How often the model ran for this utterance."""
        return len(self.accepted)


def loop_rest(tokens: Sequence[int], least: int = LOOP_TOKENS) -> int:
    """Tokens to cut off a text that has just begun to loop; 0: it does not.

    A loop is something that is repeated at the end of the text: at least 4 times and for at least ``least``
    tokens, 3 times if it has 8 tokens or more, twice if it has 16. All rounds but the first are to be cut.
    """
    size = len(tokens)
    for period in range(1, size // 2 + 1):
        if tokens[-1] != tokens[-1 - period]:
            continue
        enough = next((n for least, n in LONG_LOOPS.items() if period >= least), LOOP_ROUNDS)
        rounds = max(enough, -(-least // period))
        span = rounds * period
        if span <= size and list(tokens[size - span : size - period]) == list(tokens[size - span + period :]):
            return span - period
    return 0


@dataclass
class _Text:
    """A text that is being written, and its draft."""

    limit: int
    end: int
    pending: list[int]  # known, but not yet fed to the model
    draft: list[int] = field(default_factory=list)
    plain: bool = False  # without any draft
    begin: int = 0  # the draft goes on here
    anchor: tuple[int, int] = (0, 0)  # places in text and draft that belong together
    fed: int = 0
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    done: bool = False
    complete: bool = True

    def write(self, token: int, log_prob: float) -> None:
        """Add a token the model chose; ends the text where a rule says so."""
        if token == self.end:
            self.done = True
            return
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        # In a clip of one word the limit would come before a loop of 20 tokens.
        rest = loop_rest(self.tokens, min(LOOP_TOKENS, max(SHORT_LOOP, self.limit // 2)))
        if rest:
            del self.tokens[-rest:], self.log_probs[-rest:]
        self.done = rest > 0 or len(self.tokens) >= self.limit

    def ahead(self) -> list[int]:
        """The draft's tokens to be scored next."""
        room = self.limit - len(self.tokens)
        return self.draft[self.begin : self.begin + room]

    def result(self) -> Decoded:
        return Decoded(tuple(self.tokens), tuple(self.log_probs), tuple(self.accepted), self.complete)


@torch.inference_mode()
def greedy(
    step: Step,
    state: State,
    prompt: Sequence[int],
    end: int,
    limits: Sequence[int],
    suppress: Sequence[int] = (),
) -> list[Decoded]:
    """Greedy search, one token of every utterance at a time.

    Args:
        step, state: the model, before its first token.
        prompt: tokens fed first, at least one.
        end: id that ends a text.
        limits: B largest numbers of tokens, prompt and end not counted.
        suppress: ids that are never written.

    Raises:
        InputError: an empty prompt.
    """
    return verify(step, state, prompt, None, end, limits, suppress=suppress)


@torch.inference_mode()
def verify(
    step: Step,
    state: State,
    prompt: Sequence[int],
    drafts: Sequence[Sequence[int]] | None,
    end: int,
    limits: Sequence[int],
    kinds: TokenKinds | None = None,
    suppress: Sequence[int] = (),
    max_passes: int | None = None,
) -> list[Decoded]:
    """The greedy text of every utterance, found with the help of its draft.

    Args:
        drafts: B token lists, prompt and end left out; any tokens will do, also none. None: no guess is ever
            tried, so that every pass gives one token.
        kinds: helps to make new drafts; None: nothing is known of the tokens.
        max_passes: after so many passes what is left of the draft is taken as it is, mended: faster, and in
            between the draft and the greedy text. None: until all is verified, one pass a token at most.
        step, state, prompt, end, limits, suppress: see :func:`greedy`.

    Raises:
        InputError: an empty prompt, numbers of drafts and limits that differ, max_passes below 1.
    """
    if not prompt:
        raise InputError("prompt: is empty; an autoregressive model needs a token to begin with")
    if drafts is not None and len(drafts) != len(limits):
        raise InputError(f"drafts: {len(drafts)} for {len(limits)} limits")
    if max_passes is not None and max_passes < 1:
        raise InputError(f"max_passes: got {max_passes}; must be at least 1")
    texts = [_Text(limit, end, list(prompt), plain=drafts is None, done=limit < 1) for limit in limits]
    for text, draft in zip(texts, drafts or (), strict=False):
        text.draft = [token for token in draft if token != end]
    active = list(range(len(texts)))  # utterance of every row of the state
    device = state.lengths.device
    while not all(text.done for text in texts):
        if sum(not texts[b].done for b in active) <= len(active) // 2:
            rows = [row for row, b in enumerate(active) if not texts[b].done]
            state = state.select(torch.tensor(rows, device=device))
            active = [active[row] for row in rows]
        current = [texts[b] for b in active]
        feeds = [[] if text.done else text.pending + text.ahead() for text in current]
        best, log_probs, state, size = _score(step, state, feeds, suppress)
        kinds = kinds or TokenKinds.unknown(size)
        for text, feed, ids, sure in zip(current, feeds, best, log_probs, strict=True):
            if feed:
                _accept(text, feed, ids, sure, kinds, max_passes)
        state = state.truncate(torch.tensor([text.fed for text in current], device=device))
    return [text.result() for text in texts]


def _score(
    step: Step, state: S, feeds: list[list[int]], suppress: Sequence[int]
) -> tuple[list[list[int]], list[list[float]], S, int]:
    """One pass: the best next token behind every fed one and its log probability; the state; V."""
    device = state.lengths.device
    width = max(map(len, feeds))
    tokens = torch.tensor([feed + [0] * (width - len(feed)) for feed in feeds], device=device)
    logits, state = step(tokens, torch.tensor([len(feed) for feed in feeds], device=device), state)
    logits = logits.float()
    if suppress:
        logits[..., list(suppress)] = -torch.inf
    peak, ids = logits.max(-1)  # the first of equal ones
    return ids.tolist(), (peak - logits.logsumexp(-1)).tolist(), state, logits.shape[-1]


def _accept(
    text: _Text, feed: list[int], best: list[int], sure: list[float], kinds: TokenKinds, passes: int | None
) -> None:
    """Take from the draft what the model agrees with, then the model's own token, and make the next draft."""
    before = len(feed) - len(text.ahead()) - 1  # place whose prediction is of the draft's first token
    ahead, written = feed[before + 1 :], len(text.tokens)
    agreed = 0
    while not text.done:
        token = best[before + agreed]
        text.write(token, sure[before + agreed])
        if agreed == len(ahead) or token != ahead[agreed]:
            break
        agreed += 1
    text.accepted.append(max(0, len(text.tokens) - written))
    text.fed += before + 1 + agreed
    if text.done:
        return
    if agreed >= ANCHOR:
        text.anchor = len(text.tokens) - 1, text.begin + agreed
    text.pending = text.tokens[-1:]
    if text.plain:
        return
    # Predictions behind the disagreement, by their place in the draft; the one at the disagreement is taken.
    first = text.begin
    guesses: list[int | None] = [None] * (first + agreed + 1) + list(best[before + agreed + 1 : len(feed)])
    start, origin = text.anchor
    place = origin + continue_at(text.tokens[start:], text.draft[origin:], kinds)
    word, place = rest_of_word(text.tokens, text.draft, place, kinds)
    if first + len(ahead) < len(text.draft):
        guesses = guesses[: first + len(ahead)]
    rest = word + mend(text.draft[place:], guesses[place:], kinds, text.end)
    if place == len(text.draft):
        rest += said_again([*text.tokens, *rest])
        text.anchor = len(text.tokens), place
    text.draft, text.begin = text.draft[:place] + rest, place
    if passes is not None and len(text.accepted) >= passes:
        rest = text.draft[place:][: text.limit - len(text.tokens)]
        text.tokens += rest
        text.log_probs += [float("nan")] * len(rest)
        text.done, text.complete = True, False
