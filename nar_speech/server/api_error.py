"""Errors as every protocol tells them: an OpenAI body over HTTP, an event or a close code on a WebSocket."""

from __future__ import annotations

from typing import Any

from nar_speech.errors import AudioError, InputError, MissingExtraError

# Close codes of the WebSocket protocol that clients know what to do about.
NORMAL, BAD_DATA, POLICY, TOO_BIG = 1000, 1007, 1008, 1009
BROKEN, RESTART, TRY_LATER = 1011, 1012, 1013
_TYPES = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of the HTTP answer.
        code: short name for programs.
        param: the field at fault.
        retry_after: seconds after which it may work.
        close: code with which a WebSocket is closed; default: as ``status`` suggests.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        close: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after
        self.close = close or {413: TOO_BIG, 429: TRY_LATER, 500: BROKEN, 503: TRY_LATER}.get(status, POLICY)

    @property
    def type(self) -> str:
        """OpenAI's name of the kind of error."""
        return _TYPES.get(self.status, "server_error")

    def body(self) -> dict[str, Any]:
        """The inside of OpenAI's ``error``."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def headers(self) -> dict[str, str]:
        """Of the HTTP answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(int(-(-self.retry_after // 1)), 1))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, code, param)


def told(error: BaseException) -> ApiError:
    """What a client is told of any exception: the words of our own errors, nothing of others."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AudioError):
        return ApiError(400, str(error), "invalid_audio", "file")
    if isinstance(error, InputError):
        field = str(error).partition(":")[0].partition(" ")[0][:40]  # of "hotword 'x': ..." the first word
        return ApiError(400, str(error), "invalid_value", {"hotword": "hotwords"}.get(field, field) or None)
    if isinstance(error, MissingExtraError):
        return ApiError(400, "this container needs PyAV, which this server lacks; send wav, flac, ogg or mp3")
    return ApiError(500, "the server failed; its log has the reason", "internal_error")
