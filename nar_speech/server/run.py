"""A running server: ports, signals, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from nar_speech.engine import Engine, EngineOptions
from nar_speech.errors import ConfigError
from nar_speech.server.app import build_app, build_funasr_app
from nar_speech.server.auth import Keyring, read_keys
from nar_speech.server.logs import logger
from nar_speech.server.models import load_models
from nar_speech.server.service import LAST_WORDS, Catalog, Service
from nar_speech.server.settings import Settings
from nar_speech.server.wyoming_server import WyomingServer

PING_SECONDS, PONG_SECONDS = 20.0, 60.0  # a pong may lie behind a minute of audio
SHUTDOWN_SECONDS = 3


class Protocol(WebSocketsSansIOProtocol):
    """WebSockets that can be cut: closing properly would wait for a client that does not read.

    It stops reading the socket while a message waits to be handled, which is what pushes back.
    """

    async def run_asgi(self) -> None:
        """Run the application; it finds ``abort`` in the scope's state."""
        self.scope["state"]["abort"] = self.transport.abort
        await super().run_asgi()

    def keepalive_timeout(self) -> None:
        """No pong came."""
        super().keepalive_timeout()
        self.transport.abort()


class _Uvicorn(uvicorn.Server):
    """Leaves signals to :class:`Server`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Server:
    """All ports of a service in one event loop.

    Attributes:
        ports: by ``http``, ``funasr``, ``wyoming``; what was asked for as 0 has its number here.
    """

    def __init__(self, service: Service):
        self.service = service
        self.ports: dict[str, int] = {}
        self._servers: list[tuple[_Uvicorn, asyncio.Task]] = []
        self._wyoming: WyomingServer | None = None
        self._watch: asyncio.Task | None = None

    async def start(self) -> None:
        """Open the ports.

        Raises:
            ConfigError: one is in use, or a certificate can't be read.
        """
        settings = self.service.settings
        await self._start_web("http", build_app(self.service), settings.port)
        if settings.funasr_port is not None:
            await self._start_web("funasr", build_funasr_app(self.service), settings.funasr_port)
        if settings.wyoming_port is not None:
            self._wyoming = WyomingServer(self.service)
            await self._wyoming.start(self._bind("wyoming", settings.wyoming_port))
        self._watch = asyncio.create_task(self.service.watch_peers())
        logger.info(
            "listening", extra={"host": settings.host, **self.ports, "tls": bool(settings.ssl_certfile)}
        )

    async def _start_web(self, name: str, app: Any, port: int) -> None:
        settings = self.service.settings
        config = uvicorn.Config(
            app,
            ws=Protocol,
            ws_max_size=settings.max_message_bytes,
            ws_ping_interval=PING_SECONDS,
            ws_ping_timeout=PONG_SECONDS,
            ws_per_message_deflate=False,
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
        )
        try:
            config.load()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--ssl-certfile {settings.ssl_certfile}: can't be used: {error}") from error
        server = _Uvicorn(config)
        task = asyncio.create_task(server.serve(sockets=[self._bind(name, port)]))
        self._servers.append((server, task))
        while not server.started:
            if task.done():
                task.result()
                raise ConfigError(f"port {port}: the server did not start")
            await asyncio.sleep(0.01)

    def _bind(self, name: str, port: int) -> socket.socket:
        host = self.service.settings.host
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(1024)
        except (OSError, OverflowError) as error:
            sock.close()
            raise ConfigError(f"{name}: can't listen on {host}:{port}: {error}; use another port") from error
        sock.setblocking(False)
        self.ports[name] = sock.getsockname()[1]
        return sock

    async def stop(self, drain: float | None = None, flush: float = LAST_WORDS) -> bool:
        """Drain, then close all ports; see :meth:`Service.drain`.

        Returns:
            whether everything ended by itself.
        """
        clean = await self.service.drain(drain, flush)
        if self._wyoming is not None:
            await self._wyoming.stop()
        for server, _ in self._servers:
            server.should_exit = True
        await asyncio.gather(*(task for _, task in self._servers), return_exceptions=True)
        if self._watch is not None:
            self._watch.cancel()
        self.service.close()
        return clean


async def serve_until_signal(service: Service, ready: Callable[[Server], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the draining."""
    server, loop = Server(service), asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    await server.start()
    if ready is not None:
        ready(server)
    await signals.get()
    stop = asyncio.create_task(server.stop())
    again = asyncio.create_task(signals.get())
    await asyncio.wait([stop, again], return_when=asyncio.FIRST_COMPLETED)
    if not stop.done():
        logger.warning("ending at once")
        stop.cancel()
        await asyncio.gather(stop, return_exceptions=True)
        await server.stop(0.0, 0.0)
    again.cancel()


def run(settings: Settings) -> None:
    """Load the models and serve until a signal comes.

    Raises:
        InputError: a model, key file, certificate or port that can't be used.
    """
    keys = read_keys(settings.api_keys, settings.limits)
    check_security(settings, bool(keys))
    entries, models = load_models(settings)
    catalog = Catalog(entries, settings.aliases)
    options = EngineOptions(
        max_sessions=settings.max_streams,
        idle=settings.idle_seconds,
        longest=settings.max_stream_seconds,
    )
    with Engine(models, options) as engine:
        keyring = Keyring(keys, settings.limits)

        async def main() -> None:
            await serve_until_signal(Service(settings, engine, catalog, keyring))

        run_loop(main())


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run in the faster event loop that comes with ``uvicorn[standard]``, where there is one."""
    try:
        from uvloop import run
    except ImportError:  # Windows
        from asyncio import run
    run(main)


def check_security(settings: Settings, keys: bool) -> None:
    """Refuse what would leave a door open that was meant to be closed, and warn of open ones.

    Raises:
        ConfigError: Wyoming, which knows no keys, on a server with keys.
    """
    if keys and settings.wyoming_port is not None and not settings.open_ports:
        raise ConfigError(
            "--wyoming-port: this protocol has no keys, so anybody could come in there; add --open-ports if"
            " only machines that you trust reach it"
        )
    if settings.public and not keys:
        logger.warning(
            "no API keys: every machine that reaches this port can use it; see --api-keys",
            extra={"host": settings.host},
        )
