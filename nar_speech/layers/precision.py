"""Where mixed precision must stop."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the device of ``x``, also on devices that have none (meta)."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
