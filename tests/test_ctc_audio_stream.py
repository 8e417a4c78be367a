"""CTC models fed with audio in steps: features, log probabilities and text as from whole recordings."""

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech import hub
from nar_speech.errors import ConfigError, InputError
from nar_speech.features import Frontend, FrontendConfig
from nar_speech.layers.frontend_frames import FrameFrontend
from nar_speech.layers.state import named_tensors
from nar_speech.models.ctc import CtcConfig, CtcModel
from nar_speech.models.ctc_stream import CtcStream
from nar_speech.search.ctc import greedy, prefix_beam
from nar_speech.search.ctc_stream import BeamStream, GreedyStream
from tests.model_folders import wenet_folder
from tests.streams import drive, same_tensors

KALDI = FrontendConfig(num_mels=20)
NEMO = FrontendConfig(kind="nemo", num_mels=20, fft_size=512)
WENET = {
    "encoder": "conformer",
    "encoder_conf": {
        "output_size": 16,
        "attention_heads": 2,
        "linear_units": 24,
        "num_blocks": 2,
        "cnn_module_kernel": 5,
        "causal": True,
        "use_dynamic_chunk": True,
        "global_cmvn": True,
    },
}
FAST = {
    "encoder": "fastconformer",
    "encoder_conf": {
        "n_layers": 2,
        "d_model": 16,
        "n_heads": 2,
        "ff_expansion_factor": 2,
        "subsampling_conv_channels": 8,
        "causal_downsampling": True,
        "conv_context_size": "causal",
        "conv_norm_type": "layer_norm",
        "att_context_style": "chunked_limited",
        "att_context_size": [[6, 2], [4, 1], [2, 0]],
    },
    "blank": 8,
}


def make_model(**conf):
    torch.manual_seed(0)
    model = CtcModel(CtcConfig(**{"input_size": 20, "vocab_size": 9, **conf}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model.eval()


def make_waves(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


@pytest.mark.parametrize("config", [KALDI, NEMO], ids=["kaldi", "nemo"])
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 9000), min_size=1, max_size=4),
    first=st.integers(1, 12),
    later=st.integers(1, 12),
    late=st.booleans(),
    waits=st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
def test_steps_of_frames_equal_the_features_of_the_file(config, lengths, first, later, late, waits):
    cmvn = torch.linspace(-1, 1, 20), torch.linspace(0.5, 2, 20)
    frontend = Frontend(config, cmvn)
    steps, waves = FrameFrontend(frontend, first, later), make_waves(1, lengths)
    got, state = drive(
        steps.step, steps.init_state(len(waves)), waves, steps.first, steps.later, waits[: len(waves)], late
    )
    assert same_tensors(state, steps.init_state(len(waves)))
    for wave, frames in zip(waves, got, strict=True):
        want, counts = frontend(wave[None], torch.tensor([len(wave)]))
        if config.kind == "fbank" and len(wave) < frontend.frame:  # too short for a frame: the file gives one
            assert len(frames) == 0
        else:
            assert len(frames) == counts[0]
            torch.testing.assert_close(frames, want[0], atol=1e-5, rtol=1e-5)


CASES = {
    "wenet": (KALDI, WENET, (4, 8), {"chunk_size": 4, "left_chunks": 2}),
    "fast_look_ahead": (NEMO, FAST, (3, None), {"context": (6, 2)}),
    "fast_immediate": (NEMO, FAST, (1, 4), {"context": (4, 0)}),
    "fast_kaldi": (KALDI, FAST, (2, 2), {"context": (2, 1)}),
    "self_conditioned": (
        KALDI,
        {**WENET, "interctc_layers": (1,), "self_conditioning": True},
        (3, 3),
        {"chunk_size": 3, "left_chunks": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
@settings(deadline=None, max_examples=8)
@given(lengths=st.lists(st.integers(0, 16000), min_size=1, max_size=3), late=st.booleans(), data=st.data())
@torch.no_grad()
def test_steps_of_audio_equal_the_recording(case, lengths, late, data):
    config, conf, sizes, options = CASES[case]
    if config.kind == "fbank":  # of a clip shorter than a frame a file gives one, a stream none
        lengths = [max(length, 400) if length else 0 for length in lengths]
    model, frontend, waves = make_model(**conf), Frontend(config), make_waves(2, lengths)
    blank = model.config.blank
    stream = CtcStream(model, frontend, model.chunking(*sizes), candidates=4)
    waits = data.draw(st.lists(st.integers(0, 2), min_size=len(waves), max_size=len(waves)))
    kept = []

    def step(audio, lengths, state, final):
        frames, state = stream.step(audio, lengths, final, state)
        kept.append(frames)
        return frames.values, frames.counts, state

    got, state = drive(step, stream.init_state(len(waves)), waves, stream.first, stream.chunk, waits, late)
    assert same_tensors(state, stream.init_state(len(waves)))
    for row, wave in enumerate(waves):
        feats, counts = frontend(wave[None], torch.tensor([len(wave)]))
        out = model(feats, counts, **options)
        torch.testing.assert_close(
            got[row], out.log_probs[0].topk(4).values[: out.lengths[0]], atol=1e-4, rtol=1e-4
        )
        searches = GreedyStream(blank), BeamStream(4, blank)
        for frames in kept:
            count = int(frames.counts[row])
            parts = [t[row, :count].numpy() for t in (frames.values, frames.symbols, frames.blanks)]
            searches[0].push(*parts[:2])
            searches[1].push(*parts)
        searches[1].finish()
        assert searches[0].hypothesis().tokens == greedy(out.log_probs, out.lengths, blank)[0].tokens
        best = prefix_beam(out.log_probs, out.lengths, 4, blank=blank)[0] if out.lengths[0] else None
        assert searches[1].hypothesis(finish=True).tokens == (best[0].tokens if best else ())


@pytest.mark.parametrize("case", ["wenet", "fast_look_ahead"])
def test_steps_read_no_values(case):
    """The whole step, features included, on the meta device."""
    config, conf, sizes, _ = CASES[case]
    model, frontend = make_model(**conf).to("meta"), Frontend(config).to("meta")
    stream = CtcStream(model, frontend, model.chunking(*sizes))
    assert stream.device.type == "meta"
    state = stream.init_state(5)
    audio = torch.empty(5, max(stream.first, stream.chunk), device="meta")
    lengths, final = (torch.empty(5, dtype=d, device="meta") for d in (torch.int64, torch.bool))
    frames, after = stream.step(audio, lengths, final, state)
    assert frames.values.shape == (5, sizes[0], 1)
    shapes = [{name: (t.shape, t.dtype) for name, t in named_tensors(s)} for s in (state, after)]
    assert shapes[0] == shapes[1]


def test_a_network_in_bfloat16_hears_float32_features():
    model = make_model(**FAST)
    stream = CtcStream(model.to(torch.bfloat16), Frontend(NEMO))
    audio = torch.randn(2, max(stream.first, stream.chunk))
    lengths, final = torch.tensor([stream.first, 40]), torch.tensor([False, True])
    frames, state = stream.step(audio, lengths, final, stream.init_state(2))
    assert state.network.frames.dtype == torch.bfloat16
    assert state.frontend.samples.dtype == frames.values.dtype == torch.float32
    assert frames.counts.tolist() == [3, 0]


def test_first_steps_wait_for_no_more_than_they_need():
    wenet = CtcStream(make_model(**WENET), Frontend(KALDI))
    assert (wenet.first, wenet.chunk) == (66 * 160 + 400, 64 * 160)  # 67 frames give 16 outputs
    assert wenet.frame_seconds == pytest.approx(0.04)
    fast = CtcStream(make_model(**FAST), Frontend(NEMO))
    assert (fast.first, fast.chunk) == (16 * 160 + 200, 24 * 160)  # 17 centred frames give 3 outputs
    assert fast.frame_seconds == pytest.approx(0.08)


def test_an_official_wenet_folder_hears_streams(tmp_path):
    folder = wenet_folder(tmp_path / "m")
    tree = yaml.safe_load((folder / "train.yaml").read_text())
    tree["encoder_conf"] |= {"causal": True, "use_dynamic_chunk": True}
    (folder / "train.yaml").write_text(yaml.safe_dump(tree))
    model = hub.load_parts(folder)
    stream = CtcStream(model.network, model.frontend, model.network.chunking(8, 16))
    (wave,) = make_waves(3, [30_000])

    def step(audio, lengths, state, final):
        frames, state = stream.step(audio, lengths, final, state)
        return frames.symbols[..., 0], frames.counts, state

    (labels,), _ = drive(step, stream.init_state(1), [wave], stream.first, stream.chunk)
    feats, counts = model.frontend(wave[None], torch.tensor([len(wave)]))
    with torch.no_grad():
        out = model.network(feats, counts, chunk_size=8, left_chunks=2)
    assert torch.equal(labels, out.log_probs[0].argmax(-1))


def test_what_can_not_stream_is_refused():
    fast = make_model(**FAST)
    for config in (
        FrontendConfig(num_mels=10, lfr_m=2, lfr_n=2),
        FrontendConfig(kind="log_mel", num_mels=20),
        FrontendConfig(kind="nemo", num_mels=20, normalize="per_feature"),
    ):
        with pytest.raises(ConfigError, match="stream of frames"):
            CtcStream(fast, Frontend(config))
    with pytest.raises(ConfigError, match="at least as long"):
        FrameFrontend(Frontend(FrontendConfig(frame_ms=5.0)), 1, 1)
    with pytest.raises(ConfigError, match="needs a limit"):
        CtcStream(make_model(**WENET), Frontend(KALDI), make_model(**WENET).chunking(4, -1))
    sanm = {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2}
    with pytest.raises(ConfigError, match="'sanm' takes no streams"):
        CtcStream(make_model(encoder="sanm", encoder_conf=sanm), Frontend(KALDI))
    stream = CtcStream(fast, Frontend(NEMO))
    with pytest.raises(InputError, match="takes 3840 samples"):
        stream.step(torch.zeros(1, 7), torch.tensor([7]), torch.tensor([True]), stream.init_state(1))
