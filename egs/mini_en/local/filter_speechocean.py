"""Stage 2: how likely each speechocean762 transcript is under an earlier model.

    python filter_speechocean.py --work work --model exp/model

The prompts of this corpus often differ from what was said. Writes work/cuts/speechocean_scores.jsonl, one
line a clip: {"name", "score"}; score is the CTC log probability of the transcript (all alignments) per token.
make_cuts.py --least-score drops the clips below a bound. A finished list is kept; remove it to score again.
"""

import argparse
from pathlib import Path

import torch
from common import notice, read_16k, read_jsonl, write_jsonl
from torch.nn.utils.rnn import pad_sequence

from nar_speech.hub import LoadedModel, load_parts, resolve
from nar_speech.losses.ctc import ctc_loss
from nar_speech.models.paraformer import BLANK

BATCH = 16


@torch.no_grad()
def scores(model: LoadedModel, rows: list[dict], folder: Path) -> list[float]:
    """Log probability per token of each row's transcript."""
    waves = [torch.from_numpy(read_16k(folder / row["path"])) for row in rows]
    tokens = [torch.tensor(model.tokenizer.encode(row["text"])) for row in rows]
    feats, lengths = model.frontend(pad_sequence(waves, True), torch.tensor([len(wave) for wave in waves]))
    encoded, frames = model.network.encode(feats, lengths)
    log_probs = model.network.ctc_logits(encoded).float().log_softmax(-1)
    counts = torch.tensor([len(ids) for ids in tokens])
    targets = pad_sequence(tokens, True, -1)
    losses = ctc_loss(log_probs, frames, targets, counts, BLANK, reduction="none", zero_infinity=False)
    return (-losses / counts).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", required=True, help="model folder or name with a CTC head")
    args = parser.parse_args()
    manifest = args.work / "real" / "speechocean762.jsonl"
    if not manifest.exists():
        notice("speechocean762 isn't here, so there is nothing to filter")
        return
    rows = sorted(read_jsonl(manifest), key=lambda row: row["duration"])
    path = args.work / "cuts" / "speechocean_scores.jsonl"
    if path.exists() and {row["name"] for row in read_jsonl(path)} >= {row["name"] for row in rows}:
        print(f"{path} has all clips; remove it to score them again")
        return
    model = load_parts(resolve(args.model))
    out = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        found = scores(model, part, manifest.parent)
        out += [
            {"name": row["name"], "score": round(score, 3)} for row, score in zip(part, found, strict=True)
        ]
        if start % (50 * BATCH) == 0:
            print(f"{start} of {len(rows)} clips scored", flush=True)
    write_jsonl(path, out)
    for bound in (-1, -2, -2.5, -3, -4):
        print(f"below {bound}: {sum(row['score'] < bound for row in out)} of {len(out)}")


if __name__ == "__main__":
    main()
