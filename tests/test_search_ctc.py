"""CTC searches against enumeration of all paths and against slow, obvious implementations."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import InputError
from nar_speech.search import align
from nar_speech.search.ctc import (
    ContextGraph,
    CtcHypothesis,
    forced_align,
    greedy,
    prefix_beam,
    token_borders,
    token_spans,
)
from nar_speech.search.rescore import attention_rescore

sizes = st.tuples(
    st.integers(1, 4),  # batch
    st.integers(1, 12),  # frames
    st.integers(2, 6),  # vocabulary
    st.integers(0, 2**31 - 1),  # seed
)


def make_batch(batch, frames, vocabulary, seed, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(batch, frames, vocabulary, generator=generator)
    lengths = torch.randint(1, frames + 1, (batch,), generator=generator)
    return logits.log_softmax(-1), lengths


def collapse(path, blank=0):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def all_sequences(log_probs):
    """Log probability of every token sequence of one utterance, by enumeration of all paths."""
    frames, vocabulary = log_probs.shape
    totals = {}
    for path in itertools.product(range(vocabulary), repeat=frames):
        score = sum(log_probs[t, label].item() for t, label in enumerate(path))
        tokens = collapse(path)
        totals[tokens] = np.logaddexp(totals.get(tokens, -np.inf), score)
    return totals


def slow_prefix_beam(log_probs, beam, blank=0):
    """Scores of prefixes in a dictionary: the textbook form of the search."""
    prefixes = {(): (0.0, -math.inf)}
    for frame in log_probs:
        grown = {}

        def add(prefix, blank_score, token_score, grown=grown):
            a, b = grown.get(prefix, (-math.inf, -math.inf))
            grown[prefix] = (np.logaddexp(a, blank_score), np.logaddexp(b, token_score))

        values, symbols = frame.topk(min(beam, len(frame)))
        for value, symbol in zip(values.tolist(), symbols.tolist(), strict=True):
            for prefix, (ends_blank, ends_token) in prefixes.items():
                total = np.logaddexp(ends_blank, ends_token)
                if symbol == blank:
                    add(prefix, total + value, -math.inf)
                elif prefix and prefix[-1] == symbol:
                    add(prefix, -math.inf, ends_token + value)
                    add((*prefix, symbol), -math.inf, ends_blank + value)
                else:
                    add((*prefix, symbol), -math.inf, total + value)
        best = sorted(grown.items(), key=lambda item: -np.logaddexp(*item[1]))
        prefixes = dict(best[:beam])
    return [(prefix, float(np.logaddexp(*scores))) for prefix, scores in prefixes.items()]


def assert_same(got: list[CtcHypothesis], want: list[CtcHypothesis]):
    assert [h.tokens for h in got] == [h.tokens for h in want]
    assert [h.times for h in got] == [h.times for h in want]
    for a, b in zip(got, want, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-5)
        assert a.confidences == pytest.approx(b.confidences, abs=1e-5)


@given(sizes)
@settings(deadline=None, max_examples=60)
def test_greedy_is_the_collapsed_argmax(size):
    log_probs, lengths = make_batch(*size)
    for hypothesis, frames, length in zip(
        greedy(log_probs, lengths), log_probs, lengths.tolist(), strict=True
    ):
        labels = frames[:length].argmax(-1).tolist()
        assert hypothesis.tokens == collapse(labels)
        assert hypothesis.score == pytest.approx(frames[:length].max(-1).values.sum().item(), abs=1e-4)
        runs = [list(group) for _, group in itertools.groupby(range(length), key=labels.__getitem__)]
        runs = [run for run in runs if labels[run[0]] != 0]
        assert hypothesis.times == tuple(run[0] for run in runs)
        best = [max(frames[t, labels[t]].exp().item() for t in run) for run in runs]
        assert hypothesis.confidences == pytest.approx(best, abs=1e-5)


def test_other_blank():
    log_probs, lengths = make_batch(2, 9, 5, 3)
    rolled = log_probs.roll(-1, dims=-1)  # blank 0 becomes the last id
    for a, b in zip(greedy(log_probs, lengths), greedy(rolled, lengths, blank=4), strict=True):
        assert tuple(token - 1 for token in a.tokens) == b.tokens
    for a, b in zip(
        prefix_beam(log_probs, lengths, 4), prefix_beam(rolled, lengths, 4, blank=4), strict=True
    ):
        assert [tuple(t - 1 for t in h.tokens) for h in a] == [h.tokens for h in b]


def test_no_frames():
    log_probs = torch.zeros(2, 0, 5)
    lengths = torch.zeros(2, dtype=torch.int64)
    assert [h.tokens for h in greedy(log_probs, lengths)] == [(), ()]
    assert [[h.tokens for h in n] for n in prefix_beam(log_probs, lengths, 3)] == [[()], [()]]
    alignment = forced_align(log_probs, lengths, torch.zeros(2, 0, dtype=torch.int64), lengths)
    assert token_spans(alignment) == [[], []]


@pytest.mark.parametrize("seed", range(4))
def test_wide_beam_gives_the_exact_probabilities(seed):
    log_probs, _ = make_batch(1, 5, 3, seed)
    want = all_sequences(log_probs[0])
    got = prefix_beam(log_probs, torch.tensor([5]), beam=200, candidates=3)[0]
    assert {h.tokens: pytest.approx(h.score, abs=1e-5) for h in got} == want
    assert sum(math.exp(h.score) for h in got) == pytest.approx(1.0, abs=1e-5)


@given(sizes, st.integers(1, 6))
@settings(deadline=None, max_examples=80)
def test_beam_equals_the_textbook_form(size, beam):
    log_probs, lengths = make_batch(*size)
    for frames, length, got in zip(
        log_probs, lengths.tolist(), prefix_beam(log_probs, lengths, beam), strict=True
    ):
        want = [(p, s) for p, s in slow_prefix_beam(frames[:length], beam) if s > -math.inf]
        assert [h.score for h in got] == pytest.approx([s for _, s in want], abs=1e-5)
        assert [h.tokens for h in got] == [p for p, _ in want]


@given(sizes, st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_batch_equals_singles_and_padding_does_not_matter(size, beam):
    log_probs, lengths = make_batch(*size)
    noise = torch.randn_like(log_probs).log_softmax(-1)
    inside = torch.arange(log_probs.shape[1]) < lengths[:, None]
    padded = torch.where(inside[:, :, None], log_probs, noise)
    graph = ContextGraph([[1], [1, 1]], 0.5)
    beams, best = prefix_beam(padded, lengths, beam, context=graph), greedy(padded, lengths)
    for row, length in enumerate(lengths.tolist()):
        single, one = log_probs[row : row + 1, :length], lengths[row : row + 1]
        assert_same(beams[row], prefix_beam(single, one, beam, context=graph)[0])
        assert_same(best[row : row + 1], greedy(single, one))


@given(sizes, st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_times_ascend_and_point_at_frames(size, beam):
    log_probs, lengths = make_batch(*size)
    for frames, length, hypotheses in zip(
        log_probs, lengths.tolist(), prefix_beam(log_probs, lengths, beam), strict=True
    ):
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for h in hypotheses:
            assert len(h.times) == len(h.tokens) == len(h.confidences)
            assert list(h.times) == sorted(set(h.times))
            assert all(0 <= t < length for t in h.times)
            want = [frames[t, token].exp().item() for t, token in zip(h.times, h.tokens, strict=True)]
            assert h.confidences == pytest.approx(want, abs=1e-6)


def test_nbest_is_the_head_of_the_beam():
    log_probs, lengths = make_batch(2, 10, 6, 1)
    for a, b in zip(
        prefix_beam(log_probs, lengths, 5, nbest=2), prefix_beam(log_probs, lengths, 5), strict=True
    ):
        assert_same(a, b[:2])


def test_blank_skip_keeps_repeats_apart_and_scores_close():
    log_probs = torch.full((1, 40, 5), -12.0)
    log_probs[:, :, 0] = 0.0
    for frame, token in ((3, 2), (20, 2), (21, 2), (30, 4)):
        log_probs[0, frame] = -5.0
        log_probs[0, frame, token] = 0.0
    log_probs = log_probs.log_softmax(-1)
    lengths = torch.tensor([40])
    plain = prefix_beam(log_probs, lengths, 4)[0]
    fast = prefix_beam(log_probs, lengths, 4, blank_skip=0.99)[0]
    assert fast[0].tokens == plain[0].tokens == (2, 2, 4)
    assert fast[0].times[0] == 3
    assert fast[0].times[2] == 30
    assert fast[0].score == pytest.approx(plain[0].score, abs=0.05)
    assert_same(prefix_beam(log_probs, lengths, 4, blank_skip=1.0)[0], plain)


@given(sizes, st.integers(1, 5), st.floats(0.2, 0.9))
@settings(deadline=None, max_examples=40)
def test_blank_skip_in_a_batch_equals_singles(size, beam, threshold):
    log_probs, lengths = make_batch(*size, sharpness=4.0)
    together = prefix_beam(log_probs, lengths, beam, blank_skip=threshold)
    for row, length in enumerate(lengths.tolist()):
        alone = prefix_beam(
            log_probs[row : row + 1, :length], lengths[row : row + 1], beam, blank_skip=threshold
        )
        assert_same(together[row], alone[0])


def test_beam_must_be_positive():
    with pytest.raises(InputError, match="beam"):
        prefix_beam(torch.zeros(1, 2, 3), torch.tensor([2]), beam=0)


tokens = st.lists(st.integers(1, 3), max_size=12)
phrases = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=5)


@given(tokens, phrases)
@settings(deadline=None, max_examples=150)
def test_context_score_counts_completed_phrases(sequence, phrases):
    graph = ContextGraph(phrases, 1.5)
    state, total = np.array([graph.start]), 0.0
    for token in sequence:
        score, state = graph.step(state, np.array([token]))
        total += score[0]
    total += graph.finish(state)[0]
    found = sum(
        len(phrase)
        for phrase in {tuple(p) for p in phrases}
        for end in range(len(sequence) + 1)
        if tuple(sequence[max(0, end - len(phrase)) : end]) == phrase
    )
    assert total == pytest.approx(1.5 * found)


def test_official_graph_forgets_a_phrase_inside_an_earlier_one():
    phrases = [[1, 2, 3], [1, 2]]
    for official, completed in ((True, 0.0), (False, 4.0)):
        graph = ContextGraph(phrases, 2.0, official=official)
        state = np.array([graph.start])
        scores = []
        for token in (1, 2):
            score, state = graph.step(state, np.array([token]))
            scores.append(score[0])
        assert scores == [2.0, 2.0 + completed]


def test_a_phrase_wins_with_its_score_and_counts_in_it():
    log_probs, lengths = make_batch(1, 8, 6, 5, sharpness=0.5)
    plain = prefix_beam(log_probs, lengths.fill_(8), 6)[0][0]
    phrase = [5, 4, 5]
    assert not any(plain.tokens[i : i + 3] == (5, 4, 5) for i in range(len(plain.tokens)))
    best = prefix_beam(log_probs, lengths, 6, context=ContextGraph([phrase], 5.0))[0][0]
    assert any(best.tokens[i : i + 3] == (5, 4, 5) for i in range(len(best.tokens)))
    assert best.context_score >= 15.0
    acoustic = -torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1), torch.tensor([best.tokens]), lengths, torch.tensor([len(best.tokens)]),
        reduction="sum",
    )  # fmt: skip
    assert best.score - best.context_score <= acoustic.item() + 1e-4


def test_scores_per_phrase():
    graph = ContextGraph([[1], [2]], [1.0, 3.0])
    assert graph.step(np.zeros(2, dtype=np.int64), np.array([1, 2]))[0].tolist() == [2.0, 6.0]
    with pytest.raises(InputError, match="2 scores for 1 phrases"):
        ContextGraph([[1]], [1.0, 2.0])
    with pytest.raises(InputError, match="empty phrase"):
        ContextGraph([[1], []])


class Bigram:
    """log p(token | previous token), state = previous token."""

    start = 0

    def __init__(self, vocabulary, seed):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocabulary, vocabulary, generator=generator).log_softmax(-1).double().numpy()

    def expand(self, states, tokens):
        following = np.broadcast_to(tokens[:, None, :], (*states.shape, tokens.shape[1]))
        return self.table[states[:, :, None], following], following.copy()

    def finish(self, states):
        return self.table[states, 0]


def test_language_model_is_added():
    log_probs, lengths = make_batch(1, 5, 3, 2)
    lengths = torch.tensor([5])
    lm = Bigram(3, 0)
    got = prefix_beam(log_probs, lengths, 200, candidates=3, lm=lm, lm_weight=0.7)[0]
    acoustic = all_sequences(log_probs[0])
    assert len(got) == len(acoustic)
    for h in got:
        path = [0, *h.tokens, 0]
        want = 0.7 * sum(lm.table[a, b] for a, b in itertools.pairwise(path))
        assert h.lm_score == pytest.approx(want, abs=1e-6)
        assert h.score == pytest.approx(acoustic[h.tokens] + want, abs=1e-5)
    scores = [h.score for h in got]
    assert scores == sorted(scores, reverse=True)


def slow_alignment(log_probs, target):
    """Best path by enumeration."""
    frames, vocabulary = log_probs.shape
    best = (-math.inf, None)
    for path in itertools.product(range(vocabulary), repeat=frames):
        if collapse(path) == tuple(target):
            best = max(best, (sum(log_probs[t, label].item() for t, label in enumerate(path)), path))
    return best


@pytest.mark.parametrize("search", [align._paths_one_by_one, align._paths_at_once])
def test_alignment_is_the_best_path(search):
    log_probs, _ = make_batch(3, 5, 3, 7)
    lengths, target_lengths = torch.tensor([5, 4, 3]), torch.tensor([2, 0, 2])
    targets = torch.tensor([[1, 1], [0, 0], [2, 1]])
    labels = search(log_probs, lengths, targets, target_lengths, 0)
    for row, (length, size) in enumerate(zip(lengths.tolist(), target_lengths.tolist(), strict=True)):
        want = slow_alignment(log_probs[row, :length], targets[row, :size].tolist())
        assert tuple(labels[row, :length].tolist()) == want[1]
    alignment = forced_align(log_probs, lengths, targets, target_lengths)
    assert alignment.scores[0].item() == pytest.approx(slow_alignment(log_probs[0], [1, 1])[0], abs=1e-5)


@given(sizes, st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=60)
def test_both_alignment_searches_agree_and_spans_cover_the_target(size, seed):
    batch, frames, vocabulary, _ = size
    log_probs, lengths = make_batch(*size)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, vocabulary, (batch, frames), generator=generator)
    draws = torch.rand(batch, generator=generator)
    target_lengths = (draws * (lengths // 2 + 1)).long()  # half of the frames always hold it
    a = align._paths_one_by_one(log_probs, lengths, targets, target_lengths, 0)
    b = align._paths_at_once(log_probs, lengths, targets, target_lengths, 0)
    inside = torch.arange(frames) < lengths[:, None]
    assert torch.equal(a.masked_fill(~inside, -1), b.masked_fill(~inside, -1))
    alignment = forced_align(log_probs, lengths, targets, target_lengths)
    for row, spans in enumerate(token_spans(alignment)):
        assert [s.token for s in spans] == targets[row, : target_lengths[row]].tolist()
        for span in spans:
            assert alignment.labels[row, span.start : span.end].tolist() == [span.token] * (
                span.end - span.start
            )
            mean = alignment.log_probs[row, span.start : span.end].exp().mean().item()
            assert span.score == pytest.approx(mean, abs=1e-5)
        assert all(x.end <= y.start for x, y in itertools.pairwise(spans))


def test_alignment_errors_name_the_utterance():
    log_probs, _ = make_batch(2, 4, 4, 0)
    with pytest.raises(InputError, match=r"utterance 1 has 3 frames.*need 4"):
        forced_align(
            log_probs, torch.tensor([4, 3]), torch.tensor([[1, 2, 3], [1, 1, 2]]), torch.tensor([3, 3])
        )
    with pytest.raises(InputError, match="utterance 0 holds the blank"):
        forced_align(log_probs, torch.tensor([4, 4]), torch.tensor([[1, 0], [1, 2]]), torch.tensor([2, 2]))


def test_token_borders_stay_near_the_peaks():
    borders = token_borders([10, 12, 100], duration=10.0, frame_shift=0.04, max_token_duration=1.0)
    assert borders == [
        pytest.approx((0.0, 0.44)),
        pytest.approx((0.44, 0.98)),
        pytest.approx((3.5, 4.5)),
    ]
    assert token_borders([], 1.0) == []


def test_rescoring_equals_one_hypothesis_at_a_time():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, 6, 6, generator=generator)  # utterance, previous token, next token

    def score(rows, tokens, lengths):
        first = torch.zeros(len(tokens), 1, dtype=torch.int64)
        turned = [
            [*row[:n][::-1], *row[n:]] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ]
        left, right = torch.cat([first, tokens], 1), torch.cat([first, torch.tensor(turned)], 1)
        return table[rows[:, None], left], -table[rows[:, None], right]

    nbest = [
        [CtcHypothesis((1, 2), -1.0, (0, 1), (0.5, 0.5)), CtcHypothesis((), -3.0, (), ())],
        [CtcHypothesis((3, 3, 4), -2.0, (0, 2, 3), (0.1, 0.2, 0.3))],
    ]

    def by_hand(row, sign, tokens):
        path = [0, *tokens, 5]
        log_probs = (sign * table[row]).log_softmax(-1)
        return [log_probs[a, b].item() for a, b in itertools.pairwise(path)]

    got = attention_rescore(nbest, score, eos=5, ctc_weight=0.5, reverse_weight=0.3)
    for row, (best, confidence) in enumerate(got):
        options = []
        for h in nbest[row]:
            left, right = by_hand(row, 1, h.tokens), by_hand(row, -1, h.tokens[::-1])
            total = 0.7 * sum(left) + 0.3 * sum(right)
            sure = [(math.exp(a) + math.exp(b)) / 2 for a, b in zip(left[:-1], right[:-1][::-1], strict=True)]
            options.append((total + 0.5 * h.score, h.tokens, sure, math.exp(total / len(left))))
        want = max(options)
        assert best.tokens == want[1]
        assert best.score == pytest.approx(want[0], abs=1e-5)
        assert best.confidences == pytest.approx(want[2], abs=1e-5)
        assert confidence == pytest.approx(want[3], abs=1e-5)
    assert attention_rescore([], score, eos=5) == []
