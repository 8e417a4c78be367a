"""MaskGCT's two stages: against the official algorithm, batches against singles, given codes, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import maskgct_official as official
from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.quantize import int8_available
from nar_speech.models.maskgct import S2A, T2S, S2AConfig, S2AItem, T2SConfig, T2SItem
from nar_speech.models.maskgct_predictor import predictor
from nar_speech.models.metis import Metis, MetisConfig
from nar_speech.pipelines.maskgct_stages import (
    ALL_LAYERS,
    FIRST_LAYER,
    SEMANTIC,
    StageOptions,
    sample_acoustic,
    sample_layers,
    sample_semantic,
)
from nar_speech.sampling.codebooks import CodebookConfig, sample_codebooks
from nar_speech.sampling.draws import RecordedDraws, seeded
from nar_speech.sampling.masked import masked_sample
from nar_speech.sampling.step import StepInfo
from nar_speech.sampling.trace import Trace

SMALL = {"width": 24, "num_blocks": 2, "heads": 3, "hidden_scale": 2}
V, A, K = 19, 17, 3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def loud(network, seed=0):
    """Weights that make up their minds, and that hide no wrong use."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.25)
    return network.eval().requires_grad_(False)


def t2s():
    torch.manual_seed(0)
    return loud(T2S(T2SConfig(**SMALL, codebook_size=V, num_phones=11)))


def s2a(layers):
    torch.manual_seed(layers)
    return loud(S2A(S2AConfig(**SMALL, num_codebooks=layers, codebook_size=A, semantic_size=V)), layers)


T2S_NETWORK, FIRST, FULL = t2s(), s2a(1), s2a(K)
METIS = loud(Metis(MetisConfig(**SMALL, codebook_size=V, num_phones=11, features=5, use_phones=False)))


def ids(size, *shape, seed=0):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


def semantic_item(phones, prompt, seed=0):
    return T2SItem(ids(11, phones, seed=seed), ids(V, prompt, seed=seed + 1))


def acoustic_item(prompt, length, seed=0):
    return S2AItem(ids(V, prompt + length, seed=seed), ids(A, prompt, K, seed=seed + 1))


class Tape:
    """Uniform numbers that are kept, so that another loop can be given the same."""

    def __init__(self, seed):
        self.generator, self.tokens, self.noise = torch.Generator().manual_seed(seed), [], []

    def __call__(self, *shape):
        drawn = torch.rand(shape, generator=self.generator)
        (self.tokens if len(shape) == 3 else self.noise).append(-torch.log(drawn + 1e-10) + 1e-10)
        return drawn

    def draws(self):
        return RecordedDraws(self.tokens, self.noise)


# ---- the official algorithm -----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 7), st.integers(1, 20)),
    steps=st.integers(1, 7),
    cfg=st.sampled_from([0.0, 1.0, 2.5]),
    batch=st.integers(1, 2),
    seed=st.integers(0, 999),
)
def test_semantic_codes_are_the_official_ones(sizes, steps, cfg, batch, seed):
    phones, prompt, length = ids(11, batch, sizes[0], seed=seed), ids(V, batch, sizes[1], seed=seed), sizes[2]
    tape = Tape(seed)
    logits = official.t2s_logits(T2S_NETWORK, phones, prompt, cfg, 0.75)
    want = official.reverse(logits, (batch, length), steps, 0.9, 0.7, tape)
    got = sample_semantic(
        T2S_NETWORK,
        [T2SItem(*pair) for pair in zip(phones, prompt, strict=True)],
        [length] * batch,
        tape.draws(),
        StageOptions((steps,), cfg, filter_threshold=0.7),
        batch_deviation=True,
    )
    assert torch.equal(torch.stack(got), want)


@settings(max_examples=20, deadline=None)
@given(
    prompt=st.integers(0, 6),
    length=st.integers(1, 15),
    steps=st.tuples(*[st.integers(1, 5)] * K),
    cfg=st.sampled_from([0.0, 2.5]),
    known=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_acoustic_codes_are_the_official_ones(prompt, length, steps, cfg, known, seed):
    item, tape = acoustic_item(prompt, length, seed), Tape(seed)
    codes = ids(A, 1, known, length, seed=seed)
    given = [codes[0]]
    for layer in range(known, K):
        logits = official.s2a_logits(FULL, item.semantic[None], item.prompt[None], codes, cfg, 0.75)
        new = official.reverse(logits, (1, length), steps[layer], 1.5, 0.7, tape)
        codes = torch.cat([codes, new[:, None]], 1)
    options = StageOptions(steps, cfg, temperature=1.5, filter_threshold=0.7)
    got = sample_layers(FULL, [item], tape.draws(), options, given=given)
    assert torch.equal(got[0], codes[0])


# ---- batches --------------------------------------------------------------------------------------------

RAGGED = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 6), st.integers(1, 14), st.integers(0, 99)),
    min_size=2,
    max_size=4,
)


@settings(max_examples=25, deadline=None, derandomize=True)  # in one pack equal to rounding only
@given(
    rows=RAGGED,
    steps=st.integers(1, 5),
    cfg=st.sampled_from([0.0, 2.5]),
    together=st.booleans(),
    adaptive=st.booleans(),
)
def test_a_semantic_batch_equals_its_singles(rows, steps, cfg, together, adaptive):
    items = [semantic_item(phones, prompt, seed) for phones, prompt, _, seed in rows]
    lengths, seeds = [row[2] for row in rows], [row[3] for row in rows]
    rules = (("adaptive", "threshold"), ("adaptive_level", 0.5)) if adaptive else ()
    options = StageOptions((steps,), cfg, filter_threshold=0.7, rules=rules)
    made = sample_semantic(
        T2S_NETWORK, items, lengths, seeded(seeds), options, one_by_one=False if together else None
    )
    for item, length, seed, codes in zip(items, lengths, seeds, made, strict=True):
        alone = sample_semantic(T2S_NETWORK, [item], [length], seeded([seed]), options)
        assert torch.equal(codes, alone[0])
        assert codes.shape == (length,)
        assert ((codes >= 0) & (codes < V)).all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=RAGGED, steps=st.tuples(*[st.integers(1, 4)] * K), together=st.booleans())
def test_an_acoustic_batch_equals_its_singles(rows, steps, together):
    items = [acoustic_item(prompt, length, seed) for _, prompt, length, seed in rows]
    seeds = [row[3] for row in rows]
    options = StageOptions(steps[:1], temperature=1.5), StageOptions(steps, temperature=1.5)
    made = sample_acoustic(
        FIRST, FULL, items, seeded(seeds), *options, one_by_one=False if together else None
    )
    for item, seed, codes in zip(items, seeds, made, strict=True):
        alone = sample_acoustic(FIRST, FULL, [item], seeded([seed]), *options)
        assert torch.equal(codes, alone[0])
        assert codes.shape == (K, len(item.semantic) - len(item.prompt))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_prepared_networks_sample_alike_in_any_batch(dtype):
    if dtype == "int8" and not int8_available():
        pytest.skip("no int8 kernels here")
    networks = t2s().prepare(dtype), s2a(1).prepare(dtype), s2a(K).prepare(dtype)
    rows = [(5, 3, 9, 1), (2, 6, 12, 2), (7, 1, 4, 3)]

    def both(chosen):
        items, lengths = [semantic_item(*row[:2], row[3]) for row in chosen], [row[2] for row in chosen]
        seeds = [row[3] for row in chosen]
        codes = sample_semantic(networks[0], items, lengths, seeded(seeds), StageOptions((5,)))
        whole = [
            S2AItem(torch.cat([item.prompt, new]), ids(A, len(item.prompt), K))
            for item, new in zip(items, codes, strict=True)
        ]
        options = StageOptions((4,), temperature=1.5), StageOptions((4, 2, 1), temperature=1.5)
        return codes, sample_acoustic(*networks[1:], whole, seeded(seeds), *options)

    batch, again = both(rows), both(rows)
    for number, row in enumerate(rows):
        alone = both([row])
        for part, same, single in zip(batch, again, alone, strict=True):
            assert torch.equal(part[number], single[0])
            assert torch.equal(part[number], same[number])
    if dtype == "float32":
        plain = sample_semantic(T2S_NETWORK, [semantic_item(5, 3, 1)], [9], seeded([1]), StageOptions((5,)))
        assert torch.equal(plain[0], batch[0][0])


def test_metis_with_features_in_a_ragged_batch():
    sizes = [(4, 9), (0, 6), (2, 11)]
    items = [
        T2SItem(None, ids(V, prompt), torch.randn(prompt + length, 5, generator=seeded([length])[0]))
        for prompt, length in sizes
    ]
    lengths = [length for _, length in sizes]
    options = StageOptions((4,), 1.0)
    made = sample_semantic(METIS, items, lengths, seeded([1, 2, 3]), options)
    for number, item in enumerate(items):
        alone = sample_semantic(METIS, [item], [lengths[number]], seeded([number + 1]), options)
        assert torch.equal(alone[0], made[number])
    deaf = [T2SItem(None, item.prompt) for item in items]
    assert any(
        not torch.equal(a, b)
        for a, b in zip(made, sample_semantic(METIS, deaf, lengths, seeded([1, 2, 3]), options), strict=True)
    )


def test_the_deviation_of_the_batch_mixes_items_and_the_own_one_does_not():
    items = [semantic_item(5, 3, 1), semantic_item(5, 3, 2)]
    network = t2s()
    network.to_logit.weight.mul_(0.3)  # unsure, so that small changes show
    options = StageOptions((8,), 6.0, rescale=1.0)
    mixed = sample_semantic(network, items, [30, 30], seeded([1, 2]), options, batch_deviation=True)
    own = sample_semantic(network, items, [30, 30], seeded([1, 2]), options)
    assert any(not torch.equal(a, b) for a, b in zip(mixed, own, strict=True))


# ---- given codes, order, work that is left out ----------------------------------------------------------


def test_given_codes_stay():
    known = ids(V, 12, seed=5)
    known[4:9] = -1
    made = sample_semantic(T2S_NETWORK, [semantic_item(4, 3)], [12], seeded([0]), given=[known])[0]
    assert torch.equal(made[known >= 0], known[known >= 0])
    assert (made >= 0).all()
    layers = ids(A, K, 12, seed=6)
    layers[:, 4:9] = -1
    codes = sample_acoustic(FIRST, FULL, [acoustic_item(3, 12)], seeded([0]), given=[layers])[0]
    assert torch.equal(codes[layers >= 0], layers[layers >= 0])
    assert (codes >= 0).all()


def test_nothing_to_make_needs_no_call():
    known = ids(V, 12)
    calls = []
    made = sample_semantic(
        *(T2S_NETWORK, [semantic_item(4, 3)], [12], None), given=[known], on_step=lambda *a: calls.append(a)
    )
    assert torch.equal(made[0], known)
    assert not calls


def test_an_order_from_left_to_right():
    seen = []
    network = predictor(T2S_NETWORK, [semantic_item(4, 3)])

    def watch(tokens, step):
        seen.append(step.active[0].clone())
        return network(tokens, step)

    masked_sample(
        watch,
        torch.zeros(1, 10, dtype=torch.int64),
        torch.zeros(1, 10, dtype=torch.bool),
        torch.tensor([10]),
        StageOptions((5,)).config(V),
        seeded([0]),
        mask_id=V,
        priority=torch.arange(10.0)[None],
    )
    for active in seen:
        free = active.nonzero()[:, 0].tolist()
        assert free == list(range(10 - len(free), 10))
    assert network.passes == 2 * len(seen)


def test_no_second_pass_without_guidance():
    network = predictor(T2S_NETWORK, [semantic_item(4, 3)])
    empty = torch.zeros(1, 10, dtype=torch.int64)
    rules = StageOptions((5,), cfg=0.0).config(V)
    result = masked_sample(network, empty, empty.bool(), torch.tensor([10]), rules, seeded([0]), mask_id=V)
    assert network.passes == result.calls == 5


def test_the_first_layers_alone_can_be_guided():
    codes = torch.zeros(1, K, 10, dtype=torch.int64)
    rules = StageOptions((3, 2), temperature=1.5).config(A)
    passes = {}
    for layers in (0, 1, 2):
        network = predictor(FULL, [acoustic_item(3, 10)], guided_layers=layers)
        arguments = network, codes, codes.bool(), torch.tensor([10]), CodebookConfig((3, 2), rules)
        sample_codebooks(*arguments, seeded([0]), mask_id=A)
        passes[layers] = network.passes
    assert passes == {0: 14, 1: 10, 2: 12}


def step_info(number, length, stage=0):
    """What the loop tells about a step of 5 with all positions read."""
    active = torch.ones(1, length, dtype=torch.bool)
    one = torch.ones(1)
    return StepInfo(
        call=number,
        stage=stage,
        steps=5,
        step=torch.tensor([number]),
        progress=one * number / 5,
        time=1 - one * number / 5,
        guidance=one * 3.5,
        guided=True,
        temperature=one,
        lengths=torch.tensor([length]),
        active=active,
        changed=active,
        frozen=~active,
        rows=torch.tensor([0]),
        items=(0,),
    )


def test_kept_keys_and_values_are_those_of_a_full_pass():
    close = {"atol": 1e-4, "rtol": 1e-4}
    for network, item, shape in (
        (T2S_NETWORK, semantic_item(4, 3), (1, 6)),
        (FULL, acoustic_item(3, 6), (1, K, 6)),
    ):
        tokens, others = ids(network.mask_id + 1, *shape), ids(network.mask_id + 1, *shape, seed=1)
        kept, full = predictor(network, [item], reuse=3), predictor(network, [item])
        first = kept(tokens, step_info(1, 6))[0]
        torch.testing.assert_close(first, full(tokens, step_info(1, 6))[0], **close)
        torch.testing.assert_close(kept(tokens, step_info(1, 6))[0], first, **close)
        near, exact = kept(others, step_info(2, 6))[0], full(others, step_info(2, 6))[0]
        assert not torch.allclose(near, exact, **close)
        assert (near - exact).norm() < (first - exact).norm()
        torch.testing.assert_close(kept(others, step_info(2, 6))[0], exact, **close)  # anew after three
        if shape[1] == K:
            want = full(others, step_info(2, 6, stage=1))[0]
            torch.testing.assert_close(kept(others, step_info(2, 6, stage=1))[0], want, **close)


def test_a_batch_equals_its_singles_with_reuse():
    rows = [(5, 3, 9), (2, 6, 12), (7, 0, 4)]
    items, lengths = [semantic_item(*row[:2], row[2]) for row in rows], [row[2] for row in rows]
    options = StageOptions((6,))
    made = sample_semantic(T2S_NETWORK, items, lengths, seeded(lengths), options, reuse=3)
    for item, length, codes in zip(items, lengths, made, strict=True):
        alone = sample_semantic(T2S_NETWORK, [item], [length], seeded([length]), options, reuse=3)
        assert torch.equal(codes, alone[0])
    bare = [S2AItem(ids(V, 7), ids(A, 0, K))]  # without a prompt there is nothing to keep
    kept = sample_layers(FULL, bare, seeded([0]), StageOptions((4,)), reuse=2)
    assert torch.equal(kept[0], sample_layers(FULL, bare, seeded([0]), StageOptions((4,)))[0])
    with pytest.raises(ConfigError, match="one by one"):
        predictor(T2S_NETWORK, items, reuse=2, one_by_one=False)


def test_steps_can_be_watched():
    trace, done = Trace(), []
    options = StageOptions((3, 2), temperature=1.5)
    made = sample_layers(
        *(FULL, [acoustic_item(3, 10)], seeded([0]), options),
        trace=trace,
        on_step=lambda *numbers: done.append(numbers),
    )
    assert done == [(i, 7) for i in range(1, 8)]
    assert trace.item(0).stage.tolist() == [0] * 3 + [1] * 2 + [2] * 2
    assert trace.item(0).tokens[-1].tolist() == made[0][2].tolist()


def test_defaults_are_the_official_ones():
    semantic, first, full = SEMANTIC.config(8192), FIRST_LAYER.config(1024), ALL_LAYERS.config(1024)
    assert (semantic.steps, semantic.guidance, semantic.temperature, semantic.top_k) == (25, 3.5, 0.9, 164)
    assert (first.steps, first.temperature, first.top_k) == (25, 1.5, 21)
    assert ALL_LAYERS.steps == (25, 10, 1)
    assert full.single_temperature == 0.2
    assert SEMANTIC.rescale == FIRST_LAYER.rescale == ALL_LAYERS.rescale == 0.75


# ---- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lengths": [0]}, "at least one"),
        ({"lengths": [3, 4]}, "another number"),
        ({"items": [], "lengths": []}, "no items"),
        ({"given": [torch.zeros(4, dtype=torch.int64)]}, "given codes"),
        ({"given": [torch.tensor([0, V, -1])]}, "does not exist"),
        ({"given": [torch.tensor([0, -2, -1])]}, "does not exist"),
        ({"items": [T2SItem(ids(11, 2) + 11, ids(V, 2))]}, "phones"),
        ({"draws": None}, "generator"),
        ({"draws": seeded([1, 2])}, "generators"),
    ],
)
def test_semantic_input_that_does_not_fit(changes, word):
    inputs = {"items": [semantic_item(2, 2)], "lengths": [3], "draws": seeded([0])} | changes
    with pytest.raises(InputError, match=word):
        sample_semantic(T2S_NETWORK, **inputs)


def test_acoustic_input_that_does_not_fit():
    item = acoustic_item(3, 5)
    with pytest.raises(InputError, match="at least one"):
        sample_layers(FULL, [S2AItem(item.semantic[:3], item.prompt)], seeded([0]))
    with pytest.raises(InputError, match="layers"):
        sample_layers(FULL, [S2AItem(item.semantic, item.prompt[:, :1])], seeded([0]))
    with pytest.raises(InputError, match="generators"):
        sample_acoustic(FIRST, FULL, [item], seeded([0, 1]))
    with pytest.raises(InputError, match="given codes"):
        sample_layers(FULL, [item], seeded([0]), given=[ids(A, K + 1, 5)])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": ()}, "steps"),
        ({"cfg": -1.0}, "cfg"),
        ({"rescale": 1.5}, "rescale"),
        ({"filter_threshold": 1.0}, "filter_threshold"),
    ],
)
def test_options_that_make_no_sense(options, word):
    with pytest.raises(ConfigError, match=word):
        StageOptions(**options)


def test_more_items_than_conditions():
    network = predictor(T2S_NETWORK, [semantic_item(4, 3)])
    empty = torch.zeros(2, 10, dtype=torch.int64)
    with pytest.raises(InputError, match="item 1"):
        masked_sample(
            *(network, empty, empty.bool(), torch.tensor([10, 10]), SEMANTIC.config(V), seeded([0, 1])),
            mask_id=V,
        )
