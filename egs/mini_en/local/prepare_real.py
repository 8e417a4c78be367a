"""Stage 0: the real recordings as 16 kHz FLAC with manifests, and a table of their hours.

    python prepare_real.py --work work [--shared-data DIR] [--github https://github.com]

Writes work/real/<source>/<name>.flac and work/real/<source>.jsonl; names a source that can't be had loudly.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import soundfile
from asterisk import prompts
from common import Repository, hours, notice, read_16k, read_g722, read_jsonl, share, write_flac, write_jsonl
from reserved import asterisk_reserved, check_not_reserved, reason_reserved
from words import to_words

LONGEST = 20.0  # seconds; longer clips would set the padding of whole batches

# Where each source comes from without the shared folder; None: its transcripts are nowhere but there.
GITHUB = {
    "librispeech251": None,
    "coffee_commands": None,
    "speechocean762": "jimbozhang/speechocean762",
    "dctts_reader": "PhilippMatthes/dc_tts",
    "fsdd": "Jakobovski/free-spoken-digit-dataset",
    "ljspeech32": "coqui-ai/TTS",
    "wake_words": "Picovoice/wake-word-benchmark",
}
LICENCES = {
    "speechocean762": "CC-BY-4.0",
    "dctts_reader": "Apache-2.0 (repository)",
    "fsdd": "CC-BY-SA-4.0",
    "ljspeech32": "public domain",
    "wake_words": "Apache-2.0",
}


def wanted(source: str, row: dict, args: argparse.Namespace) -> bool:
    """The recipe's choice among a source's clips (the reserved ones are out in any case)."""
    if reason_reserved(source, row["name"], row.get("speaker")):
        return False
    if source == "coffee_commands":
        return bool(row["slots_agree"])
    if source == "speechocean762" and int(row["speaker"][-4:]) >= 9600:
        return args.speechocean_adults == "keep"
    if source == "wake_words":
        return share(row["name"]) < args.wake_share
    if source == "fsdd":
        return int(row["name"].rsplit("_", 1)[1]) in range(5, 5 + args.fsdd_takes)
    return True


def from_shared(source: str, folder: Path) -> Iterator[dict]:
    """Records of a folder of shared data: {"name", "text", "speaker", "licence", "audio": Path, ...}."""
    for row in read_jsonl(folder / "manifest.jsonl"):
        yield {**row, "name": Path(row["path"]).stem, "audio": folder / row["path"]}


def from_github(source: str, repo: Repository) -> Iterator[dict]:
    """The same records out of the corpus's own repository; "audio" is the path inside it."""
    texts: dict[str, str] = {}
    if source == "speechocean762":
        for part in ("train", "test"):
            for line in repo.read(f"{part}/text").decode().splitlines():
                name, text = line.split(None, 1)
                texts[name] = text
        paths = repo.names("WAVE")
    elif source == "dctts_reader":
        for line in repo.read("LJSpeech-1.1/transcript.csv").decode().splitlines():
            texts[line.split("|")[0]] = line.split("|")[-1]
        paths = repo.names("LJSpeech-1.1/wavs")
    elif source == "ljspeech32":
        for line in repo.read("tests/data/ljspeech/metadata.csv").decode().splitlines():
            texts[line.split("|")[0]] = line.split("|")[-1]
        paths = repo.names("tests/data/ljspeech/wavs")
    elif source == "wake_words":
        paths = [path for path in repo.names("audio") if path.count("/") == 2]  # audio/smart mirror/12.flac
    else:
        paths = repo.names("recordings")
        digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        texts = {Path(path).stem: digits[int(Path(path).stem[0])] for path in paths}
    for path in paths:
        name = Path(path).stem
        if source == "wake_words":
            words = Path(path).parent.name
            yield {"name": f"{words.replace(' ', '-')}_{name}", "text": words, "speaker": None, "audio": path}
            continue
        if name in texts and path.lower().endswith(".wav"):
            numbered = {"speechocean762": f"so762-{name[1:5]}", "fsdd": f"fsdd-{name[2:].split('_')[0]}"}
            speaker = numbered.get(source, source)
            yield {"name": name, "text": texts[name], "speaker": speaker, "audio": path}


def prepare(source: str, records: Iterator[dict], read, args: argparse.Namespace) -> list[dict]:
    """Write one source's clips and manifest; returns its rows."""
    rows = []
    for record in records:
        text = to_words(record["text"])
        if not text or not wanted(source, record, args):
            continue
        path = args.work / "real" / source / f"{record['name']}.flac"
        try:
            duration = write_flac(path, read(record["audio"]))
        except (FileNotFoundError, soundfile.LibsndfileError) as error:
            notice(f"{source}/{record['name']} skipped: {error}")
            continue
        if 0.1 < duration <= LONGEST:
            rows.append(
                {
                    "path": f"{source}/{path.name}",
                    "text": text,
                    "speaker": record.get("speaker"),
                    "source": source,
                    "name": record["name"],
                    "duration": round(duration, 3),
                    "licence": record.get("licence") or LICENCES[source],
                }
            )
    if source != "ljspeech32":
        check_not_reserved(rows, source)
    write_jsonl(args.work / "real" / f"{source}.jsonl", rows)
    return rows


def prepare_source(source: str, args: argparse.Namespace) -> list[dict]:
    if source == "asterisk":
        usable = [row for row in prompts() if not asterisk_reserved(row[0])]
        records = (
            {"name": n, "text": t, "speaker": "allison", "licence": "CC-BY-SA-3.0", "audio": p}
            for n, t, p in usable
        )
        return prepare(source, records, read_g722, args)
    if args.shared_data and (args.shared_data / source / "manifest.jsonl").exists():
        return prepare(source, from_shared(source, args.shared_data / source), read_16k, args)
    if GITHUB[source] is None:
        raise FileNotFoundError("its transcripts are only in the shared data folder (--shared-data)")
    repo = Repository(args.github, GITHUB[source], args.work / "clones")
    return prepare(source, from_github(source, repo), lambda path: read_16k(repo.read(path)), args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shared-data", type=Path)
    parser.add_argument(
        "--github", default="https://github.com", help="server, or a folder of owner+name/repo mirrors"
    )
    parser.add_argument(
        "--speechocean-adults", choices=["drop", "keep"], default="drop", help="speakers 9600 and up"
    )
    parser.add_argument(
        "--fsdd-takes", type=int, default=8, help="takes of each digit and speaker, from take 5 on"
    )
    parser.add_argument("--wake-share", type=float, default=0.17, help="of the 2293 wake words")
    args = parser.parse_args()
    table = []
    for source in [*GITHUB, "asterisk"]:
        try:
            rows = prepare_source(source, args)
        except FileNotFoundError as error:
            notice(f"{source} SKIPPED: {error}")
            table.append({"source": source, "clips": 0, "hours": 0.0})
            continue
        table.append({"source": source, "clips": len(rows), "hours": round(hours(rows), 3)})
    write_jsonl(args.work / "real" / "table.jsonl", table)
    for row in table:
        print(f"{row['source']:18s} {row['clips']:6d} clips {row['hours']:7.2f} h")
    print(f"{'all':18s} {sum(r['clips'] for r in table):6d} clips {sum(r['hours'] for r in table):7.2f} h")


if __name__ == "__main__":
    main()
