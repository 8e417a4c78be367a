"""Streams of codecs: joined, they are the whole, however the input is cut."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.codec import rows, stream
from nar_speech.errors import InputError
from tests.codec_models import BUILDERS, codec, vocos, waves

CUTS = st.lists(st.one_of(st.just(0), st.just(1), st.integers(0, 90)), max_size=12)
FEW = settings(max_examples=12, deadline=None)


def pieces(length, cuts):
    """Borders of pieces of these sizes, then of the rest."""
    begin = 0
    for size in cuts:
        yield begin, min(begin + size, length)
        begin = min(begin + size, length)
    yield begin, length


def encoded(made, sound, cuts, count=None, empty_end=False):
    """Tokens of a stream, and its last state."""
    state, parts = made.init_encoder(len(sound), count), []
    borders = list(pieces(sound.shape[2], cuts))
    for number, (begin, end) in enumerate(borders):
        final = not empty_end and number == len(borders) - 1
        part, state = made.encode_step(sound[:, :, begin:end], state, final)
        parts.append(part)
    if empty_end:
        part, state = made.encode_step(sound[:, :, :0], state, True)
        parts.append(part)
    return torch.cat(parts, 2), state


def decoded(made, tokens, cuts, scales=None, empty_end=False):
    """Sound of a stream."""
    state, parts = made.init_decoder(len(tokens)), []
    if scales is not None:
        state = made.give_scales(state, scales)
    borders = list(pieces(tokens.shape[2], cuts))
    for number, (begin, end) in enumerate(borders):
        final = not empty_end and number == len(borders) - 1
        part, state = made.decode_step(tokens[:, :, begin:end], state, final)
        parts.append(part)
    if empty_end:
        parts.append(made.decode_step(tokens[:, :, :0], state, True)[0])
    return torch.cat(parts, 2)


def assert_same(got, want):
    assert got.shape == want.shape
    if want.numel():
        assert (got - want).abs().max() <= 1e-4 * max(1e-3, float(want.abs().max()))


@pytest.mark.parametrize("name", BUILDERS)
@FEW
@given(length=st.integers(1, 400), cuts=CUTS, empty_end=st.booleans(), batch=st.integers(1, 2))
def test_an_encoder_in_pieces_gives_the_tokens_of_the_whole(name, length, cuts, empty_end, batch):
    made = codec(name)
    sound = waves(made, batch, length, seed=length)
    whole = made.encode(sound)
    tokens, state = encoded(made, sound, cuts, empty_end=empty_end)
    assert torch.equal(tokens, whole.tokens)
    assert whole.tokens.shape[2] == made.frames_of(length)
    if made.has_scales:
        assert_same(state.scales, whole.scales)


@pytest.mark.parametrize("name", BUILDERS)
@FEW
@given(frames=st.integers(1, 60), cuts=CUTS, empty_end=st.booleans(), batch=st.integers(1, 2))
def test_a_decoder_in_pieces_gives_the_sound_of_the_whole(name, frames, cuts, empty_end, batch):
    made = codec(name)
    sound = waves(made, batch, frames * made.hop, seed=frames)
    codes = dataclasses.replace(made.encode(sound), samples=None)
    whole = made.decode(codes)[0]
    assert whole.shape[2] > 0 or frames < 4
    assert_same(decoded(made, codes.tokens, cuts, codes.scales, empty_end), whole)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("left", "right", "stride", "fill"), [(4, 0, 2, True), (2, 2, 1, False), (0, 4, 3, True)]
)
def test_a_convolution_pads_every_row_where_it_ends(mode, left, right, stride, fill):
    torch.manual_seed(0)
    op = stream.Conv(torch.nn.Conv1d(3, 2, 5, stride).requires_grad_(False), left, right, mode, fill)
    x, lengths = torch.randn(5, 3, 9), torch.tensor([9, 1, 2, 4, 8])
    ours, counts = op.rows(x, lengths)
    want, wanted = stream.Op.rows(op, x, lengths)
    assert torch.equal(counts, wanted)
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(ours[row, :, :count], want[row, :, :count])


@pytest.mark.parametrize("name", BUILDERS)
def test_every_sample_alone(name):
    made = codec(name)
    sound = waves(made, 1, 150)
    codes = dataclasses.replace(made.encode(sound), samples=None)
    assert torch.equal(encoded(made, sound, [1] * 150)[0], codes.tokens)
    got = decoded(made, codes.tokens, [1] * codes.tokens.shape[2], codes.scales)
    assert_same(got, made.decode(codes)[0])


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_gives_nothing(name):
    made = codec(name)
    tokens, _ = encoded(made, waves(made, 2, 1)[:, :, :0], [])
    assert tokens.shape == (2, made.num_codebooks, 0)
    assert decoded(made, tokens, []).shape == (2, made.channels, 0)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_delay_is_what_it_says(name):
    made = codec(name)
    if not made.can_stream or made.has_scales:
        return  # a loudness of the whole, or chunks: nothing comes out before
    total = 16 * made.hop + made.delay
    sound = waves(made, 1, total)
    encoder, decoder = made.init_encoder(1), made.init_decoder(1)
    heard = given_back = 0
    late = []
    for begin in range(total):
        tokens, encoder = made.encode_step(sound[:, :, begin : begin + 1], encoder)
        wave, decoder = made.decode_step(tokens, decoder)
        heard, given_back = heard + 1, given_back + wave.shape[2]
        if tokens.shape[2] and heard > total // 4:
            late.append(heard - given_back)
    # Of a frame that has just come out no sample is more than the delay behind, and some are that much.
    assert max(late) <= made.delay
    assert max(late) > made.delay - made.hop


@pytest.mark.parametrize("name", ["encodec causal constant", "dac", "mimi", "encodec chunks"])
def test_long_rows_go_in_blocks(name, monkeypatch):
    made = codec(name)
    sound = waves(made, 2, 900)
    whole = made.encode(sound)
    monkeypatch.setattr(rows, "LONGEST_SECONDS", 0.05)
    monkeypatch.setattr(rows, "BLOCK_SECONDS", 0.03)
    blocks = made.encode(sound)
    assert torch.equal(blocks.tokens, whole.tokens)
    got = made.decode(blocks)[0]
    monkeypatch.undo()
    assert_same(got, made.decode(whole)[0])


def test_a_model_in_chunks_asks_for_its_scales():
    made = codec("encodec chunks")
    codes = made.encode(waves(made, 1, 500))
    with pytest.raises(InputError, match="scales of the next chunk"):
        made.decode_step(codes.tokens, made.init_decoder(1), True)
    with pytest.raises(InputError, match="lack the loudness"):
        made.decode(dataclasses.replace(codes, scales=None))
    with pytest.raises(InputError, match="does not normalise"):
        codec("mimi").give_scales(codec("mimi").init_decoder(1), torch.ones(1, 1))


def test_scales_may_come_with_their_chunks():
    made = codec("encodec chunks")
    codes = dataclasses.replace(made.encode(waves(made, 2, 700)), samples=None)
    state, parts = made.init_decoder(2), []
    for chunk in range(codes.scales.shape[1]):
        state = made.give_scales(state, codes.scales[:, chunk : chunk + 1])
        piece = codes.tokens[:, :, chunk * made.chunk_frames : (chunk + 1) * made.chunk_frames]
        part, state = made.decode_step(piece, state, chunk == codes.scales.shape[1] - 1)
        parts.append(part)
    assert_same(torch.cat(parts, 2), made.decode(codes)[0])


def test_mimis_state_does_not_grow():
    made = codec("mimi")
    state = made.init_decoder(1)
    tokens = torch.zeros(1, made.num_codebooks, 1, dtype=torch.int64)
    sizes = []
    for _ in range(30):
        _, state = made.decode_step(tokens, state)
        sizes.append(state.layers.parts[1].keys.shape[3])
    assert sizes[-1] == made.config.sliding_window - 1 == max(sizes)


VOCODERS = [("istft", "same"), ("istft", "center"), ("symexp", "same"), ("cos", "center")]


@pytest.mark.parametrize(("kind", "padding"), VOCODERS)
@pytest.mark.parametrize("bandwidths", [None, 3])
@FEW
@given(frames=st.integers(2, 40), cuts=CUTS, batch=st.integers(1, 2))
def test_a_vocoder_in_pieces_gives_the_sound_of_the_whole(kind, padding, bandwidths, frames, cuts, batch):
    made = vocos(kind, padding, bandwidths)
    features = torch.randn(batch, 5, frames, generator=torch.Generator().manual_seed(frames))
    under = None if bandwidths is None else torch.arange(batch) + 1
    whole = made(features, bandwidth=under)[0]
    state, parts = made.init_state(batch, under), []
    for begin, end in pieces(frames, cuts):
        part, state = made.step(features[:, :, begin:end], state)
        parts.append(part)
    parts.append(made.step(features[:, :, :0], state, True)[0])
    assert_same(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(("kind", "padding"), VOCODERS)
def test_the_delay_of_a_vocoder(kind, padding):
    made = vocos(kind, padding)
    state, given_back, late = made.init_state(1), 0, []
    for frame in range(40):
        part, state = made.step(torch.randn(1, 5, 1), state)
        given_back += part.shape[1]
        late.append((frame + 1) * made.hop - given_back)
    assert late[-1] == made.delay
