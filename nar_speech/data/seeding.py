"""Seeds that depend only on what they are for, so that a resumed run draws the same numbers."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the values that identify a draw, for example ``(seed, epoch, item id)``.

    The same parts give the same seed in every process and on every machine (unlike ``hash``).
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little") >> 1
