"""Streaming recognisers of the same audio: Paraformer-online (ours and FunASR's), our engine, and a Whisper
that decodes the last seconds again and again.

Each is called with a :class:`~benchmarks.asr.embedded.Clip`, hears it from the first to the last chunk, and
tells what that took. Everything from samples to text counts.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.asr import timing
from benchmarks.asr.embedded import Clip, Rival
from benchmarks.asr.random_model import CIF_BIAS, Size, online_tree, write_lists
from nar_speech.audio import write_audio
from nar_speech.engine import Closed, Engine, EngineOptions, Failed, Final, SessionOptions
from nar_speech.engine.asr import SpeechModel
from nar_speech.errors import InputError, NarSpeechError
from nar_speech.features import Frontend, FrontendConfig, read_kaldi_cmvn
from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.quantize import quantize_dynamic_int8
from nar_speech.models.paraformer import Paraformer, build_paraformer
from nar_speech.models.paraformer_official import convert_config
from nar_speech.models.paraformer_stream import ParaformerStream
from nar_speech.pipelines.writers import join_texts
from nar_speech.text.tokenizer import CharTokenizer

CHUNK = (0, 10, 5)  # frames of 60 ms: 600 ms at a time, 300 ms late
ENCODER_LOOK_BACK, DECODER_LOOK_BACK = 4, 1
SECONDS_TO_END = 600.0


@dataclass(frozen=True)
class Work:
    """What one clip took: CPU and wall seconds of all streams together, their chunks or updates; its text."""

    cpu: float
    wall: float
    updates: int
    text: str


@dataclass
class RandomOnline:
    """Paraformer-online with random weights, the same for all who take it.

    All frames have the same CIF weight, so tokens come as evenly as in speech, 2.7 in 600 ms.
    """

    folder: Path
    size: Size
    tree: dict[str, Any] = field(init=False)
    network: Paraformer = field(init=False)

    def __post_init__(self) -> None:
        self.tree = online_tree(self.folder, self.size)
        self.pieces = write_lists(self.folder, self.size)
        torch.manual_seed(0)
        self.network = build_paraformer(convert_config(self.tree, 560, self.size.vocab))
        self.network.eval().requires_grad_(False)
        self.network.predictor.cif_output.weight.zero_()
        self.network.predictor.cif_output.bias.fill_(CIF_BIAS)
        self.network.stream = replace(
            self.network.stream,
            chunk=CHUNK,
            encoder_look_back=ENCODER_LOOK_BACK,
            decoder_look_back=DECODER_LOOK_BACK,
        )

    def ours(self, dtype: str) -> SpeechModel:
        """For an engine."""
        network = copy.deepcopy(self.network)
        if dtype == "int8":
            network = quantize_dynamic_int8(network)
        else:
            network = network.to(getattr(torch, dtype))
        conf = self.tree["frontend_conf"]
        config = FrontendConfig(window="hamming", lfr_m=conf["lfr_m"], lfr_n=conf["lfr_n"])
        frontend = Frontend(config, read_kaldi_cmvn(self.folder / "am.mvn")).eval()
        stream = ParaformerStream(pack_linear_layers(network), frontend, in_place=True)
        return SpeechModel(stream, CharTokenizer(self.pieces), f"random {dtype}")


class Alone:
    """One stream, step by step, without an engine."""

    def __init__(self, name: str, model: SpeechModel):
        self.name, self.model = name, model

    @torch.inference_mode()
    def __call__(self, clip: Clip) -> Work:
        """Hear it."""
        (text, updates), cpu, wall = timing.timed(lambda: self._hear(torch.from_numpy(clip.samples)))
        return Work(cpu, wall, updates, text)

    def _hear(self, samples: torch.Tensor) -> tuple[str, int]:
        chunks = samples.split(self.model.chunk)
        state, ids = self.model.init_state(1), []
        for number, chunk in enumerate(chunks, start=1):
            audio = F.pad(chunk, (0, self.model.chunk - len(chunk)))[None]
            final = torch.tensor([number == len(chunks)])
            out, state = self.model.step(audio, torch.tensor([len(chunk)]), final, state)
            ids += out.ids[0, : int(out.counts[0])].tolist()
        return self.model.tokenizer.decode(ids), len(chunks)


class Engined:
    """``streams`` streams of the same clip in an engine, all of them in one batch."""

    def __init__(self, name: str, model: Any, streams: int = 1, settings: dict[str, Any] | None = None):
        self.name, self.streams, self.settings = name, streams, settings or {}
        options = EngineOptions(
            max_sessions=streams,
            buckets=(streams,),
            exact_batches=False,  # there is one batch size
            fill_wait=1.0 if streams > 1 else 0.0,
            useful_batch=streams,
            threads=torch.get_num_threads(),
        )
        self.engine = Engine({"model": model}, options)
        self.engine.start()

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def __call__(self, clip: Clip) -> Work:
        """Hear it.

        Raises:
            NarSpeechError: a stream failed.
        """
        before = self.engine.stats().online["model"].chunks
        texts, cpu, wall = timing.timed(lambda: self._hear(clip))
        updates = self.engine.stats().online["model"].chunks - before
        if len(set(texts)) != 1:
            raise NarSpeechError(f"{self.name}: streams of the same clip differ: {sorted(set(texts))[:2]}")
        return Work(cpu, wall, updates, texts[0])

    def _hear(self, clip: Clip) -> list[str]:
        done = [threading.Event() for _ in range(self.streams)]
        texts: list[dict[int, str]] = [{} for _ in range(self.streams)]
        problems: list[str] = []

        def listener(number: int) -> Any:
            def on_event(event: Any) -> None:
                if isinstance(event, Final):
                    texts[number][event.segment] = event.text
                elif isinstance(event, Failed):
                    problems.append(event.message)
                elif isinstance(event, Closed):
                    done[number].set()

            return on_event

        options = SessionOptions(self.settings, backlog=clip.seconds + 1.0)
        sessions = [self.engine.open("model", options, listener(i)) for i in range(self.streams)]
        for session in sessions:
            session.feed(clip.samples)
            session.finish()
        for event in done:
            if not event.wait(SECONDS_TO_END):
                raise NarSpeechError(f"{self.name}: no end after {SECONDS_TO_END:.0f} s")
        if problems:
            raise NarSpeechError(f"{self.name}: {problems[0]}")
        return [join_texts(parts[key] for key in sorted(parts)) for parts in texts]


class Official:
    """FunASR's own streaming code, fed chunk by chunk as its users do, with the weights of ``random``."""

    name = "FunASR float32, 1 stream"

    def __init__(self, random: RandomOnline, source: Path | None):
        """``source``: a checkout of modelscope/FunASR; None: the installed package."""
        if source is not None:
            sys.path.insert(0, str(source))
        import funasr.models.paraformer.cif_predictor
        import funasr.models.paraformer.decoder
        import funasr.models.scama.encoder  # noqa: F401
        from funasr.frontends.wav_frontend import WavFrontendOnline
        from funasr.models.paraformer_streaming.model import ParaformerStreaming
        from funasr.tokenizer.char_tokenizer import CharTokenizer as OfficialTokenizer

        tree, size = random.tree, random.size
        self.model = ParaformerStreaming(
            **{key: tree[key] for key in ("encoder", "encoder_conf", "decoder", "decoder_conf")},
            **{key: tree[key] for key in ("predictor", "predictor_conf")},
            **tree["model_conf"],
            input_size=560,
            vocab_size=size.vocab,
        )
        self.model.load_state_dict(random.network.state_dict())
        self.model.eval().requires_grad_(False)
        self.frontend = WavFrontendOnline(**tree["frontend_conf"])
        self.tokenizer = OfficialTokenizer(**{**tree["tokenizer_conf"], "token_list": random.pieces})
        self.options = {
            "chunk_size": list(CHUNK),
            "encoder_chunk_look_back": ENCODER_LOOK_BACK,
            "decoder_chunk_look_back": DECODER_LOOK_BACK,
            "encoder_conf": tree["encoder_conf"],
            "frontend_conf": tree["frontend_conf"],
            "device": "cpu",
        }

    @torch.inference_mode()
    def __call__(self, clip: Clip) -> Work:
        """Hear it."""
        (text, updates), cpu, wall = timing.timed(lambda: self._hear(torch.from_numpy(clip.samples)))
        return Work(cpu, wall, updates, text)

    def _hear(self, samples: torch.Tensor) -> tuple[str, int]:
        chunks = samples.split(960 * CHUNK[1])
        cache: dict[str, Any] = {}
        texts = []
        for number, chunk in enumerate(chunks, start=1):
            results, _ = self.model.inference(
                [chunk],
                key=["clip"],
                tokenizer=self.tokenizer,
                frontend=self.frontend,
                cache=cache,
                is_final=number == len(chunks),
                **self.options,
            )
            texts.append(results[0]["text"])
        return "".join(texts), len(chunks)


class Redecoding:
    """A recogniser of whole clips that hears the last ``window`` seconds again at every update."""

    def __init__(self, rival: Rival, folder: Path, every: float, window: float = 3.0):
        """``folder``: for the windows. every: seconds between updates."""
        self.name = f"{rival.name}, last {window:g} s at each update"
        self.rival, self.folder, self.every, self.window = rival, folder, every, window

    def close(self) -> None:
        """End its process."""
        self.rival.close()

    def __call__(self, clip: Clip) -> Work:
        """Hear it; the last window's text stands for all."""
        cpu = wall = 0.0
        text = ""
        ends = update_ends(clip.seconds, self.every)
        for number, end in enumerate(ends):
            samples = clip.samples[round(max(end - self.window, 0.0) * 16000) : round(end * 16000)]
            path = self.folder / f"{Path(clip.path).stem}_{number}.wav"
            if not path.exists():
                write_audio(path, samples, 16000)
            text, one_cpu, one_wall = self.rival(replace(clip, path=str(path), samples=samples))
            cpu, wall = cpu + one_cpu, wall + one_wall
        return Work(cpu, wall, len(ends), text)


def update_ends(seconds: float, every: float) -> Sequence[float]:
    """Times at which a stream of so many seconds is updated: each ``every`` seconds, and at its end.

    Raises:
        InputError: ``every`` is not above 0.
    """
    if not every > 0:
        raise InputError(f"update interval: got {every}; must be above 0")
    ends = [number * every for number in range(1, int(seconds / every + 1e-9) + 1)]
    if not ends or seconds - ends[-1] > 1e-6:
        ends.append(seconds)
    return ends
