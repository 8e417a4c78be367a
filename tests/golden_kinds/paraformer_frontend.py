"""Golden handlers of the Paraformer family's front end and text post-processing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from nar_speech.cmvn import read_kaldi_cmvn
from nar_speech.features import Frontend, FrontendConfig, stack_frames
from nar_speech.models.funasr import KALDI_WINDOWS
from nar_speech.text.postprocess import (
    rich_transcription_postprocess,
    sentence_postprocess,
    sentence_postprocess_sentencepiece,
)

if TYPE_CHECKING:
    from tests.golden import Case, Check


def frontend_config(conf: dict) -> FrontendConfig:
    """Our configuration from FunASR's ``frontend_conf``."""
    return FrontendConfig(
        sample_rate=conf.get("fs", 16000),
        window=KALDI_WINDOWS.get(conf.get("window", "hamming"), conf.get("window", "hamming")),
        num_mels=conf.get("n_mels", 80),
        frame_ms=float(conf.get("frame_length", 25)),
        shift_ms=float(conf.get("frame_shift", 10)),
        lfr_m=conf.get("lfr_m", 1),
        lfr_n=conf.get("lfr_n", 1),
    )


def frontend(case: Case) -> Iterator[Check]:
    """Filter bank, stacking, CMVN, batches, short clips, and streams chunk by chunk."""
    config = frontend_config(case.meta["config"])
    plain = Frontend(FrontendConfig(**{**vars(config), "lfr_m": 1, "lfr_n": 1}))
    stacked = Frontend(config)
    cmvn = read_kaldi_cmvn(next(case.folder.glob("*.mvn")))
    yield case.close("cmvn_shift", cmvn[0])
    yield case.close("cmvn_scale", cmvn[1])
    full = Frontend(config, cmvn)

    def single(module: Frontend, wave: torch.Tensor) -> torch.Tensor:
        features, lengths = module(wave[None], torch.tensor([len(wave)]))
        return features[0, : int(lengths[0])]

    names = [name.removesuffix("_wav") for name in case.io if name.endswith("_wav")]
    for name in names:
        wave = case.io[f"{name}_wav"]
        for kind, module in (("fbank", plain), ("lfr", stacked), ("feats", full)):
            if f"{name}_{kind}" in case.io:
                yield case.close(f"{name}_{kind}", single(module, wave))
    if "batch_feats" in case.io:
        yield from _batch(case, full)
    for name, want in case.io.items():
        short = re.fullmatch(r"short(\d+)_feats", name)
        if short:
            words = case.meta["tensors_in_io"][name]["what"]
            source, start = re.search(r"(\w+_wav)\[(\d+):", words).groups()
            clip = case.io[source][int(start) : int(start) + int(short[1])]
            yield case.close(name, single(full, clip), want)
        stack = re.fullmatch(r"lfr_T(\d+)", name)
        if stack:
            frames = case.io["lfr_in"][None, : int(stack[1])]
            got, rows = stack_frames(frames, torch.tensor([frames.shape[1]]), config.lfr_m, config.lfr_n)
            yield case.close(name, got[0, : int(rows[0])], want)
    yield from _streams(case, full)


def _batch(case: Case, module: Frontend) -> Iterator[Check]:
    """The ragged batch, in the order that meta.json names."""
    words = case.meta["tensors_in_io"]["batch_feats"]["what"]
    order = re.search(r"\[(.+?)\]", words)[1].replace(" ", "").split(",")
    waves = [case.io[f"{name}_wav"] for name in order]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    features, lengths = module(padded, torch.tensor([len(wave) for wave in waves]))
    yield case.close("batch_feats", features)
    yield case.close("batch_feats_lens", lengths)


def _streams(case: Case, module: Frontend) -> Iterator[Check]:
    """Chunk by chunk. Version 1.4.3 may lose the tail of a stream; ours must then hold the offline tail."""
    wave = case.io["speech_wav"][None]
    offline = module(wave, torch.tensor([wave.shape[1]]))[0][0]
    for size, entry in case.meta.get("online", {}).items():
        names = sorted(name for name in case.io if re.fullmatch(rf"online{size}_c\d+_feats", name))
        state, done, counts = module.init_state(1), 0, []
        for number, name in enumerate(names):
            chunk = wave[:, number * int(size) : (number + 1) * int(size)]
            last = number == len(names) - 1
            got, _, state = module.step(chunk, torch.tensor([chunk.shape[1]]), state, final=last)
            want = case.io[name]
            if last and entry["total"] < entry["offline_total"]:
                want = offline[done:]
            yield case.close(name, got[0], want)
            counts.append(got.shape[1])
            done += got.shape[1]
        yield case.equal(f"online{size} frames in all", sum(counts), entry["offline_total"])
        if entry["total"] == entry["offline_total"]:
            yield case.equal(f"online{size} frames per chunk", counts, entry["frames_per_chunk"])


def postprocess(case: Case) -> Iterator[Check]:
    """Token lists to text and times, sentencepieces, and SenseVoice's tags: all exact."""
    for number, entry in enumerate(case.meta.get("sentence_postprocess", [])):
        name = f"sentence {number}"
        got = sentence_postprocess(entry["tokens"], official=True)[0]
        yield case.equal(name, got, entry["expect_text"])
        if "timestamps_in" in entry:
            text, times, _ = sentence_postprocess(entry["tokens"], entry["timestamps_in"], official=True)
            yield case.equal(f"{name} timed text", text, entry["expect_text_ts"])
            yield case.equal(f"{name} times", times, entry["expect_timestamps"])
    for number, entry in enumerate(case.meta.get("sentence_postprocess_sentencepiece", [])):
        got = list(sentence_postprocess_sentencepiece(entry["tokens"], official=True))
        yield case.equal(f"sentencepiece {number}", got, entry["expect"])
    for number, entry in enumerate(case.meta.get("rich_transcription_postprocess", [])):
        yield case.equal(f"rich {number}", rich_transcription_postprocess(entry["in"]), entry["expect"])


HANDLERS = {"frontend": frontend, "postprocess": postprocess}
