"""Streaming recognisers for the engine: a network that steps through audio, and the text of each stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_speech.engine.asr_hearing import BLANK_SKIP, CtcHearing, Hearing, TokenHearing, TokenStep
from nar_speech.engine.endpoint import EndpointRules
from nar_speech.engine.events import Event, Final, Partial
from nar_speech.engine.model import Control, EndUtterance, SecondPass, SessionOptions, StreamModel
from nar_speech.engine.partials import StablePrefix
from nar_speech.engine.speech import WithVad
from nar_speech.errors import ConfigError
from nar_speech.hub import LoadedModel
from nar_speech.layers.chunks import Chunking
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.silero import SAMPLE_RATE, SileroVad
from nar_speech.model_folder import DecodingConfig
from nar_speech.models.ctc import CtcModel
from nar_speech.models.ctc_stream import CtcStream
from nar_speech.models.paraformer import Paraformer
from nar_speech.models.paraformer_stream import ParaformerStream
from nar_speech.pipelines.language_model import LanguageModels
from nar_speech.pipelines.recognize import LM_CANDIDATES, make_bias
from nar_speech.pipelines.transcribe import pick_device, pick_dtype, resolve_dtype
from nar_speech.search.context import ContextGraph
from nar_speech.search.prefix_beam import Scorer
from nar_speech.search.prior import divide_by_prior
from nar_speech.text.tokenizer import Tokenizer
from nar_speech.types import Token, Word

logger = logging.getLogger(__name__)

KNOWN = ("endpoint", "language", "hotwords", "second_pass")  # settings of a session
ROOM_CHUNKS = 4  # before a chunk, where the encoder could see all
CANDIDATES = 8  # symbols of each CTC frame that are read back, for hotwords
LEAD = 3.0  # seconds before the first token that a second pass hears too
LONG, LONGEST = 30.0, 60.0  # seconds: an utterance that nobody ends is ended at a pause, then anywhere
PAUSE = 0.5  # seconds since the last token


class SpeechModel:
    """A :class:`nar_speech.engine.StreamModel` that writes down what it hears.

    Settings of a session: ``hotwords`` (CTC, or with a second pass), ``language`` (one of the model's;
    without effect), ``second_pass`` {model, options}: a batch model that hears finished utterances again.

    Args:
        stream: audio to candidates or tokens.
        lm: language model of a CTC model's beam, with its weights.
        decoding: ``beam``, ``blank_skip`` and ``hotword_score`` of a CTC model's beam.
    """

    def __init__(
        self,
        stream: CtcStream | ParaformerStream,
        tokenizer: Tokenizer,
        name: str = "",
        lm: Scorer | None = None,
        decoding: DecodingConfig | None = None,
    ):
        self.stream, self.tokenizer, self.lm = stream, tokenizer, lm
        self.decoding = decoding or DecodingConfig()
        self.sample_rate, self.chunk = stream.sample_rate, stream.chunk
        self.first = getattr(stream, "first", stream.chunk)
        self.device = torch.device(stream.device)
        self.ctc = isinstance(stream, CtcStream)
        self.signature = f"{type(stream).__name__}:{name}"

    def init_state(self, slots: int) -> Any:
        """See :class:`StreamModel`."""
        return self.stream.init_state(slots)

    @torch.no_grad()
    def step(self, audio: Tensor, lengths: Tensor, final: Tensor, state: Any) -> tuple[Any, Any]:
        """See :class:`StreamModel`; of a Paraformer's probabilities only the best go to the host."""
        output, state = self.stream.step(audio, lengths, final, state)
        if self.ctc:
            return output, state
        best, ids = output.log_probs.max(-1)
        return TokenStep(ids, output.frames, best.exp(), output.token_lengths), state

    def hearing(self, graph: ContextGraph | None) -> Hearing:
        """Of one utterance."""
        if self.ctc:
            blank = self.stream.network.config.blank
            beam, skip = self.decoding.beam, self.decoding.blank_skip or BLANK_SKIP
            return CtcHearing(blank, self.stream.frame_seconds, graph, self.lm, beam, skip)
        return TokenHearing(self.stream.frontend.frontend.frame_shift)

    def collector(self, options: SessionOptions) -> TextCollector:
        """See :class:`StreamModel`.

        Raises:
            InputError: a setting that this model does not have, a word that it can't spell.
        """
        settings = dict(options.settings)
        unknown = [name for name in settings if name not in KNOWN]
        if unknown:
            raise ConfigError(f"settings: unknown key '{unknown[0]}'; valid keys: {', '.join(KNOWN)}")
        if settings.get("endpoint"):
            raise ConfigError("settings: endpoint: this model has no voice activity detection; leave it out")
        second, graph = settings.get("second_pass"), None
        if second is not None and not (isinstance(second, Mapping) and isinstance(second.get("model"), str)):
            raise ConfigError("settings: second_pass: expected a mapping with the name of a batch model")
        words = settings.get("hotwords") or ()
        if words and self.ctc:
            graph = make_bias(tuple(words), self.tokenizer, self.decoding.hotword_score).graph
        elif words and second is None:
            raise ConfigError("hotwords: this streaming model takes none; use one with a second pass")
        kind = TextCollector if second is None else TwoPassTextCollector
        return kind(self, graph, second)


class TextCollector:
    """Tokens of one stream into partial and final texts."""

    def __init__(self, model: SpeechModel, graph: ContextGraph | None, second: Mapping[str, Any] | None):
        self.model, self.graph, self.second_pass = model, graph, second
        self.segment = self.begin = self.heard_until = 0  # the open segment; samples of stream time
        self._next()

    def _next(self) -> None:
        self.hearing = self.model.hearing(self.graph)
        self.prefix = StablePrefix(agreement=self.hearing.agreement)

    def push(self, row: dict[str, np.ndarray], samples: int, final: bool) -> Sequence[Event | Control]:
        """See :class:`nar_speech.engine.Collector`."""
        rate, tokenizer = self.model.sample_rate, self.model.tokenizer
        self.heard_until = samples
        self.hearing.push(row)
        begin, end = self.begin / rate, samples / rate
        heard = self.hearing.heard(end - begin, final)
        text = tokenizer.decode(heard.ids)
        if not final:
            shown, self.prefix = (self.prefix.text, self.prefix.stable), self.prefix.update(text)
            quiet = end - begin - heard.ends[-1] if heard.ends else 0.0
            spoken = end - begin - heard.starts[0] if heard.starts else 0.0  # silence before may be long
            ending = [EndUtterance()] if spoken > (LONG if quiet >= PAUSE else LONGEST) else []
            if not text or shown == (self.prefix.text, self.prefix.stable):
                return ending
            start = begin + heard.starts[0] if heard.starts else begin
            return [Partial(self.segment, self.prefix.text, self.prefix.stable, start, end), *ending]
        starts, ends = ([begin + t for t in times] for times in (heard.starts, heard.ends))
        words = tokenizer.words(heard.ids, starts, ends, heard.confidences)
        pieces = tokenizer.pieces(heard.ids)
        tokens = tuple(map(Token, heard.ids, pieces, starts, ends, heard.confidences))
        event = Final(
            self.segment, text, words, tokens, starts[0] if starts else begin, ends[-1] if ends else end
        )
        self.segment, self.begin = self.segment + 1, samples
        self._next()
        return [event]

    def export(self) -> dict[str, Any]:
        """See :class:`nar_speech.engine.Collector`."""
        return {
            "segment": self.segment,
            "begin": self.begin,
            "heard_until": self.heard_until,
            "prefix": self.prefix.export(),
            "hearing": self.hearing.export(),
        }

    def restore(self, data: dict[str, Any]) -> None:
        """See :class:`nar_speech.engine.Collector`."""
        self.segment, self.begin = int(data["segment"]), int(data["begin"])
        self.heard_until = int(data["heard_until"])
        self.prefix = self.prefix.restore(data["prefix"])
        self.hearing.restore(data["hearing"])


class TwoPassTextCollector(TextCollector):
    """The same; finished utterances with text go to a batch model, whose text replaces theirs.

    The second pass hears the utterance from a little before its first token: silence before it may be long.
    """

    def __init__(self, model: SpeechModel, graph: ContextGraph | None, second: Mapping[str, Any]):
        super().__init__(model, graph, second)
        self.needed: int | None = 0

    def push(self, row: dict[str, np.ndarray], samples: int, final: bool) -> Sequence[Event | Control]:
        """See :class:`nar_speech.engine.Collector`."""
        first = self.needed
        events = list(super().push(row, samples, final))
        if not final:
            if not self.prefix.text:
                self.needed = max(first, samples - round(LEAD * self.model.sample_rate))
            return events
        self.needed = samples
        (event,) = events
        if event.text:
            tag = {
                "segment": event.segment,
                "text": event.text,
                "start": event.start,
                "end": event.end,
                "first": first / self.model.sample_rate,
            }
            options = dict(self.second_pass.get("options") or {})
            events.append(SecondPass(self.second_pass["model"], first, samples, options, tag))
        return events

    def second(self, tag: Any, result: Any, error: BaseException | None) -> Sequence[Event | Control]:
        """See :class:`nar_speech.engine.TwoPassCollector`: a Transcript; where it failed, the first text."""
        if error is not None:
            logger.warning("second pass failed", extra={"reason": type(error).__name__})
            return [Final(tag["segment"], tag["text"], (), (), tag["start"], tag["end"], "offline")]
        words, tokens = (
            tuple(moved(item, tag["first"]) for item in items)
            for items in (result.words, [t for s in result.segments for t in s.tokens])
        )
        begin = words[0].start if words else tag["start"]  # the two passes differ in times, too
        end = words[-1].end if words else tag["end"]
        return [Final(tag["segment"], result.text, words, tokens, begin, end, "offline")]

    def export(self) -> dict[str, Any]:
        """See :class:`nar_speech.engine.Collector`."""
        return {**super().export(), "needed": self.needed}

    def restore(self, data: dict[str, Any]) -> None:
        """See :class:`nar_speech.engine.Collector`."""
        super().restore(data)
        self.needed = int(data["needed"])


def moved(item: Any, seconds: float) -> Any:
    """A :class:`Word` or :class:`Token`, later."""
    if isinstance(item, Word):
        return Word(item.text, item.start + seconds, item.end + seconds, item.confidence)
    return Token(item.id, item.text, item.start + seconds, item.end + seconds, item.confidence)


def can_stream(parts: LoadedModel) -> bool:
    """Whether a model has what it takes to hear live speech."""
    network = parts.network
    if isinstance(network, Paraformer):
        return network.stream is not None
    if not isinstance(network, CtcModel):
        return False
    try:
        network.chunking()
    except ConfigError:
        return False
    return True


def chunking_of(parts: LoadedModel, chunk_size: int | None = None, left: int | None = None) -> Chunking:
    """How a CTC model is fed: as asked, else as its ``model.yaml`` says, else as its encoder does by default.

    Args:
        chunk_size, left: output frames of a chunk, and before it that it sees.

    Raises:
        ConfigError: sizes that the encoder does not take.
    """
    if parts.stream is not None:
        chunk_size = parts.stream.chunk_size if chunk_size is None else chunk_size
        left = parts.stream.left if left is None else left
    chunking = parts.network.chunking(chunk_size, left)
    if chunking.left < 0:  # all of the past: a slot has room for some of it
        chunking = parts.network.chunking(chunk_size, ROOM_CHUNKS * chunking.frames)
    return chunking


def language_model(
    parts: LoadedModel, device: torch.device
) -> tuple[Scorer | None, Callable[[Tensor], Tensor] | None]:
    """What a CTC model's beam follows, and what its label prior does to log probabilities (B, U, V).

    None without a language model in the folder, or where the folder asks for greedy search.

    Raises:
        ConfigError: a bad file.
    """
    decoding = parts.decoding
    if decoding.lm is None or decoding.decoder == "ctc_greedy":
        return None, None
    models = LanguageModels(parts.tokenizer)
    prior = models.prior(decoding, parts.network.config.vocab_size)
    if prior is None:
        return models(decoding), None
    return models(decoding), partial(divide_by_prior, prior=prior.to(device), weight=decoding.prior_weight)


def load_stream(
    parts: LoadedModel,
    device: str = "auto",
    dtype: str = "float32",
    chunk_size: int | None = None,
    left: int | None = None,
) -> StreamModel:
    """A model that hears live speech and tells when somebody speaks; ``parts`` belong to it from now on.

    Args:
        chunk_size, left: see :func:`chunking_of`.

    Raises:
        ConfigError: it hears whole utterances only, or not at 16 kHz; sizes that it does not take.
        InputError: int8 on another device than the CPU.
    """
    if not can_stream(parts):
        raise ConfigError(f"model '{parts.card.name}': recognises files only, it can't hear live speech")
    place = pick_device(device)
    kind = resolve_dtype(dtype, place)
    network = parts.network.to(place, pick_dtype(kind)).eval()
    if kind == "int8":
        from nar_speech.layers.quantize import quantize_dynamic_int8

        network = quantize_dynamic_int8(network)
    if place.type == "cpu":  # faster, and a row's bits do not depend on how many there are
        network = pack_linear_layers(network)
    frontend = parts.frontend.to(place).eval()
    stream: CtcStream | ParaformerStream
    lm = None
    if isinstance(network, Paraformer):
        if chunk_size is not None or left is not None:
            raise ConfigError(
                f"chunk_size, left: model '{parts.card.name}' has them in network.stream; leave these out"
            )
        stream = ParaformerStream(network, frontend, in_place=True)  # an engine gives it copies
    else:
        chunking = chunking_of(parts, chunk_size, left)
        lm, adjust = language_model(parts, place)
        wanted = CANDIDATES if lm is None else max(LM_CANDIDATES, parts.decoding.beam)
        candidates = min(wanted, network.config.vocab_size)
        stream = CtcStream(network, frontend, chunking, candidates, adjust)
    if stream.sample_rate != SAMPLE_RATE:
        raise ConfigError(
            f"model '{parts.card.name}': hears {stream.sample_rate} Hz; live speech needs 16000"
        )
    model = SpeechModel(stream, parts.tokenizer, parts.card.name, lm, parts.decoding)
    return WithVad(model, SileroVad.from_package(), EndpointRules())
