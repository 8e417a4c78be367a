"""Phone durations by flow matching: draws, losses, solver, sampler, and the aligner they learn from."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.checkpoint import SkipInit
from nar_speech.config import from_dict
from nar_speech.errors import ConfigError, InputError, NarSpeechError
from nar_speech.losses.flow import DurationDraws, draw_durations, flow_loss, straight_path
from nar_speech.models.duration import (
    Aligner,
    AlignerConfig,
    DurationConfig,
    DurationPredictor,
    aligner_terms,
    duration_loss,
    log_durations,
)
from nar_speech.pipelines.maskgct_durations import (
    DurationItem,
    DurationOptions,
    PredictedLength,
    _group,
    sample_durations,
    total_frames,
)
from nar_speech.sampling.draws import seeded
from nar_speech.sampling.ode import flow_times, integrate

TINY = DurationConfig(width=16, num_blocks=2, heads=2, hidden_scale=2, num_phones=8)


def network(seed=0):
    torch.manual_seed(seed)
    model = DurationPredictor(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# ---- draws and paths ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_draws_leave_something_to_learn(sizes, seed):
    lengths = torch.tensor(sizes)
    draws = draw_durations(lengths, max(sizes), torch.Generator().manual_seed(seed))
    assert (draws.prompts < lengths).all()
    assert (draws.prompts >= 0).all()
    assert (draws.prompts <= (lengths * 0.5).long().clamp_min(1)).all()
    assert draws.noise.shape == (len(sizes), max(sizes))
    assert ((draws.time >= 0) & (draws.time < 1)).all()
    again = draw_durations(lengths, max(sizes), torch.Generator().manual_seed(seed))
    assert torch.equal(draws.prompts, again.prompts)
    assert torch.equal(draws.noise, again.noise)


def test_prompts_and_conditions_are_dropped_as_often_as_asked():
    lengths = torch.full((4000,), 20)
    draws = draw_durations(
        lengths, 20, torch.Generator().manual_seed(0), prompt_drop=0.25, condition_drop=0.1
    )
    assert float((draws.prompts == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(draws.conditional.float().mean()) == pytest.approx(0.9, abs=0.02)
    shares = torch.bincount(draws.prompts, minlength=11)[1:].float() / 3000
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.03)


def test_paths_are_straight():
    clean, noise = torch.randn(3, 4), torch.randn(3, 4)
    for t in (0.0, 0.3, 1.0):
        there, velocity = straight_path(clean, noise, torch.full((3,), t))
        torch.testing.assert_close(there + (1 - t) * velocity, clean)
        torch.testing.assert_close(there - t * velocity, noise)
    counts = torch.zeros(3, 4, dtype=torch.bool)
    assert float(flow_loss(clean, noise, counts)) == 0
    counts[1, 2] = True
    assert float(flow_loss(clean, noise, counts)) == pytest.approx(float(clean[1, 2] - noise[1, 2]) ** 2)
    with pytest.raises(InputError, match="flow"):
        flow_loss(clean, noise, counts[:1])


# ---- solver -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_solvers_have_their_order(solver, order):
    errors = []
    for steps in (32, 64, 128):
        times = flow_times(steps, solver)
        asked = []

        def velocity(x, n, times=times, asked=asked):
            asked.append(n)
            return x * (1 + times[n])

        end = integrate(velocity, torch.ones(1, dtype=torch.float64), steps, solver)
        assert asked == list(range(steps * order))
        errors.append(abs(float(end) - math.exp(1.5)))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_solvers_refuse_what_they_do_not_know():
    with pytest.raises(ConfigError, match="solver"):
        flow_times(4, "heun")
    with pytest.raises(ConfigError, match="steps"):
        flow_times(0, "euler")
    with pytest.raises(ConfigError, match="cfg"):
        DurationOptions(cfg=-1.0)


# ---- the network --------------------------------------------------------------------------------------


def test_the_default_is_the_size_of_the_paper():
    with SkipInit():
        model = DurationPredictor(DurationConfig())
    assert (len(model.core.layers), model.core.layers[0].self_attn.heads) == (12, 12)
    assert 120e6 < sum(p.numel() for p in model.parameters()) < 140e6
    with pytest.raises(ConfigError, match="heads"):
        from_dict(DurationConfig, {"width": 30, "heads": 4}).core  # noqa: B018


def test_padding_changes_nothing():
    model = network()
    phones = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 1, 3, 3]])
    values, given = torch.randn(2, 5), torch.tensor([[True, True, False, False, False]]).expand(2, 5)
    time = torch.tensor([0.2, 0.7])
    both = model(phones, values, given, time, torch.tensor([5, 3]))
    alone = model(phones[1:, :3], values[1:, :3], given[1:, :3], time[1:])
    torch.testing.assert_close(both[1, :3], alone[0], atol=1e-5, rtol=1e-5)


def test_the_loss_is_about_what_is_not_given():
    """By hand: targets behind the prompt; an item without conditions sees neither phones nor prompt."""
    model = network()
    seen = []
    model.forward = lambda *args: seen.append(args) or torch.zeros(2, 4)
    phones, durations = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 0]]), torch.tensor([[3, 1, 4, 2], [2, 2, 9, 0]])
    draws = DurationDraws(
        torch.tensor([0.25, 0.5]), torch.randn(2, 4), torch.tensor([2, 1]), torch.tensor([True, False])
    )
    loss = duration_loss(model, phones, durations, torch.tensor([4, 3]), draws)
    told, values, given, time, _ = seen[0]
    assert told.tolist() == [[1, 2, 3, 4], [7, 7, 7, 7]]
    assert given.tolist() == [[True, True, False, False], [False] * 4]
    clean = torch.log1p(durations.float())
    torch.testing.assert_close(values[0, :2], clean[0, :2])
    torch.testing.assert_close(values[0, 2:], 0.75 * draws.noise[0, 2:] + 0.25 * clean[0, 2:])
    torch.testing.assert_close(values[1], 0.5 * draws.noise[1] + 0.5 * clean[1])
    wanted = [*(clean - draws.noise)[0, 2:], *(clean - draws.noise)[1, :3]]
    assert float(loss) == pytest.approx(float(torch.stack(wanted).square().mean()), rel=1e-5)
    assert torch.equal(time, draws.time)


# ---- sampling -----------------------------------------------------------------------------------------


def items_of(sizes, seed=0):
    torch.manual_seed(seed)
    return [
        DurationItem(torch.randint(0, 7, (prompt + target,)), torch.randint(1, 9, (prompt,)))
        for prompt, target in sizes
    ]


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=4),
    cfg=st.sampled_from([0.0, 1.5]),
    solver=st.sampled_from(["midpoint", "euler"]),
)
def test_a_batch_of_durations_equals_its_singles(sizes, cfg, solver):
    model, items = network(), items_of(sizes)
    options = DurationOptions(steps=2, cfg=cfg, solver=solver)
    together = sample_durations(model, items, seeded(range(len(items))), options)
    for number, (item, (_, target)) in enumerate(zip(items, sizes, strict=True)):
        alone = sample_durations(model, [item], seeded([number]), options)[0]
        assert torch.equal(alone, together[number])
        assert alone.shape == (target,)
        assert (alone >= 0).all()


@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_the_pack_gives_what_padded_passes_give(cfg):
    """Every evaluation of the sampler against plain forward passes; all items in one pack as on a GPU."""
    model, items = network(), items_of([(2, 3), (0, 5), (3, 1)])
    options = DurationOptions(steps=3, cfg=cfg)
    times = flow_times(3, "midpoint")
    for number, item in enumerate(items):
        source = seeded([number])[0]
        count, prompt = len(item.phones) - len(item.prompt), len(item.prompt)
        noise = torch.randn(count, generator=source)

        def velocity(x, n, item=item, count=count, prompt=prompt):
            time = torch.tensor([times[n]])
            values = torch.cat([log_durations(item.prompt), x])[None]
            given = (torch.arange(prompt + count) < prompt)[None]
            told = model(item.phones[None], values, given, time)[0, prompt:]
            free = torch.zeros(1, count, dtype=torch.bool)
            untold = model(torch.full((1, count), model.untold), x[None], free, time)[0]
            return told + cfg * (told - untold)

        with torch.inference_mode():
            wanted = torch.expm1(integrate(velocity, noise, 3)).clamp(0, 500)
        got = sample_durations(model, [item], seeded([number]), options)[0]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    noise = [
        torch.randn(len(item.phones) - len(item.prompt), generator=source)
        for item, source in zip(items, seeded(range(3)), strict=True)
    ]
    with torch.inference_mode():
        packed = _group(model, items, noise, [0, 1, 2], options)
    for row, alone in zip(packed, sample_durations(model, items, seeded(range(3)), options), strict=True):
        torch.testing.assert_close(row, alone, atol=1e-3, rtol=1e-3)


def test_durations_refuse_bad_input():
    model = network()
    with pytest.raises(InputError, match="generators"):
        sample_durations(model, items_of([(1, 2)]), [])
    with pytest.raises(InputError, match="at least one more"):
        sample_durations(model, [DurationItem(torch.tensor([1]), torch.tensor([2]))], seeded([0]))
    with pytest.raises(InputError, match="phones"):
        sample_durations(model, [DurationItem(torch.tensor([8]), torch.tensor([]))], seeded([0]))
    with pytest.raises(InputError, match="speed"):
        total_frames(torch.ones(3), 0.0)
    model.to_velocity.bias.data.fill_(torch.nan)
    with pytest.raises(NarSpeechError, match="NaN"):
        sample_durations(model, [DurationItem(torch.tensor([1]), torch.tensor([]))], seeded([0]))


def test_totals_follow_the_speed():
    durations = torch.tensor([2.4, 3.3, 0.0])
    assert total_frames(durations) == 6
    assert total_frames(durations, 2.0) == 3
    assert total_frames(torch.zeros(2)) == 1


def test_predicted_lengths_follow_the_prompts_pace():
    """The prompt's phones share its length, and what follows goes on from there."""
    model = network()
    rule = PredictedLength(model, 50.0, DurationOptions(steps=2))
    lengths = {}
    for seconds in (0.5, 2.0):
        seen = []

        def spy(net, items, draws, options, seen=seen):
            seen.append(items[0])
            return sample_durations(net, items, draws, options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nar_speech.pipelines.maskgct_durations.sample_durations", spy)
            lengths[seconds] = rule([1, 2, 3], seconds, [4, 5], seeded([0])[0])
        assert [len(item.phones) for item in seen] == [3, 5]
        assert float(seen[1].prompt.sum()) == pytest.approx(50 * seconds, rel=1e-4)
        assert (seen[1].prompt > 0).all()
    assert all(value >= 0 for value in lengths.values())
    assert rule([], 0.0, [4, 5], seeded([0])[0]) >= 0
    assert rule([1, 2, 3], 0.5, [4, 5], seeded([0])[0]) == lengths[0.5]


@pytest.mark.slow
def test_a_trained_predictor_follows_phones_and_the_prompt():
    """Phone p lasts p + 2 frames, three times as long in slow speech, which only the prompt tells."""
    torch.manual_seed(0)
    model = DurationPredictor(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (500 - step) / 200)
        phones = torch.randint(0, 6, (48, 8), generator=generator)
        slow = torch.randint(0, 2, (48, 1), generator=generator) * 2 + 1
        draws = draw_durations(torch.full((48,), 8), 8, generator)
        loss = duration_loss(model, phones, (phones + 2) * slow, torch.full((48,), 8), draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    phones = torch.randint(0, 6, (12,), generator=generator)
    told = phones[:4] + 2
    fast = [DurationItem(phones, told)] * 12
    slow = [DurationItem(phones, told * 3)] * 12
    quick = torch.stack(sample_durations(model, fast, seeded(range(12)))).mean(0)
    late = torch.stack(sample_durations(model, slow, seeded(range(12)))).mean(0)
    wanted = (phones[4:] + 2).float()
    assert float((quick / wanted).log().abs().mean()) < 0.35
    assert float((late / wanted / 3).log().abs().mean()) < 0.35
    assert total_frames(late) > 1.7 * total_frames(quick)


# ---- the aligner --------------------------------------------------------------------------------------


def test_the_aligner_learns_where_phones_are():
    """Semantic codes that tell their phone, with more codes than phones, ragged: durations come out."""
    torch.manual_seed(0)
    model = Aligner(AlignerConfig(num_phones=6, codebook_size=18, width=24, size=12, sharpness=0.05))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(2)

    def batch():
        lengths = torch.randint(3, 7, (16,), generator=generator)
        durations = torch.randint(1, 6, (16, 6), generator=generator)
        durations = durations * (torch.arange(6) < lengths[:, None])
        steps = torch.randint(1, 6, (16, 6), generator=generator)
        phones = steps.cumsum(1) % 6  # neighbours differ
        frames = durations.sum(1)
        codes = torch.zeros(16, int(frames.max()) + 2, dtype=torch.int64)
        for row in range(16):
            heard = torch.repeat_interleave(phones[row], durations[row])
            codes[row, : len(heard)] = heard * 3 + torch.randint(0, 3, heard.shape, generator=generator)
        return phones, codes, lengths, frames, durations

    for step in range(150):
        *data, wanted = batch()
        terms = aligner_terms(model, *data)
        loss = terms.forward_sum + (terms.binarisation if step > 75 else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    *data, wanted = batch()
    got = model.eval().align(*data)
    assert float((got == wanted).float().mean()) > 0.95
    phones, codes, lengths, frames = data
    for row in (0, 5):
        n, t = int(lengths[row]), int(frames[row])
        alone = model.align(
            phones[row : row + 1, :n],
            codes[row : row + 1, :t],
            lengths[row : row + 1],
            frames[row : row + 1],
        )
        assert torch.equal(alone[0], got[row, :n])
    with pytest.raises(InputError, match="a frame for every symbol"):
        model.align(phones[:1], codes[:1, :2], lengths[:1], torch.tensor([2]))


def test_aligner_settings_are_checked():
    with pytest.raises(ConfigError, match="kernel"):
        AlignerConfig(kernel=2)
