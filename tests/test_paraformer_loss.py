"""The training loss: sampler, terms, gradients, and that it can be minimised."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.losses.cif import (
    append_eos,
    glancing_mask,
    quantity_loss,
    random_orders,
    token_accuracy,
)
from nar_speech.models.paraformer import paraformer_loss, training_pass
from tests.test_paraformer import build, ragged

torch.set_num_threads(1)

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 4, -1, -1]])
TOKEN_LENGTHS = torch.tensor([4, 2])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.floats(0, 1.5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sampler_replaces_that_share_of_the_wrong_tokens(lengths, ratio, seed):
    size = max(lengths) + 2
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths)
    padded = torch.arange(size) >= sizes[:, None]
    targets = torch.randint(3, 6, (len(lengths), size), generator=generator).masked_fill(padded, -1)
    guesses = torch.randint(3, 6, targets.shape, generator=generator)
    orders = random_orders(sizes, size, generator)
    keep, number = glancing_mask(guesses, targets, ratio, orders)
    for b, length in enumerate(lengths):
        wrong = int((guesses[b, :length] != targets[b, :length]).sum())
        expected = min(int(torch.tensor(wrong, dtype=torch.float32) * ratio), length)
        replaced = {p for p in range(length) if not keep[b, p]}
        assert int(number[b]) == expected
        assert replaced == set(orders[b, :expected].tolist())
        assert not keep[b, length:].any()


@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_random_orders_are_permutations_of_each_item(lengths, seed):
    orders = random_orders(torch.tensor(lengths), max(lengths), torch.Generator().manual_seed(seed))
    for row, length in zip(orders.tolist(), lengths, strict=True):
        assert sorted(row[:length]) == list(range(length))
        assert set(row[length:]) <= {-1}


def test_orders_are_drawn_evenly():
    orders = random_orders(torch.full((6000,), 3), 3, torch.Generator().manual_seed(0))
    first = torch.bincount(orders[:, 0], minlength=3) / 6000
    assert (first - 1 / 3).abs().max() < 0.03


def test_eos_follows_the_last_token():
    targets, lengths = append_eos(
        torch.tensor([[5, 6, 99], [7, 8, 9], [98, 97, 96]]), torch.tensor([2, 3, 0])
    )
    assert targets.tolist() == [[5, 6, 2, -1], [7, 8, 9, 2], [2, -1, -1, -1]]
    assert lengths.tolist() == [3, 4, 1]


def test_quantity_loss_by_hand():
    predicted, wanted = torch.tensor([3.5, 1.0]), torch.tensor([3, 2])
    assert quantity_loss(predicted, wanted).item() == pytest.approx(1.5 / 5)
    assert quantity_loss(predicted, wanted, length_normalized=False).item() == pytest.approx(1.5 / 2)


def test_accuracy_ignores_padding():
    guesses = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert token_accuracy(guesses, torch.tensor([[1, 9, -1], [4, -1, -1]])).item() == pytest.approx(2 / 3)


def test_a_generator_makes_the_loss_repeatable():
    model = build(sampling_ratio=0.5)
    feats, sizes = ragged([30, 18])

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return training_pass(model, feats, sizes, TOKENS, TOKEN_LENGTHS, generator)

    assert torch.equal(run(1).keep, run(1).keep)
    assert any(not torch.equal(run(1).keep, run(seed).keep) for seed in range(2, 8))


@pytest.mark.parametrize("variant", ["paraformer", "bicif", "contextual"])
@pytest.mark.parametrize("normalized", [True, False])
def test_terms_add_up_and_every_parameter_learns(variant, normalized):
    model = build(
        variant, ctc_weight=0.25, predictor_weight=2.0, length_normalized_loss=normalized, sampling_ratio=0.9
    )
    feats, sizes = ragged([30, 18])
    draws = random_orders(TOKEN_LENGTHS + 1, 5, torch.Generator().manual_seed(0))
    terms = paraformer_loss(model, feats, sizes, TOKENS, TOKEN_LENGTHS, draws=draws)
    total = 0.75 * terms["loss_att"] + 0.25 * terms["loss_ctc"] + 2 * terms["loss_pre"]
    total = total + terms.get("loss_pre2", torch.zeros(())) * 2 * 0.5
    torch.testing.assert_close(terms["loss"].detach(), total)
    assert ("loss_pre2" in terms) == (variant == "bicif")
    assert terms["weight"].item() == (8 if normalized else 2)
    terms["loss"].backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


def test_the_loss_of_an_item_does_not_depend_on_padding():
    model = build(sampling_ratio=0.0, ctc_weight=0.3, length_normalized_loss=False)
    feats, sizes = ragged([30, 18], extra=7)
    alone = [
        paraformer_loss(
            model,
            feats[b : b + 1, :n],
            sizes[b : b + 1],
            TOKENS[b : b + 1, : int(TOKEN_LENGTHS[b])],
            TOKEN_LENGTHS[b : b + 1],
        )
        for b, n in enumerate(sizes.tolist())
    ]
    both = paraformer_loss(model, feats, sizes, TOKENS, TOKEN_LENGTHS)
    for name in ("loss", "loss_att", "loss_pre", "loss_ctc"):
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(both[name], mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [0, 1])
def test_predictor_bias_counts_the_end_of_sentence(bias):
    model = build(predictor_bias=bias, sampling_ratio=0.5)
    feats, sizes = ragged([30, 18])
    run = training_pass(model, feats, sizes, TOKENS, TOKEN_LENGTHS)
    assert run.target_lengths.tolist() == [4 + bias, 2 + bias]
    assert run.logits.shape[1] == 4 + bias
    assert bool((run.targets == 2).any()) == bool(bias)


def test_an_item_without_text_is_fine():
    model = build(ctc_weight=0.3)
    feats, sizes = ragged([30, 18])
    terms = paraformer_loss(model, feats, sizes, TOKENS, torch.tensor([4, 0]))
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_more_tokens_than_frames_is_finite():
    model = build(ctc_weight=0.3)
    feats, sizes = ragged([3, 2])
    tokens = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    terms = paraformer_loss(model, feats, sizes, tokens, torch.tensor([9, 5]))
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_shared_embedding_has_no_own_table():
    model = build(share_embedding=True)
    assert not any("embed" in name for name in model.state_dict())
    ids = torch.tensor([[4, -1]])
    assert torch.equal(model.embed_tokens(ids)[0, 0], model.decoder.output_layer.weight[4])


def test_autocast_keeps_the_loss_in_float32():
    model = build(ctc_weight=0.3)
    feats, sizes = ragged([30, 18])
    draws = random_orders(TOKEN_LENGTHS + 1, 5, torch.Generator().manual_seed(0))
    plain = paraformer_loss(model, feats, sizes, TOKENS, TOKEN_LENGTHS, draws=draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = paraformer_loss(model, feats, sizes, TOKENS, TOKEN_LENGTHS, draws=draws)
    terms["loss"].backward()
    assert terms["loss"].dtype == torch.float32
    assert terms["loss"].item() == pytest.approx(plain["loss"].item(), rel=0.05)


def test_two_utterances_can_be_learnt_by_heart():
    model = build(ctc_weight=0.2, lsm_weight=0.0, sampling_ratio=0.5).train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    feats, sizes = ragged([30, 18])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        terms = paraformer_loss(model, feats, sizes, TOKENS, TOKEN_LENGTHS, generator)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert terms["loss"].item() < 0.5 * math.log(20)
    with torch.no_grad():
        out = model.eval()(feats, sizes)
    assert out.token_lengths.tolist() == [5, 3]
    assert out.log_probs[0].argmax(-1).tolist() == [5, 6, 7, 8, 2]
    assert out.log_probs[1, :3].argmax(-1).tolist() == [9, 4, 2]
