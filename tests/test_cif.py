"""CIF: prefix sums against the plain loops, predictors, invariance to padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.layers.cif import (
    PREDICTORS,
    PredictorConfig,
    fire_counts,
    fire_track,
    integrate,
    overlap_weights,
    prefix_sums,
    prefix_track,
)

torch.set_num_threads(1)


def loop(hidden, alphas, threshold=1.0, step=1.0):
    """Integrate and fire, frame by frame and in float64: track (T,) and token vectors."""
    total, vector, track, tokens = 0.0, torch.zeros(hidden.shape[1], dtype=torch.float64), [], []
    for alpha, frame in zip(alphas.double(), hidden.double(), strict=True):
        room = 1.0 - total
        total += float(alpha)
        track.append(total)
        if total >= threshold:
            tokens.append(vector + room * frame)
            vector = (float(alpha) - room) * frame
            total -= step
        else:
            vector = vector + alpha * frame
    return torch.tensor(track), tokens


def draw(seed, frames, highest, batch=2, width=5):
    generator = torch.Generator().manual_seed(seed)
    alphas = torch.rand(batch, frames, generator=generator) * highest
    return alphas, torch.randn(batch, frames, width, generator=generator)


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([0.3, 1.0, 1.7, 3.5]))
@settings(max_examples=60, deadline=None)
def test_track_and_tokens_equal_the_loop_for_any_weights(seed, frames, highest):
    alphas, hidden = draw(seed, frames, highest)
    sums = prefix_sums(alphas)
    for b in range(len(alphas)):
        track, tokens = loop(hidden[b], alphas[b])
        torch.testing.assert_close(fire_track(sums)[b], track, atol=1e-5, rtol=0)
        counts = torch.tensor([len(tokens)])
        got = integrate(
            hidden[b : b + 1], alphas[b : b + 1], sums[b : b + 1], counts, len(tokens), "sequential"
        )
        if tokens:
            torch.testing.assert_close(got[0], torch.stack(tokens).float(), atol=1e-4, rtol=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_all_forms_agree_for_weights_up_to_one(seed, frames):
    alphas, hidden = draw(seed, frames, 1.0)
    sums = prefix_sums(alphas)
    counts = sums[:, -1].floor().long()
    tokens = int(counts.max())
    results = [
        integrate(hidden, alphas, sums, counts, tokens, mode) for mode in ("overlap", "prefix", "sequential")
    ]
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0], results[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefix_track(sums), fire_track(sums), atol=1e-5, rtol=0)


@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=40, deadline=None)
def test_every_complete_token_has_weight_one(seed, frames, highest):
    alphas, _ = draw(seed, frames, highest)
    sums = prefix_sums(alphas)
    counts = sums[:, -1].floor().long()
    shares = overlap_weights(sums, int(counts.max()))
    assert (shares >= 0).all()
    for row, count in zip(shares, counts, strict=True):
        torch.testing.assert_close(row[:count].sum(1), torch.ones(int(count), dtype=row.dtype))


def test_track_with_a_lower_threshold_equals_the_loop_that_subtracts_it():
    alphas, hidden = draw(3, 50, 0.9)
    step = 1 - 1e-4
    track = fire_track(prefix_sums(alphas), step, step)
    for b in range(len(alphas)):
        torch.testing.assert_close(track[b], loop(hidden[b], alphas[b], step, step)[0], atol=1e-5, rtol=0)


def test_fire_counts_never_jump_by_two():
    sums = prefix_sums(torch.tensor([[0.5, 3.0, 0.0, 0.0, 0.2]]))
    assert fire_counts(sums).tolist() == [[0, 1, 2, 3, 3]]


def predictor(kind, seed=0, **conf):
    torch.manual_seed(seed)
    return PREDICTORS[kind](8, PredictorConfig(dropout=0.0, **conf)).eval()


@pytest.mark.parametrize("kind", PREDICTORS)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), extra=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_a_batch_equals_its_items_for_any_padding(kind, lengths, extra):
    module = predictor(kind)
    rows = [
        torch.randn(size, 8, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(lengths)
    ]
    batch = torch.zeros(len(rows), max(lengths) + extra, 8)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    with torch.no_grad():
        got = module(batch, torch.tensor(lengths))
        for i, row in enumerate(rows):
            alone = module(row[None], torch.tensor([len(row)]))
            count = int(alone.token_lengths[0])
            assert int(got.token_lengths[i]) == count
            torch.testing.assert_close(got.embeds[i, :count], alone.embeds[0], atol=1e-5, rtol=1e-5)
            assert not got.embeds[i, count:].any()
            torch.testing.assert_close(got.alphas[i, : len(row) + 1], alone.alphas[0], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(got.peaks[i, : len(row) + 1], alone.peaks[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PREDICTORS)
@given(frames=st.integers(2, 40), target=st.integers(1, 12), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_training_never_loses_a_token(kind, frames, target, seed):
    """The last token ends exactly on an integer; also with more tokens than frames all must exist."""
    module = predictor(kind, seed)
    hidden = torch.randn(1, frames, 8, generator=torch.Generator().manual_seed(seed))
    out = module(hidden, torch.tensor([frames]), torch.tensor([target]))
    assert out.embeds.shape == (1, target, 8)
    assert out.alphas.sum().item() == pytest.approx(target, rel=1e-5)
    ones = module(torch.ones(1, frames, 8), torch.tensor([frames]), torch.tensor([target]))
    torch.testing.assert_close(ones.embeds, torch.ones(1, target, 8))
    if bool((out.alphas <= 1).all()):
        assert int((out.peaks >= 1).sum()) == target


def test_token_num_in_training_is_the_sum_before_scaling():
    module, hidden = predictor("v2"), torch.randn(2, 9, 8)
    lengths = torch.tensor([9, 5])
    raw = module.alphas(hidden, lengths)
    out = module(hidden, lengths, torch.tensor([3, 2]))
    torch.testing.assert_close(out.token_num, raw.sum(1))
    assert not raw[1, 5:].any()


@pytest.mark.parametrize("kind", PREDICTORS)
def test_gradients_reach_the_frames_and_are_right(kind):
    module = predictor(kind).double()
    hidden = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    lengths, targets = torch.tensor([6]), torch.tensor([2])
    module(hidden, lengths, targets).embeds.pow(2).sum().backward()
    numeric = torch.zeros_like(hidden)
    for index in [(0, 1, 2), (0, 3, 0), (0, 5, 7)]:
        for sign in (1, -1):
            moved = hidden.detach().clone()
            moved[index] += sign * 1e-2
            value = module(moved, lengths, targets).embeds.pow(2).sum()
            numeric[index] += sign * value.item() / 2e-2
        assert hidden.grad[index].item() == pytest.approx(numeric[index].item(), rel=5e-2, abs=5e-3)


def test_silence_has_no_token():
    module = predictor("v2", tail_threshold=0.45)
    torch.nn.init.constant_(module.cif_output.bias, -20.0)
    out = module(torch.zeros(2, 7, 8), torch.tensor([7, 3]))
    assert out.embeds.shape == (2, 0, 8)
    assert out.token_lengths.tolist() == [0, 0]


def test_tail_weight_keeps_an_almost_complete_last_token():
    module = predictor("v2")
    torch.nn.init.zeros_(module.cif_output.weight)
    torch.nn.init.zeros_(module.cif_output.bias)  # every weight is 0.5
    hidden, lengths = torch.randn(2, 3, 8), torch.tensor([3, 1])
    out = module(hidden, lengths)
    assert out.alphas.tolist() == [[0.5, 0.5, 0.5, pytest.approx(0.45)], [0.5, pytest.approx(0.45), 0.0, 0.0]]
    assert out.token_lengths.tolist() == [1, 0]
    unmasked = predictor("v2", tail_mask=False)
    unmasked.load_state_dict(module.state_dict())
    assert unmasked(hidden, lengths).alphas[1].tolist() == [0.5, 0.0, 0.0, pytest.approx(0.45)]


def test_long_weights_do_not_drift():
    """An hour of frames: float32 sums alone would lose the fraction that decides where tokens end."""
    alphas = torch.full((1, 60_000), 0.3)
    exact = (torch.arange(1, 60_001, dtype=torch.float64) * float(alphas[0, 0])) % 1
    track = prefix_track(prefix_sums(alphas))[0].double() % 1
    assert (track - exact).abs().max() < 1e-6


def test_time_stamp_head_ignores_the_batch():
    module = predictor("v3")
    hidden = torch.randn(2, 8, 8)
    hidden[1, 3:] = 0
    lengths, count = torch.tensor([8, 3]), torch.tensor([2.0, 1.0])
    both = module.times(hidden, lengths, count)
    alone = module.times(hidden[1:, :3], torch.tensor([3]), count[1:])
    torch.testing.assert_close(both.peaks[1:, :9], alone.peaks, atol=1e-5, rtol=1e-5)
    official = module.times(hidden, lengths, count, official_padding=True)
    assert (official.alphas[1, :9] - alone.alphas[0]).abs().max() > 1e-5
    torch.testing.assert_close(both.alphas.sum(1), count)


def test_accumulation_stays_float32_under_autocast():
    module, hidden = predictor("v2"), torch.randn(1, 40, 8)
    lengths = torch.tensor([40])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(hidden, lengths)
    assert out.alphas.dtype == torch.float32
    torch.testing.assert_close(out.alphas, module(hidden, lengths).alphas)
