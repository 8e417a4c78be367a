"""Stage 5: RESULTS.md out of work/scores, and with --assets both models with their cards in the package.

python results.py --work work --out RESULTS.md [--assets nar_speech/assets]
"""

import argparse
import json
import shutil
from pathlib import Path

import yaml
from base import fail, notice
from captions import vocabulary

SETS = {
    "eval_speech": "speech (LibriSpeech test-other, VCTK, JFK)",
    "eval_esc10": "recorded sounds (ESC-10, fold 5)",
    "eval_effects": "synthesised effects",
    "eval_music": "rendered music",
}
MEASURES = {
    "kbps": "kbit/s",
    "mel": "mel distance",
    "si_sdr": "SI-SDR dB",
    "pesq": "PESQ",
    "stoi": "ESTOI",
    "wer": "WER %",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the recipe")
    parser.add_argument("--out", type=Path, required=True, help="RESULTS.md to write")
    parser.add_argument("--assets", type=Path, help="folder of embedded models to copy both into")
    args = parser.parse_args()
    codec = read(args.work / "scores/codec.json")
    judged, sounds = read(args.work / "scores/classifier.json"), read(args.work / "scores/sounds.json")
    parts = [codec_section(codec), sound_section(judged, sounds), training_section(args.work)]
    args.out.write_text("# Results of egs/mini_sound\n\n" + "\n".join(parts), encoding="utf-8")
    notice(f"{args.out}: written")
    if args.assets is not None:
        embed(args.work / "codec", args.assets / "mini_codec", codec_card(parts[0]))
        model = args.work / "exp/magnet/model"
        embed(model, args.assets / "mini_sound", sound_card(parts[1]), leave="codec")
        name_codec(args.assets / "mini_sound/model.yaml")


def read(path: Path) -> dict:
    """One file of scores."""
    if not path.is_file():
        fail(f"{path}: no such file; run stage 4 first")
    return json.loads(path.read_text())


def codec_section(scores: dict) -> str:
    """Every system on every set, as tables."""
    lines = [
        "## Codec\n",
        "Means over clips of at most 10 s. Opus: opusenc, hard CBR, frames of 60 ms. Mel distance: mean",
        "difference of the logarithms (base 10) of six mel spectra. The codec makes phases anew, so its",
        "SI-SDR says nothing. Word errors: the embedded recogniser with language model, no verifier.\n",
    ]
    for name, title in SETS.items():
        if name not in scores:
            continue
        keys = [key for key in MEASURES if any(key in row for row in scores[name].values())]
        lines += [f"### {title}\n", "| | " + " | ".join(MEASURES[key] for key in keys) + " |"]
        lines.append("|---" * (len(keys) + 1) + "|")
        for system, row in scores[name].items():
            cells = [f"{row[key]:.3g}" if key in row else "" for key in keys]
            lines.append(f"| {system} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def sound_section(judged: dict, sounds: dict) -> str:
    """How often the classifier hears in a clip what was asked for, by class."""
    columns = {"held-out originals": list(judged.values())}
    for source, result in sounds.items():
        columns["through the codec" if Path(source).name == "coded" else "generated"] = [result]
    classes = sorted(
        {name for results in columns.values() for result in results for name in result["classes"]}
    )
    lines = [
        "## Sounds from texts\n",
        "Share of clips in which a classifier, trained on others, hears the class.\n",
    ]
    lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    total = []
    for results in columns.values():
        clips = sum(result["clips"] for result in results)
        right = sum((result["accuracy"] or 0) * result["clips"] for result in results)
        total.append(f"{100 * right / max(1, clips):.0f} % of {clips}")
    lines.append("| **all** | " + " | ".join(total) + " |")
    for name in classes:
        cells = []
        for results in columns.values():
            rows = [result["classes"][name] for result in results if name in result["classes"]]
            clips = sum(row["clips"] for row in rows)
            right = sum(row["accuracy"] * row["clips"] for row in rows)
            cells.append(f"{100 * right / clips:.0f} %" if clips else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def training_section(work: Path) -> str:
    """Steps, minutes and hours of audio of both trainings, from their logs."""
    lines = ["## Training\n", "| | steps | minutes | last validation |", "|---|---|---|---|"]
    for name in ("codec", "magnet"):
        log = work / f"exp/{name}/train.jsonl"
        if not log.is_file():
            continue
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        last = max((row for row in rows if "seconds" in row), key=lambda row: row["step"])
        checks = [row["dev"] for row in rows if "dev" in row]
        shown = ", ".join(
            f"{k} {v:.3f}" for k, v in (checks[-1] if checks else {}).items() if isinstance(v, float)
        )
        lines.append(f"| {name} | {last['step']} | {last['seconds'] / 60:.0f} | {shown} |")
    return "\n".join(lines) + "\n"


def codec_card(section: str) -> str:
    return f"""# mini_codec

A codec of 16 kHz mono speech and sound: 50 frames a second, 1 to 12 codebooks of 10 bits (0.5 to 6 kbit/s),
streams with a delay of 50 ms. Made by egs/mini_sound on two CPU cores. Licence: Apache-2.0; training data:
egs/mini_sound/README.md (CC BY, CC0, Apache-2.0 and public-domain recordings, rendered music and effects).

{section}"""


def sound_card(section: str) -> str:
    known = vocabulary()
    names = [*known["esc10"], *known["effects"], *known["music"]["instruments"], *known["samples"]]
    return f"""# mini_sound

A small MAGNeT over mini_codec: clips of 5 s from texts, longer ones in windows. It knows a closed vocabulary
(egs/mini_sound/conf/vocabulary.yaml): {", ".join(names)},
drums and bands; music slow, medium or fast, happy or sad. Other words give something near them, or noise.

It is small and was trained for less than an hour on two CPU cores: expect the colour of a sound and hardly
its course in time (barks without pauses, sirens that do not rise), and the graininess of 2 kbit/s. What it
does not know is in the table. Sounds together, speech and singing are not in the vocabulary.
Made by egs/mini_sound out of rendered music and effects and of free recordings (ESC-10 and Sonic Pi's
samples: CC0, CC BY, CC Sampling Plus). The texts are read by all-MiniLM-L6-v2 (Apache-2.0), which is not
in this folder: pip install 'nar-speech[sound]'. Licence: Apache-2.0.

{section}"""


def embed(source: Path, target: Path, card: str, leave: str | None = None) -> None:
    """Copy a model folder and write its card; ``leave``: a folder inside that is not copied."""
    if not (source / "model.yaml").is_file():
        fail(f"{source}: no model folder; run the stages before")
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(leave) if leave else None)
    (target / "README.md").write_text(card, encoding="utf-8")
    notice(f"{target}: {sum(path.stat().st_size for path in target.iterdir()) / 1e6:.1f} MB")


def name_codec(path: Path) -> None:
    """Let the embedded model name the embedded codec instead of a copy of its own."""
    file = yaml.safe_load(path.read_text())
    file["codec"] = "mini_codec"
    file["sha256"] = {
        name: value for name, value in file.get("sha256", {}).items() if not name.startswith("codec/")
    }
    path.write_text(yaml.safe_dump(file, sort_keys=False, allow_unicode=True), encoding="utf-8")


if __name__ == "__main__":
    main()
