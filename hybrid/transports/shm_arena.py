"""Which bytes of a ring are taken: the sender's book of its half of a shared segment.

Bytes are taken one behind the other, round and round, and given back in any order: a message that waits for its
receive does not hold up the bytes behind it. Three rings of one memory: short messages walk round a corner of their
own; the pieces of long ones walk round a middle that the caches hold (walking on, because bytes that the other core has
just read cost a write several times as much as bytes that it has forgotten); the rest is for what waits longer.
Pure: no memory, no clock. May import only the standard library.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import final

ALIGN_BYTES = 64
"""Everything starts at a multiple of this: a cache line, and what any tensor asks for."""
_SHORT_PER_NEAR = 8
"""What is no longer than this part of the corner is short."""


def aligned(size_bytes: int) -> int:
    """Return `size_bytes` rounded up to whole cache lines."""
    return (size_bytes + ALIGN_BYTES - 1) // ALIGN_BYTES * ALIGN_BYTES


@final
class Arena:
    """A ring of `size_bytes`: first `near_bytes` for short messages, then `middle_bytes`, then the rest.

    Cost:
        A bisection and one move of a list entry an operation; there are as many gaps as messages wait out of turn.
    """

    def __init__(self, size_bytes: int, *, near_bytes: int = 0, middle_bytes: int = 0) -> None:
        self._near_bytes, self._far_bytes = near_bytes, near_bytes + middle_bytes
        borders = (0, self._near_bytes, self._far_bytes, size_bytes)
        assert not any(border % ALIGN_BYTES for border in borders), "an arena is whole cache lines"
        self._near, self._middle, self._far = (_Walk(start, end) for start, end in pairwise(borders))

    @property
    def num_extents(self) -> int:
        """How many extents are taken."""
        return sum(len(walk.size_of_extent) for walk in (self._near, self._middle, self._far))

    def take(self, size_bytes: int) -> int | None:
        """Return the offset of `size_bytes` in one piece, where they fit best, or None where no gap holds them."""
        offset = self.take_hot(size_bytes)
        return self._far.take(size_bytes) if offset is None else offset

    def take_hot(self, size_bytes: int) -> int | None:
        """Return the offset of `size_bytes` in one piece of what the caches hold, or None."""
        offset = self._near.take(size_bytes) if size_bytes * _SHORT_PER_NEAR <= self._near_bytes else None
        return self._middle.take(size_bytes) if offset is None else offset

    def take_up_to(self, size_bytes: int) -> tuple[int, int] | None:
        """Return offset and size of the next gap, or of its first `size_bytes`; None where nothing is free."""
        walks = (self._middle, self._far, self._near)
        return next((found for walk in walks if (found := walk.take_up_to(size_bytes)) is not None), None)

    def cut(self, offset: int, size_bytes: int) -> None:
        """Part a taken extent in two, the first of them of `size_bytes`; each is given back by itself."""
        self._walk_of(offset).cut(offset, size_bytes)

    def give_back(self, offset: int) -> int:
        """Free the extent at `offset` and return its size.

        Raises:
            KeyError: no extent that is taken starts there.
        """
        return self._walk_of(offset).give_back(offset)

    def _walk_of(self, offset: int) -> _Walk:
        return self._near if offset < self._near_bytes else self._middle if offset < self._far_bytes else self._far


@final
class _Walk:
    """The free gaps of a ring in the order of their offsets, and the size of every extent taken."""

    def __init__(self, start: int, end: int) -> None:
        self._starts, self._ends = ([start], [end]) if start < end else ([], [])
        self._next = start
        self.size_of_extent: dict[int, int] = {}

    def take(self, size_bytes: int) -> int | None:
        for index, start in self._gaps():
            if self._ends[index] - start >= size_bytes:
                return self._carve(index, start, size_bytes)
        return None

    def take_up_to(self, size_bytes: int) -> tuple[int, int] | None:
        for index, start in self._gaps():
            taken = min(size_bytes, self._ends[index] - start)
            return self._carve(index, start, taken), taken
        return None

    def cut(self, offset: int, size_bytes: int) -> None:
        whole = self.size_of_extent[offset]
        if size_bytes < whole:
            self.size_of_extent[offset] = size_bytes
            self.size_of_extent[offset + size_bytes] = whole - size_bytes

    def give_back(self, offset: int) -> int:
        start, end = offset, offset + self.size_of_extent.pop(offset)
        size_bytes = end - start
        index = bisect_right(self._starts, start)
        if index < len(self._starts) and self._starts[index] == end:
            end = self._ends[index]
            del self._starts[index], self._ends[index]
        if index and self._ends[index - 1] == start:
            self._ends[index - 1] = end
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)
        return size_bytes

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Yield each gap and where in it to begin: from where the last extent ended, then round from the start."""
        first = bisect_right(self._ends, self._next)
        for index in range(first, len(self._starts)):
            yield index, max(self._starts[index], self._next)
        for index in range(min(first + 1, len(self._starts))):
            yield index, self._starts[index]

    def _carve(self, index: int, start: int, size_bytes: int) -> int:
        gap_start, gap_end, end = self._starts[index], self._ends[index], start + size_bytes
        left = [(gap_start, start)] if start > gap_start else []
        right = [(end, gap_end)] if end < gap_end else []
        self._starts[index : index + 1] = [piece[0] for piece in (*left, *right)]
        self._ends[index : index + 1] = [piece[1] for piece in (*left, *right)]
        self.size_of_extent[start] = size_bytes
        self._next = end
        return start
