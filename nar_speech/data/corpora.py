"""Manifests of public corpora that lie in a local folder, made with lhotse's recipes.

  python -m nar_speech.data.corpora librispeech --corpus-dir LibriSpeech --data-dir data \\
      --train train-clean-100 train-clean-360 --dev dev-clean dev-other --test test-clean test-other

Writes DATA_DIR/train.jsonl.gz and dev.jsonl.gz (CutSets; training cuts in random order, so that lazy reading
is enough for shuffling) and for every dev and test part PART.jsonl, lines {"path", "text"} for
``nar-speech evaluate``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nar_speech.data.loader import text_of
from nar_speech.errors import ManifestError, NarSpeechError


def read_librispeech(corpus_dir: Path, parts: Sequence[str], jobs: int) -> dict:
    """{part: CutSet} of LibriSpeech: PART/SPEAKER/CHAPTER/*.flac and *.trans.txt."""
    from lhotse.recipes import prepare_librispeech

    for part in parts:
        if not (corpus_dir / part).is_dir():
            raise ManifestError(f"corpus-dir: {corpus_dir} has no folder '{part}'")
    return _cuts(prepare_librispeech(corpus_dir, dataset_parts=list(parts), num_jobs=jobs))


def read_aishell(corpus_dir: Path, parts: Sequence[str], jobs: int) -> dict:
    """{part: CutSet} of AISHELL-1: data_aishell/wav/PART/SPEAKER/*.wav and data_aishell/transcript/."""
    from lhotse.recipes import prepare_aishell

    wanted = [corpus_dir / "data_aishell/wav" / part for part in parts]
    wanted.append(corpus_dir / "data_aishell/transcript/aishell_transcript_v0.8.txt")
    for path in wanted:
        if not path.exists():
            raise ManifestError(f"corpus-dir: {path} is missing; expected the unpacked data_aishell folder")
    manifests = prepare_aishell(corpus_dir)
    return _cuts({part: manifests[part] for part in parts})


def read_libritts(corpus_dir: Path, parts: Sequence[str], jobs: int) -> dict:
    """{part: CutSet} of LibriTTS or LibriTTS-R: PART/SPEAKER/CHAPTER/*.wav with .trans.tsv and .book.tsv."""
    from lhotse.recipes import prepare_libritts

    for part in parts:
        if not (corpus_dir / part).is_dir():
            raise ManifestError(f"corpus-dir: {corpus_dir} has no folder '{part}'")
    return _cuts(prepare_libritts(corpus_dir, dataset_parts=list(parts), num_jobs=jobs))


CORPORA: dict[str, Callable[[Path, Sequence[str], int], dict]] = {
    "librispeech": read_librispeech,
    "aishell": read_aishell,
    "libritts": read_libritts,
}


def prepare(
    corpus: str,
    corpus_dir: str | Path,
    data_dir: str | Path,
    train: Sequence[str],
    dev: Sequence[str],
    test: Sequence[str],
    jobs: int = 1,
    seed: int = 0,
) -> dict[str, tuple[int, float]]:
    """Write all manifests; returns {part: (utterances, hours)}.

    Raises:
        ManifestError: a folder or a transcript is missing, or a part holds no utterance.
    """
    from lhotse import CutSet

    corpus_dir, data_dir = Path(corpus_dir).resolve(), Path(data_dir)
    if not corpus_dir.is_dir():
        raise ManifestError(f"corpus-dir: no folder {corpus_dir}")
    data_dir.mkdir(parents=True, exist_ok=True)
    parts = CORPORA[corpus](corpus_dir, list(dict.fromkeys([*train, *dev, *test])), jobs)
    for name, cuts in parts.items():
        if not cuts:
            raise ManifestError(f"corpus-dir: part '{name}' of {corpus_dir} holds no utterance")
    for name, chosen in (("train", train), ("dev", dev)):
        cuts = sorted((cut for part in chosen for cut in parts[part]), key=lambda cut: cut.id)
        if name == "train":
            random.Random(seed).shuffle(cuts)
        CutSet.from_cuts(cuts).to_file(data_dir / f"{name}.jsonl.gz")
    for part in (*dev, *test):
        write_evaluation(parts[part], data_dir / f"{part}.jsonl")
    return {name: (len(cuts), sum(cut.duration for cut in cuts) / 3600) for name, cuts in parts.items()}


def write_evaluation(cuts: Sequence, path: Path) -> None:
    """Lines {"path", "text"} of cuts that are whole files, sorted by id."""
    with path.open("w", encoding="utf-8") as file:
        for cut in sorted(cuts, key=lambda cut: cut.id):
            row = {"path": cut.recording.sources[0].source, "text": text_of(cut)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _cuts(manifests: dict) -> dict[str, list]:
    from lhotse import CutSet

    return {part: list(CutSet.from_manifests(**sets)) for part, sets in manifests.items()}


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", choices=sorted(CORPORA))
    parser.add_argument("--corpus-dir", required=True)
    parser.add_argument("--data-dir", required=True)
    for name in ("train", "dev", "test"):
        parser.add_argument(f"--{name}", nargs="+", required=True, metavar="PART")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(argv)
    try:
        sizes = prepare(**vars(options))
    except NarSpeechError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part, (count, hours) in sizes.items():
        print(f"{part}: {count} utterances, {hours:.2f} h")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
