"""Rendering many clips: which, from which seeds, in several processes, without those that are there."""

import argparse
import multiprocessing
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from base import CLIP, RATE, fail, fit, hours, level, row, write_flac, write_jsonl

SPLITS = ("train", "dev", "eval")


@dataclass(frozen=True)
class Clip:
    """One clip to make: `name` tells everything, so that the same name is the same sound on every machine."""

    name: str
    label: str
    labels: dict[str, str]
    split: str
    seed: int

    def generator(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])


def plan(
    groups: list[tuple[str, dict[str, str]]], counts: dict[str, int], seed: int, tag: str = ""
) -> list[Clip]:
    """`counts[split]` clips in all, spread evenly over the groups (label, labels); at least one of each.

    Groups with the same label share the clips of that label. Clips of different groups alternate, so a part
    of the list is balanced as well. `tag` goes into the names of clips that are made in another way.
    """
    of_label = dict.fromkeys((label for label, _ in groups), 0)
    for label, _ in groups:
        of_label[label] += 1
    out = []
    for split in SPLITS:
        rounds = []
        for label, labels in groups:
            each = max(1, round(counts[split] / len(of_label) / of_label[label])) if counts[split] else 0
            words = "_".join(value for value in labels.values() if value != label) or "any"
            stem = f"{label}_{words}".replace(" ", "-")
            rounds += [
                (n, Clip(f"{stem}_{split}{seed}{tag}_{n:04d}", label, labels, split, seed))
                for n in range(each)
            ]
        out += [clip for _, clip in sorted(rounds, key=lambda pair: pair[0])]
    return out


def add_options(parser: argparse.ArgumentParser, hours: float, dev: int, held: int) -> None:
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=hours, help="of training clips (default %(default)s)")
    parser.add_argument("--dev", type=int, default=dev, help="development clips (default %(default)s)")
    parser.add_argument("--eval", type=int, default=held, help="evaluation clips (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)


def counts(args: argparse.Namespace) -> dict[str, int]:
    """Clips of each split that the options ask for."""
    if not args.hours > 0 or args.dev < 0 or args.eval < 0 or args.jobs < 1 or args.seed < 0:
        fail("--hours and --jobs must be positive, --dev, --eval and --seed not negative")
    return {"train": round(args.hours * 3600 * RATE / CLIP), "dev": args.dev, "eval": args.eval}


def make_one(clip: Clip, make: Callable[[Clip], np.ndarray], folder: Path) -> None:
    """Make and write one clip, at a loudness of its own."""
    loudness = float(clip.generator().uniform(-23.0, -18.0))
    write_flac(folder / f"{clip.name}.flac", level(fit(make(clip)), loudness))


def render(
    source: str,
    kind: str,
    clips: list[Clip],
    make: Callable[[Clip], np.ndarray],
    work: Path,
    jobs: int,
    licence: str,
) -> list[dict]:
    """Write all clips to work/sounds/<source>/, their rows to work/sounds/<source>.jsonl; returns these."""
    from tqdm import tqdm

    folder = work / "sounds" / source
    folder.mkdir(parents=True, exist_ok=True)
    missing = [clip for clip in clips if not (folder / f"{clip.name}.flac").exists()]
    if len(missing) < len(clips):
        print(f"{source}: {len(clips) - len(missing)} of {len(clips)} clips are there already")
    one = partial(make_one, make=make, folder=folder)
    bar = {"total": len(missing), "desc": source, "unit": "clip", "mininterval": 5}
    if jobs == 1:
        for clip in tqdm(missing, **bar):
            one(clip)
    elif missing:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            for _ in tqdm(pool.imap_unordered(one, missing, chunksize=4), **bar):
                pass
    rows = [row(source, c.name, kind, c.label, c.split, licence, labels=c.labels) for c in clips]
    write_jsonl(work / "sounds" / f"{source}.jsonl", rows)
    for split in SPLITS:
        mine = [record for record in rows if record["split"] == split]
        print(f"{source} {split:5s} {len(mine):6d} clips {hours(mine):6.2f} h")
    return rows
