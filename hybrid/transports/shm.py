"""The shared-memory transport: ranks are processes of one host and one user.

A node has one door (an abstract Unix socket: no file). The lower rank knocks with the job's token; the higher rank's
door answers with the descriptor of the edge's memory, and the socket of the knock stays: it tells that a peer has gone.
Linux only. May import only `errors`, `wire` and this folder.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import final

from hybrid.errors import CommTimeout, PeerLost, ProtocolError
from hybrid.host_memory import check_memory, host_word
from hybrid.transports.base import DEFAULT_WINDOW_BYTES, MIN_WINDOW_BYTES, Transport, TransportNode
from hybrid.transports.shm_door import MAX_RECORD_BYTES, MEDIUM, Door, uid_of
from hybrid.transports.shm_edge import ShmTransport
from hybrid.transports.shm_segment import Layout
from hybrid.transports.zmq_engine import Engine
from hybrid.wire import PROTOCOL_VERSION, Attach, Hello, Refusal, decode_header, encode_header

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
        self._door = Door(self._engine, rank, token, window_bytes)
        self.address = self._door.address
        with self._engine.lock:
            self._engine.add(self._door)

    @property
    def refused(self) -> tuple[str, ...]:
        return tuple(self._door.refused)

    def open(self, peer: int, address: str, *, timeout_s: float) -> Transport:
        assert peer != self.rank, "an edge joins two ranks"
        deadline_s = time.monotonic() + timeout_s
        if address.startswith(MEDIUM) and not address.startswith(f"{MEDIUM}{host_word().hex()}/"):
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
        if uid_of(line) == os.getuid():
            return line
    except OSError:
        pass
    line.close()
    return None


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
            frame, fds, _, _ = socket.recv_fds(self._line, MAX_RECORD_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
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
