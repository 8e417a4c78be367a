"""Stage 0: the evaluation sets, never trained on, as JSONL {"path", "text", ...} for `nar-speech evaluate`.

    python prepare_eval.py --work work [--shared-data DIR] [--github https://github.com]

Writes work/eval/<set>/*.flac and work/eval/<set>.jsonl with paths relative to that file. A set that can't
be had is named loudly and left out.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from asterisk import prompts
from common import (
    RATE,
    Repository,
    hours,
    notice,
    read_16k,
    read_g722,
    read_jsonl,
    read_raw,
    write_flac,
    write_jsonl,
)
from reserved import asterisk_reserved
from words import to_words

SPHINX = Path("/usr/share/pocketsphinx/test/data")
# What is said in PocketSphinx's headerless recordings (numbers.raw is left out: its wording isn't certain).
SPHINX_RAW = {
    "goforward": "go forward ten meters",
    "something": "go somewhere and do something",
    "tidigits/dhd.2934z": "two nine three four zero",
}
JFK = (
    "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
)
# The sentences that every VCTK speaker reads (elicitation paragraph, rainbow passage): "number words" a line.
VCTK_TEXT = Path(__file__).parents[1] / "conf" / "vctk_passage.txt"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

Clip = tuple[str, str, np.ndarray]  # name, words, samples at 16 kHz


def asterisk(args: argparse.Namespace) -> Iterator[Clip]:
    for name, words, path in prompts():
        if asterisk_reserved(name):
            yield name, words, read_g722(path)


def pocketsphinx(args: argparse.Namespace) -> Iterator[Clip]:
    if not SPHINX.is_dir():
        raise FileNotFoundError("Debian package pocketsphinx-testdata is not installed")
    for folder, listing in (("librivox", "transcription"), ("cards", "cards.transcription")):
        for line in (SPHINX / folder / listing).read_text(encoding="utf-8").splitlines():
            text, _, name = line.replace("<s>", "").partition("</s>")
            name = name.strip(" ()")
            yield name, to_words(text), read_16k(SPHINX / folder / f"{name}.wav")
    for name, words in SPHINX_RAW.items():
        yield Path(name).name, words, read_raw(SPHINX / f"{name}.raw")


def fsdd(args: argparse.Namespace) -> Iterator[Clip]:
    folder = args.shared_data / "fsdd" if args.shared_data else None
    if folder and (folder / "manifest.jsonl").exists():
        for row in read_jsonl(folder / "manifest.jsonl"):
            if row["split"] == "test":
                yield Path(row["path"]).stem, row["text"], read_16k(folder / row["path"])
        return
    repo = Repository(args.github, "Jakobovski/free-spoken-digit-dataset", args.work / "clones")
    for path in repo.names("recordings"):
        name = Path(path).stem
        if path.endswith(".wav") and int(name.rsplit("_", 1)[1]) < 5:
            yield name, DIGITS[int(name[0])], read_16k(repo.read(path))


def librispeech_other(args: argparse.Namespace) -> Iterator[Clip]:
    references = Repository(args.github, "facebookresearch/fbai-speech", args.work / "clones")
    lines = references.read("is21_deep_bias/ref/test-other.biasing_100.tsv").decode().splitlines()
    texts = {line.split("\t")[0]: to_words(line.split("\t")[1]) for line in lines if line.strip()}
    repo = Repository(args.github, "resemble-ai/Resemblyzer", args.work / "clones")
    for path in repo.names("audio_data/librispeech_test-other"):
        name = Path(path).stem
        if not path.endswith(".flac"):
            continue
        if name not in texts:
            notice(f"librispeech_other: no reference for {name}")
        else:
            yield name, texts[name], read_16k(repo.read(path))


def vctk(args: argparse.Namespace) -> Iterator[Clip]:
    texts = dict(line.split(" ", 1) for line in VCTK_TEXT.read_text(encoding="utf-8").splitlines())
    repo = Repository(args.github, "auspicious3000/autovc", args.work / "clones")
    for speaker in ("p225", "p226", "p227", "p228"):
        for path in repo.names(f"wavs/{speaker}"):
            words = texts.get(Path(path).stem.split("_")[1])
            if words:
                yield Path(path).stem, words, read_16k(repo.read(path))


def jfk(args: argparse.Namespace) -> Iterator[Clip]:
    repo = Repository(args.github, "openai/whisper", args.work / "clones")
    yield "jfk", JFK, read_16k(repo.read("tests/jfk.flac"))


SETS = {
    "librispeech_other": librispeech_other,
    "vctk": vctk,
    "asterisk_reserved": asterisk,
    "pocketsphinx": pocketsphinx,
    "fsdd_test": fsdd,
    "jfk": jfk,
}


def evaluation_set(name: str, args: argparse.Namespace) -> list[dict]:
    """Write one of SETS to work/eval; returns its rows."""
    folder, rows = args.work / "eval", []
    for clip, words, samples in SETS[name](args):
        path = folder / name / f"{clip}.flac"
        duration = round(write_flac(path, samples), 3)
        rows.append(
            {"path": f"{name}/{path.name}", "text": words, "source": name, "name": clip, "duration": duration}
        )
    write_jsonl(folder / f"{name}.jsonl", rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared-data", type=Path)
    parser.add_argument(
        "--github", default="https://github.com", help="server, or a folder of owner+name/repo mirrors"
    )
    args = parser.parse_args()
    for name in SETS:
        try:
            rows = evaluation_set(name, args)
        except FileNotFoundError as error:
            notice(f"evaluation set {name} SKIPPED: {error}")
            continue
        words = sum(len(row["text"].split()) for row in rows)
        print(
            f"{name:18s} {len(rows):5d} clips {hours(rows) * 3600 / 60:6.1f} min {words:6d} words, {RATE} Hz"
        )


if __name__ == "__main__":
    main()
