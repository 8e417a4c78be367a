"""Residual and scalar quantizers: codes and vectors fit, codebooks learn and come back from the dead."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.codec.quantize import Codebook, FiniteScalarQuantizer, ResidualVectorQuantizer
from nar_speech.errors import ConfigError


def trained(levels=3, size=8, width=6, inner=None, steps=30):
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer(width, levels, size, inner).train()
    for _ in range(steps):
        quantizer(torch.randn(4, 10, width))
    return quantizer.eval()


@pytest.mark.parametrize("inner", [None, 3])
@given(batch=st.integers(1, 3), frames=st.integers(1, 12), levels=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_codes_are_the_nearest_and_decode_to_the_sum_of_their_vectors(inner, batch, frames, levels, seed):
    quantizer = trained(inner=inner)
    x = torch.randn(batch, frames, 6, generator=torch.Generator().manual_seed(seed))
    tokens = quantizer.encode(x, levels)
    assert tokens.shape == (batch, levels, frames)
    rest, total = quantizer.project_in(x), 0
    for k in range(levels):
        table = quantizer.levels[k].embed
        nearest = torch.cdist(rest, table).argmin(-1)
        assert torch.equal(nearest, tokens[:, k])
        total, rest = total + table[nearest], rest - table[nearest]
    torch.testing.assert_close(quantizer.decode(tokens), quantizer.project_out(total))


def test_forward_equals_encode_and_decode_for_each_number_of_levels():
    quantizer = trained()
    x = torch.randn(3, 5, 6)
    result = quantizer(x, torch.tensor([1, 2, 3]))
    for row, levels in enumerate([1, 2, 3]):
        tokens = quantizer.encode(x[row : row + 1], levels)
        assert torch.equal(result.tokens[row : row + 1, :levels], tokens)
        torch.testing.assert_close(result.latents[row : row + 1], quantizer.decode(tokens))


def test_gradients_pass_straight_through_and_commitment_pulls():
    quantizer = trained().train()
    x = torch.randn(2, 4, 6, requires_grad=True)
    quantizer(x).latents.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    x.grad = None
    before = quantizer(x)
    before.commitment.backward()
    assert quantizer(x.detach() - 0.5 * x.grad).commitment < before.commitment


def test_commitment_does_not_depend_on_the_scale():
    quantizer, x = trained(), torch.randn(2, 4, 6)
    before = quantizer(x).commitment
    for level in quantizer.levels:
        level.embed.mul_(3)
    torch.testing.assert_close(quantizer(3 * x).commitment, before, atol=0.0, rtol=1e-4)


def test_levels_not_in_use_learn_nothing():
    quantizer = trained().train()
    before = quantizer.levels[2].embed.clone()
    quantizer(torch.randn(2, 8, 6), torch.tensor([2, 1]))
    torch.testing.assert_close(quantizer.levels[2].embed, before)
    assert not torch.equal(quantizer.levels[0].embed, trained().levels[0].embed)


def test_codebook_finds_the_clusters_of_its_input():
    torch.manual_seed(1)
    centres = 5 * torch.randn(4, 3)
    book = Codebook(16, 3, decay=0.9).train()
    for _ in range(200):
        x = centres[torch.randint(4, (64,))] + 0.05 * torch.randn(64, 3)
        if not book.started:
            book.start(x)
        book.learn(book.sums(x, book.nearest(x)), x)
    assert torch.cdist(centres, book.embed).min(1).values.max() < 0.2


def test_codebooks_start_with_k_means_of_many_latents():
    torch.manual_seed(3)
    x = torch.randn(4000, 6)
    quantizer = ResidualVectorQuantizer(6, 3, 16)
    assert not quantizer.started
    quantizer.start(x)
    assert quantizer.started
    rest, before = x, x.square().mean()
    for level in quantizer.levels:
        chosen = level.nearest(rest)
        assert len(chosen.unique()) == 16
        rest = rest - level.embed[chosen]
        assert rest.square().mean() < 0.8 * before
        before = rest.square().mean()
    skipped = quantizer.skip(x[None])
    torch.testing.assert_close(skipped.latents[0], x)
    assert skipped.tokens.shape == (1, 0, 4000)


def test_unused_entries_are_replaced_by_vectors_of_the_batch():
    torch.manual_seed(2)
    book = Codebook(4, 2, decay=0.5)
    book.start(torch.zeros(4, 2))
    book.embed[3] = book.total[3] = torch.tensor([100.0, 100.0])
    x = torch.randn(32, 2)
    for _ in range(8):
        book.learn(book.sums(x, book.nearest(x)), x)
    assert book.embed.abs().max() < 10
    assert len(book.nearest(x).unique()) == 4


def test_decayed_means_by_hand():
    book = Codebook(2, 1, decay=0.75, revive=0.0)
    book.embed.copy_(torch.tensor([[0.0], [10.0]]))
    book.total.copy_(book.embed)
    book.usage.fill_(1.0)
    x = torch.tensor([[1.0], [2.0], [9.0]])
    book.learn(book.sums(x, book.nearest(x)), x)
    torch.testing.assert_close(book.usage, torch.tensor([0.75 + 0.25 * 2, 0.75 + 0.25]))
    torch.testing.assert_close(book.embed[:, 0], torch.tensor([0.75 / 1.25, (7.5 + 2.25) / 1.0]))


@given(
    steps=st.lists(st.integers(3, 8), min_size=1, max_size=4),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_scalar_codes_are_in_range_and_decode_to_what_forward_gives(steps, groups, seed):
    torch.manual_seed(seed)
    quantizer = FiniteScalarQuantizer(5, groups, steps).eval()
    x = 5 * torch.randn(2, 6, 5)
    result = quantizer(x)
    tokens = quantizer.encode(x)
    assert torch.equal(tokens, result.tokens)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < quantizer.codebook_size
    torch.testing.assert_close(quantizer.decode(tokens), result.latents)
    fewer = quantizer(x, torch.tensor([1, groups]))
    torch.testing.assert_close(quantizer.decode(tokens[:1, :1]), fewer.latents[:1])


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_every_scalar_step_can_be_reached(count):
    quantizer = FiniteScalarQuantizer(1, 1, [count]).eval()
    torch.nn.init.ones_(quantizer.project_in.weight)
    torch.nn.init.zeros_(quantizer.project_in.bias)
    tokens = quantizer.encode(torch.linspace(-6, 6, 500)[None, :, None])
    assert tokens.unique().tolist() == list(range(count))
    assert (tokens.diff() >= 0).all()


def test_wrong_steps_are_refused():
    with pytest.raises(ConfigError, match="steps"):
        FiniteScalarQuantizer(4, 1, [8, 2])
