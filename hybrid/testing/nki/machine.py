"""Machine: one core of one generation while a kernel is interpreted.

Holds the memory account, the reduction registers and the counters. Kernels reach it through `current()`, so the
stand-in modules carry no state of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import final

import numpy as np

from hybrid.testing.nki.dtypes import Array, dtype_of_host, storage_of
from hybrid.testing.nki.generations import Generation
from hybrid.testing.nki.memory import WRITTEN, ZEROED, MemoryAccount, MemoryRegion, Storage
from hybrid.testing.nki.refusal import refuse
from hybrid.testing.nki.tile import Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a kernel took. Peaks are bytes of one partition, of the physical capacity beside them."""

    generation: str
    peak_sbuf_bytes: int
    sbuf_bytes: int
    peak_psum_bytes: int
    psum_bytes: int
    dma_bytes: int
    instructions: dict[str, int]

    def __str__(self) -> str:
        return (
            f"{self.generation}: SBUF {self.peak_sbuf_bytes / 1024:.1f} of {self.sbuf_bytes // 1024} KiB, "
            f"PSUM {self.peak_psum_bytes / 1024:.1f} of {self.psum_bytes // 1024} KiB a partition, "
            f"DMA {self.dma_bytes / 1024:.0f} KiB, {sum(self.instructions.values())} instructions"
        )


@final
class Machine:
    """One core; see the module."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.launches: list[Usage] = []
        """What each launch so far took."""
        self.reset()

    def reset(self) -> None:
        """Forget peaks, counters and registers; tiles that still live keep their old account."""
        self.account = MemoryAccount(self.generation)
        self.instructions: Counter[str] = Counter()
        self.dma_bytes = 0
        self.scalar_registers: Array | None = None
        self.vector_registers: Array | None = None

    def usage(self) -> Usage:
        """Return peaks and counts since the last reset."""
        return Usage(
            generation=self.generation.name,
            peak_sbuf_bytes=self.account.peak_bytes[MemoryRegion.sbuf],
            sbuf_bytes=self.generation.sbuf_partition_bytes,
            peak_psum_bytes=self.account.peak_bytes[MemoryRegion.psum],
            psum_bytes=self.generation.psum_partition_bytes,
            dma_bytes=self.dma_bytes,
            instructions=dict(self.instructions),
        )

    def allocate(self, shape: tuple[int, ...], dtype: str, region: MemoryRegion, name: str = "") -> Tile:
        """Return a new tile of undefined content.

        Raises:
            NkiRefused: rules `buffer-not-string`, `empty-shape`, `tile-2d`, `partitions-128`, `dtype-not-nki`,
                `sbuf-capacity`, `psum-capacity`.
        """
        if not isinstance(region, MemoryRegion):
            refuse("buffer-not-string", "not a memory region of nki.language", value=region)
        shape = tuple(int(n) for n in shape)
        itemsize = storage_of(dtype).itemsize
        if not shape or min(shape) < 1:
            refuse("empty-shape", "a dimension is smaller than one", value=shape)
        if region.on_chip:
            if len(shape) < 2:
                refuse("tile-2d", "an on-chip tile of one dimension", value=shape)
            if shape[0] > self.generation.partitions:
                refuse("partitions-128", f"a tile of {shape[0]} partitions", value=shape)
        num_bytes = math.prod(shape) * itemsize
        partition_bytes = num_bytes // shape[0] if region.on_chip else num_bytes
        storage = Storage(num_bytes, region, partition_bytes, self.account)
        return Tile(storage, dtype, shape, _row_major(shape), 0, name)

    def zero_filled(self, shape: tuple[int, ...], dtype: str, region: MemoryRegion, name: str = "") -> Tile:
        """Return a tile of zeros; a matmul's first write overwrites it."""
        tile = self.allocate(shape, dtype, region, name)
        tile.storage.data[:] = 0
        tile.storage.state[:] = WRITTEN | ZEROED
        return tile

    def argument(self, array: Array) -> Tile:
        """Return a host array as a tile in HBM, holding a copy."""
        tile = self.allocate(array.shape, dtype_of_host(array.dtype), MemoryRegion.private_hbm)
        tile.array()[...] = array
        tile.storage.state[:] = WRITTEN
        return tile

    def count(self, instruction: str) -> None:
        """Count one instruction."""
        self.instructions[instruction] += 1


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


_CURRENT: ContextVar[Machine | None] = ContextVar("nki_machine", default=None)


def current() -> Machine:
    """Return the machine that interprets now.

    Raises:
        NkiRefused: rule `outside-interpreter`.
    """
    machine = _CURRENT.get()
    if machine is None:
        refuse("outside-interpreter", "an NKI call outside an interpreter")
    return machine


@contextmanager
def active(machine: Machine) -> Iterator[None]:
    """Make a machine the current one inside the context; contexts nest."""
    token = _CURRENT.set(machine)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def registers() -> Array:
    """Return a fresh set of reduction registers, one a partition."""
    return np.zeros((current().generation.partitions, 1), np.float32)
