"""MusicGen's network: delays, key-value cache, scoring, and code-by-code sampling."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.errors import ConfigError, InputError
from nar_speech.layers.quantize import int8_available
from nar_speech.models.musicgen import MusicGen, MusicGenConfig, delay_codes, undelay
from nar_speech.sampling.autoregressive import AutoregressiveConfig, autoregressive_sample
from nar_speech.sampling.draws import GeneratorDraws, seeded

NUMBERS = {
    "num_codebooks": 3,
    "codebook_size": 9,
    "width": 24,
    "heads": 3,
    "num_blocks": 2,
    "hidden_scale": 2,
}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def network(**changes):
    torch.manual_seed(0)
    made = MusicGen(MusicGenConfig(**NUMBERS, text_width=7, **changes)).eval()
    for parameter in made.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.7, 0.4)
    return made.requires_grad_(False)


NETWORK = network()
ROTATED = network(positions="rope")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def text(batch, seed=0, longest=5):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(longest + 1, (batch,), generator=generator)
    return torch.randn(batch, longest, 7, generator=generator), torch.arange(longest) < sizes[:, None]


@settings(max_examples=30, deadline=None)
@given(
    frames=st.integers(1, 12), lags=st.sampled_from([(0, 1, 2), (0, 0, 0), (0, 3, 1), (2, 0, 0)]),
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=2),
)  # fmt: skip
def test_delays_and_back(frames, lags, lengths):
    codes = torch.randint(9, (2, 3, frames))
    sequence = delay_codes(codes, None, lags, 9)
    assert sequence.shape == (2, 3, frames + max(lags) + 1)
    assert torch.equal(undelay(sequence, frames, lags, 1), codes)
    for k, lag in enumerate(lags):
        for place in range(sequence.shape[2]):
            frame = place - 1 - lag
            wanted = codes[:, k, frame] if 0 <= frame < frames else torch.tensor(9)
            assert bool((sequence[:, k, place] == wanted).all())
    cut = undelay(delay_codes(codes, torch.tensor(lengths), lags, 9), frames, lags, 1)
    for row, length in enumerate(lengths):
        assert torch.equal(cut[row, :, :length], codes[row, :, :length])
        assert bool((cut[row, :, length:] == 9).all())


@settings(max_examples=20, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    room=st.integers(1, 20),
    model=st.sampled_from([NETWORK, ROTATED]),
)
def test_steps_of_any_size_give_what_one_pass_gives(pieces, seed, room, model):
    size = sum(pieces)
    sequence = torch.randint(10, (2, 3, size), generator=torch.Generator().manual_seed(seed))
    states, mask = text(2, seed)
    wanted = model(sequence, states, mask)
    state = model.start(2, room, model.remember(states, mask))
    begin = 0
    for piece in pieces:
        logits, state = model.step(sequence[:, :, begin : begin + piece], state)
        begin += piece
        torch.testing.assert_close(logits, wanted[:, :, begin - 1], **CLOSE)
    assert state.size == size


def test_the_future_is_not_seen():
    sequence = torch.randint(10, (1, 3, 12))
    changed = sequence.clone()
    changed[:, :, 7:] = torch.randint(10, (1, 3, 5))
    assert torch.equal(NETWORK(sequence)[:, :, :7], NETWORK(changed)[:, :, :7])


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_scores_of_a_row_depend_on_nothing_else(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(9, (len(lengths), 3, max(lengths)), generator=generator)
    states, mask = text(len(lengths), seed)
    batched = NETWORK.token_probabilities(codes, torch.tensor(lengths), states, mask)
    for row, length in enumerate(lengths):
        item, size = slice(row, row + 1), max(1, int(mask[row].sum()))
        single = NETWORK.token_probabilities(
            codes[item, :, :length], None, states[item, :size], mask[item, :size]
        )
        torch.testing.assert_close(batched[item, :, :length], single, **CLOSE)
        assert bool((batched[row, :, :length] > 0).all())
        assert bool((batched[row, :, :length] < 1).all())


def test_scores_of_one_codebook_do_not_look_at_later_ones():
    codes = torch.randint(9, (1, 3, 8))
    other = codes.clone()
    other[:, 2] = (other[:, 2] + 1) % 9
    first = NETWORK.token_probabilities(codes, stage=1)
    assert first.shape == (1, 8)
    assert torch.equal(first, NETWORK.token_probabilities(other, stage=1))
    assert not torch.equal(first, NETWORK.token_probabilities(codes)[:, 1])
    masked = codes.clone()
    masked[:, 1, 3] = 9
    assert NETWORK.token_probabilities(masked, stage=1)[0, 3] == 0


def reference(states, mask, length, config, draws, prompt):
    """The same sampling without cache and batch: every step from the beginning."""
    lags, special = NETWORK.config.lags, 9
    codes = torch.full((1, 3, length), special)
    codes[:, :, : prompt.shape[2]] = prompt
    for place in range(prompt.shape[2] + 1, length + max(lags) + 1):
        sequence = delay_codes(codes, None, lags, special)[:, :, :place]
        logits = NETWORK(sequence, states, mask)[:, :, -1]
        null = NETWORK(sequence)[:, :, -1]
        logits = null + (logits - null) * config.guidance
        wanted = [k for k in range(3) if prompt.shape[2] <= place - 1 - lags[k] < length]
        needed = torch.tensor([[k in wanted for k in range(3)]])
        noise = draws.tokens([0], needed, 9)
        for row, k in enumerate(wanted):
            probabilities = (logits[0, k] / config.temperature).softmax(-1)
            threshold = probabilities.topk(config.top_k).values[-1]
            probabilities = probabilities * (probabilities >= threshold)
            running = probabilities.cumsum(0)
            codes[0, k, place - 1 - lags[k]] = int((running <= noise[row] * running[-1]).sum())
    return codes


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 10), st.integers(0, 4)), min_size=2, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_batch_of_clips_with_prompts_is_its_singles(sizes, seed):
    config = AutoregressiveConfig(top_k=5, temperature=1.3)
    lengths = [length for length, _ in sizes]
    prompts = [min(length, prompt) for length, prompt in sizes]
    states, mask = text(len(sizes), seed)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(9, (len(sizes), 3, max(prompts)), generator=generator)
    got = autoregressive_sample(
        NETWORK.sampler(states, mask), torch.tensor(lengths), (0, 1, 2), 9, config,
        GeneratorDraws(seeded(range(len(sizes)))), prompt, torch.tensor(prompts),
    )  # fmt: skip
    for row, (length, size) in enumerate(zip(lengths, prompts, strict=True)):
        item, known = slice(row, row + 1), max(1, int(mask[row].sum()))
        wanted = reference(
            states[item, :known], mask[item, :known], length, config, GeneratorDraws(seeded([row])),
            prompt[item, :, :size],
        )  # fmt: skip
        assert torch.equal(got[item, :, :length], wanted)
        assert bool((got[row, :, length:] == 9).all())


def test_without_guidance_there_is_one_pass():
    states, mask = text(2, 4)
    step = NETWORK.sampler(states, mask, guided=False)
    logits, null = step(torch.full((2, 3, 1), 9))
    assert null is None
    torch.testing.assert_close(logits, NETWORK(torch.full((2, 3, 1), 9), states, mask)[:, :, 0], **CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_prepared_networks_give_nearly_the_same(dtype):
    if dtype == "int8" and not int8_available():
        pytest.skip("no int8 kernels")
    states, mask = text(1, 4)
    sequence = torch.randint(10, (1, 3, 9))
    wanted = NETWORK(sequence, states, mask)[:, :, -1]
    step = copy.deepcopy(NETWORK).prepare(dtype).sampler(states, mask)
    got, _ = step(sequence)
    assert float((got - wanted).std()) < {"float32": 2e-5, "bfloat16": 0.03, "int8": 0.1}[dtype]


def test_progress_is_told():
    told = []
    states, mask = text(1)
    config = AutoregressiveConfig(sample=False)
    codes = autoregressive_sample(
        NETWORK.sampler(states, mask), torch.tensor([4]), (0, 1, 2), 9, config,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(n, 6) for n in range(1, 7)]
    assert int(codes.max()) < 9


def test_what_does_not_fit_is_an_error():
    states, mask = text(1)
    step = NETWORK.sampler(states, mask)
    greedy = AutoregressiveConfig(sample=False)
    with pytest.raises(InputError, match="draws"):
        autoregressive_sample(step, torch.tensor([4]), (0, 1, 2), 9, AutoregressiveConfig())
    with pytest.raises(InputError, match="frame"):
        autoregressive_sample(step, torch.tensor([0]), (0, 1, 2), 9, greedy)
    with pytest.raises(InputError, match="prompt"):
        autoregressive_sample(
            step, torch.tensor([4]), (0, 1, 2), 9, greedy, prompt=torch.zeros(1, 2, 3).long()
        )
    sizes = {"prompt": torch.zeros(2, 3, 4).long(), "prompt_lengths": torch.tensor([4, 1])}
    with pytest.raises(InputError, match="longer than"):
        autoregressive_sample(step, torch.tensor([2, 4]), (0, 1, 2), 9, greedy, **sizes)
    with pytest.raises(InputError, match="at once"):
        NETWORK.check(1501)
    NETWORK.check(1500)
    for wrong in ({"delays": (0, 1)}, {"delays": (1, 1, 2)}, {"stride_seconds": -1.0}):
        with pytest.raises(ConfigError):
            MusicGenConfig(**NUMBERS, **wrong)
    for wrong in ({"temperature": 0.0}, {"top_p": 2.0}, {"guidance": -1.0}):
        with pytest.raises(ConfigError):
            AutoregressiveConfig(**wrong)


def test_a_prompt_that_is_the_whole_clip_asks_nothing_of_the_model():
    def never(tokens):
        raise AssertionError("the model was called")

    prompt = torch.randint(9, (1, 3, 4))
    codes = autoregressive_sample(
        never, torch.tensor([4]), (0, 1, 2), 9, AutoregressiveConfig(sample=False), None, prompt
    )
    assert torch.equal(codes, prompt)
