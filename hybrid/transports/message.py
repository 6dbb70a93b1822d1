"""Messages under way on an edge between processes: cut into parts, put together.

Pure: no sockets, no locks, no clock. May import only `errors`, `wire` and `transports.base`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import final

from hybrid.errors import CommError
from hybrid.transports.base import MESSAGE_OVERHEAD_BYTES, sizes_of
from hybrid.wire import Chunk, MessageHeader, encode_header

Payload = memoryview | bytes | bytearray


@dataclass(frozen=True, slots=True)
class Part:
    """What travels as one: a record, and at most one payload frame."""

    head: bytes
    payload: Payload | None
    weight: int
    """What it takes of the window."""
    in_place: bool = False
    """The payload is read where it lies, also after it was handed over."""


def parts_of(header: MessageHeader, views: Sequence[memoryview], *, copy_below_bytes: int) -> Iterator[Part]:
    """Yield the parts of a message, in order.

    A message of one buffer, or of up to `copy_below_bytes` (they are joined), that fits one frame is one part.
    Of a longer message every payload is in place, the short last one too: a medium that lets go of payloads
    in order has let go of all of them with the last one.
    """
    total = sum(header.sizes)
    head = encode_header(header)
    filled = [view for view in views if view.nbytes]
    if not filled:
        yield Part(head, None, MESSAGE_OVERHEAD_BYTES)
    elif total <= header.frame_bytes and (len(filled) == 1 or total <= copy_below_bytes):
        payload = filled[0] if len(filled) == 1 else b"".join(filled)
        yield Part(head, payload, MESSAGE_OVERHEAD_BYTES + total, in_place=total > copy_below_bytes)
    else:
        yield Part(head, None, MESSAGE_OVERHEAD_BYTES)
        offset = 0
        for view in filled:
            for start in range(0, view.nbytes, header.frame_bytes):
                piece = view[start : start + header.frame_bytes]
                yield Part(encode_header(Chunk(header.seq, offset)), piece, piece.nbytes, in_place=True)
                offset += piece.nbytes


@dataclass(slots=True, eq=False)
class Posted:
    """A receive: where its message goes, and whether it has ended. Changed only under the node's lock."""

    tag: str
    targets: tuple[memoryview, ...]
    ended: bool = False
    failure: CommError | None = None

    def end(self, failure: CommError | None = None) -> None:
        """End, well or with `failure`; what has ended does not end again."""
        if not self.ended:
            self.failure = failure
            self.ended = True


@final
@dataclass(slots=True, eq=False)
class Arriving:
    """A message of which the header has come: its payload goes to its receive, or waits for one in `held`."""

    header: MessageHeader
    receive: Posted | None = None
    fits: bool = True
    filled_bytes: int = 0
    weight: int = 0
    """What it takes of the window until it is bound to a receive."""
    held: list[tuple[int, Payload]] = field(default_factory=list)
    """Payloads that wait for the receive, each with its offset in the message."""
    _ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._ends = tuple(accumulate(self.header.sizes))

    @property
    def size_bytes(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def whole(self) -> bool:
        return self.filled_bytes == self.size_bytes

    def bind(self, receive: Posted) -> bool:
        """Give the message its receive; return whether it fits. What was held is copied out, or dropped."""
        self.receive = receive
        self.fits = sizes_of(receive.targets) == self.header.sizes
        for offset, payload in self.held:
            self._scatter(offset, payload)
        self.held.clear()
        return self.fits

    def frame_bytes_at(self, offset: int) -> int:
        """Return how long the chunk that begins at `offset`, inside the message, must be."""
        index, start = self._place(offset)
        return min(self.header.sizes[index] - start, self.header.frame_bytes)

    def begins_frame(self, offset: int) -> bool:
        """Return whether a chunk of an honest peer begins at `offset`."""
        return offset < self.size_bytes and self._place(offset)[1] % self.header.frame_bytes == 0

    def place_for(self, offset: int, size_bytes: int) -> memoryview | None:
        """Return where a frame goes as it is, or None where it must be held, dropped or scattered."""
        if self.receive is None or not self.fits:
            return None
        index, start = self._place(offset)
        target = self.receive.targets[index]
        return target[start : start + size_bytes] if start + size_bytes <= target.nbytes else None

    def put(self, offset: int, payload: Payload) -> None:
        """Take a frame that had no single place: hold it, scatter it, or drop it."""
        if self.receive is None:
            self.held.append((offset, payload))
        else:
            self._scatter(offset, payload)

    def _scatter(self, offset: int, payload: Payload) -> None:
        assert self.receive is not None
        if not self.fits or not len(payload):
            return
        view = memoryview(payload)
        index, start = self._place(offset)
        while view.nbytes:
            target = self.receive.targets[index][start:]
            taken = min(target.nbytes, view.nbytes)
            if taken:
                target[:taken] = view[:taken]
            view, index, start = view[taken:], index + 1, 0

    def _place(self, offset: int) -> tuple[int, int]:
        """Return the buffer that byte `offset` of the message falls in, and where in it."""
        index = bisect_right(self._ends, offset)
        return index, offset - (self._ends[index] - self.header.sizes[index])
