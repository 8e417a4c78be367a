"""Encode sounds and their captions once, for python -m recipes.magnet.

  python -m recipes.prepare_sound CUTS.jsonl.gz -o FOLDER --codec NAME --conditioner sentence

CUTS: lhotse cuts; captions are the texts of their supervisions and the list ``captions`` in ``custom``.
Shards that are there already are kept, so the same command goes on after any interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nar_speech.checkpoint import sha256_of
from nar_speech.codec.base import Codec
from nar_speech.codec.load import load_codec
from nar_speech.data.augment import open_cuts, read_cut
from nar_speech.data.tokens import (
    INDEX,
    TokenIndex,
    captions_of,
    write_index,
    write_shard,
    write_texts,
)
from nar_speech.errors import ConfigError, ManifestError, NarSpeechError
from nar_speech.locate import embedded_models
from nar_speech.text.conditioner import SENTENCE_PACKAGE, ConditionerConfig, load_conditioner

MADE = "made.json"  # what the shards that are there were made with


def prepare(
    cuts_file: str,
    out: str | Path,
    codec_name: str,
    conditioner: ConditionerConfig,
    num_codebooks: int | None = None,
    shard_size: int = 2000,
    batch_seconds: float = 120.0,
    device: str = "cpu",
) -> TokenIndex:
    """Write a folder of codes.

    Raises:
        ConfigError: the folder has codes made otherwise. ManifestError: no cuts.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    cuts = list(open_cuts(cuts_file, "cuts"))
    if not cuts:
        raise ManifestError(f"{cuts_file}: holds no cuts")
    codec, encoder = load_codec(codec_name).to(device), load_conditioner(conditioner).to(device)
    if Path(codec_name).is_dir() and codec_name not in embedded_models():
        codec_name = str(Path(codec_name).resolve())  # the training may run in another folder
    codebooks = codec.check_codebooks(num_codebooks)
    contents = json.dumps([cut.to_dict() for cut in cuts], sort_keys=True, default=str)
    made_of = sha256_of(codec.state_dict()), hashlib.sha256(contents.encode()).hexdigest()
    settings = [*made_of, codebooks, shard_size]
    if (out / MADE).is_file() and json.loads((out / MADE).read_text()) != settings:
        raise ConfigError(
            f"{out}: has codes of other cuts or captions, or of another codec; remove it or name another"
        )
    (out / MADE).write_text(json.dumps(settings))
    told = [captions_of(cut) for cut in cuts]
    captions = sorted({text for row in told for text in row})
    place = {text: number for number, text in enumerate(captions)}
    states = [encoder([text])[0][0].cpu() for text in captions]
    write_texts(out, states or [torch.zeros(0, encoder.width)])
    names = []
    for first in range(0, len(cuts), shard_size):
        names.append(f"codes-{first // shard_size:05d}.safetensors")
        part = slice(first, first + shard_size)
        if not (out / names[-1]).is_file():
            codes = encode_cuts(codec, cuts[part], codebooks, batch_seconds)
            numbers = [[place[text] for text in row] for row in told[part]]
            write_shard(out / names[-1], codes, numbers, [cut.id for cut in cuts[part]])
        print(f"{min(first + shard_size, len(cuts))} of {len(cuts)} clips", file=sys.stderr)
    index = TokenIndex(
        *(str(codec_name), codec.sample_rate, float(codec.frame_rate), codebooks, codec.codebook_size),
        *(conditioner, encoder.width, captions, names),
    )
    write_index(out, index)
    return index


@torch.inference_mode()
def encode_cuts(codec: Codec, cuts: Sequence, codebooks: int, batch_seconds: float) -> list[Tensor]:
    """Codes (K, T) of cuts, in batches of similar length."""
    order = sorted(range(len(cuts)), key=lambda i: cuts[i].duration)
    codes: list[Tensor | None] = [None] * len(cuts)
    group: list[int] = []
    for position, i in enumerate(order):
        group.append(i)
        last = position + 1 == len(order)
        if not last and cuts[order[position + 1]].duration * (len(group) + 1) <= batch_seconds:
            continue
        waves = [torch.from_numpy(read_cut(cuts[j], codec.sample_rate)) for j in group]
        lengths = torch.tensor([len(wave) for wave in waves])
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        padded = padded[:, None].expand(-1, codec.channels, -1).to(codec.device)
        made = codec.encode(padded, lengths.to(codec.device), codebooks)
        for j, tokens, length in zip(group, made.tokens.cpu(), made.lengths.tolist(), strict=True):
            codes[j] = tokens[:, :length]
        group = []
    return codes


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cuts")
    parser.add_argument("-o", "--output", required=True, help="folder of codes")
    parser.add_argument("--codec", default="mini_codec", help="name, folder or file (default: %(default)s)")
    parser.add_argument("--conditioner", choices=("sentence", "t5"), default="sentence")
    parser.add_argument("--conditioner-name", help="folder or hub id of the text encoder")
    parser.add_argument("--codebooks", type=int, help="how many to keep (default: all)")
    parser.add_argument("--shard-size", type=int, default=2000, help="clips in a file")
    parser.add_argument("--batch-seconds", type=float, default=120.0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    names = {"sentence": SENTENCE_PACKAGE, "t5": ConditionerConfig().name}
    name = options.conditioner_name or names[options.conditioner]
    try:
        index = prepare(
            *(options.cuts, options.output, options.codec, ConditionerConfig(options.conditioner, name)),
            *(options.codebooks, options.shard_size, options.batch_seconds, options.device),
        )
    except NarSpeechError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{Path(options.output) / INDEX}: {len(index.captions)} captions, {len(index.shards)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
