"""Tiny model folders with random weights, for tests of everything around the networks."""

from __future__ import annotations

import json
import string
import tarfile
from pathlib import Path

import torch
import yaml

from nar_speech import config as configs
from nar_speech.features import FrontendConfig
from nar_speech.model_folder import write_model_folder
from nar_speech.models.ctc import CtcConfig, CtcModel
from nar_speech.models.paraformer import ParaformerConfig, build_paraformer
from nar_speech.models.paraformer_official import convert_config
from nar_speech.models.sensevoice import SenseVoice
from nar_speech.models.sensevoice import convert_config as convert_sensevoice
from nar_speech.spectrum import slaney_mel_matrix
from nar_speech.text.tokenizer import CharTokenizer, train_bpe
from nar_speech.types import ModelCard

PIECES = ["<blank>", "<s>", "</s>", "<unk>", "<space>", *string.ascii_lowercase]
SANM = {"output_size": 32, "attention_heads": 2, "linear_units": 48, "num_blocks": 2, "dropout": 0.0}
DECODER = {
    "attention_heads": 2,
    "linear_units": 48,
    "num_blocks": 2,
    "att_layer_num": 2,
    "kernel_size": 5,
    "dropout": 0.0,
}
CONFORMER = {"output_size": 32, "attention_heads": 2, "linear_units": 48, "num_blocks": 2}
LFR = FrontendConfig(kind="fbank", window="hamming", num_mels=20, lfr_m=7, lfr_n=6)


def paraformer_folder(
    folder: Path,
    seed: int = 0,
    decoding: dict | None = None,
    frontend: FrontendConfig = LFR,
    **network: object,
) -> Path:
    """A Paraformer with a CTC head; ``network`` replaces keys of its configuration."""
    tokenizer = CharTokenizer(PIECES, case="lower")
    tree = {
        "input_size": frontend.num_mels * frontend.lfr_m,
        "vocab_size": tokenizer.vocab_size,
        "encoder_conf": SANM,
        "predictor_conf": {"tail_threshold": 0.45},
        "decoder_conf": DECODER,
        "ctc_weight": 0.3,
        **network,
    }
    config = configs.from_dict(ParaformerConfig, tree)
    torch.manual_seed(seed)
    model = build_paraformer(config)
    return write_model_folder(folder, model, _card("paraformer"), frontend, config, tokenizer, decoding)


def ctc_folder(folder: Path, seed: int = 0, decoding: dict | None = None, **network: object) -> Path:
    """A WeNet type conformer with a CTC head and an attention decoder."""
    tokenizer = CharTokenizer(PIECES, case="lower")
    frontend = FrontendConfig(kind="fbank", num_mels=20)
    tree = {
        "input_size": 20,
        "vocab_size": tokenizer.vocab_size,
        "encoder_conf": CONFORMER,
        "decoder": "transformer",
        "decoder_conf": {"attention_heads": 2, "linear_units": 48, "num_blocks": 1},
        **network,
    }
    config = configs.from_dict(CtcConfig, tree)
    torch.manual_seed(seed)
    model = CtcModel(config)
    return write_model_folder(folder, model, _card("ctc"), frontend, config, tokenizer, decoding)


def stream_folders(base: Path) -> dict[str, Path]:
    """Models that hear streams, ``ctc`` and ``paraformer``, and one that does not, ``offline``."""
    causal = {**CONFORMER, "causal": True, "use_dynamic_chunk": True}
    return {
        "ctc": ctc_folder(base / "ctc", encoder_conf=causal),
        "paraformer": paraformer_folder(base / "paraformer", stream={"chunk": [5, 10, 5]}, predictor="v2"),
        "offline": ctc_folder(base / "offline"),
    }


def funasr_folder(folder: Path, seed: int = 0) -> Path:
    """A Paraformer as FunASR lays it out: config.yaml, model.pt, tokens.json, am.mvn."""
    folder.mkdir(parents=True)
    encoder = {
        "output_size": 32,
        "attention_heads": 2,
        "linear_units": 48,
        "num_blocks": 2,
        "input_layer": "pe",
    }
    tree = {
        "model": "Paraformer",
        "model_conf": {"ctc_weight": 0.0, "predictor_bias": 1, "sampling_ratio": 0.75},
        "encoder": "SANMEncoder",
        "encoder_conf": {**encoder, "kernel_size": 5, "selfattention_layer_type": "sanm"},
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": {"attention_heads": 2, "linear_units": 48, "num_blocks": 2, "att_layer_num": 2},
        "predictor": "CifPredictorV2",
        "predictor_conf": {"idim": 32, "threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.45},
        "frontend": "WavFrontend",
        "frontend_conf": {"fs": 16000, "window": "hamming", "n_mels": 20, "lfr_m": 7, "lfr_n": 6},
        "tokenizer": "CharTokenizer",
    }
    configs.write_yaml(tree, folder / "config.yaml")
    torch.manual_seed(seed)
    network = build_paraformer(convert_config(tree, 140, len(PIECES)))
    torch.save({"state_dict": network.state_dict()}, folder / "model.pt")
    (folder / "tokens.json").write_text(json.dumps(PIECES))
    _write_mvn(folder)
    return folder


def sensevoice_folder(folder: Path, seed: int = 0) -> Path:
    """A SenseVoice as FunASR lays it out; the vocabulary has letters and a few of its tags."""
    folder.mkdir(parents=True)
    encoder = {"output_size": 32, "attention_heads": 2, "linear_units": 48, "num_blocks": 2, "tp_blocks": 1}
    tree = {
        "model": "SenseVoiceSmall",
        "model_conf": {"length_normalized_loss": True},
        "encoder": "SenseVoiceEncoderSmall",
        "encoder_conf": {**encoder, "input_layer": "pe", "kernel_size": 5},
        "frontend": "WavFrontend",
        "frontend_conf": {"fs": 16000, "window": "hamming", "n_mels": 20, "lfr_m": 7, "lfr_n": 6},
        "tokenizer": "SentencepiecesTokenizer",
    }
    configs.write_yaml(tree, folder / "config.yaml")
    tokenizer = train_bpe([" ".join(string.ascii_lowercase)], 32, folder / "tiny.bpe.model")
    torch.manual_seed(seed)
    network = SenseVoice(convert_sensevoice(tree, 140, tokenizer.vocab_size))
    torch.save(network.state_dict(), folder / "model.pt")
    _write_mvn(folder)
    return folder


def _write_mvn(folder: Path) -> None:
    values = " ".join(["0.1"] * 140)
    sections = [f"<{name}> 140 140\n<LearnRateCoef> 0 [ {values} ]\n" for name in ("AddShift", "Rescale")]
    (folder / "am.mvn").write_text(f"<Nnet>\n<Splice> 140 140\n[ 0 ]\n{''.join(sections)}</Nnet>\n")


def wenet_folder(folder: Path, seed: int = 0) -> Path:
    """A conformer as WeNet lays it out: train.yaml, final.pt, units.txt."""
    folder.mkdir(parents=True)
    decoder = {"attention_heads": 2, "linear_units": 48, "num_blocks": 1}
    tree = {
        "model": "asr_model",
        "encoder": "conformer",
        "encoder_conf": CONFORMER,
        "decoder": "transformer",
        "decoder_conf": decoder,
        "dataset_conf": {"fbank_conf": {"num_mel_bins": 20, "frame_shift": 10, "frame_length": 25}},
        "tokenizer": "char",
        "input_dim": 20,
    }
    configs.write_yaml(tree, folder / "train.yaml")
    torch.manual_seed(seed)
    config = CtcConfig(20, len(PIECES), encoder_conf=CONFORMER, decoder="transformer", decoder_conf=decoder)
    torch.save(CtcModel(config).state_dict(), folder / "final.pt")
    (folder / "units.txt").write_text("".join(f"{piece} {i}\n" for i, piece in enumerate(PIECES)))
    return folder


FASTCONFORMER = {
    "n_layers": 2,
    "d_model": 32,
    "subsampling": "dw_striding",
    "subsampling_factor": 4,
    "subsampling_conv_channels": 8,
    "causal_downsampling": True,
    "ff_expansion_factor": 2,
    "n_heads": 2,
    "att_context_size": [[8, 3], [8, 0]],
    "att_context_style": "chunked_limited",
    "conv_kernel_size": 5,
    "conv_norm_type": "layer_norm",
    "conv_context_size": "causal",
}


def nemo_files(folder: Path, seed: int = 0, **changes: object) -> Path:
    """The unpacked files of a hybrid model of NeMo; ``changes`` replaces sections of its configuration."""
    folder.mkdir(parents=True)
    texts = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 4
    tokenizer = train_bpe(texts, 40, folder / "0a1b_tokenizer.model")
    size = tokenizer.vocab_size
    tree = {
        "sample_rate": 16000,
        "train_ds": {"manifest_filepath": "???", "sample_rate": "${model.sample_rate}"},
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": "${sample_rate}",
            "normalize": "NA",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": 20,
            "n_fft": 512,
            "frame_splicing": 1,
            "dither": 0.00001,
            "pad_to": 0,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            "feat_in": "${preprocessor.features}",
            "feat_out": -1,
            "self_attention_model": "rel_pos",
            "pos_emb_max_len": 5000,
            **FASTCONFORMER,
        },
        "decoder": {"_target_": "nemo.collections.asr.modules.RNNTDecoder", "vocab_size": size},
        "aux_ctc": {"decoder": {"num_classes": size, "vocabulary": tokenizer.pieces(range(size))}},
        "tokenizer": {"dir": "/somewhere/else", "type": "bpe", "model_path": "nemo:0a1b_tokenizer.model"},
        **changes,
    }
    (folder / "model_config.yaml").write_text(yaml.safe_dump(tree))
    torch.manual_seed(seed)
    model = CtcModel(CtcConfig(20, size + 1, "fastconformer", FASTCONFORMER, blank=size))
    tensors = model.state_dict()
    head = {f"ctc_decoder.decoder_layers.0.{n}": tensors.pop(f"ctc.ctc_lo.{n}") for n in ("weight", "bias")}
    head["ctc_decoder.decoder_layers.0.weight"].unsqueeze_(2)
    mel = slaney_mel_matrix(20, 512, 16000, 0.0, 8000.0).float()[None]
    others = {
        "decoder.prediction.embed.weight": torch.zeros(size + 1, 4),
        "joint.enc.weight": torch.zeros(4, 32),
        "preprocessor.featurizer.fb": mel,
        "preprocessor.featurizer.window": torch.hann_window(400, periodic=False),
    }
    torch.save({**tensors, **head, **others}, folder / "model_weights.ckpt")
    return folder


def nemo_file(path: Path, seed: int = 0, mode: str = "w", **changes: object) -> Path:
    """The same as a ``.nemo`` archive, ``path`` with this ending."""
    folder = nemo_files(path.with_name(path.name + "_files"), seed, **changes)
    path = path.with_name(path.name + ".nemo")
    with tarfile.open(path, mode) as archive:
        archive.add(folder, arcname=".")
    return path


def _card(model: str) -> ModelCard:
    return ModelCard(name=f"tiny_{model}", task="transcribe", model=model, languages=("en",), licence="test")
