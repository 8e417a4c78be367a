"""Stage 1: lhotse manifests of everything that stage 0 and the renderers made.

    python make_cuts.py --work work [--speech WORK_OF_MINI_EN]

Writes to work/cuts, each for what is there:
  codec_train_{speech,real,music,effects}.jsonl.gz   what the codec learns from, captions or not
  codec_dev.jsonl.gz                                 held-out speech and sounds
  sound_train.jsonl.gz, sound_dev.jsonl.gz           sounds with captions
  eval_{speech,esc10,music,effects}.jsonl.gz         never trained on: reserved speech, fold 5, other renders
  table.jsonl                                        clips and hours of each
A cut of a sound has the most exact caption as its supervision's text, and in `custom`: captions (all that
are true), kind, label (the classifier's class), labels (what it is made of), source, licence, author where
there is one.
"""

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

from base import fail, hours, notice, read_jsonl, share, write_jsonl
from captions import captions
from development import split as split_speech
from reserved import EVAL_SOURCES, check_not_reserved

# Clear speech at 16 kHz. Left out: digits (8 kHz) and prompts (G.722), both share-alike; wake words (mostly
# silence).
SPEECH = ("librispeech251", "coffee_commands", "speechocean762", "dctts_reader", "ljspeech32")
# ... and what is never trained on, with its licence.
SPEECH_EVAL = {"librispeech_other": "CC-BY-4.0", "vctk": "CC-BY-4.0", "jfk": "public domain"}
DEV_SPEECH = 16  # clips of a source
DEV_SOUNDS = 40  # rendered clips of a kind in codec_dev
REAL = ("esc10", "sonic_pi")
RENDERED = ("music", "effects")


def to_cut(record: dict):
    """A lhotse cut of one row; its file must be 16 kHz mono."""
    from lhotse import Recording, SupervisionSegment
    from lhotse.audio import AudioSource
    from lhotse.cut import MonoCut

    name = f"{record['source']}-{record['name']}"
    samples = round(record["duration"] * 16000)
    recording = Recording(
        name, [AudioSource("file", [0], str(record["file"].resolve()))], 16000, samples, samples / 16000
    )
    custom = {key: record[key] for key in ("source", "kind", "licence")}
    custom |= {
        key: record[key]
        for key in ("label", "labels", "captions", "author", "title", "fold")
        if record.get(key)
    }
    text = SupervisionSegment(
        name, name, 0.0, recording.duration, text=record["text"], speaker=record.get("speaker"), custom=custom
    )
    return MonoCut(name, 0.0, recording.duration, 0, [text], recording=recording)


def write_cuts(path: Path, rows: list[dict]) -> None:
    from lhotse import CutSet

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    CutSet.from_cuts(to_cut(record) for record in rows).to_file(part)
    part.rename(path)  # at once: a training may be reading the old one


def sounds(work: Path, source: str) -> list[dict]:
    """Rows of work/sounds/<source>.jsonl (none where that isn't made yet) with file, captions and text."""
    listing = work / "sounds" / f"{source}.jsonl"
    if not listing.exists():
        return []
    rows = []
    for record in read_jsonl(listing):
        record["file"] = work / "sounds" / record["path"]
        record["captions"] = captions(record["kind"], record["label"], record.get("labels"))
        record["text"] = (record["captions"] or [""])[0]
        rows.append(record)
    missing = [record["file"] for record in rows if not record["file"].exists()]
    if missing:
        fail(f"{len(missing)} clips of {listing} are gone, the first is {missing[0]}; make {source} again")
    return rows


def speech(folder: Path, names: Iterable[str]) -> list[dict]:
    """Rows of recordings that mini_en prepared in `folder` (its real/ or eval/), kind "speech"."""
    rows = []
    for name in names:
        listing = folder / f"{name}.jsonl"
        if not listing.exists():
            notice(f"speech of {name} SKIPPED: {listing} is not there")
            continue
        for record in read_jsonl(listing):
            licence = record.get("licence") or SPEECH_EVAL[name]
            rows.append(record | {"kind": "speech", "licence": licence, "file": folder / record["path"]})
    return rows


def some(rows: list[dict], count: int, seed: int) -> list[dict]:
    return random.Random(seed).sample(rows, min(count, len(rows)))


def manifests(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Name of each manifest -> its rows."""
    real = [record for source in REAL for record in sounds(args.work, source)]
    rendered = {source: sounds(args.work, source) for source in RENDERED}
    heard = speech(args.speech / "real", SPEECH)
    train_speech, dev_speech = split_speech(heard)
    check_not_reserved(train_speech, "codec training list")
    dev_speech = [
        record
        for source in SPEECH
        for record in sorted(
            (record for record in dev_speech if record["source"] == source), key=lambda r: share(r["name"])
        )[:DEV_SPEECH]
    ]

    def part(rows: list[dict], split: str) -> list[dict]:
        return [record for record in rows if record["split"] == split]

    everything = real + [record for rows in rendered.values() for record in rows]
    told = [record for record in everything if record["captions"]]
    out = {"codec_train_speech": train_speech, "codec_train_real": part(real, "train")}
    out |= {f"codec_train_{source}": part(rows, "train") for source, rows in rendered.items()}
    out["codec_dev"] = dev_speech + part(real, "dev")
    for rows in rendered.values():
        out["codec_dev"] += some(part(rows, "dev"), DEV_SOUNDS, args.seed)
    out |= {"sound_train": part(told, "train"), "sound_dev": part(told, "dev")}
    out["eval_speech"] = speech(args.speech / "eval", SPEECH_EVAL)
    out |= {"eval_esc10": part(real, "eval")}
    out |= {f"eval_{source}": part(rows, "eval") for source, rows in rendered.items()}
    return out


def check(parts: dict[str, list[dict]]) -> None:
    """No clip of an evaluation set may be in a training or development list."""
    held = {(r["source"], r["name"]) for name, rows in parts.items() if name.startswith("eval") for r in rows}
    for name, rows in parts.items():
        if name.startswith("eval"):
            continue
        for record in rows:
            reserved = record["source"] in EVAL_SOURCES or record.get("fold") == 5
            if reserved or (record["source"], record["name"]) in held:
                fail(f"{name}: {record['source']}/{record['name']} is reserved for evaluation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--speech", type=Path, help="work folder of mini_en with real/ and eval/ (default: that of --work)"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.speech = args.speech or args.work
    if not (args.work / "sounds").is_dir():
        fail(f"--work {args.work}: has no sounds/; run real_sounds.py first")
    parts = manifests(args)
    check(parts)
    table = []
    for name, rows in parts.items():
        if not rows:
            continue
        write_cuts(args.work / "cuts" / f"{name}.jsonl.gz", rows)
        sources = sorted({record["source"] for record in rows})
        table.append(
            {"manifest": name, "clips": len(rows), "hours": round(hours(rows), 3), "sources": sources}
        )
        print(f"{name:20s} {len(rows):6d} clips {hours(rows):6.2f} h  {', '.join(sources)}")
    write_jsonl(args.work / "cuts" / "table.jsonl", table)


if __name__ == "__main__":
    main()
