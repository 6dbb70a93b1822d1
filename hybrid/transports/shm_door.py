"""The door of a shared-memory node: an abstract Unix socket where peers knock, and strangers are refused.

Who says the job's token gets the descriptor of the edge's memory; the socket of the knock becomes the edge's.
May import only `errors`, `host_memory`, `wire` and this folder.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import final

from hybrid.errors import MachineError, ProtocolError
from hybrid.host_memory import host_word
from hybrid.transports.base import MIN_WINDOW_BYTES
from hybrid.transports.shm_edge import ShmTransport
from hybrid.transports.shm_segment import Layout, create_segment
from hybrid.transports.zmq_engine import Engine
from hybrid.wire import PROTOCOL_VERSION, Attach, Hello, Refusal, decode_header, encode_header

_LOG = logging.getLogger(__name__)
MEDIUM = "shm://"
MAX_RECORD_BYTES = 4096
_MAX_CALLERS = 32
"""Who has connected and said nothing yet; the oldest beyond that is sent away."""


def uid_of(line: socket.socket) -> int:
    """Return the user at the other end, by the kernel's word."""
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


@final
class Door:
    """Where peers knock: refuses strangers, and makes an edge's memory for each peer that it welcomes."""

    def __init__(self, engine: Engine, rank: int, token: bytes, window_bytes: int) -> None:
        self.refused: deque[str] = deque(maxlen=16)
        self.edges_of_rank: dict[int, ShmTransport] = {}
        """Edges that a peer has dialed and this rank has not opened yet."""
        self._engine, self._rank, self._token, self._window_bytes = engine, rank, token, window_bytes
        self._callers: deque[_Caller] = deque()
        name = f"hybrid-shm-{secrets.token_hex(16)}"
        self.address = f"{MEDIUM}{host_word().hex()}/{name}"
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
            if uid_of(line) != os.getuid():
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

    def __init__(self, door: Door, line: socket.socket) -> None:
        self.fds: tuple[int, ...] = (line.fileno(),)
        self._door, self._line, self._frames = door, line, list[bytes]()
        self._readable = True

    def ready(self, fd: int) -> None:
        self._readable = True

    def move(self, enough: Callable[[], bool]) -> bool:
        del enough
        while self._readable:
            try:
                frame = self._line.recv(MAX_RECORD_BYTES)
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
