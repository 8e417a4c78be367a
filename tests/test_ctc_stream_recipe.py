"""Training of CTC models for streams: chunks are drawn, validated under, and kept in the model folder."""

from pathlib import Path

import pytest
import torch

from nar_speech import hub, load_model
from nar_speech.errors import ConfigError
from nar_speech.model_folder import StreamConfig, read_model_file
from nar_speech.models.ctc_stream import CtcStream
from nar_speech.search.ctc_stream import GreedyStream
from nar_speech.train.recipe import run_recipe
from nar_speech.train.report import read_log
from recipes import ctc
from tests.corpus import make_manifest
from tests.test_conformer import make_encoder

ROOT = Path(__file__).parent.parent
TEXTS = ["Go left", "stop", "the cat", "a dog ran"]
CONFORMER = "causal", "use_dynamic_chunk", "use_dynamic_left_chunk"
RUNS = {
    "fastconformer": ["tiny_online"],
    "conformer": [
        "tiny",
        *(f"network.encoder_conf.{key}=true" for key in CONFORMER),
        "network.encoder_conf.cnn_module_norm=layer_norm",
        "stream.chunk_size=4",
        "stream.left=8",
    ],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return [
        f"data.train=[{make_manifest(folder, 24, TEXTS, 'train')}]",
        f"data.dev=[{make_manifest(folder, 5, TEXTS, 'dev')}]",
    ]


@pytest.mark.parametrize("kind", RUNS)
def test_recipe_trains_a_model_that_hears_streams(kind, corpus, tmp_path):
    config, *words = RUNS[kind]
    torch.set_num_threads(1)
    words = [str(ROOT / f"configs/ctc/{config}.yaml"), *corpus, *words, f"train.output_dir={tmp_path}/run"]
    assert run_recipe(ctc.Recipe, ctc.recipe, [*words, "train.max_steps=12"], "doc") == 0
    first = {r["step"]: r["loss"] for r in read_log(tmp_path / "run/train.jsonl") if "loss" in r}
    words += ["train.metric=stream_wer", "train.max_steps=24"]
    assert run_recipe(ctc.Recipe, ctc.recipe, words, "doc") == 0
    losses = {r["step"]: r["loss"] for r in read_log(tmp_path / "run/train.jsonl") if "loss" in r}
    assert {step: losses[step] for step in first} == first  # goes on with the chunks that would have come
    folder = tmp_path / "run/model"
    chunks = {"fastconformer": StreamConfig(4, 16), "conformer": StreamConfig(4, 8)}[kind]
    assert read_model_file(folder).stream == chunks
    metrics = read_model_file(folder).card.metrics
    assert metrics["loss"] < losses[1]
    assert {"wer", "stream_wer"} <= metrics.keys()

    clip = str(Path(corpus[0].split("[")[1]).parent / "train-000.wav")
    assert isinstance(load_model(str(folder), device="cpu")(clip).text, str)
    model = hub.load_parts(folder)
    stream = CtcStream(model.network, model.frontend, model.network.chunking(4, 8))
    audio = 0.1 * torch.randn(1, max(stream.first, stream.chunk))
    state, search = stream.init_state(1), GreedyStream(model.network.config.blank)
    for size, final in ((stream.first, False), (stream.chunk, False), (100, True)):
        frames, state = stream.step(audio, torch.tensor([size]), torch.tensor([final]), state)
        count = int(frames.counts[0])
        search.push(frames.values[0, :count].numpy(), frames.symbols[0, :count].numpy())
    assert search.frames >= 8
    assert isinstance(model.tokenizer.decode(search.tokens), str)


def test_an_encoder_that_looks_ahead_can_not_be_validated_in_streams(corpus, tmp_path, capsys):
    config = str(ROOT / "configs/ctc/tiny_online.yaml")
    words = [
        config,
        *corpus,
        f"train.output_dir={tmp_path}/run",
        "network.encoder_conf.causal_downsampling=false",
    ]
    assert run_recipe(ctc.Recipe, ctc.recipe, words, "doc") == 2
    assert "causal_downsampling, conv_context_size: only an encoder" in capsys.readouterr().err


def test_dynamic_chunks_are_drawn_in_training_only():
    encoder = make_encoder(causal=True, use_dynamic_chunk=True, use_dynamic_left_chunk=True)
    assert encoder._policy(60, -1) == (0, -1)
    encoder.train()
    torch.manual_seed(0)
    drawn = [encoder._policy(60, -1) for _ in range(1000)]
    chunks = {chunk for chunk, _ in drawn}
    assert 60 in chunks  # full context, about every second time
    assert chunks - {60} == set(range(1, 26))
    assert all(left <= (60 - 1) // chunk for chunk, left in drawn)
    assert {left for chunk, left in drawn if chunk == 60} == {-1}
    assert len({left for chunk, left in drawn if chunk < 20}) > 5


def test_masks_of_streams_by_name():
    conformer = make_encoder(causal=True)
    assert conformer.stream_mask(conformer.chunking(4, 12)) == {"chunk_size": 4, "left_chunks": 3}
    assert conformer.stream_mask(conformer.chunking(4, -1)) == {"chunk_size": 4, "left_chunks": -1}
    with pytest.raises(ConfigError, match="causal"):
        make_encoder(causal=False).chunking(4)
