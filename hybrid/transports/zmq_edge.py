"""One end of an edge over a ZeroMQ PAIR socket: sends within credits, receives into the posted buffers.

Everything that touches the socket runs under the engine's lock and never blocks. May import only `errors`, `wire`,
zmq and this folder.
"""

from __future__ import annotations

import contextlib
import hmac
import time
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from typing import final

import zmq

from hybrid.errors import CommError, PeerLost, ProtocolError
from hybrid.transports.base import (
    MESSAGE_OVERHEAD_BYTES,
    MIN_WINDOW_BYTES,
    Buffer,
    Pending,
    Transport,
    as_bytes,
    as_targets,
    misfit,
    sizes_of,
)
from hybrid.transports.matching import Matcher
from hybrid.transports.message import Arriving, Posted, parts_of
from hybrid.transports.zmq_engine import Engine
from hybrid.transports.zmq_pending import NOW, NOW_AND_MORE, TRACKER_SLICE_S, ZmqReceiving, ZmqSending
from hybrid.transports.zmq_socket import Monitor, Socket, ZmqOptions, fd_of
from hybrid.wire import Attach, Chunk, Credit, Goodbye, MessageHeader, decode_header, encode_header

_RCVMORE = int(zmq.RCVMORE)
_FAREWELL = bytes(16 << 10)
"""Rides along with a goodbye. Twice libzmq's write buffer: so long a frame is let go of only when the kernel has it."""


@final
class ZmqTransport(Transport):
    """See `Transport`. Made by `ZmqNode.open`.

    `dial` is where the accepting end listens, and None at that end. The dialing end says the edge's secret
    first and the accepting end says it back; then both are `met`.
    """

    def __init__(
        self, engine: Engine, socket: Socket, *, peer: int, secret: bytes, options: ZmqOptions, dial: str | None = None
    ) -> None:
        self.peer, self.window_bytes = peer, options.window_bytes
        self.met = False
        self.failure: CommError | None = None
        self._engine, self._socket, self._monitor = engine, socket, Monitor(socket)
        self._secret, self._options, self._dialing = secret, options, dial is not None
        self._connection_fd: int | None = None
        self._gone: CommError | None = None
        # Both true: a ZeroMQ socket signals news only after a look has found none.
        self._readable = self._monitor_readable = True
        self._frame_bytes = self._copy_below_bytes = 0
        # Sending.
        self._outbox: deque[ZmqSending] = deque()
        self._next_out = self._credit_bytes = 0
        # Receiving. `_held_bytes` waits for receives, `_owed_bytes` is taken but not yet credited.
        self._matcher: Matcher[Arriving, Posted] = Matcher()
        self._arriving: Arriving | None = None
        self._next_in = self._held_bytes = self._owed_bytes = 0
        self.fds: tuple[int, ...] = (fd_of(socket), self._monitor.fd)
        if dial is not None:
            socket.connect(dial)
            self._say(Attach(secret, options.window_bytes))

    # What the owner of the edge calls --------------------------------------------------------------------

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        views = tuple(as_bytes(buffer) for buffer in buffers)
        with self._engine.lock:
            if self.failure is not None:
                raise copy(self.failure)
            header = MessageHeader(self._next_out, tag, sizes_of(views), self._frame_bytes)
            sending = ZmqSending(
                self._engine, self.peer, tag, parts_of(header, views, copy_below_bytes=self._copy_below_bytes)
            )
            self._next_out += 1
            self._outbox.append(sending)
            self._pump()
            self._engine.moved()
        return sending

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        posted = Posted(tag, as_targets(into))
        with self._engine.lock:
            message = self._matcher.post(posted)
            if message is not None:
                self._bind(message, posted)
                self._owe(message.weight)
                if message.whole:
                    posted.end()
                self._engine.moved()
            if self.failure is not None:
                self._forget_posted(self.failure)
        return ZmqReceiving(self._engine, self.peer, posted)

    def close(self) -> None:
        farewell = None
        with self._engine.lock:
            if self.failure is None:
                farewell = self._say_goodbye()
                failure = PeerLost(f"the edge to rank {self.peer} is closed at this end")
                self._fail(failure, keep_socket=farewell is not None)
            self._matcher.forget_arrived()
        if farewell is None:
            return
        # Until the kernel has what was sent: the rest would be dropped, and its buffers are read in place.
        deadline_s = time.monotonic() + self._options.linger_s
        while not farewell.done and time.monotonic() < deadline_s:
            with contextlib.suppress(zmq.NotDone):
                farewell.wait(TRACKER_SLICE_S)
            with self._engine.lock:
                if self._connection_has_ended():
                    break
        with self._engine.lock:
            self._release_socket()

    def abandon(self) -> None:
        """Drop an edge that nobody has opened yet; call under the engine's lock."""
        self._fail(PeerLost(f"rank {self.peer} knocked anew"))

    # What the engine calls ------------------------------------------------------------------------------

    def ready(self, fd: int) -> None:
        if fd == self.fds[0]:
            self._readable = True
        else:
            self._monitor_readable = True

    def move(self, enough: Callable[[], bool]) -> bool:
        moved = False
        # Before the loop: by the news that a connection has ended, all that was read from it is there.
        self._look_at_monitor()
        while self._readable:
            try:
                moved = self._take_one() or moved
            except ProtocolError as error:
                self._fail(error)
                moved = True
            if self._readable and enough():
                return True
        if self._gone is not None and self.failure is None:
            self._fail(self._gone)
            moved = True
        return moved

    # Sending --------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Hand ZeroMQ what the credits allow."""
        while self._outbox:
            sending = self._outbox[0]
            if sending.next_part is not None:
                weight = sending.next_part.weight
                if weight > self._credit_bytes:
                    return
                self._readable = True  # sending may swallow the signal that something has come in
                if not sending.hand_over(self._socket):
                    self._gone = self._gone or self._lost()
                    return
                self._credit_bytes -= weight
            if sending.next_part is None:
                self._outbox.popleft()

    def _say(self, record: Attach | Credit) -> None:
        try:
            self._socket.send(encode_header(record), NOW)
        except zmq.Again:
            self._gone = self._gone or self._lost()
        self._readable = True

    def _say_goodbye(self) -> zmq.MessageTracker | None:
        """Send the last word; return what tells when the kernel has it, or None where nobody listens."""
        if not self.met or self._gone is not None:
            return None
        try:
            self._socket.send(encode_header(Goodbye()), NOW_AND_MORE)
            return self._socket.send(_FAREWELL, NOW, copy=False, track=True)
        except zmq.Again:
            return None

    # Receiving ------------------------------------------------------------------------------------------

    def _take_one(self) -> bool:
        """Take one ZeroMQ message; return whether there was one."""
        try:
            if not self.met:
                self._meet(self._socket.recv(NOW, copy=False))
                return True
            record = decode_header(self._socket.recv(NOW))
        except zmq.Again:
            self._readable = False
            return False
        more = bool(self._socket.get(_RCVMORE))
        match record:
            case MessageHeader():
                self._begin(record, more)
            case Chunk():
                message = self._arriving
                if message is None or (record.seq, record.offset) != (message.header.seq, message.filled_bytes):
                    raise ProtocolError(f"rank {self.peer} sent a chunk out of turn", value=(record.seq, record.offset))
                if not more:
                    raise ProtocolError(f"rank {self.peer} sent a chunk without a payload")
                self._take_payload(message, message.frame_bytes_at(message.filled_bytes), 0)
            case Credit() if not more:
                self._credit_bytes += record.size_bytes
                self._pump()
            case Goodbye():
                if more:
                    self._socket.recv(NOW)
                self._gone = PeerLost(f"rank {self.peer} has closed the edge", fix="rebuild the edge or the group")
            case _:
                raise ProtocolError(f"rank {self.peer} sent a {type(record).__name__} that has no place here")
        # A frame too many is taken for a record next, and is none.
        return True

    def _meet(self, frame: zmq.Frame) -> None:
        """Check the first word on the edge, and answer it."""
        record = decode_header(frame.bytes)
        if not isinstance(record, Attach) or not hmac.compare_digest(record.secret, self._secret):
            raise ProtocolError("a stranger spoke first on the edge", value=frame.get("Peer-Address"))
        if record.window_bytes < MIN_WINDOW_BYTES:
            raise ProtocolError(f"rank {self.peer} has too small a window", value=record.window_bytes)
        self.window_bytes = min(record.window_bytes, self._options.window_bytes)
        self._frame_bytes = min(self._options.frame_bytes, self.window_bytes // 4)
        self._copy_below_bytes = min(self._options.copy_below_bytes, self._frame_bytes)
        self._credit_bytes = self._limit_bytes
        if not self._dialing:
            # Other connections may come and go on this listener; only this one is the peer's.
            self._connection_fd = frame.get(zmq.SRCFD)
            if self._connection_fd in set(self._monitor.lost_fds()):
                self._gone = self._lost()
            self._say(Attach(self._secret, self._options.window_bytes))
        self.met = True

    def _begin(self, header: MessageHeader, more: bool) -> None:
        if self._arriving is not None or header.seq != self._next_in:
            raise ProtocolError(
                f"rank {self.peer} sent a message out of turn", value=header.seq, valid=f"message {self._next_in}"
            )
        self._next_in += 1
        message = Arriving(header)
        receive = self._matcher.arrive(message)
        if receive is not None:
            self._bind(message, receive)
        self._arriving = message
        if more and not 0 < message.size_bytes <= header.frame_bytes:
            raise ProtocolError(f"rank {self.peer} sent a payload that its header does not announce")
        self._take_payload(message, message.size_bytes if more else 0, MESSAGE_OVERHEAD_BYTES)

    def _take_payload(self, message: Arriving, size_bytes: int, overhead_bytes: int) -> None:
        if size_bytes:
            place = message.place_for(message.filled_bytes, size_bytes)
            if place is not None:
                got = self._socket.recv_into(place, flags=NOW)
            elif size_bytes <= self._options.copy_below_bytes:
                # Small frames share ZeroMQ's read buffer: held as they are, each would keep all of it.
                small = self._socket.recv(NOW)
                got = len(small)
                message.put(message.filled_bytes, small)
            else:
                large = self._socket.recv(NOW, copy=False)
                got = len(large)
                message.put(message.filled_bytes, large.buffer)
            if got != size_bytes:
                raise ProtocolError(
                    f"rank {self.peer} sent a frame of the wrong length", value=got, valid=str(size_bytes)
                )
        message.filled_bytes += size_bytes
        weight = size_bytes + overhead_bytes
        if message.receive is None:
            message.weight += weight
            self._held_bytes += weight
            if self._held_bytes + self._owed_bytes > self._limit_bytes:
                raise ProtocolError(f"rank {self.peer} sent beyond the window", value=self._held_bytes)
        else:
            self._held_bytes += weight
            self._owe(weight)
        if message.whole:
            self._arriving = None
            if message.receive is not None:
                message.receive.end()

    def _bind(self, message: Arriving, receive: Posted) -> None:
        if not message.bind(receive):
            receive.end(misfit(self.peer, receive.tag, message.header.sizes, sizes_of(receive.targets)))

    def _owe(self, weight: int) -> None:
        """Count held bytes as taken, and credit the peer in large pieces."""
        self._held_bytes -= weight
        self._owed_bytes += weight
        if self._owed_bytes >= self.window_bytes // 4 and self.failure is None:
            self._say(Credit(self._owed_bytes))
            self._owed_bytes = 0

    @property
    def _limit_bytes(self) -> int:
        """What a sender may have under way: more than the window, since credits come in quarters of it, and late."""
        return self.window_bytes + self.window_bytes // 2

    # Ending ---------------------------------------------------------------------------------------------

    def _look_at_monitor(self) -> None:
        if self._monitor_readable and self.failure is None:
            self._monitor_readable = False
            if self._connection_has_ended():
                self._gone = self._gone or self._lost()
                self._readable = True

    def _connection_has_ended(self) -> bool:
        # At the accepting end strangers come and go too; at the dialing end there is one connection.
        return any(self._dialing or fd == self._connection_fd for fd in tuple(self._monitor.lost_fds()))

    def _lost(self) -> PeerLost:
        return PeerLost(f"the connection to rank {self.peer} has ended", fix="rebuild the edge or the group")

    def _fail(self, failure: CommError, *, keep_socket: bool = False) -> None:
        """End every operation; messages that came whole can still be received."""
        if self.failure is not None:
            return
        self.failure = failure
        # What ZeroMQ has taken whole is sent: its wait ends well once its buffers are let go of.
        for sending in self._outbox:
            sending.failure = failure
        self._outbox.clear()
        if self._arriving is not None:
            self._matcher.forget(self._arriving)
            if self._arriving.receive is not None:
                self._arriving.receive.end(failure)
        self._forget_posted(failure)
        self._engine.remove(self)
        if not keep_socket:
            self._release_socket()

    def _forget_posted(self, failure: CommError) -> None:
        for receive in self._matcher.forget_posted():
            receive.end(failure)

    def _release_socket(self) -> None:
        self._readable = False
        if not self._socket.closed:
            self._monitor.close()
            self._socket.close()
