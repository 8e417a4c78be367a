"""Official FunASR folders: a made-up small one in the official layout, and everything that can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nar_speech.config import read_yaml, write_yaml
from nar_speech.errors import CheckpointError, ConfigError, InputError
from nar_speech.models import MODELS
from nar_speech.models.paraformer import Paraformer
from nar_speech.models.paraformer_official import convert_config, predictor_conf

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "paraformer"
CASES = {
    "offline_small": "Paraformer",
    "bicif": "BiCifParaformer",
    "contextual": "ContextualParaformer",
    "seaco": "SeacoParaformer",
}


def official_tree(case, stack):
    """A config.yaml as FunASR writes it, for the recorded small model."""
    meta = json.loads((GOLDEN / case / "meta.json").read_text())
    conf = dict(meta["config"])
    model_conf = dict(conf["model_conf"])
    tree = {
        "model": CASES[case],
        "encoder": "SANMEncoder",
        "encoder_conf": conf["encoder_conf"] | {"pos_enc_class": "SinusoidalPositionEncoder"},
        "decoder": conf.get("decoder", "ParaformerSANMDecoder"),
        "decoder_conf": conf["decoder_conf"],
        "predictor": conf.get("predictor", "CifPredictorV2"),
        "predictor_conf": conf["predictor_conf"],
        "frontend": "WavFrontend",
        "frontend_conf": {
            "fs": 16000,
            "window": "hamming",
            "n_mels": conf["input_size"] // stack,
            "frame_length": 25,
            "frame_shift": 10,
            "lfr_m": stack,
            "lfr_n": 6,
            "dither": 0.0,
        },
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {"unk_symbol": "<unk>", "split_with_space": True},
        "specaug": "SpecAugLFR",
        "train_conf": {"accum_grad": 1},
    }
    if "seaco_decoder_conf" in model_conf:  # the released yaml has it at the top
        tree["seaco_decoder"] = model_conf.pop("seaco_decoder")
        tree["seaco_decoder_conf"] = model_conf.pop("seaco_decoder_conf")
    return tree | {"model_conf": model_conf}, conf


@pytest.fixture
def make(tmp_path):
    def build(case="offline_small", names=None, wrap=None, tokens="tokens.json"):
        names = {"weights": "model.pt", "config": "config.yaml", "cmvn": "am.mvn", **(names or {})}
        tree, conf = official_tree(case, 7)
        size, vocab = conf["input_size"], conf["vocab_size"]
        write_yaml(tree, tmp_path / names["config"])
        weights = load_file(GOLDEN / case / "weights.safetensors")
        torch.save({wrap: weights} if wrap else weights, tmp_path / names["weights"])
        values = " ".join(["0.5"] * size)
        (tmp_path / names["cmvn"]).write_text(
            f"<Nnet>\n<Splice> {size} {size}\n[ 0 ]\n"
            f"<AddShift> {size} {size}\n<LearnRateCoef> 0 [ {values} ]\n"
            f"<Rescale> {size} {size}\n<LearnRateCoef> 0 [ {values} ]\n</Nnet>\n"
        )
        pieces = ["<blank>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(vocab - 4)), "<unk>"]
        if tokens == "tokens.json":
            (tmp_path / tokens).write_text(json.dumps(pieces, ensure_ascii=False), encoding="utf-8")
        else:
            (tmp_path / tokens).write_text("\n".join(pieces), encoding="utf-8")
        (tmp_path / "seg_dict").write_text("hello hel@@ lo\n")
        return tmp_path

    return build


@pytest.mark.parametrize("case", CASES)
def test_an_official_folder_gives_the_recorded_numbers(make, case):
    network, frontend, tokenizer, card = MODELS["paraformer"].from_official(make(case))
    io = load_file(GOLDEN / case / "io.safetensors")
    assert not network.training
    assert network.config.variant in CASES[case].lower()
    assert tokenizer.vocab_size == network.config.vocab_size
    assert frontend.feature_size == network.config.input_size
    assert frontend.frame_shift == pytest.approx(0.06)
    assert (card.model, card.sample_rate) == ("paraformer", 16000)
    with torch.no_grad():
        encoder_out, _ = network.encode(io["speech"], io["speech_lengths"])
    torch.testing.assert_close(encoder_out, io["encoder_out"], atol=2e-5, rtol=1e-4)


def test_sound_to_text_runs_end_to_end(make):
    network, frontend, tokenizer, _ = Paraformer.from_official(make())
    waves = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    feats, lengths = frontend(waves, torch.tensor([16000]))
    with torch.no_grad():
        out = network(feats, lengths)
    ids = out.log_probs[0, : int(out.token_lengths[0])].argmax(-1).tolist()
    assert isinstance(tokenizer.decode([i for i in ids if i > 2]), str)


@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "model"])
def test_wrapped_weights_and_older_names(make, wrap):
    folder = make(names={"weights": "model.pb"}, wrap=wrap, tokens="tokens.txt")
    assert isinstance(Paraformer.from_official(folder).network, Paraformer)


def test_configuration_json_may_rename_files(make):
    folder = make(names={"weights": "am.pt", "config": "finetune.yaml", "cmvn": "stats.mvn"})
    metas = {
        "init_param": "am.pt",
        "config": "finetune.yaml",
        "tokenizer_conf": {"token_list": "tokens.json", "seg_dict_file": "seg_dict"},
        "frontend_conf": {"cmvn_file": "stats.mvn"},
    }
    (folder / "configuration.json").write_text(json.dumps({"file_path_metas": metas}))
    parts = Paraformer.from_official(folder)
    assert parts.frontend.config.cmvn == "stats.mvn"


def test_file_names_must_stay_inside_the_folder(make):
    folder = make()
    (folder.parent / "outside.pt").write_bytes(b"x")
    (folder / "configuration.json").write_text(
        json.dumps({"file_path_metas": {"init_param": "../outside.pt"}})
    )
    with pytest.raises(ConfigError, match="outside the model folder"):
        Paraformer.from_official(folder)


@pytest.mark.parametrize(
    ("missing", "word"),
    [
        ("model.pt", "weights"),
        ("am.mvn", "am.mvn"),
        ("tokens.json", "tokens"),
        ("config.yaml", "config.yaml"),
    ],
)
def test_a_missing_file_is_named(make, missing, word):
    folder = make()
    (folder / missing).unlink()
    with pytest.raises(InputError, match=word):
        Paraformer.from_official(folder)


def test_a_folder_that_is_not_there():
    with pytest.raises(CheckpointError, match="no such model folder"):
        Paraformer.from_official("/nowhere/at/all")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": "UniASR"}, "UniASR"),
        ({"encoder": "BranchformerEncoder"}, "BranchformerEncoder"),
        ({"decoder": "ParaformerDecoderSAN"}, "ParaformerDecoderSAN"),
        ({"predictor": "CifPredictorV9"}, "CifPredictorV9"),
        ({"frontend": "WhisperFrontend"}, "WhisperFrontend"),
        ({"tokenizer": "HuggingfaceTokenizer"}, "HuggingfaceTokenizer"),
        ({"encoder_conf": {"new_option": 1, "input_layer": "pe"}}, "new_option"),
        ({"encoder_conf": {"normalize_before": False, "input_layer": "pe"}}, "normalize_before"),
        ({"encoder_conf": {"output_size": 32, "input_layer": "pe"}}, "model.pt"),
        ({"decoder_conf": {"concat_after": True}}, "concat_after"),
        ({"predictor": "CifPredictor", "predictor_conf": {"threshold": 0.9}}, "threshold"),
        ({"frontend_conf": {"n_mels": 20, "lfr_m": 7, "lfr_n": 6, "upsacle": 1}}, "upsacle"),
        ({"encoder_conf": [1, 2]}, "encoder_conf"),
    ],
)
def test_what_has_no_counterpart_is_named(make, change, word):
    folder = make()
    tree = read_yaml(folder / "config.yaml")
    write_yaml(tree | change, folder / "config.yaml")
    with pytest.raises(InputError, match=word):
        Paraformer.from_official(folder)


def test_weights_with_other_names_are_refused(make):
    folder = make()
    weights = torch.load(folder / "model.pt", weights_only=True)
    weights["encoder.extra.weight"] = weights.pop("decoder.after_norm.weight")
    torch.save(weights, folder / "model.pt")
    with pytest.raises(CheckpointError, match=r"decoder\.after_norm\.weight"):
        Paraformer.from_official(folder)


def test_defaults_of_missing_keys_are_the_official_ones():
    tree, _ = official_tree("offline_small", 7)
    tree |= {
        "encoder_conf": {"input_layer": "pe"},
        "decoder_conf": {},
        "model_conf": {},
        "predictor_conf": {},
    }
    config = convert_config(tree, 140, 60)
    assert (config.encoder_conf["output_size"], config.encoder_conf["num_blocks"]) == (256, 6)
    assert (config.decoder_conf.kernel_size, config.decoder_conf.att_layer_num) == (21, 6)
    assert (config.ctc_weight, config.predictor_bias, config.sampling_ratio) == (0.5, 0, 0.2)
    assert config.predictor_conf.tail_threshold == 0.0


def test_the_tail_mask_of_v3_is_ignored_as_in_the_official_code():
    assert predictor_conf("CifPredictorV3", {"tail_mask": False}).get("tail_mask", True)
    assert predictor_conf("CifPredictorV2", {"tail_mask": False})["tail_mask"] is False
