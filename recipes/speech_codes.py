"""Phones and codes of lhotse cuts, in batches; for :mod:`recipes.prepare_speech`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from nar_speech.codec.base import Codec
from nar_speech.data.augment import read_cut
from nar_speech.errors import InputError, ManifestError
from nar_speech.pipelines.semantic import SemanticTokenizer
from nar_speech.text.g2p import Phonemizer

SPARE = 2  # frames by which semantic and acoustic codes of a clip may differ in number


def spoken(cuts: Sequence, phonemizer: Phonemizer) -> tuple[list, list[list[int]]]:
    """The cuts whose text can be said, and the phones of each; the others are named."""
    kept, phones = [], []
    for cut in cuts:
        text = " ".join(part.text.strip() for part in cut.supervisions if part.text and part.text.strip())
        try:
            phones.append(list(phonemizer(text).ids))
            kept.append(cut)
        except InputError as error:
            print(f"left out, {cut.id}: {error}", file=sys.stderr)
    return kept, phones


@torch.inference_mode()
def encode_cuts(
    codec: Codec, coder: SemanticTokenizer, cuts: Sequence, codebooks: int, batch_seconds: float
) -> list[tuple[Tensor, Tensor]]:
    """Semantic (T,) and acoustic (K, T) codes of cuts, in batches of similar length.

    Raises:
        ManifestError: both kinds differ too much in number.
    """
    order = sorted(range(len(cuts)), key=lambda i: cuts[i].duration)
    codes: list = [None] * len(cuts)
    group: list[int] = []
    for position, i in enumerate(order):
        group.append(i)
        last = position + 1 == len(order)
        if not last and cuts[order[position + 1]].duration * (len(group) + 1) <= batch_seconds:
            continue
        chosen = [cuts[j] for j in group]
        heard, lengths = waves_of(chosen, coder.features.sample_rate)
        semantic, counts = coder.encode(heard.to(codec.device), lengths)
        waves, sizes = waves_of(chosen, codec.sample_rate)
        made = codec.encode(waves[:, None].expand(-1, codec.channels, -1).to(codec.device), sizes, codebooks)
        for row, j in enumerate(group):
            pair = int(counts[row]), int(made.lengths[row])
            if abs(pair[0] - pair[1]) > SPARE:
                raise ManifestError(f"cut {cuts[j].id}: {pair[0]} semantic and {pair[1]} acoustic codes")
            size = min(pair)
            codes[j] = semantic[row, :size].cpu(), made.tokens[row, :, :size].cpu()
        group = []
    return codes


def waves_of(cuts: Sequence, rate: int) -> tuple[Tensor, Tensor]:
    """Waves (B, N) of cuts at one rate, and their lengths (B,)."""
    waves = [torch.from_numpy(read_cut(cut, rate)) for cut in cuts]
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(w) for w in waves])
