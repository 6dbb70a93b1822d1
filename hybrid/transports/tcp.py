"""The TCP transport: ranks are processes of any hosts; plain sockets, read straight into the posted buffers.

The lower rank dials. Both ends prove that they know the job's token, which never travels; what leaves the host is
encrypted, always (`tcp_talk`, `tcp_secret`). May import only `errors`, `wire` and this folder.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from typing import final

from hybrid.errors import CommTimeout, PeerLost, ProtocolError
from hybrid.transports.base import DEFAULT_WINDOW_BYTES, Transport, TransportNode
from hybrid.transports.tcp_door import Door, build_edge
from hybrid.transports.tcp_edge import TcpTransport
from hybrid.transports.tcp_engine import Engine
from hybrid.transports.tcp_socket import TcpOptions, make_lively, parse_address, stays_on_host
from hybrid.transports.tcp_talk import LENGTH_BYTES, Bond, Dialing, length_of

_PAUSE_S = 0.05
"""Between two attempts to reach a peer that does not listen yet."""


def open_tcp_node(
    rank: int, *, host: str = "127.0.0.1", port: int = 0, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES
) -> TcpNode:
    """Return a node that listens on `host`; edges to other hosts are encrypted, those inside one are not."""
    return TcpNode(rank, TcpOptions(host=host, port=port, token=token, window_bytes=window_bytes))


def open_sealed_tcp_node(
    rank: int, *, host: str = "127.0.0.1", port: int = 0, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES
) -> TcpNode:
    """Return a node whose every edge is encrypted, also inside one host."""
    return TcpNode(rank, TcpOptions(host=host, port=port, token=token, window_bytes=window_bytes, must_seal=True))


@final
class TcpNode(TransportNode):
    """See `TransportNode`. Any thread may call any method."""

    def __init__(self, rank: int, options: TcpOptions) -> None:
        self.rank, self._options = rank, options
        self._engine = Engine(f"tcp-{rank}", tick_s=min(options.heartbeat_s, options.handshake_s) / 2)
        self._closed = threading.Event()
        self._edges: list[TcpTransport] = []
        self._dialing: set[socket.socket] = set()
        try:
            self._door = Door(self._engine, rank, options)
        except BaseException:
            self._engine.close()
            raise
        self.address = self._door.address
        with self._engine.lock:
            self._door.open()

    @property
    def refused(self) -> tuple[str, ...]:
        return tuple(self._door.refused)

    def open(self, peer: int, address: str, *, timeout_s: float) -> Transport:
        assert peer != self.rank, "an edge joins two ranks"
        deadline_s = time.monotonic() + timeout_s
        edge = self._dial(peer, address, deadline_s) if self.rank < peer else self._await(peer, deadline_s)
        if edge is None and self._closed.is_set():
            raise PeerLost(f"this node was closed before rank {peer} came")
        if edge is None:
            refused = self.refused
            strangers = f"; refused here: {'; '.join(refused)}" if refused else ""
            raise CommTimeout(
                f"rank {peer} at {address} did not come within {timeout_s} s{strangers}", fix="see whether it started"
            )
        with self._engine.lock:
            self._edges = [*(kept for kept in self._edges if kept.failure is None), edge]
        return edge

    def close(self) -> None:
        with self._engine.lock:
            if self._closed.is_set():
                return
            self._closed.set()
            edges = [*self._edges, *self._door.edges_of_rank.values()]
            self._door.close()
            for opened in self._dialing:
                with contextlib.suppress(OSError):
                    opened.shutdown(socket.SHUT_RDWR)
            self._engine.tell()
        for edge in edges:
            edge.close()
        self._engine.close()

    def _await(self, peer: int, deadline_s: float) -> TcpTransport | None:
        """Return the edge that `peer` dials, once it has."""
        edges, closed = self._door.edges_of_rank, self._closed.is_set
        self._engine.wait_until(lambda: peer in edges or closed(), deadline_s - time.monotonic())
        with self._engine.lock:
            return None if closed() else edges.pop(peer, None)

    def _dial(self, peer: int, address: str, deadline_s: float) -> TcpTransport | None:
        where = parse_address(address)
        while not self._closed.is_set() and time.monotonic() < deadline_s:
            with contextlib.ExitStack() as on_failure:
                try:
                    streams = self._approach(peer, where, deadline_s, on_failure)
                except OSError:  # nobody listens yet, or the way there is cut
                    self._closed.wait(min(_PAUSE_S, max(deadline_s - time.monotonic(), 0.0)))
                    continue
                except ProtocolError as error:
                    raise ProtocolError(
                        f"rank {peer} at {address}: {error.fact}", value=error.value, fix=error.fix
                    ) from None
                with self._engine.lock:
                    self._dialing.clear()
                    if self._closed.is_set():
                        return None
                    on_failure.pop_all()
                    return build_edge(self._engine, streams, peer=peer, options=self._options)
        return None

    def _approach(
        self, peer: int, where: tuple[str, int], deadline_s: float, on_failure: contextlib.ExitStack
    ) -> list[tuple[socket.socket, Bond]]:
        """Return the streams of an edge whose other end has proven itself; word by word, for all streams at once."""
        sockets = [self._connect(where, deadline_s, on_failure)]
        near = stays_on_host(sockets[0])
        num_streams = 1 if near else self._options.num_streams_afar
        sockets += [self._connect(where, deadline_s, on_failure) for _ in range(num_streams - 1)]
        edge = secrets.token_bytes(16)
        talks = [
            Dialing(
                self._options,
                rank=self.rank,
                peer=peer,
                edge=edge,
                stream=stream,
                num_streams=num_streams,
                near=near,
            )
            for stream in range(num_streams)
        ]
        for opened, talk in zip(sockets, talks, strict=True):
            opened.sendall(talk.approach)
        for opened, talk in zip(sockets, talks, strict=True):
            opened.sendall(talk.answer(_hear(opened, deadline_s)))
        bonds = [talk.end(_hear(opened, deadline_s)) for opened, talk in zip(sockets, talks, strict=True)]
        for opened in sockets:
            make_lively(opened, self._options)
        return list(zip(sockets, bonds, strict=True))

    def _connect(self, where: tuple[str, int], deadline_s: float, on_failure: contextlib.ExitStack) -> socket.socket:
        opened = socket.create_connection(where, timeout=max(deadline_s - time.monotonic(), 1e-3))
        on_failure.callback(self._hang_up, opened)
        with self._engine.lock:
            if self._closed.is_set():
                raise ConnectionAbortedError
            self._dialing.add(opened)
        return opened

    def _hang_up(self, opened: socket.socket) -> None:
        with self._engine.lock:
            self._dialing.discard(opened)
        opened.close()


def _hear(opened: socket.socket, deadline_s: float) -> bytes:
    """Return the next word; raises OSError where none comes in time."""
    return _exactly(opened, length_of(_exactly(opened, LENGTH_BYTES, deadline_s)), deadline_s)


def _exactly(opened: socket.socket, size_bytes: int, deadline_s: float) -> bytes:
    got = b""
    while len(got) < size_bytes:
        opened.settimeout(max(deadline_s - time.monotonic(), 1e-3))
        more = opened.recv(size_bytes - len(got))
        if not more:
            raise ConnectionResetError
        got += more
    return got
