"""A small classifier of 5 s sounds: ESC-10 classes, kinds of effects, instruments, drums, band.

    python classifier.py train work/cuts/sound_train.jsonl.gz -o classifier.safetensors
    python classifier.py score classifier.safetensors work/cuts/eval_esc10.jsonl.gz [more ...] [--json FILE]

It learns from real and rendered clips and is scored on held-out ones; then it says which of the generated
clips sound like what was asked for. Inputs of `score`: lhotse manifests (.jsonl.gz), lists (.jsonl) of
{"path", "label"} or {"path", "text"} (a caption of the vocabulary) with paths relative to the list, audio
files in folders named by class, and such folders. What has no known class is skipped and counted.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from base import CLIP, RATE, fail, notice, read_16k, read_jsonl
from captions import all_captions, classes, vocabulary
from torch import nn
from torch.nn import functional as F

MELS, WINDOW, HOP = 64, 640, 320
FLOOR = 6.0  # the range in powers of ten (60 dB) below the loudest moment of a clip
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3")
Item = tuple[Path, str]


class LogMel(nn.Module):
    """Waves (B, N) -> (B, 64, N / 320): log power in mel bands, 0 at 60 dB below the clip's peak, 1 there."""

    def __init__(self):
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        bank = melscale_fbanks(WINDOW // 2 + 1, 40.0, RATE / 2, MELS, RATE, norm="slaney", mel_scale="slaney")
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def power(self, waves: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(waves, WINDOW, HOP, window=self.window, return_complex=True)[..., :-1]
        return self.bank.T @ spectrum.abs().square()

    @staticmethod
    def compress(power: torch.Tensor) -> torch.Tensor:
        log = (power + 1e-10).log10()
        return ((log - log.amax((1, 2), keepdim=True)) / FLOOR + 1).clamp(min=0)


class SoundNet(nn.Module):
    """(B, 64, T) -> (B, classes): four convolutions, then mean and maximum over time."""

    def __init__(self, num_classes: int, width: int = 24):
        super().__init__()
        sizes = [1, width, 2 * width, 3 * width, 4 * width]
        blocks = []
        for number, (before, after) in enumerate(pairwise(sizes)):
            kernel = 5 if number == 0 else 3
            blocks += [
                nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * sizes[-1] * (MELS // 16), num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.blocks(features[:, None]).flatten(1, 2)
        return self.head(self.dropout(torch.cat([x.mean(-1), x.amax(-1)], 1)))


# ---- what is classified -----------------------------------------------------------------------------------


def class_of_folder(name: str, known: Iterable[str]) -> str | None:
    plain = re.sub(r"[-_]", " ", name)
    return plain if plain in set(known) else None


def items_of(source: Path, known: list[str]) -> tuple[list[Item], int]:
    """(path, class) of every clip that `source` names, and how many have no class of `known`."""
    if not source.exists():
        fail(f"{source}: no such file or folder")
    found: list[tuple[Path, str | None]] = []
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in AUDIO)
        found = [(path, class_of_folder(path.parent.name, known)) for path in paths]
    elif source.name.endswith(".jsonl.gz"):
        from lhotse import load_manifest_lazy

        for cut in load_manifest_lazy(source):
            label = (cut.supervisions[0].custom or {}).get("label") if cut.supervisions else None
            found.append((Path(cut.recording.sources[0].source), label))
    elif source.suffix == ".jsonl":
        meaning = {caption: names[0] for caption, names in all_captions().items() if len(names) == 1}
        for record in read_jsonl(source):
            if "path" not in record:
                fail(f"{source}: a line has no path")
            found.append(
                (source.parent / record["path"], record.get("label") or meaning.get(record.get("text")))
            )
    elif source.suffix.lower() in AUDIO:
        found = [(source, class_of_folder(source.resolve().parent.name, known))]
    else:
        fail(f"{source}: neither a manifest (.jsonl.gz, .jsonl), nor audio, nor a folder")
    kept = [(path, label) for path, label in found if label in known]
    return kept, len(found) - len(kept)


def windows(path: Path) -> torch.Tensor:
    """The file as clips (W, CLIP) of 5 s; a rest of less than 2.5 s after the first is left out."""
    try:
        samples = read_16k(path)
    except Exception as error:
        fail(f"{path}: {str(error).splitlines()[0]}")
    count = max(1, round(len(samples) / CLIP))
    samples = np.pad(samples[: count * CLIP], (0, max(0, count * CLIP - len(samples))))
    return torch.from_numpy(samples).reshape(count, CLIP)


# ---- training ---------------------------------------------------------------------------------------------


def augment(power: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Power spectra (B, M, T), shifted in time, tilted and with noise; `compress` takes the gain out."""
    size, mels, frames = power.shape
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    shift = (draw(size, 1, 1) * frames).long()
    power = power.gather(2, ((torch.arange(frames) + shift) % frames).expand(-1, mels, -1))
    slope = torch.linspace(-0.6, 0.6, mels)[None, :, None]  # up to 3 dB at each end
    power = power * 10 ** (slope * (draw(size, 1, 1) - 0.5))
    # Noise 25 to 75 dB below the loudest moment, of a random colour.
    colour = 10 ** ((draw(size, 1, 1) * 2 - 1.5) * torch.linspace(0, 1, mels)[None, :, None])
    noise = power.amax((1, 2), keepdim=True) * 10 ** (-2.5 - 5 * draw(size, 1, 1))
    return power + noise * colour * -(1 - 0.999999 * draw(size, mels, frames)).log()


def mask(features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Two bands of up to 8 mels and up to 0.8 s to zero, as in SpecAugment (Park et al. 2019)."""
    for axis, longest in ((1, 8), (1, 8), (2, 40)):
        size = features.shape[axis]
        length = (torch.rand(len(features), 1, generator=generator) * longest).long()
        first = (torch.rand(len(features), 1, generator=generator) * (size - length)).long()
        place = torch.arange(size)
        hidden = (place >= first) & (place < first + length)
        features = features.masked_fill(hidden[:, :, None] if axis == 1 else hidden[:, None], 0)
    return features


def spectra(items: list[Item], most: int | None = None) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Power spectra (N, M, T) with a peak of 1, class numbers (N,), names of the classes."""
    from tqdm import tqdm

    known = [name for name in classes() if any(label == name for _, label in items)]
    if most:
        seen: Counter[str] = Counter()
        kept = []
        for item in items:
            seen[item[1]] += 1
            if seen[item[1]] <= most:
                kept.append(item)
        items = kept
    front, out, labels = LogMel(), [], []
    for path, label in tqdm(items, desc="features", unit="clip", mininterval=5):
        power = front.power(windows(path))
        out.append(power / power.amax((1, 2), keepdim=True).clamp(min=1e-10))
        labels += [known.index(label)] * len(power)
    return torch.cat(out), torch.tensor(labels), known


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    items = [item for source in args.manifest for item in items_of(source, classes())[0]]
    if not items:
        fail(f"{args.manifest[0]}: no clip has a class of conf/vocabulary.yaml")
    power, labels, known = spectra(items, args.most)
    # Every class as often as any other, the recorded ones more often: they are the most varied.
    wanted = torch.tensor([args.real if name in vocabulary()["esc10"] else 1.0 for name in known])
    chances = (wanted / torch.bincount(labels, minlength=len(known)))[labels]
    network = SoundNet(len(known)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=args.steps, pct_start=0.2)
    began, total = time.perf_counter(), 0.0
    print(
        f"{len(power)} clips, {len(known)} classes, {sum(p.numel() for p in network.parameters())} parameters"
    )
    for step in range(1, args.steps + 1):
        picked = torch.multinomial(chances, args.batch, replacement=True, generator=generator)
        mates = torch.randperm(args.batch, generator=generator)
        share = torch.ones(args.batch, 1, 1)
        if args.mixup:
            share = torch.distributions.Beta(0.3, 0.3).sample(share.shape)
        sound = augment(power[picked], generator)
        features = mask(LogMel.compress(sound * share + sound[mates] * (1 - share)), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = network(features)
        logits = logits.float()
        each_loss = F.cross_entropy(logits, labels[picked], label_smoothing=0.1, reduction="none")
        mate_loss = F.cross_entropy(logits, labels[picked][mates], label_smoothing=0.1, reduction="none")
        weight = share.flatten()
        loss = (weight * each_loss + (1 - weight) * mate_loss).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % args.report == 0 or step == args.steps:
            spent = time.perf_counter() - began
            print(
                f"step {step:5d} loss {total / ((step - 1) % args.report + 1):.3f} {spent:6.1f} s", flush=True
            )
            total = 0.0
    save(network, known, args.output)
    print(f"wrote {args.output}")
    for source in args.dev:
        report(score_source(network.eval(), known, source), source)


def save(network: SoundNet, known: list[str], path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, path, metadata={"kind": "mini_sound classifier", "classes": json.dumps(known)})


def load(path: Path) -> tuple[SoundNet, list[str]]:
    """The classifier in a file of `train` and the names of its classes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            known = json.loads((file.metadata() or {}).get("classes", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        fail(f"{path}: {error}")
    if not known:
        fail(f"{path}: not a classifier of this script")
    network = SoundNet(len(known))
    network.load_state_dict(tensors)
    return network.eval(), known


# ---- scores -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def probabilities(network: SoundNet, path: Path, front: LogMel) -> torch.Tensor:
    """(classes,) of one file, the mean over its windows."""
    return network(front.compress(front.power(windows(path)))).softmax(-1).mean(0)


def score_source(network: SoundNet, known: list[str], source: Path) -> dict:
    """Accuracy in all, by class (first guess, first three, what else was heard) and every file's guesses."""
    items, skipped = items_of(source, known)
    front, files = LogMel(), []
    for path, label in items:
        chance = probabilities(network, path, front)
        best = [known[i] for i in chance.topk(min(3, len(known))).indices]
        files.append(
            {"path": str(path), "label": label, "heard": best, "probability": round(chance.max().item(), 3)}
        )
    table = {}
    for name in known:
        mine = [file for file in files if file["label"] == name]
        if mine:
            right = sum(file["heard"][0] == name for file in mine) / len(mine)
            near = sum(name in file["heard"] for file in mine) / len(mine)
            others = Counter(file["heard"][0] for file in mine if file["heard"][0] != name)
            table[name] = {
                "clips": len(mine),
                "accuracy": right,
                "top3": near,
                "heard_as": dict(others.most_common(3)),
            }
    right = sum(file["heard"][0] == file["label"] for file in files)
    accuracy = right / len(files) if files else None
    return {"accuracy": accuracy, "clips": len(files), "skipped": skipped, "classes": table, "files": files}


def report(result: dict, source: Path) -> None:
    if not result["clips"]:
        notice(f"{source}: no clip with a class that the classifier knows")
        return
    print(
        f"\n{source}: {100 * result['accuracy']:.1f} % of {result['clips']} clips "
        f"({result['skipped']} skipped)"
    )
    for name, line in result["classes"].items():
        others = ", ".join(f"{other} {count}" for other, count in line["heard_as"].items())
        print(
            f"  {name:16s} {line['clips']:4d} clips {100 * line['accuracy']:6.1f} %  in the first 3 "
            f"{100 * line['top3']:6.1f} %  {others}"
        )


def score(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    network, known = load(args.model)
    results = {}
    for source in args.source:
        results[str(source)] = score_source(network, known, source)
        report(results[str(source)], source)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("train", help="learn from manifests with classes")
    learn.add_argument("manifest", type=Path, nargs="+")
    learn.add_argument("-o", "--output", type=Path, required=True, help="classifier.safetensors")
    learn.add_argument("--dev", type=Path, nargs="*", default=[], help="manifests to score at the end")
    learn.add_argument("--steps", type=int, default=1000)
    learn.add_argument(
        "--real", type=float, default=3.0, help="how often to draw a class of ESC-10 (default %(default)s)"
    )
    learn.add_argument("--batch", type=int, default=64)
    learn.add_argument("--most", type=int, default=80, help="clips of a class at most (default %(default)s)")
    learn.add_argument("--no-mixup", dest="mixup", action="store_false", help="do not mix pairs of clips")
    learn.add_argument("--report", type=int, default=50, help="steps between lines (default %(default)s)")
    learn.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of the convolutions (default %(default)s)",
    )
    learn.add_argument("--seed", type=int, default=1)
    test = commands.add_parser("score", help="accuracy per class of recorded, rendered or generated clips")
    test.add_argument("model", type=Path)
    test.add_argument("source", type=Path, nargs="+", help="manifest, list, audio file or folder")
    test.add_argument("--json", type=Path, help="all results, every file, as JSON")
    for command in (learn, test):
        command.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    {"train": train, "score": score}[args.command](args)


if __name__ == "__main__":
    main()
