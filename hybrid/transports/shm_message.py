"""Messages under way through a ring: laid out in pieces by the sender, put together by the receiver.

In the ring a message is its record (`hybrid.wire.MessageHeader`), then its buffers, each from a cache line on. It lies
in one extent where the ring has room for that, else in several; the receiver is shown it piece by piece.
No sockets, no locks, no clock. May import only `errors`, `wire` and this folder.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import final

from hybrid.errors import CommError
from hybrid.transports.base import MESSAGE_OVERHEAD_BYTES
from hybrid.transports.shm_arena import Arena, aligned
from hybrid.transports.shm_segment import Lane, copy_bytes
from hybrid.wire import MessageHeader, encode_header


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return where each buffer begins behind the record, and where the last one ends."""
    return (0, *accumulate(aligned(size) for size in sizes))


@final
class Outgoing:
    """A message on its way into the ring."""

    def __init__(self, header: MessageHeader, views: Sequence[memoryview]) -> None:
        self._piece_bytes = header.frame_bytes
        self.failure: CommError | None = None
        self.ended = False
        self._record: bytes = encode_header(header)
        self._views, self._starts = views, _starts(header.sizes)
        self._filled = -aligned(len(self._record))
        """Bytes behind the record that are in the ring; negative: the record is not."""
        self._extent: tuple[int, int] | None = None
        """Offset and size of what is taken for it and not yet shown."""

    def next_weight(self) -> int:
        """Return what the next piece takes of the window, at most."""
        return self._next_bytes() + (max(MESSAGE_OVERHEAD_BYTES, -self._filled) if self._filled < 0 else 0)

    def end(self, failure: CommError | None) -> None:
        """End before the whole message is in the ring."""
        self.ended, self.failure = True, failure

    def put_piece(self, arena: Arena, lane: Lane, *, hot: bool) -> tuple[int, int] | None:
        """Copy the next piece into the ring and show it.

        Args:
            hot: only into what the caches hold.

        Returns:
            Its extent, and what it takes of the window; None where there is no room.
        """
        head_bytes = max(-self._filled, 0)
        wanted = head_bytes + self._next_bytes()
        extent = self._extent or self._take(arena, wanted, head_bytes, hot=hot, whole=lane.is_read_in_place())
        if extent is None:
            return None
        offset, size_bytes = extent[0], min(extent[1], wanted)
        arena.cut(offset, size_bytes)
        self._extent = (offset + size_bytes, extent[1] - size_bytes) if extent[1] > size_bytes else None
        if head_bytes:
            lane.data[offset : offset + len(self._record)] = self._record
        self._copy(lane.data, offset + head_bytes, size_bytes - head_bytes)
        lane.note(offset, size_bytes, len(self._record) if head_bytes else 0)
        self.ended = self._filled == self._starts[-1]
        return offset, size_bytes - head_bytes + (max(MESSAGE_OVERHEAD_BYTES, head_bytes) if head_bytes else 0)

    def _next_bytes(self) -> int:
        return min(self._starts[-1] - max(self._filled, 0), self._piece_bytes)

    def _take(self, arena: Arena, wanted: int, head_bytes: int, *, hot: bool, whole: bool) -> tuple[int, int] | None:
        """Take room for the rest of the message (`whole`), else for a piece, else for a part of a piece."""
        rest = self._starts[-1] - self._filled
        if whole and (offset := arena.take(rest)) is not None:
            return offset, rest
        offset = arena.take_hot(wanted) if hot else arena.take(wanted)
        if offset is not None:
            return offset, wanted
        if hot:
            return None
        if not head_bytes:
            return arena.take_up_to(wanted)
        offset = arena.take(head_bytes)
        return None if offset is None else (offset, head_bytes)

    def _copy(self, data: memoryview, offset: int, size_bytes: int) -> None:
        """Copy the next `size_bytes` behind the record, gaps between buffers included, to `offset`."""
        begin = max(self._filled, 0)
        end = self._filled = begin + size_bytes
        index = bisect_right(self._starts, begin) - 1
        while index < len(self._views) and self._starts[index] < end:
            view, start = self._views[index], self._starts[index]
            low, high = max(begin - start, 0), min(end - start, view.nbytes)
            if low < high:
                to = offset + start + low - begin
                copy_bytes(data[to : to + high - low], view[low:high])
            index += 1


@final
@dataclass(slots=True, eq=False)
class Receive:
    """A posted receive: of targets, or of a message that is lent (`targets` is None)."""

    tag: str
    sizes: tuple[int, ...]
    targets: tuple[memoryview, ...] | None
    ended: bool = False
    failure: CommError | None = None
    views: tuple[memoryview, ...] = ()
    """Of a lent message, where it lies."""
    lent: Incoming | None = None
    """The lent message, until it is released."""

    def end(self, failure: CommError | None = None) -> None:
        """End, well or with `failure`; what has ended does not end again."""
        if not self.ended:
            self.failure = failure
            self.ended = True


@final
@dataclass(slots=True, eq=False)
class Incoming:
    """A message of which the record has come; its pieces stay in the ring until they are copied out or released."""

    header: MessageHeader
    give_back: Callable[[int, int], None]
    """Called with each extent that is no longer read, and the payload in it."""
    receive: Receive | None = None
    fits: bool = True
    filled_bytes: int = 0
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    """Offset of the extent, and where and how long the payload in it is."""
    starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.starts = _starts(self.header.sizes)

    @property
    def whole(self) -> bool:
        return self.filled_bytes == self.starts[-1]

    def bind(self, receive: Receive, data: memoryview) -> bool:
        """Give the message its receive; return whether it fits. What has come is copied out, or dropped."""
        self.receive = receive
        self.fits = receive.sizes == self.header.sizes
        if not self.fits or receive.targets is not None:
            pieces, self.pieces = self.pieces, []
            begin = 0
            for extent, at, size_bytes in pieces:
                self._land(data, at, begin, size_bytes)
                self.give_back(extent, size_bytes)
                begin += size_bytes
        return self.fits

    def add(self, extent: int, at: int, size_bytes: int, data: memoryview) -> None:
        """Take the next piece: the payload of `size_bytes` at `at` of the extent."""
        begin = self.filled_bytes
        self.filled_bytes += size_bytes
        if self.receive is None or (self.fits and self.receive.targets is None):
            self.pieces.append((extent, at, size_bytes))
        else:
            self._land(data, at, begin, size_bytes)
            self.give_back(extent, size_bytes)

    def views(self, data: memoryview) -> tuple[memoryview, ...]:
        """Return the message's buffers where they lie, or copied out where they do not lie in one piece."""
        begin, is_one = 0, True
        first = self.pieces[0][1]
        for _, at, size_bytes in self.pieces:
            is_one = is_one and (at == first + begin or not size_bytes)
            begin += size_bytes
        if is_one:
            whole = data[first : first + begin].toreadonly()
        else:
            whole = memoryview(bytearray().join(data[at : at + size_bytes] for _, at, size_bytes in self.pieces))
            self.release()
        return tuple(whole[start : start + size] for start, size in zip(self.starts, self.header.sizes, strict=False))

    def release(self) -> None:
        """Give every piece back."""
        pieces, self.pieces = self.pieces, []
        for extent, _, size_bytes in pieces:
            self.give_back(extent, size_bytes)

    def _land(self, data: memoryview, at: int, begin: int, size_bytes: int) -> None:
        """Copy a piece, that begins `begin` bytes behind the record, into the targets."""
        if not self.fits:
            return
        assert self.receive is not None
        assert self.receive.targets is not None
        end = begin + size_bytes
        index = max(bisect_right(self.starts, begin) - 1, 0)
        while index < len(self.receive.targets) and self.starts[index] < end:
            target, start = self.receive.targets[index], self.starts[index]
            low, high = max(begin - start, 0), min(end - start, target.nbytes)
            if low < high:
                copy_bytes(target[low:high], data[at + start + low - begin : at + start + high - begin])
            index += 1
