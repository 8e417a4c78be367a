"""Whisper's decoder: whole sequences and the cache give the same logits, and padding changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.whisper_decoder import WhisperDecoder, WhisperDecoderConfig

VOCAB, SIZE = 50, 16
CONFIG = WhisperDecoderConfig(VOCAB, size=SIZE, heads=2, linear_units=24, num_blocks=2, max_tokens=40)


def make_decoder(seed: int = 0) -> WhisperDecoder:
    torch.manual_seed(seed)
    decoder = WhisperDecoder(CONFIG).eval()
    with torch.no_grad():  # large enough that a wrong position or mask shows
        decoder.token_embedding.weight.normal_()
        decoder.positional_embedding.normal_()
    return decoder


DECODER = make_decoder()


def make_batch(seed: int, lengths: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn(len(lengths), max(lengths), SIZE, generator=generator)
    ids = torch.randint(VOCAB, (len(lengths), tokens), generator=generator)
    return ids, memory, torch.tensor(lengths)


@given(
    st.integers(0, 1000),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=6),
)
@settings(max_examples=40, deadline=None)
@torch.inference_mode()
def test_steps_of_any_size_give_what_the_whole_gives(seed, lengths, plan):
    """Ragged steps: in each, every utterance feeds its own number of tokens."""
    ids, memory, sizes = make_batch(seed, lengths, 24)
    whole = DECODER(ids, memory, sizes)
    state = DECODER.start(memory, sizes, room=3)
    fed = torch.zeros(len(lengths), dtype=torch.int64)
    for counts in plan:
        count = torch.tensor(counts[: len(lengths)])
        width = max(1, int(count.max()))
        index = (fed[:, None] + torch.arange(width)).clamp(max=23)
        logits, state = DECODER.step(ids.gather(1, index), count, state)
        for b in range(len(lengths)):
            wanted = whole[b, fed[b] : fed[b] + count[b]]
            torch.testing.assert_close(logits[b, : count[b]], wanted, atol=1e-5, rtol=1e-5)
        fed = fed + count
        assert state.lengths.tolist() == fed.tolist()


@given(st.integers(0, 1000), st.lists(st.integers(0, 8), min_size=3, max_size=3))
@settings(max_examples=30, deadline=None)
@torch.inference_mode()
def test_rejected_tokens_leave_no_trace(seed, keep):
    ids, memory, sizes = make_batch(seed, [5, 9, 2], 14)
    whole = DECODER(ids, memory, sizes)
    wrong = (ids + 7) % VOCAB
    kept = torch.tensor(keep)
    mixed = torch.where(torch.arange(14) < kept[:, None], ids, wrong)[:, :8]
    _, state = DECODER.step(mixed, torch.full((3,), 8), DECODER.start(memory, sizes))
    state = state.truncate(kept)
    assert state.lengths.tolist() == keep
    assert state.truncate(torch.full((3,), 30)).lengths.tolist() == keep  # never grows
    count = 14 - kept
    index = (kept[:, None] + torch.arange(int(count.max()))).clamp(max=13)
    logits, _ = DECODER.step(ids.gather(1, index), count, state)
    for b in range(3):
        torch.testing.assert_close(logits[b, : count[b]], whole[b, keep[b] :], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_selected_rows_go_on_alone():
    ids, memory, sizes = make_batch(1, [5, 9, 2], 12)
    whole = DECODER(ids, memory, sizes)
    _, state = DECODER.step(ids[:, :6], torch.full((3,), 6), DECODER.start(memory, sizes))
    rows = torch.tensor([2, 0, 2])
    logits, state = DECODER.step(ids[rows, 6:], torch.full((3,), 6), state.select(rows))
    torch.testing.assert_close(logits, whole[rows, 6:], atol=1e-5, rtol=1e-5)
    assert state.lengths.tolist() == [12, 12, 12]


@torch.inference_mode()
def test_padding_of_audio_and_text_changes_nothing():
    ids, memory, sizes = make_batch(2, [4, 9], 10)
    spoilt = memory.clone()
    spoilt[0, 4:] = 1e3
    whole = DECODER(ids, spoilt, sizes)
    alone = DECODER(ids[:1, :7], memory[:1, :4], sizes[:1])
    torch.testing.assert_close(whole[:1, :7], alone, atol=1e-5, rtol=1e-5)
    ids[0, 7:] = 0
    torch.testing.assert_close(DECODER(ids, spoilt, sizes)[:1, :7], alone, atol=1e-5, rtol=1e-5)


def test_every_parameter_learns_and_the_future_is_hidden():
    decoder = make_decoder(3).train()
    ids, memory, sizes = make_batch(3, [5, 3], 8)
    memory.requires_grad_(True)
    decoder(ids, memory, sizes)[:, :4].square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert decoder.positional_embedding.grad[4:].abs().sum() == 0
    assert memory.grad[1, 3:].abs().sum() == 0


@torch.inference_mode()
def test_too_many_tokens_are_refused():
    ids, memory, sizes = make_batch(4, [5], 41)
    with pytest.raises(InputError, match="max_tokens"):
        DECODER(ids, memory, sizes)
    state = DECODER.start(memory, sizes)
    _, state = DECODER.step(ids[:, :40], torch.tensor([40]), state)
    with pytest.raises(InputError, match="max_tokens"):
        DECODER.step(ids[:, 40:], torch.tensor([1]), state)


def test_impossible_numbers_are_refused():
    with pytest.raises(ConfigError, match="heads"):
        WhisperDecoderConfig(10, size=16, heads=3)
    with pytest.raises(ConfigError, match="vocab_size"):
        WhisperDecoderConfig(0)
    with pytest.raises(ConfigError, match="dropout"):
        WhisperDecoderConfig(10, dropout=1.0)


@torch.inference_mode()
def test_packed_decoder_gives_the_same_logits():
    ids, memory, sizes = make_batch(5, [5, 9, 2], 12)
    whole = DECODER(ids, memory, sizes)
    packed = pack_linear_layers(make_decoder().untie())
    assert not any(type(part) is torch.nn.Linear for part in packed.modules())
    state = packed.start(memory, sizes)
    first, state = packed.step(ids[:, :5], torch.tensor([5, 3, 0]), state)
    torch.testing.assert_close(first[0], whole[0, :5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[1, :3], whole[1, :3], atol=1e-5, rtol=1e-5)
    later, _ = packed.step(torch.stack([ids[0, 5:11], ids[1, 3:9], ids[2, :6]]), torch.full((3,), 6), state)
    for row, begin in enumerate((5, 3, 0)):
        torch.testing.assert_close(later[row], whole[row, begin : begin + 6], atol=1e-5, rtol=1e-5)
