"""The reference transport: ranks are threads of one process. Slow is fine here; readable is the point.

One lock an edge, one `_Lane` for each direction. No sockets. May import only `errors`, `wire` and `transports.base`.
"""

from __future__ import annotations

import hmac
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import final

from hybrid.errors import CommError, CommTimeout, PeerLost, ProtocolError
from hybrid.transports.base import (
    DEFAULT_WINDOW_BYTES,
    MESSAGE_OVERHEAD_BYTES,
    Buffer,
    Pending,
    Transport,
    TransportNode,
    as_bytes,
    as_targets,
    misfit,
    sizes_of,
)
from hybrid.wire import MAX_FRAME_BYTES, MessageHeader, encode_header


@final
@dataclass(slots=True, eq=False)
class _Operation(Pending):
    """A send (its buffers are the message) or a receive (its buffers are the target)."""

    tag: str
    buffers: tuple[memoryview, ...]
    peer: int
    changed: threading.Condition
    ended: bool = False
    failure: CommError | None = None

    @property
    def weight(self) -> int:
        return sum(sizes_of(self.buffers)) + MESSAGE_OVERHEAD_BYTES

    def end(self, failure: CommError | None = None) -> None:
        """Call under the edge's lock; what has ended does not end again."""
        if not self.ended:
            self.ended, self.failure = True, failure
            self.changed.notify_all()

    def done(self) -> bool:
        return self.ended

    def wait(self, timeout_s: float) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.ended, timeout_s):
                raise CommTimeout(
                    f"rank {self.peer} was silent for {timeout_s} s over tag {self.tag!r}",
                    fix="see whether it still runs",
                )
        if self.failure is not None:
            raise copy(self.failure)


@dataclass(slots=True)
class _Lane:
    """One direction of an edge; every method is called under the edge's lock.

    A message is in one of three places: delivered to a posted receive; `held`, copied, inside the window;
    or `blocked`, still in the sender's own buffers, beyond it.
    """

    window_bytes: int
    posted: list[_Operation] = field(default_factory=list)
    held: deque[_Operation] = field(default_factory=deque)
    blocked: deque[_Operation] = field(default_factory=deque)
    held_bytes: int = 0

    def send(self, message: _Operation) -> None:
        receive = next((r for r in self.posted if r.tag == message.tag), None)
        if receive is not None:
            self.posted.remove(receive)
            _deliver(message, receive)
        else:
            self.blocked.append(message)
            self._admit()

    def post(self, receive: _Operation) -> None:
        for queue in (self.held, self.blocked):
            message = next((m for m in queue if m.tag == receive.tag), None)
            if message is not None:
                queue.remove(message)
                self.held_bytes -= message.weight if queue is self.held else 0
                _deliver(message, receive)
                self._admit()
                return
        self.posted.append(receive)

    def fail(self, failure: CommError) -> None:
        """End what cannot happen any more; what is held can still be received."""
        for operation in (*self.posted, *self.blocked):
            operation.end(failure)
        self.posted.clear()
        self.blocked.clear()

    def forget(self) -> None:
        """Drop what is held: its receiver has left."""
        self.held.clear()
        self.held_bytes = 0

    def _admit(self) -> None:
        while self.blocked and self.held_bytes + self.blocked[0].weight <= self.window_bytes:
            message = self.blocked.popleft()
            copied = tuple(memoryview(bytes(buffer)) for buffer in message.buffers)
            self.held_bytes += message.weight
            self.held.append(_Operation(message.tag, copied, message.peer, message.changed))
            message.end()


def _deliver(message: _Operation, receive: _Operation) -> None:
    message.end()
    if sizes_of(message.buffers) != sizes_of(receive.buffers):
        receive.end(misfit(receive.peer, receive.tag, sizes_of(message.buffers), sizes_of(receive.buffers)))
        return
    for source, target in zip(message.buffers, receive.buffers, strict=True):
        if source.nbytes:
            target[:] = source
    receive.end()


@final
class InprocTransport(Transport):
    """See `Transport`."""

    def __init__(self, peer: int, changed: threading.Condition, out: _Lane, into: _Lane) -> None:
        self.peer, self.window_bytes = peer, out.window_bytes
        self._changed, self._out, self._in = changed, out, into
        self._failure: CommError | None = None
        self._other: InprocTransport | None = None

    def join(self, other: InprocTransport) -> None:
        """Make `other` the other end; called once on each end, before either is used."""
        self._other = other

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        message = _Operation(tag, tuple(as_bytes(b) for b in buffers), self.peer, self._changed)
        encode_header(MessageHeader(0, tag, sizes_of(message.buffers), MAX_FRAME_BYTES))  # the limits of every medium
        with self._changed:
            if self._failure is not None:
                raise copy(self._failure)
            self._out.send(message)
        return message

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        receive = _Operation(tag, as_targets(into), self.peer, self._changed)
        with self._changed:
            self._in.post(receive)
            if self._failure is not None:
                self._in.fail(self._failure)
        return receive

    def close(self) -> None:
        with self._changed:
            self._leave(PeerLost(f"the edge to rank {self.peer} is closed at this end"))
            self._in.forget()
            assert self._other is not None
            gone = PeerLost(f"rank {self._other.peer} has closed the edge", fix="rebuild the edge or the group")
            self._other._leave(gone)

    def _leave(self, failure: CommError) -> None:
        if self._failure is None:
            self._failure = failure
            self._out.fail(failure)
            self._in.fail(failure)


def open_inproc_node(
    rank: int, *, host: str = "", port: int = 0, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES
) -> InprocNode:
    """Return a node for ranks of this process; `host` and `port` are not used."""
    del host, port
    return InprocNode(rank, token=token, window_bytes=window_bytes)


@final
class InprocNode(TransportNode):
    """See `TransportNode`."""

    def __init__(self, rank: int, *, token: bytes = b"", window_bytes: int = DEFAULT_WINDOW_BYTES) -> None:
        self.rank, self.address = rank, f"inproc://{next(_numbers)}"
        self._token, self._window_bytes = token, window_bytes
        self._refused: deque[str] = deque(maxlen=16)
        self._accepted: dict[int, InprocTransport] = {}
        self._opened: list[InprocTransport] = []
        self._closed = False
        with _hub:
            _nodes[self.address] = self
            _hub.notify_all()

    @property
    def refused(self) -> tuple[str, ...]:
        return tuple(self._refused)

    def open(self, peer: int, address: str, *, timeout_s: float) -> Transport:
        assert peer != self.rank, "an edge joins two ranks"
        deadline_s = time.monotonic() + timeout_s
        with _hub:
            # The lower rank makes both ends and leaves one at the other's node.
            if self.rank < peer:
                self._wait_until(lambda: address in _nodes, peer, deadline_s, timeout_s)
                end = _nodes[address]._accept(self, peer)
            else:
                self._wait_until(lambda: peer in self._accepted, peer, deadline_s, timeout_s)
                end = self._accepted.pop(peer)
            self._opened.append(end)
            return end

    def close(self) -> None:
        with _hub:
            self._closed = True
            _hub.notify_all()
            _nodes.pop(self.address, None)
            ends, self._opened = [*self._opened, *self._accepted.values()], []
            self._accepted.clear()
        for end in ends:
            end.close()

    def _accept(self, dialer: InprocNode, dialed_rank: int) -> InprocTransport:
        """Return the dialer's end of a new edge; called under the hub's lock."""
        reason = None
        if not hmac.compare_digest(dialer._token, self._token):
            reason = "another job's token"
        elif dialed_rank != self.rank:
            reason = f"rank {dialed_rank} was asked for and this is rank {self.rank}"
        if reason is not None:
            self._refused.append(f"rank {dialer.rank} at {dialer.address}: {reason}")
            raise ProtocolError(f"rank {dialed_rank} at {self.address} refuses: {reason}")
        changed = threading.Condition()
        up, down = _Lane(self._window_bytes), _Lane(dialer._window_bytes)
        near, far = InprocTransport(self.rank, changed, up, down), InprocTransport(dialer.rank, changed, down, up)
        near.join(far)
        far.join(near)
        self._accepted[dialer.rank] = far
        _hub.notify_all()
        return near

    def _wait_until(self, met: Callable[[], bool], peer: int, deadline_s: float, timeout_s: float) -> None:
        was_met = _hub.wait_for(lambda: self._closed or met(), deadline_s - time.monotonic())
        if self._closed:
            raise PeerLost(f"this node was closed before rank {peer} came")
        if not was_met:
            strangers = f"; refused meanwhile: {'; '.join(self._refused)}" if self._refused else ""
            raise CommTimeout(f"rank {peer} did not come within {timeout_s} s{strangers}", fix="see whether it started")


_hub = threading.Condition()
_nodes: dict[str, InprocNode] = {}
_numbers = itertools.count(1)
