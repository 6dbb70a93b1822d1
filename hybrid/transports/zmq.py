"""The ZeroMQ transport: ranks are processes, of one host (ipc) or of several (tcp).

A node has one door (a ROUTER socket): who knocks with the job's token is told where the edge's own socket
listens. The lower rank knocks and dials. May import only `errors`, `wire`, zmq and this folder.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import final

import zmq

from hybrid.errors import CommTimeout, MachineError, PeerLost, ProtocolError
from hybrid.transports.base import DEFAULT_WINDOW_BYTES, Transport, TransportNode
from hybrid.transports.zmq_edge import ZmqTransport
from hybrid.transports.zmq_engine import Engine
from hybrid.transports.zmq_memory import keep_freed_memory
from hybrid.transports.zmq_socket import Context, ZmqOptions, bind, fd_of, open_edge_socket, open_socket
from hybrid.wire import PROTOCOL_VERSION, Hello, Refusal, Welcome, decode_header, encode_header

_LOG = logging.getLogger(__name__)
_MAX_HELLO_BYTES = 4096
_ANSWER_LINGER_MS = 200
_ATTEMPT_S = 2.0
"""Who was welcomed but met nobody on the edge's socket within this knocks again."""


def open_tcp_node(
    rank: int, *, host: str = "127.0.0.1", port: int = 0, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES
) -> ZmqNode:
    """Return a node that listens on `host`; the token and all traffic travel in the clear."""
    return ZmqNode(rank, ZmqOptions(medium="tcp", host=host, port=port, token=token, window_bytes=window_bytes))


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
        self._edges: list[ZmqTransport] = []
        self._closed = False
        try:
            self._door = _Door(self._context, self._engine, rank, options)
        except BaseException:
            self._context.destroy(0)
            raise
        self.address = self._door.address
        with self._engine.lock:
            self._engine.add(self._door)

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
        while time.monotonic() < deadline_s:
            welcome = self._knock(peer, address, deadline_s)
            if welcome is None:
                return None
            with self._engine.lock:
                if self._closed:
                    return None
                socket = open_edge_socket(self._context, self._options)
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

    def _knock(self, peer: int, address: str, deadline_s: float) -> Welcome | None:
        knock = _Knock(self._context, address, self._options)
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


@final
class _Door:
    """Where peers knock: refuses strangers, and opens an edge's socket for each peer that it welcomes."""

    def __init__(self, context: Context, engine: Engine, rank: int, options: ZmqOptions) -> None:
        self.refused: deque[str] = deque(maxlen=16)
        self.edges_of_rank: dict[int, ZmqTransport] = {}
        """Edges that a peer has dialed and this rank has not opened yet."""
        self._context, self._engine, self._rank, self._options = context, engine, rank, options
        self._socket = open_socket(context, zmq.ROUTER, options)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_HELLO_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, 16)
        self._socket.setsockopt(zmq.LINGER, _ANSWER_LINGER_MS)
        self.address = bind(self._socket, options, port=options.port)
        self.fds: tuple[int, ...] = (fd_of(self._socket),)
        self._readable = True

    def ready(self, fd: int) -> None:
        self._readable = True

    def move(self, enough: Callable[[], bool]) -> bool:
        moved = False
        while self._readable and not (moved and enough()):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                self._readable = False
                break
            moved = True
            try:
                self._welcome(identity, frames)
            except (ProtocolError, MachineError) as refusal:
                self.refused.append(refusal.fact)
                _LOG.warning("rank %d refused who knocked: %s", self._rank, refusal.fact)
                self._answer(identity, Refusal(refusal.fact))
        return moved

    def close(self) -> None:
        self._readable = False
        if not self._socket.closed:
            self._socket.close()

    def _welcome(self, identity: bytes, frames: list[bytes]) -> None:
        hello = decode_header(frames[0] if len(frames) == 1 else b"")
        if not isinstance(hello, Hello):
            raise ProtocolError(f"a {type(hello).__name__} where a Hello belongs")
        if hello.version != PROTOCOL_VERSION:
            raise ProtocolError(f"protocol version {hello.version} where {PROTOCOL_VERSION} is spoken")
        if not hmac.compare_digest(hello.token, self._options.token):
            raise ProtocolError("another job's token")
        if hello.to_rank != self._rank or hello.rank >= self._rank:
            raise ProtocolError(f"rank {hello.rank} asks for rank {hello.to_rank} and this is rank {self._rank}")
        earlier = self.edges_of_rank.pop(hello.rank, None)
        if earlier is not None:
            earlier.abandon()
        socket = open_edge_socket(self._context, self._options)
        try:
            endpoint = bind(socket, self._options)
        except MachineError:
            socket.close()
            raise
        secret = secrets.token_bytes(16)
        edge = ZmqTransport(self._engine, socket, peer=hello.rank, secret=secret, options=self._options)
        self._engine.add(edge)
        self.edges_of_rank[hello.rank] = edge
        self._answer(identity, Welcome(endpoint, secret))

    def _answer(self, identity: bytes, answer: Welcome | Refusal) -> None:
        # A ROUTER drops what is addressed to someone who has left; it never blocks.
        self._socket.send_multipart([identity, encode_header(answer)], zmq.NOBLOCK)
        self._readable = True


@final
class _Knock:
    """One question at a peer's door."""

    def __init__(self, context: Context, address: str, options: ZmqOptions) -> None:
        self.answer: object = None
        self._socket = open_socket(context, zmq.DEALER, options)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_HELLO_BYTES)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ProtocolError(f"no address of this medium: {error.strerror}", value=address) from None
        self.fds: tuple[int, ...] = (fd_of(self._socket),)

    def say(self, hello: Hello) -> None:
        self._socket.send(encode_header(hello), zmq.NOBLOCK)

    def ready(self, fd: int) -> None:
        """Nothing to note: there is one socket, and one message to come."""

    def move(self, enough: Callable[[], bool]) -> bool:
        if self.answer is not None:
            return False
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            self.answer = decode_header(frames[0])
        except ProtocolError as error:
            self.answer = Refusal(error.fact)
        return True

    def close(self) -> None:
        self._socket.close()
