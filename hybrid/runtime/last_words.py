"""What a worker tells of the failure that ends it."""

from __future__ import annotations

import traceback

import torch

from hybrid.errors import CommError, HybridError
from hybrid.runtime.messages import Fault


def fault_of(rank: int, error: Exception) -> Fault:
    """Return the message that ends a rank: what went wrong, whose fault it is, and whether another rank caused it."""
    known = isinstance(error, HybridError)
    oom = isinstance(error, torch.OutOfMemoryError)
    return Fault(
        rank=rank,
        error="DeviceOutOfMemory" if oom else type(error).__name__,
        text=str(error)[:4000],
        traceback="".join(traceback.format_exception(error))[-20_000:],
        exit_code=error.exit_code if isinstance(error, HybridError) else 1,
        is_consequence=known and isinstance(error, CommError),
    )
