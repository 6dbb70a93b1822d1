"""The board of a group on one host: shared memory in which each member shows the others a header and some bytes.

Work goes in rounds: every member writes its buffer of the round, posts, waits until all have posted, and reads the
others' buffers. A buffer is written again two rounds later at the earliest: who has posted the round between has read
it. Knows nothing of operations. May import only torch, `errors`, `host_memory` and `transports.base`.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hybrid.errors import CommTimeout
from hybrid.host_memory import fence, publish_fence, sleep_while, wake_sleepers
from hybrid.transports.base import Pending

SPIN_S = 100e-6
"""How long a member looks for the others before it sleeps: a wake-up across cores costs 30 µs."""

_LINE_BYTES = 128
_MASK = (1 << 32) - 1
_NUM_BUFFERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardLayout:
    """Where everything lies; a pure function of the group's size."""

    num_members: int
    tile_bytes: int = 256 << 10
    """What a member reduces in one round of a long operation."""

    @property
    def buffer_bytes(self) -> int:
        """A tile for each member, and one for a result."""
        return (self.num_members + 1) * self.tile_bytes

    @property
    def header_bytes(self) -> int:
        """Of one member in one round."""
        return _pages(512 + 8 * self.num_members)

    @property
    def member_bytes(self) -> int:
        """All of one member's headers and buffers."""
        return _NUM_BUFFERS * (self.header_bytes + _pages(self.buffer_bytes))

    @property
    def counters_bytes(self) -> int:
        """A counter and a flag for each member, each on cache lines of its own."""
        return _pages(2 * _LINE_BYTES * self.num_members)

    @property
    def size_bytes(self) -> int:
        """Of the whole memory."""
        return self.counters_bytes + self.num_members * self.member_bytes


def _pages(size_bytes: int) -> int:
    return (size_bytes + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE


@final
class Board:
    """One member's view. Not safe for threads: the group runs one operation at a time."""

    def __init__(self, memory: Tensor, layout: BoardLayout, *, rank: int) -> None:
        self.layout, self.rank, self.size = layout, rank, layout.num_members
        self._words = memory[: layout.counters_bytes].view(torch.int32).numpy().data.cast("B").cast("I")
        self._address = memory.data_ptr()
        self._round = 0
        self._buffers: list[list[Tensor]] = []
        self._headers: list[list[memoryview]] = []
        for member in range(self.size):
            start = layout.counters_bytes + member * layout.member_bytes
            mine = memory[start : start + layout.member_bytes]
            headers = mine[: _NUM_BUFFERS * layout.header_bytes].view(_NUM_BUFFERS, -1)
            data = mine[_NUM_BUFFERS * layout.header_bytes :].view(_NUM_BUFFERS, -1)
            self._headers.append([header.numpy().data for header in headers])
            self._buffers.append([buffer[: layout.buffer_bytes] for buffer in data])

    def begin(self) -> None:
        """Go to the next round: this member's buffer and header of it may be written now."""
        self._round += 1

    @property
    def own(self) -> Tensor:
        """This member's buffer of the round."""
        return self._buffers[self.rank][self._round % _NUM_BUFFERS]

    def of(self, member: int) -> Tensor:
        """Return a member's buffer of the round; to be read once all have posted."""
        return self._buffers[member][self._round % _NUM_BUFFERS]

    def write_header(self, header: bytes) -> None:
        """Show the others what this member takes the operation to be."""
        self._headers[self.rank][self._round % _NUM_BUFFERS][: len(header)] = header

    def header_of(self, member: int, size_bytes: int) -> bytes:
        """Return what a member has shown."""
        return bytes(self._headers[member][self._round % _NUM_BUFFERS][:size_bytes])

    def post(self) -> Pending:
        """Tell the others that this member has written its part of the round; return the wait for all of theirs."""
        publish_fence()
        words, line = self._words, _LINE_BYTES // 4
        words[2 * self.rank * line] = self._round & _MASK
        fence()
        if any(words[(2 * member + 1) * line] for member in range(self.size) if member != self.rank):
            wake_sleepers(self._address + 2 * self.rank * _LINE_BYTES)
        return Posted(self, self._round)

    def late(self, number: int) -> int | None:
        """Return a member that has not yet posted round `number`, or None."""
        words, step = self._words, 2 * _LINE_BYTES // 4
        for member in range(self.size):
            if (words[member * step] - number) & _MASK >= 1 << 31:
                return member
        return None

    def sleep_for(self, member: int, number: int, timeout_s: float) -> None:
        """Sleep until a member posts, or the time is up."""
        words, line = self._words, _LINE_BYTES // 4
        flag = (2 * self.rank + 1) * line
        words[flag] = 1
        fence()
        seen = words[2 * member * line]
        if (seen - number) & _MASK >= 1 << 31:
            sleep_while(self._address + 2 * member * _LINE_BYTES, seen, timeout_s)
        words[flag] = 0


@final
class Posted(Pending):
    """The wait for every member's post of a round."""

    def __init__(self, board: Board, number: int) -> None:
        self._board, self._number = board, number

    def done(self) -> bool:
        return self._board.late(self._number) is None

    def wait(self, timeout_s: float) -> None:
        board, number = self._board, self._number
        now_s = time.monotonic()
        deadline_s, spin_until_s = now_s + timeout_s, now_s + SPIN_S
        while (member := board.late(number)) is not None:
            now_s = time.monotonic()
            if now_s >= deadline_s:
                raise CommTimeout(f"member {member} has not come as far within {timeout_s} s")
            if now_s < spin_until_s:
                os.sched_yield()
            else:
                board.sleep_for(member, number, deadline_s - now_s)
