"""Stage 5: error rates of a model folder on every evaluation set with each of its decoders.

    python score.py --work work --model work/model [--dtype float32]

Runs `nar-speech evaluate` and writes work/scores/<set>.<decoder>.json and .txt (each utterance, its errors).
Besides the sets: fluent (librispeech_other, vctk, jfk) and all.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import notice, read_jsonl, write_jsonl

DECODERS = ("ctc_greedy", "ctc_beam", "paraformer")
POOLS = {"fluent": ("librispeech_other", "vctk", "jfk"), "all": ()}


def manifests(folder: Path) -> list[Path]:
    """The sets that are there and the pooled ones, which are written beside them."""
    single = sorted(path for path in folder.glob("*.jsonl") if path.stem not in POOLS)
    pools = []
    for name, members in POOLS.items():
        parts = [path for path in single if not members or path.stem in members]
        lacking = set(members) - {path.stem for path in parts}
        if lacking:
            notice(f"pool {name} is without {', '.join(sorted(lacking))}")
        if parts:
            pools.append(folder / f"{name}.jsonl")
            write_jsonl(pools[-1], (row for path in parts for row in read_jsonl(path)))
    return single + pools


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    folder = args.work / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    sets = manifests(args.work / "eval")
    if not sets:
        raise SystemExit(f"{args.work / 'eval'}: no evaluation set; run stage 0 first")
    for manifest in sets:
        for decoder in DECODERS:
            name = f"{manifest.stem}.{decoder}"
            command = [sys.executable, "-m", "nar_speech", "evaluate", str(manifest), "--json"]
            command += ["--model", str(args.model.resolve()), "--decoder", decoder, "--dtype", args.dtype]
            command += [
                "--device",
                "cpu",
                "--threads",
                str(args.threads),
                "--report",
                str(folder / f"{name}.txt"),
            ]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                raise SystemExit(f"{' '.join(command)}: exit code {run.returncode}")
            scores = json.loads(run.stdout)
            (folder / f"{name}.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
            print(
                f"{name:36s} WER {100 * scores['wer']['rate']:6.2f} %  RTF {scores['real_time_factor']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
