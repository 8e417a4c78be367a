"""The web application: every HTTP route and WebSocket, health, metrics and the page."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import WebSocketRoute

from nar_speech.server import funasr, openai_http, raw_stream, realtime
from nar_speech.server.api_error import ApiError, told
from nar_speech.server.formats import json_text
from nar_speech.server.logs import logger
from nar_speech.server.metrics import CONTENT_TYPE
from nar_speech.server.service import Service

PAGE = Path(__file__).parent / "page" / "index.html"
# The page runs its own inline script and talks to this server only.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' blob:; worker-src blob:;"
    " style-src 'unsafe-inline'; connect-src 'self' ws: wss:; frame-ancestors 'none'; base-uri 'none';"
    " form-action 'none'"
)


def build_app(service: Service) -> FastAPI:
    """The application on the main port."""
    app = FastAPI(
        title="nar-speech", docs_url=None, redoc_url=None, openapi_url=None, default_response_class=Json
    )
    app.state.service = service
    for module in (openai_http, realtime, raw_stream, funasr):
        app.include_router(module.router)
    _add_health(app, service)
    _add_errors(app)
    if service.settings.page:

        @app.get("/")
        async def page() -> Response:
            text = PAGE.read_text(encoding="utf-8")
            return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestId)
    return app


def build_funasr_app(service: Service) -> FastAPI:
    """The application on FunASR's own port: its clients connect to any path."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service

    async def any_path(websocket: WebSocket) -> None:
        await funasr.serve_funasr(websocket, service, service.settings.open_ports)

    app.router.routes.append(WebSocketRoute("/{path:path}", any_path))
    _add_errors(app)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the process is worth keeping."""
        health = service.engine.health()
        body = {"status": "ok" if health.alive else "failed", "reason": health.reason}
        return JSONResponse(body, 200 if health.alive else 503)

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether new clients should come here."""
        health = service.engine.health()
        ready = health.ready and not service.draining
        reason = "" if ready else "draining" if service.draining else health.reason
        body = {"status": "ready" if ready else "not ready", "reason": reason}
        body |= {"heartbeat_age": round(health.heartbeat_age, 3), "streams": len(service.streams)}
        return JSONResponse(body, 200 if ready else 503, None if ready else {"Retry-After": "5"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Numbers for Prometheus; a key is needed where keys are used."""
        service.identify(request)
        text = await asyncio.to_thread(service.metrics.render)
        return PlainTextResponse(text, headers={"Content-Type": CONTENT_TYPE})


def _add_errors(app: FastAPI) -> None:
    """Every error has the body of OpenAI's API."""

    def answer(error: ApiError) -> Response:
        return Json({"error": error.body()}, error.status, error.headers())

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        known = {404: "not_found", 405: "method_not_allowed"}
        where = f"{request.method} {request.url.path[:80]}: " if error.status_code in known else ""
        return answer(ApiError(error.status_code, f"{where}{error.detail}", known.get(error.status_code)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(ApiError(400, "the request is malformed"))

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        logger.error("request failed", exc_info=error, extra={"path": request.url.path[:80]})
        return answer(told(RuntimeError()))


class Json(JSONResponse):
    """JSON, whatever a client's words in it are."""

    def render(self, content: Any) -> bytes:
        """UTF-8."""
        return json_text(content).encode()


class RequestId:
    """Gives every answer the header ``X-Request-Id``, which OpenAI's clients report."""

    def __init__(self, app: Callable[..., Any]):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        name = b"req_" + uuid.uuid4().hex[:24].encode()

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name)]
            await send(message)

        return await self.app(scope, receive, named)
