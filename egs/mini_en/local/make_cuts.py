"""Stage 2: lhotse manifests of training, development and noise, and the word pieces.

    python make_cuts.py --work work [--repeat librispeech251=3] [--limit synthetic_flite=3]

Writes work/cuts/{train,dev,noise}.jsonl.gz, work/cuts/table.jsonl (hours by source) and work/bpe.model, which
stays as it is where it has the wanted size: trained weights depend on it. It may be run again at any time,
to take in speech that was made since.
Development: ljspeech32, some speakers of librispeech251 and speechocean762, coffee orders and prompts. None
of them is trained on, and their sentences are taken out of the synthetic speech.
"""

import argparse
import random
from pathlib import Path

from common import hours, notice, read_16k, read_jsonl, write_flac, write_jsonl
from development import split
from overlap import held_out
from reserved import check_not_reserved

from nar_speech.text.tokenizer import BpeTokenizer, train_bpe

SINGLE_WORDS = ("fsdd", "wake_words")


def limited(rows: list[dict], most: dict[str, float], seed: int) -> list[dict]:
    """Rows with at most `most[source]` hours of each source named there, drawn at random."""
    out, used = [], dict.fromkeys(most, 0.0)
    for row in random.Random(seed).sample(rows, len(rows)):
        source = row["source"]
        if source in most:
            used[source] += row["duration"] / 3600
            if used[source] > most[source]:
                continue
        out.append(row)
    return out


def likely(rows: list[dict], scores: Path, least: float | None) -> list[dict]:
    """Rows without the speechocean762 clips whose transcript scored below `least` (filter_speechocean.py)."""
    if least is None or not scores.exists():
        return rows
    low = {row["name"] for row in read_jsonl(scores) if row["score"] < least}
    kept = [row for row in rows if row["source"] != "speechocean762" or row["name"] not in low]
    print(f"{len(rows) - len(kept)} clips of speechocean762 dropped: their transcripts score below {least}")
    return kept


def to_cut(row: dict, copy: int = 0):
    """A lhotse cut of one manifest row; copies of a clip get other names, so they are augmented otherwise."""
    from lhotse import Recording, SupervisionSegment
    from lhotse.audio import AudioSource
    from lhotse.cut import MonoCut

    name = f"{row['source']}-{row['name']}" + (f"-copy{copy}" if copy else "")
    path = row["file"].resolve()
    samples = round(row["duration"] * 16000)
    recording = Recording(name, [AudioSource("file", [0], str(path))], 16000, samples, samples / 16000)
    text = SupervisionSegment(
        name,
        name,
        0.0,
        recording.duration,
        text=row["text"],
        speaker=row["speaker"],
        custom={"source": row["source"]} | ({"written": row["written"]} if row.get("written") else {}),
    )
    return MonoCut(name, 0.0, recording.duration, 0, [text], recording=recording)


def write_cuts(path: Path, rows: list[dict], repeat: dict[str, int]) -> None:
    from lhotse import CutSet

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    CutSet.from_cuts(
        to_cut(row, copy) for row in rows for copy in range(repeat.get(row["source"], 1))
    ).to_file(part)
    part.rename(path)  # at once: a training may be reading the old one


def noise_cuts(args: argparse.Namespace) -> int:
    """Environmental sounds (ESC-10 folds 1 to 4; fold 5 stays for evaluation) as a noise CutSet."""
    from lhotse import CutSet

    folder = args.shared_data / "esc10" if args.shared_data else None
    if not folder or not (folder / "manifest.jsonl").exists():
        notice("esc10 SKIPPED (no --shared-data): training goes without added noise")
        return 0
    rows = []
    for row in read_jsonl(folder / "manifest.jsonl"):
        if row["fold"] <= 4:
            file = args.work / "noise" / f"{Path(row['path']).stem}.flac"
            duration = write_flac(file, read_16k(folder / row["path"]))
            rows.append(
                {"file": file, "source": "esc10", "name": file.stem, "duration": duration}
                | {"text": "", "speaker": None}
            )
    CutSet.from_cuts(to_cut(row) for row in rows).to_file(args.work / "cuts" / "noise.jsonl.gz")
    return len(rows)


def load(folder: Path, files: list[Path]) -> list[dict]:
    rows = [row | {"file": folder / row["path"]} for file in files for row in read_jsonl(file)]
    missing = [row["file"] for row in rows if not row["file"].exists()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} clips are gone, the first is {missing[0]}; run again from stage 0"
        )
    return rows


def add_written(work: Path, rows: list[dict]) -> None:
    """Put the written form (case, punctuation) into the rows where it is known.

    Of recordings it is what teacher.py made, of synthetic speech the sentence that was given to the voice, of
    single words the word as a sentence: without them the verifier repeats clips of less than a second.
    """
    cased, spoken = {}, {}
    for path in sorted((work / "real" / "cased").glob("*.jsonl")):
        cased |= {(path.stem, row["name"]): row["cased"] for row in read_jsonl(path)}
    for path in sorted((work / "synth").glob("text*.jsonl")):
        spoken |= {(row["id"], row["text"]): row["spoken"] for row in read_jsonl(path)}
    for row in rows:
        real = cased.get((row["source"], row["name"]))
        word = f"{row['text'].capitalize()}." if row["source"] in SINGLE_WORDS else None
        row.setdefault("written", real or word or spoken.get((row["name"], row["text"])))


def word_pieces(work: Path, real: list[dict], size: int):
    """The tokenizer work/bpe.model, trained where it isn't there or has another size."""
    path = work / "bpe.model"
    if path.exists():
        known = BpeTokenizer(path)
        if known.vocab_size == size:
            return known
    # All sentences, spoken yet or not: the pieces must not depend on how much speech was made.
    texts = [row["text"] for row in real + read_jsonl(work / "synth" / "text.jsonl")]
    return train_bpe(sorted(texts), size, path)


def pairs(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared-data", type=Path)
    parser.add_argument(
        "--repeat", type=pairs, nargs="*", default=[], help="source=times a clip is in one epoch"
    )
    parser.add_argument("--limit", type=pairs, nargs="*", default=[], help="source=most hours")
    parser.add_argument("--least-score", type=float, help="drop speechocean762 clips that score lower")
    parser.add_argument("--vocab-size", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not (args.work / "real").is_dir():
        parser.error(f"--work {args.work}: has no real/; run stage 0 first")
    real = load(
        args.work / "real", [p for p in sorted((args.work / "real").glob("*.jsonl")) if p.stem != "table"]
    )
    synth = load(args.work / "synth", sorted((args.work / "synth").glob("*.*of*.jsonl")))
    train, dev = split(real)
    held, guard = {row["text"] for row in dev if len(row["text"].split()) > 3}, held_out(args.work)
    # The prompts of speechocean762 and the coffee orders repeat by nature; prose must not.
    prose = [row for row in train + synth if row["source"] == "dctts_reader" or "synthetic" in row["source"]]
    known = {id(row) for row in prose if row["text"] in held}
    known |= {id(row) for row in synth if guard.shares(row["text"])}
    print(f"{len(known)} clips left out: their sentences are evaluated or validated")
    train = limited([row for row in train + synth if id(row) not in known], dict(args.limit), args.seed)
    train = likely(train, args.work / "cuts" / "speechocean_scores.jsonl", args.least_score)
    count = check_not_reserved(train, "training list")
    add_written(args.work, train + dev)
    repeat = {name: int(times) for name, times in args.repeat}
    write_cuts(args.work / "cuts" / "train.jsonl.gz", train, repeat)
    write_cuts(args.work / "cuts" / "dev.jsonl.gz", dev, {})
    noises = noise_cuts(args)
    bpe = word_pieces(args.work, split(real)[0], args.vocab_size)
    table = []
    for part, rows in (("train", train), ("dev", dev)):
        for source in sorted({row["source"] for row in rows}):
            mine = [row for row in rows if row["source"] == source]
            times = repeat.get(source, 1) if part == "train" else 1
            table.append(
                {
                    "part": part,
                    "source": source,
                    "clips": len(mine),
                    "hours": round(hours(mine), 3),
                    "times": times,
                }
            )
            print(f"{part:5s} {source:18s} {len(mine):6d} clips {hours(mine):6.2f} h x {times}")
    write_jsonl(args.work / "cuts" / "table.jsonl", table)
    total = sum(row["hours"] * row["times"] for row in table if row["part"] == "train")
    print(
        f"{count} clips checked against the reserved names; {total:.2f} h an epoch; {noises} noises; "
        f"{bpe.vocab_size} pieces"
    )


if __name__ == "__main__":
    main()
