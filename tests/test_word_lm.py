"""The word language model in the CTC beam: against enumeration, in the pipeline, and what can go wrong."""

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nar_speech
from nar_speech import cli, hub, inspection
from nar_speech.checkpoint import save_safetensors
from nar_speech.errors import ConfigError
from nar_speech.model_folder import DecodingConfig, change_model_decoding, check_sums, read_model_file
from nar_speech.pipelines.language_model import PRIOR_NAME, LanguageModels
from nar_speech.search.ctc import ContextGraph, prefix_beam
from nar_speech.search.prior import divide_by_prior, label_prior
from nar_speech.search.word_lm import Lexicon, TokenLm, WordLm, word_lexicon
from nar_speech.text.arpa import write_arpa
from nar_speech.text.kneser_ney import choose_vocabulary, estimate
from nar_speech.text.tokenizer import CharTokenizer
from tests.model_folders import ctc_folder, paraformer_folder
from tests.test_search_ctc import all_sequences

MARK = "\u2581"
# Blank, and pieces that cut the words below in several ways.
PIECES = ["<blank>", f"{MARK}a", f"{MARK}", "b", "a", f"{MARK}ab", "ab"]
TEXT = ("ab a", "ab ab aba", "a b", "aba ab", "b a ab", "a ab ab", "ab b b", "c ab a c")


@functools.cache
def make_lm(order=3, text=TEXT):
    return estimate(text, choose_vocabulary(Counter(" ".join(text).split())), order)


def words_of(tokens, pieces=PIECES):
    return "".join(pieces[t] for t in tokens).replace(MARK, " ").split()


def lm_score(lm, words, weight, bonus, unknown):
    """The score as the docstring of WordLm has it, word by word."""
    state, total = np.array([lm.start]), 0.0
    for word in words:
        number = lm.ids.get(word, lm.unknown)
        score, state = lm.step(state, np.array([number]))
        total += weight * score[0] + bonus + (unknown * len(word) if number == lm.unknown else 0.0)
    return total + weight * lm.step(state, np.array([lm.end]))[0][0]


def random_log_probs(seed, frames, size, sharpness=1.5):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(1, frames, size, generator=generator)).log_softmax(-1)


@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.floats(0.0, 2.0),
    st.floats(-2.0, 2.0),
    st.floats(-3.0, 0.0),
    st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_wide_beam_finds_every_sequence_with_its_score(seed, frames, weight, bonus, unknown, order):
    log_probs = random_log_probs(seed, frames, len(PIECES))
    lm = make_lm(order)
    scorer = WordLm(lm, word_lexicon(lm, PIECES), weight, bonus, unknown)
    acoustic = all_sequences(log_probs[0])
    got = prefix_beam(
        log_probs,
        torch.tensor([frames]),
        len(acoustic),
        candidates=len(PIECES),
        lm=scorer,
        lm_weight=1.0,
    )[0]
    assert {h.tokens for h in got} == set(acoustic)
    for h in got:
        want = lm_score(lm, words_of(h.tokens), weight, bonus, unknown)
        assert h.lm_score == pytest.approx(want, abs=1e-6), h.tokens
        assert h.score == pytest.approx(acoustic[h.tokens] + want, abs=1e-5)
    best = max(acoustic, key=lambda t: acoustic[t] + lm_score(lm, words_of(t), weight, bonus, unknown))
    assert got[0].score == pytest.approx(
        acoustic[best] + lm_score(lm, words_of(best), weight, bonus, unknown), abs=1e-5
    )


def test_a_narrow_beam_is_nearly_as_good():
    """Against a beam that keeps far more."""
    lm = make_lm()
    scorer = WordLm(lm, word_lexicon(lm, PIECES), 0.7, 0.5, -1.0)
    log_probs = torch.cat([random_log_probs(seed, 10, len(PIECES), 3.0) for seed in range(20)])
    lengths = torch.full((20,), 10)
    wide, narrow = (
        [row[0].score for row in prefix_beam(log_probs, lengths, beam, lm=scorer, lm_weight=1.0, **options)]
        for beam, options in ((150, {"candidates": 7}), (12, {"candidates": 7, "floor": 9.0}))
    )
    # Where both beams find the same text, the wide one sums over a few more paths.
    gaps = np.array(wide) - np.array(narrow)
    assert gaps.min() > -1e-6
    assert np.median(gaps) < 0.02
    assert (gaps < 0.1).sum() >= 16


@pytest.mark.parametrize("options", [{}, {"floor": 4.0}, {"floor": 3.0, "blank_skip": 0.5}])
def test_batch_is_single_and_context_adds(options):
    lm = make_lm()
    scorer = WordLm(lm, word_lexicon(lm, PIECES), 0.6, 0.3, -0.8)
    lengths = torch.tensor([9, 4, 12])
    log_probs = torch.cat([random_log_probs(i, 12, len(PIECES), 2.0) for i in range(3)])
    context = ContextGraph([[5, 4]], 1.5)
    together = prefix_beam(
        log_probs, lengths, 6, candidates=5, context=context, lm=scorer, lm_weight=1.0, **options
    )
    for row, length in enumerate(lengths.tolist()):
        alone = prefix_beam(
            log_probs[row : row + 1, :length],
            lengths[row : row + 1],
            6,
            candidates=5,
            context=context,
            lm=scorer,
            lm_weight=1.0,
            **options,
        )[0]
        assert [h.tokens for h in alone] == [h.tokens for h in together[row]]
        assert [h.score for h in alone] == pytest.approx([h.score for h in together[row]], abs=1e-9)
        for h in alone:
            assert h.lm_score == pytest.approx(lm_score(lm, words_of(h.tokens), 0.6, 0.3, -0.8), abs=1e-6)
    assert any(h.context_score > 0 for row in together for h in row)


def test_recombination_makes_the_beam_reach_further():
    lm = make_lm()
    scorer = WordLm(lm, word_lexicon(lm, PIECES), 0.7, 0.5, -1.0)
    log_probs = torch.cat([random_log_probs(seed, 30, len(PIECES), 2.0) for seed in range(12)])
    lengths = torch.tensor([30, 25, 20] * 4)
    options = {"candidates": 7, "lm": scorer, "lm_weight": 1.0}

    def best(beam, **more):
        lists = prefix_beam(log_probs, lengths, beam, **options, **more)
        return np.array([row[0].score for row in lists])

    plain, recombined, wide = best(6), best(6, recombine=True), best(60)
    assert (recombined - plain).mean() > 0
    assert recombined.mean() > plain.mean() + 0.3 * (wide - plain).mean()
    single = prefix_beam(log_probs[1:2, :25], lengths[1:2], 6, recombine=True, **options)[0][0]
    assert single.score == pytest.approx(recombined[1], abs=1e-9)
    words = words_of(single.tokens)
    assert single.lm_score == pytest.approx(lm_score(lm, words, 0.7, 0.5, -1.0), abs=1e-6)


def test_floor_leaves_out_the_improbable():
    log_probs = torch.tensor([[[0.6, 0.3, 0.0999, 1e-4]]]).log()
    lengths = torch.tensor([1])
    tokens = [h.tokens for h in prefix_beam(log_probs, lengths, 4, candidates=4)[0]]
    assert tokens == [(), (1,), (2,), (3,)]
    tokens = [h.tokens for h in prefix_beam(log_probs, lengths, 4, candidates=4, floor=5.0)[0]]
    assert tokens == [(), (1,), (2,)]


words = st.text("abcd'é", min_size=1, max_size=6)


@given(st.sets(words, min_size=1, max_size=12), st.sets(st.text("abcd'", max_size=3), max_size=12))
@settings(max_examples=60, deadline=None)
def test_lexicon_walks_every_spelling(vocabulary, parts):
    vocabulary = sorted(vocabulary)
    pieces = ["<blank>", MARK, *sorted({MARK + p for p in parts if p} | {p for p in parts if p})]
    scores = -np.arange(1.0, len(vocabulary) + 1)
    lexicon = Lexicon(vocabulary, scores, pieces)
    prefixes = {word[:i] for word in vocabulary for i in range(1, len(word) + 1)}
    assert lexicon.outside == len(prefixes) + 1
    # Follow all piece sequences that spell a text without a mark inside.
    queue, seen = [("", 0)], 0
    for token, piece in enumerate(pieces):
        if piece.startswith(MARK):
            queue.append((piece[1:], int(lexicon.first[token])))
    while queue and seen < 400:
        text, node = queue.pop()
        seen += 1
        if text not in prefixes and text:
            assert node == lexicon.outside
            continue
        assert lexicon.depth[node] == len(text)
        below = [s for word, s in zip(vocabulary, scores, strict=True) if word.startswith(text)]
        assert lexicon.best[node] == max(below)
        number = int(lexicon.word[node])
        assert (vocabulary[number] if number >= 0 else None) == (text if text in vocabulary else None)
        for token, piece in enumerate(pieces):
            if not piece.startswith(MARK):
                queue.append((text + piece, int(lexicon.walk(np.array(node), np.array(token)))))


@pytest.mark.parametrize(("b", "text"), [(0.6, "aba"), (0.99999, "abb")])
def test_spelling_errors_are_put_right(b, text):
    """'abb' was heard more or less clearly; the vocabulary has 'aba'."""
    lm = make_lm()
    scorer = WordLm(lm, word_lexicon(lm, PIECES), 1.0, 0.0, -1.0)
    frames = torch.full((1, 3, len(PIECES)), 1e-9)
    frames[0, 0, 5], frames[0, 1, 0], frames[0, 2, 3], frames[0, 2, 4] = 1.0, 1.0, b, 1 - b
    plain, guided = (
        prefix_beam(frames.log(), torch.tensor([3]), 8, lm=model, lm_weight=1.0)[0][0].tokens
        for model in (None, scorer)
    )
    assert words_of(plain) == ["abb"]
    assert words_of(guided) == [text]


def test_token_model_follows_tokens():
    pieces = ["<blank>", "你", "好", "吗"]
    lm = make_lm(2, ("你 好", "你 好 吗", "好 吗", "你 你 好"))
    scorer = TokenLm(lm, pieces, 0.8, 0.2)
    log_probs = random_log_probs(3, 4, 4)
    acoustic = all_sequences(log_probs[0])
    got = prefix_beam(log_probs, torch.tensor([4]), len(acoustic), candidates=4, lm=scorer, lm_weight=1.0)[0]
    assert len(got) == len(acoustic)
    for h in got:
        want = lm_score(lm, [pieces[t] for t in h.tokens], 0.8, 0.2, 0.0)
        assert h.score == pytest.approx(acoustic[h.tokens] + want, abs=1e-5)
    with pytest.raises(ConfigError, match="none of the tokenizer's pieces"):
        TokenLm(lm, ["<blank>", "x"])


def test_models_that_do_not_fit():
    with pytest.raises(ConfigError, match="can spell none of its words"):
        word_lexicon(make_lm(), ["<blank>", f"{MARK}A", "B"])
    with pytest.raises(ConfigError, match="can spell none of its words"):
        word_lexicon(make_lm(), ["<blank>", "a", "b"])


# ---- in the pipeline ----


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    base = tmp_path_factory.mktemp("lm")
    lm = make_lm(2, ("the cat sees a dog", "a dog sees the cat", "the dog", "cat dog the a", "x y z"))
    return {"lm": lm.save(base / "lm.safetensors"), "arpa": write_arpa(lm, base / "lm.arpa"), "base": base}


def noise(seconds, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, int(16000 * seconds)).astype(np.float32)


def test_transcriber_follows_the_model(files, tmp_path):
    folder = ctc_folder(tmp_path / "c")
    weights = {"lm_weight": 2.0, "word_bonus": -1.0, "unknown_word": -5.0, "decoder": "ctc_beam", "beam": 12}
    plain = nar_speech.load_model(folder, device="cpu", decoder="ctc_beam", beam=12)
    guided = nar_speech.load_model(folder, device="cpu", lm=str(files["lm"]), **weights)
    waves = [noise(1.0, seed) for seed in range(3)]
    texts = [guided(wave).text for wave in waves]
    assert texts != [plain(wave).text for wave in waves]
    assert texts == [t.text for t in guided(waves)]
    assert [t.text for t in plain(waves, lm=str(files["arpa"]), **weights)] == texts
    assert [t.text for t in guided(waves, lm=None)] == [t.text for t in plain(waves)]
    # Only words of the model: its letters are pieces, "<space>" ends a word.
    known = {"the", "cat", "sees", "a", "dog", "x", "y", "z"}
    scorer = guided.recognizer.language_model(guided.decoding_for({}))
    assert {scorer.lm.words[i] for i in scorer._word} - known == {"<unk>"}
    nbest = guided(waves[0], nbest=4).segments[0].nbest
    assert [h.score for h in nbest] == sorted((h.score for h in nbest), reverse=True)
    word = nbest[0].text.split()[0]
    favoured = guided(waves[0], nbest=4, hotwords=(word,), hotword_score=30.0).segments[0].nbest
    assert favoured[0].score > nbest[0].score + 20


def test_auto_takes_the_beam(files, tmp_path):
    model = nar_speech.load_model(paraformer_folder(tmp_path / "p"), device="cpu")
    wave = noise(1.0)
    lm = str(files["lm"])
    assert model(wave, lm=lm).text == model(wave, lm=lm, decoder="ctc_beam").text
    assert model(wave, lm=lm, decoder="paraformer").text == model(wave, decoder="paraformer").text


def test_model_folder_holds_its_language_model(files, tmp_path):
    decoding = {"decoder": "ctc_beam", "lm": str(files["lm"]), "lm_weight": 1.5}
    folder = ctc_folder(tmp_path / "c", decoding=decoding)
    file = read_model_file(folder)
    assert file.decoding.lm == "lm.safetensors"
    assert "lm.safetensors" in file.sha256
    check_sums(folder, file.sha256)
    wave = noise(1.0)
    own = nar_speech.load_model(folder, device="cpu")(wave).text
    assert own == nar_speech.load_model(ctc_folder(tmp_path / "d"), device="cpu", **decoding)(wave).text
    copy = hub.import_model(folder, tmp_path / "copy")
    assert nar_speech.load_model(copy, device="cpu")(wave).text == own
    assert all(check.passed for check in inspection.verify(copy))
    changed = change_model_decoding(copy, lm=str(files["arpa"]), beam=7)
    assert (changed.decoding.lm, changed.decoding.beam, changed.decoding.lm_weight) == ("lm.arpa", 7, 1.5)
    assert not (copy / "lm.safetensors").exists()
    check_sums(copy, read_model_file(copy).sha256)
    assert read_model_file(copy).sha256.keys() == changed.sha256.keys() >= {"lm.arpa"}
    change_model_decoding(copy, lm=None)
    assert not (copy / "lm.arpa").exists()
    check_sums(copy, read_model_file(copy).sha256)
    with pytest.raises(ConfigError, match=r"decoding\.lm: no file"):
        change_model_decoding(copy, lm=str(tmp_path / "none.arpa"))
    (folder / "lm.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lm\.safetensors: can't read the language model"):
        nar_speech.load_model(folder, device="cpu")(wave)


def test_posteriors_over_the_prior(files, tmp_path):
    log_probs = random_log_probs(0, 6, 5)
    prior = label_prior(log_probs, torch.tensor([4]))
    assert torch.allclose(prior.exp(), log_probs[0, :4].exp().mean(0), atol=1e-6)
    divided = divide_by_prior(log_probs, prior, 0.4)
    assert torch.allclose(divided.exp().sum(-1), torch.ones(1, 6), atol=1e-6)
    wanted = log_probs.exp() / prior.exp() ** 0.4
    assert torch.allclose(divided.exp(), wanted / wanted.sum(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(divide_by_prior(log_probs, prior, 0.0), log_probs, atol=1e-6)


def test_model_folder_holds_its_prior(files, tmp_path):
    plain = {"decoder": "ctc_beam", "lm": str(files["lm"]), "lm_weight": 1.5}
    folder = ctc_folder(tmp_path / "c", decoding=plain)
    wave = noise(1.0)
    before = nar_speech.load_model(folder, device="cpu")(wave, nbest=3).segments[0].nbest
    size = nar_speech.load_model(folder, device="cpu").recognizer.tokenizer.vocab_size
    save_safetensors(tmp_path / "prior.safetensors", {PRIOR_NAME: torch.linspace(-9, 0, size)})
    file = change_model_decoding(folder, prior=str(tmp_path / "prior.safetensors"), prior_weight=0.8)
    assert file.decoding.prior == "prior.safetensors"
    check_sums(folder, file.sha256)
    model = nar_speech.load_model(folder, device="cpu")
    assert model(wave, nbest=3).segments[0].nbest != before
    assert model(wave, nbest=3, prior_weight=0.0).segments[0].nbest == before
    greedy = nar_speech.load_model(ctc_folder(tmp_path / "d"), device="cpu", decoder="ctc_beam")
    assert model(wave, lm=None).text == greedy(wave).text  # without a language model it is not used
    save_safetensors(tmp_path / "short.safetensors", {PRIOR_NAME: torch.zeros(size - 1)})
    with pytest.raises(ConfigError, match=f"{PRIOR_NAME}' of {size} values"):
        model(wave, prior=str(tmp_path / "short.safetensors"))
    change_model_decoding(folder, prior=None)
    assert not (folder / "prior.safetensors").exists()


def test_words_or_tokens(files):
    letters = CharTokenizer(["<blank>", "<space>", *"abcdeghostx"])
    decoding = DecodingConfig(lm=str(files["lm"]))
    models = LanguageModels(letters)
    scorer = models(decoding)
    assert isinstance(scorer, WordLm)
    assert models(decoding) is scorer
    assert models(replace(decoding, lm_weight=0.1)).lexicon is scorer.lexicon
    path = make_lm(2, ("a b c", "d e", "a e")).save(files["base"] / "tokens.safetensors")
    assert isinstance(models(replace(decoding, lm=str(path))), TokenLm)
    assert isinstance(LanguageModels(CharTokenizer(list("abcde")))(replace(decoding, lm=str(path))), TokenLm)


@pytest.mark.parametrize(
    "wrong", [{"lm_weight": -1.0}, {"unknown_word": 0.5}, {"lm": ""}, {"lm_weight": float("nan")}]
)
def test_wrong_weights(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        nar_speech.pipelines.transcribe.change_decoding(DecodingConfig(), wrong)


def test_command_line(files, tmp_path, capsys):
    import soundfile

    folder = ctc_folder(
        tmp_path / "c", decoding={"decoder": "ctc_beam", "lm": str(files["lm"]), "lm_weight": 3}
    )
    audio = tmp_path / "a.wav"
    soundfile.write(audio, noise(1.0), 16000)

    def run(*options):
        code = cli.main(["transcribe", "--model", str(folder), "--device", "cpu", str(audio), *options])
        return code, *capsys.readouterr()

    own, plain = run(), run("--no-lm")
    assert own[0] == plain[0] == 0
    assert own[1] != plain[1]
    assert run("--lm", str(files["arpa"]))[1] == own[1]
    scored = ("--format", "json", "--nbest", "2")  # with the scores
    assert len({run(*scored, *more)[1] for more in ((), ("--lm-weight", "1"), ("--word-bonus", "1"))}) == 3
    code, out, err = run("--lm", str(tmp_path / "none.arpa"))
    assert (code, out) == (2, "")
    assert "none.arpa: can't read the language model" in err
    code, _, err = run("--lm", str(files["lm"]), "--decoder", "ctc_greedy")
    assert code == 2
    assert "takes no language model" in err
