"""Stage 5: error rates of a model folder on every evaluation set with each way to decode it.

    python score.py --work work --model work/model [--dtype float32] [--scores scores] [--decoders ...]

Recognises work/eval/all.jsonl once in each way, as `nar-speech evaluate` does, and writes for each set
work/SCORES/<set>.<decoder>.json and .txt (every utterance with its errors). Besides the sets: fluent
(librispeech_other, vctk, jfk) and all.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from common import notice, read_jsonl, write_jsonl

from nar_speech.hub import load_model
from nar_speech.metrics import char_error_rate, word_error_rate
from nar_speech.pipelines.evaluate import Evaluation, evaluate, report_lines

# Column -> options of nar_speech.load_model.
DECODERS = {
    "ctc_greedy": {"decoder": "ctc_greedy", "verify": False},
    "ctc_beam": {"decoder": "ctc_beam", "lm": None, "verify": False},
    "ctc_beam_lm": {"decoder": "ctc_beam", "verify": False},
    "paraformer": {"decoder": "paraformer", "verify": False},
    "ctc_3_passes": {"decoder": "ctc_greedy", "verify": True, "max_passes": 3},
    "lm_3_passes": {"decoder": "ctc_beam", "verify": True, "max_passes": 3},
    "verified": {"decoder": "ctc_beam", "verify": True},
}
STREAM_DECODERS = ("ctc_greedy", "ctc_beam", "ctc_beam_lm")  # of the streaming twin
POOLS = {"fluent": ("librispeech_other", "vctk", "jfk"), "all": ()}


def pools(folder: Path) -> dict[str, tuple[str, ...]]:
    """Set or pool -> the sets in it; writes `folder`/all.jsonl."""
    single = sorted(path.stem for path in folder.glob("*.jsonl") if path.stem not in POOLS)
    if not single:
        raise SystemExit(f"{folder}: no evaluation set; run stage 0 first")
    write_jsonl(
        folder / "all.jsonl", (row for name in single for row in read_jsonl(folder / f"{name}.jsonl"))
    )
    out = {name: (name,) for name in single}
    for name, members in POOLS.items():
        lacking = [member for member in members if member not in single]
        if lacking:
            notice(f"pool {name} is without {', '.join(lacking)}")
        out[name] = tuple(member for member in members or single if member in single)
    return {name: members for name, members in out.items() if members}


def part(found: Evaluation, members: tuple[str, ...]) -> Evaluation:
    """The utterances of some sets (a set is the folder that a clip lies in)."""
    items = tuple(item for item in found.items if Path(item.path).parent.name in members)
    references, hypotheses = [item.reference for item in items], [item.hypothesis for item in items]
    words, characters = (rate(references, hypotheses) for rate in (word_error_rate, char_error_rate))
    return replace(found, words=words, characters=characters, items=items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scores", default="scores", help="folder in --work")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=list(DECODERS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.work / args.scores
    folder.mkdir(parents=True, exist_ok=True)
    sets = pools(args.work / "eval")
    for decoder in args.decoders:
        model = load_model(str(args.model.resolve()), "cpu", args.dtype, **DECODERS[decoder])
        found = evaluate(model, args.work / "eval" / "all.jsonl")
        if found.problems:
            raise SystemExit("\n".join(found.problems))
        print(
            f"{decoder}: {found.seconds / found.audio_seconds:.4f} s of computing per second of audio",
            flush=True,
        )
        for name, members in sets.items():
            scores = part(found, members)
            keep = {key: value for key, value in scores.to_dict().items() if "seconds" not in key}
            path = folder / f"{name}.{decoder}.json"
            path.write_text(json.dumps(keep, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".txt").write_text("\n".join(report_lines(scores)) + "\n", encoding="utf-8")
            print(f"  {name:18s} {scores.words}", flush=True)


if __name__ == "__main__":
    main()
