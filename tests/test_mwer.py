"""MWER: exact expectations on tiny vocabularies, edit distances, negative samples."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jiwer import process_words

from nar_speech.losses.mwer import (
    candidate_errors,
    drop_ids,
    edit_distance,
    first_occurrences,
    mwer_loss,
    negative_samples,
)

sequences = st.lists(st.integers(3, 6), max_size=7)


def distance(a, b):
    """By the definition, with memory."""
    table = {}
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if not i or not j:
                table[i, j] = i + j
                continue
            table[i, j] = min(
                table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            )
    return table[len(a), len(b)]


def padded(rows, extra=0, fill=-1):
    size = max((len(r) for r in rows), default=0) + extra
    table = torch.full((len(rows), size), fill)
    for n, row in enumerate(rows):
        table[n, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return table, torch.tensor([len(r) for r in rows])


@settings(deadline=None)
@given(
    st.lists(st.tuples(sequences, sequences), min_size=1, max_size=5), st.integers(0, 3), st.integers(-1, 6)
)
def test_edit_distance_equals_the_definition(pairs, extra, fill):
    a, a_lengths = padded([p[0] for p in pairs], extra, fill)
    b, b_lengths = padded([p[1] for p in pairs], extra, fill)
    assert edit_distance(a, a_lengths, b, b_lengths).tolist() == [distance(*p) for p in pairs]


def test_edit_distance_equals_jiwer():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 5, (int(n),), generator=generator).tolist() for n in range(1, 30)]
    for shift in (1, 7):
        others = rows[shift:] + rows[:shift]
        got = edit_distance(*padded(rows), *padded(others))
        for row, other, errors in zip(rows, others, got.tolist(), strict=True):
            out = process_words(" ".join(map(str, row)), " ".join(map(str, other)))
            assert errors == out.substitutions + out.deletions + out.insertions


def test_dropped_ids_do_not_count():
    tokens, lengths = drop_ids(
        torch.tensor([[3, 0, 4, 2, 9], [2, 2, 5, 6, 1]]), torch.tensor([4, 4]), (0, 1, 2)
    )
    assert lengths.tolist() == [2, 2]
    assert tokens[:, :2].tolist() == [[3, 4], [5, 6]]
    errors = candidate_errors(
        torch.tensor([[[3, 0, 4, 2], [3, 4, 5, 2]]]),
        torch.tensor([[4, 4]]),
        torch.tensor([[3, 4, 2, -1]]),
        torch.tensor([3]),
    )
    assert errors.tolist() == [[0, 1]]


def all_paths(vocab, size):
    return torch.tensor(list(itertools.product(range(vocab), repeat=size)))


@pytest.mark.parametrize(
    ("vocab", "size", "target"), [(3, 3, [1, 2]), (4, 2, [3, 0, 1]), (2, 4, [0, 1, 1, 0])]
)
def test_all_paths_as_candidates_give_the_exact_expected_error(vocab, size, target):
    torch.manual_seed(0)
    logits = torch.randn(1, size, vocab, dtype=torch.float64, requires_grad=True)
    paths = all_paths(vocab, size)
    errors = torch.tensor([float(distance(p, target)) for p in paths.tolist()], dtype=torch.float64)
    probs = logits.softmax(-1)[0]
    expected = sum(
        e * torch.stack([probs[u, v] for u, v in enumerate(p)]).prod()
        for p, e in zip(paths.tolist(), errors, strict=True)
    )
    want = torch.autograd.grad(expected, logits)[0]
    loss = mwer_loss(
        logits.log_softmax(-1),
        paths[None],
        torch.tensor([size]),
        torch.tensor([target]),
        torch.tensor([len(target)]),
        dropped=(),
    )
    torch.testing.assert_close(loss, expected.detach() - errors.mean())
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], want)


def test_gradient_prefers_candidates_with_fewer_errors():
    logits = torch.zeros(1, 2, 6, requires_grad=True)
    candidates = torch.tensor([[[3, 4], [3, 5], [5, 5]]])  # 0, 1 and 2 errors
    log_probs = logits.log_softmax(-1)
    loss = mwer_loss(log_probs, candidates, torch.tensor([2]), torch.tensor([[3, 4]]), torch.tensor([2]))
    loss.backward()
    # P^ is 1/3 each, so with s_n the path scores: d loss / d s = (W - mean W) / 3 = [-1/3, 0, 1/3]
    want = torch.zeros(2, 6)
    want[0, 3], want[0, 5], want[1, 4], want[1, 5] = -1 / 3, 1 / 3, -1 / 3, 1 / 3
    torch.testing.assert_close(logits.grad[0], want)


@pytest.mark.parametrize("candidates", [[[3, 4]], [[3, 4], [3, 4], [3, 4]]])
def test_a_single_distinct_candidate_has_no_gradient(candidates):
    logits = torch.randn(1, 2, 6, requires_grad=True)
    loss = mwer_loss(
        logits.log_softmax(-1),
        torch.tensor([candidates]),
        torch.tensor([2]),
        torch.tensor([[5, 5]]),
        torch.tensor([2]),
    )
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_repeated_candidates_count_once():
    log_probs = torch.randn(1, 2, 6).log_softmax(-1)
    rest = torch.tensor([2]), torch.tensor([[3, 4]]), torch.tensor([2])
    once = mwer_loss(log_probs, torch.tensor([[[3, 4], [3, 5]]]), *rest)
    again = mwer_loss(log_probs, torch.tensor([[[3, 4], [3, 5], [3, 4], [3, 5]]]), *rest)
    torch.testing.assert_close(once, again)
    fresh = first_occurrences(torch.tensor([[[3, 4], [3, 5], [3, 4], [4, 3]]]))
    assert fresh.tolist() == [[True, True, False, True]]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 4), st.integers(0, 1000))
def test_padding_and_batch_mates_do_not_matter(lengths, extra, seed):
    torch.manual_seed(seed)
    size, vocab, number = max(lengths) + extra, 7, 5
    log_probs = torch.randn(len(lengths), size, vocab).log_softmax(-1)
    targets = torch.randint(3, vocab, (len(lengths), size))
    target_lengths = torch.tensor([1 + (n * 7) % size for n in lengths])
    sizes = torch.tensor(lengths)
    candidates = negative_samples(log_probs, sizes, number)
    assert ((candidates < 0) == (torch.arange(size) >= sizes[:, None])[:, None]).all()
    total = mwer_loss(log_probs, candidates, sizes, targets, target_lengths)
    singles = [
        mwer_loss(
            log_probs[n : n + 1, :length],
            candidates[n : n + 1, :, :length],
            sizes[n : n + 1],
            targets[n : n + 1, : target_lengths[n]],
            target_lengths[n : n + 1],
        )
        for n, length in enumerate(lengths)
    ]
    torch.testing.assert_close(total, torch.stack(singles).mean(), atol=1e-5, rtol=1e-5)


def test_samples_take_the_runner_up_at_the_asked_rate():
    torch.manual_seed(0)
    scores = torch.randn(3, 200, 10)
    lengths = torch.tensor([200, 150, 1])
    got = negative_samples(scores, lengths, number=21, rate=0.3, generator=torch.Generator().manual_seed(1))
    assert got.shape == (3, 21, 200)
    top, second = scores.topk(2, dim=-1).indices.unbind(-1)
    valid = torch.arange(200) < lengths[:, None]
    assert torch.equal(got[:, 0], top.masked_fill(~valid, -1))
    replaced = got[:, 1:] == second[:, None]
    assert (replaced | (got[:, 1:] == top[:, None]) | ~valid[:, None]).all()
    assert 0.27 < replaced[0].float().mean() < 0.33
    again = negative_samples(scores, lengths, number=21, rate=0.3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(got, again)


def test_depth_draws_from_the_ranks_below_the_top():
    scores = torch.arange(10.0).flip(0).expand(1, 300, 10)  # id n has rank n + 1
    got = negative_samples(scores, torch.tensor([300]), number=2, rate=1.0, depth=3)[0, 1]
    assert got.bincount(minlength=10)[[0, 4, 5, 6, 7, 8, 9]].sum() == 0
    assert (got.bincount(minlength=4)[1:4] > 60).all()


@pytest.mark.parametrize("bad", [{"number": 0}, {"rate": 1.5}, {"depth": 0}, {"depth": 4}])
def test_impossible_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="negative_samples: number"):
        negative_samples(torch.zeros(1, 2, 4), torch.tensor([2]), **bad)


def test_training_on_it_lowers_the_error_of_the_greedy_path():
    torch.manual_seed(0)
    targets = torch.randint(3, 8, (4, 6))
    lengths = torch.full((4,), 6)
    logits = torch.randn(4, 6, 8)
    logits.scatter_(2, targets[..., None], logits.amax(-1, keepdim=True) - 0.1)  # the right one is runner-up
    logits.requires_grad_()
    before = edit_distance(logits.argmax(-1), lengths, targets, lengths).sum()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        log_probs = logits.log_softmax(-1)
        candidates = negative_samples(log_probs, lengths, 8, generator=generator)
        loss = mwer_loss(log_probs, candidates, lengths, targets, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = edit_distance(logits.argmax(-1), lengths, targets, lengths).sum()
    assert before > 12
    assert after <= 2
