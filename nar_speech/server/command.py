"""``nar-speech serve`` on the command line. Imported for ``--help`` too, so nothing heavy comes in here."""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any

from nar_speech.errors import ConfigError, MissingExtraError
from nar_speech.server.auth import KEYS_VARIABLE, Limits
from nar_speech.server.settings import ModelSpec, Settings, check_chunks

NEEDED = ("fastapi", "uvicorn", "websockets", "multipart", "prometheus_client")
MIB = 1 << 20
# Options that are called as the field of Settings.
# fmt: off
SAME_NAME = (
    "host", "port", "funasr_port", "wyoming_port", "device", "dtype", "max_streams", "max_uploads",
    "waiting_uploads", "max_upload_seconds", "max_stream_seconds", "idle_seconds", "stall_seconds",
    "drain_seconds", "api_keys", "open_ports", "ssl_certfile", "ssl_keyfile", "log_format", "log_level",
    "log_text", "chunk_size", "left",
)
# fmt: on


def describe_serve(parser: argparse.ArgumentParser) -> None:
    """The options of ``serve``."""
    default = Settings()
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        action="append",
        metavar="[ID=]NAME[+NAME]",
        help="name, folder or hub id; an offline and a streaming model joined by + are one (repeatable;"
        " default: the embedded models)",
    )
    models.add_argument(
        "--alias", action="append", default=[], metavar="NAME=ID", help="another name of a model (repeatable)"
    )
    models.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    models.add_argument(
        "--dtype", default="float32", choices=("auto", "float32", "fp32", "bfloat16", "bf16", "int8")
    )
    models.add_argument("--threads", type=int, metavar="N", help="CPU threads of PyTorch")
    describe_chunks(models)

    ports = parser.add_argument_group("ports")
    ports.add_argument("--host", default=default.host, help="(default: %(default)s; 0.0.0.0: all)")
    ports.add_argument("--port", type=int, default=default.port, help="of everything else (%(default)s)")
    ports.add_argument("--funasr-port", type=int, metavar="PORT", help="FunASR's WebSocket (usually 10095)")
    ports.add_argument("--wyoming-port", type=int, metavar="PORT", help="Home Assistant (usually 10300)")

    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-keys",
        metavar="FILE",
        help=f"a key a line: KEY [name=] [streams=] [requests=] [minutes=]; also ${KEYS_VARIABLE}=A,B",
    )
    access.add_argument("--limit-streams", type=int, metavar="N", help="of each key: live streams at once")
    access.add_argument("--limit-requests", type=float, metavar="N", help="of each key: requests a minute")
    access.add_argument("--limit-minutes", type=float, metavar="N", help="of each key: minutes a day")
    access.add_argument(
        "--open-ports", action="store_true", help="FunASR's and Wyoming's ports ask for no key"
    )
    access.add_argument("--ssl-certfile", metavar="FILE")
    access.add_argument("--ssl-keyfile", metavar="FILE")
    access.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web pages that may use it",
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-streams", type=int, default=default.max_streams, metavar="N", help="(%(default)s)"
    )
    limits.add_argument(
        "--max-uploads",
        type=int,
        default=default.max_uploads,
        metavar="N",
        help="files at once (%(default)s)",
    )
    limits.add_argument(
        "--waiting-uploads", type=int, default=default.waiting_uploads, metavar="N", help="(%(default)s)"
    )
    limits.add_argument(
        "--max-upload-mb",
        type=float,
        default=default.max_upload_bytes / MIB,
        metavar="N",
        help="(%(default)g)",
    )
    for name, text in (
        ("max-upload-seconds", "audio of one file"),
        ("max-stream-seconds", "audio of one live stream"),
        ("idle-seconds", "a stream without audio is closed"),
        ("stall-seconds", "a client that takes no data is cut off"),
        ("drain-seconds", "for open streams after SIGTERM"),
    ):
        value = getattr(default, name.replace("-", "_"))
        limits.add_argument(f"--{name}", type=float, default=value, metavar="S", help=f"{text} (%(default)g)")

    logs = parser.add_argument_group("logs and page")
    logs.add_argument("--log-format", choices=("json", "plain"), default="json", help="(%(default)s)")
    logs.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    logs.add_argument("--log-text", action="store_true", help="write recognised text into the log")
    logs.add_argument("--no-page", action="store_true", help="without the page for the browser at /")


def describe_chunks(group: argparse._ActionsContainer) -> None:
    """How streaming CTC models are fed; the same for all commands."""
    group.add_argument(
        "--chunk-size",
        type=int,
        metavar="N",
        help="of streaming CTC models: encoder frames of a chunk (default: as model.yaml says)",
    )
    group.add_argument("--left", type=int, metavar="N", help="frames before a chunk that it sees")


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings that the options name.

    Raises:
        ConfigError: a wrong value.
    """
    fields: dict[str, Any] = {name: getattr(options, name) for name in SAME_NAME}
    if options.model:
        fields["models"] = tuple(map(ModelSpec.parse, options.model))
    aliases = {}
    for alias in options.alias:
        name, equals, target = alias.partition("=")
        if not (name and equals and target):
            raise ConfigError(f"--alias {alias}: must be NAME=ID")
        aliases[name] = target
    limits = Limits(options.limit_streams, options.limit_requests, options.limit_minutes)
    for name, value in vars(limits).items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--limit-{name} {value:g}: must be above 0")
    return Settings(
        **fields,
        aliases=aliases,
        limits=limits,
        cors_origins=tuple(options.cors_origin),
        max_upload_bytes=round(options.max_upload_mb * MIB),
        page=not options.no_page,
    )


def serve(options: argparse.Namespace) -> int:
    """Serve transcription: OpenAI HTTP and Realtime, FunASR, Wyoming, raw WebSocket.

    Runs until SIGTERM or SIGINT, then lets open streams finish. See docs/serving.md.
    """
    settings = settings_of(options)
    need_extra("the server")
    import torch

    from nar_speech.server.logs import set_up
    from nar_speech.server.run import run

    if options.threads:
        torch.set_num_threads(options.threads)
    set_up(settings.log_format, "debug" if options.verbose else settings.log_level)
    run(settings)
    return 0


def need_extra(purpose: str) -> None:
    """Fail with one clear line where a package of the extra ``serve`` is missing.

    Raises:
        MissingExtraError: which.
    """
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "serve", purpose)


def describe_bench(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    streams = what.add_parser("streams", help="many live streams at once")
    streams.add_argument("--n", default="8", metavar="N[,N]", help="streams at once; several: one run each")
    streams.add_argument("--model", default="default", help="a streaming model (default: %(default)s)")
    streams.add_argument("--url", help="of a running server; default: an engine in this process")
    streams.add_argument("--key", help="API key of that server")
    streams.add_argument(
        "--audio", metavar="FILE", help="manifest as of 'evaluate', or one recording (default: our sample)"
    )
    streams.add_argument(
        "--find-capacity",
        action="store_true",
        help="paced: the most streams that hold with a p95 chunk latency of at most --budget-ms, from --n on",
    )
    streams.add_argument("--budget-ms", type=float, default=50.0, metavar="MS", help="(%(default)g)")
    streams.add_argument("--most", type=int, default=1024, metavar="N", help="to try (%(default)s)")
    streams.add_argument("--paced", action="store_true", help="like microphones; else as fast as it goes")
    streams.add_argument("--seconds", type=float, default=30.0, metavar="S", help="of each run (%(default)g)")
    streams.add_argument("--packet", type=float, default=0.1, metavar="S", help="audio at once (%(default)g)")
    streams.add_argument("--device", default="auto")
    streams.add_argument("--dtype", default="float32")
    streams.add_argument("--threads", type=int, metavar="N", help="CPU threads of PyTorch")
    describe_chunks(streams)
    streams.add_argument("--normalize", default="en", choices=("en", "zh", "none"), help="(%(default)s)")
    streams.add_argument("--json", action="store_true", help="all numbers as JSON on stdout")


def bench(options: argparse.Namespace) -> int:
    """Run the load and print a table, or JSON; exit code 1 if a stream failed."""
    try:
        counts = [int(n) for n in options.n.split(",")]
    except ValueError:
        counts = [0]
    positive = {"--n": min(counts), "--seconds": options.seconds, "--packet": options.packet}
    positive |= {"--budget-ms": options.budget_ms, "--most": options.most}
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name}: must be above 0")
    if options.find_capacity and len(counts) > 1:
        raise ConfigError("--n: --find-capacity begins with one number of streams")
    check_chunks(options.chunk_size, options.left)
    if options.url is not None and (options.chunk_size, options.left) != (None, None):
        raise ConfigError("--chunk-size, --left: a running server has its own; leave them out with --url")
    need_extra("the load tool")
    import torch

    from nar_speech.server import bench as tool

    if options.threads:
        torch.set_num_threads(options.threads)
    common = (options.seconds, options.paced or options.find_capacity)
    if options.url is not None:
        from nar_speech.server.bench_socket import RATE, Target, bench_server

        target = Target(options.url, options.model, options.key)
        corpus = tool.read_corpus(options.audio, RATE)

        def run(n: int) -> tool.Report:
            return bench_server(target, corpus, n, *common, options.packet, options.normalize)
    else:
        from nar_speech.server.models import load_stream_model

        chunks = (options.chunk_size, options.left)
        key, model, settings = load_stream_model(options.model, options.device, options.dtype, *chunks)
        corpus = tool.read_corpus(options.audio, model.sample_rate)

        def run(n: int) -> tool.Report:
            own = {key: model}
            return tool.bench_engine(
                own, key, corpus, n, *common, settings, None, options.packet, options.normalize
            )

    budget = options.budget_ms / 1000
    if options.find_capacity:
        reports = tool.find_capacity(run, counts[0], options.most, budget)
    else:
        reports = [run(n) for n in counts]
    if options.json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    else:
        for line in tool.lines(reports):
            print(line)
        if options.find_capacity:
            print(f"capacity: {tool.capacity(reports, budget)} streams, p95 at most {options.budget_ms:g} ms")
    return 1 if any(report.failed for report in reports) else 0
