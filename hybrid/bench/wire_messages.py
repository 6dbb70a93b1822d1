"""What the processes of the p2p and all-reduce benchmarks are told. Data only; no torch.

Arms are named: `gloo`, a transport of `hybrid.transports.VARIANTS` (or a group over it), or `shm-…`: other ways through
shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenNodes:
    """Open a node of each transport; reply: address by transport."""

    transports: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetAll:
    """Open the edges to all other ranks, and gloo's group; reply: None."""

    addresses_of_rank: tuple[Mapping[str, str], ...]
    """By rank, then by transport."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Rank 0 sends `count` messages on end to rank 1; rank 1's reply: its seconds from its go to the last arrival."""

    arm: str
    size_bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PingPong:
    """A message goes from rank 0 to rank 1 and back, `count` times; rank 0's reply: seconds of one way."""

    arm: str
    size_bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Copy within one process, by libc's memcpy in one thread, as the stream's receiver would; reply: seconds."""

    size_bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceBy:
    """All ranks reduce by one algorithm over one transport, `count` times on end; reply: seconds of one."""

    link: str
    algorithm: str
    segment_bytes: int
    size_bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """All ranks reduce, `count` times on end; reply: seconds of one."""

    arm: str
    size_bytes: int
    count: int
