"""Storage of tiles, and the account of what is live in SBUF and PSUM.

A tile's bytes return to the account when the last view of them is gone. That must not wait for the cyclic collector, so
no object here (or in `tile.py`) refers to itself: Storage knows its account, the account knows no storage, a tile knows
its storage, and nothing knows a tile.

What the account proves: a kernel that exceeds it does not fit. A kernel that stays inside may still not fit, because
the compiler's allocation, alignment and double buffering are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from hybrid.testing.nki.dtypes import Array
from hybrid.testing.nki.generations import Generation
from hybrid.testing.nki.refusal import refuse

WRITTEN, MATMUL, ZEROED = np.uint8(1), np.uint8(2), np.uint8(4)
"""State of a byte: written at all; last written by a matmul; zero-filled at creation (a matmul overwrites it)."""


class MemoryRegion(Enum):
    """Where a tile lives."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    @property
    def on_chip(self) -> bool:
        """True for SBUF and PSUM."""
        return self in (MemoryRegion.sbuf, MemoryRegion.psum)


@dataclass(slots=True)
class MemoryAccount:
    """Bytes a partition that live tiles take, and the most they ever took."""

    generation: Generation
    live_bytes: dict[MemoryRegion, int] = field(default_factory=lambda: dict.fromkeys(MemoryRegion, 0))
    peak_bytes: dict[MemoryRegion, int] = field(default_factory=lambda: dict.fromkeys(MemoryRegion, 0))

    def take(self, region: MemoryRegion, size_bytes: int) -> None:
        """Take `size_bytes` of every partition of an on-chip region.

        Raises:
            NkiRefused: rule `sbuf-capacity` or `psum-capacity`.
        """
        self.live_bytes[region] += size_bytes
        live, capacity = self.live_bytes[region], self._capacity(region)
        if live > capacity:
            self.live_bytes[region] -= size_bytes
            refuse(
                f"{region.value}-capacity",
                f"live {region.value.upper()} tiles exceed a partition of {self.generation.name}",
                value=live,
                valid=f"at most {capacity} bytes a partition",
                fix="use smaller tiles or drop some earlier",
            )
        self.peak_bytes[region] = max(self.peak_bytes[region], live)

    def give_back(self, region: MemoryRegion, size_bytes: int) -> None:
        """Return what `take` took."""
        self.live_bytes[region] -= size_bytes

    def _capacity(self, region: MemoryRegion) -> int:
        g = self.generation
        return g.sbuf_partition_bytes if region is MemoryRegion.sbuf else g.psum_partition_bytes


class Storage:
    """The bytes of one allocation and the state of each byte.

    Args:
        num_bytes: the whole allocation, all partitions.
        partition_bytes: bytes of one partition (the whole allocation in HBM).
        account: charged for on-chip regions; None in HBM, whose size is not modelled.
    """

    __slots__ = ("_account", "changed", "data", "partition_bytes", "region", "state")

    def __init__(
        self, num_bytes: int, region: MemoryRegion, partition_bytes: int, account: MemoryAccount | None
    ) -> None:
        self._account: MemoryAccount | None = None
        self.region, self.partition_bytes = region, partition_bytes
        self.changed = False
        if account is not None and region.on_chip:
            account.take(region, partition_bytes)
            # Only now: __del__ must not give back what was refused.
            self._account = account
        # The poison makes a read that slips past the state visible as NaN or a wild integer.
        self.data: Array = np.full(num_bytes, 0xFF, np.uint8)
        self.state: Array = np.zeros(num_bytes, np.uint8)

    def __del__(self) -> None:
        if self._account is not None:
            self._account.give_back(self.region, self.partition_bytes)
