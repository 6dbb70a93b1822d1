"""The Transport seam: bytes between two ranks, over one edge.

No torch: a buffer is anything that `memoryview` takes. May import only `errors`, `config` and `wire`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

Buffer: TypeAlias = "memoryview | bytes | bytearray"


class Pending(ABC):
    """A send or receive under way."""

    @abstractmethod
    def done(self) -> bool:
        """Return whether `wait` would return at once; never blocks."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Block until the operation has ended.

        After a send's wait its buffers may be overwritten; after a receive's wait
        the target buffers hold the message. Waiting again is allowed and returns at once.

        Raises:
            CommTimeout: nothing happened for `timeout_s`; the operation stays under way.
            PeerLost: the peer has gone and the message was not (wholly) received.
            ProtocolError: the message does not fit the receive that was posted for it.
        """


class Transport(ABC):
    """One end of an edge to one peer; full duplex.

    Contract (every clause is checked by `hybrid.testing.transport_kit`):

    1. *Whole*: a message arrives with the same number of buffers, sizes and bytes as sent, or not at all.
    2. *Once*: no message is lost, doubled, cut or invented while both ends are open.
    3. *Ordered*: messages of one tag are received in the order in which they were sent.
    4. *Tagged*: a receive takes only messages of its tag; receives of different tags may be
       posted and waited for in any order.
    5. *Posted ahead*: `recv` returns at once, before the message was sent; it is filled when the message comes.
    6. *Send does not wait for the receiver* until `window_bytes` of unreceived messages stand between
       the two; beyond it the send's `wait` blocks (back-pressure), and memory stays bounded.
    7. *Fits*: a message that does not fit the posted buffers raises ProtocolError and writes past no end;
       a buffer of zero bytes and a message of zero buffers are messages too.
    8. *Bounded waits*: every wait ends within its time-out with CommTimeout; the operation can be waited for again.
    9. *Loss is told*: when the peer is gone, waits raise PeerLost within seconds; what was sent before
       an orderly `close` is still delivered first.
    10. *Close* is idempotent, ends every pending operation with PeerLost, and frees threads, sockets and segments.
    """

    peer: int
    """The rank at the other end."""

    @abstractmethod
    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        """Start sending one message; the buffers must stay unchanged until the returned wait has ended.

        Raises:
            PeerLost: the peer is already known to be gone, or this end is closed.
        """

    @abstractmethod
    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        """Post a receive of the next message tagged `tag` into writable, contiguous byte buffers."""

    @abstractmethod
    def close(self) -> None:
        """Leave the edge; see clause 10."""


class TransportNode(ABC):
    """A rank's place on a medium: listens once, then opens one Transport for each peer.

    How two ranks meet: each opens a node and publishes `address`; once the addresses are known
    (the coordinator hands them round) *both* ends call `open` with the other's rank and address.
    """

    rank: int
    address: str
    """Where peers reach this rank, in this medium's own syntax, for example `tcp://10.0.0.1:40123`."""

    @abstractmethod
    def open(self, peer: int, address: str, *, timeout_s: float) -> Transport:
        """Return this rank's end of the edge to `peer`; both ends must call it.

        Raises:
            CommTimeout: the peer did not answer within `timeout_s`.
        """

    @abstractmethod
    def close(self) -> None:
        """Close every transport that this node opened; idempotent."""
