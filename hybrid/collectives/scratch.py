"""Memory that is used again and again: the first touch of fresh memory costs several times what a copy does.

May import only torch.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_LEAST_BYTES = 4 << 10


class Scratch:
    """Buffers by powers of two; what is given back is handed out again. Any thread may call any method."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._taken: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Return a vector with whatever was in it before.

        Shapes:
            returns: (num_elements,)
        """
        size_bytes = num_elements * dtype.itemsize
        capacity = max(_LEAST_BYTES, 1 << max(size_bytes - 1, 0).bit_length())
        with self._lock:
            free = self._free.get(capacity)
            whole = free.pop() if free else _fresh(capacity)
            self._taken[whole.data_ptr()] = whole
        return whole[:size_bytes].view(dtype)

    def give_back(self, part: Tensor) -> None:
        """Let others have what `take` returned."""
        with self._lock:
            whole = self._taken.pop(part.untyped_storage().data_ptr())
            self._free.setdefault(whole.numel(), []).append(whole)


def _fresh(size_bytes: int) -> Tensor:
    # Never an inference tensor, whatever mode the calling thread is in: it would not be writable elsewhere.
    with torch.inference_mode(False):
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
