"""WeNet's conformer in streams: step by step equals the masked encoder, whatever the company of a stream."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError
from nar_speech.layers.chunks import Chunking, chunk_mask, position_codes
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.position import interleaved_sinusoid
from nar_speech.layers.quantize import int8_available, quantize_dynamic_int8
from nar_speech.layers.state import export_row, gather, import_row, named_tensors, scatter
from tests.streams import drive, same_tensors
from tests.test_conformer import make_encoder

VARIANTS = {
    "layer_norm": {"causal": True, "cnn_module_norm": "layer_norm", "cnn_module_kernel": 8},
    "cmvn": {"causal": True, "global_cmvn": True},
    "conv2d6": {"input_layer": "conv2d6", "causal": True},
    "conv2d8": {"input_layer": "conv2d8", "causal": True},
    "linear": {"input_layer": "linear", "causal": True, "cnn_module_kernel": 1},
    "absolute": {"pos_enc_layer_type": "abs_pos", "selfattention_layer_type": "selfattn", "causal": True},
    "no_positions": {"pos_enc_layer_type": "no_pos", "causal": True},
    "post_norm": {"normalize_before": False, "macaron_style": False, "causal": True},
    "no_convolution": {"use_cnn_module": False},
}


def make_items(seed, lengths, size=23):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, size, generator=generator) for length in lengths]


def masked(encoder, items, **options):
    """What the offline encoder gives for each item alone."""
    results = []
    for item in items:
        y, lengths = encoder(item[None], torch.tensor([len(item)]), **options)
        results.append(y[0, : lengths[0]])
    return results


def assert_close(got, want, atol=1e-5):
    assert [len(row) for row in got] == [len(row) for row in want]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 130), min_size=1, max_size=4),
    chunk=st.integers(1, 6),
    left=st.integers(0, 3),
    late=st.booleans(),
    data=st.data(),
)
@torch.no_grad()
def test_a_stream_equals_the_masked_encoder(variant, lengths, chunk, left, late, data):
    encoder = make_encoder(**VARIANTS[variant])
    items = make_items(len(lengths), lengths)
    chunking = encoder.chunking(chunk, left * chunk)
    waits = data.draw(st.lists(st.integers(0, 3), min_size=len(items), max_size=len(items)))
    state = encoder.init_state(len(items), chunking=chunking)
    got, state = drive(encoder.step, state, items, chunking.first, chunking.later, waits, late)
    assert_close(got, masked(encoder, items, chunk_size=chunk, left_chunks=left))
    assert same_tensors(state, encoder.init_state(len(items), chunking=chunking))  # ready for new streams


@settings(deadline=None, max_examples=15)
@given(length=st.integers(20, 120), chunk=st.integers(3, 6), left=st.integers(0, 2), cut=st.integers(0, 2))
@torch.no_grad()
def test_a_shorter_first_step_makes_a_shorter_first_chunk(length, chunk, left, cut):
    """Audio that comes in equal chunks gives fewer frames at first: windows and convolutions look ahead."""
    encoder = make_encoder(**VARIANTS["layer_norm"])
    items = make_items(length, [length])
    chunking = encoder.chunking(chunk, left * chunk)
    first = chunking.first - cut * encoder.frame_stride - 1
    state = encoder.init_state(1, chunking=chunking)

    def step(x, lengths, state, final):
        return encoder.step(
            torch.nn.functional.pad(x, (0, 0, 0, chunking.width - x.shape[1])), lengths, state, final
        )

    got, _ = drive(step, state, items, first, chunking.later)
    frames = int(encoder.output_lengths(torch.tensor(first)))
    assert frames < chunk
    assert_close(got, masked(encoder, items, chunk_size=chunk, left_chunks=left, first_chunk=frames))


@torch.no_grad()
def test_an_unlimited_look_back_grows():
    encoder = make_encoder(**VARIANTS["layer_norm"])
    items, chunking = make_items(1, [150, 97]), encoder.chunking(4, -1)
    state = encoder.init_state(2, chunking=chunking)
    assert state.attention[0].shape[1] == 0

    def step(*args):
        return encoder.step(*args, grow=True)

    got, state = drive(step, state, items, chunking.first, chunking.later)
    assert_close(got, masked(encoder, items, chunk_size=4, left_chunks=-1))
    assert state.attention[0].shape[1] >= len(got[0])


@torch.no_grad()
def test_streams_move_between_slots_and_stores():
    """Two streams in slots of a store, stepped in changing company; one moves to another store on the way."""
    encoder = make_encoder(**VARIANTS["cmvn"])
    chunking = encoder.chunking(4, 8)
    items = make_items(5, [200, 200])
    want = masked(encoder, items, chunk_size=4, left_chunks=2)
    stores = [encoder.init_state(n, chunking=chunking) for n in (5, 3)]
    places, got, begin = [(0, 3), (0, 0)], [[], []], 0
    for tick in range(11):
        size = chunking.later if begin else chunking.first
        together = places[0][0] == places[1][0]
        for company in ([[0, 1]] if tick % 2 else [[1, 0]]) if together else [[0], [1]]:
            here = places[company[0]][0]
            slots = torch.tensor([*(places[i][1] for i in company), 2])  # a stranger goes along
            x = torch.full((len(slots), chunking.width, 23), 1e3)
            for row, i in enumerate(company):
                x[row, :size] = items[i][begin : begin + size]
            lengths = torch.tensor([size] * len(slots))
            y, counts, rows = encoder.step(x, lengths, gather(stores[here], slots))
            scatter(stores[here], slots, rows)
            for row, i in enumerate(company):
                got[i].append(y[row, : counts[row]])
        if tick == 5:
            import_row(stores[1], 1, export_row(stores[0], 3))
            places[0] = 1, 1
        begin += size
    for ours, theirs in zip(got, want, strict=True):
        ours = torch.cat(ours)
        torch.testing.assert_close(ours, theirs[: len(ours)], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_shapes_depend_on_shapes_only():
    """On the meta device there are no values to look at."""
    encoder = make_encoder(**VARIANTS["layer_norm"]).to("meta")
    chunking = encoder.chunking(5, 10)
    state = encoder.init_state(3, chunking=chunking)
    x = torch.empty(3, chunking.width, 23, device="meta")
    lengths, final = (torch.empty(3, dtype=d, device="meta") for d in (torch.int64, torch.bool))
    y, counts, after = encoder.step(x, lengths, state, final)
    assert y.shape == (3, 5, 16)
    assert counts.shape == (3,)
    shapes = [{name: t.shape for name, t in named_tensors(s)} for s in (state, after)]
    assert shapes[0] == shapes[1]
    assert all(shape[0] == 3 for shape in shapes[0].values())


@pytest.mark.parametrize("kind", ["packed", "bfloat16", "int8"])
@torch.no_grad()
def test_compressed_layers_take_streams(kind):
    if kind == "int8" and not int8_available():
        pytest.skip("PyTorch has no int8 kernels for this CPU")
    encoder = make_encoder(output_size=32, linear_units=64, **VARIANTS["layer_norm"])
    items, chunking = make_items(2, [90, 61]), encoder.chunking(4, 8)
    want = masked(encoder, items, chunk_size=4, left_chunks=2)
    if kind == "int8":
        encoder = quantize_dynamic_int8(encoder)
    else:
        encoder = pack_linear_layers(encoder.to(torch.float32 if kind == "packed" else torch.bfloat16))
    state = encoder.init_state(2, chunking=chunking)
    assert state.attention[0].dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    got, _ = drive(encoder.step, state, items, chunking.first, chunking.later)
    for ours, theirs in zip(got, want, strict=True):
        error = (ours.float() - theirs).norm() / theirs.norm()
        assert error < {"packed": 1e-5, "bfloat16": 0.05, "int8": 0.05}[kind]


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_can_be_captured():
    encoder = make_encoder(**VARIANTS["layer_norm"]).cuda()
    chunking = encoder.chunking(4, 8)
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


def test_a_centred_convolution_takes_no_stream():
    with pytest.raises(ConfigError, match="causal"):
        make_encoder(causal=False).init_state(1)


def test_chunking_is_explained():
    encoder = make_encoder(static_chunk_size=8, causal=True)
    assert encoder.chunking() == Chunking(first=35, later=32, frames=8, left=32)
    assert make_encoder(causal=True).chunking().frames == 16
    assert encoder.chunking(4, -1).cached == 0
    assert encoder.chunking(4).width == 19
    with pytest.raises(ConfigError, match="chunk_size"):
        encoder.chunking(-3)


def test_a_first_chunk_shifts_the_mask():
    mask = chunk_mask(7, 3, 1, None, first=1)
    seen = [[0], *[[0, 1, 2, 3]] * 3, *[[1, 2, 3, 4, 5, 6]] * 3]
    assert [row.nonzero().flatten().tolist() for row in mask] == seen


@pytest.mark.parametrize("width", [8, 9])
def test_codes_of_any_positions(width):
    want = interleaved_sinusoid(50, width, torch.device("cpu"), offset=7)
    positions = torch.tensor([[7, 9, 56], [8, 8, 20]])
    torch.testing.assert_close(position_codes(positions, width), want[positions - 7])
