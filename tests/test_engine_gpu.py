"""The engine on a CUDA device: graphs, read-back, company. Run with ``-m gpu``."""

import numpy as np
import pytest
import torch

from benchmarks.toy_models import NAN_LEVEL, ToyBatch, ToyStream
from nar_speech.engine import Closed, Engine, EngineOptions, Failed, SessionOptions
from nar_speech.engine.graphs import SOUND, Stepper
from nar_speech.engine.slots import PRISTINE, SlotStore
from nar_speech.engine.speech import WithVad
from nar_speech.errors import ConfigError
from nar_speech.layers.silero import SileroVad
from nar_speech.layers.state import named_tensors
from tests.engine_reference import finals, noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(model, audios, cut=700, **options):
    """Events of one stream for each of the audios, heard together."""
    results = [[] for _ in audios]
    with Engine({"toy": model}, EngineOptions(max_sessions=64, **options)) as engine:
        sessions = [engine.open("toy", SessionOptions({"shift": 1}), r.append) for r in results]
        for place in range(0, max(map(len, audios)), cut):
            for session, audio in zip(sessions, audios, strict=True):
                piece = audio[place : place + cut]
                if len(piece) and session.closed is None:
                    session.feed(piece, timeout=30.0)
        for session in sessions:
            session.finish()
        assert engine.drain(60.0)
        return results, engine.stats().online["toy"], engine._core.lanes["toy"].sizes


def test_graphs_give_what_eager_steps_give():
    audios = [noise(i, 1500 + 77 * i) for i in range(20)]
    eager, eager_stats, _ = run(ToyStream(device="cuda"), audios, graphs="off", buckets=(32,))
    captured, stats, _ = run(ToyStream(device="cuda"), audios, graphs="on", buckets=(32,))
    assert captured == eager
    assert eager_stats.graph_replays == stats.eager_steps == 0
    assert stats.graph_replays == stats.steps > 0


def test_a_captured_step_reads_and_writes_the_slots_it_is_told():
    model = ToyStream(device="cuda")
    with torch.inference_mode():
        store = SlotStore(model, 16)
        stepper = Stepper(model, store, "on")
        stepper.warm_up((4,))
        slots = [store.acquire() for _ in range(6)]
        for turn in ([0, 3, 5], [5, 1], [3, 0, 1, 5]):
            before = store.gather(*[torch.arange(18, device="cuda")] * 2)
            staging = stepper.staging(4)
            for row, number in enumerate(turn):
                staging.fill(row, noise(number, 320), False, slots[number].row, False, False)
            pending = stepper.launch(staging)
            assert not pending.immediate
            out = pending.wait()
            assert out[SOUND].all()
            rows = torch.tensor([slots[n].row for n in turn], device="cuda")
            audio = torch.from_numpy(np.stack([noise(n, 320) for n in turn])).cuda()
            lengths = torch.full((len(turn),), 320, device="cuda")
            wanted, state = model.step(audio, lengths, lengths < 0, store_rows(before, rows))
            assert np.array_equal(out["letters"][: len(turn)], wanted.letters.cpu().numpy())
            for (name, tensor), (_, new) in zip(
                named_tensors(store.state), named_tensors(state), strict=True
            ):
                torch.testing.assert_close(tensor[rows], new, atol=1e-4, rtol=1e-4, msg=name)
            for tensor in (t for _, t in named_tensors(store.state)):
                assert not tensor[PRISTINE].any()


def store_rows(state, rows):
    from nar_speech.layers.state import gather

    return gather(state, rows)


def test_company_changes_nothing_in_exact_batches():
    audios = [noise(i, 3000) for i in range(33)]
    together, _, sizes = run(ToyStream(device="cuda"), audios, exact_batches=True)
    for i in (0, 7, 32):
        alone, _, same = run(ToyStream(device="cuda"), audios[i : i + 1], exact_batches=True)
        assert same == sizes
        assert alone[0] == together[i]


def test_company_hardly_matters_in_any_batches():
    audios = [noise(i, 3000) for i in range(33)]
    together, _, _ = run(ToyStream(device="cuda"), audios)
    for i in (0, 7, 32):
        alone, _, _ = run(ToyStream(device="cuda"), audios[i : i + 1])
        pairs = list(zip(finals(alone[0])[0], finals(together[i])[0], strict=True))
        assert sum(a != b for a, b in pairs) <= 0.02 * len(pairs)


def test_nan_in_one_stream_of_32():
    audios = [noise(i, 1500) for i in range(32)]
    clean, _, _ = run(ToyStream(device="cuda"), audios, buckets=(32,))
    audios[9] = audios[9].copy()
    audios[9][700] = NAN_LEVEL + 1
    results, stats, _ = run(ToyStream(device="cuda"), audios, buckets=(32,))
    assert isinstance(results[9][-2], Failed)
    assert results[9][-1] == Closed("failed")
    assert [r for i, r in enumerate(results) if i != 9] == [r for i, r in enumerate(clean) if i != 9]
    assert stats.poisoned == 1


class Synchronising(ToyStream):
    """Waits for the device inside a step, which a graph can't."""

    def step(self, audio, lengths, final, state):
        if float(audio.sum()) > 1e9:
            raise ValueError
        return super().step(audio, lengths, final, state)


def test_steps_that_wait_for_the_device_are_refused_or_told():
    with pytest.raises(ConfigError, match="captured as a CUDA graph"):
        run(Synchronising(device="cuda"), [noise(0, 500)], graphs="on", buckets=(4,))
    _, stats, _ = run(Synchronising(device="cuda"), [noise(0, 500)], graphs="off", buckets=(4,))
    assert stats.eager_steps == stats.steps > 0


def test_sessions_move_between_devices():
    audio, events = noise(0, 4000), []
    engines = [Engine({"toy": ToyStream(device=d)}, EngineOptions(max_sessions=4)) for d in ("cuda", "cpu")]
    with engines[0], engines[1]:
        session = engines[0].open("toy", None, events.append)
        session.feed(audio[:2500])
        moved = engines[1].resume(engines[0].snapshot(session).to_bytes(), events.append)
        moved.feed(audio[2500:])
        moved.finish()
        assert engines[1].drain(60.0)
    alone, _, _ = run(ToyStream(), [audio])
    texts = finals(events)[0], "".join(chr((ord(c) - 97 - 1) % 26 + 97) for c in finals(alone[0])[0])
    assert sum(a != b for a, b in zip(*texts, strict=True)) <= 1


def test_speech_detection_and_batch_models_beside_captured_steps():
    model = WithVad(ToyStream(chunk=1600, device="cuda"), SileroVad.from_package())
    events = []
    models = {"toy": model, "batch": ToyBatch()}
    with Engine(models, EngineOptions(max_sessions=8, graphs="on")) as engine:
        session = engine.open("toy", SessionOptions({"second": "batch"}), events.append)
        session.feed(noise(0, 16_000))
        session.finish()
        assert engine.drain(60.0)
        assert engine.stats().online["toy"].eager_steps == 0
    assert events[-1] == Closed("finished")
    assert any(getattr(event, "source", "") == "offline" for event in events)
