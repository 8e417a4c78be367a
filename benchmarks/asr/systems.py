"""Recognisers of one official Paraformer folder: ours, the funasr package, ONNX Runtime."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.asr import onnx_files
from benchmarks.asr.official import auto_model
from nar_speech.model_folder import DecodingConfig
from nar_speech.models.paraformer import EOS, Paraformer

OFFICIAL = "funasr"
ONNX = "onnxruntime"
OURS = "nar_speech"


class Ours:
    """nar_speech in one dtype."""

    has_text = True

    def __init__(self, folder: Path, dtype: str = "float32"):
        from nar_speech.pipelines.transcribe import Transcriber

        parts = Paraformer.from_official(folder)
        model = Transcriber(*parts, device="cpu", dtype=dtype)
        self.name, self.recognizer, self.tokenizer = f"{OURS} {dtype}", model.recognizer, parts.tokenizer

    def features(self, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, F) and (B,), what every system's network gets."""
        sizes = torch.tensor([len(wave) for wave in waves])
        with torch.inference_mode():
            feats, lengths = self.recognizer.frontend(torch.from_numpy(np.stack(waves)), sizes)
        return feats.clone(), lengths.clone()

    def network(self, feats: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
        with torch.inference_mode():
            out = self.recognizer.network(feats.to(self.recognizer.dtype), lengths)
            return valid_ids(out.log_probs, out.token_lengths)

    def text(self, waves: Sequence[np.ndarray]) -> list[str]:
        found = self.recognizer(waves, DecodingConfig(), times=False)
        return [self.tokenizer.decode(item.ids) for item in found]


class Official:
    """The funasr package: its AutoModel, and the calls that its Paraformer.inference makes."""

    name = OFFICIAL
    has_text = True

    def __init__(self, folder: Path):
        logging.disable(logging.INFO)
        self.auto = auto_model(folder)
        self.model = self.auto.model

    def network(self, feats: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
        with torch.no_grad():  # as its AutoModel does
            # Its encoder scales the features in place: it gets a copy.
            encoded, encoded_lengths = self.model.encode(feats.clone(), lengths)[:2]
            embeds, counts = self.model.calc_predictor(encoded, encoded_lengths)[:2]
            counts = counts.round().long()
            scores = self.model.cal_decoder_with_predictor(encoded, encoded_lengths, embeds, counts)[0]
            return valid_ids(scores, counts)

    def text(self, waves: Sequence[np.ndarray]) -> list[str]:
        results = self.auto.generate(input=list(waves), batch_size=len(waves))
        return [result["text"] for result in results]


class OnnxRuntime:
    """FunASR's export in ONNX Runtime, which has the network only: no features, no text."""

    has_text = False

    def __init__(self, folder: Path, dtype: str):
        import onnxruntime

        onnx_files.make(folder)
        self.name = f"{ONNX} {dtype}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that wait by spinning would be counted as CPU time, and take it from the others' turns.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = str(folder / onnx_files.FILES[dtype])
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def network(self, feats: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
        inputs = {"speech": feats.numpy(), "speech_lengths": lengths.to(torch.int32).numpy()}
        scores, counts = self.session.run(["logits", "token_num"], inputs)
        return valid_ids(torch.from_numpy(scores), torch.from_numpy(counts))


System = Ours | Official | OnnxRuntime


def valid_ids(scores: torch.Tensor, counts: torch.Tensor) -> list[list[int]]:
    """Best token at each valid position, special ids dropped."""
    rows = scores.argmax(-1).tolist()
    return [[i for i in row[:n] if i > EOS] for row, n in zip(rows, counts.tolist(), strict=True)]


def build(name: str, folder: Path) -> System:
    """The system ``name``: "funasr", "onnxruntime DTYPE" or a dtype of ours."""
    if name == OFFICIAL:
        return Official(folder)
    if name.startswith(ONNX):
        return OnnxRuntime(folder, name.split()[1])
    return Ours(folder, name)


def available(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The systems that can run here, and a line for each that can't."""
    kept, skipped = [], []
    for name in names:
        needed = {OFFICIAL: (OFFICIAL,), ONNX: onnx_files.NEEDED}.get(name.split()[0], ())
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            skipped.append(f"{name}: skipped, {', '.join(missing)} not installed; see benchmarks/README.md")
        else:
            kept.append(name)
    return kept, skipped
