"""Choosing among several texts by an autoregressive model: drafts in its own style, scored in parallel.

The greedy text of :mod:`nar_speech.search.verify` may begin with a mistake that it can't take back. Other
hypotheses, such as the n-best list of a non-autoregressive model, keep their words here and take only case
and punctuation from the model; then the text with the largest probability can be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nar_speech.search.redraft import MARK, TokenKinds
from nar_speech.search.verify import State, Step

Texts = list[list[list[int]]]  # of every utterance, of every candidate, tokens


def restyle(draft: Sequence[int], guesses: Sequence[int], kinds: TokenKinds, end: int) -> list[int]:
    """Change case and punctuation of a draft, but no word.

    Args:
        draft: U tokens.
        guesses: U + 1 tokens, what the model expects in the place of each and behind the last.
        end: the id that ends a text.
    """
    new: list[int] = []
    for place, token in enumerate(draft):
        guess, mark = guesses[place], kinds.kinds[token] == MARK
        follower = draft[place + 1] if place + 1 < len(draft) else end
        if guess in (end, token):
            new.append(token)
        elif kinds.classes[guess] == kinds.classes[token]:
            new.append(guess)
        elif kinds.kinds[guess] == MARK:
            new += [guess] if mark else [guess, token]
        elif not (mark and kinds.classes[guess] == kinds.classes[follower]):
            new.append(token)  # else the model leaves this mark out
    last = guesses[len(draft)]
    return [*new, last] if last != end and kinds.kinds[last] == MARK else new


@torch.inference_mode()
def style(
    step: Step,
    state: State,
    prompt: Sequence[int],
    texts: Texts,
    end: int,
    kinds: TokenKinds,
    passes: int = 2,
) -> Texts:
    """Case and punctuation for every candidate of every utterance, in ``passes`` parallel passes.

    Args:
        step, state, prompt, end, kinds: see :func:`nar_speech.search.verify.verify`.
        texts: candidates, without prompt and end; every utterance has at least one.
    """
    state, flat, counts = _spread(state, texts)
    for _ in range(passes):
        logits, state = _run(step, state, prompt, flat)
        best = logits.argmax(-1).tolist()
        first = len(prompt) - 1
        flat = [
            restyle(text, row[first : first + len(text) + 1], kinds, end)
            for text, row in zip(flat, best, strict=True)
        ]
    return [flat[a:b] for a, b in counts]


@torch.inference_mode()
def score(step: Step, state: State, prompt: Sequence[int], texts: Texts, end: int) -> list[list[float]]:
    """Natural log probability of every candidate of every utterance, its end included, in one pass.

    Args:
        step, state, prompt, texts, end: see :func:`style`.
    """
    state, flat, counts = _spread(state, texts)
    logits, _ = _run(step, state, prompt, flat)
    first = len(prompt) - 1
    scores = []
    for row, text in zip(logits, flat, strict=True):
        log_probs = row[first : first + len(text) + 1].float().log_softmax(-1)
        scores.append(float(log_probs.gather(1, torch.tensor([[*text, end]], device=row.device).T).sum()))
    return [scores[a:b] for a, b in counts]


def _spread(state: State, texts: Texts) -> tuple[State, list[list[int]], list[tuple[int, int]]]:
    """A row of the state for every candidate; all candidates in one list, and where those of each lie."""
    rows = [b for b, some in enumerate(texts) for _ in some]
    ends = torch.tensor([len(some) for some in texts]).cumsum(0).tolist()
    flat = [list(text) for some in texts for text in some]
    return (
        state.select(torch.tensor(rows, device=state.lengths.device)),
        flat,
        list(zip([0, *ends[:-1]], ends, strict=True)),
    )


def _run(step: Step, state: State, prompt: Sequence[int], texts: list[list[int]]) -> tuple[Tensor, State]:
    """Logits behind every token of prompt and text; the state is empty again afterwards."""
    feeds = [[*prompt, *text] for text in texts]
    width = max(map(len, feeds))
    device = state.lengths.device
    tokens = torch.tensor([feed + [0] * (width - len(feed)) for feed in feeds], device=device)
    logits, state = step(tokens, torch.tensor([len(feed) for feed in feeds], device=device), state)
    return logits, state.truncate(torch.zeros_like(state.lengths))
