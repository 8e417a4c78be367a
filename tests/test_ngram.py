"""N-gram models: estimation against the formulas and kenlm, files, look-up, perplexity."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError, InputError
from nar_speech.text.arpa import read_arpa, write_arpa
from nar_speech.text.kneser_ney import choose_vocabulary, discounts, encode_text, estimate
from nar_speech.text.ngram import NgramModel, quantize
from recipes import ngram as recipe

# A small text with all counts of counts that the discounts need.
COMMON = "the a cat dog bird tree sees has likes big small red old and of in on under it he"
WORDS = [*COMMON.split(), *(f"rare{i}" for i in range(60))]


def make_text(seed=0, sentences=400):
    """Sentences of a random bigram process, so that longer contexts tell something."""
    rng = np.random.default_rng(seed)
    common = np.where(np.arange(len(WORDS)) < 20, 1.0, 0.02)
    table = rng.dirichlet(0.3 * common, len(WORDS))
    text = []
    for _ in range(sentences):
        word, row = int(rng.integers(20)), []
        for _ in range(int(rng.integers(1, 9))):
            row.append(WORDS[word])
            word = int(rng.choice(len(WORDS), p=table[word]))
        text.append(" ".join(row))
    return text


TEXT = make_text()
GOLDEN = [19.767294861875353, 10.139685558104736, 7.381889024423063]  # of orders 1, 2 and 3 on TEXT


def build(order=3, vocabulary=None, text=TEXT, **options):
    words = choose_vocabulary(Counter(" ".join(text).split()), vocabulary)
    return estimate(text, words, order, **options)


def sums(model):
    """Sum over all words of P(word | context), for every context."""
    contexts = np.arange(model._first_leaf)
    size = len(model.words)
    score, _ = model.step(np.repeat(contexts, size), np.tile(np.arange(size), len(contexts)))
    return np.exp(score).reshape(len(contexts), size).sum(1)


class SlowKneserNey:
    """The formulas of the paper, one n-gram at a time, with dictionaries."""

    def __init__(self, text, order):
        self.order = order
        sentences = [["<s>", *line.split(), "</s>"] for line in text]
        self.words = {word for line in sentences for word in line[1:]} | {"<unk>"}
        raw = Counter(
            tuple(line[i : i + n])
            for line in sentences
            for n in range(1, order + 1)
            for i in range(len(line) - n + 1)
        )
        self.counts = Counter()
        for gram, count in raw.items():
            if len(gram) == order or gram[0] == "<s>":
                self.counts[gram] = count
        for gram in raw:
            if len(gram) > 1:
                self.counts[gram[1:]] += gram[1:][0] != "<s>" and len(gram) <= order
        self.counts[("<s>",)] = 0
        self.cuts = []
        for n in range(1, order + 1):
            seen = Counter(c for gram, c in self.counts.items() if len(gram) == n)
            cut = [0.5, 1.0, 1.5]
            if all(seen[c] for c in (1, 2, 3, 4)):
                y = seen[1] / (seen[1] + 2 * seen[2])
                found = [k - (k + 1) * y * seen[k + 1] / seen[k] for k in (1, 2, 3)]
                cut = found if all(0 <= d <= k for k, d in enumerate(found, 1)) else cut
            self.cuts.append([0, *cut])

    def probability(self, context, word):
        n = len(context) + 1
        lower = self.probability(context[1:], word) if context else 1 / len(self.words)
        after = {g[-1]: c for g, c in self.counts.items() if len(g) == n and g[:-1] == context and c > 0}
        if not after:
            return lower
        total, cut = sum(after.values()), self.cuts[n - 1]
        held = {w: cut[min(c, 3)] for w, c in after.items()}
        return max(after.get(word, 0) - held.get(word, 0), 0) / total + sum(held.values()) / total * lower


def test_estimate_follows_the_formulas():
    model, slow = build(3), SlowKneserNey(TEXT, 3)
    contexts = [("<s>",), ("<s>", "the"), ("the", "cat"), ("he", "he"), ("cat",), ("tree", "under")]
    for context, word in itertools.product(contexts, [*WORDS[:8], "</s>", "<unk>"]):
        state = np.array([0 if context[0] != "<s>" else model.start])
        for name in context if context[0] != "<s>" else context[1:]:
            state = model.step(state, np.array([model.ids[name]]))[1]
        got = math.exp(model.step(state, np.array([model.ids[word]]))[0][0])
        assert got == pytest.approx(slow.probability(context, word), rel=1e-9), (context, word)


@pytest.mark.parametrize(
    ("order", "options"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (4, {}),
        (3, {"prune": (0, 1, 2)}),
        (3, {"prune": (0, 1)}),
        (3, {"vocabulary": 12}),
        (3, {"entropy": 1e-4}),
        (4, {"entropy": 3e-4, "prune": (0, 0, 1)}),
        (2, {"entropy": 1e-3}),
    ],
)
def test_probabilities_sum_to_one(order, options):
    model = build(order, **options)
    assert model.order == order
    assert np.allclose(sums(model), 1.0, atol=1e-6)


def test_golden_perplexities():
    """Recorded; kenlm's lmplz gives the same model (test below)."""
    held_out = make_text(1, 50)
    found = [build(order).perplexity(TEXT).value for order in (1, 2, 3)]
    assert found == pytest.approx(GOLDEN, rel=1e-6)
    model = build(3, 12)
    result = model.perplexity(held_out)
    assert (result.sentences, result.words) == (50, sum(len(line.split()) for line in held_out))
    assert result.unknown == sum(word not in model.ids for line in held_out for word in line.split())
    assert result.value == pytest.approx(math.exp(-result.log_prob / (result.words + 50)))


def test_longer_contexts_help_and_pruning_costs_little():
    full, pruned = build(3), build(3, entropy=1e-4)
    assert sum(pruned.num_ngrams) < 0.8 * sum(full.num_ngrams)
    a, b = full.perplexity(TEXT).value, pruned.perplexity(TEXT).value
    assert a < b < 1.2 * a
    assert build(2).perplexity(TEXT).value < build(1).perplexity(TEXT).value
    # The same number of n-grams, chosen by count: worse than by entropy.
    sizes = sum(pruned.num_ngrams)
    cut = build(3, prune=(0, 2, 3))
    assert sum(cut.num_ngrams) < sizes or cut.perplexity(TEXT).value > b


def test_cut_offs_drop_rare_ngrams_only():
    raw = Counter(tuple(line[i : i + 3]) for line in map(marked, TEXT) for i in range(len(line) - 2))
    model = build(3, prune=(0, 0, 1))
    assert model.num_ngrams[2] == sum(count > 1 for count in raw.values())
    assert model.num_ngrams[1] == build(3).num_ngrams[1]


def marked(line):
    return ["<s>", *line.split(), "</s>"]


def test_text_in_pieces_gives_the_same_counts(monkeypatch):
    whole = build(4)
    monkeypatch.setattr("nar_speech.text.kneser_ney.PIECE", 37)
    parts = build(4)
    assert whole.num_ngrams == parts.num_ngrams
    assert np.array_equal(whole.keys, parts.keys)
    assert np.allclose(whole.log_probs, parts.log_probs)


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=5), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_any_text_gives_a_distribution(rows):
    text = [" ".join(row) for row in rows]
    for order in (1, 2, 3):
        model = build(order, text=text)
        assert np.allclose(sums(model), 1.0, atol=1e-6)
        assert np.isfinite(model.perplexity(text).value)


def test_discounts_of_the_paper():
    counts = np.repeat([1, 2, 3, 4, 5, 9], [10, 5, 3, 2, 7, 1])
    assert discounts(counts, 1).tolist() == pytest.approx([0, 0.5, 1.1, 3 - 4 / 3])


def test_small_text_takes_other_discounts_and_says_so(caplog):
    assert discounts(np.array([1, 1, 2]), 2).tolist() == [0, 0.5, 1.0, 1.5]
    assert "order 2" in caplog.text


def test_vocabulary_by_frequency():
    counts = Counter({"b": 3, "a": 3, "c": 1, "<s>": 9})
    assert choose_vocabulary(counts) == ["<unk>", "<s>", "</s>", "a", "b", "c"]
    assert choose_vocabulary(counts, 4) == ["<unk>", "<s>", "</s>", "a"]
    assert choose_vocabulary(counts, least=2) == ["<unk>", "<s>", "</s>", "a", "b"]
    ids = encode_text(["a x </s>", "", "b"], choose_vocabulary(counts))
    assert ids.tolist() == [1, 3, 0, 0, 2, 1, 4, 2]


def test_files_keep_the_model(tmp_path):
    model = build(3)
    for name in ("lm.arpa", "lm.arpa.gz"):
        read = NgramModel.load(write_arpa(model, tmp_path / name))
        assert read.num_ngrams == model.num_ngrams
        assert read.perplexity(TEXT).log_prob == pytest.approx(model.perplexity(TEXT).log_prob, rel=1e-5)
    read = NgramModel.load(model.save(tmp_path / "lm.safetensors"))
    assert read.words == model.words
    assert np.array_equal(read.keys, model.keys)
    assert read.perplexity(TEXT).value == pytest.approx(model.perplexity(TEXT).value, rel=0.01)


def test_arpa_of_others(tmp_path):
    """No <unk>, n-grams in any order, missing weights, a bigram whose suffix is unknown."""
    path = tmp_path / "lm.arpa"
    path.write_text(
        "made by hand\n\n\\data\\\nngram 1=4\nngram 2=3\nngram 3=1\n\n\\1-grams:\n-99 <s> -0.5\n-1 b\n"
        "-0.7 a -0.2\n-0.6 </s>\n\n\\2-grams:\n-0.3\tb a\t-0.1\n-0.4 <s> b -0.25\n-0.9 a a\n\n\\3-grams:\n"
        "-0.05 <s> b a\n\n\\end\\\n"
    )
    model = read_arpa(path)

    def log10(*words):
        state, total = np.array([model.start]), 0.0
        for word in words:
            score, state = model.step(state, np.array([model.ids[word]]))
            total += score[0] / math.log(10)
        return total

    assert log10("b") == pytest.approx(-0.4)
    assert log10("b", "a") == pytest.approx(-0.4 - 0.05)
    assert log10("b", "b") == pytest.approx(-0.4 - 0.25 - 1.0)
    assert log10("b", "a", "a") == pytest.approx(-0.45 - 0.1 - 0.9)
    assert log10("b", "a", "</s>") == pytest.approx(-0.45 - 0.1 - 0.2 - 0.6)
    assert log10("a") == pytest.approx(-0.5 - 0.7)
    assert log10("<unk>") == pytest.approx(-0.5 - 99)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello\n", "no line"),
        ("\\data\\\n\\1-grams:\n", "no line 'ngram 1"),
        ("\\data\\\nngram 2=1\n", "count of order 1"),
        ("\\data\\\nngram 1=3\n\n\\1-grams:\n-1 a\n-1 <s>\n", "cut off"),
        ("\\data\\\nngram 1=3\n\n\\1-grams:\n-1 a\n-1 <s>\n\\end\\\n", "2 n-grams of order 1, 3 announced"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\n-1 a b c\n\\end\\\n", "expected log10 P"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\nx a\n\\end\\\n", "expected log10 P"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\n-1 a\n\\end\\\n", "'<s>' is not among"),
        (
            "\\data\\\nngram 1=2\nngram 2=1\n\\1-grams:\n-1 <s>\n-1 </s>\n\\2-grams:\n-1 <s> b\n\\end\\\n",
            "'b' is in an n-gram",
        ),
    ],
)
def test_bad_arpa_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "lm.arpa"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        NgramModel.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_compact_files(tmp_path):
    path = build(2).save(tmp_path / "lm.safetensors")
    data = path.read_bytes()
    with pytest.raises(ConfigError, match="no such file"):
        NgramModel.load(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="No such file"):
        NgramModel.load(tmp_path / "none.arpa")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"lm\.safetensors"):
        NgramModel.load(path)
    other = tmp_path / "other.safetensors"
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, str(other))
    with pytest.raises(ConfigError, match="not an n-gram model"):
        NgramModel.load(other)
    (tmp_path / "lm.binary").write_bytes(b"mmap lm http\x00\xff\xfe\x80")
    with pytest.raises(ConfigError, match="kenlm binary"):
        NgramModel.load(tmp_path / "lm.binary")


def test_wrong_options():
    for options in ({"prune": (1,)}, {"prune": (0, 2, 1)}, {"prune": (0, 0, 0, 0)}, {"entropy": -1.0}):
        with pytest.raises(ConfigError):
            build(3, **options)
    with pytest.raises(ConfigError, match="order"):
        build(0)
    with pytest.raises(InputError, match="no words"):
        estimate([""], ["<unk>", "<s>", "</s>"], 2)
    with pytest.raises(InputError, match="no sentence"):
        build(2).perplexity([])


def test_quantised_values():
    few = np.array([0.0, -1.5, 0.0, -3.0])
    codes, table = quantize(few)
    assert np.array_equal(table[codes], few)
    rng = np.random.default_rng(0)
    many = np.concatenate([rng.normal(-5, 2, 20000), np.zeros(5000)])
    codes, table = quantize(many)
    assert np.array_equal(table[codes][20000:], np.zeros(5000))
    assert np.abs(table[codes] - many).max() < 0.08
    codes, table = quantize(np.append(many, -228.0))
    assert table[codes][-1] == -228.0
    assert np.abs(table[codes][:-1] - many).max() < 0.08


def test_recipe(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXT))
    outputs = [str(tmp_path / "lm.arpa"), str(tmp_path / "lm.safetensors")]
    arguments = [str(text), "--order", "3", "--prune", "0,0,1", "--vocab", "15", "--held-out", str(text)]
    assert recipe.main([*arguments, "--output", *outputs]) == 0
    assert "perplexity" in capsys.readouterr().out
    a, b = (NgramModel.load(path) for path in outputs)
    assert a.num_ngrams == b.num_ngrams
    assert len(a.words) == 15
    assert recipe.main([str(tmp_path / "none.txt"), "--output", outputs[0]]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert recipe.main([str(text), "--prune", "0,x", "--output", outputs[0]]) == 2


def test_kenlm_scores_the_same(tmp_path):
    kenlm = pytest.importorskip("kenlm")
    model = build(3, prune=(0, 0, 1))
    path = write_arpa(model, tmp_path / "lm.arpa")
    other = kenlm.Model(str(path))
    for line in [*make_text(2, 30), "the unknownword cat", ""]:
        want = other.score(line) * math.log(10)
        states, got = np.array([model.start]), 0.0
        for i in [*model.encode(line), model.end]:
            score, states = model.step(states, np.array([i]))
            got += score[0]
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4), line
