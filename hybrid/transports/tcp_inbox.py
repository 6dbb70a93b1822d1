"""What comes in on a TCP edge: which frame belongs where, what waits for a receive, and what is owed to the sender.

Pure: no sockets, no locks, no clock. Memory is taken only after the window was asked. May import only `errors`,
`wire` and this folder's pure files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from hybrid.errors import CommError, ProtocolError
from hybrid.transports.base import MESSAGE_OVERHEAD_BYTES, misfit, sizes_of
from hybrid.transports.matching import Matcher
from hybrid.transports.message import Arriving, Posted
from hybrid.wire import MessageHeader

_NOWHERE = memoryview(b"")
_MAX_AHEAD = 1 << 20
"""By how many messages a chunk may be ahead of the first stream."""


@dataclass(frozen=True, slots=True)
class _Coming:
    """A frame of which the payload is being read."""

    message: Arriving
    offset: int
    size_bytes: int
    held: bytearray | None
    """Where it is read to, where no receive has a place for it."""


@final
class Inbox:
    """Streams are told apart by their numbers; stream 0 brings the headers, in order."""

    def __init__(self, *, peer: int, window_bytes: int, limit_bytes: int, frame_bytes: int) -> None:
        self._peer, self._frame_bytes = peer, frame_bytes
        self._quantum_bytes, self._limit_bytes = window_bytes // 4, limit_bytes
        self._matcher: Matcher[Arriving, Posted] = Matcher()
        self._arriving: dict[int, Arriving] = {}
        self._seen: dict[int, set[int]] = {}
        self._coming: dict[int, _Coming] = {}
        self._next_in = self._held_bytes = self._owed_bytes = 0

    def post(self, posted: Posted) -> None:
        """Give a receive its message, if that has come or is coming."""
        message = self._matcher.post(posted)
        if message is None:
            return
        self._bind(message, posted)
        self._held_bytes -= message.weight
        self._owed_bytes += message.weight
        if message.whole:
            posted.end()

    def begin(self, stream: int, header: MessageHeader, size_bytes: int) -> memoryview:
        """Take a message's header; return where the payload that rides along goes.

        Raises:
            ProtocolError: out of turn, beyond the window, or with another payload than it announces.
        """
        if header.seq != self._next_in or header.frame_bytes != self._frame_bytes:
            raise ProtocolError(
                f"rank {self._peer} sent a message out of turn", value=header.seq, valid=f"message {self._next_in}"
            )
        message = Arriving(header)
        if size_bytes and size_bytes != message.size_bytes:
            raise ProtocolError(f"rank {self._peer} sent a payload that its header does not announce", value=size_bytes)
        self._next_in += 1
        receive = self._matcher.arrive(message)
        if receive is not None:
            self._bind(message, receive)
        self._weigh(message, MESSAGE_OVERHEAD_BYTES + size_bytes)
        self._arriving[header.seq] = message
        if size_bytes:
            return self._room(stream, message, 0, size_bytes)
        self._end_if_whole(message)
        return _NOWHERE

    def continue_(self, stream: int, seq: int, offset: int, size_bytes: int) -> memoryview | None:
        """Take a chunk; return where it goes, or None while its message's header has not come.

        Raises:
            ProtocolError: it has no place, or had it before.
        """
        message = self._arriving.get(seq)
        if message is None:
            if stream and self._next_in <= seq < self._next_in + _MAX_AHEAD:
                return None
            raise ProtocolError(f"rank {self._peer} sent a chunk out of turn", value=(seq, offset))
        seen = self._seen.setdefault(seq, set())
        if offset in seen or not message.begins_frame(offset) or size_bytes != message.frame_bytes_at(offset):
            raise ProtocolError(f"rank {self._peer} sent a chunk that has no place", value=(seq, offset, size_bytes))
        seen.add(offset)
        self._weigh(message, size_bytes)
        return self._room(stream, message, offset, size_bytes)

    def arrived(self, stream: int) -> bool:
        """Take note that the payload under way on this stream is in its place; return whether its message is whole."""
        coming = self._coming.pop(stream)
        if coming.held is not None:
            coming.message.put(coming.offset, coming.held)
        coming.message.filled_bytes += coming.size_bytes
        self._end_if_whole(coming.message)
        return coming.message.whole

    def take_owed(self) -> int:
        """Return what to credit the sender with now: a large piece, or nothing."""
        if self._owed_bytes < self._quantum_bytes:
            return 0
        owed, self._owed_bytes = self._owed_bytes, 0
        return owed

    def fail(self, failure: CommError) -> None:
        """End the receives that no message has begun to fill; messages that came whole can still be received."""
        for message in self._arriving.values():
            self._matcher.forget(message)
        for receive in self._matcher.forget_posted():
            receive.end(failure)

    def end_arriving(self, failure: CommError) -> None:
        """End the receives that were being filled, once nothing writes to them any more."""
        for message in self._arriving.values():
            if message.receive is not None:
                message.receive.end(failure)
        self._arriving.clear()
        self._coming.clear()
        self._seen.clear()

    def forget(self) -> None:
        """Forget what nobody has received."""
        self._matcher.forget_arrived()

    def _weigh(self, message: Arriving, weight: int) -> None:
        """Count a frame against the window before memory is taken for it."""
        if message.receive is not None:
            self._owed_bytes += weight
            return
        if self._held_bytes + self._owed_bytes + weight > self._limit_bytes:
            raise ProtocolError(f"rank {self._peer} sent beyond the window", value=self._held_bytes + weight)
        message.weight += weight
        self._held_bytes += weight

    def _room(self, stream: int, message: Arriving, offset: int, size_bytes: int) -> memoryview:
        place = message.place_for(offset, size_bytes)
        held = bytearray(size_bytes) if place is None else None
        self._coming[stream] = _Coming(message, offset, size_bytes, held)
        return memoryview(held) if held is not None else place or _NOWHERE

    def _bind(self, message: Arriving, receive: Posted) -> None:
        if not message.bind(receive):
            receive.end(misfit(self._peer, receive.tag, message.header.sizes, sizes_of(receive.targets)))

    def _end_if_whole(self, message: Arriving) -> None:
        if message.whole:
            del self._arriving[message.header.seq]
            self._seen.pop(message.header.seq, None)
            if message.receive is not None:
                message.receive.end()
