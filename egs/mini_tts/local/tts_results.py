"""Stage 7: RESULTS.md out of work/scores, the model's card, and with --assets the model in the package.

python tts_results.py --work work --out RESULTS.md [--assets nar_speech/assets]
"""

import argparse
import json
import shutil
from pathlib import Path

import yaml
from base import fail, notice, read_jsonl

SYSTEMS = {
    "model": "the model",
    "codec": "recordings of the same texts through the codec, with as many codebooks",
    "recording": "recordings of the same texts",
}
TRAININGS = ("semantic", "t2s", "s2a", "duration")


def scores_section(scores: dict) -> str:
    """The table of stage 6."""
    lines = [
        "## Speech\n",
        "Texts and prompts of speakers that nothing was trained on (LibriSpeech test-other). Word errors: of",
        "Whisper tiny.en, with 95 % intervals. Similarity: cosine of Resemblyzer's embeddings of speech and",
        "prompt.\n",
        "| | word errors | similarity | seconds of speech |",
        "|---|---|---|---|",
    ]
    for name, title in SYSTEMS.items():
        row = scores[name]
        wer = f"{100 * row['wer']:.1f} % ({100 * row['wer_low']:.1f} to {100 * row['wer_high']:.1f})"
        near = f"{row['similarity']:.3f}" if "similarity" in row else "not measured"
        lines.append(f"| {title} | {wer} | {near} | {row['seconds']:.0f} |")
    factor = scores["model"]["real_time_factor"]
    return "\n".join([*lines, f"\nReal-time factor on one thread: {factor:.2f}.\n"])


def training_section(work: Path) -> str:
    """Steps, minutes and the last validation of each training."""
    lines = ["## Training\n", "| | steps | minutes | last validation |", "|---|---|---|---|"]
    for name in TRAININGS:
        log = work / f"exp/{name}/train.jsonl"
        if not log.is_file():
            continue
        rows = list(read_jsonl(log))
        last = max((row for row in rows if "seconds" in row), key=lambda row: row["step"])
        checks = [row["dev"] for row in rows if "dev" in row]
        shown = ", ".join(
            f"{k} {v:.3f}" for k, v in (checks[-1] if checks else {}).items() if isinstance(v, float)
        )
        lines.append(f"| {name} | {last['step']} | {last['seconds'] / 60:.0f} | {shown} |")
    table = work / "cuts/table.jsonl"
    if table.is_file():
        lines += ["", "| speech | clips | hours | from |", "|---|---|---|---|"]
        for row in read_jsonl(table):
            lines.append(
                f"| {row['manifest']} | {row['clips']} | {row['hours']:.2f} | {', '.join(row['sources'])} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the recipe")
    parser.add_argument("--out", type=Path, required=True, help="RESULTS.md to write")
    parser.add_argument("--assets", type=Path, help="folder of embedded models to copy the model into")
    args = parser.parse_args()
    path, model = args.work / "scores/tts.json", args.work / "model"
    if not path.is_file():
        fail(f"{path}: no such file; run stage 6 first")
    scores = json.loads(path.read_text())
    parts = [scores_section(scores), training_section(args.work)]
    args.out.write_text("# Results of egs/mini_tts\n\n" + "\n".join(parts), encoding="utf-8")
    notice(f"{args.out}: written")
    tree = yaml.safe_load((model / "model.yaml").read_text())
    keys = ("wer", "similarity", "real_time_factor")
    tree["card"]["metrics"] = {k: round(scores["model"][k], 4) for k in keys if k in scores["model"]}
    (model / "model.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    if args.assets is None:
        return
    if tree["codec"] != "mini_codec":
        fail("--embed: the model must be joined with the embedded codec (--codec mini_codec)")
    target = args.assets / "mini_tts"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(model, target)
    card = "# mini_tts\n\nA small English MaskGCT over mini_codec: speaks in the voice of a prompt. Made by\n"
    card += f"egs/mini_tts. Licence: {tree['card']['licence']}\n\n{parts[0]}"
    (target / "README.md").write_text(card, encoding="utf-8")
    notice(f"{target}: {sum(p.stat().st_size for p in target.rglob('*') if p.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
