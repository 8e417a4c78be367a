"""Alignment of text and frames against sums and maxima over every path."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import InputError
from nar_speech.losses.align import (
    best_durations,
    beta_binomial_prior,
    binarisation_loss,
    forward_sum_loss,
    soft_alignment,
    symbols_of_frames,
)


def paths(frames, symbols):
    """Durations of every path."""
    for cuts in itertools.combinations(range(1, frames), symbols - 1):
        ends = (0, *cuts, frames)
        yield [b - a for a, b in itertools.pairwise(ends)]


def score_of(scores, durations):
    symbols = torch.repeat_interleave(torch.arange(len(durations)), torch.tensor(durations))
    return float(scores[torch.arange(len(symbols)), symbols].sum())


lengths = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 5)).map(lambda p: (p[0] + p[1], p[0])), min_size=1, max_size=4
)


def batch_of(sizes, seed):
    """Random scores (B, T, N), lengths of frames and of texts."""
    frames, texts = torch.tensor(sizes).T
    torch.manual_seed(seed)
    return torch.randn(len(sizes), int(frames.max()) + 1, int(texts.max()) + 1), frames, texts


@settings(max_examples=60, deadline=None)
@given(sizes=lengths, seed=st.integers(0, 10**6))
def test_the_search_finds_the_best_path(sizes, seed):
    scores, frames, texts = batch_of(sizes, seed)
    got = best_durations(scores, frames, texts)
    assert got.shape == (len(sizes), scores.shape[2])
    for row, (t, n) in enumerate(sizes):
        durations = got[row, :n].tolist()
        assert min(durations) >= 1
        assert sum(durations) == t
        assert not got[row, n:].any()
        best = max(score_of(scores[row], path) for path in paths(t, n))
        assert score_of(scores[row], durations) == pytest.approx(best, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(sizes=lengths, seed=st.integers(0, 10**6))
def test_the_loss_sums_over_all_paths(sizes, seed):
    scores, frames, texts = batch_of(sizes, seed)
    wanted = []
    for row, (t, n) in enumerate(sizes):
        log_probs = scores[row, :t, :n].log_softmax(1)
        total = torch.logsumexp(torch.tensor([score_of(log_probs, path) for path in paths(t, n)]), 0)
        wanted.append(-float(total) / n)
    loss = forward_sum_loss(scores, frames, texts, blank=None)
    assert float(loss) == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)


def test_the_blank_lets_frames_belong_to_no_symbol():
    scores = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(1))
    with_blank = torch.cat([torch.full((4, 1), -1.0), scores[0]], 1).log_softmax(1)
    total = []
    for path in itertools.product(range(3), repeat=4):
        if [k for k, _ in itertools.groupby(path) if k] == [1, 2]:
            total.append(float(with_blank[torch.arange(4), torch.tensor(path)].sum()))
    wanted = -float(torch.logsumexp(torch.tensor(total), 0)) / 2
    assert float(forward_sum_loss(scores, torch.tensor([4]), torch.tensor([2]))) == pytest.approx(wanted)


@settings(max_examples=20, deadline=None)
@given(sizes=lengths, seed=st.integers(0, 10**6))
def test_a_batch_equals_its_singles(sizes, seed):
    scores, frames, texts = batch_of(sizes, seed)
    prior = beta_binomial_prior(frames, texts)
    together = best_durations(scores, frames, texts)
    losses = []
    for row, (t, n) in enumerate(sizes):
        one = scores[row : row + 1, :t, :n], frames[row : row + 1], texts[row : row + 1]
        assert torch.equal(best_durations(*one)[0], together[row, :n])
        torch.testing.assert_close(beta_binomial_prior(*one[1:])[0], prior[row, :t, :n])
        assert not prior[row, t:].any()
        losses.append(forward_sum_loss(*one))
    torch.testing.assert_close(forward_sum_loss(scores, frames, texts), torch.stack(losses).mean())


def test_the_prior_is_the_beta_binomial_distribution():
    frames, symbols, scale = 7, 4, 1.5
    got = beta_binomial_prior(torch.tensor([frames]), torch.tensor([symbols]), scale)[0].exp()
    assert got.sum(1).tolist() == pytest.approx([1.0] * frames, abs=1e-5)
    for t, k in itertools.product(range(1, frames + 1), range(symbols)):
        a, b, n = scale * t, scale * (frames - t + 1), symbols - 1
        beta = [math.gamma(x) * math.gamma(y) / math.gamma(x + y) for x, y in ((k + a, n - k + b), (a, b))]
        assert float(got[t - 1, k]) == pytest.approx(math.comb(n, k) * beta[0] / beta[1], rel=1e-4)
    turned = got.flip(0).flip(1)
    torch.testing.assert_close(got, turned)  # both ends alike
    assert got[0].argmax() == 0
    assert got[-1].argmax() == symbols - 1


def test_soft_alignments_are_distributions_by_distance():
    torch.manual_seed(0)
    text, frames, sizes = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.tensor([3, 2])
    got = soft_alignment(text, frames, sizes, sharpness=1.0)
    torch.testing.assert_close(got.exp().sum(2), torch.ones(2, 5))
    assert not got[1, :, 2].exp().any()
    wanted = (-torch.cdist(frames, text).square()[0]).log_softmax(1)
    torch.testing.assert_close(got[0], wanted, atol=1e-4, rtol=1e-4)
    prior = beta_binomial_prior(torch.tensor([5, 5]), sizes)
    both = soft_alignment(text, frames, sizes, prior, 1.0)
    torch.testing.assert_close(both[0], (wanted + prior[0]).log_softmax(1), atol=1e-4, rtol=1e-4)


def test_training_finds_where_symbols_are():
    """Frames that copy their symbol's vector are aligned after some steps, ragged items and all."""
    generator = torch.Generator().manual_seed(3)
    wanted = torch.tensor([[2, 5, 1, 4], [6, 3, 3, 0]])
    frames, texts = wanted.sum(1), (wanted > 0).sum(1)
    symbols = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 0]])
    heard = torch.nn.functional.one_hot(
        torch.gather(symbols, 1, symbols_of_frames(wanted, 12).clamp_min(0)), 4
    ).float()
    table = torch.nn.Embedding(4, 8)
    table.weight.data = torch.randn(4, 8, generator=generator)
    layer = torch.nn.Linear(4, 8)
    optimizer = torch.optim.Adam([*table.parameters(), *layer.parameters()], 0.05)
    prior = beta_binomial_prior(frames, texts)
    for step in range(150):
        log_probs = soft_alignment(table(symbols), layer(heard), texts, prior, 1.0)
        durations = best_durations(log_probs, frames, texts)
        loss = forward_sum_loss(log_probs, frames, texts)
        if step > 50:
            loss = loss + binarisation_loss(log_probs, durations)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in (*table.parameters(), *layer.parameters()))
        optimizer.step()
    assert torch.equal(durations, wanted)
    assert float(binarisation_loss(log_probs.detach(), durations)) < 0.3


def test_frames_know_their_symbol():
    got = symbols_of_frames(torch.tensor([[2, 1, 0], [1, 1, 2]]), 5)
    assert got.tolist() == [[0, 0, 1, -1, -1], [0, 1, 2, 2, -1]]
    log_probs = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]]))
    loss = binarisation_loss(log_probs, torch.tensor([[1, 2]]))
    assert float(loss) == pytest.approx(-math.log(0.5 * 0.75 * 0.9) / 3)


def test_scores_of_minus_infinity_are_avoided():
    scores = torch.zeros(1, 4, 2)
    scores[0, :3, 1] = -torch.inf
    assert best_durations(scores, torch.tensor([4]), torch.tensor([2])).tolist() == [[3, 1]]


@pytest.mark.parametrize(("frames", "texts"), [([2], [3]), ([5], [2]), ([3], [0]), ([3], [4]), ([3, 3], [2])])
def test_what_cannot_be_aligned_is_refused(frames, texts):
    scores = torch.zeros(1, 4, 3)
    for call in (best_durations, forward_sum_loss):
        with pytest.raises(InputError, match="alignment"):
            call(scores, torch.tensor(frames), torch.tensor(texts))


def test_nan_is_refused():
    with pytest.raises(InputError, match="NaN"):
        best_durations(torch.full((1, 3, 2), torch.nan), torch.tensor([3]), torch.tensor([2]))
