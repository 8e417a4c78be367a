"""Training audio in a few small files that can travel to another machine, and back.

    python pack.py pack --work work --out packed [--mib 60] [--kbps 16] [--limit synthetic_flite=1]
    python pack.py unpack --packed packed --work work2

`pack` reads work/cuts/{train,dev,noise}.jsonl.gz of stage 2 and writes shards of Ogg Opus (many clips one
after the other, so that no clip pays for a header), manifest.jsonl.gz and bpe.model. When everything is more
than `--mib`, real speech goes first, then Kokoro, Piper and flite. Shards that are there are kept, so a run
that was stopped goes on. `unpack` needs soundfile and lhotse only; it writes one WAV a shard and
work2/cuts/*.jsonl.gz with the same cut names, texts and copies, whose cuts are parts of the WAVs.
"""

import argparse
import gzip
import json
import multiprocessing
import random
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from common import RATE, notice, read_16k

PARTS = ("train", "dev", "noise")
# The order in which sources get room; what isn't named here, real speech, comes before all of them.
LAST = ("synthetic_kokoro", "synthetic_piper", "synthetic_flite")
GAP = RATE // 20  # samples of silence between clips: what a frame of the coder smears stays in the gap
SHARD_SECONDS = 1800
OVERHEAD = 1.06  # Ogg pages, and what the variable bit rate goes over its mean


@dataclass
class Clip:
    """One recording and the cuts that are made of it (a source that is repeated has several)."""

    file: str
    samples: int
    source: str
    part: str
    cuts: list[dict] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.samples / RATE


def collect(work: Path) -> list[Clip]:
    """The clips of the manifests, in their order."""
    from lhotse import CutSet

    clips: dict[tuple[str, str], Clip] = {}
    for part in PARTS:
        path = work / "cuts" / f"{part}.jsonl.gz"
        if not path.exists():
            notice(f"{path} isn't there, so {part} isn't packed")
            continue
        for cut in CutSet.from_file(path):
            text = cut.supervisions[0]
            row = {"id": cut.id, "text": text.text, "speaker": text.speaker, "custom": text.custom}
            source = (text.custom or {}).get("source", part)
            file = cut.recording.sources[0].source
            clip = clips.setdefault((part, file), Clip(file, cut.num_samples, source, part))
            clip.cuts.append(row)
    return list(clips.values())


def choose(clips: list[Clip], mib: float, kbps: float, limit: dict[str, float], seed: int) -> list[Clip]:
    """Those that fit: development and noise whole, then the sources of training in their order.

    Raises:
        ValueError: development and noise alone are too much.
    """
    room = mib * 2**20 / OVERHEAD - 2**20  # one MiB for the manifest and the word pieces
    chosen = [clip for clip in clips if clip.part != "train"]
    room -= sum((clip.seconds + GAP / RATE) * kbps * 125 for clip in chosen)
    if room <= 0:
        raise ValueError(f"--mib {mib:g} has no room for training clips beside development and noise")
    train = [clip for clip in clips if clip.part == "train"]
    random.Random(seed).shuffle(train)
    train.sort(key=lambda clip: LAST.index(clip.source) if clip.source in LAST else -1)
    used = dict.fromkeys(limit, 0.0)
    for clip in train:
        size = (clip.seconds + GAP / RATE) * kbps * 125
        if size > room or used.get(clip.source, 0.0) + clip.seconds > 3600 * limit.get(clip.source, np.inf):
            continue
        if clip.source in used:
            used[clip.source] += clip.seconds
        room -= size
        chosen.append(clip)
    return chosen


def shards(clips: list[Clip], kbps: float) -> list[tuple[str, list[Clip]]]:
    """Groups of up to SHARD_SECONDS, each under a name that changes with its content."""
    groups: list[list[Clip]] = [[]]
    seconds = 0.0
    for clip in clips:
        if seconds > SHARD_SECONDS:
            groups.append([])
            seconds = 0.0
        groups[-1].append(clip)
        seconds += clip.seconds
    out = []
    for index, group in enumerate(groups):
        content = json.dumps([(clip.part, clip.cuts[0]["id"], clip.samples, kbps) for clip in group])
        out.append((f"{index:03d}-{zlib.crc32(content.encode()):08x}.opus", group))
    return out


def write_shard(job: tuple[Path, list[str], list[int], float]) -> int:
    """Code the clips of one shard; returns its bytes."""
    path, files, lengths, kbps = job
    if path.exists():
        return path.stat().st_size
    waves = []
    for file, length in zip(files, lengths, strict=True):
        wave = read_16k(Path(file))[:length]
        waves += [np.pad(wave, (0, length - len(wave))), np.zeros(GAP, np.float32)]
    part = path.with_suffix(".part")
    # libsndfile codes at 256 - 250 * level kbit/s.
    soundfile.write(
        part, np.concatenate(waves), RATE, format="OGG", subtype="OPUS", compression_level=(256 - kbps) / 250
    )
    part.rename(path)
    return path.stat().st_size


def pack(args: argparse.Namespace) -> None:
    """The command `pack`."""
    clips = collect(args.work)
    chosen = choose(clips, args.mib, args.kbps, dict(args.limit), args.seed)
    groups = shards(chosen, args.kbps)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in set(args.out.glob("*.opus")) - {args.out / name for name, _ in groups}:
        old.unlink()  # of an earlier choice
    jobs = [
        (args.out / name, [clip.file for clip in group], [clip.samples for clip in group], args.kbps)
        for name, group in groups
    ]
    size = 0
    with multiprocessing.Pool(args.jobs) as pool:
        for number, written in enumerate(pool.imap(write_shard, jobs), 1):
            size += written
            print(f"shard {number} of {len(jobs)}: {size / 2**20:.1f} MiB", flush=True)
    part = args.out / "manifest.part"
    with gzip.open(part, "wt", encoding="utf-8") as out:
        for name, group in groups:
            start = 0
            for clip in group:
                row = {"shard": name, "start": start, "samples": clip.samples, "part": clip.part}
                out.write(json.dumps(row | {"cuts": clip.cuts}) + "\n")
                start += clip.samples + GAP
    part.rename(args.out / "manifest.jsonl.gz")
    if (args.work / "bpe.model").exists():
        shutil.copy(args.work / "bpe.model", args.out / "bpe.model")
    report(clips, chosen)
    total = sum(path.stat().st_size for path in args.out.iterdir())
    print(
        f"{args.out}: {len(groups)} shards, {total / 2**20:.1f} MiB of {args.mib:g} at {args.kbps:g} kbit/s"
    )
    if total > args.mib * 2**20:
        notice(f"more than {args.mib:g} MiB: pack again with a smaller --mib or --kbps")


def report(clips: list[Clip], chosen: list[Clip]) -> None:
    """Hours packed and left out, by part and source."""
    kept = {id(clip) for clip in chosen}
    for part, source in sorted({(clip.part, clip.source) for clip in clips}):
        mine = [clip for clip in clips if (clip.part, clip.source) == (part, source)]
        inside = [clip for clip in mine if id(clip) in kept]
        print(
            f"{part:5s} {source:18s} {len(inside):6d} of {len(mine):6d} clips, "
            f"{sum(clip.seconds for clip in inside) / 3600:6.2f} of "
            f"{sum(clip.seconds for clip in mine) / 3600:6.2f} h"
        )


def decode_shard(job: tuple[Path, Path]) -> int:
    """One shard as a 16 bit WAV; returns its samples."""
    source, path = job
    if path.exists():
        return soundfile.info(path).frames
    wave, rate = soundfile.read(source, dtype="int16")
    if rate != RATE:
        raise ValueError(f"{source}: coded at {rate} Hz, not {RATE}")
    part = path.with_suffix(".part")
    soundfile.write(part, wave, RATE, subtype="PCM_16", format="WAV")
    part.rename(path)
    return len(wave)


def restored_cuts(rows: list[dict], recordings: dict):
    """The lhotse cuts of manifest rows."""
    from lhotse import SupervisionSegment
    from lhotse.cut import MonoCut

    for row in rows:
        recording = recordings[row["shard"]]
        start, duration = row["start"] / RATE, row["samples"] / RATE
        for cut in row["cuts"]:
            name, custom = cut["id"], cut["custom"]
            text = SupervisionSegment(
                name, recording.id, 0.0, duration, text=cut["text"], speaker=cut["speaker"], custom=custom
            )
            yield MonoCut(name, start, duration, 0, [text], recording=recording)


def unpack(args: argparse.Namespace) -> None:
    """The command `unpack`."""
    from lhotse import CutSet, Recording
    from lhotse.audio import AudioSource

    with gzip.open(args.packed / "manifest.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    folder = args.work.resolve() / "unpacked"
    for path in (folder, args.work / "cuts"):
        path.mkdir(parents=True, exist_ok=True)
    names = sorted({row["shard"] for row in rows})
    missing = [name for name in names if not (args.packed / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{args.packed}: {', '.join(missing)} not there; pack or copy the folder again"
        )
    jobs = [(args.packed / name, folder / f"{Path(name).stem}.wav") for name in names]
    with multiprocessing.Pool(args.jobs) as pool:
        lengths = pool.map(decode_shard, jobs, chunksize=1)
    recordings = {}
    for (_, path), name, samples in zip(jobs, names, lengths, strict=True):
        source = AudioSource("file", [0], str(path))
        recordings[name] = Recording(path.stem, [source], RATE, samples, samples / RATE)
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        if mine:
            cuts = CutSet.from_cuts(restored_cuts(mine, recordings))
            cuts.to_file(args.work / "cuts" / f"{part}.jsonl.gz")
            seconds = sum(row["samples"] for row in mine) / RATE
            print(
                f"{part}: {len(mine)} clips, {seconds / 3600:.2f} h, {sum(len(r['cuts']) for r in mine)} cuts"
            )
    if (args.packed / "bpe.model").exists():
        shutil.copy(args.packed / "bpe.model", args.work / "bpe.model")


def pairs(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    there = commands.add_parser("pack", help="work/cuts into a folder of small files")
    there.add_argument("--work", type=Path, required=True)
    there.add_argument("--out", type=Path, required=True)
    there.add_argument("--mib", type=float, default=60, help="size of everything (default %(default)s)")
    there.add_argument("--kbps", type=float, default=16, help="of Opus, 6 to 64 (default %(default)s)")
    there.add_argument("--limit", type=pairs, nargs="*", default=[], help="source=most hours")
    there.add_argument("--seed", type=int, default=1)
    there.set_defaults(run=pack)
    back = commands.add_parser("unpack", help="the folder into WAV files and lhotse manifests")
    back.add_argument("--packed", type=Path, required=True)
    back.add_argument("--work", type=Path, required=True)
    back.set_defaults(run=unpack)
    for command in (there, back):
        command.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
