"""What the recipes of recognisers share: tokenizer and frontend set-up, and validation by error rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nar_speech.data.augment import AugmentConfig
from nar_speech.data.batch import Batch
from nar_speech.data.loader import DataConfig, EvalData, TrainData, open_many, text_of
from nar_speech.data.specaug import SpecAugmentConfig
from nar_speech.errors import ConfigError
from nar_speech.features import Frontend, FrontendConfig, build_frontend
from nar_speech.metrics import ErrorCounts, char_errors, word_errors
from nar_speech.model_folder import DecodingConfig
from nar_speech.text.tokenizer import (
    BpeTokenizer,
    CharTokenizer,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_bpe,
)
from nar_speech.train.distributed import World, barrier, gather_lists, say
from nar_speech.train.loop import TrainConfig
from nar_speech.train.recipe import InitSection
from nar_speech.train.saver import write_atomic
from nar_speech.types import ModelCard

Evaluate = Callable[
    [nn.Module, Tensor, Tensor, Batch], tuple[Mapping[str, Tensor], Mapping[str, Sequence[Sequence[int]]]]
]


@dataclass(frozen=True)
class TokenizerSection:
    """The tokenizer of a recipe: a file that exists, or one made from the training texts.

    Attributes:
        kind: "bpe" (sentencepiece) or "char": every character of the training texts, "<space>" for the space.
        file: an existing sentencepiece model or list of pieces; None makes one.
        vocab_size: of a BPE model that is made; a "char" list has as many pieces as there are characters.
        case: what is done to every text.
        texts: text file, one sentence a line, to train the BPE model on instead of the training texts.
    """

    kind: Literal["bpe", "char"] = "bpe"
    file: str | None = None
    vocab_size: int = 500
    case: Literal["keep", "lower", "upper"] = "lower"
    texts: str | None = None


@dataclass(frozen=True, kw_only=True)
class RecognitionRecipe:
    """Settings of every recogniser's recipe; ``network`` takes its sizes from frontend and tokenizer."""

    train: TrainConfig
    data: DataConfig
    card: ModelCard
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    network: dict[str, Any] = field(default_factory=dict)
    init: InitSection = field(default_factory=InitSection)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    specaug: SpecAugmentConfig | None = field(default_factory=SpecAugmentConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    unit: Literal["wer", "cer"] = "wer"


def make_data(
    config: RecognitionRecipe, encode: Callable[[str], list[int]], world: World
) -> tuple[TrainData, EvalData]:
    """Training and development batches of this process."""
    group = world.size * config.train.accumulation
    place = config.train.seed, world.rank, world.size, group
    return (
        TrainData(config.data, encode, config.augment, *place),
        EvalData(config.data, encode, world.rank, world.size),
    )


def make_tokenizer(
    section: TokenizerSection, data: DataConfig, folder: str | Path, world: World
) -> Tokenizer:
    """The tokenizer of a run, saved in ``folder``/tokenizer; a resumed run reads it from there."""
    place = Path(folder) / "tokenizer"
    names = {"bpe": BpeTokenizer.FILE, "char": CharTokenizer.FILE}
    kept = TokenizerConfig(section.kind, names[section.kind], case=section.case)
    if world.main and not (place / kept.file).is_file():
        place.mkdir(parents=True, exist_ok=True)
        if section.file is not None:
            source = Path(section.file)
            made = load_tokenizer(
                TokenizerConfig(section.kind, source.name, case=section.case), source.parent
            )
        elif section.kind == "bpe":
            made = train_bpe(_texts(section, data), section.vocab_size, place / ".making")
            (place / ".making").unlink()
        else:
            characters = sorted({c for text in _texts(section, data) for c in text if not c.isspace()})
            spaced = any(" " in text for text in _texts(section, data))
            space = ["<space>"] if spaced else []
            made = CharTokenizer(["<blank>", "<s>", "</s>", "<unk>", *space, *characters])
        made.save(place)
    barrier(world)
    return load_tokenizer(kept, place)


def make_frontend(config: FrontendConfig, data: DataConfig, folder: str | Path, world: World) -> Frontend:
    """The frontend of a run; its CMVN file is computed from the training audio where it does not exist yet.

    ``frontend.cmvn`` names a file of ``folder`` (FunASR's *.mvn or WeNet's *.json). Computing takes the first
    5000 training utterances.

    Raises:
        ConfigError: a CMVN file that is neither there nor to be computed (only *.json is).
    """
    folder = Path(folder)
    if config.cmvn is None:
        return build_frontend(config, folder)
    path = folder / config.cmvn
    if world.main and not path.is_file():
        if path.suffix != ".json":
            raise ConfigError(
                f"frontend.cmvn: no file {path}; copy it there, or name a .json to have it computed"
            )
        stats = json.dumps(cmvn_statistics(config, data))
        write_atomic(path, lambda part: part.write_text(stats, encoding="utf-8"))
    barrier(world)
    return build_frontend(config, folder)


def cmvn_statistics(config: FrontendConfig, data: DataConfig, utterances: int = 5000) -> dict[str, Any]:
    """WeNet's global_cmvn: sums and sums of squares (F values) of the features of training utterances."""
    frontend = build_frontend(replace(config, cmvn=None))
    cuts = list(islice(open_many(data.train, "data.train", 0), utterances))
    sums = torch.zeros(2, frontend.feature_size, dtype=torch.float64)
    count = 0
    for batch in EvalData(data, lambda _: [], cuts=cuts):
        feats, lengths = frontend(batch.waves, batch.wave_lengths)
        valid = (torch.arange(feats.shape[1]) < lengths[:, None])[:, :, None]
        values = feats.double() * valid
        sums += torch.stack([values.sum((0, 1)), values.square().sum((0, 1))])
        count += int(lengths.sum())
    return {"mean_stat": sums[0].tolist(), "var_stat": sums[1].tolist(), "frame_num": count}


class Validator:
    """Losses and error rates on the evaluation utterances; call it with a model in eval mode.

    Args:
        evaluate: ``(model, feats, lengths, batch)`` to loss scalars (means over the batch) and to
            {name: token ids of each utterance} of one or more decodings.
        unit: "wer" or "cer"; the decoding "" is reported under this name, the decoding "ctc" as "ctc_wer".
        examples: how many utterances to print with every validation.
    """

    def __init__(
        self,
        data: EvalData,
        frontend: Frontend,
        tokenizer: Tokenizer,
        evaluate: Evaluate,
        unit: Literal["wer", "cer"],
        world: World,
        examples: int = 3,
    ):
        self.data, self.frontend, self.tokenizer, self.world = data, frontend, tokenizer, world
        self.evaluate, self.unit, self.examples = evaluate, unit, examples

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Mean of every loss scalar over the utterances, and error rates as fractions; equal everywhere."""
        records: list[tuple[str, str, dict[str, str], dict[str, float]]] = []
        for batch in self.data:
            batch = batch.to(self.world.device)
            feats, lengths = self.frontend(batch.waves, batch.wave_lengths)
            scalars, decoded = self.evaluate(model, feats, lengths, batch)
            scalars = {key: float(value) for key, value in scalars.items()}
            for b, (name, text) in enumerate(zip(batch.ids, batch.texts, strict=True)):
                reference = self.tokenizer.decode(self.tokenizer.encode(text))
                texts = {key: self.tokenizer.decode(list(ids[b])) for key, ids in decoded.items()}
                records.append((name, reference, texts, scalars))
        records = sorted(gather_lists(self.world, records), key=lambda record: record[0])
        for name, reference, texts, _ in records[:: max(1, len(records) // self.examples)][: self.examples]:
            shown = "".join(f"\n    {key or 'out'}: {text}" for key, text in texts.items())
            say(self.world, f"  {name}\n    ref: {reference}{shown}")
        metrics = {key: sum(r[3][key] for r in records) / len(records) for key in records[0][3]}
        for key in records[0][2]:
            name = f"{key}_{self.unit}" if key else self.unit
            metrics[name] = _rate([r[1] for r in records], [r[2][key] for r in records], self.unit)
        return metrics


def _texts(section: TokenizerSection, data: DataConfig) -> Iterable[str]:
    change = {"keep": str, "lower": str.lower, "upper": str.upper}[section.case]
    if section.texts is not None:
        try:
            lines = Path(section.texts).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"tokenizer.texts: {section.texts} can't be read: {error.strerror}") from error
        return [change(line) for line in lines]
    return [change(text_of(cut)) for cut in open_many(data.train, "data.train", 0)]


def _rate(references: Sequence[str], hypotheses: Sequence[str], unit: str) -> float:
    errors = word_errors if unit == "wer" else char_errors
    return sum(errors(references, hypotheses), ErrorCounts()).rate
