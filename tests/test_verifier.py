"""The verifier of a model folder: its files, the transcription with it, words and their times."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nar_speech
from nar_speech.checkpoint import read_weights
from nar_speech.cli import main
from nar_speech.compress import compress, expand
from nar_speech.errors import CheckpointError, ConfigError
from nar_speech.features import FrontendConfig
from nar_speech.hub import import_model, load_parts
from nar_speech.layers.whisper_decoder import WhisperDecoder, WhisperDecoderConfig
from nar_speech.model_folder import add_verifier, check_sums, read_model_file
from nar_speech.pipelines.plot import plot_recognition
from nar_speech.text.realign import as_written, retime
from nar_speech.types import Word
from tests.model_folders import ctc_folder, paraformer_folder
from tests.test_whisper_bpe import SMALL

WHISPER = {"output_size": 32, "attention_heads": 2, "linear_units": 48, "num_blocks": 1, "max_positions": 400}
LOG_MEL = FrontendConfig(kind="log_mel", num_mels=80)


def verifier_parts(seed=4):
    torch.manual_seed(seed)
    config = WhisperDecoderConfig(
        SMALL.vocab_size, size=32, heads=2, linear_units=48, num_blocks=2, max_tokens=60
    )
    decoder = WhisperDecoder(config)
    with torch.no_grad():
        decoder.token_embedding.weight.normal_()
        decoder.positional_embedding.normal_()
    return decoder, config


def make_folder(folder, store="float16", **network):
    conf = {**WHISPER, **network}
    paraformer_folder(folder, frontend=LOG_MEL, encoder="whisper", encoder_conf=conf, input_size=80)
    decoder, config = verifier_parts()
    add_verifier(folder, decoder, config, SMALL, store)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("verified") / "model", branch_blocks=1, branch_stride=2)


@pytest.fixture(scope="module")
def model(folder):
    return nar_speech.load_model(folder)


def noise(seconds, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(round(16000 * seconds))).astype(np.float32)


WAVES = [noise(0.5, 1), noise(2.0, 2), noise(1.2, 3)]


def greedy_texts(model, waves):
    """The verifier's own greedy text, from the trunk of the encoder, one waveform at a time."""
    recognizer = model.recognizer
    texts = []
    for wave in waves:
        with torch.inference_mode():
            memory, lengths = recognizer.network.encoder.trunk(*recognizer.features([wave]))
        found = recognizer.verifier()(memory, lengths, None, [len(wave) / 16000])[0]
        assert found.complete
        texts.append(recognizer.verifier().describe(found, (), 1.0, times=False).text)
    return texts


@pytest.mark.parametrize("decoder", ["paraformer", "ctc_greedy"])
def test_text_is_the_greedy_text_in_batches_and_alone(model, decoder):
    wanted = greedy_texts(model, WAVES)
    assert len(set(wanted)) > 1
    options = {"verify": True, "decoder": decoder}
    assert [t.text for t in model(WAVES, **options)] == wanted
    assert [model(wave, times=False, **options).text for wave in WAVES] == wanted
    plain = [t.text for t in model(WAVES, decoder=decoder)]
    assert [t.text for t in model(WAVES, verify=False, decoder=decoder)] == plain
    assert plain != wanted


def test_words_and_tokens_have_times_and_confidences(model):
    for wave, transcript in zip(WAVES, model(WAVES, verify=True), strict=True):
        segment = transcript.segments[0]
        assert " ".join(word.text for word in segment.words) == " ".join(segment.text.split())
        assert 0 < segment.confidence <= 1
        ends = [0.0]
        for word in segment.words:
            assert 0 <= word.start <= word.end <= len(wave) / 16000 + 1e-6
            assert 0 < word.confidence <= 1
            ends.append(word.end)
        assert ends == sorted(ends)
        assert {token.id for token in segment.tokens} <= set(range(SMALL.vocab_size))


def test_bounded_passes(model):
    recognizer, decoding = model.recognizer, model.decoding_for({"verify": True, "max_passes": 1})
    found = recognizer(WAVES, decoding)
    assert all(item.verified.passes == 1 for item in found)
    unbounded = recognizer(WAVES, model.decoding_for({"verify": True}))
    assert all(item.verified.complete for item in unbounded)
    assert any(not item.verified.complete for item in found)
    with pytest.raises(ConfigError, match="max_passes"):
        model(WAVES[0], verify=True, max_passes=0)


def test_a_plot_of_verified_text(folder, tmp_path):
    """The verifier's tokens are more than the network's: they are no columns of its posteriors."""
    pytest.importorskip("matplotlib")
    plot_recognition(nar_speech.load_model(folder), WAVES[1], tmp_path / "x.png", verify=True)
    assert (tmp_path / "x.png").stat().st_size > 0


def test_a_model_without_verifier_says_so(tmp_path):
    model = nar_speech.load_model(paraformer_folder(tmp_path / "plain"))
    with pytest.raises(ConfigError, match="has no verifier"):
        model(WAVES[0], verify=True)


def test_only_paraformers_take_a_verifier(tmp_path):
    add_verifier(ctc_folder(tmp_path / "ctc"), *verifier_parts(), SMALL)
    with pytest.raises(ConfigError, match="Paraformer"):
        nar_speech.load_model(tmp_path / "ctc")


def test_command_line(folder, tmp_path, capsys):
    import soundfile

    soundfile.write(tmp_path / "a.wav", WAVES[1], 16000)
    words = ["transcribe", str(tmp_path / "a.wav"), "--model", str(folder)]
    assert main([*words, "--verify"]) == 0
    verified = capsys.readouterr().out
    assert verified.split() == greedy_texts(nar_speech.load_model(folder), [WAVES[1]])[0].split()
    assert main([*words, "--no-verify"]) == 0
    assert capsys.readouterr().out != verified
    assert main([*words, "--verify", "--max-passes", "1"]) == 0
    capsys.readouterr()
    assert main([*words, "--verify", "--hotwords", "a"]) == 2
    assert "--hotwords: the verifier writes the text" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_other_dtypes_run(folder, dtype):
    model = nar_speech.load_model(folder, dtype=dtype)
    texts = [t.text for t in model(WAVES, verify=True)]
    assert all(isinstance(text, str) for text in texts)
    linear = [type(part).__name__ for part in model.recognizer.verifier().decoder.modules()]
    assert ("Int8Linear" in linear) == (dtype == "int8")


def test_the_folder_is_whole_and_can_be_imported(folder, tmp_path):
    file = read_model_file(folder)
    assert {"verifier.safetensors", "verifier.json"} <= set(file.sha256)
    check_sums(folder, file.sha256)
    import_model(folder, tmp_path / "copy")
    copy = read_model_file(tmp_path / "copy")
    assert copy.verifier == file.verifier
    check_sums(tmp_path / "copy", copy.sha256)
    assert load_parts(tmp_path / "copy").verifier == file.verifier


def test_the_verifier_is_read_when_it_is_needed(tmp_path):
    folder = make_folder(tmp_path / "model")
    (folder / "verifier.safetensors").unlink()
    model = nar_speech.load_model(folder)
    assert isinstance(model(WAVES[0]).text, str)
    with pytest.raises(CheckpointError, match=r"verifier\.safetensors"):
        model(WAVES[0], verify=True)


def test_compressed_weights(tmp_path):
    folder = make_folder(tmp_path / "model", store="int8")
    stored = read_weights(folder / "verifier.safetensors")
    assert any(tensor.dtype == torch.int8 for tensor in stored.values())
    whole = verifier_parts()[0].state_dict()
    back = expand(stored)
    assert set(back) == set(whole)
    for name, tensor in whole.items():
        bound = tensor.abs().amax(dim=-1, keepdim=True) / 250 if stored[name].dtype == torch.int8 else 2e-3
        assert ((back[name] - tensor).abs() <= bound + 1e-6).all(), name
    assert isinstance(nar_speech.load_model(folder)(WAVES[0], verify=True).text, str)


@given(st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=20, deadline=None)
def test_compression_is_reversible(rows, columns):
    tensors = {"m": torch.randn(rows, columns), "v": torch.randn(rows), "n": torch.arange(rows)}
    tensors["m"][0] = 0
    for kind in ("float16", "int8"):
        back = expand(compress(tensors, kind))
        assert set(back) == set(tensors)
        assert torch.equal(back["n"], tensors["n"])
        torch.testing.assert_close(back["m"], tensors["m"], atol=0.025, rtol=1e-3)
        again = expand(compress(back, kind))  # what was compressed once is not changed again
        torch.testing.assert_close(again["m"], back["m"], atol=1e-6, rtol=1e-6)


TIMED = [Word(t, float(i), i + 0.5, 0.9) for i, t in enumerate(("the", "quick", "brown", "fox"))]


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("The quick, brown fox.", [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5)]),
        ("The quick red fox", [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5)]),
        ("The quick fox", [(0, 0.5), (1, 1.5), (3, 3.5)]),
        ("The quick dark brown fox", [(0, 0.5), (1, 1.5), (1.5, 2), (2, 2.5), (3, 3.5)]),
        ("The fast ones fox", [(0, 0.5), (1, 1.75), (1.75, 2.5), (3, 3.5)]),
        ("The quick brown fox runs", [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.5), (3.5, 5)]),
        ("", []),
    ],
)
def test_times_come_from_the_draft(text, times):
    texts = text.split()
    words = retime(texts, [0.5] * len(texts), TIMED, 5.0)
    assert [word.text for word in words] == texts
    assert [(word.start, word.end) for word in words] == [pytest.approx(pair) for pair in times]


def test_a_word_between_two_without_a_pause_has_some_time():
    timed = [Word("a", 0.0, 1.0, 0.9), Word("b", 1.0, 2.0, 0.9)]
    words = retime(["a", "new", "b"], [0.5] * 3, timed, 2.0)
    assert [(word.start, word.end) for word in words] == [(0.0, 0.5), (0.5, 1.0), (1.0, 2.0)]


def test_written_form_of_a_draft():
    assert as_written("well i think i'm right in paris") == "Well I think I'm right in paris."
    assert as_written("Already written") == "Already written"
    assert as_written("done.") == "done."
    assert as_written("  ") == ""
