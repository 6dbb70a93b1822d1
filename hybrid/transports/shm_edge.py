"""One end of an edge through shared memory: copies messages into its ring, and out of the peer's.

A Unix socket beside the ring tells that the peer has gone, and wakes it where it sleeps. Everything runs under the
engine's lock and never blocks. May import only `errors`, `wire` and this folder.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from typing import final

from hybrid.errors import CommError, CommTimeout, PeerLost, ProtocolError
from hybrid.host_memory import fence
from hybrid.transports.base import (
    MESSAGE_OVERHEAD_BYTES,
    Buffer,
    Pending,
    Transport,
    as_bytes,
    as_targets,
    misfit,
    sizes_of,
)
from hybrid.transports.lending import Lender, Lent
from hybrid.transports.matching import Matcher
from hybrid.transports.shm_arena import Arena, aligned
from hybrid.transports.shm_message import Incoming, Outgoing, Receive
from hybrid.transports.shm_segment import Layout, Segment
from hybrid.transports.zmq_engine import Engine
from hybrid.wire import MessageHeader, decode_header

BELL, GOODBYE = b"!", b"G"
"""What is said over the socket."""
_MOMENT_S = 300e-6
"""A piece is copied out in 100 µs."""


@final
class ShmTransport(Transport, Lender):
    """See `Transport`. Made by `ShmNode.open`; owns the socket and the segment."""

    def __init__(self, engine: Engine, line: socket.socket, fd: int, layout: Layout, *, rank: int, peer: int) -> None:
        self.peer, self.window_bytes = peer, layout.window_bytes
        self.met = False
        """Whether both ends have the memory."""
        self.failure: CommError | None = None
        self._engine, self._line, self._layout = engine, line, layout
        self.fds: tuple[int, ...] = (line.fileno(),)
        self._segment = Segment(fd, layout, low=rank < peer)
        self._out, self._into = self._segment.out, self._segment.into
        self._closed = False
        self._gone: CommError | None = None
        # Sending.
        self._arena = Arena(layout.arena_bytes, near_bytes=layout.near_bytes, middle_bytes=layout.middle_bytes)
        self._outbox: deque[Outgoing] = deque()
        self._weight_of_extent: dict[int, int] = {}
        self._next_out = self._ahead_bytes = 0
        self._returned_s = float("-inf")
        # Receiving.
        self._matcher: Matcher[Incoming, Receive] = Matcher()
        self._arriving: Incoming | None = None
        self._next_in = self._returned_bytes = 0

    # What the owner of the edge calls --------------------------------------------------------------------

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        views = tuple(as_bytes(buffer) for buffer in buffers)
        with self._engine.lock:
            if self.failure is not None:
                raise copy(self.failure)
            message = Outgoing(MessageHeader(self._next_out, tag, sizes_of(views), self._layout.piece_bytes), views)
            self._next_out += 1
            self._outbox.append(message)
            self._guarded(self._pump)
            self._engine.moved()
        return _Pending(self._engine, message, f"rank {self.peer} did not take the message {tag!r} for")

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        targets = as_targets(into)
        return self._post(Receive(tag, sizes_of(targets), targets))

    def lend(self, tag: str, sizes: Sequence[int]) -> Lent:
        receive = Receive(tag, tuple(sizes), None)
        with self._engine.lock:
            if not self._closed:
                self._into.reads_in_place()
        return _Lent(self._post(receive), receive, self._release)

    def close(self) -> None:
        with self._engine.lock:
            if self.failure is None:
                with suppress(OSError):
                    self._line.send(GOODBYE, socket.MSG_DONTWAIT)
                self._fail(PeerLost(f"the edge to rank {self.peer} is closed at this end"))
                self._engine.moved()
            if not self._closed:
                self._closed = True
                self._matcher.forget_arrived()
                self._segment.close()

    def abandon(self) -> None:
        """Drop an edge that nobody has opened yet; call under the engine's lock."""
        self._fail(PeerLost(f"rank {self.peer} knocked anew"))
        if not self._closed:
            self._closed = True
            self._matcher.forget_arrived()
            self._segment.close()

    @property
    def closed(self) -> bool:
        """Whether this end has let go of the memory."""
        return self._closed

    # What the engine calls ------------------------------------------------------------------------------

    def ready(self, fd: int) -> None:
        """Hear what was said over the socket: a bell needs no more than being awake."""
        del fd
        try:
            while word := self._line.recv(16, socket.MSG_DONTWAIT):
                if word == GOODBYE:
                    self._gone = PeerLost(f"rank {self.peer} has closed the edge", fix="rebuild the edge or the group")
                elif word != BELL and not self.met:
                    self.met = True
        except BlockingIOError:
            return
        except OSError:
            pass
        self._gone = self._gone or PeerLost(
            f"the process of rank {self.peer} has ended", fix="rebuild the edge or the group"
        )

    def move(self, enough: Callable[[], bool]) -> bool:
        gone = self._gone  # before the look: by the news that the peer has gone, all that it has written is there
        moved = self._guarded(lambda: self._move(enough))
        if gone is not None and self.failure is None and not self._into.has_note():
            self._fail(gone)
            moved = True
        return moved

    def rest(self) -> bool:
        """Ask the peer for a bell from now on; return whether there is news already."""
        waits = bool(self._outbox)
        if waits:
            self._out.sender_sleeps(True)
        self._into.receiver_sleeps(True)
        fence()
        return self._into.has_note() or (waits and self._out.has_return())

    # Sending --------------------------------------------------------------------------------------------

    def _pump(self) -> bool:
        """Copy into the ring what the window and the ring have room for; return whether anything moved."""
        moved = self._take_returns()
        while self._outbox and self._arena.num_extents < self._layout.num_notes:
            message = self._outbox[0]
            if self._ahead_bytes + message.next_weight() > self._layout.limit_bytes:
                break
            piece = message.put_piece(self._arena, self._out, hot=True)
            if piece is None:
                if self._receiver_keeps_up():
                    continue
                piece = message.put_piece(self._arena, self._out, hot=False)
            if piece is None:
                break
            extent, weight = piece
            self._weight_of_extent[extent] = weight
            self._ahead_bytes += weight
            moved = True
            fence()
            if self._out.must_wake_receiver():
                self._ring()
            if message.ended:
                self._outbox.popleft()
        return moved

    def _take_returns(self) -> bool:
        """Take back what the receiver has read; return whether there was any."""
        moved = False
        while (extent := self._out.returned()) is not None:
            if extent not in self._weight_of_extent:
                raise ProtocolError(f"rank {self.peer} gave back what it was not given", value=extent)
            self._ahead_bytes -= self._weight_of_extent.pop(extent)
            self._arena.give_back(extent)
            moved = True
        if moved:
            self._returned_s = time.monotonic()
        return moved

    def _receiver_keeps_up(self) -> bool:
        """Return whether a receiver that gave something back a moment ago does so again within one.

        Bytes that are still in the caches are worth that: far ahead of its receiver a sender writes to cold memory.
        """
        while time.monotonic() - self._returned_s < _MOMENT_S:
            if self._take_returns():
                return True
            os.sched_yield()
        return False

    def _ring(self) -> None:
        # A full socket has bells enough in it; a broken one is heard of by reading it.
        with suppress(OSError):
            self._line.send(BELL, socket.MSG_DONTWAIT)

    # Receiving ------------------------------------------------------------------------------------------

    def _move(self, enough: Callable[[], bool]) -> bool:
        moved = self._pump() if self._out.has_return() else False
        while (note := self._into.noted()) is not None:
            self._take(*note)
            moved = True
            if enough():
                break
        self._wake_sender(at_least_bytes=0)
        return moved

    def _take(self, offset: int, size_bytes: int, record_bytes: int) -> None:
        """Take one piece that the peer has shown."""
        data, message, head_bytes = self._into.data, self._arriving, aligned(record_bytes)
        if (message is None) != bool(record_bytes) or head_bytes > size_bytes:
            raise ProtocolError(f"rank {self.peer} showed a piece out of turn", value=(size_bytes, record_bytes))
        if message is None:
            header = decode_header(bytes(data[offset : offset + record_bytes]))
            if not isinstance(header, MessageHeader) or header.seq != self._next_in:
                raise ProtocolError(f"rank {self.peer} sent a message out of turn", valid=f"message {self._next_in}")
            self._next_in += 1
            message = self._arriving = Incoming(header, self._give_back)
            receive = self._matcher.arrive(message)
            if receive is not None:
                self._bind(message, receive)
        body_bytes = size_bytes - head_bytes
        if message.filled_bytes + body_bytes > message.starts[-1]:
            raise ProtocolError(f"rank {self.peer} sent more than its record announces", value=body_bytes)
        message.add(offset, offset + head_bytes, body_bytes, data)
        if message.whole:
            self._arriving = None
            if message.receive is not None:
                self._end(message, message.receive)
        self._wake_sender(at_least_bytes=self.window_bytes // 8)

    def _post(self, receive: Receive) -> _Pending:
        with self._engine.lock:
            message = self._matcher.post(receive)
            if message is not None:
                self._bind(message, receive)
                if message.whole:
                    self._end(message, receive)
                self._wake_sender(at_least_bytes=0)
            if self.failure is not None:
                self._forget_posted(self.failure)
        return _Pending(self._engine, receive, f"rank {self.peer} was silent over tag {receive.tag!r} for")

    def _bind(self, message: Incoming, receive: Receive) -> None:
        if not message.bind(receive, self._into.data):
            receive.end(misfit(self.peer, receive.tag, message.header.sizes, receive.sizes))

    def _end(self, message: Incoming, receive: Receive) -> None:
        if receive.targets is None and message.fits:
            receive.views = message.views(self._into.data)
            receive.lent = message
        receive.end()

    def _release(self, message: Incoming) -> None:
        with self._engine.lock:
            if not self._closed:
                message.release()
                self._wake_sender(at_least_bytes=0)

    def _give_back(self, extent: int, size_bytes: int) -> None:
        self._returned_bytes += size_bytes + MESSAGE_OVERHEAD_BYTES
        self._into.give_back(extent)

    def _wake_sender(self, *, at_least_bytes: int) -> None:
        """Wake the peer where it sleeps for room, and enough has been given back since the last time."""
        if self._returned_bytes > at_least_bytes and self.failure is None:
            self._returned_bytes = 0
            fence()
            if self._into.must_wake_sender():
                self._ring()

    # Ending ---------------------------------------------------------------------------------------------

    def _guarded(self, action: Callable[[], bool]) -> bool:
        """Return what `action` does; bytes that no honest peer writes end the edge."""
        if self.failure is not None:
            return False
        try:
            return action()
        except ProtocolError as error:
            self._fail(error)
            return True

    def _fail(self, failure: CommError) -> None:
        """End every operation; messages that came whole can still be received."""
        if self.failure is not None:
            return
        self.failure = failure
        for message in self._outbox:
            message.end(failure)
        self._outbox.clear()
        if self._arriving is not None:
            self._matcher.forget(self._arriving)
            if self._arriving.receive is not None:
                self._arriving.receive.end(failure)
        self._forget_posted(failure)
        self._engine.remove(self)
        self._line.close()

    def _forget_posted(self, failure: CommError) -> None:
        for receive in self._matcher.forget_posted():
            receive.end(failure)


@final
class _Pending(Pending):
    """A send or a receive as its owner sees it."""

    def __init__(self, engine: Engine, operation: Outgoing | Receive, silence: str) -> None:
        self._engine, self._operation, self._silence = engine, operation, silence

    def done(self) -> bool:
        return self._operation.ended or self._engine.wait_until(self._ended, 0.0)

    def wait(self, timeout_s: float) -> None:
        operation = self._operation
        if not operation.ended and not self._engine.wait_until(self._ended, timeout_s):
            raise CommTimeout(f"{self._silence} {timeout_s} s", fix="see whether it still runs")
        if operation.failure is not None:
            raise copy(operation.failure)

    def _ended(self) -> bool:
        return self._operation.ended


@final
class _Lent(Lent):
    """A message that is read in the ring."""

    def __init__(self, pending: Pending, receive: Receive, release: Callable[[Incoming], None]) -> None:
        self._pending, self._receive, self._release = pending, receive, release

    @property
    def buffers(self) -> tuple[memoryview, ...]:
        return self._receive.views

    def done(self) -> bool:
        return self._pending.done()

    def wait(self, timeout_s: float) -> None:
        self._pending.wait(timeout_s)

    def release(self) -> None:
        message, self._receive.lent, self._receive.views = self._receive.lent, None, ()
        if message is not None:
            self._release(message)
