"""What can be set about a server. Plain values; nothing heavy is imported, so ``--help`` stays quick."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from nar_speech.errors import ConfigError
from nar_speech.server.auth import Limits

_ID = re.compile(r"[A-Za-z0-9][\w.:-]*")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Names that clients of OpenAI send by default: they mean the first model of this server.
OPENAI_NAMES = (
    "whisper-1",
    "gpt-4o-transcribe",
    "gpt-4o-mini-transcribe",
    "gpt-transcribe",
    "gpt-realtime-whisper",
    "default",
)


@dataclass(frozen=True)
class ModelSpec:
    """One model of the server: ``id`` in the API, and the names of its offline and its streaming half.

    ``sources`` are names, folders or hub ids; which half each of them is, is seen when it is loaded.
    """

    id: str | None
    sources: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Of ``[ID=]NAME[+NAME]``, such as ``mini=default`` or ``zh=paraformer-zh+paraformer-zh-streaming``.

        Raises:
            ConfigError: it is not of this form.
        """
        name, equals, rest = text.partition("=")
        if not equals or Path(text).exists():
            name, rest = "", text
        parts = [rest] if Path(rest).exists() else rest.split("+")
        if (equals and rest != text and not _ID.fullmatch(name)) or not all(parts) or len(parts) > 2:
            raise ConfigError(f"--model {text}: must be NAME, ID=NAME or ID=OFFLINE+STREAMING")
        return cls(name or None, tuple(parts))


@dataclass(frozen=True)
class Settings:
    """A server. Times are seconds.

    Args:
        funasr_port, wyoming_port: of these protocols; None: not served on a port of their own.
        chunk_size, left: of streaming CTC models, see :func:`nar_speech.engine.asr.chunking_of`.
        max_streams: live streams at once; above, clients are refused with 503.
        max_uploads, waiting_uploads: files recognised at once, and files that wait; above, 503.
        max_upload_bytes, max_upload_seconds: of one file.
        max_stream_seconds: audio of one live stream.
        idle_seconds: a live stream without audio is closed after so long.
        stall_seconds: a client that takes no data for so long is cut off.
        max_message_bytes: of one WebSocket message.
        drain_seconds: that live streams and uploads may still use after SIGTERM.
        api_keys: file; with the variable NAR_SPEECH_API_KEYS. None and no variable: no key is asked for.
        open_ports: whether FunASR's and Wyoming's ports take clients without a key where keys are used.
        cors_origins: web pages that may use this server; ``*``: all.
        log_text: whether recognised text goes into the log.
        page: whether the page for the browser is served at ``/``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    funasr_port: int | None = None
    wyoming_port: int | None = None
    models: tuple[ModelSpec, ...] = (ModelSpec(None, ("default",)),)
    aliases: dict[str, str] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "float32"
    chunk_size: int | None = None
    left: int | None = None
    max_streams: int = 64
    max_uploads: int = 2
    waiting_uploads: int = 32
    max_upload_bytes: int = 256 << 20
    max_upload_seconds: float = 14_400.0
    max_stream_seconds: float = 14_400.0
    idle_seconds: float = 120.0
    stall_seconds: float = 20.0
    max_message_bytes: int = 4 << 20
    max_connections: int = 2048
    drain_seconds: float = 30.0
    api_keys: str | None = None
    limits: Limits = field(default_factory=Limits)
    open_ports: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    cors_origins: tuple[str, ...] = ()
    log_format: str = "json"
    log_level: str = "info"
    log_text: bool = False
    page: bool = True

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models: none; name at least one")
        ports = [p for p in (self.port, self.funasr_port, self.wyoming_port) if p]
        if len(set(ports)) != len(ports):
            raise ConfigError(f"ports {', '.join(map(str, ports))}: each protocol needs a port of its own")
        for name in ("port", "funasr_port", "wyoming_port"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 65_535:
                raise ConfigError(f"{name}: got {value}; must be 0 (any that is free) to 65535")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: got {getattr(self, name)}; must be above 0")
        check_chunks(self.chunk_size, self.left)
        for name in ("waiting_uploads", "drain_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: got {getattr(self, name)}; must not be negative")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile: give both, or none")
        for name in ("ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"--{name.replace('_', '-')} {path}: no such file")
        for alias in self.aliases:
            if not _ID.fullmatch(alias):
                raise ConfigError(f"--alias {alias}: letters, digits and . _ : - only")

    @property
    def public(self) -> bool:
        """Whether other machines can reach this one."""
        return self.host not in LOOPBACK


def check_chunks(chunk_size: int | None, left: int | None) -> None:
    """Whether chunks may have these sizes, in frames.

    Raises:
        ConfigError: they may not.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"--chunk-size {chunk_size}: must be at least 1")
    if left is not None and left < 0:
        raise ConfigError(f"--left {left}: must not be negative; a stream has room for a number of frames")


_POSITIVE = (
    "max_streams",
    "max_uploads",
    "max_upload_bytes",
    "max_upload_seconds",
    "max_stream_seconds",
    "idle_seconds",
    "stall_seconds",
    "max_message_bytes",
    "max_connections",
)
