"""Turn transcribed speech into phones, semantic and acoustic codes once, for python -m recipes.maskgct.

  python -m recipes.prepare_speech CUTS.jsonl.gz -o FOLDER --codec NAME --semantic FOLDER

CUTS: lhotse cuts whose supervisions have texts. Cuts that can't be used (no text, letters of another
language) are named and left out. Shards that are there already are kept, so the same command goes on after
any interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nar_speech.checkpoint import sha256_of
from nar_speech.codec.load import load_codec
from nar_speech.data.augment import open_cuts
from nar_speech.data.speech_tokens import (
    INDEX,
    SpeechClip,
    SpeechIndex,
    write_speech_index,
    write_speech_shard,
)
from nar_speech.errors import ConfigError, ManifestError, NarSpeechError
from nar_speech.locate import embedded_models
from nar_speech.pipelines.semantic import load_semantic
from nar_speech.speech_folder import FeaturesConfig
from nar_speech.text.g2p import Phonemizer, PhonemizerConfig
from recipes.speech_codes import encode_cuts, spoken

MADE = "made.json"  # what the shards that are there were made with


def prepare(
    cuts_file: str,
    out: str | Path,
    codec_name: str,
    semantic: str,
    features: FeaturesConfig | None = None,
    num_codebooks: int | None = None,
    language: str = "auto",
    shard_size: int = 2000,
    batch_seconds: float = 60.0,
    device: str = "cpu",
) -> SpeechIndex:
    """Write a folder of phones and codes.

    Raises:
        ConfigError: the folder has codes made otherwise, or codecs of different rates.
        ManifestError: no cuts.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    codec, coder = load_codec(codec_name).to(device), load_semantic(semantic, features).to(device)
    if codec.frame_rate != coder.features.frame_rate:
        rates = f"{codec.frame_rate:g} and {coder.features.frame_rate:g} codes a second"
        raise ConfigError(f"{codec_name}, {semantic}: have {rates}; both must have the same rate")
    codebooks = codec.check_codebooks(num_codebooks)
    cuts, phones = spoken(list(open_cuts(cuts_file, "cuts")), Phonemizer(PhonemizerConfig(language)))
    if not cuts:
        raise ManifestError(f"{cuts_file}: holds no cuts with a text that can be said")
    said = json.dumps([[cut.to_dict(), row] for cut, row in zip(cuts, phones, strict=True)], default=str)
    made_of = sha256_of(codec.state_dict()), sha256_of(coder.state_dict())
    settings = [*made_of, hashlib.sha256(said.encode()).hexdigest(), codebooks, shard_size]
    if (out / MADE).is_file() and json.loads((out / MADE).read_text()) != settings:
        raise ConfigError(
            f"{out}: has codes of other cuts or texts, or of other codecs; remove it or name another"
        )
    (out / MADE).write_text(json.dumps(settings))
    names = []
    for first in range(0, len(cuts), shard_size):
        names.append(f"speech-{first // shard_size:05d}.safetensors")
        part = slice(first, first + shard_size)
        if not (out / names[-1]).is_file():
            codes = encode_cuts(codec, coder, cuts[part], codebooks, batch_seconds)
            rows = zip(cuts[part], phones[part], codes, strict=True)
            write_speech_shard(
                out / names[-1], [SpeechClip(cut.id, torch.tensor(p), *c) for cut, p, c in rows]
            )
        print(f"{min(first + shard_size, len(cuts))} of {len(cuts)} clips", file=sys.stderr)
    if Path(codec_name).is_dir() and codec_name not in embedded_models():
        codec_name = str(Path(codec_name).resolve())  # the training may run in another folder
    sizes = codec.sample_rate, float(codec.frame_rate), codebooks, codec.codebook_size
    index = SpeechIndex(codec_name, *sizes, str(Path(semantic).resolve()), coder.codebook_size, names)
    write_speech_index(out, index)
    return index


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cuts")
    parser.add_argument("-o", "--output", required=True, help="folder of codes")
    parser.add_argument("--codec", default="mini_codec", help="name, folder or file (default: %(default)s)")
    parser.add_argument("--semantic", required=True, help="folder of a semantic codec, or of MaskGCT")
    parser.add_argument(
        "--w2vbert", help="folder or hub id of w2v-BERT (default: as the semantic codec says)"
    )
    parser.add_argument("--codebooks", type=int, help="how many to keep (default: all)")
    parser.add_argument("--language", default="auto", help="of the texts (default: %(default)s)")
    parser.add_argument("--shard-size", type=int, default=2000, help="clips in a file")
    parser.add_argument("--batch-seconds", type=float, default=60.0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    source = FeaturesConfig(source=options.w2vbert) if options.w2vbert else None
    try:
        index = prepare(
            *(options.cuts, options.output, options.codec, options.semantic, source, options.codebooks),
            *(options.language, options.shard_size, options.batch_seconds, options.device),
        )
    except NarSpeechError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{Path(options.output) / INDEX}: {len(index.shards)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
