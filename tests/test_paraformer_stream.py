"""Streaming Paraformer: chunks equal one piece, streams do not meet, fixed shapes, training, audio."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import nar_speech
from nar_speech.config import from_dict, to_dict, write_yaml
from nar_speech.errors import ConfigError, InputError
from nar_speech.features import Frontend, FrontendConfig, build_frontend
from nar_speech.layers.cif import CifPredictorV2, PredictorConfig
from nar_speech.layers.cif_stream import CifState, most_tokens
from nar_speech.layers.frontend_stream import ChunkFrontend
from nar_speech.layers.packed import PackedLinear, pack_linear_layers
from nar_speech.layers.quantize import int8_available, quantize_dynamic_int8
from nar_speech.layers.sanm_stream import StreamConfig, WindowConfig
from nar_speech.layers.sanm_windows import encode_windows, training_windows
from nar_speech.layers.state import (
    export_row,
    gather,
    import_row,
    map_state,
    named_tensors,
    scatter,
)
from nar_speech.model_folder import read_model_file
from nar_speech.models import paraformer_stream
from nar_speech.models.paraformer import (
    Paraformer,
    ParaformerConfig,
    build_paraformer,
    loss_terms,
    paraformer_loss,
    training_pass,
)
from nar_speech.models.paraformer_stream import ParaformerStream, recognise_stream, state_bytes
from tests.corpus import make_manifest

torch.set_num_threads(1)

WIDTH, VOCAB, FEATURES = 16, 20, 12
GOLDEN = Path(__file__).parent / "golden" / "paraformer"


def build(seed=0, shift=2, blocks=2, cross=2, predictor=None, **stream):
    config = ParaformerConfig(
        input_size=FEATURES,
        vocab_size=VOCAB,
        encoder_conf={
            "attention_heads": 2,
            "linear_units": 24,
            "num_blocks": 2,
            "output_size": WIDTH,
            "kernel_size": 5,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        predictor_conf=PredictorConfig(**(predictor or {})),
        decoder_conf=from_dict(
            type(ParaformerConfig().decoder_conf),
            {
                "attention_heads": 2,
                "linear_units": 24,
                "num_blocks": blocks,
                "att_layer_num": cross,
                "kernel_size": 5,
                "shift": shift,
                "dropout": 0.0,
                "self_attention_dropout": 0.0,
                "src_attention_dropout": 0.0,
            },
        ),
        stream=StreamConfig(**stream),
    )
    torch.manual_seed(seed)
    model = build_paraformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2, generator)
    return model.eval()


def ragged(lengths, seed=0, extra=0):
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(len(lengths), max([*lengths, 1]) + extra, FEATURES, generator=generator)
    return feats, torch.tensor(lengths)


def pieces(model, feats, length, last):
    """(features of a whole chunk, valid frames, final) of each step of one stream of ``length`` frames."""
    size = model.stream.chunk[1]
    steps = [(i, size, False) for i in range(0, length - last, size)] + [(length - last, last, True)]
    for begin, count, final in steps:
        chunk = torch.full((size, FEATURES), 7.0)  # what stands past the end must not matter
        chunk[:count] = feats[begin : begin + count]
        yield chunk, count, final


def run_alone(model, feats, length, last, grow=False):
    """Log probs (U, V) and frames (U,) of one stream."""
    state, found, frames = model.init_state(1, grow=grow), [], []
    for chunk, count, final in pieces(model, feats, length, last):
        out, state = model.step(chunk[None], torch.tensor([count]), state, torch.tensor([final]))
        tokens = int(out.token_lengths[0])
        assert not out.log_probs[0, tokens:].any()
        assert (out.frames[0, tokens:] == -1).all()
        found.append(out.log_probs[0, :tokens])
        frames.append(out.frames[0, :tokens])
    return torch.cat(found), torch.cat(frames)


def last_of(length, size, choice):
    """Frames of the last step: an end with frames, or, where it can be, an empty one."""
    rest = (length - 1) % size + 1 if length else 0
    return 0 if rest == size and choice else rest


CHUNKS = st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(0, 4))
NETWORKS = st.fixed_dictionaries(
    {
        "shift": st.sampled_from([0, 1, 2]),
        "blocks": st.sampled_from([2, 3]),
        "predictor": st.sampled_from(
            [{}, {"l_order": 2, "r_order": 3}, {"smooth_factor": 2.5}, {"tail_threshold": 0.0}]
        ),
    }
)


@given(
    network=NETWORKS,
    chunk=CHUNKS,
    look_back=st.tuples(st.integers(-1, 3), st.integers(-1, 3)),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    empty_end=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_steps_equal_one_piece(network, chunk, look_back, lengths, empty_end, padded, seed):
    stream = {"encoder_look_back": look_back[0], "decoder_look_back": look_back[1], "padded": padded}
    model = build(seed, **network, chunk=chunk, **stream)
    feats, sizes = ragged(lengths, seed, extra=2)
    last = [last_of(length, chunk[1], empty_end) for length in lengths]
    whole = recognise_stream(model, feats, sizes, torch.tensor(last))
    for b, length in enumerate(lengths):
        log_probs, frames = run_alone(model, feats[b], length, last[b], grow=True)
        assert int(whole.token_lengths[b]) == len(log_probs)
        torch.testing.assert_close(whole.log_probs[b, : len(frames)], log_probs, atol=1e-5, rtol=1e-4)
        assert whole.frames[b, : len(frames)].equal(frames)
        assert (frames.diff() >= 0).all()
        assert ((frames >= 0) & (frames <= length)).all()
        assert not whole.log_probs[b, len(frames) :].any()


def play(model, streams, order, slots, batches):
    """Streams in slots, stepped in any order and in batches of any size; log probs of each utterance.

    ``streams``: per slot a list of utterances (feats, length, last frames), one after the other.
    """
    store = model.init_state(slots)
    queues = [
        [(number, step) for number, (feats, length, last) in enumerate(utterances)
         for step in pieces(model, feats, length, last)]
        for utterances in streams
    ]  # fmt: skip
    found = {(slot, n): [] for slot, utterances in enumerate(streams) for n in range(len(utterances))}
    generator = torch.Generator().manual_seed(order)
    while any(queues):
        ready = [slot for slot in range(slots) if queues[slot]]
        count = min(batches[int(torch.randint(len(batches), (), generator=generator))], len(ready))
        chosen = [ready[i] for i in torch.randperm(len(ready), generator=generator)[:count].tolist()]
        rows = [queues[slot].pop(0) for slot in chosen]
        index = torch.tensor(chosen)
        out, state = model.step(
            torch.stack([chunk for _, (chunk, _, _) in rows]),
            torch.tensor([valid for _, (_, valid, _) in rows]),
            gather(store, index),
            torch.tensor([final for _, (_, _, final) in rows]),
        )
        scatter(store, index, state)
        for row, (slot, (number, _)) in enumerate(zip(chosen, rows, strict=True)):
            found[slot, number].append(out.log_probs[row, : int(out.token_lengths[row])])
    return {key: torch.cat(parts) for key, parts in found.items()}


@given(
    chunk=st.sampled_from([(0, 4, 2), (2, 3, 2), (1, 5, 0), (4, 2, 3)]),
    look_back=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    shift=st.sampled_from([0, 2]),
    lengths=st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=2), min_size=2, max_size=5),
    order=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_streams_in_slots_do_not_meet(chunk, look_back, shift, lengths, order):
    """Random arrival, batch mates and order; an utterance follows another one in the same slot."""
    model = build(1, shift, chunk=chunk, encoder_look_back=look_back[0], decoder_look_back=look_back[1])
    streams = []
    for slot, sizes in enumerate(lengths):
        feats = [ragged([size], 10 * slot + n)[0][0] for n, size in enumerate(sizes)]
        ends = [last_of(size, chunk[1], (slot + n) % 2) for n, size in enumerate(sizes)]
        streams.append(list(zip(feats, sizes, ends, strict=True)))
    found = play(model, streams, order, len(streams), [1, 2, 3])
    for slot, utterances in enumerate(streams):
        for number, (feats, length, last) in enumerate(utterances):
            alone, _ = run_alone(model, feats, length, last)
            torch.testing.assert_close(found[slot, number], alone, atol=1e-5, rtol=1e-4)


def test_a_stream_moves_to_another_store():
    model = build(chunk=(0, 4, 2), encoder_look_back=2)
    feats, _ = ragged([22])
    steps = list(pieces(model, feats[0], 22, 2))
    want, _ = run_alone(model, feats[0], 22, 2)
    first, second, found = model.init_state(3), model.init_state(2), []
    for number, (chunk, count, final) in enumerate(steps):
        if number == 3:
            saved = export_row(first, 1)
            assert {"encoder.past", "predictor.hidden", "decoder.memory"} <= set(saved)
            import_row(second, 0, saved)
        store, slot = (first, 1) if number < 3 else (second, 0)
        index = torch.tensor([slot])
        out, state = model.step(
            chunk[None], torch.tensor([count]), gather(store, index), torch.tensor([final])
        )
        scatter(store, index, state)
        found.append(out.log_probs[0, : int(out.token_lengths[0])])
    torch.testing.assert_close(torch.cat(found), want, atol=1e-6, rtol=1e-5)


def test_a_row_begins_anew_behind_its_end():
    model = build(chunk=(1, 4, 2), encoder_look_back=3, decoder_look_back=2)
    state = model.init_state(2)
    feats, _ = ragged([4, 4])
    for final in ([False, False], [True, False]):
        _, state = model.step(feats, torch.tensor([4, 4]), state, torch.tensor(final))
    fresh = model.init_state(2)
    assert state.encoder.frames.tolist() == [0, 8]
    for (name, got), (_, new) in zip(named_tensors(state), named_tensors(fresh), strict=True):
        if not name.endswith("past"):  # forgotten through its count
            assert got[0].equal(new[0]), name


def test_shapes_do_not_depend_on_values_and_nothing_is_read_back():
    """On the meta device there are no values: reading one, or a shape that depends on one, raises."""
    with torch.device("meta"):
        model = build(chunk=(1, 4, 2), shift=0, blocks=3, cross=2, max_tokens=3).to("meta")
        state = model.init_state(5)
        shapes = {name: (t.shape, t.dtype) for name, t in named_tensors(state)}
        lengths, final = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.bool)
        out, state = model.step(torch.zeros(5, 4, FEATURES), lengths, state, final)
        assert out.log_probs.shape == (5, 3, VOCAB)
        assert out.frames.shape == (5, 3)
        assert {name: (t.shape, t.dtype) for name, t in named_tensors(state)} == shapes
    conf = FrontendConfig(num_mels=4, window="hamming", lfr_m=7, lfr_n=6)
    frontend = ChunkFrontend(Frontend(conf).to("meta"), 3)
    state = frontend.init_state(2, "meta")
    waves = torch.zeros(2, frontend.chunk, device="meta")
    flags = torch.zeros(2, dtype=torch.bool, device="meta")
    feats, _, _ = frontend.step(waves, torch.zeros(2, dtype=torch.int64, device="meta"), state, flags)
    assert feats.shape == (2, 3, 28)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_can_be_captured_in_a_cuda_graph():
    model = build(chunk=(1, 4, 2), encoder_look_back=2, predictor={"smooth_factor": 2.0}).cuda()
    feats = torch.randn(6, 3, 4, FEATURES, device="cuda")
    lengths, final = torch.full((3,), 4, device="cuda"), torch.zeros(3, dtype=torch.bool, device="cuda")
    inputs, state = feats[0].clone(), model.init_state(3)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        model.step(inputs, lengths, state, final)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, new = model.step(inputs, lengths, state, final)
    plain = model.init_state(3)
    for number in range(6):
        inputs.copy_(feats[number])
        graph.replay()
        want, plain = model.step(feats[number], lengths, plain, final)
        torch.testing.assert_close(out.log_probs, want.log_probs, atol=1e-5, rtol=1e-4)
        assert out.token_lengths.equal(want.token_lengths)
        map_state(lambda kept, fresh: kept.copy_(fresh), state, new)


def test_decoding_only_the_tokens_there_are_changes_nothing(monkeypatch):
    model = build(chunk=(0, 4, 2))
    feats, _ = ragged([30])
    short, _ = run_alone(model, feats[0], 30, 2)
    monkeypatch.setattr(paraformer_stream, "_used", lambda counts, size: size)
    full, _ = run_alone(model, feats[0], 30, 2)
    assert len(full)
    torch.testing.assert_close(short, full, atol=1e-6, rtol=1e-5)


def test_a_stream_without_audio_has_no_tokens_and_official_ones_may():
    model = build(chunk=(0, 4, 3), predictor={"smooth_factor": 2.0})
    nothing = torch.zeros(1, 4, FEATURES), torch.tensor([0])
    out, _ = model.step(*nothing, model.init_state(1), torch.tensor([True]))
    assert not out.token_lengths.any()
    model.stream = dataclasses.replace(model.stream, padded=True, official=True)
    out, _ = model.step(*nothing, model.init_state(1), torch.tensor([True]))
    assert out.token_lengths.any()


def test_most_tokens_can_be_limited():
    model = build(chunk=(0, 6, 2), predictor={"smooth_factor": 3.0})
    feats, lengths = ragged([6])
    many, _ = model.step(feats, lengths, model.init_state(1), torch.tensor([True]))
    model.stream = dataclasses.replace(model.stream, max_tokens=2)
    few, _ = model.step(feats, lengths, model.init_state(1), torch.tensor([True]))
    assert int(many.token_lengths[0]) > 2 == int(few.token_lengths[0])
    assert few.log_probs.shape == (1, 2, VOCAB)
    assert few.frames.equal(many.frames[:, :2])


# ---- CIF ----------------------------------------------------------------------------------------------


def loop_cif(hidden, alphas, integral, frame, official):
    """Integrate and fire frame by frame: tokens, and what is left."""
    tokens = []
    for alpha, h in zip(alphas, hidden, strict=True):
        if official:
            if alpha + integral < 1:
                integral, frame = integral + alpha, frame + alpha * h
            else:
                tokens.append(frame + (1 - integral) * h)
                integral = integral + alpha - 1
                frame = integral * h
        else:
            while alpha + integral >= 1:
                tokens.append(frame + (1 - integral) * h)
                alpha, integral, frame = alpha - (1 - integral), 0.0, torch.zeros_like(h)
            integral, frame = integral + alpha, frame + alpha * h
    return tokens, integral, frame


@given(
    weights=st.lists(st.floats(0, 1.875, width=32), min_size=12, max_size=12),
    large=st.booleans(),
    official=st.booleans(),
    rows=st.integers(3, 12),
    final=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_chunks_of_cif_equal_the_loop(weights, large, official, rows, final):
    torch.manual_seed(0)
    config = StreamConfig(chunk=(2, 4, 6), official=official)
    predictor = CifPredictorV2(3, PredictorConfig(smooth_factor=1.9 if large else 1.0))
    alphas = torch.tensor(weights)[None].clamp_max(1.875 if large else 0.999)
    hidden = torch.randn(1, 12, 3)
    hidden[:, rows:], alphas[:, rows:] = 0, 0
    predictor.alphas = lambda hidden, rows: alphas
    state = CifState(torch.tensor([0.6]), torch.randn(1, 3))
    valid = torch.arange(12)[None] < rows
    chunk, new = predictor.step(hidden, valid, state, torch.tensor([final]), config)
    used = alphas[0].double().clone()
    used[:2] = 0
    used[6 if not final else 12 :] = 0
    frames, used = [state.hidden[0].double(), *hidden[0].double()], [0.6, *used.tolist()]
    frames, used = frames[: rows + 1], used[: rows + 1]
    if final:
        frames, used = [*frames, torch.zeros(3).double()], [*used, 0.45]
    tokens, integral, frame = loop_cif(frames, used, 0.0, torch.zeros(3).double(), official)
    sums = torch.tensor(used).double().cumsum(0)
    if ((sums - sums.round()).abs() < 1e-6).any():
        return  # a sum on an integer: either side is right
    count = int(chunk.counts[0])
    assert count == len(tokens) <= most_tokens(predictor, config, 12)
    if tokens:
        torch.testing.assert_close(chunk.embeds[0, :count], torch.stack(tokens).float(), atol=1e-5, rtol=1e-5)
    assert not chunk.embeds[0, count:].any()
    torch.testing.assert_close(new.remainder[0].double(), torch.tensor(integral).double(), atol=1e-6, rtol=0)
    mean = frame / integral if integral > 0 else frame
    torch.testing.assert_close(new.hidden[0], mean.float(), atol=1e-4, rtol=1e-4)


# ---- in place ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("look_back", [0, 1, 3])
def test_steps_in_place_give_the_same(look_back):
    model = build(chunk=(1, 4, 2), encoder_look_back=look_back, decoder_look_back=look_back)
    feats, _ = ragged([30])
    state, own = model.init_state(1), model.init_state(1)
    for chunk, count, final in pieces(model, feats[0], 30, 2):
        arguments = chunk[None], torch.tensor([count])
        given = own.encoder.past
        out, state = model.step(*arguments, state, torch.tensor([final]))
        got, own = model.step(*arguments, own, torch.tensor([final]), in_place=True)
        assert torch.equal(got.log_probs, out.log_probs)
        assert own.encoder.past.data_ptr() == given.data_ptr()
        for (name, a), (_, b) in zip(named_tensors(state), named_tensors(own), strict=True):
            assert torch.equal(a, b), name


# ---- precision ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_packed_layers_and_coarse_dtypes_stream():
    model = build(chunk=(0, 4, 2), encoder_look_back=2)
    feats, _ = ragged([30])
    want, _ = run_alone(model, feats[0], 30, 2)
    packed = pack_linear_layers(copy.deepcopy(model))
    assert isinstance(packed.encoder.encoders[0].self_attn.linear_q_k_v, PackedLinear)
    got, _ = run_alone(packed, feats[0], 30, 2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    half = pack_linear_layers(copy.deepcopy(model).bfloat16())
    state = half.init_state(1)
    assert (state.encoder.past.dtype, state.predictor.hidden.dtype) == (torch.bfloat16, torch.float32)
    coarse = [half]
    if int8_available():
        coarse.append(quantize_dynamic_int8(copy.deepcopy(model)))
    for other in coarse:
        state, plain = other.init_state(1), model.init_state(1)
        for chunk, count, final in pieces(model, feats[0], 30, 2):
            arguments = chunk[None], torch.tensor([count])
            out, state = other.step(*arguments, state, torch.tensor([final]))
            sure, plain = model.step(*arguments, plain, torch.tensor([final]))
            tokens = int(out.token_lengths[0])
            assert out.log_probs.dtype == torch.float32
            if tokens == int(sure.token_lengths[0]) > 0:
                gap = (out.log_probs - sure.log_probs).abs().max()
                assert 0 < gap < 0.5


# ---- configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"chunk": (0, 0, 5)}, "chunk"),
        ({"chunk": (-1, 5, 5)}, "chunk"),
        ({"encoder_look_back": -2}, "encoder_look_back"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_impossible_streams_are_refused(values, word):
    with pytest.raises(ConfigError, match=word):
        StreamConfig(**values)


def test_windows_must_hold_what_they_own():
    with pytest.raises(ConfigError, match="size 8"):
        WindowConfig(size=8, stride=7, left=2)


@pytest.mark.parametrize(
    "changes", [{"variant": "bicif", "predictor": "v3"}, {"encoder": "conformer"}, {"predictor": "v3"}]
)
def test_only_plain_san_m_models_stream(changes):
    with pytest.raises(ConfigError, match="stream: needs"):
        ParaformerConfig(stream=StreamConfig(), **changes)


def test_misuse_is_named():
    model = build(chunk=(0, 4, 2), encoder_look_back=-1)
    with pytest.raises(ConfigError, match="grow"):
        model.init_state(1)
    state = model.init_state(1, grow=True)
    with pytest.raises(InputError, match="chunks of 4 frames, got 5"):
        model.step(torch.zeros(1, 5, FEATURES), torch.tensor([5]), state, torch.tensor([False]))
    model.stream = StreamConfig(official=True)
    with pytest.raises(ConfigError, match="official"):
        recognise_stream(model, torch.zeros(1, 5, FEATURES), torch.tensor([5]))
    model.stream = None
    with pytest.raises(ConfigError, match="not trained to stream"):
        model.init_state(1)


def test_a_state_grows_with_unlimited_look_back_and_only_then():
    for look_back, grows in ((2, False), (-1, True)):
        model = build(chunk=(0, 4, 2), encoder_look_back=look_back)
        state = model.init_state(1, grow=True)
        before = state_bytes(state)
        for _ in range(4):
            _, state = model.step(
                torch.randn(1, 4, FEATURES), torch.tensor([4]), state, torch.tensor([False])
            )
        assert (state_bytes(state) > before) == grows


def test_a_configuration_survives_yaml():
    config = build(chunk=(1, 2, 3), windows=(WindowConfig(9, 4, 1, 2, 3),)).config
    assert from_dict(ParaformerConfig, to_dict(config)) == config


def test_an_official_online_folder_loads_and_streams(tmp_path):
    case = GOLDEN / "online_0_8_4_lookback_all"
    meta, io = json.loads((case / "meta.json").read_text()), load_file(case / "io.safetensors")
    conf = meta["config"]
    size, vocab = conf["input_size"], conf["vocab_size"]
    frontend = {"fs": 16000, "window": "hamming", "n_mels": size // 7, "frame_length": 25, "frame_shift": 10}
    tree = {
        "model": "ParaformerStreaming",
        "encoder": "SANMEncoderChunkOpt",
        "encoder_conf": conf["encoder_conf"] | {"pos_enc_class": "SinusoidalPositionEncoder"},
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": conf["decoder_conf"],
        "predictor": "CifPredictorV2",
        "predictor_conf": conf["predictor_conf"],
        "model_conf": conf["model_conf"],
        "frontend": "WavFrontendOnline",
        "frontend_conf": frontend | {"lfr_m": 7, "lfr_n": 6},
        "tokenizer": "CharTokenizer",
        "normalize": None,
    }
    write_yaml(tree, tmp_path / "config.yaml")
    torch.save(load_file(case / "weights.safetensors"), tmp_path / "model.pt")
    values = " ".join(["0.5"] * size)
    (tmp_path / "am.mvn").write_text(
        f"<Nnet>\n<AddShift> {size} {size}\n<LearnRateCoef> 0 [ {values} ]\n"
        f"<Rescale> {size} {size}\n<LearnRateCoef> 0 [ {values} ]\n</Nnet>\n"
    )
    pieces = ["<blank>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(vocab - 4)), "<unk>"]
    (tmp_path / "tokens.json").write_text(json.dumps(pieces), encoding="utf-8")
    network, front, _, _ = Paraformer.from_official(tmp_path)
    windows = WindowConfig(12, 8), WindowConfig(15, 10)
    assert network.stream == StreamConfig((0, 10, 5), 4, 1, windows=windows, padded=True)
    network.stream = dataclasses.replace(network.stream, chunk=tuple(meta["chunk_size"]))
    state = network.init_state(1)
    out, state = network.step(io["feats"][:, :8], torch.tensor([8]), state, torch.tensor([False]))
    assert out.log_probs[0, : int(out.token_lengths[0])].argmax(-1).tolist() == meta["chunks"][0]["tokens"]
    stream = ParaformerStream(network, front)
    assert stream.chunk == 8 * 960
    audio = torch.randn(2, stream.chunk) * 0.1
    out, _ = stream.step(
        audio, torch.tensor([stream.chunk, 3000]), torch.tensor([False, True]), stream.init_state(2)
    )
    assert out.log_probs.shape[::2] == (2, vocab)
    # The transcriber gives what the stream gives, in one piece, alone and in company.
    model = nar_speech.load_model(tmp_path, device="cpu")
    stream = ParaformerStream(model.recognizer.network, model.recognizer.frontend)
    wave = 0.3 * torch.randn(3 * stream.chunk + 5000)
    state, heard = stream.init_state(1), []
    for piece in wave.split(stream.chunk):
        final = torch.tensor([len(piece) < stream.chunk])
        padded = torch.nn.functional.pad(piece, (0, stream.chunk - len(piece)))[None]
        out, state = stream.step(padded, torch.tensor([len(piece)]), final, state)
        heard += out.log_probs[0, : int(out.token_lengths[0])].argmax(-1).tolist()
    found = model([wave.numpy(), wave.numpy()[:20000]])[0]
    tokens = [token for segment in found.segments for token in segment.tokens]
    assert [token.id for token in tokens] == [i for i in heard if i > 2] != []
    assert found.text == model(wave.numpy()).text
    assert all(0 <= token.start <= token.end <= found.duration for token in tokens)


# ---- training -----------------------------------------------------------------------------------------


def test_one_window_over_everything_is_the_offline_encoder():
    model = build()
    feats, lengths = ragged([17, 9])
    windows = training_windows(lengths, WindowConfig(20, 20, 0, 0, 0))
    got = encode_windows(model.encoder, feats, lengths, windows)
    want, _ = model.encode(feats, lengths)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[b, :length], want[b, :length], atol=1e-5, rtol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    window=st.tuples(st.integers(1, 6), st.integers(0, 3), st.integers(0, 3)),
    look_back=st.tuples(st.integers(0, 3), st.integers(0, 2)),
)
@settings(max_examples=25, deadline=None)
def test_training_of_a_batch_equals_its_items(lengths, window, look_back):
    stride, left, right = window
    config = WindowConfig(left + stride + right, stride, left, *look_back)
    model = build(shift=0, windows=(config,))
    feats, sizes = ragged(lengths, extra=3)
    counts = torch.tensor([1 + length // 5 for length in lengths])
    tokens = torch.randint(3, VOCAB, (len(lengths), int(counts.max())))
    draws = torch.arange(int(counts.max()) + 1).expand(len(lengths), -1)
    batch = training_pass(model, feats, sizes, tokens, counts, draws=draws)
    for b, length in enumerate(lengths):
        row, count = slice(b, b + 1), int(counts[b])
        alone = training_pass(
            model, feats[row, :length], sizes[row], tokens[row, :count], counts[row],
            draws=draws[row, : count + 1],
        )  # fmt: skip
        torch.testing.assert_close(batch.logits[b, : count + 1], alone.logits[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(batch.cif.token_num[b], alone.cif.token_num[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch.encoder_out[b, :length], alone.encoder_out[0], atol=1e-5, rtol=1e-5)


def test_windows_are_drawn_in_training_only():
    model = build(windows=(WindowConfig(6, 4), WindowConfig(9, 6)))
    feats, sizes = ragged([30, 20])
    tokens, counts = torch.randint(3, VOCAB, (2, 4)), torch.tensor([4, 2])
    batch = feats, sizes, tokens, counts
    draws = torch.arange(5).expand(2, -1)
    each = [paraformer_loss(model, *batch, draws=draws, window=i)["loss"].item() for i in (0, 1)]
    assert each[0] != each[1]
    assert paraformer_loss(model, *batch, draws=draws)["loss"].item() == each[0]
    model.train()
    generator = torch.Generator().manual_seed(0)
    found = {paraformer_loss(model, *batch, generator, draws)["loss"].item() for _ in range(12)}
    assert found == set(each)


def test_every_parameter_of_a_windowed_model_learns():
    model = build(shift=2, blocks=3, cross=2).train()
    feats, sizes = ragged([30, 20])
    tokens, counts = torch.randint(3, VOCAB, (2, 4)), torch.tensor([4, 2])
    run = training_pass(model, feats, sizes, tokens, counts, draws=torch.arange(5).expand(2, -1))
    loss_terms(model, run, tokens, counts)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_model_learns_to_stream():
    """Tokens spelt out by the frames: after some training the stream is recognised word for word."""
    torch.manual_seed(0)
    model = build(
        predictor={"tail_threshold": 0.4}, chunk=(0, 4, 2), encoder_look_back=1,
        windows=(WindowConfig(6, 4, 0, 1, 1), WindowConfig(8, 6, 0, 1, 1)),
    ).train()  # fmt: skip
    table = torch.randn(VOCAB, FEATURES)

    def batch(size):
        tokens = torch.randint(3, VOCAB, (size, 6))
        feats = table[tokens.repeat_interleave(3, dim=1)]
        return feats, torch.full((size,), 18), tokens, torch.full((size,), 6)

    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(120):
        loss = paraformer_loss(model, *batch(16))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    feats, lengths, tokens, _ = batch(20)
    out = recognise_stream(model, feats, lengths)
    right = sum(
        [i for i in row[:count].argmax(-1).tolist() if i > 2] == want
        for row, count, want in zip(out.log_probs, out.token_lengths, tokens.tolist(), strict=True)
    )
    assert right >= 14


def test_the_recipe_trains_an_online_model(tmp_path, capsys):
    from nar_speech.train.recipe import run_recipe
    from recipes import paraformer as recipe

    words = [
        str(Path(__file__).parent.parent / "configs/paraformer/tiny_online.yaml"),
        f"data.train=[{make_manifest(tmp_path, 12, ['go left', 'stop'], 'train')}]",
        f"data.dev=[{make_manifest(tmp_path, 3, ['go left', 'stop'], 'dev')}]",
        f"train.output_dir={tmp_path}/run",
        "train.max_steps=6",
        "train.validate_every=3",
    ]
    assert run_recipe(recipe.Recipe, recipe.recipe, words, "doc") == 0
    assert "ref: " in capsys.readouterr().err
    folder = tmp_path / "run/model"
    file = read_model_file(folder)
    model = build_paraformer(from_dict(ParaformerConfig, file.network, "network")).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    assert model.stream.chunk == (0, 4, 2)
    stream = ParaformerStream(model, build_frontend(file.frontend, folder))
    audio = 0.1 * torch.randn(2, stream.chunk)
    flags = torch.tensor([False, True])
    out, _ = stream.step(audio, torch.full((2,), stream.chunk), flags, stream.init_state(2))
    assert out.log_probs.isfinite().all()


# ---- audio --------------------------------------------------------------------------------------------


def make_frontend(m=7, n=6, cmvn=True):
    conf = FrontendConfig(num_mels=4, window="hamming", lfr_m=m, lfr_n=n)
    size = 4 * m
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(2, size, generator=generator)
    return Frontend(conf, tuple(values) if cmvn else None)


def hear(frontend, waves, batches=1):
    """Features of waves through ``frontend.step``, all in one batch."""
    state, found = frontend.init_state(len(waves)), [[] for _ in waves]
    positions, done = [0] * len(waves), [False] * len(waves)
    while not all(done):
        audio = torch.full((len(waves), frontend.chunk), 3.0)
        counts, finals = [], []
        for row, wave in enumerate(waves):
            part = wave[positions[row] : positions[row] + frontend.chunk]
            audio[row, : len(part)] = part
            counts.append(len(part))
            finals.append(len(part) < frontend.chunk)
            positions[row] += len(part)
        feats, rows, state = frontend.step(audio, torch.tensor(counts), state, torch.tensor(finals))
        for row in range(len(waves)):
            if not done[row]:
                assert finals[row] or int(rows[row]) == frontend.rows
                assert not feats[row, int(rows[row]) :].any()
                found[row].append(feats[row, : int(rows[row])])
                done[row] = finals[row]
    return [torch.cat(parts) for parts in found]


@given(
    sizes=st.lists(
        st.one_of(st.integers(400, 20000), st.integers(4, 20).map(lambda n: 960 * n)), min_size=1, max_size=3
    ),
    stack=st.sampled_from([(7, 6), (5, 5), (9, 8)]),
    rows=st.integers(1, 7),
)
@settings(max_examples=30, deadline=None)
def test_chunks_of_audio_give_the_features_of_the_whole(sizes, stack, rows):
    frontend = make_frontend(*stack)
    generator = torch.Generator().manual_seed(1)
    waves = [0.1 * torch.randn(size, generator=generator) for size in sizes]
    for wave, got in zip(waves, hear(ChunkFrontend(frontend, rows), waves), strict=True):
        want, _ = frontend(wave[None], torch.tensor([len(wave)]))
        torch.testing.assert_close(got, want[0], atol=1e-4, rtol=1e-4)


def test_the_official_end_of_a_stream_loses_what_is_shorter_than_a_row():
    wave = 0.1 * torch.randn(9600 + 700)
    ours = hear(ChunkFrontend(make_frontend(), 10), [wave])[0]
    official = hear(ChunkFrontend(make_frontend(), 10, official_tail=True), [wave])[0]
    assert (len(ours), len(official)) == (11, 10)
    assert official.equal(ours[:10])


@pytest.mark.parametrize("size", [0, 1, 399])
def test_a_stream_shorter_than_a_frame_has_no_features(size):
    assert hear(ChunkFrontend(make_frontend(), 3), [torch.randn(size)])[0].shape == (0, 28)


def test_front_ends_that_can_not_stream_are_refused():
    with pytest.raises(ConfigError, match="can't stream"):
        ChunkFrontend(Frontend(FrontendConfig(kind="log_mel")), 10)
    with pytest.raises(ConfigError, match="lfr_m 5"):
        ChunkFrontend(make_frontend(5, 4), 10)
    front = ChunkFrontend(make_frontend(), 10)
    with pytest.raises(InputError, match="chunks of 9600 samples"):
        front.step(torch.zeros(1, 5), torch.tensor([5]), front.init_state(1), torch.tensor([False]))


def test_audio_in_chunks_is_recognised_like_its_features():
    frontend = make_frontend()
    model = build(chunk=(0, 5, 3))
    model.encoder = build_paraformer(dataclasses.replace(model.config, input_size=28)).eval().encoder
    stream = ParaformerStream(model, frontend)
    waves = [0.1 * torch.randn(size) for size in (23000, 9600, 4800 * 3 + 500)]
    state, found = stream.init_state(3), [[] for _ in waves]
    for begin in range(0, 24000, stream.chunk):
        parts = [wave[begin : begin + stream.chunk] for wave in waves]
        audio = torch.stack([torch.nn.functional.pad(p, (0, stream.chunk - len(p))) for p in parts])
        over = torch.tensor([begin > len(wave) for wave in waves])
        final = torch.tensor([len(p) < stream.chunk for p in parts])
        out, new = stream.step(audio, torch.tensor([len(p) for p in parts]), final, state)
        for row in range(3):
            if not over[row]:
                found[row].append(out.log_probs[row, : int(out.token_lengths[row])])
        state = map_state(lambda t: t, new)
    for wave, parts in zip(waves, found, strict=True):
        feats, lengths = frontend(wave[None], torch.tensor([len(wave)]))
        whole = len(wave) // stream.chunk * 5
        want = recognise_stream(model, feats, lengths, lengths - whole)
        torch.testing.assert_close(torch.cat(parts), want.log_probs[0], atol=1e-4, rtol=1e-3)
