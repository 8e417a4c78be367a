"""Stage 1: lhotse manifests of speech with texts, and the pairs that the model is judged by.

    python tts_cuts.py --work work --speech WORK_OF_MINI_EN

Reads real/, synth/ and eval/ of mini_en's work folder. Writes to work/cuts
  speech_train.jsonl.gz   everything that the semantic codec hears
  tts_train.jsonl.gz, tts_dev.jsonl.gz   clear speech whose words are known, what the networks learn from
  pairs.jsonl             50 lines {"name", "speaker", "prompt", "prompt_text", "target", "text"}: unseen
                          speakers, a recording of each as the prompt, what another one says as the text
  table.jsonl             clips and hours of each
Words are written with case and punctuation where mini_en's teacher gave them (real/cased) or the voices were
given them ("written").
"""

import argparse
from pathlib import Path

from base import RATE, fail, hours, notice, read_jsonl, share, write_jsonl
from development import split
from reserved import EVAL_SOURCES, check_not_reserved

HEARD = ("librispeech251", "dctts_reader", "ljspeech32", "coffee_commands", "speechocean762")
# Read by fluent speakers, or said clearly: of these the words are learnt. Children and beginners
# (speechocean762) are only heard by the semantic codec.
TOLD = ("librispeech251", "dctts_reader", "ljspeech32", "coffee_commands")
VOICES = ("kokoro", "piper")
DEV_SHARE = 0.02  # of the synthetic clips
JUDGED = "librispeech_other"
SECONDS = {"prompt": (3.0, 8.0), "target": (2.0, 12.0)}


def real_rows(folder: Path) -> list[dict]:
    """Recordings that mini_en prepared, with ``written`` where the teacher agrees."""
    rows = []
    for source in HEARD:
        listing, cased = folder / f"{source}.jsonl", folder / "cased" / f"{source}.jsonl"
        if not listing.exists():
            notice(f"{source} SKIPPED: {listing} is not there")
            continue
        written = {row["name"]: row["cased"] for row in read_jsonl(cased)} if cased.exists() else {}
        for row in read_jsonl(listing):
            known = {"file": folder / row["path"], "written": written.get(row["name"])}
            rows.append(row | known)
    return rows


def synthetic_rows(folder: Path) -> list[dict]:
    """Clips of the voices that there are."""
    rows = []
    for voice in VOICES:
        listings = sorted(folder.glob(f"{voice}.*.jsonl"))
        if not listings:
            notice(f"voice {voice} SKIPPED: no {folder}/{voice}.*.jsonl; run stage 0")
        seen = set()
        for row in (row for listing in listings for row in read_jsonl(listing)):
            file = folder / row["path"]
            if row["name"] not in seen and file.exists():
                seen.add(row["name"])
                rows.append(row | {"file": file, "name": f"{voice}-{row['name']}"})
    return rows


def to_cut(row: dict):
    """A lhotse cut of one row; its file must be 16 kHz mono."""
    from lhotse import Recording, SupervisionSegment
    from lhotse.audio import AudioSource
    from lhotse.cut import MonoCut

    name, samples = f"{row['source']}-{row['name']}", round(row["duration"] * RATE)
    source = AudioSource("file", [0], str(row["file"].resolve()))
    recording = Recording(name, [source], RATE, samples, samples / RATE)
    text = row.get("written") or row["text"]
    custom = {"source": row["source"], "licence": row.get("licence", "")}
    said = SupervisionSegment(
        name, name, 0.0, recording.duration, text=text, speaker=row.get("speaker"), custom=custom
    )
    return MonoCut(name, 0.0, recording.duration, 0, [said], recording=recording)


def pairs(folder: Path, each: int = 5) -> list[dict]:
    """For every speaker ``each`` texts that they have read, and another recording of theirs as the prompt."""
    listing = folder / f"{JUDGED}.jsonl"
    if not listing.exists():
        fail(f"{listing}: missing; the model is judged by these recordings: run stage 0")
    speakers: dict[str, list[dict]] = {}
    for row in sorted(read_jsonl(listing), key=lambda row: share(row["name"])):
        speakers.setdefault(row["name"].split("-")[0], []).append(row)
    found = []
    for speaker, rows in sorted(speakers.items()):
        fitting = {
            part: [row for row in rows if low <= row["duration"] <= high]
            for part, (low, high) in SECONDS.items()
        }
        targets = fitting["target"][:each]
        for number, target in enumerate(targets):
            prompts = [row for row in fitting["prompt"] if row["name"] != target["name"]]
            if not prompts:
                notice(f"speaker {speaker}: no recording that could be a prompt")
                continue
            prompt = prompts[number % len(prompts)]
            files = {"prompt": str(folder / prompt["path"]), "target": str(folder / target["path"])}
            texts = {"prompt_text": prompt["text"], "text": target["text"]}
            found.append({"name": target["name"], "speaker": speaker, **files, **texts})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--speech", type=Path, required=True, help="work folder of mini_en")
    args = parser.parse_args()
    if not (args.speech / "real").is_dir():
        fail(f"--speech {args.speech}: has no real/; run stage 0")
    real, made = real_rows(args.speech / "real"), synthetic_rows(args.speech / "synth")
    train, dev = split(real)
    check_not_reserved(train, "speech_train")
    parts = {
        "speech_train": train + made,
        "tts_train": [row for row in train if row["source"] in TOLD],
        "tts_dev": [row for row in dev if row["source"] in TOLD],
    }
    for row in made:
        parts["tts_dev" if share(f"dev {row['name']}") < DEV_SHARE else "tts_train"].append(row)
    held = {(row["source"], row["name"]) for row in parts["tts_dev"]}
    parts["speech_train"] = [r for r in parts["speech_train"] if (r["source"], r["name"]) not in held]
    judged = pairs(args.speech / "eval")
    if any(row["source"] in EVAL_SOURCES for rows in parts.values() for row in rows):
        fail("a training list names a recording that is reserved for evaluation")

    from lhotse import CutSet

    (args.work / "cuts").mkdir(parents=True, exist_ok=True)
    table = []
    for name, rows in parts.items():
        if not rows:
            fail(f"{name}: there is no speech for it; run stage 0")
        part = args.work / "cuts" / f"part-{name}.jsonl.gz"
        CutSet.from_cuts(map(to_cut, rows)).to_file(part)
        part.rename(args.work / "cuts" / f"{name}.jsonl.gz")
        sources = sorted({row["source"] for row in rows})
        table.append(
            {"manifest": name, "clips": len(rows), "hours": round(hours(rows), 3), "sources": sources}
        )
        print(f"{name:14s} {len(rows):6d} clips {hours(rows):6.2f} h  {', '.join(sources)}")
    write_jsonl(args.work / "cuts" / "pairs.jsonl", judged)
    write_jsonl(args.work / "cuts" / "table.jsonl", table)
    print(f"pairs          {len(judged):6d} of {len({row['speaker'] for row in judged})} speakers")


if __name__ == "__main__":
    main()
