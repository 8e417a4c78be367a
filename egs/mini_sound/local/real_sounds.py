"""Stage 0: recorded sounds as clips of 5 s at 16 kHz: ESC-10 and the samples of Sonic Pi.

    python real_sounds.py --work work [--shared-data DIR] [--github https://github.com]

Writes work/sounds/<source>/*.flac and work/sounds/<source>.jsonl for the sources esc10 and sonic_pi. Folds 1
to 4 of ESC-10 train (two clips of a class of fold 4 are for development), fold 5 is for evaluation and
nothing else.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from base import (
    CLIP,
    RATE,
    fail,
    fit,
    hours,
    level,
    notice,
    read_16k,
    read_jsonl,
    row,
    write_flac,
    write_jsonl,
)
from captions import vocabulary

ESC10 = "karolpiczak/ESC-10"
ESC10_COMMIT = "553c8f1"  # the last with audio; later ones point to ESC-50
ESC10_DEV = 2  # clips of a class of fold 4
SAMPLES = Path("/usr/share/sonic-pi/samples")
# Left out: loops cut from well-known records, and what is no sound of its own.
LEFT_OUT = ("loop_amen", "loop_amen_full", "loop_breakbeat")
# How the README of ESC-10 tells where a clip comes from.
CREDIT = re.compile(
    r"\*\*\[(?P<name>[\w-]+)\.ogg\].*?clip derived from \[(?P<title>.*)\]\(.*?\) by \*(?P<author>.*?)\* "
    r"\(\[(?P<licence>[^\]]+)\]"
)


def git(folder: Path, *command: str) -> bytes:
    run = subprocess.run(["git", f"--git-dir={folder}", *command], capture_output=True)
    if run.returncode:
        raise FileNotFoundError(f"{folder}: git {command[0]}: {run.stderr.decode(errors='replace').strip()}")
    return run.stdout


def esc10_repository(origin: str, cache: Path) -> Path:
    """Git directory of ESC-10 with its history (40 MB): a mirror's, or cloned once."""
    mirror = Path(origin) / ESC10.replace("/", "+") / "repo"
    if mirror.is_dir():
        return mirror / ".git" if (mirror / ".git").is_dir() else mirror
    folder = cache / f"{ESC10.replace('/', '+')}.full.git"
    if not folder.exists():
        if not re.match(r"[a-z+]+://|git@", origin):
            raise FileNotFoundError(f"{mirror} is not there")
        part = folder.with_suffix(".part")
        subprocess.run(["rm", "-rf", str(part)], check=True)
        clone = ["git", "clone", "--quiet", "--bare", f"{origin.rstrip('/')}/{ESC10}", str(part)]
        try:
            subprocess.run(clone, check=True, timeout=1800, stdin=subprocess.DEVNULL)
        except (subprocess.SubprocessError, OSError) as error:
            raise FileNotFoundError(f"{origin}/{ESC10} can't be cloned: {error}") from error
        part.rename(folder)
    return folder


def esc10_from_git(folder: Path) -> Iterator[dict]:
    """Name, label, fold, licence, author, title and audio (bytes) of every clip of the repository."""
    names = git(folder, "ls-tree", "-r", "-z", "--name-only", ESC10_COMMIT).decode().split("\0")
    readme = git(folder, "cat-file", "blob", f"{ESC10_COMMIT}:README.md").decode()
    credit = {found["name"]: found.groupdict() for found in CREDIT.finditer(readme)}
    for path in sorted(name for name in names if name.endswith(".ogg")):
        name = Path(path).stem
        if name not in credit:
            notice(f"esc10/{name} SKIPPED: its README names no licence")
            continue
        label = Path(path).parent.name.split(" - ")[1].lower()
        audio = git(folder, "cat-file", "blob", f"{ESC10_COMMIT}:{path}")
        yield {**credit[name], "label": label, "fold": int(name.split("-")[0]), "audio": audio}


def esc10_from_shared(folder: Path) -> Iterator[dict]:
    for record in read_jsonl(folder / "manifest.jsonl"):
        yield {**record, "name": Path(record["path"]).stem, "audio": folder / record["path"]}


def esc10(args: argparse.Namespace) -> list[dict]:
    """Write the clips of ESC-10; returns their rows."""
    shared = args.shared_data / "esc10" if args.shared_data else None
    if shared and (shared / "manifest.jsonl").exists():
        records = esc10_from_shared(shared)
    else:
        records = esc10_from_git(esc10_repository(args.github, args.work / "clones"))
    rows, dev = [], dict.fromkeys(vocabulary()["esc10"], 0)
    for record in sorted(records, key=lambda record: record["name"]):
        label = record["label"]
        split = "eval" if record["fold"] == 5 else "train"
        if record["fold"] == 4 and dev[label] < ESC10_DEV:
            dev[label] += 1
            split = "dev"
        write_flac(
            args.work / "sounds" / "esc10" / f"{record['name']}.flac", fit(level(read_16k(record["audio"])))
        )
        credit = {key: record[key] for key in ("author", "title")}
        rows.append(
            row(
                "esc10",
                record["name"],
                "esc10",
                label,
                split,
                record["licence"],
                fold=record["fold"],
                **credit,
            )
        )
    return rows


def sonic_pi(args: argparse.Namespace) -> list[dict]:
    """Write the samples of Sonic Pi; those that no class of the vocabulary names get kind "other"."""
    if not args.samples.is_dir():
        raise FileNotFoundError(f"{args.samples} is not there: install the package sonic-pi-samples")
    label_of = {name: label for label, entry in vocabulary()["samples"].items() for name in entry["files"]}
    paths = {path.stem: path for path in sorted(args.samples.glob("*.flac"))}
    if missing := sorted(set(label_of) - set(paths)):
        notice(f"sonic_pi: {len(missing)} samples are not in {args.samples}: {', '.join(missing[:5])} ...")
    rows = []
    for name, path in paths.items():
        if name in LEFT_OUT:
            continue
        samples = read_16k(path)
        parts = {name: samples}
        if len(samples) > 1.5 * CLIP:
            parts[f"{name}-end"] = samples[-CLIP:]
        for part, clip in parts.items():
            loop = name.startswith("loop_") and len(clip) > RATE // 2
            write_flac(args.work / "sounds" / "sonic_pi" / f"{part}.flac", fit(level(clip), loop=loop))
            kind = "samples" if name in label_of else "other"
            rows.append(
                row("sonic_pi", part, kind, label_of.get(name, name), "train", "CC0", author="freesound.org")
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--shared-data", type=Path, help="folder with esc10/; without it ESC-10 is cloned from --github"
    )
    parser.add_argument(
        "--github", default="https://github.com", help="server, or a folder of owner+name/repo mirrors"
    )
    parser.add_argument(
        "--samples", type=Path, default=SAMPLES, help="Sonic Pi's samples (default %(default)s)"
    )
    args = parser.parse_args()
    if args.shared_data and not args.shared_data.is_dir():
        fail(f"--shared-data {args.shared_data}: no such folder")
    for source, make in (("esc10", esc10), ("sonic_pi", sonic_pi)):
        try:
            rows = make(args)
        except FileNotFoundError as error:
            notice(f"{source} SKIPPED: {error}")
            continue
        write_jsonl(args.work / "sounds" / f"{source}.jsonl", rows)
        print(f"{source:10s} {len(rows):5d} clips {hours(rows):6.2f} h")


if __name__ == "__main__":
    main()
