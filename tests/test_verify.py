"""Draft and verify gives the greedy text exactly, for any draft, batch or single, in few passes."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import InputError
from nar_speech.layers.whisper_decoder import WhisperDecoder, WhisperDecoderConfig
from nar_speech.search.redraft import (
    INSIDE,
    MARK,
    START,
    TokenKinds,
    continue_at,
    mend,
    rest_of_word,
    said_again,
)
from nar_speech.search.verify import greedy, loop_rest, verify

VOCAB, END = 12, 0
PROMPT = (10, 11)


@dataclass(frozen=True)
class Prefixes:
    """A state that simply knows what was fed; rows say which utterance each one is."""

    fed: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    lengths: torch.Tensor

    def truncate(self, lengths):
        fed = tuple(f[:n] for f, n in zip(self.fed, lengths.tolist(), strict=True))
        return replace(self, fed=fed, lengths=torch.tensor([len(f) for f in fed]))

    def select(self, rows):
        rows = rows.tolist()
        return Prefixes(
            tuple(self.fed[r] for r in rows), tuple(self.rows[r] for r in rows), self.lengths[rows]
        )


class Toy:
    """An autoregressive model given by a function of utterance and prefix; counts its passes."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def start(self, batch, first=0):
        return Prefixes(
            ((),) * batch, tuple(range(first, first + batch)), torch.zeros(batch, dtype=torch.int64)
        )

    def step(self, tokens, counts, state):
        self.calls += 1
        logits = torch.zeros(*tokens.shape, VOCAB)
        fed = []
        for row, (ids, count, old) in enumerate(
            zip(tokens.tolist(), counts.tolist(), state.fed, strict=True)
        ):
            for k in range(count):
                prefix = (*old, *ids[: k + 1])
                assert prefix[: len(PROMPT)] == PROMPT[: len(prefix)]
                logits[row, k] = self.function(state.rows[row], prefix)
            fed.append((*old, *ids[:count]))
        return logits, Prefixes(tuple(fed), state.rows, torch.tensor([len(f) for f in fed]))


def random_model(seed, context=3, ties=False):
    """Logits that depend on utterance, place and last tokens; whole numbers, with many ties if wanted."""

    def function(utterance, prefix):
        key = hash((seed, utterance, len(prefix), prefix[-context:])) % 2**31
        noise = (key * (2 * np.arange(VOCAB) + 1) + 97 * np.arange(VOCAB) ** 3) % 10007
        logits = torch.from_numpy(noise % (3 if ties else 1000)).float()
        logits[END] -= 0 if ties else 300  # texts of some length
        return logits

    return Toy(function)


def plain_greedy(toy, utterance, limit, suppress=()):
    """The definition, written down naively."""
    text = []
    while len(text) < limit:
        logits = toy.function(utterance, (*PROMPT, *text)).clone()
        logits[list(suppress)] = -math.inf
        token = logits.tolist().index(logits.max().item())
        if token == END:
            break
        text.append(token)
        rest = loop_rest(text)
        if rest:
            return text[:-rest]
    return text


tokens = st.integers(1, VOCAB - 1)
drafts = st.lists(tokens, max_size=25)


@given(st.integers(0, 10**6), st.lists(drafts, min_size=1, max_size=4), st.integers(1, 30), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_draft_gives_the_greedy_text(seed, some, limit, ties):
    toy = random_model(seed, ties=ties)
    limits = [limit + b for b in range(len(some))]
    wanted = [plain_greedy(toy, b, n, PROMPT) for b, n in enumerate(limits)]
    batch = verify(toy.step, toy.start(len(some)), PROMPT, some, END, limits, suppress=PROMPT)
    assert [list(found.tokens) for found in batch] == wanted
    assert all(found.complete and len(found.log_probs) == len(found.tokens) for found in batch)
    one_by_one = greedy(toy.step, toy.start(len(some)), PROMPT, END, limits, PROMPT)
    assert [list(found.tokens) for found in one_by_one] == wanted
    for b, found in enumerate(batch):
        alone = verify(toy.step, toy.start(1, b), PROMPT, some[b : b + 1], END, [limits[b]], suppress=PROMPT)
        assert alone[0].tokens == found.tokens
        assert alone[0].accepted == found.accepted
        assert alone[0].log_probs == pytest.approx(found.log_probs)
        assert found.log_probs == pytest.approx(one_by_one[b].log_probs)
        assert found.passes <= max(1, one_by_one[b].passes)


@given(st.integers(0, 10**6), st.data())
@settings(max_examples=80, deadline=None)
def test_edited_greedy_text_as_draft_takes_few_passes(seed, data):
    toy = random_model(seed, context=1)
    text = plain_greedy(toy, 0, 24)
    draft = list(text)
    edits = data.draw(st.integers(0, 3))
    for _ in range(edits):
        place = data.draw(st.integers(0, len(draft)))
        kind = data.draw(st.sampled_from(("change", "add", "drop")))
        draft[place : place + (kind != "add")] = [] if kind == "drop" else [data.draw(tokens)]
    found = verify(toy.step, toy.start(1), PROMPT, [draft], END, [24])[0]
    assert list(found.tokens) == text
    if edits == 0:
        assert found.passes == 1
    greedy_passes = greedy(toy.step, toy.start(1), PROMPT, END, [24])[0].passes
    assert found.passes <= min(greedy_passes, len(text) + 1)
    assert sum(found.accepted) >= len(text)


def audio(targets):
    """A model that hears: it finds its place by the prefix and says what comes next there."""

    def function(utterance, prefix):
        target, text = targets[utterance], prefix[len(PROMPT) :]
        # The place in the target that fits the text best, as an alignment would find it.
        kinds = TokenKinds.unknown(VOCAB)
        place = continue_at(text, target, kinds) if text else 0
        logits = torch.zeros(VOCAB)
        logits[target[place] if place < len(target) else END] = 9.0
        return logits

    return Toy(function)


@given(st.permutations(range(1, 10)), st.data())
@settings(max_examples=40, deadline=None)
def test_separate_errors_are_mended_together(target, data):
    """Two errors of any kinds: each costs two passes at most, a last one confirms."""
    draft = list(target)
    for place in (6, 2):
        kind = data.draw(st.sampled_from(("change", "add", "drop")))
        draft[place : place + (kind != "add")] = [] if kind == "drop" else [11]
    toy = audio([list(target)])
    found = verify(toy.step, toy.start(1), PROMPT, [draft], END, [20])[0]
    assert list(found.tokens) == list(target)
    assert found.passes <= 5
    assert toy.calls == found.passes


def test_bounded_passes_return_the_mended_draft():
    target = [1, 2, 3, 4, 5, 6, 7, 8]
    toy = audio([target, target])
    draft = [1, 2, 9, 4, 5, 9, 7, 8]
    one, whole = verify(toy.step, toy.start(2), PROMPT, [draft, target], END, [20, 20], max_passes=1)
    assert list(one.tokens) == target
    assert not one.complete
    assert one.accepted == (3,)
    assert [math.isnan(p) for p in one.log_probs] == [False] * 3 + [True] * 5
    assert whole.complete
    assert list(whole.tokens) == target
    short = verify(toy.step, toy.start(1), PROMPT, [draft], END, [5], max_passes=1)[0]
    assert list(short.tokens) == target[:5]


def test_loops_end():
    toy = Toy(lambda utterance, prefix: torch.eye(VOCAB)[{5: 6, 6: 5}.get(prefix[-1], 5)])
    for draft, most in (([], 8), ([5, 6], 8), ([5, 6] * 30, 2), ([7] * 40, 19)):
        found = verify(toy.step, toy.start(1), PROMPT, [draft], END, [200])[0]
        assert found.tokens == (5, 6)
        assert found.complete
        assert found.passes <= most  # its own words are the draft where there is none left


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ([1] * 19, 0),
        ([1] * 20, 19),
        ([2, 3] + [1, 4] * 10, 18),
        ([1, 2, 3, 4, 5, 6] * 3, 0),
        ([9] + [1, 2, 3, 4, 5, 6] * 4, 18),
        ([1, 2, 3, 4, 5, 6] * 3 + [1, 2, 3, 4, 5, 7], 0),
        (list(range(10)) * 2, 0),
        (list(range(10)) * 3, 20),
        ([7, *range(16), *range(16)], 16),
        ([*range(16), *range(15)], 0),
        ([], 0),
    ],
)
def test_what_a_loop_is(text, rest):
    assert loop_rest(text) == rest


def test_wrong_arguments_are_refused():
    toy = random_model(0)
    with pytest.raises(InputError, match="prompt"):
        verify(toy.step, toy.start(1), (), [[]], END, [5])
    with pytest.raises(InputError, match="limits"):
        verify(toy.step, toy.start(1), PROMPT, [[], []], END, [5])
    with pytest.raises(InputError, match="max_passes"):
        verify(toy.step, toy.start(1), PROMPT, [[]], END, [5], max_passes=0)


KINDS = TokenKinds(  # 3 is 2 with a capital, 4 a comma, 5 and 6 go on with a word
    np.array([0, 1, 2, 2, 4, 5, 6, 7, 8, 9, 10, 11]),
    np.array([MARK, START, START, START, MARK, INSIDE, INSIDE, START, START, START, START, START]),
)


@pytest.mark.parametrize(
    ("text", "draft", "place"),
    [
        ([1, 2], [1, 2, 7, 8], 2),
        ([1, 3], [1, 2, 7, 8], 2),  # case
        ([1, 4], [1, 2, 7, 8], 1),  # a comma is added
        ([1, 2, 9], [1, 2, 7, 8], 3),  # another word
        ([1, 2, 9, 5, 6], [1, 2, 7, 8], 3),  # another, longer word
        ([1, 7], [1, 2, 7, 8], 3),  # a word left out
        ([1, 8, 9], [1, 2, 7, 8, 9], 5),  # two words left out
        ([], [1, 2], 0),
        ([1], [], 0),
    ],
)
def test_place_where_the_draft_goes_on(text, draft, place):
    assert continue_at(text, draft, KINDS) == place


def test_a_loop_in_a_short_clip_is_cut_before_the_limit():
    toy = Toy(lambda utterance, prefix: torch.eye(VOCAB)[3])  # for ever
    for draft in ([], [3] * 8, [2, 3]):
        for limit, tokens in ((5, (3,) * 5), (13, (3,)), (100, (3,))):
            found = verify(toy.step, toy.start(1), PROMPT, [draft], END, [limit])[0]
            assert found.tokens == tokens


@pytest.mark.parametrize(
    ("draft", "guesses", "new"),
    [
        ([1, 2, 7], [1, 2, 7, 0], [1, 2, 7]),
        ([1, 2, 7], [None, 3, 7, 9], [1, 3, 7, 9]),  # case, and one more at the end
        ([1, 2, 7], [1, 4, 7], [1, 4, 2, 7]),  # a comma before 2
        ([1, 2, 7, 8], [1, 7, 7, 8], [1, 7, 8]),  # 2 is left out
        ([1, 2, 7], [1, 5, 7], [1, 5, 2, 7]),  # 1 goes on
        ([1, 2, 7], [1, 8, 7], [1, 8, 7]),  # another word
        ([1, 2, 7], [1, 0, 0], [1, 2, 7]),  # an end is no token
    ],
)
def test_mending(draft, guesses, new):
    assert mend(draft, guesses, KINDS, 0) == new


TEXTS = ["", " lab", "our", " Lab", "L", " L", "abour", "s", " work", "ing", ".", "ab"]
SPELLED = TokenKinds(
    np.array([0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 10, 11]),
    np.array([MARK, START, INSIDE, START, INSIDE, START, INSIDE, INSIDE, START, INSIDE, MARK, INSIDE]),
    TEXTS,
    lambda text: {" Labour": [5, 11, 2], "abour": [6], " Labs": [3, 7]}.get(text, []),
)


@pytest.mark.parametrize(
    ("text", "draft", "place", "word", "after"),
    [
        ([8, 5], [8, 1, 2, 8], 2, [11, 2], 3),  # " lab our" that begins with " L" is " L ab our"
        ([8, 8], [8, 1, 2, 8], 2, [], 3),  # another word: nothing is left of the old one
        ([8, 3], [8, 1, 2, 8], 2, [], 2),  # case only
        ([8, 10], [8, 1, 2, 8], 1, [], 1),  # a full stop
        ([8, 9], [8, 9, 8], 2, [], 2),
    ],
)
def test_a_word_in_other_pieces_goes_on(text, draft, place, word, after):
    assert rest_of_word(text, draft, place, SPELLED) == (word, after)


def test_a_text_is_its_own_draft():
    assert said_again([1, 2, 3, 4, 5, 1, 2, 3]) == [4, 5, 1, 2, 3] * 3 + [4]
    assert said_again([1, 2, 3, 9, 1, 2, 3, 4, 1, 2, 3], most=5) == [4, 1, 2, 3, 4]
    assert said_again([1, 2, 3]) == said_again([]) == said_again([1, 2, 3, 1, 2]) == []


def test_mending_of_words():
    assert mend([1, 2, 8], [5, 2, 8], SPELLED, 0) == [5, 11, 2, 8]  # " Labour"
    assert mend([5, 2, 1], [8, 7, 7], SPELLED, 0) == [8, 1]  # another word, after which no guess goes on
    assert mend([1, 2, 8], [1, 2, 7], SPELLED, 0) == [1, 2, 7, 8]  # the word goes on
    assert mend([1, 2, 8], [8, 7, 8], SPELLED, 0) == [8]  # the word is left out


@given(st.integers(0, 1000), st.lists(st.lists(st.integers(1, 19), max_size=12), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
@torch.inference_mode()
def test_whisper_decoder_verifies_as_it_searches(seed, some):
    torch.manual_seed(seed)
    config = WhisperDecoderConfig(20, size=16, heads=2, linear_units=16, num_blocks=2, max_tokens=40)
    decoder = WhisperDecoder(config).eval()
    decoder.token_embedding.weight.normal_()
    decoder.positional_embedding.normal_()
    lengths = torch.randint(1, 7, (len(some),))
    memory = torch.randn(len(some), int(lengths.max()), 16)
    limits = [10 + 3 * b for b in range(len(some))]

    def run(drafts, rows):
        state = decoder.start(memory[rows], lengths[rows], room=4)
        return verify(
            decoder.step, state, (18, 19), drafts, END, [limits[r] for r in rows], suppress=(18, 19)
        )

    everyone = list(range(len(some)))
    wanted = run([()] * len(some), everyone)
    found = run(some, everyone)
    assert [f.tokens for f in found] == [w.tokens for w in wanted]
    again = run([w.tokens for w in wanted], everyone)
    assert [a.tokens for a in again] == [w.tokens for w in wanted]
    for a, w in zip(again, wanted, strict=True):
        if sum(w.accepted) == len(w.tokens):  # a text that was cut must loop again to be cut again
            assert a.passes <= 2
    for row in everyone:
        assert run([some[row]], [row])[0].tokens == wanted[row].tokens


def test_a_guessed_word_takes_the_place_of_all_pieces_of_the_old_one():
    #                          0     1       2       3      4
    kinds = TokenKinds(np.arange(5), np.array([START, INSIDE, START, START, MARK]))
    # word 0+1 becomes word 2, word 3 stays
    assert mend([0, 1, 3], [2, None, 3, 4], kinds, end=9) == [2, 3, 4]
    # the verifier ends the word before its second piece
    assert mend([0, 1, 1, 3], [0, 2, None], kinds, end=9) == [0, 2, 3]
    # it goes on within the word: only that piece changes
    inside = TokenKinds(np.arange(5), np.array([START, INSIDE, INSIDE, START, MARK]))
    assert mend([0, 1, 3], [0, 2, 3], inside, end=9) == [0, 2, 3]
