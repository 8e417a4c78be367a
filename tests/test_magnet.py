"""MAGNeT's network and its predictor: attention in a band, padding, skipped work, lower precision."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.band import band_mask, banded_attention
from nar_speech.layers.dot_product import attention_by_heads
from nar_speech.layers.multistream import position_codes, rotate, rotation_codes, with_null
from nar_speech.layers.quantize import int8_available
from nar_speech.models.magnet import Magnet, MagnetConfig
from nar_speech.models.magnet_predictor import predictor
from nar_speech.sampling.codebooks import CodebookConfig, sample_codebooks

NUMBERS = {
    "num_codebooks": 3,
    "codebook_size": 11,
    "width": 24,
    "heads": 3,
    "num_blocks": 3,
    "hidden_scale": 2,
}
CONFIG = MagnetConfig(**NUMBERS, text_width=7, frame_rate=10.0, segment_seconds=10.0, context=3)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def network(seed=0, **changes):
    torch.manual_seed(seed)
    made = Magnet(MagnetConfig(**{**vars(CONFIG), **changes})).eval()
    for parameter in made.parameters():
        if parameter.ndim == 1:  # norms and the bias: nothing that a wrong use would hide
            torch.nn.init.normal_(parameter, 0.7, 0.4)
    return made


NETWORK = network()
POSITIONS = {"sin": NETWORK, "rope": network(positions="rope"), "sin_rope": network(positions="sin_rope")}


def inputs(batch=3, frames=26, text=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(12, (batch, 3, frames), generator=generator)
    states = torch.randn(batch, text, 7, generator=generator)
    sizes = torch.randint(text + 1, (batch,), generator=generator)
    return tokens, states, torch.arange(text) < sizes[:, None]


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 70), context=st.integers(0, 12), block=st.sampled_from([1, 4, 32]),
    seed=st.integers(0, 9), data=st.data(),
)  # fmt: skip
def test_banded_attention_is_dense_attention_with_a_mask(frames, context, block, seed, data):
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, frames), min_size=2, max_size=2)))
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, frames, 2, 4, generator=generator) for _ in range(3)]
    got = banded_attention(*parts, context, band_mask(frames, context, lengths, block))
    place = torch.arange(frames)
    near = (place[:, None] - place).abs() <= context
    seen = near & (place < lengths[:, None, None])
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None]
    wanted = F.scaled_dot_product_attention(*(p.transpose(1, 2) for p in parts), attn_mask=bias).transpose(
        1, 2
    )
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[row, :length], wanted[row, :length], **CLOSE)
    assert got.isfinite().all()


def test_the_band_needs_no_square_of_the_length():
    frames = 6000
    parts = [torch.randn(1, frames, 1, 2) for _ in range(3)]
    mask = band_mask(frames, 5, torch.tensor([frames]))
    assert mask.numel() < frames * 50
    assert banded_attention(*parts, 5, mask).shape == (1, frames, 1, 2)


def test_position_codes_are_cosines_then_sines():
    codes = position_codes(torch.arange(5), 8)
    for p in range(5):
        for i in range(4):
            phase = torch.tensor(p / 10000 ** (i / 3))
            torch.testing.assert_close(codes[p, i], phase.cos())
            torch.testing.assert_close(codes[p, 4 + i], phase.sin())


def test_rotations_turn_neighbouring_coordinates_as_complex_numbers():
    x = torch.randn(2, 5, 3, 8)
    angles = torch.outer(torch.arange(5.0), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(5, 4), angles)[:, None]
    got = rotate(x, rotation_codes(torch.arange(5), 8))
    torch.testing.assert_close(got, torch.view_as_real(turned).flatten(-2))


def test_rotated_networks_see_distances_and_not_places():
    """Moved to other frames, the same codes give the same logits; with position codes they do not."""
    tokens, _, _ = inputs(1, 20)
    for kind, same in (("rope", True), ("sin", False), ("sin_rope", False)):
        model = POSITIONS[kind]
        with torch.no_grad():
            x = model.embed(tokens, 7)
            attend, rotation = model.attention(1, 20, None, False), model.rotation(7, 20)
            for number, block in enumerate(model.blocks):
                x = block(number, x, attend, None, rotation)
            moved = model.logits(x)
            assert torch.allclose(moved, model(tokens), **CLOSE) == same


def test_rotated_heads_have_an_even_width():
    with pytest.raises(ConfigError, match=r"positions: 'rope' needs heads of an even width, got 24 / 8 = 3"):
        MagnetConfig(**{**NUMBERS, "heads": 8}, positions="rope")


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 26), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    stage=st.integers(-1, 2),
)
def test_a_row_depends_neither_on_its_mates_nor_on_padding(lengths, seed, stage):
    tokens, states, mask = inputs(len(lengths), 26, 5, seed)
    with torch.no_grad():
        batched = NETWORK(tokens, torch.tensor(lengths), states, mask, stage)
        for row, length in enumerate(lengths):
            size = max(1, int(mask[row].sum()))
            item = slice(row, row + 1)
            single = NETWORK(tokens[item, :, :length], None, states[item, :size], mask[item, :size], stage)
            torch.testing.assert_close(batched[item, :, :length], single, **CLOSE)


def test_official_padding_lets_padding_of_the_text_matter():
    tokens, states, _ = inputs(1)
    mask = torch.tensor([[True, True, False, False, False]])
    with torch.no_grad():
        options = {"stage": 0, "only_stage": True}
        short = NETWORK(tokens, None, states[:, :2], mask[:, :2], **options, official_padding=True)
        long = NETWORK(tokens, None, states, mask, **options, official_padding=True)
        ours = NETWORK(tokens, None, states, mask, **options)
    torch.testing.assert_close(ours, short, **CLOSE)
    assert (long - short).abs().max() > 0.01


@pytest.mark.parametrize("stage", [0, 1])
def test_a_row_without_text_skips_nothing_but_zeros(stage):
    tokens, states, _ = inputs(3)
    mask = torch.tensor([[True] * 5, [False] * 5, [True, True, False, False, False]])
    with torch.no_grad():
        skipped = NETWORK(tokens, None, states, mask, stage)
        computed = NETWORK(tokens, None, states, mask, stage, official_padding=True)
        without = NETWORK(tokens, None, None, None, stage)
    torch.testing.assert_close(skipped[1], computed[1], **CLOSE)
    torch.testing.assert_close(skipped[1], without[1], **CLOSE)
    with_gradients = NETWORK(tokens, None, states, mask, stage)
    torch.testing.assert_close(skipped, with_gradients.detach(), **CLOSE)


def test_every_parameter_has_a_gradient_even_when_no_row_has_text():
    tokens, states, mask = inputs()
    made = network()
    made(tokens, None, states, torch.zeros_like(mask), 1).sum().backward()
    missing = [name for name, p in made.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize("only_stage", [False, True])
def test_rows_of_several_stages(only_stage):
    tokens, states, mask = inputs(4)
    lengths, stages = torch.tensor([26, 20, 7, 26]), torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        mixed = NETWORK(tokens, lengths, states, mask, stages, only_stage=only_stage)
        for row, stage in enumerate(stages.tolist()):
            alone = NETWORK(tokens, lengths, states, mask, stage, only_stage=only_stage)
            torch.testing.assert_close(mixed[row], alone[row], **CLOSE)


def test_what_does_not_fit_is_an_error():
    tokens, states, mask = inputs()
    long = torch.zeros(1, 3, 101, dtype=torch.int64)
    with pytest.raises(InputError, match="100 that this model"):
        NETWORK(long)
    assert NETWORK(long, allow_longer=True).shape == (1, 3, 101, 11)
    with pytest.raises(InputError, match="stage"):
        NETWORK(tokens, stage=3)
    with pytest.raises(InputError, match="stage"):
        NETWORK(tokens, stage=-1, only_stage=True)
    with pytest.raises(InputError, match="condition"):
        NETWORK(tokens, None, states[..., :3], mask)
    with pytest.raises(InputError, match="tokens"):
        NETWORK(tokens[:, :2])
    with pytest.raises(InputError, match="no frames"):
        NETWORK(tokens[:, :, :0])
    for wrong in (
        {"heads": 5},
        {"num_blocks": 0},
        {"context": -2},
        {"dropout": 1.0},
        {"segment_seconds": 0.0},
    ):
        with pytest.raises(ConfigError):
            MagnetConfig(**{**vars(CONFIG), **wrong})


def step_info(active, stage=0, guidance=3.0, lengths=None, items=None, changed=None):
    rows, frames = active.shape
    return SimpleNamespace(
        stage=stage,
        active=active,
        changed=torch.ones_like(active) if changed is None else changed,
        guided=guidance != 1.0,
        guidance=torch.full((rows,), guidance),
        lengths=torch.full((rows,), frames) if lengths is None else lengths,
        items=tuple(range(rows)) if items is None else items,
    )


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3), seed=st.integers(0, 99),
    stage=st.integers(0, 2), share=st.sampled_from([0.02, 0.3, 1.0]), together=st.booleans(),
    kind=st.sampled_from(sorted(POSITIONS)),
)  # fmt: skip
def test_the_predictor_gives_what_the_plain_passes_give(lengths, seed, stage, share, together, kind):
    model = POSITIONS[kind]
    generator = torch.Generator().manual_seed(seed)
    tokens, states, mask = inputs(len(lengths), max(lengths), 5, seed)
    lengths = torch.tensor(lengths)
    inside = torch.arange(tokens.shape[2]) < lengths[:, None]
    active = (torch.rand(inside.shape, generator=generator) < share) & inside
    call = predictor(model, states, mask, one_by_one=not together)
    got, null = call(tokens, step_info(active, stage, lengths=lengths))
    with torch.no_grad():
        wanted = model(tokens, lengths, states, mask, stage, only_stage=True)[active]
        bare = model(tokens, lengths, None, None, stage, only_stage=True)[active]
    torch.testing.assert_close(got, wanted, **CLOSE)
    torch.testing.assert_close(null, bare, **CLOSE)


def test_no_unconditional_pass_without_guidance():
    tokens, states, mask = inputs(2)
    active = torch.ones(2, 26, dtype=torch.bool)
    call = predictor(NETWORK, states, mask)
    assert call(tokens, step_info(active, guidance=1.0))[1] is None
    assert call.passes == 2
    info = step_info(active)
    info.guidance = torch.tensor([1.0, 4.0])
    logits, null = call(tokens, info)
    assert call.passes == 2 + 1 + 2
    torch.testing.assert_close(null[:26], logits[:26])  # guided or not: the same
    assert (null[26:] - logits[26:]).abs().max() > 1e-3


def test_another_null_condition_is_computed():
    tokens, states, mask = inputs(2, seed=3)
    negative = torch.randn(1, 3, 7), torch.ones(1, 3, dtype=torch.bool)
    active = torch.ones(2, 26, dtype=torch.bool)
    for alone in (True, False):
        _, null = predictor(NETWORK, states, mask, negative, one_by_one=alone)(tokens, step_info(active))
        with torch.no_grad():
            wanted = NETWORK(tokens, None, *(t.expand(2, *t.shape[1:]) for t in negative), 0, only_stage=True)
        torch.testing.assert_close(null, wanted[active], **CLOSE)
    joined, seen = with_null(states, mask, negative)
    assert joined.shape == (4, 5, 7)
    assert seen.sum(1).tolist()[2:] == [3, 3]


def test_logits_of_all_positions_when_asked_for():
    tokens, states, mask = inputs(2)
    active = torch.zeros(2, 26, dtype=torch.bool)
    active[:, 3] = True
    lengths = torch.tensor([26, 9])
    whole = predictor(NETWORK, states, mask, all_positions=True)
    logits, null = whole(tokens, step_info(active, lengths=lengths))
    few, _ = predictor(NETWORK, states, mask)(tokens, step_info(active, lengths=lengths))
    assert logits.shape == null.shape == (2, 26, 11)
    torch.testing.assert_close(logits[active], few, **CLOSE)


def test_only_what_is_in_sight_is_computed_in_the_later_stages():
    tokens, states, mask = inputs(1, 90)
    active = torch.zeros(1, 90, dtype=torch.bool)
    active[0, 44:46] = True
    seen = []
    made = copy.deepcopy(NETWORK)
    for block in made.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[1].shape[1]))
    got, _ = predictor(made, states, mask)(tokens, step_info(active, stage=2))
    assert seen == [2 + 2 * 9, 2 + 2 * 6, 2 + 2 * 3]
    with torch.no_grad():
        wanted = NETWORK(tokens, None, states, mask, 2, only_stage=True)[active]
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_wrong_calls_of_the_predictor():
    tokens, states, mask = inputs(2)
    active = torch.ones(2, 26, dtype=torch.bool)
    with pytest.raises(InputError, match="condition"):
        predictor(NETWORK, states, mask[:, :3])
    with pytest.raises(InputError, match="texts for 2 items"):
        predictor(NETWORK, states, mask)(tokens, step_info(active, items=(0, 2)))
    with pytest.raises(ConfigError, match="reuse"):
        predictor(NETWORK, states, mask, reuse=2, one_by_one=False)
    with pytest.raises(InputError, match="come first"):
        predictor(NETWORK, states, torch.tensor([[False, True, True, True, True]] * 2))(
            tokens, step_info(active)
        )


def sample(net, states, mask, lengths, seeds, reuse=0, steps=(6, 4, 3)):
    batch, frames = len(states), int(max(lengths))
    call = predictor(net, states, mask, reuse=reuse)
    codes = torch.zeros(batch, 3, frames, dtype=torch.int64)
    fixed = torch.zeros(batch, frames, dtype=torch.bool)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    result = sample_codebooks(
        call, codes, fixed, torch.tensor(lengths), CodebookConfig(steps), generators, mask_id=11
    )
    return result.tokens, call.passes


@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(3, 60), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_a_batch_of_clips_is_its_singles_code_for_code(lengths, seed):
    _, states, mask = inputs(len(lengths), 3, 5, seed)
    net = copy.deepcopy(NETWORK).prepare()
    batched, _ = sample(net, states, mask, lengths, range(len(lengths)))
    for row, length in enumerate(lengths):
        item = slice(row, row + 1)
        size = max(1, int(mask[row].sum()))  # alone its text is not padded either
        single, _ = sample(net, states[item, :size], mask[item, :size], [length], [row])
        assert torch.equal(batched[row, :, :length], single[0])


def test_reuse_is_exact_with_a_full_pass_every_time_and_near_otherwise():
    tokens, states, mask = inputs(1, 40)
    stage, place = 1, torch.arange(40)
    exact, near = (predictor(NETWORK, states, mask, reuse=n) for n in (1, 3))
    plain = predictor(NETWORK, states, mask)
    before, distances = tokens, []
    for step in range(4):
        tokens = tokens.clone()
        tokens[0, stage] = torch.where(place % 4 == step, torch.randint(11, (40,)), torch.tensor(11))
        active = (place % 4 > step)[None]
        if not bool(active.any()):
            break
        info = step_info(active, stage, changed=(tokens != before).any(1) | (step == 0))
        wanted = plain(tokens, info)[0]
        torch.testing.assert_close(exact(tokens, info)[0], wanted, **CLOSE)
        distances.append(float((near(tokens, info)[0] - wanted).abs().max()))
        before = tokens
    assert distances[0] < 1e-4, "the first call is a full pass"
    assert all(d < 5 for d in distances)
    assert max(distances[1:]) > 1e-4, "then it is not exact"


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_partial_pass_in_which_all_is_stale_is_exact(kind):
    tokens, states, mask = inputs(1, 40)
    active = torch.ones(1, 40, dtype=torch.bool)
    call = predictor(POSITIONS[kind], states, mask, reuse=5)
    call(tokens, step_info(active, 1))
    other = torch.randint(12, tokens.shape)
    got = call(other, step_info(active, 1, changed=active))
    wanted = predictor(POSITIONS[kind], states, mask)(other, step_info(active, 1))
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_reuse_computes_fewer_positions_and_still_makes_whole_clips():
    _, states, mask = inputs(1, 3)
    computed = []
    for reuse in (0, 4):
        net, count = copy.deepcopy(NETWORK), []
        net.blocks[0].register_forward_pre_hook(lambda module, args, c=count: c.append(args[1].shape[1]))
        tokens, _ = sample(net, states, mask, [60], [0], reuse, steps=(10, 10, 10))
        assert int(tokens.max()) < 11
        computed.append(sum(count))
    assert computed[1] < computed[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_prepared_networks_give_nearly_the_same(dtype):
    if dtype == "int8" and not int8_available():
        pytest.skip("no int8 kernels")
    tokens, states, mask = inputs(2, 40)
    active = torch.ones(2, 40, dtype=torch.bool)
    wanted = predictor(NETWORK, states, mask)(tokens, step_info(active, 1))
    ready = copy.deepcopy(NETWORK).prepare(dtype)
    got = predictor(ready, states, mask)(tokens, step_info(active, 1))
    worst = {"float32": 2e-5, "bfloat16": 0.03, "int8": 0.1}[dtype]
    scale = float(wanted[0].std())
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).std()) < worst * scale
    assert got[0].dtype == torch.float32


def test_an_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="float32, bfloat16, int8"):
        copy.deepcopy(NETWORK).prepare("float16")


def test_the_start_of_training_is_that_of_the_sheet():
    made = Magnet(MagnetConfig(2, 64, 256, 4, 4))
    block = made.blocks[3]
    for weight, fan_in in ((block.linear1.weight, 256), (block.linear2.weight, 1024)):
        std = fan_in**-0.5 / (2 * 4) ** 0.5
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.05)
        assert float(weight.detach().abs().max()) <= 3 * std + 1e-6
    assert float(made.emb[0].weight.detach().std()) == pytest.approx(256**-0.5, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 5), frames=st.integers(1, 90), masked=st.booleans(),
    coarse=st.booleans(),
)  # fmt: skip
def test_attention_head_by_head_is_plain_attention(batch, heads, frames, masked, coarse):
    parts = [torch.randn(batch, heads, frames, 8) for _ in range(3)]
    mask = None
    if masked:
        lengths = torch.randint(1, frames + 1, (batch,))
        mask = (torch.arange(frames) < lengths[:, None])[:, None, None]
    wanted = F.scaled_dot_product_attention(*parts, attn_mask=mask)
    with torch.no_grad():
        got = attention_by_heads(*parts, mask, coarse=coarse)
        half = attention_by_heads(*(p.bfloat16() for p in parts), mask)
    assert float((got - wanted).abs().max()) < (0.06 if coarse else 1e-5)
    assert half.dtype == torch.bfloat16
    assert float((half - wanted).abs().max()) < 0.06
