"""The shared memory of one edge: which bytes are whose, and how one end shows the other what it wrote.

The memory is nameless (`hybrid.host_memory`), and a Unix socket carries its descriptor to the peer. Each direction
has an arena for the bytes, a ring of notes (what lies where) from sender to receiver, and a ring of returns (what may
be used again) back; a counter in shared memory, written after what it counts, says how many there are.
May import only `errors`, `host_memory` and this folder.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import final

import numpy as np

from hybrid.errors import ProtocolError
from hybrid.host_memory import create_memory, publish_fence
from hybrid.transports.base import MESSAGE_OVERHEAD_BYTES
from hybrid.transports.shm_arena import aligned

_PIECE_BYTES, _NEAR_BYTES, _MIDDLE_BYTES = 1 << 20, 256 << 10, 8 << 20
_PAGE_BYTES = mmap.PAGESIZE
_LINE_WORDS = 16
"""Counters of different writers lie two cache lines apart: neighbours are fetched in pairs."""
_NOTE_WORDS = 4
_SMALL_BYTES = 32 << 10


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in a segment; a pure function of the window, so both ends compute the same."""

    window_bytes: int

    @property
    def piece_bytes(self) -> int:
        """A longer message is shown to the receiver in pieces of this: it copies out while the sender copies in."""
        return min(_PIECE_BYTES, aligned(self.window_bytes // 8))

    @property
    def limit_bytes(self) -> int:
        """What may be in the ring at once: the window, and an eighth for buffers rounded up to cache lines."""
        return self.window_bytes + self.window_bytes // 8

    @property
    def num_notes(self) -> int:
        """More extents than this are never taken at once."""
        return self.limit_bytes // MESSAGE_OVERHEAD_BYTES + 1024

    @property
    def near_bytes(self) -> int:
        """The arena's corner for short messages."""
        return min(_NEAR_BYTES, aligned(self.window_bytes // 8))

    @property
    def middle_bytes(self) -> int:
        """The part of the arena that long messages go through while their receiver keeps up."""
        return min(_MIDDLE_BYTES, aligned(self.window_bytes // 8))

    @property
    def arena_bytes(self) -> int:
        """More than the limit, for gaps."""
        return _pages(self.window_bytes + self.window_bytes // 4 + (64 << 10) + self.near_bytes + self.middle_bytes)

    @property
    def control_bytes(self) -> int:
        """Counters, notes and returns of one direction."""
        return _pages(8 * (4 * _LINE_WORDS + self.num_notes * (_NOTE_WORDS + 1)))

    @property
    def size_bytes(self) -> int:
        """Of the whole segment."""
        return 2 * (self.control_bytes + self.arena_bytes)


def _pages(size_bytes: int) -> int:
    return (size_bytes + _PAGE_BYTES - 1) // _PAGE_BYTES * _PAGE_BYTES


def create_segment(layout: Layout) -> int:
    """Return the descriptor of a new segment; see `create_memory`."""
    return create_memory(layout.size_bytes, "hybrid-shm")


@final
class Segment:
    """This process's view of an edge's memory. Not safe for threads: its edge's lock guards it."""

    def __init__(self, fd: int, layout: Layout, *, low: bool) -> None:
        self._map = mmap.mmap(fd, layout.size_bytes)
        view = memoryview(self._map)
        control, arena = layout.control_bytes, layout.arena_bytes
        words = [view[start : start + control].cast("Q") for start in (0, control)]
        bytes_of = [view[2 * control + start : 2 * control + start + arena] for start in (0, arena)]
        mine, theirs = (0, 1) if low else (1, 0)
        self.out = Lane(words[mine], bytes_of[mine], layout.num_notes)
        self.into = Lane(words[theirs], bytes_of[theirs], layout.num_notes)
        view.release()

    def close(self) -> None:
        """Let go of the memory; what a lent view still shows stays until that view is gone."""
        self.out.close()
        self.into.close()
        try:
            self._map.close()
        except BufferError:
            del self._map


@final
class Lane:
    """One direction. The sender calls `note`, `returned`; the receiver `noted`, `give_back`.

    Words: [0] notes written, [16] returns written, [32] whether the sender sleeps, [48] whether the receiver does,
    [49] whether the receiver reads messages where they lie.
    """

    def __init__(self, words: memoryview[int], data: memoryview, num_notes: int) -> None:
        self.data = data
        self._words, self._num_notes = words, num_notes
        self._notes_at = 4 * _LINE_WORDS
        self._returns_at = self._notes_at + num_notes * _NOTE_WORDS
        self._written = self._read = 0

    def note(self, offset: int, size_bytes: int, record_bytes: int) -> None:
        """Show the receiver `size_bytes` at `offset`, that begin with a record or go on with a payload (0)."""
        words, at = self._words, self._notes_at + self._written % self._num_notes * _NOTE_WORDS
        words[at], words[at + 1], words[at + 2] = offset, size_bytes, record_bytes
        self._written += 1
        publish_fence()
        words[0] = self._written

    def noted(self) -> tuple[int, int, int] | None:
        """Return the next note, or None.

        Raises:
            ProtocolError: the peer's counter or note is none that an honest peer writes.
        """
        words = self._words
        ahead = words[0] - self._read
        if ahead == 0:
            return None
        publish_fence()
        at = self._notes_at + self._read % self._num_notes * _NOTE_WORDS
        offset, size_bytes, record_bytes = words[at], words[at + 1], words[at + 2]
        if not 0 < ahead <= self._num_notes or offset + size_bytes > self.data.nbytes or record_bytes > size_bytes:
            raise ProtocolError("the peer's note points outside its ring", value=(ahead, offset, size_bytes))
        self._read += 1
        return offset, size_bytes, record_bytes

    def give_back(self, offset: int) -> None:
        """Let the sender use the extent at `offset` again."""
        words = self._words
        words[self._returns_at + self._written % self._num_notes] = offset
        self._written += 1
        publish_fence()
        words[_LINE_WORDS] = self._written

    def returned(self) -> int | None:
        """Return the next extent that the receiver gave back, or None.

        Raises:
            ProtocolError: the peer's counter is none that an honest peer writes.
        """
        words = self._words
        ahead = words[_LINE_WORDS] - self._read
        if ahead == 0:
            return None
        publish_fence()
        if not 0 < ahead <= self._num_notes:
            raise ProtocolError("the peer gave back more than it was given", value=ahead)
        offset: int = words[self._returns_at + self._read % self._num_notes]
        self._read += 1
        return offset

    def has_note(self) -> bool:
        """Return whether the sender has shown something that is not yet taken."""
        return self._words[0] != self._read

    def has_return(self) -> bool:
        """Return whether the receiver has given something back that is not yet taken."""
        return self._words[_LINE_WORDS] != self._read

    def sender_sleeps(self, asleep: bool) -> None:
        """Say whether the sender is to be woken when something is given back."""
        self._words[2 * _LINE_WORDS] = int(asleep)

    def receiver_sleeps(self, asleep: bool) -> None:
        """Say whether the receiver is to be woken when something is shown."""
        self._words[3 * _LINE_WORDS] = int(asleep)

    def reads_in_place(self) -> None:
        """Say that the receiver reads messages where they lie: each should be in one piece."""
        self._words[3 * _LINE_WORDS + 1] = 1

    def is_read_in_place(self) -> bool:
        """Return whether the receiver reads messages where they lie."""
        return bool(self._words[3 * _LINE_WORDS + 1])

    def must_wake_sender(self) -> bool:
        """Return whether the sender sleeps, and take it for awake from now on. Call `fence` first."""
        asleep = self._words[2 * _LINE_WORDS]
        if asleep:
            self._words[2 * _LINE_WORDS] = 0
        return bool(asleep)

    def must_wake_receiver(self) -> bool:
        """Return whether the receiver sleeps, and take it for awake from now on. Call `fence` first."""
        asleep = self._words[3 * _LINE_WORDS]
        if asleep:
            self._words[3 * _LINE_WORDS] = 0
        return bool(asleep)

    def close(self) -> None:
        """Let go of the views."""
        self._words.release()
        # Lent parts of it may live on; this one is only dropped.
        self.data = memoryview(b"")


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy equally many bytes; long ones without holding up this process's other threads."""
    if source.nbytes < _SMALL_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
