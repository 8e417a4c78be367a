"""MaskGCT's and Metis' networks: names and shapes, padding, packing, loading, masks of training."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.checkpoint import SkipInit, compare_shapes, save_safetensors
from nar_speech.errors import CheckpointError, ConfigError, InputError
from nar_speech.layers.diffllama import DiffLlama, DiffLlamaConfig, PackedLayout, step_embedding
from nar_speech.layers.quantize import int8_available
from nar_speech.losses.maskgct import (
    StepDraws,
    draw_layer,
    draw_step,
    layer_weights,
    mask_acoustic,
    mask_probability,
    mask_semantic,
)
from nar_speech.models.maskgct import (
    EMPTY,
    S2A,
    T2S,
    S2AConfig,
    S2AItem,
    T2SConfig,
    T2SItem,
    load_network,
    s2a_loss,
    t2s_loss,
    target_frames,
)
from nar_speech.models.metis import Metis, MetisConfig, load_metis

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SMALL = {"width": 24, "num_blocks": 2, "heads": 3, "hidden_scale": 2}
T2S_CONFIG = T2SConfig(**SMALL, codebook_size=13, num_phones=9)
S2A_CONFIG = S2AConfig(**SMALL, num_codebooks=3, codebook_size=11, semantic_size=13)
FULL = Path(__file__).parent / "golden" / "maskgct" / "state_dict_transformers.json"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def loud(network, seed=0):
    """Weights that hide no wrong use."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return network.eval()


torch.manual_seed(0)
T2S_NETWORK, S2A_NETWORK = loud(T2S(T2S_CONFIG)), loud(S2A(S2A_CONFIG))


def ids(size, *shape, seed=0):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


# ---- names and shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "cls", "config"),
    [
        ("t2s_model/model.safetensors", T2S, T2SConfig()),
        ("s2a_model/s2a_model_1layer/model.safetensors", S2A, S2AConfig(num_codebooks=1)),
        ("s2a_model/s2a_model_full/model.safetensors", S2A, S2AConfig()),
    ],
)
def test_full_size_has_the_official_names_and_shapes(file, cls, config):
    shapes = {name: tuple(shape) for name, shape in json.loads(FULL.read_text())[file].items()}
    if cls is S2A:
        assert shapes.pop(EMPTY) == (0, 256)
    with torch.device("meta"), SkipInit():
        network = cls(config)
    assert compare_shapes(network, shapes) == []


def test_official_words():
    assert T2SConfig.from_official({"hidden_size": 48, "num_layers": 3, "num_heads": 4}) == T2SConfig(
        width=48, num_blocks=3, heads=4
    )
    conf = {"num_quantizer": 1, "codebook_size": 96, "cond_codebook_size": 128, "predict_layer_1": True}
    assert S2AConfig.from_official(conf) == S2AConfig(num_codebooks=1, codebook_size=96, semantic_size=128)


@pytest.mark.parametrize("changes", [{"heads": 5}, {"heads": 8}, {"num_blocks": 0}, {"codebook_size": 1}])
def test_sizes_that_make_no_sense(changes):
    with pytest.raises(ConfigError):
        T2S(T2SConfig(**{**vars(T2S_CONFIG), **changes}))


# ---- the core -------------------------------------------------------------------------------------------


def test_the_step_is_not_scaled():
    code = step_embedding(torch.tensor([0.0, 0.5, 1.0]), 8)
    assert torch.equal(code[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(code[1, 0], torch.tensor(0.5).sin())
    torch.testing.assert_close(code[2, 3], torch.tensor(1e-4).sin())


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 7)), min_size=1, max_size=5),
    apart=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_sequences_are_what_they_are_alone(sizes, apart, seed):
    core = loud(DiffLlama(DiffLlamaConfig(16, 3, 2)), seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(before + wanted, 16, generator=generator) for before, wanted in sizes]
    time = torch.rand(len(rows), generator=generator)
    time = time if apart else time[:1]
    layout = PackedLayout.of([len(x) for x in rows], [w for _, w in sizes], 8, torch.device("cpu"))
    got = core.packed(torch.cat(rows), layout, core.gains(time))
    want = torch.cat(
        [
            core(x[None], time[i if apart else 0].reshape(1))[0, -wanted:]
            for i, (x, (_, wanted)) in enumerate(zip(rows, sizes, strict=True))
        ]
    )
    torch.testing.assert_close(got, want, **CLOSE)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_padded_batch_of_phones_equals_its_singles(sizes, seed):
    lengths = torch.tensor([size for _, size in sizes])
    phone_lengths = torch.tensor([count for count, _ in sizes])
    tokens, phones = ids(14, len(sizes), 9, seed=seed), ids(9, len(sizes), 6, seed=seed + 1)
    time = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed))
    got = T2S_NETWORK(tokens, time, lengths, phones, phone_lengths)
    for row, (count, size) in enumerate(sizes):
        alone = T2S_NETWORK(tokens[row, None, :size], time[row, None], None, phones[row, None, :count])
        torch.testing.assert_close(got[row, :size], alone[0], **CLOSE)


def test_official_padding_lets_the_longest_phones_shift_the_codes():
    tokens, phones = ids(13, 1, 6), ids(9, 1, 5)
    arguments = tokens, torch.tensor([0.5]), None, phones, torch.tensor([3])
    official = T2S_NETWORK(*arguments, official_padding=True)
    assert not torch.allclose(T2S_NETWORK(*arguments), official, atol=1e-4)


def test_padding_of_acoustic_codes_changes_nothing():
    tokens, semantic = ids(12, 2, 3, 8), ids(13, 2, 8)
    time, lengths = torch.tensor([0.3, 0.9]), torch.tensor([8, 5])
    got = S2A_NETWORK(tokens, time, semantic, 1, lengths)
    alone = S2A_NETWORK(tokens[1:, :, :5], time[1:], semantic[1:, :5], 1)
    torch.testing.assert_close(got[1, :5], alone[0], **CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_prepared_for_inference(dtype):
    if dtype == "int8" and not int8_available():
        pytest.skip("no int8 kernels here")
    network = loud(T2S(T2S_CONFIG))
    tokens, phones, time = ids(14, 2, 9), ids(9, 2, 4), torch.tensor([0.2, 0.7])
    with torch.inference_mode():
        want = network(tokens, time, None, phones)
        got = network.prepare(dtype)(tokens, time, None, phones)
    assert got.dtype == torch.float32
    error = (got - want).norm() / want.norm()
    assert error < {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.1}[dtype]
    assert (error > 0) or dtype == "float32"


def test_a_dtype_that_there_is_not():
    with pytest.raises(InputError, match="float64"):
        T2S(T2S_CONFIG).prepare("float64")


# ---- what is known of an item ---------------------------------------------------------------------------

PROMPT, PHONES = ids(13, 4), ids(9, 5)


@pytest.mark.parametrize(
    ("item", "word"),
    [
        (T2SItem(PHONES + 9, PROMPT), "phones"),
        (T2SItem(PHONES[:0], PROMPT), "letter"),
        (T2SItem(PHONES.float(), PROMPT), "int64"),
        (T2SItem(PHONES[None], PROMPT), "axes"),
        (T2SItem(PHONES, PROMPT + 13), "prompt"),
        (T2SItem(PHONES, PROMPT, torch.zeros(9, 2)), "features"),
    ],
)
def test_semantic_items_that_do_not_fit(item, word):
    with pytest.raises(InputError, match=word):
        T2S_NETWORK.condition(item, 0, 5)


@pytest.mark.parametrize(
    ("item", "word"),
    [
        (S2AItem(ids(13, 8), ids(11, 4, 3)), "cover both"),
        (S2AItem(ids(13, 9), ids(11, 4, 2)), "2 layers"),
        (S2AItem(ids(13, 9) + 13, ids(11, 4, 3)), "semantic"),
        (S2AItem(ids(13, 9), ids(11, 4, 3) - 11), "acoustic prompt"),
    ],
)
def test_acoustic_items_that_do_not_fit(item, word):
    with pytest.raises(InputError, match=word):
        S2A_NETWORK.condition(item, 0, 5)


def test_shapes_and_layers_that_do_not_fit():
    with pytest.raises(InputError, match="stage"):
        S2A_NETWORK(ids(12, 1, 3, 4), torch.ones(1), ids(13, 1, 4), 3)
    with pytest.raises(InputError, match="positions"):
        S2A_NETWORK(ids(12, 1, 2, 4), torch.ones(1), ids(13, 1, 4), 0)
    plain = T2S(T2SConfig(**{**vars(T2S_CONFIG), "use_phones": False}))
    assert not hasattr(plain, "phone_emb")
    with pytest.raises(InputError, match="without phones"):
        plain(ids(13, 1, 4), torch.ones(1), None, ids(9, 1, 4))
    with pytest.raises(InputError, match="without phones"):
        plain.condition(T2SItem(PHONES, PROMPT), 0, 5)


def test_length_rule():
    assert target_frames(48_000, 30, 45) == 225
    assert target_frames(16_001, 7, 3) == 21
    with pytest.raises(InputError, match="no phones"):
        target_frames(16_000, 0, 3)


# ---- loading --------------------------------------------------------------------------------------------


def test_the_table_without_rows_is_ignored_and_one_with_rows_is_not(tmp_path):
    file = tmp_path / "model.safetensors"
    save_safetensors(file, S2A_NETWORK.state_dict() | {EMPTY: torch.zeros(0, 256)})
    loaded = load_network(S2A, S2A_CONFIG, file)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), S2A_NETWORK.parameters(), strict=True))
    save_safetensors(file, S2A_NETWORK.state_dict() | {EMPTY: torch.zeros(1, 256)})
    with pytest.raises(CheckpointError, match="has rows"):
        load_network(S2A, S2A_CONFIG, file)
    save_safetensors(file, T2S_NETWORK)
    with pytest.raises(CheckpointError, match="missing"):
        load_network(S2A, S2A_CONFIG, file)


METIS_CONFIG = MetisConfig(**SMALL, codebook_size=13, num_phones=9, features=6)


def lora_of(network, rank, seed=0):
    """Factors of all Linear layers of the blocks, in the official names."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, part in network.named_modules():
        if name.endswith("_proj"):
            first = torch.randn(rank, part.in_features, generator=generator)
            second = torch.randn(part.out_features, rank, generator=generator)
            factors[f"model.{name}.lora_A.default.weight"] = first
            factors[f"model.{name}.lora_B.default.weight"] = second
    return factors


@pytest.mark.parametrize("whole", [False, True])
def test_lora_and_adapter_files(tmp_path, whole):
    """Base model, adapter and factors in three files, or as one file with wrapped layers."""
    tuned = loud(Metis(METIS_CONFIG), 1)
    factors = lora_of(tuned, 3)
    state = tuned.state_dict()
    adapter = {f"model.{n}": t for n, t in state.items() if n.startswith("cond_adapter")}
    if whole:
        layers = {name.split(".lora_")[0] for name in factors}
        wrapped = {f"base_model.model.{n}": t for n, t in state.items()}
        renamed = {
            n.replace(".weight", ".base_layer.weight") if n[11:].removesuffix(".weight") in layers else n: t
            for n, t in wrapped.items()
        }
        save_safetensors(tmp_path / "vc", renamed | {f"base_model.{n}": t for n, t in factors.items()})
        got = load_metis(METIS_CONFIG, tmp_path / "vc", alpha=6.0)
    else:
        base = {n: t for n, t in state.items() if not n.startswith("cond_adapter")}
        for name, tensors in (("base", base), ("lora", factors), ("adapter", adapter)):
            save_safetensors(tmp_path / name, tensors)
        files = (tmp_path / name for name in ("base", "lora", "adapter"))
        got = load_metis(METIS_CONFIG, *files, alpha=6.0)
    for name, tensor in got.state_dict().items():
        want = state[name]
        factor = f"model.{name.removesuffix('.weight')}.lora_"
        if factor + "A.default.weight" in factors:
            product = factors[factor + "B.default.weight"] @ factors[factor + "A.default.weight"]
            want = want + 2.0 * product  # alpha / rank
        torch.testing.assert_close(tensor, want)


def test_metis_files_that_do_not_fit(tmp_path):
    tuned = Metis(METIS_CONFIG)
    factors = lora_of(tuned, 2)
    save_safetensors(tmp_path / "base", tuned)
    some = dict(list(factors.items())[:1])
    stray = {"layer.lora_A.weight": torch.ones(2, 3), "layer.lora_B.weight": torch.ones(3, 2)}
    wrong = {name: tensor[:, :-1] for name, tensor in list(factors.items())[:2]}
    cases = (
        ("other factor", some),
        ("layer's weight", stray),
        ("do not fit", wrong),
        ("no LoRA", {"a": PROMPT}),
    )
    for number, (word, tensors) in enumerate(cases):
        save_safetensors(tmp_path / str(number), tensors)
        with pytest.raises(CheckpointError, match=word):
            load_metis(METIS_CONFIG, tmp_path / "base", tmp_path / str(number))
    with pytest.raises(CheckpointError, match="no weight of an adapter"):
        load_metis(METIS_CONFIG, tmp_path / "base", adapter=tmp_path / "0")


def test_metis_adapters():
    tasks = {"vc": (1024, True), "l2s": (1024, False), "tts": (0, True)}
    for task, (features, gate) in tasks.items():
        config = MetisConfig.from_official({"use_phone_cond": False, "cond_dim": 1024}, task)
        assert (config.features, config.gate if features else True, config.use_phones) == (
            features,
            gate,
            False,
        )
    plain = Metis(MetisConfig(**{**vars(METIS_CONFIG), "gate": False}))
    assert {"cond_adapter.0.weight", "cond_adapter.2.bias"} <= set(plain.state_dict())
    network = Metis(METIS_CONFIG)  # the gate is shut at first
    bare = network.condition(T2SItem(None, PROMPT), 0, 3)
    full = network.condition(T2SItem(None, PROMPT, torch.randn(7, 6)), 0, 3)
    assert torch.equal(bare.prefix, full.prefix)
    assert bare.target is None
    assert not full.target.any()
    with pytest.raises(InputError, match="cover both"):
        network.condition(T2SItem(None, PROMPT, torch.randn(6, 6)), 0, 3)
    with pytest.raises(InputError, match="expected"):
        network.condition(T2SItem(None, PROMPT, torch.randn(7, 5)), 0, 3)
    with pytest.raises(InputError, match="no adapter"):
        Metis(MetisConfig(**{**vars(METIS_CONFIG), "features": 0})).added(torch.randn(7, 6))


# ---- masks and losses of training -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    prompt=st.sampled_from([0.4, 0.5]),
    drop=st.sampled_from([0.0, 0.15, 1.0]),
    seed=st.integers(0, 999),
)
def test_draws_of_a_step(lengths, prompt, drop, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes, frames = torch.tensor(lengths), max(lengths)
    draws = draw_step(sizes, frames, generator, prompt=prompt, prompt_drop=drop)
    assert ((draws.time >= 1e-5) & (draws.time <= 1)).all()
    assert ((draws.prompts >= 0) & (draws.prompts < sizes)).all()
    for length, size in zip(lengths, draws.prompts.tolist(), strict=True):
        assert size <= max(int(length * prompt) - 1, min(length // 4, 5), 0)
        assert size >= min(length // 4, 5) or drop
    if drop == 1.0:
        assert not draws.prompts.any()
    batch = mask_semantic(ids(13, len(lengths), frames, seed=seed), sizes, draws, 13)
    place = torch.arange(frames)
    assert batch.masked.any(1).all()
    assert not (batch.masked & (place >= sizes[:, None])).any()
    assert not (batch.masked & (place < draws.prompts[:, None])).any()
    assert ((batch.tokens == 13) | (batch.tokens == batch.targets)).all()
    assert (batch.tokens[batch.masked] == 13).all()


def test_a_mask_on_padding_counts_only_officially():
    masked = torch.tensor([[False, False, True]])
    draws = StepDraws(torch.ones(1), torch.zeros(1, dtype=torch.int64), masked)
    codes, lengths = ids(13, 1, 3), torch.tensor([2])
    assert mask_semantic(codes, lengths, draws, 13).masked.tolist() == [[True, False, False]]
    assert not mask_semantic(codes, lengths, draws, 13, official_padding=True).masked.any()


def test_masked_part_follows_the_step():
    draws = draw_step(torch.full((4000,), 50), 50, torch.Generator().manual_seed(0))
    share = draws.masked.float().mean(1)
    want = mask_probability(draws.time, 0.2)
    assert (share - want).mean().abs() < 0.005
    assert want.min() == pytest.approx(0.2)
    assert (draws.prompts == 0).float().mean() == pytest.approx(0.15, abs=0.02)


def test_layers_before_are_true_and_layers_after_are_masked():
    codes = ids(11, 2, 3, 8)
    masked = torch.zeros(2, 8, dtype=torch.bool)
    masked[0, [1, 5]] = True
    draws = StepDraws(torch.tensor([0.5, 0.5]), torch.tensor([2, 3]), masked)
    batch = mask_acoustic(codes, torch.tensor([8, 6]), draws, 1, 11)
    assert torch.equal(batch.tokens[:, 0], codes[:, 0])
    assert (batch.tokens[0, 1] == 11).nonzero()[:, 0].tolist() == [5]  # 1 lies in the prompt
    assert (batch.tokens[1, 1] == 11).nonzero()[:, 0].tolist() == [3]  # one at least
    assert torch.equal(batch.tokens[1, 2, :3], codes[1, 2, :3])
    assert (batch.tokens[1, 2, 3:] == 11).all()
    assert torch.equal(batch.targets, codes[:, 1])
    assert batch.stage == 1
    with pytest.raises(InputError, match="stage"):
        mask_acoustic(codes, torch.tensor([8, 6]), draws, 3, 11)


def test_weights_of_layers():
    assert layer_weights(3) == pytest.approx((3 / 6, 2 / 6, 1 / 6))
    assert layer_weights(3, first=False) == pytest.approx((0, 3 / 5, 2 / 5))
    assert layer_weights(4, "uniform", first=False) == pytest.approx((0, 1 / 3, 1 / 3, 1 / 3))
    assert layer_weights(2, "cosine")[1] == pytest.approx(0.5**0.5 / (1 + 0.5**0.5))
    generator = torch.Generator().manual_seed(0)
    drawn = {draw_layer(layer_weights(3, first=False), generator) for _ in range(50)}
    assert drawn == {1, 2}
    with pytest.raises(ConfigError, match="unknown"):
        layer_weights(3, "square")
    with pytest.raises(ConfigError, match="nothing"):
        layer_weights(1, first=False)


def test_training_in_bfloat16():
    network = loud(T2S(T2S_CONFIG)).train()
    lengths, codes = torch.tensor([12, 9]), ids(13, 2, 12)
    batch = mask_semantic(codes, lengths, draw_step(lengths, 12, torch.Generator().manual_seed(0)), 13)
    phones = ids(9, 2, 4), torch.tensor([4, 0])  # the second without: phones may be dropped item by item
    want = t2s_loss(network, batch, *phones)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = t2s_loss(network, batch, *phones)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_losses_fall():
    """A few steps on one batch: gradients reach everything."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    first, second = T2S(T2S_CONFIG), S2A(S2A_CONFIG)
    lengths = torch.tensor([12, 9])
    codes, acoustic = ids(13, 2, 12), ids(11, 2, 3, 12)
    draws = draw_step(lengths, 12, generator)
    semantic = mask_semantic(codes, lengths, draws, 13)
    layers = [mask_acoustic(acoustic, lengths, draws, stage, 11) for stage in range(3)]

    def loss():
        parts = [s2a_loss(second, batch, codes)["loss"] for batch in layers]
        return t2s_loss(first, semantic, ids(9, 2, 4), torch.tensor([4, 2]))["loss"] + sum(parts)

    parameters = [*first.parameters(), *second.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]
