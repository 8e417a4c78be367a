"""PALLE's policies on the masked loop: spans from left to right, and rounds that refine."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError
from nar_speech.models.maskgct import S2A, T2S, S2AConfig, S2AItem, T2SConfig, T2SItem
from nar_speech.pipelines.maskgct_stages import StageOptions, sample_layers, sample_semantic
from nar_speech.sampling.config import MaskedConfig, maskgct_config, palle_config
from nar_speech.sampling.draws import seeded
from nar_speech.sampling.masked import masked_sample
from nar_speech.sampling.schedules import make_plan, mask_ratio
from tests.test_sampling_masked import Toy, V

torch.set_num_threads(1)


def plain_palle(logits_of, tokens, fixed, steps, rounds, share):
    """Both stages for one item, written from the description, and how often each position was predicted."""
    free = (~fixed).nonzero()[:, 0].tolist()
    codes = torch.where(fixed, tokens, V)
    sure = torch.zeros(len(codes))
    left = list(free)
    for step in range(1, steps + 1):
        if not left:
            break
        probabilities = logits_of(codes).softmax(-1)
        stay = int(len(free) * (1 - step / steps) + 1e-3) if step < steps else 0
        for place in left[: len(left) - stay]:
            codes[place] = probabilities[place].argmax()
            sure[place] = probabilities[place].max()
        left = left[len(left) - stay :]
    again = set()
    for _ in range(rounds):
        count = int(len(free) * share + 1e-6)
        chosen = sorted((p for p in free if p not in again), key=lambda p: (float(sure[p]), p))[:count]
        if not chosen:
            break
        again |= set(chosen)
        codes[chosen] = V
        probabilities = logits_of(codes).softmax(-1)
        for place in chosen:
            codes[place] = probabilities[place].argmax()
            sure[place] = probabilities[place].max()
    return codes, again


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 500),
    length=st.integers(1, 30),
    steps=st.integers(1, 12),
    rounds=st.integers(0, 5),
    share=st.sampled_from([0.1, 0.3, 0.5]),
    known=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_palle_written_out(seed, length, steps, rounds, share, known):
    draws, model = torch.Generator().manual_seed(seed), Toy(seed=seed)
    tokens = torch.randint(0, V, (1, length), generator=draws)
    fixed = torch.rand(1, length, generator=draws) < known
    lengths = torch.tensor([length])
    config = palle_config(steps, rounds, refine_share=share)
    result = masked_sample(
        lambda ids, info: (model.logits(ids, info.lengths), None),
        *(tokens, fixed, lengths, config, None),
        mask_id=V,
    )
    want, again = plain_palle(
        lambda codes: model.logits(codes[None], lengths)[0], tokens[0], fixed[0], steps, rounds, share
    )
    assert torch.equal(result.tokens[0], want)
    assert result.calls <= config.calls == steps + rounds
    assert len(again) <= rounds * int((~fixed).sum() * share + 1e-6)


@settings(max_examples=40, deadline=None)
@given(free=st.integers(1, 60), steps=st.integers(1, 80))
def test_spans_are_even_and_come_from_the_left(free, steps):
    model = Toy()
    tokens = torch.zeros(1, free + 4, dtype=torch.int64)
    fixed = torch.arange(free + 4)[None] < 4
    masked_sample(model, tokens, fixed, torch.tensor([free + 4]), palle_config(steps, 0), None, mask_id=V)
    masked = [(ids[0] == V).nonzero()[:, 0].tolist() for ids in model.inputs]
    ends = list(range(4, free + 4))
    sizes = []
    for now, later in zip(masked, [*masked[1:], []], strict=True):
        assert now == ends[len(ends) - len(now) :]
        sizes.append(len(now) - len(later))
    assert sum(sizes) == free
    assert max(sizes) - min(sizes) <= 1 or steps > free
    assert max(sizes) <= math.ceil(free / steps)


def test_rounds_know_how_much_is_masked():
    """A network that reads the time is told the one at which its schedule masks as much."""
    model = Toy()
    tokens, fixed = torch.zeros(1, 40, dtype=torch.int64), torch.zeros(1, 40, dtype=torch.bool)
    for schedule in ("cosine", "linear", "square"):
        config = MaskedConfig(steps=3, schedule=schedule, greedy=True, refine_rounds=2, refine_share=0.2)
        model.infos.clear()
        masked_sample(model, tokens, fixed, torch.tensor([40]), config, None, mask_id=V)
        assert [int(info.step[0]) for info in model.infos] == [0, 1, 2, 3, 4]
        for info in model.infos[3:]:
            assert int(info.active.sum()) == 8
            assert float(mask_ratio(schedule, 1 - info.time)) == pytest.approx(0.2, abs=1e-4)
        assert make_plan(config).steps == 3


def test_refined_tokens_are_the_best_ones_whatever_is_drawn_before():
    """Rounds draw nothing: with sampling in the steps the generator stands where it stood without them."""
    states, results = [], []
    for rounds in (0, 2):
        source = seeded([3])
        config = MaskedConfig(steps=4, temperature=2.0, refine_rounds=rounds, refine_share=0.5)
        batch = torch.zeros(1, 20).long(), torch.zeros(1, 20).bool(), torch.tensor([20])
        results.append(masked_sample(Toy(), *batch, config, source, mask_id=V).tokens)
        states.append(source[0].get_state())
    assert torch.equal(*states)
    assert not torch.equal(*results)


def test_a_round_that_predicts_the_mask_keeps_the_token():
    class Unsure(Toy):
        """It predicts the mask in rounds."""

        def __call__(self, tokens, info):
            logits, _ = super().__call__(tokens, info)
            logits = torch.nn.functional.pad(logits, (0, 1), value=-50.0)
            logits[info.step >= info.steps, :, V] = 50.0
            return logits, None

    batch = torch.zeros(2, 20).long(), torch.zeros(2, 20).bool(), torch.tensor([20, 9])
    plain = masked_sample(Unsure(), *batch, palle_config(5, 0), None, mask_id=V)
    refined = masked_sample(Unsure(), *batch, palle_config(5, 3, refine_share=0.4), None, mask_id=V)
    assert refined.calls > plain.calls
    assert torch.equal(plain.tokens, refined.tokens)


# ---- MaskGCT's networks -------------------------------------------------------------------------------


def network(cls, config, seed=0):
    torch.manual_seed(seed)
    model = cls(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model.prepare()


T2S_NET = network(T2S, T2SConfig(16, 2, 2, 2, 24, 16))
S2A_NET = network(S2A, S2AConfig(16, 2, 2, 2, 3, 24, 24))
POLICY = (("schedule", "linear"), ("order", "left"), ("refine_rounds", 3), ("refine_share", 0.25))
POLICIES = [
    POLICY,
    (("refine_rounds", 2), ("refine_share", 0.3)),
    (*POLICY, ("greedy", True), ("confidence_noise", 0.0)),
]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 14)), min_size=1, max_size=3),
    steps=st.integers(1, 9),
    cfg=st.sampled_from([0.0, 1.5]),
    rules=st.sampled_from(POLICIES),
    together=st.booleans(),
)
def test_batches_of_maskgct_equal_singles(rows, steps, cfg, rules, together):
    """To the last bit where items are computed one by one; so does a pack but for rounding."""
    generator = torch.Generator().manual_seed(steps)
    items = [
        T2SItem(*(torch.randint(0, 15, (n,), generator=generator) for n in (2 + prompt, prompt)))
        for prompt, _ in rows
    ]
    lengths = [length for _, length in rows]
    options = StageOptions((steps,), cfg, rules=rules)
    made = sample_semantic(T2S_NET, items, lengths, seeded(range(len(rows))), options)
    for number, (item, length) in enumerate(zip(items, lengths, strict=True)):
        alone = sample_semantic(T2S_NET, [item], [length], seeded([number]), options)[0]
        assert torch.equal(alone, made[number])
    if together:
        packed = sample_semantic(
            *(T2S_NET, items, lengths, seeded(range(len(rows))), options), one_by_one=False
        )
        assert [len(codes) for codes in packed] == lengths
        assert all(0 <= int(codes.min()) <= int(codes.max()) < 24 for codes in packed)


@pytest.mark.parametrize("rules", POLICIES)
def test_given_codes_stay_in_every_layer(rules):
    items = [
        S2AItem(torch.arange(12), torch.randint(0, 24, (3, 3))),
        S2AItem(torch.arange(6), torch.randint(0, 24, (0, 3))),
    ]
    given_codes = [torch.full((3, 9), -1), torch.full((3, 6), -1)]
    given_codes[0][:, 2:5], given_codes[1][0] = 7, torch.arange(6)
    options = StageOptions((4, 2), 1.0, rules=rules)
    made = sample_layers(S2A_NET, items, seeded([0, 1]), options, given=given_codes)
    for codes, kept in zip(made, given_codes, strict=True):
        assert torch.equal(codes[kept >= 0], kept[kept >= 0])
    again = sample_layers(S2A_NET, items[1:], seeded([1]), options, given=given_codes[1:])
    assert torch.equal(again[0], made[1])


@pytest.mark.parametrize("steps", range(1, 13))
def test_every_number_of_steps(steps):
    item = T2SItem(torch.tensor([1, 2, 3]), torch.tensor([4, 5]))
    made = sample_semantic(T2S_NET, [item], [7], seeded([0]), StageOptions((steps,), rules=POLICY))[0]
    assert made.shape == (7,)


# ---- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"order": "left", "dilation": 8}, "dilation"),
        ({"order": "left", "adaptive": "threshold"}, "order"),
        ({"order": "left", "explore": 0.5}, "order"),
        ({"order": "left", "span": 3, "arrangement": "stride1"}, "order"),
        ({"refine_rounds": 1, "span": 3, "arrangement": "stride1"}, "refine_rounds"),
        ({"refine_rounds": -1}, "refine_rounds"),
        ({"refine_share": 1.5}, "refine_share"),
    ],
)
def test_policies_that_make_no_sense(options, word):
    with pytest.raises(ConfigError, match=word):
        MaskedConfig(**options)


def test_an_order_and_a_priority_do_not_go_together():
    batch = torch.zeros(1, 4).long(), torch.zeros(1, 4).bool(), torch.tensor([4])
    with pytest.raises(ConfigError, match="priority"):
        masked_sample(Toy(), *batch, palle_config(2), None, mask_id=V, priority=torch.zeros(1, 4))


def test_defaults_are_those_of_the_paper():
    config = palle_config()
    assert (config.steps, config.refine_rounds, config.refine_share) == (100, 7, 0.1)
    assert maskgct_config(25, 100).calls == 25
