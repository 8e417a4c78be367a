"""NeMo's FastConformer: padding, contexts, streams, position tables. Numbers: recorded cases."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nar_speech.errors import ConfigError
from nar_speech.layers.chunks import Chunking, position_codes
from nar_speech.layers.fastconformer import FastConformerConfig, FastConformerEncoder
from nar_speech.layers.packed import PackedLinear, pack_linear_layers
from nar_speech.layers.quantize import int8_available, quantize_dynamic_int8
from nar_speech.layers.relative import RelativeAttention, distance_codes, relative_shift
from nar_speech.layers.state import export_row, gather, import_row, named_tensors, scatter
from nar_speech.layers.strided import StridedSubsampling
from tests.streams import drive, same_tensors
from tests.test_conformer_stream import assert_close, make_items, masked

SMALL = {"n_layers": 2, "d_model": 16, "n_heads": 2, "ff_expansion_factor": 2, "subsampling_conv_channels": 8}
CAUSAL = {"causal_downsampling": True, "conv_context_size": "causal", "conv_kernel_size": 5}
CHUNKED = {**CAUSAL, "conv_norm_type": "layer_norm", "att_context_style": "chunked_limited"}


def make_encoder(input_size=23, **conf):
    """A small encoder in eval mode, norms and statistics not trivial."""
    torch.manual_seed(0)
    encoder = FastConformerEncoder(input_size, FastConformerConfig(**{**SMALL, **conf}))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        for name, buffer in encoder.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer))
    return encoder.eval()


VARIANTS = {
    "streaming": CHUNKED,
    "streaming_factor4": {**CHUNKED, "subsampling_factor": 4, "att_context_size": ((4, 1), (3, 0))},
    "offline": {"conv_kernel_size": 9},
    "striding": {"subsampling": "striding", "subsampling_factor": 4, "subsampling_conv_channels": -1},
    "tied": {"untie_biases": False, "xscaling": False, "use_bias": False},
    "band": {"att_context_size": ((3, 2),)},
    "left_only": {"att_context_style": "chunked_limited", "att_context_size": ((3, -1),)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_batch_equals_single_and_padding_does_not_matter(variant):
    encoder = make_encoder(**VARIANTS[variant])
    lengths = torch.tensor([91, 50, 1, 0, 17])
    items = make_items(3, lengths.tolist())
    noisy = 100 * torch.randn(5, 91, 23)
    for row, item in enumerate(items):
        noisy[row, : len(item)] = item
    together, counts = encoder(noisy, lengths)
    assert torch.equal(counts, encoder.output_lengths(lengths))
    assert counts[3] == 0
    for row, want in enumerate(masked(encoder, items)):
        torch.testing.assert_close(together[row, : counts[row]], want, atol=1e-5, rtol=1e-5)
        assert (together[row, counts[row] :] == 0).all()


@pytest.mark.parametrize(
    ("factor", "causal", "frames", "want"),
    [(8, True, 8, 2), (8, True, 9, 2), (8, True, 10, 3), (8, False, 9, 2), (4, True, 1, 1), (2, False, 5, 3)],
)
def test_output_lengths_are_those_of_the_convolutions(factor, causal, frames, want):
    layer = StridedSubsampling(11, 6, 4, factor, causal=causal)
    y, lengths = layer(torch.randn(1, frames, 11), torch.tensor([frames]))
    assert y.shape == (1, want, 6)
    assert lengths.item() == want


@torch.no_grad()
def test_relative_attention_by_its_definition():
    """Every pair of frames by itself, with the code of its distance."""
    torch.manual_seed(1)
    attention, x = RelativeAttention(2, 8), torch.randn(1, 5, 8)
    for bias in (attention.pos_bias_u, attention.pos_bias_v):
        bias.normal_()
    mask = torch.rand(1, 5, 5) < 0.7
    mask |= torch.eye(5, dtype=torch.bool)
    got = attention(x, mask, distance_codes(5, 5, x))[0]
    query, key, value = (
        linear(x[0]).view(5, 2, 4) for linear in (attention.linear_q, attention.linear_k, attention.linear_v)
    )
    rows = []
    for i in range(5):
        heads = []
        for h in range(2):
            scores = []
            for j in range(5):
                code = attention.linear_pos(position_codes(torch.tensor(i - j), 8)).view(2, 4)[h]
                u, v = attention.pos_bias_u[h], attention.pos_bias_v[h]
                score = (query[i, h] + u) @ key[j, h] + (query[i, h] + v) @ code
                scores.append(score / 2 if mask[0, i, j] else torch.tensor(-math.inf))
            heads.append(torch.stack(scores).softmax(0) @ value[:, h])
        rows.append(torch.cat(heads))
    torch.testing.assert_close(got, attention.linear_out(torch.stack(rows)), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 6), st.integers(0, 6))
@settings(deadline=None, max_examples=25)
def test_shift_by_its_definition(queries, more):
    keys = queries + more
    scores = torch.randn(2, 3, queries, queries + keys - 1)
    got = relative_shift(scores, keys)
    for i in range(queries):
        torch.testing.assert_close(got[:, :, i], scores[:, :, i, queries - 1 - i : queries - 1 - i + keys])


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    right=st.integers(0, 3),
    chunks_back=st.integers(0, 3),
    factor=st.sampled_from([2, 4, 8]),
    norm=st.sampled_from(["layer_norm", "batch_norm"]),
    late=st.booleans(),
    data=st.data(),
)
@torch.no_grad()
def test_a_stream_equals_the_masked_encoder(lengths, right, chunks_back, factor, norm, late, data):
    context = chunks_back * (right + 1), right
    encoder = make_encoder(**{**CHUNKED, "conv_norm_type": norm}, subsampling_factor=factor)
    items = make_items(len(lengths), lengths)
    chunks = data.draw(st.integers(1, 3))
    chunking = encoder.chunking(right + 1, context[0], chunks)
    waits = data.draw(st.lists(st.integers(0, 3), min_size=len(items), max_size=len(items)))
    state = encoder.init_state(len(items), chunking=chunking)

    def step(x, lengths, state, final):
        return encoder.step(x, lengths, state, final, chunk_size=right + 1)

    got, state = drive(step, state, items, chunking.first, chunking.later, waits, late)
    assert_close(got, masked(encoder, items, context=context))
    assert same_tensors(state, encoder.init_state(len(items), chunking=chunking))  # ready for new streams


@torch.no_grad()
def test_the_official_start_leaks_and_ours_does_not():
    """With one frame in the first step NeMo's second one takes what is missing for frames of zeros."""
    encoder = make_encoder(**CHUNKED)
    items, chunking = make_items(4, [70]), encoder.chunking(1, 6)
    want = masked(encoder, items, context=(6, 0))[0]
    outputs = []
    for official in (False, True):

        def step(*args, official=official):
            return encoder.step(*args, official_start=official)

        got, _ = drive(step, encoder.init_state(1, chunking=chunking), items, chunking.first, chunking.later)
        outputs.append(got[0])
    torch.testing.assert_close(outputs[0], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[1][0], want[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[1][1], want[1], atol=1e-2)


@pytest.mark.parametrize("style", ["regular", "chunked_limited"])
@torch.no_grad()
def test_an_unlimited_look_back_grows(style):
    encoder = make_encoder(**{**CHUNKED, "att_context_style": style, "att_context_size": ((-1, 0),)})
    items, chunking = make_items(1, [150, 97]), encoder.chunking()
    assert chunking == Chunking(first=1, later=8, frames=1, left=-1)

    def step(*args):
        return encoder.step(*args, grow=True)

    state = encoder.init_state(2, chunking=chunking)
    got, state = drive(step, state, items, chunking.first, chunking.later)
    assert_close(got, masked(encoder, items))
    assert state.attention[0].shape[1] >= len(got[0])


@torch.no_grad()
def test_streams_move_between_slots_and_stores():
    encoder = make_encoder(**CHUNKED)
    chunking = encoder.chunking(2, 4)
    items = make_items(5, [1 + 16 * 9, 1 + 16 * 9])
    want = masked(encoder, items, context=(4, 1))
    stores = [encoder.init_state(n, chunking=chunking) for n in (4, 2)]
    where, got, begin = [(0, 3), (0, 1)], [[], []], 0
    for tick in range(9):
        size = chunking.later if begin else chunking.first
        for i in (tick % 2, 1 - tick % 2):
            store, slot = where[i]
            slots = torch.tensor([slot, 0])  # a stranger goes along
            x = torch.full((2, chunking.width, 23), 1e3)
            x[0, :size] = items[i][begin : begin + size]
            y, counts, rows = encoder.step(x, torch.tensor([size, size]), gather(stores[store], slots))
            scatter(stores[store], slots, rows)
            got[i].append(y[0, : counts[0]])
        if tick == 4:
            import_row(stores[1], 1, export_row(stores[0], 3))
            where[0] = 1, 1
        begin += size
    for ours, theirs in zip(got, want, strict=True):
        ours = torch.cat(ours)
        assert len(ours) == 18
        torch.testing.assert_close(ours, theirs[:18], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_shapes_depend_on_shapes_only():
    """On the meta device there are no values to look at."""
    encoder = make_encoder(**CHUNKED).to("meta")
    chunking = encoder.chunking(3, 6, chunks=2)
    state = encoder.init_state(3, chunking=chunking)
    x = torch.empty(3, chunking.width, 23, device="meta")
    lengths, final = (torch.empty(3, dtype=d, device="meta") for d in (torch.int64, torch.bool))
    y, counts, after = encoder.step(x, lengths, state, final, chunk_size=3, official_start=True)
    assert y.shape == (3, 6, 16)
    assert counts.shape == (3,)
    shapes = [{name: t.shape for name, t in named_tensors(s)} for s in (state, after)]
    assert shapes[0] == shapes[1]
    assert all(shape[0] == 3 for shape in shapes[0].values())


@pytest.mark.parametrize("kind", ["packed", "bfloat16", "int8"])
@torch.no_grad()
def test_compressed_layers_work_offline_and_in_streams(kind):
    if kind == "int8" and not int8_available():
        pytest.skip("PyTorch has no int8 kernels for this CPU")
    encoder = make_encoder(d_model=32, **CHUNKED)
    items, chunking = make_items(2, [90, 61]), encoder.chunking(2, 4)
    want = masked(encoder, items, context=(4, 1))
    if kind == "int8":
        encoder = quantize_dynamic_int8(encoder)
    else:
        encoder = pack_linear_layers(encoder.to(torch.float32 if kind == "packed" else torch.bfloat16))
        assert isinstance(encoder.layers[0].conv.pointwise_conv1, PackedLinear)
        assert isinstance(encoder.layers[0].self_attn.merged, PackedLinear)
        assert pack_linear_layers(encoder) is encoder  # once more does no harm
    state = encoder.init_state(2, chunking=chunking)
    assert state.attention[0].dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    got, _ = drive(encoder.step, state, items, chunking.first, chunking.later)
    offline = masked(encoder, [item.to(state.frames.dtype) for item in items], context=(4, 1))
    for ours, whole, theirs in zip(got, offline, want, strict=True):
        for result in (ours, whole):
            error = (result.float() - theirs).norm() / theirs.norm()
            assert error < {"packed": 1e-5, "bfloat16": 0.08, "int8": 0.08}[kind]


@torch.no_grad()
def test_tables_of_positions_follow_the_weights():
    attention, x = RelativeAttention(2, 8).eval(), torch.randn(1, 3, 8)
    cache, count = torch.zeros(1, 4, 16), torch.tensor([3])
    mask = torch.ones(1, 1, 7, dtype=torch.bool)

    def step(layer):
        return layer.step(x, cache, count, mask)[0]

    before = step(attention)
    assert torch.equal(step(attention), before)
    assert len(attention._tables) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(attention)
    assert torch.equal(step(attention), before)
    other = RelativeAttention(2, 8).eval()
    weights = copy.deepcopy(other.state_dict())
    attention.load_state_dict(weights)
    torch.testing.assert_close(step(attention), step(other))
    attention.linear_pos = nn.Linear(8, 8, bias=False)
    other.train().linear_pos.weight.copy_(attention.linear_pos.weight)
    torch.testing.assert_close(step(attention), step(other.eval()))
    assert step(attention.double().float()).dtype == torch.float32
    for size in range(1, 9):  # few shapes are remembered
        wider = torch.ones(1, 1, 4 + size, dtype=torch.bool)
        attention.step(x[:, :1].expand(1, size, 8), cache, torch.tensor([1]), wider)
    assert len(attention._tables) <= 4


def test_training_draws_contexts_and_reaches_every_weight():
    contexts = (6, 2), (3, 0)
    encoder = make_encoder(**CHUNKED, att_context_size=contexts, att_context_probs=(0.5, 0.5), dropout=0.0)
    torch.manual_seed(0)
    assert {encoder.train()._draw() for _ in range(20)} == set(contexts)
    assert encoder.eval()._draw() == contexts[0]
    encoder.train()
    y, _ = encoder(torch.randn(2, 60, 23), torch.tensor([60, 41]))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_dropout_of_position_codes_is_for_training():
    encoder = make_encoder(dropout=0.0, dropout_pre_encoder=0.0, dropout_att=0.0, dropout_emb=0.5)
    x, lengths = torch.randn(1, 60, 23), torch.tensor([60])
    with torch.no_grad():
        assert torch.equal(encoder(x, lengths)[0], encoder(x, lengths)[0])
        encoder.train()
        assert not torch.allclose(encoder(x, lengths)[0], encoder(x, lengths)[0])


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_can_be_captured():
    encoder = make_encoder(**CHUNKED).cuda()
    chunking = encoder.chunking(2, 4)
    x = torch.randn(3, chunking.width, 23, device="cuda")
    lengths = torch.tensor([chunking.first, chunking.later, 7], device="cuda")
    final = torch.tensor([False, False, True], device="cuda")
    state = encoder.init_state(3, chunking=chunking)
    want = encoder.step(x, lengths, state, final)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            encoder.step(x, lengths, state, final)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, counts, after = encoder.step(x, lengths, state, final)
    graph.replay()
    torch.testing.assert_close(y, want[0])
    assert torch.equal(counts, want[1])
    for (name, ours), (_, theirs) in zip(named_tensors(after), named_tensors(want[2]), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"d_model": 15}, "does not divide"),
        ({"conv_kernel_size": 4}, "conv_kernel_size: 4 is even"),
        ({"subsampling_factor": 6}, "power of 2"),
        ({"subsampling_conv_channels": 0}, "subsampling_conv_channels"),
        ({"att_context_size": ()}, "att_context_size"),
        ({"att_context_size": ((-2, 0),)}, "-1 means all"),
        ({"att_context_style": "chunked_limited", "att_context_size": ((5, 1),)}, "multiple of 2"),
        ({"att_context_probs": (0.5, 0.5)}, "att_context_probs"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(conf, message):
    with pytest.raises(ConfigError, match=message):
        make_encoder(**conf)


def test_chunking_is_explained_or_refused():
    contexts = (70, 13), (70, 6), (70, 1), (70, 0)
    encoder = make_encoder(**CHUNKED, att_context_size=contexts)
    assert encoder.chunking() == Chunking(first=105, later=112, frames=14, left=70)
    assert encoder.chunking(1) == Chunking(first=1, later=8, frames=1, left=70)
    assert encoder.chunking(2, 8, chunks=3) == Chunking(first=41, later=48, frames=6, left=8)
    for wrong, message in (
        ((0,), "chunk_size"),
        ((3, 4), "left: got 4; must be a multiple of the chunk size, 3"),
        ((1, 4, 0), "chunks: 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            encoder.chunking(*wrong)
    with pytest.raises(ConfigError, match="causal_downsampling"):
        make_encoder().init_state(1)
    with pytest.raises(ConfigError, match="regular"):
        make_encoder(**CAUSAL, att_context_size=((4, 2),)).chunking()
    with torch.no_grad(), pytest.raises(ConfigError, match="multiple of 2"):
        encoder(torch.randn(1, 40, 23), torch.tensor([40]), context=(3, 1))
