"""One batch of waveforms to tokens, times and confidences, for every family of recognisers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nar_speech.errors import ConfigError, InputError, NarSpeechError
from nar_speech.features import Frontend
from nar_speech.layers.cif import CifOutput
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.whisper import WhisperEncoder
from nar_speech.model_folder import DecodingConfig
from nar_speech.models.ctc import CtcModel
from nar_speech.models.paraformer import BLANK, EOS, Paraformer
from nar_speech.models.paraformer_stream import recognise_stream
from nar_speech.models.sensevoice import LANGUAGES, PROMPT_FRAMES, SenseVoice
from nar_speech.pipelines.language_model import LanguageModels
from nar_speech.search.ctc import (
    ContextGraph,
    forced_align,
    greedy,
    prefix_beam,
    token_borders,
    token_spans,
)
from nar_speech.search.parallel import best_sequences
from nar_speech.search.prefix_beam import Scorer
from nar_speech.search.prior import divide_by_prior
from nar_speech.search.rescore import attention_rescore
from nar_speech.text.postprocess import split_tags
from nar_speech.text.timestamps import token_times
from nar_speech.text.tokenizer import Tokenizer
from nar_speech.types import Hypothesis

if TYPE_CHECKING:
    from nar_speech.pipelines.verify import Verified, Verifier

LM_CANDIDATES, LM_FLOOR = 24, 9.0  # of prefix_beam with a language model
MIN_SECONDS = 0.2  # shorter clips are followed by silence: subsampling encoders need some frames
Times: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # starts and ends
BEAMS = ("ctc_beam", "attention_rescoring")  # decoders that take a language model
BIASED_VARIANTS = ("contextual", "seaco")


@dataclass(frozen=True)
class Recognized:
    """What was recognised in one waveform; times in seconds from its beginning, () where not asked for."""

    ids: tuple[int, ...]
    confidences: tuple[float, ...]
    starts: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()
    nbest: tuple[Hypothesis, ...] = ()
    tags: tuple[str, ...] = ()
    verified: Verified | None = None


@dataclass(frozen=True)
class Analysis:
    """What a plot shows of one waveform.

    features: (T, F), ``feature_seconds`` apart. weights: (T',) CIF weights; posteriors: (T', V)
    of the CTC head; either is None where the network lacks it; frames are ``frame_seconds`` apart.
    """

    features: np.ndarray
    feature_seconds: float
    frame_seconds: float
    weights: np.ndarray | None
    posteriors: np.ndarray | None
    blank: int


@dataclass(frozen=True)
class Bias:
    """Hotwords as token ids, and the automaton that ``ctc_beam`` uses."""

    phrases: tuple[tuple[int, ...], ...]
    graph: ContextGraph


def has_ctc(network: nn.Module) -> bool:
    """Whether the network has a CTC head."""
    return isinstance(network, CtcModel | SenseVoice) or network.config.ctc_weight > 0


def choose(network: nn.Module, decoding: DecodingConfig) -> str:
    """The decoder to use: the one asked for, or under ``auto`` the model's own.

    ``auto`` is ``paraformer`` or ``ctc_greedy``. With hotwords it is ``ctc_beam``, except for Paraformer
    variants that take hotwords themselves; and so it is with a language model where there is a CTC head, and
    for an n-best list of a CTC model.

    Raises:
        ConfigError: the model does not have what the decoder needs.
    """
    name, hotwords = decoding.decoder, decoding.hotwords
    paraformer = isinstance(network, Paraformer)
    biased = paraformer and network.variant in BIASED_VARIANTS
    if name == "auto":
        if hotwords and not biased:
            if not has_ctc(network):
                raise ConfigError(
                    "hotwords: this Paraformer has no CTC head and no hotword decoder; use a contextual,"
                    " SeACo or CTC model"
                )
            return "ctc_beam"
        if decoding.lm is not None and has_ctc(network) and not (hotwords and biased):
            return "ctc_beam"
        if paraformer:
            return "paraformer"
        return "ctc_greedy" if decoding.nbest == 1 else "ctc_beam"
    if name == "paraformer" and not paraformer:
        raise ConfigError("decoder 'paraformer': this is a CTC model; use ctc_greedy or ctc_beam")
    if name.startswith("ctc") and not has_ctc(network):
        raise ConfigError(f"decoder '{name}': this Paraformer has no CTC head; use paraformer")
    if name == "attention_rescoring" and not (isinstance(network, CtcModel) and network.decoder is not None):
        raise ConfigError("decoder 'attention_rescoring': only U2 models have the attention decoder it needs")
    if hotwords and (name == "ctc_greedy" or (name == "paraformer" and not biased)):
        raise ConfigError(f"hotwords: decoder '{name}' of this model takes none; use ctc_beam")
    if name == "ctc_greedy" and decoding.nbest > 1:
        raise ConfigError("nbest: decoder 'ctc_greedy' has one hypothesis; use ctc_beam")
    return name


def idle_option(
    network: nn.Module, decoding: DecodingConfig, given: Collection[str]
) -> tuple[str, str] | None:
    """The first of the fields ``given`` that changes nothing under ``decoding``, and what to do; None: none.

    Raises:
        ConfigError: as :func:`choose`.
    """
    decoder = choose(network, decoding)
    no_beam = f"decoder '{decoder}' has no beam; use ctc_beam, or leave it out"
    no_lm = "there is no language model; name one, or leave it out" if decoding.lm is None else None
    reasons = {
        "beam": no_beam,
        "lm": no_beam if decoding.lm is not None else None,
        "lm_weight": no_beam,
        "word_bonus": no_beam,
        "hotword_score": no_beam,
    }
    if decoder in BEAMS:
        no_words = None if decoding.hotwords else "there are no hotwords; name some, or leave it out"
        reasons = {"lm_weight": no_lm, "word_bonus": no_lm, "hotword_score": no_words}
    if decoding.verify and decoding.max_passes is None:
        reasons["hotwords"] = "the verifier writes the text and does not follow them; add --no-verify"
    if not decoding.verify:
        reasons["max_passes"] = "there is no verification; add --verify, or leave it out"
    return next(((name, why) for name, why in reasons.items() if why and name in given), None)


def make_bias(hotwords: Sequence[str], tokenizer: Tokenizer, score: float) -> Bias | None:
    """Token ids of hotwords; None without any.

    Raises:
        InputError: a hotword with characters that the vocabulary lacks.
    """
    phrases = []
    for word in hotwords:
        try:
            ids = tuple(tokenizer.encode(word))
        except InputError as error:
            raise InputError(f"hotword '{word}': {error}") from error
        if not ids or {"<unk>", "<OOV>"} & set(tokenizer.pieces(ids)):
            raise InputError(f"hotword '{word}': the model's vocabulary can't spell it; leave it out")
        phrases.append(ids)
    return Bias(tuple(phrases), ContextGraph(phrases, score)) if phrases else None


class Recognizer:
    """A network with its frontend on one device.

    Args:
        dtype: in which the network computes; features, CIF sums and log probabilities are float32 anyway.
    """

    def __init__(
        self,
        network: nn.Module,
        frontend: Frontend,
        tokenizer: Tokenizer,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.network = (
            network.to(device, dtype).eval() if dtype != torch.float32 else network.to(device).eval()
        )
        if device.type == "cpu":
            self.network = pack_linear_layers(self.network)
        self.frontend = frontend.to(device).eval()
        self.tokenizer, self.device, self.dtype = tokenizer, device, dtype
        self._lms = LanguageModels(tokenizer)
        self.load_verifier: Callable[[], Verifier] | None = None  # called when first needed
        self._verifier: Verifier | None = None
        self.sample_rate = frontend.config.sample_rate
        self.frame_seconds = frontend.frame_shift * float(
            network.encoder.frame_stride if hasattr(network, "encoder") else 1
        )

    def language_model(self, decoding: DecodingConfig) -> Scorer | None:
        """What the beam follows, read when it is first asked for; None if ``decoding`` names none.

        Raises:
            ConfigError: a bad file, or one that does not suit the tokenizer.
        """
        if decoding.lm is None:
            return None
        self.prior(decoding)
        return self._lms(decoding)

    def prior(self, decoding: DecodingConfig) -> Tensor | None:
        """The label prior that goes with the language model, read when it is first asked for.

        Raises:
            CheckpointError, ConfigError: a bad file, or one of another model.
        """
        return self._lms.prior(decoding, self.network.config.vocab_size)

    def verifier(self) -> Verifier:
        """What checks the text, read when it is first asked for.

        Raises:
            ConfigError: the model has none, or a bad one.
        """
        if self._verifier is None:
            if self.load_verifier is None:
                raise ConfigError("verify: this model has no verifier; leave the option out")
            self._verifier = self.load_verifier()
        return self._verifier

    def features(self, waves: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """(B, T, F) features and (B,) lengths of (N,) float32 waveforms, on the device."""
        shortest = round(MIN_SECONDS * self.sample_rate)
        lengths = torch.tensor([max(len(wave), shortest) for wave in waves])
        padded = pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True)
        if padded.shape[1] < int(lengths.max()):
            padded = torch.nn.functional.pad(padded, (0, int(lengths.max()) - padded.shape[1]))
        feats, lengths = self.frontend(padded.to(self.device), lengths.to(self.device))
        return feats.to(self.dtype), lengths

    @torch.inference_mode()
    def __call__(
        self,
        waves: Sequence[np.ndarray],
        decoding: DecodingConfig,
        bias: Bias | None = None,
        times: bool = True,
    ) -> list[Recognized]:
        """Recognise a batch; the result of an item does not depend on the others.

        Args:
            waves: (N,) float32 each, in the model's rate.
            times: whether token times are wanted.

        Raises:
            ConfigError: the decoder does not suit the model.
            NarSpeechError: the network gave NaN.
        """
        decoder = choose(self.network, decoding)
        feats, lengths = self.features(waves)
        durations = [len(wave) / self.sample_rate for wave in waves]
        if not isinstance(self.network, Paraformer):
            return self._ctc(feats, lengths, durations, decoder, decoding, bias, times)
        if self.network.stream is not None and decoder == "paraformer" and not decoding.verify:
            return self._online(feats, lengths, durations, decoding, times)
        if not decoding.verify:
            encoded, lengths = self.network.encode(feats, lengths)
            return self._paraformer(encoded, lengths, durations, decoder, decoding, bias, times)
        # Both read the same encoder; where it has a branch, the verifier reads the trunk.
        encoder = self.network.encoder
        if isinstance(encoder, WhisperEncoder):
            memory = encoder.trunk(feats, lengths)
            encoded, lengths = encoder.finish(*memory)
        else:
            memory = encoded, lengths = self.network.encode(feats, lengths)
        found = self._paraformer(encoded, lengths, durations, decoder, decoding, bias, times)
        return self._verify(found, *memory, durations, decoding, times)

    @torch.inference_mode()
    def analyse(self, wave: np.ndarray, decoding: DecodingConfig) -> Analysis:
        """The inner workings of the recognition of one (N,) waveform."""
        feats, lengths = self.features([wave])
        weights = posteriors = None
        if isinstance(self.network, Paraformer):
            encoded, lengths = self.network.encode(feats, lengths)
            weights = self.network.predict(encoded, lengths).alphas[0]
            if has_ctc(self.network):
                posteriors = self.network.ctc_logits(encoded)[0].float().softmax(-1)
        elif isinstance(self.network, SenseVoice):
            out = self.network(feats, lengths, decoding.language, decoding.textnorm)
            posteriors = out.log_probs[0, PROMPT_FRAMES:].exp()
        else:
            posteriors = self.network(feats, lengths).log_probs[0].exp()
        return Analysis(
            feats[0].float().cpu().numpy(),
            self.frontend.frame_shift,
            self.frame_seconds,
            None if weights is None else weights.float().cpu().numpy(),
            None if posteriors is None else posteriors.cpu().numpy(),
            getattr(self.network.config, "blank", BLANK),
        )

    def _verify(
        self,
        found: list[Recognized],
        memory: Tensor,
        lengths: Tensor,
        durations: list[float],
        decoding: DecodingConfig,
        times: bool,
    ) -> list[Recognized]:
        """Let the verifier check every draft; ``memory`` (B, T, D) is what it reads."""
        verifier = self.verifier()
        drafts = [self.tokenizer.decode(item.ids) for item in found]
        texts = verifier(memory, lengths, drafts, durations, decoding.max_passes)
        items = []
        for item, text, duration in zip(found, texts, durations, strict=True):
            timed = times and len(item.starts) == len(item.ids)
            words = self.tokenizer.words(item.ids, item.starts, item.ends, item.confidences) if timed else ()
            items.append(replace(item, verified=verifier.describe(text, words, duration, times)))
        return items

    def _paraformer(
        self,
        encoded: Tensor,
        lengths: Tensor,
        durations: list[float],
        decoder: str,
        decoding: DecodingConfig,
        bias: Bias | None,
        times: bool,
    ) -> list[Recognized]:
        if decoder.startswith("ctc"):
            log_probs = self.network.ctc_logits(encoded).float().log_softmax(-1)
            return self._search(log_probs, lengths, durations, decoder, decoding, bias, times)
        hotwords = [list(ids) for ids in bias.phrases] if bias else None
        self._refuse_nan(encoded, lengths)
        cif = self.network.predict(encoded, lengths)
        log_probs = self.network.recognise(encoded, lengths, cif, hotwords)
        self._refuse_nan(log_probs, cif.token_lengths)
        rows = self._positions(log_probs, cif.token_lengths.tolist(), decoding.nbest)
        if not times:
            return [item for item, _ in rows]
        spans = self._paraformer_times(encoded, lengths, cif, rows, durations)
        return [replace(item, starts=s, ends=e) for (item, _), (s, e) in zip(rows, spans, strict=True)]

    def _online(
        self, feats: Tensor, lengths: Tensor, durations: list[float], decoding: DecodingConfig, times: bool
    ) -> list[Recognized]:
        """What a streaming Paraformer gives chunk by chunk, all chunks at once; a token begins where the one
        before it has ended.
        """
        out = recognise_stream(self.network, feats, lengths)
        self._refuse_nan(out.log_probs, out.token_lengths)
        rows = self._positions(out.log_probs, out.token_lengths.tolist(), decoding.nbest)
        if not times:
            return [item for item, _ in rows]
        items = []
        for (item, kept), frames, duration in zip(rows, out.frames.tolist(), durations, strict=True):
            ends = [(frame + 1) * self.frame_seconds for frame in frames]
            starts = [0.0, *ends]
            spans = tidy([starts[u] for u in kept], [ends[u] for u in kept], duration)
            items.append(replace(item, starts=spans[0], ends=spans[1]))
        return items

    def _positions(
        self, log_probs: Tensor, counts: list[int], nbest: int
    ) -> list[tuple[Recognized, list[int]]]:
        """Best token at every position, special ids dropped, and the positions that were kept."""
        if log_probs.shape[1] == 0:
            return [(Recognized((), ()), []) for _ in counts]
        best, ids = log_probs.max(-1)
        rows = []
        for row, (count, item_ids, sure) in enumerate(
            zip(counts, ids.tolist(), best.exp().tolist(), strict=True)
        ):
            kept = [u for u in range(min(count, len(item_ids))) if item_ids[u] > EOS]
            hypotheses: tuple[Hypothesis, ...] = ()
            if nbest > 1:
                hypotheses = self._hypotheses(
                    (tuple(i for i in sequence if i > EOS), score)
                    for sequence, score in best_sequences(log_probs[row, :count], nbest)
                )
            tokens = tuple(item_ids[u] for u in kept)
            rows.append((Recognized(tokens, tuple(sure[u] for u in kept), nbest=hypotheses), kept))
        return rows

    def _paraformer_times(
        self,
        encoded: Tensor,
        lengths: Tensor,
        cif: CifOutput,
        rows: list[tuple[Recognized, list[int]]],
        durations: list[float],
    ) -> list[Times]:
        """Token times from the time stamp head, the CTC head or the CIF weights, the first the model has."""
        head = self.network.times(encoded, lengths, cif.token_num)
        if head is None and has_ctc(self.network):
            # The best CTC path of the recognised tokens.
            log_probs = self.network.ctc_logits(encoded).float().log_softmax(-1)
            return self._align(log_probs, lengths, [item.ids for item, _ in rows], durations)
        source = cif if head is None else head
        ratio = 1 if head is None else head.alphas.shape[1] // encoded.shape[1]
        alphas, peaks = source.alphas.float().cpu(), source.peaks.float().cpu()
        sizes = (lengths * ratio).tolist()
        times: list[Times] = []
        for row, (_, kept) in enumerate(rows):
            if not kept:
                times.append(((), ()))
                continue
            # The end-of-sentence token has a fire of its own, the last one.
            tokens = max(int(cif.token_lengths[row]) - 1, kept[-1] + 1)
            weights = alphas[row, : sizes[row]], peaks[row, : sizes[row]]
            starts, ends = token_times(*weights, tokens, self.frame_seconds / ratio)
            times.append(tidy([starts[u] for u in kept], [ends[u] for u in kept], durations[row]))
        return times

    def _align(
        self,
        log_probs: Tensor,
        lengths: Tensor,
        ids: list[tuple[int, ...]],
        durations: list[float],
    ) -> list[Times]:
        """Token borders around a forced alignment's spikes; spread evenly where tokens outnumber frames."""
        frames = lengths.tolist()
        needed = [len(row) + sum(a == b for a, b in pairwise(row)) for row in ids]
        fits = [need <= have for need, have in zip(needed, frames, strict=True)]
        targets = [
            torch.tensor(row if fit else (), dtype=torch.int64) for row, fit in zip(ids, fits, strict=True)
        ]
        padded = pad_sequence(targets, batch_first=True)
        sizes = torch.tensor([len(t) for t in targets])
        if padded.shape[1] == 0:
            spans = [[] for _ in ids]
        else:
            spans = token_spans(forced_align(log_probs, lengths, padded, sizes, BLANK))
        times = []
        for row, fit, item, duration in zip(ids, fits, spans, durations, strict=True):
            if fit:
                peaks = [(span.start + span.end) / 2 for span in item]
                borders = token_borders(peaks, duration, self.frame_seconds)
            else:
                step = duration / len(row)
                borders = [(i * step, (i + 1) * step) for i in range(len(row))]
            times.append(tidy([a for a, _ in borders], [b for _, b in borders], duration))
        return times

    def _ctc(
        self,
        feats: Tensor,
        lengths: Tensor,
        durations: list[float],
        decoder: str,
        decoding: DecodingConfig,
        bias: Bias | None,
        times: bool,
    ) -> list[Recognized]:
        if isinstance(self.network, SenseVoice):
            out = self.network(feats, lengths, decoding.language, decoding.textnorm)
            tags = self._tags(out.log_probs[:, :PROMPT_FRAMES])
            log_probs, lengths = out.log_probs[:, PROMPT_FRAMES:], out.lengths - PROMPT_FRAMES
            found = self._search(log_probs, lengths, durations, decoder, decoding, bias, times)
            return [replace(item, tags=row) for item, row in zip(found, tags, strict=True)]
        out = self.network(feats, lengths)
        rescore = None
        if decoder == "attention_rescoring":

            def rescore(rows: Tensor, tokens: Tensor, token_lengths: Tensor) -> tuple[Tensor, Tensor | None]:
                return self.network.decode_tokens(
                    out.encoder_out[rows], out.lengths[rows], tokens, token_lengths
                )

        return self._search(out.log_probs, out.lengths, durations, decoder, decoding, bias, times, rescore)

    def _tags(self, log_probs: Tensor) -> list[tuple[str, ...]]:
        """SenseVoice's answers in its prompt frames: language, emotion, event, text normalisation."""
        rows = log_probs.argmax(-1).tolist()
        return [tuple(tag for p in self.tokenizer.pieces(row) for tag in split_tags(p)[1]) for row in rows]

    def _search(
        self,
        log_probs: Tensor,
        lengths: Tensor,
        durations: list[float],
        decoder: str,
        decoding: DecodingConfig,
        bias: Bias | None,
        times: bool,
        rescore: Any = None,
    ) -> list[Recognized]:
        self._refuse_nan(log_probs, lengths)
        blank = getattr(self.network.config, "blank", BLANK)
        if decoder == "ctc_greedy":
            lists = [[hypothesis] for hypothesis in greedy(log_probs, lengths, blank)]
        else:
            lm = self.language_model(decoding)
            prior = None if lm is None else self.prior(decoding)
            if prior is not None:
                log_probs = divide_by_prior(log_probs, prior, decoding.prior_weight)
            lists = prefix_beam(
                log_probs,
                lengths,
                max(decoding.beam, decoding.nbest),
                blank=blank,
                candidates=None if lm is None else max(decoding.beam, LM_CANDIDATES),
                context=bias.graph if bias else None,
                lm=lm,
                lm_weight=1.0,  # the scorer has its weights inside
                blank_skip=decoding.blank_skip,
                floor=None if lm is None else LM_FLOOR,
                recombine=lm is not None and decoding.nbest == 1,
            )
        best = [hypotheses[0] for hypotheses in lists]
        if rescore is not None:
            config = self.network.config
            eos = config.eos if config.eos >= 0 else config.vocab_size - 1
            weights = (decoding.ctc_weight, decoding.reverse_weight)
            best = [h for h, _ in attention_rescore(lists, rescore, eos, *weights, device=self.device)]
        found = []
        for item, others, duration in zip(best, lists, durations, strict=True):
            spans = ((), ())
            if times and item.tokens:
                borders = token_borders(item.times, duration, self.frame_seconds)
                spans = tidy([a for a, _ in borders], [b for _, b in borders], duration)
            nbest: tuple[Hypothesis, ...] = ()
            if decoding.nbest > 1:
                others = [item, *(o for o in others if o.tokens != item.tokens)][: decoding.nbest]
                nbest = self._hypotheses((o.tokens, o.score) for o in others)
            found.append(Recognized(item.tokens, item.confidences, *spans, nbest))
        return found

    def _refuse_nan(self, values: Tensor, lengths: Tensor) -> None:
        """A row of softmax or norm outputs (B, T, V) is NaN everywhere or nowhere: one column tells."""
        if values.shape[1] == 0:
            return
        valid = torch.arange(values.shape[1], device=values.device) < lengths.to(values.device)[:, None]
        if bool((torch.isnan(values[:, :, 0]) & valid).any()):
            raise NarSpeechError(
                f"the network gave NaN in {self.dtype}; use float32, and check the model with"
                " 'nar-speech models verify'"
            )

    def _hypotheses(self, sequences: Any) -> tuple[Hypothesis, ...]:
        """Texts and scores; of equal texts the first stays."""
        texts: dict[str, float] = {}
        for ids, score in sequences:
            texts.setdefault(self.tokenizer.decode(ids), score)
        return tuple(Hypothesis(text, score) for text, score in texts.items())


def tidy(starts: Sequence[float], ends: Sequence[float], duration: float) -> Times:
    """Times inside [0, duration], in order, no token longer than up to the next one's start."""
    first = np.maximum.accumulate(np.clip(starts, 0.0, duration)) if len(starts) else np.zeros(0)
    last = np.minimum(np.clip(ends, 0.0, duration), np.append(first[1:], duration)) if len(starts) else first
    return tuple(first.tolist()), tuple(np.maximum(last, first).tolist())


def language_of(tags: Sequence[str]) -> str | None:
    """The language among SenseVoice's tags."""
    return next((tag for tag in tags if tag in LANGUAGES and tag not in ("auto", "nospeech")), None)
