"""Where peers of a ZeroMQ node knock, and how a node knocks at a peer's: a question, an answer, strangers refused.

Never blocks; everything runs under the engine's lock. May import only `errors`, `wire`, zmq and this folder.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections import deque
from collections.abc import Callable
from typing import final

import zmq

from hybrid.errors import MachineError, ProtocolError
from hybrid.transports.zmq_edge import ZmqTransport
from hybrid.transports.zmq_engine import Engine
from hybrid.transports.zmq_gate import Gate, Keys, with_key
from hybrid.transports.zmq_socket import Context, Socket, ZmqOptions, bind, fd_of, open_edge_socket, open_socket
from hybrid.wire import PROTOCOL_VERSION, Hello, Refusal, Welcome, decode_header, encode_header

_LOG = logging.getLogger(__name__)
_MAX_HELLO_BYTES = 4096
_ANSWER_LINGER_MS = 200
_LOUD = 16
"""So many refusals are logged one by one; after that only each one whose number is a power of two."""
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


@final
class Door:
    """Where peers knock: refuses strangers, and opens an edge's socket for each peer that it welcomes."""

    def __init__(self, context: Context, engine: Engine, rank: int, options: ZmqOptions, keys: Keys) -> None:
        self.refused: deque[str] = deque(maxlen=16)
        self.edges_of_rank: dict[int, ZmqTransport] = {}
        """Edges that a peer has dialed and this rank has not opened yet."""
        self._context, self._engine, self._rank, self._options = context, engine, rank, options
        self._num_refused = 0
        self.gate = Gate(context, keys, self.note, encrypted=options.encrypted)
        self._socket = open_socket(context, zmq.ROUTER, options)
        self.gate.guard(self._socket, keys.door_word, keep=True)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_HELLO_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, 16)
        self._socket.setsockopt(zmq.LINGER, _ANSWER_LINGER_MS)
        endpoint = bind(self._socket, options, port=options.port)
        self.address = with_key(endpoint, keys.own_public) if options.encrypted else endpoint
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
                self.note(refusal.fact)
                self._answer(identity, Refusal(refusal.fact))
        return moved

    def close(self) -> None:
        self._readable = False
        self.gate.close()
        if not self._socket.closed:
            self._socket.close()

    def note(self, reason: str) -> None:
        """List who was refused."""
        self.refused.append(reason)
        self._num_refused += 1
        if self._num_refused <= _LOUD or not self._num_refused & (self._num_refused - 1):
            _LOG.warning("rank %d refused who knocked (%d so far): %s", self._rank, self._num_refused, reason)

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
        secret = secrets.token_bytes(16)
        socket = open_edge_socket(self._context, self._options)
        self.gate.guard(socket, secret)
        try:
            endpoint = bind(socket, self._options)
        except MachineError:
            socket.close()
            raise
        edge = ZmqTransport(self._engine, socket, peer=hello.rank, secret=secret, options=self._options)
        self._engine.add(edge)
        self.edges_of_rank[hello.rank] = edge
        self._answer(identity, Welcome(endpoint, secret))

    def _answer(self, identity: bytes, answer: Welcome | Refusal) -> None:
        # A ROUTER drops what is addressed to someone who has left; it never blocks.
        self._socket.send_multipart([identity, encode_header(answer)], zmq.NOBLOCK)
        self._readable = True


@final
class Knock:
    """One question at a peer's door."""

    def __init__(self, context: Context, endpoint: str, options: ZmqOptions, secure: Callable[[Socket], None]) -> None:
        self.answer: object = None
        self._socket = open_socket(context, zmq.DEALER, options)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_HELLO_BYTES)
        self._events: Socket | None = None
        try:
            secure(self._socket)
            self._events = self._socket.get_monitor_socket(_REFUSED)
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ProtocolError(f"no address of this medium: {error.strerror}", value=endpoint) from None
        self.fds: tuple[int, ...] = (fd_of(self._socket), fd_of(self._events))

    def say(self, hello: Hello) -> None:
        self._socket.send(encode_header(hello), zmq.NOBLOCK)

    def ready(self, fd: int) -> None:
        """Nothing to note: there are two sockets, and one message to come."""

    def move(self, enough: Callable[[], bool]) -> bool:
        if self.answer is not None:
            return False
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return self._look_for_refusal()
        try:
            self.answer = decode_header(frames[0])
        except ProtocolError as error:
            self.answer = Refusal(error.fact)
        return True

    def close(self) -> None:
        if self._events is not None:
            self._socket.disable_monitor()
            self._events.close(0)
        self._socket.close()

    def _look_for_refusal(self) -> bool:
        assert self._events is not None
        try:
            self._events.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.answer = Refusal("our key or password is not of its job")
        return True
