"""One end of an edge over TCP connections: sends within credits, receives straight into the posted buffers.

Records and short messages travel on the first stream, in order; the chunks of long ones on whichever stream has room,
so that the slowest of several does not hold up the rest. Everything runs under the engine's lock. May import only
`errors`, `wire` and this folder.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from socket import socket
from typing import final

from hybrid.errors import CommError, PeerLost, ProtocolError
from hybrid.transports.arrival import ArrivalHistory
from hybrid.transports.base import Buffer, Pending, Transport, as_bytes, as_targets, sizes_of
from hybrid.transports.message import Posted, parts_of
from hybrid.transports.tcp_engine import Engine
from hybrid.transports.tcp_inbox import Inbox
from hybrid.transports.tcp_pending import TcpReceiving, TcpSending
from hybrid.transports.tcp_secret import Seal
from hybrid.transports.tcp_socket import TcpOptions
from hybrid.transports.tcp_stream import Frame, Stream
from hybrid.wire import Chunk, Credit, Goodbye, MessageHeader, decode_header, encode_header

_HEARTBEAT = Credit(0)
_MOVES_A_SEND = 2
"""System calls that a send makes itself; the rest is left to whoever waits, so that a long send returns at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What two ends have agreed on at the door."""

    peer: int
    window_bytes: int
    frame_bytes: int


@final
class TcpTransport(Transport):
    """See `Transport`. Made by `TcpNode.open`, under the engine's lock."""

    def __init__(
        self,
        engine: Engine,
        sockets: Sequence[tuple[socket, tuple[Seal, Seal] | None]],
        terms: Terms,
        options: TcpOptions,
    ) -> None:
        self.peer, self.window_bytes, self.frame_bytes = terms.peer, terms.window_bytes, terms.frame_bytes
        self.sealed = sockets[0][1] is not None
        self.failure: CommError | None = None
        self._engine, self._options = engine, options
        self._gone: CommError | None = None
        self._closing = self._released = False
        self._silences = ArrivalHistory(options.silence)
        self._spoke_s = self._heard_s = time.monotonic()
        # More than the window: credits come in quarters of it, and late.
        limit_bytes = terms.window_bytes + terms.window_bytes // 2
        self._outbox: deque[TcpSending] = deque()
        self._records: deque[bytes] = deque()
        self._next_out, self._credit_bytes = 0, limit_bytes
        self._inbox = Inbox(
            peer=terms.peer, window_bytes=terms.window_bytes, limit_bytes=limit_bytes, frame_bytes=terms.frame_bytes
        )
        self._streams = [
            Stream(engine, opened, self, index=index, seals=seals) for index, (opened, seals) in enumerate(sockets)
        ]
        engine.add_ticker(self)

    # What the owner of the edge calls --------------------------------------------------------------------

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        views = tuple(as_bytes(buffer) for buffer in buffers)
        with self._engine.lock:
            if self.failure is not None:
                raise copy(self.failure)
            header = MessageHeader(self._next_out, tag, sizes_of(views), self.frame_bytes)
            join_below_bytes = min(self._options.join_below_bytes, self.frame_bytes)
            parts = parts_of(header, views, copy_below_bytes=join_below_bytes)
            sending = TcpSending(self._engine, self.peer, tag, parts)
            self._next_out += 1
            self._outbox.append(sending)
            self._pump()
        return sending

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        posted = Posted(tag, as_targets(into))
        with self._engine.lock:
            self._inbox.post(posted)
            if self.failure is not None:
                self._inbox.fail(self.failure)
            else:
                self._pay()
            if posted.ended:
                self._engine.tell()
        return TcpReceiving(self._engine, self.peer, posted)

    def close(self) -> None:
        with self._engine.lock:
            if self.failure is None:
                self._say_goodbye()
            self._inbox.forget()
        self._engine.wait_until(self._has_left, self._options.linger_s)
        with self._engine.lock:
            self._break_off()

    def abandon(self) -> None:
        """Drop an edge that nobody has opened yet; call under the engine's lock."""
        self._fail(PeerLost(f"rank {self.peer} knocked anew"))

    # What the engine calls -------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Say that this end lives, and see whether the other does."""
        if self.failure is not None:
            return
        if now_s - self._spoke_s >= self._options.heartbeat_s and not self._records:
            self._say(_HEARTBEAT)
        silent_s = now_s - self._heard_s
        if silent_s > self._silences.timeout_s:
            what = f"rank {self.peer} was silent for {silent_s:.1f} s, heartbeats included"
            self._fail(PeerLost(what, fix="rebuild the edge or the group"))

    # What the streams call -------------------------------------------------------------------------------

    def next_frame(self, stream: Stream) -> Frame | None:
        if stream.index == 0 and self._records:
            return Frame(self._records.popleft())
        sending = self._outbox[0] if self._outbox else None
        if sending is None or (stream.index and sending.is_new):
            return None
        assert sending.next_part is not None
        if sending.next_part.weight > self._credit_bytes:
            return None
        part = sending.take()
        self._credit_bytes -= part.weight
        if sending.next_part is None:
            self._outbox.popleft()
        return Frame(part.head, part.payload, sending)

    def written(self, frame: Frame) -> None:
        self._spoke_s = time.monotonic()
        if isinstance(frame.sending, TcpSending) and frame.sending.written():
            self._engine.tell()

    def place_of(self, stream: Stream, record: bytes, size_bytes: int) -> memoryview | None:
        self._hear()
        match decode_header(record):
            case MessageHeader() as header if stream.index == 0:
                place: memoryview | None = self._inbox.begin(0, header, size_bytes)
                self._look_again(header)
                return place
            case Chunk(seq, offset):
                place = self._inbox.continue_(stream.index, seq, offset, size_bytes)
                self._pay()
                return place
            case Credit(credited) if stream.index == 0 and not size_bytes:
                self._credit_bytes += credited
                if credited:
                    self._pump()
            case Goodbye() if stream.index == 0 and not size_bytes:
                self._gone = PeerLost(f"rank {self.peer} has closed the edge", fix="rebuild the edge or the group")
            case other:
                raise ProtocolError(f"rank {self.peer} sent a {type(other).__name__} that has no place here")
        return memoryview(b"")

    def arrived(self, stream: Stream) -> None:
        if self._inbox.arrived(stream.index):
            self._engine.tell()

    def broken(self, stream: Stream, failure: ProtocolError | None) -> None:
        stream.break_off()
        if failure is not None:
            self._fail(failure)
        elif self._closing:
            self._engine.tell()
        elif self._gone is None:
            self._fail(PeerLost(f"the connection to rank {self.peer} has ended", fix="rebuild the edge or the group"))
        elif all(other.ended or other.parked for other in self._streams):
            self._fail(self._gone)

    def settle(self) -> None:
        if self.failure is None or self._released:
            return
        for stream in self._streams:
            # One that is in a system call may yet learn that the kernel has taken all.
            if stream.ended and not stream.writing and stream.frame is not None:
                self._fail_frame(stream.frame, self.failure)
        if any(stream.reading for stream in self._streams):
            return
        self._inbox.end_arriving(self.failure)
        if self._closing:
            for stream in self._streams:
                if stream.idle and not (stream.index == 0 and self._records):
                    stream.end_writing()
        if (self._has_left() or not self._closing) and not any(stream.writing for stream in self._streams):
            self._released = True
            for stream in self._streams:
                stream.close()

    # Sending and receiving -------------------------------------------------------------------------------

    def _pump(self) -> None:
        for stream in self._streams:
            stream.write(_MOVES_A_SEND)

    def _say(self, record: Credit | Goodbye) -> None:
        self._records.append(encode_header(record))
        self._streams[0].write(_MOVES_A_SEND)

    def _pay(self) -> None:
        owed_bytes = self._inbox.take_owed()
        if owed_bytes:
            self._say(Credit(owed_bytes))

    def _hear(self) -> None:
        """Take note that the peer lives, and of how long it was silent where that is worth remembering."""
        now_s = time.monotonic()
        if now_s - self._heard_s > self._options.heartbeat_s / 2:
            self._silences.observe(now_s - self._heard_s)
        self._heard_s = now_s

    def _look_again(self, header: MessageHeader) -> None:
        """Go on after a header: empty messages end with it, and chunks of it may have come before it."""
        self._pay()
        if not sum(header.sizes):
            self._engine.tell()
        for stream in self._streams[1:]:
            stream.go_on()

    # Ending ----------------------------------------------------------------------------------------------

    def _say_goodbye(self) -> None:
        """End every operation; what the streams have begun to write is written, then a goodbye."""
        self.failure = PeerLost(f"the edge to rank {self.peer} is closed at this end")
        self._closing = True
        self._engine.remove_ticker(self)
        for sending in self._outbox:
            sending.fail(self.failure, at_once=False)
        self._outbox.clear()
        self._inbox.fail(self.failure)
        for stream in self._streams:
            stream.turn_deaf()
        self._say(Goodbye())
        self.settle()
        self._engine.tell()

    def _fail(self, failure: CommError) -> None:
        """End every operation and the connections; messages that came whole can still be received."""
        if self.failure is None:
            self.failure = failure
            self._inbox.fail(failure)
            self._break_off()

    def _break_off(self) -> None:
        assert self.failure is not None
        self._engine.remove_ticker(self)
        for stream in self._streams:
            stream.break_off()
        for sending in self._outbox:
            sending.fail(self.failure, at_once=True)
        self._outbox.clear()
        self.settle()
        self._engine.tell()

    def _fail_frame(self, frame: Frame, failure: CommError) -> None:
        if isinstance(frame.sending, TcpSending) and not frame.sending.ended:
            frame.sending.fail(failure, at_once=True)
            self._engine.tell()

    def _has_left(self) -> bool:
        return all(stream.ended for stream in self._streams)
