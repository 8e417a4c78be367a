"""What the scripts share: the helpers of mini_en and its list of reserved recordings."""

import sys
from pathlib import Path

# At the end of the path: the names of this folder come first.
MINI_EN = Path(__file__).resolve().parents[2] / "mini_en" / "local"
if str(MINI_EN) not in sys.path:
    sys.path.append(str(MINI_EN))

from common import RATE, hours, notice, read_16k, read_jsonl, share, write_jsonl  # noqa: E402

__all__ = ["RATE", "fail", "hours", "notice", "read_16k", "read_jsonl", "share", "write_jsonl"]


def fail(message: str) -> None:
    """End the script with one line and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
