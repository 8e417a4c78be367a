"""Stage 6: RESULTS.md of the recipe from what the other stages wrote; optionally the embedded model folder.

python results.py --work work --out RESULTS.md [--embed nar_speech/assets/mini_en]
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path

import torch
from common import read_jsonl
from score import DECODERS, POOLS, STREAM_DECODERS

SETS = {
    "librispeech_other": "LibriSpeech test-other, 10 speakers (audiobooks, hard)",
    "vctk": "VCTK p225 to p228 (British readers)",
    "jfk": "Kennedy's inaugural address, one clip",
    "asterisk_reserved": "Asterisk prompts vm-* and 3 more (voice seen in training)",
    "pocketsphinx": "PocketSphinx test recordings",
    "fsdd_test": "Free Spoken Digits, takes 0 to 4 (speakers seen in training)",
    "fluent": "**LibriSpeech, VCTK and JFK together**",
    "all": "**all of the above together**",
}


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def data_table(work: Path) -> list[str]:
    lines = ["| part | source | clips | hours | times an epoch |", "|---|---|---|---|---|"]
    rows = read_jsonl(work / "cuts" / "table.jsonl")
    for row in rows:
        lines.append(
            f"| {row['part']} | {row['source']} | {row['clips']} | {row['hours']:.2f} | {row['times']} |"
        )
    train = [row for row in rows if row["part"] == "train"]
    total, epoch = sum(row["hours"] for row in train), sum(row["hours"] * row["times"] for row in train)
    return [*lines, "", f"Training data: {total:.2f} h, {epoch:.2f} h an epoch."]


def read_score(folder: Path, name: str, decoder: str) -> dict | None:
    path = folder / f"{name}.{decoder}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def score_table(folder: Path, decoders: Collection[str] = DECODERS) -> list[str]:
    """One row a set: word error rate in % with its 95 % interval for each decoder."""
    lines = [f"| set | words | {' | '.join(decoders)} |", "|---|---|" + "---|" * len(decoders)]
    for name, title in SETS.items():
        found = [read_score(folder, name, decoder) for decoder in decoders]
        if not any(found):
            continue
        cells = []
        for score in found:
            wer = score["wer"] if score else None
            cells.append(
                f"{100 * wer['rate']:.1f} ({100 * wer['low']:.1f} to {100 * wer['high']:.1f})" if wer else ""
            )
        words = next(score for score in found if score)["wer"]["reference"]
        lines.append(f"| {title} | {words} | {' | '.join(cells)} |")
    speeds = [read_score(folder, "all", decoder) for decoder in decoders]
    if all(speeds):
        shown = (
            f"{name} {score['real_time_factor']:.4f}" for name, score in zip(decoders, speeds, strict=True)
        )
        lines += [
            "",
            f"Seconds of computing per second of audio, all sets, one thread, float32: {', '.join(shown)}.",
        ]
    return lines


def phase(folder: Path) -> list[str]:
    """What one training run saw, and its validations."""
    log = folder / "train.jsonl"
    if not log.exists():
        return []
    rows = read_jsonl(log)
    steps = [row for row in rows if "audio_per_second" in row]
    before, audio = 0.0, 0.0
    for row in steps:
        audio += row["audio_per_second"] * max(0.0, row["seconds"] - before)
        before = row["seconds"]
    kinds = {"ctc_wer": "ctc_greedy", "wer": "paraformer"}
    if folder.name == "stream":
        kinds = {"wer": "ctc_greedy"}
    lines = [
        f"`{folder.name}`: {len(steps)} steps, {before / 60:.0f} minutes, {audio / 3600:.1f} h of audio.",
        "",
        f"| step | dev loss | {' | '.join(f'dev WER, {kind}' for kind in kinds.values())} |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for row in rows:
        for kind in ("dev", "average", "final"):
            if kind in row:
                dev = row[kind]
                step = row["step"] if kind == "dev" else f"{row['step']} {kind}"
                rates = " | ".join(f"{dev[key]:.1%}" if key in dev else "" for key in kinds)
                lines.append(f"| {step} | {dev['loss']:.2f} | {rates} |")
    return [*lines, ""]


def twin(work: Path) -> list[str]:
    """Word error rates of the streaming twin, where it was trained."""
    table = score_table(work / "scores_stream", STREAM_DECODERS)
    if len(table) == 2:
        return []
    return [
        "### The streaming twin",
        "",
        "The same sets through mini_en_stream under the masks of its chunks of 640 ms, as a stream hears "
        "them (but a stream's beam also drops, after each chunk, what is far behind), without a second pass.",
        "",
        *table,
        "",
    ]


def report(args: argparse.Namespace) -> str:
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    commit = command("git", "rev-parse", "--short", "HEAD")
    parts = [
        "# mini_en: results",
        "",
        f"Made by `bash egs/mini_en/run.sh` on {today}, commit {commit}, on {os.cpu_count()} threads of "
        f"{processor()}, PyTorch {torch.__version__}, Python {platform.python_version()}. Numbers vary from "
        "run to run: the training budget is wall time.",
        "",
        "## Word error rates",
        "",
        "In per cent with 95 % bootstrap intervals, one checkpoint, by `nar-speech evaluate` (lower case, "
        "punctuation off). None of this audio was trained on; `local/reserved.py` refuses it. The columns: "
        "CTC greedy; its beam without (`--no-lm`) and with the word 3-gram; the Paraformer decoder; the "
        "greedy draft (no language model) and the beam's, mended in at most three parallel passes of the "
        "verifier (`--max-passes 3`); the beam's, verified until it is the verifier's own greedy text (the "
        "default).",
        "",
        *score_table(args.work / "scores"),
        "",
        *twin(args.work),
        "",
        "## Data",
        "",
        *data_table(args.work),
        "",
        "## Training",
        "",
        *(
            line
            for name in ("heads", "joint", "decoder", "stream")
            for line in phase(args.work / "exp" / name)
        ),
    ]
    return "\n".join(parts).rstrip() + "\n"


CARD = """# {name}

{description}

Default: `{decoder}` with a word 3-gram, {verified}; `ctc_greedy` and `paraformer` work too.

Where it comes from: {source}

Good for: read and dictated English, commands and prompts, on a small processor, without a download. Not good
for: single words of less than a second (the verifier sometimes repeats or drops them; `--no-verify` is
better), sound without speech (short clips are not searched for it; the drafts hear words in noise), noisy
rooms, several speakers at once, rare names. The training data is mostly read speech and synthetic voices,
with many Mandarin speakers and children.

Word error rates in per cent (95 % interval):

{scores}

Rebuild it: `bash egs/mini_en/run.sh --embed`.
"""


STREAM_CARD = """# {name}

{description}

{size:.1f} MB. It takes audio in steps of 640 ms (`nar-speech transcribe --stream`, `nar-speech serve`,
`nar_speech.models.ctc_stream.CtcStream`); whole files go through the same masks.

Where it comes from: {source}

Good for: showing words while somebody speaks, before mini_en has heard the whole utterance. Not good for: a
final text by itself; words are cut at the ends of chunks now and then, and nobody measured it in noise.

Word error rates in per cent (95 % interval), without a second pass:

{scores}

Rebuild it: `bash egs/mini_en/run.sh --embed`.
"""


def stream_card(args: argparse.Namespace) -> str:
    """README.md of the streaming twin's folder."""
    from nar_speech.model_folder import read_model_file

    folder = args.work / "stream_model"
    card = read_model_file(folder).card
    return STREAM_CARD.format(
        name=card.name,
        description=card.description,
        size=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
        source=card.source,
        scores="\n".join(score_table(args.work / "scores_stream", STREAM_DECODERS)),
    )


def card_text(args: argparse.Namespace) -> str:
    """README.md of the model folder: what the model is, what it was made of, how good it is."""
    from nar_speech.model_folder import read_model_file

    file = read_model_file(args.work / "model")
    return CARD.format(
        name=args.name,
        description=file.card.description,
        decoder=file.decoding.decoder,
        verified="verified by Whisper's decoder" if file.decoding.verify else "not verified (--verify)",
        source=file.card.source,
        scores="\n".join(score_table(args.work / "scores")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", default="mini_en")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--embed", type=Path, help="folder to copy the model to")
    args = parser.parse_args()
    args.out.write_text(report(args), encoding="utf-8")
    print(f"wrote {args.out}; pools: {', '.join(POOLS)}")
    if args.embed:
        embed(args.work / "model", args.embed, card_text(args))
        if (args.work / "stream_model").is_dir():
            embed(args.work / "stream_model", Path(f"{args.embed}_stream"), stream_card(args))


def embed(model: Path, folder: Path, card: str) -> None:
    """Copy a model folder and put its card beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        shutil.copy2(path, folder / path.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"model folder copied to {folder}")


if __name__ == "__main__":
    main()
