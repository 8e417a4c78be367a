"""The parts of masked sampling against plain references: schedules, filters, spans, selection, guidance."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError
from nar_speech.sampling import filters
from nar_speech.sampling.confidence import confidence_of
from nar_speech.sampling.config import MaskedConfig, magnet_config, mask_ctc_config, maskgct_config
from nar_speech.sampling.filters import draw, draw_tokens, draw_top_p, top_k_filter, top_p_filter
from nar_speech.sampling.guidance import guide, rescale
from nar_speech.sampling.schedules import make_plan, mask_ratio, unit_counts
from nar_speech.sampling.selection import dilated_groups, keep_masked, sure_units
from nar_speech.sampling.spans import any_in_chunk, overlapping_mask, to_positions, unit_scores

torch.set_num_threads(1)

SCHEDULES = ("cosine", "linear", "arccos", "square", "cubic", "sqrt", "even")
SEEDS = st.integers(0, 10_000)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# --- schedules
# ------------------------------------------------------------------------------------------------


@given(
    schedule=st.sampled_from(SCHEDULES),
    progress=st.sampled_from(["inclusive", "exclusive"]),
    steps=st.integers(1, 60),
    minimum=st.integers(0, 2),
    totals=st.lists(st.integers(0, 300), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_counts_begin_with_everything_and_never_grow(schedule, progress, steps, minimum, totals):
    config = MaskedConfig(steps=steps, schedule=schedule, progress=progress, minimum=minimum)
    plan = make_plan(config)
    assert plan.steps == steps == len(plan.temperature) == len(plan.guidance)
    for total, counts in zip(totals, unit_counts(config, plan, totals), strict=True):
        assert len(counts) == steps
        assert counts[0] == total
        assert all(a >= b >= 0 for a, b in itertools.pairwise(counts))
        if schedule != "even" and total:
            assert min(counts) >= min(minimum, total)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ratio_falls_from_one_to_zero(schedule):
    ratio = mask_ratio(schedule, torch.linspace(0, 1, 101))
    assert ratio[0].item() == pytest.approx(1, abs=1e-6)
    assert ratio[-1].item() == pytest.approx(0, abs=1e-6)
    assert (ratio.diff() < 0).all()


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match="unknown"):
        mask_ratio("tangent", torch.zeros(1))


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 9, 10, 25, 40])
@pytest.mark.parametrize("total", [1, 2, 7, 50, 333, 1000])
def test_counts_of_the_official_loops(steps, total):
    maskgct = maskgct_config(steps, 1024)
    length = 1.0 / steps
    want = [total]
    for i in range(1, steps):
        time = (1.0 - i * length) * torch.ones(1)
        want.append(int((torch.sin(time * math.pi / 2) * total).long()))
    assert unit_counts(maskgct, make_plan(maskgct), [total]) == [want]
    magnet = magnet_config(steps=steps)
    shares = [torch.cos(u * math.pi * 0.5) for u in torch.linspace(0, 1, steps)]
    want = [max(int((share * total).item()), 1) for share in shares]
    assert unit_counts(magnet, make_plan(magnet), [total]) == [want]


def test_temperature_and_guidance_of_magnet():
    plan = make_plan(magnet_config(steps=4))
    assert plan.temperature == pytest.approx((2.25, 1.5, 0.75, 0.01))
    cosine = [math.cos(u * math.pi / 2) for u in (0, 1 / 3, 2 / 3, 1)]
    assert plan.guidance == pytest.approx([10 * c + (1 - c) for c in cosine], abs=1e-5)
    assert plan.guidance[-1] == 1.0  # exactly: the unconditional pass is left out
    assert make_plan(magnet_config(steps=1)).guidance == (10.0,)
    linear = make_plan(MaskedConfig(steps=4, guidance=3.0, guidance_end=1.0, guidance_anneal="linear"))
    assert linear.guidance == pytest.approx((3.0, 2.5, 2.0, 1.5))


def test_mask_ctc_fixes_the_same_number_in_every_step():
    config = mask_ctc_config(4)
    assert unit_counts(config, make_plan(config), [10, 3, 4, 0]) == [
        [10, 8, 6, 4],
        [3, 2, 1, 0],
        [4, 3, 2, 1],
        [0, 0, 0, 0],
    ]


# --- filters
# --------------------------------------------------------------------------------------------------


def test_top_k_keeps_ties():
    probabilities = torch.tensor([[0.1, 0.3, 0.3, 0.2, 0.1]])
    assert torch.equal(top_k_filter(probabilities, 1) > 0, torch.tensor([[False, True, True, False, False]]))
    assert torch.allclose(top_k_filter(probabilities, 2).sum(-1), torch.ones(1))
    assert torch.equal(top_k_filter(probabilities, 9), probabilities)


@given(seed=SEEDS, size=st.integers(1, 12), p=st.floats(0.01, 1.0))
@settings(max_examples=50, deadline=None)
def test_top_p_keeps_what_begins_within_p(seed, size, p):
    probabilities = torch.softmax(torch.randn(1, size, generator=generator(seed)), -1)
    kept, tokens = top_p_filter(probabilities, p)
    assert sorted(tokens[0].tolist()) == list(range(size))
    total, want = 0.0, []
    for value in sorted(probabilities[0].tolist(), reverse=True):
        want.append(value if total <= p else 0.0)
        total += value
    want = torch.tensor(want) / sum(want)
    assert torch.allclose(kept[0], want, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}])
def test_a_draw_is_what_multinomial_draws(options):
    logits = torch.randn(50, 9, generator=generator(1))
    temperature = torch.full((50,), 0.8)
    exponential = torch.empty(50, 9).exponential_(generator=generator(7))
    tokens, scored = draw_tokens(logits, temperature, exponential, **options)
    plain = torch.softmax(logits / 0.8, -1)
    if "top_p" in options:
        ordered, ids = top_p_filter(plain, 0.7)
        want = ids.gather(1, torch.multinomial(ordered, 1, generator=generator(7)))[:, 0]
        assert torch.allclose(scored, plain)
    else:
        kept = top_k_filter(plain, 3) if options else plain
        want = torch.multinomial(kept, 1, generator=generator(7))[:, 0]
        assert torch.allclose(scored, kept)
    assert torch.equal(tokens, want)


def test_uniform_numbers_follow_the_distribution():
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3, 0.0])
    numbers = torch.linspace(0, 1, 1001)[:-1]
    columns = draw(probabilities.expand(1000, 5), numbers)
    assert columns.bincount(minlength=5).tolist() == pytest.approx([200, 0, 500, 300, 0], abs=1)
    assert columns.tolist() == sorted(columns.tolist())
    edge = draw(torch.tensor([[0.3, 0.7, 0.0]]), torch.tensor([1.0]))  # as far as rounding may get
    assert edge.tolist() == [1]


@pytest.mark.parametrize("p", [0.3, 0.9, 1.0])
def test_sorting_a_part_draws_as_sorting_all_does(p, monkeypatch):
    logits = torch.randn(60, 40, generator=generator(4)) * torch.linspace(0.1, 6, 60)[:, None]
    probabilities, numbers = torch.softmax(logits, -1), torch.rand(60, generator=generator(5))
    whole = draw_top_p(probabilities, numbers, p)
    monkeypatch.setattr(filters, "NUCLEUS", 8)  # some rows keep more than 8, others fewer
    assert torch.equal(draw_top_p(probabilities, numbers, p), whole)
    kept, tokens = top_p_filter(probabilities, p)
    assert (kept.gather(1, (tokens == whole[:, None]).int().argmax(1, keepdim=True)) > 0).all()


def test_without_draws_the_best_token_wins_and_scores_are_whole():
    logits = torch.randn(20, 6, generator=generator(2))
    tokens, scored = draw_tokens(logits, torch.full((20,), 2.0), None, top_k=2)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.allclose(scored, torch.softmax(logits / 2, -1))
    _, plain = draw_tokens(logits, torch.full((20,), 2.0), None, tempered_scores=False)
    assert torch.allclose(plain, torch.softmax(logits, -1))


# --- confidence, guidance
# -------------------------------------------------------------------------------------


def test_kinds_of_confidence():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    tokens, logits = torch.tensor([1, 0, 2]), torch.tensor([[0.0, -2.0, 1.0]] * 3)

    def of(kind):
        return confidence_of(kind, probabilities, tokens, logits)

    assert torch.allclose(of("probability"), torch.tensor([0.3, 1.0, 1 / 3]))
    assert torch.allclose(of("purity"), torch.tensor([0.5, 1.0, 1 / 3]))
    assert torch.allclose(of("margin"), torch.tensor([0.2, 1.0, 0.0]))
    assert torch.allclose(of("logit"), torch.tensor([-2.0, 0.0, 1.0]))
    entropies = of("entropy")
    assert entropies[1] == 1
    assert entropies[2] == pytest.approx(0, abs=1e-6)
    assert 0 < entropies[0] < 1
    with pytest.raises(ConfigError, match="unknown"):
        of("hope")


def test_rescaled_guidance_of_an_item_is_its_own():
    conditional, other = torch.randn(2, 3, 7, 5, generator=generator(3)).unbind(0)
    valid = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]
    guided = guide(conditional, other, torch.tensor([2.0, 3.0, 1.0]))
    assert torch.equal(guided[2], conditional[2])
    scaled = rescale(guided, conditional, 0.75, valid)
    for row, length in enumerate((7, 4, 1)):
        one, base = guided[row, :length], conditional[row, :length]
        want = 0.75 * one * base.std() / one.std() + 0.25 * one
        assert torch.allclose(scaled[row, :length], want, atol=1e-5)
        alone = rescale(one[None], base[None], 0.75, valid[row : row + 1, :length])
        assert torch.equal(alone[0], scaled[row, :length])  # whatever the padding
    assert torch.equal(scaled[2], conditional[2])
    whole = rescale(guided, conditional, 1.0, per_item=False)
    assert torch.allclose(whole, guided * conditional.std() / guided.std(), atol=1e-5)


# --- spans
# ----------------------------------------------------------------------------------------------------


def least_probable_spans(scores, wanted, span):
    """The official search, item by item, written from its description."""
    length = len(scores)
    sums = [sum(scores[j : j + span]) for j in range(length - span + 1)]
    order = sorted(range(len(sums)), key=lambda j: -sums[j])

    def union(count):
        return {t for j in order[:count] for t in range(j, j + span)}

    wanted = max(wanted, span)
    low, high = wanted // span, wanted - span + 1
    middle = round(0.5 * (low + high))
    if middle in (low, high):
        return union(middle)
    while low < middle < high:
        found = union(middle)
        if len(found) > wanted:
            high = middle
        else:
            low = middle
        middle = round(0.5 * (low + high))
    return found


@given(
    seed=SEEDS,
    span=st.integers(2, 5),
    lengths=st.lists(st.integers(5, 40), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_overlapping_spans_are_found_as_officially(seed, span, lengths, share):
    longest = max(lengths)
    scores = torch.rand(len(lengths), longest, generator=generator(seed)) * 5
    counts = torch.tensor([max(int(share * n), 1) for n in lengths])
    found = overlapping_mask(scores, counts, torch.tensor(lengths), span)
    for row, length in enumerate(lengths):
        want = least_probable_spans(scores[row, :length].tolist(), int(counts[row]), span)
        assert set(found[row].nonzero()[:, 0].tolist()) == want


def test_a_clip_shorter_than_a_span_is_masked_whole():
    found = overlapping_mask(torch.rand(1, 6), torch.tensor([1]), torch.tensor([2]), 3)
    assert found.tolist() == [[True, True, False, False, False, False]]


def test_scores_of_units():
    confidence = torch.tensor([[0.5, 0.2, 0.9, 0.4, 0.25]])
    counted = torch.tensor([[True, True, True, True, False]])
    most = unit_scores(confidence, counted, 3, "max")
    assert torch.allclose(most, torch.tensor([[1 - 0.9, 1 - 0.4]]))
    product = unit_scores(confidence, counted, 3, "prod")
    want = torch.tensor([[-math.log(0.5 * 0.2 * 0.9), -3 * math.log(0.4)]])
    assert torch.allclose(product, want)  # one of three positions counts three times
    assert unit_scores(confidence, torch.zeros_like(counted), 3, "max").tolist() == [[0.0, 0.0]]
    noisy = unit_scores(confidence, counted, 1, "max", torch.full_like(confidence, 0.5))
    assert torch.allclose(noisy[0, :4], 1 - (confidence[0, :4] + 0.5))


@given(length=st.integers(1, 30), span=st.integers(1, 5), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_chunks_cover_every_position(length, span, seed):
    mask = torch.rand(2, length, generator=generator(seed)) < 0.3
    chunks = any_in_chunk(mask, span)
    assert chunks.shape == (2, math.ceil(length / span))
    back = to_positions(chunks, span, length)
    assert back.shape == mask.shape
    assert (back | ~mask).all()
    for row, t in back.nonzero().tolist():
        assert mask[row, t // span * span : (t // span + 1) * span].any()


# --- selection
# ------------------------------------------------------------------------------------------------


@given(seed=SEEDS, units=st.integers(1, 12), count=st.integers(0, 12), explored=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_the_highest_scores_stay_masked(seed, units, count, explored):
    draws = generator(seed)
    scores = torch.randint(0, 4, (1, units), generator=draws).float()
    candidates = torch.rand(1, units, generator=draws) < 0.7
    kept = keep_masked(scores, candidates, torch.tensor([count]), torch.tensor([explored]))
    order = sorted((i for i in range(units) if candidates[0, i]), key=lambda i: -scores[0, i].item())
    assert set(kept[0].nonzero()[:, 0].tolist()) == set(order[explored : explored + count])


def test_infinite_scores_are_ranked_too():
    scores = torch.tensor([[torch.inf, -torch.inf, 1.0, 5.0]])
    candidates = torch.tensor([[True, True, True, False]])
    kept = keep_masked(scores, candidates, torch.tensor([3]))
    assert kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("block", [2, 4, 8, 32])
def test_dilated_groups_are_far_apart(block):
    groups = dilated_groups(100, block)
    assert groups.max() == int(math.log2(block))
    assert groups[::block].eq(0).all()
    for group in range(int(groups.max()) + 1):
        places = (groups == group).nonzero()[:, 0]
        assert places.diff().min() >= max(block >> max(group - 1, 0), 2)


def brute_sure(kind, level, confidence, entropies):
    order = sorted(range(len(confidence)), key=lambda i: -confidence[i])
    if kind == "threshold":
        found = {i for i in order if confidence[i] >= level}
    elif kind == "factor":
        fits = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - confidence[order[n - 1]]) < level]
        found = set(order[: max(fits, default=0)])
    else:
        found = set()
        for n in range(1, len(order) + 1):
            values = [entropies[i] for i in order[:n]]
            if sum(values) - max(values) > level:
                break
            found = set(order[:n])
    return found


@given(
    seed=SEEDS,
    kind=st.sampled_from(["threshold", "factor", "entropy"]),
    level=st.floats(0.05, 1.0),
    units=st.integers(1, 10),
)
@settings(max_examples=60, deadline=None)
def test_adaptive_rules(seed, kind, level, units):
    draws = generator(seed)
    confidence = torch.rand(1, units, generator=draws)
    entropies = torch.rand(1, units, generator=draws)
    candidates = torch.rand(1, units, generator=draws) < 0.8
    sure = sure_units(kind, level, confidence, entropies, candidates)
    inside = candidates[0].nonzero()[:, 0].tolist()
    if not inside:
        assert not sure.any()
        return
    want = brute_sure(kind, level, confidence[0, inside].tolist(), entropies[0, inside].tolist())
    assert set(sure[0].nonzero()[:, 0].tolist()) == {inside[i] for i in want}


# --- configuration
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"top_p": 1.5}, "top_p"),
        ({"dilation": 12}, "power of two"),
        ({"dilation": 8, "explore": 0.5}, "choose one"),
        ({"adaptive": "factor", "arrangement": "stride1", "span": 3}, "nonoverlap"),
        ({"adaptive": "threshold", "adaptive_level": 2.0}, "at most 1"),
        ({"confidence": "logit", "scoring": "prod"}, "logit"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        MaskedConfig(**options)


def test_single_tokens_of_magnet_are_scored_by_their_logarithm():
    assert magnet_config(span=1).scoring == "prod"
    assert make_plan(maskgct_config(1, 100)).temperature == (0.2,)
    assert make_plan(maskgct_config(2, 100)).temperature == (0.9, 0.45)
    assert maskgct_config(5, 8192).top_k == 164
