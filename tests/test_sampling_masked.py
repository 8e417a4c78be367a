"""The masked-sampling loop: what holds for every configuration, and the official loops written out."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError, InputError, NarSpeechError
from nar_speech.sampling.codebooks import CodebookConfig, sample_codebooks
from nar_speech.sampling.config import (
    MaskedConfig,
    magnet_config,
    mask_ctc_config,
    maskgct_config,
    palle_config,
)
from nar_speech.sampling.draws import RecordedDraws, seeded
from nar_speech.sampling.masked import masked_sample
from nar_speech.sampling.trace import Trace

torch.set_num_threads(1)

V = 11


class Toy:
    """A model whose logits depend on the tokens around each position, on nothing behind an item's length."""

    def __init__(self, vocabulary=V, seed=0, flat=False, width=None):
        draws = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocabulary + 1, width or vocabulary, generator=draws) * 1.5
        self.place = torch.randn(64, width or vocabulary, generator=draws)
        self.flat, self.infos, self.inputs = flat, [], []

    def logits(self, tokens, lengths):
        inside = torch.arange(tokens.shape[-1]) < lengths[:, None]
        embedded = self.table[tokens] * inside[..., None]
        left = torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        right = torch.nn.functional.pad(embedded, (0, 0, 0, 1))[:, 1:]
        return 0.5 * embedded + left + 0.7 * right.roll(1, -1) + self.place[: tokens.shape[-1]]

    def __call__(self, tokens, info):
        if tokens.dim() == 3:
            tokens = tokens[:, info.stage]
        self.infos.append(info)
        self.inputs.append(tokens.clone())
        logits = self.logits(tokens, info.lengths)
        if self.flat:
            return logits[info.active], 0.3 * logits[info.active]
        return logits, 0.3 * logits


RULES = st.sampled_from(
    [
        MaskedConfig(steps=6),
        MaskedConfig(steps=5, schedule="linear", confidence="entropy", top_k=4, guidance=3.0),
        MaskedConfig(steps=4, greedy=True, confidence="margin"),
        MaskedConfig(
            steps=7, confidence_noise=1.0, anneal="time", final_greedy=True, tempered_confidence=False
        ),
        MaskedConfig(steps=5, confidence_noise=0.5, scoring="prod", span=2),
        maskgct_config(6, V, 0.6),
        magnet_config(steps=6),
        magnet_config(steps=6, scoring="prod", score_fixed=True),
        magnet_config(steps=6, arrangement="stride1"),
        magnet_config(steps=5, span=1, top_p=0.0),
        MaskedConfig(dilation=8),
        MaskedConfig(dilation=4, span=3, guidance=2.0),
        MaskedConfig(steps=9, adaptive="threshold", adaptive_level=0.6),
        MaskedConfig(steps=9, adaptive="factor", adaptive_level=0.8, span=2, final_greedy=True),
        MaskedConfig(steps=9, adaptive="entropy", adaptive_level=1.5, explore=0.5, confidence_noise=0.3),
        MaskedConfig(steps=8, explore=0.5),
        MaskedConfig(steps=5, schedule="even", guidance=2.0, guidance_rescale=0.7),
        MaskedConfig(steps=6, schedule="linear", order="left", confidence_noise=0.5),
        palle_config(5, 3, refine_share=0.3),
        maskgct_config(6, V, 0.6, refine_rounds=2, refine_share=0.25),
        MaskedConfig(steps=4, span=3, guidance=2.0, order="left", refine_rounds=2, refine_share=0.4),
        MaskedConfig(steps=9, adaptive="threshold", adaptive_level=0.6, refine_rounds=4, refine_share=0.3),
        MaskedConfig(dilation=4, refine_rounds=3, refine_share=0.5),
    ]
)


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 25), min_size=1, max_size=4))
    seed = draw(st.integers(0, 1000))
    draws = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(max(lengths), 1)
    tokens = torch.randint(0, V, shape, generator=draws)
    share = draw(st.sampled_from([0.0, 0.3, 0.95, 1.0]))
    fixed = torch.rand(shape, generator=draws) < share
    return tokens, fixed, torch.tensor(lengths), list(range(seed, seed + len(lengths)))


def sample(model, batch, config, **options):
    tokens, fixed, lengths, seeds = batch
    return masked_sample(model, tokens, fixed, lengths, config, seeded(seeds), mask_id=V, **options)


@given(batch=batches(), config=RULES)
@settings(max_examples=80, deadline=None)
def test_every_free_position_gets_a_token_and_no_other(batch, config):
    tokens, fixed, lengths, _ = batch
    before, model = tokens.clone(), Toy()
    result = sample(model, batch, config)
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    assert torch.equal(tokens, before)
    assert torch.equal(result.tokens[fixed | ~inside], tokens[fixed | ~inside])
    assert (result.tokens < V).all()
    assert (result.tokens >= 0).all()
    assert result.calls == len(model.infos) <= config.calls
    free = (~fixed & inside).any(1)
    assert [calls > 0 for calls in result.item_calls] == free.tolist()


@given(batch=batches(), config=RULES)
@settings(max_examples=60, deadline=None)
def test_a_batch_equals_its_singles(batch, config):
    tokens, fixed, lengths, seeds = batch
    whole = sample(Toy(), batch, config)
    still = sample(Toy(), batch, dataclasses.replace(config, drop_finished=False))
    assert torch.equal(whole.tokens, still.tokens)
    assert whole.item_calls == still.item_calls
    for row, length in enumerate(lengths.tolist()):
        part = tokens[row : row + 1, :length], fixed[row : row + 1, :length], lengths[row : row + 1]
        single = sample(Toy(flat=not config.guidance_rescale), (*part, seeds[row : row + 1]), config)
        assert torch.equal(single.tokens[0], whole.tokens[row, :length])
        assert single.item_calls[0] == whole.item_calls[row]


@given(batch=batches(), config=RULES)
@settings(max_examples=50, deadline=None)
def test_the_network_is_told_the_truth(batch, config):
    tokens, fixed, lengths, _ = batch
    model, trace = Toy(), Trace()
    result = sample(model, batch, config, trace=trace)
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    seen: dict[int, torch.Tensor] = {}
    settled: dict[int, torch.Tensor] = {}
    for number, (info, given_tokens) in enumerate(zip(model.infos, model.inputs, strict=True)):
        assert info.call == number
        assert info.rows.tolist() == list(info.items)
        assert info.guided == bool((info.guidance != 1).any())
        masked = given_tokens == V
        assert (masked <= info.active).all()
        assert not (info.active & ~inside[info.rows]).any()
        assert not (masked & fixed[info.rows]).any()
        for row, item in enumerate(info.items):
            if item in seen:
                assert torch.equal(info.changed[row], given_tokens[row] != seen[item])
                kept = settled[item]
                assert torch.equal(given_tokens[row][kept], seen[item][kept])
            else:
                assert info.changed[row].all()
            seen[item], settled[item] = given_tokens[row], info.frozen[row] & inside[item]
    for item in range(len(tokens)):
        steps = trace.item(item)
        length = int(lengths[item])
        assert steps.masked.shape == (result.item_calls[item], length)
        if len(steps.tokens):
            assert steps.tokens[-1].tolist() == result.tokens[item, :length].tolist()
        given_at = steps.fixed_at(0)
        assert ((given_at > 0) == ~fixed[item, :length].numpy()).all()


def test_finished_items_leave_the_batch():
    tokens = torch.zeros(3, 20, dtype=torch.int64)
    fixed = torch.zeros(3, 20, dtype=torch.bool)
    fixed[0], fixed[1, :18] = True, True
    model = Toy()
    config = MaskedConfig(steps=10, schedule="even", greedy=True)
    result = masked_sample(model, tokens, fixed, torch.full((3,), 20), config, None, mask_id=V)
    assert result.item_calls == (0, 2, 10)
    assert [info.items for info in model.infos] == [(1, 2)] * 2 + [(2,)] * 8


def plain_maskgct(logits_of, length, steps, top_k, temperature, token_u, score_u):
    """MaskGCT's reverse loop for one item, written from its description (codes as the noise is given)."""

    def noise(u):
        return -torch.log(-torch.log(u + 1e-10) + 1e-10)

    times = [1.0 - i * (1.0 / steps) for i in range(steps)] + [0.0]
    masked = torch.ones(length, dtype=torch.bool)
    codes = torch.zeros(length, dtype=torch.int64)
    for i in range(steps):
        logits = logits_of(torch.where(masked, V, codes))
        best = logits.topk(top_k, -1)
        kept = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
        if i == steps - 1:
            drawn = kept.argmax(-1)
        else:
            drawn = (kept / max(temperature * times[i], 1e-3) + noise(token_u[i])).argmax(-1)
        codes = torch.where(masked, drawn, codes)
        score = 1 - (times[i] * noise(score_u[i]) + kept.softmax(-1).gather(-1, drawn[:, None])[:, 0])
        count = int((torch.sin(torch.tensor(times[i + 1]) * math.pi / 2) * length).long())
        if count == 0:
            break
        score[~masked] = -torch.inf
        masked = torch.zeros_like(masked).scatter(0, score.topk(count).indices, True)
    return codes


@given(seed=st.integers(0, 500), length=st.integers(1, 30), steps=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_maskgct_written_out(seed, length, steps):
    draws, model = torch.Generator().manual_seed(seed), Toy(seed=seed)
    token_u = torch.rand(steps, length, V, generator=draws)
    score_u = torch.rand(steps, length, generator=draws)
    lengths = torch.tensor([length])

    def exponential(u):
        return (-torch.log(u + 1e-10) + 1e-10)[:, None]

    config = maskgct_config(steps, V, 0.6)
    want = plain_maskgct(
        lambda codes: model.logits(codes[None], lengths)[0],
        *(length, steps, config.top_k, config.temperature, token_u, score_u),
    )
    result = masked_sample(
        lambda tokens, info: (model.logits(tokens, info.lengths), None),
        torch.zeros(1, length, dtype=torch.int64),
        torch.zeros(1, length, dtype=torch.bool),
        lengths,
        config,
        RecordedDraws(list(exponential(token_u)), list(exponential(score_u))),
        mask_id=V,
    )
    assert torch.equal(result.tokens[0], want)


def plain_mask_ctc(logits_of, tokens, iterations):
    """ESPnet's easy-first loop for one item, written from its description."""
    masked = (tokens == V).nonzero()[:, 0]
    rounds = min(iterations, len(masked))
    if not rounds:
        return tokens
    per_round = len(masked) // rounds
    tokens = tokens.clone()
    for i in range(rounds):
        scores, best = logits_of(tokens).max(-1)
        places = (tokens == V).nonzero()[:, 0]
        if i < rounds - 1:
            places = places[scores[places].topk(min(per_round, len(places))).indices]
        tokens[places] = best[places]
    return tokens


@given(
    seed=st.integers(0, 500), length=st.integers(1, 25), iterations=st.integers(1, 12), share=st.floats(0, 1)
)
@settings(max_examples=50, deadline=None)
def test_mask_ctc_written_out(seed, length, iterations, share):
    """The network can predict the mask itself, which then stays."""
    draws, model = torch.Generator().manual_seed(seed), Toy(seed=seed, width=V + 1)
    fixed = torch.rand(1, length, generator=draws) >= share
    tokens = torch.randint(0, V, (1, length), generator=draws)
    lengths = torch.tensor([length])
    want = plain_mask_ctc(
        lambda row: model.logits(row[None], lengths)[0], tokens[0].masked_fill(~fixed[0], V), iterations
    )
    result = masked_sample(
        lambda ids, info: (model.logits(ids, info.lengths), None),
        *(tokens, fixed, lengths, mask_ctc_config(iterations), None),
        mask_id=V,
    )
    assert torch.equal(result.tokens[0], want)


def test_a_given_order_is_kept():
    order = torch.tensor([[5, 0, 4, 1, 3, 2]])
    model = Toy()
    sample(model, (torch.zeros(1, 6).long(), torch.zeros(1, 6).bool(), torch.tensor([6]), [1]),
           MaskedConfig(steps=6, schedule="linear"), priority=order.float())  # fmt: skip
    for number, ids in enumerate(model.inputs):
        assert torch.equal(ids == V, order >= number)


def test_dilated_steps_unmask_units_that_are_no_neighbours():
    model = Toy()
    batch = torch.zeros(1, 40).long(), torch.zeros(1, 40).bool(), torch.tensor([40]), [3]
    result = sample(model, batch, MaskedConfig(dilation=8))
    assert result.calls == 4
    masks = [ids[0] == V for ids in model.inputs] + [torch.zeros(40, dtype=torch.bool)]
    for before, after in itertools.pairwise(masks):
        assert (before & ~after).nonzero()[:, 0].diff().min() >= 2


def test_empty_dilated_groups_take_no_step():
    fixed = torch.zeros(1, 16, dtype=torch.bool)
    fixed[0, ::8] = fixed[0, 4::8] = True  # groups 0 and 1
    model = Toy()
    sample(model, (torch.zeros(1, 16).long(), fixed, torch.tensor([16]), [0]), MaskedConfig(dilation=8))
    assert len(model.infos) == 2


def test_a_sure_model_needs_one_call_and_an_unsure_one_the_schedule():
    batch = torch.zeros(1, 30).long(), torch.zeros(1, 30).bool(), torch.tensor([30]), [3]

    def calls(scale, **options):
        def predict(ids, info):
            return scale * torch.nn.functional.one_hot(torch.arange(30) % V, V).float()[None], None

        return sample(predict, batch, MaskedConfig(steps=12, **options)).calls

    for options in ({"adaptive_level": 0.9}, {"adaptive": "factor"}, {"adaptive": "entropy"}):
        options = {"adaptive": "threshold"} | options
        assert calls(50.0, **options) == 1
        assert calls(0.0, **options) in (calls(0.0), calls(0.0) - 1)  # by entropy one is always sure


def test_items_that_run_ahead_take_the_guidance_of_where_they_are():
    model = Toy()
    config = MaskedConfig(steps=20, adaptive="threshold", adaptive_level=0.8, guidance=3.0, guidance_end=1.0)
    batch = torch.zeros(1, 60).long(), torch.zeros(1, 60).bool(), torch.tensor([60]), [3]
    result = sample(model, batch, config)
    assert 1 < result.calls < 20
    steps = [int(info.step[0]) for info in model.infos]
    assert steps == sorted(set(steps))
    assert steps != list(range(len(steps)))
    guidance = [float(info.guidance[0]) for info in model.infos]
    assert guidance == sorted(guidance, reverse=True)


def test_explored_steps_unmask_the_least_certain_too():
    confidence = torch.linspace(3.0, 0.1, 20)  # the logit of one token falls from left to right
    logits = torch.zeros(1, 20, V)
    logits[0, :, 4] = confidence
    inputs = []

    def predict(ids, info):
        inputs.append(ids[0] == V)
        return logits, None

    batch = torch.zeros(1, 20).long(), torch.zeros(1, 20).bool(), torch.tensor([20]), [3]
    sample(predict, batch, MaskedConfig(steps=4, schedule="linear", greedy=True, explore=0.4))
    assert (~inputs[1]).nonzero()[:, 0].tolist() == [0, 1, 2, 18, 19]
    # 5 of 20 are unmasked in a step; in the second half the surest ones alone
    assert (~inputs[2]).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 16, 17, 18, 19]
    assert (~inputs[3]).nonzero()[:, 0].tolist() == [*range(11), 16, 17, 18, 19]


def test_an_external_model_changes_the_order_alone():
    batch = torch.zeros(1, 12).long(), torch.zeros(1, 12).bool(), torch.tensor([12]), [3]
    wanted = torch.linspace(1, 0, 12)[None]
    inputs = []

    def predict(ids, info):
        inputs.append(ids[0] == V)
        return torch.zeros(1, 12, V), None

    config = MaskedConfig(steps=12, schedule="linear", rescore_weight=1.0)
    filled = []

    def external(ids, info):
        filled.append(ids.clone())
        return wanted

    result = sample(predict, batch, config, rescore=external)
    assert [mask.nonzero()[:, 0].tolist() for mask in inputs] == [list(range(i, 12)) for i in range(12)]
    assert (filled[0] < V).all()
    assert torch.equal(filled[-1], result.tokens)
    plain = sample(Toy(), batch, MaskedConfig(steps=5))
    same = sample(Toy(), batch, MaskedConfig(steps=5, rescore_weight=0.0), rescore=external)
    assert torch.equal(plain.tokens, same.tokens)


def test_codebooks_come_one_after_the_other_and_prompts_stay():
    model, trace, done = Toy(), Trace(), []
    codes = torch.randint(0, V, (2, 3, 14), generator=torch.Generator().manual_seed(1))
    fixed = torch.zeros(2, 3, 14, dtype=torch.bool)
    fixed[0, :, :4] = True
    fixed[1, 0] = True  # the whole first codebook
    lengths = torch.tensor([14, 11])
    inputs = []

    def predict(tokens, info):
        inputs.append((info.stage, tokens.clone(), info))
        return model(tokens, info)

    config = CodebookConfig((4, 2), magnet_config())
    result = sample_codebooks(
        *(predict, codes, fixed, lengths, config, seeded([1, 2])),
        mask_id=V,
        trace=trace,
        on_step=lambda now, most: done.append((now, most)),
    )
    inside = torch.arange(14) < lengths[:, None, None]
    assert torch.equal(result.tokens[fixed & inside], codes[fixed & inside])
    assert (result.tokens[~inside.expand_as(codes)] == 0).all()
    assert result.calls == len(inputs) == 8
    assert result.item_calls == (8, 4)
    assert done == [(i, 8) for i in range(1, 9)]
    for stage, tokens, info in inputs:
        valid = inside[info.rows, 0]
        assert (tokens[:, :stage].movedim(1, -1)[valid] < V).all()
        later = torch.where(fixed[info.rows, stage + 1 :], codes[info.rows, stage + 1 :], V)
        assert torch.equal(tokens[:, stage + 1 :] * valid[:, None], later * valid[:, None])
    # the last call of a stage leaves tokens that the first of the next one has not seen yet
    assert inputs[4][2].changed.any()
    assert trace.item(0).fixed.shape == (3, 14)
    assert trace.item(1).stage.tolist() == [1, 1, 2, 2]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    seed=st.integers(0, 100),
    arrangement=st.sampled_from(["nonoverlap", "stride1"]),
    cut=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_codebooks_of_a_batch_equal_singles(lengths, seed, arrangement, cut):
    draws = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, V, (len(lengths), 2, max(lengths)), generator=draws)
    fixed = torch.rand(len(lengths), max(lengths), generator=draws) < 0.3
    config = CodebookConfig((4, 3), magnet_config(arrangement=arrangement), cut=cut)
    seeds = list(range(seed, seed + len(lengths)))
    whole = sample_codebooks(Toy(), codes, fixed, torch.tensor(lengths), config, seeded(seeds), mask_id=V)
    for row, length in enumerate(lengths):
        single = sample_codebooks(
            Toy(),
            codes[row : row + 1, :, :length],
            fixed[row : row + 1, :length],
            torch.tensor([length]),
            config,
            seeded(seeds[row : row + 1]),
            mask_id=V,
        )
        wanted = length // 3 * 3 if cut and arrangement == "nonoverlap" else length
        assert single.lengths.tolist() == [wanted] == whole.lengths[row : row + 1].tolist()
        assert torch.equal(single.tokens[0], whole.tokens[row, :, :wanted])


def test_bad_input_is_refused():
    tokens, fixed, lengths = torch.zeros(1, 5).long(), torch.zeros(1, 5).bool(), torch.tensor([5])
    with pytest.raises(InputError, match="expected"):
        masked_sample(Toy(), tokens[0], fixed, lengths, MaskedConfig(), None, mask_id=V)
    with pytest.raises(InputError, match="must be 0 to 5"):
        masked_sample(Toy(), tokens, fixed, lengths + 1, MaskedConfig(), None, mask_id=V)
    with pytest.raises(InputError, match="generator"):
        masked_sample(Toy(), tokens, fixed, lengths, MaskedConfig(), None, mask_id=V)
    with pytest.raises(InputError, match="fewer"):
        masked_sample(Toy(), tokens, fixed, lengths, MaskedConfig(), RecordedDraws(), mask_id=V)
    with pytest.raises(InputError, match="2 generators for 1 items"):
        masked_sample(Toy(), tokens, fixed, lengths, MaskedConfig(), seeded([1, 2]), mask_id=V)
    with pytest.raises(InputError, match="0 generators for 1 items"):
        sample_codebooks(Toy(), tokens[None], fixed, lengths, CodebookConfig(), [], mask_id=V)
    dilated, order = MaskedConfig(dilation=4), torch.arange(5.0)[None]
    for without_a_say in ({"priority": order}, {"rescore": lambda ids, info: order}):
        with pytest.raises(ConfigError, match="dilation: fixes the order"):
            masked_sample(Toy(), tokens, fixed, lengths, dilated, seeded([1]), mask_id=V, **without_a_say)
    odd = RecordedDraws([torch.ones(1, 5, 3)])
    with pytest.raises(InputError, match="shape"):
        masked_sample(Toy(), tokens, fixed, lengths, MaskedConfig(), odd, mask_id=V)
    broken, greedy = torch.full((1, 5, V), torch.nan), MaskedConfig(greedy=True)
    with pytest.raises(NarSpeechError, match="NaN"):
        masked_sample(lambda ids, info: (broken, None), tokens, fixed, lengths, greedy, None, mask_id=V)
    config = MaskedConfig(guidance=2.0, guidance_rescale=0.5)
    with pytest.raises(ConfigError, match="all positions"):
        masked_sample(Toy(flat=True), tokens, fixed, lengths, config, seeded([1]), mask_id=V)
    codes = torch.full((1, 2, 5), V)
    with pytest.raises(InputError, match="out of range"):
        sample_codebooks(Toy(), codes, ~fixed, lengths, CodebookConfig(), None, mask_id=V)
    with pytest.raises(InputError, match="codebooks"):
        sample_codebooks(Toy(), tokens, fixed, lengths, CodebookConfig(), None, mask_id=V)
    with pytest.raises(ConfigError, match="steps"):
        CodebookConfig(())
