"""Which codes a training step masks, and the cross entropy of those."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import InputError
from nar_speech.losses.masked import (
    MaskDraws,
    draw_masks,
    mask_codes,
    masked_cross_entropy,
    span_counts,
    span_mask,
)
from nar_speech.models.magnet import Magnet, MagnetConfig, magnet_loss


def test_the_table_of_the_sheet():
    table = span_counts(500, 3)
    assert [table[q] for q in (0, 1, 10, 50, 90, 99, 100)] == [0, 2, 18, 103, 268, 392, 498]


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 80), span=st.integers(1, 8), seed=st.integers(0, 99), rate=st.floats(0, 1))
def test_spans_cover_what_their_starts_say(frames, span, seed, rate):
    scores = torch.rand(2, frames, generator=torch.Generator().manual_seed(seed))
    got = span_mask(scores, torch.full((2,), rate), span)
    for row in range(2):
        permutation = scores[row].argsort().tolist()
        if span == 1:
            count = max(1, round(float(torch.tensor(rate) * frames)))
        else:
            count = max(1, span_counts(frames, span)[round(float(100 * torch.tensor(rate)))])
        starts = [t for t in range(frames) if permutation[t] < count]
        wanted = {t + i for t in starts for i in range(span) if t + i < frames}
        assert set(got[row].nonzero()[:, 0].tolist()) == wanted


def test_the_masked_part_is_what_was_asked_for_on_average():
    generator = torch.Generator().manual_seed(0)
    for rate in (0.1, 0.5, 0.9):
        mask = span_mask(torch.rand(200, 120, generator=generator), torch.full((200,), rate), 3)
        assert float(mask.float().mean()) == pytest.approx(rate, abs=0.03)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    stage=st.integers(0, 2),
)
def test_a_row_is_masked_as_it_would_be_alone(lengths, seed, stage):
    generator = torch.Generator().manual_seed(seed)
    frames = max(lengths)
    codes = torch.randint(9, (len(lengths), 3, frames), generator=generator)
    draws = draw_masks(len(lengths), frames, generator, torch.device("cpu"))
    batch = mask_codes(codes, torch.tensor(lengths), stage, 3, 9, draws)
    assert torch.equal(batch.tokens[:, :stage], codes[:, :stage])
    assert bool((batch.tokens[:, stage + 1 :] == 9).all())
    assert torch.equal(batch.tokens[:, stage] == 9, batch.spans)
    assert torch.equal(batch.masked, batch.spans)  # none on padding
    for row, length in enumerate(lengths):
        assert int(batch.masked[row].sum()) >= 1
        single = MaskDraws(draws.rates[row : row + 1], draws.scores[row : row + 1, :length])
        alone = mask_codes(codes[row : row + 1, :, :length], torch.tensor([length]), stage, 3, 9, single)
        assert torch.equal(batch.tokens[row, :, :length], alone.tokens[0])


def test_the_loss_is_the_mean_over_masked_positions_of_the_batch():
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    masked = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    terms = masked_cross_entropy(logits.bfloat16(), targets, masked)
    wanted = F.cross_entropy(logits.bfloat16().float()[masked], targets[masked])
    torch.testing.assert_close(terms["loss"], wanted)
    assert terms["masked"] == 3
    targets[~masked] = -100  # padding may hold anything
    torch.testing.assert_close(masked_cross_entropy(logits.bfloat16(), targets, masked)["loss"], wanted)
    smooth = masked_cross_entropy(logits, targets, masked, label_smoothing=0.1)["loss"]
    torch.testing.assert_close(smooth, F.cross_entropy(logits[masked], targets[masked], label_smoothing=0.1))


def test_nothing_masked_gives_a_loss_of_zero_with_gradients():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    terms = masked_cross_entropy(logits, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3).bool())
    terms["loss"].backward()
    assert float(terms["loss"]) == 0
    assert float(logits.grad.abs().sum()) == 0


def test_the_loss_of_a_batch_is_that_of_its_rows():
    torch.manual_seed(0)
    network = Magnet(MagnetConfig(3, 9, 16, 2, 2, 2, 4, context=3))
    codes, lengths = torch.randint(9, (3, 3, 20)), torch.tensor([20, 11, 5])
    states, mask = torch.randn(3, 4, 4), torch.arange(4) < torch.tensor([4, 2, 0])[:, None]
    for stage in range(3):
        draws = draw_masks(3, 20, None, torch.device("cpu"))
        batch = mask_codes(codes, lengths, stage, 3, 9, draws)
        whole = magnet_loss(network, batch, states, mask)
        total, count = 0.0, 0
        for row, length in enumerate(lengths.tolist()):
            single = MaskDraws(draws.rates[row : row + 1], draws.scores[row : row + 1, :length])
            part = mask_codes(codes[row : row + 1, :, :length], lengths[row : row + 1], stage, 3, 9, single)
            terms = magnet_loss(network, part, states[row : row + 1], mask[row : row + 1])
            total += float(terms["loss"]) * int(terms["masked"])
            count += int(terms["masked"])
        assert float(whole["loss"]) == pytest.approx(total / count, rel=1e-4)


def test_it_learns():
    torch.manual_seed(0)
    network = Magnet(MagnetConfig(2, 8, 32, 2, 2, 2, 4, context=3))
    codes = torch.arange(24).remainder(8).repeat(8, 2, 1)
    states, mask = torch.zeros(8, 1, 4), torch.zeros(8, 1).bool()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(40):
        draws = draw_masks(8, 24, generator, torch.device("cpu"))
        batch = mask_codes(codes, torch.full((8,), 24), step % 2, 3, 8, draws)
        loss = magnet_loss(network, batch, states, mask)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    assert sum(found[-10:]) / 10 < 0.5 * math.log(8)


def test_what_does_not_fit_is_an_error():
    codes, draws = torch.zeros(1, 2, 5, dtype=torch.int64), MaskDraws(torch.zeros(1), torch.rand(1, 5))
    with pytest.raises(InputError, match="stage"):
        mask_codes(codes, torch.tensor([5]), 2, 3, 9, draws)
    with pytest.raises(InputError, match="span_len"):
        mask_codes(codes, torch.tensor([5]), 0, 0, 9, draws)
