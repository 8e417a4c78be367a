"""CTC losses and models: conventions, InterCTC, self-conditioning, decoders, official folders, full sizes."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from nar_speech.checkpoint import compare_shapes, rename_tensors
from nar_speech.errors import CheckpointError, ConfigError, InputError
from nar_speech.layers.conformer import ConformerEncoderConfig
from nar_speech.losses.ctc import ctc_loss, fits, interctc_loss, required_frames
from nar_speech.losses.label_smoothing import label_smoothed_ce
from nar_speech.models import MODELS
from nar_speech.models.ctc import CtcConfig, CtcModel, ctc_model_loss
from nar_speech.models.ctc_decoder import decoder_inputs, reverse_tokens
from nar_speech.models.ctc_official import RENAME
from nar_speech.models.sensevoice import SenseVoice, SenseVoiceConfig, sensevoice_loss
from nar_speech.text.tokenizer import train_bpe

GOLDEN = Path(__file__).parent / "golden"
ENCODER = {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 3}


def make_model(**changes) -> CtcModel:
    torch.manual_seed(0)
    conf = {**ENCODER, "cnn_module_kernel": 5, "cnn_module_norm": "layer_norm"}
    values = {"input_size": 20, "vocab_size": 11, "encoder_conf": conf, **changes}
    return CtcModel(CtcConfig(**values)).eval()


BOTH = {"decoder": "bitransformer", "decoder_conf": {"linear_units": 24, "num_blocks": 2, "r_num_blocks": 1}}


def make_batch(vocabulary=11):
    feats, lengths = torch.randn(3, 66, 20), torch.tensor([66, 51, 33])
    tokens = torch.randint(1, vocabulary, (3, 4))
    token_lengths = torch.tensor([4, 2, 1])
    tokens = tokens.masked_fill(torch.arange(4) >= token_lengths[:, None], -1)
    return feats, lengths, tokens, token_lengths


# --- losses


def test_reductions_are_those_of_the_toolkits():
    _, _, targets, target_lengths = make_batch()
    log_probs, lengths = torch.randn(3, 12, 11).log_softmax(-1), torch.tensor([12, 9, 5])
    each = ctc_loss(log_probs, lengths, targets, target_lengths, reduction="none")
    torch_mean = F.ctc_loss(log_probs.transpose(0, 1), targets.clamp(min=0), lengths, target_lengths)
    assert each.shape == (3,)
    for reduction, want in {
        "sum": each.sum(),
        "batch_mean": each.sum() / 3,
        "mean_volume": each.sum() / 7,
        "token_mean": torch_mean,
    }.items():
        got = ctc_loss(log_probs, lengths, targets, target_lengths, reduction=reduction)
        assert torch.allclose(got, want, atol=1e-6), reduction
    with pytest.raises(ConfigError, match="reduction: got 'mean'"):
        ctc_loss(log_probs, lengths, targets, target_lengths, reduction="mean")


def test_loss_is_float32_and_padding_does_not_matter():
    log_probs, lengths = torch.randn(2, 9, 5).log_softmax(-1), torch.tensor([9, 6])
    targets, target_lengths = torch.tensor([[1, 2, 2], [3, -1, -1]]), torch.tensor([3, 1])
    loss = ctc_loss(log_probs.bfloat16(), lengths, targets, target_lengths)
    assert loss.dtype == torch.float32
    each = ctc_loss(log_probs, lengths, targets, target_lengths, reduction="none")
    alone = ctc_loss(log_probs[1:, :6], lengths[1:], targets[1:, :1], target_lengths[1:], reduction="none")
    assert torch.allclose(each[1:], alone, atol=1e-6)


def test_what_does_not_fit_has_zero_loss_or_infinite():
    log_probs = torch.randn(2, 3, 5).log_softmax(-1).requires_grad_()
    lengths, targets, target_lengths = (
        torch.tensor([3, 3]),
        torch.tensor([[1, 1], [1, 2]]),
        torch.tensor([2, 2]),
    )
    short = torch.tensor([2, 3])
    assert required_frames(targets, target_lengths).tolist() == [3, 2]
    assert fits(lengths, targets, target_lengths).tolist() == [True, True]
    assert fits(short, targets, target_lengths).tolist() == [False, True]
    each = ctc_loss(log_probs, short, targets, target_lengths, reduction="none")
    assert each[0] == 0
    assert each[1] > 0
    each.sum().backward()
    assert torch.isfinite(log_probs.grad).all()
    infinite = ctc_loss(log_probs, short, targets, target_lengths, reduction="none", zero_infinity=False)
    assert infinite[0] == math.inf
    nothing = torch.zeros(2, 0, 5)
    none = torch.tensor([0, 0])
    assert ctc_loss(nothing, none, targets, torch.tensor([0, 1]), reduction="none").tolist() == [0.0, 0.0]
    left = ctc_loss(nothing, none, targets, torch.tensor([0, 1]), reduction="none", zero_infinity=False)
    assert left.tolist() == [0.0, math.inf]


@given(st.lists(st.integers(1, 3), min_size=0, max_size=5), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_fits_exactly_when_the_loss_is_finite(target, frames):
    targets, size = torch.tensor([[*target, 0]]), torch.tensor([len(target)])
    log_probs, lengths = torch.zeros(1, frames, 4).log_softmax(-1), torch.tensor([frames])
    loss = ctc_loss(log_probs, lengths, targets, size, reduction="sum", zero_infinity=False)
    assert bool(fits(lengths, targets, size)) == math.isfinite(loss.item())


def test_intermediate_weight():
    last, middle = torch.tensor(2.0), [torch.tensor(4.0), torch.tensor(8.0)]
    assert interctc_loss(last, middle, 0.25).item() == pytest.approx(0.75 * 2 + 0.25 * 6)
    assert interctc_loss(last, [], 0.25) is last


def test_label_smoothing_is_a_divergence():
    logits, targets = torch.randn(2, 3, 7), torch.tensor([[1, 2, -1], [6, -1, -1]])
    smooth = torch.full((2, 3, 7), 0.1 / 6).scatter(2, targets.clamp(min=0).unsqueeze(2), 0.9)
    each = F.kl_div(logits.log_softmax(-1), smooth, reduction="none").sum(-1)[targets >= 0]
    assert torch.allclose(label_smoothed_ce(logits, targets, 0.1), each.mean(), atol=1e-6)
    assert torch.allclose(label_smoothed_ce(logits, targets, 0.1, False), each.sum() / 2, atol=1e-6)
    plain = F.cross_entropy(logits[targets >= 0], targets[targets >= 0])
    assert torch.allclose(label_smoothed_ce(logits, targets, 0.0), plain, atol=1e-6)


# --- model


@pytest.mark.parametrize("changes", [{}, {"interctc_layers": (1, 2), "self_conditioning": True}, BOTH])
@torch.no_grad()
def test_batch_equals_single(changes):
    model = make_model(**changes)
    feats, lengths, _, _ = make_batch()
    together = model(feats, lengths)
    assert together.log_probs.dtype == torch.float32
    assert torch.allclose(together.log_probs.exp().sum(-1), torch.ones(1), atol=1e-5)
    for row, frames in enumerate(lengths.tolist()):
        alone = model(feats[row : row + 1, :frames], lengths[row : row + 1])
        size = int(alone.lengths)
        assert torch.allclose(together.log_probs[row, :size], alone.log_probs[0], atol=1e-5)
        assert len(alone.intermediate) == len(changes.get("interctc_layers", ()))
    encoded, out_lengths = model.encode(feats, lengths)
    assert torch.equal(encoded, together.encoder_out)
    assert torch.equal(out_lengths, together.lengths)


@given(st.integers(1, 40))
@settings(deadline=None, max_examples=15)
def test_any_length_gives_a_loss(frames):
    model = make_model(**BOTH)
    out = model(torch.randn(1, frames, 20), torch.tensor([frames]))
    assert out.log_probs.shape == (1, max(0, (frames - 3) // 4), 11)
    loss = ctc_model_loss(
        model, torch.randn(1, frames, 20), torch.tensor([frames]), torch.tensor([[3]]), torch.tensor([1])
    )
    assert torch.isfinite(loss["loss"])


@pytest.mark.parametrize("kind", ["conformer", "sanm", "whisper"])
def test_intermediate_predictions_with_every_encoder(kind):
    model = make_model(encoder=kind, encoder_conf=ENCODER, interctc_layers=(1, 2), self_conditioning=True)
    feats, lengths, tokens, token_lengths = make_batch()
    out = model(feats, lengths)
    assert [p.shape for p in out.intermediate] == [out.log_probs.shape] * 2
    terms = ctc_model_loss(model.train(), feats, lengths, tokens, token_lengths)
    terms["loss"].backward()
    assert model.conditioning_layer.weight.grad.abs().sum() > 0
    assert not terms["loss_ctc"].requires_grad


def test_intermediate_loss_is_that_of_the_layers():
    model = make_model(interctc_layers=(2,), interctc_weight=0.4)
    feats, lengths, tokens, token_lengths = make_batch()
    out = model(feats, lengths)
    last, middle = (
        ctc_loss(p, out.lengths, tokens, token_lengths) for p in (out.log_probs, out.intermediate[0])
    )
    terms = ctc_model_loss(model, feats, lengths, tokens, token_lengths)
    assert torch.allclose(terms["loss"], 0.6 * last + 0.4 * middle)
    assert torch.allclose(terms["loss_interctc"], middle)


def test_conditioning_adds_the_projected_prediction():
    torch.manual_seed(3)
    model = make_model(interctc_layers=(3,), self_conditioning=True)  # after the last layer: easy to follow
    feats, lengths, _, _ = make_batch()
    raw = {}
    handle = model.encoder.encoders[2].register_forward_hook(lambda m, i, y: raw.update(y=y))
    out = model(feats, lengths)
    handle.remove()
    p = model.ctc(model.encoder.after_norm(raw["y"]))
    assert torch.allclose(p, out.intermediate[0])
    want = model.encoder.after_norm(raw["y"] + model.conditioning_layer(p.exp()))
    size = int(out.lengths[1])
    assert torch.allclose(out.encoder_out[1, :size], want[1, :size], atol=1e-6)


@torch.no_grad()
def test_decoders_see_neither_padding_nor_the_future():
    model = make_model(**BOTH)
    encoder_out, lengths = torch.randn(2, 9, 16), torch.tensor([9, 5])
    tokens, token_lengths = torch.tensor([[3, 4, 5], [6, 7, -1]]), torch.tensor([3, 2])
    left, right = model.decode_tokens(encoder_out, lengths, tokens.clamp(min=0), token_lengths)
    assert left.shape == right.shape == (2, 4, 11)
    alone = model.decode_tokens(encoder_out[1:, :5], lengths[1:], tokens[1:, :2], token_lengths[1:])
    assert torch.allclose(left[1, :3], alone[0][0], atol=1e-5)
    assert torch.allclose(right[1, :3], alone[1][0], atol=1e-5)
    changed = tokens.clone()
    changed[0, 2] = 9
    after, _ = model.decode_tokens(encoder_out, lengths, changed, token_lengths)
    assert torch.allclose(after[0, :3], left[0, :3], atol=1e-6)
    assert not torch.allclose(after[0, 3], left[0, 3], atol=1e-3)


def test_decoder_inputs_and_reversal():
    tokens, lengths = torch.tensor([[3, 4, 5], [6, -1, -1], [-1, -1, -1]]), torch.tensor([3, 1, 0])
    inputs, targets = decoder_inputs(tokens, lengths, 1, 2)
    assert inputs.tolist() == [[1, 3, 4, 5], [1, 6, 2, 2], [1, 2, 2, 2]]
    assert targets.tolist() == [[3, 4, 5, 2], [6, 2, -1, -1], [2, -1, -1, -1]]
    assert reverse_tokens(tokens, lengths).tolist() == [[5, 4, 3], [6, -1, -1], [-1, -1, -1]]


def test_a_model_without_decoder_says_so():
    with pytest.raises(ConfigError, match="no attention decoder"):
        make_model().decode_tokens(
            torch.zeros(1, 2, 16), torch.tensor([2]), torch.ones(1, 1).long(), torch.tensor([1])
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blank": 11}, "blank: 11"),
        ({"self_conditioning": True}, "interctc_layers"),
        ({"reverse_weight": 0.3}, "reverse_weight"),
        ({"decoder": "bitransformer"}, "r_num_blocks"),
        ({"interctc_layers": (4,)}, "interctc_layers: layer 4"),
        ({"encoder": "rnn"}, "unknown kind 'rnn'"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_model(**changes)


def test_training_learns_a_small_text():
    conf = {**ENCODER, "num_blocks": 2, "cnn_module_kernel": 5, "cnn_module_norm": "layer_norm"}
    conf |= {"dropout_rate": 0.0, "positional_dropout_rate": 0.0}
    model = make_model(encoder_conf=conf, interctc_layers=(1,), self_conditioning=True).train()
    feats, lengths, tokens, token_lengths = make_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(ctc_model_loss(model, feats, lengths, tokens, token_lengths)["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# --- official names and folders


def full_size(name):
    entry = json.loads((GOLDEN / "ctc" / "full_size.json").read_text())[name]
    tensors = {}
    for key, shape in entry["tensors"].items():
        count = re.search(r"\{(\d+)\}", key)
        for index in range(int(count[1]) if count else 1):
            tensors[re.sub(r"\{\d+\}", str(index), key)] = tuple(shape)
    return entry, tensors


@pytest.mark.parametrize("name", ["aishell_u2pp", "wenetspeech_u2pp"])
def test_full_size_wenet_names_and_shapes(name):
    entry, tensors = full_size(name)
    conf = entry["config"]
    encoder = {k: v for k, v in conf.items() if k in ConformerEncoderConfig.__dataclass_fields__}
    decoder = {
        "attention_heads": conf["attention_heads"],
        "linear_units": conf["dec_units"],
        "num_blocks": conf["dec_layers"],
        "r_num_blocks": conf["r_layers"],
    }
    config = CtcConfig(
        conf["input_size"],
        conf["vocab"],
        encoder_conf={**encoder, "global_cmvn": True},
        decoder="bitransformer",
        decoder_conf=decoder,
    )
    with torch.device("meta"):
        model = CtcModel(config)
    assert compare_shapes(model, rename_tensors(tensors, RENAME)) == []


def test_full_size_sensevoice_names_and_shapes():
    entry, tensors = full_size("sensevoice")
    with torch.device("meta"):
        model = SenseVoice()
    assert compare_shapes(model, tensors) == []
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]


def test_models_are_registered():
    assert MODELS["ctc"] is CtcModel
    assert MODELS["sensevoice"] is SenseVoice


@pytest.fixture
def wenet_folder(tmp_path):
    """The official layout around the recorded small weights, and the recorded tensors."""
    case = GOLDEN / "ctc" / "wenet_u2pp_small"
    conf = json.loads((case / "meta.json").read_text())["config"]
    own = {"input_size", "vocab", "dec_layers", "r_layers", "dec_units"}
    tree = {
        "encoder": "conformer",
        "encoder_conf": {
            **{k: v for k, v in conf.items() if k not in own},
            "use_dynamic_chunk": True,
            "use_sdpa": False,
        },
        "decoder": "bitransformer",
        "decoder_conf": {
            "linear_units": 40, "num_blocks": 2, "r_num_blocks": 2, "src_attention_dropout_rate": 0.1,
        },
        "tokenizer": "char",
        "tokenizer_conf": {
            "symbol_table_path": "data/dict/lang_char.txt", "special_tokens": {"<sos>": 2, "<eos>": 2},
        },
        "ctc": "ctc",
        "ctc_conf": {"ctc_blank_id": 0},
        "cmvn": "global_cmvn",
        "cmvn_conf": {"cmvn_file": "data/train/global_cmvn", "is_json_cmvn": True},
        "model": "asr_model",
        "model_conf": {
            "ctc_weight": 0.3, "lsm_weight": 0.1, "reverse_weight": 0.3, "length_normalized_loss": False,
        },
        "dataset": "asr",
        "dataset_conf": {
            "fbank_conf": {"num_mel_bins": 20, "frame_shift": 10, "frame_length": 25, "dither": 1.0},
        },
        "input_dim": 20,
        "output_dim": 21,
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tree))
    units = ["<blank>", "<unk>", "<sos/eos>", *"一二三四五六七八九十百千万上下左右天"]
    (tmp_path / "units.txt").write_text("".join(f"{piece} {i}\n" for i, piece in enumerate(units)))
    weights = load_file(case / "weights.safetensors")
    torch.save(weights, tmp_path / "final.pt")
    return tmp_path, weights, load_file(case / "io.safetensors"), tree


@torch.no_grad()
def test_wenet_folder(wenet_folder):
    folder, _, io, _ = wenet_folder
    network, frontend, tokenizer, card = CtcModel.from_official(folder)
    assert not network.training
    assert (network.sos, network.eos) == (2, 2)
    assert frontend.feature_size == 20
    assert frontend.config.window == "povey"
    assert frontend.config.dither == 0.0
    assert tokenizer.decode([3, 4, 5]) == "一二三"
    assert (card.model, card.task, card.sample_rate) == ("ctc", "transcribe", 16000)
    out = network(io["feats"], io["feat_lens"])
    valid = io["enc_mask"].squeeze(1)
    assert torch.allclose(out.log_probs[valid], io["ctc_full"][valid], atol=2e-5, rtol=1e-4)
    feats, lengths = frontend(0.1 * torch.randn(2, 9000), torch.tensor([9000, 5000]))
    assert network(feats, lengths).log_probs.shape[2] == tokenizer.vocab_size


@torch.no_grad()
def test_wenet_folder_with_cmvn_in_its_file(wenet_folder):
    folder, weights, io, _ = wenet_folder
    mean, istd = weights["encoder.global_cmvn.mean"].double(), weights["encoder.global_cmvn.istd"].double()
    count = 1000
    stats = {
        "mean_stat": (mean * count).tolist(),
        "var_stat": ((istd**-2 + mean**2) * count).tolist(),
        "frame_num": count,
    }
    (folder / "global_cmvn").write_text(json.dumps(stats))
    torch.save({k: v for k, v in weights.items() if "cmvn" not in k}, folder / "avg_30.pt")
    (folder / "final.pt").unlink()
    network = CtcModel.from_official(folder).network
    out = network(io["feats"], io["feat_lens"])
    valid = io["enc_mask"].squeeze(1)
    assert torch.allclose(out.log_probs[valid], io["ctc_full"][valid], atol=1e-4, rtol=1e-3)


def test_wenet_folder_errors(wenet_folder, tmp_path):
    folder, weights, _, tree = wenet_folder

    def write(**changes):
        (folder / "train.yaml").write_text(yaml.safe_dump({**tree, **changes}))

    with pytest.raises(CheckpointError, match="no such model folder"):
        CtcModel.from_official(folder / "missing")
    for changes, message in (
        ({"model": "transducer"}, "model 'transducer' is not supported"),
        ({"encoder": "squeezeformer"}, "encoder 'squeezeformer' is not supported"),
        ({"encoder_conf": {**tree["encoder_conf"], "cnn_kernel": 3}}, "unknown key 'cnn_kernel'"),
        ({"encoder_conf": {**tree["encoder_conf"], "layer_norm_type": "rms_norm"}}, "layer_norm_type"),
        ({"input_dim": 24}, "global_cmvn.mean is 20 in the file, 24 in the model"),
        (
            {"dataset_conf": {"fbank_conf": {"num_mel_bins": 24}}},
            "input_dim is 20, fbank_conf.num_mel_bins 24",
        ),
    ):
        write(**changes)
        with pytest.raises((ConfigError, CheckpointError), match=message):
            CtcModel.from_official(folder)
    write()
    (folder / "units.txt").write_text("<blank> 0\n<unk> 1\n")
    with pytest.raises(ConfigError, match="2 tokens, the weights 21"):
        CtcModel.from_official(folder)
    (folder / "units.txt").unlink()
    with pytest.raises(ConfigError, match=r"units\.txt is missing"):
        CtcModel.from_official(folder)
    name = "encoder.encoders.0.norm_ff.weight"
    torch.save({k: v for k, v in weights.items() if k != name}, folder / "final.pt")
    with pytest.raises(CheckpointError, match=name):
        CtcModel.from_official(folder)
    (folder / "final.pt").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        CtcModel.from_official(folder)


# --- SenseVoice


def small_sensevoice(**changes) -> SenseVoice:
    torch.manual_seed(0)
    conf = {"output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2, "tp_blocks": 1}
    tables = {"language_tokens": {5: 3, 6: 4}, "textnorm_tokens": {7: 14, 8: 15}}
    values = {"input_size": 14, "vocab_size": 20, "encoder_conf": conf, **tables, **changes}
    return SenseVoice(SenseVoiceConfig(**values)).eval()


@torch.no_grad()
def test_sensevoice_prompts_per_utterance():
    model = small_sensevoice()
    feats, lengths = torch.randn(3, 20, 14), torch.tensor([20, 1, 12])
    names, norms = ["zh", "auto", "ko"], ["withitn", "woitn", "woitn"]
    together = model(feats, lengths, names, norms)
    assert together.lengths.tolist() == [24, 5, 16]
    for row, frames in enumerate(lengths.tolist()):
        alone = model(feats[row : row + 1, :frames], lengths[row : row + 1], names[row], norms[row])
        assert torch.allclose(together.log_probs[row, : frames + 4], alone.log_probs[0], atol=1e-5)
    assert not torch.allclose(model(feats, lengths, "zh").log_probs, model(feats, lengths, "en").log_probs)
    with pytest.raises(InputError, match="language: unknown value 'de'"):
        model(feats, lengths, "de")
    with pytest.raises(InputError, match="textnorm: got 1 names for 3"):
        model(feats, lengths, "zh", ["woitn"])


def test_sensevoice_training_hides_the_language_sometimes():
    model = small_sensevoice()
    feats, lengths = torch.randn(2, 20, 14), torch.tensor([20, 16])
    tokens = torch.tensor([[5, 9, 10, 7, 11, 12], [6, 9, 10, 8, 13, -1]])
    token_lengths = torch.tensor([6, 5])

    def loss(draws):
        return sensevoice_loss(model, feats, lengths, tokens, token_lengths, torch.tensor(draws))["loss"]

    with torch.no_grad():
        shown, hidden, half = loss([0.9, 0.9]), loss([0.1, 0.2]), loss([0.9, 0.1])
        auto = model(feats, lengths, "auto", ["withitn", "woitn"])
    want = ctc_loss(auto.log_probs[:, 4:], lengths, tokens[:, 4:], token_lengths - 4)
    want = want + label_smoothed_ce(auto.log_probs[:, :4], tokens[:, :4], 0.1)
    assert torch.allclose(hidden, want, atol=1e-5)
    assert len({round(x.item(), 5) for x in (shown, hidden, half)}) == 3
    first = [
        sensevoice_loss(
            model, feats, lengths, tokens, token_lengths, generator=torch.Generator().manual_seed(4)
        )
        for _ in range(2)
    ]
    assert first[0]["loss"] == first[1]["loss"]
    wrong = tokens.clone()
    wrong[1, 3] = 9
    with pytest.raises(InputError, match="fourth token of utterance 1 is 9"):
        sensevoice_loss(model, feats, lengths, wrong, token_lengths)


@pytest.fixture
def sensevoice_folder(tmp_path):
    """The official layout around the recorded small weights."""
    case = GOLDEN / "paraformer" / "sensevoice"
    conf = json.loads((case / "meta.json").read_text())["config"]
    tree = {
        "model": "SenseVoiceSmall",
        "model_conf": {"length_normalized_loss": True, "sos": 1, "eos": 2, "ignore_id": -1},
        "encoder": "SenseVoiceEncoderSmall",
        "encoder_conf": conf["encoder_conf"],
        "tokenizer": "SentencepiecesTokenizer",
        "tokenizer_conf": {"bpemodel": None, "unk_symbol": "<unk>", "split_with_space": True},
        "frontend": "WavFrontend",
        "frontend_conf": {
            "fs": 16000, "window": "hamming", "n_mels": 12, "frame_length": 25, "frame_shift": 10,
            "lfr_m": 7, "lfr_n": 6, "cmvn_file": None,
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    texts = [
        "the quick brown fox jumps over the lazy dog " * 3,
        "pack my box with five dozen liquor jugs",
        "hello",
    ]
    train_bpe(texts, conf["vocab_size"], tmp_path / "chn_jpn_yue_eng_ko_spectok.bpe.model")
    zeros, ones = " ".join(["0"] * 84), " ".join(["1"] * 84)
    (tmp_path / "am.mvn").write_text(
        f"<Nnet>\n<Splice> 84 84\n[ 0 ]\n<AddShift> 84 84\n<LearnRateCoef> 0 [ {zeros} ]\n"
        f"<Rescale> 84 84\n<LearnRateCoef> 0 [ {ones} ]\n</Nnet>\n"
    )
    torch.save({"state_dict": load_file(case / "weights.safetensors")}, tmp_path / "model.pt")
    return tmp_path, load_file(case / "io.safetensors")


@torch.no_grad()
def test_sensevoice_folder(sensevoice_folder):
    folder, io = sensevoice_folder
    network, frontend, tokenizer, card = SenseVoice.from_official(folder)
    assert (card.model, frontend.feature_size, tokenizer.vocab_size) == ("sensevoice", 84, 70)
    out = network(io["speech"], io["speech_lengths"], "zh", "woitn")
    for row, size in enumerate(out.lengths.tolist()):
        want = io["zh_woitn_log_probs"][row, :size]
        assert torch.allclose(out.log_probs[row, :size], want, atol=2e-5, rtol=1e-4)
    assert network.config.encoder_conf["norm_eps"] == 1e-5


def test_sensevoice_folder_errors(sensevoice_folder, tmp_path):
    folder, _ = sensevoice_folder
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("copy"))
    (copy / "chn_jpn_yue_eng_ko_spectok.bpe.model").unlink()
    with pytest.raises(ConfigError, match="sentencepiece"):
        SenseVoice.from_official(copy)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "model": "SenseVoiceLarge"}))
    with pytest.raises(ConfigError, match="SenseVoiceLarge"):
        SenseVoice.from_official(folder)
