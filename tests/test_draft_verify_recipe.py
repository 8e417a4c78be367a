"""Training of the verifier: its inputs and loss, and the recipe that trains it beside a recogniser."""

import gzip
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nar_speech import config as configs
from nar_speech.layers.whisper_decoder import WhisperDecoder, WhisperDecoderConfig
from nar_speech.losses.noisy_prefix import noisy_prefix_ce
from nar_speech.text.whisper_bpe import WhisperBpeTokenizer
from nar_speech.train.recipe import run_recipe
from nar_speech.train.report import read_log
from nar_speech.train.verifier import verifier_tokens
from recipes import draft_verify
from tests.corpus import make_manifest
from tests.test_whisper_bpe import TREE

TOKENIZER = WhisperBpeTokenizer(TREE)
CONFIG = "configs/draft_verify/tiny.yaml"


@given(st.lists(st.one_of(st.none(), st.text(min_size=1, max_size=12)), min_size=1, max_size=4))
@settings(deadline=None)
def test_every_target_is_the_token_after_its_input(written):
    rows, inputs, targets = verifier_tokens(TOKENIZER, written)
    known = [b for b, text in enumerate(written) if text]
    assert rows.tolist() == (known or [0])
    if not known:
        assert (targets == -1).all()
    for row, b in enumerate(known):
        text = TOKENIZER.encode(" " + written[b].strip())
        sequence = [*TOKENIZER.prompt_ids, *text, TOKENIZER.eot]
        assert inputs[row, : len(sequence) - 1].tolist() == sequence[:-1]
        assert targets[row].tolist()[: len(sequence) - 1] == [-1, *sequence[2:]]
        assert (targets[row, len(sequence) - 1 :] == -1).all()


def test_noise_puts_guesses_into_the_text_and_nowhere_else():
    _, inputs, targets = verifier_tokens(TOKENIZER, ["Turn the light on", "Go"])
    guess = inputs.max().item() + 1
    seen = []

    def decode(tokens):
        seen.append(tokens)
        logits = torch.zeros(*tokens.shape, guess + 1, requires_grad=True)
        return logits + torch.nn.functional.one_hot(torch.tensor(guess), guess + 1)

    generator = torch.Generator().manual_seed(0)
    changed = torch.zeros_like(inputs, dtype=torch.bool)
    for _ in range(200):
        noisy_prefix_ce(decode, inputs, targets, 0.9, 0.0, generator)
        clean, noisy = seen[-2:]
        assert torch.equal(clean, inputs)
        assert (noisy[noisy != inputs] == guess).all()
        changed |= noisy != inputs
    lengths = [len(TOKENIZER.encode(" Turn the light on")), len(TOKENIZER.encode(" Go"))]
    for row, length in enumerate(lengths):
        text = range(2, 2 + length)
        assert all(changed[row, place] for place in text)
        assert not changed[row, :2].any()
    count = len(seen)
    noisy_prefix_ce(decode, inputs, targets, 0.0, 0.0, generator)
    assert len(seen) == count + 1  # without noise there is no first pass


def test_loss_is_the_sum_over_tokens_of_an_utterance():
    torch.manual_seed(0)
    decoder = WhisperDecoder(WhisperDecoderConfig(TOKENIZER.vocab_size, 16, 2, 32, 1, 64))
    memory, lengths = torch.randn(2, 5, 16), torch.tensor([5, 3])
    _, inputs, targets = verifier_tokens(TOKENIZER, ["Turn it on", "Stop."])
    generator = torch.Generator().manual_seed(0)
    loss, right = noisy_prefix_ce(lambda t: decoder(t, memory, lengths), inputs, targets, 0.0, 0.0, generator)
    logits = decoder(inputs, memory, lengths)
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-1
    )
    torch.testing.assert_close(loss, wanted / 2)
    assert 0 <= right <= 1


def with_written(path):
    """Give the cuts of a manifest written transcripts, save every third one."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    for number, row in enumerate(rows):
        for part in row["supervisions"]:
            part["custom"] = {"written": part["text"].capitalize() + "."} if number % 3 else {}
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["go left", "stop", "the cat", "a dog ran"]
    TOKENIZER.save(folder)
    return [
        CONFIG,
        f"data.train=[{with_written(make_manifest(folder, 24, texts, 'train'))}]",
        f"data.dev=[{with_written(make_manifest(folder, 5, texts, 'dev'))}]",
        f"verifier.tokenizer={folder / TOKENIZER.FILE}",
    ]


def test_recipe_trains_all_heads_and_resumes(words, tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    run = [*words, f"train.output_dir={tmp_path}/run"]
    for steps in (10, 20):
        code = run_recipe(draft_verify.Recipe, draft_verify.recipe, [*run, f"train.max_steps={steps}"], "doc")
        assert code == 0, capsys.readouterr().err
    assert "resumed from" in capsys.readouterr().err
    rows = [row for row in read_log(tmp_path / "run/train.jsonl") if "loss_ctc" in row]
    for name in ("loss", "loss_ctc", "loss_verifier", "loss_parallel"):
        assert rows[-1][name] < rows[0][name]
    tensors = load_file(tmp_path / "run/final.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"encoder", "ctc", "predictor", "decoder", "verifier"}


def test_the_verifier_starts_from_given_weights_and_can_be_frozen(words, tmp_path):
    first = [*words, f"train.output_dir={tmp_path}/one", "train.max_steps=1"]
    assert run_recipe(draft_verify.Recipe, draft_verify.recipe, first, "doc") == 0
    second = [
        *words,
        f"train.output_dir={tmp_path}/two",
        "train.max_steps=2",
        f"init_verifier.init_from={tmp_path}/one/final.safetensors",
        "init_verifier.prefix={verifier.: ''}",
        "train.optim.freeze=[verifier.]",
        "verifier.weight=0",
    ]
    assert run_recipe(draft_verify.Recipe, draft_verify.recipe, second, "doc") == 0
    one, two = (load_file(tmp_path / run / "final.safetensors") for run in ("one", "two"))
    for name, value in one.items():
        assert torch.equal(value, two[name]) == name.startswith("verifier."), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("verifier.tokenizer=null", "verifier.tokenizer: name a file"),
        ("verifier.tokenizer=nowhere.json", "nowhere.json: can't read the tokenizer"),
        ("network.ctc_weight=0", "draft_verify needs encoder 'whisper' and a ctc_weight above 0"),
        ("verifier.conf.heads=3", "heads: 3 does not divide the size 16"),
    ],
)
def test_mistakes_end_in_one_line(words, tmp_path, capsys, change, message):
    run = [*words, f"train.output_dir={tmp_path}/run", change]
    assert run_recipe(draft_verify.Recipe, draft_verify.recipe, run, "doc") == 2
    assert message in capsys.readouterr().err


def test_the_embedded_configuration_is_valid():
    config = configs.load(draft_verify.Recipe, ["configs/draft_verify/mini_en.yaml"], ["train.output_dir=x"])
    assert config.verifier.weight > 0
