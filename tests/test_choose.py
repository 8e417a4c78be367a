"""Candidates keep their words, take case and punctuation from the model, and get their true probabilities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.layers.whisper_decoder import WhisperDecoder, WhisperDecoderConfig
from nar_speech.search.choose import restyle, score, style
from nar_speech.search.redraft import INSIDE, MARK, START, TokenKinds

END, VOCAB = 0, 12
KINDS = TokenKinds(  # 3 is 2 with a capital, 4 a comma, 10 a full stop, 5 goes on with a word
    np.array([0, 1, 2, 2, 4, 5, 6, 7, 8, 9, 10, 11]),
    np.array([MARK, START, START, START, MARK, INSIDE, START, START, START, START, MARK, START]),
)
PROMPT = (11, 9)


@pytest.mark.parametrize(
    ("draft", "guesses", "new"),
    [
        ([2, 7], [3, 7, 10], [3, 7, 10]),  # a capital and a full stop
        ([2, 7], [6, 8, 0], [2, 7]),  # other words are not taken
        ([2, 7], [2, 4, 8], [2, 4, 7]),  # a comma, but no word at the end
        ([2, 4, 7], [2, 7, 7, 0], [2, 7]),  # a comma is left out
        ([2, 4, 7], [2, 10, 7, 0], [2, 10, 7]),
        ([2, 4, 7], [2, 8, 7, 0], [2, 4, 7]),
        ([2, 5], [0, 0, 0], [2, 5]),
        ([], [3], []),
    ],
)
def test_only_case_and_punctuation_change(draft, guesses, new):
    assert restyle(draft, guesses, KINDS, END) == new


def make_decoder(seed):
    torch.manual_seed(seed)
    config = WhisperDecoderConfig(VOCAB, size=16, heads=2, linear_units=16, num_blocks=2, max_tokens=40)
    decoder = WhisperDecoder(config).eval()
    with torch.no_grad():
        decoder.token_embedding.weight.normal_()
    return decoder


def words_of(text):
    return [int(KINDS.classes[token]) for token in text if KINDS.kinds[token] != MARK]


candidates = st.lists(st.lists(st.integers(1, 8), max_size=8), min_size=1, max_size=3)


@given(st.integers(0, 100), st.lists(candidates, min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_scores_are_those_of_whole_sequences(seed, texts):
    decoder = make_decoder(seed)
    lengths = torch.arange(len(texts)) + 2
    memory = torch.randn(len(texts), len(texts) + 1, 16)
    with torch.inference_mode():
        state = decoder.start(memory, lengths, room=4)
        styled = style(decoder.step, state, PROMPT, texts, END, KINDS)
        scores = score(decoder.step, decoder.start(memory, lengths), PROMPT, styled, END)
        for b, (some, before) in enumerate(zip(styled, texts, strict=True)):
            assert [words_of(text) for text in some] == [words_of(text) for text in before]
            for text, found in zip(some, scores[b], strict=True):
                ids = torch.tensor([[*PROMPT, *text]])
                log_probs = decoder(ids, memory[b : b + 1], lengths[b : b + 1])[0].log_softmax(-1)
                targets = torch.tensor([*text, END])
                wanted = log_probs[len(PROMPT) - 1 :].gather(1, targets[:, None]).sum()
                assert found == pytest.approx(float(wanted), abs=1e-3)
