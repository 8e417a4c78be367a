"""The Paraformer networks: batches equal single items, sizes of the released models, edge cases."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.checkpoint import compare_shapes
from nar_speech.config import from_dict, to_dict
from nar_speech.errors import ConfigError
from nar_speech.layers.sanm import (
    SANMDecoderConfig,
    SANMEncoder,
    SANMEncoderConfig,
    memory_block,
    memory_padding,
)
from nar_speech.models.paraformer import HotwordConfig, Paraformer, ParaformerConfig, build_paraformer

torch.set_num_threads(1)

WIDTH, VOCAB, FEATURES = 16, 20, 12
VARIANTS = ("paraformer", "bicif", "contextual", "seaco")


def small_config(variant="paraformer", **changes):
    sizes = {"attention_heads": 2, "linear_units": 24, "num_blocks": 2}
    decoder = {**sizes, "att_layer_num": 2, "kernel_size": 5}
    values = {
        "input_size": FEATURES,
        "vocab_size": VOCAB,
        "variant": variant,
        "encoder_conf": {**sizes, "output_size": WIDTH, "kernel_size": 5},
        "predictor": "v3" if variant in ("bicif", "seaco") else "v2",
        "decoder_conf": decoder,
        "hotword_conf": {
            "inner_dim": WIDTH,
            "no_bias": 7,
            "decoder": {**decoder, "embed": False, "output_layer": False},
        },
        **changes,
    }
    return from_dict(ParaformerConfig, values)


def build(variant="paraformer", seed=0, **changes):
    torch.manual_seed(seed)
    return build_paraformer(small_config(variant, **changes)).eval()


def ragged(lengths, extra=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    feats = torch.zeros(len(lengths), max(lengths) + extra, FEATURES)
    for row, size in zip(feats, lengths, strict=True):
        row[:size] = torch.randn(size, FEATURES, generator=generator)
    return feats, torch.tensor(lengths)


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 60)), min_size=1, max_size=4),
    extra=st.sampled_from([0, 1, 17]),
    biased=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_a_batch_equals_its_items(variant, lengths, extra, biased):
    model = build(variant)
    hotwords = [[3, 4], [5]] if biased and variant in ("contextual", "seaco") else None
    feats, sizes = ragged(lengths, extra)
    with torch.no_grad():
        batch = model(feats, sizes, hotwords)
        for b, size in enumerate(lengths):
            alone = model(feats[b : b + 1, :size], torch.tensor([size]), hotwords)
            tokens = int(alone.token_lengths[0])
            assert int(batch.token_lengths[b]) == tokens
            got = batch.log_probs[b, :tokens]
            torch.testing.assert_close(got, alone.log_probs[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(batch.alphas[b, : size + 1], alone.alphas[0], atol=1e-5, rtol=1e-5)
            assert not batch.alphas[b, size + 1 :].any()
            if alone.us_peaks is not None:
                fine = batch.us_peaks[b, : alone.us_peaks.shape[1]]
                torch.testing.assert_close(fine, alone.us_peaks[0], atol=1e-4, rtol=1e-4)


def test_the_filter_of_seaco_does_not_look_at_batch_mates():
    sizes = {"attention_heads": 2, "linear_units": 24, "num_blocks": 6, "att_layer_num": 6, "kernel_size": 5}
    decoder = {**sizes, "embed": False, "output_layer": False}
    conf = {"inner_dim": WIDTH, "no_bias": 7, "filter_size": 2, "decoder": decoder}
    model = build("seaco", hotword_conf=conf)
    hotwords = [[i, i + 1] for i in range(3, 12)]
    feats, sizes = ragged([40, 25])
    with torch.no_grad():
        batch = model(feats, sizes, hotwords)
        alone = model(feats[1:, :25], sizes[1:], hotwords)
        tokens = int(alone.token_lengths[0])
        torch.testing.assert_close(batch.log_probs[1, :tokens], alone.log_probs[0], atol=1e-5, rtol=1e-5)
        everything = model(feats[1:, :25], sizes[1:], hotwords[:1])
    assert tokens > 0
    assert (everything.log_probs - alone.log_probs).abs().max() > 1e-4


def test_time_stamps_hold_as_many_tokens_as_are_recognised():
    model = build("bicif", predictor_conf={"tail_threshold": 0.0})
    out = model(*ragged([40, 31]))
    torch.testing.assert_close(out.us_alphas.sum(dim=1), out.token_lengths.float(), atol=1e-4, rtol=0)


def test_seaco_may_decode_with_the_entry_for_no_hotword_alone():
    model = build("seaco", hotword_conf={**vars(small_config("seaco").hotword_conf), "no_bias": 99})
    feats, lengths = ragged([40])
    encoder_out, lengths = model.encode(feats, lengths)
    cif = model.predict(encoder_out, lengths)
    hidden = model.decoder.hidden(cif.embeds, cif.token_lengths, encoder_out, lengths)
    states = model.hotword_states([])
    want = model.hotword_logits(cif.embeds, hidden, cif.token_lengths, states).log_softmax(-1)
    torch.testing.assert_close(model.favour(hidden, cif, states), want)


def test_inputs_are_not_changed():
    model = build("seaco")
    feats, sizes = ragged([9, 4])
    before = feats.clone(), sizes.clone()
    model(feats, sizes, [[3, 4]])
    assert torch.equal(feats, before[0])
    assert torch.equal(sizes, before[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_predicted_gives_empty_outputs(variant):
    model = build(variant)
    torch.nn.init.constant_(model.predictor.cif_output.bias, -30.0)
    feats, sizes = ragged([6, 2])
    hotwords = [[3]] if variant in ("contextual", "seaco") else None
    out = model(feats, sizes, hotwords)
    assert out.log_probs.shape == (2, 0, VOCAB)
    assert out.token_lengths.tolist() == [0, 0]


def test_an_item_without_tokens_beside_one_with_tokens():
    model = build()
    feats, sizes = ragged([50, 1])
    out = model(feats, sizes)
    assert int(out.token_lengths[0]) > int(out.token_lengths[1]) == 0
    assert out.log_probs.isfinite().all()


def test_an_item_of_length_zero_leaves_its_batch_mates_alone():
    model = build()
    feats, sizes = ragged([30, 0])
    out, alone = model(feats, sizes), model(feats[:1], sizes[:1])
    torch.testing.assert_close(out.log_probs[:1], alone.log_probs, atol=1e-5, rtol=1e-5)
    assert int(out.token_lengths[1]) == 0
    assert out.log_probs.isfinite().all()


def test_log_probabilities_are_float32_and_normalised_under_autocast():
    model = build()
    feats, sizes = ragged([40])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = model(feats, sizes)
    assert out.log_probs.dtype == torch.float32
    torch.testing.assert_close(out.log_probs.exp().sum(-1), torch.ones(out.log_probs.shape[:2]))


def test_bfloat16_weights_run():
    model = build("bicif").bfloat16()
    feats, sizes = ragged([40, 12])
    with torch.no_grad():
        out = model(feats.bfloat16(), sizes)
    assert out.alphas.dtype == out.log_probs.dtype == torch.float32
    assert out.log_probs.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "features", "conf"),
    [
        ("conformer", 80, {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 1}),
        ("whisper", 80, {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 1}),
    ],
)
def test_other_encoders_and_frame_rates(kind, features, conf):
    model = build(encoder=kind, encoder_conf=conf, input_size=features)
    lengths = torch.tensor([100, 60])
    feats = torch.randn(2, 100, features)
    feats[1, 60:] = 0
    with torch.no_grad():
        out = model(feats, lengths)
        alone = model(feats[1:, :60], lengths[1:])
    assert out.alphas.shape[1] == out.encoder_out.shape[1] + 1
    assert model.frame_stride >= 2
    assert out.encoder_out.shape[1] <= 100 // model.frame_stride + 1
    tokens = int(alone.token_lengths[0])
    assert int(out.token_lengths[1]) == tokens > 0
    torch.testing.assert_close(out.log_probs[1, :tokens], alone.log_probs[0], atol=1e-5, rtol=1e-5)


def test_joint_ctc_head_exists_only_with_a_weight():
    frames = torch.randn(2, 5, WIDTH)
    assert build(ctc_weight=0.3).ctc_logits(frames).shape == (2, 5, VOCAB)
    assert not any(name.startswith("ctc.") for name in build().state_dict())
    with pytest.raises(ConfigError, match="ctc_weight"):
        build().ctc_logits(frames)


@pytest.mark.parametrize("variant", ["paraformer", "bicif"])
def test_hotwords_need_a_hotword_model(variant):
    feats, sizes = ragged([5])
    with pytest.raises(ConfigError, match="takes none"):
        build(variant)(feats, sizes, [[3]])


@pytest.mark.parametrize("variant", ["contextual", "seaco"])
@pytest.mark.parametrize("hotwords", [[[]], [[3, VOCAB]], [[-1]]])
def test_impossible_hotwords_are_refused(variant, hotwords):
    feats, sizes = ragged([40])
    with pytest.raises(ConfigError, match="hotwords"):
        build(variant)(feats, sizes, hotwords)


@pytest.mark.parametrize("variant", ["contextual", "seaco"])
def test_no_hotwords_and_an_empty_list_are_the_same(variant):
    model = build(variant)
    feats, sizes = ragged([40])
    with torch.no_grad():
        assert torch.equal(model(feats, sizes).log_probs, model(feats, sizes, []).log_probs)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"ctc_weight": 1.0}, "ctc_weight"),
        ({"predictor_bias": 2}, "predictor_bias"),
        ({"sampling_ratio": -0.1}, "sampling_ratio"),
        ({"encoder": "lstm"}, "lstm"),
        ({"encoder_conf": {"heads": 3}}, "heads"),
        ({"predictor_conf": {"order": 1}}, "order"),
        ({"decoder_conf": {"embed": False}}, "embed"),
        ({"variant": "bicif", "predictor": "v2"}, "predictor"),
        ({"hotword_conf": {"inner_dim": 99}, "variant": "contextual"}, "inner_dim"),
    ],
)
def test_wrong_configurations_are_named(changes, word):
    with pytest.raises(ConfigError, match=word):
        build(**changes)


def test_a_class_of_another_variant_is_refused():
    with pytest.raises(ConfigError, match="variant"):
        Paraformer(small_config("bicif"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_survives_yaml(variant):
    config = small_config(variant)
    assert from_dict(ParaformerConfig, to_dict(config)) == config


FULL = json.loads((Path(__file__).parent / "golden" / "paraformer" / "full_size.json").read_text())


def full_shapes(entry):
    """Names and shapes; ``{50}`` in a name stands for the numbers 0 to 49."""
    shapes = {}
    for pattern, shape in entry.items():
        if pattern == "parameters":
            continue
        count = re.search(r"\{(\d+)\}", pattern)
        numbers = range(int(count[1])) if count else [None]
        for number in numbers:
            name = pattern if number is None else pattern.replace(count[0], str(number))
            shapes[name] = tuple(shape)
    return shapes


@pytest.mark.parametrize("name", FULL)
def test_released_models_have_the_official_names_and_shapes(name):
    variant = name if name in VARIANTS else "paraformer"
    config = ParaformerConfig(
        vocab_size=10020 if name == "english" else 8404,
        variant=variant,
        predictor="v3" if variant in ("bicif", "seaco") else "v2",
        decoder_conf=SANMDecoderConfig(shift=5 if name == "streaming" else 0),
        hotword_conf=HotwordConfig(),
    )
    with torch.device("meta"):
        model = build_paraformer(config)
    assert compare_shapes(model, full_shapes(FULL[name])) == []
    assert sum(p.numel() for p in model.parameters()) == FULL[name]["parameters"]


@given(st.integers(1, 12), st.integers(0, 4), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_memory_block_equals_a_one_dimensional_convolution(frames, shift, kernel):
    left, right = memory_padding(kernel, shift)
    x, weight = torch.randn(2, frames, 4), torch.randn(4, 1, kernel)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (left, max(right, 0)))[..., : frames + left + right]
    want = torch.nn.functional.conv1d(padded, weight, groups=4).transpose(1, 2) + x
    torch.testing.assert_close(memory_block(x, weight, left, right), want, atol=1e-5, rtol=1e-5)


def test_position_table_grows_and_is_not_saved():
    encoder = SANMEncoder(FEATURES, SANMEncoderConfig(WIDTH, 2, 24, 1))
    first = encoder.embed(torch.zeros(1, 3, FEATURES))
    longer = encoder.embed(torch.zeros(1, 700, FEATURES))
    assert torch.equal(first[0], longer[0, :3])
    assert torch.equal(encoder.embed(torch.zeros(1, 2, FEATURES), start=5)[0], longer[0, 5:7])
    assert not any("table" in name for name in encoder.state_dict())
    assert longer[0, 0, 0].item() == pytest.approx(torch.sin(torch.tensor(1.0)).item())
