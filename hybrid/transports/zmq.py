"""The ZeroMQ transport: ranks are processes, of one host (ipc) or of several (tcp).

A node has one door (a ROUTER socket): who knocks with the job's token is told where the edge's own socket
listens. The lower rank knocks and dials. May import only `errors`, `wire`, zmq and this folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import final

import zmq

from hybrid.errors import CommTimeout, PeerLost, ProtocolError
from hybrid.transports.base import DEFAULT_WINDOW_BYTES, Transport, TransportNode
from hybrid.transports.zmq_door import Door, Knock
from hybrid.transports.zmq_edge import ZmqTransport
from hybrid.transports.zmq_engine import Engine
from hybrid.transports.zmq_gate import make_keys, split_key
from hybrid.transports.zmq_memory import keep_freed_memory
from hybrid.transports.zmq_socket import Context, Socket, ZmqOptions, open_edge_socket
from hybrid.wire import PROTOCOL_VERSION, Hello, Refusal, Welcome

_ATTEMPT_S = 2.0
"""Who was welcomed but met nobody on the edge's socket within this knocks again."""


def open_tcp_node(
    rank: int, *, host: str = "127.0.0.1", port: int = 0, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES
) -> ZmqNode:
    """Return a node that listens on `host`; encrypted (CURVE) unless that is a loopback address of this host."""
    return ZmqNode(rank, ZmqOptions(medium="tcp", host=host, port=port, token=token, window_bytes=window_bytes))


def open_curve_node(
    rank: int, *, host: str = "127.0.0.1", port: int = 0, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES
) -> ZmqNode:
    """Return a node whose every edge is encrypted (CURVE), also inside one host."""
    return ZmqNode(
        rank,
        ZmqOptions(medium="tcp", host=host, port=port, token=token, window_bytes=window_bytes, must_encrypt=True),
    )


def open_ipc_node(
    rank: int, *, host: str = "127.0.0.1", port: int = 0, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES
) -> ZmqNode:
    """Return a node for ranks of this host and this user; `host` and `port` are not used."""
    del host, port
    return ZmqNode(rank, ZmqOptions(medium="ipc", token=token, window_bytes=window_bytes))


@final
class ZmqNode(TransportNode):
    """See `TransportNode`. Any thread may call any method."""

    def __init__(self, rank: int, options: ZmqOptions) -> None:
        self.rank, self._options = rank, options
        if options.keep_freed_memory:
            keep_freed_memory()
        self._context: Context = zmq.Context()
        self._engine = Engine()
        self._keys = make_keys(options.token)
        self._edges: list[ZmqTransport] = []
        self._closed = False
        try:
            self._door = Door(self._context, self._engine, rank, options, self._keys)
        except BaseException:
            self._context.destroy(0)
            raise
        self.address = self._door.address
        with self._engine.lock:
            self._engine.add(self._door)
            self._engine.add(self._door.gate)

    @property
    def refused(self) -> tuple[str, ...]:
        return tuple(self._door.refused)

    def open(self, peer: int, address: str, *, timeout_s: float) -> Transport:
        assert peer != self.rank, "an edge joins two ranks"
        deadline_s = time.monotonic() + timeout_s
        edge: ZmqTransport | None = None
        try:
            if not self._closed:
                edge = self._dial(peer, address, deadline_s) if self.rank < peer else self._await(peer, deadline_s)
        except zmq.ZMQError:
            # A socket of a context that another thread is closing.
            if not self._closed:
                raise
        if edge is None and self._closed:
            raise PeerLost(f"this node was closed before rank {peer} came")
        if edge is None:
            refused = self.refused
            strangers = f"; refused here: {'; '.join(refused)}" if refused else ""
            raise CommTimeout(
                f"rank {peer} at {address} did not come within {timeout_s} s{strangers}", fix="see whether it started"
            )
        with self._engine.lock:
            if self._closed:
                # Met while another thread closed the node: an open socket would hold up the context's end.
                edge.abandon()
                raise PeerLost(f"this node was closed when rank {peer} came")
            self._edges = [*(kept for kept in self._edges if kept.failure is None), edge]
        return edge

    def close(self) -> None:
        with self._engine.lock:
            if self._closed:
                return
            self._closed = True
            self._engine.remove(self._door)
            self._engine.remove(self._door.gate)
            edges, self._edges = [*self._edges, *self._door.edges_of_rank.values()], []
            self._door.close()
        for edge in edges:
            edge.close()
        self._engine.close()
        # At once: every socket is closed, and only the door lingers, for the answers to who knocked last.
        self._context.term()

    def _await(self, peer: int, deadline_s: float) -> ZmqTransport | None:
        """Return the edge that `peer` dials, once it has."""
        edges = self._door.edges_of_rank
        self._engine.wait_until(lambda: peer in edges and edges[peer].met, deadline_s - time.monotonic())
        with self._engine.lock:
            return edges.pop(peer) if peer in edges and edges[peer].met else None

    def _dial(self, peer: int, address: str, deadline_s: float) -> ZmqTransport | None:
        """Knock at the peer's door until an edge is met."""
        endpoint, key = split_key(address)
        if key is None and self._options.must_encrypt:
            raise ProtocolError("an address without a key where encryption is demanded", value=address)

        while time.monotonic() < deadline_s:
            welcome = self._knock(peer, endpoint, key, deadline_s)
            if welcome is None:
                return None
            with self._engine.lock:
                if self._closed:
                    return None
                socket = open_edge_socket(self._context, self._options)
                self._keys.secure_dialer(socket, key, welcome.secret)
                edge = ZmqTransport(
                    self._engine,
                    socket,
                    peer=peer,
                    secret=welcome.secret,
                    options=self._options,
                    dial=welcome.endpoint,
                )
                self._engine.add(edge)
            attempt_s = min(deadline_s - time.monotonic(), _ATTEMPT_S)
            self._engine.wait_until(_settled(edge), attempt_s)
            if edge.met:
                return edge
            edge.close()
        return None

    def _knock(self, peer: int, address: str, key: bytes | None, deadline_s: float) -> Welcome | None:
        def secure(opened: Socket) -> None:
            self._keys.secure_dialer(opened, key, self._keys.door_word)

        knock = Knock(self._context, address, self._options, secure)
        hello = Hello(PROTOCOL_VERSION, self.rank, peer, self._options.token)
        with self._engine.lock:
            knock.say(hello)
            self._engine.add(knock)
        try:
            self._engine.wait_until(lambda: knock.answer is not None, deadline_s - time.monotonic())
        finally:
            with self._engine.lock:
                self._engine.remove(knock)
                knock.close()
        match knock.answer:
            case None:
                return None
            case Welcome() as welcome:
                return welcome
            case Refusal(reason):
                raise ProtocolError(
                    f"rank {peer} at {address} refuses: {reason}", fix="start every rank from the same job and release"
                )
            case other:
                raise ProtocolError(f"what listens at {address} is no rank of this job", value=type(other).__name__)


def _settled(edge: ZmqTransport) -> Callable[[], bool]:
    return lambda: edge.met or edge.failure is not None
