"""Our Silero network against the package's, window by window and in chunks of any size."""

import copy
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.audio import read_audio
from nar_speech.errors import CheckpointError
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.silero import WINDOW, SileroVad
from nar_speech.layers.state import gather, scatter, select

SAMPLE = Path(__file__).parent.parent / "nar_speech" / "assets" / "sample.flac"


@pytest.fixture(scope="module")
def vad() -> SileroVad:
    return SileroVad.from_package()


@pytest.fixture(scope="module")
def official_tensors() -> dict[str, torch.Tensor]:
    path = Path(importlib.util.find_spec("silero_vad").origin).parent / "data" / "silero_vad.jit"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path, map_location="cpu").state_dict()


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    return torch.from_numpy(read_audio(SAMPLE, 16000).samples)


@pytest.fixture(scope="module")
def official(speech) -> torch.Tensor:
    """The package's probabilities of the whole windows of the sample."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", DeprecationWarning)
        from silero_vad import load_silero_vad

        model = load_silero_vad()
        windows = speech[: len(speech) // WINDOW * WINDOW].view(-1, 1, WINDOW)
        result = torch.cat([model(window, 16000)[0] for window in windows])
    torch.set_num_threads(threads)
    return result


def chunked(vad, audio, pieces):
    """Probabilities of one stream fed in pieces of the given sizes, in a batch of one."""
    state, found, place = vad.init_stream(1), [], 0
    for size in pieces:
        chunk = audio[place : place + size]
        place += size
        out, counts, state = vad.step_stream(chunk[None], torch.tensor([len(chunk)]), state)
        found.append(out[0, : int(counts)])
    return torch.cat(found), state


@torch.inference_mode()
def test_equals_the_package_window_by_window(vad, speech, official):
    state, found = vad.init_state(1), []
    for window in speech[: len(official) * WINDOW].view(-1, 1, WINDOW):
        probability, state = vad.step(window, state)
        found.append(probability)
    assert official.max() > 0.9 > 0.1 > official.min()  # speech and silence
    torch.testing.assert_close(torch.cat(found), official, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("size", [160, 511, 512, 1000, 9600])
def test_equals_the_package_in_chunks(vad, speech, official, size):
    pieces = [size] * (min(len(speech), max(40_000, 10 * size)) // size)
    found, _ = chunked(vad, speech, pieces)
    assert len(found) == sum(pieces) // WINDOW
    torch.testing.assert_close(found, official[: len(found)], atol=1e-5, rtol=0)


@torch.inference_mode()
@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 1300), min_size=1, max_size=8), st.integers(0, 100_000))
def test_any_chunks_give_the_same(vad, speech, pieces, start):
    audio = speech[start : start + sum(pieces)]
    found, state = chunked(vad, audio, pieces)
    whole, _ = chunked(vad, audio, [sum(pieces)])
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
    left = sum(pieces) % WINDOW
    assert int(state.waiting) == left
    assert torch.equal(state.samples[0, :left], audio[len(audio) - left :])
    assert not state.samples[0, left:].any()


@torch.inference_mode()
def test_rows_are_streams_of_their_own(vad, speech):
    """Rows at other places, of other lengths, coming and going: each as if it were alone."""
    size, rounds, starts = 700, 12, (0, 20_000, 50_000, 81_234)
    store = vad.init_stream(6)
    slots, found = torch.tensor([5, 0, 3, 2]), [[] for _ in starts]
    generator = torch.Generator().manual_seed(0)
    places = list(starts)
    fed = [[] for _ in starts]
    for _ in range(rounds):
        lengths = torch.randint(0, size + 1, (4,), generator=generator)
        audio = torch.zeros(4, size)
        for row, count in enumerate(lengths.tolist()):
            audio[row, :count] = speech[places[row] : places[row] + count]
            places[row] += count
            fed[row].append(count)
        out, counts, new = vad.step_stream(audio, lengths, gather(store, slots))
        scatter(store, slots, new)
        for row in range(4):
            found[row].append(out[row, : int(counts[row])])
            assert not out[row, int(counts[row]) :].any()
    for row, start in enumerate(starts):
        alone, _ = chunked(vad, speech[start:], fed[row])
        torch.testing.assert_close(torch.cat(found[row]), alone, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_reset_row_begins_anew(vad, speech):
    audio = speech[30_000:34_000].expand(2, -1)
    lengths = torch.tensor([4000, 4000])
    first, _, state = vad.step_stream(audio, lengths, vad.init_stream(2))
    state = select(torch.tensor([True, False]), vad.init_stream(2), state)
    again, _, _ = vad.step_stream(audio, lengths, state)
    torch.testing.assert_close(again[0], first[0])
    assert not torch.allclose(again[1], first[1], atol=1e-3)


@torch.inference_mode()
def test_packed_for_the_cpu_it_is_the_same_in_any_batch(vad, speech):
    """To the last bit, wherever a stream stands in a batch of any size."""
    packed = pack_linear_layers(copy.deepcopy(vad))
    audio = speech[30_000 : 30_000 + 3 * 1600].view(3, 1, 1600)
    outcomes = []
    for size in (1, 2, 3, 5, 8, 16):
        state, found = packed.init_stream(size), []
        for chunk in audio:
            lengths = torch.full((size,), 1600)
            probabilities, _, state = packed.step_stream(chunk.repeat(size, 1), lengths, state)
            assert torch.equal(probabilities, probabilities[:1].expand_as(probabilities))
            found.append(probabilities[0])
        outcomes.append(torch.cat(found))
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
    plain, _ = chunked(vad, audio.flatten(), [4800])
    valid = torch.cat([outcomes[0][:3], outcomes[0][4:7], outcomes[0][8:11]])[: len(plain)]
    torch.testing.assert_close(valid, plain, atol=1e-5, rtol=0)


def test_other_weights_are_refused(official_tensors):
    for name, message in (("decoder.rnn.weight_ih", "input"), ("decoder.decoder.2.bias", "head")):
        wrong = {n: t[:-1] if n.endswith(name) else t for n, t in official_tensors.items()}
        with pytest.raises(CheckpointError, match=rf"somewhere.*don't fit.*{message}"):
            SileroVad.from_state_dict(wrong, "somewhere")
    missing = {n: t for n, t in official_tensors.items() if "encoder.2" not in n}
    with pytest.raises(CheckpointError, match=r"convs\.2"):
        SileroVad.from_state_dict(missing, "somewhere")


def test_reading_it_leaves_the_threads_alone():
    before = torch.get_num_threads()
    SileroVad.from_package()
    assert torch.get_num_threads() == before
