"""CPU time of one step of the full-size streaming Paraformer, with random weights.

    python -m benchmarks.paraformer_step [--dtype int8] [--batch 1] [--chunk 0 10 5] [--official SOURCE]

Every step is a chunk of all streams of a batch (600 ms by default); times are those of the process, so other
work on the machine counts only through what it takes from memory and caches. ``--official``: a checkout of
modelscope/FunASR (and its packages), whose step of one stream is timed in turns with ours in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from nar_speech.layers.packed import pack_linear_layers
from nar_speech.layers.quantize import quantize_dynamic_int8
from nar_speech.layers.sanm import SANMDecoderConfig
from nar_speech.layers.sanm_stream import StreamConfig
from nar_speech.models.paraformer import Paraformer, ParaformerConfig, build_paraformer
from nar_speech.models.paraformer_stream import state_bytes

Step = Callable[[], int]  # one chunk; returns how many tokens the first stream gave


def build(dtype: str, chunk: tuple[int, int, int], bias: float) -> Paraformer:
    """Paraformer-large whose frames all have the CIF weight sigmoid(``bias``)."""
    torch.manual_seed(0)
    config = ParaformerConfig(decoder_conf=SANMDecoderConfig(shift=5), stream=StreamConfig(chunk=chunk))
    model = build_paraformer(config).eval().requires_grad_(False)
    model.predictor.cif_output.weight.zero_()
    model.predictor.cif_output.bias.fill_(bias)
    if dtype == "int8":
        return quantize_dynamic_int8(model)
    return pack_linear_layers(model.to(getattr(torch, dtype)))


def our_step(model: Paraformer, batch: int) -> Step:
    """A function that steps ``batch`` streams by a chunk of noise."""
    size, state = model.stream.chunk[1], model.init_state(batch)
    lengths, final = torch.full((batch,), size), torch.zeros(batch, dtype=torch.bool)

    def step() -> int:
        nonlocal state
        out, state = model.step(torch.randn(batch, size, 560), lengths, state, final)
        return int(out.token_lengths[0])

    return step


def official_step(source: str, chunk: tuple[int, int, int], bias: float) -> Step:
    """The same of the official code with its default packages."""
    sys.path.insert(0, source)
    import funasr.models.paraformer.cif_predictor
    import funasr.models.paraformer.decoder
    import funasr.models.scama.encoder  # noqa: F401
    from funasr.models.paraformer_streaming.model import ParaformerStreaming

    encoder: dict[str, Any] = {"output_size": 512, "num_blocks": 50, "input_layer": "pe_online"}
    encoder |= {"selfattention_layer_type": "sanm", "chunk_size": [15], "stride": [10], "pad_left": [0]}
    model = ParaformerStreaming(
        encoder="SANMEncoderChunkOpt",
        encoder_conf=encoder,
        decoder="ParaformerSANMDecoder",
        decoder_conf={"num_blocks": 16, "att_layer_num": 16, "kernel_size": 11, "sanm_shfit": 5},
        predictor="CifPredictorV2",
        predictor_conf={"idim": 512, "l_order": 1, "r_order": 1, "tail_threshold": 0.45},
        input_size=560,
        vocab_size=8404,
        ctc_weight=0.0,
        predictor_bias=1,
    )
    model.eval().requires_grad_(False)
    model.predictor.cif_output.weight.zero_()
    model.predictor.cif_output.bias.fill_(bias)
    cache: dict[str, Any] = {}
    sizes = {"encoder_conf": encoder, "frontend_conf": {"n_mels": 80, "lfr_m": 7}}
    look_back = {"encoder_chunk_look_back": 4, "decoder_chunk_look_back": 1}
    model.init_cache(cache, chunk_size=list(chunk), **look_back, **sizes)

    def step() -> int:
        lengths = torch.tensor([chunk[1]])
        encoded, lengths = model.encode_chunk(torch.randn(1, chunk[1], 560), lengths, cache=cache)
        embeds, counts, _, _ = model.calc_predictor_chunk(encoded, lengths, cache=cache, is_final=False)
        if int(counts.max()) > 0:
            model.cal_decoder_with_predictor_chunk(encoded, lengths, embeds, counts, cache=cache)
        return int(counts[0])

    return step


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, nargs=3, default=[0, 10, 5], metavar=("L", "C", "R"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bias", type=float, default=-1.0, help="-1: 2.7 tokens in 600 ms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--official", help="checkout of modelscope/FunASR to time as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chunk = tuple(options.chunk)
    model = build(options.dtype, chunk, options.bias)
    steps = {f"ours, {options.dtype}, batch {options.batch}": our_step(model, options.batch)}
    if options.official:
        steps["official, float32, batch 1"] = official_step(options.official, chunk, options.bias)
    times: dict[str, list[float]] = {name: [] for name in steps}
    tokens = dict.fromkeys(steps, 0)
    with torch.inference_mode():
        for number in range(options.steps + 3):
            for name, step in steps.items():
                start = time.process_time()
                tokens[name] += step()
                if number >= 3:
                    times[name].append(1000 * (time.process_time() - start))
    audio = 60 * chunk[1]
    kept = state_bytes(model.init_state(1)) / 1e6
    print(f"chunk {[*chunk]}: {audio} ms of audio, state {kept:.1f} MB a stream")
    for name, values in times.items():
        median, rate = statistics.median(values), tokens[name] / (options.steps + 3)
        print(f"{name}: median {median:.1f} ms, least {min(values):.1f} ms a step, {rate:.1f} tokens a step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
