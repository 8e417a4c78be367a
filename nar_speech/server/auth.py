"""API keys, and short-lived secrets for browsers.

A key file has a line per key: ``KEY [name=NAME] [streams=N] [requests=N] [minutes=N]``. Of keys, only
digests are kept.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nar_speech.errors import ConfigError

KEYS_VARIABLE = "NAR_SPEECH_API_KEYS"
SHORTEST_KEY = 8
MAX_SECRETS = 10_000
SECRET_SECONDS = (10, 7200)  # shortest and longest life, as OpenAI's
DEFAULT_SECRET_SECONDS = 600
SUBPROTOCOL = "openai-insecure-api-key."


@dataclass(frozen=True)
class Limits:
    """What one key may use; None: without limit.

    Args:
        streams: live streams at once.
        requests: per minute; a live stream is one.
        minutes: of audio per day.
    """

    streams: int | None = None
    requests: float | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class Identity:
    """Who asks. ``session`` is what a short-lived secret was made for."""

    name: str
    limits: Limits = field(default_factory=Limits)
    session: dict[str, Any] | None = None


def read_keys(
    path: str | Path | None, default: Limits, environment: str | None = None
) -> dict[bytes, Identity]:
    """Digest of each key -> whose it is; of a file and of the variable NAR_SPEECH_API_KEYS (``a,b``).

    Raises:
        ConfigError: a file that can't be read, a key that is too short or there twice, a wrong field.
    """
    keys: dict[bytes, Identity] = {}
    lines: list[tuple[str, str]] = []
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--api-keys {path}: can't read this file; check path and permissions"
            ) from error
        lines += [(f"{path}:{n}", line) for n, line in enumerate(text.splitlines(), 1)]
    variable = os.environ.get(KEYS_VARIABLE, "") if environment is None else environment
    lines += [(f"{KEYS_VARIABLE}, key {n}", key) for n, key in enumerate(variable.split(","), 1)]
    for where, line in lines:
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        digest = _digest(words[0])
        if len(words[0]) < SHORTEST_KEY:
            raise ConfigError(f"{where}: a key needs at least {SHORTEST_KEY} characters")
        if digest in keys:
            raise ConfigError(f"{where}: this key is there twice; keep one line")
        keys[digest] = _identity(words[1:], default, f"key-{digest.hex()[:6]}", where)
    if path is not None and not keys:
        raise ConfigError(f"--api-keys {path}: holds no key; put one on a line")
    return keys


def _identity(words: Iterable[str], limits: Limits, name: str, where: str) -> Identity:
    for word in words:
        field_name, _, value = word.partition("=")
        if field_name == "name" and value:
            name = value
            continue
        try:
            number = int(value) if field_name == "streams" else float(value)
        except ValueError:
            number = -1
        if field_name not in ("streams", "requests", "minutes") or not 0 <= number < float("inf"):
            raise ConfigError(
                f"{where}: '{word}': must be name=, streams=, requests= or minutes= and a number"
            )
        limits = replace(limits, **{field_name: number})
    return Identity(name, limits)


class Keyring:
    """Checks keys in constant time and makes short-lived secrets.

    Args:
        keys: of :func:`read_keys`; none: everybody may come in, under the name ``anonymous``.
    """

    def __init__(
        self,
        keys: dict[bytes, Identity],
        anonymous: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.keys, self.clock = keys, clock
        self.anonymous = Identity("anonymous", anonymous or Limits())
        self._secrets: dict[bytes, tuple[float, Identity, str]] = {}  # the session as JSON: it is smaller

    def check(self, key: str | None) -> Identity | None:
        """Whose key it is; None: it is not known."""
        digest = _digest(key or "")
        found = None
        for known, identity in self.keys.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = identity
        if found is not None and key:
            return found
        if key and digest in self._secrets:
            expires, identity, session = self._secrets[digest]
            return replace(identity, session=json.loads(session)) if expires > self.clock() else None
        return self.anonymous if not self.keys else None

    def make_secret(self, identity: Identity, session: dict[str, Any], seconds: float) -> tuple[str, int]:
        """A secret that acts for ``identity`` for so long, and when it ends (Unix time)."""
        now = self.clock()
        if len(self._secrets) >= MAX_SECRETS:
            self._secrets = {d: s for d, s in self._secrets.items() if s[0] > now}
            while len(self._secrets) >= MAX_SECRETS:
                del self._secrets[next(iter(self._secrets))]  # the oldest
        value = f"ek_{secrets.token_urlsafe(24)}"
        self._secrets[_digest(value)] = (now + seconds, identity, json.dumps(session))
        return value, int(now + seconds)


def key_of(headers: Any, query: Any, subprotocols: Iterable[str] = ()) -> str | None:
    """The key in a request: ``Authorization: Bearer``, ``X-Api-Key``, ``?api_key=``, a subprotocol."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    for protocol in subprotocols:
        if protocol.startswith(SUBPROTOCOL):
            return protocol.removeprefix(SUBPROTOCOL)
    return headers.get("x-api-key") or query.get("api_key") or query.get("token") or None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
