"""Whisper's encoder in streams: step by step equals the masked encoder, whatever the company of a stream."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError
from nar_speech.features import Frontend, FrontendConfig
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.state import export_row, gather, import_row, named_tensors
from nar_speech.layers.whisper import WhisperEncoder, WhisperEncoderConfig
from nar_speech.models.ctc import CtcConfig, CtcModel
from nar_speech.models.ctc_stream import CtcStream
from nar_speech.search.ctc import greedy
from nar_speech.search.ctc_stream import GreedyStream
from tests.streams import drive, same_tensors

SIZES = {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2, "max_positions": 13}
VARIANTS = {
    "branch": {"branch_blocks": 2, "branch_stride": 2},
    "branch_of_three": {"branch_blocks": 1, "branch_stride": 3},
    "trunk": {},
}


def make_encoder(**conf) -> WhisperEncoder:
    torch.manual_seed(0)
    encoder = WhisperEncoder(6, WhisperEncoderConfig(**{**SIZES, **conf})).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.3)
    return encoder


def make_items(lengths, size=6):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(length, size, generator=generator) for length in lengths]


def whole(encoder, item):
    y, lengths = encoder(item[None], torch.tensor([len(item)]))
    assert y.shape[1] == lengths[0]
    return y[0]


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    chunk=st.integers(1, 4),
    left=st.integers(0, 3),
    late=st.booleans(),
    waits=st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
@torch.no_grad()
def test_a_stream_equals_the_masked_encoder(variant, lengths, chunk, left, late, waits):
    encoder = make_encoder(**VARIANTS[variant], chunk_size=chunk, left=left * chunk)
    chunking, items = encoder.chunking(), make_items(lengths)
    got, state = drive(
        encoder.step, encoder.init_state(len(items)), items, chunking.first, chunking.later, waits, late
    )
    for ours, item in zip(got, items, strict=True):
        torch.testing.assert_close(ours, whole(encoder, item), atol=1e-5, rtol=1e-5)
    assert same_tensors(state, encoder.init_state(len(items)))  # every stream has ended


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(0, 60), min_size=2, max_size=4), offset=st.integers(0, 40))
@torch.no_grad()
def test_a_padded_batch_equals_its_singles_at_any_position(lengths, offset):
    encoder, items = make_encoder(branch_blocks=1, branch_stride=2, chunk_size=2, left=4), make_items(lengths)
    batch = torch.full((len(items), max(lengths), 6), 7.0)
    for row, item in enumerate(items):
        batch[row, : len(item)] = item
    offsets = torch.full((len(items),), offset)
    together, counts = encoder(batch, torch.tensor(lengths), offset=offsets)
    assert counts.tolist() == [length // 4 for length in lengths]
    for row, item in enumerate(items):
        alone, _ = encoder(item[None], torch.tensor([len(item)]), offset=offsets[:1])
        torch.testing.assert_close(together[row, : counts[row]], alone[0], atol=1e-5, rtol=1e-5)
        assert not together[row, counts[row] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_much_padding_makes_no_nan(dtype):
    encoder = make_encoder(branch_blocks=1, branch_stride=2, chunk_size=2, left=2).to(dtype)
    x = torch.cat([make_items([200])[0][None], torch.zeros(1, 200, 6)]).to(dtype)
    out, counts = encoder(x, torch.tensor([200, 9]))
    assert out.isfinite().all()
    alone, _ = encoder(x[1:, :9], torch.tensor([9]))
    torch.testing.assert_close(
        out[1, : counts[1]], alone[0], atol=3e-2 if dtype != torch.float32 else 1e-5, rtol=0
    )


@torch.no_grad()
def test_a_frame_sees_its_chunk_and_the_frames_before_it():
    encoder = make_encoder(num_blocks=1, chunk_size=2, left=2)
    item = make_items([40])[0]
    before = whole(encoder, item)
    item[17] += 1.0  # of the convolutions of frames 8 and 9, the latter one in the chunk of frames 8 and 9
    after = whole(encoder, item)
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [8, 9, 10, 11]


@torch.no_grad()
def test_positions_run_in_a_circle_and_begin_anywhere_in_training():
    encoder = make_encoder(chunk_size=2, left=2)
    item, lengths = make_items([24])[0][None], torch.tensor([24])
    start, again = (encoder(item, lengths, offset=torch.tensor([o]))[0] for o in (4, 4 + 13))
    assert torch.equal(start, again)
    assert not torch.allclose(start, encoder(item, lengths)[0])
    encoder.train()
    assert not torch.equal(encoder(item, lengths)[0], encoder(item, lengths)[0])


@torch.no_grad()
def test_a_stream_goes_on_in_another_batch_and_from_a_file():
    encoder = make_encoder(branch_blocks=1, branch_stride=2, chunk_size=2, left=4)
    chunking, items = encoder.chunking(), torch.stack(make_items([40, 40]))
    full = torch.tensor([chunking.first, chunking.first])
    _, _, state = encoder.step(items[:, : chunking.first], full, encoder.init_state(2))
    later = items[:, chunking.first : chunking.first + chunking.later]
    counts = torch.tensor([chunking.later, chunking.later])
    want, _, _ = encoder.step(later, counts, state)

    swapped = gather(state, torch.tensor([1, 0]))
    got, _, _ = encoder.step(later.flip(0), counts, swapped)
    torch.testing.assert_close(got.flip(0), want)

    slots = encoder.init_state(3)
    import_row(slots, 2, export_row(state, 1))
    got, _, _ = encoder.step(later[1:], counts[1:], gather(slots, torch.tensor([2])))
    torch.testing.assert_close(got, want[1:])
    assert {len(tensor) for _, tensor in named_tensors(state)} == {2}


@torch.no_grad()
def test_packed_layers_give_the_same_stream():
    encoder = make_encoder(branch_blocks=1, branch_stride=2, chunk_size=2, left=4)
    items = make_items([61, 30])
    want = [whole(encoder, item) for item in items]
    chunking = encoder.chunking()
    packed = pack_linear_layers(encoder)
    got, _ = drive(packed.step, packed.init_state(2), items, chunking.first, chunking.later)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=10)
@given(lengths=st.lists(st.integers(0, 30000), min_size=1, max_size=3), late=st.booleans())
@torch.no_grad()
def test_audio_in_steps_gives_the_tokens_of_the_whole_recording(lengths, late):
    torch.manual_seed(0)
    conf = {**SIZES, "branch_blocks": 1, "branch_stride": 2, "chunk_size": 4, "left": 8}
    model = CtcModel(CtcConfig(input_size=20, vocab_size=9, encoder="whisper", encoder_conf=conf)).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.4)
    frontend = Frontend(FrontendConfig(kind="log_mel", num_mels=20, peak=1.0))
    stream = CtcStream(model, frontend)
    generator = torch.Generator().manual_seed(len(lengths))
    waves = [0.1 * torch.randn(length, generator=generator) for length in lengths]

    def step(audio, counts, state, final):
        frames, state = stream.step(audio.nan_to_num(0.0), counts, final, state)
        return frames.symbols, frames.counts, state

    got, _ = drive(step, stream.init_state(len(waves)), waves, stream.first, stream.chunk, late=late)
    for wave, symbols in zip(waves, got, strict=True):
        feats, counts = frontend(wave[None], torch.tensor([len(wave)]))
        out = model(feats, counts)
        want = greedy(out.log_probs, out.lengths, 0)[0].tokens
        heard = GreedyStream(0)
        heard.push(torch.zeros(len(symbols)).numpy(), symbols.numpy())
        assert heard.tokens == list(want)


def test_what_can_not_stream_says_so():
    with pytest.raises(ConfigError, match="trained in chunks"):
        make_encoder().chunking()
    with pytest.raises(ConfigError, match=r"one chunk size, 4 frames.*leave both out"):
        make_encoder(chunk_size=4, left=8).chunking(2, None)
    with pytest.raises(ConfigError, match="whole chunks"):
        WhisperEncoderConfig(chunk_size=4, left=6)
    with pytest.raises(ConfigError, match="whole chunks"):
        WhisperEncoderConfig(left=6)
