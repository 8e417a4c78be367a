"""Text encoders: states, masks, limits, and what is missing."""

import importlib.util
import json
import sys

import pytest
import torch

from nar_speech.errors import CheckpointError, ConfigError, HubError, InputError, MissingExtraError
from nar_speech.text import conditioner as module
from nar_speech.text.conditioner import (
    SENTENCE_PACKAGE,
    ConditionerConfig,
    SentenceConditioner,
    T5Conditioner,
    load_conditioner,
)

here = importlib.util.find_spec(SENTENCE_PACKAGE) is not None
needs_package = pytest.mark.skipif(not here, reason="the extra 'sound' is not installed")
VOCABULARY = ["<pad>", "</s>", "<unk>", "a", "dog", "bark", "rain", "s"]


def write_tokenizer(folder, bert):
    """A fast tokenizer over a few words in transformers' layout."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[SEP]", "[UNK]", *VOCABULARY[3:], "[CLS]"] if bert else VOCABULARY
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "[CLS] $A [SEP]" if bert else "$A </s>"
    special = [(w, words.index(w)) for w in (("[CLS]", "[SEP]") if bert else ("</s>",))]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": words[0], "unk_token": words[2]} | ({} if bert else {"eos_token": "</s>"})
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random T5 and a tiny random BERT."""
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    t5, bert = tmp_path_factory.mktemp("t5"), tmp_path_factory.mktemp("bert")
    config = T5Config(vocab_size=8, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(t5)
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    BertModel(config).save_pretrained(bert)
    write_tokenizer(t5, False)
    write_tokenizer(bert, True)
    return {"t5": t5, "sentence": bert}


@pytest.fixture(params=["t5", "sentence"])
def encoder(request, folders):
    return load_conditioner(ConditionerConfig(request.param, str(folders[request.param])))


def test_states_masks_and_width(encoder):
    texts = ["a dog bark s", "", "rain", "   "]
    states, mask = encoder(texts)
    ends = {12: 1, 8: 2}[encoder.width]  # T5 has an end token, BERT a beginning and an end
    assert states.shape == (4, 4 + ends, encoder.width)
    assert states.dtype == torch.float32
    assert mask.sum(1).tolist() == [4 + ends, 0, 1 + ends, 0]
    assert not states[~mask].any()
    assert bool((mask[:, 1:] <= mask[:, :-1]).all()), "tokens come first"


def test_a_text_is_encoded_as_it_would_be_alone(encoder):
    states, mask = encoder(["a dog bark s", "rain"])
    for row, text in enumerate(["a dog bark s", "rain"]):
        single, _ = encoder([text])
        assert torch.equal(states[row][mask[row]], single[0])
        ids = torch.tensor([encoder.tokens(text)])
        torch.testing.assert_close(encoder.network(input_ids=ids).last_hidden_state.detach(), single)


def test_the_network_runs_once_for_a_text(encoder, monkeypatch):
    calls = []
    original = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda ids: calls.append(1) or original(ids))
    encoder(["a dog", "a dog", "rain"])
    encoder(["rain", "a dog"])
    assert len(calls) == 2
    monkeypatch.setattr(module, "KEPT", 2)
    encoder(["s"])
    encoder(["a dog"])
    encoder(["rain"])
    assert len(calls) == 4, "what was used longest ago was forgotten"


def test_a_text_that_is_too_long_is_named(encoder):
    encoder.max_tokens = 6
    encoder.check("a dog")
    with pytest.raises(InputError, match="takes; shorten it"):
        encoder(["rain", "a dog bark s rain rain rain"])


@pytest.mark.parametrize("texts", [[], "a dog"])
def test_only_lists_of_texts(encoder, texts):
    with pytest.raises(InputError, match="list"):
        encoder(texts)


def test_an_all_empty_batch_has_one_masked_state(encoder):
    states, mask = encoder(["", ""])
    assert states.shape == (2, 1, encoder.width)
    assert not mask.any()


def test_wrong_folders_are_named(folders, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        T5Conditioner(tmp_path)
    with pytest.raises(CheckpointError, match="expected a 't5'"):
        T5Conditioner(folders["sentence"])
    with pytest.raises(CheckpointError, match="expected a 'bert'"):
        SentenceConditioner(folders["t5"])
    (tmp_path / "config.json").write_text((folders["t5"] / "config.json").read_text())
    write_tokenizer(tmp_path, False)
    with pytest.raises(CheckpointError, match="can't be loaded"):
        T5Conditioner(tmp_path)
    with pytest.raises(ConfigError, match="positions for 12"):
        SentenceConditioner(folders["sentence"], max_tokens=13)
    for wrong in ({"name": ""}, {"max_tokens": 0}):
        with pytest.raises(ConfigError):
            ConditionerConfig(**wrong)


def test_an_encoder_of_the_hub_is_looked_for_where_it_should_be(monkeypatch):
    import transformers

    asked = []

    def nothing(source, **options):
        asked.append((source, options))
        raise OSError("no such thing")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", nothing)
    monkeypatch.setenv("NAR_SPEECH_CACHE", "all")
    config = ConditionerConfig("t5", "google-t5/t5-base")
    for place in ((), ("mine", True)):
        with pytest.raises(HubError, match="google-t5/t5-base"):
            load_conditioner(config, None, *place)
    assert asked == [
        ("google-t5/t5-base", {"cache_dir": "all"}),
        ("google-t5/t5-base", {"cache_dir": "mine", "local_files_only": True}),
    ]


def test_a_folder_inside_the_model_folder_comes_first(folders):
    found = load_conditioner(ConditionerConfig("t5", folders["t5"].name), folders["t5"].parent)
    assert found.width == 12


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(module, "SENTENCE_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(MissingExtraError, match=r"nar-speech\[sound\]"):
        SentenceConditioner("no_such_package_anywhere")


@needs_package
def test_the_packaged_sentence_encoder():
    encoder = SentenceConditioner()
    assert (encoder.width, encoder.max_tokens) == (384, 256)
    states, mask = encoder(["a dog barks", "a dog barking", "a symphony orchestra"])
    mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    mean = torch.nn.functional.normalize(mean, dim=-1)
    assert float(mean[0] @ mean[1]) > 0.8 > float(mean[0] @ mean[2])
    assert not {"sentence_transformers", SENTENCE_PACKAGE} & sys.modules.keys(), "only its files are read"
