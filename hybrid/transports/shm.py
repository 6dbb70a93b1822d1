"""The shared-memory transport: ranks are processes of one host and one user.

A node has one door (an abstract Unix socket: no file). The lower rank knocks with the job's token; the higher rank's
door answers with the descriptor of the edge's memory, and the socket of the knock stays: it tells that a peer has gone.
Linux only. May import only `errors`, `wire` and this folder.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import final

from hybrid.errors import CommTimeout, MachineError, PeerLost, ProtocolError
from hybrid.host_memory import check_memory, host_word
from hybrid.transports.base import DEFAULT_WINDOW_BYTES, MIN_WINDOW_BYTES, Transport, TransportNode
from hybrid.transports.shm_edge import ShmTransport
from hybrid.transports.shm_segment import Layout, create_segment
from hybrid.transports.zmq_engine import Engine
from hybrid.wire import PROTOCOL_VERSION, Attach, Hello, Refusal, decode_header, encode_header

_LOG = logging.getLogger(__name__)
_MEDIUM = "shm://"
_MAX_RECORD_BYTES = 4096
_MAX_CALLERS = 32
"""Who has connected and said nothing yet; the oldest beyond that is sent away."""
_RETRY_S = 0.02
SPIN_S = 150e-6
"""A wake-up across cores costs 30 µs, and the next piece of a long message comes after 100: one looks that long."""


def open_shm_node(
    rank: int, *, host: str = "", port: int = 0, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES
) -> ShmNode:
    """Return a node for ranks of this host and this user; `host` and `port` are not used."""
    del host, port
    return ShmNode(rank, token=token, window_bytes=window_bytes)


@final
class ShmNode(TransportNode):
    """See `TransportNode`. Any thread may call any method."""

    def __init__(self, rank: int, *, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES) -> None:
        assert window_bytes >= MIN_WINDOW_BYTES, f"window_bytes is at least {MIN_WINDOW_BYTES}"
        self.rank, self._token, self._window_bytes = rank, token, window_bytes
        self._engine = Engine(spin_s=SPIN_S)
        self._edges: list[ShmTransport] = []
        self._closed = False
        self._door = _Door(self._engine, rank, token, window_bytes)
        self.address = self._door.address
        with self._engine.lock:
            self._engine.add(self._door)

    @property
    def refused(self) -> tuple[str, ...]:
        return tuple(self._door.refused)

    def open(self, peer: int, address: str, *, timeout_s: float) -> Transport:
        assert peer != self.rank, "an edge joins two ranks"
        deadline_s = time.monotonic() + timeout_s
        if address.startswith(_MEDIUM) and not address.startswith(f"{_MEDIUM}{host_word().hex()}/"):
            raise ProtocolError(
                f"rank {peer} is on another host: shm joins ranks of one host",
                value=address,
                fix="place the ranks on one host, or use the zmq transport",
            )
        edge = self._dial(peer, address, deadline_s) if self.rank < peer else self._await(peer, deadline_s)
        with self._engine.lock:
            if self._closed:
                if edge is not None:
                    edge.abandon()
                raise PeerLost(f"this node was closed before rank {peer} came")
            if edge is not None:
                self._edges = [*(kept for kept in self._edges if not kept.closed), edge]
                return edge
        strangers = f"; refused here: {'; '.join(self.refused)}" if self.refused else ""
        raise CommTimeout(
            f"rank {peer} at {address} did not come within {timeout_s} s{strangers}",
            fix="see whether it started, and on this host: shm joins ranks of one host",
        )

    def close(self) -> None:
        with self._engine.lock:
            if self._closed:
                return
            self._closed = True
            edges, self._edges = [*self._edges, *self._door.edges_of_rank.values()], []
            self._door.close()
        for edge in edges:
            edge.close()
        self._engine.close()

    def _await(self, peer: int, deadline_s: float) -> ShmTransport | None:
        """Return the edge that `peer` dials, once it has."""
        edges = self._door.edges_of_rank
        self._engine.wait_until(lambda: peer in edges and edges[peer].met, deadline_s - time.monotonic())
        with self._engine.lock:
            return edges.pop(peer) if peer in edges and edges[peer].met else None

    def _dial(self, peer: int, address: str, deadline_s: float) -> ShmTransport | None:
        """Knock at the peer's door until it is answered."""
        while not self._closed:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                return None
            line = _connect(address)
            if line is None:
                # Nobody listens there yet, or too many knock: come again, and serve the own door meanwhile.
                self._engine.wait_until(lambda: self._closed, min(_RETRY_S, remaining_s))
                continue
            edge = self._knock(line, peer, address, deadline_s)
            if edge is not None:
                return edge
        return None

    def _knock(self, line: socket.socket, peer: int, address: str, deadline_s: float) -> ShmTransport | None:
        knock = _Knock(line)
        hello = Hello(PROTOCOL_VERSION, self.rank, peer, self._token)
        with self._engine.lock:
            self._engine.add(knock)
        try:
            knock.say(encode_header(hello), encode_header(Attach(b"", self._window_bytes)))
            self._engine.wait_until(lambda: knock.answered, deadline_s - time.monotonic())
            with self._engine.lock:
                self._engine.remove(knock)
                return self._answered(knock, peer, address)
        finally:
            knock.close()

    def _answered(self, knock: _Knock, peer: int, address: str) -> ShmTransport | None:
        """Return the edge that the answer opens; called under the engine's lock."""
        if isinstance(knock.answer, Refusal):
            raise ProtocolError(
                f"rank {peer} at {address} refuses: {knock.answer.reason}",
                fix="start every rank from the same job and release",
            )
        if not isinstance(knock.answer, Attach) or knock.memory_fd is None or self._closed:
            return None
        if not MIN_WINDOW_BYTES <= knock.answer.window_bytes <= self._window_bytes:
            raise ProtocolError(f"rank {peer} answers with another window", value=knock.answer.window_bytes)
        layout = Layout(knock.answer.window_bytes)
        check_memory(knock.memory_fd, layout.size_bytes)
        line = knock.keep_line()
        edge = ShmTransport(self._engine, line, knock.memory_fd, layout, rank=self.rank, peer=peer)
        edge.met = True
        with suppress(OSError):
            line.send(encode_header(Attach(b"", layout.window_bytes)))
        self._engine.add_resting(edge)
        return edge


def _connect(address: str) -> socket.socket | None:
    """Return a line to the door at `address`, or None where none of this user's listens."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.setblocking(False)
    try:
        line.connect("\0" + address.rpartition("/")[2])
        if _uid_of(line) == os.getuid():
            return line
    except OSError:
        pass
    line.close()
    return None


def _uid_of(line: socket.socket) -> int:
    """Return the user at the other end, by the kernel's word."""
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


@final
class _Door:
    """Where peers knock: refuses strangers, and makes an edge's memory for each peer that it welcomes."""

    def __init__(self, engine: Engine, rank: int, token: bytes, window_bytes: int) -> None:
        self.refused: deque[str] = deque(maxlen=16)
        self.edges_of_rank: dict[int, ShmTransport] = {}
        """Edges that a peer has dialed and this rank has not opened yet."""
        self._engine, self._rank, self._token, self._window_bytes = engine, rank, token, window_bytes
        self._callers: deque[_Caller] = deque()
        name = f"hybrid-shm-{secrets.token_hex(16)}"
        self.address = f"{_MEDIUM}{host_word().hex()}/{name}"
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listener.setblocking(False)
            self._listener.bind("\0" + name)
            self._listener.listen(128)
        except OSError as error:
            raise MachineError(f"cannot listen on this host: {error.strerror}", value=name) from None
        self.fds: tuple[int, ...] = (self._listener.fileno(),)
        self._readable = True

    def ready(self, fd: int) -> None:
        self._readable = True

    def move(self, enough: Callable[[], bool]) -> bool:
        del enough
        if not self._readable:
            return False
        self._readable = False
        moved = False
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return moved
            moved = True
            line.setblocking(False)
            if _uid_of(line) != os.getuid():
                line.close()
                self._refuse("a process of another user")
                continue
            if len(self._callers) == _MAX_CALLERS:
                self._callers[0].leave()
            caller = _Caller(self, line)
            self._callers.append(caller)
            self._engine.add(caller)

    def welcome(self, caller: _Caller, frames: list[bytes]) -> None:
        """Answer who has said all that a peer says."""
        line = caller.leave(keep_line=True)
        try:
            edge = self._open_edge(line, frames)
        except (ProtocolError, MachineError) as refusal:
            self._refuse(refusal.fact)
            with suppress(OSError):
                line.send(encode_header(Refusal(refusal.fact)))
            line.close()
            return
        earlier = self.edges_of_rank.pop(edge.peer, None)
        if earlier is not None:
            earlier.abandon()
        self.edges_of_rank[edge.peer] = edge

    def forget(self, caller: _Caller) -> None:
        """Strike a caller from the list."""
        self._callers.remove(caller)
        self._engine.remove(caller)

    def close(self) -> None:
        """Stop listening; call under the engine's lock."""
        self._engine.remove(self)
        while self._callers:
            self._callers[0].leave()
        self._readable = False
        self._listener.close()

    def _refuse(self, reason: str) -> None:
        self.refused.append(reason)
        _LOG.warning("rank %d refused who knocked: %s", self._rank, reason)

    def _open_edge(self, line: socket.socket, frames: list[bytes]) -> ShmTransport:
        hello, attach = (decode_header(frame) for frame in frames)
        if not isinstance(hello, Hello) or not isinstance(attach, Attach):
            raise ProtocolError(f"a {type(hello).__name__} where a Hello belongs")
        if hello.version != PROTOCOL_VERSION:
            raise ProtocolError(f"protocol version {hello.version} where {PROTOCOL_VERSION} is spoken")
        if not hmac.compare_digest(hello.token, self._token):
            raise ProtocolError("another job's token")
        if hello.to_rank != self._rank or hello.rank >= self._rank:
            raise ProtocolError(f"rank {hello.rank} asks for rank {hello.to_rank} and this is rank {self._rank}")
        if attach.window_bytes < MIN_WINDOW_BYTES:
            raise ProtocolError(f"rank {hello.rank} has too small a window")
        layout = Layout(min(attach.window_bytes, self._window_bytes))
        fd = create_segment(layout)
        try:
            edge = ShmTransport(self._engine, line, fd, layout, rank=self._rank, peer=hello.rank)
            with suppress(OSError):  # a caller who has left is heard of by reading the line
                socket.send_fds(line, [encode_header(Attach(b"", layout.window_bytes))], [fd])
        finally:
            os.close(fd)
        self._engine.add_resting(edge)
        return edge


@final
class _Caller:
    """Who has connected to the door and has not said all yet."""

    def __init__(self, door: _Door, line: socket.socket) -> None:
        self.fds: tuple[int, ...] = (line.fileno(),)
        self._door, self._line, self._frames = door, line, list[bytes]()
        self._readable = True

    def ready(self, fd: int) -> None:
        self._readable = True

    def move(self, enough: Callable[[], bool]) -> bool:
        del enough
        while self._readable:
            try:
                frame = self._line.recv(_MAX_RECORD_BYTES)
            except BlockingIOError:
                self._readable = False
                return False
            except OSError:
                frame = b""
            if not frame:
                self.leave()
                return True
            self._frames.append(frame)
            if len(self._frames) == 2:
                self._door.welcome(self, self._frames)
                return True
        return False

    def leave(self, *, keep_line: bool = False) -> socket.socket:
        """Go from the door; return the line, closed unless it is kept."""
        self._readable = False
        self._door.forget(self)
        if not keep_line:
            self._line.close()
        return self._line


@final
class _Knock:
    """One question at a peer's door."""

    def __init__(self, line: socket.socket) -> None:
        self.answer: object = None
        self.answered = False
        self.memory_fd: int | None = None
        self.fds: tuple[int, ...] = (line.fileno(),)
        self._line: socket.socket | None = line

    def say(self, *frames: bytes) -> None:
        """Say who knocks; where nobody hears it any more, the line tells."""
        assert self._line is not None
        with suppress(OSError):
            for frame in frames:
                self._line.send(frame)

    def ready(self, fd: int) -> None:
        """Nothing to note: there is one answer to come."""

    def move(self, enough: Callable[[], bool]) -> bool:
        del enough
        if self.answered or self._line is None:
            return False
        try:
            frame, fds, _, _ = socket.recv_fds(self._line, _MAX_RECORD_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError:
            frame, fds = b"", []
        self.answered = True
        self.memory_fd = fds[0] if fds else None
        if frame:
            try:
                self.answer = decode_header(frame)
            except ProtocolError as error:
                self.answer = Refusal(error.fact)
        return True

    def keep_line(self) -> socket.socket:
        """Return the line, which the edge goes on with."""
        line, self._line = self._line, None
        assert line is not None
        return line

    def close(self) -> None:
        """Let go of what nobody has kept."""
        if self._line is not None:
            self._line.close()
        if self.memory_fd is not None:
            os.close(self.memory_fd)
