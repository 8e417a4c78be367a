"""The form of ``/v1/audio/transcriptions``: read with limits, checked field by field."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from nar_speech.server.api_error import ApiError, bad_request
from nar_speech.server.formats import RESPONSE_FORMATS, language_code

RECEIVE_SECONDS = 60.0  # a client that sends nothing for so long has given up
MAX_FIELDS, MAX_FIELD_BYTES = 1000, 1 << 20
MAX_HOTWORDS, MAX_HOTWORD = 500, 100
_SPLIT = re.compile(r"[,;\n，；、]")


@dataclass(frozen=True)
class TranscriptionForm:
    """What the client asked for, besides the file. ``hotwords`` are wanted, ``hints`` are welcome."""

    model: str
    response_format: str = "json"
    language: str | None = None
    hotwords: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    temperature: float = 0.0
    stream: bool = False
    granularities: tuple[str, ...] = ()
    logprobs: bool = False
    verify: bool | None = None


async def read_form(request: Request, limit: int) -> FormData:
    """The form of a request; its file lies on disk when it is large. Close it when done.

    Raises:
        ApiError: 413 larger than ``limit`` bytes, 408 too slow, 415 not multipart, 400 malformed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(
            415, f"the body must be multipart/form-data, not '{kind or 'nothing'}'", "unsupported_media_type"
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large(limit)
    taken = 0

    async def receive() -> Any:
        nonlocal taken
        try:
            message = await asyncio.wait_for(request.receive(), RECEIVE_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, "the upload stopped half-way; send it again", "upload_timeout") from None
        taken += len(message.get("body", b""))
        if taken > limit:
            raise too_large(limit)
        return message

    try:
        counted = Request(request.scope, receive)
        # Starlette's parser keeps what it has read of the file in a spooled temporary file.
        return await counted.form(max_files=8, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except ClientDisconnect:
        raise
    except ApiError:
        raise
    except (MultiPartException, ValueError, KeyError) as error:
        raise bad_request(f"the multipart body can't be read: {error or 'it is malformed'}") from error
    except Exception as error:
        detail = getattr(error, "detail", None)  # Starlette turns its own errors into HTTPException
        if detail is None:
            raise
        raise bad_request(f"the multipart body can't be read: {detail}") from error


def too_large(limit: int) -> ApiError:
    """413."""
    size = f"{limit / (1 << 20):.3g} MiB"
    return ApiError(413, f"the upload is larger than {size}; send a shorter or compressed file", "too_large")


def the_file(form: FormData) -> UploadFile:
    """The one file of a form.

    Raises:
        ApiError: 400, none, several, or an empty one.
    """
    files = [value for name, value in form.multi_items() if name == "file"]
    if len(files) != 1:
        message = "file: missing; send the recording as multipart field 'file'"
        raise bad_request(message if not files else "file: given several times; send one", "file")
    if not isinstance(files[0], UploadFile):
        raise bad_request("file: is a plain field; send it as a file part, with a filename", "file")
    if not files[0].size:
        raise bad_request("file: is empty (0 bytes)", "file")
    return files[0]


def parse_form(form: FormData) -> TranscriptionForm:
    """The plain fields. Names may carry ``[]``, as the Python client sends lists; unknown ones are ignored.

    Raises:
        ApiError: 400, a field that is missing or has a value that is not allowed.
    """
    fields: dict[str, list[str]] = {}
    for name, value in form.multi_items():
        if isinstance(value, str):
            fields.setdefault(name.removesuffix("[]"), []).append(value)

    def one(name: str, default: str = "") -> str:
        return fields.get(name, [default])[-1].strip()

    style = one("response_format") or "json"
    if style not in RESPONSE_FORMATS:
        raise bad_request(
            f"response_format: '{style}' is not offered; use {', '.join(RESPONSE_FORMATS)}", "response_format"
        )
    granularities = tuple(_parts(fields.get("timestamp_granularities", ())))
    if wrong := [g for g in granularities if g not in ("word", "segment")]:
        raise bad_request(
            f"timestamp_granularities: '{wrong[0]}' is not one of word, segment", "timestamp_granularities"
        )
    language = one("language") or (_parts(fields.get("languages", ())) or [""])[0]
    return TranscriptionForm(
        one("model") or "default",
        style,
        language_code(language) or None,
        hotwords([*fields.get("keywords", ()), *fields.get("hotwords", ())]),
        words_of_prompt(one("prompt")),
        _temperature(one("temperature")),
        _flag("stream", one("stream")),
        granularities,
        "logprobs" in _parts(fields.get("include", ())),
        _flag("verify", one("verify")) if one("verify") else None,
    )


def hotwords(texts: Sequence[str], param: str = "keywords") -> tuple[str, ...]:
    """Words to favour, of lists that are joined by commas or lines.

    Raises:
        ApiError: 400, too many, or one that is too long.
    """
    found = tuple(dict.fromkeys(word for text in texts for word in _parts([text])))
    if len(found) > MAX_HOTWORDS or any(len(word) > MAX_HOTWORD for word in found):
        message = f"{param}: at most {MAX_HOTWORDS} words of up to {MAX_HOTWORD} characters"
        raise bad_request(message, param)
    return found


def words_of_prompt(prompt: str) -> tuple[str, ...]:
    """The words of a prompt that is a list of names and terms, as people write it; () of running text.

    Favouring each word of a sentence would harm, so only lists of short parts count.
    """
    parts = _parts([prompt.strip().rstrip(".")])
    short = all(
        len(part.split()) <= 3 and len(part) <= 40 and not part.endswith((".", "?", "!")) for part in parts
    )
    return tuple(dict.fromkeys(parts))[:MAX_HOTWORDS] if len(parts) > 1 and short else ()


def _parts(texts: Sequence[str]) -> list[str]:
    whole = (text.encode(errors="replace").decode() for text in texts)  # no tokenizer takes half characters
    return [part.strip() for text in whole for part in _SPLIT.split(text) if part.strip()]


def _flag(name: str, text: str) -> bool:
    if text.lower() in ("", "false", "0", "no"):
        return False
    if text.lower() in ("true", "1", "yes"):
        return True
    raise bad_request(f"{name}: got '{text[:40]}'; must be true or false", name)


def _temperature(text: str) -> float:
    try:
        value = float(text or 0)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 2:
        raise bad_request(f"temperature: got '{text[:40]}'; must be a number from 0 to 1", "temperature")
    return value
