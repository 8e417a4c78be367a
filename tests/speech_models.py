"""Models that speak, of random weights, small enough to run whole texts in a test."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

from nar_speech import config as configs
from nar_speech.checkpoint import save_safetensors
from nar_speech.codec.maskgct import DecoderConfig, EncoderConfig, MaskGCTCodec, MaskGCTCodecConfig
from nar_speech.codec.repcodec import RepCodec, RepCodecConfig
from nar_speech.codec.weight_norm import fold
from nar_speech.models.maskgct import S2A, T2S, S2AConfig, T2SConfig
from nar_speech.models.w2vbert import W2vBert
from nar_speech.pipelines.speech_codes import Networks
from nar_speech.pipelines.speech_model import SpeechParts, part_weights
from nar_speech.pipelines.speech_options import SynthesisConfig
from nar_speech.pipelines.synthesize import Synthesizer
from nar_speech.speech_folder import FeaturesConfig, SpeechFile, write_speech_folder
from nar_speech.text.g2p import PhonemizerConfig
from nar_speech.types import Audio, ModelCard, Segment, Transcript, Word

SEMANTIC, CODES, LAYERS, PHONES = 32, 16, 3, 400
CORE = {"width": 32, "num_blocks": 2, "heads": 16, "hidden_scale": 2}  # 16, as all official networks have
W2VBERT = {
    "hidden_size": 16,
    "num_hidden_layers": 18,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "feature_projection_input_dim": 160,
}
QUICK = {"steps": 3, "acoustic_steps": (2, 1), "watermark": False}
CARD = ModelCard(name="tiny", task="synthesize", model="maskgct", sample_rate=24000, languages=("en",))


def loud(network, seed=0):
    """Weights that make up their minds, and that hide no wrong use."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return network.eval().requires_grad_(False)


def tiny_networks() -> Networks:
    """All three Transformers."""
    torch.manual_seed(0)
    sizes = {"codebook_size": CODES, "semantic_size": SEMANTIC}
    return Networks(
        loud(T2S(T2SConfig(**CORE, codebook_size=SEMANTIC, num_phones=PHONES)), 1),
        loud(S2A(S2AConfig(**CORE, **sizes, num_codebooks=1)), 2),
        loud(S2A(S2AConfig(**CORE, **sizes, num_codebooks=LAYERS)), 3),
    )


def tiny_semantic() -> RepCodec:
    """32 codes of 16 values."""
    torch.manual_seed(1)
    sizes = {"codebook_size": SEMANTIC, "hidden_size": 16, "codebook_dim": 4, "vocos_dim": 8}
    return loud(RepCodec(RepCodecConfig(**sizes, vocos_intermediate_dim=12, vocos_num_layers=1)), 4)


def tiny_codec() -> MaskGCTCodec:
    """Three codebooks of 16 codes, 24 kHz, 50 Hz, without any padding, as officially."""
    torch.manual_seed(2)
    encoder = EncoderConfig(d_model=2, out_channels=6)
    sizes = {"vocos_dim": 8, "vocos_intermediate_dim": 12, "vocos_num_layers": 1}
    decoder = DecoderConfig(6, LAYERS, CODES, 4, **sizes)
    return loud(MaskGCTCodec(MaskGCTCodecConfig(encoder, decoder, pad_tail=False)), 5)


def tiny_features() -> W2vBert:
    """17 of 18 layers of 16 values."""
    torch.manual_seed(3)
    statistics = 0.1 * torch.randn(16), 0.5 + torch.rand(16)
    return loud(W2vBert(W2VBERT, statistics=statistics), 6)


def tiny_parts() -> SpeechParts:
    """All of it."""
    codec, semantic = tiny_codec(), tiny_semantic()
    fold(codec)
    fold(semantic)
    style = PhonemizerConfig(language="en")
    return SpeechParts(tiny_networks(), tiny_features(), semantic, codec, style, CARD, Path("tiny"))


class Hearing:
    """A transcriber that always hears the same words, evenly spread."""

    def __init__(self, text: str = "one two three four"):
        self.text, self.calls = text, 0

    def __call__(self, audio: Audio, **_) -> Transcript:
        self.calls += 1
        length, words = audio.duration, self.text.split()
        size = length / max(len(words), 1)
        found = tuple(Word(w, i * size + 0.02, (i + 1) * size - 0.02, 1.0) for i, w in enumerate(words))
        return Transcript(self.text, (Segment(self.text, 0.0, length, 1.0, found),), length)


@cache
def tiny_synthesizer() -> Synthesizer:
    """Ready to speak."""
    parts = tiny_parts()
    parts.prepare(torch.device("cpu"), "float32")
    return Synthesizer(parts, SynthesisConfig(**QUICK), Hearing())


def speech(seconds: float = 1.0, rate: int = 24000, seed: int = 0) -> Audio:
    """What could be a voice: a gliding tone with noise, in bursts."""
    generator, time = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (120 + 40 * seed + 30 * time) * time) * (0.6 + 0.4 * np.sin(9 * time))
    return Audio((0.3 * tone + 0.01 * generator.standard_normal(len(time))).astype(np.float32), rate)


def write_official(folder: Path) -> SpeechParts:
    """A folder with the layout of amphion/MaskGCT and of w2v-BERT inside; what is in it."""
    networks, semantic, codec = tiny_networks(), tiny_semantic(), tiny_codec()
    full = W2vBert(W2VBERT, 18)
    loud(full, 6)
    files = {
        "t2s_model": networks.t2s,
        "s2a_model/s2a_model_1layer": networks.first,
        "s2a_model/s2a_model_full": networks.full,
        "semantic_codec": semantic,
        "acoustic_codec": codec.encoder,
        "w2v-bert-2.0": full.model,
    }
    for name, network in files.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        tensors = dict(network.state_dict())
        if name.startswith("s2a"):
            tensors["diff_estimator.embed_tokens.weight"] = torch.zeros(0, 8)
        save_safetensors(folder / name / "model.safetensors", tensors)
    save_safetensors(folder / "acoustic_codec" / "model_1.safetensors", codec.decoder)
    config = W2VBERT | {"model_type": "wav2vec2-bert"}
    (folder / "w2v-bert-2.0" / "config.json").write_text(json.dumps(config))
    mean, variance = tiny_features().mean, tiny_features().variance
    torch.save({"mean": mean, "var": variance}, folder / "wav2vec2bert_stats.pt")
    fold(codec)
    fold(semantic)
    features = W2vBert(W2VBERT, statistics=(mean, variance)).eval()
    features.model.load_state_dict(
        {n: t for n, t in full.model.state_dict().items() if not n.startswith("encoder.layers.17.")}
    )
    return SpeechParts(networks, features, semantic, codec, PhonemizerConfig(), CARD, folder)


def write_own(folder: Path, codec: Path, features: Path, store="float32") -> SpeechParts:
    """A folder of ours with the codec and w2v-BERT of an official one copied into it; what is in it."""
    parts = tiny_parts()
    file = SpeechFile(
        card=CARD,
        t2s=configs.to_dict(parts.networks.t2s.config),
        s2a_first=configs.to_dict(parts.networks.first.config),
        s2a_full=configs.to_dict(parts.networks.full.config),
        semantic=configs.to_dict(parts.semantic.config),
        features=FeaturesConfig(source=str(features)),
        codec=str(codec),
        phonemizer=parts.phonemizer,
        synthesis={"steps": 4, "acoustic_steps": [2, 1], "watermark": False},
    )
    write_speech_folder(folder, part_weights(parts.modules(), parts.features), file, store)
    return parts
