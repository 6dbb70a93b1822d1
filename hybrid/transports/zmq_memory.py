"""Makes glibc keep freed memory, so that received frames land in memory that is already there.

libzmq allocates each received frame anew. By default glibc gives freed memory of that size back to the kernel and
asks for it again, and the page faults cost as much as the transfer itself: of 1 GB received, 70,000 to 150,000 pages
were faulted in again, and the CPU time of both ends fell by a third to a half without (`docs/transports.md`).
Process-wide. May import only the standard library.
"""

from __future__ import annotations

import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 256 << 20
"""Free memory at the top of a heap that is not given back."""
_HEAP_BLOCK_BYTES = 32 << 20
"""Blocks up to this come from the heap, not from the kernel; glibc's own maximum, which it reaches by itself too."""


@cache
def keep_freed_memory() -> bool:
    """Ask the allocator once per process; return whether it is glibc and has agreed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))
